"""The gpt family: published sizes, the two blocks, the band, dropout, initialisation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.errors import ConfigError, UserError
from fledge.layers.attention import RowContext
from fledge.models.gpt import GPT, PRESETS, GPTConfig, PostNormBlock, PreNormBlock
from fledge.models.presets import count_parameters

SMALL = GPTConfig(31, 16, 4, 2, 30)
# The released weights of GPT-1 and GPT-2, counted.
RELEASED = {
    "gpt1-117m": 116_534_784,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
}
# Brown et al. 2020, table D.1, in millions, with as many digits as are printed there.
TABLE_D1 = {
    "gpt3-125m": (125, 3),
    "gpt3-350m": (356, 3),
    "gpt3-760m": (760, 3),
    "gpt3-1.3b": (1320, 3),
    "gpt3-2.7b": (2650, 3),
    "gpt3-6.7b": (6660, 3),
    "gpt3-13b": (12850, 4),
    "gpt3-175b": (174600, 4),
}


def some_tokens(num_rows: int, num_positions: int) -> Tensor:
    return torch.randint(0, 31, (num_rows, num_positions), generator=torch.Generator().manual_seed(0))


def randomise(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return model


@pytest.mark.parametrize("name", RELEASED)
def test_gpt1_and_gpt2_have_the_parameters_of_their_released_weights(name: str) -> None:
    assert count_parameters("gpt", PRESETS[name]) == RELEASED[name]


@pytest.mark.parametrize("name", TABLE_D1)
def test_gpt3_has_the_parameters_of_table_d1(name: str) -> None:
    millions, digits = TABLE_D1[name]
    assert float(f"{count_parameters('gpt', PRESETS[name]) / 1e6:.{digits}g}") == millions


def test_every_preset_is_checked() -> None:
    assert set(PRESETS) == set(RELEASED) | set(TABLE_D1)


def test_the_two_generations_have_two_kinds_of_block() -> None:
    assert all(isinstance(block, PreNormBlock) for block in GPT(SMALL).blocks)
    assert all(isinstance(block, PostNormBlock) for block in GPT(replace(SMALL, block="post_norm")).blocks)
    assert isinstance(GPT(SMALL).final_norm, nn.LayerNorm)


class RecordingContext(RowContext):
    """Notes every window, and attends through one dense mask."""

    def __init__(self, tokens_BT: Tensor) -> None:
        super().__init__(tokens_BT)
        self.windows: list[tuple[int, int | None]] = []

    def attend(self, site: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, **_: Any) -> Tensor:
        self.windows.append((site, window))
        index = torch.arange(q.shape[1])
        distance = index[:, None] - index
        allowed = (distance >= 0) & (distance < (window or q.shape[1]))
        scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [1, 3, 7, 13, 24, 30])
def test_gpt3_equals_its_masked_dense_twin(window: int) -> None:
    model = randomise(GPT(replace(SMALL, window=window)))
    tokens_BT = some_tokens(2, 25)
    twin = RecordingContext(tokens_BT)
    x_BTD = model.embed(tokens_BT, twin)
    found, expected = model.hidden(x_BTD, RowContext(tokens_BT)), model.hidden(x_BTD, twin)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert twin.windows == [(0, None), (1, window), (2, None), (3, window)]


def test_a_banded_layer_forgets_what_left_its_window() -> None:
    model = randomise(GPT(replace(SMALL, num_layers=2, window=3)))
    context = RowContext(some_tokens(1, 12))
    x_BTD = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 4, 0] += 1.0
    moved_T = (model.blocks[1](x_BTD, context) - model.blocks[1](changed_BTD, context)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved_T.tolist() == [4 <= t < 7 for t in range(12)]


@pytest.mark.parametrize("option", ["embedding_dropout", "residual_dropout", "attention_dropout"])
def test_every_dropout_acts_in_training_and_never_in_evaluation(option: str) -> None:
    model = randomise(GPT(replace(SMALL, **{option: 0.3})))
    plain = randomise(GPT(SMALL))
    tokens_BT = some_tokens(2, 9)
    torch.manual_seed(0)
    assert not torch.equal(model.train().next_logprobs(tokens_BT), model.next_logprobs(tokens_BT))
    expected = plain.train().next_logprobs(tokens_BT)
    assert torch.equal(model.eval().next_logprobs(tokens_BT), expected)


def test_presets_drop_as_published() -> None:
    for name, config in PRESETS.items():
        expected = 0.0 if name.startswith("gpt3") else 0.1
        assert {config.embedding_dropout, config.residual_dropout, config.attention_dropout} == {expected}


def spread(model: GPT, name: str) -> float:
    return float(model.get_parameter(name).detach().std())


@pytest.mark.parametrize(("block", "into_stream"), [("pre_norm", 0.02 / 12**0.5), ("post_norm", 0.02)])
def test_initialisation_is_the_published_one(block: Any, into_stream: float) -> None:
    model = GPT(GPTConfig(500, 96, 6, 4, 200, block))
    model.init_weights(torch.Generator().manual_seed(0))
    assert spread(model, "tokens.weight") == pytest.approx(0.02, rel=0.02)
    assert spread(model, "positions.weight") == pytest.approx(0.01 if block == "pre_norm" else 0.02, rel=0.02)
    for layer in (0, 5):
        for name in ("attention.query", "attention.key", "attention.value", "mlp.up"):
            assert spread(model, f"blocks.{layer}.{name}.weight") == pytest.approx(0.02, rel=0.03)
        for name in ("attention.output", "mlp.down"):
            assert spread(model, f"blocks.{layer}.{name}.weight") == pytest.approx(into_stream, rel=0.03)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert parameter.eq(1.0 if name.endswith("norm.weight") else 0.0).all(), name


def test_the_head_is_the_embedding() -> None:
    model = GPT(SMALL)
    assert model.head.weight is model.tokens.weight
    assert "head.weight" not in model.roles()


def test_hooks_on_the_model_see_hidden() -> None:
    model, seen = GPT(SMALL), []
    model.register_forward_hook(lambda *_: seen.append(1))
    context = RowContext(tokens_BT := some_tokens(1, 4))
    model.hidden(model.embed(tokens_BT, context), context)
    assert seen == [1]


def test_a_sequence_longer_than_the_model_is_refused_with_both_lengths() -> None:
    with pytest.raises(UserError, match="31 tokens does not fit a model of 30 positions"):
        GPT(SMALL).next_logprobs(some_tokens(1, 31))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_heads": 3}, "multiple of num_heads 3"),
        ({"vocab_size": 0}, "positive"),
        ({"window": 0}, "window must be at least 1"),
        ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\)"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        replace(SMALL, **changes)


def test_gelu_is_the_tanh_form() -> None:
    model = randomise(GPT(SMALL))
    mlp, x = model.blocks[0].mlp, torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    h = F.linear(x, mlp.up.weight, mlp.up.bias)
    gelu = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), F.linear(gelu, mlp.down.weight, mlp.down.bias))
