"""The corpus of a run: chosen sources, filtered, split, written down; then, once there is a tokenizer, shards.

`write_corpus` reads the sources once and leaves one JSONL file a side (each line `{"text"}` or `{"messages"}` with
source, id and licence) and a manifest with the yield of every filter. Everything later (tokenizer, shards, chats)
reads that folder, so no two stages can disagree about which document is held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fledge.data import catalogue
from fledge.data.atomic import check_size, new_folder, read_manifest
from fledge.data.filters import FilterConfig, Sieve
from fledge.data.folder import path_examples
from fledge.data.jsonl import example_to_json, record_example
from fledge.data.package import file_sha256
from fledge.data.reading import Drops, Example, Split
from fledge.data.shards import Encoder, Shards, write_shards
from fledge.errors import DataError
from fledge.types import ChatExample, TextExample

KIND = "fledge corpus"
SIDES: tuple[Split, Split] = ("train", "validation")


@dataclass(frozen=True)
class Ingredient:
    """A source of the corpus: one of the catalogue by `name`, or, with `path`, the user's own folder or file.

    `limit` bounds the examples read, None: all. With `skip_bad` files and lines that cannot be used are counted
    and left out instead of refused.
    """

    name: str
    path: str | None = None
    limit: int | None = None
    skip_bad: bool = False


def write_corpus(
    ingredients: Sequence[Ingredient],
    folder: Path,
    *,
    cache: Path,
    filters: FilterConfig | None = None,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> Corpus:
    """Read, filter and split the ingredients into the new `folder`. `progress(source, documents so far)` is called now
    and then.

    Earlier ingredients win where two hold the same text. Raises `DataError` for an unknown source, input that cannot be
    used, an ingredient that yields nothing, a full disk, or a `folder` that exists.
    """
    config = filters or FilterConfig()
    sieve = Sieve(config)
    drops = {ingredient.name: Drops() for ingredient in ingredients}
    if len(drops) < len(ingredients):
        raise DataError(
            f"two sources share a name in {', '.join(i.name for i in ingredients)}: give each its own"
        )
    with new_folder(folder) as workplace:
        with ExitStack() as stack:
            files = {
                s: stack.enter_context((workplace / f"{s}.jsonl").open("w", encoding="utf-8")) for s in SIDES
            }
            for ingredient in ingredients:
                examples = read_ingredient(ingredient, cache=cache, seed=seed, drops=drops[ingredient.name])
                for number, (side, example) in enumerate(sieve.sift(ingredient.name, examples)):
                    files[side].write(json.dumps(example_to_json(example), ensure_ascii=False) + "\n")
                    if progress and number % 1000 == 0:
                        progress(ingredient.name, number)
                _refuse_nothing(ingredient, sieve, drops[ingredient.name])
        _write_manifest(workplace, sieve, drops)
    return Corpus.open(folder)


def read_ingredient(ingredient: Ingredient, *, cache: Path, seed: int, drops: Drops) -> Iterator[Example]:
    """The examples of an ingredient, unfiltered, both sides of the split."""
    if ingredient.path is None:
        examples = catalogue.source(ingredient.name).open("all", cache=cache, seed=seed)
    else:
        strictness = drops if ingredient.skip_bad else None
        examples = path_examples(Path(ingredient.path), ingredient.name, drops=drops, bad=strictness)
    return islice(examples, ingredient.limit)


class Corpus:
    """A corpus on disk. `yields[source]` says what was read, kept on each side and dropped, and why."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.yields: dict[str, dict[str, Any]] = manifest["yields"]
        self.sources: tuple[str, ...] = tuple(self.yields)
        self.hash = hashlib.sha256(
            "".join(manifest["files"][s]["sha256"] for s in SIDES).encode()
        ).hexdigest()

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> Corpus:
        """The corpus in `folder`; sizes are always checked, contents too if `verify`; `DataError` otherwise."""
        manifest = read_manifest(folder, KIND)
        for side in SIDES:
            path = folder / f"{side}.jsonl"
            check_size(path, manifest["files"][side]["bytes"])
            if verify and file_sha256(path) != manifest["files"][side]["sha256"]:
                raise DataError(f"{path} was altered: its sha256 differs from the manifest's; build it again")
        return cls(folder, manifest)

    def examples(self, side: Split, sources: Iterable[str] | None = None) -> Iterator[Example]:
        """The examples of a side, in the order they were written; of all sources, or of those named."""
        wanted = self._known(sources)
        for each in SIDES if side == "all" else (side,):
            with (self.folder / f"{each}.jsonl").open(encoding="utf-8") as file:
                for line in file:
                    record = json.loads(line)
                    if record["source"] in wanted:
                        yield record_example(record, record["source"], record["id"], record["licence"])

    def texts(self, side: Split, sources: Iterable[str] | None = None) -> Iterator[TextExample]:
        """The documents among `examples`."""
        return (example for example in self.examples(side, sources) if isinstance(example, TextExample))

    def chats(self, side: Split, sources: Iterable[str] | None = None) -> Iterator[ChatExample]:
        """The conversations among `examples`."""
        return (example for example in self.examples(side, sources) if isinstance(example, ChatExample))

    def _known(self, sources: Iterable[str] | None) -> set[str]:
        wanted = set(self.sources if sources is None else sources)
        if unknown := wanted - set(self.sources):
            raise DataError(
                f"{self.folder} holds no source '{min(unknown)}': it has {', '.join(self.sources)}"
            )
        return wanted


def tokenizer_sample(corpus: Corpus, max_chars: int, seed: int) -> Iterator[str]:
    """Training texts for a tokenizer: the train side of every source, chats as their messages, at most `max_chars`.

    When there is more, each text is kept with the same chance, so sources keep their proportions.
    """
    total = sum(account["kept_bytes"]["train"] for account in corpus.yields.values())
    chance = min(1.0, max_chars / max(total, 1))
    rng = np.random.default_rng(seed)
    for example in corpus.examples("train"):
        if chance < 1.0 and rng.random() >= chance:
            continue
        if isinstance(example, TextExample):
            yield example.text
        else:
            yield from (message.text for message in example.conversation.messages)


def tokenize_corpus(corpus: Corpus, encoder: Encoder, folder: Path) -> dict[Split, Shards]:
    """Shards of the documents of both sides, in `folder`/train and `folder`/validation.

    A side that is there already, finished and made with this tokenizer is opened, not made again. Raises `DataError` if
    a side has no document at all.
    """
    made: dict[Split, Shards] = {}
    for side in SIDES:
        place = folder / side
        if place.exists():
            made[side] = Shards.open(place)
            if made[side].tokenizer_hash != encoder.hash:
                raise DataError(f"{place} was made with another tokenizer: remove it or name another folder")
        else:
            made[side] = write_shards(corpus.texts(side), encoder, place)
    return made


def _refuse_nothing(ingredient: Ingredient, sieve: Sieve, drops: Drops) -> None:
    account = sieve.yields[ingredient.name]
    if account.kept["train"] == 0:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in account.dropped.items())
        said = "; ".join(filter(None, [reasons, str(drops)])) or "it is empty"
        raise DataError(
            f"source '{ingredient.name}'{f' at {ingredient.path}' if ingredient.path else ''} gave no training document "
            f"out of {account.read} read ({said}); expected UTF-8 text; point it at text or leave it out"
        )


def _write_manifest(workplace: Path, sieve: Sieve, drops: dict[str, Drops]) -> None:
    yields = {name: account.to_json() for name, account in sieve.yields.items()}
    for name, dropped in drops.items():
        yields[name]["unusable"] = {
            reason: {"count": count, "first": dropped.first[reason]}
            for reason, count in dropped.counts.items()
        }
    files = {side: workplace / f"{side}.jsonl" for side in SIDES}
    manifest = {
        "kind": KIND,
        "version": 1,
        "filters": asdict(sieve.config),
        "yields": yields,
        "files": {
            side: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for side, path in files.items()
        },
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (workplace / "manifest.json").write_text(text, encoding="utf-8")
