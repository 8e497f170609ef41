"""The labelling head: equal to the engine's embedding and a head in numpy, blind to padding, and able to learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fledge.infer.scoring import embed
from fledge.layers.attention import SegmentContext
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.labels import Labels
from fledge.models.pocket import Pocket, PocketConfig
from fledge.objectives.multi_label import LabelledIds, MultiLabel
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet


def trunk(family: str) -> torch.nn.Module:
    if family == "gpt":
        model: torch.nn.Module = GPT(GPTConfig(vocab_size=40, width=16, num_layers=1, num_heads=2, max_positions=32))
    else:
        model = Pocket(PocketConfig(vocab_size=40, width=16, num_layers=1, num_heads=1, table_rows=64))
    model.init_weights(torch.Generator().manual_seed(0))  # type: ignore[operator]
    return model


def labels(family: str, num_labels: int = 3) -> Labels:
    model = Labels(trunk(family), num_labels, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.head.bias.copy_(torch.arange(num_labels) - 1.0)
    return model


@pytest.mark.parametrize("family", ["pocket", "gpt"])
def test_the_exported_head_over_the_engines_embedding_says_the_same(family: str) -> None:
    model = labels(family)
    rows = [[1, 2, 3, 4, 5], [6, 7], [8]]
    batch = MultiLabel(8, 39, [1.0] * 3).collate([LabelledIds(tuple(row), (None,) * 3) for row in rows])
    with torch.no_grad():
        ours = model.logits(batch.tokens_BT, batch.segments_BT.sum(dim=1), SegmentContext(batch.segments_BT)).numpy()
        vectors = embed(model.trunk, rows).numpy()  # type: ignore[arg-type]
    weight, bias = (tensor.numpy() for tensor in model.exported())
    np.testing.assert_allclose(vectors @ weight.T + bias, ours, atol=1e-5)


def test_what_pads_a_row_is_not_read() -> None:
    model = labels("pocket")
    objective = MultiLabel(8, 39, [1.0] * 3)
    alone = objective.collate([LabelledIds((6, 7), (None,) * 3)])
    beside = objective.collate([LabelledIds((6, 7), (None,) * 3), LabelledIds((1, 2, 3, 4, 5, 6), (None,) * 3)])
    with torch.no_grad():
        found = [
            model.logits(b.tokens_BT, b.segments_BT.sum(dim=1), SegmentContext(b.segments_BT))[0]
            for b in (alone, beside)
        ]
    torch.testing.assert_close(found[0], found[1])


def test_every_parameter_that_trains_has_a_role_and_the_unused_head_is_frozen() -> None:
    for family in ("pocket", "gpt"):
        model = labels(family)
        training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert training <= set(model.roles())
        assert "head.weight" in training


def test_labels_that_follow_from_a_token_are_learnt() -> None:
    model = labels("pocket", 2)
    objective = MultiLabel(8, 39, [1.0, 1.0])
    draw = np.random.default_rng(0)
    rows = [tuple(int(i) for i in draw.integers(0, 39, 6)) for _ in range(64)]
    examples = [LabelledIds(row, (7 in row, None if i % 2 else 9 in row)) for i, row in enumerate(rows)]
    optimizers = OptimizerSet(model, OptimConfig.adamw(1e-2, decay=0.0))
    losses = [train_step(model, optimizers, [(objective, objective.collate(examples))])["loss"] for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]
