"""What the files of a Hugging Face directory say of its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers as library
from gguf_samples import CHATML, published
from tokenizers import processors

from fledge.errors import CheckpointError
from fledge.formats.huggingface_tokenizer import read_tokenizer

SETTINGS: dict[str, Any] = {
    "bos_token": {"content": "<|im_start|>", "lstrip": False},
    "eos_token": "<|im_end|>",
    "pad_token": None,
    "chat_template": "{{ 1 }}",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(published().data)
    write(tmp_path / "tokenizer_config.json", SETTINGS)
    return tmp_path


def write(path: Path, data: Any) -> None:
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def test_tokens_are_read_in_both_spellings(directory: Path) -> None:
    found = read_tokenizer(directory)
    assert (found.bos, found.ends, found.pad, found.begins) == ("<|im_start|>", ("<|im_end|>",), None, False)
    assert found.template == "{{ 1 }}"


def test_generation_also_ends_at_what_the_model_s_settings_name(directory: Path) -> None:
    write(directory / "generation_config.json", {"eos_token_id": [2, 0]})
    write(directory / "config.json", {"eos_token_id": 0})
    assert read_tokenizer(directory).ends == ("<|im_end|>", "<|endoftext|>")


def test_an_end_that_is_a_token_of_ordinary_text_is_none(directory: Path) -> None:
    """The default of a config class, left where it was by whoever trained another vocabulary."""
    letter = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]["a"]
    write(directory / "config.json", {"eos_token_id": letter})
    assert read_tokenizer(directory).ends == ("<|im_end|>",)


def test_special_tokens_that_are_named_apart_as_they_once_were(directory: Path) -> None:
    named = {"bos_token": "<|im_end|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<unused>"}
    write(directory / "special_tokens_map.json", named)
    write(directory / "tokenizer_config.json", {"bos_token": "<|im_start|>"})
    found = read_tokenizer(directory)
    assert (found.bos, found.ends, found.pad) == ("<|im_start|>", ("<|im_end|>",), "<unused>")


def test_a_tokenizer_alone_is_enough(directory: Path) -> None:
    (directory / "tokenizer_config.json").unlink()
    found = read_tokenizer(directory)
    assert (found.bos, found.ends, found.template) == (None, (), None)


def test_a_template_of_its_own_file_comes_first_and_of_several_the_default(directory: Path) -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(directory / "tokenizer_config.json", {**SETTINGS, "chat_template": several})
    assert read_tokenizer(directory).template == "d"
    write(directory / "chat_template.jinja", CHATML)
    assert read_tokenizer(directory).template == CHATML


def test_a_text_begins_with_bos_where_the_setting_or_the_post_processor_says_so(directory: Path) -> None:
    write(directory / "tokenizer_config.json", {**SETTINGS, "add_bos_token": True})
    assert read_tokenizer(directory).begins
    core = library.Tokenizer.from_str(published().data.decode())
    core.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    (directory / "tokenizer.json").write_text(core.to_str())
    write(directory / "tokenizer_config.json", SETTINGS)
    assert read_tokenizer(directory).begins
    write(directory / "tokenizer_config.json", {**SETTINGS, "add_bos_token": False})
    assert not read_tokenizer(directory).begins


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", '{"model": [], "added_tokens": []}', "tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", "[" * 200_000, "tokenizer.json: not a tokenizer.json"),
        ("tokenizer_config.json", "[" * 200_000, "tokenizer_config.json: cannot be read"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json: expected a JSON object"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
        ("generation_config.json", "{", "generation_config.json: cannot be read"),
    ],
)
def test_a_damaged_file_is_named(file: str, content: str, complaint: str, directory: Path) -> None:
    write(directory / file, content)
    with pytest.raises(CheckpointError, match=complaint):
        read_tokenizer(directory)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    for file, advice in (
        (None, "a model comes with one"),
        ("vocab.json", "a model comes with one"),
        ("merges.txt", "let transformers make it of vocab.json and merges.txt"),
    ):
        if file:
            (tmp_path / file).touch()
        with pytest.raises(CheckpointError, match=advice):
            read_tokenizer(tmp_path)
