"""Stages 4, 5 and 6: pretraining, the code stage and SFT. One objective, one loop, three mixes of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fledge.batches import TokenBatch
from fledge.data.fim import FimDocuments, FimTokens
from fledge.data.mix import Mixture
from fledge.data.pack import PackedRows, PieceList, RowSource, ShardDocuments, batch
from fledge.errors import DataError
from fledge.evals import bits_per_byte
from fledge.evals.scorer import CausalScorer
from fledge.files import write_json
from fledge.objectives.next_token import NextToken
from fledge.recipes.chats import windows
from fledge.recipes.plan import FitPlan
from fledge.recipes.report import Claim, Fact, Table
from fledge.recipes.stage_corpus import Texts, chats_of, document_numbers, open_texts, validation_texts
from fledge.recipes.training import Context, Course, initialised, next_token, pairs_of, save_stage_model, train
from fledge.text.chat import conversation_piece, normalise
from fledge.train.loop import Pairs, TrainState
from fledge.train.metrics import FLOPS_FORMULA
from fledge.types import ChatExample, Metrics, Piece

CHATS_AT_ONCE = 512  # cut into pieces: their texts are encoded together
LANGUAGE = "language.json"  # bits per byte of a stage's model, beside it
VALIDATION_ROWS = 32  # of the curve while training; the figures on the card are measured on all held-out text
VALIDATIONS = 10  # points on that curve


def pretrain_stage(context: Context) -> None:
    """From random weights to a base model on prose (with code from the first token if the plan says so)."""
    plan, texts = context.plan.pretrain, open_texts(context)
    fit = plan.fit
    model = initialised(context.plan, texts.tokenizer.vocab_size).to(context.device)
    prose = _packed(context, texts, texts.prose, fit)
    rows: RowSource = prose
    if plan.code_share:
        rows = mixed(prose, _packed(context, texts, texts.code, fit), plan.code_share)
    objective = next_token(context, fit, texts.tokenizer)
    epoch = prose.steps_per_epoch(fit.rows)
    # The last epoch ends on the last step, so that the tables have seen every document once since they last forgot.
    first = -fit.steps % epoch

    def batches(state: TrainState, step: int) -> Pairs:
        if plan.reset_tables and step and (step + first) % epoch == 0:
            _forget(context, state, (step + first) // epoch)
        return pairs_of(objective, batch(rows, step + first, fit.rows), fit.lanes)

    held_out = _packed(context, texts, texts.prose, fit, held_out=True)
    course = Course(fit, batches, _validating(texts, held_out, fit))
    train(context, model, course)
    save_stage_model(context, model, texts.tokenizer, {})
    found = _leave_language(context, model, texts)
    context.report = replace(
        context.report,
        headline=Fact("prose", found.get("bits_per_byte/without_code", found["bits_per_byte"]), "bits per byte"),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        facts=(
            Fact("training tokens", fit.tokens),
            Fact("passes over the prose", fit.steps / epoch),
            Fact("padding share", prose.padding_share(), "%"),
            Fact("FLOPs", context.total_cost().flops),
        ),
        summary=FLOPS_FORMULA,
    )


def code_stage(context: Context) -> None:
    """Go on from the base model on mostly code, some of it rearranged for fill-in-the-middle."""
    plan, texts = context.plan.code, open_texts(context)
    fit, base = plan.fit, context.model("pretrain")
    before = language_of(context, "pretrain", base.model, texts)
    numbers = document_numbers(texts.train, texts.code)
    documents = FimDocuments(ShardDocuments(texts.train, numbers), plan.fim, fim_tokens(texts), context.plan.seed)
    code = PackedRows(documents, fit.row_length, context.plan.seed)
    rows = mixed(_packed(context, texts, texts.prose, fit, epoch_seed=1), code, plan.code_share)
    objective = next_token(context, fit, texts.tokenizer)

    def batches(state: TrainState, step: int) -> Pairs:
        return pairs_of(objective, batch(rows, step, fit.rows), fit.lanes)

    held_out = _packed(context, texts, texts.code, fit, held_out=True)
    train(context, base.model, Course(fit, batches, _validating(texts, held_out, fit)))
    save_stage_model(context, base.model, texts.tokenizer, {"base": base.hash})
    after = _leave_language(context, base.model, texts)
    kinds = {"code": "/all_code", "prose": "/without_code"}
    table = [(name, before[f"bits_per_byte{s}"], after[f"bits_per_byte{s}"]) for name, s in kinds.items()]
    gain = before["bits_per_byte/all_code"] - after["bits_per_byte/all_code"]
    context.report = replace(
        context.report,
        headline=Fact("code", after["bits_per_byte/all_code"], "bits per byte"),
        facts=(Fact("training tokens", fit.tokens), Fact("padding share", code.padding_share(), "%")),
        claims=(Claim("the code stage lowers bits per byte on held-out code", gain, ">", 0.0, "bits per byte"),),
        tables=(Table.of("Bits per byte, before and after the code stage", ("text", "before", "after"), table),),
    )


def sft_stage(context: Context) -> None:
    """Imitate the assistant's side of human chats; loss on its tokens and its end of turn only."""
    plan, texts = context.plan.sft, open_texts(context)
    fit, base = plan.fit, context.model("code")
    chats = chat_pieces(chats_of(context, "sft"), texts, fit.row_length)
    held_out_chats = chat_pieces(chats_of(context, "validation"), texts, fit.row_length)
    conversations = PackedRows(PieceList(chats), fit.row_length, context.plan.seed)
    rows: RowSource = conversations
    if plan.prose_share:
        prose = _packed(context, texts, texts.prose, fit, epoch_seed=2)
        rows = mixed(conversations, prose, plan.prose_share)
    objective = next_token(context, fit, texts.tokenizer)

    def batches(state: TrainState, step: int) -> Pairs:
        return pairs_of(objective, batch(rows, step, fit.rows), fit.lanes)

    held_out = PackedRows(PieceList(held_out_chats), fit.row_length, context.plan.seed)
    state = train(context, base.model, Course(fit, batches, _validating(texts, held_out, fit)))
    save_stage_model(context, state.model, texts.tokenizer, {"base": base.hash})
    loss = _validation_loss(state.model, texts, held_out, fit)
    context.report = replace(
        context.report,
        headline=Fact("held-out replies", loss, "nats per token"),
        facts=(
            Fact("conversation stretches", len(chats)),
            Fact("passes over them", fit.steps / conversations.steps_per_epoch(fit.rows)),
            Fact("padding share", conversations.padding_share(), "%"),
        ),
    )


def chat_pieces(chats: Sequence[ChatExample], texts: Texts, row_length: int) -> list[Piece]:
    """Conversations as trainable pieces of at most a row; `DataError` if there is none."""
    kept: list[Piece] = []
    for first in range(0, len(chats), CHATS_AT_ONCE):
        whole = [normalise(chat.conversation) for chat in chats[first : first + CHATS_AT_ONCE]]
        renderer = texts.renderer.knowing(message.text for each in whole for message in each.messages)
        stretches = (stretch for each in whole for stretch in windows(each, renderer, row_length))
        pieces = (conversation_piece(renderer, stretch, row_length) for stretch in stretches)
        kept += [piece for piece in pieces if piece is not None]
    if not kept:
        raise DataError("no conversation to learn from: name a source in corpus.chats or put chats (JSONL) into --text")
    return kept


def language_of(context: Context, stage: str, model: nn.Module, texts: Texts) -> Metrics:
    """Bits per byte of a finished stage's `model`: as the stage left them, else measured now."""
    path = context.run / stage / LANGUAGE
    return (
        dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else _bits_per_byte(context, model, texts)
    )


def _leave_language(context: Context, model: nn.Module, texts: Texts) -> Metrics:
    """Measure this stage's model once for all who ask `language_of` it."""
    found = _bits_per_byte(context, model, texts)
    write_json(context.path / LANGUAGE, found)
    return found


def _bits_per_byte(context: Context, model: nn.Module, texts: Texts) -> Metrics:
    """Bits per byte on all held-out documents, in windows of pretraining's row length."""
    any_model: Any = model
    row_length = context.plan.pretrain.fit.row_length
    scorer = CausalScorer(any_model, row_length=row_length, pad_id=texts.tokenizer.pad_id)
    documents = validation_texts(context, (*texts.prose, *texts.code))
    code = [name for name in texts.code if name in documents]
    return bits_per_byte.evaluate(scorer, documents, texts.tokenizer, code_sources=code)


def mixed(first: RowSource, second: RowSource, second_share: float) -> RowSource:
    """Rows of both, `second_share` of them from the second."""
    return Mixture({"first": first, "second": second}, {"first": 1 - second_share, "second": second_share})


def fim_tokens(texts: Texts) -> FimTokens:
    tokenizer = texts.tokenizer
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    prefix, suffix, middle = (tokenizer.special_id(name) for name in names)
    return FimTokens(prefix, suffix, middle, tokenizer.end_of_text_id)


def _packed(
    context: Context,
    texts: Texts,
    names: tuple[str, ...],
    fit: FitPlan,
    *,
    held_out: bool = False,
    epoch_seed: int = 0,
) -> PackedRows:
    """Rows of these sources; `epoch_seed` gives later stages an order of their own."""
    shards = texts.validation if held_out else texts.train
    documents = ShardDocuments(shards, document_numbers(shards, names))
    return PackedRows(documents, fit.row_length, context.plan.seed + 1000 * epoch_seed)


def _forget(context: Context, state: TrainState, epoch: int) -> None:
    """Before a new epoch: n-gram tables and their moments begin anew (models/pocket.py says why)."""
    model: Any = state.model
    if "table" in model.roles().values():
        model.reset_tables(torch.Generator().manual_seed(context.plan.seed + 1000 + epoch))
        state.optimizers.reset_role("table")


def _validating(
    texts: Texts, held_out: PackedRows, fit: FitPlan
) -> list[tuple[int, Callable[[TrainState, Metrics], None]]]:
    """A callback that adds `validation_loss` to a step's metrics now and then."""

    def validate(state: TrainState, metrics: Metrics) -> None:
        metrics["validation_loss"] = _validation_loss(state.model, texts, held_out, fit)

    return [(max(1, fit.steps // VALIDATIONS), validate)]


@torch.no_grad()
def _validation_loss(model: nn.Module, texts: Texts, held_out: PackedRows, fit: FitPlan) -> float:
    """Nats per target over the first `VALIDATION_ROWS` rows. Eager: compiling a gradient-free graph would cost more."""
    objective = NextToken(fit.row_length, texts.tokenizer.pad_id)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0.0
    for number in range(max(1, min(VALIDATION_ROWS, held_out.num_rows(0)) // fit.rows)):
        tokens: TokenBatch = objective.collate(held_out.batch(number, fit.rows)).to(device)
        term = objective.loss(model, tokens).terms["next_token"]  # type: ignore[arg-type]
        total, count = total + float(term.sum), count + term.count
    model.train(was_training)
    return total / max(count, 1.0)
