"""Grammars that try to crash, hang or fool whoever compiles them. Run as a program it compiles them all, so that a
crash ends a process of its own: every one must be refused, or bear a walk of some tokens in bounded time."""

from __future__ import annotations

import json
import random
import sys
import time

from fledge.errors import UserError
from fledge.infer.grammar import GrammarCompiler
from fledge.infer.grammar_guard import GrammarLimits
from fledge.text.tokenizer import Tokenizer
from fledge.types import Grammar


def schema(value: object) -> Grammar:
    return Grammar("json_schema", value if isinstance(value, str) else json.dumps(value))


def regex(text: str) -> Grammar:
    return Grammar("regex", text)


def lark(text: str) -> Grammar:
    return Grammar("lark", text)


def chained(kind: str, size: int) -> dict:
    """A schema of definitions each of which needs the next."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(size)}
    if kind == "properties":
        links = {name: {"type": "object", "properties": {"x": link}} for name, link in links.items()}
    if kind == "allOf":
        links = {name: {"allOf": [link], "type": "object"} for name, link in links.items()}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{size}": {"type": "object"}}}


HOSTILE = {
    # Crashes of the library's: its stack overflows.
    "rule chain": lark("start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(7000)) + '\nr7000: "a"'),
    "terminal chain": lark("start: T0\n" + "\n".join(f'T{i}: T{i + 1} "b"' for i in range(6000)) + '\nT6000: "a"'),
    "reference chain": schema(chained("properties", 1500)),
    "allOf chain": schema(chained("allOf", 1500)),
    "plain reference chain": schema(chained("", 3000)),
    # Hangs: work that its limits do not see.
    "intersections": lark("start: A\nA: " + " & ".join(f"/.*a.{{{i}}}/" for i in range(30))),
    "patterns": schema({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}$"} for i in range(1, 20)]}),
    "large divisor": schema({"type": "integer", "multipleOf": 1234567}),
    "many divisors": schema({"allOf": [{"type": "integer", "multipleOf": m} for m in (7919, 7907, 7901)]}),
    # Size.
    "deep": schema('{"items":' * 90 + "{}" + "}" * 90),
    "deeper": schema('{"items":' * 50_000 + "{}" + "}" * 50_000),
    "giant enum": schema({"enum": [f"value{i}" for i in range(8000)]}),
    "many optional properties": schema({"properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
    "exploding anyOf": schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(2)]} for i in range(20)]}
    ),
    "long strings": schema({"type": "string", "minLength": 10**6, "maxLength": 10**12}),
    "long arrays": schema({"type": "array", "minItems": 10**6, "maxItems": 2**63, "items": {"type": "null"}}),
    "nested arrays": schema(
        {"type": "array", "minItems": 999, "items": {"type": "array", "minItems": 999, "items": {}}}
    ),
    "large bounds": schema('{"type": "integer", "minimum": ' + "9" * 300 + "}"),
    "large range": schema({"type": "number", "minimum": -1e308, "maximum": 1e308}),
    "negative length": schema({"type": "string", "minLength": -1}),
    "length of letters": schema({"type": "string", "minLength": "é" * 200}),
    "long repeat": regex("a{1,1000000}"),
    "nested repeat": regex("((a{1,1000}){1,1000}){1,1000}"),
    "least repeat": regex("(a|b){1000000}"),
    "optional": regex("a?" * 3000 + "a" * 3000),
    "far choice": regex("(a|b)*a(a|b){200}"),
    "catastrophic": regex("(a*)*(a|aa)+(a|a?)+b"),
    "many words": regex("|".join(f"word{i}" for i in range(10_000))),
    "long": regex("a" * 120_000),
    "too long": regex("a" * 200_000),
    "letters": regex("[\\p{L}\\p{N}]{1,100000}"),
    "rule repeat": lark('start: ("a" "b"){1000000}'),
    "brackets": lark("start: " + "(" * 60_000 + '"a"' + ")" * 60_000),
    "regex brackets": regex("(" * 60_000 + "a" + ")" * 60_000),
    "inline schema": lark("start: %json " + '{"items":' * 9000 + "{}" + "}" * 9000),
    "substrings": lark('start: A\nA: %regex {"substring_chars": "' + "abc def " * 9000 + '"}'),
    # Nothing satisfies them.
    "itself": schema({"$ref": "#"}),
    "each other": schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    "never": regex("[^\\s\\S]"),
    "endless rule": lark("start: start"),
    "contradiction": schema({"type": "string", "enum": [1, 2]}),
    "required but false": schema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
    # Not grammars.
    "broken regex": regex("(a"),
    "look-ahead": regex("(?=a)b"),
    "back-reference": regex(r"(a)\1"),
    "surrogate": regex("a\ud800"),
    "broken lark": lark("start"),
    "bytes": lark("\x00\x01"),
    "empty": lark(""),
    "list": lark('{"grammars": [{"json_schema": {}}]}'),
    "unknown special": lark("start: <|nobody|>"),
    "unknown import": lark("%import nowhere.X\nstart: X"),
    "other grammar": lark("start: @other"),
    "temperature": lark("start: a\na[temperature=3]: /.*/"),
    "not UTF-8": lark('%llguidance {"allow_invalid_utf8": true}\nstart: /(?s:.*)/'),
    "inline unsupported": lark('start: %json {"uniqueItems": true}'),
    "inline typo": lark('start: %json {"typ": "string"}'),
    # Ambiguous, but to be borne.
    "left recursion": lark('start: start "a" | "a"'),
    "ambiguous": lark('start: e\ne: e e e | e e | "a" | ""'),
    "empty repeats": lark('start: a*\na: b*\nb: ""'),
    "ignored all": lark('%ignore /.*/\nstart: "b"'),
}
MUST_BE_REFUSED = {
    *(
        "rule chain",
        "terminal chain",
        "reference chain",
        "intersections",
        "patterns",
        "large divisor",
        "deeper",
    ),
    *("exploding anyOf", "large bounds", "negative length", "length of letters", "too long", "brackets"),
    *("regex brackets", "inline schema", "itself", "each other", "never", "endless rule", "contradiction"),
    *(
        "required but false",
        "broken regex",
        "look-ahead",
        "back-reference",
        "surrogate",
        "broken lark",
        "bytes",
    ),
    *("empty", "list", "unknown special", "unknown import", "other grammar", "temperature", "not UTF-8"),
    *("inline unsupported", "inline typo", "many optional properties"),
}
SECONDS_A_STEP = 2.0  # far more than is seen; the machine may be busy


def walk(compiler: GrammarCompiler, grammar: Grammar, num_tokens: int, seed: int = 0) -> str:
    """What became of it: "refused", "failed" on the way, "finished" or "open"."""
    chance = random.Random(seed)
    try:
        matcher = compiler.matcher(grammar, ())
    except UserError as error:
        return "refused" if str(error) and "\n" not in str(error) else f"refused with {error!r}"
    for _ in range(num_tokens):
        began = time.process_time()
        mask_V = compiler.masks([(matcher, ())])[0]
        if matcher.failure is not None:
            return "failed"
        matcher.push(chance.choice(mask_V.nonzero()[:, 0].tolist()))
        assert time.process_time() - began < SECONDS_A_STEP
        if matcher.failure is not None:
            return "failed"
        if matcher.is_finished:
            return "finished"
    return "open"


def main() -> None:
    compiler = GrammarCompiler(Tokenizer.load(sys.argv[1]), limits=GrammarLimits(compile_seconds=0.4))
    for name in sys.argv[2:] or HOSTILE:
        outcome = walk(compiler, HOSTILE[name], num_tokens=30)
        wanted = {"refused"} if name in MUST_BE_REFUSED else {"refused", "failed", "finished", "open"}
        assert outcome in wanted, f"{name}: {outcome}"
        sys.stdout.write(f"{name}: {outcome}\n")
        sys.stdout.flush()
    compiler.close()


if __name__ == "__main__":
    main()
