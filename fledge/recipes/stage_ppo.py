"""Stage 8: PPO against the reward model, with the pretraining mix; the gold judge looks on and never teaches."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from typing import Any

from fledge.batches import TokenBatch
from fledge.data.pack import PackedRows, ShardDocuments, batch
from fledge.errors import DataError
from fledge.formats.checkpoint import LoadedModel, load_state
from fledge.models.scalar import ScalarModel
from fledge.objectives.clipped_policy import action_logprobs
from fledge.objectives.scores import read_scores
from fledge.recipes.chats import prompts
from fledge.recipes.episodes import episode_lines, keep_episodes
from fledge.recipes.episodes_page import EPISODES
from fledge.recipes.plan import RingPlan
from fledge.recipes.report import Curve, Fact, Series
from fledge.recipes.stage_corpus import Texts, chats_of, document_numbers, open_texts
from fledge.recipes.stage_text import mixed
from fledge.recipes.training import Context, Keeper, next_token, record_step, save_stage_model, step_flops
from fledge.rl.actors import Actors
from fledge.rl.ppo import PPO, PPOConfig, PretrainMix, Round, World
from fledge.rl.rollout import Episodes, Regions, RewardModelScorer
from fledge.rl.sampler import EngineSampler
from fledge.train.compile import compiled
from fledge.train.metrics import JsonLines
from fledge.types import Metrics

# Four graphs (with and without gradients, two kinds of model) take most of a minute to compile; they save a third.
COMPILED_FROM_EPISODES = 10_000
EPISODES_KEPT = 4  # of every round, token by token, for the page beside the card


def ppo_stage(context: Context) -> None:
    """Rounds of sampling and learning; writes the policy, its moving average and the value model."""
    _align(context, context.plan.ppo)


def control_stage(context: Context) -> None:
    """The same PPO without the pretraining mix: what the mix is worth (Ouyang et al. 2022, section 4.1)."""
    _align(context, without_mix(context.plan).ppo)


def without_mix(plan: RingPlan) -> RingPlan:
    """The plan whose PPO reads no pretraining rows."""
    return replace(plan, ppo=replace(plan.ppo, pretrain_weight=0.0))


def _align(context: Context, plan: PPOConfig) -> None:
    sft, reward, gold = context.model("sft"), context.model("reward"), context.model("gold")
    texts = open_texts(context)
    reward_model, judge = _scalar(reward), _scalar(gold)
    actors = Actors.start(sft.model, reward_model)
    ppo = PPO(plan, actors, _world(context, plan, sft, reward_model, texts))
    saved = load_state(context.path)
    if saved is not None:
        ppo.load(saved[1], saved[2])
    keeper, flops = Keeper(context), _round_flops(context, plan, sft)
    log = JsonLines(context.run / "metrics.jsonl", ppo.round_number, stage=context.name)
    episodes = JsonLines(context.path / EPISODES, ppo.round_number, stage=context.name)
    gold_scorer = RewardModelScorer(judge)
    try:
        with context.interrupts.deferred():
            while ppo.round_number < plan.rounds:
                began = time.perf_counter()
                done = ppo.round()
                metrics = {**done.metrics, "gold_score": _gold_score(gold_scorer, done)}
                tokens = int(done.rollout.action_mask_BT.sum())
                context.add_cost(tokens=tokens, flops=flops, busy_seconds=time.perf_counter() - began)
                record_step(context, log, ppo.round_number, plan.rounds, metrics)
                where = {"stage": context.name, "step": ppo.round_number}
                keep_episodes(episodes, where, episode_lines(done, sft.tokenizer, EPISODES_KEPT))
                keeper.after_step(ppo.round_number, plan.rounds, lambda: (ppo.tensors(), ppo.scalars()))
    finally:
        log.close()
        episodes.close()
    _save(context, ppo, {"reference": sft, "reward": reward})
    context.report = replace(context.report, **_report(context))


def _scalar(loaded: LoadedModel) -> ScalarModel:
    assert isinstance(loaded.model, ScalarModel)
    return loaded.model


def _world(context: Context, plan: PPOConfig, sft: LoadedModel, reward_model: ScalarModel, texts: Texts) -> World:
    found = prompts(
        chats_of(context, "ppo"),
        sft.renderer,
        count=plan.rounds * plan.episodes,
        max_tokens=plan.prompt_length,
        seed=context.plan.seed,
    )
    if not found:
        raise DataError("no conversation for PPO to ask about: add chats, or raise ppo.prompt_length")
    pays = context.compiled and plan.rounds * plan.episodes >= COMPILED_FROM_EPISODES
    regions = Regions(compiled(action_logprobs), compiled(read_scores)) if pays else Regions()
    # The end of turn alone ends an answer; a base model's end of text does not count as one.
    stop_ids = frozenset((sft.renderer.end_id,))
    pad_id = sft.tokenizer.pad_id
    return World(
        prompts=[prompt.ids for prompt in found],
        pad_id=pad_id,
        stop_ids=stop_ids,
        end_id=sft.renderer.end_id,
        sampler=EngineSampler(sft.tokenizer, stop_ids),
        scorer=RewardModelScorer(reward_model, region=regions.scores),
        pretrain=_pretrain_mix(context, texts) if plan.pretrain_weight else None,
        regions=regions,
        dump_folder=context.path,
    )


def _pretrain_mix(context: Context, texts: Texts) -> PretrainMix:
    """Prose and code in the shares they have in the corpus of the code stage."""
    plan = context.plan
    fit = plan.pretrain.fit
    objective = next_token(context, fit, texts.tokenizer)

    def packed(names: tuple[str, ...]) -> PackedRows:
        documents = ShardDocuments(texts.train, document_numbers(texts.train, names))
        return PackedRows(documents, fit.row_length, plan.seed + 3000)

    prose = packed(texts.prose)
    rows: Any = prose
    if texts.code:
        rows = mixed(prose, packed(texts.code), plan.code.code_share)

    def rows_of(step: int, count: int) -> TokenBatch:
        return objective.collate(batch(rows, step, count))

    return PretrainMix(objective, rows_of)


def _gold_score(scorer: RewardModelScorer, done: Round) -> float:
    """The gold judge's mean score of a round's answers (Gao et al. 2022: gold against proxy)."""
    rollout = done.rollout
    episodes = Episodes(
        rollout.tokens_BT,
        rollout.segments_BT,
        rollout.action_mask_BT,
        rollout.sampler_logprobs_BT,
        rollout.action_mask_BT.any(dim=1),
    )
    return float(scorer(episodes).mean())


def _round_flops(context: Context, plan: PPOConfig, sft: LoadedModel) -> float:
    """Arithmetic of a round: four networks forward over all episodes, two of them trained, the pretraining rows."""
    fit = context.plan.pretrain.fit
    trained = step_flops(sft.model, replace(fit, rows=1, row_length=plan.prompt_length + plan.response_length))
    pretraining = step_flops(sft.model, replace(fit, rows=1))
    forward = trained / 3
    per_episode = 5 * forward + 2 * plan.epochs * trained
    rows = plan.steps_per_round * plan.pretrain_rows if plan.pretrain_weight else 0
    return plan.episodes * per_episode + rows * pretraining


def _save(context: Context, ppo: PPO, parents: dict[str, LoadedModel]) -> None:
    tokenizer = parents["reference"].tokenizer
    hashes = {role: loaded.hash for role, loaded in parents.items()}
    policy = save_stage_model(context, ppo.actors.policy, tokenizer, hashes)
    averaged = copy.deepcopy(ppo.actors.policy)
    ppo.ema.copy_to(averaged)
    save_stage_model(context, averaged, tokenizer, {"policy": policy}, name="ema")
    save_stage_model(context, ppo.actors.value, tokenizer, {"reward": hashes["reward"]}, name="value")


def _report(context: Context) -> dict[str, Any]:
    """Proxy and gold score over the distance travelled, and where the run ended."""
    lines = (context.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rounds: list[Metrics] = [r for r in map(json.loads, lines) if r["stage"] == context.name]
    by_distance = sorted(rounds, key=lambda r: r["kl"])
    distance = [max(r["kl"], 0.0) ** 0.5 for r in by_distance]
    series = tuple(
        Series.of(label, distance, [r[name] for r in by_distance])
        for name, label in (("score_mean", "reward model (proxy)"), ("gold_score", "gold judge"))
    )
    last = rounds[-1]
    return {
        "headline": Fact("reward", last["score_mean"] - rounds[0]["score_mean"], "gained"),
        "facts": (
            Fact("episodes", context.plan.ppo.rounds * context.plan.ppo.episodes),
            Fact("KL to the SFT model", last["kl"], "nats an answer"),
            Fact("largest gap between engine and trainer", max(r["sampler_logprob_gap"] for r in rounds), "nats"),
        ),
        "curves": (Curve("Proxy and gold reward", "square root of KL", "score", series),),
    }
