"""Learning from demonstrations and from rankings: supervised fine-tuning, and the reward model, in an alignment run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fledge.batches import TokenBatch
from fledge.data.feedback import FeedbackExample
from fledge.data.pack import PackedRows, PieceList, RowSource, batch
from fledge.errors import DataError
from fledge.formats.checkpoint import LoadedModel
from fledge.layers.lora import add_lora
from fledge.models.scalar import ScalarModel
from fledge.objectives.next_token import NextToken
from fledge.objectives.ranking import KWiseRanking, RankedIds
from fledge.recipes.align_data import TRAIN, cut_of, examples_of, pieces, tokens_of
from fledge.recipes.align_models import FROZEN_ROLES, Context, save_aligned, start_of, trainable_model
from fledge.recipes.align_offline import fit_and_save, parts, per_step
from fledge.recipes.align_plan import FitSettings
from fledge.recipes.answers import score_answers
from fledge.recipes.report import Fact
from fledge.recipes.stage_text import mixed
from fledge.recipes.training import Course, chosen, train
from fledge.rl.world import split_rows
from fledge.train.loop import Pairs, TrainState
from fledge.types import ChatExample, Piece, TextExample


def sft_stage(context: Context) -> None:
    """Imitate the assistant's side of the conversations; `text_share` of the rows are the texts among the data."""
    settings, start = context.plan.train, start_of(context)
    cut, examples = cut_of(context, start.renderer), examples_of(context, TRAIN)

    def pieces_of(kind: type[FeedbackExample]) -> list[Piece]:
        return [piece for example in examples if isinstance(example, kind) for piece in pieces(example, cut)]

    chats, texts = pieces_of(ChatExample), pieces_of(TextExample)
    if not chats or bool(settings.text_share) != bool(texts):
        raise DataError(
            f"sft has {len(chats)} conversations and {len(texts)} pieces of text with train.text_share "
            f"{settings.text_share}; it needs conversations, and texts just where their share is above 0"
        )
    fit: FitSettings = settings.fit
    conversations = PackedRows(PieceList(chats), fit.max_length, context.plan.seed)
    rows: RowSource = conversations
    if texts:
        rows = mixed(
            conversations, PackedRows(PieceList(texts), fit.max_length, context.plan.seed + 1), settings.text_share
        )
    steps = max(1, round(conversations.num_steps(fit.epochs, fit.batch) / (1 - settings.text_share)))
    imitate(context, start, rows, fit, steps)


def imitate(context: Context, start: LoadedModel, rows: RowSource, fit: FitSettings, steps: int) -> None:
    """Supervised fine-tuning on packed rows, `fit.batch` of them a step; saves the result."""
    model = trainable_model(context, start.model)
    objective = NextToken(fit.max_length, start.tokenizer.pad_id)

    def batches(state: TrainState, step: int) -> Pairs:
        whole: TokenBatch = objective.collate(batch(rows, step, fit.batch))
        return [(objective, part) for part in split_rows(whole, fit.forward_rows)]

    fit_and_save(context, model, start, Course(fit.plan(steps, fit.batch, fit.max_length), batches))


def reward_stage(context: Context) -> None:
    """A reward model on the start's trunk: K-wise ranking, one epoch, normalised so that best answers average 0."""
    settings, start = context.plan.train, start_of(context)
    fit: FitSettings = settings.fit
    examples: list[RankedIds] = tokens_of(context, TRAIN, cut_of(context, start.renderer))
    model = _scalar_on(context, start)
    if fit.epochs > 1:
        warning = f"train.fit.epochs is {fit.epochs}: reward models overfit beyond one epoch (Ouyang et al. 2022)"
        context.listener.stage(context.name, "warning", warning)
    objective = KWiseRanking(fit.max_length, start.tokenizer.pad_id)
    size = per_step(fit, len(examples))

    def batches(state: TrainState, step: int) -> Pairs:
        some = [examples[i] for i in chosen(len(examples), size, step, context.plan.seed)]
        return [(objective, objective.collate(part)) for part in parts(some, fit.forward_rows)]

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    answers = sum(len(ranking.completions) for ranking in examples) // len(examples)
    plan = fit.plan(fit.epochs * max(1, len(examples) // size), size * answers, fit.max_length)
    train(context, model, Course(plan, batches))
    mean, spread = _normalise(model, examples, start.tokenizer.pad_id)
    save_aligned(context, model, start, {"start": start.hash})
    context.report = replace(
        context.report,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        facts=(
            Fact("parameters trained", trained),
            Fact("rankings", len(examples)),
            Fact("steps", plan.steps),
            Fact("raw score of the best answers", mean),
            Fact("spread of raw scores", spread),
        ),
    )


def _scalar_on(context: Context, start: LoadedModel) -> ScalarModel:
    """A scalar model whose head trains whole, and whose trunk does, or an adapter in it."""
    generator = torch.Generator().manual_seed(context.plan.seed)
    model = ScalarModel.from_trunk(start.info.family, start.model, generator=generator, freeze_roles=FROZEN_ROLES)
    model.to(context.device)
    if context.plan.lora is not None:
        trunk: Any = model.trunk
        add_lora(trunk, context.plan.lora.config, torch.Generator().manual_seed(context.plan.seed))
    return model


def _normalise(model: ScalarModel, examples: Sequence[RankedIds], pad_id: int) -> tuple[float, float]:
    """The best answers average 0 (Ouyang et al. 2022, section 3.5), and the spread over all answers is 1 (C17)."""
    best = [(ids.prompt, ids.completions[ids.ranks.index(min(ids.ranks))]) for ids in examples]
    everything = [(ids.prompt, completion) for ids in examples for completion in ids.completions]
    mean = float(score_answers(model, best, pad_id).double().mean())
    spread = max(float(score_answers(model, everything, pad_id).double().std()), 1e-6)
    model.normalise(mean, spread)
    return mean, spread
