"""Speculative decoding: cheap guesses at the next tokens, checked by the model in one step.

A guess comes from the text itself (the tokens that followed the same few tokens before; Saxena 2023, prompt lookup) or
from a smaller model. The model is run over the guesses at once, and at every position a token is drawn from its own
distribution with the random number that this position has anyway; guesses are kept as long as they equal what is drawn.
So an answer has exactly the tokens that it has without speculation, sampled ones too, and does not depend on how much
of a draft the batch leaves room for.

That is rejection sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2) for guesses that are
certain, given the text and the random numbers: with q all on x, accepting x with probability p(x) and else drawing from
p without x is the same as drawing y from p and keeping x if y = x. The smaller model guesses with the same random
numbers as the model draws, so that it is right wherever the two distributions agree. (Independent draws, accepted with
min(1, p/q), would be right a little more often, at the price of answers that depend on the batch.)

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fledge.infer.answers import Answer
from fledge.infer.blocks import BlockManager
from fledge.infer.causal import CausalModel, device_of, evaluating
from fledge.infer.choosing import Row, choose
from fledge.infer.float_linear import few_rows, float_linears
from fledge.infer.paged import Pages
from fledge.infer.runner import Runner, in_running_order, probe_sites
from fledge.infer.sequence import Live, Span

# How many tokens are guessed where somebody names a draft model and no number: the first guesses are right most often.
USUAL_DRAFT = 4
# Lengths of the endings that are looked up, longest first: longer ones are right more often, shorter found more often.
_NGRAMS = (4, 3, 2)
# Positions of a prompt that the smaller model reads at most before a step; meanwhile it guesses nothing.
_CATCH_UP = 512


class Wish(NamedTuple):
    """A sequence for which up to `limit` (at least 1) guesses are wanted."""

    live: Live
    answer: Answer
    limit: int


class Proposer(Protocol):
    """Where guesses come from. They are a function of the text and the answer's own random numbers."""

    def propose(self, wishes: Sequence[Wish]) -> list[list[int]]:
        """For every wish at most `limit` guesses at the tokens that follow, perhaps none."""

    def forget(self, live: Live) -> None:
        """The sequence has ended."""


class Speculator:
    """Sets the drafts before a step and learns from what became of them: a sequence whose guesses fail gets fewer."""

    def __init__(self, proposer: Proposer, max_draft: int) -> None:
        self._proposer, self._max_draft = proposer, max_draft
        self._limits: dict[int, int] = {}  # live.id -> how many guesses it gets

    def propose(self, answers: Iterable[Answer]) -> None:
        """Set `live.draft` of every answer that decodes."""
        wishes = []
        for answer in answers:
            live = answer.live
            limit = min(self._limits.get(live.id, self._max_draft), live.max_tokens - live.num_generated - 1)
            if limit > 0 and live.blocks and live.num_computed == len(live.tokens) - 1:
                wishes.append(Wish(live, answer, limit))
        for wish, draft in zip(wishes, self._proposer.propose(wishes), strict=True):
            wish.live.draft = draft

    def observe(self, live: Live, num_draft: int, num_accepted: int) -> None:
        """So many of a draft's tokens were right. If all: next time twice as many, otherwise one more than were."""
        more = 2 * num_draft if num_accepted == num_draft else num_accepted + 1
        self._limits[live.id] = min(self._max_draft, more)

    def forget(self, live: Live) -> None:
        self._limits.pop(live.id, None)
        self._proposer.forget(live)


class NgramProposer:
    """What followed the latest earlier occurrence of the text's last tokens."""

    def __init__(self) -> None:
        self._follows: dict[int, dict[tuple[int, ...], int]] = {}  # live.id -> n-gram -> the place after it
        self._num_read: dict[int, int] = {}

    def propose(self, wishes: Sequence[Wish]) -> list[list[int]]:
        return [self._look_up(wish.live, wish.limit) for wish in wishes]

    def forget(self, live: Live) -> None:
        self._follows.pop(live.id, None)
        self._num_read.pop(live.id, None)

    def _look_up(self, live: Live, limit: int) -> list[int]:
        tokens, follows = live.tokens, self._follows.setdefault(live.id, {})
        # Every n-gram is entered once it is followed by something, so that the last one finds an earlier place.
        for place in range(self._num_read.get(live.id, 1), len(tokens)):
            for length in _NGRAMS:
                if length <= place:
                    follows[tuple(tokens[place - length : place])] = place
        self._num_read[live.id] = len(tokens)
        for length in _NGRAMS:
            found = follows.get(tuple(tokens[-length:])) if length <= len(tokens) else None
            if found is not None:
                return tokens[found : found + limit]
        return []


@dataclass
class _Shadow:
    """A sequence as the smaller model keeps it: its tokens, then guesses. The first `num_sure` that were read are the
    sequence's own."""

    live: Live
    num_sure: int = 0


class DraftModel:
    """Guesses of a smaller model with the same vocabulary, which keeps a cache of its own of `num_blocks` blocks.

    A sequence that its cache has no room for, or that is longer than it can read, gets no guesses.
    """

    def __init__(self, model: CausalModel, banned: Tensor, num_blocks: int, block_size: int) -> None:
        """`banned` are the ids that the model never draws."""
        self._model, self._banned = model, banned.to(device_of(model))
        pages = Pages(probe_sites(model), num_blocks, block_size, device_of(model))
        self._runner = Runner(model, pages)
        self._linears = float_linears(model)
        self._blocks = BlockManager(num_blocks, block_size)
        self._shadows: dict[int, _Shadow] = {}

    def propose(self, wishes: Sequence[Wish]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in wishes]
        ready = [(self._follow(wish), wish, draft) for wish, draft in zip(wishes, drafts, strict=True)]
        going = [(shadow, wish, draft) for shadow, wish, draft in ready if shadow is not None]
        with evaluating(self._model), few_rows(self._linears):
            while going:
                tokens = self._guess([(shadow, wish, tuple(draft)) for shadow, wish, draft in going])
                for (shadow, _, draft), token in zip(going, tokens, strict=True):
                    shadow.tokens.append(token)
                    draft.append(token)
                going = [(shadow, wish, draft) for shadow, wish, draft in going if len(draft) < wish.limit]
        return drafts

    def forget(self, live: Live) -> None:
        shadow = self._shadows.pop(live.id, None)
        if shadow is not None:
            self._blocks.release(shadow.live)
            self._blocks.forget(shadow.live)
            self._runner.forget(shadow.live)

    def _follow(self, wish: Wish) -> Live | None:
        """The sequence as this model keeps it, to be read from where it has not been yet; None if it has no room."""
        live, longest = wish.live, self._model.config.max_positions
        num_needed = len(live.tokens) + wish.limit
        if longest is not None and num_needed > longest:
            return None
        shadow = self._shadows.setdefault(live.id, _Shadow(Live(live.id, [], live.num_prompt, live.max_tokens)))
        own, place = shadow.live, shadow.num_sure
        while place < min(own.num_computed, len(live.tokens) - 1) and own.tokens[place] == live.tokens[place]:
            place += 1  # what was guessed before and came true is read already
        own.num_computed = shadow.num_sure = place
        own.tokens[place:] = live.tokens[place:]
        return own if self._blocks.grow(own, num_needed) and self._catch_up(own) else None

    def _catch_up(self, own: Live) -> bool:
        """Read what is missing of a prompt, a part at a time; whether only a little is left."""
        if len(own.tokens) - own.num_computed <= _CATCH_UP:
            return True
        with evaluating(self._model), few_rows(self._linears):
            self._runner.run([Span(own, own.num_computed, _CATCH_UP, 0, False)], [0])
        own.num_computed += _CATCH_UP
        return False

    def _guess(self, going: Sequence[tuple[Live, Wish, tuple[int, ...]]]) -> list[int]:
        """The next token of every sequence, drawn as the model draws it; `going` has the guesses so far."""
        spans = {
            shadow.id: Span(shadow, shadow.num_computed, len(shadow.tokens) - shadow.num_computed, 0, True)
            for shadow, _, _ in going
        }
        order = in_running_order(list(spans.values()))
        states = self._runner.run(order, [1] * len(order))
        state_of = {span.live.id: state for span, state in zip(order, states, strict=True)}
        logits: Tensor = self._model.unembed(torch.cat([state_of[shadow.id] for shadow, _, _ in going])[None])[0]
        rows = [
            Row(wish.answer.params, wish.answer.shaper, wish.answer.uniform(len(ahead)), ahead)
            for _, wish, ahead in going
        ]
        for shadow, _, _ in going:
            shadow.num_computed = len(shadow.tokens)
        return [choice.token for choice in choose(logits, rows, self._banned)]
