"""Conversations <-> tokens. The only place where a conversation becomes tokens (docs/architecture.md, seam 1).

Layer 2. SFT, reward model, PPO, evals and server all call `ChatRenderer`. The layout is

    <|endoftext|> ( <|system|> | <|user|> | <|assistant|> | <|tool|>  text  <|end|> )*

The special tokens are placed by id and every text is encoded apart, so what a user writes can never open a turn, close
one, or speak in another's name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, get_args

import numpy as np

from fledge.config import config_hash
from fledge.errors import TokenizerError
from fledge.text.tokenizer import Tokenizer
from fledge.text.tools import show_tools
from fledge.types import Conversation, Message, Piece, Rendered, Role, Termination, TextPart

ROLES: tuple[Role, ...] = get_args(Role)
JOINED_ROLES: tuple[Role, ...] = ("system", "user", "assistant")  # each tool message is one tool's answer: never joined


@dataclass(frozen=True)
class ChatTemplate:
    """Which special token opens a conversation, which opens each role's turn, and which ends a turn."""

    start: str = "<|endoftext|>"
    system: str = "<|system|>"
    user: str = "<|user|>"
    assistant: str = "<|assistant|>"
    tool: str = "<|tool|>"
    end: str = "<|end|>"


class Renderer(Protocol):
    """What turns conversations into tokens and back: `ChatRenderer`, or a `TemplateRenderer` (text/template.py).

    `hash` names the template; `end_id` ends the assistant's turn and is one of `stop_ids`, at which generation stops.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def hash(self) -> str: ...
    @property
    def end_id(self) -> int: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    def render(self, conversation: Conversation, *, ended: bool = True) -> Rendered: ...
    def prompt(self, conversation: Conversation) -> tuple[int, ...]: ...
    def parse(self, ids: Sequence[int]) -> tuple[Message, Termination]: ...


class ChatRenderer:
    """Renders and parses conversations for one tokenizer.

    `hash` names the template (C11): a model works only with the template it was trained with. `end_id` ends a turn.
    `stop_ids` are the tokens at which generation of a turn must stop: `end_id`, and `<|endoftext|>`, which a base model
    says instead; only the first of them is an answer that was brought to its end (C23), and `parse` tells which it was.
    Raises `TokenizerError` if two of the tokens are one, or padding is one of them (C1).
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        template = template or ChatTemplate()
        self.tokenizer = tokenizer
        self.hash = config_hash(template)
        self.start_id = tokenizer.special_id(template.start)
        self.end_id = tokenizer.special_id(template.end)
        self.role_ids: dict[Role, int] = {role: tokenizer.special_id(getattr(template, role)) for role in ROLES}
        self.stop_ids = frozenset((self.end_id, tokenizer.end_of_text_id))
        self._role_of: dict[int, Role] = {token_id: role for role, token_id in self.role_ids.items()}
        self._encoded: Mapping[str, Sequence[int]] = {}
        used = (self.start_id, self.end_id, tokenizer.pad_id, *self.role_ids.values())
        if len(set(used)) < len(used):
            raise TokenizerError(
                f"a chat template needs distinct tokens for padding, start, end and each role, got the ids {used}; "
                f"give each a token of its own"
            )

    def knowing(self, texts: Iterable[str]) -> Self:
        """This renderer with these texts encoded beforehand, on all cores: for who renders the same messages more than
        once. What it gives is the same."""
        renderer, known = copy.copy(self), list(dict.fromkeys(texts))
        renderer._encoded = dict(zip(known, self.tokenizer.encode_batch(known), strict=True))
        return renderer

    def render(self, conversation: Conversation, *, ended: bool = True) -> Rendered:
        """The whole conversation, verbatim. The mask is true on the assistant's tokens and their `<|end|>` (C9);
        its tools stand in the system message.

        With `ended` false the last turn is left open, as an answer that ran out of tokens was.
        """
        ids, mask = [self.start_id], [False]
        for message in show_tools(conversation).messages:
            turn = self.turn(message)
            ids += turn.ids
            mask += turn.loss_mask
        if not ended and conversation.messages:
            del ids[-1], mask[-1]
        return Rendered(tuple(ids), tuple(mask))

    def prompt(self, conversation: Conversation) -> tuple[int, ...]:
        """The conversation with the assistant's turn opened. For a conversation that ends with the assistant's message,
        the prompt of what comes before it is a prefix of `render(conversation).ids`."""
        return (*self.render(conversation).ids, self.role_ids["assistant"])

    def parse(self, ids: Sequence[int]) -> tuple[Message, Termination]:
        """The last turn in `ids`: a rendered conversation, a prompt with what was generated after it, or that alone
        (then it is the assistant's).

        A turn opens where a role token follows the start or the end of a turn; elsewhere a role token is a model's
        slip. The text goes to the first framing token or to the end of `ids`; `END_OF_TURN` only if that is `<|end|>`.
        """
        start = 0
        role: Role = "assistant"
        for i in range(1, len(ids)):
            if ids[i] in self._role_of and ids[i - 1] in (self.start_id, self.end_id):
                start, role = i + 1, self._role_of[ids[i]]
        framing = self.tokenizer.framing_ids
        stop = next((i for i in range(start, len(ids)) if ids[i] in framing), len(ids))
        has_ended = stop < len(ids) and ids[stop] == self.end_id
        message = Message.of(role, self.tokenizer.decode(ids[start:stop]))
        return message, Termination.END_OF_TURN if has_ended else Termination.TRUNCATED

    def turn(self, message: Message) -> Rendered:
        """One message: its role, its text, the end of the turn. A conversation is the start token and its turns."""
        known = self._encoded.get(message.text)
        text = self.tokenizer.encode(message.text) if known is None else known
        is_learned = message.role == "assistant" and message.is_learned
        ids = (self.role_ids[message.role], *text, self.end_id)
        return Rendered(ids, (False, *(is_learned for _ in text), is_learned))


def normalise(conversation: Conversation) -> Conversation:
    """The conversation as it is trained on and stored. Applying it twice changes nothing more.

    Each message becomes one text part, line breaks become \\n, white space around it goes; messages without text go;
    neighbours of one role are joined by a line break (not tool messages, nor a learned one with one that is not).
    Nothing else about a text is touched.
    """
    messages: list[Message] = []
    for message in conversation.messages:
        text = message.text.replace("\r\n", "\n").replace("\r", "\n").strip()
        if not text:
            continue
        if messages and message.role in JOINED_ROLES and _is_alike(messages[-1], message):
            text = f"{messages.pop().text}\n{text}"
        messages.append(replace(message, parts=(TextPart(text),)))
    return replace(conversation, messages=tuple(messages))


def _is_alike(one: Message, other: Message) -> bool:
    return (one.role, one.is_learned) == (other.role, other.is_learned)


def conversation_piece(renderer: ChatRenderer, conversation: Conversation, max_length: int) -> Piece | None:
    """A conversation as training data of at most `max_length` ids (so at most `max_length - 1` predictions).

    What comes after the last assistant message is left away: nothing is learned from it. A conversation that is too
    long loses its oldest exchanges, each from a user message to the next, and keeps its system messages at the head;
    if the last exchange alone is too long, its tail is cut. None if no token of the assistant's is left to learn, so
    that no row is ever fully masked. `conversation` should be `normalise`d.
    """
    messages = show_tools(conversation).messages
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]
    head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    starts = [head, *(i for i in range(head + 1, len(messages)) if messages[i].role == "user")]
    turns = [renderer.turn(message) for message in messages]
    offsets = np.cumsum([1, *(len(turn.ids) for turn in turns)])  # where each turn begins in the ids, and their end
    excess = offsets[-1] - max_length
    start = next((i for i in starts if offsets[i] - offsets[head] >= excess), starts[-1])
    kept = [*turns[:head], *turns[start:]]
    ids = np.array([renderer.start_id, *(i for turn in kept for i in turn.ids)][:max_length], dtype=np.int32)
    mask = np.array([False, *(m for turn in kept for m in turn.loss_mask)][:max_length], dtype=np.float32)
    if not mask[1:].any():
        return None
    return Piece(ids, mask)
