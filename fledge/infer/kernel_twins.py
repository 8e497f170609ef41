"""The slow twins of the C++ kernels, in plain torch: what each operator means, on any device.

They run where there is no compiler and stand against the kernels in tests. Same arguments as the operators
(kernels.py). Shapes: M rows, N output channels, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

QMAX = 127.0
LEAST = 1e-30  # kernels/activations.h


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes_MK as float32 integers -127..127, scale_M1): symmetric, one scale a row; bit for bit as the kernels do it.

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
    """The integers are summed in float64, which holds them exactly."""
    x_MK = x.reshape(-1, x.shape[-1])
    weight_NK = unpack_int8(packed, scales_N.shape[0], x.shape[-1])
    bytes_MK, scale_M1 = quantize_rows(x_MK)
    sums_MN = (bytes_MK.double() @ weight_NK.double().mT).float()
    y_MN = sums_MN * scale_M1 * scales_N
    if bias_N is not None:
        y_MN = y_MN + bias_N
    return y_MN.reshape(*x.shape[:-1], scales_N.shape[0])
