"""`fledge eval` on a small run made here: what it measures, what it prints, what it refuses."""

from __future__ import annotations

import argparse
import json
import math
import shutil

import pytest
import torch

import fledge
from fledge.commands import eval as eval_command
from fledge.config import to_json
from fledge.data.corpus import Ingredient, write_corpus
from fledge.data.filters import FilterConfig
from fledge.data.multiple_choice import MultipleChoice
from fledge.errors import ConfigError, DataError, RunError
from fledge.files import write_json
from fledge.formats.checkpoint import CheckpointInfo, save_model
from fledge.models.ngram import NGram, NGramConfig
from fledge.models.pocket import Pocket, PocketConfig
from fledge.models.scalar import ScalarModel
from fledge.recipes import measure
from fledge.recipes.pocket import sprout
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer
from fledge.types import Provenance

WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "an",
    "old",
    "dog",
    "that",
    "ran",
    "over",
    "hills",
)


def sentence(number):
    return " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(3, 15)) + f" {number}."


def text_record(number):
    return {"text": f"{sentence(number)} {sentence(number + 7)}"}


def chat_record(number):
    turns = [("user", sentence(number)), ("assistant", sentence(number + 1))] * 2
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def save(folder, model, family, stage, tokenizer):
    info = CheckpointInfo(
        family=family,
        config=to_json(model.config),
        stage=stage,
        tokenizer_hash=tokenizer.hash,
        template_hash=ChatRenderer(tokenizer).hash,
    )
    save_model(folder, model, tokenizer, info)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder: `small` with a base, a chat, a reward and a counting model on one held-out corpus."""
    runs = tmp_path_factory.mktemp("runs")
    run = runs / "small"
    run.mkdir()
    lines = [json.dumps(text_record(n)) for n in range(40)] + [json.dumps(chat_record(n)) for n in range(40)]
    source = runs / "mine.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    ingredient = Ingredient("user", path=str(source))
    filters = FilterConfig(validation_share=0.5)
    corpus = write_corpus([ingredient], run / "corpus" / "documents", cache=runs, filters=filters, seed=0)
    tokenizer = train_tokenizer([e.text for e in corpus.texts("train")], TokenizerConfig(vocab_size=320))
    model = Pocket(PocketConfig(tokenizer.vocab_size, 32, 1, 1, table_rows=64))
    model.init_weights(torch.Generator().manual_seed(0))
    reward = ScalarModel.from_trunk("pocket", model, generator=torch.Generator().manual_seed(0))
    documents = [[tokenizer.end_of_text_id, *tokenizer.encode(e.text)] for e in corpus.texts("train")]
    counts = NGram.fit(documents, NGramConfig(tokenizer.vocab_size, 3))
    made = (("pretrain", model, "pocket"), ("sft", model, "pocket"), ("reward", reward, "scalar"))
    for stage, each, family in (*made, ("counts", counts, "ngram")):
        save(run / stage / "model", each, family, stage, tokenizer)
    save(runs / "alone", model, "pocket", "pretrain", tokenizer)
    write_json(run / "plan.json", {"fledge": fledge.__version__, **to_json(sprout())})
    for stage in ("pretrain", "sft"):
        write_json(run / stage / "manifest.json", {})
    return runs


@pytest.fixture
def benchmark(monkeypatch):
    """Questions that need no download."""
    asked = [
        MultipleChoice("", f"is it {sentence(n)}", ("yes", "no"), n % 2, Provenance("piqa", str(n), "MIT"))
        for n in range(90)
    ]
    monkeypatch.setattr(measure, "questions", lambda name, cache: asked)
    return asked


def call(*words):
    parser = argparse.ArgumentParser()
    eval_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["eval", *map(str, words)])
    return args.run(args)


def result(capsys, *words):
    assert call(*words, "--json") == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_untrained_model_costs_the_logarithm_of_its_vocabulary(runs, capsys):
    found = result(capsys, "small:pretrain", "--runs", runs)
    metrics = found["bits_per_byte"]
    vocab_size = json.loads((runs / "small/pretrain/model/run.json").read_text())["config"]["vocab_size"]
    per_token = metrics["bits_per_byte"] * metrics["bytes"] / metrics["tokens"]
    assert per_token == pytest.approx(math.log2(vocab_size), abs=1e-4)
    assert metrics["documents/user"] > 5
    assert found["row_length"] == sprout().pretrain.fit.row_length
    assert found["generation"]["answers"] == sprout().evaluation.prompts
    assert found["benchmarks"] == {}


def test_a_run_alone_means_its_furthest_stage_and_chat_stages_are_asked_as_chats(runs, capsys):
    found = result(capsys, "small", "--runs", runs, "--limit", "3")
    assert found["stage"] == "sft"
    assert found["generation"]["answers"] == 3
    assert found["bits_per_byte"]["documents"] == 3


def test_the_same_seed_measures_the_same_and_another_draws_other_answers(runs, capsys):
    first = result(capsys, "small:sft", "--runs", runs, "--limit", "4")
    assert result(capsys, "small:sft", "--runs", runs, "--limit", "4") == first
    other = result(capsys, "small:sft", "--runs", runs, "--limit", "4", "--seed", "1")
    assert other["generation"] != first["generation"]
    assert other["bits_per_byte"] == first["bits_per_byte"]


def test_an_ngram_checkpoint_is_scored_like_any_other_and_gives_no_answers(runs, capsys):
    base = result(capsys, "small:pretrain", "--runs", runs)["bits_per_byte"]["bits_per_byte"]
    found = result(capsys, runs / "small/counts/model", "--runs", runs)
    assert found["bits_per_byte"]["bits_per_byte"] < base
    assert found["generation"] == {}


def test_benchmarks_are_asked_with_every_number_of_shots(runs, capsys, benchmark):
    words = ("small", "--runs", runs, "--benchmarks", "piqa", "--shots", "2", "0", "--limit", "10")
    found = result(capsys, *words)["benchmarks"]
    assert list(found) == ["piqa"]
    assert list(found["piqa"]) == ["0", "2"]
    for metrics in found["piqa"].values():
        assert metrics["chance"] == 0.5
        assert metrics["questions"] == 10
        assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]


def test_examples_are_never_asked_and_the_split_never_moves(benchmark):
    asked, examples = measure.set_aside(benchmark)
    assert len(examples) == measure.NUM_EXAMPLES
    assert {q.question for q in asked} & {q.question for q in examples} == set()
    assert len(asked) + len(examples) == len(benchmark)
    assert measure.set_aside(benchmark) == (asked, examples)


def test_tables_name_what_was_measured(runs, capsys, benchmark, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert call("small", "--runs", runs, "--limit", "4", "--benchmarks", "piqa") == 0
    out = capsys.readouterr().out
    for words in (
        "bits per byte on held-out text",
        "user",
        "answers that end",
        "piqa",
        "50.0",
        "cut left",
    ):
        assert words in out
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert out.count("bits per byte on held-out text") == 1


def test_benchmarks_without_names_are_all_of_them(runs, capsys, benchmark):
    found = result(capsys, "small", "--runs", runs, "--limit", "1", "--shots", "0", "--benchmarks")
    assert len(found["benchmarks"]) >= 3


@pytest.mark.parametrize(
    ("words", "error", "complaint"),
    [
        (("small:reward",), RunError, "reward or value model"),
        (("small", "--benchmarks", "pica"), DataError, "unknown benchmark 'pica'"),
        (("small", "--source", "wikipeda"), DataError, "wikipedia"),
        (("small", "--limit", "0"), ConfigError, "--limit 0"),
        (("small", "--row-length", "0"), ConfigError, "--row-length 0"),
        (("small", "--shots", "-1"), ConfigError, "--shots -1"),
        (("tall",), RunError, "no run 'tall'"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(runs, words, error, complaint):
    with pytest.raises(error, match=complaint):
        call(*words, "--runs", runs)


def test_a_checkpoint_outside_a_run_needs_text_and_a_row_length(runs, benchmark):
    with pytest.raises(RunError, match="--source"):
        call(runs / "alone")
    with pytest.raises(RunError, match="--row-length"):
        call(runs / "alone", "--benchmarks", "piqa")
    assert call(runs / "alone", "--benchmarks", "piqa", "--row-length", "64", "--limit", "2") == 0


def test_code_of_the_users_folder_counts_as_code(runs, capsys, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prose.jsonl").write_text("".join(json.dumps(text_record(n)) + "\n" for n in range(40)))
    for n in range(40):
        (tmp_path / "mine" / f"{n}.py").write_text(f"def sat_{n}(mat):\n    return mat + {n}\n")
    whole = [
        Ingredient("user", str(tmp_path / "mine"), "other"),
        Ingredient("user-code", str(tmp_path / "mine"), "code"),
    ]
    folder = tmp_path / "runs" / "small" / "corpus" / "documents"
    write_corpus(whole, folder, cache=tmp_path, filters=FilterConfig(validation_share=0.5), seed=0)
    bits = result(capsys, "small:pretrain", "--runs", tmp_path / "runs")["bits_per_byte"]
    assert bits["bits_per_byte/all_code"] == bits["bits_per_byte/user-code"]
    assert bits["bits_per_byte/without_code"] == bits["bits_per_byte/user"]


def test_held_out_text_that_was_altered_is_refused_by_name(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / "small" / "corpus" / "documents" / "validation.jsonl"
    path.write_bytes(path.read_bytes().replace(b"the", b"eht", 1))
    with pytest.raises(DataError, match=r"validation\.jsonl was altered"):
        call("small", "--runs", tmp_path / "runs")
