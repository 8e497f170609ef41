"""Models of an alignment run: the one that is aligned, with an adapter or whole; what is checked; how it is saved.

What is refused before any work: padding that is also an end token (C1), a reward model or judge of another tokenizer
or chat template (C11), weights that are no longer those the plan was made for (C45).
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fledge.config import to_json
from fledge.errors import CheckpointError, RunError, TrainingHalted, UserError
from fledge.formats.checkpoint import CheckpointInfo, LoadedModel, load_model, save_model
from fledge.formats.peft import save_adapter
from fledge.layers.lora import LoraLinear, add_lora, merge_lora, remove_lora, take_adapter
from fledge.layers.soft_prompt import SoftPrompt
from fledge.models.scalar import ScalarModel, freeze
from fledge.recipes.align_plan import AlignPlan
from fledge.recipes.align_settings import RewardSettings
from fledge.recipes.ring import StageContext
from fledge.recipes.runs import resolve_model
from fledge.registry import family

Context = StageContext[AlignPlan]
TIED = "is_head_tied"  # the families' name for a head that may be the embedding or not
FROZEN_ROLES = ("table",)  # n-gram tables: no later stage trains them (models/pocket.py)


def load_start(name: str, runs: Path, device: torch.device | None = None) -> LoadedModel:
    """The model that a user wants aligned. `UserError` if there is none, it cannot be trained, or C1 does not hold."""
    directory = resolve_model(name, runs)
    loaded = load_model(directory, device=device)
    if family(loaded.info.family).kind != "causal" or not any(True for _ in loaded.model.parameters()):
        raise RunError(f"{directory}: a {loaded.info.family} model does not train; name a language model")
    refuse_padding_that_ends(loaded)
    return loaded


def refuse_padding_that_ends(loaded: LoadedModel) -> None:
    """C1: padding with an id of its own, for otherwise every padded answer would look finished."""
    renderer, tokenizer = loaded.renderer, loaded.tokenizer
    if tokenizer.pad_id in {*renderer.stop_ids, renderer.end_id, tokenizer.end_of_text_id}:
        raise CheckpointError(
            f"{loaded.directory}: its padding token {tokenizer.pad_id} also ends texts or turns; "
            "import the model again, which gives padding an unused id"
        )


def start_of(context: Context) -> LoadedModel:
    """The model of the plan, unchanged since it was made (C45)."""
    plan = context.plan.start
    loaded = load_start(plan.name, context.run.parent, context.device)
    refuse_other_weights(loaded, plan.hash)
    return loaded


def refuse_other_weights(loaded: LoadedModel, expected: str) -> None:
    if loaded.hash != expected:
        raise RunError(
            f"{loaded.directory}: other weights ({loaded.hash[:12]}) than this run began with ({expected[:12]}); "
            "restore them, or start a new run with --name"
        )


def load_scorer(name: str, runs: Path, start: LoadedModel, device: torch.device | None = None) -> LoadedModel:
    """A reward model or judge of the same tokens and chat template as `start` (C11); it is left frozen."""
    directory = resolve_model(scorer_name(name, runs), runs)
    loaded = load_model(directory, device=device)
    if not isinstance(loaded.model, ScalarModel):
        raise RunError(f"{directory}: a {loaded.info.family} model gives no scores; name a reward model, RUN:reward")
    for what in ("tokenizer_hash", "template_hash"):
        ours, theirs = getattr(start.info, what), getattr(loaded.info, what)
        if ours != theirs:
            raise RunError(
                f"{directory}: another {what.partition('_')[0]} ({theirs[:12]}) than the policy's ({ours[:12]}); "
                "train the reward model from the policy's own family line"
            )
    loaded.model.requires_grad_(False)
    return loaded


def scorer_name(name: str, runs: Path) -> str:
    """RUN:reward for a RUN that holds a reward model and is named alone; otherwise the name as it is."""
    holds_one = ":" not in name and (runs / name / "reward" / "manifest.json").is_file()
    return f"{name}:reward" if holds_one else name


def own_stages(plan: AlignPlan) -> tuple[str, ...]:
    """The stages of the method itself: one, or one a member of an ensemble of reward models."""
    members = plan.train.members if isinstance(plan.train, RewardSettings) else 1
    return tuple(plan.method if number == 1 else f"{plan.method}-{number}" for number in range(1, members + 1))


def scalar(loaded: LoadedModel) -> ScalarModel:
    assert isinstance(loaded.model, ScalarModel)
    return loaded.model


def trainable_model(context: Context, model: nn.Module) -> nn.Module:
    """`model` made ready to train, in place: with the plan's adapter, or whole but for its tables. `UserError` for an
    adapter that could not be saved with it."""
    if context.plan.lora is None:
        model.requires_grad_(True)
        freeze(model, FROZEN_ROLES)
    else:
        add_lora(model, context.plan.lora.config, torch.Generator().manual_seed(context.plan.seed))
        _refuse_parting(model)
    return model


def _refuse_parting(model: nn.Module) -> None:
    """An adapter of a head that is the embedding makes it a head of its own, which not every family can have."""
    any_model: Any = model
    head = getattr(any_model, "head", None)
    if isinstance(head, LoraLinear) and head.base.weight is any_model.tokens.weight and not _can_part(any_model):
        raise UserError(
            "this model's head is always its embedding, so an adapter has no place in it; adapt other layers"
        )


def _can_part(model: Any) -> bool:
    return any(field.name == TIED for field in fields(model.config))


def _config_of(model: Any) -> Any:
    """The config of a model whose adapter is merged: if it was in a head that was the embedding, they are two now."""
    is_parted = _can_part(model) and model.head.weight is not model.tokens.weight
    return replace(model.config, **{TIED: False}) if is_parted else model.config


def save_aligned(
    context: Context, model: nn.Module, start: LoadedModel, parents: dict[str, str], *, name: str = "model"
) -> str:
    """Write a trained model, its adapter merged (and beside it as PEFT's, where a layout is published); its hash."""
    config: Any = model.config
    if context.plan.lora is not None:
        _save_adapter(context, model, start, name)
        trunk: nn.Module = model.trunk if isinstance(model, ScalarModel) else model
        merge_lora(trunk)
        remove_lora(trunk)
        config = _config_of(model)
    info = CheckpointInfo(
        family="scalar" if isinstance(model, ScalarModel) else start.info.family,
        config=to_json(config),
        stage=context.name,
        tokenizer_hash=start.info.tokenizer_hash,
        template_hash=start.info.template_hash,
        parents=parents,
        seed=context.plan.seed,
        soft_prompt=len(model.soft_ids) if isinstance(model, SoftPrompt) else 0,
        notes={"method": context.plan.method},
    )
    return save_model(context.path / name, model, start.tokenizer, info, start.template)


def save_checkpoint(context: Context, model: nn.Module, start: LoadedModel, step: int) -> None:
    """Leave a model behind as `checkpoint-STEP`, whole like the result; training goes on with what it has."""
    # An adapter is merged when it is saved, so it is a copy's.
    saved = model if context.plan.lora is None else copy.deepcopy(model)
    save_aligned(context, saved, start, {"start": start.hash}, name=f"checkpoint-{step}")


def _save_adapter(context: Context, model: nn.Module, start: LoadedModel, name: str) -> None:
    assert context.plan.lora is not None
    directory = context.path / ("adapter" if name == "model" else f"{name}-adapter")
    if isinstance(model, ScalarModel) or directory.exists():
        return
    try:
        save_adapter(take_adapter(model, context.plan.lora.config), model, directory, base=context.plan.start.name)
    except CheckpointError as why:  # a family of ours alone has no published layout; the merged model holds it all
        context.listener.stage(context.name, "note", f"no PEFT adapter: {why}")


def weights_digest(model: nn.Module) -> str:
    """sha256 over all parameters, bit for bit."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_unchanged(model: nn.Module, before: str) -> None:
    """C45: the reference is what it was. `TrainingHalted` if training has touched it."""
    if weights_digest(model) != before:
        raise TrainingHalted("the frozen reference has changed during training; the result cannot be trusted")
