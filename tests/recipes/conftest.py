from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import align_world as world
import pytest
import torch


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world of the alignment tests, for those whose runs have names of their own."""
    return world.plant(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(planted: Path, tmp_path: Path) -> Path:
    """The world in a place of its own, so that runs do not meet."""
    shutil.copytree(planted, tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture(autouse=True)
def _indifferent() -> Iterator[None]:
    """A run switches deterministic algorithms on; other tests need not have them."""
    yield
    torch.use_deterministic_algorithms(False)
