"""Graders of the published API: what they score, what is refused, and that their programs read nothing."""

from __future__ import annotations

from typing import Any

import pytest

from fledge.rl.formula import Formula, FormulaError
from fledge.rl.graders import GraderError, check, combined, fill, grade
from fledge.rl.judge import Judge, Verdict, Verifier
from fledge.rl.likeness import MEASURES, common_length, likeness

EQ = {
    "type": "string_check",
    "name": "same",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{ item.answer }}",
}
PYTHON = {"type": "python", "name": "mine", "source": "def grade(sample, item):\n    return len(sample['output_text'])"}
MULTI = {"type": "multi", "name": "both", "graders": {"a": EQ, "b": PYTHON}, "calculate_output": "0.5 * a + min(b, 3)"}


def program(source: str) -> dict[str, Any]:
    return {**PYTHON, "source": source}


@pytest.mark.parametrize(
    ("operation", "given", "reference", "expected"),
    [
        ("eq", "Yes", "Yes", 1),
        ("eq", "Yes", "yes", 0),
        ("ne", "Yes", "yes", 1),
        ("like", "so Yes it is", "Yes", 1),
        ("like", "so yes it is", "Yes", 0),
        ("ilike", "so yes it is", "Yes", 1),
    ],
)
def test_string_checks_compare_as_published(operation: str, given: str, reference: str, expected: int) -> None:
    assert grade({**EQ, "operation": operation}, given, {"answer": reference}) == expected


def test_templates_reach_into_item_and_sample() -> None:
    sample = {"output_text": "x", "output_json": {"a": [1, {"b": "deep"}]}}
    text = "{{item.name}} {{ sample.output_json.a[1].b }} {{sample.output_json.a}} {x}"
    assert fill(text, sample, {"name": "n"}) == 'n deep [1, {"b": "deep"}] {x}'
    for missing in ("{{item.nope}}", "{{nope.x}}", "{{sample.output_json.a[7]}}", "{{item.name.x}}"):
        with pytest.raises(GraderError) as caught:
            fill(missing, sample, {"name": "n"})
        assert caught.value.kind == "invalid_variable_error"


def test_a_multi_grader_combines_its_parts_by_its_formula() -> None:
    check(MULTI)
    assert grade(MULTI, "ab", {"answer": "ab"}) == 2.5
    assert grade(MULTI, "abcd", {"answer": "ab"}) == 3
    assert combined(EQ, {"same": 1.0}) == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1 + 2 * 3 ** 2", 19), ("-a / 2", -2), ("max(a, b, 7)", 7), ("sqrt(a) + floor(1.5) - abs(-b)", 0), ("min(a)", 4)],
)
def test_formulas_are_arithmetic(text: str, expected: float) -> None:
    assert Formula(text)({"a": 4.0, "b": 3.0}) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "a +", "a if b else c", "a.b", "a[0]", "__import__('os')", "(lambda: 1)()", "'a'", "True", "f(a)"),
        *("[a for a in b]", "a and b", "a < b", "min()", "exp(a, b)", "(" * 300 + "1" + ")" * 300, "1+" * 900 + "1"),
    ],
)
def test_nothing_else_is_a_formula(text: str) -> None:
    with pytest.raises(FormulaError):
        Formula(text)({"a": 1.0, "b": 1.0})


@pytest.mark.parametrize("text", ["1 / a", "9 ** 9 ** 9", "log(a)", "sqrt(0 - 1)"])
def test_a_formula_without_a_finite_value_has_none(text: str) -> None:
    with pytest.raises(FormulaError):
        Formula(text)({"a": 0.0})


def test_likeness_by_known_answers() -> None:
    assert common_length("ABCBDAB", "BDCABA") == 4  # Cormen et al., section 15.4
    assert likeness("fuzzy_match", "abcd", "abxd") == pytest.approx(0.75)
    said, wanted = "the cat sat on the mat", "the cat is on the mat"
    assert likeness("rouge_1", said, wanted) == pytest.approx(5 / 6)
    assert likeness("rouge_2", said, wanted) == pytest.approx(3 / 5)
    assert likeness("rouge_l", said, wanted) == pytest.approx(5 / 6)
    assert likeness("gleu", said, wanted) == pytest.approx(9 / 18)
    # Five matches in two chunks: (1 - 0.5 * (2 / 5) ** 3) * 5 / 6.
    assert likeness("meteor", said, wanted) == pytest.approx(5 / 6 * (1 - 0.5 * 0.4**3))
    assert 0 < likeness("bleu", said, wanted) < 1


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_every_measure_is_1_for_equal_texts_0_for_strangers_and_bounded(measure: str) -> None:
    long = "one two three four five six 你好世界"
    limit = 0.99 if measure == "meteor" else 1.0
    assert limit <= likeness(measure, long, long) <= 1.0
    assert likeness(measure, "abc", "xyz") == 0.0
    assert likeness(measure, "", "xyz") == 0.0
    assert 0.0 <= likeness(measure, "a b a b c", "b a c") <= 1.0


@pytest.mark.parametrize(
    ("grader", "place"),
    [
        ({"type": "nope"}, "grader.type"),
        ({"type": "score_model", "name": "x"}, "grader"),
        ({**EQ, "operation": "is"}, "grader.operation"),
        ({**EQ, "reference": 5}, "grader.reference"),
        ({**EQ, "type": "text_similarity", "evaluation_metric": "cosine"}, "grader.evaluation_metric"),
        (program("x = 1"), "grader.source"),
        ({**MULTI, "graders": {}}, "grader.graders"),
        ({**MULTI, "graders": {"a": MULTI}}, "grader.graders.a"),
        ({**MULTI, "calculate_output": "a + c"}, "grader.calculate_output"),
        ("text", "grader"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_place(grader: Any, place: str) -> None:
    with pytest.raises(GraderError) as caught:
        check(grader)
    assert caught.value.param == place


def ask(judge: Judge, grader: dict[str, Any], answer: str = "four", **options: Any) -> Verdict:
    verifier = Verifier("grader", {"grader": grader, **options})
    return judge(verifier, [(answer, {"item": {"answer": "four"}})])[0]


def test_in_the_sandbox_programs_compute_and_cannot_reach_anything(tmp_path: Any) -> None:
    secret = tmp_path / "secret"
    secret.write_text("7")
    with Judge(1) as judge:
        assert ask(judge, EQ).score == 1
        assert ask(judge, PYTHON).score == 4
        useful = "import re, json, math\nfrom collections import Counter\n"
        useful += "def grade(sample, item):\n    return len(re.findall('o', sample['output_text'])) + math.floor(1.5)"
        assert ask(judge, program(useful)).score == 2
        for attack in (
            f"open({str(secret)!r}).read()",
            "open('/proc/self/environ').read()",
            f"__import__('os').stat({str(secret)!r})",
            "__import__('os').listdir('/')",
            "__import__('os').getcwd()",
            "__import__('os').fork()",
            "__import__('os').kill(1, 0)",
            "__import__('_socket').socket()",
            "__import__('sqlite3')",
        ):
            found = ask(judge, program(f"def grade(sample, item):\n    {attack}\n    return 1"))
            assert found.score is None, attack
            assert found.reason is not None
            assert found.reason.startswith("python_grader_runtime_error"), found.reason
        for bad in ("def grade(sample, item):\n    return float('nan')", "def grade(sample, item):\n    return 'x'"):
            assert ask(judge, program(bad)).score is None
        assert ask(judge, program("def grade(:"), check=True).score is None
        assert ask(judge, MULTI, check=True).score == 1
