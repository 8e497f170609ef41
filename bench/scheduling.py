"""Scheduling simulated: what tenants wait for beside one that floods the engine, and what the cache memory buys.

    python bench/scheduling.py [--requests 4000] [--seed 0]

No model runs; a step takes the time that fledge.infer.simulation.StepCost states. Prints two tables for the docs.
"""

from __future__ import annotations

import argparse

from fledge.infer.scheduler import SchedulerConfig
from fledge.infer.simulation import Arrival, Report, TenantLoad, arrivals, simulate

MAX_POSITIONS = 2048


def loads(num_requests: int) -> list[TenantLoad]:
    """Four tenants that together ask for about half of what the engine gives, and one that asks for everything."""
    part = num_requests // 10
    return [
        TenantLoad("chat", part * 2, gap_seconds=8.0, num_turns=4),
        TenantLoad("assistant", part * 2, gap_seconds=4.0, num_system=512, mean_prompt=60, num_turns=2),
        TenantLoad("batch", part, gap_seconds=6.0, mean_prompt=400, mean_answer=40),
        TenantLoad("rare", part // 2, gap_seconds=12.0, mean_answer=50),
        TenantLoad("flood", num_requests - 5 * part - part // 2, gap_seconds=0.05, mean_answer=200, impatient=0.05),
    ]


def tenant_table(report: Report) -> str:
    rows = [
        "| tenant | requests | tokens | wait p50 s | wait p99 s | wait max s | gap p99 s |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in report.tenants:
        rows.append(
            f"| {one.name} | {one.num_requests:,} | {one.num_tokens:,} | {one.wait_p50:.2f} | {one.wait_p99:.2f} "
            f"| {one.wait_max:.2f} | {one.gap_p99:.3f} |"
        )
    return "\n".join(rows)


def memory_table(requests: list[Arrival]) -> str:
    rows = [
        "| cache positions | found in the cache | preempted | displaced | positions run | worst wait p99 s |",
        "|---|---|---|---|---|---|",
    ]
    for num_blocks in (256, 512, 1024, 2048, 4096):
        report = simulate(requests, SchedulerConfig(num_blocks=num_blocks))
        stats = report.stats
        worst = max(one.wait_p99 for one in report.tenants if one.name != "flood")
        rows.append(
            f"| {num_blocks * 16:,} | {report.hit_rate:.1%} | {stats.num_preempted:,} | {stats.num_displaced:,} "
            f"| {report.num_positions:,} | {worst:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    requests = arrivals(loads(args.requests), max_positions=MAX_POSITIONS, seed=args.seed)
    report = simulate(requests, SchedulerConfig(num_blocks=1024))
    print(f"{len(requests):,} requests of {len(report.tenants)} tenants, 1024 blocks of 16, at most 64 at once:\n")
    print(tenant_table(report))
    alone = simulate([one for one in requests if one.tenant != "flood"], SchedulerConfig(num_blocks=1024))
    print("\nThe same without the flood:\n")
    print(tenant_table(alone))
    print("\nAll of them, by cache memory (the worst wait is that of the tenants beside the flood):\n")
    print(memory_table(requests))


if __name__ == "__main__":
    main()
