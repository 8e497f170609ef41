"""A small world for alignment tests: a tiny model with a tokenizer of its own, and data of every kind about it.

The task is the same everywhere: an answer that says "yes" is good, one that says "no" is not.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fledge.config import to_json
from fledge.files import write_json
from fledge.formats.checkpoint import CheckpointInfo, save_model
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.scalar import ScalarModel
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from fledge.types import Metrics

POSITIONS = 64


class Killed(Exception):
    pass


class Silent:
    """A listener that hears, and may fail at a step of a stage, as a process that is killed there."""

    def __init__(self, stage: str | None = None, step: int | None = None) -> None:
        self.fatal = (stage, step)
        self.heard: list[str] = []

    def stage(self, name: str, status: str, note: str) -> None:
        self.heard.append(f"{name} {status} {note}")

    def step(self, stage: str, step: int, num_steps: int, metrics: Metrics) -> None:
        if (stage, step) == self.fatal:
            raise Killed


THINGS = ("tea", "rain", "cats", "music", "snow", "bread", "ships", "books", "stars", "soup", "bells", "moss")
VERBS = ("like", "want", "see", "need")


def questions() -> list[str]:
    return [f"do you {verb} {thing}?" for thing in THINGS for verb in VERBS]


def plant(folder: Path, vocab_size: int = 290, positions: int = POSITIONS, family: str = "gpt") -> Path:
    """`runs/tiny` with a stage `sft`, `reward` and `gold`, and one data file of each kind; the same every time."""
    texts = [*questions(), "yes yes", "no no", "yes i do", "no i do not"] * 4
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=vocab_size))
    run = folder / "runs" / "tiny"
    model: Any = GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, positions))
    if family == "llama":
        model = Llama(LlamaConfig(tokenizer.vocab_size, 32, 1, 2, 2, 64, positions, is_head_tied=True))
    model.init_weights(torch.Generator().manual_seed(0))
    _add(run, "sft", family, model, tokenizer)
    for seed, stage in enumerate(("reward", "gold"), start=1):
        judge = ScalarModel.from_trunk(family, model, generator=torch.Generator().manual_seed(seed))
        _add(run, stage, "scalar", judge, tokenizer)
    for name, rows in data().items():
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def data() -> dict[str, list[dict[str, Any]]]:
    return {
        "pairs": [{"prompt": q, "chosen": "yes i do", "rejected": "no i do not"} for q in questions()],
        "verdicts": [
            {"prompt": q, "completion": a, "label": a == "yes i do"}
            for q in questions()
            for a in ("yes i do", "no i do not")
        ],
        "rankings": [
            {"prompt": q, "completions": ["yes yes", "yes i do", "no no", "no i do not"], "ranks": [1, 1, 2, 3]}
            for q in questions()
        ],
        "chats": [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "yes i do"}]}
            for q in questions()
        ],
        "prompts": [{"prompt": q} for q in questions()],
        "sums": [
            {
                "data_source": "sums",
                "prompt": [{"role": "user", "content": f"{a} and {b}?"}],
                "ability": "arithmetic",
                "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                "extra_info": {},
            }
            for a in range(8)
            for b in range(8)
        ],
    }


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(folder: Path, runs: Path, method: str, data_name: str, *more: str) -> list[str]:
    """The command line that aligns the tiny model, tiny."""
    start = [sys.executable, "-m", "fledge", "align", method, "tiny:sft", "--data", str(folder / f"{data_name}.jsonl")]
    return [*start, "--runs", str(runs), *more]


def environment(home: Path) -> dict[str, str]:
    """Without a network and with one thread, so that tests neither wait nor race."""
    return {**os.environ, "FLEDGE_HOME": str(home), "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}


def _add(run: Path, stage: str, family: str, model: Any, tokenizer: Tokenizer) -> None:
    info = CheckpointInfo(family, to_json(model.config), stage, tokenizer.hash, ChatRenderer(tokenizer).hash)
    save_model(run / stage / "model", model, tokenizer, info)
    write_json(run / stage / "manifest.json", {})
    write_json(run / "plan.json", {})
