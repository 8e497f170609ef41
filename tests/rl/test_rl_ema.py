"""Averaged weights: the known answer, frozen parameters, and the way back into a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fledge.rl.ema import Ema


def line(value: float, bias: float = 0.0) -> nn.Linear:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, value)
    nn.init.constant_(layer.bias, bias)
    return layer


def test_c46_known_answer():
    layer = line(1.0)
    ema = Ema(layer, 0.992)
    nn.init.constant_(layer.weight, 2.0)
    ema.update(layer)
    assert ema.shadows["weight"].item() == pytest.approx(0.992 + 0.016, abs=1e-6)
    ema.update(layer)
    assert ema.shadows["weight"].item() == pytest.approx(0.992 * 1.008 + 0.016, abs=1e-6)


def test_frozen_parameters_have_no_shadow_and_stay_what_they_are():
    layer = line(1.0, 3.0)
    layer.bias.requires_grad_(False)
    ema = Ema(layer, 0.5)
    assert set(ema.shadows) == {"weight"}
    other = line(9.0, 7.0)
    other.bias.requires_grad_(False)
    ema.copy_to(other)
    assert (other.weight.item(), other.bias.item()) == (1.0, 7.0)


def test_state_restores_the_average_and_is_not_the_model():
    layer = line(1.0)
    ema = Ema(layer, 0.5)
    nn.init.constant_(layer.weight, 5.0)
    ema.update(layer)
    restored = Ema(line(0.0), 0.5)
    restored.load(ema.state())
    assert restored.shadows["weight"].item() == 3.0
    restored.shadows["weight"].zero_()
    assert ema.shadows["weight"].item() == 3.0


def test_state_of_another_model_and_a_decay_out_of_range_are_refused():
    with pytest.raises(ValueError, match="another model"):
        Ema(line(1.0), 0.5).load({"weight": torch.zeros(2, 1), "bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Ema(line(1.0), 1.0)
