"""The classifier as it is served: windows, scores, what may flag, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safety_samples import TEXT, head, info, tokenizer, write

from fledge.errors import CheckpointError, ConfigError
from fledge.files import sha256_file
from fledge.safety.categories import LEARNT, MIN_HELD_OUT, MINORS, NAMES
from fledge.safety.classifier import Classifier, Figures, read_classifier, windows

K = len(LEARNT)


def classifier(**changes: float) -> Classifier:
    return Classifier(info(), tokenizer(), *head(), changes or None)


def direction(name: str) -> np.ndarray:
    return np.eye(K, dtype=np.float32)[[LEARNT.index(name)]]


@settings(deadline=None)
@given(st.text(max_size=300))
def test_windows_cover_every_token_in_order_and_overlap(text: str) -> None:
    ids = tokenizer().encode(text)
    rows = windows(tokenizer(), text, 16, 12)
    assert all(row[0] == tokenizer().end_of_text_id and 2 <= len(row) <= 16 for row in rows)
    starts = [12 * number for number in range(len(rows))]
    assert [row[1:] for row in rows] == [ids[start : start + 15] for start in starts]
    covered = {place for start, row in zip(starts, rows, strict=True) for place in range(start, start + len(row) - 1)}
    assert covered == set(range(len(ids)))


def test_scores_are_those_of_the_head_worked_by_hand() -> None:
    verdict = classifier().verdict("words", direction("hate"))
    assert verdict.scores["hate"] == pytest.approx(1 / (1 + math.exp(-8)))
    assert verdict.scores["violence"] == pytest.approx(1 / (1 + math.exp(4)))
    assert (verdict.flagged, verdict.is_flagged) == (("hate",), True)
    assert tuple(verdict.scores) == NAMES


def test_a_text_scores_what_its_worst_window_scores() -> None:
    vectors = np.concatenate([np.zeros((5, K), np.float32), direction("hate"), direction("illicit")])
    assert set(classifier().verdict("words", vectors).flagged) == {"hate", "illicit"}


def test_an_empty_text_scores_nothing() -> None:
    assert classifier().rows("") == []
    verdict = classifier().verdict("", np.zeros((0, 0), np.float32))
    assert (verdict.flagged, set(verdict.scores.values())) == ((), {0.0})


def test_an_unmeasured_category_never_flags_however_high_it_scores() -> None:
    assert Figures(MIN_HELD_OUT, 0, 1.0, 1.0).is_measured
    assert not Figures(MIN_HELD_OUT - 1, 0, 1.0, 1.0).is_measured
    for text in ("世界你好", "Привет, мир"):
        verdict = classifier().verdict(text, direction("hate"))
        assert verdict.scores["hate"] > 0.99
        assert verdict.flagged == ()


def test_the_category_that_is_never_learnt_scores_0_and_never_flags() -> None:
    assert MINORS not in LEARNT
    for name in LEARNT:
        verdict = classifier().verdict("words", direction(name))
        assert verdict.scores[MINORS] == 0.0
        assert MINORS not in verdict.flagged
    assert not classifier().flags(MINORS, 1.0, "latin")


def test_an_operators_threshold_goes_before_the_measured_one() -> None:
    strict = Classifier(info(), tokenizer(), *head(), {"hate": 1.0})
    assert strict.verdict("words", direction("hate")).flagged == ()
    assert strict.thresholds["violence"] == 0.5


@pytest.mark.parametrize("given", [{"hat": 0.5}, {MINORS: 0.5}, {"hate": 0.0}, {"hate": 1.1}, {"hate": float("nan")}])
def test_a_threshold_that_cannot_be_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Classifier(info(), tokenizer(), *head(), given)


def test_a_written_classifier_is_read_back(tmp_path: Path) -> None:
    found = read_classifier(write(tmp_path / "c"))
    assert found.info.name == "sample"
    assert found.verdict("words", direction("hate")).flagged == ("hate",)
    assert found.rows(TEXT)


def test_a_folder_without_one_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fledge moderation train"):
        read_classifier(tmp_path)


def test_an_altered_head_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    (folder / "head.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="altered"):
        read_classifier(folder)


@pytest.mark.parametrize("shape", [(K + 1, 4), (K,)])
def test_a_head_of_another_shape_or_with_nan_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = write(tmp_path / "c")
    _rewrite(folder, np.zeros(shape, np.float32), np.zeros(K, np.float32))
    with pytest.raises(CheckpointError, match="not the head"):
        read_classifier(folder)
    _rewrite(folder, np.full((K, 4), np.nan, np.float32), np.zeros(K, np.float32))
    with pytest.raises(CheckpointError, match="not the head"):
        read_classifier(folder)


def _rewrite(folder: Path, weight: np.ndarray, bias: np.ndarray) -> None:
    save_file({"weight": weight, "bias": bias}, folder / "head.safetensors")
    described = json.loads((folder / "classifier.json").read_text())
    described["files"]["head.safetensors"] = sha256_file(folder / "head.safetensors")
    (folder / "classifier.json").write_text(json.dumps(described))
