"""Checkpoints as strangers leave them: settings written whole, weights twice or elsewhere, files that lie.

Against `transformers` and `peft` where they can make such a checkpoint themselves.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fledge.errors import CheckpointError
from fledge.formats.huggingface import load_huggingface, save_huggingface
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.qwen import Qwen, QwenConfig

OURS: dict[str, Any] = {
    "llama": Llama(LlamaConfig(89, 48, 2, 6, 2, 50, 64)),
    "gpt": GPT(GPTConfig(97, 36, 2, 4, 40)),
    "qwen": Qwen(QwenConfig(53, 36, 2, 3, 1, 12, 19, "biased", 64, is_head_tied=True)),
}
# What `PretrainedConfig.to_dict` held in the fourth `transformers`, beside what a family adds.
WHOLE: dict[str, Any] = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
    "torch_dtype": "float32", "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {},
    "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False,
    "cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20,
    "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "finetuning_task": None, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "tokenizer_class": None,
    "prefix": None, "sep_token_id": None, "decoder_start_token_id": None, "task_specific_params": None,
    "problem_type": None, "_name_or_path": "x", "_attn_implementation_autoset": True, "unsloth_version": "2025.1",
}  # fmt: skip


@pytest.fixture(params=OURS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory(family: str, tmp_path: Path) -> Path:
    save_huggingface(family, OURS[family], tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_huggingface("llama", OURS["llama"], tmp_path / "llama", max_shard_bytes=9000)
    return tmp_path / "llama"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_settings_that_were_written_whole_are_read(family: str, directory: Path) -> None:
    change(directory / "config.json", **WHOLE)
    assert load_huggingface(directory)[1].config == OURS[family].config  # type: ignore[comparison-overlap]


def test_settings_that_this_transformers_writes_whole_are_read(family: str, directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(directory)
    config.to_json_file(directory / "config.json", use_diff=False)
    assert load_huggingface(directory)[1].config == OURS[family].config  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"is_encoder_decoder": True}, "is_encoder_decoder True is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "not a setting of .* quantization_config"),
        ({"initializer_range": float("nan")}, "init_std: expected a finite number, got nan"),
        ({"initializer_range": float("inf")}, "init_std: expected a finite number"),
        ({"initializer_range": 10**400}, "init_std: expected a finite number"),
        ({"vocab_size": 10**30}, r"config\.json: "),
        ({"vocab_size": 2**62}, r"config\.json: "),
        ({"n_embd": 2**40, "hidden_size": 2**40, "intermediate_size": 2**40}, r"config\.json: "),
        ({"num_attention_heads": 0, "n_head": 0}, "num_attention_heads 0|must be positive|48 / 0"),
        ({"num_attention_heads": "3", "n_head": "3"}, "num_attention_heads|num_heads"),
        ({"num_hidden_layers": 10**6, "n_layer": 10**6}, "1000000 layers, where there are"),
        ({"rope_parameters": [], "rope_scaling": 3, "n_inner": []}, r"config\.json: "),
    ],
)
def test_settings_that_lie_are_refused_by_name(changes: dict[str, Any], complaint: str, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    always = ("is_encoder_decoder", "add_cross_attention", "pruned_heads", "quantization_config", "n_inner")
    change(directory / "config.json", **{key: value for key, value in changes.items() if key in {*config, *always}})
    with pytest.raises(CheckpointError, match=complaint) as refusal:
        load_huggingface(directory)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_brackets_without_end_are_refused(file: str, llama: Path) -> None:
    (llama / file).write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=rf"{file}: cannot be read"):
        load_huggingface(llama)


def test_as_many_query_heads_as_key_heads_where_qwen_leaves_that_open(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_huggingface("qwen", Qwen(QwenConfig(53, 36, 1, 3, 3, 12, 19, "biased", 64)), tmp_path / "qwen")
    change(tmp_path / "qwen/config.json", num_key_value_heads=None)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "qwen").num_key_value_heads == 3
    assert load_huggingface(tmp_path / "qwen")[1].config.num_kv_heads == 3  # type: ignore[union-attr]


def test_a_weight_that_is_there_under_two_names_is_refused(tmp_path: Path) -> None:
    save_huggingface("llama", OURS["llama"], tmp_path / "whole")
    path = tmp_path / "whole/model.safetensors"
    weights = load_file(path)
    save_file({**weights, "norm.weight": weights["model.norm.weight"] + 1}, path)
    with pytest.raises(CheckpointError, match=r"'(model\.)?norm\.weight' and '(model\.)?norm\.weight' are the same"):
        load_huggingface(tmp_path / "whole")


def test_a_shard_holds_what_the_index_says_and_nothing_else(llama: Path) -> None:
    index = json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    own, other = sorted(set(index.values()))[:2]
    name = next(weight for weight, file in index.items() if file == other)
    weights = load_file(llama / own)
    save_file({**weights, name: torch.zeros_like(load_file(llama / other)[name])}, llama / own)
    with pytest.raises(CheckpointError, match=rf"{own}: holds '{name}', which .*index\.json does not place there"):
        load_huggingface(llama)
    save_file(weights, llama / own)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**index, name: own}}))
    with pytest.raises(CheckpointError, match=rf"places '{name}' in {own}, which does not hold it"):
        load_huggingface(llama)


@pytest.mark.parametrize("place", ["", ".", "..", "a\0b", "/dev/zero", "model.safetensors/x", "\ud800"])
def test_an_index_names_files_beside_it_or_is_refused(place: str, llama: Path) -> None:
    index = json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(index, place)}))
    with pytest.raises(CheckpointError, match=r"cannot be read|is not the name of a file beside it"):
        load_huggingface(llama)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},  # one over the other
        {"a": entry(0, 8, [2]), "b": entry(12, 20, [2])},  # a hole
        {"a": entry(8, 0, [2])},
        {"a": entry(0, 8, [3])},
        {"a": entry(0, 2**63, [2**61])},
        {"a": entry(0, 8, [2**62, 2**62])},
        {"a": entry(-8, 0, [2])},
        {"a": entry(0, 8, [2], "F4096")},
        {"a": [0, 8]},
        {"__metadata__": 3, "a": entry(0, 8, [2])},
        [],
    ],
)
def test_a_header_that_lies_is_refused_by_name(header: Any, tmp_path: Path) -> None:
    save_huggingface("llama", OURS["llama"], tmp_path / "hostile")
    text = json.dumps(header).encode()
    (tmp_path / "hostile/model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(20))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_huggingface(tmp_path / "hostile")


@pytest.mark.parametrize("size", [0, 101_000_000, 2**63, 2**64 - 1])
def test_a_header_of_any_length_is_refused_before_it_is_read(size: int, tmp_path: Path) -> None:
    save_huggingface("llama", OURS["llama"], tmp_path / "hostile")
    (tmp_path / "hostile/model.safetensors").write_bytes(struct.pack("<Q", size) + b"{}" + bytes(100))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_huggingface(tmp_path / "hostile")


def test_names_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    save_huggingface("llama", OURS["llama"], tmp_path / "hostile")
    twice = f'{{"a": {json.dumps(entry(0, 8, [2]))}, "a": {json.dumps(entry(8, 16, [2]))}}}'.encode()
    (tmp_path / "hostile/model.safetensors").write_bytes(struct.pack("<Q", len(twice)) + twice + bytes(16))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_huggingface(tmp_path / "hostile")


def test_numbers_that_half_precision_cannot_hold_are_not_written(tmp_path: Path) -> None:
    model = Llama(LlamaConfig(11, 8, 1, 2, 2, 8, 16))
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[3, 3] = 1e5
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight' holds numbers that float16 cannot hold"):
        save_huggingface("llama", model, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()
    save_huggingface("llama", model, tmp_path / "half", dtype=torch.bfloat16)
