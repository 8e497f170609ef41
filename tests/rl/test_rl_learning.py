"""What reward model and PPO learn in the toy world. A rising reward alone proves little: see test_rl_ppo.py.

Thresholds are those of docs/alignment.md, each for three seeds; the fast tests take one seed and fewer rounds.
"""

from __future__ import annotations

import pytest
import rl_toy as toy
import torch

from fledge.models.scalar import ScalarModel
from fledge.objectives.clipped_policy import ActionSpace, ClippedPolicy, action_logprobs
from fledge.objectives.clipped_value import ClippedValue
from fledge.objectives.ranking import KWiseRanking, RankedIds, last_scores
from fledge.objectives.scores import read_scores
from fledge.rl.actors import Actors
from fledge.rl.kl import KLConfig
from fledge.rl.ppo import PPO
from fledge.rl.reward import RewardConfig
from fledge.rl.rollout import RewardModelScorer, naive_sampler
from fledge.train.compile import compiled, obstacle
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.types import Metrics, SamplingParams

RANKING = KWiseRanking(toy.PROMPT + toy.RESPONSE, toy.PAD)
SEEDS = pytest.mark.parametrize("seed", [1, 2, 3])


def history(ppo: PPO) -> list[Metrics]:
    return [ppo.round().metrics for _ in range(ppo.config.rounds)]


def mean(rounds: list[Metrics], name: str) -> float:
    return sum(metrics[name] for metrics in rounds) / len(rounds)


def pretraining_loss(model) -> float:
    """Nats a token on counting documents that no one trained on."""
    batch = toy.counting(torch.Generator().manual_seed(77), 128)
    with torch.no_grad():
        (term,) = toy.OBJECTIVE.loss(model, batch).terms.values()
    return float(term.sum) / term.count


def share(ids) -> float:
    letters = [token for token in ids if token >= toy.LETTER_A]
    return sum(token == toy.LETTER_A for token in letters) / max(1, len(letters))


def rankings(num_prompts: int, noise: float, seed: int) -> list[RankedIds]:
    """Four samples of the toy language model a prompt, ranked by their share of "a" as a noisy labeler sees it."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [prompt for prompt in toy.prompts(num_prompts, seed) for _ in range(4)]
    sampler = naive_sampler(pad_id=toy.PAD, stop_ids=frozenset({toy.END}), decode=toy.decode)
    said = sampler(toy.language_model(), prompts, SamplingParams(max_tokens=toy.RESPONSE), generator)
    examples = []
    for start in range(0, len(said), 4):
        ids = [completion.ids for completion in said[start : start + 4]]
        seen = [round(share(one) + noise * float(torch.randn((), generator=generator)), 6) for one in ids]
        ranks = tuple(1 + sum(other > mine for other in seen) for mine in seen)
        if len(set(ranks)) > 1:
            examples.append(RankedIds(prompts[start], tuple(ids), ranks))
    return examples


def reward_model(num_steps: int, seed: int = 1) -> ScalarModel:
    model = ScalarModel.from_trunk("llama", toy.language_model(), generator=torch.Generator().manual_seed(seed))
    optimizers = OptimizerSet(model, OptimConfig.adamw(1e-3, decay=0.0))
    examples = rankings(16 * num_steps, noise=0.1, seed=1 + seed)
    for step in range(num_steps):
        batch = RANKING.collate(examples[16 * step : 16 * step + 16] or examples[:16])
        train_step(model, optimizers, [(RANKING, batch)], clip_norm=1.0)
    return model


def accuracy(model: ScalarModel, examples: list[RankedIds]) -> float:
    with torch.no_grad():
        total, count = RANKING.loss(model, RANKING.collate(examples)).stats["accuracy"]
    return float(total) / count


def test_ppo_raises_the_share_of_a():
    rounds = history(toy.ppo(toy.config(rounds=12, seed=1)))
    assert mean(rounds[-3:], "score_mean") >= 0.7
    assert mean(rounds[-3:], "score_mean") >= rounds[0]["score_mean"] + 0.4
    assert min(metrics["kl_k3"] for metrics in rounds) >= 0
    assert mean(rounds[-3:], "kl") > 0
    assert max(metrics["ratio_gap"] for metrics in rounds) <= 1e-5


def test_reward_model_learns_a_noisy_ranking():
    held_out = rankings(96, noise=0.0, seed=3)
    model = reward_model(30)
    before = ScalarModel.from_trunk("llama", toy.language_model(), generator=torch.Generator().manual_seed(1))
    assert accuracy(model, held_out) >= 0.85
    assert accuracy(model, held_out) > accuracy(before, held_out) + 0.15


def test_c23_price_of_a_missing_end_makes_answers_end_sooner_than_a_reward_for_length_does():
    rates = []
    for reward in (RewardConfig(), RewardConfig(missing_end_score=None)):
        config = toy.config(reward=reward, kl=KLConfig(beta=0.01), rounds=8, seed=1)
        rates.append(history(toy.ppo(config, toy.world(toy.length)))[-1]["end_rate"])
    assert rates[0] > rates[1] + 0.3


@pytest.mark.slow
def test_toy_language_model_learns_to_count():
    assert pretraining_loss(toy.language_model(150)) <= 0.9


@pytest.mark.slow
@SEEDS
def test_ppo_raises_the_share_of_a_for_every_seed(seed):
    rounds = history(toy.ppo(toy.config(seed=seed)))
    assert mean(rounds[-5:], "score_mean") >= 0.8
    assert mean(rounds[-5:], "score_mean") >= mean(rounds[:5], "score_mean") + 0.5


@pytest.mark.slow
@SEEDS
def test_k_wise_reward_model_orders_nine_clean_pairs_of_ten(seed):
    assert accuracy(reward_model(60, seed), rankings(200, noise=0.0, seed=30 + seed)) >= 0.9


@pytest.mark.slow
@SEEDS
def test_c17_c41_ppo_on_a_learned_reward_raises_the_true_one(seed):
    model = reward_model(60, seed)
    with torch.no_grad():
        scores = last_scores(model, RANKING.collate(rankings(64, noise=0.0, seed=40 + seed)))
    model.normalise(float(scores.mean()), float(scores.std()))
    world = toy.world(RewardModelScorer(model))
    ppo = PPO(toy.config(rounds=40, seed=seed), Actors.start(toy.language_model(), model), world)
    results = [ppo.round() for _ in range(ppo.config.rounds)]
    truth = [sum(share(c.ids) for c in result.completions) / len(result.completions) for result in results]
    assert sum(truth[-5:]) / 5 >= 0.8
    assert sum(truth[-5:]) / 5 >= truth[0] + 0.5


@pytest.mark.slow
@SEEDS
def test_c23_price_of_a_missing_end_decides_whether_answers_end(seed):
    for reward, ends in ((RewardConfig(), True), (RewardConfig(missing_end_score=None), False)):
        config = toy.config(reward=reward, kl=KLConfig(beta=0.01), seed=seed)
        rate = mean(history(toy.ppo(config, toy.world(toy.length)))[-3:], "end_rate")
        assert rate >= 0.9 if ends else rate <= 0.3


@pytest.mark.slow
@SEEDS
def test_c47_pretraining_mix_keeps_more_than_half_of_what_ppo_forgets(seed):
    losses, gains = [], []
    for weight in (0.0, 0.5, 2.0):
        ppo = toy.ppo(toy.config(pretrain_weight=weight, seed=seed), toy.world(pretrain=toy.pretrain_mix()))
        rounds = history(ppo)
        losses.append(pretraining_loss(ppo.actors.policy))
        gains.append(mean(rounds[-5:], "score_mean") - rounds[0]["score_mean"])
    assert losses[1] < losses[0] / 2
    assert losses[2] < losses[1], "a larger weight keeps more"
    assert gains[1] > 0.2
    assert gains[0] > gains[1] > gains[2], "and learns less"


@pytest.mark.slow
@SEEDS
def test_kl_falls_with_its_price(seed):
    kl, score = [], []
    for beta in (0.0, 0.05, 0.2, 1.0):
        rounds = history(toy.ppo(toy.config(kl=KLConfig(beta=beta), rounds=20, seed=seed)))
        kl.append(mean(rounds[-5:], "kl"))
        score.append(mean(rounds[-5:], "score_mean"))
    assert kl == sorted(kl, reverse=True)
    assert kl[-1] < 1 < kl[0]
    assert score[0] > score[-1] + 0.5


@pytest.mark.slow
@SEEDS
def test_adaptive_price_brings_the_kl_to_its_target(seed):
    kl = KLConfig(beta=0.2, target=2.0, horizon=600)
    optim = OptimConfig.adamw(3e-4, decay=0.0, eps=1e-5)
    rounds = history(toy.ppo(toy.config(kl=kl, rounds=120, epochs=1, policy_optim=optim, seed=seed)))
    # The controller swings about its target, in waves of some 60 rounds here.
    assert 1.4 <= mean(rounds[-60:], "kl") <= 2.6


@pytest.mark.slow
def test_compiled_regions_give_the_same_losses_and_gradients():
    if obstacle("cpu") is not None:
        pytest.skip("no compiler here")
    rollout = toy.ppo(toy.config(rounds=1, episodes=8, minibatch=8, epochs=1)).round().rollout
    space = ActionSpace(toy.RESPONSE, banned_ids=(toy.PAD,))
    policy = [ClippedPolicy(space), ClippedPolicy(space, region=compiled(action_logprobs))]
    value = [ClippedValue(), ClippedValue(region=compiled(read_scores))]
    judge = ScalarModel.from_trunk("llama", toy.language_model(), generator=torch.Generator().manual_seed(1))
    for objectives, model in ((policy, toy.language_model()), (value, judge)):
        results = []
        for objective in objectives:
            model.zero_grad()
            (term,) = objective.loss(model, rollout).terms.values()
            term.sum.backward()
            results.append([term.sum.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for plain, fast in zip(*results, strict=True):
            assert torch.allclose(plain, fast, atol=1e-3, rtol=1e-3)
