"""Learning from rewards in an alignment run: PPO, GRPO and RLOO, one loop of rounds for all.

The engine samples; rewards are the plan's weighted sum of reward models and verifiers. Every round leaves a line in
metrics.jsonl and some episodes, token by token, in `<METHOD>/episodes.jsonl`. A gold judge that is never trained
against ends a run whose gold score falls again and again (C58; Gao et al. 2022, 2210.10760), which then keeps the
weights of before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fledge.batches import TokenBatch
from fledge.data.pack import PackedRows, PieceList, batch
from fledge.errors import DataError
from fledge.formats.checkpoint import LoadedModel, load_state
from fledge.layers.lora import add_lora
from fledge.models.scalar import ScalarModel, twin
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
)
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
from fledge.recipes.align_plan import RewardPart
from fledge.recipes.answers import Asked, chat_answers, score_answers
from fledge.recipes.report import Curve, Fact, Series
from fledge.recipes.training import Keeper, record_step
from fledge.rl.actors import Actors, PolicyPair
from fledge.rl.ema import Ema
from fledge.rl.grpo import GRPO, GRPOConfig
from fledge.rl.judge import Judge, Verifier
from fledge.rl.ppo import PPO, PPOConfig
from fledge.rl.rewards import Failure, Part, Records, RewardSum, VerifierReward
from fledge.rl.rollout import RewardModelScorer
from fledge.rl.sampler import EngineSampler
from fledge.rl.saving import load_trainable, trainable
from fledge.rl.world import PretrainMix, Round, World
from fledge.train.metrics import JsonLines
from fledge.types import Metrics, TextExample

EPISODES_SHOWN = 2  # of every round, token by token


class Algorithm(Protocol):
    """What PPO and GRPO have in common."""

    config: Any
    actors: Any
    ema: Ema
    round_number: int

    def round(self) -> Round: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def scalars(self) -> dict[str, Any]: ...
    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None: ...


@dataclass
class GoldWatch:
    """What a judge that is never trained against says of the policy, and whether it is time to stop.

    `best` holds the weights of the highest gold score so far.
    """

    judge: ScalarModel
    asked: Sequence[Asking]
    every: int
    falls: int
    scores: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def look(self, score: float, policy: nn.Module) -> None:
        """Take in one more gold score of the policy as it is."""
        if not self.scores or score > max(self.scores):
            self.best = {name: tensor.clone() for name, tensor in trainable(policy).items()}
        self.scores.append(score)

    @property
    def is_over(self) -> bool:
        """The last `falls` looks were each below the one before."""
        last = self.scores[-self.falls - 1 :]
        return len(last) > self.falls and all(later < earlier for earlier, later in pairwise(last))


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
    keeper, rounds = Keeper(context), algorithm.config.rounds
    log = JsonLines(context.run / "metrics.jsonl", algorithm.round_number, stage=context.name)
    episodes = JsonLines(context.path / "episodes.jsonl", algorithm.round_number, stage=context.name)
    try:
        with context.interrupts.deferred():
            while algorithm.round_number < rounds and not (watch is not None and watch.is_over):
                metrics = _one_round(context, algorithm, watch, start, episodes)
                record_step(context, log, algorithm.round_number, rounds, metrics)
                keeper.after_step(algorithm.round_number, rounds, lambda: _state(algorithm, watch))
    finally:
        log.close()
        episodes.close()


def _one_round(
    context: Context, algorithm: Algorithm, watch: GoldWatch | None, start: LoadedModel, episodes: JsonLines
) -> Metrics:
    """A round, what the gold judge says of it, and its lines in the table of episodes."""
    began = time.perf_counter()
    done = algorithm.round()
    if algorithm.round_number in context.plan.marks(algorithm.config.rounds):
        save_checkpoint(context, algorithm.actors.policy, start, algorithm.round_number)
    metrics = {**done.metrics, **_gold(context, algorithm, watch, start)}
    tokens = int(done.rollout.action_mask_BT.sum())
    context.add_cost(tokens=tokens, busy_seconds=time.perf_counter() - began)
    for line in episode_lines(done, start):
        episodes.write({"stage": context.name, "step": algorithm.round_number, **line})
    return metrics


def world_of(context: Context, start: LoadedModel, judge: Judge) -> World:
    """The prompts of the training side, the engine as sampler, and the plan's rewards."""
    renderer, cut = start.renderer, cut_of(context, start.renderer)
    asked: list[Asking] = askings_of(context, TRAIN, cut)
    if not asked:
        raise DataError("no prompt to answer: the data hold none that fits train.prompt_length")
    stop_ids = frozenset((renderer.end_id,))  # a base model's end of text is no end of an answer
    prompts = [asking.ids for asking in asked]

    def record(failure: Failure) -> None:
        with (context.path / "failed_rewards.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(failure), ensure_ascii=False) + "\n")

    scorer = RewardSum(
        parts=[_part(context, part, start, judge) for part in context.plan.rewards],
        records=Records.of(prompts, [asking.record for asking in asked]),
        decode=start.tokenizer.decode,
        stop_ids=stop_ids,
        max_failed=context.plan.max_failed_rewards,
        on_failure=record,
    )
    return World(
        prompts=prompts,
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


def _part(context: Context, part: RewardPart, start: LoadedModel, judge: Judge) -> Part:
    if part.kind == "verifier":
        return Part.text(part.name, VerifierReward(Verifier(part.name, part.options), judge), part.weight)
    loaded = load_scorer(part.name, context.run.parent, start, context.device)
    refuse_other_weights(loaded, part.hash or loaded.hash)
    rows = getattr(context.plan.train, "forward_rows", 64)
    return Part.model(part.name, RewardModelScorer(scalar(loaded), rows), part.weight)


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
    models = [part for part in context.plan.rewards if part.kind == "model"]
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
    roles = value.roles()
    for name, parameter in value.named_parameters():
        parameter.requires_grad_(name in roles and roles[name] not in FROZEN_ROLES)
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


def _gold(context: Context, algorithm: Algorithm, watch: GoldWatch | None, start: LoadedModel) -> Metrics:
    """`gold_score` of the policy on held-out prompts, every so many rounds and after the last."""
    number, rounds = algorithm.round_number, algorithm.config.rounds
    if watch is None or (number % watch.every and number != rounds):
        return {}
    speaking = replace(start, model=algorithm.actors.policy)
    asked = Asked([asking.conversation for asking in watch.asked], algorithm.config.response_length)
    said = chat_answers(speaking, asked, context.plan.seed)
    answers = [(asking.ids, completion.ids) for asking, completion in zip(watch.asked, said, strict=True)]
    score = float(score_answers(watch.judge, answers, start.tokenizer.pad_id).mean())
    watch.look(score, algorithm.actors.policy)
    return {"gold_score": score}


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


def episode_lines(done: Round, start: LoadedModel) -> list[dict[str, Any]]:
    """The first episodes of a round for the table: text, score, and per token its KL, value and advantage."""
    rollout, lines = done.rollout, []
    for row in range(min(EPISODES_SHOWN, len(done.prompts))):
        said = rollout.action_mask_BT[row] > 0
        kl_T = rollout.old_logprobs_BT[row] - rollout.reference_logprobs_BT[row]
        lines.append(
            {
                "prompt": start.tokenizer.decode(list(done.prompts[row])),
                "answer": done.completions[row].text,
                "score": float(rollout.scores_B[row]),
                "tokens": rollout.tokens_BT[row][said].tolist(),
                "kl": [round(value, 6) for value in kl_T[said].tolist()],
                "values": [round(value, 6) for value in rollout.old_values_BT[row][said].tolist()],
                "advantages": [round(value, 6) for value in rollout.advantages_BT[row][said].tolist()],
            }
        )
    return lines


def _save(context: Context, algorithm: Algorithm, watch: GoldWatch | None, start: LoadedModel) -> None:
    policy = algorithm.actors.policy
    facts = [Fact("rounds", algorithm.round_number)]
    averaged = twin(policy)
    algorithm.ema.copy_to(averaged)
    if watch is not None and watch.is_over:
        load_trainable(policy, watch.best)
        facts.append(Fact("stopped by the gold judge after round", algorithm.round_number))
    rewards = {f"reward_{place}": part.hash for place, part in enumerate(context.plan.rewards) if part.hash}
    hashed = save_aligned(context, policy, start, {"reference": start.hash, **rewards})
    save_aligned(context, averaged, start, {"policy": hashed}, name="ema")
    value = getattr(algorithm.actors, "value", None)
    if value is not None:
        save_aligned(context, value, start, {"policy": hashed}, name="value")
    context.report = replace(
        context.report,
        parameters=sum(parameter.numel() for parameter in policy.parameters()),
        facts=tuple(facts) + _last_facts(context),
        curves=_gold_curves(context),
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


def _gold_curves(context: Context) -> tuple[Curve, ...]:
    """Proxy and gold score over the distance travelled (Gao et al. 2022, figure 1)."""
    looked = sorted((r for r in _own_lines(context) if "gold_score" in r), key=lambda record: record["kl"])
    if not looked:
        return ()
    distance = [max(record["kl"], 0.0) ** 0.5 for record in looked]
    named = (("score_mean", "reward (proxy)"), ("gold_score", "gold judge"))
    series = tuple(Series.of(label, distance, [record[name] for record in looked]) for name, label in named)
    return (Curve("Proxy and gold reward", "square root of KL", "score", series),)
