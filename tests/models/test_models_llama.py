"""The llama family: published sizes, grouped queries, SwiGLU, initialisation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fledge.errors import ConfigError, UserError
from fledge.models.llama import PRESETS, Llama, LlamaConfig
from fledge.models.presets import count_parameters

SMALL = LlamaConfig(31, 24, 2, 6, 2, 17, 30)
# Counted from the released weights; Touvron et al. 2023, table 2 prints 6.7B, 13.0B, 32.5B and 65.2B.
RELEASED = {
    "llama1-7b": 6_738_415_616,
    "llama1-13b": 13_015_864_320,
    "llama1-33b": 32_528_943_616,
    "llama1-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
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
def test_presets_have_the_parameters_of_their_released_weights(name: str) -> None:
    assert count_parameters("llama", PRESETS[name]) == RELEASED[name]


def test_every_preset_is_checked() -> None:
    assert set(PRESETS) == set(RELEASED)


def test_grouped_queries_equal_plain_heads_with_repeated_keys_and_values() -> None:
    grouped = randomise(Llama(SMALL))
    plain = Llama(replace(SMALL, num_kv_heads=6))
    weights = grouped.state_dict()
    for name in weights:
        if name.endswith(("key.weight", "value.weight")):
            heads = weights[name].view(2, 4, 24)  # two heads of width 4, each serving three queries
            weights[name] = heads.repeat_interleave(3, dim=0).reshape(24, 24)
    plain.load_state_dict(weights)
    tokens_BT = some_tokens(2, 13)
    torch.testing.assert_close(grouped.next_logprobs(tokens_BT), plain.next_logprobs(tokens_BT), atol=1e-5, rtol=1e-5)


def test_the_mlp_is_swiglu() -> None:
    mlp = randomise(Llama(SMALL)).blocks[0].mlp
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    gate, up = x @ mlp.gate.weight.T, x @ mlp.up.weight.T
    torch.testing.assert_close(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.down.weight.T)


def test_order_matters_although_nothing_is_added_to_the_embedding() -> None:
    model = randomise(Llama(SMALL))
    tokens_BT = torch.tensor([[1, 2, 3, 9], [2, 1, 3, 9]])
    first, second = model.next_logprobs(tokens_BT)[:, -1]
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not() -> None:
    tied, untied = Llama(replace(SMALL, is_head_tied=True)), Llama(SMALL)
    assert tied.head.weight is tied.tokens.weight
    assert "head.weight" not in tied.roles()
    assert untied.roles()["head.weight"] == "head"


def test_initialisation_is_normal_with_unit_gains() -> None:
    model = Llama(LlamaConfig(400, 96, 2, 4, 4, 128, init_std=0.03))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert parameter.eq(1.0).all(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.03, rel=0.03), name


def test_hooks_on_the_model_see_hidden() -> None:
    model, seen = Llama(SMALL), []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.next_logprobs(some_tokens(1, 4))
    assert seen == [1]


def test_a_sequence_longer_than_the_model_is_refused_unless_it_has_no_limit() -> None:
    with pytest.raises(UserError, match="31 tokens does not fit a model of 30 positions"):
        Llama(SMALL).next_logprobs(some_tokens(1, 31))
    assert Llama(replace(SMALL, max_positions=None)).next_logprobs(some_tokens(1, 31)).shape == (1, 31, 31)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_heads": 8}, "even head width"),
        ({"num_kv_heads": 4}, "num_kv_heads 4 must divide num_heads 6"),
        ({"mlp_width": 0}, "positive"),
        ({"max_positions": 0}, "positive"),
        ({"rope_base": -1.0}, "rope_base"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        replace(SMALL, **changes)
