"""The adaptive controller of the price of KL: known answers."""

from __future__ import annotations

import pytest

from fledge.rl.kl import KLConfig, next_beta


@pytest.mark.parametrize(("kl", "expected"), [(12.0, 0.151536), (0.0, 0.148464), (6.6, 0.150768)])
def test_c34_adaptive_controller_known_answers(kl, expected):
    config = KLConfig(beta=0.15, target=6.0, horizon=10_000)
    assert next_beta(0.15, config, kl=kl, num_episodes=512) == pytest.approx(expected, abs=1e-9)


def test_fixed_beta_never_moves():
    assert next_beta(0.02, KLConfig(), kl=100.0, num_episodes=512) == 0.02


@pytest.mark.parametrize("wrong", [{"beta": -0.1}, {"target": 0.0}, {"horizon": 0}, {"beta": 0.0, "target": 6.0}])
def test_contradictory_options_are_refused(wrong):
    with pytest.raises(ValueError):
        KLConfig(**wrong)
