"""Gold beside proxy: the looks become a chart over the root of KL, and Gao's form is found again where it holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fledge.recipes.align_gold import LOOKS, fitted, gold_report


def looks(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / LOOKS).write_text("".join(json.dumps({"stage": "ppo", **row}) + "\n" for row in rows))
    return folder


def gold_at(d: float) -> float:
    return 0.3 + d * (1.5 - 0.8 * math.log(d))


def test_the_form_of_gao_is_found_again() -> None:
    distances = [0.2 * n for n in range(1, 12)]
    found = fitted(distances, [gold_at(d) for d in distances])
    assert found == pytest.approx((1.5, 0.8, 0.3))
    assert fitted([0.0, *distances], [9.0, *map(gold_at, distances)]) == pytest.approx(found)  # log 0 is no point


def test_a_form_that_says_nothing_is_not_shown() -> None:
    assert fitted([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]) is None
    assert fitted([0.5] * 9, [1.0] * 9) is None
    distances = [0.2 * n for n in range(1, 12)]
    assert fitted(distances, [d * math.log(d) for d in distances]) is None  # turns the other way


def test_the_chart_has_both_scores_over_the_root_of_kl_in_order(tmp_path: Path) -> None:
    rows = [{"step": n, "gold": gold_at(0.2 * n), "proxy": 1.0 * n, "kl": (0.2 * n) ** 2} for n in (5, 1, 4, 2, 9, 20)]
    rows.append({"step": 30, "gold": 0.0, "proxy": None, "kl": -0.01})
    facts, (curve,) = gold_report(looks(tmp_path, rows))
    proxy, gold, fit = curve.series
    assert proxy.x == gold.x == pytest.approx((0.0, 0.2, 0.4, 0.8, 1.0, 1.8, 4.0))
    assert proxy.y == (None, 1.0, 2.0, 4.0, 5.0, 9.0, 20.0)
    assert min(fit.x) == pytest.approx(0.2)
    assert "1.50 − 0.80 log d" in curve.note
    best = max(rows, key=lambda row: row["gold"])
    assert (facts[0].value, facts[0].unit) == (best["gold"], f"after round {best['step']}")


def test_without_looks_there_is_no_chart(tmp_path: Path) -> None:
    assert gold_report(tmp_path) == ((), ())
