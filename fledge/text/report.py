"""How well tokenizers fit texts: bytes per token and source, beside GPT-2's published vocabulary.

Layer 2. More bytes a token mean fewer tokens to train on and to generate for the same text; what a vocabulary costs is
its embedding. GPT-2's files come from the caller as bytes (data/gpt2_vocabulary.py fetches them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fledge.text.foreign import adopt, gpt2_layout
from fledge.text.tokenizer import NAMED_SPECIAL_TOKENS, Tokenizer
from fledge.types import Metrics


@dataclass(frozen=True)
class Fit:
    """One source under several tokenizers: its UTF-8 bytes, and the tokens that each makes of it."""

    source: str
    num_bytes: int
    num_tokens: Mapping[str, int]

    def bytes_per_token(self, tokenizer: str) -> float:
        """0 for a source without text."""
        return self.num_bytes / self.num_tokens[tokenizer] if self.num_tokens[tokenizer] else 0.0


def fits(tokenizers: Mapping[str, Tokenizer], sources: Mapping[str, Sequence[str]]) -> tuple[Fit, ...]:
    """Encode the texts of every source with every tokenizer and count; one row a source, in their order."""
    return tuple(
        Fit(
            source,
            sum(len(text.encode()) for text in texts),
            {name: sum(map(len, tokenizer.encode_batch(texts))) for name, tokenizer in tokenizers.items()},
        )
        for source, texts in sources.items()
    )


def fit_metrics(rows: Iterable[Fit]) -> Metrics:
    """`bytes_per_token/<tokenizer>/<source>` for every pair."""
    return {
        f"bytes_per_token/{tokenizer}/{row.source}": row.bytes_per_token(tokenizer)
        for row in rows
        for tokenizer in row.num_tokens
    }


def gpt2_tokenizer(vocab: bytes, merges: bytes) -> Tokenizer:
    """GPT-2's 50,257 tokens from `encoder.json` and `vocab.bpe` (Radford et al. 2019), then fledge's special ones.

    `TokenizerError` if the bytes are not such files.
    """
    added = {name: None for name in NAMED_SPECIAL_TOKENS if name != "<|endoftext|>"}
    return Tokenizer(adopt(gpt2_layout(vocab, merges), added))
