"""Running the stages of a ring in order, each once, each able to go on where it was stopped.

A stage is a function of a `StageContext`. It writes into its own folder only; when it returns, its outputs are hashed
and its manifest is written. A stage whose manifest holds and whose inputs are the same is kept as it is.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

import fledge
from fledge.config import config_hash
from fledge.errors import RunError
from fledge.files import write_json
from fledge.formats.checkpoint import LoadedModel, clear_states, load_model
from fledge.recipes.interrupts import Interrupts
from fledge.recipes.report import StageReport, write_report
from fledge.recipes.runs import (
    Cost,
    Manifest,
    hash_outputs,
    read_json,
    read_manifest,
    verify_outputs,
    write_manifest,
)
from fledge.train.device import peak_memory_bytes, reset_peak_memory
from fledge.train.metrics import measured_peak
from fledge.types import Metrics

PlanT = TypeVar("PlanT")
INPUTS, COST = "inputs.json", "cost.json"  # of an unfinished stage: the hashes of what it reads, what it took so far


class Board(Protocol):
    """Where metrics go beside metrics.jsonl: TensorBoard, or nowhere."""

    def write(self, metrics: Metrics, step: int) -> None: ...


class NoBoard:
    def write(self, metrics: Metrics, step: int) -> None:
        """Nothing."""


class Listener(Protocol):
    """Who is told how a run goes; the commands show it to people or print it as JSON lines."""

    def stage(self, name: str, status: str, note: str) -> None:
        """`status` is kept, started, resumed or finished."""

    def step(self, stage: str, step: int, num_steps: int, metrics: Metrics) -> None:
        """One unit of `num_steps` is done."""


@dataclass(frozen=True)
class Heeding:
    """Tells the listener, and then stops work that should have stopped before (interrupts.py)."""

    listener: Listener
    interrupts: Interrupts

    def stage(self, name: str, status: str, note: str) -> None:
        self.listener.stage(name, status, note)
        self.interrupts.heed()

    def step(self, stage: str, step: int, num_steps: int, metrics: Metrics) -> None:
        self.listener.step(stage, step, num_steps, metrics)
        self.interrupts.heed()


@dataclass
class StageContext(Generic[PlanT]):
    """What a stage is given, and where it leaves what it has to say."""

    name: str
    plan: PlanT
    run: Path
    listener: Listener
    interrupts: Interrupts
    board: Board
    report: StageReport
    device: torch.device
    compiled: bool
    cost: Cost = field(default_factory=Cost)
    started: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        return self.run / self.name

    def model(self, stage: str) -> LoadedModel:
        """The finished model of another stage, on this run's device."""
        return load_model(self.run / stage / "model", device=self.device)

    def add_cost(self, *, tokens: int = 0, flops: float = 0.0, busy_seconds: float = 0.0) -> None:
        self.cost = replace(
            self.cost,
            tokens=self.cost.tokens + tokens,
            flops=self.cost.flops + flops,
            busy_seconds=self.cost.busy_seconds + busy_seconds,
        )

    def save_cost(self) -> None:
        """Remember what this sitting cost so far, in case it is the last thing this process does."""
        write_json(self.path / COST, self.total_cost().__dict__)

    def total_cost(self) -> Cost:
        return replace(self.cost, seconds=self.cost.seconds + time.monotonic() - self.started)


@dataclass(frozen=True)
class Stage(Generic[PlanT]):
    """`needs` names the stages whose outputs this one reads."""

    name: str
    needs: tuple[str, ...]
    work: Callable[[StageContext[PlanT]], None]


@dataclass(frozen=True)
class RingRun(Generic[PlanT]):
    """A plan, its folder, and those who watch and may stop it."""

    plan: PlanT
    path: Path
    listener: Listener
    interrupts: Interrupts
    board: Board
    device: torch.device
    compiled: bool


def run_stages(run: RingRun[PlanT], stages: Sequence[Stage[PlanT]]) -> None:
    """Bring every stage to its manifest, in order. Raises what a stage raises; finished stages stay finished."""
    run = replace(run, listener=Heeding(run.listener, run.interrupts))
    digests: dict[str, str] = {}
    for stage in stages:
        inputs = {need: digests[need] for need in stage.needs}
        manifest = _kept(run.path / stage.name, inputs)
        if manifest is None:
            manifest = _run_stage(run, stage, inputs)
        else:
            run.listener.stage(stage.name, "kept", "")
        digests[stage.name] = config_hash(manifest.outputs)


def _kept(path: Path, inputs: Mapping[str, str]) -> Manifest | None:
    """The manifest of a stage that need not run; a stage made from other inputs is cleared away."""
    manifest = read_manifest(path)
    if manifest is None:
        return None
    if manifest.inputs == dict(inputs):
        verify_outputs(path, manifest)
        _tidy(path)
        return manifest
    shutil.rmtree(path)
    return None


def _run_stage(run: RingRun[PlanT], stage: Stage[PlanT], inputs: dict[str, str]) -> Manifest:
    path = run.path / stage.name
    _begin(path, inputs)
    earlier = _read_cost(path / COST)
    is_resumed = any(path.glob("state-*"))
    run.listener.stage(stage.name, "resumed" if is_resumed else "started", "")
    reset_peak_memory()
    context = StageContext(
        name=stage.name,
        plan=run.plan,
        run=run.path,
        listener=run.listener,
        interrupts=run.interrupts,
        board=run.board,
        report=StageReport(stage.name),
        device=run.device,
        compiled=run.compiled,
        cost=earlier,
    )
    stage.work(context)
    write_report(path / "report.json", context.report)
    outputs = hash_outputs(path, besides=(INPUTS, COST))
    cost = replace(context.total_cost(), peak_rss_bytes=max(earlier.peak_rss_bytes, peak_memory_bytes()))
    if cost.flops and cost.busy_seconds:
        cost = replace(cost, mfu=cost.flops / cost.busy_seconds / measured_peak(run.device))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(stage.name, inputs, outputs, cost, versions(), now)
    write_manifest(path, manifest)
    _tidy(path)
    run.listener.stage(stage.name, "finished", f"{cost.seconds:.0f} s")
    return manifest


def _begin(path: Path, inputs: Mapping[str, str]) -> None:
    """The stage's folder; what an earlier sitting left there stays only if it read what is there to be read now.

    Without a note of what it read nothing stays: a clearing may have been killed in the middle.
    """
    noted = path / INPUTS
    if path.is_dir() and not (noted.is_file() and read_json(noted) == inputs):
        shutil.rmtree(path)
    path.mkdir(exist_ok=True)
    if not noted.is_file():
        write_json(noted, inputs)


def _tidy(path: Path) -> None:
    """Remove what only an unfinished stage needs: after its manifest is there, so that no crash loses the stage."""
    clear_states(path)
    for passing in (COST, INPUTS):
        (path / passing).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """What a result depends on beside the plan."""
    return {
        "fledge": fledge.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _read_cost(path: Path) -> Cost:
    if not path.is_file():
        return Cost()
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Cost(**data)
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: damaged ({error}); remove it and run the same command again") from error
