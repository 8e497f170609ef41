"""Layers with quantised weights, which stand in for `nn.Linear` and `nn.Embedding`. Made by quantize.py.

The weights are stored as the C++ kernels read them (kernels.py), so a checkpoint is mapped and used as it lies. Where
the kernels cannot run, on a GPU or without a compiler, plain torch does the same arithmetic on a copy of the weights
that is unpacked at first use. On the CPU activations are rounded to int8 as well, elsewhere too: a model has one
meaning wherever it runs.

Shapes: M rows, N output channels or tokens, K inputs, G groups of I = 32 of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.infer import kernel_twins as twins
from fledge.infer import kernels
from fledge.infer.kernel_twins import INT4_CHANNELS, INT4_GROUP, INT8_CHANNELS, INT8_GROUP


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Packed(nn.Module):
    """What the layers share: packed weights, and a plain copy of them where the kernels cannot run."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self._plain: Tensor | None = None
        self._has_kernels = kernels.load().is_compiled  # asked once: torch.compile cannot look into `load`

    def _unpack(self) -> Tensor:
        raise NotImplementedError

    def plain(self) -> Tensor:
        """The unpacked weights on the device of the packed ones; made once."""
        if self._plain is None or self._plain.device != self.packed.device:
            self._plain = self._unpack()
        return self._plain

    def forget_plain(self) -> None:
        """The packed weights have changed."""
        self._plain = None

    def _runs_kernels(self, x: Tensor) -> bool:
        return self._has_kernels and x.device.type == "cpu"


class Int8Linear(_Packed):
    """y = x W^T + b: int8 weights with a scale a channel, activations rounded to int8 in groups of 128.

    Float in, the same type out. `packed`, `scales` from `quantize.int8_matrix`; left out, they are made to be loaded.
    """

    scales: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, packed: Tensor | None = None, scales: Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = _int8_shape(out_features, in_features)
        self.register_buffer("packed", torch.zeros(shape, dtype=torch.uint8) if packed is None else packed)
        self.register_buffer("scales", torch.zeros(out_features) if scales is None else scales)
        self.register_buffer("bias", None)
        assert self.packed.shape == shape, (self.packed.shape, shape)

    def forward(self, x: Tensor) -> Tensor:
        if self._runs_kernels(x):
            if x.dtype == torch.float32:  # the usual case calls nothing else: small models feel every call
                return kernels.linear_int8(x, self.packed, self.scales, self.bias)
            return kernels.linear_int8(x.float(), self.packed, self.scales, self.bias).to(x.dtype)
        # Converted at each use: a second copy, four times as large, would be what was to be saved.
        y = F.linear(_rounded(x, INT8_GROUP), self.plain().float()) * self.scales
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _unpack(self) -> Tensor:
        return twins.unpack_int8(self.packed, self.out_features, self.packed.shape[1] * 4)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int4Linear(_Packed):
    """y = x W^T + b: 4-bit weights, each group of 32 inputs with a scale and a minimum; activations rounded to int8
    in the same groups. Float in, the same type out. `packed` from `quantize.int4_matrix`."""

    def __init__(self, in_features: int, out_features: int, *, packed: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (
            _up(out_features, INT4_CHANNELS) // INT4_CHANNELS,
            _up(in_features, INT4_GROUP) // INT4_GROUP,
            20 * INT4_CHANNELS,
        )
        self.register_buffer("packed", torch.zeros(shape, dtype=torch.uint8) if packed is None else packed)
        self.register_buffer("bias", None)
        assert self.packed.shape == shape, (self.packed.shape, shape)

    def forward(self, x: Tensor) -> Tensor:
        if self._runs_kernels(x):
            if x.dtype == torch.float32:
                return kernels.linear_int4(x, self.packed, self.out_features, self.bias)
            return kernels.linear_int4(x.float(), self.packed, self.out_features, self.bias).to(x.dtype)
        return F.linear(_rounded(x, INT4_GROUP), self.plain(), self.bias).to(x.dtype)

    @property
    def numbers(self) -> Tensor:
        """The scales and minima of all groups, float16, as they stand among the packed bytes."""
        return self.packed[..., 16 * INT4_CHANNELS :].view(torch.float16)

    def _unpack(self) -> Tensor:
        nibbles_NGI, scales_NG, minima_NG = twins.unpack_int4(self.packed, self.out_features)
        return (nibbles_NGI * scales_NG.float()[..., None] + minima_NG.float()[..., None]).flatten(1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Embedding(nn.Module):
    """Rows of an int8 matrix, each with its scale: packed as in `Int8Linear`, so that a tied head can share them."""

    packed: Tensor
    scales: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, packed: Tensor | None = None, scales: Tensor | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        shape = _int8_shape(num_embeddings, embedding_dim)
        self.register_buffer("packed", torch.zeros(shape, dtype=torch.uint8) if packed is None else packed)
        self.register_buffer("scales", torch.zeros(num_embeddings) if scales is None else scales)
        assert self.packed.shape == shape, (self.packed.shape, shape)

    def forward(self, tokens: Tensor) -> Tensor:
        scales = self.scales[tokens]  # refuses ids that are not there
        rows = self.packed[tokens // INT8_CHANNELS, :, tokens % INT8_CHANNELS].flatten(-2)
        return (rows[..., : self.embedding_dim].float() - 128.0) * scales[..., None]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def _int8_shape(num_channels: int, width: int) -> tuple[int, int, int, int]:
    num_blocks = _up(num_channels, INT8_CHANNELS) // INT8_CHANNELS
    return num_blocks, _up(width, INT8_GROUP) // 4, INT8_CHANNELS, 4


def _rounded(x: Tensor, group: int) -> Tensor:
    """float32 (..., K rounded up to whole groups): x as the kernels see it, each group rounded to 255 values."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    numbers, scales = twins.quantize_rows(groups)
    return (numbers * scales).flatten(-2)
