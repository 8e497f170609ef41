"""What tests of several folders share: programs that run as processes which learn together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def in_processes() -> Callable[[Path, Path, int], None]:
    """(program, folder, how many): run `python program NUMBER COUNT FOLDER` in so many processes at once, joined by
    torch.distributed; fails with what they said if one does."""

    def run(program: Path, folder: Path, count: int = 2) -> None:
        paths = os.pathsep.join([str(ROOT), str(program.parent)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        words = [[sys.executable, str(program), str(number), str(count), str(folder)] for number in range(count)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started = [subprocess.Popen(command, env=environment, **pipes) for command in words]
        said = [process.communicate(timeout=600)[0] for process in started]
        assert [process.returncode for process in started] == [0] * count, "\n".join(said)

    return run
