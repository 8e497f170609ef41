"""The training loop: `train_step` is one optimizer step over any objectives, `fit` repeats it.

It knows no family, loss, file format or eval. An objective returns sums with counts; the step divides each sum by
its count over ALL micro-batches, so that the gradient does not depend on how a batch was cut (averaging the means
of micro-batches with uneven masks is wrong by up to 90 % of the gradient norm).
"""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fledge.batches import Batch, Loss
from fledge.errors import CheckpointError, TrainingHalted
from fledge.train.device import precision
from fledge.train.lanes import add_gradients, lanes_of, side_by_side
from fledge.train.optim import OptimizerSet
from fledge.train.parallel import ALONE, Ranks
from fledge.train.schedule import Schedule
from fledge.types import Metrics


class Objective(Protocol):
    """The half of an objective that a step needs; `collate` is the data pipeline's."""

    def loss(self, model: Any, batch: Any) -> Loss: ...


Pairs = Sequence[tuple[Objective, Batch]]
Callback = Callable[["TrainState", Metrics], None]


@dataclass
class TrainState:
    """All that a run changes. `step` counts finished steps; `seed` feeds the global generator before each one."""

    model: nn.Module
    optimizers: OptimizerSet
    schedule: Schedule
    seed: int = 0
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Weights as "model/<name>" and optimizer state as "optimizer/<name>:<slot>"; not copies."""
        weights = {f"model/{name}": tensor for name, tensor in _weights(self.model).items()}
        return weights | {f"optimizer/{key}": tensor for key, tensor in self.optimizers.tensors().items()}

    def scalars(self) -> dict[str, Any]:
        """What `tensors` cannot hold, as JSON values."""
        return {"step": self.step, "seed": self.seed}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on where another state stood: after this, training continues as if it had never stopped, to the bit.

        Names that begin with neither prefix are someone else's and ignored. CheckpointError, with nothing changed, if
        a name or shape does not fit.
        """
        weights = _weights(self.model)
        given = {key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")}
        for name in sorted(weights.keys() ^ given.keys()):
            where = "the saved state" if name in weights else "this model"
            raise CheckpointError(f"weight '{name}' is missing from {where}; was it made with another config?")
        for name, weight in weights.items():
            if weight.shape != given[name].shape:
                shapes = f"{tuple(given[name].shape)}, expected {tuple(weight.shape)}"
                raise CheckpointError(f"saved weight '{name}' has shape {shapes}")
        prefix = "optimizer/"
        self.optimizers.load_tensors({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(given[name])
        self.step, self.seed = int(scalars["step"]), int(scalars["seed"])


def fit(
    state: TrainState,
    batches: Callable[[int], Pairs],
    num_steps: int,
    callbacks: Sequence[tuple[int, Callback]] = (),
    *,
    clip_norm: float | None = None,
    dump_to: Path | None = None,
    lanes: int = 1,
) -> None:
    """Train from `state.step` until `num_steps` are done; `batches(step)` must depend on the step alone.

    After every `every`-th step and after the last one, each `(every, function)` is called with the state and the
    step's metrics: those of `train_step`, and "step", "step_seconds" (batch included), "lr_scale".
    """
    while state.step < num_steps:
        began = time.perf_counter()
        scale = state.schedule.scale(state.step)
        state.optimizers.set_scale(scale)
        # Dropout draws from the global generator; seeding it by step makes a resumed run draw the same.
        torch.manual_seed(state.seed * 1_000_003 + state.step)
        pairs = batches(state.step)
        metrics = train_step(state.model, state.optimizers, pairs, clip_norm=clip_norm, dump_to=dump_to, lanes=lanes)
        state.step += 1
        metrics |= {"step": float(state.step), "step_seconds": time.perf_counter() - began, "lr_scale": scale}
        for every, act in callbacks:
            if state.step % every == 0 or state.step == num_steps:
                act(state, metrics)


def train_step(
    model: nn.Module,
    optimizers: OptimizerSet,
    pairs: Pairs,
    *,
    clip_norm: float | None = None,
    dump_to: Path | None = None,
    lanes: int = 1,
    ranks: Ranks = ALONE,
) -> Metrics:
    """One optimizer step on the sum over terms of weight x sum / count, counted over all `pairs` of all `ranks`.

    `lanes` of them run at a time (train/lanes.py), if `lanes_of` allows. `pairs` are this process's share of the
    batch, and may be none; metrics, clipping and the step are those of the whole one, the same in every process.

    Metrics: "loss" (that sum), "loss/<term>" (its mean, unweighted), "count/<term>", the objectives' stats as means and
    extremes, and "grad_norm" before clipping to `clip_norm`. TrainingHalted, with the weights untouched and the batches
    in `dump_to`, if loss or gradient is NaN or infinite.
    """
    counts: dict[str, float] = defaultdict(float)
    for told in ranks.told([dict(batch.counts) for _, batch in pairs]):
        for name, count in (item for part in told for item in part.items()):
            counts[name] += count
    optimizers.zero_grad()
    sums = _Sums()
    lanes = min(len(pairs), lanes_of(model, lanes))
    for loss in (_losses_side_by_side if lanes > 1 else _losses)(model, pairs, counts, lanes):
        sums.add(loss)
    sums = sums.joined(ranks)
    ranks.add_gradients(optimizers.parameters)
    grad_norm = optimizers.clip(clip_norm)
    metrics = sums.metrics(counts) | {"grad_norm": grad_norm}
    if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
        where = dump_batches(pairs, dump_to) if dump_to is not None else "nowhere (no dump_to given)"
        raise TrainingHalted(f"loss {metrics['loss']}, gradient norm {grad_norm}; weights untouched, batch in {where}")
    optimizers.step()
    return metrics


def _losses(model: nn.Module, pairs: Pairs, counts: Mapping[str, float], lanes: int) -> Iterator[Loss]:
    """The loss of each pair, its gradients added to `.grad`."""
    for objective, batch in pairs:
        loss = _loss(model, objective, batch)
        total = _total(loss, counts)
        if total is not None:
            total.backward()
        yield loss


def _losses_side_by_side(model: nn.Module, pairs: Pairs, counts: Mapping[str, float], lanes: int) -> Iterator[Loss]:
    """As `_losses`, `lanes` pairs at a time."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def work(objective: Objective, batch: Batch) -> tuple[Loss, Sequence[Tensor | None]]:
        loss = _loss(model, objective, batch)
        total = _total(loss, counts)
        if total is None:
            return loss, [None] * len(parameters)
        return loss, torch.autograd.grad(total, parameters, allow_unused=True)

    results = side_by_side([functools.partial(work, *pair) for pair in pairs], lanes)
    add_gradients(parameters, [gradients for _, gradients in results])
    yield from (loss for loss, _ in results)


def _loss(model: nn.Module, objective: Objective, batch: Batch) -> Loss:
    device = next(model.parameters()).device
    with precision(device):
        loss = objective.loss(model, batch.to(device))
    for name, term in loss.terms.items():
        assert math.isclose(term.count, batch.counts[name], rel_tol=1e-5), f"{name}: loss and batch disagree"
    return loss


def _total(loss: Loss, counts: Mapping[str, float]) -> Tensor | None:
    """The scalar to run backward from, or None if no term has anything to count or to learn from."""
    parts = [term.sum * (term.weight / counts[name]) for name, term in loss.terms.items() if counts[name] > 0]
    total = torch.stack(parts).sum() if parts else None
    return total if total is not None and total.requires_grad else None


class _Sums:
    """The sums of a step, over its micro-batches."""

    def __init__(self) -> None:
        self._terms: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = {}
        self._stats: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._lows: dict[str, float] = {}
        self._highs: dict[str, float] = {}

    def add(self, loss: Loss) -> None:
        self._add(
            {name: (float(term.sum.detach()), term.weight) for name, term in loss.terms.items()},
            {name: (float(value.detach()), count) for name, (value, count) in loss.stats.items()},
            {name: float(value) for name, value in loss.lows.items()},
            {name: float(value) for name, value in loss.highs.items()},
        )

    def joined(self, ranks: Ranks) -> _Sums:
        """The sums of the step over all processes."""
        if ranks.count == 1:
            return self
        whole = _Sums()
        terms = {name: (value, self._weights[name]) for name, value in self._terms.items()}
        for told in ranks.told((terms, self._stats, self._lows, self._highs)):
            whole._add(*told)
        return whole

    def _add(
        self,
        terms: Mapping[str, Sequence[float]],
        stats: Mapping[str, Sequence[float]],
        lows: Mapping[str, float],
        highs: Mapping[str, float],
    ) -> None:
        for name, (value, weight) in terms.items():
            self._terms[name] += value
            self._weights[name] = weight
        for name, (value, count) in stats.items():
            self._stats[name][0] += value
            self._stats[name][1] += count
        for extreme, known, found in ((min, self._lows, lows), (max, self._highs, highs)):
            for name, value in found.items():
                known[name] = extreme(known.get(name, value), value)

    def metrics(self, counts: Mapping[str, float]) -> Metrics:
        means = {name: total / counts[name] if counts[name] > 0 else 0.0 for name, total in self._terms.items()}
        return {
            "loss": sum(self._weights[name] * mean for name, mean in means.items()),
            **{f"loss/{name}": mean for name, mean in means.items()},
            **{f"count/{name}": counts[name] for name in means},
            **{name: total / count if count > 0 else 0.0 for name, (total, count) in self._stats.items()},
            **self._lows,
            **self._highs,
        }


def dump_batches(pairs: Pairs, path: Path) -> Path:
    """Write every tensor of every batch to a safetensors file, as "<pair>.<field>"; returns the path."""
    tensors: dict[str, Tensor] = {}
    for index, (_, batch) in enumerate(pairs):
        dataclass_batch: Any = batch
        for field in fields(dataclass_batch):
            value = getattr(batch, field.name)
            if isinstance(value, Tensor):
                tensors[f"{index}.{field.name}"] = value.detach().cpu().contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train and persistent buffers, a tied parameter once.

    What is frozen is no state: whoever goes on has it from where it came from, and beside an adapter it is most.
    """
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name in dict(model.named_buffers())}
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad} | buffers
