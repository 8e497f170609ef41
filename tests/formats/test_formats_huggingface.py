"""Hugging Face directories, both directions, against `transformers` on randomly initialised models of odd shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fledge.errors import CheckpointError
from fledge.formats.huggingface import load_huggingface, save_huggingface
from fledge.layers.attention import RowContext
from fledge.layers.rope import Llama3Scaling
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.qwen import Qwen, QwenConfig

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
THEIRS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_positions=40, n_embd=36, n_layer=3, n_head=4),
    "gpt2-one-odd-head": lambda: transformers.GPT2Config(
        vocab_size=11, n_positions=25, n_embd=7, n_layer=1, n_head=1, layer_norm_epsilon=1e-3
    ),
    "gpt1": lambda: transformers.OpenAIGPTConfig(vocab_size=61, n_positions=33, n_embd=30, n_layer=3, n_head=5),
    "llama-grouped": lambda: transformers.LlamaConfig(
        vocab_size=89, hidden_size=48, intermediate_size=50, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64,
    ),
    "llama-one-kv-head-tied": lambda: transformers.LlamaConfig(
        vocab_size=53, hidden_size=36, intermediate_size=19, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-5,
    ),
    "llama3-rope": lambda: transformers.LlamaConfig(
        vocab_size=71, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, rope_parameters=dict(LLAMA3_ROPE), max_position_embeddings=128,
    ),
    "qwen2-grouped": lambda: transformers.Qwen2Config(
        vocab_size=89, hidden_size=48, intermediate_size=50, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64,
    ),
    "qwen2-tied": lambda: transformers.Qwen2Config(
        vocab_size=53, hidden_size=36, intermediate_size=19, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-5,
    ),
    "qwen3-wide-heads": lambda: transformers.Qwen3Config(
        vocab_size=71, hidden_size=40, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=18, max_position_embeddings=64, rope_theta=700.0,
    ),
    "qwen3-tied": lambda: transformers.Qwen3Config(
        vocab_size=53, hidden_size=36, intermediate_size=19, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    ),
}  # fmt: skip
OURS = {
    "gpt2": GPT(GPTConfig(97, 36, 3, 4, 40)),
    "gpt1": GPT(GPTConfig(61, 30, 2, 5, 33, "post_norm", residual_dropout=0.2)),
    "llama": Llama(LlamaConfig(89, 48, 3, 6, 2, 50, 64, rope_base=700.0)),
    "llama-tied": Llama(LlamaConfig(53, 36, 2, 3, 1, 19, 2048, is_head_tied=True, norm_eps=1e-6)),
    "llama3-rope": Llama(LlamaConfig(71, 64, 2, 2, 2, 80, 128, 5000.0, Llama3Scaling(8.0, 1.0, 4.0, 16))),
    "qwen2": Qwen(QwenConfig(89, 48, 3, 6, 2, 8, 50, "biased", 64, rope_base=700.0)),
    "qwen2-tied": Qwen(QwenConfig(53, 36, 2, 3, 1, 14, 19, "biased", 32, is_head_tied=True, norm_eps=1e-5)),
    "qwen3": Qwen(QwenConfig(71, 40, 3, 4, 2, 18, 24, "normed", 64)),
}


def make_theirs(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(THEIRS[name]()).eval()
    with torch.no_grad():  # their initialisation leaves biases 0 and gains 1, where a mix-up would not show
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def some_tokens(vocab_size: int, length: int = 24) -> Tensor:
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def our_logits(model: Any, tokens_BT: Tensor) -> Tensor:
    context = RowContext(tokens_BT)
    return model.unembed(model.hidden(model.embed(tokens_BT, context), context))


def rewrite_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def gpt2_directory(tmp_path: Path) -> Path:
    make_theirs("gpt2").save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("name", THEIRS)
def test_logits_of_their_directory_equal_theirs(name: str, tmp_path: Path) -> None:
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path / "theirs")
    _, ours = load_huggingface(tmp_path / "theirs")
    tokens_BT = some_tokens(ours.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours, tokens_BT), theirs(tokens_BT).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_logits_of_our_directory_are_the_same_in_transformers(name: str, tmp_path: Path) -> None:
    ours = OURS[name].eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    save_huggingface(name.split("-")[0].rstrip("123"), ours, tmp_path / "ours")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens_BT = some_tokens(ours.vocab_size)
    with torch.no_grad():
        expected = our_logits(ours, tokens_BT)
        torch.testing.assert_close(theirs.eval()(tokens_BT).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_what_we_write_we_read_back_unchanged(name: str, tmp_path: Path) -> None:
    ours, family = OURS[name], name.split("-")[0].rstrip("123")
    save_huggingface(family, ours, tmp_path / "ours", max_shard_bytes=5000)
    assert len(list(tmp_path.glob("ours/model-*-of-*.safetensors"))) > 2
    found_family, again = load_huggingface(tmp_path / "ours")
    assert (found_family, again.config) == (family, ours.config)
    assert not again.training
    for (name_a, a), (name_b, b) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert name_a == name_b
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["gpt2", "llama-one-kv-head-tied"])
def test_tied_heads_stay_tied_and_train_as_one_parameter(name: str, tmp_path: Path) -> None:
    make_theirs(name).save_pretrained(tmp_path / "theirs")
    _, ours = load_huggingface(tmp_path / "theirs")
    assert ours.head.weight is ours.tokens.weight
    assert ours.tokens.weight.requires_grad


@pytest.mark.parametrize("shard", ["1KB", "20KB"])
def test_shards_that_they_wrote_are_read(shard: str, tmp_path: Path) -> None:
    theirs = make_theirs("llama-grouped")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    _, ours = load_huggingface(tmp_path / "theirs")
    tokens_BT = some_tokens(ours.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours, tokens_BT), theirs(tokens_BT).logits, atol=1e-5, rtol=1e-5)


def test_our_shards_are_read_by_transformers(tmp_path: Path) -> None:
    ours = OURS["llama"].eval()
    save_huggingface("llama", ours, tmp_path / "ours", max_shard_bytes=20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens_BT = some_tokens(ours.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens_BT).logits, our_logits(ours, tokens_BT), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_files_are_cast_to_what_is_asked(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = make_theirs("gpt2").to(dtype)
    theirs.save_pretrained(tmp_path / "half")
    _, as_float = load_huggingface(tmp_path / "half")
    _, as_half = load_huggingface(tmp_path / "half", dtype=dtype)
    assert {parameter.dtype for parameter in as_float.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in as_half.parameters()} == {dtype}
    tokens_BT = some_tokens(as_float.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(
            our_logits(as_float, tokens_BT), theirs.float()(tokens_BT).logits, atol=1e-5, rtol=1e-5
        )


def test_half_files_of_ours_are_half_and_say_so(tmp_path: Path) -> None:
    save_huggingface("gpt", OURS["gpt2"], tmp_path / "half", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_names_without_prefix_and_old_buffers_are_read(gpt2_directory: Path) -> None:
    _, expected = load_huggingface(gpt2_directory)
    file = gpt2_directory / "model.safetensors"
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    weights["h.2.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    save_file(weights, file)
    _, found = load_huggingface(gpt2_directory)
    for a, b in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama-grouped", "qwen2-grouped", "qwen3-tied"])
def test_no_way_of_stretching_the_rotation_that_transformers_knows_is_passed_over(name: str, tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    make_theirs(name).save_pretrained(tmp_path / "theirs")
    computed = {"default", "llama3"} if name.startswith("llama") else {"default"}
    others = {*ROPE_INIT_FUNCTIONS, "linear", "yarn", "longrope"} - computed
    for kind in others:
        for spelling in ("type", "rope_type"):
            rewrite_config(tmp_path / "theirs", rope_scaling={spelling: kind, "factor": 2.0}, rope_parameters=None)
            with pytest.raises(CheckpointError, match=f"rope type '{kind}' is not supported: known"):
                load_huggingface(tmp_path / "theirs")
    for more in ({"partial_rotary_factor": 0.5}, {"something_new": 1}):
        rewrite_config(tmp_path / "theirs", rope_parameters={"rope_type": "default", **more})
        with pytest.raises(CheckpointError, match=rf"rope type 'default' takes .* got \['{next(iter(more))}'\]"):
            load_huggingface(tmp_path / "theirs")


def test_the_old_and_the_new_spelling_of_the_rotation_mean_the_same(tmp_path: Path) -> None:
    make_theirs("llama3-rope").save_pretrained(tmp_path / "theirs")
    _, new = load_huggingface(tmp_path / "theirs")
    old = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    rewrite_config(tmp_path / "theirs", rope_parameters=None, rope_scaling=old, rope_theta=5000)
    assert load_huggingface(tmp_path / "theirs")[1].config == new.config


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom' is not supported"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_inner": 17}, "n_inner 17"),
        ({"sliding_window": 4, "auto_map": {}}, "auto_map, sliding_window"),
        ({"n_embd": "36"}, "width"),
        ({"n_head": 5}, "num_heads"),
        ({"n_layer": 4}, "12 missing weight"),
        ({"n_layer": 2}, "12 unexpected weight"),
        ({"vocab_size": 98}, "shape"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(
    changes: dict[str, Any], complaint: str, gpt2_directory: Path
) -> None:
    rewrite_config(gpt2_directory, **changes)
    with pytest.raises(CheckpointError, match=complaint) as refusal:
        load_huggingface(gpt2_directory)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"transformer.ln_f.bias": None}, "1 missing weight.*ln_f.bias"),
        ({"score.weight": torch.ones(2, 2)}, "1 unexpected weight.*score.weight"),
        ({"transformer.ln_f.bias": torch.ones(35)}, r"ln_f.bias' is of shape \(35,\)"),
        (
            {"transformer.ln_f.bias": torch.full((36,), float("nan"))},
            "ln_f.bias' holds infinite or undefined",
        ),
        ({"transformer.ln_f.bias": torch.ones(36, dtype=torch.int8)}, "ln_f.bias' is of type torch.int8"),
        ({"lm_head.weight": torch.ones(97, 36)}, "ties the head to the embedding, but they differ"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    changes: dict[str, Tensor | None], complaint: str, gpt2_directory: Path
) -> None:
    file = gpt2_directory / "model.safetensors"
    weights = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file)
    with pytest.raises(CheckpointError, match=complaint):
        load_huggingface(gpt2_directory)


def test_a_pickle_is_refused_and_the_way_out_named(gpt2_directory: Path) -> None:
    (gpt2_directory / "model.safetensors").rename(gpt2_directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*safetensors"):
        load_huggingface(gpt2_directory)


def test_a_truncated_or_absent_file_is_refused_by_name(gpt2_directory: Path) -> None:
    file = gpt2_directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
        load_huggingface(gpt2_directory)
    file.unlink()
    with pytest.raises(CheckpointError, match="found neither"):
        load_huggingface(gpt2_directory)
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        load_huggingface(gpt2_directory / "elsewhere")


@pytest.mark.parametrize("place", ["../model.safetensors", "{root}/model.safetensors", "..", "absent.safetensors"])
def test_an_index_cannot_point_elsewhere(place: str, gpt2_directory: Path) -> None:
    outside = gpt2_directory.parent / "model.safetensors"  # all the weights are there, and yet
    (gpt2_directory / "model.safetensors").rename(outside)
    place = place.format(root=gpt2_directory.parent)
    index = {"weight_map": dict.fromkeys(load_file(outside), place)}
    (gpt2_directory / "model.safetensors.index.json").write_text(json.dumps(index))
    is_beside = "/" not in place
    with pytest.raises(CheckpointError, match="cannot be read" if is_beside else "is not the name of a file beside it"):
        load_huggingface(gpt2_directory)


def test_a_banded_model_has_no_published_layout(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no Hugging Face layout"):
        save_huggingface("gpt", GPT(GPTConfig(11, 8, 2, 2, 16, window=4)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_not_overwritten(gpt2_directory: Path) -> None:
    before = (gpt2_directory / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        save_huggingface("gpt", OURS["gpt2"], gpt2_directory)
    assert (gpt2_directory / "config.json").read_bytes() == before


def test_token_ids_and_companions_are_written_beside_the_weights(tmp_path: Path) -> None:
    save_huggingface(
        "gpt",
        OURS["gpt2"],
        tmp_path / "out",
        token_ids={"eos_token_id": 0},
        companions={"tokenizer.json": "{}"},
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, None)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
