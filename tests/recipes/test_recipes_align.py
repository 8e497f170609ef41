"""`fledge align`, method by method, on a tiny model: what a run leaves, that it goes on, what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import align_world as world
import pytest
import torch
from align_world import Killed, Silent

from fledge import cli
from fledge.errors import ConfigError, DataError, RunError, TrainingHalted, UserError
from fledge.formats.checkpoint import load_model
from fledge.formats.peft import load_adapter
from fledge.recipes import align_rl
from fledge.recipes.align import METHODS, AlignOrder, align, plan_of
from fledge.recipes.align_data import Cut, answer_ids
from fledge.recipes.align_models import load_scorer, refuse_padding_that_ends, require_unchanged, weights_digest
from fledge.recipes.align_rl import GoldWatch
from fledge.recipes.runs import resolve_model
from fledge.types import Conversation

SHORT = ("train.prompt_length=30", "train.response_length=8", "outcome.max_tokens=8", "outcome.prompts=4")
ROUNDS = ("train.warmup_rounds=1", "train.rounds=2")
GROUPS = (*SHORT, *ROUNDS, "train.minibatch=16", "train.prompts=4", "train.group=4")
REWARDED: dict[str, Any] = {"rewards": (("tiny:reward", 1.0),)}
# What each method is ordered with: its data, what else it needs, and overrides that make it tiny.
ORDERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "sft": ("chats", {}, ("outcome.max_tokens=8", "train.fit.batch=4")),
    "reward": ("rankings", {}, ()),
    "dpo": ("pairs", {}, ("outcome.max_tokens=8",)),
    "ipo": ("pairs", {"lora": 4}, ("outcome.max_tokens=8",)),
    "kto": ("verdicts", {}, ("outcome.max_tokens=8", "train.fit.batch=32")),
    "ppo": ("prompts", REWARDED, (*SHORT, *ROUNDS, "train.episodes=16")),
    "grpo": ("prompts", {**REWARDED, "judge": "tiny:gold", "lora": 4}, (*GROUPS, "judge.every=1")),
    "rloo": ("prompts", REWARDED, GROUPS),
    "best-of-n": ("prompts", REWARDED, (*SHORT, "train.samples=4", "train.fit.batch=1")),
    "feedme": ("chats", REWARDED, (*SHORT, "train.rounds=2", "train.prompts=4", "train.samples=4", "train.steps=2")),
}


def order(folder: Path, method: str, *overrides: str, **others: Any) -> AlignOrder:
    name, needs, tiny = ORDERS[method]
    given: dict[str, Any] = {"lr": 1e-2, **needs, **others}
    data = given.pop("data", (folder / f"{name}.jsonl",))
    return AlignOrder(
        method, "tiny:sft", data, overrides=(*tiny, *overrides), runs=folder / "runs", name=method, **given
    )


def lines(run: Path, stage: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["stage"] == stage]


def weights(run: Path) -> dict[str, str]:
    """The hash of every model of a run."""
    infos = sorted(run.glob("*/*/run.json"))
    return {str(path.relative_to(run)): json.loads(path.read_text())["files"]["model.safetensors"] for path in infos}


def test_every_method_is_tried_here() -> None:
    assert set(ORDERS) == {method.name for method in METHODS}


@pytest.mark.parametrize("method", ORDERS)
def test_a_method_leaves_a_model_a_card_and_lineage_and_goes_on_to_the_same_bits(method: str, folder: Path) -> None:
    start = load_model(folder / "runs" / "tiny" / "sft" / "model")
    run = align(order(folder, method, "save_seconds=0.0"), Silent())
    found = load_model(run / method / "model")
    assert found.hash != start.hash
    assert found.info.template_hash == start.info.template_hash
    assert start.hash in found.info.parents.values()
    assert load_model(folder / "runs" / "tiny" / "sft" / "model").hash == start.hash
    card = json.loads((run / "card.json").read_text())
    assert next(stage["name"] for stage in card["stages"]) == "data"
    assert {stage["state"] for stage in card["stages"]} == {"finished"}
    expected = weights(run)
    shutil.rmtree(run)
    with pytest.raises(Killed):
        align(order(folder, method, "save_seconds=0.0"), Silent(method, 2))
    assert list((run / method).glob("state-*"))
    again = Silent()
    align(order(folder, method, "save_seconds=0.0"), again)
    assert f"{method} resumed " in again.heard
    assert weights(run) == expected


def test_c51_dpo_begins_at_ln_2_and_comes_to_prefer_what_was_chosen(folder: Path) -> None:
    run = align(order(folder, "dpo", "train.fit.epochs=3"), Silent())
    first, *_, last = lines(run, "dpo")
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["accuracy"] == 0.5
    assert last["accuracy"] == 1.0
    report = json.loads((run / "outcome" / "report.json").read_text())
    facts = {fact["label"]: fact["value"] for fact in report["facts"]}
    assert facts["held-out pairs right"] == 1.0
    assert facts["held-out margin"] > 0.1
    assert report["samples"][0]["answers"][0]["stage"] == "before"


@pytest.mark.parametrize(
    ("method", "figure", "value"), [("dpo", "loss", math.log(2)), ("kto", "desirable_reward", 0.0)]
)
def test_c38_dropout_sleeps_where_the_loss_compares_with_a_frozen_reference(
    method: str, figure: str, value: float, folder: Path
) -> None:
    path = folder / "runs" / "tiny" / "sft" / "model" / "run.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "config": {**info["config"], "residual_dropout": 0.5}}))
    run = align(order(folder, method), Silent())
    assert lines(run, method)[0][figure] == pytest.approx(value, abs=1e-5)


def test_dpo_does_not_depend_on_how_many_pairs_pass_at_once(folder: Path) -> None:
    losses = []
    for rows in (16, 3):
        run = align(replace(order(folder, "dpo", f"train.fit.forward_rows={rows}"), name=f"dpo{rows}"), Silent())
        losses.append([line["loss"] for line in lines(run, "dpo")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_c56_no_prompt_of_training_is_held_out(folder: Path) -> None:
    run = align(order(folder, "dpo"), Silent())
    sides = [
        {json.dumps(json.loads(line)["example"]["prompt"]) for line in (run / "data" / name).read_text().splitlines()}
        for name in ("train.jsonl", "held_out.jsonl")
    ]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_an_adapter_leaves_the_start_as_it_was_and_is_saved_as_peft_and_merged(folder: Path) -> None:
    run = align(order(folder, "dpo", lora=4, lora_targets=("query", "value")), Silent())
    assert (run / "dpo" / "adapter" / "adapter_model.safetensors").is_file()
    before = load_model(folder / "runs" / "tiny" / "sft" / "model").model.state_dict()
    after = load_model(run / "dpo" / "model").model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(("query.weight", "value.weight")) for name in changed)
    state = json.loads((run / "card.json").read_text())
    trained = next(f for s in state["stages"] if s["name"] == "dpo" for f in s["report"]["facts"])
    assert trained["value"] == 2 * 4 * (32 + 32)


def test_an_adapter_in_a_head_that_was_the_embedding_leaves_the_embedding_as_it_was(tmp_path: Path) -> None:
    folder = world.plant(tmp_path, family="llama")
    run = align(order(folder, "dpo", lora=4, lora_targets=("head",)), Silent())
    before: Any = load_model(folder / "runs" / "tiny" / "sft" / "model").model
    after: Any = load_model(run / "dpo" / "model").model
    assert torch.equal(after.tokens.weight, before.tokens.weight)
    delta = load_adapter(run / "dpo" / "adapter", before).pairs["head"]
    expected = before.head.weight + delta.scale * delta.b @ delta.a
    torch.testing.assert_close(after.head.weight, expected)
    assert not torch.equal(after.head.weight, before.head.weight)


def test_an_adapter_in_a_head_that_is_always_the_embedding_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="head is always its embedding"):
        align(order(folder, "dpo", lora=4, lora_targets=("head",)), Silent())


BAD_ROWS = {
    "missing key": {"prompt": "do you like hats?", "chosen": "yes"},
    "empty text": {"prompt": "do you like hats?", "chosen": " ", "rejected": "no"},
    "identical answers": {"prompt": "do you like hats?", "chosen": "no", "rejected": "no"},
    "too long": {"prompt": "do you like hats?", "chosen": "yes " * 80, "rejected": "no"},
    "text too long": {"prompt": "do you like hats?", "chosen": "y" * 100_001, "rejected": "no"},
    "wrong kind": {"prompt": "do you like hats?"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_refused_with_file_line_and_reason(reason: str, folder: Path) -> None:
    rows = [*world.data()["pairs"][:20], BAD_ROWS[reason]]
    path = world.write_rows(folder / "bad.jsonl", rows)
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 21.*{reason}"):
        align(order(folder, "dpo", data=(path,)), Silent())


def test_what_stands_in_a_file_of_another_kind_is_said_in_words(folder: Path) -> None:
    for name, what in (("prompts", "a prompt without answers"), ("verdicts", "an answer with a verdict")):
        with pytest.raises(DataError, match=f"it is {what}, this method learns from pairs or rankings"):
            align(order(folder, "dpo", data=(folder / f"{name}.jsonl",)), Silent())


def test_a_stage_that_lost_its_model_is_not_among_those_that_have_one(folder: Path) -> None:
    (folder / "runs" / "tiny" / "sft" / "model" / "run.json").unlink()
    with pytest.raises(UserError, match=r"no model 'sft'; finished stages with one: (?!.*sft)"):
        align(order(folder, "dpo"), Silent())


def test_too_few_prompts_are_refused_with_what_became_of_the_rows(folder: Path) -> None:
    row = world.data()["pairs"][0]
    same = world.write_rows(folder / "same.jsonl", [row] * 5)
    with pytest.raises(DataError, match="5 usable rows of 1 prompts leave none for"):
        align(order(folder, "dpo", data=(same,)), Silent())
    rows = [{**row, "chosen": f"ask ann{n}@example.com"} for n in range(3)]
    personal = world.write_rows(folder / "personal.jsonl", [*rows, {"prompt": "no pair"}])
    chosen = order(folder, "dpo", "data.personal=drop", data=(personal,), skip_bad=True)
    with pytest.raises(DataError, match="0 usable rows of 0 prompts, 1 skipped, 3 with personal data left out leave"):
        align(chosen, Silent())


def test_kto_refuses_answers_of_one_kind_and_of_one_prompt_while_it_reads(folder: Path) -> None:
    rows = world.data()["verdicts"]
    good = world.write_rows(folder / "good.jsonl", [row for row in rows if row["label"]])
    heard = Silent()
    with pytest.raises(DataError, match=r"good\.jsonl, train: \d+ answers found good and 0 found bad; KTO learns from"):
        align(order(folder, "kto", data=(good,)), heard)
    assert not any(line.startswith("reference") for line in heard.heard)
    one = world.write_rows(folder / "one.jsonl", [{**row, "prompt": "do you like hats?"} for row in rows[:2]])
    with pytest.raises(DataError, match="held out: 2 answers to one prompt; KTO compares them with answers to others"):
        align(order(folder, "kto", held_out=one), Silent())


def test_kto_measures_on_answers_of_one_kind(folder: Path) -> None:
    bad = [{**row, "prompt": f"{row['prompt']} no?"} for row in world.data()["verdicts"] if not row["label"]]
    run = align(order(folder, "kto", held_out=world.write_rows(folder / "bad.jsonl", bad[:4])), Silent())
    card = json.loads((run / "card.json").read_text(), parse_constant=pytest.fail)
    report = json.loads((run / "outcome" / "report.json").read_text(), parse_constant=pytest.fail)
    facts = {fact["label"]: fact["value"] for fact in report["facts"]}
    assert facts["held-out reward, undesirable"] is not None
    assert facts["held-out reward, desirable"] is None
    assert card["stages"]


def test_a_file_that_is_missing_is_named_with_its_option(folder: Path) -> None:
    nowhere = folder / "nowhere.jsonl"
    for option, changes in (
        ("--data", {"data": (nowhere,)}),
        ("--held-out", {"held_out": nowhere}),
        ("--safety", {"safety": (nowhere,)}),
    ):
        with pytest.raises(DataError, match=f"{option} .*nowhere.jsonl: there is no such file"):
            align(order(folder, "sft", **changes), Silent())


def test_bad_rows_are_skipped_and_counted_where_the_user_says_so(folder: Path) -> None:
    path = world.write_rows(folder / "bad.jsonl", [*world.data()["pairs"], *BAD_ROWS.values()])
    run = align(order(folder, "dpo", data=(path,), skip_bad=True), Silent())
    report = json.loads((run / "data" / "report.json").read_text())
    table = next(table for table in report["tables"] if "could not" in table["title"])
    assert {(row[0], row[1]) for row in table["rows"]} == {(reason, 1) for reason in BAD_ROWS}


@pytest.mark.parametrize(("choice", "rows", "done"), [("redact", 48, "replaced"), ("drop", 46, "left out")])
def test_c56_personal_data_are_replaced_or_left_out_and_counted(
    choice: str, rows: int, done: str, folder: Path
) -> None:
    pairs = world.data()["pairs"]
    for place, said in ((3, "yes, ask ann@example.com"), (9, "yes, call +44 20 7946 0958")):
        pairs[place] = {**pairs[place], "chosen": said}
    path = world.write_rows(folder / "personal.jsonl", pairs)
    run = align(order(folder, "dpo", f"data.personal={choice}", data=(path,)), Silent())
    found = (run / "data" / "train.jsonl").read_text() + (run / "data" / "held_out.jsonl").read_text()
    assert "ann@example.com" not in found
    assert "7946" not in found
    assert found.count("[email]") + found.count("[phone]") == (2 if choice == "redact" else 0)
    report = json.loads((run / "data" / "report.json").read_text())
    assert report["headline"]["value"] == rows
    assert {fact["label"]: fact["value"] for fact in report["facts"]}[f"rows with personal data, {done}"] == 2


def test_c56_prompts_that_begin_like_others_are_left_out_and_counted(folder: Path) -> None:
    run = align(order(folder, "dpo", "data.prefix_chars=18", "data.held_out_share=0.5"), Silent())
    report = json.loads((run / "data" / "report.json").read_text())
    facts = {fact["label"]: fact["value"] for fact in report["facts"]}
    left = report["headline"]["value"]
    assert facts["rows left out, whose prompts begin like others"] == len(world.questions()) - left > 0
    assert left > 10


def test_a_prompt_with_two_right_answers_is_refused_and_one_that_stands_twice_is_asked_once(folder: Path) -> None:
    def row(answer: str, index: int) -> dict[str, Any]:
        return {"data_source": "s", "prompt": [{"role": "user", "content": "do you like tea?"}], "ability": "a",
                "reward_model": {"style": "rule", "ground_truth": answer}, "extra_info": {"index": index}}  # fmt: skip

    rows = [*world.data()["sums"], row("yes", 1), row("yes", 2), row("no", 3)]
    path = world.write_rows(folder / "verl.jsonl", rows)
    told = order(folder, "rloo", data=(path,), rewards=(), verifiers=(("regex", 1.0, {"pattern": "[a-m]"}),))
    with pytest.raises(DataError, match=r"verl\.jsonl, line 67.*two answers"):
        align(told, Silent())
    run = align(replace(told, skip_bad=True), Silent())
    tables = json.loads((run / "data" / "report.json").read_text())["tables"]
    table = next(table for table in tables if "could not" in table["title"])
    assert [row[:2] for row in table["rows"]] == [["two answers", 1]]


def test_a_held_out_file_may_not_share_a_prompt_with_the_data(folder: Path) -> None:
    path = world.write_rows(folder / "others.jsonl", world.data()["pairs"][5:6])
    with pytest.raises(DataError, match="--held-out"):
        align(order(folder, "dpo", held_out=path), Silent())


def test_changed_data_are_another_plan(folder: Path) -> None:
    before = plan_of(order(folder, "dpo"))
    world.write_rows(folder / "pairs.jsonl", world.data()["pairs"][1:])
    assert plan_of(order(folder, "dpo")).data.hash != before.data.hash


def test_c45_other_weights_under_the_same_name_are_another_run(folder: Path) -> None:
    run = align(order(folder, "dpo"), Silent())
    again = replace(order(folder, "dpo"), model="tiny:other")
    shutil.copytree(run / "dpo", folder / "runs" / "tiny" / "other")
    assert plan_of(again).start.hash != plan_of(order(folder, "dpo")).start.hash


def test_c45_a_reference_that_has_changed_ends_the_run() -> None:
    model = torch.nn.Linear(2, 2)
    before = weights_digest(model)
    require_unchanged(model, before)
    with torch.no_grad():
        model.weight[0, 0] += 1e-7 + model.weight[0, 0].abs() * 1e-6
    with pytest.raises(TrainingHalted, match="reference"):
        require_unchanged(model, before)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_c45_a_run_whose_reference_moves_ends_without_a_model(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiling(actors: Any) -> None:
        with torch.no_grad():
            next(actors.reference.parameters()).add_(1e-3)

    ended: list[Any] = []
    monkeypatch.setattr("fledge.recipes.align_rl._one_round", _after(align_rl._one_round, ended, spoiling))
    with pytest.raises(TrainingHalted, match="reference has changed"):
        align(order(folder, method, "train.rounds=1", "train.warmup_rounds=0"), Silent())
    assert ended
    assert not (folder / "runs" / method / method / "model").exists()


def _after(work: Any, ended: list[Any], spoil: Any) -> Any:
    def done(sitting: Any) -> Any:
        metrics = work(sitting)
        ended.append(sitting)
        spoil(sitting.algorithm.actors)
        return metrics

    return done


def test_c1_padding_that_ends_turns_is_refused(folder: Path) -> None:
    loaded = load_model(folder / "runs" / "tiny" / "sft" / "model")
    refuse_padding_that_ends(loaded)

    class Ends:
        stop_ids = frozenset((loaded.tokenizer.pad_id,))
        end_id = loaded.tokenizer.pad_id

    with pytest.raises(ValueError, match="padding token"):
        refuse_padding_that_ends(replace(loaded, renderer=Ends()))  # type: ignore[arg-type]


def test_c11_a_reward_model_of_another_tokenizer_is_refused(folder: Path) -> None:
    path = folder / "runs" / "tiny" / "reward" / "model"
    other = world.plant(folder / "else", vocab_size=289) / "runs" / "tiny" / "reward" / "model"
    shutil.rmtree(path)
    shutil.copytree(other, path)
    with pytest.raises(RunError, match="another tokenizer"):
        plan_of(order(folder, "grpo"))


def test_c11_a_reward_model_of_another_chat_template_is_refused(folder: Path) -> None:
    start = load_model(folder / "runs" / "tiny" / "sft" / "model")
    assert load_scorer("tiny:reward", folder / "runs", start).hash
    other = replace(start, info=replace(start.info, template_hash="0" * 64))
    with pytest.raises(RunError, match="another template"):
        load_scorer("tiny:reward", folder / "runs", other)


def test_c46_the_average_can_be_asked_for_by_its_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = align(order(folder, "ppo"), Silent())
    runs = folder / "runs"
    assert load_model(resolve_model("ppo:ppo/ema", runs)).hash == load_model(run / "ppo" / "ema").hash
    assert cli.main(["complete", "ppo:ppo/ema", "do you", "--max-tokens", "3", "--runs", str(runs)]) == 0
    for wrong in ("ppo:ppo/nothing", "ppo:../ppo/ppo/ema"):
        with pytest.raises(RunError, match="has no model"):
            resolve_model(wrong, runs)


def test_c58_two_falls_in_a_row_end_the_run_and_the_best_weights_are_kept() -> None:
    policy = torch.nn.Linear(1, 1)
    watch = GoldWatch(judge=None, asked=(), every=1, falls=2)  # type: ignore[arg-type]
    for score, expected in ((0.1, False), (0.5, False), (0.4, False), (0.45, False), (0.3, False), (0.2, True)):
        with torch.no_grad():
            policy.weight.fill_(score)
        watch.look(score, policy)
        assert watch.is_over is expected
    assert float(watch.best["weight"]) == pytest.approx(0.5)


def test_c58_a_run_whose_gold_score_falls_stops_early(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    falling = iter(range(100, 0, -1))
    monkeypatch.setattr("fledge.recipes.align_gold.score_answers", lambda *_: torch.tensor([float(next(falling))]))
    run = align(order(folder, "grpo", "train.rounds=6"), Silent())
    assert len(lines(run, "grpo")) == 3
    facts = json.loads((run / "grpo" / "report.json").read_text())["facts"]
    assert any("gold judge" in fact["label"] for fact in facts)


def test_c48_every_round_leaves_all_figures_on_disk(folder: Path) -> None:
    named = "entropy approx_kl clip_fraction explained_variance response_length end_rate score_mean score_std kl beta"
    rounds = lines(align(order(folder, "ppo"), Silent()), "ppo")
    assert [record["step"] for record in rounds] == [1, 2]
    for record in rounds:
        assert all(math.isfinite(record[name]) for name in (*named.split(), "ratio_min", "ratio_max"))


def test_a_round_leaves_episodes_token_by_token_and_a_small_gap_between_engine_and_trainer(folder: Path) -> None:
    run = align(order(folder, "ppo"), Silent())
    episodes = [json.loads(line) for line in (run / "ppo" / "episodes.jsonl").read_text().splitlines()]
    assert {episode["step"] for episode in episodes} == {1, 2}
    for episode in episodes:
        assert len(episode["tokens"]) == len(episode["kl"]) == len(episode["values"]) == len(episode["advantages"])
    assert max(line["sampler_logprob_gap"] for line in lines(run, "ppo")) < 1e-4
    assert max(line["ratio_gap"] for line in lines(run, "ppo")) < 1e-5
    assert abs(lines(run, "ppo")[0]["kl"]) < 1e-5


def test_a_verifier_is_a_reward(folder: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": q}], "data_source": "tiny", "ability": "yes",
         "reward_model": {"style": "rule", "ground_truth": "yes"}, "extra_info": {}}
        for q in world.questions()
    ]  # fmt: skip
    path = world.write_rows(folder / "verl.jsonl", rows)
    verifier = (("regex", 1.0, {"pattern": "[a-m]"}),)
    run = align(order(folder, "ppo", data=(path,), rewards=(), verifiers=verifier), Silent())
    assert all(0 <= line["reward/regex"] <= 1 for line in lines(run, "ppo"))
    assert lines(run, "ppo")[0]["value"] == 0, "C41: without a reward model the value head begins as zeros"


@pytest.mark.parametrize("rank", [None, 2])
def test_c41_the_value_function_of_a_run_begins_as_its_reward_model(rank: int | None, folder: Path) -> None:
    run = align(order(folder, "ppo", "train.rounds=1", "train.warmup_rounds=0", lr=1e-7, lora=rank), Silent())
    value, reward = (load_model(path).model for path in (run / "ppo" / "value", folder / "runs/tiny/reward/model"))
    found = value.state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in reward.state_dict().items())
    assert load_model(run / "ppo" / "value").info.parents["policy"] == load_model(run / "ppo" / "model").hash


@pytest.mark.parametrize(
    ("method", "others", "complaint"),
    [
        ("dpo", {"rewards": (("tiny:reward", 1.0),)}, "learns without rewards"),
        ("grpo", {"rewards": (), "judge": None}, "needs a reward"),
        ("grpo", {"judge": "tiny:reward"}, "trained against"),
        ("dpo", {"lora_targets": ("query",)}, "--lora"),
        ("dpo", {"data": ()}, "--data"),
    ],
)
def test_orders_that_contradict_themselves_are_refused(
    method: str, others: dict[str, Any], complaint: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_of(order(folder, method, **others))


def test_a_reward_model_is_normalised_and_its_accuracy_told(folder: Path) -> None:
    run = align(order(folder, "reward", "train.fit.batch=4"), Silent())
    report = json.loads((run / "outcome" / "report.json").read_text())
    assert report["headline"]["value"] > 0.9
    model = load_model(run / "reward" / "model").model
    assert float(model.mean) != 0.0  # type: ignore[arg-type]


def test_c47_texts_among_the_data_are_pretraining_rows_beside_the_episodes(folder: Path) -> None:
    texts = world.write_rows(folder / "texts.jsonl", [{"text": f"all about {q}"} for q in world.questions()])
    data = (folder / "prompts.jsonl", texts)
    run = align(order(folder, "ppo", "train.pretrain_weight=0.5", data=data), Silent())
    assert all(line["loss/next_token"] > 0 for line in lines(run, "ppo"))
    with pytest.raises(DataError, match="add a file of texts"):
        align(replace(order(folder, "ppo", "train.pretrain_weight=0.5"), name="none"), Silent())
    with pytest.raises(DataError, match="wrong kind"):
        align(replace(order(folder, "ppo", data=data), name="without"), Silent())


def test_c55_feedme_imitates_what_people_rated_seven_beside_its_own_best(folder: Path) -> None:
    rated = [
        {"type": "rating", "prompt": [{"role": "user", "content": q}], "completion": "yes i do", "rating": 7 - n % 2}
        for n, q in enumerate(world.questions())
    ]
    path = world.write_rows(folder / "rated.jsonl", rated)
    run = align(order(folder, "feedme", data=(path,)), Silent())
    facts = {f["label"]: f["value"] for f in json.loads((run / "feedme" / "report.json").read_text())["facts"]}
    sides = [json.loads(line)["example"]["rating"] for line in (run / "data" / "train.jsonl").read_text().splitlines()]
    assert facts["answers that people rated high enough"] == sides.count(7.0) > 10
    assert facts["demonstrations"] == 0
    long = world.write_rows(folder / "long.jsonl", [*rated, {**rated[0], "completion": "yes " * 60}])
    with pytest.raises(DataError, match=r"long\.jsonl, line 49.*too long"):
        align(replace(order(folder, "feedme", data=(long,)), name="long"), Silent())


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_an_imported_model_keeps_its_template_and_learns_to_end_its_turn(method: str, folder: Path) -> None:
    runs = ("--runs", str(folder / "runs"))
    assert cli.main(["export", "tiny:sft", str(folder / "published"), "--to", "huggingface", *runs]) == 0
    assert cli.main(["import", str(folder / "published"), "--name", "theirs", *runs]) == 0
    theirs = load_model(folder / "runs" / "theirs")
    assert theirs.template is not None
    run = align(replace(order(folder, method), model="theirs"), Silent())
    found = load_model(run / method / "model")
    assert found.info.template_hash == theirs.info.template_hash
    cut = Cut(theirs.renderer, 64)
    prompt, answer = answer_ids(cut, Conversation.of(("user", "do you like tea?")), "yes i do")
    assert prompt == theirs.renderer.prompt(Conversation.of(("user", "do you like tea?")))
    assert answer[-1] == theirs.renderer.end_id
    assert answer.count(theirs.renderer.end_id) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 4], ids=["whole", "adapter"])
@pytest.mark.parametrize("method", ORDERS)
def test_c50_every_method_goes_on_to_the_same_bits_on_an_imported_model_whole_and_by_adapter(
    method: str, rank: int | None, folder: Path
) -> None:
    runs = ("--runs", str(folder / "runs"))
    assert cli.main(["export", "tiny:sft", str(folder / "published"), "--to", "huggingface", *runs]) == 0
    assert cli.main(["import", str(folder / "published"), "--name", "theirs", *runs]) == 0
    told = replace(order(folder, method, "save_seconds=0.0", lora=rank), model="theirs")
    if told.rewards:  # reward models of the imported model's own template
        for name, seed in (("prized", 1), ("judge", 2)):
            align(replace(order(folder, "reward"), model="theirs", name=name, seed=seed), Silent())
        told = replace(told, rewards=(("prized:reward", 1.0),), judge=told.judge and "judge:reward")
    expected = weights(align(told, Silent()))
    again = replace(told, name="again")
    with pytest.raises(Killed):
        align(again, Silent(method, 2))
    assert weights(align(again, Silent())) == expected
    assert (folder / "runs" / "again" / "card.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "grpo", "ppo"])
def test_killed_at_random_moments_the_same_command_ends_with_the_same_weights(method: str, folder: Path) -> None:
    expected = weights(align(order(folder, method), Silent()))
    name, needs, tiny = ORDERS[method]
    rewards = [word for reward, _ in needs.get("rewards", ()) for word in ("--reward", reward)]
    others = ["--judge", needs["judge"]] if "judge" in needs else []
    others += ["--lora", str(needs["lora"])] if "lora" in needs else []
    sets = [word for override in (*tiny, "save_seconds=0.0") for word in ("--set", override)]
    line = world.command(folder, folder / "runs", method, name, "--name", "killed", "--lr", "0.01")
    line += [*rewards, *others, *sets]
    for seconds in (3.0, 4.0, 5.0):
        process = subprocess.Popen(line, env=world.environment(folder), stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(line, env=world.environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert weights(folder / "runs" / "killed") == expected
