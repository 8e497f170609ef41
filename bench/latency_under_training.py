"""How the engine's latency fares while a training job shares the cores, and what lowering the job's priority mends.

    .venv/bin/python bench/latency_under_training.py [--seconds 4] [--rounds 1]

A small model answers one request in its own process; the job is a training loop on a model of the same size with as
many threads as there are cores. In every round all settings take turns, so that a busy machine disturbs all alike;
figures are over all rounds, `ratio` is to the engine alone. The job's priority is lowered by 10 niceness levels (a
share of about 1 to 9; at most 19 in all) or to SCHED_IDLE (about 1 to 340, and it yields to whoever wakes). The engine
cannot raise its own without privileges, so it is the job that must step back.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fledge.config import to_json
from fledge.formats.checkpoint import CheckpointInfo, save_model
from fledge.infer.process import EngineProcess
from fledge.models.gpt import GPT, GPTConfig
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer
from fledge.types import Request, SamplingParams

VOCAB, WIDTH, NUM_LAYERS, MAX_POSITIONS = 8192, 384, 6, 2048
ROWS, POSITIONS = 2, 128  # a training step of the job, short so that it can be counted
PRIORITIES = ("equal", "nice +10", "idle")


def build() -> GPT:
    model = GPT(GPTConfig(VOCAB, WIDTH, NUM_LAYERS, WIDTH // 64, MAX_POSITIONS))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def write_checkpoint(directory: Path) -> None:
    tokenizer = train_tokenizer(["the rain in the garden"] * 20, TokenizerConfig(vocab_size=300))
    model = build()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {os.cpu_count()} cores", flush=True)
    info = CheckpointInfo(
        family="gpt",
        config=to_json(model.config),
        stage="pretrain",
        tokenizer_hash=tokenizer.hash,
        template_hash=ChatRenderer(tokenizer).hash,
    )
    save_model(directory, model, tokenizer, info)


def train(priority: str) -> None:
    """The job: train until SIGTERM, one line of output a step."""
    if priority == "nice +10":
        os.nice(10)
    elif priority == "idle":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    torch.set_num_threads(os.cpu_count() or 1)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens_BT = torch.randint(0, VOCAB, (ROWS, POSITIONS + 1), generator=torch.Generator().manual_seed(0))
    while True:
        loss = -model.next_logprobs(tokens_BT[:, :-1]).gather(2, tokens_BT[:, 1:, None]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print("step", flush=True)


@contextmanager
def job(priority: str | None, output: Path) -> Iterator[None]:
    """A training job beside what runs within; it has made its first step when this begins."""
    if priority is None:
        yield
        return
    with output.open("w") as file:
        process = subprocess.Popen([sys.executable, __file__, "--job", priority], stdout=file)
    try:
        while not output.stat().st_size:
            assert process.poll() is None, "the job has ended"
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def gaps(engine: EngineProcess, seconds: float) -> list[float]:
    """Seconds between the tokens of one answer after another, for so long; first tokens left out."""
    found: list[float] = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        last = None
        for _ in engine.submit(Request("r", (5,) * 16, SamplingParams(max_tokens=100, temperature=0.0))):
            now = time.monotonic()
            if last is not None:
                found.append(now - last)
            last = now
    return found


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


Setting = tuple[int, str | None]  # the engine's threads, the job's priority


def measure(checkpoint: Path, seconds: float, rounds: int) -> None:
    found: dict[Setting, list[float]] = defaultdict(list)
    steps: dict[Setting, list[float]] = defaultdict(list)
    output = checkpoint.parent / "steps"
    for threads in sorted({1, os.cpu_count() or 1}):
        settings = [(threads, priority) for priority in (None, *PRIORITIES)]
        with EngineProcess(checkpoint, {"cache_bytes": 1 << 26}, num_threads=threads) as engine:
            gaps(engine, 0.5)
            for setting in settings * rounds:
                measured, steps_per_second = measure_once(engine, setting[1], seconds, output)
                found[setting] += measured
                steps[setting].append(steps_per_second)
    print(table(found, steps))


def measure_once(
    engine: EngineProcess, priority: str | None, seconds: float, output: Path
) -> tuple[list[float], float]:
    """(gaps between tokens, training steps a second meanwhile)."""
    with job(priority, output):
        before = output.stat().st_size if priority else 0
        began = time.monotonic()
        measured = gaps(engine, seconds)
        steps = (output.stat().st_size - before) / len("step\n") if priority else 0.0
        return measured, steps / (time.monotonic() - began)


def table(found: dict[Setting, list[float]], steps: dict[Setting, list[float]]) -> str:
    rows = [
        "| engine threads | training job | p50 ms | p99 ms | p50 ratio | p99 ratio | job's tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for (threads, priority), values in found.items():
        p50, p99 = (quantile(values, share) for share in (0.5, 0.99))
        ratio_50, ratio_99 = (now / quantile(found[threads, None], q) for now, q in ((p50, 0.5), (p99, 0.99)))
        trained = statistics.mean(steps[threads, priority]) * ROWS * POSITIONS
        rows.append(
            f"| {threads} | {priority or 'none'} | {p50 * 1e3:.2f} | {p99 * 1e3:.2f} | {ratio_50:.2f} "
            f"| {ratio_99:.2f} | {trained:,.0f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of every measurement")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--job", choices=PRIORITIES, help="be the job")
    args = parser.parse_args()
    if args.job:
        train(args.job)
        return
    print(f"base niceness {os.nice(0)}")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model")
        measure(Path(folder) / "model", args.seconds, args.rounds)


if __name__ == "__main__":
    main()
