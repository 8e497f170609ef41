"""What must hold of a round before anything is learned from it; each check gives a complaint, or None.

A curve that rises shows little: of nine bugs put into a small PPO, five still made the reward rise. These catch them
while they run; the algorithm halts with the complaint and the batch on disk (rl/world.py). Beside them: ratios are 1
before a round's first step (ppo.py, grpo.py), losses are numbers (train/loop.py). Suffixes: B episodes, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fledge.batches import Rollout
from fledge.rl.report import sampler_gap
from fledge.rl.reward import last_action

# Mean |difference of probability| of engine and trainer from which temperature, positions or precision differ (C25).
MAX_SAMPLER_GAP = 0.01
SCORE_TOLERANCE = 1e-4  # of a reward, for rounding in float32


def moved_at_the_start(rollout: Rollout, tolerance: float) -> str | None:
    """C27: before the first step of all the policy IS the reference, so their log-probabilities are the same."""
    gap_BT = (rollout.old_logprobs_BT - rollout.reference_logprobs_BT).abs() * rollout.action_mask_BT
    largest = float(gap_BT.max())
    if largest <= tolerance:
        return None
    return f"KL is not 0 at step 0: policy and reference differ by {largest:.2e} nats before anything was learned"


def score_is_elsewhere(rollout: Rollout, shaped_B: Tensor, beta: float) -> str | None:
    """C26: the score stands at the last token of the answer and nowhere else; all other rewards are the price of KL."""
    delta_BT = (rollout.old_logprobs_BT - rollout.reference_logprobs_BT) * rollout.action_mask_BT
    rest_BT = rollout.rewards_BT + beta * delta_BT
    rows = torch.arange(len(shaped_B), device=shaped_B.device)
    is_paid_B = rollout.action_mask_BT.any(dim=1)
    expected_BT = torch.zeros_like(rest_BT)
    expected_BT[rows, last_action(rollout.action_mask_BT)] = torch.where(is_paid_B, shaped_B, 0.0)
    off_BT = (rest_BT - expected_BT).abs()
    scale = SCORE_TOLERANCE * max(1.0, float(expected_BT.abs().max()))
    if float(off_BT.max()) <= scale:
        return None
    row, position = divmod(int(off_BT.argmax()), off_BT.shape[1])
    return (
        f"the score does not stand at the end of its answer: episode {row} has a reward of "
        f"{float(rest_BT[row, position]):.4g} at position {position}, expected {float(expected_BT[row, position]):.4g}"
    )


def sampler_disagrees(rollout: Rollout) -> str | None:
    """C25: the engine drew from the distribution that the trainer computes."""
    gap = sampler_gap(rollout)
    if gap["sampler_gap"] <= MAX_SAMPLER_GAP:
        return None
    return (
        f"engine and trainer disagree about the tokens drawn: {gap['sampler_gap']:.4f} in probability on average, at "
        f"most {MAX_SAMPLER_GAP} is let pass (temperature, banned ids, positions or precision differ)"
    )
