"""The built-in verifiers: functions that say whether an answer is right, from it and its record in the data set.

They run in the confined process of sandbox.py, never in the trainer's (judge.py asks for them), so this file imports
nothing but the standard library and what lies beside it.

Source: Cobbe et al. 2021 (2110.14168) for '####'; Lambert et al. 2024 (2411.15124), section 6, for rewards that can be
verified.
"""

from __future__ import annotations

import json
import os
import re
import runpy
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from fledge.rl.graders import GraderError, grade, read_programs

Verdict = tuple[float, str | None]  # score and, where it is not full, why
Verifier = Callable[[str, Mapping[str, Any], Mapping[str, Any]], Verdict]


class Unjudgeable(Exception):
    """The record or the options, not the answer, are at fault: there is no score."""


# The verifiers: (completion, record of the data set, options) -> verdict.


def exact_match(completion: str, record: Mapping[str, Any], options: Mapping[str, Any]) -> Verdict:
    """1 if the answer is `record["answer"]` (or one of a list), white space around it aside; option `ignore_case`."""
    fold = str.casefold if options.get("ignore_case") else str
    wanted = _field(record, "answer")
    accepted = wanted if isinstance(wanted, list) else [wanted]
    return _verdict(fold(completion.strip()) in {fold(str(one).strip()) for one in accepted}, "another answer")


def numeric_answer(completion: str, record: Mapping[str, Any], options: Mapping[str, Any]) -> Verdict:
    """1 if the number behind the last '####' equals that of `record["answer"]` (Cobbe et al. 2021, GSM8K).

    A record without '####' is the number itself. Option `last_number` takes the last number of an answer without
    '####'; option `tolerance` is how far off it may be.
    """
    wanted = _number(str(_field(record, "answer")).rpartition("####")[2])
    if wanted is None:
        raise Unjudgeable(f"the record's answer {record['answer']!r} is no number")
    marked = completion.rpartition("####")
    if marked[1]:
        found = _number(marked[2])
    else:
        numbers = re.findall(NUMBER, completion) if options.get("last_number") else []
        found = _number(numbers[-1]) if numbers else None
    if found is None:
        return 0.0, "no number"
    return _verdict(abs(found - wanted) <= Decimal(str(options.get("tolerance", 0))), f"{found} instead of {wanted}")


def regex(completion: str, record: Mapping[str, Any], options: Mapping[str, Any]) -> Verdict:
    """1 if `record["pattern"]` (or the option `pattern`) is found in the answer; option `whole`: matches all of it."""
    pattern = str(record.get("pattern") or options.get("pattern") or _field(record, "pattern"))
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise Unjudgeable(f"pattern {pattern!r}: {error}") from error
    match = compiled.fullmatch(completion) if options.get("whole") else compiled.search(completion)
    return _verdict(match is not None, "no match")


def json_validity(completion: str, record: Mapping[str, Any], options: Mapping[str, Any]) -> Verdict:
    """1 if the answer, a code fence around it aside, is JSON; option or field `keys`: an object with at least these."""
    try:
        found = json.loads(_fenced(completion), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return 0.0, f"no JSON: {error}"
    keys = record.get("keys") or options.get("keys") or []
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    return _verdict(not missing, f"lacks {missing}")


def python_tests(completion: str, record: Mapping[str, Any], options: Mapping[str, Any]) -> Verdict:
    """1 if the answer's Python code runs and passes every test of `record["tests"]`: a list of statements or one text.

    `record["setup"]`, if given, runs first. Option `partial` gives the share of tests passed. Code that
    never ends or needs too much memory has failed its tests (sandbox.py says so).
    """
    tests = _field(record, "tests")
    tests = [tests] if isinstance(tests, str) else list(tests)
    if not tests:
        raise Unjudgeable("the record's list of tests is empty")
    try:
        names = _run(str(record.get("setup") or ""), {})
    except BaseException as error:
        raise Unjudgeable(f"the record's setup raises {_told(error)}") from error
    try:
        names = _run(_fenced(completion), names)
    except BaseException as error:
        return 0.0, f"the code raises {_told(error)}"
    passed, why = 0, None
    for place, test in enumerate(tests):
        try:
            _run(str(test), names)
            passed += 1
        except BaseException as error:
            why = why or f"test {place} raises {_told(error)}"
    return (passed / len(tests) if options.get("partial") else float(passed == len(tests))), why


def custom(completion: str, record: Mapping[str, Any], options: Mapping[str, Any]) -> Verdict:
    """What `function(completion, record)` of the Python file `options["path"]` says: a number."""
    names = runpy.run_path(str(options["path"]), run_name="verifier")
    function = names.get(str(options["function"]))
    if not callable(function):
        raise Unjudgeable(f"{options['path']} has no function {options['function']}")
    return float(function(completion, dict(record))), None


def grader(completion: str, record: Mapping[str, Any], options: Mapping[str, Any]) -> Verdict:
    """The score that `options["grader"]`, one of the published API's (graders.py), gives with `record["item"]`.

    Option `check`: its programs are only read, and the score is 1.
    """
    try:
        if options.get("check"):
            read_programs(options["grader"])
            return 1.0, None
        return grade(options["grader"], completion, _field(record, "item")), None
    except GraderError as error:
        raise Unjudgeable(str(error)) from error


VERIFIERS: dict[str, Verifier] = {
    "exact_match": exact_match,
    "numeric_answer": numeric_answer,
    "regex": regex,
    "json_validity": json_validity,
    "python_tests": python_tests,
    "custom": custom,
    "grader": grader,
}
# What each of them can be told; whoever offers one of these takes nothing else, so that a slip is no silent default.
OPTIONS: dict[str, frozenset[str]] = {
    "exact_match": frozenset({"ignore_case"}),
    "numeric_answer": frozenset({"last_number", "tolerance"}),
    "regex": frozenset({"pattern", "whole"}),
    "json_validity": frozenset({"keys"}),
    "python_tests": frozenset({"partial"}),
    "custom": frozenset({"path", "function"}),
    "grader": frozenset({"grader", "check"}),
}
# What a user of the server may have run: these open no file at all, so nothing on the machine can be read.
SEALED = {"grader"}
# Where code that dies or hangs is the answer's own and has failed; elsewhere the verifier has.
RUNS_THE_ANSWER = {"python_tests"}

NUMBER = r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+"


def _number(text: str) -> Decimal | None:
    """The number that a text is, with thousands separators, currency or a final full stop; None if it is none."""
    bare = re.sub(r"[,$€£%\s]", "", text).rstrip(".")
    try:
        number = Decimal(bare)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _fenced(text: str) -> str:
    """The inside of the last code fence, or the text itself if it has none."""
    blocks = re.findall(r"```[\w+-]*[ \t]*\n(.*?)```", text, re.DOTALL)
    return str(blocks[-1]) if blocks else text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _run(code: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """The names that there are after Python code ran. The code lies in memory: a confined process writes no file."""
    descriptor = os.memfd_create("answer")
    os.write(descriptor, code.encode())
    # Not closed: functions of the answer may look themselves up. The process ends soon.
    return {**names, **runpy.run_path(f"/proc/self/fd/{descriptor}", init_globals=dict(names), run_name="answer")}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise Unjudgeable(f"the record has no field '{name}'")
    return record[name]


def _verdict(holds: bool, why: str) -> Verdict:
    return (1.0, None) if holds else (0.0, why)
