"""How well a model that is being trained by imitation foresees the conversations that were kept for measuring."""

from __future__ import annotations

from typing import Any

import torch

from fledge.data.pack import PackedRows, PieceList
from fledge.formats.checkpoint import LoadedModel
from fledge.objectives.next_token import NextToken
from fledge.recipes.align_data import HELD_OUT, cut_of, examples_of, pieces
from fledge.recipes.align_models import Context
from fledge.train.device import precision
from fledge.types import ChatExample, Metrics


def held_out_figures(context: Context, model: Any, start: LoadedModel, objective: NextToken) -> Metrics:
    """`held_out_loss`, nats a learned token, and `held_out_accuracy`; nothing where no conversation is held out.

    The model is left as it was, in training mode or out of it; no random number is drawn.
    """
    cut = cut_of(context, start.renderer)
    chats = [example for example in examples_of(context, HELD_OUT) if isinstance(example, ChatExample)]
    if not chats:
        return {}
    found = [piece for chat in chats for piece in pieces(chat, cut)]
    rows = PackedRows(PieceList(found), objective.row_length, context.plan.seed)
    was_training = model.training
    model.eval()
    loss, right, count = 0.0, 0.0, 0.0
    for number in range(rows.num_rows(0)):
        row = objective.collate([rows.row(number)]).to(context.device)
        with torch.no_grad(), precision(context.device):
            told = objective.loss(model, row)
        loss, right = loss + float(told.terms["next_token"].sum), right + float(told.stats["accuracy"][0])
        count += told.terms["next_token"].count
    model.train(was_training)
    metrics: Metrics = {}
    metrics["held_out_loss"] = loss / max(count, 1.0)
    metrics["held_out_accuracy"] = right / max(count, 1.0)
    return metrics
