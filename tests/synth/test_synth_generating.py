"""The engine as a model of synth: prompts rendered or raw, answers by their own seeds, sums of log-probabilities."""

from __future__ import annotations

import pytest
import torch

from fledge.errors import DataError
from fledge.infer.engine import Engine, EngineConfig
from fledge.models.pocket import Pocket, PocketConfig
from fledge.synth.generating import Ask, EngineModel
from fledge.types import SamplingParams


class Bytes:
    """A tokenizer whose tokens are bytes."""

    vocab_size, pad_id, end_of_text_id, opening = 256, 1, 0, None

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def encode(self, text: str, *, within: bool = False) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = Pocket(PocketConfig(vocab_size=256, width=16, num_layers=2, num_heads=2, table_rows=32))
    model.init_weights(torch.Generator().manual_seed(0))
    return Engine(model, Bytes(), EngineConfig(num_blocks=64))  # type: ignore[arg-type]


def asks(*seeds: int) -> list[Ask]:
    return [Ask("Once", SamplingParams(max_tokens=6, seed=seed)) for seed in seeds]


def test_answers_follow_their_own_seed_not_their_neighbours(engine: Engine) -> None:
    model = EngineModel(engine, Bytes())  # type: ignore[arg-type]
    together = model.generate(asks(1, 2, 3))
    assert [model.generate([ask])[0] for ask in asks(1, 2, 3)] == together
    assert len({answer.ids for answer in together}) == 3


def test_a_continuation_scores_the_sum_of_its_tokens(engine: Engine) -> None:
    model = EngineModel(engine, Bytes())  # type: ignore[arg-type]
    [[both, first], [alone]] = model.score(["Once", "Once a"], [["ab", "a"], ["b"]])
    [row] = engine.score([(0, *b"Onceab")])
    assert both == pytest.approx(sum(row[-2:]), abs=1e-6)
    assert first == pytest.approx(row[-2], abs=1e-5)
    assert alone < 0
    with pytest.raises(DataError, match="no tokens"):
        model.score(["Once"], [[""]])
