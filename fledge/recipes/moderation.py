"""A moderation model on a trunk of ours: what `fledge moderation train` runs.

    data -> moderation

Trunk and head are trained together to say of a text which of the categories hold (objectives/multi_label.py); the
thresholds are set on texts that were not trained on; precision and recall are measured on others again, by script,
because a category that was measured in English says nothing of Chinese. The stage's folder is what the server reads
(safety/classifier.py).

Source of the plan: Markov et al. 2023 (2208.03274), who train one multi-label head on a language model's trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

import fledge
from fledge.config import config_hash, override, to_json
from fledge.data.labelled import LabelledText
from fledge.errors import ConfigError, DataError, Interrupted
from fledge.files import sha256_file, write_file, write_json, write_text
from fledge.formats.checkpoint import CheckpointInfo, LoadedModel, load_model, save_model
from fledge.infer.scoring import embed
from fledge.models.labels import Labels
from fledge.objectives.multi_label import LabelledIds, MultiLabel
from fledge.recipes.align_models import load_start, refuse_other_weights
from fledge.recipes.align_offline import parts
from fledge.recipes.align_plan import StartPlan
from fledge.recipes.interrupts import Interrupts
from fledge.recipes.moderation_card import card_text, figures_of, harmless_rates
from fledge.recipes.moderation_data import data_stage, read_side
from fledge.recipes.moderation_plan import Context, FitSettings, ModerationData, ModerationPlan
from fledge.recipes.report import Cell, Fact, Table
from fledge.recipes.ring import Listener, NoBoard, RingRun, Stage, run_stages
from fledge.recipes.runs import locked, open_run
from fledge.recipes.training import Course, chosen, train
from fledge.safety.categories import LEARNT, SCRIPTS, script_of
from fledge.safety.classifier import ClassifierInfo, Figures, windows
from fledge.train.device import default_device, raise_malloc_thresholds
from fledge.train.loop import Pairs, TrainState

STAGE = "moderation"
DEFAULT_NAME = "moderation"


@dataclass(frozen=True)
class ModerationOrder:
    """What the user asked for: on which model, with which own files beside (`is_only_own`: instead of) the packages."""

    model: str
    data: Sequence[Path] = ()
    is_only_own: bool = False
    seed: int = 0
    overrides: Sequence[str] = ()
    name: str = DEFAULT_NAME
    runs: Path = Path("runs")


def plan_of(order: ModerationOrder) -> ModerationPlan:
    """`UserError` before any work if it cannot be carried out."""
    if order.is_only_own and not order.data:
        raise ConfigError("--only-own leaves nothing to learn from; name files with --data")
    for path in order.data:
        if not path.is_file():
            raise DataError(f"--data {path}: there is no such file; check the path")
    start = load_start(order.model, order.runs)
    any_model: Any = start.model
    longest: int | None = any_model.config.max_positions
    own = tuple(str(path.expanduser().resolve()) for path in order.data)
    data = ModerationData(paths=own, hash=config_hash([sha256_file(path) for path in order.data]) if own else "")
    if order.is_only_own:
        data = replace(data, sources=(), harmless=())
    window = 128 if longest is None else min(128, longest)
    plan = ModerationPlan(
        StartPlan(order.model, start.hash), data, seed=order.seed, window=window, stride=3 * window // 4
    )
    return override(plan, order.overrides)


def train_moderation(order: ModerationOrder, listener: Listener) -> Path:
    """Run what is left of it; returns the folder that `fledge serve --moderation` takes."""
    plan = plan_of(order)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # see recipes/raise_.py
    raise_malloc_thresholds()
    path, notice = open_run(order.name, {"fledge": fledge.__version__, **to_json(plan)}, order.runs)
    if notice:
        listener.stage("plan", "note", notice)
    interrupts = Interrupts()
    stages = (Stage("data", (), data_stage), Stage(STAGE, ("data",), moderation_stage))
    with locked(path), interrupts.handled():
        run = RingRun(plan, path, listener, interrupts, NoBoard(), default_device(), compiled=False)
        try:
            run_stages(run, stages)
        except Interrupted as stop:
            raise Interrupted(f"{stop}; go on with the same command") from stop
    return path / STAGE


def moderation_stage(context: Context) -> None:
    """Train, set the thresholds, measure, write the classifier."""
    plan = context.plan
    start = load_start(plan.start.name, context.run.parent, context.device)
    refuse_other_weights(start, plan.start.hash)
    generator = torch.Generator().manual_seed(plan.seed)
    model = Labels(start.model, len(LEARNT), generator=generator).to(context.device)
    examples = _as_ids(context, start, read_side(context.run, "train"))
    objective = MultiLabel(plan.window, start.tokenizer.pad_id, _positive_weights(examples, plan.fit))
    size = min(plan.fit.batch, len(examples))

    def batches(state: TrainState, step: int) -> Pairs:
        some = sorted((examples[i] for i in chosen(len(examples), size, step, plan.seed)), key=lambda one: len(one.ids))
        # Texts of like length side by side: less padding, and the same step.
        return [(objective, objective.collate(part)) for part in parts(some, plan.fit.forward_rows)]

    steps = plan.fit.epochs * max(1, len(examples) // size)
    train(context, model, Course(plan.fit.plan(steps, plan.window), batches))
    _measure(context, start, model)


def _as_ids(context: Context, start: LoadedModel, texts: Sequence[LabelledText]) -> list[LabelledIds]:
    plan, found = context.plan, []
    for text in texts:
        labels = tuple(text.labels.get(name) for name in LEARNT)
        rows = windows(start.tokenizer, text.text, plan.window, plan.stride)
        found += [LabelledIds(tuple(row), labels) for row in rows[: plan.fit.max_windows]]
    if not found:
        raise DataError("no text to learn from; give labelled texts with --data")
    return found


def _positive_weights(examples: Sequence[LabelledIds], settings: FitSettings) -> list[float]:
    """The square root of negatives over positives, from 1 to the bound: rare categories count more, not all alike."""
    weights = []
    for k in range(len(LEARNT)):
        positives = sum(example.labels[k] is True for example in examples)
        negatives = sum(example.labels[k] is False for example in examples)
        weights.append(min(settings.max_positive_weight, max(1.0, (negatives / max(1, positives)) ** 0.5)))
    return weights


def _measure(context: Context, start: LoadedModel, model: Labels) -> None:
    plan, path = context.plan, context.path
    info = CheckpointInfo(
        family=start.info.family,
        config=start.info.config,
        stage=STAGE,
        tokenizer_hash=start.info.tokenizer_hash,
        template_hash=start.info.template_hash,
        parents={"start": start.hash},
        seed=plan.seed,
    )
    save_model(path / "model", model.trunk, start.tokenizer, info, start.template)
    weight, bias = (tensor.numpy() for tensor in model.exported())
    score = _scorer(load_model(path / "model", device=context.device), weight, bias, plan)
    tune, held_out = (read_side(context.run, side) for side in ("tune", "held_out"))
    thresholds = _thresholds(tune, score(tune), plan)
    scores_NK = score(held_out)
    scripts = [script_of(text.text) for text in held_out]
    figures: dict[str, dict[str, Figures]] = {}
    for script in SCRIPTS:
        rows = [n for n, found in enumerate(scripts) if found == script]
        figures[script] = figures_of([held_out[n] for n in rows], scores_NK[rows], thresholds)
    _write(context, (weight, bias), thresholds, figures)
    write_text(path / "card.md", card_text(to_json(plan), held_out, scores_NK, thresholds, figures))
    _report(context, model, figures, harmless_rates(held_out, scores_NK, thresholds, figures))


Score = Callable[[Sequence[LabelledText]], NDArray[np.float64]]


def _scorer(loaded: LoadedModel, weight: NDArray[Any], bias: NDArray[Any], plan: ModerationPlan) -> Score:
    """Texts to scores (N, K), as the server comes by them: each text's worst window."""
    model: Any = loaded.model

    def score(texts: Sequence[LabelledText]) -> NDArray[np.float64]:
        found = np.zeros((len(texts), len(LEARNT)))
        for n, text in enumerate(texts):
            rows = windows(loaded.tokenizer, text.text, plan.window, plan.stride)
            if rows:
                with torch.no_grad():
                    logits_WK = embed(model, rows).numpy() @ weight.T + bias
                found[n] = 1.0 / (1.0 + np.exp(-np.clip(logits_WK.max(axis=0), -30.0, 30.0)))
        return found

    return score


def _thresholds(
    texts: Sequence[LabelledText], scores_NK: NDArray[np.float64], plan: ModerationPlan
) -> dict[str, float]:
    """For each category the lowest score that keeps precision and the share of harmless texts above it; the highest
    tried where none does."""
    tried = np.arange(0.05, 1.0, 0.01)
    is_harmless_N = np.array([not any(text.labels.values()) and len(text.labels) > 8 for text in texts])
    found = {}
    for k, name in enumerate(LEARNT):
        known = [text.labels.get(name) for text in texts]
        is_yes_N, is_known_N = np.array([one is True for one in known]), np.array([one is not None for one in known])
        fitting = [
            t
            for t in tried
            if _precision(scores_NK[:, k] >= t, is_yes_N, is_known_N) >= plan.target_precision
            and (scores_NK[is_harmless_N, k] >= t).mean() <= plan.max_false_share
        ]
        found[name] = round(float(fitting[0] if fitting else tried[-1]), 2)
    return found


def _precision(is_above_N: NDArray[Any], is_yes_N: NDArray[Any], is_known_N: NDArray[Any]) -> float:
    """0 where nothing is above."""
    above = int((is_above_N & is_known_N).sum())
    return float((is_above_N & is_yes_N).sum()) / above if above else 0.0


def _write(
    context: Context,
    head: tuple[NDArray[Any], NDArray[Any]],
    thresholds: dict[str, float],
    figures: dict[str, dict[str, Figures]],
) -> None:
    path, plan = context.path, context.plan
    tensors = {"weight": np.ascontiguousarray(head[0]), "bias": np.ascontiguousarray(head[1])}
    write_file(path / "head.safetensors", lambda temporary: save_file(tensors, temporary))
    names = ("head.safetensors", "model/run.json")
    hashes = {name: sha256_file(path / name) for name in names}
    name = f"fledge-moderation-{hashes['head.safetensors'][:8]}"
    info = ClassifierInfo(name, plan.window, plan.stride, thresholds, figures, hashes)
    write_json(path / "classifier.json", to_json(info))


def _report(
    context: Context, model: Labels, figures: dict[str, dict[str, Figures]], rates: dict[str, tuple[int, float]]
) -> None:
    rows: list[tuple[Cell, ...]] = [
        (f"{name}, {script}", one.positives, one.precision, one.recall, one.is_measured)
        for script in SCRIPTS
        for name, one in figures[script].items()
        if one.positives
    ]
    false = tuple((name, count, share) for name, (count, share) in rates.items())
    context.report = replace(
        context.report,
        headline=Fact("categories measured", sum(one.is_measured for one in figures["latin"].values())),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tables=(
            Table("held-out texts", ("category", "positives", "precision %", "recall %", "measured"), tuple(rows)),
            Table("harmless texts that are flagged", ("source", "texts", "flagged %"), false),
        ),
    )
