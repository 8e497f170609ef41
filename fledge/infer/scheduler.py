"""What the engine runs next: continuous batching, chunked prompts, preemption, fairness between tenants. No tensors.

Before every step `plan()` says which positions of which sequences to run, after it `commit()` takes what was drawn
(Yu et al. 2022, Orca: a sequence joins and leaves the batch at any step). Order of a plan:

1. every sequence that decodes runs its one token and, as far as there is room, its draft;
2. what is left of the step's budget reads prompts, in chunks (Agrawal et al. 2024, Sarathi-Serve, section 4), always
   for the tenant that has been served least (Sheng et al. 2024, VTC, algorithm 2), first come first served within it.

If blocks run out, the latest arrival of the tenant that has been served most is put back to the front of its queue
and is read again later (preemption by recomputation). A tenant that waits with nothing running takes the place of the
most-served tenant's latest one, so that no flood of long answers keeps others waiting for an answer to end.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice

from fledge.errors import ConfigError, UserError
from fledge.infer.blocks import BlockManager
from fledge.infer.fairness import Ledger
from fledge.infer.sequence import Live, Span, StepPlan

# So many waiting sequences of a tenant are looked at if the ones before wait for a block that is being computed.
_LOOK_AHEAD = 8


@dataclass(frozen=True)
class SchedulerConfig:
    """`num_blocks` blocks of `block_size` positions; at most `max_live` sequences run at once; a step runs at most
    `max_step_tokens` positions (more: prompts are read faster; fewer: those that decode meanwhile wait less)."""

    num_blocks: int
    block_size: int = 16
    max_live: int = 64
    max_step_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_live", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_step_tokens < self.max_live:
            raise ConfigError(
                f"max_step_tokens {self.max_step_tokens} is less than max_live {self.max_live}: every sequence "
                "that decodes needs one; raise the one or lower the other"
            )


@dataclass(frozen=True)
class SchedulerStats:
    """Counts since the start, and how things stand. `num_cached_tokens` of `num_prompt_tokens` were found."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_findable_blocks: int
    num_admitted: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preempted: int
    num_displaced: int
    num_draft_tokens: int
    num_accepted_tokens: int


_COUNTED = tuple(field.name for field in fields(SchedulerStats))[5:]


@dataclass(eq=False)
class _Entry:
    """A sequence as the scheduler keeps it. Its first `num_charged` positions are on its tenant's account."""

    live: Live
    arrival: int
    reads_all: bool
    num_charged: int = 0
    was_admitted: bool = False


class Scheduler:
    """Sequences from `add` to `finish` or `cancel`. Not thread-safe: one owner calls `plan` and `commit` in turn.

        while (plan := scheduler.plan()) is not None:
            drawn = run(plan)                    # {live.id: tokens drawn} for every span with `draws`
            scheduler.commit(plan, drawn)        # appends them to live.tokens
            for live in those that ended: scheduler.finish(live.id)

    `cancel` and `finish` may be called at any time, between `plan` and `commit` too: `commit` passes over spans of
    sequences that are gone, and their blocks are not handed out before the next `plan`.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self._entries: dict[int, _Entry] = {}
        # What runs is either reading (its prompt, or all of it again) or decoding; in order of arrival there.
        self._reading: dict[int, _Entry] = {}
        self._decoding: dict[int, _Entry] = {}
        self._waiting: dict[str, OrderedDict[int, _Entry]] = {}  # tenant -> its queue; no queue is empty
        self._num_running: dict[str, int] = {}  # tenant -> how many of its sequences run
        self._ledger = Ledger()
        self._num_arrived = 0
        self._counts = dict.fromkeys(_COUNTED, 0)

    @property
    def has_work(self) -> bool:
        return bool(self._entries)

    def check_fit(self, num_prompt: int, max_tokens: int) -> None:
        """`UserError` with the numbers if a sequence so long could never run, even alone."""
        room = self.config.num_blocks * self.config.block_size
        if num_prompt + max_tokens > room:
            raise UserError(
                f"a prompt of {num_prompt} tokens and max_tokens {max_tokens} need {num_prompt + max_tokens} positions "
                f"of cache, the engine has {room}; shorten the prompt, ask for fewer tokens, or give the engine more "
                "cache memory"
            )

    def add(self, live: Live, *, reads_all: bool = False) -> None:
        """Queue a new sequence (`live.tokens` is its prompt). Raises `UserError` if it can never fit.

        `reads_all`: every position of the prompt is run, none is taken from the cache (for the prompt's own
        log-probabilities); if it is preempted it starts again from the first.
        """
        assert live.id not in self._entries, f"sequence {live.id} is here already"
        assert live.tokens, "an empty prompt"
        self.check_fit(live.num_prompt, live.max_tokens)
        entry = _Entry(live, self._num_arrived, reads_all)
        self._num_arrived += 1
        self._entries[live.id] = entry
        if live.tenant not in self._waiting:
            self._ledger.lift(live.tenant, self._waiting)
        self._waiting.setdefault(live.tenant, OrderedDict())[live.id] = entry

    def plan(self) -> StepPlan | None:
        """The next step; None exactly if there are no sequences. Every `plan` is followed by its `commit`.

        Spans come decoding ones first, in order of admission. A span's draft tokens are the first `num_draft` of
        `live.draft`.
        """
        if not self._entries:
            return None
        self._make_room()
        self._make_place()
        spans = self._plan_decoding()
        spans += self._plan_reading(self.config.max_step_tokens - sum(span.count for span in spans))
        assert spans, "there is work, but nothing can run"
        return StepPlan(tuple(spans))

    def commit(self, plan: StepPlan, drawn: Mapping[int, Sequence[int]]) -> None:
        """Take the result of a step: `drawn[live.id]` are the tokens that follow, for every span with `draws`.

        Without a draft that is one token; with one, the accepted draft tokens and the one drawn after them (1 to
        `num_draft + 1`). They are appended to `live.tokens`, `num_computed` moves on, the draft is emptied, and blocks
        that only refused draft tokens needed are given back.
        """
        size = self.config.block_size
        for span in plan.spans:
            live = span.live
            if live.id not in self._decoding and live.id not in self._reading:
                continue
            live.num_computed = span.start + span.count - span.num_draft
            if span.draws:
                self._accept(span, drawn[live.id])
            if live.num_computed // size > span.start // size:
                self.blocks.publish(live)

    def finish(self, live_id: int) -> None:
        """The sequence has ended: its blocks are free (and findable) at once."""
        assert live_id in self._entries, f"sequence {live_id} is not here"
        self.cancel(live_id)

    def cancel(self, live_id: int) -> bool:
        """As `finish`; False if there is no such sequence (any more)."""
        entry = self._entries.pop(live_id, None)
        if entry is None:
            return False
        if live_id in self._decoding or live_id in self._reading:
            self._stop(entry)
        else:
            self._unqueue(entry)
        self.blocks.forget(entry.live)
        self._ledger.prune(self._waiting.keys() | self._num_running.keys())
        return True

    def flush(self) -> None:
        """The weights changed: nothing computed is used again. Running sequences go back to their queues."""
        for entry in sorted(self._running(), key=lambda entry: -entry.arrival):
            self._requeue(entry)
        self.blocks.flush()

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=self._count_running(),
            num_waiting=len(self._entries) - self._count_running(),
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free,
            num_findable_blocks=self.blocks.num_findable,
            **self._counts,
        )

    def served(self) -> dict[str, int]:
        """The virtual counter of every tenant that is present: weighted tokens of service (VTC)."""
        return {tenant: self._ledger[tenant] for tenant in {entry.live.tenant for entry in self._entries.values()}}

    # Planning

    def _make_room(self) -> None:
        """See to it that every sequence that decodes has a block for its next token: preempt until it is so."""
        size = self.config.block_size
        needy = {
            key: entry
            for key, entry in self._decoding.items()
            if len(entry.live.blocks) * size < len(entry.live.tokens)
        }
        while len(needy) > self.blocks.num_free:
            victim = self._most_served(least_running=1)
            assert victim is not None, "sequences need blocks, but none runs"
            needy.pop(victim.live.id, None)
            self._requeue(victim)
            self._counts["num_preempted"] += 1
        for entry in needy.values():
            self.blocks.grow(entry.live, len(entry.live.tokens))

    def _make_place(self) -> None:
        """Let the least-served tenant that waits with nothing running take the place of one that has several."""
        unserved = [tenant for tenant in self._waiting if not self._num_running.get(tenant)]
        if not unserved:
            return
        tenant = min(unserved, key=self._ledger.__getitem__)
        first = next(iter(self._waiting[tenant].values()))
        while not self._fits(first):
            victim = self._most_served(least_running=2)
            if victim is None or self._ledger[victim.live.tenant] <= self._ledger[tenant]:
                return
            self._requeue(victim)
            self._counts["num_displaced"] += 1

    def _plan_decoding(self) -> list[Span]:
        spare = self.config.max_step_tokens - len(self._decoding)
        if self._waiting or self._reading:
            spare //= 2  # drafts are bets; they must not keep prompts from being read
        spans = []
        for entry in self._decoding.values():
            live = entry.live
            num_draft = self._grant_draft(live, spare) if live.draft else 0
            spare -= num_draft
            spans.append(Span(live, live.num_computed, 1 + num_draft, num_draft, True))
        return spans

    def _grant_draft(self, live: Live, spare: int) -> int:
        """How much of its draft a sequence may run: what the budget, the blocks and its length leave room for."""
        num_draft = min(len(live.draft), spare, live.max_tokens - live.num_generated - 1)
        return num_draft if self.blocks.grow(live, len(live.tokens) + num_draft) else 0

    def _plan_reading(self, budget: int) -> list[Span]:
        """Chunks of prompts for the least-served tenants, up to `budget` positions."""
        reading: dict[str, list[_Entry]] = {}
        for entry in reversed(self._reading.values()):
            reading.setdefault(entry.live.tenant, []).append(entry)  # the last is popped first
        spans: list[Span] = []
        may_admit = True
        turns = [(self._ledger[tenant], tenant) for tenant in {*reading, *self._waiting}]
        heapq.heapify(turns)
        while budget > 0 and turns:
            _, tenant = heapq.heappop(turns)
            own = reading.get(tenant)
            if own:
                next_entry: _Entry | None = own.pop()
            elif may_admit and tenant in self._waiting:
                next_entry, may_admit = self._admit_from(tenant)
            else:
                next_entry = None
            if next_entry is None:
                continue
            span = self._chunk(next_entry, budget)
            budget -= span.count
            spans.append(span)
            heapq.heappush(turns, (self._ledger[tenant], tenant))
        return spans

    def _admit_from(self, tenant: str) -> tuple[_Entry | None, bool]:
        """The tenant's next sequence, now running, or None; and whether anyone else may still be admitted.

        Nobody overtakes a sequence that does not fit, or a long one would wait for ever behind short ones.
        """
        for entry in islice(self._waiting[tenant].values(), _LOOK_AHEAD):
            if not entry.reads_all and self.blocks.is_awaiting(entry.live):
                continue
            if not self._fits(entry):
                return None, False
            self._start(entry)
            return entry, True
        return None, True

    def _chunk(self, entry: _Entry, budget: int) -> Span:
        live = entry.live
        count = min(budget, len(live.tokens) - live.num_computed)
        end = live.num_computed + count
        self._charge(entry, end)
        return Span(live, live.num_computed, count, 0, end == len(live.tokens))

    def _fits(self, entry: _Entry) -> bool:
        """Whether there is a place and blocks, with one more left for each that runs: they grow on."""
        if self._count_running() >= self.config.max_live:
            return False
        needed = self.blocks.num_needed(entry.live, use_cache=not entry.reads_all)
        return needed + self._count_running() <= self.blocks.num_free

    def _most_served(self, least_running: int) -> _Entry | None:
        """The latest arrival that runs for the most-served tenant of those with at least so many running."""
        tenants = [tenant for tenant, count in self._num_running.items() if count >= least_running]
        if not tenants:
            return None
        tenant = max(tenants, key=self._ledger.__getitem__)
        own = (entry for entry in self._running() if entry.live.tenant == tenant)
        return max(own, key=lambda entry: entry.arrival)

    def _running(self) -> Iterator[_Entry]:
        return chain(self._reading.values(), self._decoding.values())

    def _count_running(self) -> int:
        return len(self._reading) + len(self._decoding)

    # Moving between queue and batch

    def _start(self, entry: _Entry) -> None:
        live = entry.live
        self._unqueue(entry)
        admitted = self.blocks.admit(live, use_cache=not entry.reads_all)
        assert admitted, "it was seen to fit"
        self._reading[live.id] = entry
        self._num_running[live.tenant] = self._num_running.get(live.tenant, 0) + 1
        if entry.was_admitted:
            return
        entry.was_admitted = True
        live.num_cached = live.num_computed
        entry.num_charged = live.num_computed  # what is found costs nothing
        self._counts["num_admitted"] += 1
        self._counts["num_prompt_tokens"] += live.num_prompt
        self._counts["num_cached_tokens"] += live.num_cached

    def _stop(self, entry: _Entry) -> None:
        tenant = entry.live.tenant
        del (self._decoding if entry.live.id in self._decoding else self._reading)[entry.live.id]
        self._num_running[tenant] -= 1
        if not self._num_running[tenant]:
            del self._num_running[tenant]
        self.blocks.release(entry.live)

    def _requeue(self, entry: _Entry) -> None:
        """Back to the front of its tenant's queue, to be computed again."""
        live = entry.live
        self._stop(entry)
        live.draft = []
        queue = self._waiting.setdefault(live.tenant, OrderedDict())
        queue[live.id] = entry
        queue.move_to_end(live.id, last=False)

    def _unqueue(self, entry: _Entry) -> None:
        tenant = entry.live.tenant
        del self._waiting[tenant][entry.live.id]
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._ledger.left(tenant)

    # Accounts

    def _accept(self, span: Span, tokens: Sequence[int]) -> None:
        live = span.live
        assert 1 <= len(tokens) <= span.num_draft + 1, f"{len(tokens)} tokens after a draft of {span.num_draft}"
        live.tokens.extend(tokens)
        live.num_computed += len(tokens) - 1
        live.draft = []
        if live.id in self._reading:
            self._decoding[live.id] = self._reading.pop(live.id)
        if span.num_draft:
            self.blocks.trim(live, len(live.tokens))
            self._counts["num_draft_tokens"] += span.num_draft
            self._counts["num_accepted_tokens"] += len(tokens) - 1
        self._ledger.wrote(live.tenant, len(tokens))
        self._counts["num_output_tokens"] += len(tokens)

    def _charge(self, entry: _Entry, end: int) -> None:
        """Put the prompt's positions up to `end` on the tenant's account, each once, however often it is computed."""
        end = min(end, entry.live.num_prompt)
        if end > entry.num_charged:
            self._ledger.read(entry.live.tenant, end - entry.num_charged)
            entry.num_charged = end
