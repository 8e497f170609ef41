"""Rewards from anything: a weighted sum of reward models, Python functions and verifiers, as one `Scorer`.

    score = sum over parts of weight x part's score

A part that fails for an answer (a function raises, hangs or gives no number; a verifier has no verdict) leaves that
answer WITHOUT a score: NaN, which the algorithms leave out (rl/world.py, `failed_rewards`), never 0. Every failure is
recorded, and too many of them end the run.

Functions run in this process, with a clock each; verifiers in processes of their own (judge.py). Suffix: B episodes.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fledge.errors import ConfigError, DataError, TrainingHalted
from fledge.infer.naive import Decode
from fledge.rl.judge import Judge, Verifier
from fledge.rl.rollout import Episodes, Scorer
from fledge.rl.world import scorer_figures
from fledge.types import Metrics

KEPT_FAILURES = 1000  # the record of a long run stays small; its count goes on


@dataclass(frozen=True)
class Attempt:
    """One answer as functions and verifiers see it: text without its end token, and the record of its prompt."""

    completion: str
    record: Mapping[str, Any]
    ended: bool
    num_tokens: int


@dataclass(frozen=True)
class Failure:
    """Why `part` has no score for an answer."""

    part: str
    reason: str
    completion: str


Outcome = float | str  # a score, or why there is none
RewardFunction = Callable[[Attempt], float]


class AttemptScorer(Protocol):
    """A part that reads text: one outcome an attempt."""

    def __call__(self, attempts: Sequence[Attempt]) -> list[Outcome]: ...


@dataclass(frozen=True)
class FunctionReward:
    """A Python function of one attempt, given `seconds` for each."""

    function: RewardFunction
    seconds: float = 10.0

    def __call__(self, attempts: Sequence[Attempt]) -> list[Outcome]:
        return [bounded(self.function, attempt, self.seconds) for attempt in attempts]


@dataclass(frozen=True)
class VerifierReward:
    """A verifier, asked in its sandboxes."""

    verifier: Verifier
    judge: Judge

    def __call__(self, attempts: Sequence[Attempt]) -> list[Outcome]:
        verdicts = self.judge(self.verifier, [(attempt.completion, attempt.record) for attempt in attempts])
        return [verdict.reason or "no verdict" if verdict.score is None else verdict.score for verdict in verdicts]


def bounded(function: RewardFunction, attempt: Attempt, seconds: float) -> Outcome:
    """What the function says within `seconds`, or why it says nothing.

    It runs in a thread of its own; one that is late is told to stop, which works at its next Python instruction, and
    is not waited for.
    """
    outcome: list[Outcome] = []

    def run() -> None:
        try:
            score = float(function(attempt))
            outcome.append(score if math.isfinite(score) else f"the score is {score}, expected a finite number")
        except BaseException as error:
            outcome.append(f"{type(error).__name__}: {str(error)[:500]}")

    thread = threading.Thread(target=run, daemon=True, name="reward")
    thread.start()
    thread.join(seconds)
    if outcome:
        return outcome[0]
    assert thread.ident is not None
    # The one way to end a thread that does not cooperate: an exception raised within it (CPython's C API).
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(TimeoutError))
    return f"no score within {seconds:g} seconds"


@dataclass(frozen=True)
class Part:
    """One summand, made by one of the two constructors: of tokens (a reward model) or of text (all others)."""

    name: str
    weight: float
    of_tokens: Scorer | None = None
    of_text: AttemptScorer | None = None

    @classmethod
    def model(cls, name: str, scorer: Scorer, weight: float = 1.0) -> Part:
        return cls(name, weight, of_tokens=scorer)

    @classmethod
    def text(cls, name: str, scorer: AttemptScorer, weight: float = 1.0) -> Part:
        return cls(name, weight, of_text=scorer)


@dataclass(frozen=True)
class Records:
    """What the data set says about each prompt (the right answer, tests), found again by the prompt's token ids."""

    of_prompt: Mapping[tuple[int, ...], Mapping[str, Any]]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], records: Sequence[Mapping[str, Any]]) -> Records:
        """`DataError` if one prompt has two different records."""
        found: dict[tuple[int, ...], Mapping[str, Any]] = {}
        for prompt, record in zip(prompts, records, strict=True):
            if found.setdefault(tuple(prompt), record) != record:
                raise DataError(f"a prompt of {len(prompt)} tokens has two different records; drop one of them")
        return cls(found)


@dataclass
class RewardSum:
    """A `Scorer` and a `Reporting`: NaN for an episode that a part has no score for.

    `max_failed` is the share of a call's episodes that may fail; beyond it TrainingHalted names the first reason.
    `failures` holds the first thousand; `on_failure` is told every one of them (to write it to the run's folder).
    """

    parts: Sequence[Part]
    records: Records
    decode: Decode
    stop_ids: frozenset[int]
    max_failed: float = 0.25
    on_failure: Callable[[Failure], None] | None = None
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"rewards need at least one part and different names, got {names}")
        if not all(math.isfinite(part.weight) and part.weight != 0 for part in self.parts):
            raise ConfigError("the weight of a reward must be finite and not 0; leave the part out instead")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"max_failed is a share from 0 to 1, got {self.max_failed}")
        self._seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def __call__(self, episodes: Episodes) -> Tensor:
        attempts = self.attempts(episodes) if any(part.of_text for part in self.parts) else []
        device = episodes.tokens_BT.device
        total_B = torch.zeros(len(episodes.tokens_BT), device=device)
        reasons: list[Failure] = []
        for part in self.parts:
            scores_B, failed = self._score(part, episodes, attempts)
            self._seen[part.name].append(scores_B)
            reasons += failed
            total_B = total_B + part.weight * scores_B.to(device)
        self._record(reasons)
        share = float(total_B.isnan().float().mean())
        if share > self.max_failed:
            first = reasons[0] if reasons else Failure("a reward model", "its score is not a number", "")
            raise TrainingHalted(
                f"rewards failed for {share:.0%} of the answers, at most {self.max_failed:.0%} may; "
                f"first: {first.part}: {first.reason}"
            )
        return total_B

    def attempts(self, episodes: Episodes) -> list[Attempt]:
        """The episodes as text. `DataError` for a prompt without a record."""
        found = []
        for row, (prompt, said) in enumerate(episodes.spoken()):
            if prompt not in self.records.of_prompt:
                raise DataError(
                    f"a prompt of {len(prompt)} tokens has no record; give Records every prompt of the world"
                )
            text = self.decode(said[:-1] if said and said[-1] in self.stop_ids else said)
            ended = bool(episodes.ended_B[row])
            found.append(Attempt(text, self.records.of_prompt[prompt], ended, len(said)))
        return found

    def figures(self) -> Metrics:
        """Since the last call of this: `reward/<part>`, the mean over answers that it has a score for,
        `reward_failed/<part>`, the share that it has none for, and the parts' own figures."""
        metrics: Metrics = {}
        for name, calls in self._seen.items():
            if not calls:
                continue
            scores_B = torch.cat([call.float().cpu() for call in calls])
            valid_B = scores_B[~scores_B.isnan()]
            metrics[f"reward/{name}"] = float(valid_B.mean()) if len(valid_B) else 0.0
            metrics[f"reward_failed/{name}"] = 1 - len(valid_B) / len(scores_B)
            calls.clear()
        for part in self.parts:
            if part.of_tokens is not None:
                metrics |= scorer_figures(part.of_tokens)
        return metrics

    def _score(self, part: Part, episodes: Episodes, attempts: list[Attempt]) -> tuple[Tensor, list[Failure]]:
        if part.of_text is None:
            assert part.of_tokens is not None
            return part.of_tokens(episodes).float(), []
        outcomes = part.of_text(attempts)
        failed = [
            Failure(part.name, outcome, attempt.completion[:2000])
            for outcome, attempt in zip(outcomes, attempts, strict=True)
            if isinstance(outcome, str)
        ]
        return torch.tensor([math.nan if isinstance(outcome, str) else outcome for outcome in outcomes]), failed

    def _record(self, failed: Sequence[Failure]) -> None:
        self.failures += failed[: max(0, KEPT_FAILURES - len(self.failures))]
        if self.on_failure is not None:
            for failure in failed:
                self.on_failure(failure)
