"""The scheduler, driven by a model without tensors that checks what it reads: the same answers under any schedule."""

from __future__ import annotations

import random
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from infer_memory import VOCAB, Memory, accepted, answer

from fledge.errors import ConfigError, UserError
from fledge.infer.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT
from fledge.infer.scheduler import Scheduler, SchedulerConfig
from fledge.infer.sequence import Live, StepPlan


class Driver:
    """An engine in small: adds requests, runs plans, ends sequences at their `max_tokens`."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.scheduler = Scheduler(config)
        self.memory = Memory(config.num_blocks, config.block_size)
        self.going: dict[int, Live] = {}
        self.num_made = 0

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        tenant: str = "",
        *,
        reads_all: bool = False,
        salt: str | None = None,
    ) -> Live:
        live = Live(self.num_made, list(prompt), len(prompt), max_tokens, tenant, tenant if salt is None else salt)
        self.num_made += 1
        self.scheduler.add(live, reads_all=reads_all)
        self.going[live.id] = live
        return live

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert plan is not None
        config = self.scheduler.config
        assert 0 < plan.num_tokens <= config.max_step_tokens
        assert len({span.live.id for span in plan.spans}) == len(plan.spans) <= config.max_live
        return plan

    def finish_step(self, plan: StepPlan) -> None:
        spans = [span for span in plan.spans if span.live.id in self.going]  # the others were cancelled meanwhile
        said = {span.live.id: accepted(span, self.memory.run(span)) for span in spans}
        for span in spans:
            assert span.draws == (span.start + span.count - span.num_draft == len(span.live.tokens))
        self.scheduler.commit(plan, {span.live.id: said[span.live.id] for span in spans if span.draws})
        self.scheduler.blocks.check()
        for span in spans:
            if span.live.num_generated == span.live.max_tokens:
                self.scheduler.finish(span.live.id)
                del self.going[span.live.id]

    def step(self) -> StepPlan:
        plan = self.plan()
        self.finish_step(plan)
        return plan

    def steps(self) -> Iterator[StepPlan]:
        while self.going:
            yield self.step()
        assert self.scheduler.plan() is None
        assert not self.scheduler.has_work
        assert self.scheduler.blocks.num_free == self.scheduler.config.num_blocks

    def cancel(self, live: Live) -> None:
        assert self.scheduler.cancel(live.id)
        del self.going[live.id]


def spoken(live: Live) -> list[int]:
    return live.tokens[live.num_prompt :]


def oracle(live: Live) -> list[int]:
    return answer(live.salt, live.tokens[: live.num_prompt], live.max_tokens)


ROOMY = SchedulerConfig(num_blocks=1000, block_size=4, max_live=8, max_step_tokens=16)

configs = st.builds(
    SchedulerConfig,
    num_blocks=st.integers(10, 40),
    block_size=st.sampled_from([1, 3, 4, 16]),
    max_live=st.integers(1, 6),
    max_step_tokens=st.sampled_from([6, 7, 30, 1000]),
)


@settings(max_examples=120, deadline=None)
@given(configs, st.integers(0, 2**32))
def test_whatever_the_schedule_every_answer_is_the_same_and_no_block_is_lost(
    config: SchedulerConfig, seed: int
) -> None:
    generator = random.Random(seed)
    driver, lives, cancelled = Driver(config), [], set()
    room = config.num_blocks * config.block_size
    while driver.going or len(lives) < 25:
        if len(lives) < 25 and generator.random() < 0.5:
            prompt = [0] * generator.randint(0, 9) + generator.choices(range(VOCAB), k=generator.randint(1, 9))
            max_tokens = generator.randint(1, 12)
            if len(prompt) + max_tokens <= room:
                tenant, reads_all = generator.choice("ab"), generator.random() < 0.2
                lives.append(driver.add(prompt, max_tokens, tenant, reads_all=reads_all))
        if not driver.going:
            continue
        plan = driver.plan()
        if generator.random() < 0.1:  # while a step runs
            driver.cancel(leaving := generator.choice(list(driver.going.values())))
            cancelled.add(leaving.id)
        driver.finish_step(plan)
        for live in driver.going.values():  # drafts that are partly right
            guess = answer(live.salt, live.tokens, 4)
            live.draft = [
                *guess[: generator.randint(0, 4)],
                *generator.choices(range(VOCAB), k=generator.randint(0, 2)),
            ]
    for live in lives:
        if live.id not in cancelled:
            assert spoken(live) == oracle(live)
    assert driver.scheduler.blocks.num_free == config.num_blocks
    assert driver.scheduler.served() == {}


def test_sequences_join_and_leave_the_batch_at_any_step() -> None:
    driver = Driver(ROOMY)
    driver.add([0, 1], max_tokens=6)
    driver.step()
    driver.add([1], max_tokens=2)
    sizes = [len(plan.spans) for plan in driver.steps()]
    assert sizes == [2, 2, 1, 1, 1]


def test_prompts_are_read_in_chunks_beside_those_that_decode() -> None:
    driver = Driver(SchedulerConfig(num_blocks=100, block_size=4, max_live=4, max_step_tokens=10))
    short = driver.add([1, 2], max_tokens=8)
    driver.step()
    long = driver.add([0] * 30, max_tokens=1)
    counts = [{span.live.id: span.count for span in plan.spans} for plan in driver.steps()]
    assert counts[:4] == [{short.id: 1, long.id: 9}] * 3 + [{short.id: 1, long.id: 3}]
    assert len(counts) == 7


def test_a_preempted_sequence_resumes_with_the_same_tokens() -> None:
    driver = Driver(SchedulerConfig(num_blocks=8, block_size=2, max_live=4, max_step_tokens=8))
    lives = [driver.add([i, i, i], max_tokens=10) for i in range(3)]
    for _ in driver.steps():
        pass
    assert driver.scheduler.stats().num_preempted > 0
    assert [spoken(live) for live in lives] == [oracle(live) for live in lives]


def until_preempted(driver: Driver) -> None:
    for _ in driver.steps():
        if driver.scheduler.stats().num_preempted:
            return


def test_out_of_blocks_the_latest_of_the_most_served_tenant_goes() -> None:
    driver = Driver(SchedulerConfig(num_blocks=18, block_size=2, max_live=4, max_step_tokens=8))
    hungry = [driver.add([i] * 3, max_tokens=20, tenant="hungry") for i in range(2)]
    for _ in range(4):
        driver.step()
    modest = driver.add([2] * 3, max_tokens=20, tenant="modest")
    until_preempted(driver)
    assert [bool(live.blocks) for live in (*hungry, modest)] == [True, False, True]
    assert driver.scheduler.stats().num_displaced == 0


def test_what_was_preempted_goes_before_what_came_later() -> None:
    driver = Driver(SchedulerConfig(num_blocks=10, block_size=2, max_live=2, max_step_tokens=8))
    first, second = (driver.add([i] * 3, max_tokens=10) for i in range(2))
    later = driver.add([2] * 3, max_tokens=2)
    until_preempted(driver)
    assert first.blocks
    num_before = second.num_generated
    while not later.num_generated:
        driver.step()
    assert second.num_generated > num_before


def test_one_block_is_left_for_each_sequence_that_runs_when_another_joins() -> None:
    driver = Driver(SchedulerConfig(num_blocks=6, block_size=2, max_live=4, max_step_tokens=8))
    driver.add([0] * 3, max_tokens=3)  # has two blocks
    driver.step()
    joins = driver.add([1] * 7, max_tokens=2)  # four more would leave none
    driver.step()
    assert not joins.blocks
    for _ in driver.steps():
        pass
    assert driver.scheduler.stats().num_preempted == 0


def test_answers_to_one_prompt_share_its_full_blocks_and_read_it_once() -> None:
    driver = Driver(SchedulerConfig(num_blocks=100, block_size=4, max_live=8, max_step_tokens=8))
    lives = [driver.add([1] * 14, max_tokens=3, tenant="a") for _ in range(4)]
    num_read = 0
    while any(not live.num_generated for live in lives):
        num_read += sum(span.count for span in driver.step().spans if span.start < 14)
    assert num_read == 14 + 3 * 2, "twelve positions are shared, the last two are each answer's own"
    assert [live.num_cached for live in lives] == [0, 12, 12, 12]
    running = [live for live in lives if live.blocks]
    assert len({tuple(live.blocks[:3]) for live in running}) == 1
    assert len({live.blocks[3] for live in running}) == len(running) > 1


def test_the_answers_share_the_prompt_although_the_first_one_is_cancelled() -> None:
    driver = Driver(SchedulerConfig(num_blocks=100, block_size=4, max_live=8, max_step_tokens=8))
    lives = [driver.add([1] * 30, max_tokens=3) for _ in range(3)]
    driver.step()
    driver.cancel(lives[0])
    for _ in driver.steps():
        pass
    assert [live.num_cached for live in lives[1:]] == [8, 28]
    assert spoken(lives[2]) == oracle(lives[2])


def test_a_prompt_whose_log_probabilities_are_wanted_is_read_whole() -> None:
    driver = Driver(ROOMY)
    driver.add([1] * 12)
    for _ in driver.steps():
        pass
    again = driver.add([1] * 12, reads_all=True)
    [span] = driver.step().spans
    assert (span.start, span.count, again.num_cached) == (0, 12, 0)


def test_a_cancelled_sequence_is_gone_from_the_next_step_and_its_blocks_are_free() -> None:
    driver = Driver(ROOMY)
    stays, goes, waits = driver.add([0] * 9), driver.add([1] * 9, max_tokens=50), driver.add([2] * 9)
    driver.step()
    plan = driver.plan()
    driver.cancel(goes)
    driver.finish_step(plan)
    assert goes.blocks == []
    driver.cancel(waits)
    assert [span.live for span in driver.step().spans] == [stays]
    assert not driver.scheduler.cancel(goes.id)
    for _ in driver.steps():
        pass


def test_drafts_leave_room_for_prompts_and_for_blocks() -> None:
    driver = Driver(SchedulerConfig(num_blocks=30, block_size=2, max_live=2, max_step_tokens=10))
    guessing = driver.add([1], max_tokens=30)
    driver.step()
    guessing.draft = [0] * 20
    reading = driver.add([2] * 20)
    first, second = driver.plan().spans
    assert (first.live, first.num_draft, second.live, second.count) == (guessing, 4, reading, 5)


def test_a_draft_never_runs_past_the_end_of_the_answer() -> None:
    driver = Driver(ROOMY)
    live = driver.add([1], max_tokens=4)
    driver.step()
    live.draft = answer("", live.tokens, 9)
    [span] = driver.plan().spans
    assert span.num_draft == 2  # one token is there, two of the draft and the one after them make four


def test_accepted_drafts_count_and_refused_ones_give_their_blocks_back() -> None:
    driver = Driver(ROOMY)
    live = driver.add([1] * 4, max_tokens=40)
    driver.step()
    truth = answer("", live.tokens, 8)
    live.draft = [*truth[:2], (truth[2] + 1) % VOCAB, *truth[3:8]]
    driver.step()
    assert spoken(live)[1:] == truth[:3]
    assert len(live.blocks) == 2  # eight tokens in blocks of four
    stats = driver.scheduler.stats()
    assert (stats.num_draft_tokens, stats.num_accepted_tokens) == (8, 2)


def test_changed_weights_mean_that_everything_is_computed_again() -> None:
    driver = Driver(ROOMY)
    live = driver.add([1] * 9, max_tokens=5)
    driver.step()
    driver.scheduler.flush()
    assert driver.scheduler.stats().num_findable_blocks == 0
    [span] = driver.step().spans
    assert (span.start, span.count) == (0, 10)
    for _ in driver.steps():
        pass
    assert spoken(live) == oracle(live)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    driver = Driver(SchedulerConfig(num_blocks=4, block_size=4, max_live=2, max_step_tokens=8))
    driver.add([0] * 10, max_tokens=6)
    with pytest.raises(UserError, match=r"10 tokens and max_tokens 7 need 17 positions of cache, the engine has 16"):
        driver.add([0] * 10, max_tokens=7)
    for _ in driver.steps():
        pass


def test_a_config_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_step_tokens 8 is less than max_live 9"):
        SchedulerConfig(num_blocks=1, max_live=9, max_step_tokens=8)
    with pytest.raises(ConfigError, match="block_size must be at least 1, got 0"):
        SchedulerConfig(num_blocks=1, block_size=0)


def test_a_long_prompt_is_not_overtaken_for_ever_by_short_ones() -> None:
    driver = Driver(SchedulerConfig(num_blocks=24, block_size=2, max_live=6, max_step_tokens=40))
    driver.add([0], max_tokens=40, tenant="long")
    for _ in range(5):
        driver.add([2], max_tokens=8, tenant="short")
        driver.step()
    long = driver.add([1] * 30, max_tokens=2, tenant="long")
    for step in range(30):
        driver.add([2, step % VOCAB], max_tokens=8, tenant="short")
        driver.step()
        if long.num_generated:
            break
    assert step <= 12, "short ones were let in although the least-served tenant waits for room"


def test_two_tenants_who_both_wait_get_the_same_service_whatever_they_send() -> None:
    """Theorem 4.4 of VTC: the difference is at most 2 max(w_p x longest prompt, w_q x tokens that fit in memory)."""
    config = SchedulerConfig(num_blocks=64, block_size=4, max_live=6, max_step_tokens=32)
    driver = Driver(config)
    generator = random.Random(0)
    bound = 2 * max(INPUT_WEIGHT * 60, OUTPUT_WEIGHT * config.num_blocks * config.block_size)
    shapes = {"long": (60, 4), "talker": (3, 40)}
    service = dict.fromkeys(shapes, 0)
    for _ in range(3000):
        for tenant, (num_prompt, max_tokens) in shapes.items():
            waiting = sum(live.tenant == tenant and not live.blocks for live in driver.going.values())
            for _ in range(2 - waiting):
                driver.add(generator.choices(range(VOCAB), k=num_prompt), max_tokens, tenant)
        for span in driver.step().spans:
            service[span.live.tenant] += (
                INPUT_WEIGHT * span.count if span.start < span.live.num_prompt else OUTPUT_WEIGHT
            )
        assert abs(service["long"] - service["talker"]) <= bound
    assert min(service.values()) > 4 * bound


def test_a_newcomer_does_not_wait_for_the_answers_of_a_flood_to_end() -> None:
    driver = Driver(SchedulerConfig(num_blocks=400, block_size=4, max_live=8, max_step_tokens=32))
    for index in range(60):
        driver.add([index % VOCAB] * 5, max_tokens=100, tenant="flood")
    for _ in range(20):
        driver.step()
    newcomer = driver.add([1, 2, 0], max_tokens=3, tenant="newcomer")
    driver.step()
    driver.step()
    assert newcomer.num_generated
    assert driver.scheduler.stats().num_displaced == 1


def test_a_tenant_has_no_credit_from_the_time_when_it_asked_for_nothing() -> None:
    driver = Driver(SchedulerConfig(num_blocks=400, block_size=4, max_live=1, max_step_tokens=32))
    for _ in range(20):
        driver.add([1], max_tokens=20, tenant="busy")
    for _ in range(200):
        driver.step()
    served = driver.scheduler.served()["busy"]
    driver.add([1], tenant="idle")
    assert driver.scheduler.served()["idle"] >= served - OUTPUT_WEIGHT * 20
