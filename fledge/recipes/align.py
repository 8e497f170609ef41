"""Aligning a model: from what the user ordered to a finished run folder. What `fledge align` calls.

    data -> (reference | samples) -> METHOD -> outcome (-> health, of a reward model)

Each method is a row of `METHODS`: what it is and which stages make it. The folder is that of every run (runs.py): a
frozen plan, a manifest a stage, a state to go on from, metrics, samples, a card; the result is the stage METHOD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import fledge
from fledge.config import config_hash, override, to_json
from fledge.errors import ConfigError, DataError, Interrupted, nearest
from fledge.files import sha256_file
from fledge.formats.checkpoint import LoadedModel
from fledge.recipes.align_demonstrations import reward_stage, sft_stage
from fledge.recipes.align_health import health_stage
from fledge.recipes.align_models import Context, load_scorer, load_start, own_stages
from fledge.recipes.align_offline import kto_stage, preference_stage, reference_stage
from fledge.recipes.align_outcome import outcome_stage
from fledge.recipes.align_plan import (
    AlignPlan,
    DataPlan,
    JudgePlan,
    LoraPlan,
    OutcomePlan,
    RewardPart,
    SelectPlan,
    StartPlan,
)
from fledge.recipes.align_reading import data_stage
from fledge.recipes.align_rewards import DEFAULT_CAUTION, RewardOrder, reward_parts
from fledge.recipes.align_rl import rl_stage
from fledge.recipes.align_rules import RuleOrder
from fledge.recipes.align_sampling import best_of_n_stage, feedme_stage, samples_stage
from fledge.recipes.align_settings import SAFETY_SHARE, Scope, settings_of, with_lr
from fledge.recipes.card_page import write_card
from fledge.recipes.interrupts import Interrupts
from fledge.recipes.measure import context_of
from fledge.recipes.plan import MAX_SEED
from fledge.recipes.ring import Board, Listener, NoBoard, RingRun, Stage, run_stages
from fledge.recipes.runs import locked, open_run
from fledge.train.device import default_device, raise_malloc_thresholds
from fledge.train.metrics import TensorBoard

Work = Callable[[Context], None]


@dataclass(frozen=True)
class Method:
    """`before`: stages between data and the method's own, by name. `is_rewarded`: it needs something that scores."""

    name: str
    summary: str
    work: Work
    before: tuple[tuple[str, Work], ...] = ()
    is_rewarded: bool = False


_REFERENCE = (("reference", reference_stage),)
_SAMPLES = (("samples", samples_stage),)
METHODS = (
    Method("sft", "imitate conversations (Ouyang et al. 2022, section 3.5)", sft_stage),
    Method("reward", "a reward model from rankings or pairs (Ouyang et al. 2022, eq. 1)", reward_stage),
    Method("dpo", "learn from pairs, without a reward model (Rafailov et al. 2023)", preference_stage, _REFERENCE),
    Method("ipo", "DPO that does not run away where pairs agree (Azar et al. 2023)", preference_stage, _REFERENCE),
    Method("kto", "learn from answers found good or bad (Ethayarajh et al. 2024)", kto_stage, _REFERENCE),
    Method("ppo", "learn from rewards, with a value function (Schulman et al. 2017)", rl_stage, is_rewarded=True),
    Method("grpo", "learn from rewards within groups of answers (Shao et al. 2024)", rl_stage, is_rewarded=True),
    Method("rloo", "REINFORCE with the other answers as baseline (Ahmadian et al. 2024)", rl_stage, is_rewarded=True),
    Method("best-of-n", "imitate one's best answers of several (Nakano et al. 2021)", best_of_n_stage, _SAMPLES, True),
    Method("feedme", "imitate demonstrations and one's best answers, in rounds", feedme_stage, is_rewarded=True),
)


def method_named(name: str) -> Method:
    """The row of that name; `ConfigError` with the nearest name if there is none."""
    for method in METHODS:
        if method.name == name:
            return method
    raise ConfigError(f"no method '{name}'; {nearest(name, [method.name for method in METHODS])}")


@dataclass(frozen=True)
class AlignOrder:
    """What the user asked for. `rewards`: (name of a reward model's run, weight), several names with commas between an
    ensemble of that `caution`; `rules`: rule reward models and their rules; `verifiers`: (name, weight, options);
    `functions`: (FILE.py:NAME, weight).

    `lora` is the rank of an adapter, `soft_prompt` the length of a soft prompt; without either all weights train.
    `judge` names a reward model that is never trained against, `select_by` one that chooses among the checkpoints of
    sft. `safety` are files of safety demonstrations.
    """

    method: str
    model: str
    data: Sequence[Path]
    format: str | None = None
    held_out: Path | None = None
    skip_bad: bool = False
    lora: int | None = None
    lora_targets: tuple[str, ...] | None = None
    rewards: Sequence[tuple[str, float]] = ()
    verifiers: Sequence[tuple[str, float, Mapping[str, Any]]] = ()
    functions: Sequence[tuple[str, float]] = ()
    caution: float = DEFAULT_CAUTION
    rules: RuleOrder = field(default_factory=RuleOrder)
    judge: str | None = None
    soft_prompt: int | None = None
    select_by: str | None = None
    safety: Sequence[Path] = ()
    seed: int = 0
    lr: float | None = None
    overrides: Sequence[str] = ()
    name: str | None = None
    runs: Path = Path("runs")
    tensorboard: bool = False


def plan_of(order: AlignOrder) -> AlignPlan:
    """The plan an order comes to; `UserError` before any work if it cannot be carried out."""
    method = method_named(order.method)
    _refuse_contradictions(order, method)
    start = load_start(order.model, order.runs)
    any_model: Any = start.model
    is_adapter, is_soft = order.lora is not None, order.soft_prompt is not None
    scope = Scope(any_model.config.width, context_of(start), is_adapter, order.seed, is_soft)
    settings = settings_of(method.name, scope)
    if order.lr is not None:
        settings = with_lr(settings, order.lr)
    if order.safety:
        settings = replace(settings, safety_share=SAFETY_SHARE)
    lora = None if order.lora is None else LoraPlan(order.lora, 2.0 * order.lora, order.lora_targets)
    plan = AlignPlan(
        method=method.name,
        seed=order.seed,
        start=StartPlan(order.model, start.hash),
        data=_data_plan(order),
        lora=lora,
        train=settings,
        rewards=_reward_parts(order, start),
        judge=_judge_plan(order, start),
        soft_prompt=order.soft_prompt,
        select=_select_plan(order, start),
        outcome=OutcomePlan(max_tokens=scope.lengths[1]),
    )
    return override(plan, order.overrides)


def align(order: AlignOrder, listener: Listener, interrupts: Interrupts | None = None) -> Path:
    """Run the method, or what is left of it, and write the card; returns the run folder. Whoever hands in `interrupts`
    can stop it by them as Ctrl-C does.

    Raises `UserError` for what cannot be used, `Interrupted` (naming the command that goes on) after Ctrl-C or SIGTERM.
    """
    plan = plan_of(order)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # see recipes/raise_.py
    raise_malloc_thresholds()
    default_name = f"{order.model.partition(':')[0].rstrip('/').rpartition('/')[2]}-{plan.method}"
    path, notice = open_run(
        default_name if order.name is None else order.name, {"fledge": fledge.__version__, **to_json(plan)}, order.runs
    )
    if notice:
        listener.stage("plan", "note", notice)
    interrupts = interrupts or Interrupts()
    with locked(path), interrupts.handled():
        board: Board = TensorBoard(path / "tensorboard") if order.tensorboard else NoBoard()
        run = RingRun(plan, path, listener, interrupts, board, default_device(), compiled=False)
        try:
            run_stages(run, stages_of(plan))
        except Interrupted as stop:
            raise Interrupted(f"{stop}; go on with the same command") from stop
        finally:
            if isinstance(board, TensorBoard):
                board.close()
        write_card(path)
    return path


def stages_of(plan: AlignPlan) -> tuple[Stage[AlignPlan], ...]:
    """The stages of a plan in the order they run."""
    method = method_named(plan.method)
    names = ("data", *(name for name, _ in method.before))
    before = [Stage(name, names[: place + 1], work) for place, (name, work) in enumerate(method.before)]
    own = [Stage(name, names, method.work) for name in own_stages(plan)]
    last = [Stage("outcome", (*names, *own_stages(plan)), outcome_stage)]
    if method.name == "reward":
        last.append(Stage("health", ("data", *own_stages(plan)), health_stage))
    return (Stage("data", (), data_stage), *before, *own, *last)


def _refuse_contradictions(order: AlignOrder, method: Method) -> None:
    has_reward = bool(order.rewards or order.verifiers or order.functions or order.rules.models)
    if method.is_rewarded and not has_reward:
        raise ConfigError(
            f"{method.name} needs a reward: --reward RUN:reward, --function FILE.py:NAME, --verifier NAME"
        )
    if not method.is_rewarded and has_reward:
        raise ConfigError(
            f"{method.name} learns without rewards; leave out --reward, --rule-reward, --function and --verifier"
        )
    if not order.rules.models and (order.rules.ids or order.rules.constitution):
        raise ConfigError("--rules and --constitution belong to a rule reward model; name it with --rule-reward")
    _refuse_what_only_sft_can(order, method)
    if order.lora_targets is not None and order.lora is None:
        raise ConfigError("--lora-targets says where an adapter goes; give its rank with --lora")
    if not 0 <= order.caution < float("inf"):
        raise ConfigError(f"--caution {order.caution}: expected 0 or more spreads to take off an ensemble's mean")
    if order.judge is not None and order.judge in {name for name, _ in (*order.rewards, *order.rules.models)}:
        raise ConfigError(f"--judge {order.judge} is trained against; a gold judge must be another model (C58)")
    if not 0 <= order.seed <= MAX_SEED:
        raise ConfigError(f"--seed {order.seed}: expected 0 to {MAX_SEED}")
    if order.lr is not None and not 0 < order.lr < float("inf"):
        raise ConfigError(f"--lr {order.lr}: expected a positive number")
    if not order.data:
        raise ConfigError("nothing to learn from; name a file with --data")


def _refuse_what_only_sft_can(order: AlignOrder, method: Method) -> None:
    only = {"--soft-prompt": order.soft_prompt, "--select-by": order.select_by, "--safety": order.safety or None}
    given = [option for option, value in only.items() if value is not None]
    if given and method.name != "sft":
        raise ConfigError(f"{given[0]} belongs to sft, which learns from demonstrations; leave it out of {method.name}")
    if order.soft_prompt is not None and order.lora is not None:
        raise ConfigError("--lora trains an adapter, --soft-prompt a few vectors before the input; choose one of them")
    if order.soft_prompt is not None and order.soft_prompt < 1:
        raise ConfigError(f"--soft-prompt {order.soft_prompt}: expected 1 token or more; 20 is customary")


def _data_plan(order: AlignOrder) -> DataPlan:
    held_out = () if order.held_out is None else (order.held_out,)
    named = {"--data": order.data, "--safety": order.safety, "--held-out": held_out}
    for option, files in named.items():
        for file in files:
            if not file.exists():
                raise DataError(f"{option} {file}: there is no such file; check the path")
    hashes = [sha256_file(inner) for files in named.values() for file in files for inner in _files_of(file)]
    return DataPlan(
        paths=tuple(str(path.expanduser().resolve()) for path in order.data),
        hash=config_hash(hashes),
        format=order.format,
        held_out=None if order.held_out is None else str(order.held_out.expanduser().resolve()),
        safety=tuple(str(path.expanduser().resolve()) for path in order.safety),
        skip_bad=order.skip_bad,
    )


def _files_of(path: Path) -> list[Path]:
    return sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]


def _reward_parts(order: AlignOrder, start: LoadedModel) -> tuple[RewardPart, ...]:
    rewards = RewardOrder(order.rewards, order.verifiers, order.functions, order.caution, order.rules)
    return reward_parts(rewards, order.runs, start)


def _judge_plan(order: AlignOrder, start: LoadedModel) -> JudgePlan | None:
    if order.judge is None:
        return None
    judge = load_scorer(order.judge, order.runs, start)
    parts = _reward_parts(order, start)
    if judge.hash in {member.hash for part in parts for member in part.models}:
        raise ConfigError(f"--judge {order.judge} has the weights of a reward; a gold judge must be another (C58)")
    return JudgePlan(order.judge, judge.hash)


def _select_plan(order: AlignOrder, start: LoadedModel) -> SelectPlan | None:
    if order.select_by is None:
        return None
    return SelectPlan(order.select_by, load_scorer(order.select_by, order.runs, start).hash)
