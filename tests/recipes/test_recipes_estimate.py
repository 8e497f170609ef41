"""What a plan would take, from rates that are given: every stage has a row, and the work in it counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fledge.errors import ConfigError
from fledge.recipes import estimate as estimating
from fledge.recipes.estimate import Rates, StageEstimate, estimate, measured_rates
from fledge.recipes.plan import RingPlan
from fledge.recipes.raise_ import RECIPES, ring_of

RATES = Rates(
    document_seconds=2e-3,
    step_seconds=0.2,
    compile_seconds=20.0,
    eager_token_seconds=1.5e-4,
    forward_token_seconds=4e-5,
    decode_seconds=8e-3,
    count_seconds=4e-6,
)


@pytest.fixture(autouse=True)
def given_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "measured_rates", lambda plan: RATES)


def rows_of(plan: RingPlan) -> dict[str, StageEstimate]:
    return {row.stage: row for row in estimate(plan)}


def recipe(name: str) -> RingPlan:
    return next(row.build(None) for row in RECIPES if row.name == name)


@pytest.mark.parametrize("name", [row.name for row in RECIPES])
def test_every_stage_that_would_run_has_a_row_and_the_last_is_their_sum(name: str) -> None:
    plan = recipe(name)
    *rows, total = estimate(plan)
    assert [row.stage for row in rows] == [stage.name for stage in ring_of(plan)]
    assert all(row.seconds > 0 and row.bytes > 0 for row in rows)
    assert total.seconds == pytest.approx(sum(row.seconds for row in rows))
    assert total.flops == pytest.approx(sum(row.flops for row in rows))
    assert total.bytes == max(row.bytes for row in rows)


def test_the_control_costs_a_ppo_without_its_pretraining_rows() -> None:
    rows = rows_of(recipe("fledgling"))
    assert 0.5 * rows["ppo"].flops < rows["control"].flops < rows["ppo"].flops
    assert rows["control"].seconds < rows["ppo"].seconds
    assert rows["control"].work == rows["ppo"].work


def test_multiple_choice_is_counted_by_questions_choices_shots_and_models() -> None:
    plan = recipe("pocket")

    def seconds(**changes: object) -> float:
        changed = replace(plan, evaluation=replace(plan.evaluation, **changes))  # type: ignore[arg-type]
        return rows_of(changed)["evaluation"].seconds

    without = seconds()
    one = seconds(benchmarks=("piqa",), shots=(0,)) - without
    assert one == pytest.approx(4 * 1500 * 2 * 40 * RATES.forward_token_seconds)
    assert seconds(benchmarks=("piqa",), shots=(0, 1)) - without == pytest.approx(3 * one)
    assert seconds(benchmarks=("piqa",), shots=(0,), benchmark_limit=150) - without == pytest.approx(one / 10)
    # However many examples are shown, no more than a row is read.
    assert seconds(benchmarks=("piqa",), shots=(50,)) == seconds(benchmarks=("piqa",), shots=(99,))


def test_twice_the_steps_take_twice_the_time() -> None:
    plan = recipe("pocket")
    fit = plan.pretrain.fit
    longer = replace(plan, pretrain=replace(plan.pretrain, fit=replace(fit, steps=2 * fit.steps)))
    gained = rows_of(longer)["pretrain"].seconds - rows_of(plan)["pretrain"].seconds
    assert gained == pytest.approx(fit.steps * RATES.step_seconds)


def test_rates_are_measured_once_a_plan_and_a_damaged_note_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure(plan: RingPlan) -> Rates:
        asked.append(plan.seed)
        return RATES

    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    monkeypatch.setattr(estimating, "_measure", measure)
    plan = recipe("pocket")
    assert measured_rates(plan) == measured_rates(plan) == RATES
    assert asked == [0]
    measured_rates(replace(plan, seed=1))
    assert asked == [0, 1]
    (note, _) = sorted((tmp_path / "rates").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    note.write_text("{")
    assert measured_rates(plan) == RATES
    assert asked == [0, 1, 0]


def test_of_the_users_folder_only_what_is_read_is_counted(tmp_path: Path) -> None:
    plan = recipe("pocket")
    (tmp_path / "notes.txt").write_text("a" * 2_000_000)
    own = replace(plan, corpus=replace(plan.corpus, text=str(tmp_path)))
    before = rows_of(own)["corpus"].work
    assert before == f"{float(rows_of(plan)['corpus'].work.split()[0]) + 2:.1f} MB of text"
    (tmp_path / "film.mp4").write_bytes(b"\0" * 5_000_000)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/pack.txt").write_text("b" * 5_000_000)
    assert rows_of(own)["corpus"].work == before


def test_what_the_machine_cannot_hold_is_refused_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    monkeypatch.setattr(estimating, "_measure", lambda plan: RATES)
    monkeypatch.setattr(estimating, "memory_bytes", lambda: 1 << 30)
    with pytest.raises(ConfigError, match=r"takes about \d GiB and this machine has 1; give a smaller --depth"):
        measured_rates(recipe("pocket"))
    monkeypatch.setattr(estimating, "memory_bytes", lambda: 1 << 40)
    assert measured_rates(recipe("pocket")) == RATES
