"""The number formats of GGUF tensors: bytes <-> float32, block by block, vectorised.

Beneath formats/gguf.py. A quantised tensor is a sequence of blocks along its inputs (its last axis): 32 numbers, or 256
for the K formats, that share scales. Layouts: the `ggml` library's ggml-common.h and ggml-quants.c (Gerganov et al.);
the K formats are Kawrakow's. Legend: N blocks, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[Any]  # uint8; numpy's stubs take what bit operations make of it for something else
Floats = NDArray[np.float32]
Numbers = NDArray[Any]

BLOCK, SUPER = 32, 256


@dataclass(frozen=True)
class Kind:
    """One number format. `code` names it in a file, `file_type` a file most of whose matrices have it.

    A block of `per_block` numbers takes `block_bytes`. `expand` maps (N, block_bytes) to (N, per_block) float32;
    `shrink`, where we write the format, is its inverse up to rounding.
    """

    name: str
    code: int
    file_type: int
    per_block: int
    block_bytes: int
    expand: Callable[[Bytes], Floats]
    shrink: Callable[[Floats], Bytes] | None = None

    def num_bytes(self, num_elements: int) -> int:
        return num_elements // self.per_block * self.block_bytes


@dataclass(frozen=True)
class Blocks:
    """A block-quantised matrix, not expanded: weight[o, i] = scales[o, i // 32] * codes[o, i] + offsets[o, i // 32].

    `codes` (O, I) uint8 (Q4_0 and Q4_1: 0 to 15) or int8 (Q8_0: -128 to 127). `scales` and `offsets` (O, I / 32)
    float32, `offsets` None where it is 0 (Q8_0) or -8 x scale (Q4_0, as `zero` 8 says: scale * (code - zero)).
    """

    kind: str
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    zero: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    def expand(self) -> Tensor:
        """(O, I) float32."""
        codes = self.codes.float().unflatten(1, (-1, BLOCK)) - self.zero
        weight = codes * self.scales[:, :, None]
        if self.offsets is not None:
            weight = weight + self.offsets[:, :, None]
        flat: Tensor = weight.flatten(1)
        return flat

    def rows(self, order: Tensor) -> Blocks:
        """The same matrix with its rows in another order; blocks run along a row, so nothing is requantised."""
        offsets = None if self.offsets is None else self.offsets[order]
        return Blocks(self.kind, self.codes[order], self.scales[order], offsets, self.zero)


def stack_blocks(parts: Sequence[Blocks]) -> Blocks:
    """Matrices of one format, one below the other."""
    first = parts[0]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Blocks(
        first.kind,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(offsets) if offsets else None,
        first.zero,
    )


def unpack_blocks(kind: str, data: Bytes, shape: tuple[int, int]) -> Blocks:
    """The blocks of a Q4_0, Q4_1 or Q8_0 matrix of `shape` (O, I) from its bytes."""
    rows, columns = shape
    blocks = data.reshape(-1, KINDS[kind].block_bytes)
    per_row = (rows, columns // BLOCK)
    scales = torch.from_numpy(_half(blocks[:, :2]).reshape(per_row))
    if kind == "Q8_0":
        return Blocks(kind, torch.from_numpy(blocks[:, 2:].copy().view(np.int8).reshape(shape)), scales)
    offsets = torch.from_numpy(_half(blocks[:, 2:4]).reshape(per_row)) if kind == "Q4_1" else None
    codes = torch.from_numpy(_nibbles(blocks[:, -16:]).reshape(shape))
    return Blocks(kind, codes, scales, offsets, 8 if kind == "Q4_0" else 0)


def pack_blocks(blocks: Blocks) -> Bytes:
    """The bytes of a matrix: the inverse of `unpack_blocks`."""
    codes = blocks.codes.reshape(-1, BLOCK).numpy()
    numbers = [blocks.scales] if blocks.offsets is None else [blocks.scales, blocks.offsets]
    head = [_shrink_f16(part.reshape(-1, 1).numpy()) for part in numbers]
    return np.concatenate((*head, codes.view(np.uint8) if blocks.kind == "Q8_0" else _pack_nibbles(codes)), axis=1)


# Plain floats.


def _expand_f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _expand_f16(blocks: Bytes) -> Floats:
    return _half(blocks)


def _expand_bf16(blocks: Bytes) -> Floats:
    high = np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16
    return high.view(np.float32)


def _shrink_f32(x: Floats) -> Bytes:
    return np.ascontiguousarray(x.astype("<f4")).view(np.uint8)


def _shrink_f16(x: Floats) -> Bytes:
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and the writer refuses it
        return np.ascontiguousarray(x.astype("<f2")).view(np.uint8)


def _shrink_bf16(x: Floats) -> Bytes:
    """To the nearest, ties to even, as torch rounds."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.ascontiguousarray(rounded.astype("<u2")).view(np.uint8)


def _half(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


# Blocks of 32.


def _nibbles(packed: Bytes) -> Bytes:
    """(N, 2n) codes from (N, n) bytes: low halves first, then high halves."""
    return np.concatenate((packed & np.uint8(15), packed >> np.uint8(4)), axis=1)


def _pack_nibbles(codes: Bytes) -> Bytes:
    low, high = np.split(codes, 2, axis=1)
    packed: Bytes = low | (high << 4)
    return packed


def _fifth_bits(packed: Bytes) -> Bytes:
    """(N, 32) of 0 or 16 from (N, 4) bytes, one bit a number."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _expand_q8_0(blocks: Bytes) -> Floats:
    return _half(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _expand_q4_0(blocks: Bytes) -> Floats:
    return _half(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _expand_q4_1(blocks: Bytes) -> Floats:
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks[:, 2:4])


def _expand_q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks[:, :2]) * (codes.astype(np.float32) - 16)


def _expand_q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks[:, :2]) * codes.astype(np.float32) + _half(blocks[:, 2:4])


def _inverse(scale: Floats) -> Floats:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def _extreme(x: Floats) -> Floats:
    """(N, 1): of each block the number of largest size, with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)


def _shrink_q8_0(x: Floats) -> Bytes:
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(scale)
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)  # halves away from 0, as C rounds
    return np.concatenate((_shrink_f16(scale), codes.view(np.uint8)), axis=1)


def _symmetric(x: Floats, bits: int) -> tuple[Floats, Bytes]:
    """(scale, codes) with codes - 2^(bits-1) times the scale close to `x`; the largest number takes the lowest code."""
    half = 1 << (bits - 1)
    scale = _extreme(x) / np.float32(-half)
    codes = np.trunc(x * _inverse(scale) + np.float32(half + 0.5))
    return scale, codes.clip(0, 2 * half - 1).astype(np.uint8)


def _between(x: Floats, bits: int) -> tuple[Floats, Floats, Bytes]:
    """(scale, lowest, codes) with codes times the scale plus the lowest close to `x`."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    scale = (high - low) / np.float32((1 << bits) - 1)
    codes = np.trunc((x - low) * _inverse(scale) + np.float32(0.5))
    return scale, low, codes.clip(0, (1 << bits) - 1).astype(np.uint8)


def _pack_fifth_bits(codes: Bytes) -> Bytes:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _shrink_q4_0(x: Floats) -> Bytes:
    scale, codes = _symmetric(x, 4)
    return np.concatenate((_shrink_f16(scale), _pack_nibbles(codes)), axis=1)


def _shrink_q4_1(x: Floats) -> Bytes:
    scale, low, codes = _between(x, 4)
    return np.concatenate((_shrink_f16(scale), _shrink_f16(low), _pack_nibbles(codes)), axis=1)


def _shrink_q5_0(x: Floats) -> Bytes:
    scale, codes = _symmetric(x, 5)
    return np.concatenate((_shrink_f16(scale), _pack_fifth_bits(codes), _pack_nibbles(codes & 15)), axis=1)


def _shrink_q5_1(x: Floats) -> Bytes:
    scale, low, codes = _between(x, 5)
    head = (_shrink_f16(scale), _shrink_f16(low))
    return np.concatenate((*head, _pack_fifth_bits(codes), _pack_nibbles(codes & 15)), axis=1)


# Blocks of 256: sub-blocks of 16 or 32 whose scales are themselves small integers times one half-precision number.


def _spread(scales: Numbers, codes: Numbers) -> Floats:
    """scales (N, S) times codes (N, 256), each scale over its 256 / S neighbours."""
    num_blocks, num_scales = scales.shape
    return (scales[:, :, None] * codes.reshape(num_blocks, num_scales, -1)).reshape(num_blocks, SUPER)


def _pairs_of_bits(packed: Bytes) -> Bytes:
    """(N, 256) codes of two bits from (N, 64) bytes: of each half of 32 bytes, its lowest pairs first."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    return ((packed.reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, SUPER)


def _expand_q2_k(blocks: Bytes) -> Floats:
    small, codes = blocks[:, :16], _pairs_of_bits(blocks[:, 16:80]).astype(np.float32)
    scale, low = _half(blocks[:, 80:82]), _half(blocks[:, 82:84])
    lows = _spread((low * (small >> 4)).astype(np.float32), np.ones_like(codes))
    return _spread((scale * (small & 15)).astype(np.float32), codes) - lows


def _expand_q3_k(blocks: Bytes) -> Floats:
    high, packed, small = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    low_four = np.concatenate((small[:, :8] & 15, small[:, :8] >> 4), axis=1)
    high_two = np.concatenate([(small[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = (low_four | (high_two << 4)).astype(np.float32) - 32
    bits = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    third = ((high[:, None, :] >> bits) & 1).reshape(-1, SUPER)
    codes = (_pairs_of_bits(packed) | (third << 2)).astype(np.float32) - 4
    return _spread(_half(blocks[:, 108:110]) * scales, codes)


def _six_bit_scales(packed: Bytes) -> tuple[Numbers, Numbers]:
    """Eight scales and eight lows of six bits from twelve bytes (Q4_K, Q5_K)."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((a & 63, (c & 15) | ((a >> 6) << 4)), axis=1)
    lows = np.concatenate((b & 63, (c >> 4) | ((b >> 6) << 4)), axis=1)
    return scales.astype(np.float32), lows.astype(np.float32)


def _halves(packed: Bytes) -> Bytes:
    """(N, 256) codes of four bits from (N, 128) bytes: of each 32 bytes the low halves, then the high ones."""
    shifts = np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
    return ((packed.reshape(-1, 4, 1, 32) >> shifts) & 15).reshape(-1, SUPER)


def _with_lows(blocks: Bytes, codes: Bytes) -> Floats:
    scales, lows = _six_bit_scales(blocks[:, 4:16])
    ones = np.ones_like(codes, dtype=np.float32)
    scaled = _spread(_half(blocks[:, :2]) * scales, codes.astype(np.float32))
    return scaled - _spread(_half(blocks[:, 2:4]) * lows, ones)


def _expand_q4_k(blocks: Bytes) -> Floats:
    return _with_lows(blocks, _halves(blocks[:, 16:]))


def _expand_q5_k(blocks: Bytes) -> Floats:
    bits = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    fifth = ((blocks[:, None, 16:48] >> bits) & 1).reshape(-1, SUPER)
    return _with_lows(blocks, _halves(blocks[:, 48:]) | (fifth << 4))


def _expand_q6_k(blocks: Bytes) -> Floats:
    shifts = np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
    low = ((blocks[:, :128].reshape(-1, 2, 1, 64) >> shifts) & 15).reshape(-1, SUPER)
    codes = (low | (_pairs_of_bits(blocks[:, 128:192]) << 4)).astype(np.float32) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _spread(_half(blocks[:, 208:210]) * scales, codes)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("F32", 0, 0, 1, 4, _expand_f32, _shrink_f32),
        Kind("F16", 1, 1, 1, 2, _expand_f16, _shrink_f16),
        Kind("BF16", 30, 32, 1, 2, _expand_bf16, _shrink_bf16),
        Kind("Q8_0", 8, 7, BLOCK, 34, _expand_q8_0, _shrink_q8_0),
        Kind("Q4_0", 2, 2, BLOCK, 18, _expand_q4_0, _shrink_q4_0),
        Kind("Q4_1", 3, 3, BLOCK, 20, _expand_q4_1, _shrink_q4_1),
        Kind("Q5_0", 6, 8, BLOCK, 22, _expand_q5_0, _shrink_q5_0),
        Kind("Q5_1", 7, 9, BLOCK, 24, _expand_q5_1, _shrink_q5_1),
        Kind("Q2_K", 10, 10, SUPER, 84, _expand_q2_k),
        Kind("Q3_K", 11, 12, SUPER, 110, _expand_q3_k),
        Kind("Q4_K", 12, 15, SUPER, 144, _expand_q4_k),
        Kind("Q5_K", 13, 17, SUPER, 176, _expand_q5_k),
        Kind("Q6_K", 14, 18, SUPER, 210, _expand_q6_k),
    )
}
UNPACKED = ("Q4_0", "Q4_1", "Q8_0")  # the formats that `unpack_blocks` takes
WRITTEN = tuple(kind.name for kind in KINDS.values() if kind.shrink is not None)
