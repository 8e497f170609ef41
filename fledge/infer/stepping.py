"""One step of the engine over the model: from a plan to the tokens drawn.

runner.py gives the hidden states of the positions that are wanted; here they become logits, each row through its own
adapter, the prompt's own log-probabilities where asked for, and choices (choosing.py) within each answer's grammar.
engine.py makes events of those.

Shapes: W positions wanted, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fledge.infer.adapters import Adapters
from fledge.infer.answers import Answer, Job
from fledge.infer.causal import CausalModel, device_of
from fledge.infer.choosing import Choice, Row, choose, read_logprobs
from fledge.infer.grammar import GrammarCompiler
from fledge.infer.runner import Runner, in_running_order
from fledge.infer.sequence import Span, StepPlan
from fledge.text.tokenizer import Tokenizer
from fledge.types import Grammar

# Positions of a prompt whose distributions are worked out at once: 128 x 50,000 float32 are 26 MB.
_PROMPT_ROWS = 128


class Written(NamedTuple):
    """An answer being written, and the job that it belongs to."""

    job: Job
    answer: Answer


class Stepper:
    """A model with its runner, adapters and grammars. `run` is to be called within `evaluating`."""

    def __init__(self, model: CausalModel, tokenizer: Tokenizer, runner: Runner, adapters: Adapters) -> None:
        self._model, self._tokenizer, self._runner, self._adapters = model, tokenizer, runner, adapters
        # Padding, and ids that the model has but no token, are never drawn.
        unused = range(tokenizer.vocab_size, model.vocab_size)
        self.banned = torch.tensor([tokenizer.pad_id, *unused], device=device_of(model))

    @cached_property
    def grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self._tokenizer, vocab_size=self._model.vocab_size)

    def knows(self, grammar: Grammar) -> bool:
        """Whether a matcher for it costs next to nothing."""
        own: GrammarCompiler | None = self.__dict__.get("grammars")  # not made before somebody wants one
        return own is not None and own.knows(grammar)

    def run(self, plan: StepPlan, written: Mapping[int, Written]) -> list[tuple[Span, list[Choice]]]:
        """One forward pass: for every span that draws, what follows each of its last 1 + num_draft positions.

        `written` is by live.id. Adds what is learned about prompts to their jobs.
        """
        spans = in_running_order(plan.spans)
        own = [written[span.live.id] for span in spans]
        drawing = [(span, of) for span, of in zip(spans, own, strict=True) if span.draws]
        logits_WV = self._forward(spans, own)
        if not drawing:
            return []
        masks = self._masks(drawing)
        rows = [row for span, of in drawing for row in _rows(span, of.answer, masks.get(span.live.id))]
        choices = choose(logits_WV, rows, self.banned)
        ends = accumulate(1 + span.num_draft for span, _ in drawing)
        return [(span, choices[end - 1 - span.num_draft : end]) for (span, _), end in zip(drawing, ends, strict=True)]

    def _forward(self, spans: Sequence[Span], own: Sequence[Written]) -> Tensor:
        """logits_WV of the positions that are drawn after, span after span; (0, 0) if there is none."""
        if not self._adapters.names and all(span.count == 1 + span.num_draft and span.draws for span in spans):
            logits_TV = self._runner.decode(spans)
            if logits_TV is not None:
                return logits_TV
        self._adapters.route([(of.answer.request.adapter, span.count) for span, of in zip(spans, own, strict=True)])
        if not any(of.job.request.prompt_logprobs is not None for of in own):
            return self._after_last(spans, own)
        states = self._runner.run(spans, [_num_wanted(span, of) for span, of in zip(spans, own, strict=True)])
        drawn: list[Tensor] = []
        owners: list[tuple[str | None, int]] = []
        for span, of, state_WD in zip(spans, own, states, strict=True):
            self._read_prompt(span, of, state_WD)
            if span.draws:
                drawn.append(state_WD[-1 - span.num_draft :])
                owners.append((of.answer.request.adapter, 1 + span.num_draft))
        return self._unembed(torch.cat(drawn), owners) if drawn else torch.zeros(0, 0)

    def _after_last(self, spans: Sequence[Span], own: Sequence[Written]) -> Tensor:
        """`_forward` where no prompt is read for its own sake, so that nothing is wanted but what is drawn after."""
        x_TD = self._runner.states(spans)
        ends = accumulate(span.count for span in spans)
        drawing = [(span, of, end) for span, of, end in zip(spans, own, ends, strict=True) if span.draws]
        places = [place for span, _, end in drawing for place in range(end - 1 - span.num_draft, end)]
        if not places:
            return torch.zeros(0, 0)
        x_WD = x_TD if len(places) == len(x_TD) else x_TD[torch.tensor(places, device=x_TD.device)]
        return self._unembed(x_WD, [(of.answer.request.adapter, 1 + span.num_draft) for span, of, _ in drawing])

    def _unembed(self, x_WD: Tensor, owners: Sequence[tuple[str | None, int]]) -> Tensor:
        """logits_WV; `owners` says which adapter how many rows go through, side by side."""
        self._adapters.route(owners)
        return self._model.unembed(x_WD[None])[0]

    def _masks(self, drawing: Sequence[tuple[Span, Written]]) -> dict[int, Tensor]:
        """By live.id, the masks (1 + num_draft, V) of the answers that have a grammar."""
        held = [(span, matcher) for span, of in drawing if (matcher := of.answer.matcher)]
        if not held:
            return {}
        drafts = [(matcher, span.live.draft[: span.num_draft]) for span, matcher in held]
        masks = self.grammars.masks(drafts).split([1 + span.num_draft for span, _ in held])
        return {span.live.id: own for (span, _), own in zip(held, masks, strict=True)}

    def _read_prompt(self, span: Span, of: Written, state_WD: Tensor) -> None:
        """Add the log-probabilities of the prompt's tokens that this span predicts."""
        num_unread, first, request = _num_unread(span, of), _first_unread(span, of), of.job.request
        for start in range(0, num_unread, _PROMPT_ROWS):
            x_WD = state_WD[start : min(start + _PROMPT_ROWS, num_unread)]
            logprobs_WV = self._unembed(x_WD, [(request.adapter, len(x_WD))]).float().log_softmax(dim=-1)
            place = first + start + 1
            tokens_W = torch.tensor(span.live.tokens[place : place + len(x_WD)], device=x_WD.device)
            of.job.prompt += read_logprobs(logprobs_WV, tokens_W, [request.prompt_logprobs or 0] * len(x_WD))


def _rows(span: Span, answer: Answer, masks: Tensor | None) -> list[Row]:
    """One for each position of the span that a token is drawn after."""
    draft = tuple(span.live.draft[: span.num_draft])
    return [
        Row(
            params=answer.params,
            shaper=answer.shaper,
            uniform=answer.uniform(ahead),
            ahead=draft[:ahead],
            allowed=None if masks is None else masks[ahead],
            num_top=answer.num_top,
        )
        for ahead in range(1 + span.num_draft)
    ]


def _num_wanted(span: Span, of: Written) -> int:
    """How many of the span's last positions the model must speak at."""
    if _num_unread(span, of) > 0:
        return span.start + span.count - _first_unread(span, of)
    return 1 + span.num_draft if span.draws else 0


def _first_unread(span: Span, of: Written) -> int:
    return max(span.start, len(of.job.prompt))


def _num_unread(span: Span, of: Written) -> int:
    """How many positions of the span predict tokens of the prompt that are wanted and not known yet."""
    if of.job.request.prompt_logprobs is None or of.answer.index != 0:
        return 0
    return min(span.start + span.count, span.live.num_prompt - 1) - _first_unread(span, of)
