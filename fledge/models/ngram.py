"""Interpolated Kneser-Ney n-grams of any order: the yardstick that every neural model must beat.

Sits beside the neural families as kind "counts": it offers `next_logprobs` and no `hidden`. Sources: Kneser & Ney 1995;
Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 3.4.3 and
eq. 4.29-4.31 (modified, interpolated). Heafield et al. 2013, section 3, for n-grams at a sequence start.

    p_k(w | h) = (a(hw) - D(a(hw))) / sum_v a(hv)  +  gamma(h) p_{k-1}(w | h'),      p_0 = 1 / V

`a` is the raw count at the highest order and the number of distinct left neighbours below it; a sequence start is a
left neighbour unlike every other, so what stands at a start keeps its raw count. An n-gram is known by (id of its
first k-1 tokens, last token): ids are bounded by the number of tokens, so no vocabulary overflows 64 bits.
Letters: k order of an n-gram, U distinct n-grams of one order, C contexts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fledge.errors import CheckpointError, ConfigError, DataError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Tokens = Sequence[int] | NDArray[np.integer]

# Used when counts of counts are too few to estimate discounts (the defaults of Heafield's KenLM).
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
_ROWS_AT_ONCE = 1 << 24  # float64 entries of the dense table that next_logprobs builds at a time (128 MiB)


@dataclass(frozen=True)
class NGramConfig:
    """`order` is the length of the longest n-gram: 1 unigrams, 5 four tokens of context."""

    vocab_size: int
    order: int = 5

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ConfigError(f"order must be at least 1, got {self.order}")
        if not 1 <= self.vocab_size < 2**31:
            raise ConfigError(f"vocab_size must be between 1 and 2^31, got {self.vocab_size}")

    @property
    def max_positions(self) -> None:
        """An n-gram reads sequences of any length."""
        return None


@dataclass(frozen=True)
class _Level:
    """All n-grams of one order k: `keys_U` (sorted) = context id * V + last token, `counts_U` = a of the formula.

    The id of an n-gram is its index in `keys_U`; the context ids are the ids of the order below (tokens at k = 2,
    one empty context at k = 1). `starts_C` is where a context's successors begin in `keys_U` (one more at the end).
    """

    keys_U: Ints
    counts_U: Ints
    discounts: Floats  # index min(count, 3); entry 0 is 0
    starts_C: Ints
    inverse_totals_C: Floats  # 1 / sum_v a(hv); 0 for a context that nothing follows
    backoffs_C: Floats  # gamma(h); 1 for a context that nothing follows
    vocab_size: int

    @classmethod
    def build(cls, keys_U: Ints, counts_U: Ints, discounts: Floats, num_contexts: int, vocab_size: int) -> _Level:
        """Derive the sums of every context from its counts."""
        context_U = keys_U // vocab_size
        successors_C = np.bincount(context_U, minlength=num_contexts)
        totals_C = np.bincount(context_U, weights=counts_U, minlength=num_contexts)
        removed_C = np.bincount(context_U, weights=discounts[np.minimum(counts_U, 3)], minlength=num_contexts)
        inverse_totals_C = np.divide(1.0, totals_C, out=np.zeros(num_contexts), where=totals_C > 0)
        backoffs_C = np.where(totals_C > 0, removed_C * inverse_totals_C, 1.0)
        starts_C = np.concatenate([[0], np.cumsum(successors_C)])
        return cls(keys_U, counts_U, discounts, starts_C, inverse_totals_C, backoffs_C, vocab_size)

    def find(self, context: Ints, token: Ints) -> Ints:
        """The id of (context, token), -1 where the context is -1 or the n-gram was never seen."""
        if len(self.keys_U) == 0:
            return np.full(context.shape, -1, dtype=np.int64)
        key = context * self.vocab_size + token
        index = np.minimum(np.searchsorted(self.keys_U, key), len(self.keys_U) - 1)
        return np.where((context >= 0) & (self.keys_U[index] == key), index, -1)

    def shares(self, ngram: Ints) -> Floats:
        """The discounted count of each n-gram id (not -1)."""
        counts = self.counts_U[ngram]
        return counts - self.discounts[np.minimum(counts, 3)]

    def interpolate(self, context: Ints, ngram: Ints, lower: Floats) -> Floats:
        """p_k from p_{k-1} = `lower` for single words; ids of -1 (unseen) pass `lower` through or add nothing."""
        mixed = lower.copy()
        known, seen = (
            np.flatnonzero(context >= 0),
            np.flatnonzero(ngram >= 0),
        )  # whatever was seen has a context
        mixed[known] *= self.backoffs_C[context[known]]
        mixed[seen] += self.shares(ngram[seen]) * self.inverse_totals_C[context[seen]]
        return mixed

    def interpolate_rows(self, context_N: Ints, lower_NV: Floats) -> None:
        """p_k from p_{k-1} for whole distributions, in place: scale every row, then add the words that were seen."""
        rows_R = np.flatnonzero(context_N >= 0)
        context_R = context_N[rows_R]
        lower_NV[rows_R] *= self.backoffs_C[context_R, None]
        sizes_R = self.starts_C[context_R + 1] - self.starts_C[context_R]
        within_S = np.arange(sizes_R.sum()) - np.repeat(np.cumsum(sizes_R) - sizes_R, sizes_R)
        ngram_S = np.repeat(self.starts_C[context_R], sizes_R) + within_S
        share_S = self.shares(ngram_S) * np.repeat(self.inverse_totals_C[context_R], sizes_R)
        lower_NV[np.repeat(rows_R, sizes_R), self.keys_U[ngram_S] % self.vocab_size] += share_S


class NGram(nn.Module):
    """A Kneser-Ney model. As made from a config it knows nothing (uniform); `fit` or `load_state_dict` fill it.

    A module so that it is saved and loaded like every family; its tensors (int64 `keys_k` and `counts_k` for every
    order k, float64 `discounts` (order, 3)) are buffers, and there is nothing to train. It counts on the CPU.
    """

    discounts: Tensor

    def __init__(self, config: NGramConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        empty = np.zeros(0, dtype=np.int64)
        self._set_levels([(empty, empty, _as_table(FALLBACK_DISCOUNTS))] * config.order)

    @classmethod
    def fit(cls, sequences: Sequence[Tokens], config: NGramConfig) -> NGram:
        """Count `sequences` (each predicts its own tokens from the second on; none sees another).

        Raises `DataError` when no sequence has two tokens or an id is outside the vocabulary.
        """
        return fit_orders(sequences, [config.order], config.vocab_size)[config.order]

    def next_logprobs(self, tokens_BT: Tensor) -> Tensor:
        """Natural log-probabilities (B, T, V) float32 of the token after each position; rows are document starts."""
        tokens = self._checked(tokens_BT.detach().cpu().numpy().astype(np.int64))
        context_BT_by_length = self._ids(tokens, self.config.order - 1)
        num_rows, num_positions = tokens.shape
        out_NV = np.empty((num_rows * num_positions, self.vocab_size), dtype=np.float32)
        step = max(1, _ROWS_AT_ONCE // self.vocab_size)
        for start in range(0, len(out_NV), step):
            chosen = slice(start, start + step)
            prob_NV = np.repeat(self._unigram_V[None], len(out_NV[chosen]), axis=0)
            for level, context_BT in zip(self._levels[1:], context_BT_by_length, strict=True):
                level.interpolate_rows(context_BT.reshape(-1)[chosen], prob_NV)
            np.log(prob_NV, out=prob_NV)
            out_NV[chosen] = prob_NV
        logprobs_BTV = torch.from_numpy(out_NV).view(num_rows, num_positions, self.vocab_size)
        return logprobs_BTV.to(tokens_BT.device)

    def target_logprobs(self, sequence: Tokens) -> Floats:
        """Natural log-probability of each token of `sequence` after the first, given all before it: n tokens, n-1
        numbers. The fast twin of `next_logprobs`: it looks up one word a position and never builds a distribution.
        """
        tokens_1T = self._checked(np.asarray(sequence, dtype=np.int64)[None])
        ngram_T_by_order = [ids_1T[0] for ids_1T in self._ids(tokens_1T, self.config.order)]
        prob_T = self._unigram_V[tokens_1T[0, 1:]]
        orders = zip(self._levels[1:], ngram_T_by_order, ngram_T_by_order[1:], strict=False)
        for level, context_T, ngram_T in orders:
            prob_T = level.interpolate(context_T[:-1], ngram_T[1:], prob_T)
        logprob_T: Floats = np.log(prob_T)
        return logprob_T

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Fill the model from what `state_dict` returned; `CheckpointError` if that is not what `state_dict` holds.

        Always strict; counts have no shape of their own to copy into, so the tensors are taken over in any case.
        """
        if not strict:
            raise ValueError("an n-gram model loads all of its counts or none; strict=False is not possible")
        orders = range(1, self.config.order + 1)
        wanted = {"discounts", *(f"{kind}_{k}" for kind in ("keys", "counts") for k in orders)}
        if wanted != set(state_dict):
            raise CheckpointError(
                f"not an {self.config.order}-gram model: expected tensors {sorted(wanted)}, got {sorted(state_dict)}"
            )
        discounts = np.asarray(state_dict["discounts"].numpy(), dtype=np.float64)
        if discounts.shape != (self.config.order, 3) or not np.all((discounts > 0) & (discounts <= [1, 2, 3])):
            raise CheckpointError("the discounts are damaged: take the file from its source again")
        levels = []
        num_contexts = 1
        for k in orders:
            keys_U = np.asarray(state_dict[f"keys_{k}"].numpy(), dtype=np.int64)
            counts_U = np.asarray(state_dict[f"counts_{k}"].numpy(), dtype=np.int64)
            is_sound = keys_U.shape == counts_U.shape == (keys_U.size,) and bool(np.all(np.diff(keys_U) > 0))
            limit = num_contexts * self.vocab_size
            if not is_sound or np.any(keys_U < 0) or np.any(keys_U >= limit) or np.any(counts_U < 1):
                raise CheckpointError(f"the counts of order {k} are damaged: take the file from its source again")
            levels.append((keys_U, counts_U, _as_table(discounts[k - 1])))
            num_contexts = self.vocab_size if k == 1 else len(keys_U)
        self._set_levels(levels)

    def _set_levels(self, levels: Sequence[tuple[Ints, Ints, Floats]]) -> None:
        self._levels: list[_Level] = []
        num_contexts = 1
        for k, (keys_U, counts_U, discounts) in enumerate(levels, start=1):
            self._levels.append(_Level.build(keys_U, counts_U, discounts, num_contexts, self.vocab_size))
            self.register_buffer(f"keys_{k}", torch.from_numpy(keys_U))
            self.register_buffer(f"counts_{k}", torch.from_numpy(counts_U))
            num_contexts = self.vocab_size if k == 1 else len(keys_U)
        self.register_buffer("discounts", torch.tensor(np.stack([table[1:] for _, _, table in levels])))
        uniform_1V = np.full((1, self.vocab_size), 1.0 / self.vocab_size)
        self._levels[0].interpolate_rows(np.zeros(1, dtype=np.int64), uniform_1V)
        self._unigram_V = uniform_1V[0]

    def _ids(self, tokens_BT: Ints, longest: int) -> list[Ints]:
        """For k = 1 .. longest: the id of the k tokens that end at each position, -1 where unseen or cut off."""
        ids = [tokens_BT] if longest >= 1 else []
        for level in self._levels[1:longest]:
            before_BT = np.full_like(tokens_BT, -1)
            before_BT[:, 1:] = ids[-1][:, :-1]
            ids.append(level.find(before_BT, tokens_BT))
        return ids

    def _checked(self, tokens: Ints) -> Ints:
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            raise ValueError(f"token ids must lie in 0..{self.vocab_size - 1}, got {tokens.min()}..{tokens.max()}")
        return tokens


def fit_orders(sequences: Sequence[Tokens], orders: Sequence[int], vocab_size: int) -> dict[int, NGram]:
    """Models of several orders from one count of `sequences`; see `NGram.fit`."""
    configs = {order: NGramConfig(vocab_size, order) for order in orders}
    counted = _count(sequences, max(configs), vocab_size)
    models = {}
    for order, config in configs.items():
        raw = counted[order - 1]
        chosen = [(level.keys_U, level.adjusted_U) for level in counted[: order - 1]] + [(raw.keys_U, raw.raw_U)]
        models[order] = NGram(config)
        models[order]._set_levels([(keys_U, counts_U, _discounts(counts_U)) for keys_U, counts_U in chosen])
    return models


@dataclass(frozen=True)
class _Counted:
    """One order of n-grams with their raw and adjusted counts."""

    keys_U: Ints
    raw_U: Ints
    adjusted_U: Ints


def _count(sequences: Sequence[Tokens], longest: int, vocab_size: int) -> list[_Counted]:
    """Count all n-grams of order 1 .. longest; left neighbours are counted one order up, so not at `longest`."""
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences if len(sequence) > 1]
    if not arrays:
        raise DataError("nothing to count: no sequence has two tokens or more")
    tokens_P = np.concatenate(arrays)
    if tokens_P.min() < 0 or tokens_P.max() >= vocab_size:
        raise DataError(f"token ids must lie in 0..{vocab_size - 1}, got {tokens_P.min()}..{tokens_P.max()}")
    depth_P = np.concatenate([np.arange(len(array)) for array in arrays])  # position in its own sequence
    keys_U, raw_U = np.unique(tokens_P[depth_P >= 1], return_counts=True)
    counted = []
    ids_P, num_ids = tokens_P, vocab_size  # the k-gram that ends at each position; at k = 1 the token itself
    for k in range(1, longest):
        ends_E = np.flatnonzero(depth_P >= k)
        longer_U, inverse_E, longer_raw_U = np.unique(
            ids_P[ends_E - 1] * vocab_size + tokens_P[ends_E], return_inverse=True, return_counts=True
        )
        suffix_U = np.empty(len(longer_U), dtype=np.int64)
        suffix_U[inverse_E] = ids_P[ends_E]
        adjusted_U = np.bincount(suffix_U, minlength=num_ids)
        if k == 1:
            adjusted_U = adjusted_U[keys_U]
        else:
            adjusted_U += np.bincount(ids_P[depth_P == k - 1], minlength=num_ids)
        counted.append(_Counted(keys_U, raw_U, adjusted_U))
        ids_P = np.full(len(tokens_P), -1, dtype=np.int64)
        ids_P[ends_E] = inverse_E
        keys_U, raw_U, num_ids = longer_U, longer_raw_U, len(longer_U)
    return [*counted, _Counted(keys_U, raw_U, raw_U)]


def _discounts(counts_U: Ints) -> Floats:
    """D1, D2, D3+ from the counts of counts (Chen & Goodman, eq. 4.31), as a table indexed by min(count, 3).

    Falls back when a count of counts is 0 or a discount leaves (0, count]: then the estimate does not exist.
    """
    n1, n2, n3, n4 = (float(np.count_nonzero(counts_U == count)) for count in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return _as_table(FALLBACK_DISCOUNTS)
    share = n1 / (n1 + 2 * n2)  # Y
    estimate = (1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3)
    is_sound = all(0 < discount <= count for count, discount in enumerate(estimate, start=1))
    return _as_table(estimate if is_sound else FALLBACK_DISCOUNTS)


def _as_table(discounts: Sequence[float] | Floats) -> Floats:
    return np.concatenate([[0.0], np.asarray(discounts, dtype=np.float64)])
