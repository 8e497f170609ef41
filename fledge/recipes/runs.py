"""Run folders: where a raised model lives, which stages are finished, and who may write.

    runs/NAME/
      plan.json              the frozen recipe
      <stage>/manifest.json  written last: hashes of what the stage read and wrote, and what it cost
      metrics.jsonl          one line a step of every stage
      card.json, card.html

A stage is finished when its manifest is there and every hash in it still holds. `.lock` keeps two processes apart.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fledge.errors import RunError, nearest
from fledge.files import explaining, sha256_file, write_json

SERVED_STAGES = ("ppo", "sft", "code", "pretrain")  # the order in which RUN alone picks its model
# What a run of `fledge align` ends with; its folder holds one of them.
ALIGNED_STAGES = ("dpo", "ipo", "kto", "grpo", "rloo", "best-of-n", "feedme")


@dataclass(frozen=True)
class Cost:
    """What a stage took, over all its sittings.

    `flops` counts the models' own arithmetic, `busy_seconds` the time in steps or rounds alone; `mfu` is the first over
    the second and the measured peak (docs/metrics.md).
    """

    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    mfu: float | None = None
    peak_rss_bytes: int = 0
    busy_seconds: float = 0.0


@dataclass(frozen=True)
class Manifest:
    """A finished stage. `inputs` and `outputs` map a role or a file (relative to the stage) to its sha256; `finished`
    is the ISO time in UTC (older manifests have none)."""

    stage: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    cost: Cost
    versions: dict[str, str] = field(default_factory=dict)
    finished: str | None = None


def run_path(name: str, runs: Path) -> Path:
    """`runs/NAME`; `RunError` if NAME could not be a folder's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise RunError(
            f"'{name}' cannot name a run; use letters, digits, '.', '_' and '-', beginning with the first two"
        )
    return runs / name


def find_run(name: str, runs: Path = Path("runs")) -> Path:
    """The folder of a run that exists; `RunError` names the runs there are."""
    path = Path(name) if (Path(name) / "plan.json").is_file() else run_path(name, runs)
    if (path / "plan.json").is_file():
        return path
    known = sorted(entry.parent.name for file in ("plan.json", "run.json") for entry in runs.glob(f"*/{file}"))
    if not known:
        raise RunError(f"no run '{name}': {runs} holds none yet; raise one with `fledge raise pocket`")
    raise RunError(f"no run '{name}' in {runs}; {nearest(name, known)}")


def resolve_model(spec: str, runs: Path = Path("runs")) -> Path:
    """The checkpoint folder of `RUN` (its furthest stage) or `RUN:STAGE`, of an imported model, or of a path.

    `RUN:STAGE/NAME` is another model of a stage: PPO's average `ppo/ema`, or `dpo/checkpoint-100`.
    """
    for path in (Path(spec), runs / spec):
        if (path / "run.json").is_file():
            return path
    name, colon, stage = spec.partition(":")
    run = find_run(name, runs)
    stages = (*ALIGNED_STAGES, *SERVED_STAGES)
    finished = [stage for stage in stages if (run / stage / "manifest.json").is_file()]
    if not colon and finished:
        return run / finished[0] / "model"
    have = ", ".join(one for one in reversed(finished) if (run / one / "model" / "run.json").is_file()) or "none yet"
    if not colon:
        raise RunError(f"run '{name}' has no finished model to talk with; finish it with the command that began it")
    if re.fullmatch(r"[\w-]+/[\w-]+", stage) and (run / stage / "run.json").is_file():
        return run / stage
    if not (run / stage / "model" / "run.json").is_file():
        raise RunError(f"run '{name}' has no model '{stage}'; finished stages with one: {have}")
    return run / stage / "model"


def open_run(name: str, plan: Mapping[str, Any], runs: Path) -> tuple[Path, str | None]:
    """The folder for `plan`, made if need be, and a sentence for the user if it is not simply `runs/NAME`.

    A folder whose plan differs is never touched: the run gets the next free name, `NAME-2` and so on, or goes on in
    the one of these that has the same plan.
    """
    for number in range(1, 1000):
        candidate = name if number == 1 else f"{name}-{number}"
        path = run_path(candidate, runs)
        if not (path / "plan.json").is_file():
            write_json(path / "plan.json", plan)
            return (
                path,
                None if number == 1 else f"the plan of '{name}' has changed: starting a new run, '{candidate}'",
            )
        if read_json(path / "plan.json") == json.loads(json.dumps(plan)):
            return path, None if number == 1 else f"the plan of '{name}' differs: going on with '{candidate}'"
    raise RunError(f"{runs}: a thousand runs are named after '{name}'; choose another name with --name")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run folder for this process; `RunError` if another one has it. The lock dies with the process."""
    with (path / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise RunError(
                f"{path}: in use by process {holder}; wait for it, or raise another run with --name"
            ) from error
        with explaining(path / ".lock"):
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        yield


def write_manifest(stage_path: Path, manifest: Manifest) -> None:
    write_json(stage_path / "manifest.json", asdict(manifest))


def read_manifest(stage_path: Path) -> Manifest | None:
    """The manifest of a finished stage, or None; `RunError` if it cannot be read."""
    path = stage_path / "manifest.json"
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        return Manifest(**{**data, "cost": Cost(**data["cost"])})
    except (TypeError, KeyError) as error:
        raise RunError(f"{path}: damaged ({error}); remove {stage_path} and run the same command again") from error


def verify_outputs(stage_path: Path, manifest: Manifest) -> None:
    """Check every file a finished stage wrote; `RunError` names the first that is missing or altered."""
    for name, expected in manifest.outputs.items():
        path = stage_path / name
        if not path.is_file():
            complaint = "missing"
        elif sha256_file(path) != expected:
            complaint = "truncated or altered"
        else:
            continue
        raise RunError(
            f"{path}: {complaint} since stage '{manifest.stage}' finished; restore it, "
            f"or remove {stage_path} to make this stage and the later ones again"
        )


def hash_outputs(stage_path: Path, besides: tuple[str, ...] = ()) -> dict[str, str]:
    """sha256 of every file below a stage's folder but for its training states, its manifest and those named."""
    files = sorted(entry for entry in stage_path.rglob("*") if entry.is_file())
    names = [str(entry.relative_to(stage_path)) for entry in files]
    kept = [name for name in names if not name.startswith(("state-", "manifest.json")) and ".writing" not in name]
    return {name: sha256_file(stage_path / name) for name in kept if name not in besides}


def read_json(path: Path) -> Any:
    """What a JSON file of a run says; `RunError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: damaged ({error}); remove it or its folder and run the same command again") from error
