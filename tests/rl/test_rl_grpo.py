"""What holds in every round of GRPO and its relatives, whatever they learn; and that they learn."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import rl_toy as toy
import torch

from fledge.config import from_json, to_json
from fledge.errors import CheckpointError, TrainingHalted
from fledge.models.gpt import GPT, GPTConfig
from fledge.objectives.clipped_policy import action_logprobs
from fledge.rl import grpo as grpo_module
from fledge.rl.actors import PolicyPair
from fledge.rl.groups import group_advantages
from fledge.rl.grpo import GRPO, GRPOConfig
from fledge.rl.kl import KLConfig
from fledge.rl.prompts import draw_prompts
from fledge.rl.reward import RewardConfig
from fledge.rl.rollout import Regions
from fledge.rl.world import Weighted
from fledge.train.optim import OptimConfig

OPTIM = OptimConfig.adamw(1e-3, decay=0.0, eps=1e-5)
SHAPE = {"prompt_length": toy.PROMPT, "response_length": toy.RESPONSE, "optim": OPTIM, "warmup_rounds": 0}
SMALL = GRPOConfig(rounds=4, prompts=4, group=4, minibatch=8, epochs=2, **SHAPE)
# Everything that has a state of its own, at once.
BUSY = replace(
    SMALL,
    kl=KLConfig(beta=0.05, target=2.0, horizon=64),
    reward=RewardConfig(missing_end_score=None, normalise=True, clip=3.0),
    pretrain_weight=0.5,
    redraws=2,
    sampler_cap=2.0,
    warmup_rounds=3,
    schedule="linear",
    ema_decay=0.9,
)
FIGURES = """
round beta lr_scale kl kl_k3 kl_per_token entropy score_mean score_std shaped_score_mean shaped_score_std
response_length end_rate groups_without_spread advantage_size failed_rewards redraws sampler_gap sampler_gap_max
sampler_logprob_gap approx_kl clip_fraction ratio_min ratio_max ratio_gap grad_norm loss/policy loss/kl
loss/next_token count/policy count/kl
"""


def grpo(config=SMALL, world=None) -> GRPO:
    return GRPO(config, PolicyPair.start(toy.language_model()), world or toy.world())


def mean(rounds, name) -> float:
    return sum(metrics[name] for metrics in rounds) / len(rounds)


def history(config, world=None):
    run = grpo(config, world)
    return [run.round().metrics for _ in range(config.rounds)]


@pytest.fixture
def seen_pairs(monkeypatch) -> list:
    seen, step = [], grpo_module.train_step

    def spy(model, optimizers, pairs, **options):
        seen.append(pairs)
        return step(model, optimizers, pairs, **options)

    monkeypatch.setattr(grpo_module, "train_step", spy)
    return seen


def test_c27_c36_first_round_starts_at_the_reference_with_ratio_one():
    run = grpo()
    first, second = run.round().metrics, run.round().metrics
    assert first["kl"] == first["kl_k3"] == 0
    assert max(first["ratio_gap"], second["ratio_gap"]) <= 1e-5
    assert abs(second["kl"]) > 0


def test_c36_noise_between_old_and_new_log_probability_aborts_and_leaves_the_batch_on_disk(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def noisy(*args):
        logprobs = action_logprobs(*args)
        return logprobs + 1e-3 * torch.randn(logprobs.shape, generator=generator)

    with pytest.raises(TrainingHalted, match="away from 1 before any step"):
        grpo(SMALL, toy.world(regions=Regions(policy=noisy), dump_folder=tmp_path)).round()
    assert (tmp_path / "halted-0-rollout.safetensors").exists()


def test_answers_of_a_group_follow_one_prompt_and_share_nothing_but_it():
    result = grpo().round()
    prompts = [result.prompts[start : start + 4] for start in range(0, 16, 4)]
    assert all(group.count(group[0]) == 4 for group in prompts)
    assert len({group[0] for group in prompts}) > 1
    assert len({completion.ids for completion in result.completions[:4]}) > 1
    assert result.rollout.group_B.tolist() == [n // 4 for n in range(16)]


def test_c52_advantages_of_a_round_are_those_of_its_scores_on_every_action():
    rollout = grpo().round().rollout
    scores = rollout.scores_B.view(4, 4)
    expected = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    found = rollout.advantages_BT
    assert torch.allclose(found, expected.flatten()[:, None] * rollout.action_mask_BT, atol=1e-4)


def test_c54_episodes_without_a_reward_are_left_out_and_counted_and_never_paid_zero():
    def flaky(episodes):
        scores = toy.share_of_a(episodes)
        scores[::5] = float("nan")
        return scores

    result = grpo(replace(SMALL, reward=RewardConfig()), toy.world(flaky)).round()
    rollout = result.rollout
    assert result.metrics["failed_rewards"] == pytest.approx(4 / 16)
    assert rollout.scores_B.isnan().sum() == 4
    assert (rollout.action_mask_BT[::5] == 0).all()
    assert (rollout.weights_BT[::5] == 0).all()
    assert rollout.counts["policy"] == 12
    plain = grpo(SMALL, toy.world(flaky)).round().rollout
    expected = group_advantages(plain.scores_B, 4, baseline="mean", scale="std")
    assert torch.allclose(plain.advantages_BT, expected[:, None] * plain.action_mask_BT, atol=1e-5)
    assert all(math.isfinite(figure) for figure in result.metrics.values())
    assert result.metrics["score_mean"] == pytest.approx(float(rollout.scores_B.nanmean()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_c49_round_without_any_reward_or_with_an_infinite_one_aborts(bad):
    with pytest.raises(TrainingHalted, match="not a finite number"):
        grpo(SMALL, toy.world(lambda episodes: torch.full((16,), bad))).round()


def test_c53_groups_without_spread_are_replaced_by_those_of_further_prompts():
    def rarely(episodes):  # half of the groups say all the same
        scores = toy.share_of_a(episodes) + torch.rand(16, generator=torch.Generator().manual_seed(3))
        return torch.where(torch.arange(16) // 4 % 2 == 0, 0.5, scores)

    run = grpo(replace(SMALL, redraws=3), toy.world(rarely))
    result = run.round()
    assert result.metrics["redraws"] == 1
    assert result.metrics["groups_without_spread"] == 0
    assert run.num_draws == 2
    first, second = (draw_prompts(len(run.world.prompts), 4, seed=0, number=number) for number in range(2))
    asked = [run.world.prompts[index] for index in (first[1], first[3], second[1], second[3])]
    assert result.prompts[::4] == asked, "those of the first draw that teach, then those of another"
    assert all(result.prompts[start : start + 4].count(result.prompts[start]) == 4 for start in range(0, 16, 4))
    tokens = result.rollout.tokens_BT
    for row, (prompt, completion) in enumerate(zip(result.prompts, result.completions, strict=True)):
        assert tuple(tokens[row, toy.PROMPT - len(prompt) : toy.PROMPT].tolist()) == tuple(prompt)
        assert tuple(tokens[row, toy.PROMPT : toy.PROMPT + len(completion.ids)].tolist()) == completion.ids
    plain = grpo(SMALL, toy.world(rarely)).round().metrics
    assert plain["groups_without_spread"] == 0.5


def test_c53_further_draws_are_bounded_and_what_is_missing_is_filled_up():
    run = grpo(replace(SMALL, redraws=2), toy.world(lambda episodes: torch.ones(16)))
    result = run.round()
    assert (run.num_draws, result.metrics["redraws"], result.metrics["groups_without_spread"]) == (3, 2, 1)
    assert len(result.prompts) == 16
    assert result.metrics["loss/policy"] == 0


def test_rloo_pays_for_kl_in_the_reward_and_grpo_in_the_loss(seen_pairs):
    config = replace(GRPOConfig.rloo(), rounds=2, prompts=4, group=4, minibatch=16, kl=KLConfig(beta=0.5), **SHAPE)
    config = replace(config, kl_as="reward")
    run = grpo(config)
    run.round()
    rollout = run.round().rollout
    delta = (rollout.old_logprobs_BT - rollout.reference_logprobs_BT).sum(1)
    paid = (rollout.scores_B - 0.5 * delta).view(4, 4)
    expected = (paid - (paid.sum(1, keepdim=True) - paid) / 3).flatten()
    assert torch.allclose(rollout.advantages_BT.sum(1) / rollout.action_mask_BT.sum(1), expected, atol=1e-4)
    assert all(one_pass.objective.beta == 0 for pairs in seen_pairs for one_pass, _ in pairs)
    seen_pairs.clear()
    grpo(replace(config, kl_as="loss")).round()
    assert [one_pass.objective.beta for one_pass, _ in seen_pairs[0]] == [0.5]


def test_rloo_step_is_reinforce_on_whole_answers():
    """The gradient of the mean over answers of -A log pi(answer)."""
    config = replace(GRPOConfig.rloo(), rounds=1, prompts=4, group=4, minibatch=16, clip_norm=None, **SHAPE)
    run = grpo(replace(config, optim=OptimConfig.adamw(0.0)))
    result = run.round()
    policy, rollout = toy.language_model(), result.rollout
    x = policy.embed(rollout.tokens_BT, toy_context(rollout))
    logprobs = action_logprobs(policy, x, rollout.tokens_BT, rollout.segments_BT, run.space)
    said = torch.where(rollout.action_mask_BT > 0, logprobs, 0.0).sum(1)
    advantages = rollout.advantages_BT.sum(1) / rollout.action_mask_BT.sum(1)
    (-(advantages * said).mean()).backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
    assert result.metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


def toy_context(rollout):
    from fledge.layers.attention import SegmentContext

    return SegmentContext(rollout.segments_BT)


def test_c25_truncated_importance_weights_correct_the_sampler(monkeypatch):
    run = grpo(replace(SMALL, sampler_cap=1.3))
    told = run.world.sampler

    def off(*args):
        said = told(*args)
        return [
            replace(one, logprobs=tuple(value - 0.2 * (n % 3) for value in one.logprobs)) for n, one in enumerate(said)
        ]

    object.__setattr__(run.world, "sampler", off)
    rollout = run.round().rollout
    ratio = rollout.weights_BT * rollout.action_mask_BT.sum(1, keepdim=True)
    actions = rollout.action_mask_BT > 0
    for row in range(16):
        expected = min(1.3, math.exp(0.2 * (row % 3)))
        assert ratio[row][actions[row]].tolist() == pytest.approx([expected] * int(actions[row].sum()), rel=1e-3)


def test_c43_c47_every_step_takes_every_episode_once_an_epoch_and_pretraining_rows_beside_it(seen_pairs):
    grpo(replace(BUSY, forward_rows=5), toy.world(pretrain=toy.pretrain_mix())).round()
    assert len(seen_pairs) == 4
    for pairs in seen_pairs:
        sizes = [len(batch.tokens_BT) for _, batch in pairs]
        assert sizes == [5, 3, 5, 3]
        assert [isinstance(objective, Weighted) for objective, _ in pairs] == [False, False, True, True]


def test_c43_every_epoch_is_a_fresh_permutation_and_uses_every_episode_once(seen_pairs):
    numbered = toy.world(lambda episodes: torch.arange(len(episodes.tokens_BT)).float())
    grpo(replace(SMALL, epochs=3), numbered).round()
    orders = [int(score) for pairs in seen_pairs for score in pairs[0][1].scores_B]
    epochs = [orders[start : start + 16] for start in (0, 16, 32)]
    assert all(sorted(order) == list(range(16)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3


def test_c38_dropout_sleeps_even_if_someone_calls_train_on_the_networks():
    config = GPTConfig(toy.VOCAB, 32, 2, 2, 64, embedding_dropout=0.3, residual_dropout=0.3, attention_dropout=0.3)
    policy = GPT(config)
    policy.init_weights(torch.Generator().manual_seed(0))
    run = GRPO(SMALL, PolicyPair.start(policy), toy.world())
    run.actors.policy.train()
    run.actors.reference.train()
    metrics = run.round().metrics
    assert metrics["ratio_gap"] <= 1e-5
    assert metrics["kl"] == 0


def test_c46_average_follows_the_policy_after_every_round():
    run = grpo(replace(SMALL, ema_decay=0.5))
    start = run.actors.policy.head.weight.detach().clone()
    run.round()
    expected = 0.5 * start + 0.5 * run.actors.policy.head.weight.detach()
    assert torch.allclose(run.ema.shadows["head.weight"], expected, atol=1e-7)


def test_c53_answers_near_the_limit_are_paid_less():
    plain, priced = (grpo(replace(SMALL, overlong_buffer=buffer)).round() for buffer in (None, 12))
    lengths = plain.rollout.action_mask_BT.sum(1)
    assert (priced.rollout.action_mask_BT.sum(1) == lengths).all()
    gone = plain.metrics["shaped_score_mean"] - priced.metrics["shaped_score_mean"]
    assert gone == pytest.approx(float((lengths / toy.RESPONSE).mean()), abs=1e-5)
    assert priced.metrics["score_mean"] == plain.metrics["score_mean"]


def test_c48_every_figure_is_there_and_finite_in_every_round():
    run = grpo(BUSY, toy.world(pretrain=toy.pretrain_mix()))
    for _ in range(2):
        metrics = run.round().metrics
        assert set(FIGURES.split()) <= metrics.keys()
        assert all(math.isfinite(figure) for figure in metrics.values())


def test_c50_run_that_is_resumed_equals_the_uninterrupted_one_to_the_bit():
    world = toy.world(pretrain=toy.pretrain_mix())
    whole = grpo(BUSY, world)
    told = [whole.round().metrics for _ in range(4)]
    broken_off = grpo(BUSY, world)
    for _ in range(2):
        broken_off.round()
    tensors = {name: tensor.clone() for name, tensor in broken_off.tensors().items()}
    resumed = grpo(BUSY, world)
    resumed.load(tensors, json.loads(json.dumps(broken_off.scalars())))
    assert [resumed.round().metrics for _ in range(2)] == told[2:]
    assert resumed.scalars() == whole.scalars()
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in resumed.tensors().items())


def test_c50_prompts_of_a_resumed_run_go_on_behind_the_last_draw_not_behind_the_last_round():
    config, world = replace(SMALL, redraws=2), toy.world(lambda episodes: torch.ones(16))
    whole, resumed = grpo(config, world), grpo(config, world)
    whole.round()
    assert whole.num_draws == 3
    tensors = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    resumed.load(tensors, json.loads(json.dumps(whole.scalars())))
    assert resumed.round().prompts == whole.round().prompts


def test_state_of_other_models_is_refused():
    run = grpo()
    with pytest.raises(CheckpointError, match="other models"):
        run.load({"policy/strange": torch.zeros(1)}, run.scalars())


def test_c45_reference_is_the_same_after_training_as_before():
    run = grpo()
    before = {name: tensor.clone() for name, tensor in run.actors.reference.state_dict().items()}
    run.round()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.actors.reference.state_dict().items())
    assert not torch.equal(run.actors.policy.head.weight, run.actors.reference.head.weight)


def test_config_survives_json():
    for config in (BUSY, GRPOConfig.grpo(), GRPOConfig.dr_grpo(), GRPOConfig.dapo(), GRPOConfig.rloo()):
        assert from_json(GRPOConfig, json.loads(json.dumps(to_json(config)))) == config


def test_published_choices():
    grpo_, dr, dapo, rloo = (getattr(GRPOConfig, name)() for name in ("grpo", "dr_grpo", "dapo", "rloo"))
    assert (grpo_.scale, grpo_.normalise, grpo_.estimator, grpo_.kl.beta) == ("std", "answer", "k3", 0.04)
    assert (dr.scale, dr.normalise, dr.kl.beta) == ("none", "limit", 0.0)
    assert (dapo.clip, dapo.clip_high, dapo.normalise, dapo.kl.beta) == (0.2, 0.28, "token", 0.0)
    assert dapo.redraws > 0
    assert dapo.overlong_buffer is not None
    assert (rloo.baseline, rloo.scale, rloo.normalise, rloo.kl_as) == (
        "leave_one_out",
        "none",
        "sum",
        "reward",
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": 1},
        {"minibatch": 4},
        {"minibatch": 0},
        {"minibatch": 12},
        {"redraws": -1},
        {"overlong_buffer": 0},
        {"sampler_cap": 0.5},
        {"reward": RewardConfig(whiten=True)},
        {"clip_high": 0.1},
        {"pretrain_weight": -1.0},
        {"warmup_rounds": 9},
    ],
)
def test_contradictory_options_are_refused(wrong):
    with pytest.raises(ValueError):
        replace(SMALL, **wrong)


# One value for every option that differs from SMALL's or BUSY's; see the next test.
OPTIONS = {
    "rounds": 5, "prompts": 2, "group": 2, "minibatch": 16, "epochs": 1, "forward_rows": 3, "prompt_length": 9,
    "response_length": 9, "temperature": 0.8, "baseline": "leave_one_out", "scale": "none", "normalise": "token",
    "clip": 0.02, "clip_high": 0.9, "dual_clip": 1.01, "kl": KLConfig(beta=0.5), "kl_as": "reward",
    "estimator": "k3", "redraws": 0, "overlong_buffer": 4, "sampler_cap": 1.0, "reward": RewardConfig(),
    "pretrain_weight": 0.1, "pretrain_ratio": 2.0, "optim": OptimConfig.adamw(1e-4), "schedule": "constant",
    "warmup_rounds": 2, "clip_norm": 0.01, "ema_decay": 0.1, "seed": 1,
}  # fmt: skip


def test_options_table_names_every_option():
    assert set(OPTIONS) == set(GRPOConfig.__dataclass_fields__)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"prompt_length", "forward_rows", "redraws", "sampler_cap"}))
def test_every_option_is_used(name):
    """Four have tests of their own above: shapes, memory, further draws, the sampler's correction."""
    base = replace(BUSY, epochs=4, redraws=0, warmup_rounds=1, optim=OptimConfig.adamw(3e-3, decay=0.0))
    found = []
    for config in (base, replace(base, **{name: OPTIONS[name]})):
        run = grpo(config, toy.world(pretrain=toy.pretrain_mix()))
        for _ in range(3):
            run.round()
        found.append({key: tensor.clone() for key, tensor in run.tensors().items()})
    assert any(not torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_grpo_raises_the_share_of_a():
    rounds = history(GRPOConfig(rounds=10, prompts=8, group=8, minibatch=64, epochs=4, seed=1, **SHAPE))
    assert mean(rounds[-3:], "score_mean") >= 0.7
    assert mean(rounds[-3:], "score_mean") >= rounds[0]["score_mean"] + 0.4
    assert max(metrics["ratio_gap"] for metrics in rounds) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "rloo"])
def test_every_relative_raises_the_share_of_a_for_every_seed(name, seed):
    base = getattr(GRPOConfig, name)()
    epochs = 1 if name == "rloo" else 4
    rounds = history(replace(base, rounds=30, epochs=epochs, seed=seed, **SHAPE))
    assert mean(rounds[-5:], "score_mean") >= 0.8
    assert mean(rounds[-5:], "score_mean") >= rounds[0]["score_mean"] + 0.5
    assert min(metrics["kl_k3"] for metrics in rounds) >= 0
