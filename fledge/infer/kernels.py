"""The engine's own operators: `torch.ops.fledge.*`, in C++ where a compiler is found and in plain torch elsewhere.

`load()` declares them once a process and says what runs them. Nothing else of fledge depends on which it is: the same
names, arguments and (for whole numbers bit for bit, for sums of floats within rounding) results. torch.compile sees
them as opaque operators with known shapes.

Shapes: M rows (all axes before the last), N output channels, K inputs of a channel.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.infer import kernel_twins as twins
from fledge.infer.kernel_build import BuildError, discard, library
from fledge.infer.kernel_twins import INT4_CHANNELS, INT4_GROUP, INT8_CHANNELS, INT8_GROUP

log = logging.getLogger(__name__)

SCHEMAS = (
    "linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor? bias) -> Tensor",
    "linear_int4(Tensor x, Tensor packed, int num_channels, Tensor? bias) -> Tensor",
    "linear_float(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "paged_attention(Tensor q, Tensor keys, Tensor values, Tensor tables, Tensor lengths, float scale, int window)"
    " -> Tensor",
)


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
    filled_NK = F.pad(weight_NK, (0, -weight_NK.shape[1] % INT8_GROUP, 0, -weight_NK.shape[0] % INT8_CHANNELS))
    bytes_NK = (filled_NK.to(torch.int16) + 128).to(torch.uint8)
    num_blocks, num_fours = bytes_NK.shape[0] // INT8_CHANNELS, bytes_NK.shape[1] // 4
    return bytes_NK.reshape(num_blocks, INT8_CHANNELS, num_fours, 4).transpose(1, 2).contiguous()


def linear_int8(x: Tensor, packed: Tensor, scales_N: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """float32 (..., N): x (..., K) float32, rounded to int8 in groups of 128, times int8 weights, a scale a channel.

    `packed` from `pack_int8`. A row's result does not depend on the rows beside it, bit for bit. A row that holds NaN
    or infinity gives NaN.
    """
    y: Tensor = torch.ops.fledge.linear_int8.default(x, packed, scales_N, bias_N)
    return y


def pack_int4(nibbles_NGI: Tensor, scales_NG: Tensor, minima_NG: Tensor) -> Tensor:
    """uint8 (N/16, G, 320), N rounded up: weights q x scale + minimum as kernels/linear_int4.cpp reads them.

    `nibbles_NGI` uint8 0..15, in groups of I = 32 inputs; scales and minima float16.
    """
    assert nibbles_NGI.dtype == torch.uint8, nibbles_NGI.dtype
    assert nibbles_NGI.shape[2] == INT4_GROUP, nibbles_NGI.shape
    assert scales_NG.dtype == minima_NG.dtype == torch.float16, (scales_NG.dtype, minima_NG.dtype)
    missing = -nibbles_NGI.shape[0] % INT4_CHANNELS
    nibbles_NGI, scales_NG, minima_NG = (
        torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) for x in (nibbles_NGI, scales_NG, minima_NG)
    )
    low, high = nibbles_NGI.chunk(2, dim=-1)
    num_blocks, num_groups = len(nibbles_NGI) // INT4_CHANNELS, nibbles_NGI.shape[1]
    both = (low | high << 4).reshape(num_blocks, INT4_CHANNELS, num_groups, 4, 4).permute(0, 2, 3, 1, 4).flatten(2)
    numbers = torch.stack((scales_NG, minima_NG)).reshape(2, num_blocks, INT4_CHANNELS, num_groups).permute(1, 3, 0, 2)
    return torch.cat((both, numbers.contiguous().view(torch.uint8).flatten(2)), dim=-1)


def linear_int4(x: Tensor, packed: Tensor, num_channels: int, bias_N: Tensor | None = None) -> Tensor:
    """float32 (..., N): x (..., K) float32, rounded to int8 in groups of 32, times 4-bit weights from `pack_int4`.

    A row's result does not depend on the rows beside it, bit for bit; NaN and infinity give NaN in their row.
    """
    y: Tensor = torch.ops.fledge.linear_int4.default(x, packed, num_channels, bias_N)
    return y


def linear_float(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """float32 (..., N): what `F.linear` gives, for few rows, with the weights as they lie.

    A row's result does not depend on the rows beside it, bit for bit.
    """
    y: Tensor = torch.ops.fledge.linear_float.default(x, weight_NK, bias_N)
    return y


def paged_attention(
    q_NHK: Tensor,
    keys: Tensor,
    values: Tensor,
    tables_NM: Tensor,
    lengths_N: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """y_NHV: query n over positions 0 to lengths_N[n] - 1 of its own sequence; only the last `window` of them if given.

    `keys` (blocks, P, G, K) and `values` (blocks, P, G, V) float32 or both float16, contiguous; position p of query n
    stands in block `tables_NM[n, p // P]`, int64; lengths at least 1, int64. G divides H. What stands after a row's
    length is never looked at. A query's result does not depend on the others, bit for bit.
    """
    assert window is None or window > 0, window
    y: Tensor = torch.ops.fledge.paged_attention.default(q_NHK, keys, values, tables_NM, lengths_N, scale, window or 0)
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


def _fake_int8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[0])


def _fake_int4(x: Tensor, packed: Tensor, num_channels: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], num_channels)


def _fake_float(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float, window: int
) -> Tensor:
    return q.new_empty(*q.shape[:-1], values.shape[3])


_FAKES: dict[str, Callable[..., Tensor]] = {
    "linear_int8": _fake_int8,
    "linear_int4": _fake_int4,
    "linear_float": _fake_float,
    "paged_attention": _fake_attention,
}
