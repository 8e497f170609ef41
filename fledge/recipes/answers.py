"""Asking models for answers, and judges for scores: what rankings, PPO's evaluation and win rates share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fledge.batches import RankingBatch
from fledge.formats.checkpoint import LoadedModel
from fledge.models.scalar import ScalarModel
from fledge.objectives.ranking import last_scores
from fledge.rl.sampler import EngineSampler
from fledge.text.chat import Renderer
from fledge.train.device import precision
from fledge.types import Completion, Conversation, SamplingParams

JUDGED_AT_ONCE = 64


@dataclass(frozen=True)
class Asked:
    """Conversations that end with the user's turn, and how many tokens an answer may have."""

    conversations: Sequence[Conversation]
    max_tokens: int


def chat_answers(loaded: LoadedModel, asked: Asked, seed: int) -> list[Completion]:
    """One answer to each, at temperature 1, ended by the end of turn only."""
    renderer = loaded.renderer
    prompts = [renderer.prompt(conversation) for conversation in asked.conversations]
    return _sampled(loaded, prompts, asked, [renderer.end_id], seed)


def base_answers(loaded: LoadedModel, asked: Asked, seed: int) -> list[Completion]:
    """What a model that knows no chat says: it continues the messages as lines of text, up to the next line."""
    tokenizer = loaded.tokenizer
    lines = ["\n".join(m.text for m in conversation.messages) + "\n" for conversation in asked.conversations]
    prompts = [[tokenizer.end_of_text_id, *ids] for ids in tokenizer.encode_batch(lines)]
    newlines = [i for i in range(tokenizer.vocab_size) if b"\n" in tokenizer.token_bytes(i)]
    return _sampled(loaded, prompts, asked, [tokenizer.end_of_text_id, *newlines], seed)


def score_answers(
    model: ScalarModel, answers: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> torch.Tensor:
    """What a reward model says to each (prompt ids, answer ids), float32; longest first, so that little is padded."""
    rows = [[*prompt, *answer] for prompt, answer in answers]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scores = torch.empty(len(rows))
    for start in range(0, len(rows), JUDGED_AT_ONCE):
        chosen = order[start : start + JUDGED_AT_ONCE]
        scores[chosen] = _scores(model, [rows[i] for i in chosen], pad_id)
    return scores


def judge(model: ScalarModel, renderer: Renderer, asked: Asked, completions: Sequence[Completion]) -> list[float]:
    """Scores of answers given as completions: rendered as the assistant's turn, left open where they were cut."""
    answers = []
    for conversation, completion in zip(asked.conversations, completions, strict=True):
        prompt = renderer.prompt(conversation)
        ended = completion.finish_reason == "stop"
        whole = renderer.render(conversation.then("assistant", completion.text), ended=ended).ids
        answers.append((prompt, whole[len(prompt) : len(prompt) + asked.max_tokens]))
    return [float(score) for score in score_answers(model, answers, renderer.tokenizer.pad_id)]


def _sampled(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], asked: Asked, stop_ids: Sequence[int], seed: int
) -> list[Completion]:
    sampler = EngineSampler(loaded.tokenizer, frozenset(stop_ids))
    with precision(next(loaded.model.parameters()).device):
        params = SamplingParams(max_tokens=asked.max_tokens)
        return sampler(loaded.model, prompts, params, torch.Generator().manual_seed(seed))


@torch.no_grad()
def _scores(model: ScalarModel, rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    device, longest = model.mean.device, max(map(len, rows))
    tokens_NT = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    length_N = torch.tensor([len(row) for row in rows])
    segments_NT = (torch.arange(longest) < length_N[:, None]).int()
    none_N = torch.zeros_like(length_N)
    batch = RankingBatch(tokens_NT, segments_NT, length_N - 1, none_N, none_N, 1)
    with precision(device):
        return last_scores(model, batch.to(device)).float().cpu()
