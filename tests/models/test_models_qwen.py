"""What is Qwen's own: head widths apart from the width, biases or norms on queries and keys, the published sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fledge.errors import ConfigError
from fledge.layers.attention import RowContext
from fledge.models.presets import count_parameters
from fledge.models.qwen import PRESETS, Qwen, QwenConfig

SMALL = QwenConfig(43, 24, 2, 6, 2, 10, 17, "normed", 20)

# The model cards of the releases, in billions: all parameters.
CARDS = {
    "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.61, "qwen2.5-14b": 14.8,
    "qwen2.5-32b": 32.8, "qwen2.5-72b": 72.7, "qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7, "qwen3-4b": 4.0, "qwen3-8b": 8.2,
    "qwen3-14b": 14.8, "qwen3-32b": 32.8,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_have_the_parameters_of_their_model_cards(name: str) -> None:
    assert count_parameters("qwen", PRESETS[name]) / 1e9 == pytest.approx(CARDS[name], rel=0.03)


def test_the_biases_of_queries_keys_and_values_and_no_others_exist() -> None:
    model = Qwen(replace(SMALL, attention="biased"))
    biases = {name.split(".", 2)[2] for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biases == {f"attention.{part}.bias" for part in ("query", "key", "value")}
    assert not [name for name, _ in Qwen(SMALL).named_parameters() if name.endswith("bias")]


def test_with_normed_attention_the_size_of_queries_and_keys_changes_nothing() -> None:
    model = Qwen(SMALL).eval()
    tokens_BT = torch.arange(12)[None]
    before = model.next_logprobs(tokens_BT)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query.weight.mul_(64.0)
            block.attention.key.weight.mul_(64.0)
    torch.testing.assert_close(model.next_logprobs(tokens_BT), before, atol=1e-3, rtol=1e-3)


def test_a_document_beyond_the_positions_is_refused() -> None:
    tokens_BT = torch.zeros(1, 21, dtype=torch.int64)
    with pytest.raises(ValueError, match="20"):
        Qwen(SMALL).embed(tokens_BT, RowContext(tokens_BT))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"head_width": 9}, "head_width 9 must be positive and even"),
        ({"num_kv_heads": 4}, "num_kv_heads 4 must divide num_heads 6"),
        ({"attention": "plain"}, "attention 'plain' is unknown"),
        ({"width": 0}, "sizes must be positive"),
        ({"max_positions": 0}, "sizes must be positive"),
        ({"norm_eps": 0.0}, "must be positive"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        replace(SMALL, **changes)
