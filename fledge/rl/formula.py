"""The formula of a multi grader: arithmetic over named scores, read as a tree and never run as a program.

+ - * / **, comparisons of size through min and max, and the functions of the guide to graders. All numbers are
floats, so that no power grows beyond one. Imports nothing but the standard library (see graders.py).
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

MAX_LENGTH, MAX_NODES = 2000, 400
_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}


class FormulaError(Exception):
    """What of a formula is no arithmetic over the known names, or has no finite value."""


class Formula:
    """A formula that has been read; `names` are the scores it asks for. `FormulaError` if it cannot be."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise FormulaError(f"the formula has more than {MAX_LENGTH} characters")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise FormulaError(f"the formula cannot be read ({type(error).__name__})") from error
        nodes = list(ast.walk(self._tree))
        if len(nodes) > MAX_NODES:
            raise FormulaError("the formula is too long")
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        self.names = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}
        _value(self._tree, dict.fromkeys(self.names, 1.0), is_trial=True)

    def __call__(self, scores: Mapping[str, float]) -> float:
        found = _value(self._tree, scores, is_trial=False)
        if not math.isfinite(found):
            raise FormulaError(f"the formula's value is {found}")
        return found


def _value(node: ast.AST, scores: Mapping[str, float], *, is_trial: bool) -> float:
    """`is_trial`: only the form matters; what has no value for these scores counts as 1."""

    def of(inner: ast.AST) -> float:
        return _value(inner, scores, is_trial=is_trial)

    try:
        return float(_apply(node, scores, of))
    except (ArithmeticError, ValueError, TypeError) as error:
        if is_trial and isinstance(error, ArithmeticError | ValueError):
            return 1.0
        raise FormulaError(f"the formula has no value for these scores ({error})") from error


def _apply(node: ast.AST, scores: Mapping[str, float], of: Callable[[ast.AST], float]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name) if name in scores:
            return scores[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -of(inner)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return of(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](of(left), of(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and args:
            values = [of(inner) for inner in args]
            return _FUNCTIONS[name](*values) if len(values) > 1 or name not in ("min", "max") else values[0]
    raise FormulaError(f"the formula may hold numbers, graders' names, + - * / ** and {', '.join(_FUNCTIONS)}")
