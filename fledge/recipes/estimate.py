"""What a plan would take on this machine: time, memory and FLOPs of every stage, without running any of them.

Rates are measured on the spot on the plan's own model: a few training steps at the plan's shape (compiled if the run
would be), a few eager ones, some decoding, some counting. They are kept in FLEDGE_HOME/rates, by machine, versions and
plan, so that asking again is instant. A download, if one is needed, is not counted.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fledge.batches import TokenBatch
from fledge.config import config_hash, from_json, to_json
from fledge.data.catalogue import source
from fledge.data.filters import document_key
from fledge.data.folder import num_bytes
from fledge.data.multiple_choice import benchmark
from fledge.data.package import cache_home
from fledge.errors import ConfigError, UserError
from fledge.files import write_json
from fledge.models.ngram import fit_orders
from fledge.objectives.next_token import NextToken, next_token_sums
from fledge.recipes.plan import FitPlan, RingPlan
from fledge.recipes.ring import versions
from fledge.recipes.stage_ppo import COMPILED_FROM_EPISODES, without_mix
from fledge.recipes.stage_reward import COMPILED_FROM_STEPS
from fledge.recipes.training import initialised, step_flops
from fledge.rl.sampler import EngineSampler
from fledge.rl.world import split_rows
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer
from fledge.train.compile import compiled, resolve
from fledge.train.device import default_device, memory_bytes, raise_malloc_thresholds
from fledge.train.loop import Pairs, train_step
from fledge.train.optim import OptimizerSet
from fledge.types import SamplingParams

BYTES_PER_TOKEN = 3.6  # English with a vocabulary of a few thousand tokens; the corpus stage measures the real figure
QUESTION_TOKENS = 40  # a question of the benchmarks and one of its choices, so tokenized
PROBE_STEPS, PROBE_WARMUP = 16, 4  # the first ones share the cores with the compiler's own processes
FORWARD_PROBES = 3
PROBE_TOKENS = 200_000  # for counting n-grams
BASE_BYTES = 420 << 20  # interpreter, torch, tokenizer and the corpus index, before any model
SERIAL_SECONDS = 1.5  # what every stage spends on loading, hashing and writing, beside its work


@dataclass(frozen=True)
class Rates:
    """Seconds of one unit of work on this machine."""

    document_seconds: float  # filtering and hashing 1 kB of text
    step_seconds: float  # one pretraining step at the plan's shape
    compile_seconds: float  # the first such step
    eager_token_seconds: float  # forward and backward, a token
    forward_token_seconds: float
    decode_seconds: float  # one token for each of `ppo.episodes` rows
    count_seconds: float  # one token through the n-gram counts


@dataclass(frozen=True)
class StageEstimate:
    stage: str
    work: str
    seconds: float
    bytes: float
    flops: float


def estimate(plan: RingPlan) -> list[StageEstimate]:
    """One row a stage, and the total last. Takes up to a minute the first time, to measure."""
    rates = measured_rates(plan)
    rows = [*_reading(plan, rates), *_learning(plan, rates), *_aligning(plan, rates)]
    total = StageEstimate(
        "total", "", sum(r.seconds for r in rows), max(r.bytes for r in rows), sum(r.flops for r in rows)
    )
    return [*rows, total]


def measured_rates(plan: RingPlan) -> Rates:
    """From the cache if this machine has measured this plan before; `ConfigError` if it cannot hold the model."""
    key = config_hash({"plan": to_json(plan), "versions": versions(), "processor": platform.processor()})
    path = cache_home() / "rates" / f"{key[:32]}.json"
    if path.is_file():
        try:
            return from_json(Rates, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, UserError):
            path.unlink()
    _refuse_too_large(plan)
    rates = _measure(plan)
    write_json(path, asdict(rates))
    return rates


def _refuse_too_large(plan: RingPlan) -> None:
    """Measuring takes as much memory as training: more than there is would end in the kernel's killing us."""
    model = initialised(plan, plan.tokenizer.vocab_size, device="meta")
    needed, there = _training_bytes(plan, model, plan.pretrain.fit), memory_bytes()
    if needed > there:
        raise ConfigError(
            f"pretraining this plan takes about {needed / 2**30:.0f} GiB and this machine has {there / 2**30:.0f}; "
            "give a smaller --depth, or plan it on a larger machine"
        )


def _measure(plan: RingPlan) -> Rates:
    raise_malloc_thresholds()
    device = default_device()
    torch.manual_seed(plan.seed)
    model = initialised(plan, plan.tokenizer.vocab_size).to(device)
    compiles = resolve(plan.compile, None, device)
    fit = plan.pretrain.fit
    step_seconds, first_seconds = _step_seconds(model, fit, compiles=compiles)
    eager = _step_seconds(model, fit, compiles=False)[0] if compiles else step_seconds
    positions = fit.rows * fit.row_length
    return Rates(
        document_seconds=_timed(_document_work),
        step_seconds=step_seconds,
        compile_seconds=max(0.0, first_seconds - step_seconds) if compiles else 0.0,
        eager_token_seconds=eager / positions,
        forward_token_seconds=_forward_seconds(model, fit) / positions,
        decode_seconds=_decode_seconds(model, plan),
        count_seconds=_timed(lambda: _count_work(plan)) / PROBE_TOKENS,
    )


def _step_seconds(model: nn.Module, fit: FitPlan, *, compiles: bool) -> tuple[float, float]:
    """(median seconds of a step, seconds of the first)."""
    objective = NextToken(fit.row_length, 1, compiled(next_token_sums) if compiles else next_token_sums)
    optimizers = OptimizerSet(model, fit.optim)
    taken = []
    for number in range(PROBE_WARMUP + PROBE_STEPS):
        parts = split_rows(_random_batch(model, fit, number), -(-fit.rows // fit.lanes))
        pairs: Pairs = [(objective, part) for part in parts]
        taken.append(_timed(lambda pairs=pairs: train_step(model, optimizers, pairs, lanes=fit.lanes)))  # type: ignore[misc]
    return float(np.median(taken[PROBE_WARMUP:])), taken[0]


def _random_batch(model: nn.Module, fit: FitPlan, seed: int) -> TokenBatch:
    """Tokens of a Zipf-like law: how many rows of the tables a batch touches decides what a step costs."""
    any_model: Any = model
    shape = (fit.rows, fit.row_length)
    drawn = np.random.default_rng(seed).zipf(1.2, size=shape) % any_model.vocab_size
    tokens_BT = torch.from_numpy(drawn)
    ones_BT = torch.ones(shape)
    return TokenBatch(tokens_BT, tokens_BT.roll(-1, 1), ones_BT, ones_BT.int())


@torch.no_grad()
def _forward_seconds(model: nn.Module, fit: FitPlan) -> float:
    any_model: Any = model
    batch = _random_batch(model, fit, 0).to(next(model.parameters()).device)
    objective = NextToken(fit.row_length, 1)
    return min(_timed(lambda: objective.loss(any_model, batch)) for _ in range(FORWARD_PROBES))


def _decode_seconds(model: nn.Module, plan: RingPlan) -> float:
    """Of one step for a round's episodes; the pass over the prompts is part of it."""
    prompts = [[2 + place % 200] * (plan.ppo.prompt_length // 2) for place in range(plan.ppo.episodes)]
    params = SamplingParams(max_tokens=plan.ppo.response_length)
    tokenizer = train_tokenizer(["any"], TokenizerConfig(vocab_size=300))  # what a token says costs nothing here
    sampler = EngineSampler(tokenizer, frozenset())

    def decode() -> object:
        return sampler(model, prompts, params, torch.Generator().manual_seed(0))

    return min(_timed(decode) for _ in range(2)) / plan.ppo.response_length


def _document_work() -> object:
    """A thousandth of the filters' work on a megabyte: hashing, normalising, splitting."""
    text = "The quick brown fox jumps over the lazy dog, again and again. " * 16
    return [document_key(text) for _ in range(100)]


def _count_work(plan: RingPlan) -> object:
    drawn = np.random.default_rng(0).zipf(1.3, size=PROBE_TOKENS) % plan.tokenizer.vocab_size
    return fit_orders(np.array_split(drawn, 1000), plan.evaluation.orders, plan.tokenizer.vocab_size)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _reading(plan: RingPlan, rates: Rates) -> list[StageEstimate]:
    text = _text_bytes(plan, (*plan.corpus.prose, *plan.corpus.code, *plan.corpus.chats))
    documents = _text_bytes(plan, (*plan.corpus.prose, *plan.corpus.code))
    memory = BASE_BYTES + 12 * text
    kilobytes = text / 1000
    corpus = SERIAL_SECONDS + FILTERS_PER_HASH * rates.document_seconds / 100 * kilobytes
    tokenizer = SERIAL_SECONDS + TOKENIZING_PER_HASH * rates.document_seconds / 100 * (kilobytes + documents / 1000)
    return [
        StageEstimate("corpus", f"{text / 1e6:.1f} MB of text", corpus, memory, 0.0),
        StageEstimate("tokenizer", f"{plan.tokenizer.vocab_size:,} tokens", tokenizer, memory, 0.0),
    ]


# Measured once beside `_document_work` (docs/log.md): how many times the hash of a text the whole of its reading takes.
FILTERS_PER_HASH, TOKENIZING_PER_HASH = 12.0, 10.0


def _learning(plan: RingPlan, rates: Rates) -> list[StageEstimate]:
    model = initialised(plan, plan.tokenizer.vocab_size, device="meta")
    held_out = _text_bytes(plan, (*plan.corpus.prose, *plan.corpus.code)) / BYTES_PER_TOKEN
    held_out *= plan.corpus.filters.validation_share
    measuring = {"pretrain": 0.5, "code": 2.0, "sft": 0.0}  # passes over the held-out text
    rows = []
    for name, fit in (("pretrain", plan.pretrain.fit), ("code", plan.code.fit), ("sft", plan.sft.fit)):
        ratio = fit.rows * fit.row_length / (plan.pretrain.fit.rows * plan.pretrain.fit.row_length)
        seconds = SERIAL_SECONDS + fit.steps * rates.step_seconds * ratio
        seconds += rates.compile_seconds if name == "pretrain" else 0.0
        seconds += measuring[name] * held_out * rates.forward_token_seconds
        work = f"{fit.tokens / 1e6:.2f} M tokens in {fit.steps:,} steps"
        flops = fit.steps * step_flops(model, fit)
        rows.append(StageEstimate(name, work, seconds, _training_bytes(plan, model, fit), flops))
    return rows


def _aligning(plan: RingPlan, rates: Rates) -> list[StageEstimate]:
    model = initialised(plan, plan.tokenizer.vocab_size, device="meta")
    ppo, rankings = plan.ppo, plan.rankings
    length = ppo.prompt_length + ppo.response_length
    forward_flops = step_flops(model, replace(plan.pretrain.fit, rows=1, row_length=length)) / 3
    asked = 2 * rankings.prompts + rankings.held_out
    sampling = rates.decode_seconds * ppo.response_length / ppo.episodes  # one answer
    samples = asked * (rankings.completions - 1)
    sampled = StageEstimate(
        "rankings",
        f"{samples:,} answers to {asked:,} prompts",
        SERIAL_SECONDS + samples * sampling,
        _training_bytes(plan, model, plan.pretrain.fit),
        samples * forward_flops,
    )
    return [
        sampled,
        *_judging(plan, rates, model),
        _ppo("ppo", plan, rates, model, sampling),
        *([_ppo("control", without_mix(plan), rates, model, sampling)] if plan.control else []),
        _evaluating(plan, rates, model, sampling),
    ]


def _judging(plan: RingPlan, rates: Rates, model: nn.Module) -> list[StageEstimate]:
    """Reward model and gold judge: every ranked answer once forward and backward, then scored twice."""
    length = plan.ppo.prompt_length + plan.ppo.response_length
    answers = plan.rankings.prompts * plan.rankings.completions * plan.reward.epochs
    fit = replace(plan.pretrain.fit, rows=plan.reward.prompts_per_step * plan.rankings.completions, row_length=length)
    steps = max(1, plan.rankings.prompts // plan.reward.prompts_per_step) * plan.reward.epochs
    speed = (
        1.0
        if steps < COMPILED_FROM_STEPS
        else rates.step_seconds / (rates.eager_token_seconds * plan.pretrain.fit.rows * plan.pretrain.fit.row_length)
    )
    seconds = answers * length * (rates.eager_token_seconds * speed + 1.2 * rates.forward_token_seconds)
    flops = answers * step_flops(model, replace(fit, rows=1))
    memory = _training_bytes(plan, model, fit)
    work = f"{answers:,} ranked answers"
    return [StageEstimate(name, work, SERIAL_SECONDS + seconds, memory, flops) for name in ("reward", "gold")]


def _ppo(name: str, plan: RingPlan, rates: Rates, model: nn.Module, sampling: float) -> StageEstimate:
    ppo, fit = plan.ppo, plan.pretrain.fit
    length = ppo.prompt_length + ppo.response_length
    episodes = ppo.rounds * ppo.episodes
    pretraining = ppo.rounds * ppo.steps_per_round * ppo.pretrain_rows if ppo.pretrain_weight else 0
    trained = 2 * ppo.epochs * episodes * length + pretraining * fit.row_length
    speed = 1.0 if episodes < COMPILED_FROM_EPISODES else 0.7
    seconds = episodes * sampling + speed * trained * rates.eager_token_seconds
    seconds += 5 * episodes * length * rates.forward_token_seconds
    flops = trained * step_flops(model, replace(fit, rows=1)) / fit.row_length * 4 / 3
    rows = max(ppo.forward_rows, ppo.pretrain_rows)
    memory = 1.3 * _training_bytes(plan, model, replace(fit, rows=rows))
    return StageEstimate(name, f"{episodes:,} episodes in {ppo.rounds} rounds", SERIAL_SECONDS + seconds, memory, flops)


def _evaluating(plan: RingPlan, rates: Rates, model: nn.Module, sampling: float) -> StageEstimate:
    fit, stages = plan.pretrain.fit, 5 if plan.control else 4
    tokens = _text_bytes(plan, (*plan.corpus.prose, *plan.corpus.code)) / BYTES_PER_TOKEN
    held_out = stages * tokens * plan.corpus.filters.validation_share
    choices = stages * _choice_tokens(plan)
    prose = _text_bytes(plan, plan.corpus.prose) / BYTES_PER_TOKEN
    answers = stages * plan.evaluation.prompts
    read = held_out * 1.5 + choices
    seconds = read * rates.forward_token_seconds + prose * rates.count_seconds + answers * sampling
    flops = (held_out + choices) * step_flops(model, replace(fit, rows=1)) / fit.row_length / 3
    memory = BASE_BYTES + (stages + 1) * _model_bytes(model) + 100 * prose
    work = f"{held_out / 1e3:.0f} k held-out tokens"
    if choices:
        work += f", {choices / 1e6:.0f} M of multiple choice"
    return StageEstimate("evaluation", work, SERIAL_SECONDS + seconds, memory, flops)


def _choice_tokens(plan: RingPlan) -> float:
    """What one model reads of the benchmarks: every choice after its question and the solved examples, cut to a row."""
    row_length, asked = plan.pretrain.fit.row_length, plan.evaluation
    each = sum(min(row_length, (1 + shots) * QUESTION_TOKENS) for shots in asked.shots)
    found = [benchmark(name) for name in asked.benchmarks]
    questions = [min(test.num_questions, asked.benchmark_limit or test.num_questions) for test in found]
    return float(each * sum(count * test.num_choices for count, test in zip(questions, found, strict=True)))


def _text_bytes(plan: RingPlan, names: Sequence[str]) -> float:
    """Of these sources and the user's folder."""
    sizes = [plan.corpus.limits.get(name, round(source(name).megabytes * 1e6)) for name in names]
    if plan.corpus.text is not None:
        sizes.append(num_bytes(Path(plan.corpus.text)))
    return float(sum(sizes))


def _model_bytes(model: nn.Module) -> float:
    return 4.0 * sum(parameter.numel() for parameter in model.parameters())


def _training_bytes(plan: RingPlan, model: nn.Module, fit: FitPlan) -> float:
    """Weights, two moments, activations and logits with their gradients."""
    any_model: Any = model
    config = any_model.config
    positions = fit.rows * fit.row_length
    activations = positions * (3 * config.vocab_size + 40 * config.num_layers * config.width) * 4.0
    return float(BASE_BYTES + 3.2 * _model_bytes(model) + activations)
