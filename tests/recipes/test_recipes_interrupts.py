"""Ctrl-C and SIGTERM: heard at once, after saving, or at the next word of progress where the exception was lost."""

from __future__ import annotations

import contextlib
import gc
import shutil
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.errors import Interrupted
from fledge.formats.checkpoint import save_state
from fledge.recipes import ring
from fledge.recipes.interrupts import Interrupts
from fledge.recipes.ring import NoBoard, RingRun, Stage, StageContext, run_stages
from fledge.recipes.runs import read_manifest


def ctrl_c(number: int = signal.SIGINT) -> None:
    signal.raise_signal(number)


class Dying:
    """Something whose end falls together with a Ctrl-C."""

    def __del__(self) -> None:
        ctrl_c()


def in_a_destructor() -> None:
    dying = Dying()
    del dying
    gc.collect()


def in_a_weak_reference() -> None:
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: ctrl_c())
    del thing
    gc.collect()
    assert reference() is None


def where_all_is_caught() -> None:
    with contextlib.suppress(Exception):  # as a compiler that falls back to something slower does
        ctrl_c()


LOST = [in_a_destructor, in_a_weak_reference, where_all_is_caught]


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Python says it has dropped, instead of a warning."""
    found: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: found.append(told.exc_type))
    return found


class Watcher:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def stage(self, name: str, status: str, note: str) -> None:
        self.heard.append(f"{name} {status}")

    def step(self, stage: str, step: int, num_steps: int, metrics: Any) -> None:
        self.heard.append(f"{stage} {step}")


def run_of(folder: Path, works: dict[str, Callable[[StageContext[Any]], None]]) -> tuple[Watcher, Interrupts]:
    """Run stages of these names over a plan that nobody looks at; Interrupted is the caller's to expect."""
    watcher, interrupts = Watcher(), Interrupts()
    run: RingRun[Any] = RingRun(None, folder, watcher, interrupts, NoBoard(), torch.device("cpu"), compiled=False)
    with interrupts.handled():
        try:
            run_stages(run, [Stage(name, (), work) for name, work in works.items()])
        except Interrupted as stop:
            watcher.heard.append(str(stop))
    return watcher, interrupts


@pytest.mark.parametrize("lose", LOST)
def test_a_signal_whose_exception_is_lost_stops_the_work_at_its_next_word(
    tmp_path: Path, dropped: list[Any], lose: Callable[[], None]
) -> None:
    def work(context: StageContext[Any]) -> None:
        context.listener.step(context.name, 1, 3, {})
        lose()
        (context.path / "went on").touch()
        context.listener.step(context.name, 2, 3, {})
        context.listener.step(context.name, 3, 3, {})

    watcher, _ = run_of(tmp_path, {"data": work, "sft": work})
    assert dropped == ([] if lose is where_all_is_caught else [Interrupted])
    assert (tmp_path / "data" / "went on").exists(), "the exception was not lost, so nothing was tried"
    assert watcher.heard == ["data started", "data 1", "data 2", "stopped"]
    assert read_manifest(tmp_path / "data") is None


def test_a_stage_that_tells_nothing_is_finished_and_the_next_is_not_begun(tmp_path: Path, dropped: list[Any]) -> None:
    watcher, _ = run_of(tmp_path, {"data": lambda _: in_a_destructor(), "sft": lambda _: None})
    assert dropped == [Interrupted]
    assert watcher.heard == ["data started", "data finished", "stopped"]
    assert read_manifest(tmp_path / "data") is not None
    assert not (tmp_path / "sft").exists()


def test_a_signal_that_is_not_lost_stops_the_work_at_once(tmp_path: Path) -> None:
    def work(context: StageContext[Any]) -> None:
        ctrl_c(signal.SIGTERM)
        context.listener.step(context.name, 1, 1, {})

    assert run_of(tmp_path, {"data": work})[0].heard == ["data started", "stopped"]


def test_patient_work_hears_of_a_signal_only_when_it_asks_and_then_saves(tmp_path: Path) -> None:
    saved: list[int] = []

    def work(context: StageContext[Any]) -> None:
        with context.interrupts.deferred():
            for step in range(1, 9):
                if step == 3:
                    ctrl_c()
                context.listener.step(context.name, step, 8, {})
                context.interrupts.check(lambda step=step: saved.append(step))  # type: ignore[misc]

    watcher, _ = run_of(tmp_path, {"sft": work})
    assert watcher.heard == ["sft started", "sft 1", "sft 2", "sft 3", "stopped; the state is saved"]
    assert saved == [3]


def test_a_second_signal_stops_even_patient_work() -> None:
    interrupts = Interrupts()
    with interrupts.handled(), interrupts.deferred():
        ctrl_c()
        with pytest.raises(Interrupted):
            ctrl_c()


def test_one_that_was_lost_before_patient_work_began_is_not_counted_as_its_first(dropped: list[Any]) -> None:
    interrupts = Interrupts()
    with interrupts.handled():
        in_a_destructor()
        with interrupts.deferred():
            interrupts.heed()  # not here: the state is not saved
            ctrl_c()
            with pytest.raises(Interrupted, match="saved"):
                interrupts.check(lambda: None)
    assert dropped == [Interrupted]


def test_a_stop_that_patient_work_never_asked_about_is_heeded_after_it() -> None:
    interrupts = Interrupts()
    with interrupts.handled():
        with interrupts.deferred():
            ctrl_c()
        with pytest.raises(Interrupted):
            interrupts.heed()


def test_what_a_stage_had_begun_is_given_up_when_what_it_read_has_changed(tmp_path: Path) -> None:
    said = ["one"]
    found: list[list[str]] = []

    def data(context: StageContext[Any]) -> None:
        (context.path / "said").write_text(said[0])

    def sft(context: StageContext[Any]) -> None:
        found.append(sorted(path.name for path in context.path.iterdir()))
        (context.path / "state-00000001").mkdir(exist_ok=True)
        if len(found) < 3:
            raise Interrupted("stopped")

    stages = [Stage("data", (), data), Stage("sft", ("data",), sft)]
    run: RingRun[Any] = RingRun(None, tmp_path, Watcher(), Interrupts(), NoBoard(), torch.device("cpu"), compiled=False)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run_stages(run, stages)
    shutil.rmtree(tmp_path / "data")
    said[0] = "another"
    run_stages(run, stages)
    assert found == [["inputs.json"], ["inputs.json", "state-00000001"], ["inputs.json"]]
    manifest = read_manifest(tmp_path / "sft")
    assert manifest is not None
    assert "inputs.json" not in manifest.outputs


def test_what_no_note_vouches_for_is_cleared_before_a_stage_begins(tmp_path: Path) -> None:
    """A clearing that is killed may have removed the note and not yet the state that was made from other inputs."""
    state = tmp_path / "sft" / "state-00000007"
    state.mkdir(parents=True)
    found: list[str] = []
    watcher, _ = run_of(tmp_path, {"sft": lambda context: found.extend(path.name for path in context.path.iterdir())})
    assert found == ["inputs.json"]
    assert watcher.heard == ["sft started", "sft finished"]


def test_a_stage_that_is_killed_before_its_manifest_keeps_its_state_and_after_it_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(context: StageContext[Any]) -> None:
        (context.path / "said").write_text("one")
        save_state(context.path, 9, {}, {})
        context.save_cost()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for moment, left in (("write_manifest", ["state-00000009"]), ("clear_states", ["manifest.json", "state-00000009"])):
        folder = tmp_path / moment
        folder.mkdir()
        with monkeypatch.context() as patched:
            patched.setattr(ring, moment, killed)
            with pytest.raises(KeyboardInterrupt):
                run_of(folder, {"sft": work})
        assert sorted({path.name for path in (folder / "sft").iterdir()} & {"manifest.json", "state-00000009"}) == left
        watcher, _ = run_of(folder, {"sft": work})
        assert watcher.heard[0] == ("sft resumed" if moment == "write_manifest" else "sft kept")
        assert sorted(path.name for path in (folder / "sft").iterdir()) == ["manifest.json", "report.json", "said"]
        manifest = read_manifest(folder / "sft")
        assert manifest is not None
        assert sorted(manifest.outputs) == ["report.json", "said"]
