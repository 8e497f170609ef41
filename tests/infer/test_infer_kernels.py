"""The engine's operators against their slow twins, over odd shapes, and rows that know nothing of their neighbours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def int4_case(num_channels: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    shape = (num_channels, -(-width // twins.INT4_GROUP))
    nibbles_NGI = torch.randint(0, 16, (*shape, twins.INT4_GROUP), generator=random).to(torch.uint8)
    scales_NG = torch.rand(shape, generator=random).half()
    return nibbles_NGI, scales_NG, (-8 * torch.rand(shape, generator=random)).half(), torch.randn(num_channels)


@pytest.mark.parametrize(("rows", "width", "num_channels"), SHAPES)
def test_int4_linear_equals_its_twin_within_rounding(rows: int, width: int, num_channels: int) -> None:
    *weight, bias_N = int4_case(num_channels, width)
    packed = kernels.pack_int4(*weight)
    x_MK = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * 10
    for bias in (bias_N, None):
        y_MN, twin_MN = (f(x_MK, packed, num_channels, bias) for f in (kernels.linear_int4, twins.linear_int4))
        assert (y_MN - twin_MN).norm() < 1e-6 * twin_MN.norm()


def test_int4_linear_is_near_the_linear_layer_it_stands_for() -> None:
    nibbles_NGI, scales_NG, minima_NG, bias_N = int4_case(64, 256)
    weight_NGI = nibbles_NGI * scales_NG.float()[..., None] + minima_NG.float()[..., None]
    x_MK = torch.randn(7, 256, generator=torch.Generator().manual_seed(1))
    exact_MN = x_MK @ weight_NGI.flatten(1).mT + bias_N
    y_MN = kernels.linear_int4(x_MK, kernels.pack_int4(nibbles_NGI, scales_NG, minima_NG), 64, bias_N)
    assert (y_MN - exact_MN).norm() < 0.01 * exact_MN.norm()


def test_int4_packing_keeps_every_number() -> None:
    *weight, _ = int4_case(45, 70)
    unpacked = twins.unpack_int4(kernels.pack_int4(*weight), 45)
    assert all(torch.equal(a, b) for a, b in zip(unpacked, weight, strict=True))


@pytest.mark.parametrize("rows", [2, 6, 12, 19])
def test_an_int4_row_of_a_batch_equals_that_row_alone(rows: int) -> None:
    *weight, bias_N = int4_case(70, 200)
    packed = kernels.pack_int4(*weight)
    x_MK = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows)) * torch.arange(1, rows + 1)[:, None]
    together_MN = kernels.linear_int4(x_MK, packed, 70, bias_N)
    alone_MN = torch.cat([kernels.linear_int4(x_MK[i : i + 1], packed, 70, bias_N) for i in range(rows)])
    assert torch.equal(together_MN, alone_MN)


def test_what_is_not_a_number_spoils_its_own_int4_row_only() -> None:
    *weight, bias_N = int4_case(33, 50)
    x_MK = torch.ones(3, 50)
    x_MK[1, 7] = float("inf")
    y_MN = kernels.linear_int4(x_MK, kernels.pack_int4(*weight), 33, bias_N)
    assert y_MN[1].isnan().all()
    assert torch.equal(y_MN[0], y_MN[2])
    assert y_MN[0].isfinite().all()


def float_case(rows: int, width: int, num_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(rows)
    return tuple(
        torch.randn(shape, generator=random) for shape in ((rows, width), (num_channels, width), (num_channels,))
    )


@pytest.mark.parametrize(("rows", "width", "num_channels"), [*SHAPES, (48, 15, 7), (4, 31, 4)])
def test_float_linear_equals_its_twin_within_rounding(rows: int, width: int, num_channels: int) -> None:
    x_MK, weight_NK, bias_N = float_case(rows, width, num_channels)
    for bias in (bias_N, None):
        y_MN = kernels.linear_float(x_MK, weight_NK, bias)
        exact_MN = twins.linear_float(x_MK.double(), weight_NK.double(), None if bias is None else bias.double())
        assert (y_MN - exact_MN).norm() < 1e-6 * exact_MN.norm()
    assert kernels.linear_float(x_MK.view(1, rows, width), weight_NK).shape == (1, rows, num_channels)
    assert kernels.linear_float(x_MK[:0], weight_NK).shape == (0, num_channels)


@pytest.mark.parametrize("rows", [2, 5, 12, 19, 48])
def test_a_float_row_of_a_batch_equals_that_row_alone(rows: int) -> None:
    x_MK, weight_NK, bias_N = float_case(rows, 203, 71)
    together_MN = kernels.linear_float(x_MK, weight_NK, bias_N)
    for i in range(rows):
        assert torch.equal(together_MN[i : i + 1], kernels.linear_float(x_MK[i : i + 1], weight_NK, bias_N))


def test_what_is_not_a_number_spoils_its_own_float_row_only() -> None:
    x_MK, weight_NK, bias_N = float_case(5, 37, 9)
    expected_MN = kernels.linear_float(x_MK, weight_NK, bias_N)
    x_MK[1, 36] = float("nan")
    y_MN = kernels.linear_float(x_MK, weight_NK, bias_N)
    assert y_MN[1].isnan().all()
    assert torch.equal(y_MN[[0, 2, 3, 4]], expected_MN[[0, 2, 3, 4]])


def test_torch_compile_traces_the_float_linear() -> None:
    x_MK, weight_NK, bias_N = float_case(3, 20, 6)
    torch.library.opcheck(torch.ops.fledge.linear_float.default, (x_MK, weight_NK, bias_N))


# queries, heads, key heads, key width, value width, block size, window
PAGES = [
    (1, 12, 12, 64, 64, 16, None),
    (3, 9, 3, 64, 64, 16, None),
    (4, 4, 2, 20, 12, 8, 5),
    (2, 8, 1, 8, 8, 4, 300),
    (2, 6, 6, 128, 80, 32, 256),
]
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, int | None]


def pages_case(shape: tuple[int, int, int, int, int, int, int | None], longest: int = 900) -> Case:
    num_queries, num_heads, num_groups, key_width, value_width, block_size, window = shape
    random = torch.Generator().manual_seed(num_queries)
    table_width = -(-longest // block_size)
    num_blocks = num_queries * table_width
    keys = torch.randn(num_blocks, block_size, num_groups, key_width, generator=random)
    values = torch.randn(num_blocks, block_size, num_groups, value_width, generator=random)
    tables_NM = torch.randperm(num_blocks, generator=random).reshape(num_queries, table_width)
    lengths_N = torch.randint(1, longest, (num_queries,), generator=random)
    q_NHK = torch.randn(num_queries, num_heads, key_width, generator=random) * 3
    return q_NHK, keys, values, tables_NM, lengths_N, key_width**-0.5, window


@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", PAGES)
def test_paged_attention_equals_its_twin_within_rounding(
    shape: tuple[int, int, int, int, int, int, int | None], kept: torch.dtype
) -> None:
    q_NHK, keys, values, *rest, window = pages_case(shape)
    case = (q_NHK, (keys * 1e-4).to(kept) * 1e4, values.to(kept), *rest)  # some of the keys were subnormal
    y_NHV = kernels.paged_attention(*case, window)
    assert torch.allclose(y_NHV, twins.paged_attention(*case, window or 0), atol=2e-6, rtol=1e-5)


def test_paged_attention_at_every_length_around_a_part_and_a_block() -> None:
    q_NHK, keys, values, tables_NM, _, scale, _ = pages_case((1, 4, 2, 16, 16, 16, None), longest=520)
    for length in (1, 2, 15, 16, 17, 255, 256, 257, 511, 512, 513):
        case = (q_NHK, keys, values, tables_NM, torch.tensor([length]), scale)
        assert torch.allclose(kernels.paged_attention(*case), twins.paged_attention(*case, 0), atol=2e-6)


def test_a_query_of_a_batch_attends_as_it_does_alone() -> None:
    q_NHK, keys, values, tables_NM, lengths_N, scale, window = pages_case(PAGES[1])
    together = kernels.paged_attention(q_NHK, keys, values, tables_NM, lengths_N, scale, window)
    for n in range(len(q_NHK)):
        own = slice(n, n + 1)
        alone = kernels.paged_attention(q_NHK[own], keys, values, tables_NM[own], lengths_N[own], scale, window)
        assert torch.equal(together[own], alone)


def test_paged_attention_never_looks_past_a_length() -> None:
    q_NHK, keys, values, tables_NM, lengths_N, scale, _ = pages_case(PAGES[1])
    expected = kernels.paged_attention(q_NHK, keys, values, tables_NM, lengths_N, scale)
    for n, length in enumerate(lengths_N.tolist()):
        position = torch.arange(length, tables_NM.shape[1] * keys.shape[1])
        blocks, offsets = tables_NM[n, position // keys.shape[1]], position % keys.shape[1]
        keys[blocks, offsets], values[blocks, offsets] = float("nan"), float("nan")
    assert torch.equal(kernels.paged_attention(q_NHK, keys, values, tables_NM, lengths_N, scale), expected)


def test_scores_far_apart_and_infinite_do_no_harm() -> None:
    case = pages_case((2, 4, 2, 16, 16, 16, None), longest=40)
    huge = kernels.paged_attention(case[0] * 1e4, *case[1:])
    assert torch.allclose(huge, twins.paged_attention(case[0] * 1e4, *case[1:6], 0), atol=1e-4)
    q_NHK = case[0].clone()
    q_NHK[0, 1] = float("nan")
    y_NHV = kernels.paged_attention(q_NHK, *case[1:])
    assert y_NHV[0, 1].isnan().all()
    assert y_NHV[1].isfinite().all()


def test_a_block_that_is_not_there_is_refused() -> None:
    q_NHK, keys, values, tables_NM, lengths_N, scale, _ = pages_case(PAGES[1])
    if not kernels.load().is_compiled:
        pytest.skip("the twin indexes with torch, which refuses by itself")
    for wrong in (len(keys), -1):
        tables_NM[1, 0] = wrong
        with pytest.raises(RuntimeError, match=f"there is no block {wrong}"):
            kernels.paged_attention(q_NHK, keys, values, tables_NM, lengths_N, scale)
    with pytest.raises(RuntimeError, match="does not fit its table"):
        kernels.paged_attention(q_NHK, keys, values, tables_NM, lengths_N + 10_000, scale)


def test_torch_compile_traces_paged_attention() -> None:
    *case, _ = pages_case((2, 4, 2, 16, 16, 16, None), longest=40)
    torch.library.opcheck(torch.ops.fledge.paged_attention.default, (*case, 0))


@pytest.mark.slow
def test_the_kernels_are_right_without_the_processors_own_instructions() -> None:
    """What other machines run: the library built for any processor of this kind gives the same numbers."""
    if not kernels.load().is_compiled:
        pytest.skip("there is no C++ compiler")
    this = str(Path(__file__))
    plain = "from fledge.infer import kernel_build as b; b.MACHINE = ()\n"
    script = f"{plain}import sys, pytest; sys.exit(pytest.main([{this!r}, '-p', 'no:cacheprovider']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
