"""A classifier over a tiny tokenizer whose head reads one direction a category."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fledge.config import to_json
from fledge.files import sha256_file
from fledge.safety.categories import LEARNT, SCRIPTS
from fledge.safety.classifier import ClassifierInfo, Figures
from fledge.text.subwords import TokenizerConfig
from fledge.text.tokenizer import Tokenizer, train_tokenizer

TEXT = "some words of no harm, and others. 你好，世界！ "


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 20], TokenizerConfig(vocab_size=320))


def figures(positives: int) -> dict[str, Figures]:
    return {name: Figures(positives, 10, 0.9, 0.8) for name in LEARNT}


def info(latin: int = 50, han: int = 49) -> ClassifierInfo:
    """Measured in Latin script, one positive short of it in Chinese."""
    found = dict(zip(SCRIPTS, (figures(latin), figures(han), figures(0)), strict=True))
    return ClassifierInfo("sample", 16, 12, dict.fromkeys(LEARNT, 0.5), found, {})


def head() -> tuple[np.ndarray, np.ndarray]:
    """Category k is at logit 8 where the embedding is direction k, else at -4."""
    return 12 * np.eye(len(LEARNT), dtype=np.float32), np.full(len(LEARNT), -4.0, np.float32)


def write(folder: Path) -> Path:
    """A classifier's folder, without the weights of its model."""
    (folder / "model").mkdir(parents=True)
    weight, bias = head()
    save_file({"weight": weight, "bias": bias}, folder / "head.safetensors")
    tokenizer().save(folder / "model" / "tokenizer.json")
    described = {**to_json(info()), "files": {"head.safetensors": sha256_file(folder / "head.safetensors")}}
    (folder / "classifier.json").write_text(json.dumps(described))
    return folder
