"""What PPO of a model of 30 million parameters takes of memory: `fledge align ppo` as a process, seen from outside.

    python tests/recipes/align_memory.py

Policy, reference, value and reward model are float32 and of one size; lengths and rows are those that `fledge align`
starts from (256 tokens of prompt, 128 of answer, minibatches of 16 episodes, 4 in a forward pass). Two rounds of one
minibatch: the second holds the optimizers' moments while it samples and learns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from align_world import environment, write_rows

from fledge.config import to_json
from fledge.files import write_json
from fledge.formats.checkpoint import CheckpointInfo, save_model
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.scalar import ScalarModel
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer

ROOT = Path(__file__).parents[2]
VOCAB, WIDTH, LAYERS, HEADS, POSITIONS = 8192, 512, 8, 8, 512


def plant(folder: Path) -> int:
    """A run `base` with the stages `sft` and `reward`, and a file of prompts; the number of the model's parameters."""
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))]
    code = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "fledge").rglob("*.py"))]
    tokenizer = train_tokenizer([*pages, *code], TokenizerConfig(vocab_size=VOCAB))
    model = GPT(GPTConfig(tokenizer.vocab_size, WIDTH, LAYERS, HEADS, POSITIONS))
    model.init_weights(torch.Generator().manual_seed(0))
    judge = ScalarModel.from_trunk("gpt", model, generator=torch.Generator().manual_seed(1))
    hashes = (tokenizer.hash, ChatRenderer(tokenizer).hash)
    for stage, family, one in (("sft", "gpt", model), ("reward", "scalar", judge)):
        info = CheckpointInfo(family, to_json(one.config), stage, *hashes)  # type: ignore[attr-defined]
        save_model(folder / "runs" / "base" / stage / "model", one, tokenizer, info)
        write_json(folder / "runs" / "base" / stage / "manifest.json", {})
    write_json(folder / "runs" / "base" / "plan.json", {})
    lines = [line for page in pages for line in page.splitlines() if len(line) > 40]
    write_rows(folder / "prompts.jsonl", [{"prompt": f"What does this mean? {line}"} for line in lines[:200]])
    return sum(parameter.numel() for parameter in model.parameters())


def measure(folder: Path) -> dict[str, float]:
    """Plant a world in `folder` and run PPO there: parameters, peak resident bytes, seconds. Raises if it fails."""
    parameters = plant(folder)
    settings = (
        "train.warmup_rounds=1",
        "train.rounds=2",
        "train.episodes=16",
        "outcome.prompts=2",
        "outcome.max_tokens=16",
    )
    command = [sys.executable, "-m", "fledge", "align", "ppo", "base:sft", "--data", str(folder / "prompts.jsonl")]
    command += ["--reward", "base:reward", "--runs", str(folder / "runs"), "--name", "rewarded", "--skip-bad"]
    command += [word for setting in settings for word in ("--set", setting)]
    began = time.monotonic()
    with (folder / "said.txt").open("w+") as said:
        process = subprocess.Popen(command, env=environment(folder), stdout=said, stderr=said, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode != 0:
            raise RuntimeError(said.read())
    # Linux counts in KiB, macOS in bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"parameters": parameters, "peak_rss_bytes": peak, "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        sys.stdout.write(json.dumps(measure(Path(place))) + "\n")
