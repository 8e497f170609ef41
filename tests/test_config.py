"""Configs are read strictly, told apart by hash, and overridden leaf by leaf."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fledge.config import config_hash, from_json, override, to_json
from fledge.errors import ConfigError
from fledge.recipes.fledgling import fledgling
from fledge.recipes.plan import RingPlan
from fledge.recipes.pocket import pocket, sprout


@dataclass(frozen=True)
class Inner:
    lr_peak: float = 0.1
    kind: Literal["linear", "cosine"] = "linear"


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ()
    limit: int | None = None
    table: dict[str, Any] = field(default_factory=dict)
    is_on: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@pytest.mark.parametrize(
    "plan", [pocket(), pocket(6), sprout(), fledgling()], ids=["pocket", "deeper", "sprout", "fledgling"]
)
def test_a_plan_comes_back_from_json_as_it_was(plan: RingPlan) -> None:
    assert from_json(RingPlan, to_json(plan)) == plan
    assert config_hash(from_json(RingPlan, to_json(plan))) == config_hash(plan)


WRONG = [
    ({"step": 1}, "unknown key 'step'; did you mean 'steps'"),
    ({}, "missing key 'steps'"),
    ({"steps": 1.5}, "steps: expected int, got 1.5"),
    ({"steps": True}, "steps: expected int, got True"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"steps": 1, "inner": {"kind": "wave"}}, "inner.kind: 'wave' is not one of"),
    ({"steps": 1, "inner": 3}, "inner: expected an object"),
    ({"steps": 1, "names": "abc"}, "names: expected a list"),
    ({"steps": 1, "limit": "many"}, "limit: expected int"),
    ([], "expected an object"),
]


@pytest.mark.parametrize(("data", "complaint"), WRONG)
def test_what_does_not_fit_is_refused_by_path(data: object, complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_json(Outer, data)
    assert complaint in str(refused.value)


def test_leaves_are_overridden_and_the_original_stays() -> None:
    config = Outer(3)
    changed = override(
        config, ["inner.lr_peak=3e-4", "names=[\"a\"]", "limit=7", "table.width=64", "is_on=true", "inner.kind=cosine"]
    )  # fmt: skip
    assert changed == Outer(3, Inner(3e-4, "cosine"), ("a",), 7, {"width": 64}, is_on=True)
    assert config == Outer(3)
    assert override(changed, ["limit=null"]).limit is None
    assert override(config, ["steps=4", "steps=5"]).steps == 5


@dataclass(frozen=True)
class Divided:
    whole: int = 8
    part: int = 4
    outer: Outer = field(default_factory=lambda: Outer(1))

    def __post_init__(self) -> None:
        if self.whole % self.part:
            raise ValueError(f"part {self.part} must divide whole {self.whole}")


def test_settings_that_belong_together_may_come_in_any_order() -> None:
    for order in (["whole=9", "part=3"], ["part=3", "whole=9"]):
        assert override(Divided(), [*order, "outer.steps=2"]) == Divided(9, 3, Outer(2))
    with pytest.raises(ConfigError, match=r"^whole: part 4 must divide whole 9$"):
        override(Divided(), ["whole=9"])


REFUSED = [
    ("inner.lr_paek=1", "did you mean 'lr_peak'"),
    ("inner=1", "is a group"),
    ("steps.a=1", "goes deeper"),
    ("steps", "key=value"),
    ("steps=0", "at least 1"),
    ("steps=NaN", "NaN is not a value"),
    ("is_on=1", "expected bool"),
]


@pytest.mark.parametrize(("assignment", "complaint"), REFUSED)
def test_an_override_that_does_not_fit_is_refused(assignment: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        override(Outer(3), [assignment])
    assert complaint in str(refused.value)
