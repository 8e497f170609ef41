"""Training speed beside `transformers` in a plain loop: the same shape, batch and number of tokens, in one run.

    .venv/bin/python bench/train_speed.py
    .venv/bin/python bench/train_speed.py --size 4m --turns 12

Four workers, each a process of its own (so that our allocator settings do not help theirs): fledge's Llama under
`train_step` and transformers' Llama under a plain loop, each eager and compiled. They take turns of a few steps, so
that a busy machine slows all; a ratio is the median over turns of (their seconds / our seconds). The share of the
peak divides the FLOPs of FLOPS_FORMULA by the best square product measured between the turns of the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fledge.models.llama import Llama, LlamaConfig
from fledge.objectives.next_token import NextToken, next_token_sums
from fledge.recipes.pocket import LANES
from fledge.recipes.training import pairs_of
from fledge.train.compile import compiled
from fledge.train.device import default_device, raise_malloc_thresholds
from fledge.train.loop import train_step
from fledge.train.metrics import FLOPS_FORMULA, flops_per_token, measured_peak
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.types import Piece

LR = 3e-4
PAD = 1


@dataclass(frozen=True)
class Size:
    """A Llama with a tied head, and the batch it is trained on."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    rows: int = 8
    row_length: int = 256

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            self.vocab_size,
            self.width,
            self.num_layers,
            self.num_heads,
            self.num_heads,
            self.mlp_width,
            self.row_length,
            is_head_tied=True,
        )


SIZES = {
    "4m": Size(vocab_size=4096, width=256, num_layers=4, num_heads=4, mlp_width=688),
    "30m": Size(vocab_size=8192, width=512, num_layers=8, num_heads=8, mlp_width=1376),
}
WORKERS = ("fledge eager", "transformers eager", "fledge compiled", "transformers compiled")


def tokens_of(size: Size, step: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """One document a row, the same for every worker: the other side's loop knows no packing."""
    rng = np.random.default_rng(step)
    return rng.integers(2, size.vocab_size, (size.rows, size.row_length + 1), dtype=np.int32)


def fledge_step(size: Size, is_compiled: bool) -> Callable[[int], float]:
    raise_malloc_thresholds()
    device = default_device()
    model = Llama(size.config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    optimizers = OptimizerSet(model, OptimConfig.adamw(LR))
    objective = NextToken(size.row_length, PAD, compiled(next_token_sums) if is_compiled else next_token_sums)
    ones = np.ones(size.row_length + 1, np.float32)
    lanes = LANES if device.type == "cpu" else 1  # as the recipes do

    def step(index: int) -> float:
        pairs = pairs_of(objective, [(Piece(ids, ones),) for ids in tokens_of(size, index)], lanes)
        return train_step(model, optimizers, pairs, clip_norm=1.0, lanes=lanes)["loss"]

    return step


def transformers_step(size: Size, is_compiled: bool) -> Callable[[int], float]:
    """What most scripts do: the model computes its loss, backward, clip, AdamW with its defaults."""
    import transformers

    library: Any = transformers
    device = default_device()
    torch.manual_seed(0)
    config = library.LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=size.row_length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model: Any = library.LlamaForCausalLM(config).to(device)
    run = torch.compile(model, dynamic=False) if is_compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)

    def step(index: int) -> float:
        ids = torch.from_numpy(tokens_of(size, index)).long().to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            # As many predictions as ours: their loss shifts the labels itself, so it gets one more token a row.
            loss = run(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return step


def work(name: str, size: Size) -> None:
    """The worker's side: read a number of steps, run them, answer with seconds and the last loss."""
    warnings.simplefilter("ignore")
    side, mode = name.split()
    step = (fledge_step if side == "fledge" else transformers_step)(size, mode == "compiled")
    done = 0
    for line in sys.stdin:
        began = time.perf_counter()
        loss = math.nan
        for _ in range(int(line)):
            loss = step(done)
            done += 1
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}), flush=True)


class Worker:
    def __init__(self, name: str, size_name: str) -> None:
        command = [sys.executable, __file__, "--size", size_name, "--worker", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, steps: int) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(size_name: str, names: tuple[str, ...], turns: int, steps: int) -> dict[str, Any]:
    size = SIZES[size_name]
    workers = {name: Worker(name, size_name) for name in names}
    for name, worker in workers.items():
        first = worker.run(1)
        print(f"  {name}: first step {first['seconds']:.1f} s, loss {first['loss']:.3f}", flush=True)
        worker.run(2)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peak = 0.0
    for turn in range(turns):
        # Every other turn backwards, so that none always follows the same neighbour.
        for name in names if turn % 2 == 0 else reversed(names):
            seconds[name].append(workers[name].run(steps)["seconds"])
        peak = max(peak, measured_peak.__wrapped__(default_device()))
    for worker in workers.values():
        worker.close()
    model = Llama(size.config)
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    flops = flops_per_token(parameters, model.roles(), size.config, size.row_length)
    tokens = steps * size.rows * size.row_length
    result: dict[str, Any] = {
        "size": size_name,
        "parameters": sum(parameters.values()),
        "peak_gflops": peak / 1e9,
    }
    for name, taken in seconds.items():
        rate = tokens / statistics.median(taken)
        result[name] = {"tokens_per_second": rate, "share_of_peak": rate * flops / peak}
    for mode in ("eager", "compiled"):
        ours, theirs = seconds.get(f"fledge {mode}"), seconds.get(f"transformers {mode}")
        if ours and theirs:
            ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
            result[f"ratio {mode}"] = statistics.median(ratios)
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{result['size']}: {result['parameters'] / 1e6:.1f}M parameters, peak {result['peak_gflops']:.0f} GFLOP/s")
    for name in WORKERS:
        if name in result:
            row = result[name]
            print(f"  {name:22} {row['tokens_per_second']:8.0f} tokens/s  {row['share_of_peak']:6.1%} of peak")
    for mode in ("eager", "compiled"):
        if f"ratio {mode}" in result:
            print(f"  ratio {mode:9} {result[f'ratio {mode}']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="default: all")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--only", choices=("eager", "compiled"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, SIZES[arguments.size])
        return
    names = tuple(name for name in WORKERS if arguments.only is None or name.endswith(arguments.only))
    for size_name in [arguments.size] if arguments.size else SIZES:
        result = compare(size_name, names, arguments.turns, arguments.steps)
        print(json.dumps(result)) if arguments.json else show(result)
    print(FLOPS_FORMULA)


if __name__ == "__main__":
    main()
