"""llama.cpp as a peer of bench/engine.py: run by an interpreter that has llama-cpp-python, asked in lines of JSON.

    {"do": "decode", "prompt": [ids], "batch": n, "tokens": n} -> {"seconds": of the decoding steps alone}
    {"do": "nats", "rows": [[ids], ...]}                       -> {"nats": [negative log-likelihood of each row]}

Needs no fledge. `PYTHON llamacpp_worker.py MODEL.gguf THREADS wall|cpu`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import llama_cpp as llama
import numpy as np

CONTEXT, BATCH = 4096, 512


class Peer:
    def __init__(self, path: str, num_threads: int, clock: str) -> None:
        self._now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._num_threads = num_threads
        self._batch = llama.llama_batch_init(BATCH, 0, 1)

    def _context(self, num_sequences: int) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT * num_sequences, BATCH, BATCH
        params.n_seq_max = num_sequences
        params.n_threads = params.n_threads_batch = self._num_threads
        return llama.llama_init_from_model(self._model, params)

    def _run(self, context: Any, entries: list[tuple[int, int, int, bool]]) -> list[Any]:
        """One step over (token, position, sequence, wanted); the logits of those wanted."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, is_wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, is_wanted
        status = llama.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        wanted = [i for i, entry in enumerate(entries) if entry[3]]
        return [
            np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), shape=(self._vocab_size,)) for i in wanted
        ]

    def decode(self, prompt: list[int], batch: int, tokens: int) -> dict[str, Any]:
        context = self._context(batch)
        newest = []
        for sequence in range(batch):
            last = len(prompt) - 1
            entries = [(token, i, sequence, i == last) for i, token in enumerate(prompt)]
            newest.append(int(self._run(context, entries)[0].argmax()))
        start = self._now()
        for step in range(tokens):
            entries = [(token, len(prompt) + step, sequence, True) for sequence, token in enumerate(newest)]
            newest = [int(row.argmax()) for row in self._run(context, entries)]
        seconds = self._now() - start
        llama.llama_free(context)
        return {"seconds": seconds}

    def nats(self, rows: list[list[int]]) -> dict[str, Any]:
        found = []
        for row in rows:
            context = self._context(1)
            total = 0.0
            for first in range(0, len(row) - 1, BATCH):
                part = row[first : min(first + BATCH, len(row) - 1)]
                entries = [(token, first + i, 0, True) for i, token in enumerate(part)]
                for i, logits in enumerate(self._run(context, entries)):
                    wide = logits.astype(np.float64)
                    top = wide.max()
                    total += top + np.log(np.exp(wide - top).sum()) - wide[row[first + i + 1]]
            llama.llama_free(context)
            found.append(total)
        return {"nats": found}


def main() -> None:
    peer = Peer(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    for line in sys.stdin:
        order = json.loads(line)
        answer = getattr(peer, {"decode": "decode", "nats": "nats"}[order.pop("do")])(**order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
