"""Block-quantised matrices inside fledge's own checkpoint: kept as they were imported, not expanded. Layer 4.

A matrix NAME in the format Q4_0, Q4_1 or Q8_0 is stored as NAME.codes (uint8 (O, I / 2), two codes a byte, for four
bits; int8 (O, I) for eight), NAME.scales and, for Q4_1, NAME.offsets (float16 (O, I / 32)). Half precision is what
these formats hold, so nothing is lost on the way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fledge.errors import CheckpointError
from fledge.formats.gguf_tensors import Blocks

ZERO = {"Q4_0": 8, "Q4_1": 0, "Q8_0": 0}


def pack(name: str, blocks: Blocks) -> dict[str, Tensor]:
    """The tensors that hold a matrix."""
    codes = blocks.codes
    if blocks.kind != "Q8_0":
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    packed = {f"{name}.codes": codes.contiguous(), f"{name}.scales": blocks.scales.half()}
    return packed if blocks.offsets is None else {**packed, f"{name}.offsets": blocks.offsets.half()}


def unpack(name: str, kind: str, tensors: Mapping[str, Tensor]) -> Blocks:
    """A matrix from its tensors; `CheckpointError` if one is missing or the format is unknown."""
    if kind not in ZERO:
        raise CheckpointError(f"'{name}' is in the unknown format {kind!r}; known are {', '.join(ZERO)}")
    wanted = [f"{name}.codes", f"{name}.scales", *([f"{name}.offsets"] if kind == "Q4_1" else [])]
    missing = [part for part in wanted if part not in tensors]
    if missing:
        raise CheckpointError(f"'{missing[0]}' is missing; import the model again")
    codes = tensors[f"{name}.codes"]
    if kind != "Q8_0":
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    offsets = tensors[f"{name}.offsets"].float() if kind == "Q4_1" else None
    return Blocks(kind, codes, tensors[f"{name}.scales"].float(), offsets, ZERO[kind])
