"""Models from and to GGUF: through our own files, and against the reader of `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_samples import MODELS, VOCAB, checkpoint, family_of, filled
from torch import Tensor

from fledge.errors import CheckpointError
from fledge.formats.export import export_gguf
from fledge.formats.gguf import INT32, GGUFFile, Outgoing, Typed, read_gguf, write_gguf
from fledge.formats.gguf_models import read_model, settings_of, tensors_of
from fledge.layers.attention import RowContext
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.pocket import Pocket, PocketConfig

every_model = pytest.mark.parametrize("name", MODELS)


def logits(model: Any, tokens_BT: Tensor) -> Tensor:
    context = RowContext(tokens_BT)
    with torch.no_grad():
        found: Tensor = model.unembed(model.hidden(model.embed(tokens_BT, context), context))
    return found


def some_tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


def write(path: Path, name: str, kind: str | None = None, **changes: Any) -> Path:
    """The model as a file; `changes` are of its metadata, None leaving a key out."""
    model = filled(name)
    metadata = {
        **settings_of(family_of(name), model),
        **{key.replace("__", "."): v for key, v in changes.items()},
    }
    kept = {key: value for key, value in metadata.items() if value is not None}
    write_gguf(path, kept, list(tensors_of(family_of(name), model, kind)))
    return path


@every_model
def test_a_written_model_comes_back_unchanged(name: str, tmp_path: Path) -> None:
    model = filled(name)
    found = read_model(read_gguf(write(tmp_path / "m.gguf", name)))
    assert (found.family, found.model.config) == (family_of(name), model.config)
    for key, tensor in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], tensor), key
    assert not found.model.training


# Not the stretched llama: transformers drops the stretched frequencies of a GGUF file.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama-tied-stretched"])
@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0"])
def test_logits_equal_those_of_the_reader_of_transformers(name: str, kind: str, tmp_path: Path) -> None:
    """It expands the same blocks and has its own tables of names and its own permutation of queries and keys."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    loaded = checkpoint(tmp_path / "model", name)
    export_gguf(loaded, tmp_path / "m.gguf", kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = read_model(read_gguf(tmp_path / "m.gguf")).model
    with torch.no_grad():
        expected = theirs.eval()(some_tokens()).logits
    torch.testing.assert_close(logits(ours, some_tokens()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_the_parameters_and_are_written_again_as_they_came(kind: str, tmp_path: Path) -> None:
    first = read_gguf(write(tmp_path / "first.gguf", "llama", kind))
    found = read_model(first)
    matrices = {name for name, p in found.model.named_parameters() if p.ndim == 2}
    assert set(found.blocks) == matrices
    for name, blocks in found.blocks.items():
        assert torch.equal(blocks.expand(), found.model.get_parameter(name))
    outgoing = list(tensors_of("llama", found.model, None, found.blocks))
    write_gguf(tmp_path / "again.gguf", settings_of("llama", found.model), outgoing)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()


def test_with_four_bits_the_embedding_and_the_head_keep_eight(tmp_path: Path) -> None:
    kinds = {
        name: entry.kind.name for name, entry in read_gguf(write(tmp_path / "m", "qwen-2.5", "Q4_1")).entries.items()
    }
    assert (kinds["token_embd.weight"], kinds["output.weight"], kinds["blk.0.attn_q.weight"]) == (
        "Q8_0",
        "Q8_0",
        "Q4_1",
    )
    assert (kinds["blk.0.attn_q.bias"], kinds["output_norm.weight"]) == ("F32", "F32")


def test_the_stretched_frequencies_of_llama3_travel_as_divisors(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path / "m.gguf", "llama-tied-stretched"))
    divisors = file.tensor("rope_freqs.weight")
    assert (divisors.min(), divisors.max()) == (1.0, 8.0)
    assert read_model(file).model.config.rope_scaling == MODELS["llama-tied-stretched"].config.rope_scaling


def rewritten(file: GGUFFile, path: Path, change: Callable[[dict[str, Tensor]], object]) -> GGUFFile:
    """The file with its tensors changed, all in float32."""
    tensors = {name: file.tensor(name) for name in file.entries}
    change(tensors)
    outgoing = [Outgoing(name, tuple(x.shape), "F32", lambda x=x: x) for name, x in tensors.items()]
    write_gguf(path, file.metadata, outgoing)
    return read_gguf(path)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("llama", lambda t: t.pop("blk.1.ffn_up.weight"), r"1 missing tensor\(s\): blk\.1\.ffn_up\.weight"),
        (
            "llama",
            lambda t: t.update({"blk.0.attn_q.bias": torch.ones(96)}),
            r"1 unexpected tensor\(s\): blk\.0",
        ),
        ("llama", lambda t: t.update({"blk.2.attn_norm.weight": torch.ones(96)}), "unexpected"),
        (
            "llama",
            lambda t: t.update({"blk.0.attn_k.weight": torch.ones(96, 96)}),
            r"of shape \(96, 96\).*\(32, 96\)",
        ),
        ("llama", lambda t: t.pop("token_embd.weight"), "no tensor 'token_embd.weight'"),
        ("llama", lambda t: t.update({"rope_freqs.weight": torch.arange(1.0, 9.0)}), "not Llama 3's"),
        ("gpt", lambda t: t.update({"rope_freqs.weight": torch.ones(8)}), "unexpected"),
        ("qwen-2.5", lambda t: t.pop("blk.0.attn_v.bias"), "missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    name: str, change: Callable[[dict[str, Tensor]], object], complaint: str, tmp_path: Path
) -> None:
    file = rewritten(read_gguf(write(tmp_path / "m.gguf", name)), tmp_path / "changed.gguf", change)
    with pytest.raises(CheckpointError, match=complaint):
        read_model(file)


def test_a_tied_matrix_that_is_stored_twice_is_read_from_the_finer_one(tmp_path: Path) -> None:
    model = filled("gpt")
    outgoing = list(tensors_of("gpt", model, "Q8_0"))
    finer = Outgoing("output.weight", tuple(model.tokens.weight.shape), "F16", lambda: model.tokens.weight)
    write_gguf(tmp_path / "m.gguf", settings_of("gpt", model), [*outgoing, finer])
    found = read_model(read_gguf(tmp_path / "m.gguf")).model
    assert torch.equal(found.tokens.weight, model.tokens.weight.half().float())
    assert found.head.weight is found.tokens.weight


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        (
            "llama",
            {"general__architecture": "mamba"},
            "architecture 'mamba' is not supported: known are llama, gpt2",
        ),
        ("llama", {"general__architecture": None}, "architecture None"),
        ("llama", {"split__count": 3}, "one of several files"),
        ("llama", {"llama__expert_count": 8}, "expert_count 8 is not supported"),
        ("llama", {"llama__rope__scaling__type": "yarn"}, "rope.scaling.type 'yarn' is not supported"),
        ("llama", {"llama__attention__sliding_window": 512}, "attention.sliding_window"),
        ("llama", {"llama__attention__key_length": 32}, "attention.key_length is not supported"),
        ("llama", {"llama__rope__dimension_count": 8}, "rope.dimension_count is not supported"),
        ("llama", {"llama__vocab_size": 5}, "vocab_size is not the"),
        (
            "llama",
            {"llama__embedding_length": None},
            "embedding_length and attention.head_count must be there",
        ),
        ("llama", {"llama__block_count": None}, "missing key 'num_layers'"),
        ("llama", {"llama__attention__head_count": "six"}, "must be there, as positive numbers"),
        ("llama", {"llama__attention__head_count": 0}, "must be there, as positive numbers"),
        ("llama", {"llama__attention__head_count_kv": [2, 6]}, "num_kv_heads"),
        ("llama", {"llama__attention__layer_norm_rms_epsilon": -1.0}, "must be positive"),
        ("llama", {"llama__attention__layer_norm_rms_epsilon": float("nan")}, "expected a finite number"),
        ("llama", {"llama__attention__layer_norm_rms_epsilon": None}, "no llama.attention.layer_norm_rms_epsilon"),
        ("gpt", {"gpt2__attention__layer_norm_epsilon": None}, "no gpt2.attention.layer_norm_epsilon"),
        ("llama", {"llama__context_length": None}, "no llama.context_length"),
        ("llama", {"general__architecture": ["llama", "gpt2"]}, "general.architecture .* must be a str"),
        ("llama", {"general__architecture": Typed(INT32, [1, 2])}, "general.architecture .* must be a str"),
        ("llama", {"split__count": Typed(INT32, [1, 1])}, "split.count .* must be a int"),
        ("llama", {"llama__vocab_size": Typed(INT32, [1, 1])}, "m.gguf: "),
        ("llama", {"llama__expert_count": Typed(INT32, [0, 0])}, "m.gguf: "),
        ("llama", {"llama__feed_forward_length": Typed(10, 2**64 - 1)}, "m.gguf: "),
        ("llama", {"llama__feed_forward_length": Typed(10, 2**61)}, "m.gguf: "),
        ("llama", {"llama__rope__freq_base": 0.0}, "must be positive"),
        ("llama-tied-stretched", {"llama__rope__freq_base": 0.0}, "m.gguf: "),
        ("llama-tied-stretched", {"llama__rope__freq_base": "x"}, "m.gguf: "),
        ("gpt", {"gpt2__feed_forward_length": 100}, "feed_forward_length is not supported: known is 384"),
        ("qwen-3-tied", {"qwen3__attention__value_length": 16}, "value_length is not supported"),
    ],
)
def test_settings_that_we_do_not_compute_are_refused_by_name(
    name: str, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read_model(read_gguf(write(tmp_path / "m.gguf", name, **changes)))


def test_a_shape_of_a_terabyte_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="1000000 layers, where there are"):
        read_model(read_gguf(write(tmp_path / "m.gguf", "llama", llama__block_count=1_000_000)))
    with pytest.raises(CheckpointError, match="the settings make it"):
        read_model(read_gguf(write(tmp_path / "n.gguf", "llama", llama__feed_forward_length=2**31)))


@pytest.mark.parametrize(
    ("family", "model", "complaint"),
    [
        ("gpt", GPT(GPTConfig(11, 8, 2, 2, 16, window=4)), "no GGUF architecture computes this gpt"),
        ("gpt", GPT(GPTConfig(11, 8, 2, 2, 16, "post_norm")), "no GGUF architecture computes this gpt"),
        ("pocket", Pocket(PocketConfig(43, 24, 1, 2, table_rows=0)), "there are some for gpt, llama, qwen"),
        ("llama", Llama(LlamaConfig(11, 8, 1, 2, 2, 8)), "GGUF needs context_length"),
    ],
)
def test_a_model_that_no_architecture_computes_is_refused(family: str, model: Any, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        settings_of(family, model)


def test_rows_of_queries_are_turned_as_llama_cpp_turns_them(tmp_path: Path) -> None:
    """Two heads of width 4: channels 0 1 2 3 are stored as 0 2 1 3 (gguf-py's `permute`)."""
    model = Llama(LlamaConfig(11, 8, 1, 2, 2, 8, 16))
    with torch.no_grad():
        model.blocks[0].attention.query.weight.copy_(torch.arange(8.0)[:, None].expand(8, 8))
    write_gguf(tmp_path / "m.gguf", settings_of("llama", model), list(tensors_of("llama", model, "F32")))
    rows: Sequence[float] = read_gguf(tmp_path / "m.gguf").tensor("blk.0.attn_q.weight")[:, 0].tolist()
    assert rows == [0, 2, 1, 3, 4, 6, 5, 7]
