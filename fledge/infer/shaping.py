"""What a request does to its logits before the temperature: allowed ids, bias, penalties, no early end.

`types.SamplingParams` says what each means. One `Shaper` serves one answer, in the oracle (naive.py) and in the engine;
sampling.py draws from what it leaves. A row without any of it costs nothing.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fledge.errors import UserError
from fledge.types import SamplingParams

# Of a bias: some dozens of these still add up to a float32, whatever the logits.
_LARGEST = 1e37


class Shaper:
    """Follows one answer: `push` every token drawn, `apply` to the logits of the next.

    An id that `logit_bias` names twice gets both. Ids are not checked here (`check_ids`).
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: Collection[int],
        device: torch.device,
    ) -> None:
        self._params, self._device = params, device
        self._stop_ids = self._index(stop_ids) if params.min_tokens else None
        self._allowed_ids = None if params.allowed_ids is None else self._index(params.allowed_ids)
        if params.logit_bias:
            self._biased_ids = self._index(token for token, _ in params.logit_bias)
            self._biases = torch.tensor([bias for _, bias in params.logit_bias], device=device)
        self._is_fixed = params.allowed_ids is not None or bool(params.logit_bias)
        self._is_penalised = bool(params.presence_penalty or params.frequency_penalty)
        self._is_repelled = params.repetition_penalty != 1.0
        self._said: Counter[int] = Counter()  # of the answer
        self._seen = dict.fromkeys(prompt_ids) if self._is_repelled else {}  # prompt and answer
        self._num_said = 0

    @property
    def has_effect(self) -> bool:
        """Whether `apply` would change anything now."""
        is_early = self._num_said < self._params.min_tokens
        return self._is_fixed or self._is_repelled or self._is_penalised or is_early

    def push(self, token: int) -> None:
        """The answer goes on with this token."""
        self._num_said += 1
        if self._is_penalised:
            self._said[token] += 1
        if self._is_repelled:
            self._seen[token] = None

    def apply(self, scores_V: Tensor, ahead: Sequence[int] = ()) -> None:
        """Change in place the logits, float32, of the next token, or of the one after the tokens `ahead`."""
        params = self._params
        if self._allowed_ids is not None:
            kept = scores_V[self._allowed_ids]
            scores_V.fill_(-math.inf)[self._allowed_ids] = kept
        if params.logit_bias:
            scores_V.index_add_(0, self._biased_ids, self._biases)
        if self._is_repelled:
            ids = self._index({**self._seen, **dict.fromkeys(ahead)})
            scores = scores_V[ids]
            penalty = params.repetition_penalty
            scores_V[ids] = torch.where(scores > 0, scores / penalty, scores * penalty)
        said = self._said + Counter(ahead) if ahead else self._said
        if self._is_penalised and said:
            counts = np.fromiter(said.values(), dtype=np.float64)
            loss = params.presence_penalty + params.frequency_penalty * counts
            scores_V[self._index(said)] -= torch.from_numpy(loss).to(scores_V)
        if self._num_said + len(ahead) < params.min_tokens:
            scores_V[self._stop_ids] = -math.inf

    def _index(self, ids: Iterable[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self._device)


def check_ids(params: SamplingParams, vocab_size: int, stop_ids: Collection[int] = ()) -> None:
    """`UserError` if the parameters name ids outside the vocabulary, or prefer one by more than float32 can tell."""
    named = [*(params.allowed_ids or ()), *(token for token, _ in params.logit_bias), *stop_ids]
    if named and not 0 <= min(named) <= max(named) < vocab_size:
        raise UserError(
            f"allowed_ids, logit_bias and stop_ids name ids {min(named)} to {max(named)}, the model knows 0 to "
            f"{vocab_size - 1}"
        )
    if any(bias > _LARGEST for _, bias in params.logit_bias):
        raise UserError("a logit_bias of infinity leaves nothing to draw from; use allowed_ids, or a finite bias")
