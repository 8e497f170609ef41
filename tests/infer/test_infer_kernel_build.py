"""Building the kernels: once, by one process, again when damaged; without a compiler the twins run."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from fledge.infer import kernel_build
from fledge.infer.kernel_build import BuildError

TINY = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one function, which compiles at once, in a home of its own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "tiny.cpp").write_text(TINY)
    monkeypatch.setattr(kernel_build, "SOURCES", folder)
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))
    try:
        kernel_build.cpp_compiler()
    except BuildError:
        pytest.skip("there is no C++ compiler")
    return folder


def answer(path: Path) -> int:
    number: int = ctypes.CDLL(str(path)).answer()
    return number


def test_a_library_is_built_once_and_found_again(sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = kernel_build.library()
    assert answer(path) == 42
    built = path.stat().st_mtime_ns
    assert kernel_build.library() == path
    assert path.stat().st_mtime_ns == built
    assert caplog.text.count("building the CPU kernels") == 1


def test_another_source_is_another_library(sources: Path) -> None:
    path = kernel_build.library()
    (sources / "tiny.cpp").write_text(TINY.replace("42", "43"))
    newer = kernel_build.library()
    assert newer != path
    assert answer(newer) == 43


@pytest.mark.parametrize("damage", [b"", b"not a library"])
def test_a_damaged_library_is_built_anew(damage: bytes, sources: Path) -> None:
    path = kernel_build.library()
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-5] + damage)
    assert kernel_build.library() == path
    assert answer(path) == 42


def test_a_library_that_was_discarded_is_built_anew(sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    kernel_build.discard(kernel_build.library())
    kernel_build.library()
    assert caplog.text.count("building the CPU kernels") == 2


def test_what_the_compiler_refuses_is_told_in_a_line(sources: Path) -> None:
    (sources / "tiny.cpp").write_text("int answer() { return nothing; }\n")
    with pytest.raises(BuildError, match=r"the compiler failed: .*'?nothing'?"):
        kernel_build.library()


def test_without_a_compiler_the_reason_is_told(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"there is no C\+\+ compiler"):
        kernel_build.library()


def test_a_home_that_cannot_be_written_is_told(sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="file"):
        kernel_build.library()


@pytest.mark.slow
def test_two_processes_build_one_library(sources: Path, tmp_path: Path) -> None:
    script = (
        "import logging; logging.basicConfig(); from pathlib import Path; from fledge.infer import kernel_build as b;"
        f"b.SOURCES = Path({str(sources)!r}); print(b.library())"
    )
    pipe = subprocess.PIPE
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert told[0][0] == told[1][0]
    assert (told[0][1] + told[1][1]).count("building the CPU kernels") == 1
    assert answer(Path(told[0][0].strip())) == 42


def test_without_a_compiler_plain_torch_runs_the_operators(tmp_path: Path) -> None:
    script = (
        "import torch; from fledge.infer import kernels;"
        "assert kernels.load().obstacle == 'there is no C++ compiler', kernels.load();"
        "w = torch.randint(-127, 128, (40, 50)).to(torch.int8);"
        "y = kernels.linear_int8(torch.eye(50), kernels.pack_int8(w), torch.ones(40));"
        "assert torch.allclose(y.T, w.float(), rtol=1e-6)"
    )
    environment = {"PATH": "", "FLEDGE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no CPU kernels: there is no C++ compiler; quantised models run several times slower" in done.stderr
