"""Scorers: log-probabilities of given tokens, the one thing that likelihood evals ask of a model.

Two of them, one for causal families and one for n-grams, so that both stand in the same table. A text longer than the
model's row is read in windows that overlap by half: every token after the first row sees at least half a row of
context. Letters: B windows of a batch, T positions, N scored positions, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fledge.layers.attention import Context, RowContext
from fledge.models.ngram import NGram
from fledge.objectives.logprobs import target_logprobs

Floats = NDArray[np.float64]

BATCH_TOKENS = 4096  # tokens of one forward pass; 2048 took the same time on one thread
_LOGITS_AT_ONCE = 1 << 22  # float32 entries of the logits held at a time (16 MiB); bounds memory, costs no time


class TextEncoder(Protocol):
    """What evals ask of a tokenizer: text to ids without special tokens, and the id that opens and ends a text."""

    @property
    def end_of_text_id(self) -> int: ...

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int]]: ...


class Scorer(Protocol):
    """What can tell how likely given tokens are. `row_length`: the most tokens it sees at once; None is no limit."""

    @property
    def row_length(self) -> int | None: ...

    def logprobs(self, sequences: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> list[Floats]:
        """Natural log-probability of tokens `first[i]`, `first[i]` + 1, ... of each sequence, given those before.

        `first` is 1 for all if not given (a sequence's first token is never predicted); n tokens give n - first
        numbers. Raises `ValueError` where `first` is below 1 or past the end.
        """


class CausalModel(Protocol):
    """A causal language model as the evals see it; see docs/architecture.md, "The four contracts"."""

    vocab_size: int

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor: ...

    def hidden(self, x_BTD: Tensor, context: Context) -> Tensor: ...

    def unembed(self, x_BTD: Tensor) -> Tensor: ...


class Window(NamedTuple):
    """Tokens `start` .. `stop` of a sequence are read; the predictions of tokens `first` .. `stop` are kept."""

    sequence: int
    start: int
    first: int
    stop: int  # exclusive; the last token is predicted and never read


class CausalScorer:
    """Scores by a causal model, many texts at a time, sorted by length; the results do not depend on the batching.

    The model is put into evaluation mode (no dropout) while it scores.
    """

    def __init__(self, model: CausalModel, *, row_length: int, pad_id: int, batch_tokens: int = BATCH_TOKENS) -> None:
        if row_length < 1 or batch_tokens < 1:
            raise ValueError(f"row_length and batch_tokens must be at least 1, got {row_length} and {batch_tokens}")
        self._model = model
        self._row_length = row_length
        self._pad_id = pad_id
        self._batch_tokens = batch_tokens

    @property
    def row_length(self) -> int:
        return self._row_length

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> list[Floats]:
        firsts = _firsts(sequences, first)
        found = [np.empty(len(tokens) - start) for tokens, start in zip(sequences, firsts, strict=True)]
        windows = [
            window
            for number, (tokens, start) in enumerate(zip(sequences, firsts, strict=True))
            for window in windows_of(number, len(tokens), start, self._row_length)
        ]
        windows.sort(key=lambda window: window.stop - window.start, reverse=True)
        with _evaluating(self._model):
            for batch in self._batches(windows):
                scores = self._score([sequences[w.sequence][w.start : w.stop] for w in batch], batch)
                for window, values in zip(batch, scores, strict=True):
                    offset = window.first - firsts[window.sequence]
                    found[window.sequence][offset : offset + len(values)] = values
        return found

    def _batches(self, windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
        """Consecutive windows (longest first), each group within `batch_tokens` once padded."""
        start = 0
        while start < len(windows):
            longest = windows[start].stop - windows[start].start - 1
            stop = start + max(1, self._batch_tokens // longest)
            yield windows[start:stop]
            start = stop

    def _score(self, tokens: Sequence[Sequence[int]], batch: Sequence[Window]) -> list[Floats]:
        longest = len(tokens[0]) - 1
        padded = np.full((len(tokens), longest), self._pad_id, dtype=np.int64)
        for row, ids in zip(padded, tokens, strict=True):
            row[: len(ids) - 1] = ids[:-1]
        device = _device(self._model)
        tokens_BT = torch.from_numpy(padded).to(device)
        context = RowContext(tokens_BT)
        x_BTD = self._model.hidden(self._model.embed(tokens_BT, context), context)
        counts = [window.stop - window.first for window in batch]
        columns = [np.arange(w.first - w.start - 1, w.stop - w.start - 1) for w in batch]
        targets = [np.asarray(ids[-count:], dtype=np.int64) for ids, count in zip(tokens, counts, strict=True)]
        row_N = torch.from_numpy(np.repeat(np.arange(len(batch)), counts)).to(device)
        column_N = torch.from_numpy(np.concatenate(columns)).to(device)
        target_N = torch.from_numpy(np.concatenate(targets)).to(device)
        logprob_N = self._logprobs(x_BTD[row_N, column_N], target_N)
        return np.split(logprob_N, np.cumsum(counts)[:-1])

    def _logprobs(self, x_ND: Tensor, target_N: Tensor) -> Floats:
        """The head on chosen positions only, a few at a time: logits are the largest thing in a small model."""
        size = max(1, _LOGITS_AT_ONCE // self._model.vocab_size)
        parts = [
            target_logprobs(self._model.unembed(x_SD[None]), target_S[None])[0]
            for x_SD, target_S in zip(x_ND.split(size), target_N.split(size), strict=True)
        ]
        return torch.cat(parts).double().cpu().numpy()


class NGramScorer:
    """Scores by an n-gram model, which reads texts of any length."""

    def __init__(self, model: NGram) -> None:
        self._model = model

    @property
    def row_length(self) -> None:
        return None

    def logprobs(self, sequences: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> list[Floats]:
        firsts = _firsts(sequences, first)
        return [
            self._model.target_logprobs(tokens)[start - 1 :] for tokens, start in zip(sequences, firsts, strict=True)
        ]


def windows_of(sequence: int, num_tokens: int, first: int, row_length: int) -> list[Window]:
    """Windows of at most `row_length` read tokens, half a row apart, that together predict tokens `first` and on.

    Each token is predicted once, in the earliest window that holds it. Windows that predict nothing wanted are left
    out.
    """
    stride = max(1, row_length // 2)
    windows = []
    start, predicted = 0, first  # tokens before `predicted` are done with
    while predicted < num_tokens:
        stop = min(start + row_length + 1, num_tokens)
        if stop > predicted:
            windows.append(Window(sequence, start, predicted, stop))
            predicted = stop
        start += stride
    return windows


def _firsts(sequences: Sequence[Sequence[int]], first: Sequence[int] | None) -> Sequence[int]:
    firsts = [1] * len(sequences) if first is None else first
    for tokens, start in zip(sequences, firsts, strict=True):
        if not 1 <= start <= max(1, len(tokens)):
            raise ValueError(f"cannot score from token {start} of a sequence of {len(tokens)}")
        if not tokens:
            raise ValueError("cannot score an empty sequence")
    return firsts


@contextmanager
def _evaluating(model: CausalModel) -> Iterator[None]:
    """Evaluation mode for a while, if the model knows modes at all."""
    if not isinstance(model, nn.Module) or not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _device(model: CausalModel) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
