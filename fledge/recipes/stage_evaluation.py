"""Stage 9: what the whole run came to, on text and prompts that no stage has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from fledge.data.multiple_choice import questions
from fledge.data.package import cache_home
from fledge.data.shards import Shards
from fledge.evals import bits_per_byte, generation, multiple_choice, win_rate
from fledge.evals.scorer import CausalScorer, NGramScorer
from fledge.formats.checkpoint import LoadedModel
from fledge.models.ngram import fit_orders
from fledge.models.scalar import ScalarModel
from fledge.recipes.answers import Asked, base_answers, chat_answers, judge
from fledge.recipes.chats import Prompt, prompts
from fledge.recipes.measure import set_aside
from fledge.recipes.report import Answer, Bars, Cell, Claim, Fact, Interval, Sample, Table
from fledge.recipes.stage_corpus import (
    Texts,
    chats_of,
    document_numbers,
    open_texts,
    validation_texts,
)
from fledge.recipes.stage_reward import measure_accuracy
from fledge.recipes.stage_text import language_of
from fledge.recipes.training import Context
from fledge.types import Completion, Metrics

BASE_STAGES, CHAT_STAGES = ("pretrain", "code"), ("sft", "ppo")
STAGES = (*BASE_STAGES, *CHAT_STAGES)
MARGIN = 0.10  # how far below the best Kneser-Ney model the base model must lie


def evaluation_stage(context: Context) -> None:
    """Bits per byte beside Kneser-Ney, win rates by the gold judge, answers after every stage."""
    texts = open_texts(context)
    stages = (*STAGES, "control") if context.plan.control else STAGES
    models = {name: context.model(name) for name in stages}
    context.listener.step(context.name, 1, 5, {})
    language = {name: language_of(context, name, loaded.model, texts) for name, loaded in models.items()}
    context.listener.step(context.name, 2, 5, {})
    ngrams = _kneser_ney(context, texts)
    context.listener.step(context.name, 3, 5, {})
    found, answers = _answers(context, models)
    context.listener.step(context.name, 4, 5, {})
    wins = _win_rates(context, models["sft"], found, answers)
    manners = _manners(context, models, found, answers)
    context.listener.step(context.name, 5, 5, {})
    last = wins["ppo over sft"]
    context.report = replace(
        context.report,
        headline=Fact("PPO wins over SFT", last["win_rate"], "%"),
        claims=(*_language_claims(language["pretrain"], ngrams, texts), _win_claim(last)),
        bars=(_language_bars(language, ngrams),),
        tables=(
            _language_table(language, ngrams, texts),
            _win_table(wins),
            _manners_table(manners),
            _judges_table(context, models["sft"]),
            *_benchmark_table(context, models),
        ),
        samples=_samples(context, found, answers),
    )


def _kneser_ney(context: Context, texts: Texts) -> dict[str, Metrics]:
    """Interpolated Kneser-Ney of every order on the very documents the base model was trained on."""
    documents = _training_documents(texts.train, texts)
    tokenizer, held_out = texts.tokenizer, validation_texts(context, texts.prose)
    measured = {}
    counted = fit_orders(documents, context.plan.evaluation.orders, tokenizer.vocab_size)
    for order, model in counted.items():
        scorer = NGramScorer(model)
        measured[f"Kneser-Ney {order}-gram"] = bits_per_byte.evaluate(scorer, held_out, tokenizer)
    return measured


def _training_documents(shards: Shards, texts: Texts) -> list[Any]:
    return [shards.document(int(number)) for number in document_numbers(shards, texts.prose)]


def _answers(context: Context, models: dict[str, LoadedModel]) -> tuple[list[Prompt], dict[str, list[Completion]]]:
    """Held-out prompts and one answer of every stage to each, with the same seeds."""
    plan, sft = context.plan, models["sft"]
    found = prompts(
        chats_of(context, "validation"),
        sft.renderer,
        count=plan.evaluation.prompts,
        max_tokens=plan.ppo.prompt_length,
        seed=plan.seed + 1,
    )
    asked = Asked([prompt.conversation for prompt in found], plan.ppo.response_length)
    answers = {}
    for name, loaded in models.items():
        answer = base_answers if name in BASE_STAGES else chat_answers
        answers[name] = answer(loaded, asked, plan.seed)
    return found, answers


def _win_rates(
    context: Context, sft: LoadedModel, found: Sequence[Prompt], answers: dict[str, list[Completion]]
) -> dict[str, Metrics]:
    """Each stage over the one before, judged by the gold model, which scores every answer on its own."""
    gold = context.model("gold").model
    assert isinstance(gold, ScalarModel)
    asked = Asked([prompt.conversation for prompt in found], context.plan.ppo.response_length)
    scores = {name: judge(gold, sft.renderer, asked, said) for name, said in answers.items()}
    measured = {}
    compared = [*pairwise(STAGES), ("sft", "control")] if "control" in answers else list(pairwise(STAGES))
    for before, after in compared:
        measured[f"{after} over {before}"] = win_rate.evaluate_scores(
            (scores[after], scores[before]),
            [c.text for c in answers[after]],
            [c.text for c in answers[before]],
            seed=context.plan.seed,
            num_resamples=context.plan.evaluation.resamples,
        )
    return measured


def _manners(
    context: Context, models: dict[str, LoadedModel], found: Sequence[Prompt], answers: dict[str, list[Completion]]
) -> dict[str, Metrics]:
    """Length, entropy, share of answers that end, and the distance of PPO from SFT."""
    measured = {name: generation.describe(said) for name, said in answers.items()}
    ids = [prompt.ids for prompt in found]
    row_length = len(max(ids, key=len)) + context.plan.ppo.response_length
    scorers = [_scorer(models[name], row_length) for name in ("ppo", "sft")]
    measured["ppo"] |= generation.evaluate_kl(scorers[0], scorers[1], ids, answers["ppo"])
    if "control" in models:
        control = _scorer(models["control"], row_length)
        measured["control"] |= generation.evaluate_kl(control, scorers[1], ids, answers["control"])
    return measured


def _scorer(loaded: LoadedModel, row_length: int) -> CausalScorer:
    model: Any = loaded.model
    return CausalScorer(model, row_length=row_length, pad_id=loaded.tokenizer.pad_id)


def _language_claims(base: Metrics, ngrams: dict[str, Metrics], texts: Texts) -> tuple[Claim, ...]:
    ours = base.get("bits_per_byte/without_code", base["bits_per_byte"])
    best = min(metrics["bits_per_byte"] for metrics in ngrams.values())
    text = f"bits per byte on held-out prose at least {MARGIN:.0%} below the best Kneser-Ney model ({best:.3f})"
    return (Claim(text, ours, "<=", best * (1 - MARGIN), "bits per byte"),)


def _win_claim(wins: Metrics) -> Claim:
    return Claim("lower bound of PPO's win rate over SFT, gold judge", wins["win_rate_low"], ">", 0.5, "%")


def _language_table(language: dict[str, Metrics], ngrams: dict[str, Metrics], texts: Texts) -> Table:
    columns = ("model", "prose", *texts.prose, *texts.code)
    rows: list[tuple[Any, ...]] = []
    for name, metrics in {**ngrams, **language}.items():
        prose = metrics.get("bits_per_byte/without_code", metrics["bits_per_byte"])
        rows.append((name, prose, *(metrics.get(f"bits_per_byte/{s}") for s in (*texts.prose, *texts.code))))
    note = "Kneser-Ney models are trained on the same documents of prose with the same tokenizer."
    return Table.of("Bits per byte on held-out text", columns, rows, note)


def _language_bars(language: dict[str, Metrics], ngrams: dict[str, Metrics]) -> Bars:
    """The base model beside the n-grams that read the same documents."""
    found = {name: metrics["bits_per_byte"] for name, metrics in ngrams.items()}
    base = language["pretrain"]
    found["ours"] = base.get("bits_per_byte/without_code", base["bits_per_byte"])
    values = {"held-out prose": list(found.values())}
    return Bars.of("Held-out prose, against Kneser-Ney", "bits per byte", list(found), values)


def _win_table(wins: dict[str, Metrics]) -> Table:
    rows = []
    for name, m in wins.items():
        plain = Interval(m["win_rate"], m["win_rate_low"], m["win_rate_high"], 0.5)
        key = "win_rate_length_controlled"
        controlled = Interval(m[key], m[f"{key}_low"], m[f"{key}_high"], 0.5)
        rows.append((name, plain, controlled, m["ties"], m["length_difference"]))
    columns = ("stages", "wins %", "wins at equal length %", "ties", "characters more")
    note = "Judged by the gold model, which no stage was trained against; ties count half; 95 % bootstrap intervals."
    return Table.of("Win rate of each stage over the one before", columns, rows, note)


def _manners_table(manners: dict[str, Metrics]) -> Table:
    names = ("answer_tokens", "share_ended", "entropy", "distinct_2", "kl_k1_answer")
    columns = ("stage", "tokens", "ended %", "entropy, nats a token", "distinct bigrams %", "KL to SFT, nats an answer")
    rows = [(stage, *(metrics.get(name) for name in names)) for stage, metrics in manners.items()]
    return Table.of("How the stages answer", columns, rows)


def _judges_table(context: Context, sft: LoadedModel) -> Table:
    rows = []
    for name in ("reward", "gold"):
        model = context.model(name).model
        assert isinstance(model, ScalarModel)
        accuracy = measure_accuracy(context, model, sft)
        interval = Interval(accuracy["accuracy"], accuracy["accuracy_low"], accuracy["accuracy_high"], 0.5)
        rows.append((name, interval, accuracy.get("accuracy_length_matched"), accuracy["calibration_error"]))
    columns = ("model", "pairs right %", "of equal length %", "calibration error")
    return Table.of("Reward model and gold judge on held-out rankings", columns, rows)


def _benchmark_table(context: Context, models: dict[str, LoadedModel]) -> tuple[Table, ...]:
    """Zero-, one- and few-shot multiple choice by likelihood, if the plan names benchmarks."""
    plan = context.plan.evaluation
    row_length = context.plan.pretrain.fit.row_length
    rows: list[tuple[Cell, ...]] = []
    for name in plan.benchmarks:
        asked, examples = set_aside(questions(name, cache=cache_home()))
        for stage, loaded in models.items():
            any_model: Any = loaded.model
            scorer = CausalScorer(any_model, row_length=row_length, pad_id=loaded.tokenizer.pad_id)
            measured = [
                multiple_choice.evaluate(
                    scorer,
                    asked,
                    examples,
                    loaded.tokenizer,
                    num_shots=shots,
                    seed=context.plan.seed,
                    limit=plan.benchmark_limit,
                )
                for shots in plan.shots
            ]
            cells = (Interval(m["accuracy"], m["accuracy_low"], m["accuracy_high"], m["chance"]) for m in measured)
            rows.append((name, stage, measured[0]["chance"], *cells))
    if not rows:
        return ()
    columns = ("benchmark", "stage", "chance %", *(f"{shots}-shot %" for shots in plan.shots))
    note = "Accuracy by likelihood; 95 % bootstrap intervals; the mark is chance."
    return (Table.of("Multiple choice", columns, rows, note),)


def _samples(context: Context, found: Sequence[Prompt], answers: dict[str, list[Completion]]) -> tuple[Sample, ...]:
    shown = range(min(context.plan.evaluation.prompts_shown, len(found)))
    return tuple(
        Sample(
            "\n".join(f"{m.role}: {m.text}" for m in found[i].conversation.messages),
            tuple(Answer(stage, said[i].text, said[i].finish_reason == "stop") for stage, said in answers.items()),
        )
        for i in shown
    )
