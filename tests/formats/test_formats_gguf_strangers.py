"""GGUF files as llama.cpp's own tools write them, in every number format, against the reader of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_samples import VOCAB, published
from numpy.typing import NDArray

from fledge.formats.gguf import Typed, read_gguf
from fledge.formats.gguf_models import read_model, settings_of
from fledge.formats.gguf_tensors import KINDS, UNPACKED
from fledge.formats.gguf_tokenizer import tokenizer_metadata
from fledge.layers.attention import RowContext
from fledge.models.llama import Llama, LlamaConfig

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

# Where a block of a format has its half-precision scales, which every bit pattern would make huge, and their size here.
SCALES = {
    "Q8_0": (1e-3, 0), "Q4_0": (1e-2, 0), "Q4_1": (1e-2, 0, 2), "Q5_0": (5e-3, 0), "Q5_1": (5e-3, 0, 2),
    "Q2_K": (3e-3, 80, 82), "Q3_K": (1e-3, 108), "Q4_K": (3e-4, 0, 2), "Q5_K": (2e-4, 0, 2), "Q6_K": (1e-4, 208),
}  # fmt: skip
MODEL = Llama(LlamaConfig(VOCAB, 256, 1, 4, 2, 256, 64))


def some_matrix(kind: str, rows: int, columns: int, seed: int) -> NDArray[Any]:
    """Bytes of a matrix: codes of every pattern, small scales."""
    draw = np.random.default_rng(seed)
    if kind in ("F32", "F16", "BF16"):
        return np.asarray(gguf.quants.quantize(draw.normal(size=(rows, columns)).astype(np.float32) * 0.1, code(kind)))
    known = KINDS[kind]
    blocks = draw.integers(0, 256, (rows * columns // known.per_block, known.block_bytes), dtype=np.uint8)
    size, *places = SCALES[kind]
    for place in map(int, places):
        half = (draw.random(len(blocks)) * size).astype(np.float16)
        blocks[:, place : place + 2] = half.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def code(kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind]


def write(path: Path, kind: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {**settings_of("llama", MODEL), **tokenizer_metadata(published(), VOCAB)[0]}
    metadata |= {"general.quantization_version": 2, "general.size_label": "1M", "general.tags": ["a", "b"]}
    for key, value in metadata.items():
        plain = value.value if isinstance(value, Typed) else value
        if key == "general.architecture":
            continue
        if isinstance(plain, list):
            writer.add_array(key, plain)
        else:
            types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
            writer.add_key_value(key, plain, gguf.GGUFValueType[types[type(plain)]])
    shapes = {
        "token_embd": (VOCAB, 256),
        "output": (VOCAB, 256),
        "blk.0.attn_k": (128, 256),
        "blk.0.attn_v": (128, 256),
    }
    shapes |= {f"blk.0.{name}": (256, 256) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    for seed, (name, shape) in enumerate(shapes.items()):
        matrix = some_matrix(kind, *shape, seed)
        writer.add_tensor(f"{name}.weight", matrix, raw_dtype=None if kind in ("F32", "F16") else code(kind))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.linspace(0.5, 1.5, 256, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_their_writer_in_every_format_gives_the_logits_of_their_reader(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    read = read_model(read_gguf(tmp_path / "m.gguf"))
    model: Any = read.model
    assert set(read.blocks) == ({n for n, p in model.named_parameters() if p.ndim == 2} if kind in UNPACKED else set())
    tokens_BT = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    context = RowContext(tokens_BT)
    with torch.no_grad():
        expected = theirs.eval()(tokens_BT).logits
        found = model.unembed(model.hidden(model.embed(tokens_BT, context), context))
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
