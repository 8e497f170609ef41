"""Number formats of GGUF against the `gguf` package, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fledge.formats.gguf_tensors import KINDS, UNPACKED, WRITTEN, pack_blocks, unpack_blocks

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

every_kind = pytest.mark.parametrize("name", KINDS)
written = pytest.mark.parametrize("name", WRITTEN)


def some_blocks(name: str, seed: int = 0) -> NDArray[np.uint8]:
    """Blocks of every bit pattern."""
    return np.random.default_rng(seed).integers(0, 256, (512, KINDS[name].block_bytes), dtype=np.uint8)


def some_numbers(rows: int, columns: int = 256, seed: int = 0) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    x[1] = 0.0
    x[2, : columns // 2] = 3.0
    x[3] *= 1e-6
    x[4] = np.arange(columns) % 7
    return x


@every_kind
def test_expanding_equals_the_gguf_package_bit_for_bit(name: str) -> None:
    kind, blocks = KINDS[name], some_blocks(name)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(blocks.reshape(8, -1), gguf.GGMLQuantizationType[name]).reshape(len(blocks), -1)
        found = kind.expand(blocks)
    assert found.shape == (len(blocks), kind.per_block)
    assert found.dtype == np.float32
    finite = np.isfinite(expected)
    assert finite.mean() > 0.8
    assert np.array_equal(found[finite], expected[finite])
    assert not np.isfinite(found[~finite]).any()


@written
def test_shrinking_equals_the_gguf_package_bit_for_bit(name: str) -> None:
    kind, x = KINDS[name], some_numbers(40)
    assert kind.shrink is not None
    expected = quants.quantize(x, gguf.GGMLQuantizationType[name])
    found = kind.shrink(x.reshape(-1, kind.per_block))
    assert np.array_equal(found.reshape(-1), np.ascontiguousarray(expected).view(np.uint8).reshape(-1))


@written
def test_sizes_and_codes_are_those_of_the_gguf_package(name: str) -> None:
    kind, theirs = KINDS[name], gguf.GGMLQuantizationType[name]
    assert (kind.code, (kind.per_block, kind.block_bytes)) == (int(theirs), gguf.GGML_QUANT_SIZES[theirs])
    file_type = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
    assert kind.file_type == gguf.LlamaFileType[file_type]


@pytest.mark.parametrize(
    ("name", "error"), [("Q8_0", 0.005), ("Q5_1", 0.03), ("Q5_0", 0.04), ("Q4_1", 0.06), ("Q4_0", 0.08)]
)
def test_what_is_shrunk_and_expanded_is_close(name: str, error: float) -> None:
    kind, x = KINDS[name], some_numbers(40)
    assert kind.shrink is not None
    back = kind.expand(kind.shrink(x.reshape(-1, kind.per_block))).reshape(x.shape)
    assert np.abs(back - x).max() < error * np.abs(x).max()


@pytest.mark.parametrize("name", UNPACKED)
def test_blocks_expand_to_the_same_numbers_and_go_back_to_the_same_bytes(name: str) -> None:
    kind, x = KINDS[name], some_numbers(24, 96)
    assert kind.shrink is not None
    data = kind.shrink(x.reshape(-1, kind.per_block))
    blocks = unpack_blocks(name, data.reshape(-1), (24, 96))
    assert np.array_equal(blocks.expand().numpy(), kind.expand(data).reshape(24, 96))
    assert np.array_equal(pack_blocks(blocks).reshape(-1), data.reshape(-1))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(blocks.rows(order).expand(), blocks.expand()[order])
    assert blocks.shape == (24, 96)
