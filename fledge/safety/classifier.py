"""The moderation classifier as it is served: a linear head over embeddings by a model of ours, and what it may flag.

    classifier.json    categories, thresholds, what was measured on held-out texts, and where the model is
    head.safetensors   weight (K, D), bias (K,)
    model/             an ordinary checkpoint; the engine's `embed` reads texts with it
    card.md            precision and recall by category, what it was trained on, what it cannot do

made by `fledge moderation train` (recipes/moderation.py). A long text is cut into windows, and scores what its worst
window scores. A category flags only where it was measured: at least `MIN_HELD_OUT` held-out examples in the script
that the text is written in (safety/categories.py). No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fledge.config import from_json
from fledge.errors import CheckpointError, ConfigError, nearest
from fledge.files import sha256_file
from fledge.safety.categories import LEARNT, MIN_HELD_OUT, NAMES, script_of
from fledge.text.tokenizer import Tokenizer

FORMAT = 1


@dataclass(frozen=True)
class Figures:
    """What a category came to on held-out texts of one script. Precision and recall are None without a positive."""

    positives: int
    negatives: int
    precision: float | None
    recall: float | None

    @property
    def is_measured(self) -> bool:
        return self.positives >= MIN_HELD_OUT


@dataclass(frozen=True)
class ClassifierInfo:
    """classifier.json. `thresholds` by category; `figures[script][category]`; `files` are sha256 by name.

    `window` tokens are read at once, `stride` apart.
    """

    name: str
    window: int
    stride: int
    thresholds: dict[str, float]
    figures: dict[str, dict[str, Figures]]
    files: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Verdict:
    """What the classifier says of a text: a score by category, and those that flag it."""

    scores: Mapping[str, float]
    flagged: tuple[str, ...]

    @property
    def is_flagged(self) -> bool:
        return bool(self.flagged)


class Classifier:
    """Cuts texts into rows of tokens, and turns the rows' embeddings into verdicts."""

    def __init__(
        self,
        info: ClassifierInfo,
        tokenizer: Tokenizer,
        weight_KD: NDArray[np.float32],
        bias_K: NDArray[np.float32],
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        """`thresholds` go before the measured ones; `ConfigError` for one that cannot be."""
        self.info, self._tokenizer = info, tokenizer
        self._weight_KD, self._bias_K = weight_KD, bias_K
        self.thresholds = {**info.thresholds, **checked_thresholds(thresholds or {})}

    def rows(self, text: str) -> list[list[int]]:
        """The windows of a text, each with the token that begins a document; none for an empty one."""
        return windows(self._tokenizer, text, self.info.window, self.info.stride)

    def verdict(self, text: str, embeddings_WD: NDArray[np.float32]) -> Verdict:
        """From the embeddings of the text's `rows`."""
        if not len(embeddings_WD):
            return Verdict(dict.fromkeys(NAMES, 0.0), ())
        logits_WK = embeddings_WD @ self._weight_KD.T + self._bias_K
        worst_K = 1.0 / (1.0 + np.exp(-np.clip(logits_WK.max(axis=0), -30.0, 30.0)))
        found = dict(zip(LEARNT, worst_K.tolist(), strict=True))
        scores = {name: found.get(name, 0.0) for name in NAMES}
        script = script_of(text)
        return Verdict(scores, tuple(name for name in NAMES if self.flags(name, scores[name], script)))

    def flags(self, category: str, score: float, script: str) -> bool:
        figures = self.info.figures.get(script, {}).get(category)
        return figures is not None and figures.is_measured and score >= self.thresholds[category]


def windows(tokenizer: Tokenizer, text: str, window: int, stride: int) -> list[list[int]]:
    """Rows of at most `window` tokens, `stride` apart, that cover the text."""
    ids = tokenizer.encode(text)
    room = window - 1
    starts = range(0, max(1, len(ids) - room + stride), stride)
    return [[tokenizer.end_of_text_id, *ids[start : start + room]] for start in starts if ids[start : start + room]]


def checked_thresholds(given: Mapping[str, float]) -> dict[str, float]:
    for name, value in given.items():
        if name not in LEARNT:
            raise ConfigError(f"no threshold for '{name}': {nearest(name, LEARNT)}")
        if not 0 < value <= 1:
            raise ConfigError(f"the threshold of {name} is above 0 and at most 1, got {value}")
    return dict(given)


def read_classifier(folder: Path, thresholds: Mapping[str, float] | None = None) -> Classifier:
    """The classifier in a folder; `CheckpointError` if there is none or a file is not the one it was written with.

    The weights of the model are verified by whoever loads them (infer/process.py).
    """
    path = folder / "classifier.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        info = from_json(ClassifierInfo, data)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no moderation model; make one: fledge moderation train RUN") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); make it again: fledge moderation train RUN") from error
    for name, digest in info.files.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: missing or altered; make it again: fledge moderation train RUN")
    try:
        tensors = load_file(folder / "head.safetensors")
        weight_KD, bias_K = tensors["weight"], tensors["bias"]
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder / 'head.safetensors'}: damaged ({error})") from error
    is_fit = weight_KD.ndim == 2 and bias_K.shape == (len(LEARNT),) and len(weight_KD) == len(LEARNT)
    if not (is_fit and np.isfinite(weight_KD).all() and np.isfinite(bias_K).all()):
        raise CheckpointError(f"{folder / 'head.safetensors'}: not the head of {len(LEARNT)} categories")
    tokenizer = Tokenizer.load(folder / "model" / "tokenizer.json")
    return Classifier(info, tokenizer, weight_KD, bias_K, thresholds)
