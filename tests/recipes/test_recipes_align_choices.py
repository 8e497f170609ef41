"""What an alignment run can be told beside its method: soft prompts, who chooses the checkpoint, safety demonstrations,
ensembles of reward models, Python functions as rewards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import align_world as world
import pytest
import torch
from align_world import Killed, Silent

from fledge import cli
from fledge.config import override
from fledge.errors import CheckpointError, ConfigError, DataError, UserError
from fledge.formats.checkpoint import load_model
from fledge.recipes import align_offline
from fledge.recipes.align import AlignOrder, align, plan_of
from fledge.recipes.align_models import own_stages
from fledge.recipes.align_rules import RuleOrder
from fledge.recipes.answers import score_answers
from fledge.synth.rules import rule_text, under_rule
from fledge.text.chat import ChatRenderer
from fledge.text.constitution import load as load_constitution
from fledge.text.prefixed import PrefixedRenderer
from fledge.types import Conversation

SMALL = ("outcome.max_tokens=8", "outcome.prompts=4", "train.fit.batch=4")
SHORT = ("train.prompt_length=30", "train.response_length=8", "outcome.max_tokens=8", "outcome.prompts=4")
GROUPS = (*SHORT, "train.warmup_rounds=1", "train.rounds=2", "train.minibatch=16", "train.prompts=4", "train.group=4")


def order(folder: Path, method: str, data: str, *overrides: str, **others: Any) -> AlignOrder:
    given: dict[str, Any] = {"lr": 1e-2, "name": method, **others}
    return AlignOrder(
        method, "tiny:sft", (folder / f"{data}.jsonl",), overrides=overrides, runs=folder / "runs", **given
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts(run: Path, stage: str) -> dict[str, Any]:
    report = json.loads((run / stage / "report.json").read_text())
    told = [*report["facts"], *([report["headline"]] if report["headline"] else [])]
    return {fact["label"]: fact["value"] for fact in told}


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert cli.main(list(command)) == 0
    return capsys.readouterr().out


# Soft prompts.


def test_a_soft_prompt_learns_and_leaves_every_weight_as_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = order(folder, "sft", "chats", *SMALL, "train.fit.epochs=6", soft_prompt=5, lr=0.1)
    run = align(told, Silent())
    found = facts(run, "outcome")
    assert found["held-out answers, after"] < found["held-out answers, before"] - 0.02  # a frozen model of noise
    assert facts(run, "sft")["parameters trained"] == 5 * 32
    start = load_model(folder / "runs" / "tiny" / "sft" / "model")
    tuned = load_model(run / "sft" / "model", with_soft_prompt=True)
    assert tuned.info.soft_prompt == 5
    assert tuned.info.template_hash == start.info.template_hash
    before, after = start.model.state_dict(), tuned.model.state_dict()
    assert all(torch.equal(before[name], after[f"trunk.{name}"]) for name in before)
    assert tuned.soft_ids == tuple(range(start.tokenizer.vocab_size, start.tokenizer.vocab_size + 5))
    runs = ("--runs", str(folder / "runs"), "--max-tokens", "6", "--temperature", "0")
    assert "do you like tea?" in said(capsys, "compare", "tiny:sft", "sft", "--prompt", "do you like tea?", *runs)
    assert said(capsys, "complete", "sft", "do you", *runs).startswith("do you")


def test_a_soft_prompt_goes_on_to_the_same_bits(folder: Path) -> None:
    told = order(folder, "sft", "chats", *SMALL, "save_seconds=0.0", soft_prompt=3)
    expected = load_model(align(told, Silent()) / "sft" / "model", with_soft_prompt=True).hash
    again = replace(told, name="again")
    with pytest.raises(Killed):
        align(again, Silent("sft", 2))
    assert load_model(align(again, Silent()) / "sft" / "model", with_soft_prompt=True).hash == expected


def test_who_cannot_put_a_soft_prompt_in_front_is_told_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    align(order(folder, "sft", "chats", *SMALL, soft_prompt=3), Silent())
    with pytest.raises(CheckpointError, match="chat, complete and compare"):
        load_model(folder / "runs" / "sft" / "sft" / "model")
    for command in (["export", "sft", str(folder / "out"), "--to", "huggingface"], ["quantize", "sft", "--to", "int8"]):
        assert cli.main([*command, "--runs", str(folder / "runs")]) == 2
        assert "soft prompt of 3 tokens" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="the model it was made from"):
        plan_of(replace(order(folder, "dpo", "pairs"), model="sft"))


@pytest.mark.parametrize(
    ("method", "data", "others", "complaint"),
    [
        ("dpo", "pairs", {"soft_prompt": 3}, "belongs to sft"),
        ("dpo", "pairs", {"select_by": "tiny:gold"}, "belongs to sft"),
        ("sft", "chats", {"soft_prompt": 3, "lora": 2}, "choose one"),
        ("sft", "chats", {"soft_prompt": 0}, "1 token or more"),
    ],
)
def test_what_does_not_go_together_is_refused(
    method: str, data: str, others: dict[str, Any], complaint: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_of(order(folder, method, data, **others))


def test_a_prefixed_renderer_renders_asks_and_parses_as_the_one_beneath(folder: Path) -> None:
    plain = ChatRenderer(load_model(folder / "runs" / "tiny" / "sft" / "model").tokenizer)
    renderer = PrefixedRenderer(plain, (900, 901))
    talk = Conversation.of(("user", "do you like tea?"), ("assistant", "yes i do"))
    rendered = renderer.render(talk)
    assert rendered.ids == (900, 901, *plain.render(talk).ids)
    assert rendered.loss_mask == (False, False, *plain.render(talk).loss_mask)
    assert rendered.ids[: len(renderer.prompt(Conversation(talk.messages[:1])))] == renderer.prompt(
        Conversation(talk.messages[:1])
    )
    assert renderer.parse(rendered.ids) == plain.parse(plain.render(talk).ids)
    assert (renderer.hash, renderer.end_id, renderer.stop_ids) == (plain.hash, plain.end_id, plain.stop_ids)


# Which checkpoint is kept.


def test_the_checkpoint_is_kept_whose_answers_the_reward_model_likes_best(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = ("train.fit.epochs=4", "data.held_out_share=0.4", "save_seconds=0.0")
    told = order(folder, "sft", "chats", *SMALL, *tiny, select_by="tiny:gold", name="all")
    expected = (0.1, 0.9, 0.3, 0.2)
    scores = iter((*expected, 0.0))  # an epoch more may be cut short by the number of steps

    def score(*_: Any) -> torch.Tensor:
        return torch.tensor([next(scores)])

    monkeypatch.setattr("fledge.recipes.align_selection.score_answers", score)
    run = align(told, Silent())
    looks = [json.loads(line) for line in (run / "sft" / "selection.jsonl").read_text().splitlines()]
    assert [look["score"] for look in looks][:4] == pytest.approx(expected)
    assert facts(run, "sft")["kept checkpoint, by reward-model score"] == looks[1]["step"]
    kept = load_model(run / "sft" / "model").hash
    scores = iter((*expected, 0.0))
    with pytest.raises(Killed):
        align(replace(told, name="killed"), Silent("sft", looks[1]["step"] + 1))
    scores = iter((*expected[2:], 0.0))
    assert load_model(align(replace(told, name="killed"), Silent()) / "sft" / "model").hash == kept


def test_c50_a_stop_after_the_choice_and_before_the_end_of_the_stage_loses_no_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = ("train.fit.epochs=4", "data.held_out_share=0.4", "save_seconds=0.0")
    told = order(folder, "sft", "chats", *SMALL, *tiny, select_by="tiny:gold", name="whole")
    liked = {"whole": iter((0.1, 0.9, 0.3, 0.2, 0.0)), "cut": iter((0.1, 0.9, 0.3, 0.2, 0.0, 0.0))}
    looking = ["whole"]
    monkeypatch.setattr(
        "fledge.recipes.align_selection.score_answers", lambda *_: torch.tensor([next(liked[looking[0]])])
    )
    expected = load_model(align(told, Silent()) / "sft" / "model").hash
    looking[0] = "cut"
    saving = align_offline.save_aligned

    def killed(*_: Any, **__: Any) -> str:
        raise Killed

    monkeypatch.setattr(align_offline, "save_aligned", killed)
    with pytest.raises(Killed):
        align(replace(told, name="cut"), Silent())
    monkeypatch.setattr(align_offline, "save_aligned", saving)
    run = align(replace(told, name="cut"), Silent())
    assert load_model(run / "sft" / "model").hash == expected
    assert not list((run / "sft").glob("state-*"))


def test_checkpoints_are_chosen_on_other_prompts_than_the_outcome_measures(folder: Path) -> None:
    told = order(folder, "sft", "chats", *SMALL, "outcome.prompts=1000", select_by="tiny:gold")
    with pytest.raises(DataError, match="no held-out prompt is left"):
        align(told, Silent())


def test_a_real_judge_chooses_and_stands_on_the_card(folder: Path) -> None:
    told = order(folder, "sft", "chats", *SMALL, "data.held_out_share=0.4", select_by="tiny:gold")
    run = align(told, Silent())
    looks = [json.loads(line) for line in (run / "sft" / "selection.jsonl").read_text().splitlines()]
    best = max(looks, key=lambda look: look["score"])
    assert facts(run, "sft")["its reward-model score"] == best["score"]
    card = json.loads((run / "card.json").read_text())
    stage = next(stage for stage in card["stages"] if stage["name"] == "sft")
    assert {"Which checkpoint is kept", "Loss that does not choose"} <= {c["title"] for c in stage["report"]["curves"]}
    outcome = json.loads((run / "outcome" / "report.json").read_text())
    assert outcome["tables"][0]["rows"][0][:2] == ["tiny:gold", "chose the checkpoint"]


# Safety demonstrations.


def refusals(folder: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"harm {q}"}, {"role": "assistant", "content": "no no"}]}
        for q in world.questions()
    ]
    return world.write_rows(folder / "safety.jsonl", rows)


def test_safety_demonstrations_are_a_source_of_their_own(folder: Path) -> None:
    safe = refusals(folder)
    told = order(folder, "sft", "chats", *SMALL, "train.fit.epochs=4", safety=(safe,))
    assert plan_of(told).train.safety_share == 0.1
    run = align(replace(told, overrides=(*told.overrides, "train.safety_share=0.5")), Silent())
    found = facts(run, "outcome")
    assert found["held-out safety demonstrations, after"] < found["held-out safety demonstrations, before"]
    assert found["held-out answers, after"] < found["held-out answers, before"]
    assert facts(run, "sft")["safety demonstrations"] > 30
    split = json.loads((run / "data" / "report.json").read_text())["tables"][0]["rows"]
    assert [row[0] for row in split] == ["train", "held out", "safety, train", "safety, held out"]
    assert split[2][1] + split[3][1] == len(world.questions())


def test_a_share_of_safety_demonstrations_without_any_is_refused(folder: Path) -> None:
    told = order(folder, "sft", "chats", *SMALL, "train.safety_share=0.5")
    with pytest.raises(DataError, match="name their files with --safety"):
        align(told, Silent())
    held_out = world.write_rows(folder / "held.jsonl", [json.loads(refusals(folder).read_text().splitlines()[0])])
    with pytest.raises(DataError, match="--safety"):
        align(replace(told, name="shared", safety=(folder / "safety.jsonl",), held_out=held_out), Silent())


# Ensembles and functions.


def test_members_of_an_ensemble_are_trained_each_in_a_stage_of_its_own(folder: Path) -> None:
    told = order(folder, "reward", "rankings", "train.fit.batch=4", "train.members=3", "save_seconds=0.0")
    assert own_stages(plan_of(told)) == ("reward", "reward-2", "reward-3")
    run = align(told, Silent())
    hashes = [load_model(run / stage / "model").hash for stage in ("reward", "reward-2", "reward-3")]
    assert len(set(hashes)) == 3
    alone = align(order(folder, "reward", "rankings", "train.fit.batch=4", name="alone"), Silent())
    assert load_model(alone / "reward" / "model").hash == hashes[0]
    card = json.loads((run / "card.json").read_text())
    assert [stage["name"] for stage in card["stages"]][:4] == ["data", "reward", "reward-2", "reward-3"]
    again = replace(told, name="killed")
    with pytest.raises(Killed):
        align(again, Silent("reward-2", 2))
    again_run = align(again, Silent())
    assert [load_model(again_run / s / "model").hash for s in ("reward", "reward-2", "reward-3")] == hashes


def test_an_ensemble_rewards_with_its_mean_less_its_spread_and_tells_the_disagreement(folder: Path) -> None:
    both = (("tiny:reward,tiny:gold", 2.0),)
    run = align(order(folder, "grpo", "prompts", *GROUPS, rewards=both, caution=0.5), Silent())
    plan = json.loads((run / "plan.json").read_text())
    assert [member["name"] for member in plan["rewards"][0]["members"]] == ["tiny:reward", "tiny:gold"]
    assert plan["rewards"][0]["caution"] == 0.5
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["reward_disagreement"] > 0 for line in rounds if line["stage"] == "grpo")
    table = json.loads((run / "outcome" / "report.json").read_text())["tables"][0]
    assert table["rows"][0][0] == "tiny:reward,tiny:gold"


def test_a_run_with_several_members_is_named_as_one_reward(folder: Path) -> None:
    align(order(folder, "reward", "rankings", "train.fit.batch=16", "train.members=2", name="judge"), Silent())
    told = order(folder, "grpo", "prompts", rewards=(("judge:reward", 1.0), ("tiny:gold", 0.5)))
    plan = plan_of(told)
    assert [[member.name for member in part.models] for part in plan.rewards] == [
        ["judge:reward", "judge:reward-2"], ["tiny:gold"]
    ]  # fmt: skip
    assert plan.rewards[0].caution == 1.0
    alone = plan_of(replace(told, rewards=(("judge", 1.0),), judge="tiny"))
    assert [member.name for member in alone.rewards[0].models] == ["judge:reward", "judge:reward-2"]
    assert alone.judge is not None
    assert alone.judge.hash == load_model(folder / "runs" / "tiny" / "reward" / "model").hash
    with pytest.raises(ConfigError, match="gold judge must be another"):
        plan_of(replace(told, judge="judge:reward-2"))
    with pytest.raises(ConfigError, match="same weights"):
        plan_of(replace(told, rewards=(("tiny:gold,tiny:gold", 1.0),)))
    with pytest.raises(ConfigError, match="caution"):
        plan_of(replace(told, caution=-1.0))


def test_a_rule_reward_model_is_asked_rule_by_rule_beside_a_preference_model(tmp_path: Path) -> None:
    folder = world.plant(tmp_path, positions=256)
    ids = ("no-threats", "on-topic")
    told = order(
        folder, "grpo", "prompts", *GROUPS,
        rewards=(("tiny:reward", 1.0),), rules=RuleOrder((("tiny:gold", 0.5),), ids),
    )  # fmt: skip
    run = align(told, Silent())
    part = json.loads((run / "plan.json").read_text())["rewards"][1]
    constitution = load_constitution()
    texts = [rule_text(constitution.rule(identity), "en") for identity in ids]
    assert part["options"] == {"constitution": constitution.label, "rules": dict(zip(ids, texts, strict=True))}
    rounds = [line for line in lines_of(run / "metrics.jsonl") if line["stage"] == "grpo"]
    for line in rounds:
        assert line["score_mean"] == pytest.approx(
            line["reward/tiny:reward"] + 0.5 * line["reward/tiny:gold"], abs=1e-4
        )
    start, plain, ruling = (load_model(folder / "runs" / "tiny" / s / "model") for s in ("sft", "reward", "gold"))
    for episode in lines_of(run / "grpo" / "episodes.jsonl"):
        question = next(q for q in world.questions() if q in episode["prompt"])
        talk, said = Conversation.of(("user", question)), episode["tokens"]
        under = [(start.renderer.prompt(under_rule(talk, text)), said) for text in texts]
        expected = float(score_answers(ruling.model, under, start.tokenizer.pad_id).mean()) * 0.5
        expected += float(score_answers(plain.model, [(start.renderer.prompt(talk), said)], start.tokenizer.pad_id))
        assert episode["score"] == pytest.approx(expected, abs=1e-4)
    judges = json.loads((run / "outcome" / "report.json").read_text())["tables"][0]["rows"]
    assert [row[:2] for row in judges] == [["tiny:reward", "trained on"], ["tiny:gold", "trained on"]]


def test_rules_that_cannot_be_asked_about_are_refused(folder: Path) -> None:
    told = order(folder, "grpo", "prompts", *GROUPS, rules=RuleOrder((("tiny:gold", 1.0),), ("no-threats",)))
    assert plan_of(replace(told, rewards=())).rewards[0].kind == "rules"
    with pytest.raises(ConfigError, match="no rule 'no-such'"):
        plan_of(replace(told, rules=RuleOrder((("tiny:gold", 1.0),), ("no-such",))))
    with pytest.raises(ConfigError, match="name it with --rule-reward"):
        plan_of(replace(told, rewards=(("tiny:reward", 1.0),), rules=RuleOrder((), ("no-threats",))))
    with pytest.raises(ConfigError, match="trained against"):
        plan_of(replace(told, judge="tiny:gold"))
    with pytest.raises(UserError, match="does not fit a model of 64 positions"):
        align(told, Silent())  # the rule takes room too


def function_file(folder: Path, body: str) -> Path:
    path = folder / "mine.py"
    path.write_text(f"def short(completion, record):\n    {body}\n", encoding="utf-8")
    return path


def test_a_python_function_is_a_reward_beside_models_and_verifiers(folder: Path) -> None:
    path = function_file(folder, "return -len(completion)")
    told = order(
        folder, "grpo", "prompts", *GROUPS,
        rewards=(("tiny:reward", 0.5),), functions=((f"{path}:short", 2.0),),
        verifiers=(("regex", 1.0, {"pattern": "[a-m]"}),),
    )  # fmt: skip
    run = align(told, Silent())
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in rounds if line["stage"] == "grpo"):
        expected = 0.5 * line["reward/tiny:reward"] + 2 * line["reward/short"] + line["reward/regex"]
        assert line["score_mean"] == pytest.approx(expected, abs=1e-4)
    function_file(folder, "return 0.0")
    assert plan_of(told).rewards[-1].hash != json.loads((run / "plan.json").read_text())["rewards"][-1]["hash"]


def test_a_function_that_raises_is_recorded_and_never_a_score_of_zero(folder: Path) -> None:
    path = function_file(folder, "raise ValueError('broken') if 'e' in completion else KeyError('other')")
    told = order(folder, "grpo", "prompts", *GROUPS, functions=((f"{path}:short", 1.0),))
    with pytest.raises(RuntimeError, match="rewards failed for 100%"):
        align(told, Silent())
    found = [json.loads(line) for line in (folder / "runs/grpo/grpo/failed_rewards.jsonl").read_text().splitlines()]
    assert {record["part"] for record in found} == {"short"}
    for text in ("nowhere.py:short", str(path), f"{path}:1x"):
        with pytest.raises(ConfigError, match=r"expected FILE\.py:NAME"):
            plan_of(replace(told, functions=((text, 1.0),)))


def test_models_are_left_behind_on_the_way_evenly_and_never_last() -> None:
    from fledge.recipes.align_plan import AlignPlan, DataPlan, StartPlan

    plan = AlignPlan("sft", 0, StartPlan("a", "b"), DataPlan((), ""), None, None)
    assert plan.marks(40) == frozenset()
    assert override(plan, ("checkpoints=3",)).marks(40) == {10, 20, 30}
    assert override(plan, ("checkpoints=3",)).marks(2) == {1}
    with pytest.raises(ConfigError, match="checkpoints"):
        override(plan, ("checkpoints=-1",))
