"""What the HTTP layer adds: streams over the fake engine, so that nothing but the server is measured.

    python bench/serving.py [--streams 64] [--tokens 200]

Prints tokens a second over all streams, the median time to the first token beyond the engine's own, and the CPU
seconds of the server's process for each thousand tokens. The client reads raw sockets, so that it costs little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SERVE_TESTS = Path(__file__).parents[1] / "tests" / "serve"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SERVE_TESTS / "fake_server.py"), folder, str(port), str(args.tokens)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            key = server.stdout.readline().strip()
            asyncio.run(measure(port, key, args, server.pid))
        finally:
            server.terminate()
            server.wait(30)


async def measure(port: int, key: str, args: argparse.Namespace, pid: int) -> None:
    for _ in range(100):
        try:
            await one_stream(port, key)
            break
        except OSError:
            await asyncio.sleep(0.1)
    alone = statistics.median([(await one_stream(port, key))[0] for _ in range(20)])
    began, cpu = time.perf_counter(), cpu_seconds(pid)
    results = await asyncio.gather(*(one_stream(port, key) for _ in range(args.streams)))
    seconds, used = time.perf_counter() - began, cpu_seconds(pid) - cpu
    num_tokens = sum(count for _, count in results)
    print(f"first token, one stream    {alone * 1000:8.1f} ms at the median")
    print(f"tokens, {args.streams} streams        {num_tokens / seconds:8.0f} a second")
    print(f"server                     {used / num_tokens * 1e6:8.0f} us of CPU a token")


async def one_stream(port: int, key: str) -> tuple[float, int]:
    """Seconds until the first content, and how many events held content."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    began, first, count = time.perf_counter(), 0.0, 0
    writer.write(head.encode() + body)
    while data := await reader.read(1 << 16):
        found = len(re.findall(rb'"delta":\{"content"', data))
        if found and not count:
            first = time.perf_counter() - began
        count += found
    writer.close()
    assert count, "no answer"
    return first, count


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
