"""Device, precision, memory."""

from __future__ import annotations

import mmap
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fledge.train.device import (
    default_device,
    memory_bytes,
    peak_memory_bytes,
    precision,
    raise_malloc_thresholds,
    reset_peak_memory,
)


def test_the_cpu_computes_in_float32() -> None:
    with precision(torch.device("cpu")):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_cuda_would_compute_in_bfloat16() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, where there is no CUDA
        context = precision(torch.device("cuda"))
    assert isinstance(context, torch.autocast)
    assert context.fast_dtype == torch.bfloat16


def test_the_default_device_is_one_that_exists() -> None:
    torch.ones(1, device=default_device())


def test_peak_memory_is_at_least_what_torch_takes_and_in_bytes() -> None:
    before = peak_memory_bytes()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert 20 << 20 < before < 1 << 40
    assert peak_memory_bytes() >= held.numel()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_the_peak_can_be_measured_anew() -> None:
    # Pages of our own, not malloc's: whether malloc gives memory back depends on the thresholds set by other tests.
    with mmap.mmap(-1, 256 << 20) as held:
        held.write(b"1" * (256 << 20))
        with_it = peak_memory_bytes()
    reset_peak_memory()
    assert peak_memory_bytes() < with_it - (128 << 20)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_malloc_thresholds_can_be_raised_more_than_once() -> None:
    assert raise_malloc_thresholds() == raise_malloc_thresholds()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert raise_malloc_thresholds() is False


def test_the_machines_memory_is_more_than_this_process_takes() -> None:
    assert memory_bytes() > peak_memory_bytes()
