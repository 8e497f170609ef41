"""Rankings from given answers: the order of makers, honest ties, sizes, and answers cut to fit."""

from __future__ import annotations

import pytest

from fledge.rl.rankings import Answer, Candidates, make_rankings, rank, ranked_ids
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer
from fledge.types import Conversation, Provenance

PROVENANCE = Provenance("test", "0", "CC0")


def candidates(number: int = 0, human: str = "a human wrote this", num: int = 4, **tiers) -> Candidates:
    sft = tiers.get("sft", [f"sft {i}" for i in range(num)])
    base = tiers.get("base", [f"base {i}" for i in range(num)])
    return Candidates(
        Conversation.of(("user", f"question {number}")),
        (
            (Answer(human, "human"),),
            tuple(Answer(text, "sft") for text in sft),
            tuple(Answer(text, "base", ended=False) for text in base),
        ),
        PROVENANCE,
    )


def test_human_beats_sft_beats_base_and_samples_of_one_maker_tie():
    ranking = rank(candidates(), 9)
    assert ranking.makers == ("human", *["sft"] * 4, *["base"] * 4)
    assert ranking.ranks == (1, 2, 2, 2, 2, 6, 6, 6, 6)
    assert ranking.ended == (*[True] * 5, *[False] * 4)
    assert ranking.provenance == PROVENANCE


def test_answers_are_taken_from_the_makers_in_turn():
    assert rank(candidates(), 4).makers == ("human", "sft", "sft", "base")
    assert rank(candidates(), 6).makers == ("human", "sft", "sft", "sft", "base", "base")
    assert rank(candidates(sft=["s"]), 5).makers == ("human", "sft", "base", "base", "base")


def test_identical_texts_tie_at_the_better_place_whoever_wrote_them():
    ranking = rank(candidates(human="same", sft=["same ", "other"], base=["other", "worse"]), 5)
    assert dict(zip(ranking.completions, ranking.ranks, strict=True)) == {
        "same": 1,
        "same ": 1,
        "other": 3,
        "worse": 5,
    }


def test_prompt_with_too_few_answers_or_nothing_but_ties_gives_no_ranking():
    assert rank(candidates(sft=["x"], base=["y"]), 9) is None
    assert rank(candidates(human="x", sft=["x"] * 3, base=["x"] * 3), 9) is None


def test_sizes_vary_from_four_to_nine_and_depend_on_the_prompt_alone():
    many = [candidates(number) for number in range(200)]
    rankings = make_rankings(many, seed=0)
    assert {len(ranking.completions) for ranking in rankings} == {4, 5, 6, 7, 8, 9}
    assert make_rankings(many[50:60], seed=0) == rankings[50:60]
    assert make_rankings(many, seed=1) != rankings


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    texts = ["question 1 a human wrote this sft base other same", "0 1 2 3 4"] * 5
    return ChatRenderer(train_tokenizer(texts, TokenizerConfig(vocab_size=300)))


def test_ranked_ids_are_the_rendered_conversation_cut_after_the_prompt(renderer):
    ranking = rank(candidates(), 5)
    found = ranked_ids(ranking, renderer, prompt_length=64, response_length=64)
    assert found.prompt == renderer.prompt(ranking.prompt)
    whole = renderer.render(ranking.prompt.then("assistant", ranking.completions[0])).ids
    assert found.prompt + found.completions[0] == whole
    assert found.completions[0][-1] == renderer.end_id
    assert found.completions[-1][-1] != renderer.end_id, "an answer that ran out of tokens has no end"
    assert found.ranks == ranking.ranks


def test_answers_that_a_cut_makes_identical_tie(renderer):
    ranking = rank(candidates(human="other one", sft=["other two", "same"], base=["base"]), 4)
    start = len(renderer.tokenizer.encode("other"))
    found = ranked_ids(ranking, renderer, prompt_length=64, response_length=start)
    assert found.completions[0] == found.completions[1]
    assert found.ranks[0] == found.ranks[1] == 1
    assert all(len(completion) <= start for completion in found.completions)


def test_ranking_whose_prompt_does_not_fit_or_whose_order_a_cut_destroys_is_left_out(renderer):
    ranking = rank(candidates(), 5)
    assert ranked_ids(ranking, renderer, prompt_length=2, response_length=64) is None
    same_start = rank(candidates(human="same a", sft=["same b"], base=["same c", "same d"]), 4)
    start = len(renderer.tokenizer.encode("same"))
    assert ranked_ids(same_start, renderer, prompt_length=64, response_length=start) is None
