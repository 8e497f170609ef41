"""Thousands of requests through the scheduler, without a model: nobody starves, nothing is lost."""

from __future__ import annotations

import itertools
import statistics

import pytest

from fledge.infer.scheduler import SchedulerConfig
from fledge.infer.simulation import Report, StepCost, TenantLoad, TenantReport, arrivals, simulate

QUIET = [
    TenantLoad("chat", 150, gap_seconds=8.0, num_turns=3),
    TenantLoad("assistant", 150, gap_seconds=4.0, num_system=256, mean_prompt=60, mean_answer=60),
    TenantLoad("rare", 40, gap_seconds=12.0, mean_answer=40),
]
FLOOD = TenantLoad("flood", 600, gap_seconds=0.02, mean_answer=120)
CONFIG = SchedulerConfig(num_blocks=512)


def by_name(report: Report) -> dict[str, TenantReport]:
    return {one.name: one for one in report.tenants}


@pytest.fixture(scope="module")
def beside_the_flood() -> Report:
    return simulate(arrivals([*QUIET, FLOOD], max_positions=1024, seed=0), CONFIG)


def test_nobody_starves_beside_a_flood_and_the_flood_is_served_too(beside_the_flood: Report) -> None:
    for one in beside_the_flood.tenants:
        assert one.num_answered == one.num_requests
        assert one.num_refused == 0


def test_a_tenants_wait_is_bounded_whatever_another_sends(beside_the_flood: Report) -> None:
    """A quiet tenant waits for steps and for its own requests, never for the flood's."""
    tenants = by_name(beside_the_flood)
    assert tenants["flood"].wait_p50 > 40
    for load in QUIET:
        assert tenants[load.name].wait_p50 < 1
        assert tenants[load.name].wait_max < 10


def test_ten_times_the_flood_does_not_make_the_others_wait_longer(beside_the_flood: Report) -> None:
    patient = TenantLoad("flood", 3000, gap_seconds=0.002, mean_answer=20)
    report = simulate(arrivals([*QUIET, patient], max_positions=1024, seed=0), CONFIG)
    before, after = by_name(beside_the_flood), by_name(report)
    for load in QUIET:
        assert after[load.name].wait_p50 < 1
        assert after[load.name].wait_max < 2 * before[load.name].wait_max


def test_conversations_and_system_prompts_are_found_in_the_cache(beside_the_flood: Report) -> None:
    alone = simulate(arrivals(QUIET, max_positions=1024, seed=0), CONFIG)
    assert 0.5 < alone.hit_rate < 0.9
    assert 0.2 < beside_the_flood.hit_rate < alone.hit_rate


def test_little_memory_means_preemption_and_waiting_but_the_same_answers() -> None:
    requests = arrivals([*QUIET, FLOOD], max_positions=512, seed=1)[:400]
    tight = simulate(requests, SchedulerConfig(num_blocks=64))
    roomy = simulate(requests, SchedulerConfig(num_blocks=8192))
    assert tight.stats.num_preempted > 20
    assert roomy.stats.num_preempted == 0
    assert tight.num_positions > roomy.num_positions
    assert {one.name: one.num_tokens for one in tight.tenants} == {one.name: one.num_tokens for one in roomy.tenants}


def test_what_cannot_fit_is_refused_and_the_rest_is_served() -> None:
    report = simulate(arrivals([FLOOD], max_positions=1024, seed=2)[:200], SchedulerConfig(num_blocks=24))
    [flood] = report.tenants
    assert flood.num_refused > 5
    assert flood.num_refused + flood.num_answered == flood.num_requests == 200


def test_ten_thousand_requests_with_cancellations_leave_every_block_free() -> None:
    loads = [
        TenantLoad(
            f"tenant {index}",
            2500,
            gap_seconds=0.2,
            num_system=20 * index,
            mean_prompt=40,
            mean_answer=12,
            impatient=0.4,
            patience_seconds=4.0,
        )
        for index in range(4)
    ]
    report = simulate(arrivals(loads, max_positions=400, seed=3), SchedulerConfig(num_blocks=100, max_live=32))
    stats = report.stats
    assert sum(one.num_requests for one in report.tenants) == 10_000
    assert sum(one.num_cancelled for one in report.tenants) > 1000
    assert all(one.num_answered + one.num_cancelled == one.num_requests for one in report.tenants)
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks == 100


def test_an_idle_engine_answers_at_once() -> None:
    load = TenantLoad("one", 1, gap_seconds=1.0, mean_prompt=50, mean_answer=10)
    [request] = arrivals([load], max_positions=400, seed=0)
    cost = StepCost(step_seconds=1.0, position_seconds=0.0)
    [one] = simulate([request], CONFIG, cost).tenants
    assert one.wait_max == pytest.approx(1.0)
    assert one.num_tokens == len(request.answer)


def test_lengths_and_gaps_have_the_shape_they_say() -> None:
    load = TenantLoad("one", 4000, gap_seconds=3.0, burstiness=2.0, num_system=0, mean_prompt=100, mean_answer=80)
    requests = arrivals([load], max_positions=100_000, seed=0)
    assert statistics.mean(len(one.answer) for one in requests) == pytest.approx(80, rel=0.1)
    lengths = [len(one.prompt) for one in requests]
    assert statistics.mean(lengths) == pytest.approx(0.9 * 100 + 0.1 * 200, rel=0.15)  # a Pareto tail of shape 2: twice
    gaps = [later.seconds - one.seconds for one, later in itertools.pairwise(requests)]
    assert statistics.mean(gaps) == pytest.approx(3.0, rel=0.2)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(2.0, rel=0.2)
