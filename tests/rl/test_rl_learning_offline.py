"""What the offline methods learn in the toy world: DPO and its relatives, and KTO, from answers sampled beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rl_toy as toy
import torch

from fledge.objectives.kto import KTO, mismatch, with_kto_reference
from fledge.objectives.preference import Preference, PreferenceIds, with_reference
from fledge.rl.best_of import Scored, sample_scored
from fledge.train.loop import Pairs, train_step
from fledge.train.optim import OptimConfig, OptimizerSet

LENGTH = toy.PROMPT + toy.RESPONSE
ROWS = 64
OPTIM = OptimConfig.adamw(1e-3, decay=0.0)


SPREAD = 2.0  # temperature of the answers that are compared: wide enough to hold what the policy is to find


def answers(num_prompts: int, n: int, seed: int, model=None, temperature: float = 1.0) -> list[Scored]:
    world, policy = toy.world(), model or toy.language_model()
    shape, prompts = world.shape(toy.PROMPT, toy.RESPONSE), toy.prompts(num_prompts, seed)
    return sample_scored(world, policy, prompts, shape, n=n, temperature=temperature, seed=seed)


def share_of_a(model) -> float:
    """The mean score of answers to prompts that no one trained on."""
    found = answers(64, 2, 99, model)
    return sum(sum(one.scores) for one in found) / (2 * len(found))


def pairs(num: int, seed: int, noise: float) -> list[PreferenceIds]:
    """Two samples a prompt in the order they were drawn; a share `noise` of the labels is wrong."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for one in answers(num, 2, seed, temperature=SPREAD):
        (first, second), (score, other) = (completion.ids for completion in one.completions), one.scores
        is_wrong = float(torch.rand((), generator=generator)) < noise
        if first != second and score != other:
            found.append(PreferenceIds(one.prompt, first, second, float((score > other) != is_wrong)))
    return found


def dpo(num_steps: int, seed: int, noise: float = 0.0, **options) -> tuple[list[dict[str, float]], float]:
    policy, reference = toy.language_model(), toy.language_model()
    objective = Preference(LENGTH, toy.PAD, **options)
    optimizers, examples = OptimizerSet(policy, OPTIM), pairs(ROWS * num_steps, seed, noise)
    told = []
    for step in range(num_steps):
        chosen = [examples[(ROWS * step + i) % len(examples)] for i in range(ROWS)]
        batch = with_reference(objective.collate(chosen), reference, rows=ROWS)
        told.append(train_step(policy, optimizers, [(objective, batch)], clip_norm=1.0))
    return told, share_of_a(policy)


def kto(num_steps: int, seed: int) -> tuple[list[dict[str, float]], float]:
    policy, reference, objective = toy.language_model(), toy.language_model(), KTO(LENGTH, toy.PAD)
    optimizers = OptimizerSet(policy, OPTIM)
    scored = answers(32 * num_steps, 1, seed, temperature=SPREAD)
    middle = sorted(one.scores[0] for one in scored)[len(scored) // 2]
    verdicts = [(one.prompt, one.completions[0].ids, one.scores[0] > middle) for one in scored]
    told = []
    for step in range(num_steps):
        examples = mismatch(verdicts[32 * step : 32 * step + 32], max_length=LENGTH)
        batches = [
            with_kto_reference(objective.collate(part), reference, rows=64) for part in (examples[:16], examples[16:])
        ]
        z0 = objective.baseline(policy, batches)
        micro: Pairs = [(objective, replace(batch, baseline=z0)) for batch in batches]
        told.append(train_step(policy, optimizers, micro, clip_norm=1.0))
    return told, share_of_a(policy)


def test_c51_dpo_raises_the_true_score():
    told, truth = dpo(20, seed=1)
    assert told[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert told[-1]["loss"] < 0.5
    assert told[-1]["accuracy"] >= 0.8
    assert truth >= share_of_a(toy.language_model()) + 0.15


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_c51_dpo_raises_the_true_score_for_every_seed(seed):
    told, truth = dpo(60, seed)
    assert sum(step["loss"] for step in told[-10:]) / 10 < 0.6
    assert truth >= 0.7


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"kind": "ipo", "beta": 0.02}, {"label_smoothing": 0.2}],
    ids=["ipo", "smoothed"],
)
def test_relatives_of_dpo_raise_the_true_score_from_labels_of_which_a_fifth_is_wrong(options):
    _, truth = dpo(60, seed=1, noise=0.2, **options)
    assert truth >= share_of_a(toy.language_model()) + 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kto_raises_the_true_score_for_every_seed(seed):
    told, truth = kto(60, seed)
    assert told[-1]["desirable_reward"] > told[-1]["undesirable_reward"]
    assert truth >= share_of_a(toy.language_model()) + 0.3
