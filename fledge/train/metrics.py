"""What a run writes about itself: JSON lines that survive `kill -9`, and the accounting of tokens, FLOPs and MFU.

The peak that a model-FLOP utilisation is a share of is measured on the spot, never taken from a data sheet.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from fledge.errors import ConfigError
from fledge.files import explaining
from fledge.types import Metrics

FLOPS_FORMULA = (
    "FLOPs per trained token = 6 x (parameters of matrices and of the head) + 12 x layers x width x row length: "
    "2 per multiply-add, forward once and backward twice; attention scores and their use are full T x T products "
    "(masked entries are computed too); look-ups, norms and the optimizer count as 0"
)
MFU_FORMULA = (
    "MFU = FLOPs per trained token x tokens per second / peak; peak = best of square products of "
    "1024, 2048 and 4096, measured in this process in the precision of training"
)


class Shaped(Protocol):
    @property
    def width(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


def flops_per_token(parameters: Mapping[str, int], roles: Mapping[str, str], config: Shaped, row_length: int) -> float:
    """FLOPS_FORMULA. `parameters` gives the number of elements by name; a model without a head of its own is tied."""
    by_role = dict.fromkeys(("matrix", "head"), 0)
    for name, size in parameters.items():
        if roles[name] in by_role:
            by_role[roles[name]] += size
    head = by_role["head"] or config.vocab_size * config.width
    return 6.0 * (by_role["matrix"] + head) + 12.0 * config.num_layers * config.width * row_length


# Size of a square product and how often it is timed: the large ones last long enough to be timed once or twice.
PEAK_TRIALS = ((1024, 6), (2048, 3), (4096, 1))


@functools.cache
def measured_peak(device: torch.device, trials: tuple[tuple[int, int], ...] = PEAK_TRIALS) -> float:
    """FLOP/s: the best of square matrix products of 1024, 2048 and 4096 in the precision that training uses.

    Measured once a process, in about a second.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    best = 0.0
    for size, repeats in trials:
        left = torch.ones(size, size, device=device, dtype=dtype)
        right, out = torch.ones_like(left), torch.empty_like(left)
        for _ in range(repeats):
            _synchronise(device)
            began = time.perf_counter()
            torch.mm(left, right, out=out)
            _synchronise(device)
            best = max(best, 2.0 * size**3 / (time.perf_counter() - began))
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class JsonLines:
    """One JSON object a line, appended and flushed; opening it again after a crash makes the file whole first.

    `from_step` is the step that training goes on from: a torn last line and every line of a later step is dropped,
    because those steps are about to be written again. Lines without "step" stay, and, given a `stage`, so do those of
    other stages, which share the file.
    """

    def __init__(self, path: Path, from_step: int = 0, stage: str | None = None) -> None:
        self.path = path
        with explaining(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _keep(path, from_step, stage)
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """One line; NaN and infinities become null, which JSON has. `RunError` if the disk is full."""
        with explaining(self.path):
            self._file.write(json.dumps({key: _jsonable(value) for key, value in record.items()}) + "\n")
            self._file.flush()

    def close(self) -> None:
        with explaining(self.path):  # what a full disk has not taken is tried once more
            self._file.close()


def _keep(path: Path, from_step: int, stage: str | None) -> None:
    kept = []
    whole_lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn, or nothing
    for line in whole_lines:
        try:
            record = json.loads(line)
        except ValueError:
            break  # a line torn by a full disk: nothing after it can be trusted
        is_ours = stage is None or record.get("stage") == stage
        if not is_ours or record.get("step", 0) <= from_step:
            kept.append(line + b"\n")
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


class TensorBoard:
    """The same metrics as event files for TensorBoard; `ConfigError` without the optional package of that name."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "--tensorboard needs the package tensorboard: pip install tensorboard, or leave the option out"
            ) from error
        self._writer = SummaryWriter(str(directory))

    def write(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
