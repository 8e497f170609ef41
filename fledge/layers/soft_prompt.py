"""Prompt tuning: a frozen model learns a task by a few vectors that stand before every input.

The vectors are the rows of token ids beyond the model's vocabulary. Whoever renders a prompt puts `soft_ids` before
it (before the first token of all, as in the paper); caches, packing, padding and sampling then treat them as tokens
like any other. They can be read but never said: their logits are minus infinity.

Source: Lester et al. 2021 (2104.08691), section 2; initial values from the vocabulary, section 3.2.
Shapes: B rows, T positions, P soft tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.errors import ConfigError
from fledge.layers.attention import Context, RowContext


class SoftPrompt(nn.Module):
    """A causal model with a soft prompt in front; a causal model itself. Only `prompt` trains.

    It starts as the embeddings of `initial_ids` at the beginning of a text, so that at first the soft prompt IS those
    tokens. The trunk is shared, not copied, and frozen.
    """

    def __init__(self, trunk: nn.Module, initial_ids: Sequence[int]) -> None:
        super().__init__()
        model: Any = trunk
        if not initial_ids or not 0 <= min(initial_ids) <= max(initial_ids) < model.vocab_size:
            raise ConfigError(
                f"a soft prompt starts as at least one token of the vocabulary of {model.vocab_size}, "
                f"got {len(initial_ids)} ids"
            )
        self.trunk = trunk.requires_grad_(False)
        self.config = model.config
        self.first_id = int(model.vocab_size)
        self.vocab_size = self.first_id + len(initial_ids)
        tokens_1P = torch.tensor([list(initial_ids)], device=next(trunk.parameters()).device)
        with torch.no_grad():
            self.prompt = nn.Parameter(model.embed(tokens_1P, RowContext(tokens_1P))[0].clone().float())

    @property
    def soft_ids(self) -> tuple[int, ...]:
        """The ids to put before a prompt."""
        return tuple(range(self.first_id, self.vocab_size))

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """What the trunk's `embed` returns, soft tokens taken from `prompt`."""
        is_soft_BT = tokens_BT >= self.first_id
        # The trunk never sees an id beyond its vocabulary; what it makes of the stand-in is thrown away.
        x: Tensor = self._model.embed(torch.where(is_soft_BT, 0, tokens_BT), context)
        soft = self.prompt[(tokens_BT - self.first_id).clamp(min=0)].to(x.dtype)
        return torch.where(is_soft_BT[..., None], soft, x)

    def hidden(self, x: Tensor, context: Context) -> Tensor:
        y: Tensor = self._model.hidden(x, context)
        return y

    forward = hidden

    def unembed(self, x_BTD: Tensor) -> Tensor:
        """logits_BTV, minus infinity for soft tokens."""
        logits: Tensor = self._model.unembed(x_BTD)
        return F.pad(logits, (0, self.vocab_size - self.first_id), value=float("-inf"))

    def next_logprobs(self, tokens_BT: Tensor) -> Tensor:
        """(B, T, V) natural log-probabilities of the next token, float32, one document a row."""
        context = RowContext(tokens_BT)
        return self.unembed(self.hidden(self.embed(tokens_BT, context), context)).float().log_softmax(dim=-1)

    def roles(self) -> dict[str, str]:
        """The trunk's roles, and "embedding" for the prompt."""
        trunk_roles: dict[str, str] = self._model.roles()
        return {"prompt": "embedding", **{f"trunk.{name}": role for name, role in trunk_roles.items()}}

    @property
    def _model(self) -> Any:
        return self.trunk
