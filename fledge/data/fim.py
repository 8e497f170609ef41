"""Fill in the middle (Bavarian et al. 2022): some documents are rearranged so that the model learns to infill.

A stretch of text tokens is cut at two random places into prefix P, middle M and suffix S and becomes

    PSM   <|fim_prefix|> P <|fim_suffix|> S <|fim_middle|> M
    SPM   <|fim_prefix|> <|fim_suffix|> S <|fim_middle|> P M        (their "SPM variant 2", section 3)

with end-of-text around it, which teaches where to stop. A document longer than a row is first cut into stretches that
fit (their "context level", section 4.4), because a middle whose prefix lies in another row teaches nothing.
Which documents, where, and which order: functions of (seed, epoch, document) only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fledge.data.pack import Cuts, Ints, ShardDocuments, cut_evenly
from fledge.errors import ConfigError
from fledge.types import Piece

OVERHEAD = 4  # positions a stretch of n tokens takes beyond n: three sentinels and one end-of-text


class FimTokens(NamedTuple):
    """Ids of the special tokens."""

    prefix: int
    suffix: int
    middle: int
    end_of_text: int


@dataclass(frozen=True)
class FimConfig:
    """`rate`: share of documents rearranged in an epoch; `spm_share`: share of those in the order SPM."""

    rate: float = 0.5
    spm_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("rate", "spm_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}")


def rearrange(ids: NDArray[np.int32], cuts: tuple[int, int], is_spm: bool, tokens: FimTokens) -> NDArray[np.int32]:
    """The text tokens `ids`, cut before `cuts[0]` and `cuts[1]`, rearranged and framed: len(ids) + 5 ids."""
    prefix, middle, suffix = ids[: cuts[0]], ids[cuts[0] : cuts[1]], ids[cuts[1] :]
    if is_spm:
        body = (tokens.prefix, tokens.suffix, *suffix, tokens.middle, *prefix, *middle)
    else:
        body = (tokens.prefix, *prefix, tokens.suffix, *suffix, tokens.middle, *middle)
    return np.array((tokens.end_of_text, *body, tokens.end_of_text), np.int32)


def restore(ids: NDArray[np.int32], tokens: FimTokens) -> NDArray[np.int32]:
    """The text tokens in their order, from what `rearrange` gave: its inverse."""
    body = ids[1:-1]
    suffix_at = int(np.flatnonzero(body == tokens.suffix)[0])
    middle_at = int(np.flatnonzero(body == tokens.middle)[0])
    # In the order SPM the prefix stands before the middle already, and nothing stands where PSM has it.
    return np.concatenate([body[1:suffix_at], body[middle_at + 1 :], body[suffix_at + 1 : middle_at]])


class FimDocuments:
    """Documents of shards for `PackedRows`, a share of them rearranged anew in every epoch."""

    def __init__(self, documents: ShardDocuments, config: FimConfig, tokens: FimTokens, seed: int) -> None:
        self._documents = documents
        self._config = config
        self._tokens = tokens
        self._seed = seed
        self._chosen: dict[int, NDArray[np.bool_]] = {}

    def cut(self, epoch: int, row_length: int) -> Cuts:
        """Documents left alone cut as they are; the others into stretches of at most `row_length` - 4 tokens."""
        if row_length <= OVERHEAD:
            raise ConfigError(
                f"rows of {row_length} positions cannot hold fill-in-the-middle: expected more than {OVERHEAD}"
            )
        is_fim_N = self._is_fim_N(epoch)
        plain = cut_evenly(np.where(is_fim_N, 0, self._documents.num_positions_N), row_length)
        num_tokens_N = np.where(is_fim_N, self._documents.num_positions_N - 1, 0)
        stretches = cut_evenly(num_tokens_N, row_length - OVERHEAD)
        return Cuts(
            np.concatenate([plain.document_P, stretches.document_P]),
            np.concatenate([plain.start_P, stretches.start_P]),
            np.concatenate([plain.length_P, stretches.length_P + OVERHEAD]),
        )

    def piece(self, epoch: int, document: int, start: int, length: int) -> Piece:
        if not self._is_fim_N(epoch)[document]:
            return self._documents.piece(epoch, document, start, length)
        num_tokens = length - OVERHEAD
        text = self._documents.piece(epoch, document, start + 1, num_tokens - 1).ids
        rng = np.random.default_rng([self._seed, epoch, document, start])
        first, second = sorted(rng.integers(0, num_tokens + 1, size=2).tolist())
        ids = rearrange(text, (first, second), bool(rng.random() < self._config.spm_share), self._tokens)
        return Piece(ids, np.ones(len(ids), np.float32))

    def _is_fim_N(self, epoch: int) -> NDArray[np.bool_]:
        if epoch not in self._chosen:
            if len(self._chosen) > 1:  # a step can touch two epochs, no more are kept
                del self._chosen[min(self._chosen)]
            rng = np.random.default_rng([self._seed, epoch])
            lengths: Ints = self._documents.num_positions_N
            # A document without a token (none passes the filters) has nothing to rearrange.
            self._chosen[epoch] = (rng.random(len(lengths)) < self._config.rate) & (lengths > 1)
        return self._chosen[epoch]
