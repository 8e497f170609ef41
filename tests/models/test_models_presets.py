"""The look-up over all published sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fledge.errors import ConfigError
from fledge.models.gpt import GPT
from fledge.models.gpt import PRESETS as GPT_PRESETS
from fledge.models.llama import PRESETS as LLAMA_PRESETS
from fledge.models.llama import Llama
from fledge.models.presets import count_parameters, preset, presets
from fledge.models.qwen import PRESETS as QWEN_PRESETS


def test_presets_are_those_of_all_model_files() -> None:
    assert {name: config for name, (_, config) in presets().items()} == GPT_PRESETS | LLAMA_PRESETS | QWEN_PRESETS
    assert preset("llama2-7b") == ("llama", LLAMA_PRESETS["llama2-7b"])


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown model 'llama2-7'; did you mean 'llama2-7b'"):
        preset("llama2-7")


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_counting_two_layers_gives_the_count_of_all(num_layers: int) -> None:
    gpt = replace(GPT_PRESETS["gpt3-125m"], width=24, num_layers=num_layers)
    llama = replace(LLAMA_PRESETS["tinyllama-1.1b"], width=64, num_layers=num_layers, vocab_size=100)
    assert count_parameters("gpt", gpt) == sum(parameter.numel() for parameter in GPT(gpt).parameters())
    assert count_parameters("llama", llama) == sum(parameter.numel() for parameter in Llama(llama).parameters())
