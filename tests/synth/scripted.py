"""A model that says what a script says; it remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fledge.synth.generating import Ask
from fledge.types import Completion, FinishReason


def said(text: str, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(text, (1,), (-1.0,), finish_reason)


class Scripted:
    """`reply(ask)` is what it says, `odds(prompt, continuation)` the log-probability it gives.

    After `dies_after` answers it stops dead, as a killed process does.
    """

    def __init__(
        self,
        reply: Callable[[Ask], str | Completion] = lambda ask: "",
        odds: Callable[[str, str], float] = lambda prompt, continuation: 0.0,
        dies_after: int | None = None,
    ) -> None:
        self.reply = reply
        self.odds = odds
        self.asked: list[Ask] = []
        self.scored: list[str] = []
        self.lives = dies_after

    def generate(self, asks: Sequence[Ask]) -> list[Completion]:
        self._live(len(asks))
        self.asked += asks
        replies = [self.reply(ask) for ask in asks]
        return [said(reply) if isinstance(reply, str) else reply for reply in replies]

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> list[list[float]]:
        self._live(len(prompts))
        self.scored += prompts
        return [[self.odds(p, each) for each in several] for p, several in zip(prompts, continuations, strict=True)]

    def _live(self, count: int) -> None:
        if self.lives is not None:
            self.lives -= count
            if self.lives < 0:
                raise KeyboardInterrupt
