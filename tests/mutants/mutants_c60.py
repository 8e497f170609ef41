"""The bugs of C60: most of them let a small PPO's reward rise, so that no learning curve finds them."""

from __future__ import annotations

from mutant import Mutant

POLICY = "fledge/objectives/clipped_policy.py"
REWARD = "fledge/rl/reward.py"
ADVANTAGE = "fledge/rl/advantage.py"
SCORE_LANDS = "rewards_BT[rows, last_action(action_mask_BT)] += shaped_B"

C60 = (
    Mutant(
        "c60-advantage-sign",
        POLICY,
        "torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + high))",
        "torch.maximum(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + high))",
        "the advantage's sign is flipped",
    ),
    Mutant(
        "c60-score-one-late",
        REWARD,
        SCORE_LANDS,
        "rewards_BT[rows, (last_action(action_mask_BT) + 1).clamp(max=rewards_BT.shape[1] - 1)] += shaped_B",
        "the score lands one token after the end, on padding",
    ),
    Mutant(
        "c60-score-at-the-end-of-the-row",
        REWARD,
        SCORE_LANDS,
        "rewards_BT[:, -1] += shaped_B",
        "the score lands on the last position of the row",
    ),
    Mutant(
        "c60-logits-off-by-one",
        POLICY,
        "x_BTD[:, -space.response_length - 1 : -1]",
        "x_BTD[:, -space.response_length :]",
        "the logit at t speaks of token t, not of the next one",
    ),
    Mutant(
        "c60-kl-sign",
        REWARD,
        "rewards_BT = -beta * torch.where",
        "rewards_BT = beta * torch.where",
        "leaving the reference is paid instead of priced",
    ),
    Mutant(
        "c60-live-dropout",
        "fledge/rl/actors.py",
        "        for model in (self.policy, self.reference, self.value):\n            model.eval()",
        "        for model in (self.policy, self.reference, self.value):\n            model.train()",
        "dropout puts noise between old and new log-probability",
    ),
    Mutant(
        "c60-temperature-of-the-sampler",
        "fledge/rl/world.py",
        "SamplingParams(max_tokens=shape.response_length, temperature=temperature)",
        "SamplingParams(max_tokens=shape.response_length, temperature=0.7 * temperature)",
        "the sampler is colder than the policy that is trained",
    ),
    Mutant(
        "c60-temperature-of-the-trainer",
        POLICY,
        "scaled = logits.float() if self.temperature == 1 else logits.float() / self.temperature",
        "scaled = logits.float()",
        "the trainer's log-probabilities forget the temperature",
    ),
    Mutant(
        "c60-whitening-unmasked",
        ADVANTAGE,
        "mean = (values_BT * mask_BT).sum() / count\n"
        "    variance = ((values_BT - mean).square() * mask_BT).sum() / count",
        "mean = values_BT.mean()\n    variance = (values_BT - mean).square().mean()",
        "advantages are whitened over padding too",
    ),
    Mutant(
        "c60-no-positions",
        "fledge/layers/attention.py",
        "self.positions_BT = index_T - start_BT\n        self._index_T",
        "self.positions_BT = index_T.expand_as(start_BT)\n        self._index_T",
        "positions count from the row's start, left padding included",
    ),
)
