"""Raising a model: from a recipe's name to a finished run folder. What `fledge raise` calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

import fledge
from fledge.config import override, to_json
from fledge.data.folder import content_hash, contents
from fledge.data.reading import real_path, shown
from fledge.errors import ConfigError, DataError, Interrupted, RunError, nearest
from fledge.files import write_json
from fledge.recipes.card_page import write_card
from fledge.recipes.fledgling import fledgling
from fledge.recipes.interrupts import Interrupts
from fledge.recipes.plan import RingPlan
from fledge.recipes.plan_checks import check_plan
from fledge.recipes.pocket import pocket, sprout
from fledge.recipes.ring import Board, Listener, NoBoard, RingRun, Stage, run_stages
from fledge.recipes.runs import SERVED_STAGES, locked, open_run, read_json
from fledge.recipes.stage_corpus import corpus_stage, tokenizer_stage
from fledge.recipes.stage_evaluation import evaluation_stage
from fledge.recipes.stage_ppo import control_stage, ppo_stage
from fledge.recipes.stage_reward import gold_stage, rankings_stage, reward_stage
from fledge.recipes.stage_text import code_stage, pretrain_stage, sft_stage
from fledge.train.compile import resolve
from fledge.train.device import default_device, raise_malloc_thresholds
from fledge.train.metrics import TensorBoard


@dataclass(frozen=True)
class Recipe:
    """`build(depth)` makes the plan; `depth` None is the recipe's own."""

    name: str
    summary: str
    build: Callable[[int | None], RingPlan]


RECIPES = (
    Recipe("sprout", "the whole ring in a minute, to see that everything works; learns next to nothing", sprout),
    Recipe("pocket", "the whole ring on two CPU cores in minutes", pocket),
    Recipe("fledgling", "the same ring with more of everything: an evening on two cores, minutes on a GPU", fledgling),
)

RING: tuple[Stage[RingPlan], ...] = (
    Stage("corpus", (), corpus_stage),
    Stage("tokenizer", ("corpus",), tokenizer_stage),
    Stage("pretrain", ("corpus", "tokenizer"), pretrain_stage),
    Stage("code", ("corpus", "tokenizer", "pretrain"), code_stage),
    Stage("sft", ("corpus", "tokenizer", "code"), sft_stage),
    Stage("rankings", ("corpus", "pretrain", "sft"), rankings_stage),
    Stage("reward", ("sft", "rankings"), reward_stage),
    Stage("gold", ("sft", "rankings"), gold_stage),
    Stage("ppo", ("corpus", "tokenizer", "sft", "reward", "gold"), ppo_stage),
)
CONTROL = Stage("control", ("corpus", "tokenizer", "sft", "reward", "gold"), control_stage)
EVALUATION = Stage(
    "evaluation", ("corpus", "tokenizer", "rankings", *SERVED_STAGES, "reward", "gold"), evaluation_stage
)


def ring_of(plan: RingPlan) -> tuple[Stage[RingPlan], ...]:
    """The stages of a plan in the order they run."""
    if not plan.control:
        return (*RING, EVALUATION)
    return (*RING, CONTROL, replace(EVALUATION, needs=(*EVALUATION.needs, CONTROL.name)))


# Leaves that say what was ordered: changing them alone would change nothing but what the plan says of itself.
DECIDED = {
    "recipe": "name another recipe, or give the run a --name",
    "depth": "give --depth",
    "corpus.text": "give --text",
    "corpus.text_hash": "give --text",
}


@dataclass(frozen=True)
class Order:
    """What the user asked for: a recipe, the dial, a folder of text, overrides, and where runs live."""

    recipe: str
    depth: int | None = None
    text: Path | None = None
    overrides: Sequence[str] = ()
    name: str | None = None
    runs: Path = Path("runs")
    tensorboard: bool = False


def plan_of(order: Order) -> RingPlan:
    """The plan an order comes to; `ConfigError` or `DataError` before any work if it cannot be carried out."""
    by_name = {recipe.name: recipe for recipe in RECIPES}
    if order.recipe not in by_name:
        raise ConfigError(f"no recipe '{order.recipe}'; {nearest(order.recipe, by_name)}")
    if order.depth is not None and not 1 <= order.depth <= 64:
        raise ConfigError(f"--depth {order.depth}: expected 1 to 64 layers")
    plan = by_name[order.recipe].build(order.depth)
    if order.text is not None:
        path = real_path(order.text, "--text")
        if shown(path) != str(path):
            raise DataError(f"--text {shown(path)}: its name is not UTF-8, so no plan can hold it; rename it")
        if not contents(path):
            raise DataError(f"--text {order.text}: no text in it; add files such as .txt, .md, .py or .jsonl")
        plan = replace(plan, corpus=replace(plan.corpus, text=str(path), text_hash=content_hash(path)))
    changed = override(plan, order.overrides)
    for setting, option in DECIDED.items():
        if attrgetter(setting)(changed) != attrgetter(setting)(plan):
            raise ConfigError(f"--set {setting}: it only says what was asked for; {option}")
    check_plan(changed)
    return changed


def raise_model(order: Order, listener: Listener) -> Path:
    """Run the ring, or what is left of it, and write the card; returns the run folder.

    Raises `UserError` for what cannot be used, `Interrupted` (naming the command that goes on) after Ctrl-C or SIGTERM.
    """
    plan = plan_of(order)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # Part of that mode is filling fresh memory, to unmask code that reads it; a tenth of the time, and no help here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    raise_malloc_thresholds()
    path, notice = open_run(order.name or plan.recipe, _frozen(plan), order.runs)
    if notice:
        listener.stage("plan", "note", notice)
    interrupts = Interrupts()
    with locked(path), interrupts.handled():
        board: Board = TensorBoard(path / "tensorboard") if order.tensorboard else NoBoard()
        device = default_device()
        compiles = _compiles(plan, path, device)
        run = RingRun(plan, path, listener, interrupts, board, device, compiles)
        try:
            run_stages(run, ring_of(plan))
            write_card(path)
        except Interrupted as stop:
            raise Interrupted(f"{stop}; go on with the same command") from stop
        finally:
            if isinstance(board, TensorBoard):
                board.close()
    return path


def _frozen(plan: RingPlan) -> dict[str, Any]:
    """What plan.json says: another version of fledge may come to other results, so its plan is another one."""
    frozen: Mapping[str, Any] = to_json(plan)
    return {"fledge": fledge.__version__, **frozen}


def _compiles(plan: RingPlan, path: Path, device: torch.device) -> bool:
    """Whether this run compiles: decided when it begins and kept, because compiled and eager code round differently."""
    record = path / "compiled.json"
    recorded: Any = read_json(record) if record.is_file() else None
    if recorded not in (None, True, False):
        raise RunError(f"{record}: damaged (expected true or false); remove it and run the same command again")
    chosen = resolve(plan.compile, recorded, device)
    if recorded is None:
        write_json(record, chosen)
    return chosen
