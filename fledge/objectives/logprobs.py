"""Logits to log-probabilities: the one place, shared by pretraining, SFT and RL, because they must agree to the bit.

Always float32, whatever precision the logits come in: log-sum-exp over a vocabulary loses digits in half precision.
Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor


def target_logprobs(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """(B, T) float32: natural log-probability of `targets_BT[b, t]` under the logits at the same position."""
    logits_BTV = logits_BTV.float()
    return logits_BTV.gather(-1, targets_BT[..., None])[..., 0] - logits_BTV.logsumexp(dim=-1)


def entropy(logits_BTV: Tensor) -> Tensor:
    """(B, T) float32: entropy in nats of the distribution at each position; a logit of minus infinity adds 0."""
    logprobs_BTV = logits_BTV.float().log_softmax(dim=-1)
    probabilities_BTV = logprobs_BTV.exp()
    return -(probabilities_BTV * logprobs_BTV.masked_fill(probabilities_BTV == 0, 0.0)).sum(dim=-1)
