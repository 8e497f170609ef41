"""What holds in every round of PPO, whatever it learns."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import rl_toy as toy
import torch
from safetensors.torch import load_file, save_file

from fledge.batches import Rollout
from fledge.config import from_json, override, to_json
from fledge.errors import CheckpointError, TrainingHalted
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.scalar import ScalarModel
from fledge.objectives.clipped_policy import ClippedPolicy, action_logprobs
from fledge.rl import ppo as ppo_module
from fledge.rl.actors import Actors
from fledge.rl.kl import KLConfig
from fledge.rl.ppo import PPO, PPOConfig
from fledge.rl.reward import RewardConfig
from fledge.rl.rollout import Regions
from fledge.rl.world import Weighted, split_rows
from fledge.train.optim import OptimConfig
from fledge.types import SamplingParams

SMALL = toy.config(rounds=4, episodes=16, minibatch=8, epochs=2)
# Everything that has a state of its own, at once.
BUSY = replace(
    SMALL,
    kl=KLConfig(beta=0.05, target=2.0, horizon=64),
    reward=RewardConfig(normalise=True, clip=3.0),
    pretrain_weight=0.5,
    warmup_rounds=3,
    schedule="linear",
    ema_decay=0.9,
)
FIGURES = """
round beta lr_scale kl kl_k3 kl_per_token entropy score_mean score_std shaped_score_mean shaped_score_std
episode_reward response_length end_rate explained_variance return_mean sampler_gap sampler_gap_max
sampler_logprob_gap approx_kl
clip_fraction ratio_min ratio_max ratio_gap grad_norm value_grad_norm value value_error value_clip_fraction
loss/policy loss/value loss/next_token
"""


def weights(ppo: PPO) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in ppo.tensors().items()}


def run(config: PPOConfig, rounds: int, world=None) -> PPO:
    ppo = toy.ppo(config, world)
    for _ in range(rounds):
        ppo.round()
    return ppo


@pytest.fixture
def seen_pairs(monkeypatch) -> list:
    """The pairs of every optimizer step that PPO takes."""
    seen, step = [], ppo_module.train_step

    def spy(model, optimizers, pairs, **options):
        seen.append(pairs)
        return step(model, optimizers, pairs, **options)

    monkeypatch.setattr(ppo_module, "train_step", spy)
    return seen


def test_c27_c36_first_round_starts_at_the_reference_with_ratio_one():
    ppo = toy.ppo(SMALL)
    for number in range(3):
        metrics = ppo.round().metrics
        assert metrics["ratio_gap"] <= 1e-5
        if number == 0:
            assert metrics["kl"] == 0
            assert metrics["kl_k3"] == 0
    assert abs(metrics["kl"]) > 0


def test_c36_noise_between_old_and_new_log_probability_aborts_and_leaves_the_batch_on_disk(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def noisy(*args):
        logprobs = action_logprobs(*args)
        return logprobs + 1e-3 * torch.randn(logprobs.shape, generator=generator)

    world = toy.world(regions=Regions(policy=noisy), dump_folder=tmp_path)
    with pytest.raises(TrainingHalted, match="away from 1 before any step"):
        toy.ppo(SMALL, world).round()
    dumped = load_file(tmp_path / "halted-0-rollout.safetensors")
    assert dumped["0.tokens_BT"].shape == (8, toy.PROMPT + toy.RESPONSE)


def test_c37_without_learning_rate_ratio_stays_one_kl_stays_zero_and_no_weight_moves():
    still = OptimConfig.adamw(0.0, decay=0.0, eps=1e-5)
    ppo = toy.ppo(replace(SMALL, policy_optim=still, value_optim=still))
    before = {name: p.detach().clone() for name, p in ppo.actors.policy.named_parameters()}
    values = {name: p.detach().clone() for name, p in ppo.actors.value.named_parameters()}
    for _ in range(3):
        metrics = ppo.round().metrics
        assert (metrics["ratio_min"], metrics["ratio_max"]) == pytest.approx((1, 1), abs=1e-5)
        assert metrics["kl"] == 0
        assert metrics["clip_fraction"] == 0
    assert all(torch.equal(p, before[name]) for name, p in ppo.actors.policy.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in ppo.actors.value.named_parameters())


def test_c38_dropout_sleeps_even_if_someone_calls_train_on_the_networks():
    config = GPTConfig(toy.VOCAB, 32, 2, 2, 64, embedding_dropout=0.3, residual_dropout=0.3, attention_dropout=0.3)
    policy = GPT(config)
    policy.init_weights(torch.Generator().manual_seed(0))
    judge = ScalarModel.from_trunk("gpt", policy, generator=torch.Generator().manual_seed(1))
    ppo = PPO(SMALL, Actors.start(policy, judge), toy.world())
    for model in (ppo.actors.policy, ppo.actors.reference, ppo.actors.value):
        model.train()
    metrics = ppo.round().metrics
    assert metrics["ratio_gap"] <= 1e-5
    assert metrics["kl"] == 0


def test_c42_adam_has_the_epsilon_of_the_papers_and_rates_warm_up_from_a_tenth():
    config = PPOConfig()
    assert config.policy_optim.matrix.eps == config.value_optim.head.eps == 1e-5
    assert config.clip_norm == 1.0
    scales = [toy.ppo(replace(SMALL, rounds=20, warmup_rounds=10)).schedule.scale(r) for r in (0, 4, 9, 15)]
    assert scales == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert toy.ppo(replace(SMALL, schedule="linear", rounds=10)).schedule.scale(5) == pytest.approx(0.5)


def test_c42_rates_of_policy_and_value_function_follow_the_schedule():
    ppo = run(replace(SMALL, rounds=20, warmup_rounds=10), 3)
    for optimizers in (ppo.policy_optimizers, ppo.value_optimizers):
        assert rates(optimizers) == pytest.approx([0.3 * 1e-3] * len(rates(optimizers)))


def rates(optimizers) -> list[float]:
    return [group["lr"] for optimizer in optimizers._optimizers.values() for group in optimizer.param_groups]


def test_c43_every_epoch_is_a_fresh_permutation_and_uses_every_episode_once(seen_pairs):
    def numbered(episodes):
        return torch.arange(len(episodes.tokens_BT)).float()

    toy.ppo(replace(SMALL, epochs=3), toy.world(numbered)).round()
    minibatches = [pairs[0][1] for pairs in seen_pairs if isinstance(pairs[0][0], ClippedPolicy)]
    assert len(minibatches) == 6
    assert all(len(minibatch.tokens_BT) == 8 for minibatch in minibatches)
    orders = [int(score) for minibatch in minibatches for score in minibatch.scores_B]
    epochs = [orders[start : start + 16] for start in (0, 16, 32)]
    assert all(sorted(order) == list(range(16)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3


def test_c45_reference_and_reward_model_are_the_same_after_training_as_before():
    policy = toy.language_model()
    judge = ScalarModel.from_trunk("llama", policy, generator=torch.Generator().manual_seed(1))
    ppo = PPO(SMALL, Actors.start(policy, judge), toy.world())
    frozen = [ppo.actors.reference, judge]
    before = [[t.clone() for t in model.state_dict().values()] for model in frozen]
    ppo.round()
    for model, tensors in zip(frozen, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tensors, strict=True))
    assert not torch.equal(policy.head.weight, ppo.actors.reference.head.weight)
    assert not torch.equal(ppo.actors.value.head.weight, judge.head.weight)


def test_c46_average_follows_the_policy_after_every_round():
    ppo = toy.ppo(replace(SMALL, ema_decay=0.5))
    start = ppo.actors.policy.head.weight.detach().clone()
    ppo.round()
    expected = 0.5 * start + 0.5 * ppo.actors.policy.head.weight.detach()
    assert torch.allclose(ppo.ema.shadows["head.weight"], expected, atol=1e-7)


def test_c47_pretraining_rows_join_the_same_step_in_the_stated_ratio_and_weight(seen_pairs):
    config = replace(SMALL, pretrain_weight=0.7, pretrain_ratio=1.5, forward_rows=5)
    metrics = toy.ppo(config, toy.world(pretrain=toy.pretrain_mix())).round().metrics
    policy_steps = [pairs for pairs in seen_pairs if isinstance(pairs[0][0], ClippedPolicy)]
    assert len(policy_steps) == config.steps_per_round == 4
    for pairs in policy_steps:
        episodes = [batch for _, batch in pairs if isinstance(batch, Rollout)]
        rows = [batch for objective, batch in pairs if isinstance(objective, Weighted)]
        assert [len(batch.tokens_BT) for batch in episodes] == [5, 3]
        assert [len(batch.tokens_BT) for batch in rows] == [5, 5, 2]
    assert metrics["loss"] == pytest.approx(metrics["loss/policy"] + 0.7 * metrics["loss/next_token"], abs=1e-5)
    assert 0.5 < metrics["loss/next_token"] < 1.5, "a mean over tokens, of a model that was pretrained"


def test_c47_each_step_has_pretraining_rows_of_its_own():
    asked, mix = [], toy.pretrain_mix()

    def batch(step, rows):
        asked.append((step, rows))
        return mix.batch(step, rows)

    world = toy.world(pretrain=replace(mix, batch=batch))
    run(BUSY, 2, world)
    assert asked == [(step, 8) for step in range(8)]


def test_c48_every_figure_is_there_and_finite_in_every_round():
    world = toy.world(pretrain=toy.pretrain_mix())
    ppo = toy.ppo(BUSY, world)
    for _ in range(2):
        metrics = ppo.round().metrics
        assert set(FIGURES.split()) <= metrics.keys()
        assert all(math.isfinite(figure) for figure in metrics.values())


def test_c21_c22_c25_sampler_and_trainer_agree_in_every_round():
    ppo = toy.ppo(replace(SMALL, temperature=0.8))
    with torch.no_grad():
        for model in (ppo.actors.policy, ppo.actors.reference):
            model.head.weight[toy.PAD] = model.head.weight[toy.LETTER_A]  # padding, which is banned, becomes likely
    for _ in range(3):
        assert ppo.round().metrics["sampler_gap"] < 1e-4


def test_c21_rollouts_are_drawn_at_the_temperature_of_training_and_without_any_filter():
    seen, draw = [], toy.world().sampler

    def listening(model, prompts, params, generator):
        seen.append(params)
        return draw(model, prompts, params, generator)

    toy.ppo(replace(SMALL, temperature=0.8), replace(toy.world(), sampler=listening)).round()
    assert seen == [SamplingParams(max_tokens=toy.RESPONSE, temperature=0.8)]
    plain = SamplingParams()
    assert (plain.top_k, plain.top_p, plain.min_p, plain.allowed_ids, plain.logit_bias) == (None, None, None, None, ())
    assert (plain.min_tokens, plain.presence_penalty, plain.frequency_penalty, plain.repetition_penalty) == (0, 0, 0, 1)


def off_by_row(sampler):
    """A sampler that says of answer n that its tokens were exp(-0.2 (n mod 3)) times as likely as they were."""

    def told(*args):
        return [
            replace(one, logprobs=tuple(value - 0.2 * (n % 3) for value in one.logprobs))
            for n, one in enumerate(sampler(*args))
        ]

    return told


def test_c25_truncated_importance_weights_correct_the_sampler():
    plain = toy.ppo(SMALL).round().rollout
    other = replace(toy.world(), sampler=off_by_row(toy.world().sampler))
    with pytest.raises(TrainingHalted, match="engine and trainer disagree"):
        toy.ppo(SMALL, other).round()
    corrected = toy.ppo(replace(SMALL, sampler_cap=1.3), other).round().rollout
    assert torch.equal(corrected.tokens_BT, plain.tokens_BT)
    for row in range(16):
        weight = min(1.3, math.exp(0.2 * (row % 3)))
        assert torch.allclose(corrected.advantages_BT[row], weight * plain.advantages_BT[row], rtol=1e-3)
    assert torch.equal(corrected.returns_BT, plain.returns_BT), "what the value function learns is drawn as it is"


def test_c31_advantages_are_whitened_over_all_episodes_of_a_round():
    rollout = toy.ppo(SMALL).round().rollout
    advantages = rollout.advantages_BT[rollout.action_mask_BT > 0]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (rollout.advantages_BT[rollout.action_mask_BT == 0] == 0).all()
    plain = toy.ppo(replace(SMALL, whiten_advantages=False)).round().rollout
    assert torch.allclose(plain.advantages_BT + plain.old_values_BT, plain.returns_BT, atol=1e-6)


def test_c33_raw_scores_are_reported_beside_what_is_paid():
    reward = RewardConfig(missing_end_score=None, clip=0.1)
    result = toy.ppo(replace(SMALL, reward=reward)).round()
    assert result.metrics["score_mean"] == pytest.approx(float(result.rollout.scores_B.mean()))
    assert result.metrics["score_mean"] > result.metrics["shaped_score_mean"]


def test_c34_beta_moves_by_the_number_of_episodes_of_a_round():
    ppo = toy.ppo(replace(SMALL, kl=KLConfig(beta=0.1, target=6.0, horizon=100)))
    assert ppo.round().metrics["beta"] == 0.1
    assert ppo.beta == pytest.approx(0.1 * (1 - 0.2 * 16 / 100)), "KL 0 is the clipped error of -0.2"


def test_c49_score_that_is_no_number_aborts_and_leaves_the_batch_on_disk(tmp_path):
    def broken(episodes):
        return torch.where(episodes.ended_B, 1.0, float("nan")) * float("nan")

    ppo = toy.ppo(SMALL, toy.world(broken, dump_folder=tmp_path))
    before = ppo.actors.policy.head.weight.detach().clone()
    with pytest.raises(TrainingHalted, match="not a finite number"):
        ppo.round()
    assert torch.equal(ppo.actors.policy.head.weight, before)
    assert (tmp_path / "halted-0-rollout.safetensors").exists()


def test_c54_episodes_without_a_reward_are_left_out_and_counted_and_never_paid_zero():
    def flaky(episodes):
        scores = toy.share_of_a(episodes)
        scores[::4] = float("nan")
        return scores

    result = toy.ppo(SMALL, toy.world(flaky)).round()
    rollout, metrics = result.rollout, result.metrics
    assert metrics["failed_rewards"] == 0.25
    assert rollout.scores_B.isnan().sum() == 4
    for name in ("action_mask_BT", "rewards_BT", "advantages_BT", "returns_BT"):
        assert (getattr(rollout, name)[::4] == 0).all()
    assert metrics["score_mean"] == pytest.approx(float(rollout.scores_B.nanmean()))
    lengths = rollout.action_mask_BT.sum(1)
    assert metrics["response_length"] == pytest.approx(float(lengths[lengths > 0].mean()))
    assert all(math.isfinite(figure) for figure in metrics.values())


def test_c54_a_pass_in_which_every_reward_failed_leaves_all_figures_finite():
    def flaky(episodes):
        scores = toy.share_of_a(episodes)
        scores[:4] = float("nan")
        return scores

    for pieces in (1, 2):
        metrics = toy.ppo(replace(SMALL, forward_rows=pieces), toy.world(flaky)).round().metrics
        assert all(math.isfinite(figure) for figure in metrics.values())
        assert metrics["ratio_min"] <= 1 <= metrics["ratio_max"]


def test_c49_loss_that_is_no_number_aborts_with_the_weights_untouched(tmp_path):
    poisoned = replace(toy.pretrain_mix(), objective=Weighted(toy.OBJECTIVE, float("nan")))
    ppo = toy.ppo(replace(SMALL, pretrain_weight=1.0), toy.world(pretrain=poisoned, dump_folder=tmp_path))
    before = ppo.actors.policy.head.weight.detach().clone()
    with pytest.raises(TrainingHalted):
        ppo.round()
    assert torch.equal(ppo.actors.policy.head.weight, before)
    assert (tmp_path / "halted-0-policy.safetensors").exists()


def test_c50_run_that_is_resumed_equals_the_uninterrupted_one_to_the_bit(tmp_path):
    world = toy.world(pretrain=toy.pretrain_mix())
    whole = toy.ppo(BUSY, world)
    told = [whole.round().metrics for _ in range(4)]
    broken_off = run(BUSY, 2, world)
    save_file({name: t.contiguous() for name, t in broken_off.tensors().items()}, tmp_path / "state.safetensors")
    scalars = json.loads(json.dumps(broken_off.scalars()))
    del broken_off
    resumed = toy.ppo(BUSY, world)
    resumed.load(load_file(tmp_path / "state.safetensors"), scalars)
    assert [resumed.round().metrics for _ in range(2)] == told[2:]
    assert resumed.scalars() == whole.scalars()
    expected, found = whole.tensors(), resumed.tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_c50_state_holds_weights_averages_moments_beta_and_the_cursor():
    ppo = run(BUSY, 1, toy.world(pretrain=toy.pretrain_mix()))
    groups = {name.partition("/")[0] for name in ppo.tensors()}
    assert groups == {"policy", "value", "ema", "policy_optimizer", "value_optimizer"}
    assert ppo.scalars()["round"] == 1
    assert ppo.scalars()["beta"] == ppo.beta != BUSY.kl.beta
    assert ppo.scalars()["moments"]["count"] == 16


def test_state_of_other_models_is_refused():
    ppo = toy.ppo(SMALL)
    tensors = {name: t for name, t in ppo.tensors().items() if name != "policy/head.weight"}
    with pytest.raises(CheckpointError, match="other models"):
        ppo.load(tensors, ppo.scalars())


def test_c24_same_seed_gives_the_same_run_and_another_seed_another():
    first, second = (weights(run(SMALL, 2)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = weights(run(replace(SMALL, seed=1), 2))
    assert not torch.equal(first["policy/head.weight"], other["policy/head.weight"])


def test_c44_memory_option_changes_nothing_that_is_learned():
    world = toy.world(pretrain=toy.pretrain_mix())
    config = replace(SMALL, pretrain_weight=0.5, rounds=1)
    whole, parts = (toy.ppo(replace(config, forward_rows=rows), world) for rows in (64, 3))
    for ppo in (whole, parts):
        ppo.round()
    for name, tensor in whole.tensors().items():
        if name.startswith("policy_optimizer") and name.endswith("exp_avg"):
            assert torch.allclose(parts.tensors()[name], tensor, atol=1e-5), name


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"minibatch": 4}, "at least 8"),
        ({"minibatch": 0}, "at least 8"),
        ({"minibatch": 24}, "must divide"),
        ({"rounds": 0}, "at least 1"),
        ({"lam": 1.5}, "between 0 and 1"),
        ({"pretrain_weight": -1.0}, "0 or more"),
        ({"pretrain_weight": 1.0, "pretrain_ratio": 0.0}, "no row a minibatch"),
        ({"warmup_rounds": 99}, "between 0 and rounds"),
        ({"sampler_cap": 0.5}, "at least 1"),
        ({"forward_rows": 0}, "at least 1"),
    ],
)
def test_contradictory_options_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(SMALL, **changes)


def test_pretraining_weight_without_pretraining_rows_is_refused():
    with pytest.raises(ValueError, match="no pretraining rows"):
        toy.ppo(replace(SMALL, pretrain_weight=1.0))


def test_config_survives_json_and_takes_overrides():
    assert from_json(PPOConfig, json.loads(json.dumps(to_json(BUSY)))) == BUSY
    changed = override(BUSY, ["kl.target=null", "reward.clip=1.5", "policy_optim.matrix.lr=0.5", "dual_clip=3"])
    assert (changed.kl.target, changed.reward.clip, changed.policy_optim.matrix.lr) == (None, 1.5, 0.5)


def test_pieces_of_a_pretraining_batch_are_the_batch():
    batch = toy.pretrain_mix().batch(0, 7)
    parts = split_rows(batch, 3)
    assert [len(part.tokens_BT) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.targets_BT for part in parts]), batch.targets_BT)


OPTIONS = {
    "episodes": 24,
    "minibatch": 16,
    "epochs": 1,
    "temperature": 0.7,
    "clip": 0.01,
    "dual_clip": 1.001,
    "value_clip": 0.001,
    "gamma": 0.5,
    "lam": 0.5,
    "whiten_advantages": False,
    "sampler_cap": 1.0,
    "kl": KLConfig(beta=1.0),
    "reward": RewardConfig(whiten=True),
    "pretrain_weight": 0.0,
    "pretrain_ratio": 2.0,
    "policy_optim": OptimConfig.adamw(1e-4, decay=0.0),
    "value_optim": OptimConfig.adamw(1e-4, decay=0.0),
    "schedule": "linear",
    "warmup_rounds": 2,
    "clip_norm": 0.01,
    "ema_decay": 0.5,
    "seed": 1,
    "prompt_length": 9,
    "response_length": 9,
    "forward_rows": 3,
    "lanes": 2,
    "rounds": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_option_is_used(name):
    config = replace(BUSY, rounds=4, warmup_rounds=0, schedule="constant", minibatch=8)
    world = toy.world(pretrain=toy.pretrain_mix())
    changed = replace(config, **{name: OPTIONS[name]})
    # Shapes, memory, and the weights of a sampler that is right: only rounding may show.
    if name in ("prompt_length", "forward_rows", "lanes", "sampler_cap"):
        a, b = (toy.ppo(given, world).round() for given in (config, changed))
        assert a.metrics["kl_k3"] == pytest.approx(b.metrics["kl_k3"], abs=1e-4)
        return
    if name == "rounds":
        config, changed = replace(config, schedule="linear"), replace(changed, schedule="linear")
    a, b = (weights(run(given, 3, world)) for given in (config, changed))
    assert any(not torch.equal(a[key], b[key]) for key in a.keys() & b.keys())


def test_options_table_names_every_option():
    assert set(OPTIONS) == set(PPOConfig.__dataclass_fields__)
