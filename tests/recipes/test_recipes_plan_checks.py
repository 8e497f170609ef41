"""Every leaf of a plan is taken, or refused by name before any work; none is found out about in the middle of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fledge.config import override, to_json
from fledge.errors import ConfigError
from fledge.recipes.plan_checks import check_plan
from fledge.recipes.pocket import pocket
from fledge.recipes.raise_ import Order, plan_of

PLAN = pocket()
# What these leaves cannot be: below what the code that reads them can do anything with.
SHARES = ("warmup", "cooldown", "final", "code_share", "prose_share", "rate", "spm_share", "max_bad_share", "ema_decay")
MAY_BE_ZERO = (
    *SHARES, "seed", "lr", "eps", "decay", "momentum", "save_seconds", "prompts_shown", "table_rows", "sft_samples",
    "base_samples", "gamma", "lam", "pretrain_weight", "pretrain_ratio", "warmup_rounds", "beta",
)  # fmt: skip
MAY_BE_BELOW = ("missing_end_score",)  # a score may be anything


def leaves(values: Any, path: str = "") -> list[tuple[str, float]]:
    """The numbers of a plan by their paths."""
    if isinstance(values, dict):
        return [leaf for key, value in values.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]
    return [(path, values)] if isinstance(values, int | float) and not isinstance(values, bool) else []


NUMBERS = [path for path, _ in leaves(to_json(PLAN)) if path != "depth" and not path.startswith("corpus.limits.")]


def refusal(assignment: str) -> str:
    """The one line with which a plan that was changed so is refused."""
    with pytest.raises(ConfigError) as caught:
        check_plan(override(PLAN, [assignment]))
    said = str(caught.value)
    assert "\n" not in said
    return said


def name_of(path: str) -> str:
    return path.rpartition(".")[2]


@pytest.mark.parametrize("path", [path for path in NUMBERS if name_of(path) not in MAY_BE_BELOW])
def test_no_number_of_a_plan_may_be_negative(path: str) -> None:
    assert name_of(path) in refusal(f"{path}=-1")


@pytest.mark.parametrize("path", [path for path in NUMBERS if name_of(path) not in (*MAY_BE_ZERO, *MAY_BE_BELOW)])
def test_what_counts_or_divides_may_not_be_zero(path: str) -> None:
    assert name_of(path) in refusal(f"{path}=0")


@pytest.mark.parametrize("path", [path for path in NUMBERS if name_of(path) in SHARES])
def test_a_share_may_not_be_more_than_all(path: str) -> None:
    assert name_of(path) in refusal(f"{path}=1.5")


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("evaluation.orders=[]", "orders are []"),
        ("evaluation.orders=[0]", "orders are [0]"),
        ("evaluation.shots=[-1]", "shots are [-1]"),
        ("evaluation.benchmark_limit=0", "benchmark_limit is 0"),
        ("pretrain.fit.clip_norm=0", "clip_norm is 0.0"),
        ("pretrain.fit.optim.matrix.betas=[0.9, 1.0]", "betas"),
        ("model.max_positions=0", "max_positions must be positive"),
        ("ppo.dual_clip=0.5", "dual_clip is 0.5: expected 1 or more"),
        ("seed=99999999999999999999", "expected 0 to"),
    ],
)
def test_lists_and_what_is_usually_unset_are_checked_too(assignment: str, complaint: str) -> None:
    assert complaint in refusal(assignment)


def test_what_only_says_what_was_ordered_is_refused_where_it_would_change_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("A note.")
    for setting in ("depth=6", "recipe=mine", "corpus.text=/elsewhere", 'corpus.text_hash="0"'):
        with pytest.raises(ConfigError, match=setting.partition("=")[0]):
            plan_of(Order("pocket", text=tmp_path, overrides=(setting,)))
