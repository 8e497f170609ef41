"""Checkpoints say what they are; what is damaged is refused by name; training states survive a crash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fledge.config import to_json
from fledge.errors import CheckpointError
from fledge.formats.checkpoint import (
    CheckpointInfo,
    clear_states,
    load_model,
    load_state,
    save_model,
    save_state,
)
from fledge.models.gpt import GPT, GPTConfig
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the rain in the garden, 园里下雨"] * 20, TokenizerConfig(vocab_size=300))


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> tuple[Path, GPT]:
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, width=16, num_layers=1, num_heads=2, max_positions=8))
    info = CheckpointInfo(
        family="gpt",
        config=to_json(model.config),
        stage="pretrain",
        tokenizer_hash=tokenizer.hash,
        template_hash=ChatRenderer(tokenizer).hash,
        parents={"base": "0" * 64},
    )
    save_model(tmp_path / "model", model, tokenizer, info)
    return tmp_path / "model", model


def test_a_model_comes_back_as_it_was_tied_head_included(saved: tuple[Path, GPT]) -> None:
    directory, model = saved
    loaded = load_model(directory)
    tokens_BT = torch.tensor([[1, 5, 9]])
    assert torch.equal(loaded.model.next_logprobs(tokens_BT), model.eval().next_logprobs(tokens_BT))  # type: ignore[operator]
    assert loaded.info.parents == {"base": "0" * 64}
    assert sorted(path.name for path in directory.iterdir()) == ["model.safetensors", "run.json", "tokenizer.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["truncate", "alter", "remove"])
def test_a_damaged_file_is_refused_by_name(saved: tuple[Path, GPT], name: str, harm: str) -> None:
    path = saved[0] / name
    data = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-3] if harm == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=name):
        load_model(saved[0])


def test_another_template_is_refused(saved: tuple[Path, GPT]) -> None:
    path = saved[0] / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "template_hash": "other"}))
    with pytest.raises(CheckpointError, match="another chat template"):
        load_model(saved[0])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 9, "files": {}}'])
def test_a_damaged_description_is_refused(saved: tuple[Path, GPT], text: str) -> None:
    (saved[0] / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        load_model(saved[0])


def test_a_folder_that_is_no_checkpoint_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a fledge checkpoint"):
        load_model(tmp_path)


def test_the_newest_state_is_kept_and_equal_to_the_bit(tmp_path: Path) -> None:
    shared = torch.randn(3)
    save_state(tmp_path, 1, {"a": torch.zeros(2)}, {"step": 1})
    save_state(tmp_path, 12, {"a": shared, "b": shared, "step": torch.tensor(2.0)}, {"step": 12, "beta": 0.1})
    found = load_state(tmp_path)
    assert found is not None
    step, tensors, scalars = found
    assert (step, scalars) == (12, {"step": 12, "beta": 0.1})
    assert torch.equal(tensors["a"], shared)
    assert torch.equal(tensors["b"], shared)
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000012"]
    clear_states(tmp_path)
    assert load_state(tmp_path) is None


def test_a_state_that_was_never_finished_is_not_seen(tmp_path: Path) -> None:
    save_state(tmp_path, 1, {"a": torch.zeros(2)}, {})
    (tmp_path / "state-00000002.writing").mkdir()
    (tmp_path / "state-00000002.writing" / "state.safetensors").write_bytes(b"half")
    found = load_state(tmp_path)
    assert found is not None
    assert found[0] == 1


def test_a_state_whose_removal_was_killed_is_not_found_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 7, {"a": torch.zeros(2)}, {})

    def killed(path: Path) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            clear_states(tmp_path)
    assert load_state(tmp_path) is None
    clear_states(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_killed_saves_left_goes_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "state-00000002.writing").mkdir()
    save_state(tmp_path, 3, {"a": torch.zeros(2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000003"]


def test_an_altered_state_is_refused_by_name(tmp_path: Path) -> None:
    save_state(tmp_path, 1, {"a": torch.zeros(2)}, {})
    path = tmp_path / "state-00000001" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="truncated or altered"):
        load_state(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_a_state_whose_description_is_damaged_is_refused_by_name(text: str, tmp_path: Path) -> None:
    save_state(tmp_path, 1, {"a": torch.zeros(2)}, {})
    (tmp_path / "state-00000001" / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json: damaged .*; remove"):
        load_state(tmp_path)
