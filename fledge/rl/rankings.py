"""Rankings made from data at hand: a human's reply over the SFT model's samples over the base model's samples.

Stands between sampling and the reward model; a pure function of the answers it is given. Where nobody can honestly
say which answer is better they tie: identical texts, and the samples of one maker.

Source: Ouyang et al. 2022 (2203.02155), section 3.4 (K of 4 to 9 answers a prompt); makers stand for labelers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from fledge.objectives.ranking import RankedIds
from fledge.text.chat import Renderer
from fledge.types import Conversation, Provenance, Ranking

MIN_ANSWERS, MAX_ANSWERS = 4, 9  # InstructGPT, section 3.4


@dataclass(frozen=True)
class Answer:
    """`ended` is false if it ran out of tokens; `maker` says who wrote it ("human", "sft", "base")."""

    text: str
    maker: str
    ended: bool = True


@dataclass(frozen=True)
class Candidates:
    """Everything said in reply to one prompt. `tiers` go from best to worst, the answers of a tier tie."""

    prompt: Conversation
    tiers: tuple[tuple[Answer, ...], ...]
    provenance: Provenance


def make_rankings(candidates: Sequence[Candidates], *, seed: int) -> list[Ranking]:
    """One ranking a prompt, its size drawn from 4 to 9; prompts that give none (see `rank`) are left out.

    The draw depends on seed and prompt alone, so more prompts never change the rankings of the others.
    """
    sizes = range(MIN_ANSWERS, MAX_ANSWERS + 1)
    ranked = (rank(one, sizes[_number(one.prompt, seed) % len(sizes)]) for one in candidates)
    return [ranking for ranking in ranked if ranking is not None]


def rank(candidates: Candidates, size: int) -> Ranking | None:
    """The ranking of at most `size` answers, taken from the tiers in turn.

    None if there are fewer than four answers, or if all of them tie.
    """
    in_turn = [(tier, answer) for row in zip_longest(*candidates.tiers) for tier, answer in enumerate(row) if answer]
    chosen = sorted(in_turn[:size], key=lambda pair: pair[0])
    best_tier_of: dict[str, int] = {}
    for tier, answer in chosen:
        best_tier_of.setdefault(answer.text.strip(), tier)
    tiers = [best_tier_of[answer.text.strip()] for _, answer in chosen]
    if len(chosen) < MIN_ANSWERS or len(set(tiers)) < 2:
        return None
    return Ranking(
        prompt=candidates.prompt,
        completions=tuple(answer.text for _, answer in chosen),
        ranks=tuple(1 + sum(other < tier for other in tiers) for tier in tiers),
        ended=tuple(answer.ended for _, answer in chosen),
        makers=tuple(answer.maker for _, answer in chosen),
        provenance=candidates.provenance,
    )


def ranked_ids(ranking: Ranking, renderer: Renderer, *, prompt_length: int, response_length: int) -> RankedIds | None:
    """A ranking as tokens, answers cut at `response_length`; those that a cut makes identical tie.

    None if the prompt does not fit `prompt_length`, or if no two answers of different rank are left.
    """
    prompt = renderer.prompt(ranking.prompt)
    best_rank_of: dict[tuple[int, ...], int] = {}
    completions = []
    for text, rank_, ended in zip(ranking.completions, ranking.ranks, ranking.ended, strict=True):
        rendered = renderer.render(ranking.prompt.then("assistant", text), ended=ended).ids
        ids = rendered[len(prompt) : len(prompt) + response_length]
        if ids:
            completions.append(ids)
            best_rank_of[ids] = min(rank_, best_rank_of.get(ids, rank_))
    ranks = tuple(best_rank_of[ids] for ids in completions)
    if len(prompt) > prompt_length or len(set(ranks)) < 2:
        return None
    return RankedIds(prompt, tuple(completions), ranks)


def _number(prompt: Conversation, seed: int) -> int:
    """64 bits that depend on the seed and on what the prompt says."""
    said = "\x00".join(f"{m.role}\x01{' '.join(m.text.casefold().split())}" for m in prompt.messages)
    return int.from_bytes(hashlib.sha256(f"{seed}\x00{said}".encode()).digest()[:8], "big")
