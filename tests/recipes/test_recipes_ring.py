"""A whole ring, tiny, by the command line: what it leaves, that it is kept, killed, stopped, refused, and goes on."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import garden as world
import pytest

STAGES = ["corpus", "tokenizer", "pretrain", "code", "sft", "rankings", "reward", "gold", "ppo", "evaluation"]


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = world.plant(tmp_path_factory.mktemp("garden"))
    (folder / "scan.pdf").write_bytes(b"%PDF-1.7")
    return folder


@pytest.fixture(scope="module")
def finished(garden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted ring."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    done = world.raise_tiny(garden, runs)
    assert done.returncode == 0, done.stderr
    return runs / "sprout"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "runs")
    return tmp_path / "runs" / "sprout"


def weights(run: Path) -> dict[str, str]:
    """The hash of every model of a run."""
    infos = sorted(run.glob("*/*/run.json"))
    return {str(path.relative_to(run)): json.loads(path.read_text())["files"]["model.safetensors"] for path in infos}


def test_every_stage_leaves_a_manifest_and_the_run_a_card(finished: Path) -> None:
    for stage in STAGES:
        manifest = json.loads((finished / stage / "manifest.json").read_text())
        assert manifest["outputs"], stage
        assert manifest["cost"]["seconds"] > 0
    assert "<html" in (finished / "card.html").read_text(encoding="utf-8")
    stages = {json.loads(line)["stage"] for line in (finished / "metrics.jsonl").read_text().splitlines()}
    assert {"pretrain", "code", "sft", "reward", "gold", "ppo"} <= stages


def card_of(run: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((run / "card.json").read_text(encoding="utf-8"))
    return card


def test_the_card_holds_every_table_that_a_ring_owes(finished: Path) -> None:
    card = card_of(finished)
    tables = {table["title"]: table for stage in card["stages"] for table in stage["report"]["tables"]}
    columns = {title: table["columns"] for title, table in tables.items()}
    assert columns["Bits per byte on held-out text"] == ["model", "prose", "user", "stdlib"]
    assert columns["Win rate of each stage over the one before"][1:4] == ["wins %", "wins at equal length %", "ties"]
    manners = ["stage", "tokens", "ended %", "entropy, nats a token", "distinct bigrams %", "KL to SFT, nats an answer"]
    assert columns["How the stages answer"] == manners
    judges = "Reward model and gold judge on held-out rankings"
    assert columns[judges] == ["model", "pairs right %", "of equal length %", "calibration error"]
    assert [row[0] for row in tables[judges]["rows"]] == ["reward", "gold"]
    models = [row[0] for row in tables["Bits per byte on held-out text"]["rows"]]
    assert models == [*(f"Kneser-Ney {n}-gram" for n in (2, 3, 5)), "pretrain", "code", "sft", "ppo"]
    wins = tables["Win rate of each stage over the one before"]["rows"]
    assert [row[0] for row in wins] == ["code over pretrain", "sft over code", "ppo over sft"]
    assert all({"value", "low", "high", "mark"} == set(row[column]) for row in wins for column in (1, 2))
    [tokenizer] = [stage for stage in card["stages"] if stage["name"] == "tokenizer"]
    assert tokenizer["report"]["tables"][0]["note"].startswith("GPT-2's vocabulary could not be had")  # no network


def test_the_card_says_what_every_stage_cost_and_what_it_was_made_from(finished: Path) -> None:
    card = card_of(finished)
    costs = {stage["name"]: stage["cost"] for stage in card["stages"]}
    assert list(costs) == STAGES
    assert all(cost["seconds"] > 0 and cost["peak_rss_bytes"] > 50e6 for cost in costs.values())
    assert card["finished"] == json.loads((finished / "evaluation" / "manifest.json").read_text())["finished"]
    for stage in ("pretrain", "code", "sft", "rankings", "reward", "gold", "ppo"):
        assert costs[stage]["tokens"] > 0
        assert 0 < costs[stage]["mfu"] < 1.5
    assert any("2 per multiply-add" in formula for formula in card["formulas"])
    assert any("1024, 2048 and 4096" in formula for formula in card["formulas"])
    for stage in ("pretrain", "code", "sft"):
        [report] = [s["report"] for s in card["stages"] if s["name"] == stage]
        assert "padding share" in {fact["label"] for fact in report["facts"]}
    assert {licence["source"]: licence["licence"] for licence in card["licences"]} == {
        "stdlib": "PSF-2.0",
        "user": "the user's own",
    }
    assert all(answers == ["pretrain", "code", "sft", "ppo"] for answers in _who_answers(card))


def _who_answers(card: dict[str, Any]) -> list[list[str]]:
    return [[answer["stage"] for answer in sample["answers"]] for sample in card["samples"]]


def test_what_was_not_read_of_the_users_folder_stands_on_the_card(finished: Path) -> None:
    [corpus] = [stage for stage in card_of(finished)["stages"] if stage["name"] == "corpus"]
    left_out = {row[0]: row[-1] for row in corpus["report"]["tables"][0]["rows"]}
    assert "1 not a text file by its name (first: " in left_out["user"]
    assert "scan.pdf" in left_out["user"]


def test_bits_per_byte_of_a_stage_are_the_same_wherever_they_stand(finished: Path) -> None:
    def table(stage: str) -> dict[str, list[object]]:
        report = json.loads((finished / stage / "report.json").read_text())
        return {row[0]: row[1:] for row in report["tables"][0]["rows"]}

    code, evaluation = table("code"), table("evaluation")
    for column, stage in enumerate(("pretrain", "code")):
        left = json.loads((finished / stage / "language.json").read_text())
        assert code["code"][column] == left["bits_per_byte/all_code"]
        assert code["prose"][column] == evaluation[stage][0] == left["bits_per_byte/without_code"]


def test_lineage_can_be_read_from_disk(finished: Path) -> None:
    def info(stage: str, name: str = "model") -> dict[str, object]:
        data: dict[str, object] = json.loads((finished / stage / name / "run.json").read_text())
        return data

    def hash_of(stage: str) -> object:
        return weights(finished)[f"{stage}/model/run.json"]

    assert info("code")["parents"] == {"base": hash_of("pretrain")}
    assert info("sft")["parents"] == {"base": hash_of("code")}
    assert info("reward")["parents"] == {"sft": hash_of("sft")}
    assert info("ppo")["parents"] == {"reference": hash_of("sft"), "reward": hash_of("reward")}
    assert info("ppo", "ema")["parents"] == {"policy": hash_of("ppo")}
    assert info("ppo", "value")["parents"] == {"reward": hash_of("reward")}


def test_no_validation_text_is_ever_trained_on(finished: Path) -> None:
    sides = {}
    for side in ("train", "validation"):
        lines = (finished / "corpus" / "documents" / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()
        sides[side] = {json.dumps([json.loads(line).get(key) for key in ("text", "messages")]) for line in lines}
    assert sides["validation"]
    assert not sides["train"] & sides["validation"]


def test_a_finished_run_is_kept_as_it_is(copied: Path, garden: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.glob("*/manifest.json")}
    done = world.raise_tiny(garden, copied.parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("kept") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in copied.glob("*/manifest.json")} == before


def test_a_removed_stage_is_made_again_to_the_same_bits(copied: Path, garden: Path) -> None:
    expected = weights(copied)
    shutil.rmtree(copied / "ppo")
    done = world.raise_tiny(garden, copied.parent)
    assert done.returncode == 0, done.stderr
    assert weights(copied) == expected


def test_killed_at_random_moments_the_same_command_ends_with_the_same_weights(
    finished: Path, garden: Path, tmp_path: Path
) -> None:
    _kill_and_go_on(finished, garden, tmp_path / "runs", kills=2, seed=time.time_ns())


@pytest.mark.slow
def test_killed_again_and_again_the_same_command_ends_with_the_same_weights(
    finished: Path, garden: Path, tmp_path: Path
) -> None:
    for seed in range(4):
        _kill_and_go_on(finished, garden, tmp_path / f"runs{seed}", kills=5, seed=seed)


def _kill_and_go_on(finished: Path, garden: Path, runs: Path, *, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    # A state is saved after every step, so that a kill is likely to fall between two of them or into a save.
    line = world.command(garden, runs, "--set", "save_seconds=0.0")
    for _ in range(kills):
        process = subprocess.Popen(
            line, env=world.environment(runs.parent / "home"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(draw.uniform(3.0, 14.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(
        line, env=world.environment(runs.parent / "home"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert weights(runs / "sprout") == weights(finished), f"seed {seed}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_the_state_and_says_how_to_go_on(number: signal.Signals, copied: Path, garden: Path) -> None:
    expected = weights(copied)
    shutil.rmtree(copied / "sft")
    for later in STAGES[STAGES.index("sft") :]:
        shutil.rmtree(copied / later, ignore_errors=True)
    line = world.command(garden, copied.parent, "--json")
    home = copied.parent.parent / "home"
    process = subprocess.Popen(
        line, env=world.environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for event in process.stdout:
        if json.loads(event).get("stage") == "sft" and json.loads(event)["event"] == "step":
            break
    process.send_signal(number)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert "go on with the same command" in complaint
    assert "Traceback" not in complaint
    assert world.raise_tiny(garden, copied.parent).returncode == 0
    assert weights(copied) == expected


@pytest.mark.parametrize("harm", ["truncate", "alter", "remove"])
def test_a_damaged_artifact_is_refused_and_nothing_is_overwritten(harm: str, copied: Path, garden: Path) -> None:
    victim = copied / "pretrain" / "model" / "model.safetensors"
    data = victim.read_bytes()
    if harm == "truncate":
        victim.write_bytes(data[:-100])
    elif harm == "alter":
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        victim.unlink()
    left = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file() and path.name != ".lock"}
    done = world.raise_tiny(garden, copied.parent)
    assert done.returncode == 2
    assert str(victim) in done.stderr
    assert "remove" in done.stderr
    assert "Traceback" not in done.stderr
    now = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file() and path.name != ".lock"}
    assert now == left


def test_a_damaged_choice_of_compiling_is_refused_by_name(copied: Path, garden: Path) -> None:
    for text in ("{", '"maybe"'):
        (copied / "compiled.json").write_text(text)
        done = world.raise_tiny(garden, copied.parent)
        assert done.returncode == 2
        assert f"{copied / 'compiled.json'}: damaged" in done.stderr
        assert done.stderr.count("\n") == 1


def test_two_processes_on_one_run_are_kept_apart(copied: Path, garden: Path) -> None:
    import fcntl

    with (copied / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = world.raise_tiny(garden, copied.parent)
    assert done.returncode == 2
    assert str(copied) in done.stderr
    assert "in use by process" in done.stderr


def test_a_changed_plan_starts_a_new_run_and_says_so(copied: Path, garden: Path) -> None:
    before = (copied / "plan.json").read_bytes()
    process = subprocess.Popen(
        world.command(garden, copied.parent, "--set", "seed=1"),
        env=world.environment(copied.parent.parent / "home"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    process.kill()
    process.communicate()
    assert "sprout-2" in first
    assert (copied / "plan.json").read_bytes() == before
    assert (copied.parent / "sprout-2" / "plan.json").is_file()
