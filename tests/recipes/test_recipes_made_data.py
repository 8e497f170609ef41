"""Data that a model makes, end to end: the files that come out are what `fledge align` learns from."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import align_world as world
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "synth"))
from align_world import Silent
from scripted import Scripted

from fledge.data import interchange
from fledge.errors import DataError, RunError
from fledge.files import write_json
from fledge.formats.checkpoint import load_model, save_model
from fledge.recipes.align import AlignOrder, align
from fledge.recipes.made_data import (
    Maker,
    Wanted,
    load_maker,
    make_instructions,
    make_labels,
    make_revisions,
    make_rule_labels,
    measure_agreement,
    prompts_of,
    rule_rankings,
    speaks_chat,
    take,
)
from fledge.synth.answering import AnswerConfig, draw_answers
from fledge.synth.constitutional import LabelConfig, RevisionConfig
from fledge.synth.generating import Ask
from fledge.synth.instruct_texts import ENGLISH
from fledge.synth.rules import RuleConfig
from fledge.synth.self_instruct import SelfInstructConfig
from fledge.text.constitution import load
from fledge.types import PairExample, UnpairedExample

CONSTITUTION = load()
SENTENCE = "river stone candle harbour tailor orchard violin glacier market lantern bridge sparrow praise defend"
WORDS = SENTENCE.split()


def speak(ask: Ask) -> str:
    """New tasks, answers and revisions: whatever a prompt of ours asks for."""
    draw = random.Random(ask.params.seed)
    if ask.prompt.startswith(ENGLISH.propose):
        return f" {' '.join(draw.sample(WORDS, 6))}\nTask 10: Draw a map of the town today"
    if ask.prompt.startswith(ENGLISH.decide):
        return "No"
    if ask.prompt.startswith(ENGLISH.input_first):
        return "Output: yes yes"
    return draw.choice(["yes i do", "no i do not"]) if ask.prompt.endswith("Assistant:") else "yes i do"


def likes_yes(prompt: str, continuation: str) -> float:
    """Finds the answer that says yes better, a little also what stands first; "no" breaks every rule."""
    if "(A)" in prompt:
        return (3.0 if "(A) yes" in prompt else -3.0) + 0.5 if continuation == " (A)" else 0.0
    is_bad = "Assistant: no" in prompt
    asks_broken = "break this rule" in prompt
    return 2.0 if (continuation == " yes") == (is_bad == asks_broken) else -2.0


def maker(reply: Callable[[Ask], str] = speak, name: str = "m 1") -> Maker:
    return Maker(name, Scripted(reply, likes_yes), True)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.plant(tmp_path_factory.mktemp("world"), positions=128)


def aligned(folder: Path, method: str, data: Path, name: str) -> Path:
    tiny = ("outcome.max_tokens=4", "outcome.prompts=2", "data.held_out_share=0.3", "train.fit.batch=4")
    order = AlignOrder(
        method, "tiny:sft", (data,), overrides=tiny, runs=folder / "runs", name=name, lr=1e-2, skip_bad=True
    )
    return align(order, Silent())


def test_instructions_that_were_made_are_learned_from(planted: Path, tmp_path: Path) -> None:
    config = SelfInstructConfig(target=12, requests=2, patience=5)
    report = make_instructions(maker(), None, tmp_path / "made", config, Silent(), skip_bad=False)
    assert report["instructions"]["kept"] == 12
    assert report["instructions"]["dropped"]["needs more than text"] > 0
    assert json.loads((tmp_path / "made" / "report.json").read_text()) == report
    run = aligned(planted, "sft", tmp_path / "made" / "tasks.jsonl", "instructed")
    assert load_model(run / "sft" / "model").info.stage == "sft"


def test_the_work_of_one_model_is_not_gone_on_with_by_another(tmp_path: Path) -> None:
    config = SelfInstructConfig(target=2, requests=1)
    make_instructions(maker(), None, tmp_path, config, Silent(), skip_bad=False)
    with pytest.raises(RunError, match="other work"):
        make_instructions(maker(name="m 2"), None, tmp_path, config, Silent(), skip_bad=False)


def prompts(folder: Path) -> Path:
    return folder / "prompts.jsonl"


def test_revisions_are_demonstrations_for_sft(planted: Path, tmp_path: Path) -> None:
    taken = take(Wanted((prompts(planted),), limit=24))
    report = make_revisions(maker(), taken, CONSTITUTION, tmp_path, RevisionConfig(revisions=2), Silent())
    assert report["demonstrations"] == report["prompts"] == 24
    assert 0 < report["answers that revision changed"] < 1
    assert sum(report["principles"].values()) == 48
    assert report["constitution"] == CONSTITUTION.label
    examples = list(interchange.read(tmp_path / "demonstrations.jsonl"))
    assert CONSTITUTION.label in examples[0].provenance.source
    run = aligned(planted, "sft", tmp_path / "demonstrations.jsonl", "revised")
    facts = json.loads((run / "outcome" / "report.json").read_text())["facts"]
    held_out = {fact["label"]: fact["value"] for fact in facts}
    assert held_out["held-out answers, after"] < held_out["held-out answers, before"]


@pytest.mark.parametrize("thinking", [False, True])
def test_labels_are_soft_targets_for_dpo_and_reward_models(thinking: bool, planted: Path, tmp_path: Path) -> None:
    taken = take(Wanted((prompts(planted),)))
    configs = (LabelConfig(labeler="", thinking=thinking), AnswerConfig())
    report = make_labels((maker(), maker(name="other 2")), taken, CONSTITUTION, tmp_path, configs, Silent())
    assert report["dropped"]["both answers are the same"] + report["labels"] == len(world.questions())
    assert report["metrics"]["label_consistency"] == 1.0
    pairs = [pair for pair in interchange.read(tmp_path / "labels.jsonl") if isinstance(pair, PairExample)]
    assert len(pairs) == report["labels"] > 10
    for pair in pairs:
        assert pair.chosen == "yes i do"
        assert 0.5 < pair.probability <= (0.6 if thinking else 1.0)
        assert pair.judgement is not None
        assert (pair.judgement.kind, pair.judgement.labeler) == ("ai", "m 1")
        assert pair.judgement.policy_version == "other 2"
        assert CONSTITUTION.version in str(pair.judgement.grounds)
    if not thinking:
        for method in ("dpo", "reward"):
            run = aligned(planted, method, tmp_path / "labels.jsonl", f"labelled-{method}")
            assert load_model(run / method / "model").info.stage == method


def test_pairs_that_people_have_judged_are_judged_again_and_agreement_is_told(planted: Path, tmp_path: Path) -> None:
    rows = [
        {"type": "pair", "prompt": [{"role": "user", "content": q}], "labeler": who, "kind": "human",
         "completions": ["yes i do", "no i do not"] if n % 4 or who == "ann" else ["no i do not", "yes i do"]}
        for n, q in enumerate(world.questions())
        for who in ("ann", "bea")
    ]  # fmt: skip
    human = world.write_rows(tmp_path / "human.jsonl", rows)
    configs = (LabelConfig(labeler=""), AnswerConfig())
    report = make_labels(
        (maker(), maker()), take(Wanted((human,), limit=40)), CONSTITUTION, tmp_path, configs, Silent()
    )
    assert report["pairs given"] == report["labels"] == 40
    found = measure_agreement(take(Wanted((human, tmp_path / "labels.jsonl"))), 0)
    assert found["agreement_human_human"] == pytest.approx(0.75)
    assert 0.8 < found["agreement_human_ai"] < 1
    assert found["agreement/ann~m 1"] == 1.0
    with pytest.raises(DataError, match="none judged by two"):
        measure_agreement(take(Wanted((tmp_path / "labels.jsonl",), limit=5)), 0)


def test_rules_are_judged_one_by_one_and_make_a_rule_reward_model(planted: Path, tmp_path: Path) -> None:
    taken = take(Wanted((planted / "verdicts.jsonl",)))
    rules = tuple(rule.id for rule in CONSTITUTION.rules[:2])
    configs = (RuleConfig("", rules=rules), AnswerConfig())
    report = make_rule_labels((maker(), maker()), taken, CONSTITUTION, tmp_path, configs, Silent())
    answers = 2 * len(world.questions())
    assert report["answers judged"] == answers
    assert report["labels"] == 2 * answers
    assert report["rankings"] == answers
    labels = [one for one in interchange.read(tmp_path / "labels.jsonl") if isinstance(one, UnpairedExample)]
    assert all(one.is_desirable == (one.completion == "yes i do") for one in labels)
    assert all(one.prompt.messages[0].role == "system" for one in labels)
    run = aligned(planted, "reward", tmp_path / "rule_rankings.jsonl", "ruled")
    report = json.loads((run / "outcome" / "report.json").read_text())
    assert report["headline"]["value"] > 0.7


def test_answers_that_all_keep_a_rule_make_no_ranking(planted: Path) -> None:
    taken = take(Wanted((planted / "verdicts.jsonl",)))
    good = [e for e in taken.examples if isinstance(e, UnpairedExample) and e.is_desirable]
    assert rule_rankings(good) == []
    assert len(rule_rankings([e for e in taken.examples if isinstance(e, UnpairedExample)])) == len(good)


def test_answers_are_the_same_after_a_kill(planted: Path, tmp_path: Path) -> None:
    some = prompts_of(take(Wanted((prompts(planted),), limit=9)).examples)
    config = AnswerConfig(batch=2)
    expected = draw_answers(Scripted(speak), some, config)
    with pytest.raises(KeyboardInterrupt):
        draw_answers(Scripted(speak, dies_after=9), some, config, tmp_path / "answers.jsonl")
    left = Scripted(speak)
    assert draw_answers(left, some, config, tmp_path / "answers.jsonl") == expected
    assert len(left.asked) == 18 - 8


def test_what_is_no_text_is_left_out_and_counted(planted: Path, tmp_path: Path) -> None:
    taken = take(Wanted((prompts(planted),), limit=4))
    says = maker(lambda ask: "a\x00b" if "tea" in ask.prompt and "see" not in ask.prompt else "yes i do")
    report = make_revisions(says, taken, CONSTITUTION, tmp_path, RevisionConfig(revisions=1), Silent())
    assert report["dropped"]["what was said is no text"] == 3
    assert report["demonstrations"] == 1


def test_files_without_a_prompt_are_refused(tmp_path: Path) -> None:
    texts = world.write_rows(tmp_path / "texts.jsonl", [{"text": "all about tea"}])
    with pytest.raises(DataError, match="no prompt in it"):
        take(Wanted((texts,)))


def test_a_base_model_goes_on_with_texts_and_a_chat_model_is_asked(planted: Path, tmp_path: Path) -> None:
    chat = load_model(planted / "runs" / "tiny" / "sft" / "model")
    assert speaks_chat(chat)
    info = json.loads((chat.directory / "run.json").read_text())
    from dataclasses import replace

    base = replace(chat.info, stage="pretrain")
    save_model(tmp_path / "runs" / "base" / "pretrain" / "model", chat.model, chat.tokenizer, base)
    write_json(tmp_path / "runs" / "base" / "plan.json", {})
    write_json(tmp_path / "runs" / "base" / "pretrain" / "manifest.json", {})
    assert info["stage"] == "sft"
    assert not load_maker("base", tmp_path / "runs").is_chat
    assert load_maker("base", tmp_path / "runs", "chat").is_chat
    with pytest.raises(RunError, match="writes nothing"):
        load_maker("tiny:reward", planted / "runs")
