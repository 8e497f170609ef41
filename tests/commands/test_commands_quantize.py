"""`fledge quantize` and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.cli import main
from fledge.config import to_json
from fledge.formats.checkpoint import CheckpointInfo, read_info, save_model
from fledge.infer.quantize import load_model
from fledge.models.llama import Llama, LlamaConfig
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(
        ["a bird flies out of the nest, and the nest is empty"] * 3, TokenizerConfig("bpe", 300)
    )
    model = Llama(LlamaConfig(tokenizer.vocab_size, 64, 2, 2, 1, 96, 64)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    info = CheckpointInfo("llama", to_json(model.config), "sft", tokenizer.hash, ChatRenderer(tokenizer).hash)
    save_model(tmp_path / "bird", model, tokenizer, info)
    return tmp_path / "bird"


def test_the_small_checkpoint_lies_beside_the_model_and_names_it_as_parent(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(directory), "--to", "int8"]) == 0
    shown = capsys.readouterr().out
    small = directory.with_name("bird-int8")
    info, files = read_info(small)
    assert info.parents == {"float": read_info(directory)[1]["model.safetensors"]}
    assert files["model.safetensors"][:12] in shown
    assert "no held-out text" in shown
    assert f"fledge chat {small}" in shown
    assert main(["quantize", str(directory), "--to", "int8"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["quantize", str(small), "--to", "int4"]) == 2
    assert "quantised" in capsys.readouterr().err


def test_what_rounding_costs_is_told_where_there_is_text(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([1.25, 1.2634] * 2)
    asked: list[Any] = []

    def language(loaded: Any, directory: Path, order: Any) -> dict[str, float]:
        asked.append((order.sources, order.limit))
        return {"bits_per_byte": next(measured)}

    monkeypatch.setattr("fledge.recipes.measure.language", language)
    command = ["quantize", str(directory), "--to", "int4", "--skip", "down", "--source", "wikipedia", "--limit", "7"]
    assert main([*command, "--out", str(tmp_path / "small")]) == 0
    assert "1.2634, +0.0134 by rounding" in capsys.readouterr().out
    assert asked == [(("wikipedia",), 7)] * 2
    assert main([*command, "--out", str(tmp_path / "again"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bits_per_byte_before"], found["bits_per_byte"]) == (1.25, 1.2634)
    assert found["bytes"] < 0.5 * found["bytes_before"]
    assert isinstance(load_model(tmp_path / "small").model.get_submodule("blocks.0.mlp.down"), torch.nn.Linear)


def test_a_wrong_layer_or_number_is_one_line_and_leaves_nothing(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(directory), "--to", "int8", "--skip", "dwn"]) == 2
    assert "did you mean 'down'?" in capsys.readouterr().err
    assert main(["quantize", str(directory), "--to", "int8", "--limit", "-1"]) == 2
    assert "--limit -1" in capsys.readouterr().err
    assert not directory.with_name("bird-int8").exists()
