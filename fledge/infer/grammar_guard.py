"""A process that tries a grammar out, so that one which crashes or hangs the grammar library takes nobody with it.

Layer 5, beneath grammar.py. `llguidance` limits its own work, but not everywhere: a chain of some thousand rules
overflows its stack, and the intersection of a dozen regular expressions keeps it busy for minutes (both measured,
tests/infer). So every new grammar is first compiled here and walked for a few tokens, on a smaller stack and with
limits on processor time and memory; only one that survives is compiled in the engine's process, with more room.

`python -m fledge.infer.grammar_guard` is the process itself. It speaks lines of JSON: first the vocabulary, then per
grammar its text and the limits; it answers each line with an error or null, and ends when its input does.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import selectors
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, TypeVar

import llguidance
import numpy as np

ResultT = TypeVar("ResultT")
_sizing = threading.Lock()  # the size of new threads' stacks is the whole process's

GUARD_STACK_BYTES = 2 << 20  # compiling in the guard; the engine gives it `COMPILE_STACK_BYTES`
COMPILE_STACK_BYTES = 16 << 20
WALK_TOKENS = 16
WALL_PATIENCE = 20  # wall-clock seconds waited per allowed second of processor time: others may use the machine


@dataclass(frozen=True)
class GrammarLimits:
    """What one grammar may cost. The lexer's and parser's limits are the library's own; work beyond them is refused
    at the start and ends the answer with an error later.

    `compile_seconds` is processor time for compiling and the first few tokens; `memory_bytes` the guard's address
    space. `lexer_states` are 1-2 kB each, and a grammar's answers share them.
    """

    compile_seconds: float = 0.5
    memory_bytes: int = 4 << 30
    lexer_states: int = 20_000
    lexer_fuel_start: int = 1_000_000
    lexer_fuel_step: int = 200_000
    parser_items_step: int = 50_000

    def of_library(self) -> Any:
        return llguidance.LLParserLimits(
            initial_lexer_fuel=self.lexer_fuel_start,
            step_lexer_fuel=self.lexer_fuel_step,
            step_max_items=self.parser_items_step,
            max_lexer_states=self.lexer_states,
            verbose_errors=False,
        )


class Vocabulary:
    """A tokenizer as the grammar library wants it: the bytes of every id, for special tokens their names.

    `encode` spells a text that a grammar forces the way the model is used to; without it the longest tokens do.
    """

    is_tokenizer_wrapper = True  # the library asks for it
    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_token_ids: Sequence[int],
        eos_token_id: int,
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = (
            list(tokens),
            list(special_token_ids),
            eos_token_id,
        )
        self._encode = encode or self._encode_greedily
        special = set(special_token_ids)
        self._id_of = {token: i for i, token in reversed(list(enumerate(tokens))) if token and i not in special}
        self._longest = max(map(len, self._id_of))

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)

    def of_library(self) -> Any:
        return llguidance.LLTokenizer(self)  # type: ignore[arg-type]  # only the attributes matter

    def to_json(self) -> bytes:
        spelled = base64.b64encode(b"".join(self.tokens)).decode()
        lengths = [len(token) for token in self.tokens]
        return json.dumps([spelled, lengths, self.special_token_ids, self.eos_token_id]).encode()

    @classmethod
    def from_json(cls, line: bytes) -> Vocabulary:
        spelled, lengths, special, eos = json.loads(line)
        data, ends = base64.b64decode(spelled), np.cumsum(lengths).tolist()
        return cls([data[end - size : end] for end, size in zip(ends, lengths, strict=True)], special, eos)

    def _encode_greedily(self, text: str) -> list[int]:
        data, ids, start = text.encode(), [], 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._id_of), None)
            if end is None:  # a byte that the vocabulary cannot spell
                break
            ids.append(self._id_of[data[start:end]])
            start = end
        return ids


class GuardedTrial:
    """The handle on the guard's process, which is started when it is first needed and again after it died.

    `close()` ends it for good, and so does the end of the handle.
    """

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        self._vocabulary, self._limits = vocabulary, limits
        self._processes: list[subprocess.Popen[bytes]] = []  # one, or none
        self.close = weakref.finalize(self, _end, self._processes)

    def complaint(self, grammar: str) -> str | None:
        """What is wrong with a grammar in the library's own spelling; None if it can be used."""
        process = self._running()
        assert process.stdin
        assert process.stdout
        trial = {"grammar": grammar, "limits": asdict(self._limits)}
        try:
            process.stdin.write(json.dumps(trial).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline() if self._is_told(process.stdout) else b""
        except BrokenPipeError:
            answer = b""
        if not answer:
            _end(self._processes)
            return f"it is too complex (more than {self._limits.compile_seconds:g} s of work, or too deep)"
        return None if (error := json.loads(answer)) is None else str(error)

    def _is_told(self, pipe: IO[bytes]) -> bool:
        """Whether there is something to read before patience ends."""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            return bool(selector.select(self._limits.compile_seconds * WALL_PATIENCE))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._processes and self._processes[0].poll() is None:
            return self._processes[0]
        _end(self._processes)
        command = [sys.executable, "-m", "fledge.infer.grammar_guard", str(self._limits.memory_bytes)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._processes.append(process)
        assert process.stdin
        assert process.stdout
        process.stdin.write(self._vocabulary.to_json() + b"\n")
        process.stdin.flush()
        if not process.stdout.readline():
            raise RuntimeError(f"the grammar guard cannot start (exit code {process.wait()})")
        return process


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        process = processes.pop()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what it never read is lost with it
                pipe.close() if pipe else None


def new_matcher(tokenizer: Any, grammar: str, limits: GrammarLimits) -> Any:
    """A matcher of the library at the start of its grammar. Whatever is wrong shows in its `is_error()`."""
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits.of_library())


def on_a_stack_of(size_bytes: int, work: Callable[[], ResultT]) -> ResultT:
    """What `work` returns, run in a thread of its own with a stack of this size."""
    results: list[ResultT] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    with _sizing:
        before = threading.stack_size(size_bytes)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return results[0]


def _try_out(tokenizer: Any, grammar: str, limits: GrammarLimits) -> str | None:
    """Compile a grammar and walk it at random for a few tokens; what went wrong, None if nothing did."""
    matcher = new_matcher(tokenizer, grammar, limits)
    chance = random.Random(0)
    for step in range(WALK_TOKENS):
        if matcher.is_error():
            break
        words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(words, bitorder="little"))
        if matcher.is_error() and step == 0 and "NoExtension" in matcher.get_error():
            return "no text satisfies it"
        if matcher.is_error() or matcher.is_stopped() or not len(allowed):
            break
        token = int(chance.choice(allowed))
        if token == tokenizer.eos_token:
            break
        matcher.consume_token(token)
    return str(matcher.get_error()) if matcher.is_error() else None


def serve(source: Iterable[bytes], answer: Callable[[bytes], None]) -> None:
    """The guard's loop: one line in, one line out."""
    lines = iter(source)
    first = next(lines, None)
    if first is None:
        return
    tokenizer = Vocabulary.from_json(first).of_library()
    answer(b"null\n")  # ready
    for line in lines:
        trial = json.loads(line)
        limits, grammar = GrammarLimits(**trial["limits"]), trial["grammar"]
        # Processor time, not wall time; nobody handles the signal, so it ends the process wherever it is.
        signal.setitimer(signal.ITIMER_PROF, limits.compile_seconds)
        error = on_a_stack_of(GUARD_STACK_BYTES, lambda: _try_out(tokenizer, grammar, limits))  # noqa: B023
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer(json.dumps(error).encode() + b"\n")


def main() -> None:
    import resource  # not on every system, and only this process needs it

    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def answer(line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

    serve(sys.stdin.buffer, answer)


if __name__ == "__main__":
    main()
