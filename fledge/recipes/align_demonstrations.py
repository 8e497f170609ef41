"""Learning from demonstrations and from rankings: supervised fine-tuning, and the reward model, in an alignment run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fledge.batches import TokenBatch
from fledge.data.feedback import FeedbackExample
from fledge.data.mix import Mixture
from fledge.data.pack import PackedRows, PieceList, RowSource, batch
from fledge.errors import DataError
from fledge.formats.checkpoint import LoadedModel
from fledge.layers.lora import add_lora
from fledge.layers.soft_prompt import SoftPrompt
from fledge.models.scalar import ScalarModel
from fledge.objectives.next_token import NextToken
from fledge.objectives.ranking import KWiseRanking, RankedIds
from fledge.recipes.align_data import SAFETY_TRAIN, TRAIN, Cut, cut_of, examples_of, pieces, tokens_of
from fledge.recipes.align_held_out import held_out_figures
from fledge.recipes.align_models import FROZEN_ROLES, Context, own_stages, save_aligned, start_of, trainable_model
from fledge.recipes.align_offline import fit_and_save, parts, per_step
from fledge.recipes.align_selection import Selection
from fledge.recipes.align_settings import FitSettings, SFTSettings
from fledge.recipes.answers import score_answers
from fledge.recipes.report import Fact
from fledge.recipes.training import Course, chosen, train
from fledge.rl.world import split_rows
from fledge.text.prefixed import PrefixedRenderer
from fledge.train.loop import Pairs, TrainState
from fledge.types import ChatExample, Piece, TextExample

MEMBER_SEEDS = 1000  # between the seeds of two members of an ensemble


def sft_stage(context: Context) -> None:
    """Imitate the assistant's side of the conversations, by all weights, an adapter or a soft prompt.

    `text_share` of the rows are the texts among the data, `safety_share` the safety demonstrations of their own files.
    """
    settings, start = context.plan.train, start_of(context)
    fit: FitSettings = settings.fit
    examples = examples_of(context, TRAIN)
    if context.plan.soft_prompt is None:
        start = replace(start, model=trainable_model(context, start.model))
    else:
        start = _soft_prompted(context, start, examples)
    cut = Cut(start.renderer, fit.max_length)
    chats, texts = _pieces(examples, ChatExample, cut), _pieces(examples, TextExample, cut)
    safety = _pieces(examples_of(context, SAFETY_TRAIN), ChatExample, cut)
    _refuse_shares_without_rows(settings, len(chats), len(texts), len(safety))
    conversations = PackedRows(PieceList(chats), fit.max_length, context.plan.seed)
    sources: dict[str, RowSource] = {"conversations": conversations}
    shares = {"conversations": 1 - settings.text_share - settings.safety_share}
    for number, (name, some, share) in enumerate(
        (("texts", texts, settings.text_share), ("safety", safety, settings.safety_share)), start=1
    ):
        if share:
            sources[name] = PackedRows(PieceList(some), fit.max_length, context.plan.seed + number)
            shares[name] = share
    rows: RowSource = Mixture(sources, shares) if len(sources) > 1 else conversations
    steps = max(1, round(conversations.num_steps(fit.epochs, fit.batch) / shares["conversations"]))
    facts = (Fact("conversations", len(chats)), Fact("safety demonstrations", len(safety)), Fact("texts", len(texts)))
    context.report = replace(context.report, facts=tuple(fact for fact in facts if fact.value))
    imitate(context, start, rows, fit, steps)


def _pieces(examples: Sequence[FeedbackExample], kind: type[FeedbackExample], cut: Cut) -> list[Piece]:
    return [piece for example in examples if isinstance(example, kind) for piece in pieces(example, cut)]


def _refuse_shares_without_rows(settings: SFTSettings, num_chats: int, num_texts: int, num_safety: int) -> None:
    if not num_chats or bool(settings.text_share) != bool(num_texts):
        raise DataError(
            f"sft has {num_chats} conversations and {num_texts} pieces of text with train.text_share "
            f"{settings.text_share}; it needs conversations, and texts just where their share is above 0"
        )
    if bool(settings.safety_share) != bool(num_safety):
        raise DataError(
            f"sft has {num_safety} safety demonstrations with train.safety_share {settings.safety_share}; "
            "name their files with --safety, or leave the share at 0"
        )


def _soft_prompted(context: Context, start: LoadedModel, examples: Sequence[FeedbackExample]) -> LoadedModel:
    """The start frozen behind a soft prompt, and its renderer with the prompt's ids in front.

    The prompt begins as tokens that the demonstrations' answers hold, drawn by how often they do (Lester et al. 2021,
    section 3.2: words of the task beat random values).
    """
    if context.plan.train.text_share:
        raise DataError("train.text_share keeps a model from forgetting; behind a soft prompt it is frozen: leave it 0")
    assert context.plan.soft_prompt is not None
    plain = Cut(start.renderer, context.plan.train.fit.max_length)
    said = [ids for piece in _pieces(examples, ChatExample, plain) for ids in piece.ids[piece.loss_mask > 0].tolist()]
    if not said:
        raise DataError("no conversation among the data: a soft prompt learns from demonstrations; bring some")
    rng = np.random.default_rng(context.plan.seed)
    model = SoftPrompt(start.model, [int(ids) for ids in rng.choice(said, context.plan.soft_prompt)])
    return replace(start, model=model, renderer=PrefixedRenderer(start.renderer, model.soft_ids))


def imitate(context: Context, start: LoadedModel, rows: RowSource, fit: FitSettings, steps: int) -> None:
    """Supervised fine-tuning of `start.model`, ready to train, on packed rows, `fit.batch` of them a step; saves the
    result: the last weights, or those that the plan's reward model likes best."""
    model = start.model
    objective = NextToken(fit.max_length, start.tokenizer.pad_id)

    def batches(state: TrainState, step: int) -> Pairs:
        whole: TokenBatch = objective.collate(batch(rows, step, fit.batch))
        return [(objective, part) for part in split_rows(whole, fit.forward_rows)]

    plan = fit.plan(steps, fit.batch, fit.max_length)
    if context.plan.select is None:
        measure = partial(held_out_figures, context, model, start, objective)
        fit_and_save(context, model, start, Course(plan, batches), measure)
        return
    with Selection(context, start, every=context.plan.select.every or max(1, steps // fit.epochs)) as selection:
        fit_and_save(
            context, model, start, Course(plan, batches, [(selection.every, selection.look)]), finish=selection.keep
        )


def reward_stage(context: Context) -> None:
    """A reward model on the start's trunk: K-wise ranking, one epoch, normalised so that best answers average 0."""
    number = own_stages(context.plan).index(context.name)
    # A member of an ensemble differs in its head and in the order of its data; its first is the model without others.
    context.plan = replace(context.plan, seed=context.plan.seed + MEMBER_SEEDS * number)
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
