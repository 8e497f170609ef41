"""What the engine keeps of a request while it lives: one `Job`, and one `Answer` for each text being written for it.

Pure bookkeeping between the tokens drawn (choosing.py) and the events that go out. A job that asks for the best of
more answers than it returns holds all events back until every answer has ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from fledge.infer.choosing import Choice
from fledge.infer.grammar import GrammarMatcher
from fledge.infer.sequence import Live
from fledge.infer.shaping import Shaper
from fledge.infer.stops import AnswerText
from fledge.text.tokenizer import Tokenizer
from fledge.types import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs

_DRAWN_AT_ONCE = 64  # random numbers


class Answer:
    """Answer `index` of a request while it is written. `live` is the scheduler's view of it."""

    def __init__(
        self,
        request: Request,
        index: int,
        live: Live,
        tokenizer: Tokenizer,
        matcher: GrammarMatcher | None,
        device: torch.device,
    ) -> None:
        self.request, self.index, self.live = request, index, live
        self.params: SamplingParams = request.params
        self.matcher = matcher
        self.shaper = Shaper(request.params, request.prompt_ids, request.stop_ids, device)
        self.logprob_sum = 0.0  # under the model's own distribution, where that was asked for
        self.num_said = 0
        self.finish_reason: FinishReason | None = None
        is_exact = request.continues or matcher is not None  # a grammar says what stands at the beginning
        self._text = AnswerText(tokenizer, request.stop, continues=is_exact)
        self._randomness = None if request.params.temperature == 0 else _Randomness(request.params.seed + index)

    @property
    def num_top(self) -> int | None:
        """How many alternatives to every token are wanted; None: not even the model's own log-probability is."""
        wanted = self.request.top_logprobs
        return 0 if wanted is None and _is_choosy(self.request) else wanted

    def uniform(self, num_ahead: int) -> float:
        """The random number that decides the token after `num_ahead` more ones."""
        return 0.0 if self._randomness is None else self._randomness.number(self.num_said + num_ahead)

    def take(self, choice: Choice) -> TokenEvent:
        """The answer goes on with this token, and perhaps ends with it."""
        if math.isnan(choice.logprob) or (self.matcher is not None and self.matcher.failure is not None):
            return self.end("error")
        self.num_said += 1
        self.shaper.push(choice.token)
        if self.matcher is not None:
            self.matcher.push(choice.token)
        text, reason = self._read(choice.token)
        self.finish_reason = reason
        if choice.model is not None:
            self.logprob_sum += choice.model.logprob
        model = None if self.request.top_logprobs is None else choice.model
        return TokenEvent(choice.token, choice.logprob, text, reason, self.request.id, self.index, model)

    def end(self, reason: FinishReason) -> TokenEvent:
        """The answer ends here without a further token; text that was withheld is lost."""
        self.finish_reason = reason
        return TokenEvent(-1, 0.0, "", reason, self.request.id, self.index)

    def _read(self, token: int) -> tuple[str, FinishReason | None]:
        if self.matcher is not None and self.matcher.failure is not None:
            return self._text.finish(), "error"
        if token in self.request.stop_ids:
            return self._text.finish(), "stop"
        text, is_stopped = self._text.push(token)
        if is_stopped:
            return text, "stop"
        if self.matcher is not None and self.matcher.is_finished:
            return text + self._text.finish(), "stop"
        if self.num_said == self.params.max_tokens:
            return text + self._text.finish(), "length"
        return text, None


@dataclass(eq=False)
class Job:
    """A request, its answers, and what is known of its prompt. `held` events wait for the choice of the best."""

    request: Request
    answers: tuple[Answer, ...]
    prompt: list[TokenLogprobs] = field(default_factory=list)
    held: list[TokenEvent] = field(default_factory=list)
    _is_told: bool = False  # whether answer 0's first event is out

    @property
    def is_finished(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    def forget_half_read(self) -> None:
        """The weights have changed: a prompt of which only a part is known is read from its beginning again."""
        if len(self.prompt) < len(self.request.prompt_ids) - 1:
            self.prompt.clear()

    def tell(self, event: TokenEvent) -> list[TokenEvent]:
        """The events that can go out now that this one has happened."""
        if not _is_choosy(self.request):
            return [self._introduce(event)]
        self.held.append(event)
        return self._choose_best() if self.is_finished else []

    def _introduce(self, event: TokenEvent) -> TokenEvent:
        """The first event of answer 0 carries what is known of the prompt."""
        if event.index != 0 or self._is_told:
            return event
        self._is_told = True
        return replace(event, prompt=tuple(self.prompt), num_cached=self.answers[0].live.num_cached)

    def _choose_best(self) -> list[TokenEvent]:
        """All events of the `n` best answers, best first; of equally good ones the earlier."""
        ranked = sorted(self.answers, key=lambda answer: -_mean_logprob(answer))[: self.request.n]
        place = {answer.index: new for new, answer in enumerate(ranked)}
        kept = [replace(event, index=place[event.index]) for event in self.held if event.index in place]
        self.held.clear()
        return [self._introduce(event) for event in sorted(kept, key=lambda event: event.index)]


def _is_choosy(request: Request) -> bool:
    return request.best_of is not None and request.best_of > request.n


def _mean_logprob(answer: Answer) -> float:
    """An answer that failed or was cancelled is worse than any that came to its end."""
    if answer.finish_reason in ("error", "cancelled"):
        return -math.inf
    return answer.logprob_sum / max(answer.num_said, 1)


class _Randomness:
    """The row of `sampling.uniforms` of this seed, drawn as far as it is needed: `max_tokens` may be a million, and
    thousands of answers may wait."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._numbers: list[float] = []

    def number(self, place: int) -> float:
        while place >= len(self._numbers):
            self._generator = self._generator or torch.Generator().manual_seed(self._seed)
            some = torch.empty(_DRAWN_AT_ONCE, dtype=torch.float64)
            self._numbers += some.uniform_(generator=self._generator).tolist()
        return self._numbers[place]
