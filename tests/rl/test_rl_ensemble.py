"""Ensembles of reward models: conservative scores and their disagreement."""

from __future__ import annotations

import pytest
import torch

from fledge.errors import ConfigError
from fledge.rl.ensemble import EnsembleScorer, combined

SCORES = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])]


def test_c20_score_is_the_mean_less_caution_times_the_spread():
    scores, spread = combined(SCORES, 0.5)
    assert scores.tolist() == [1.5, 2.0]
    assert spread.tolist() == [1.0, 0.0]


def test_c20_disagreement_is_logged_since_the_last_look():
    ensemble = EnsembleScorer([lambda given, s=s: s for s in SCORES], caution=1.0)
    assert ensemble(None).tolist() == [1.0, 2.0]
    ensemble(None)
    assert ensemble.figures() == {"reward_disagreement": 0.5, "reward_disagreement_max": 1.0}
    assert ensemble.figures() == {}


def test_ensemble_of_one_or_with_a_negative_price_is_refused():
    with pytest.raises(ConfigError, match="at least two"):
        EnsembleScorer([len])
    with pytest.raises(ConfigError, match="caution"):
        EnsembleScorer([len, len], caution=-1.0)
