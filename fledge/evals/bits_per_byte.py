"""Bits per byte: how well a model predicts held-out text, comparable across tokenizers and model families.

Each document is scored alone, `[endoftext] text [endoftext]`, so the cost of ending is included; the bytes are those of
the text in UTF-8. Source of the unit: Gao et al. 2020 (The Pile), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fledge.errors import DataError
from fledge.evals.scorer import Scorer, TextEncoder
from fledge.types import Metrics


@dataclass(frozen=True)
class _Sums:
    bits: float = 0.0
    num_bytes: int = 0
    num_documents: int = 0
    num_tokens: int = 0

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(
            self.bits + other.bits,
            self.num_bytes + other.num_bytes,
            self.num_documents + other.num_documents,
            self.num_tokens + other.num_tokens,
        )

    def metrics(self, suffix: str) -> Metrics:
        return {
            f"bits_per_byte{suffix}": self.bits / self.num_bytes,
            f"documents{suffix}": float(self.num_documents),
            f"bytes{suffix}": float(self.num_bytes),
            f"tokens{suffix}": float(self.num_tokens),
        }


def evaluate(
    scorer: Scorer,
    documents: Mapping[str, Sequence[str]],
    tokenizer: TextEncoder,
    *,
    code_sources: Collection[str] = (),
    limit: int | None = None,
) -> Metrics:
    """Bits per byte of every source in `documents` (name -> texts) and of all together.

    For each source s: `bits_per_byte/s`, `documents/s`, `bytes/s`, `tokens/s` (predictions made); the same names
    without a suffix for all of it and, where `code_sources` names some but not all sources, with `/all_code` and
    `/without_code`. `limit` takes the first so many documents of each source. Empty texts are left out; `DataError`
    if nothing is left.
    """
    unknown = set(code_sources) - set(documents)
    if unknown:
        raise ValueError(f"code_sources names {sorted(unknown)}, the documents are of {sorted(documents)}")
    by_source = {source: _sums(scorer, texts[:limit], tokenizer) for source, texts in documents.items()}
    by_source = {source: sums for source, sums in by_source.items() if sums.num_bytes}
    if not by_source:
        raise DataError("no text to measure bits per byte on; every document is empty")
    metrics = _total(by_source, by_source).metrics("")
    for source, sums in by_source.items():
        metrics |= sums.metrics(f"/{source}")
    code = [source for source in by_source if source in code_sources]
    prose = [source for source in by_source if source not in code_sources]
    if code and prose:
        metrics |= _total(by_source, code).metrics("/all_code") | _total(by_source, prose).metrics("/without_code")
    return metrics


def _sums(scorer: Scorer, texts: Sequence[str], tokenizer: TextEncoder) -> _Sums:
    texts = [text for text in texts if text]
    if not texts:
        return _Sums()
    end = tokenizer.end_of_text_id
    sequences = [[end, *ids, end] for ids in tokenizer.encode_batch(texts)]
    nats = math.fsum(-float(logprobs.sum()) for logprobs in scorer.logprobs(sequences))
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return _Sums(nats / math.log(2), num_bytes, len(texts), sum(len(ids) - 1 for ids in sequences))


def _total(by_source: Mapping[str, _Sums], sources: Collection[str]) -> _Sums:
    total = _Sums()
    for source in sources:
        total = total.plus(by_source[source])
    return total
