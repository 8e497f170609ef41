"""Episodes kept for a person to read: every token of an answer with its KL, value and advantage, whole characters."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fledge.batches import Rollout
from fledge.recipes.episodes import episode_lines, keep_episodes, pieces
from fledge.rl.world import Round
from fledge.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from fledge.train.metrics import JsonLines
from fledge.types import Completion

PROMPT = 6  # the fixed width of prompts, which stand at its right


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["do you like tea?", "yes i do"] * 4, TokenizerConfig(vocab_size=280))


def done(tokenizer: Tokenizer, answer: str, *, score: float = 1.5) -> Round:
    """A round of one episode: a prompt of two tokens, padded on the left, and an answer that ends."""
    prompt = tuple(tokenizer.encode("do"))[:2]
    ids = (*tokenizer.encode(answer), tokenizer.special_id("<|end|>"))
    width = PROMPT + len(ids) + 3
    shape = (1, width)
    tokens, segments, mask = (
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int32),
        torch.zeros(shape),
    )
    tokens[0, PROMPT - len(prompt) : PROMPT + len(ids)] = torch.tensor([*prompt, *ids])
    segments[0, PROMPT - len(prompt) : PROMPT + len(ids)] = 1
    mask[0, PROMPT : PROMPT + len(ids)] = 0.0 if math.isnan(score) else 1.0
    places = torch.arange(width, dtype=torch.float32)[None]
    rollout = Rollout(
        tokens_BT=tokens, segments_BT=segments, action_mask_BT=mask, old_logprobs_BT=-places,
        reference_logprobs_BT=-2 * places, old_values_BT=places / 10, rewards_BT=torch.zeros(shape),
        advantages_BT=places * mask, returns_BT=torch.zeros(shape), scores_B=torch.tensor([score]),
        sampler_logprobs_BT=-places, policy_version=0,
    )  # fmt: skip
    return Round({}, [prompt], [Completion(answer, ids, tuple(-1.0 for _ in ids), "stop")], rollout)


def test_every_token_of_the_answer_has_its_figures_and_none_of_the_prompt_has(tokenizer: Tokenizer) -> None:
    [line] = episode_lines(done(tokenizer, "yes i do"), tokenizer, 4)
    count = len(line["tokens"])
    places = [float(PROMPT + n) for n in range(count)]
    assert line["kl"] == places  # -t + 2t
    assert line["advantages"] == places
    assert line["values"] == pytest.approx([place / 10 for place in places])
    assert "".join(line["pieces"]) == "yes i do<|end|>"
    assert (line["prompt"], line["answer"], line["score"], line["ended"]) == ("do", "yes i do", 1.5, True)


def test_an_episode_whose_reward_could_not_be_had_is_shown_without_a_score(tokenizer: Tokenizer) -> None:
    [line] = episode_lines(done(tokenizer, "yes", score=math.nan), tokenizer, 4)
    assert line["score"] is None
    assert "".join(line["pieces"]) == "yes<|end|>"
    assert set(line["advantages"]) == {0.0}


def test_a_method_without_a_value_function_keeps_no_values(tokenizer: Tokenizer) -> None:
    made = done(tokenizer, "yes")
    plain = replace(made, rollout=replace(made.rollout, old_values_BT=torch.zeros_like(made.rollout.old_values_BT)))
    assert episode_lines(plain, tokenizer, 1)[0]["values"] == []
    assert episode_lines(made, tokenizer, 0) == []


def test_bytes_of_one_character_are_shown_as_one(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("天 ok")
    assert len(ids) > 3  # three bytes, which this tokenizer has not joined
    found = pieces(ids, tokenizer)
    assert "".join(found) == "天 ok"
    assert found[:3] == ["", "", "天"]
    assert pieces(ids[:2], tokenizer)[-1] == "\N{REPLACEMENT CHARACTER}"


def test_lines_of_a_round_are_kept_under_their_step(tokenizer: Tokenizer, tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "episodes.jsonl", stage="ppo")
    keep_episodes(log, {"stage": "ppo", "step": 3}, episode_lines(done(tokenizer, "yes"), tokenizer, 4))
    log.close()
    assert '"step": 3' in (tmp_path / "episodes.jsonl").read_text()
