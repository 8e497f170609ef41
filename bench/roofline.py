"""The roofline of decoding: how long reading so many bytes takes with torch's threads, and nothing else.

A few lines of C++, compiled for the occasion; torch's own sums are a tenth slower. Used by engine.py.
"""

from __future__ import annotations

import ctypes
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fledge.infer.kernel_build import cpp_compiler

SOURCE = """
#include <cstdint>
typedef uint64_t V __attribute__((vector_size(64)));
extern "C" uint64_t read_all(const char* from, int64_t count, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : total) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    const int64_t part = count / threads / 256 * 256;
    const V* at = reinterpret_cast<const V*>(from + t * part);
    V a{}, b{}, c{}, d{};
    for (int64_t i = 0; i < part / 64; i += 4) a ^= at[i], b ^= at[i + 1], c ^= at[i + 2], d ^= at[i + 3];
    a ^= b ^ c ^ d;
    for (int i = 0; i < 8; ++i) total ^= a[i];
  }
  return total;
}
"""


class Clocks:
    """What time is measured with: the wall's, or on a machine that others use too, this process's own."""

    def __init__(self) -> None:
        self.now: Callable[[], float] = time.perf_counter


clocks = Clocks()


class Roofline:
    """Reads a buffer of `num_bytes` with `num_threads` threads."""

    def __init__(self, num_bytes: int, num_threads: int, folder: Path) -> None:
        self._buffer = torch.randint(0, 255, (num_bytes // 64 * 64 + 64,), dtype=torch.uint8)
        offset = -self._buffer.data_ptr() % 64
        self._arguments = self._buffer.data_ptr() + offset, num_bytes // 64 * 64, num_threads
        source, library = folder / "roofline.cpp", folder / "roofline.so"
        if not library.exists():
            source.write_text(SOURCE)
            flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
            subprocess.run([cpp_compiler(), *flags, str(source), "-o", str(library)], check=True)
        self._read = ctypes.CDLL(str(library)).read_all
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._read.restype = ctypes.c_uint64

    def seconds(self, times: int = 5) -> float:
        """The shortest of so many readings."""
        found = []
        for _ in range(times):
            start = clocks.now()
            self._read(*self._arguments)
            found.append(clocks.now() - start)
        return min(found)
