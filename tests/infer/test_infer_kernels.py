"""The engine's operators against their slow twins, over odd shapes, and rows that know nothing of their neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fledge.infer import kernel_twins as twins
from fledge.infer import kernels

SHAPES = [(1, 768, 768), (3, 100, 50), (13, 64, 33), (25, 17, 32), (5, 1, 1), (2, 4096, 97)]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    kernels.load()


def int8_case(num_channels: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    weight_NK = torch.randint(-127, 128, (num_channels, width), generator=random).to(torch.int8)
    return weight_NK, torch.rand(num_channels, generator=random), torch.randn(num_channels, generator=random)


@pytest.mark.parametrize(("rows", "width", "num_channels"), SHAPES)
def test_int8_linear_equals_its_twin_bit_for_bit(rows: int, width: int, num_channels: int) -> None:
    weight_NK, scales_N, bias_N = int8_case(num_channels, width)
    packed = kernels.pack_int8(weight_NK)
    x_MK = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * 10
    for bias in (bias_N, None):
        y_MN = kernels.linear_int8(x_MK, packed, scales_N, bias)
        assert torch.equal(y_MN, twins.linear_int8(x_MK, packed, scales_N, bias))


def test_int8_packing_keeps_every_weight() -> None:
    weight_NK, _, _ = int8_case(45, 37)
    assert torch.equal(twins.unpack_int8(kernels.pack_int8(weight_NK), 45, 37), weight_NK)


def test_int8_linear_is_near_the_linear_layer_it_stands_for() -> None:
    weight_NK, scales_N, bias_N = int8_case(64, 256)
    x_MK = torch.randn(7, 256, generator=torch.Generator().manual_seed(1))
    exact_MN = x_MK @ (weight_NK * scales_N[:, None]).mT + bias_N
    y_MN = kernels.linear_int8(x_MK, kernels.pack_int8(weight_NK), scales_N, bias_N)
    assert (y_MN - exact_MN).norm() < 0.01 * exact_MN.norm()


@pytest.mark.parametrize("rows", [2, 6, 12, 19, 33])
def test_a_row_of_a_batch_equals_that_row_alone(rows: int) -> None:
    weight_NK, scales_N, bias_N = int8_case(70, 200)
    packed = kernels.pack_int8(weight_NK)
    x_MK = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows)) * torch.arange(1, rows + 1)[:, None]
    together_MN = kernels.linear_int8(x_MK, packed, scales_N, bias_N)
    alone_MN = torch.cat([kernels.linear_int8(x_MK[i : i + 1], packed, scales_N, bias_N) for i in range(rows)])
    assert torch.equal(together_MN, alone_MN)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_spoils_its_own_row_only(bad: float) -> None:
    weight_NK, scales_N, bias_N = int8_case(33, 50)
    packed = kernels.pack_int8(weight_NK)
    x_MK = torch.ones(3, 50)
    x_MK[1, 7] = bad
    y_MN = kernels.linear_int8(x_MK, packed, scales_N, bias_N)
    assert y_MN[1].isnan().all()
    assert torch.equal(y_MN[0], y_MN[2])
    assert y_MN[0].isfinite().all()
    assert torch.equal(y_MN.nan_to_num(), twins.linear_int8(x_MK, packed, scales_N, bias_N).nan_to_num())


def test_rows_of_nothing_give_the_bias() -> None:
    weight_NK, scales_N, bias_N = int8_case(33, 50)
    packed = kernels.pack_int8(weight_NK)
    for size in (0.0, 1e-38, -1e-35):
        y_MN = kernels.linear_int8(torch.full((2, 50), size), packed, scales_N, bias_N)
        assert torch.equal(y_MN, bias_N.expand(2, -1))
    assert kernels.linear_int8(torch.empty(0, 50), packed, scales_N, bias_N).shape == (0, 33)


def test_torch_compile_traces_the_operators() -> None:
    weight_NK, scales_N, bias_N = int8_case(33, 50)
    packed = kernels.pack_int8(weight_NK)
    torch.library.opcheck(torch.ops.fledge.linear_int8.default, (torch.ones(2, 3, 50), packed, scales_N, bias_N))
