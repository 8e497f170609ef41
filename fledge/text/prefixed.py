"""A renderer whose every conversation begins with the same ids: those of a soft prompt (layers/soft_prompt.py).

The prefix belongs to the model, not to the conversation, so `hash` stays that of the template beneath.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fledge.text.chat import Renderer
from fledge.text.tokenizer import Tokenizer
from fledge.types import Conversation, Message, Rendered, Termination


@dataclass(frozen=True)
class PrefixedRenderer:
    """`inner` with `prefix` before everything it renders; nothing in the prefix is learned."""

    inner: Renderer
    prefix: tuple[int, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer

    @property
    def hash(self) -> str:
        return self.inner.hash

    @property
    def end_id(self) -> int:
        return self.inner.end_id

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.inner.stop_ids

    def render(self, conversation: Conversation, *, ended: bool = True) -> Rendered:
        rendered = self.inner.render(conversation, ended=ended)
        return Rendered((*self.prefix, *rendered.ids), (*(False for _ in self.prefix), *rendered.loss_mask))

    def prompt(self, conversation: Conversation) -> tuple[int, ...]:
        return (*self.prefix, *self.inner.prompt(conversation))

    def parse(self, ids: Sequence[int]) -> tuple[Message, Termination]:
        known = frozenset(self.prefix)
        return self.inner.parse([token for token in ids if token not in known])
