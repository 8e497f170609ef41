"""`fledgling`: the ring of pocket with more of everything. An evening on two cores, minutes on a GPU."""

from __future__ import annotations

from dataclasses import replace

from fledge.recipes.plan import RingPlan, SFTPlan
from fledge.recipes.pocket import continued, pocket

DEPTH = 6  # 8 takes 8 hours and a half on two cores
VOCAB_SIZE = 8192
TABLE_ROWS = 16_384  # keeps the weights under 60 MB in half precision


def fledgling(depth: int | None = None) -> RingPlan:
    """Half as deep again as pocket, three times its tokens, ten times its PPO, more prompts and held-out questions."""
    depth = DEPTH if depth is None else depth
    plan = pocket(depth)
    corpus = replace(plan.corpus, prose=("wikipedia", "recipes"), chats=("chitchat", "chatterbot"))
    ppo = replace(
        plan.ppo, rounds=100, episodes=128, prompt_length=96, response_length=64, warmup_rounds=5, ema_decay=0.98
    )
    return replace(
        plan,
        recipe="fledgling",
        model={**plan.model, "table_rows": TABLE_ROWS},
        corpus=corpus,
        tokenizer=replace(plan.tokenizer, vocab_size=VOCAB_SIZE),
        sft=SFTPlan(continued(depth, share=0.2, rate=0.2)),
        rankings=replace(plan.rankings, prompts=1500, held_out=300),
        ppo=ppo,
        evaluation=replace(plan.evaluation, prompts=400, benchmarks=("piqa", "openbookqa", "siqa")),
        control=True,
    )
