"""What a model's own answers look like: length, whether they end, how varied they are, how far from a reference.

Nothing here judges quality; these figures show collapse and drift early. Sources: Li et al. 2016, section 4.3
(distinct-n); Schulman 2020, "Approximating KL divergence" (k1, k3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fledge.errors import DataError
from fledge.evals.scorer import Scorer
from fledge.types import Completion, Metrics

Tokens = Sequence[int]
Floats = NDArray[np.float64]
Generator = Callable[[Sequence[Tokens]], Sequence[Completion]]
"""Prompts as token ids -> one completion each, drawn at temperature 1 without filters."""

# exp(20) overflows nothing; a token that far off is a bug or lost anyway (the same bound as objectives/kl.py).
MAX_LOG_RATIO = 20.0


def evaluate(generate: Generator, prompts: Sequence[Tokens], *, limit: int | None = None) -> Metrics:
    """Figures of one answer to each of the first `limit` prompts; see `describe`."""
    chosen = prompts[:limit]
    if not chosen:
        raise DataError("no prompts to answer; hold some out")
    return describe(generate(chosen))


def describe(completions: Sequence[Completion]) -> Metrics:
    """`answers`; `share_ended` (stopped by themselves) and `share_empty`; `answer_tokens` and `answer_characters`
    (means; the stop token counts as a token); `entropy` (nats a token: the mean of -log p of what was drawn, which
    estimates the entropy if the draws are at temperature 1 without filters); `distinct_1`, `_2`, `_3` (distinct n-grams
    over all n-grams of all answers, without stop tokens); `share_distinct` (answers that no other answer equals).
    """
    if not completions:
        raise DataError("no answers to describe")
    logprobs = np.concatenate([np.asarray(completion.logprobs, dtype=np.float64) for completion in completions])
    num_answers = len(completions)
    texts = [completion.text for completion in completions]
    said = [completion.ids[:-1] if _has_ended(completion) else completion.ids for completion in completions]
    metrics = {
        "answers": float(num_answers),
        "share_ended": sum(map(_has_ended, completions)) / num_answers,
        "share_empty": sum(not text.strip() for text in texts) / num_answers,
        "share_distinct": len(set(texts)) / num_answers,
        "answer_tokens": sum(len(completion.ids) for completion in completions) / num_answers,
        "answer_characters": sum(map(len, texts)) / num_answers,
        "entropy": -float(logprobs.mean()) if len(logprobs) else 0.0,
    }
    return metrics | {f"distinct_{n}": distinct(said, n) for n in (1, 2, 3)}


def distinct(sequences: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams over all n-grams of `sequences`; 0 where none is n long."""
    grams = [tuple(ids[start : start + n]) for ids in sequences for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def kl_estimates(policy: Sequence[Floats], reference: Sequence[Floats]) -> Metrics:
    """KL(policy || reference) from the log-probabilities of tokens the policy drew: one array of each an answer.

    `kl_k1` (mean of delta = log policy - log reference; unbiased, may be negative) and `kl_k3` (mean of
    exp(-delta) - 1 + delta; unbiased, never negative) in nats a token; `kl_k1_answer` and `kl_k3_answer` in nats
    an answer.
    """
    if not sum(map(len, policy)):
        raise DataError("no answer holds a token; there is nothing to estimate KL from")
    delta = np.concatenate([np.asarray(p) - np.asarray(r) for p, r in zip(policy, reference, strict=True)])
    clamped = np.clip(delta, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    sums = {"kl_k1": float(delta.sum()), "kl_k3": float((np.exp(-clamped) - 1 + clamped).sum())}
    per_token = {name: total / len(delta) for name, total in sums.items()}
    return per_token | {f"{name}_answer": total / len(policy) for name, total in sums.items()}


def evaluate_kl(
    policy: Scorer, reference: Scorer, prompts: Sequence[Tokens], completions: Sequence[Completion]
) -> Metrics:
    """`kl_estimates` over `completions` drawn by `policy` after `prompts`; both models score the very ids drawn.

    Answers without a token are left out.
    """
    pairs = [(p, c.ids) for p, c in zip(prompts, completions, strict=True) if c.ids]
    sequences = [[*prompt, *ids] for prompt, ids in pairs]
    starts = [len(prompt) for prompt, _ in pairs]
    return kl_estimates(policy.logprobs(sequences, starts), reference.logprobs(sequences, starts))


def _has_ended(completion: Completion) -> bool:
    return completion.finish_reason == "stop"
