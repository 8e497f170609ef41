"""The engine's own operators: `torch.ops.fledge.*`, in C++ where a compiler is found and in plain torch elsewhere.

`load()` declares them once a process and says what runs them. Nothing else of fledge depends on which it is: the same
names, arguments and (for whole numbers bit for bit, for sums of floats within rounding) results. torch.compile sees
them as opaque operators with known shapes.

Shapes: M rows (all axes before the last), N output channels, K inputs of a channel.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.infer import kernel_twins as twins
from fledge.infer.kernel_build import BuildError, discard, library

log = logging.getLogger(__name__)

CHANNELS = 32  # output channels side by side in packed weights; kernels/kernels.h
INPUTS_MULTIPLE = 16  # inputs of a channel are filled up to this; kernels/linear_int8.cpp

SCHEMAS = ("linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor? bias) -> Tensor",)


@dataclass(frozen=True)
class Kernels:
    """What `load` found. `obstacle` says why plain torch runs the operators, None if the C++ kernels do."""

    declarations: torch.library.Library
    obstacle: str | None

    @property
    def is_compiled(self) -> bool:
        return self.obstacle is None


@functools.cache
def load() -> Kernels:
    """Declare the operators, building the C++ library if this machine has none yet (about half a minute, once).

    Logs a warning when it cannot be built; then plain torch runs them, several times slower.
    """
    declarations = torch.library.Library("fledge", "DEF")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        declarations.define(schema)
        declarations.impl(name, getattr(twins, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fledge::{name}", _FAKES[name], lib=declarations)
    obstacle = _obstacle()
    if obstacle is not None:
        log.warning("no CPU kernels: %s; quantised models run several times slower", obstacle)
    return Kernels(declarations, obstacle)


def pack_int8(weight_NK: Tensor) -> Tensor:
    """uint8 (N/32, K/4, 32, 4), both rounded up: int8 weights as kernels/linear_int8.cpp reads them."""
    assert weight_NK.dtype == torch.int8, weight_NK.dtype
    filled_NK = F.pad(weight_NK, (0, -weight_NK.shape[1] % INPUTS_MULTIPLE, 0, -weight_NK.shape[0] % CHANNELS))
    bytes_NK = (filled_NK.to(torch.int16) + 128).to(torch.uint8)
    num_blocks, num_fours = bytes_NK.shape[0] // CHANNELS, bytes_NK.shape[1] // 4
    return bytes_NK.reshape(num_blocks, CHANNELS, num_fours, 4).transpose(1, 2).contiguous()


def linear_int8(x: Tensor, packed: Tensor, scales_N: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """float32 (..., N): x (..., K) float32, rounded to int8 row by row, times int8 weights with a scale a channel.

    `packed` from `pack_int8`. A row's result does not depend on the rows beside it, bit for bit. A row that holds NaN
    or infinity gives NaN.
    """
    y: Tensor = torch.ops.fledge.linear_int8(x, packed, scales_N, bias_N)
    return y


def _obstacle() -> str | None:
    """Load the library; why that failed, or None. A library that does not load is built once more."""
    try:
        path = library()
        try:
            torch.ops.load_library(path)
        except OSError:
            discard(path)
            torch.ops.load_library(library())
    except (BuildError, OSError) as error:
        return str(error.__cause__ or error).splitlines()[0]  # torch puts the loader's own words behind its own
    return None


def _fake_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[0])


_FAKES = {"linear_int8": _fake_linear}
