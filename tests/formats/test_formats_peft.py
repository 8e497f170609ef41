"""PEFT adapters, both directions, against the `peft` library on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fledge.errors import CheckpointError
from fledge.formats.huggingface import load_huggingface, save_huggingface
from fledge.formats.peft import load_adapter, save_adapter
from fledge.layers.attention import RowContext
from fledge.layers.lora import Adapter, AdapterBank, LoraConfig, Pair
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.pocket import Pocket, PocketConfig
from fledge.models.qwen import Qwen, QwenConfig

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

OURS: dict[str, Any] = {
    "llama": Llama(LlamaConfig(89, 48, 2, 6, 2, 50, 64)),
    "gpt": GPT(GPTConfig(97, 36, 2, 4, 40)),
    "qwen": Qwen(QwenConfig(53, 36, 2, 3, 1, 8, 19, "normed", 64, is_head_tied=True)),
}
THEIRS = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"], "r": 3, "lora_alpha": 7},
    "gpt": {"target_modules": ["c_attn", "c_fc"], "r": 4, "lora_alpha": 2, "fan_in_fan_out": True},
    "qwen": {
        "target_modules": ["q_proj", "k_proj", "up_proj"], "r": 2, "lora_alpha": 3, "use_rslora": True,
        "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"up_proj": 9},
    },
}  # fmt: skip


def filled(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def logits(model: Any, tokens_BT: Tensor, adapter: Adapter | None = None) -> Tensor:
    context = RowContext(tokens_BT)
    bank = AdapterBank(model)
    if adapter is not None:
        bank.load("a", adapter)
        bank.route([("a", tokens_BT.numel())])
    with torch.no_grad():
        found: Tensor = model.unembed(model.hidden(model.embed(tokens_BT, context), context))
    if adapter is not None:
        bank.unload("a")
    return found


def some_tokens(model: Any) -> Tensor:
    return torch.randint(0, model.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=OURS)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Any]:
    """(family, our model, the same model in transformers)."""
    name: str = request.param
    ours = filled(OURS[name], 3)
    save_huggingface(name, ours, tmp_path / "base")
    return name, ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()


def test_an_adapter_of_theirs_gives_their_logits(both: tuple[str, Any, Any], tmp_path: Path) -> None:
    name, ours, theirs = both
    tokens_BT = some_tokens(ours)
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **THEIRS[name]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.normal_(0.0, 0.3, generator=generator)
        expected = adapted.eval()(tokens_BT).logits
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = load_adapter(tmp_path / "adapter", ours)
    found = logits(ours, tokens_BT, adapter)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits(ours, tokens_BT), atol=0.1)


def made_by_peft(theirs: Any, directory: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Their model with a random adapter, which is saved as they save it."""
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.normal_(0.0, 0.3, generator=generator)
                parameter.copy_(parameter.to(dtype))
    adapted.save_pretrained(directory)
    path = directory / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    return adapted


STRANGE: dict[str, dict[str, Any]] = {
    "modules by a pattern": {"target_modules": r".*layers\.1\..*(q|up)_proj", "r": 3},
    "every linear layer": {"target_modules": "all-linear", "r": 2, "lora_alpha": 3},
    "ranks and alphas by patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"], "r": 2, "lora_alpha": 5,
        "rank_pattern": {r"layers\.(0|1)\.self_attn\.q_proj": 4, "^model.layers.0.mlp.down_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 9, "^model.layers.0.mlp.down_proj": 1.5},
    },
    "alphas by patterns that overlap": {
        "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"], "r": 2, "lora_alpha": 5,
        "rank_pattern": {r".*\.(1|2)\.mlp\.\w+": 3},
        # In the order in which PEFT writes them, which is that of the alphabet: the first that matches counts.
        "alpha_pattern": {
            r"(up|down)_proj$": 0.5, r"^model\.layers\.0\..*": 1.5, r"layers\.[1-9]\d*\.self_attn\.(q|k)_proj": 9,
        },
    },
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "orthogonal from the start": {"target_modules": ["o_proj"], "r": 4, "init_lora_weights": "orthogonal"},
    "rank-stabilised, dropped out": {"target_modules": ["gate_proj"], "use_rslora": True, "lora_dropout": 0.3},
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, Any]:
    ours = filled(OURS["llama"], 3)
    save_huggingface("llama", ours, tmp_path / "base")
    return ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_of_every_make_give_the_logits_of_peft(
    llama: tuple[Any, Any], name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    ours, theirs = llama
    adapted = made_by_peft(theirs, tmp_path / "adapter", dtype, **STRANGE[name])
    with torch.no_grad():
        expected = adapted(some_tokens(ours)).logits
    found = logits(ours, some_tokens(ours), load_adapter(tmp_path / "adapter", ours))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits(ours, some_tokens(ours)), atol=1e-3)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen"])  # the second's head is its embedding
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_of_the_head_comes_with_the_head_and_is_read(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    ours = filled(OURS[family], 3)
    save_huggingface(family, ours, tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapted = made_by_peft(theirs, tmp_path / "adapter", dtype, target_modules=["lm_head", "q_proj"], r=3)
    path = tmp_path / "adapter/adapter_model.safetensors"
    copies = {name: tensor for name, tensor in load_file(path).items() if "lora_" not in name}
    assert copies
    with torch.no_grad():
        expected = adapted(some_tokens(ours)).logits
    found = logits(ours, some_tokens(ours), load_adapter(tmp_path / "adapter", ours))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    save_file(load_file(path) | {name: tensor + 1 for name, tensor in copies.items()}, path)
    with pytest.raises(CheckpointError, match=r"(lm_head|embed_tokens).*weight' is not the model's own weight"):
        load_adapter(tmp_path / "adapter", ours)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices \[1, 2\] is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
    ],
)
def test_what_peft_itself_makes_beyond_plain_lora_is_refused_by_name(
    llama: tuple[Any, Any], settings: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    ours, theirs = llama
    made_by_peft(theirs, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    with pytest.raises(CheckpointError, match=complaint):
        load_adapter(tmp_path / "adapter", ours)


def our_adapter(model: Any, ends: tuple[str, ...], config: LoraConfig) -> Adapter:
    generator = torch.Generator().manual_seed(7)
    pairs = {}
    for name, module in model.named_modules():
        if name.endswith(ends):
            a = torch.randn(config.rank, module.in_features, generator=generator) * 0.3
            b = torch.randn(module.out_features, config.rank, generator=generator) * 0.3
            pairs[name] = Pair(a, b, config.scale)
    return Adapter(config, pairs)


@pytest.mark.parametrize("ends", [("query", "mlp.up"), ("query", "key", "value"), ("blocks.1.attention.value",)])
@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_of_ours_gives_our_logits_in_peft(
    both: tuple[str, Any, Any], ends: tuple[str, ...], stabilised: bool, tmp_path: Path
) -> None:
    _, ours, theirs = both
    tokens_BT = some_tokens(ours)
    adapter = our_adapter(ours, ends, LoraConfig(3, 5.0, is_rank_stabilised=stabilised))
    save_adapter(adapter, ours, tmp_path / "adapter")
    expected = logits(ours, tokens_BT, adapter)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(tokens_BT).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    again = load_adapter(tmp_path / "adapter", ours)
    torch.testing.assert_close(logits(ours, tokens_BT, again), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = OURS["llama"]
    save_adapter(our_adapter(model, ("query",), LoraConfig(2, 4.0)), model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_we_write_names_all_of_a_kind_by_their_end(directory: Path) -> None:
    settings = json.loads((directory / "adapter_config.json").read_text())
    assert (settings["target_modules"], settings["rank_pattern"], settings["alpha_pattern"]) == (["q_proj"], {}, {})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"lora_bias": True}, "lora_bias True is not supported"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"something_new": 3}, "something_new 3 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"lora_alpha": "much"}, "lora_alpha 'much' must be"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan must be"),
        ({"lora_alpha": 10**400}, "lora_alpha 10+ must be"),
        ({"r": 2.5}, "r 2.5 must be a int"),
        ({"alpha_pattern": {"(a+": 3}}, r"alpha_pattern '\(a\+' cannot be used: a '\(' is not closed"),
        ({"alpha_pattern": {"(?=a)b": 3}}, "groups that look ahead"),
        ({"alpha_pattern": {f"(a{{90}}b{i}){{9}}": 3 for i in range(400)}}, "more patterns than any model has"),
        ({"alpha_pattern": {"q_proj": "much"}}, "alpha_pattern gives 'q_proj' 'much'"),
        ({"alpha_pattern": {"q_proj": [1]}}, "alpha_pattern gives"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern gives"),
        ({"alpha_pattern": [1]}, "alpha_pattern .* must be a dict"),
    ],
)
def test_a_setting_that_we_do_not_compute_is_refused_by_name(
    changes: dict[str, Any], complaint: str, directory: Path
) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=complaint):
        load_adapter(directory, OURS["llama"])


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(KEY), "one half of its pair"),
        (lambda t: t.update({KEY: torch.zeros(2, 47)}), r"\(rank, 48\)"),
        (lambda t: t.update({KEY: torch.zeros(0, 48)}), r"\(rank, 48\)"),
        (lambda t: t.update({KEY: torch.full((2, 48), torch.nan)}), "undefined"),
        (lambda t: t.update({KEY: torch.zeros(2, 48, dtype=torch.int8)}), "none that are floats"),
        (lambda t: t.update({KEY.replace("q_proj", "z_proj"): torch.zeros(2, 48)}), "z_proj"),
        (lambda t: t.update({KEY.replace("layers.0", "layers.7"): torch.zeros(2, 48)}), "layers.7"),
        (lambda t: t.update({"base_model.model.lora_embedding_A": torch.zeros(2)}), "lora_embedding_A"),
        (lambda t: t.update({KEY.removeprefix("base_model.model."): torch.zeros(2, 48)}), "no part of a LoRA pair"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(48)}), "not the model's own weight"),
        (lambda t: t.clear(), "no adapter"),
    ],
)
def test_tensors_that_do_not_belong_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], object], complaint: str, directory: Path
) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=complaint):
        load_adapter(directory, OURS["llama"])


def test_a_pickled_adapter_is_not_read(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_adapter(directory, OURS["llama"])


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "{", "null"])
def test_settings_that_are_none_are_refused(text: str, directory: Path) -> None:
    (directory / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: (cannot be read|expected a JSON object)"):
        load_adapter(directory, OURS["llama"])


def test_a_truncated_adapter_is_refused(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(directory, OURS["llama"])


def test_a_family_without_a_published_layout_has_no_adapter_directory(tmp_path: Path) -> None:
    model = Pocket(PocketConfig(43, 24, 1, 2, table_rows=0))
    with pytest.raises(CheckpointError, match="no Hugging Face layout"):
        save_adapter(our_adapter(model, ("query",), LoraConfig(2)), model, tmp_path / "out")


def test_a_model_read_from_hugging_face_takes_adapters(directory: Path, tmp_path: Path) -> None:
    save_huggingface("llama", OURS["llama"], tmp_path / "base")
    _, model = load_huggingface(tmp_path / "base")
    assert load_adapter(directory, model).config.targets == ("attention.query",)
