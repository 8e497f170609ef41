"""The pages of docs/methods/: their examples run, their data are read, and every metric that a run tells is explained.

The world is that of the tests of `fledge align`: a tiny model, `pocket:sft`, with a reward model and a judge, and a
small file of every kind of data.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fledge import cli
from fledge.data.interchange import read
from fledge.recipes.align import METHODS
from fledge.rl.verifier import VERIFIERS

sys.path.insert(0, str(Path(__file__).parent / "recipes"))
import align_world as world

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "methods"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))}
OVERVIEW = (ROOT / "docs" / "align.md").read_text(encoding="utf-8")
PARTS = ("Equation", "When to use it", "Data", "Example", "Metrics")
# What makes a run tiny; the rest of an example runs as it stands.
EPISODES = ("train.prompt_length=30", "train.response_length=8", "outcome.max_tokens=8", "outcome.prompts=4")
ROUNDS = (*EPISODES, "train.warmup_rounds=1", "train.rounds=2")
GROUPS = (*ROUNDS, "train.minibatch=16", "train.prompts=4", "train.group=4")
TINY = {
    "sft": ("outcome.max_tokens=8", "train.fit.batch=4"),
    "reward": (),
    "dpo": ("outcome.max_tokens=8",),
    "ipo": ("outcome.max_tokens=8",),
    "kto": ("outcome.max_tokens=8", "train.fit.batch=32"),
    "ppo": (*ROUNDS, "train.episodes=16"),
    "grpo": GROUPS,
    "rloo": GROUPS,
    "best-of-n": (*EPISODES, "train.samples=4", "train.fit.batch=1", "train.fit.epochs=1"),
    "feedme": (*EPISODES, "train.rounds=2", "train.prompts=4", "train.samples=4", "train.steps=2"),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = world.plant(tmp_path_factory.mktemp("world"))
    (folder / "runs" / "tiny").rename(folder / "runs" / "pocket")
    world.write_rows(folder / "texts.jsonl", [{"text": f"all about {question}"} for question in world.questions()])
    return folder


@pytest.fixture(autouse=True)
def _indifferent() -> Iterator[None]:
    """A run switches deterministic algorithms on; other tests need not have them."""
    yield
    torch.use_deterministic_algorithms(False)


def fenced(page: str, language: str) -> list[str]:
    """The lines of all blocks of a language."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def explained(text: str) -> set[str]:
    """The names of the tables of metrics in a page's part about them."""
    part = text.split("## Metrics\n", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE))


def explained_for(page: str) -> set[str]:
    """The names of a page, of the pages whose metrics it says are its own, and of what every step tells."""
    part = PAGES[page].split("## Metrics\n", 1)[1]
    named = re.findall(r"\]\(([\w-]+)\.md#metrics\)", part)
    return explained(PAGES[page]) | explained(OVERVIEW) | {name for one in named for name in explained_for(one)}


def is_explained(name: str, names: set[str]) -> bool:
    return any(re.fullmatch(re.sub(r"<\w+>", ".+", re.escape(known)), name) for known in names)


def test_every_method_has_a_page_that_the_overview_links() -> None:
    assert set(PAGES) == {method.name for method in METHODS} == set(TINY)
    for name in PAGES:
        assert f"(methods/{name}.md)" in OVERVIEW


def test_page_of_grpo_names_every_verifier() -> None:
    assert all(name in PAGES["grpo"] for name in VERIFIERS)


@pytest.mark.parametrize("page", PAGES)
def test_page_has_all_its_parts_and_a_source(page: str) -> None:
    assert re.findall(r"^## (.+)$", PAGES[page], re.MULTILINE) == list(PARTS)
    assert re.search(r"\(\d{4}\.\d{5}\)|\d{4}\.\d{5}|OpenAI's model index", PAGES[page])


@pytest.mark.parametrize("page", PAGES)
def test_data_of_the_page_are_read_without_a_bad_row(page: str, tmp_path: Path) -> None:
    """Each row as a file of its own: a page may show several formats."""
    rows = fenced(page, "json")
    assert rows
    for row in rows:
        path = world.write_rows(tmp_path / "rows.jsonl", [json.loads(row)])
        assert len(list(read(path))) == 1


@pytest.mark.parametrize("page", PAGES)
def test_metrics_of_the_page_stand_on_the_page_of_metrics(page: str) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    assert explained(PAGES[page]) | explained(OVERVIEW) <= known


@pytest.mark.parametrize("page", PAGES)
def test_example_of_the_page_runs_and_all_that_it_tells_is_explained(
    page: str, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "world"
    shutil.copytree(planted, folder)
    monkeypatch.chdir(folder)
    commands = [shlex.split(line) for line in fenced(page, "sh")]
    assert commands[0][:4] == ["fledge", "align", page, "pocket:sft"]
    for _, *words in commands:
        settings = [word for leaf in TINY[page] for word in ("--set", leaf)] if words[0] == "align" else []
        assert cli.main([*words, *settings]) == 0, words
    told = set[str]()
    for path in folder.glob("runs/*/metrics.jsonl"):
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        told |= {name for line in lines if line["stage"] == page for name in line} - {"stage"}
    assert told
    unexplained = {name for name in told if not is_explained(name, explained_for(page))}
    assert not unexplained, f"docs/methods/{page}.md does not explain {sorted(unexplained)}"
