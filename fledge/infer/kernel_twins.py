"""The slow twins of the C++ kernels, in plain torch: what each operator means, on any device.

They run where there is no compiler and stand against the kernels in tests. Same arguments as the operators
(kernels.py). Shapes: M rows, N output channels or queries, K inputs or key width, G groups of I = 32 inputs, H heads,
S positions, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Output channels side by side in packed weights; kernels/kernels.h.
INT8_CHANNELS, INT4_CHANNELS = 32, 16
# Inputs that share a scale: of the activations in both, of the weights too in int4.
INT8_GROUP, INT4_GROUP = 128, 32
QMAX = 127.0
LEAST = 1e-30  # kernels/activations.h


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes_MK as float32 integers -127..127, scale_M1): symmetric, a scale a row; bit for bit as the kernels do it.

    A row with numbers that are not finite gets bytes of zero and the scale NaN.
    """
    largest_M1 = x_MK.abs().amax(dim=-1, keepdim=True)
    is_finite_M1 = largest_M1.isfinite()
    is_zero_M1 = ~(largest_M1 >= LEAST) | ~is_finite_M1
    divisor_M1 = torch.where(is_zero_M1, 1.0, largest_M1)
    bytes_MK = torch.where(is_zero_M1, 0.0, x_MK * (QMAX / divisor_M1)).round()
    scale_M1 = torch.where(is_zero_M1, 0.0, largest_M1 / QMAX).masked_fill(~is_finite_M1, float("nan"))
    return bytes_MK, scale_M1


def unpack_int8(packed: Tensor, num_channels: int, width: int) -> Tensor:
    """weight_NK int8 from the layout of `kernels.pack_int8`."""
    num_blocks, num_fours, channels, four = packed.shape
    weight_NK = packed.permute(0, 2, 1, 3).reshape(num_blocks * channels, num_fours * four)
    return (weight_NK[:num_channels, :width].to(torch.int16) - 128).to(torch.int8)


def linear_int8(x: Tensor, packed: Tensor, scales_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """Bit for bit as the kernel: sums of integers in float64, which holds them exactly, then group after group."""
    x_MGI = F.pad(x.reshape(-1, x.shape[-1]), (0, -x.shape[-1] % INT8_GROUP)).unflatten(1, (-1, INT8_GROUP))
    weight_NGI = unpack_int8(packed, scales_N.shape[0], packed.shape[1] * 4).unflatten(1, (-1, INT8_GROUP))
    bytes_MGI, scale_MG1 = quantize_rows(x_MGI)
    y_MN = x.new_zeros(len(x_MGI), scales_N.shape[0])
    for g in range(x_MGI.shape[1]):
        sums_MN = (bytes_MGI[:, g].double() @ weight_NGI[:, g].double().mT).float()
        y_MN = y_MN + sums_MN * scale_MG1[:, g]
    y_MN = y_MN * scales_N
    if bias_N is not None:
        y_MN = y_MN + bias_N
    return y_MN.reshape(*x.shape[:-1], scales_N.shape[0])


def unpack_int4(packed: Tensor, num_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(nibbles_NGI uint8 0..15, scales_NG, minima_NG float16) from the layout of `kernels.pack_int4`; I = 32."""
    num_blocks, num_groups, _ = packed.shape
    nibbles, numbers = packed.split([16 * INT4_CHANNELS, 4 * INT4_CHANNELS], dim=-1)
    both = nibbles.reshape(num_blocks, num_groups, 4, INT4_CHANNELS, 4).permute(0, 3, 1, 2, 4).flatten(3)
    nibbles_NGI = torch.cat((both & 15, both >> 4), dim=-1).flatten(0, 1)
    halves = numbers.contiguous().view(torch.float16).reshape(num_blocks, num_groups, 2, INT4_CHANNELS)
    scales_NG, minima_NG = halves.permute(2, 0, 3, 1).flatten(1, 2)
    return nibbles_NGI[:num_channels], scales_NG[:num_channels], minima_NG[:num_channels]


def linear_int4(x: Tensor, packed: Tensor, num_channels: int, bias_N: Tensor | None) -> Tensor:
    """Sums within a group are exact; groups are added up in whatever order torch likes."""
    nibbles_NGI, scales_NG, minima_NG = unpack_int4(packed, num_channels)
    x_MK = x.reshape(-1, x.shape[-1])
    x_MGI = F.pad(x_MK, (0, -x_MK.shape[1] % INT4_GROUP)).unflatten(1, (-1, INT4_GROUP))
    bytes_MGI, scale_MG1 = quantize_rows(x_MGI)
    sums_GMN = (bytes_MGI.double().transpose(0, 1) @ nibbles_NGI.double().permute(1, 2, 0)).float()
    weighted_MG = (bytes_MGI.sum(dim=-1, keepdim=True) * scale_MG1)[..., 0]
    y_MN = torch.einsum("gmn,mg,ng->mn", sums_GMN, scale_MG1[..., 0], scales_NG.float())
    y_MN = y_MN + weighted_MG @ minima_NG.float().mT
    if bias_N is not None:
        y_MN = y_MN + bias_N
    return y_MN.reshape(*x.shape[:-1], num_channels)


def linear_float(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """`F.linear`."""
    return F.linear(x, weight_NK, bias_N)


def paged_attention(
    q_NHK: Tensor, keys: Tensor, values: Tensor, tables_NM: Tensor, lengths_N: Tensor, scale: float, window: int
) -> Tensor:
    """One query after the other over its own positions. `window` 0 shows everything."""
    y_NHV = q_NHK.new_empty(*q_NHK.shape[:2], values.shape[3])
    num_shared = q_NHK.shape[1] // keys.shape[2]
    for n, length in enumerate(lengths_N.tolist()):
        first = max(0, length - window) if window else 0
        own = tables_NM[n, : -(-length // keys.shape[1])]
        k_HSK, v_HSV = (
            x[own].flatten(0, 1)[first:length].to(q_NHK.dtype).repeat_interleave(num_shared, dim=1).transpose(0, 1)
            for x in (keys, values)
        )
        weights_H1S = (q_NHK[n, :, None] @ k_HSK.mT * scale).softmax(dim=-1)
        y_NHV[n] = (weights_H1S @ v_HSV)[:, 0]
    return y_NHV
