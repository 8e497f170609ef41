"""Scores and embeddings of whole texts against one text at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_infer_naive import CONFIGS, build, prompts_of

from fledge.infer import scoring
from fledge.infer.causal import CausalModel, evaluating
from fledge.layers.attention import RowContext
from fledge.objectives.logprobs import target_logprobs

ROWS = prompts_of([5, 1, 30, 12, 2, 12])


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> CausalModel:
    return build(request.param).eval()


@pytest.mark.parametrize("limits", [(4096, 256), (31, 7), (1, 1)])
def test_scores_are_the_trainers_whatever_stands_beside_a_text(
    model: CausalModel, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in zip(("_BATCH_POSITIONS", "_LOGIT_ROWS"), limits, strict=True):
        monkeypatch.setattr(scoring, name, limit)
    with evaluating(model):
        scores = scoring.score(model, ROWS)
        for row, own in zip(ROWS, scores, strict=True):
            tokens_1T = torch.tensor([row])
            logits = model.next_logprobs(tokens_1T)[:, :-1]
            expected = target_logprobs(logits, tokens_1T[:, 1:])[0].tolist() if len(row) > 1 else []
            assert own == pytest.approx(expected, abs=1e-5)


def test_an_embedding_is_the_mean_direction_of_a_text_alone(model: CausalModel) -> None:
    with evaluating(model):
        vectors = scoring.embed(model, ROWS)
        for row, vector in zip(ROWS, vectors, strict=True):
            tokens_1T = torch.tensor([row])
            context = RowContext(tokens_1T)
            x_TD = model.hidden(model.embed(tokens_1T, context), context)[0]
            torch.testing.assert_close(vector, F.normalize(x_TD.mean(dim=0), dim=0), atol=1e-5, rtol=1e-4)


def test_no_texts_have_no_scores_and_no_embeddings(model: CausalModel) -> None:
    assert scoring.score(model, []) == []
    assert scoring.embed(model, []).shape == (0, 0)
