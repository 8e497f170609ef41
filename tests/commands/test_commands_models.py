"""`fledge models` and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fledge.cli import main
from fledge.config import to_json
from fledge.formats.checkpoint import CheckpointInfo, save_model
from fledge.models.gpt import PRESETS, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.pocket import Pocket, PocketConfig
from fledge.registry import FAMILIES
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from fledge.types import Conversation


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a bird flies out of the nest, and the nest is empty"] * 3, TokenizerConfig("bpe", 300))


def write_checkpoint(directory: Path, family: str, model: torch.nn.Module, tokenizer: Tokenizer) -> None:
    info = CheckpointInfo(family, to_json(model.config), "sft", tokenizer.hash, ChatRenderer(tokenizer).hash)
    save_model(directory, model, tokenizer, info)


def small_llama(tokenizer: Tokenizer) -> Llama:
    model = Llama(LlamaConfig(tokenizer.vocab_size, 24, 2, 6, 2, 17, 64, is_head_tied=True)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_the_table_holds_every_family_and_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert all(row.name in shown for row in FAMILIES)
    assert "124,439,808" in shown
    assert main(["models", "list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["name"]: row["parameters"] for row in rows}["llama3-8b"] == 8_030_261_248


def test_show_prints_every_field_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "gpt2-124m"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} = " in shown for name in GPTConfig.__dataclass_fields__)
    assert main(["models", "show", "gpt2-124m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == to_json(PRESETS["gpt2-124m"])


def test_an_unknown_size_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "gpt2-124"]) == 2
    assert capsys.readouterr().err == "fledge: unknown model 'gpt2-124'; did you mean 'gpt2-124m'?\n"


def test_an_exported_model_talks_the_same_in_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    model = small_llama(tokenizer)
    write_checkpoint(tmp_path / "model", "llama", model, tokenizer)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "huggingface"]) == 0

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the nest, 鸟 and\n a  bird"
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    renderer = ChatRenderer(tokenizer)
    conversation = Conversation.of(("system", "be brief"), ("user", "bird?"), ("assistant", "yes"), ("user", text))
    messages = [{"role": message.role, "content": message.text} for message in conversation.messages]
    ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tuple(ids) == renderer.prompt(conversation)
    assert set(theirs.generation_config.eos_token_id) == renderer.stop_ids
    assert their_tokenizer.pad_token_id == tokenizer.pad_id
    tokens_BT = torch.tensor([ids])
    with torch.no_grad():
        logprobs_BTV = theirs(tokens_BT).logits.log_softmax(-1)
        torch.testing.assert_close(logprobs_BTV, model.next_logprobs(tokens_BT), atol=1e-5, rtol=1e-5)


def test_a_family_without_a_published_layout_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Pocket(PocketConfig(tokenizer.vocab_size, 24, 1, 2, table_rows=8))
    write_checkpoint(tmp_path / "model", "pocket", model, tokenizer)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "huggingface"]) == 2
    assert "no Hugging Face layout holds this pocket" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
