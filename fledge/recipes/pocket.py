"""`pocket`: the whole ring on two CPU cores in minutes. `sprout`: the same ring in seconds, to try a machine.

Rates and the length of every stage come from trials on such a machine (docs/pretraining.md, docs/log.md).
"""

from __future__ import annotations

from dataclasses import replace

from fledge.config import to_json
from fledge.data.filters import FilterConfig
from fledge.models.pocket import PocketConfig
from fledge.recipes.plan import (
    CodePlan,
    CorpusPlan,
    EvaluationPlan,
    FitPlan,
    PretrainPlan,
    RankingPlan,
    RewardPlan,
    RingPlan,
    SFTPlan,
    scale_of,
)
from fledge.rl.kl import KLConfig
from fledge.rl.ppo import PPOConfig
from fledge.text.tokenizer import TokenizerConfig
from fledge.train.optim import OptimConfig

DEPTH = 4
VOCAB_SIZE = 4096
LANES = 2  # micro-batches of a step: one a core


def pocket(depth: int | None = None) -> RingPlan:
    """Wikipedia introductions and cookbook recipes, the standard library's Python, chats between strangers."""
    depth = DEPTH if depth is None else depth
    scale = scale_of(depth)
    tokens_a_step = scale.rows * scale.row_length
    ppo = pocket_ppo()
    return RingPlan(
        recipe="pocket",
        depth=depth,
        seed=0,
        family="pocket",
        model=model_config(depth),
        corpus=CorpusPlan(
            prose=("wikipedia", "recipes"),
            code=("stdlib",),
            chats=("chitchat",),
            # Two passes over the prose fit into the time; more of it would be read less than twice.
            limits={"recipes": 1_600_000, "stdlib": 3_000_000},
            filters=FilterConfig(validation_cap=150_000),
        ),
        tokenizer=TokenizerConfig(vocab_size=VOCAB_SIZE),
        pretrain=PretrainPlan(
            FitPlan(
                scale.tokens // tokens_a_step,
                scale.rows,
                scale.row_length,
                OptimConfig.by_role(scale.lr),
                lanes=LANES,
            )
        ),
        code=CodePlan(continued(depth, share=0.1, rate=0.3)),
        sft=SFTPlan(continued(depth, share=0.13, rate=0.5)),
        rankings=RankingPlan(prompts=320),
        reward=RewardPlan(prompts_per_step=16, optim=OptimConfig.adamw(1e-3, eps=1e-5), lanes=LANES),
        ppo=ppo,
        evaluation=EvaluationPlan(),
    )


def sprout(depth: int | None = None) -> RingPlan:
    """The ring of `pocket` on a hundredth of everything: proves that all of it runs, and teaches little."""
    plan = pocket(1 if depth is None else depth)
    small = {**plan.model, "width": 64, "num_heads": 1, "table_rows": 512}

    def short(fit: FitPlan) -> FitPlan:
        return replace(fit, steps=6, rows=4, row_length=128)

    corpus = replace(
        plan.corpus, limits={"wikipedia": 200_000, "recipes": 50_000, "stdlib": 200_000, "chitchat": 400_000}
    )
    ppo = replace(plan.ppo, rounds=2, episodes=16, minibatch=8, forward_rows=8, response_length=16, warmup_rounds=1)
    return replace(
        plan,
        recipe="sprout",
        model=small,
        corpus=corpus,
        tokenizer=replace(plan.tokenizer, vocab_size=512),
        pretrain=replace(plan.pretrain, fit=short(plan.pretrain.fit)),
        code=replace(plan.code, fit=short(plan.code.fit)),
        sft=replace(plan.sft, fit=short(plan.sft.fit)),
        rankings=replace(plan.rankings, prompts=16, held_out=8, batch=16),
        reward=replace(plan.reward, prompts_per_step=4),
        ppo=ppo,
        evaluation=replace(plan.evaluation, prompts=16, resamples=500),
        compile=False,
    )


def model_config(depth: int) -> dict[str, object]:
    """pocket's own family at this depth; the vocabulary is the tokenizer's to say."""
    config: dict[str, object] = to_json(PocketConfig.from_depth(depth, VOCAB_SIZE))
    del config["vocab_size"]
    return config


def continued(depth: int, *, share: float, rate: float) -> FitPlan:
    """A stage that goes on from a trained model: `share` of pretraining's steps at `rate` of its rates."""
    scale = scale_of(depth)
    steps = max(1, round(share * scale.tokens / (scale.rows * scale.row_length)))
    optim = OptimConfig.by_role(scale.lr * rate)
    return FitPlan(steps, scale.rows, scale.row_length, optim, warmup=0.05, cooldown=0.9, lanes=LANES)


def pocket_ppo() -> PPOConfig:
    """20 rounds of 64 episodes; beta and the mix are InstructGPT's in kind, scaled to a model of this size."""
    policy = OptimConfig.adamw(5e-4, decay=0.0, eps=1e-5)
    value = OptimConfig.adamw(1e-3, decay=0.0, eps=1e-5)
    return PPOConfig(
        rounds=20,
        episodes=64,
        minibatch=16,
        epochs=1,
        forward_rows=16,
        lanes=LANES,
        prompt_length=56,
        response_length=40,
        kl=KLConfig(beta=0.05, target=8.0, horizon=1000),
        policy_optim=policy,
        value_optim=value,
        warmup_rounds=2,
        ema_decay=0.9,  # 0.992 belongs to hundreds of rounds: 20 of them would leave 85 % of the SFT weights
        pretrain_weight=0.5,
        pretrain_ratio=1.0,
    )
