"""Constitutional AI: chains of critique and revision, soft labels by known answers, and resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted

from fledge.errors import ConfigError, DataError, RunError
from fledge.synth.constitutional import (
    Candidates,
    LabelConfig,
    RevisionConfig,
    label,
    revise,
    soft_label,
)
from fledge.synth.generating import Ask
from fledge.text.constitution import load
from fledge.types import Conversation, PromptExample, Provenance

ORIGIN = Provenance("s", "1", "MIT")
CONSTITUTION = load()
PROMPTS = [PromptExample(Conversation.of(("user", f"question {n}")), ORIGIN) for n in range(5)]
CONFIG = RevisionConfig(revisions=2, batch=2)
LABELS = LabelConfig(labeler="m1")
QUESTION = Conversation.of(("system", "be kind"), ("user", "how?"))


def reply(ask: Ask) -> str:
    """Says which turn it is, and of which question."""
    last = ask.prompt.rsplit("\n\n", 1)[1]
    number = ask.prompt.split("question ")[1][0]
    if last == "Assistant:":
        return f" first {number}"
    return f" fault {number}" if last == "Critique:" else f" better {number} by {ask.params.seed % 1000}"


def test_an_answer_is_criticised_and_revised_and_the_revision_is_criticised_next() -> None:
    model = Scripted(reply)
    chains = revise(model, PROMPTS, CONSTITUTION, CONFIG)
    assert [chain.answer for chain in chains] == [f"first {n}" for n in range(5)]
    chain = chains[3]
    assert [step.critique for step in chain.steps] == ["fault 3"] * 2
    assert all(step.revision.startswith("better 3 by ") for step in chain.steps)
    assert chain.steps[0].revision != chain.steps[1].revision
    principle = CONSTITUTION.principle(chain.steps[1].principle).en
    last = [ask.prompt for ask in model.asked if "question 3" in ask.prompt][-1]
    assert last == (
        f"Human: question 3\n\nAssistant: {chain.steps[0].revision}\n\nCritique Request: {principle.critique}\n\n"
        f"Critique: fault 3\n\nRevision Request: {principle.revision}\n\nRevision:"
    )
    shown = chain.demonstration(CONSTITUTION.label)
    assert shown.conversation.messages[-1].text == chain.steps[1].revision
    assert [message.is_learned for message in shown.conversation.messages] == [False, True]
    assert CONSTITUTION.label in shown.provenance.source


def test_chains_do_not_depend_on_their_batch_and_principles_vary() -> None:
    one_by_one = revise(Scripted(reply), PROMPTS, CONSTITUTION, replace(CONFIG, batch=1))
    assert revise(Scripted(reply), PROMPTS, CONSTITUTION, replace(CONFIG, batch=5)) == one_by_one
    many = [PromptExample(Conversation.of(("user", f"question {n % 10}")), ORIGIN) for n in range(60)]
    drawn = {step.principle for chain in revise(Scripted(reply), many, CONSTITUTION, CONFIG) for step in chain.steps}
    assert drawn == {principle.id for principle in CONSTITUTION.principles}


def test_an_empty_revision_keeps_the_answer_and_an_empty_answer_drops_the_prompt() -> None:
    silent = Scripted(lambda ask: " first" if ask.prompt.endswith("Assistant:") and "question 0" in ask.prompt else "")
    [chain] = revise(silent, PROMPTS, CONSTITUTION, CONFIG)
    assert [step.revision for step in chain.steps] == ["first", "first"]


@pytest.mark.parametrize(("lives", "left"), [(0, 25), (10, 15), (12, 15), (24, 5), (25, 0)])
def test_a_killed_revision_goes_on_where_it_stopped(lives: int, left: int, tmp_path: Path) -> None:
    expected = revise(Scripted(reply), PROMPTS, CONSTITUTION, CONFIG)
    dying = Scripted(reply, dies_after=lives)
    path = tmp_path / "chains.jsonl"
    try:
        revise(dying, PROMPTS, CONSTITUTION, CONFIG, path)
    except KeyboardInterrupt:
        assert lives < 25
    again = Scripted(reply)
    assert revise(again, PROMPTS, CONSTITUTION, CONFIG, path) == expected
    assert len(again.asked) == left
    with pytest.raises(RunError, match="prompts differ"):
        revise(again, PROMPTS[::-1], CONSTITUTION, CONFIG, path)


def test_chinese_chains_are_asked_for_in_chinese() -> None:
    model = Scripted(lambda ask: "好")
    revise(model, PROMPTS[:1], CONSTITUTION, replace(CONFIG, language="zh"))
    assert model.asked[0].prompt == "用户: question 0\n\n助手:"
    assert "批评要求: 请具体指出" in model.asked[1].prompt


# Labels.


def two(first: str = "kind", second: str = "rude") -> Candidates:
    return Candidates(QUESTION, (first, second), ORIGIN)


def judge(liking: float, bias: float) -> Scripted:
    """Log-odds of (A): `liking` if (A) is the kind answer, minus it otherwise, and `bias` for the first place."""

    def odds(prompt: str, continuation: str) -> float:
        if continuation == " (B)":
            return -3.0
        return -3.0 + bias + (liking if "(A) kind" in prompt else -liking)

    return Scripted(lambda ask: "thought", odds)


def test_the_label_is_the_normalised_probability_of_a_against_b() -> None:
    labelled = label(judge(math.log(3), 0.0), [two()], CONSTITUTION, LABELS)
    [pair] = labelled.pairs
    assert (pair.chosen, pair.rejected) == ("kind", "rude")
    assert pair.probability == pytest.approx(0.75)
    assert pair.judgement is not None
    assert (pair.judgement.kind, pair.judgement.labeler) == ("ai", "m1")
    assert pair.judgement.grounds is not None
    assert pair.judgement.grounds.startswith(f"{CONSTITUTION.label} / ")
    assert pair.prompt == QUESTION


@settings(max_examples=40, deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5), st.booleans())
def test_a_liking_for_the_first_place_cancels_whatever_its_strength(
    liking: float, bias: float, is_swapped: bool
) -> None:
    candidates = two("rude", "kind") if is_swapped else two()
    labelled = label(judge(liking, bias), [candidates], CONSTITUTION, LABELS)
    [pair] = labelled.pairs
    of_kind = pair.probability if pair.chosen == "kind" else 1 - pair.probability
    assert of_kind == pytest.approx(1 / (1 + math.exp(-liking)), abs=1e-9)
    assert labelled.metrics["label_position_bias"] == pytest.approx(bias, abs=1e-9)


def test_orders_that_disagree_are_reported() -> None:
    assert label(judge(1.0, 0.5), [two()], CONSTITUTION, LABELS).metrics["label_consistency"] == 1
    assert label(judge(0.5, 1.0), [two()], CONSTITUTION, LABELS).metrics["label_consistency"] == 0


def test_under_a_chain_of_thought_labels_are_clamped_and_thoughts_kept() -> None:
    model = judge(9.0, 0.0)
    labelled = label(model, [two(), two("rude", "kind")], CONSTITUTION, replace(LABELS, thinking=True))
    assert [pair.probability for pair in labelled.pairs] == [0.6, 0.6]
    assert [pair.chosen for pair in labelled.pairs] == ["kind", "kind"]
    assert labelled.pairs[0].judgement is not None
    assert labelled.pairs[0].judgement.rationale == "thought\n\nthought"
    assert all("step by step: thought\n\nThe better answer is:" in prompt for prompt in model.scored)
    assert soft_label([math.log(0.55 / 0.45)], (0.4, 0.6)) == pytest.approx(0.55)
    assert soft_label([-800.0], None) == 0.0
    assert soft_label([800.0], None) == 1.0


def test_several_principles_are_averaged_in_log_odds_and_named() -> None:
    config = replace(LABELS, principles=3)
    [pair] = label(judge(1.0, 0.3), [two()], CONSTITUTION, config).pairs
    assert pair.probability == pytest.approx(1 / (1 + math.exp(-1)))
    assert pair.judgement is not None
    assert pair.judgement.grounds is not None
    assert len(pair.judgement.grounds.split(" / ")[1].split(", ")) == 3


@pytest.mark.parametrize("lives", [0, 4, 7, 20])
def test_killed_labelling_goes_on_where_it_stopped(lives: int, tmp_path: Path) -> None:
    candidates = [two("kind", f"rude {n}") for n in range(5)]
    config = replace(LABELS, batch=2)
    expected = label(judge(1.0, 0.1), candidates, CONSTITUTION, config)
    dying = judge(1.0, 0.1)
    dying.lives = lives
    try:
        label(dying, candidates, CONSTITUTION, config, tmp_path / "labels.jsonl")
    except KeyboardInterrupt:
        assert lives < 10
    again = judge(1.0, 0.1)
    assert label(again, candidates, CONSTITUTION, config, tmp_path / "labels.jsonl") == expected
    assert len(again.scored) == max(0, 10 - lives // 4 * 4)


def test_equal_answers_broken_models_and_senseless_settings_are_refused() -> None:
    with pytest.raises(DataError, match="different answers"):
        label(judge(1, 0), [two("a", "a")], CONSTITUTION, LABELS)
    with pytest.raises(DataError, match="not numbers"):
        label(Scripted(odds=lambda p, c: float("nan")), [two()], CONSTITUTION, LABELS)
    with pytest.raises(ConfigError, match="clamp"):
        LabelConfig("m", clamp=(0.6, 0.7))
    with pytest.raises(ConfigError, match="not 99"):
        label(judge(1, 0), [two()], CONSTITUTION, replace(LABELS, principles=99))
    with pytest.raises(ConfigError, match="no principles"):
        revise(Scripted(), PROMPTS, replace(CONSTITUTION, principles=()), CONFIG)
