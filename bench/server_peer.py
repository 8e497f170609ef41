"""`fledge serve` beside llama-server: the same 4-bit weights and threads, asked over HTTP by the same client.

    .venv/bin/python bench/server_peer.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --llama-server PATH

PATH is a llama-server (llama.cpp) built on this machine. The file is imported and quantised to int4 first. Both
servers stay up and take turns; each turn so many clients stream an answer of a fixed length at once, each to a prompt
of its own that no turn has asked before. Tokens a second count over all streams, from the first request to the last
token; the first token is the median over streams. Ratios are the medians of the turns' ratios. One JSON object a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from serving import free_port

WORDS = ("river", "stone", "cloud", "winter", "garden", "letter", "window", "silver", "morning", "forest", "engine")
READY_SECONDS = 600  # compiling takes minutes where nothing was compiled before


@dataclass(frozen=True)
class Served:
    base: str
    model: str
    key: str


@contextmanager
def running(command: Sequence[str], base: str) -> Iterator[None]:
    """A server that answers, ended at the end."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(server, base)
            yield
        finally:
            server.terminate()


def wait_for(server: subprocess.Popen[bytes], base: str) -> None:
    until = time.monotonic() + READY_SECONDS
    while not answers(base):
        if server.poll() is not None or time.monotonic() > until:
            sys.exit(f"{server.args!r} does not answer")
        time.sleep(0.2)


def answers(base: str) -> bool:
    try:
        return httpx2.get(f"{base}/health").status_code == 200
    except httpx2.HTTPError:
        return False


@contextmanager
def fledge(args: argparse.Namespace, folder: Path) -> Iterator[Served]:
    home, port = [sys.executable, "-m", "fledge"], free_port()
    for step in (
        ["import", str(args.gguf), "--name", "whole", "--runs", str(folder)],
        ["quantize", "whole", "--to", "int4", "--out", str(folder / "peer4"), "--runs", str(folder)],
    ):
        subprocess.run([*home, *step], check=True, stdout=subprocess.DEVNULL)
    made = subprocess.run([*home, "keys", "create"], check=True, capture_output=True, text=True)
    key = re.search(r"\bsk-\S+", made.stdout)
    assert key is not None, "no key in what `fledge keys create` says"
    base = f"http://127.0.0.1:{port}"
    options = ["--threads", str(args.threads), *(["--compile"] if args.compile else [])]
    with running([*home, "serve", "peer4", "--port", str(port), "--runs", str(folder), *options], base):
        yield Served(base, "peer4", key[0])


@contextmanager
def llama(args: argparse.Namespace) -> Iterator[Served]:
    port, most = free_port(), max(args.streams)
    command = [str(args.llama_server), "-m", str(args.gguf), "-t", str(args.threads), "-tb", str(args.threads)]
    command += ["-np", str(most), "-c", str(1024 * most), "--port", str(port)]
    with running(command, f"http://127.0.0.1:{port}"):
        yield Served(f"http://127.0.0.1:{port}", "peer", "none")


async def stream(client: httpx2.AsyncClient, served: Served, prompt: str, tokens: int) -> tuple[float, int]:
    """Seconds to the first words, and how many tokens the answer had."""
    body = {
        "model": served.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, count = time.perf_counter(), 0.0, 0
    headers = {"authorization": f"Bearer {served.key}"}
    async with client.stream("POST", f"{served.base}/v1/chat/completions", json=body, headers=headers) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if not first and any(choice["delta"].get("content") for choice in event["choices"]):
                first = time.perf_counter() - began
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
    if not first or not count:
        sys.exit(f"{served.base} gave no answer: status {answer.status_code}")
    return first, count


async def turn(served: Served, prompts: Sequence[str], tokens: int) -> tuple[float, float]:
    """(tokens a second, median seconds to the first token)."""
    async with httpx2.AsyncClient(timeout=600) as client:
        began = time.perf_counter()
        found = await asyncio.gather(*(stream(client, served, prompt, tokens) for prompt in prompts))
        seconds = time.perf_counter() - began
    return sum(count for _, count in found) / seconds, statistics.median(first for first, _ in found)


def compare(args: argparse.Namespace, ours: Served, theirs: Served) -> None:
    draw = random.Random(0)
    for streams in args.streams:
        rows = []
        for number in range(args.repeats + 1):  # the first one warms up
            prompts = [" ".join(draw.choices(WORDS, k=args.words)) for _ in range(streams)]
            sides = (ours, theirs) if number % 2 else (theirs, ours)
            told = {side.model: asyncio.run(turn(side, prompts, args.tokens)) for side in sides}
            rows.append((*told[ours.model], *told[theirs.model]))
        rate, first, other_rate, other_first = (statistics.median(column) for column in zip(*rows[1:], strict=True))
        result = {
            "streams": streams,
            "threads": args.threads,
            "fledge_tokens_per_second": round(rate, 1),
            "llama_tokens_per_second": round(other_rate, 1),
            "rate_ratio": round(statistics.median(row[0] / row[2] for row in rows[1:]), 3),
            "fledge_first_ms": round(1e3 * first, 1),
            "llama_first_ms": round(1e3 * other_first, 1),
            "first_ratio": round(statistics.median(row[3] / row[1] for row in rows[1:]), 3),
        }
        print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--llama-server", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="let fledge decode by compiled code")
    parser.add_argument("--words", type=int, default=60, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FLEDGE_DATABASE_URL"] = f"sqlite:///{folder}/peer.db"
        with fledge(args, Path(folder)) as ours, llama(args) as theirs:
            compare(args, ours, theirs)


if __name__ == "__main__":
    main()
