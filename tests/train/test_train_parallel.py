"""Two real processes, joined by gloo, against one: the same sums, counts, gradients, clipping and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import train_ranks
from safetensors.torch import load_file

from fledge.train.parallel import ALONE, Ranks


@pytest.fixture(scope="module")
def told(in_processes, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """(the folder of the weights and gradients, what each of two processes said)."""
    folder = tmp_path_factory.mktemp("ranks")
    in_processes(Path(train_ranks.__file__), folder)
    return folder, [json.loads((folder / f"told-{number}.json").read_text()) for number in range(2)]


@pytest.mark.parametrize(("name", "clip_norm"), [("whole", None), ("clipped", train_ranks.CLIP)])
def test_c42_c44_two_processes_have_the_gradients_norm_and_metrics_of_one(told, name, clip_norm):
    folder, said = told
    metrics, gradients, weights = train_ranks.step_of(ALONE, clip_norm)
    if clip_norm is not None:
        assert metrics["grad_norm"] > clip_norm, "or nothing is clipped here"
    for number in range(2):
        assert said[number][name] == pytest.approx(metrics, rel=1e-5)
        found = load_file(folder / f"{name}-gradients-{number}.safetensors")
        assert found.keys() == gradients.keys()
        assert max(float((found[key] - gradients[key]).abs().max()) for key in gradients) <= 1e-5
        moved = load_file(folder / f"{name}-weights-{number}.safetensors")
        assert max(float((moved[key] - weights[key]).abs().max()) for key in weights) <= 1e-3


def test_both_processes_have_the_same_weights_and_figures_to_the_bit(told):
    folder, said = told
    assert said[0]["whole"] == said[1]["whole"]
    first, second = (load_file(folder / f"whole-weights-{number}.safetensors") for number in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_c49_a_loss_that_is_no_number_in_one_process_halts_all(told):
    assert all("weights untouched" in one["halt"] for one in told[1])


def test_gradients_that_one_process_lacks_are_those_of_the_other(told):
    for one in told[1]:
        found = one["uneven"]
        assert found["dense"] == [3.0, 6.0]
        assert found["absent"] is True
        assert found["only_first"] == [1.0, 1.0]
        assert found["table"] == [[0, 0], [1, 1], [0, 0], [2, 2], [0, 0]]
        assert found["touched"] == [1, 3], "rows that nobody looked up stay out of a row-sparse sum"


def test_what_each_says_is_told_to_all_in_their_order(told):
    for one in told[1]:
        said = [{"number": 0, "text": "", "tiny": 0.1}, {"number": 1, "text": "é", "tiny": 1.1}]
        assert one["uneven"]["told"] == said
        assert one["uneven"]["gathered"] == [[0, 7], [1, 7]]
        assert one["uneven"]["bools"] == [True, False]


def test_shares_cover_every_row_once_and_differ_by_one():
    for count in (1, 2, 3, 5):
        shares = [Ranks(number, count).own(7).tolist() for number in range(count)]
        assert sorted(place for share in shares for place in share) == list(range(7))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_alone_meets_nobody():
    rows = torch.ones(3, 2)
    assert ALONE.gathered(rows) is rows
    assert ALONE.told({"a": 1}) == [{"a": 1}]
    ALONE.add_gradients([])
