"""Splits by prompt (C56): no answer to a training prompt is ever held out, and near-equal prompts count as one.

A prompt's side follows from a hash of how its first message begins, so it does not depend on the file, the order, the
format or the stage it comes from, and a conversation at different lengths, or one long post with different questions,
falls on one side. InstructGPT likewise removed prompts that share a long common prefix and split by user (Ouyang et
al. 2022, section 3.2).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fledge.data.feedback import FeedbackExample, prompt_of
from fledge.data.filters import DEFAULT, side
from fledge.errors import DataError
from fledge.types import Conversation

ExampleT = TypeVar("ExampleT", bound=FeedbackExample)
PREFIX_CHARS = 200  # prompts that agree in this many characters are of one family
_ROLE, _MESSAGE = "\x01", "\x00"  # after a role and between messages; texts of formats hold no NUL


@dataclass(frozen=True)
class Sides(Generic[ExampleT]):
    """`num_prompts` and `num_families` are distinct ones over both sides."""

    train: tuple[ExampleT, ...]
    validation: tuple[ExampleT, ...]
    num_prompts: int
    num_families: int


def prompt_text(prompt: Conversation) -> str:
    """What a prompt says, by which it is known: its messages with their roles, without regard to Unicode form, letter
    case and white space."""
    return _MESSAGE.join(f"{message.role}{_ROLE}{_plain(message.text)}" for message in prompt.messages)


def family_text(prompt: Conversation, prefix_chars: int = PREFIX_CHARS) -> str:
    """How the first message that is not the system's begins."""
    said = [message.text for message in prompt.messages if message.role != "system"]
    return _plain(said[0])[:prefix_chars] if said else prompt_text(prompt)


def split_by_prompt(
    examples: Iterable[ExampleT], *, share: float = DEFAULT.validation_share, prefix_chars: int = PREFIX_CHARS
) -> Sides[ExampleT]:
    """About `share` of the prompt families held out, whole; the order is kept on each side.

    A family are the prompts whose first message (not the system's) begins with the same `prefix_chars` characters;
    further data never move a prompt to the other side.
    Raises `DataError` if a share outside of (0, 1) or a prefix shorter than 1 is asked for.
    """
    if not 0 < share < 1 or prefix_chars < 1:
        raise DataError(f"expected a share in (0, 1) and a prefix of 1 or more, got {share} and {prefix_chars}")
    train: list[ExampleT] = []
    validation: list[ExampleT] = []
    prompts: set[bytes] = set()
    families: set[bytes] = set()
    for example in examples:
        prompt = prompt_of(example)
        family = _hash(family_text(prompt, prefix_chars))
        prompts.add(_hash(prompt_text(prompt)))
        families.add(family)
        (validation if side(family, share) == "validation" else train).append(example)
    return Sides(tuple(train), tuple(validation), len(prompts), len(families))


def require_disjoint(
    train: Iterable[FeedbackExample],
    held_out: Iterable[FeedbackExample],
    *,
    names: tuple[str, str] = ("the training data", "the held-out data"),
) -> None:
    """`DataError` naming the first prompt of `held_out` that `train` answers as well."""
    known = {_hash(prompt_text(prompt_of(example))): example.provenance for example in train}
    for example in held_out:
        origin = known.get(_hash(prompt_text(prompt_of(example))))
        if origin is not None:
            mine = example.provenance
            raise DataError(
                f"{names[1]} ({mine.source}, {mine.id}) has a prompt of {names[0]} ({origin.source}, {origin.id}): "
                "the two must share none; split by prompt, or drop it from one of them"
            )


def without_common_prefixes(
    examples: Sequence[ExampleT], *, prefix_chars: int = PREFIX_CHARS, per_family: int = 1
) -> tuple[list[ExampleT], int]:
    """(the first `per_family` prompts of every family, how many examples were dropped).

    Prompts are of one family here when they agree in their first `prefix_chars` characters from the first message on,
    or when one goes on where another ends (the same conversation, longer). All examples of a kept prompt are kept.
    """
    texts = [prompt_text(prompt_of(example)) for example in examples]
    family_of = _families(sorted(set(texts)), prefix_chars)
    kept_of: dict[int, list[str]] = {}
    kept = []
    for example, text in zip(examples, texts, strict=True):
        members = kept_of.setdefault(family_of[text], [])
        if text not in members and len(members) < per_family:
            members.append(text)
        if text in members:
            kept.append(example)
    return kept, len(examples) - len(kept)


def _families(texts: Sequence[str], prefix_chars: int) -> dict[str, int]:
    """The family of each of some sorted texts; what has a beginning in common stands side by side."""
    family_of: dict[str, int] = {}
    family, root = -1, None
    for text in texts:
        is_longer = root is not None and text.startswith(root + _MESSAGE)
        is_alike = root is not None and len(text) >= prefix_chars and text[:prefix_chars] == root[:prefix_chars]
        if not is_longer and not is_alike:
            family, root = family + 1, text
        family_of[text] = family
    return family_of


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
