"""Quantising models: the grids, the layers that stand in, tied heads, checkpoints that come back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fledge.config import to_json
from fledge.errors import CheckpointError, UserError
from fledge.formats import checkpoint
from fledge.formats.checkpoint import CheckpointInfo, LoadedModel, load_model
from fledge.formats.gguf_tensors import Blocks
from fledge.infer import kernel_twins as twins
from fledge.infer import kernels, quantize
from fledge.infer.quantized import Int4Linear, Int8Embedding, Int8Linear
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

WIDTH = 64


def tiny(family: str = "llama", *, is_head_tied: bool = True, vocab_size: int = 300) -> GPT | Llama:
    random = torch.Generator().manual_seed(0)
    if family == "gpt":
        model: GPT | Llama = GPT(GPTConfig(vocab_size, WIDTH, 2, 2, 64))
    else:
        model = Llama(LlamaConfig(vocab_size, WIDTH, 2, 2, 1, 96, 64, is_head_tied=is_head_tied))
    model.init_weights(random)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # so that predictions differ from one another
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))


def weights_of(nibbles_NGI: Tensor, scales_NG: Tensor, minima_NG: Tensor) -> Tensor:
    return (nibbles_NGI * scales_NG.float()[..., None] + minima_NG.float()[..., None]).flatten(1)


def test_int8_uses_all_its_numbers_in_every_channel() -> None:
    weight_NK = torch.randn(40, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 40)[:, None]
    bytes_NK, scales_N = quantize.int8_matrix(weight_NK)
    assert (bytes_NK.abs().amax(dim=1) == 127).all()
    assert ((bytes_NK * scales_N[:, None] - weight_NK).abs() <= scales_N[:, None] * 0.5001).all()


def test_a_channel_of_zeros_stays_zero() -> None:
    for matrix in (torch.zeros(40, 64), torch.full((40, 64), 1e-41)):
        bytes_NK, scales_N = quantize.int8_matrix(matrix)
        assert (bytes_NK * scales_N[:, None]).abs().max() < 1e-38
        assert weights_of(*quantize.int4_matrix(matrix)).abs().max() < 1e-38


def test_int4_is_better_than_the_plain_grid_from_least_to_largest() -> None:
    weight_NK = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    groups = weight_NK.reshape(-1, 32)
    low, step = groups.amin(dim=1), (groups.amax(dim=1) - groups.amin(dim=1)) / 15
    plain = ((groups - low[:, None]) / step[:, None]).round() * step[:, None] + low[:, None]
    error = (weights_of(*quantize.int4_matrix(weight_NK)) - weight_NK).square().mean()
    assert error < 0.87 * (plain - groups).square().mean()


def test_weights_on_a_grid_of_16_steps_come_back_as_they_were() -> None:
    random = torch.Generator().manual_seed(0)
    nibbles_NGI = torch.randint(0, 16, (33, 3, 32), generator=random).to(torch.uint8)
    nibbles_NGI[..., 0], nibbles_NGI[..., 1] = 0, 15
    scales_NG, minima_NG = torch.rand(33, 3, generator=random).half() + 0.1, torch.randn(33, 3, generator=random).half()
    weight_NK = weights_of(nibbles_NGI, scales_NG, minima_NG)
    found = quantize.int4_matrix(weight_NK)
    assert all(torch.equal(a, b) for a, b in zip(found, (nibbles_NGI, scales_NG, minima_NG), strict=True))


def test_int4_takes_matrices_whose_width_is_no_multiple_of_a_group() -> None:
    weight_NK = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) + 5
    found = weights_of(*quantize.int4_matrix(weight_NK))[:, :50]
    assert (found - weight_NK).abs().max() < 0.4


@pytest.mark.parametrize("target", quantize.FORMATS)
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_quantised_model_predicts_nearly_the_same(family: str, target: quantize.Format) -> None:
    model = tiny(family)
    expected_BTV = model.next_logprobs(tokens())
    formats = quantize.quantize(model, target)
    found_BTV = model.next_logprobs(tokens())
    nats = (expected_BTV.exp() * (expected_BTV - found_BTV)).sum(dim=-1).mean()
    assert nats < {"int8": 0.004, "int4": 0.2}[target]
    assert set(formats.values()) == {"int8", target}
    assert not [module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]


def test_int4_leaves_head_and_embedding_at_int8_and_together() -> None:
    model = tiny()
    formats = quantize.quantize(model, "int4")
    assert isinstance(model.head, Int8Linear)
    assert isinstance(model.tokens, Int8Embedding)
    assert model.head.packed is model.tokens.packed
    assert formats["blocks.0.mlp.up"] == "int4"
    untied = tiny(is_head_tied=False)
    quantize.quantize(untied, "int8")
    assert untied.head.packed is not untied.tokens.packed


def test_an_embedding_gives_the_rows_of_the_head_it_is_tied_to() -> None:
    model = tiny()
    quantize.quantize(model, "int8")
    rows_TD = model.tokens(torch.arange(300))
    weight_ND = twins.unpack_int8(model.head.packed, 300, WIDTH) * model.head.scales[:, None]
    assert torch.equal(rows_TD, weight_ND)
    with pytest.raises(IndexError):
        model.tokens(torch.tensor([300]))


def test_layers_can_be_left_out_by_name_and_a_wrong_name_is_refused() -> None:
    model = tiny()
    formats = quantize.quantize(model, "int8", skip=["down", "blocks.1.mlp.up"])
    assert "blocks.0.mlp.up" in formats
    assert not [name for name in formats if name.endswith("down") or name == "blocks.1.mlp.up"]
    assert isinstance(model.get_submodule("blocks.0.mlp.down"), nn.Linear)
    with pytest.raises(UserError, match="no layer to skip is called 'dwn'; did you mean 'down'"):
        quantize.quantize(tiny(), "int8", skip=["dwn"])


def test_weights_that_are_no_numbers_are_refused_by_name() -> None:
    model = tiny()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.gate.weight")[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"'blocks.1.mlp.gate' holds weights that are no numbers"):
        quantize.quantize(model, "int8")


def test_weights_too_large_for_a_scale_in_half_precision_are_refused_by_name() -> None:
    model = tiny()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.gate.weight")[3, 3] = 3e6
    with pytest.raises(UserError, match=r"'blocks.1.mlp.gate' holds weights beyond .* --skip blocks.1.mlp.gate"):
        quantize.quantize(model, "int4")
    blocks = Blocks("Q4_0", torch.zeros(96, WIDTH, dtype=torch.uint8), torch.full((96, 2), 6e4), None, 8)
    with pytest.raises(UserError, match="'0' holds weights beyond"):
        quantize.quantize(nn.Sequential(nn.Linear(WIDTH, 96, bias=False)), "int4", blocks={"0.weight": blocks})


@pytest.mark.parametrize("bias", [True, False])
def test_the_plain_layers_mean_what_the_kernels_compute(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for width, num_channels in ((64, 96), (50, 45)):
        linear = nn.Sequential(nn.Linear(width, num_channels, bias=bias))
        x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
        for target, kind in (("int8", Int8Linear), ("int4", Int4Linear)):
            model = nn.Sequential(nn.Linear(width, num_channels, bias=bias))
            model.load_state_dict(linear.state_dict())
            quantize.quantize(model, target)
            assert isinstance(model[0], kind)
            fast = model(x)
            monkeypatch.setattr(kind, "_runs_kernels", lambda self, x: False)
            assert torch.allclose(fast, model(x), atol=1e-5)
            monkeypatch.undo()


def test_new_float_weights_are_quantised_in_place() -> None:
    model, newer = tiny(), tiny()
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.mul_(1.5)
    for target in quantize.FORMATS:
        quantized = tiny()
        quantize.quantize(quantized, target)
        expected = tiny()
        expected.load_state_dict(newer.state_dict())
        quantize.quantize(expected, target)
        quantize.assign(quantized, dict(newer.named_parameters()))
        assert torch.equal(quantized.next_logprobs(tokens()), expected.next_logprobs(tokens()))
    quantize.quantize(model, "int8")
    for name, value in (("blocks.0.mlp.up.bias", torch.ones(96)), ("blocks.0.mlp.up.weight", torch.ones(2, 2))):
        with pytest.raises(UserError, match=r"blocks\.0\.mlp\.up"):
            quantize.assign(model, {"tokens.weight": torch.zeros(300, WIDTH), name: value})
    assert model.tokens.scales.any()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["a few words of text, and some more"]), TokenizerConfig("bpe", 300))


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> LoadedModel:
    model = tiny(vocab_size=tokenizer.vocab_size)
    info = CheckpointInfo("llama", to_json(model.config), "sft", tokenizer.hash, ChatRenderer(tokenizer).hash)
    checkpoint.save_model(tmp_path / "float", model, tokenizer, info)
    return load_model(tmp_path / "float")


@pytest.mark.parametrize("target", quantize.FORMATS)
def test_a_quantised_checkpoint_comes_back_bit_for_bit(
    target: quantize.Format, saved: LoadedModel, tmp_path: Path
) -> None:
    hashed = quantize.save_quantized(tmp_path / "small", saved, target)
    loaded = quantize.load_model(tmp_path / "small")
    some = tokens() % saved.tokenizer.vocab_size
    assert torch.equal(loaded.model.next_logprobs(some), saved.model.next_logprobs(some))
    assert loaded.hash == hashed
    assert loaded.info.parents == {quantize.ROLE: saved.hash}
    size, before = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "float"))
    # The inputs of so narrow a layer fill up to a whole group: of 128 in int8, of 32 in int4.
    assert size < (0.55 if target == "int8" else 0.45) * before


def test_a_quantised_checkpoint_is_not_read_as_a_plain_one_nor_quantised_again(
    saved: LoadedModel, tmp_path: Path
) -> None:
    quantize.save_quantized(tmp_path / "small", saved, "int8")
    with pytest.raises(CheckpointError, match="quantised, which is for generating"):
        load_model(tmp_path / "small")
    with pytest.raises(UserError, match="quantised already"):
        quantize.save_quantized(tmp_path / "smaller", quantize.load_model(tmp_path / "small"), "int4")


def test_a_description_that_does_not_fit_the_model_is_refused(saved: LoadedModel, tmp_path: Path) -> None:
    quantize.save_quantized(tmp_path / "small", saved, "int8")
    path = tmp_path / "small" / "run.json"
    described = json.loads(path.read_text())
    for wrong in ({"blocks.7.mlp.up": "int8"}, {"head": "int3"}):
        path.write_text(json.dumps({**described, "quantized": wrong}))
        with pytest.raises(CheckpointError, match="does not fit the model"):
            quantize.load_model(tmp_path / "small")


def test_a_plain_checkpoint_is_read_as_ever(saved: LoadedModel) -> None:
    loaded = quantize.load_model(saved.directory)
    assert isinstance(loaded.model.get_submodule("head"), nn.Linear)


def test_blocks_that_came_quantised_are_taken_as_they_are() -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (96, WIDTH), generator=random).to(torch.uint8)
    scales = (torch.rand(96, 2, generator=random) + 0.5).half().float()
    for blocks in (Blocks("Q4_0", codes, scales, None, 8), Blocks("Q4_1", codes, scales, (scales * 3).half().float())):
        model = nn.Sequential(nn.Linear(WIDTH, 96, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(blocks.expand())
        quantize.quantize(model, "int4", blocks={"0.weight": blocks})
        assert torch.equal(model[0].plain(), blocks.expand())
        assert torch.equal(twins.unpack_int4(model[0].packed, 96)[0].flatten(1), codes)


def test_kernels_are_the_default_where_there_is_a_compiler() -> None:
    assert Int8Linear(32, 32)._runs_kernels(torch.ones(1)) == kernels.load().is_compiled
