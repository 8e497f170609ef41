"""A process that judges answers it does not trust: a server that forks one confined child an answer.

Started by judge.py as `python -m fledge.rl.sandbox`. It reads one JSON request a line from standard input and writes
one JSON verdict a line to standard output. It imports nothing but the standard library and what lies beside it, so that
a child starts in milliseconds and holds nothing worth stealing. What holds a child: confine.py, an empty environment,
an empty standard input and output, and a clock on the wall.

What this cannot hold: code under test shares a process with its tests, so an answer can cheat them on purpose.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import select
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from fledge.rl import confine
from fledge.rl.verifier import RUNS_THE_ANSWER, SEALED, VERIFIERS, Unjudgeable

MAX_REPLY_BYTES = 65_536
# All that programs of graders can import.
PROGRAM_MODULES = (
    *("json", "re", "math", "cmath", "statistics", "random", "string", "textwrap", "unicodedata", "difflib"),
    *("collections", "itertools", "functools", "operator", "copy", "enum", "dataclasses", "typing", "types", "abc"),
    *("datetime", "calendar", "decimal", "fractions", "numbers", "heapq", "bisect", "hashlib", "base64", "ast"),
    *("html", "csv", "io", "time", "traceback", "xml.etree.ElementTree", "encodings.idna"),
)


def main() -> None:
    """Serve requests until standard input ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    for line in sys.stdin:
        reply = judge(json.loads(line))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def judge(request: Mapping[str, Any]) -> dict[str, Any]:
    """{"score": number or null, "reason": text or null}: the verdict of a child of its own, or why there is none."""
    nonce = secrets.token_hex(16)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _judge_in_child(request, writing, nonce)
    os.close(writing)
    said, is_late = _read(reading, time.monotonic() + float(request["seconds"]))
    os.close(reading)
    if is_late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if said.startswith(nonce):
        verdict: dict[str, Any] = json.loads(said.removeprefix(nonce))
        return verdict
    if is_late:
        why = f"no verdict within {request['seconds']:g} seconds"
    elif os.WIFSIGNALED(status):
        why = f"the process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    else:
        why = "the process ended without a verdict"
    # Code under test that hangs or dies has failed; any other verifier that does has no verdict.
    return {"score": 0.0 if request["verifier"] in RUNS_THE_ANSWER else None, "reason": why}


def _read(descriptor: int, deadline: float) -> tuple[str, bool]:
    """(what was said until the other side closed, whether the deadline passed first)."""
    said = b""
    while len(said) < MAX_REPLY_BYTES:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return "", True
        piece = os.read(descriptor, 4096)
        if not piece:
            break
        said += piece
    return said.decode(errors="replace"), False


def _judge_in_child(request: Mapping[str, Any], writing: int, nonce: str) -> None:
    """Confine this process, judge, say so, end. Never returns, whatever happens."""
    try:
        verdict = _confined(request, writing)
    except Unjudgeable as error:
        verdict = {"score": None, "reason": str(error)}
    except BaseException as error:
        verdict = {"score": None, "reason": f"{type(error).__name__}: {str(error)[:500]}"}
    try:
        os.write(writing, (nonce + json.dumps(verdict)).encode())
    finally:
        os._exit(0)


def _confined(request: Mapping[str, Any], writing: int) -> dict[str, Any]:
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    # Above all the server's own replies: a child that could write there could judge itself.
    os.closerange(3, writing)
    os.closerange(writing + 1, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    confine.limit(seconds=float(request["seconds"]), memory_bytes=int(request["memory_bytes"]))
    is_sealed = request["verifier"] in SEALED
    if is_sealed:
        _import_for_programs()
    if request["filtered"]:
        confine.filter_calls(is_sealed=is_sealed)
    verifier = VERIFIERS[request["verifier"]]
    score, reason = verifier(request["completion"], request["record"], request["options"])
    if score != score or abs(score) == float("inf"):
        raise Unjudgeable(f"the verifier's score is {score}, expected a finite number")
    return {"score": score, "reason": reason and reason[:1000]}


def _import_for_programs() -> None:
    """What a sealed program may import must be there before files are out of reach."""
    for name in PROGRAM_MODULES:
        importlib.import_module(name)


if __name__ == "__main__":
    main()
