"""The plain values between scheduler and runner: what is being generated, and what one step runs of it.

No tensors here, so that the scheduler can be simulated by the thousand. One engine step is
`scheduler.plan() -> StepPlan -> runner.run(plan) -> drawn tokens -> scheduler.commit(plan, drawn)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Live:
    """One answer being generated. `tokens` are the prompt's ids and the answer's so far.

    `num_computed` of them have keys and values in `blocks` (block b holds positions b x block_size onwards). A
    sequence whose `num_computed` is `len(tokens) - 1` decodes; below that it reads its prompt, or reads again after
    preemption. `draft` holds guesses of the tokens that follow, to be checked in one step (speculative decoding).
    `salt` keeps tenants and adapters apart in the prefix cache.
    """

    id: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    tenant: str = ""
    salt: str = ""
    num_computed: int = 0
    num_cached: int = 0  # of the prompt, found in the cache when it was first admitted
    blocks: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True)
class Span:
    """Positions `start` to `start + count - 1` of one sequence, run together in one step.

    The last `num_draft` of them are the sequence's draft. `draws` says that the span reaches the newest token, so that
    the step draws what follows it.
    """

    live: Live
    start: int
    count: int
    num_draft: int
    draws: bool


@dataclass(frozen=True)
class StepPlan:
    """What one forward pass runs. No sequence is in it twice."""

    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        return sum(span.count for span in self.spans)
