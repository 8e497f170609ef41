"""Building the C++ kernels on the machine that runs them: once, with its own compiler, for its own processor.

The library lands in FLEDGE_HOME/kernels under a hash of everything it depends on: the sources, torch, the compiler
and the processor's features. A lock keeps two processes from building the same one, a recorded sha256 tells a damaged
file, and whatever goes wrong is a reason in words: the engine then runs the plain torch twins.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fledge.data.package import cache_home
from fledge.files import sha256_file, write_file, write_text

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")
# No contraction and no loosened arithmetic: a result must not depend on how a loop was unrolled.
FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
MACHINE = ("-march=native",)
BUILD_SECONDS = 600


class BuildError(RuntimeError):
    """Why there is no library, in a few words."""


def cpp_compiler() -> str:
    """Path of the C++ compiler; `BuildError` if there is none."""
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++")
    found = (shutil.which(candidate) for candidate in candidates if candidate)
    path = next((path for path in found if path), None)
    if path is None:
        raise BuildError("there is no C++ compiler")
    return path


def library() -> Path:
    """The library for this machine, built if need be; `BuildError` if it cannot be."""
    compiler = cpp_compiler()
    path = cache_home() / "kernels" / f"fledge-{_fingerprint(compiler)}.so"
    try:
        if _is_whole(path):
            return path
        with _locked(path):
            if not _is_whole(path):  # another process may have built it while this one waited
                _build(compiler, path)
    except OSError as error:
        raise BuildError(f"{error.filename or path}: {error.strerror or error}") from error
    return path


def discard(path: Path) -> None:
    """Forget a library that does not load, so that the next call builds it anew."""
    _sum_of(path).unlink(missing_ok=True)


def _build(compiler: str, path: Path) -> None:
    log.warning("building the CPU kernels with %s (once; about half a minute)", compiler)
    with tempfile.TemporaryDirectory(prefix="fledge-kernels-") as folder:
        try:
            built = _compile(compiler, Path(folder), MACHINE)
        except BuildError:
            built = _compile(compiler, Path(folder), ())  # some compilers cannot name their own processor
        write_file(path, lambda temporary: shutil.copyfile(built, temporary))
        write_text(_sum_of(path), sha256_file(built))


def _compile(compiler: str, folder: Path, machine: Sequence[str]) -> Path:
    """Every source to an object, side by side, and the objects to a library that takes torch from the process."""
    torch_include = Path(torch.__file__).parent / "include"
    include = [f"-I{torch_include}", f"-I{torch_include / 'torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [compiler, *FLAGS, *machine, abi, *include, "-c", str(source), "-o", str(output)]
        for source, output in zip(sources, objects, strict=True)
    ]
    _run_all(commands)
    built = folder / "fledge.so"
    # The OpenMP runtime stays open: torch brought one, and a second would have threads of its own.
    is_mac = platform.system() == "Darwin"
    shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if is_mac else ["-shared"]
    torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run_all([[compiler, *shared, *map(str, objects), *torch_libraries, "-o", str(built)]])
    return built


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        results = [(process, process.communicate(timeout=BUILD_SECONDS)[1]) for process in running]
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the compiler did not finish within {BUILD_SECONDS} seconds") from error
    finally:
        for process in running:
            process.kill()
    for process, complaint in results:
        if process.returncode:
            lines = [line for line in complaint.splitlines() if "error" in line] or complaint.splitlines() or ["?"]
            raise BuildError(f"the compiler failed: {lines[0][:300]}")


def _fingerprint(compiler: str) -> str:
    """Of everything that the library depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [
        torch.__version__,
        compiler,
        version,
        *FLAGS,
        *MACHINE,
        platform.platform(),
        platform.machine(),
        _cpu_features(),
    ]
    for source in (Path(__file__), *sorted(SOURCES.iterdir())):
        parts += [source.name, source.read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu_features() -> str:
    """What the processor can do, as Linux tells it; elsewhere its name must do."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    told = (line for line in lines if line.startswith(("flags", "Features", "model name")))
    return "\n".join(sorted(set(told)))


def _sum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    recorded = _sum_of(path)
    if not path.is_file() or not recorded.is_file():
        return False
    return recorded.read_text(encoding="utf-8") == sha256_file(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; the lock dies with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
