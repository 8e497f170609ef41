"""Graders of the published API: how a fine-tuning job's answers are scored, and what is refused before any is.

Runs in the confined process of sandbox.py, whose files are out of reach (verifier.py, `SEALED`), so this file imports
nothing but the standard library. `{{item.NAME}}` stands for what the data set says, `{{sample.output_text}}` for the
answer. Sources: openapi 2.3.0, `Grader...`; the measures of likeness are cited where they stand (likeness.py).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import math
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fledge.rl.formula import Formula, FormulaError
from fledge.rl.likeness import MEASURES, likeness

TYPES = ("string_check", "text_similarity", "python", "multi")
MAX_GRADERS, MAX_SOURCE = 32, 1 << 18  # of a multi grader; characters of a program
_OPERATIONS = ("eq", "ne", "like", "ilike")
_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_]\w*)((?:\.[\w-]+|\[\d+\])*)\s*\}\}")
_STEP = re.compile(r"\.([\w-]+)|\[(\d+)\]")


class GraderError(Exception):
    """A grader that cannot be used or has no score. `kind` is the published name of the error, `param` the place."""

    def __init__(self, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.param = kind, message, param


def check(grader: Any, place: str = "grader") -> None:
    """`GraderError` naming what of a grader cannot be used here; nothing is run."""
    if not isinstance(grader, Mapping):
        raise _invalid("expected an object", place)
    kind = grader.get("type")
    if kind in ("score_model", "label_model"):
        raise _invalid(f"'{kind}': no model of this server was trained to grade; use {', '.join(TYPES)}", place)
    if kind not in TYPES:
        raise _invalid(f"a grader's type is one of {', '.join(TYPES)}", f"{place}.type")
    for name in _TEXTS[kind]:
        if not isinstance(grader.get(name), str):
            raise _invalid("expected a text", f"{place}.{name}")
    if kind == "string_check" and grader["operation"] not in _OPERATIONS:
        raise _invalid(f"expected one of {', '.join(_OPERATIONS)}", f"{place}.operation")
    if kind == "text_similarity" and grader["evaluation_metric"] not in MEASURES:
        raise _invalid(f"expected one of {', '.join(MEASURES)}", f"{place}.evaluation_metric")
    if kind == "python":
        _check_program(grader["source"], f"{place}.source")
    if kind == "multi":
        _check_multi(grader, place)


def read_programs(grader: Mapping[str, Any]) -> None:
    """`GraderError` for a program that is not Python; reading one is for the confined process as well."""
    for name, part in parts_of(grader).items():
        try:
            if part["type"] == "python":
                _Source.source_to_code(part["source"])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise _invalid(f"the program cannot be read ({type(error).__name__}: {error})", f"{name}.source") from error


def parts_of(grader: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The graders that a multi grader is made of, by the names its formula uses; of another, itself."""
    if grader["type"] != "multi":
        return {str(grader["name"]): grader}
    inner = grader["graders"]
    return {str(inner["name"]): inner} if "type" in inner else dict(inner)


def combined(grader: Mapping[str, Any], scores: Mapping[str, float]) -> float:
    """The reward that the parts' scores come to."""
    if grader["type"] != "multi":
        return scores[str(grader["name"])]
    try:
        return Formula(grader["calculate_output"])(scores)
    except FormulaError as error:
        raise GraderError("formula_parse_error", str(error)) from error


def grade(grader: Mapping[str, Any], answer: str, item: Mapping[str, Any]) -> float:
    """The score of an answer; `GraderError` if there is none."""
    if grader["type"] == "multi":
        return combined(grader, {name: grade(part, answer, item) for name, part in parts_of(grader).items()})
    sample = _sample(answer)
    if grader["type"] == "python":
        return _run(grader["source"], sample, item)
    given, reference = (fill(grader[name], sample, item) for name in ("input", "reference"))
    if grader["type"] == "string_check":
        return float(_checked(grader["operation"], given, reference))
    return likeness(grader["evaluation_metric"], given, reference)


def fill(template: str, sample: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    """The template with its variables replaced; what is no text is written as JSON."""
    names = {"sample": sample, "item": item}

    def value(match: re.Match[str]) -> str:
        found: Any = names.get(match[1])
        for key, place in _STEP.findall(match[2]):
            try:
                found = found[key] if key else found[int(place)]
            except (KeyError, IndexError, TypeError):
                raise GraderError("invalid_variable_error", f"nothing is called '{match[1]}{match[2]}'") from None
        if found is None:
            raise GraderError("invalid_variable_error", f"nothing is called '{match[1]}{match[2]}'")
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _VARIABLE.sub(value, template)


def _sample(answer: str) -> dict[str, Any]:
    """The `sample` namespace; `output_json` is there if the answer is JSON."""
    sample: dict[str, Any] = {"output_text": answer, "output_tools": []}
    sample["choices"] = [{"message": {"role": "assistant", "content": answer}}]
    try:
        sample["output_json"] = json.loads(answer)
    except (ValueError, RecursionError):
        sample["output_json"] = None
    return sample


def _checked(operation: str, given: str, reference: str) -> bool:
    match operation:
        case "eq":
            return given == reference
        case "ne":
            return given != reference
        case "like":
            return reference in given
        case _:
            return reference.casefold() in given.casefold()


# Programs. They are loaded as a module from memory: the process that runs them can open no file.


class _Source(importlib.abc.InspectLoader):
    def __init__(self, source: str) -> None:
        self._source = source

    def get_source(self, fullname: str) -> str:
        return self._source

    def is_package(self, fullname: str) -> bool:
        return False


def _run(source: str, sample: Mapping[str, Any], item: Mapping[str, Any]) -> float:
    """What `grade(sample, item)` of the program says."""
    spec = importlib.util.spec_from_loader("grader", _Source(source))
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        score = float(module.grade(dict(sample), dict(item)))
    except BaseException as error:
        told = f"{type(error).__name__}: {str(error)[:300]}"
        raise GraderError("python_grader_runtime_error", told) from error
    if not math.isfinite(score):
        raise GraderError("python_grader_runtime_error", f"the score is {score}, expected a finite number")
    return score


def _check_program(source: str, place: str) -> None:
    if len(source) > MAX_SOURCE:
        raise _invalid(f"a program has at most {MAX_SOURCE} characters", place)
    if not re.search(r"^def grade\(", source, re.MULTILINE):
        raise _invalid("the program needs a function grade(sample, item)", place)


def _check_multi(grader: Mapping[str, Any], place: str) -> None:
    inner = grader.get("graders")
    if not isinstance(inner, Mapping) or not 1 <= len(inner) <= MAX_GRADERS:
        raise _invalid(f"expected a grader, or an object of 1 to {MAX_GRADERS} graders by name", f"{place}.graders")
    parts = {str(inner.get("name")): inner} if "type" in inner else dict(inner)
    for name, part in parts.items():
        where = f"{place}.graders.{name[:64]}"
        if isinstance(part, Mapping) and part.get("type") == "multi":
            raise _invalid("a multi grader holds no other", where)
        check(part, where)
    try:
        unknown = Formula(grader["calculate_output"]).names - set(parts)
    except FormulaError as error:
        raise GraderError("formula_parse_error", str(error), f"{place}.calculate_output") from error
    if unknown:
        message = f"no grader is called '{min(unknown)[:64]}'"
        raise GraderError("formula_parse_error", message, f"{place}.calculate_output")


def _invalid(message: str, place: str) -> GraderError:
    return GraderError("invalid_grader", message, place)


# The fields of each type that must be texts.
_TEXTS = {
    "string_check": ("name", "input", "reference", "operation"),
    "text_similarity": ("name", "input", "reference", "evaluation_metric"),
    "python": ("name", "source"),
    "multi": ("name", "calculate_output"),
}
