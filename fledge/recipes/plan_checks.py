"""What a plan names is looked up, and what it asks of its model is compared with what the model reads, before any work.

The types of a plan cannot tell that a source, a family or a benchmark is unknown, or that a row is too long; without
this a run would find out in the stage that needs it, minutes later. Called by raise_.py.
"""

from __future__ import annotations

from typing import Any

from fledge.config import check_range, from_json
from fledge.data.catalogue import source
from fledge.data.multiple_choice import benchmark
from fledge.errors import ConfigError
from fledge.recipes.plan import MAX_SEED, SMALLEST, CorpusPlan, RingPlan
from fledge.registry import FAMILIES, family, load_family
from fledge.rl.ppo import PPOConfig


def check_plan(plan: RingPlan) -> None:
    """`ConfigError` or `DataError`, naming the setting, for a plan that could not be carried out."""
    _check_corpus(plan.corpus)
    for name in plan.evaluation.benchmarks:
        benchmark(name)
    _check_ppo(plan.ppo)
    config = _model_config(plan)
    if config.max_positions is not None:
        _check_lengths(plan, config.max_positions)


def _check_corpus(corpus: CorpusPlan) -> None:
    for setting, names, is_chat in (
        ("prose", corpus.prose, False),
        ("code", corpus.code, False),
        ("chats", corpus.chats, True),
    ):
        for name in names:
            if (source(name).kind == "chat") != is_chat:
                expected = "conversations" if is_chat else "documents"
                raise ConfigError(
                    f"corpus.{setting}: '{name}' holds no {expected}; `fledge data list` shows what each source holds"
                )
    for name, num_bytes in corpus.limits.items():
        source(name)
        if num_bytes < 1:
            raise ConfigError(f"corpus.limits.{name} is {num_bytes}: expected bytes to read, 1 or more")


def _check_ppo(ppo: PPOConfig) -> None:
    """What PPO's own config leaves open, because a loop that is not a plan's may want it."""
    try:
        check_range(ppo, "prompt_length response_length dual_clip", 1)
        check_range(ppo, "clip value_clip clip_norm temperature", SMALLEST)
        check_range(ppo, "pretrain_ratio", 0)
        check_range(ppo, "ema_decay", 0, 1)
        check_range(ppo, "seed", 0, MAX_SEED)
    except ValueError as error:
        raise ConfigError(f"ppo: {error}") from error


def _model_config(plan: RingPlan) -> Any:
    if family(plan.family).kind != "causal":
        known = ", ".join(row.name for row in FAMILIES if row.kind == "causal")
        raise ConfigError(f"family: a '{plan.family}' model cannot be raised; expected one of {known}")
    config_class, _ = load_family(plan.family)
    return from_json(config_class, {**plan.model, "vocab_size": plan.tokenizer.vocab_size}, path="model")


def _check_lengths(plan: RingPlan, longest: int) -> None:
    asked = {
        "pretrain.fit.row_length": plan.pretrain.fit.row_length,
        "code.fit.row_length": plan.code.fit.row_length,
        "sft.fit.row_length": plan.sft.fit.row_length,
        "ppo.prompt_length + ppo.response_length": plan.ppo.prompt_length + plan.ppo.response_length,
    }
    for setting, length in asked.items():
        if length > longest:
            raise ConfigError(f"{setting} is {length}: the model has {longest} positions; shorten it, or give it more")
