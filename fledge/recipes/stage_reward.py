"""Stage 7: rankings from real data, the reward model, and the gold judge that is never trained against."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fledge.config import from_json, to_json
from fledge.errors import DataError
from fledge.evals import reward_accuracy
from fledge.files import write_text
from fledge.formats.checkpoint import LoadedModel
from fledge.models.scalar import ScalarModel
from fledge.objectives.ranking import KWiseRanking, RankedIds
from fledge.objectives.scores import read_scores
from fledge.recipes.answers import Asked, base_answers, chat_answers, score_answers
from fledge.recipes.chats import Prompt, prompts
from fledge.recipes.plan import FitPlan
from fledge.recipes.report import Fact, Table
from fledge.recipes.stage_corpus import chats_of
from fledge.recipes.training import Context, Course, chosen, pairs_of, save_stage_model, step_flops, train
from fledge.rl.rankings import Answer, Candidates, make_rankings, ranked_ids
from fledge.train.compile import compiled
from fledge.train.loop import Pairs, TrainState
from fledge.train.metrics import JsonLines
from fledge.types import Metrics, Ranking

COMPILED_FROM_STEPS = 100  # fewer take less time than compiling
# Which conversations each set of rankings asks about: disjoint for the two models, held out for both.
SETS = {"reward": "reward", "gold": "gold", "held_out": "validation"}


def rankings_stage(context: Context) -> None:
    """Sample answers of the SFT and the base model, rank them under the human's, write one JSONL file a set."""
    plan = context.plan.rankings
    sft, base = context.model("sft"), context.model("pretrain")
    asked = {name: _prompts(context, sft, name) for name in SETS}
    work = [(name, start) for name, found in asked.items() for start in range(0, len(found), plan.batch)]
    done = _finished(context)
    log = JsonLines(context.path / "samples.jsonl", len(done), stage=context.name)
    for number, (name, start) in enumerate(work[len(done) :], start=len(done)):
        some = asked[name][start : start + plan.batch]
        seed = context.plan.seed + 7919 * number
        candidates = [to_json(one) for one in _candidates(context, sft, base, some, seed)]
        log.write({"stage": context.name, "step": number + 1, "set": name, "candidates": candidates})
        context.save_cost()
        context.listener.step(context.name, number + 1, len(work), {})
    log.close()
    counts = {name: _write_set(context, name) for name in SETS}
    (context.path / "samples.jsonl").unlink()
    context.report = replace(
        context.report,
        headline=Fact("rankings", sum(counts.values())),
        facts=tuple(Fact(f"rankings, {name.replace('_', ' ')}", count) for name, count in counts.items()),
    )


def reward_stage(context: Context) -> None:
    """The reward model: trained on the set "reward"."""
    _ranking_model(context, "reward", context.plan.seed)


def gold_stage(context: Context) -> None:
    """The gold judge: another seed, other prompts, never trained against."""
    _ranking_model(context, "gold", context.plan.seed + 1)


def read_rankings(context: Context, name: str) -> list[Ranking]:
    # Read as a file, not by `splitlines`: an answer may hold a line break of Unicode's, and JSON leaves it as it is.
    with (context.run / "rankings" / f"{name}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        return [from_json(Ranking, json.loads(line)) for line in lines]


def _prompts(context: Context, sft: LoadedModel, name: str) -> list[Prompt]:
    """Prompts of a set whose human reply fits an answer."""
    plan = context.plan
    count = plan.rankings.held_out if name == "held_out" else plan.rankings.prompts
    chats = chats_of(context, SETS[name])
    found = prompts(chats, sft.renderer, count=2 * count, max_tokens=plan.ppo.prompt_length, seed=plan.seed)
    encode = sft.tokenizer.encode
    fitting = [prompt for prompt in found if len(encode(prompt.reply)) < plan.ppo.response_length]
    if not fitting:
        raise DataError(f"no conversation to ask about for '{name}': add chats, or raise ppo.prompt_length")
    return fitting[:count]


def _candidates(
    context: Context, sft: LoadedModel, base: LoadedModel, some: Sequence[Prompt], seed: int
) -> Iterator[Candidates]:
    """What the human, the SFT model and the base model say to each prompt; counts what the samples cost."""
    plan, length = context.plan.rankings, context.plan.ppo.response_length
    asked = Asked([prompt.conversation for prompt in some], length)
    began = time.perf_counter()
    ours = [chat_answers(sft, asked, seed + i) for i in range(plan.sft_samples)]
    theirs = [base_answers(base, asked, seed + 500 + i) for i in range(plan.base_samples)]
    sampled = sum(len(answer.ids) for answers in (*ours, *theirs) for answer in answers)
    read = sum(len(prompt.ids) for prompt in some) * (plan.sft_samples + plan.base_samples)
    fit = replace(context.plan.pretrain.fit, rows=1, row_length=context.plan.ppo.prompt_length + length)
    flops = (read + sampled) * step_flops(sft.model, fit) / fit.row_length / 3  # forward alone
    context.add_cost(tokens=sampled, flops=flops, busy_seconds=time.perf_counter() - began)
    for place, prompt in enumerate(some):
        tiers = (
            (Answer(prompt.reply, "human"),),
            tuple(Answer(c[place].text, "sft", c[place].finish_reason == "stop") for c in ours),
            tuple(Answer(c[place].text, "base", c[place].finish_reason == "stop") for c in theirs),
        )
        yield Candidates(prompt.conversation, tiers, prompt.provenance)


def _finished(context: Context) -> list[dict[str, Any]]:
    """The batches that an earlier sitting wrote whole, in order."""
    path = context.path / "samples.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _write_set(context: Context, name: str) -> int:
    records = [record for record in _finished(context) if record["set"] == name]
    candidates = [from_json(Candidates, item) for record in records for item in record["candidates"]]
    rankings = make_rankings(candidates, seed=context.plan.seed)
    lines = (json.dumps(to_json(ranking), ensure_ascii=False) + "\n" for ranking in rankings)
    write_text(context.path / f"{name}.jsonl", "".join(lines))
    return len(rankings)


def _ranking_model(context: Context, name: str, seed: int) -> None:
    plan, sft = context.plan.reward, context.model("sft")
    examples = [ids for ranking in read_rankings(context, name) if (ids := _ids(context, sft, ranking)) is not None]
    if not examples:
        raise DataError(f"no ranking of '{name}' has two answers of different rank; raise rankings.prompts")
    generator = torch.Generator().manual_seed(seed)
    model = ScalarModel.from_trunk(sft.info.family, sft.model, generator=generator)
    if plan.epochs > 1:
        warning = f"reward.epochs is {plan.epochs}: reward models overfit beyond one epoch (Ouyang et al. 2022)"
        context.listener.stage(name, "warning", warning)
    per_step = min(plan.prompts_per_step, len(examples))
    fit = _fit_plan(context, num_examples=len(examples), per_step=per_step)
    pays = context.compiled and fit.steps >= COMPILED_FROM_STEPS
    region = compiled(read_scores) if pays else None
    num_rows = -(-per_step // fit.lanes) * context.plan.rankings.completions
    objective = KWiseRanking(fit.row_length, sft.tokenizer.pad_id, num_rows=num_rows, region=region)

    def batches(state: TrainState, step: int) -> Pairs:
        some = [examples[i] for i in chosen(len(examples), per_step, step, seed)]
        return pairs_of(objective, some, fit.lanes)

    train(context, model, Course(fit, batches))
    _normalise(model, examples, sft)
    save_stage_model(context, model, sft.tokenizer, {"sft": sft.hash})
    accuracy = measure_accuracy(context, model, sft)
    context.report = replace(
        context.report,
        headline=Fact("pairs right", accuracy["accuracy"], "%"),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        facts=(Fact("rankings", len(examples)), Fact("epochs", plan.epochs)),
        tables=(accuracy_table(accuracy),),
    )


def _normalise(model: ScalarModel, examples: Sequence[RankedIds], sft: LoadedModel) -> None:
    """Human replies average 0 (Ouyang et al. 2022, section 3.5), and the spread over all answers is 1."""
    best = [(ids.prompt, ids.completions[ids.ranks.index(1)]) for ids in examples]
    everything = [(ids.prompt, completion) for ids in examples for completion in ids.completions]
    mean = score_answers(model, best, sft.tokenizer.pad_id).mean()
    spread = score_answers(model, everything, sft.tokenizer.pad_id).std()
    model.normalise(float(mean), max(float(spread), 1e-6))


def _fit_plan(context: Context, *, num_examples: int, per_step: int) -> FitPlan:
    plan, ppo = context.plan.reward, context.plan.ppo
    steps = max(1, plan.epochs * num_examples // per_step)
    return FitPlan(
        steps=steps,
        rows=per_step * context.plan.rankings.completions,
        row_length=ppo.prompt_length + ppo.response_length,
        optim=plan.optim,
        schedule="cosine",
        warmup=plan.warmup,
        final=plan.final,
        clip_norm=plan.clip_norm,
        lanes=plan.lanes,
    )


def _ids(context: Context, sft: LoadedModel, ranking: Ranking) -> RankedIds | None:
    ppo = context.plan.ppo
    return ranked_ids(ranking, sft.renderer, prompt_length=ppo.prompt_length, response_length=ppo.response_length)


def measure_accuracy(context: Context, model: ScalarModel, sft: LoadedModel) -> Metrics:
    """Pair accuracy on the held-out rankings."""

    def score(rankings: Sequence[Ranking]) -> list[list[float]]:
        rendered = []
        for ranking in rankings:
            prompt = sft.renderer.prompt(ranking.prompt)
            for text, ended in zip(ranking.completions, ranking.ended, strict=True):
                whole = sft.renderer.render(ranking.prompt.then("assistant", text), ended=ended).ids
                rendered.append((prompt, whole[len(prompt) :]))
        scores = iter(score_answers(model, rendered, sft.tokenizer.pad_id).tolist())
        return [[next(scores) for _ in ranking.completions] for ranking in rankings]

    return reward_accuracy.evaluate(score, read_rankings(context, "held_out"), seed=context.plan.seed)


def accuracy_table(accuracy: Metrics) -> Table:
    rows: list[tuple[str, float | None, float | None]] = [("all pairs", accuracy["accuracy"], accuracy["pairs"])]
    for name in sorted(accuracy):
        if name.startswith("accuracy/"):
            label = name.removeprefix("accuracy/")
            rows.append((label, accuracy[name], accuracy[f"pairs/{label}"]))
    matched = accuracy.get("accuracy_length_matched")
    rows.append(("pairs of equal length (within 10 %)", matched, accuracy["pairs_length_matched"]))
    note = (
        f"Calibration error {accuracy['calibration_error']:.3f}; correlation of score and length "
        f"{accuracy['length_correlation']:+.2f}, within a prompt {accuracy['length_correlation_within']:+.2f}."
    )
    return Table.of("Pairs put in the right order, held-out prompts", ("pairs", "right %", "number"), rows, note)
