"""What every stage of training by gradient shares: build or go on, train, keep the state, log, account for the cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fledge.config import from_json, to_json
from fledge.formats.checkpoint import CheckpointInfo, load_state, save_model, save_state
from fledge.layers.lora import plain_state
from fledge.models.scalar import ScalarModel
from fledge.objectives.next_token import NextToken, next_token_sums
from fledge.recipes.plan import FitPlan, RingPlan
from fledge.recipes.ring import StageContext
from fledge.registry import load_family
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import Tokenizer
from fledge.train.compile import compiled
from fledge.train.loop import Callback, Pairs, TrainState, fit
from fledge.train.metrics import JsonLines, flops_per_token
from fledge.train.optim import OptimizerSet
from fledge.train.schedule import Schedule
from fledge.types import Metrics

Context = StageContext[RingPlan]
# `train` and what it calls ask a plan for `seed` and `save_seconds` only, so that alignment runs use them too.
AnyContext = StageContext[Any]


@dataclass(frozen=True)
class Course:
    """A fit with what belongs to its stage: the plan, batches by step, and what to do after a step.

    `quiet` keeps dropout off: where the loss compares with frozen log-probabilities, it would be noise (C38).
    """

    fit: FitPlan
    batches: Callable[[TrainState, int], Pairs]
    callbacks: Sequence[tuple[int, Callback]] = ()
    quiet: bool = False


def initialised(plan: RingPlan, vocab_size: int, *, device: str = "cpu") -> nn.Module:
    """The plan's model for a vocabulary, drawn from the plan's seed; on "meta" it has shapes only."""
    config_class, model_class = load_family(plan.family)
    config = from_json(config_class, {**plan.model, "vocab_size": vocab_size}, path="model")
    with torch.device(device):
        model: Any = model_class(config)
    if device != "meta":
        model.init_weights(torch.Generator().manual_seed(plan.seed))
    built: nn.Module = model
    return built


def train(context: AnyContext, model: nn.Module, course: Course) -> TrainState:
    """Train `model` in place, from the stage's saved state if it has one. Raises Interrupted once that is saved."""
    plan = course.fit
    schedule = Schedule(plan.schedule, plan.steps, plan.warmup_steps, plan.cooldown, plan.final)
    state = TrainState(model, OptimizerSet(model, plan.optim), schedule, seed=context.plan.seed)
    saved = load_state(context.path)
    if saved is not None:
        state.load(saved[1], saved[2])
    keeper = Keeper(context)
    flops = step_flops(model, plan)
    log = JsonLines(context.run / "metrics.jsonl", state.step, stage=context.name)

    def account(state: TrainState, metrics: Metrics) -> None:
        context.add_cost(tokens=plan.rows * plan.row_length, flops=flops, busy_seconds=metrics["step_seconds"])
        rate = plan.rows * plan.row_length / metrics["step_seconds"]
        record_step(context, log, state.step, plan.steps, {**metrics, "tokens_per_second": rate})

    def keep(state: TrainState, metrics: Metrics) -> None:
        keeper.after_step(state.step, plan.steps, lambda: (state.tensors(), state.scalars()))

    model.train(not course.quiet)
    try:
        with context.interrupts.deferred():
            fit(
                state,
                lambda step: course.batches(state, step),
                plan.steps,
                [*course.callbacks, (1, account), (1, keep)],
                clip_norm=plan.clip_norm,
                dump_to=context.path / "halted.safetensors",
                lanes=plan.lanes,
            )
    finally:
        log.close()
    model.eval()
    return state


def chosen(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """Which examples a step takes: one shuffled order an epoch, each example at most once in it."""
    steps_per_epoch = max(1, count // per_step)
    epoch, place = divmod(step, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [int(i) for i in order[place * per_step : (place + 1) * per_step]]


def record_step(context: AnyContext, log: JsonLines, step: int, num_steps: int, metrics: Metrics) -> None:
    """One step to the stage's metrics file, to TensorBoard if asked for, and to whoever watches."""
    log.write({"stage": context.name, **metrics, "step": step})
    context.board.write({f"{context.name}/{name}": value for name, value in metrics.items()}, step)
    context.listener.step(context.name, step, num_steps, metrics)


class Keeper:
    """Saves a stage's state every `save_seconds`, and when a stop is wanted."""

    def __init__(self, context: AnyContext) -> None:
        self._context = context
        self._saved_at = time.monotonic()

    def after_step(self, step: int, num_steps: int, state: Callable[[], tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Call after every step; `state` gives tensors and JSON values. Raises Interrupted after saving."""

        def save() -> None:
            tensors, scalars = state()
            save_state(self._context.path, step, tensors, scalars)
            self._context.save_cost()
            self._saved_at = time.monotonic()

        self._context.interrupts.check(save)
        is_due = time.monotonic() - self._saved_at >= self._context.plan.save_seconds
        if is_due and step < num_steps:
            save()


def pairs_of(objective: Any, examples: Sequence[Any], lanes: int) -> Pairs:
    """A step's examples as `lanes` micro-batches of neighbours, as even as can be; `objective` collates them."""
    bounds = [place * len(examples) // lanes for place in range(lanes + 1)]
    parts = [examples[start:end] for start, end in itertools.pairwise(bounds) if start < end]
    return [(objective, objective.collate(part)) for part in parts]


def next_token(context: Context, fit_plan: FitPlan, tokenizer: Tokenizer) -> NextToken:
    """The objective of all text stages, with its costly region compiled if this run compiles."""
    sums = compiled(next_token_sums) if context.compiled else next_token_sums
    return NextToken(fit_plan.row_length, tokenizer.pad_id, sums)


def step_flops(model: nn.Module, plan: FitPlan) -> float:
    """Arithmetic of one step of this shape (train/metrics.py has the formula)."""
    any_model: Any = model
    roles = any_model.roles()
    sizes = {name: parameter.numel() for name, parameter in plain_state(model).items() if name in roles}
    trunk = any_model.trunk if isinstance(model, ScalarModel) else any_model
    return plan.rows * plan.row_length * flops_per_token(sizes, roles, trunk.config, plan.row_length)


def save_stage_model(
    context: Context, model: nn.Module, tokenizer: Tokenizer, parents: dict[str, str], *, name: str = "model"
) -> str:
    """Write the stage's checkpoint; `parents` maps roles to hashes. Returns its own hash."""
    any_model: Any = model
    info = CheckpointInfo(
        family="scalar" if isinstance(model, ScalarModel) else context.plan.family,
        config=to_json(any_model.config),
        stage=context.name,
        tokenizer_hash=tokenizer.hash,
        template_hash=ChatRenderer(tokenizer).hash,
        parents=parents,
        seed=context.plan.seed,
    )
    return save_model(context.path / name, model, tokenizer, info)
