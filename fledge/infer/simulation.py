"""The scheduler run without a model: what tenants would wait for, in a world where a step takes a stated time.

Used by bench/scheduling.py and the scheduler's tests; also answers how much cache memory a load needs. Requests look
like published ones: lengths of prompts are log-normal with a Pareto tail, lengths of answers exponential, gaps between
a tenant's requests gamma-distributed and bursty (Xiang et al. 2025, ServeGen, section 3), a tenant's prompts begin
with its system prompt, and a conversation's next prompt begins with the one before and its answer.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fledge.errors import UserError
from fledge.infer.scheduler import Scheduler, SchedulerConfig, SchedulerStats
from fledge.infer.sequence import Live, Span

_VOCAB = 50_000
_TAIL_SHARE, _TAIL_SHAPE = 0.1, 2.0  # one prompt in ten is from the Pareto tail
_LOG_SPREAD = 0.8  # standard deviation of the logarithm of a prompt's length


@dataclass(frozen=True)
class TenantLoad:
    """What one tenant sends. `gap_seconds` is the mean time between its conversations, `burstiness` their coefficient
    of variation (1 is a Poisson process). A conversation has `num_turns` requests. A share `impatient` of the requests
    is cancelled somewhere in the first `patience_seconds`."""

    name: str
    num_requests: int
    gap_seconds: float
    burstiness: float = 2.0
    num_system: int = 64
    mean_prompt: float = 120.0
    mean_answer: float = 100.0
    num_turns: int = 1
    think_seconds: float = 20.0
    impatient: float = 0.0
    patience_seconds: float = 10.0


@dataclass(frozen=True)
class Arrival:
    """A request on its way: `answer` is what the model is going to say to `prompt`."""

    seconds: float
    tenant: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    max_tokens: int
    cancel_seconds: float | None


@dataclass(frozen=True)
class StepCost:
    """A step of n positions takes `step_seconds + n x position_seconds`.

    The defaults are a 124M model in int8 on two cores: 128 tokens a second alone, 1,050 in a batch of 32.
    """

    step_seconds: float = 0.0073
    position_seconds: float = 0.00072


@dataclass(frozen=True)
class TenantReport:
    """Waits are from arrival to the first token, gaps from token to token, both in simulated seconds."""

    name: str
    num_requests: int
    num_refused: int
    num_cancelled: int
    num_answered: int
    num_tokens: int
    wait_p50: float
    wait_p99: float
    wait_max: float
    gap_p99: float
    gap_max: float


@dataclass(frozen=True)
class Report:
    """`num_positions` were run, those that were run again after preemption included."""

    tenants: tuple[TenantReport, ...]
    seconds: float
    num_steps: int
    num_positions: int
    stats: SchedulerStats

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were found in the cache."""
        return self.stats.num_cached_tokens / max(self.stats.num_prompt_tokens, 1)


@dataclass(eq=False)
class _Request:
    arrival: Arrival
    live: Live
    token_seconds: list[float] = field(default_factory=list)
    state: str = "live"  # then "answered", "cancelled" or "refused"


def arrivals(loads: Sequence[TenantLoad], *, max_positions: int, seed: int) -> list[Arrival]:
    """The requests of all tenants in order of time; prompt and answer are at most `max_positions` together."""
    found: list[Arrival] = []
    for load in loads:
        generator = random.Random(f"{seed} {load.name}")
        found += _arrivals_of(load, max_positions, generator)
    return sorted(found, key=lambda arrival: arrival.seconds)


def simulate(requests: Sequence[Arrival], config: SchedulerConfig, cost: StepCost = StepCost()) -> Report:
    """Run the scheduler over `requests` until all are answered, cancelled or refused."""
    return _World(requests, config, cost).run()


class _World:
    """Clock, scheduler, and every request that has come in."""

    def __init__(self, requests: Sequence[Arrival], config: SchedulerConfig, cost: StepCost) -> None:
        self.scheduler = Scheduler(config)
        self._cost = cost
        self._coming = deque(requests)
        self._all: list[_Request] = []
        self._live: dict[int, _Request] = {}
        self._impatient: dict[int, float] = {}
        self._seconds = 0.0
        self._num_steps = self._num_positions = 0

    def run(self) -> Report:
        while self._coming or self.scheduler.has_work:
            self._let_in()
            self._let_go()
            plan = self.scheduler.plan()
            if plan is None:
                if self._coming:
                    self._seconds = max(self._seconds, self._coming[0].seconds)
                continue
            self._num_steps += 1
            self._num_positions += plan.num_tokens
            self._seconds += self._cost.step_seconds + plan.num_tokens * self._cost.position_seconds
            drawn = {span.live.id: [self._next_token(span)] for span in plan.spans if span.draws}
            self.scheduler.commit(plan, drawn)
            for live_id in drawn:
                self._hear(self._live[live_id])
        return self._report()

    def _next_token(self, span: Span) -> int:
        request = self._live[span.live.id]
        return request.arrival.answer[request.live.num_generated]

    def _hear(self, request: _Request) -> None:
        request.token_seconds.append(self._seconds)
        if request.live.num_generated == len(request.arrival.answer):
            self.scheduler.finish(request.live.id)
            self._end(request, "answered")

    def _let_in(self) -> None:
        while self._coming and self._coming[0].seconds <= self._seconds:
            arrival = self._coming.popleft()
            live = Live(
                id=len(self._all),
                tokens=list(arrival.prompt),
                num_prompt=len(arrival.prompt),
                max_tokens=arrival.max_tokens,
                tenant=arrival.tenant,
                salt=arrival.tenant,
            )
            request = _Request(arrival, live)
            self._all.append(request)
            try:
                self.scheduler.add(live)
            except UserError:
                request.state = "refused"
                continue
            self._live[live.id] = request
            if arrival.cancel_seconds is not None:
                self._impatient[live.id] = arrival.cancel_seconds

    def _let_go(self) -> None:
        for live_id in [key for key, seconds in self._impatient.items() if seconds <= self._seconds]:
            assert self.scheduler.cancel(live_id)
            self._end(self._live[live_id], "cancelled")

    def _end(self, request: _Request, state: str) -> None:
        request.state = state
        del self._live[request.live.id]
        self._impatient.pop(request.live.id, None)

    def _report(self) -> Report:
        names = dict.fromkeys(request.arrival.tenant for request in self._all)
        tenants = tuple(_tenant_report(name, [r for r in self._all if r.arrival.tenant == name]) for name in names)
        return Report(tenants, self._seconds, self._num_steps, self._num_positions, self.scheduler.stats())


def _tenant_report(name: str, requests: Sequence[_Request]) -> TenantReport:
    heard = [request for request in requests if request.token_seconds]
    waits = sorted(request.token_seconds[0] - request.arrival.seconds for request in heard)
    gaps = sorted(
        later - earlier
        for request in heard
        for earlier, later in zip(request.token_seconds, request.token_seconds[1:], strict=False)
    )
    states = [request.state for request in requests]
    return TenantReport(
        name=name,
        num_requests=len(requests),
        num_refused=states.count("refused"),
        num_cancelled=states.count("cancelled"),
        num_answered=states.count("answered"),
        num_tokens=sum(request.live.num_generated for request in requests),
        wait_p50=_quantile(waits, 0.5),
        wait_p99=_quantile(waits, 0.99),
        wait_max=_quantile(waits, 1.0),
        gap_p99=_quantile(gaps, 0.99),
        gap_max=_quantile(gaps, 1.0),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def _arrivals_of(load: TenantLoad, max_positions: int, generator: random.Random) -> list[Arrival]:
    shape = 1 / load.burstiness**2  # of a gamma distribution with that coefficient of variation
    system = _tokens(load.num_system, generator)
    found: list[Arrival] = []
    opens = 0.0
    while len(found) < load.num_requests:
        opens += generator.gammavariate(shape, load.gap_seconds / shape)
        seconds, said = opens, system
        for _ in range(min(load.num_turns, load.num_requests - len(found))):
            prompt = (said + _tokens(_prompt_length(load, generator), generator))[: max_positions - 1]
            length = max(1, round(generator.expovariate(1 / load.mean_answer)))
            answer = _tokens(min(length, max_positions - len(prompt)), generator)
            cancels = seconds + generator.uniform(0, load.patience_seconds)
            leaves = generator.random() < load.impatient
            found.append(Arrival(seconds, load.name, prompt, answer, len(answer), cancels if leaves else None))
            seconds, said = seconds + generator.expovariate(1 / load.think_seconds), prompt + answer
    return found


def _prompt_length(load: TenantLoad, generator: random.Random) -> int:
    if generator.random() < _TAIL_SHARE:
        return round(load.mean_prompt * generator.paretovariate(_TAIL_SHAPE))
    # A log-normal variable with median m and spread s has the mean m exp(s^2 / 2).
    return 1 + round(generator.lognormvariate(0.0, _LOG_SPREAD) * load.mean_prompt * math.exp(-(_LOG_SPREAD**2) / 2))


def _tokens(count: int, generator: random.Random) -> tuple[int, ...]:
    return tuple(generator.randrange(_VOCAB) for _ in range(count))
