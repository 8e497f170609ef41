"""Learning from rewards in an alignment run: PPO, GRPO and RLOO, one loop of rounds for all.

The engine samples; rewards are the plan's weighted sum of reward models and verifiers. Every round leaves a line in
metrics.jsonl and some episodes, token by token, in `<METHOD>/episodes.jsonl`. A gold judge that is never trained
against ends a run whose gold score falls again and again (C58; Gao et al. 2022, 2210.10760), which then keeps the
weights of before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fledge.batches import TokenBatch
from fledge.data.pack import PackedRows, PieceList, batch
from fledge.errors import DataError
from fledge.formats.checkpoint import LoadedModel, load_state
from fledge.layers.lora import add_lora
from fledge.models.scalar import ScalarModel, thaw, twin
from fledge.objectives.next_token import NextToken
from fledge.recipes.align_data import (
    HELD_OUT,
    TRAIN,
    Asking,
    Cut,
    askings_of,
    cut_of,
    examples_of,
    mixes_texts,
    pieces,
    read_lines,
)
from fledge.recipes.align_gold import LOOKS, GoldWatch, Look, Scene, gold_report, look_at
from fledge.recipes.align_models import (
    FROZEN_ROLES,
    Context,
    load_scorer,
    refuse_other_weights,
    require_unchanged,
    save_aligned,
    save_checkpoint,
    scalar,
    start_of,
    trainable_model,
    weights_digest,
)
from fledge.recipes.align_rewards import reward_sum
from fledge.recipes.episodes import episode_lines, keep_episodes
from fledge.recipes.episodes_page import EPISODES
from fledge.recipes.report import Fact
from fledge.recipes.training import Keeper, record_step
from fledge.rl.actors import Actors, PolicyPair
from fledge.rl.ema import Ema
from fledge.rl.grpo import GRPO, GRPOConfig
from fledge.rl.judge import Judge
from fledge.rl.ppo import PPO, PPOConfig
from fledge.rl.rewards import RewardSum
from fledge.rl.rollout import EpisodeShape
from fledge.rl.sampler import EngineSampler
from fledge.rl.saving import load_trainable
from fledge.rl.world import PretrainMix, Round, World
from fledge.train.metrics import JsonLines
from fledge.types import Metrics, TextExample


class Algorithm(Protocol):
    """What PPO and GRPO have in common."""

    config: Any
    actors: Any
    world: World
    shape: EpisodeShape
    ema: Ema
    round_number: int

    def round(self) -> Round: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def scalars(self) -> dict[str, Any]: ...
    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None: ...


@dataclass
class Sitting:
    """What the rounds of one sitting share."""

    context: Context
    algorithm: Algorithm
    start: LoadedModel
    watch: GoldWatch | None
    scene: Scene
    episodes: JsonLines
    looks: JsonLines


def rl_stage(context: Context) -> None:
    """Rounds of sampling and learning; writes the policy, its moving average and, for PPO, the value model."""
    start = start_of(context)
    policy = trainable_model(context, start.model)
    with Judge() as judge:
        world = world_of(context, start, judge)
        algorithm = _algorithm(context, start, policy, world)
        reference = weights_digest(algorithm.actors.reference)
        watch = _watch(context, start)
        saved = load_state(context.path)
        if saved is not None:
            _load(algorithm, watch, saved[1], saved[2])
        _rounds(context, algorithm, watch, start)
    require_unchanged(algorithm.actors.reference, reference)
    _save(context, algorithm, watch, start)


def _rounds(context: Context, algorithm: Algorithm, watch: GoldWatch | None, start: LoadedModel) -> None:
    keeper, rounds, done = Keeper(context), algorithm.config.rounds, algorithm.round_number
    log, episodes, looks = (
        JsonLines(path, done, stage=context.name)
        for path in (context.run / "metrics.jsonl", context.path / EPISODES, context.path / LOOKS)
    )
    reference = replace(start, model=algorithm.actors.reference)
    rewards = algorithm.world.scorer
    assert isinstance(rewards, RewardSum)
    scene = Scene(reference, rewards, algorithm.shape, context.plan.seed)
    sitting = Sitting(context, algorithm, start, watch, scene, episodes, looks)
    try:
        with context.interrupts.deferred():
            if watch is not None and not read_lines(context.path / LOOKS):
                _look(sitting, watch)  # where it starts from; no candidate, and no fall can begin here
            while algorithm.round_number < rounds and not (watch is not None and watch.is_over):
                metrics = _one_round(sitting)
                record_step(context, log, algorithm.round_number, rounds, metrics)
                keeper.after_step(algorithm.round_number, rounds, lambda: _state(algorithm, watch))
    finally:
        for lines in (log, episodes, looks):
            lines.close()


def _one_round(sitting: Sitting) -> Metrics:
    """A round, the model it may leave behind, what the gold judge says, and its lines in the table of episodes."""
    context, algorithm, watch = sitting.context, sitting.algorithm, sitting.watch
    began = time.perf_counter()
    done = algorithm.round()
    number, rounds = algorithm.round_number, algorithm.config.rounds
    if number in context.plan.marks(rounds):
        save_checkpoint(context, algorithm.actors.policy, sitting.start, number)
    metrics = dict(done.metrics)
    if watch is not None and (number % watch.every == 0 or number == rounds):
        look = _look(sitting, watch)
        watch.look(look.gold, algorithm.actors.policy)
        metrics["gold_score"], metrics["gold_kl"] = look.gold, look.kl
        if look.proxy is not None:
            metrics["gold_proxy_score"] = look.proxy
    tokens = int(done.rollout.action_mask_BT.sum())
    context.add_cost(tokens=tokens, busy_seconds=time.perf_counter() - began)
    lines = episode_lines(done, sitting.start.tokenizer, context.plan.episodes_kept)
    keep_episodes(sitting.episodes, {"stage": context.name, "step": number}, lines)
    return metrics


def _look(sitting: Sitting, watch: GoldWatch) -> Look:
    look = look_at(sitting.algorithm.actors.policy, watch, sitting.scene)
    sitting.looks.write({"stage": sitting.context.name, "step": sitting.algorithm.round_number, **vars(look)})
    return look


def world_of(context: Context, start: LoadedModel, judge: Judge) -> World:
    """The prompts of the training side, the engine as sampler, and the plan's rewards."""
    renderer, cut = start.renderer, cut_of(context, start.renderer)
    asked: list[Asking] = askings_of(context, TRAIN, cut)
    if not asked:
        raise DataError("no prompt to answer: the data hold none that fits train.prompt_length")
    scorer = reward_sum(context, start, judge, asked)
    stop_ids = scorer.stop_ids
    return World(
        prompts=[asking.ids for asking in asked],
        pad_id=start.tokenizer.pad_id,
        stop_ids=stop_ids,
        end_id=renderer.end_id,
        sampler=EngineSampler(start.tokenizer, stop_ids),
        scorer=scorer,
        pretrain=_pretrain_mix(context, start) if mixes_texts(context.plan) else None,
        dump_folder=context.path,
    )


def _pretrain_mix(context: Context, start: LoadedModel) -> PretrainMix:
    """The texts among the data as rows beside the episodes (PPO-ptx; Ouyang et al. 2022, section 3.5)."""
    config = context.plan.train
    row_length = config.prompt_length + config.response_length
    cut = Cut(start.renderer, row_length)
    texts = [
        piece
        for example in examples_of(context, TRAIN)
        if isinstance(example, TextExample)
        for piece in pieces(example, cut)
    ]
    if not texts:
        raise DataError("train.pretrain_weight is above 0, but the data hold no text; add a file of texts to --data")
    rows = PackedRows(PieceList(texts), row_length, context.plan.seed + 3000)
    objective = NextToken(row_length, start.tokenizer.pad_id)

    def rows_of(step: int, count: int) -> TokenBatch:
        return objective.collate(batch(rows, step, count))

    return PretrainMix(objective, rows_of)


def _algorithm(context: Context, start: LoadedModel, policy: Any, world: World) -> Algorithm:
    config = context.plan.train
    if isinstance(config, GRPOConfig):
        return GRPO(config, PolicyPair.start(policy, freeze_roles=FROZEN_ROLES), world)
    assert isinstance(config, PPOConfig)
    value = _value_model(context, start, policy)
    reference = twin(policy).requires_grad_(False)
    return PPO(config, Actors(policy, reference, value), world)


def _value_model(context: Context, start: LoadedModel, policy: nn.Module) -> ScalarModel:
    """The value function begins as the first reward model, head included (C41); without one as the start's trunk with
    a head of zeros, which predicts 0 everywhere. It trains as the policy does: whole, or by an adapter."""
    models = [member for part in context.plan.rewards if part.kind == "model" for member in part.models]
    if models:
        value = scalar(load_scorer(models[0].name, context.run.parent, start, context.device))
        trunk: Any = value.trunk
    else:
        plain = start_of(context).model
        generator = torch.Generator().manual_seed(context.plan.seed)
        value = ScalarModel.from_trunk(start.info.family, plain, generator=generator, freeze_roles=FROZEN_ROLES)
        value.to(context.device)
        trunk = value.trunk
        nn.init.zeros_(value.head.weight)
    thaw(value, FROZEN_ROLES)
    if context.plan.lora is not None:
        add_lora(trunk, context.plan.lora.config, torch.Generator().manual_seed(context.plan.seed + 1))
    return value


# The gold judge.


def _watch(context: Context, start: LoadedModel) -> GoldWatch | None:
    plan = context.plan.judge
    if plan is None:
        return None
    loaded = load_scorer(plan.name, context.run.parent, start, context.device)
    refuse_other_weights(loaded, plan.hash)
    asked = askings_of(context, HELD_OUT, cut_of(context, start.renderer))[: plan.prompts]
    if not asked:
        raise DataError("no held-out prompt for the judge: raise data.held_out_share, or give --held-out")
    return GoldWatch(scalar(loaded), asked, plan.every, plan.falls)


# State, table, result.


def _state(algorithm: Algorithm, watch: GoldWatch | None) -> tuple[dict[str, Any], dict[str, Any]]:
    best = {} if watch is None else {f"gold_best/{name}": tensor for name, tensor in watch.best.items()}
    scores = [] if watch is None else list(watch.scores)
    return {**algorithm.tensors(), **best}, {**algorithm.scalars(), "gold": scores}


def _load(
    algorithm: Algorithm, watch: GoldWatch | None, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    algorithm.load(tensors, scalars)
    if watch is not None:
        device = next(algorithm.actors.policy.parameters()).device
        prefix = "gold_best/"
        watch.best = {n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}
        watch.scores = [float(score) for score in scalars["gold"]]


def _save(context: Context, algorithm: Algorithm, watch: GoldWatch | None, start: LoadedModel) -> None:
    policy = algorithm.actors.policy
    facts = [Fact("rounds", algorithm.round_number)]
    averaged = twin(policy)
    algorithm.ema.copy_to(averaged)
    if watch is not None and watch.is_over:
        load_trainable(policy, watch.best)
        facts.append(Fact("stopped by the gold judge after round", algorithm.round_number))
    models = [member for part in context.plan.rewards for member in part.models]
    rewards = {f"reward_{place}": member.hash for place, member in enumerate(models)}
    hashed = save_aligned(context, policy, start, {"reference": start.hash, **rewards})
    save_aligned(context, averaged, start, {"policy": hashed}, name="ema")
    value = getattr(algorithm.actors, "value", None)
    if value is not None:
        save_aligned(context, value, start, {"policy": hashed}, name="value")
    looked, curves = gold_report(context.path)
    told = _last_facts(context)
    context.report = replace(
        context.report,
        headline=told[0],
        parameters=sum(parameter.numel() for parameter in policy.parameters()),
        facts=(*facts, *told[1:], *looked),
        curves=curves,
    )


def _own_lines(context: Context) -> list[Metrics]:
    lines = (context.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["stage"] == context.name]


def _last_facts(context: Context) -> tuple[Fact, ...]:
    rounds = _own_lines(context)
    last = rounds[-1]
    return (
        Fact("reward gained", last["score_mean"] - rounds[0]["score_mean"], "score"),
        Fact("KL to the start", last["kl"], "nats an answer"),
        Fact("largest gap between engine and trainer", max(r["sampler_logprob_gap"] for r in rounds), "nats"),
        Fact("rewards that could not be had", max(r["failed_rewards"] for r in rounds), "%"),
    )
