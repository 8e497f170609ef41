"""JSON schemas that callers send: read strictly, and reduced to what the grammar library enforces.

Layer 2, beneath text/tools.py and infer/grammar.py. Every keyword of JSON Schema 2020-12 is known by name here: it is
enforced, or says nothing about validity, or is refused; none is silently ignored, so a text that the grammar accepts
is valid under the schema as it was sent. What is enforced follows the documentation of `llguidance`
(docs/json_schema.md); where that would accept too much (see `_refuse_loose`), the keyword is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from fledge.errors import UserError, nearest

Schema = dict[str, Any]

MAX_BYTES = 128 * 1024
MAX_NESTING = 100  # of the JSON text; the library's own parser stops at 128

# Keywords by where they hold further schemas.
_ONE = ("items", "additionalProperties")
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_PLAIN = (
    *("type", "const", "enum", "$ref", "required", "format", "pattern", "minLength", "maxLength"),
    *("minItems", "maxItems", "minProperties", "maxProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)
ENFORCED = (*_ONE, *_MANY, *_NAMED, *_PLAIN)
# What says nothing about validity: annotations of 2020-12, and those that OpenAPI 3.1 adds.
ANNOTATIONS = (
    *("$schema", "$comment", "$anchor", "title", "description", "default", "examples", "deprecated"),
    *("readOnly", "writeOnly", "contentMediaType", "contentEncoding", "contentSchema"),
    *("example", "discriminator", "xml", "externalDocs"),
)
NOT_ENFORCED = (
    *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "propertyNames"),
    *("contains", "minContains", "maxContains", "uniqueItems", "additionalItems"),
    *("unevaluatedItems", "unevaluatedProperties", "$vocabulary", "$id", "id"),
    *("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"),
)
ROOT_ONLY = ("$id", "id")  # elsewhere they change what a `$ref` below them means
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")

# The library reads these as regular expressions, and they must not let anything but JSON whitespace in.
_SPACE = r"(?: |\\[tnr]|\\x(?:20|0[9aAdD])|\[(?: |\\[tnr]|\\x(?:20|0[9aAdD]))+\])(?:[*+?]|\{\d{1,3}(?:,\d{0,3})?\})?"
_OPTIONS: Mapping[str, re.Pattern[str]] = {
    "item_separator": re.compile(rf"(?:{_SPACE})*,(?:{_SPACE})*"),
    "key_separator": re.compile(rf"(?:{_SPACE})*:(?:{_SPACE})*"),
    "whitespace_pattern": re.compile(rf"(?:{_SPACE})+"),
    "json_allowed_escapes": re.compile(r'[nrbtf\\"u]*'),
}


def parse_schema(text: str) -> Schema | bool:
    """The schema that a JSON text spells. `UserError` for what is no JSON, too long, too deep, or no schema."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UserError("the JSON schema holds half a character (a lone surrogate); send UTF-8") from None
    if size > MAX_BYTES:
        raise UserError(f"the JSON schema has {size} bytes, at most {MAX_BYTES} are taken; make it smaller")
    if _nesting(text) > MAX_NESTING:
        raise UserError(f"the JSON schema is nested deeper than {MAX_NESTING} levels; use $defs and $ref")
    try:
        schema = json.loads(text, parse_constant=_no_number)
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("the JSON schema holds half a character (a lone surrogate escape)") from None
    except ValueError as error:
        raise UserError(f"the JSON schema is no JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise UserError(f"a JSON schema is an object, true or false, got {_short(schema)}")
    return schema


def reduce_schema(schema: Schema | bool) -> Schema:
    """The schema with its annotations left away, ready for the grammar library.

    Without a wish of the schema's own (`x-guidance`) the JSON is compact: models that are weak lose themselves in
    whitespace. `UserError` names the keyword and the place for everything that is not enforced.
    """
    if isinstance(schema, bool):
        if not schema:
            raise UserError("the JSON schema is false: nothing satisfies it")
        schema = {}
    options = {"whitespace_flexible": False, **_options(schema.get("x-guidance", {}))}
    places = dict(_places(schema))
    for path, place in places.items():
        if isinstance(place, dict):
            _refuse_unknown(place, path)
            _refuse_wrong_ref(place, path, places)
            _refuse_loose(place, path)
    return {"x-guidance": options, **_reduced(schema)}


def _places(schema: Schema) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every schema inside a schema, itself first, with its path."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), schema)]
    while waiting:
        path, place = waiting.pop()
        if not isinstance(place, dict | bool):
            raise UserError(f"{_where(path)} must be a schema (an object, true or false), got {_short(place)}")
        yield path, place
        if isinstance(place, dict):
            waiting += _inner(path, place)


def _inner(path: tuple[str, ...], place: Schema) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key in _ONE:
        if key in place:
            yield (*path, key), place[key]
    for key in _MANY:
        for i, inner in enumerate(_expect(place, key, list, path)):
            yield (*path, key, str(i)), inner
    for key in _NAMED:
        for name, inner in _expect(place, key, dict, path).items():
            yield (*path, key, name), inner


def _expect(place: Schema, key: str, kind: type, path: tuple[str, ...]) -> Any:
    value = place.get(key, kind())
    if not isinstance(value, kind):
        wanted = "an array" if kind is list else "an object"
        raise UserError(f"'{key}' at {_where(path)} must be {wanted} of schemas, got {_short(value)}")
    return value


def _reduced(place: Any) -> Any:
    """A schema without what is not enforced; its inner schemas likewise."""
    if isinstance(place, bool):
        return place
    kept = {}
    for key, value in place.items():
        if key in _ONE:
            kept[key] = _reduced(value)
        elif key in _MANY:
            kept[key] = [_reduced(inner) for inner in value]
        elif key in _NAMED:
            kept[key] = {name: _reduced(inner) for name, inner in value.items()}
        elif key in _PLAIN:
            kept[key] = value
    return kept


def _refuse_unknown(place: Schema, path: tuple[str, ...]) -> None:
    for key, value in place.items():
        is_known = key in ENFORCED or key in ANNOTATIONS or (key.startswith("x-") and key != "x-guidance")
        if is_known or (not path and key in (*ROOT_ONLY, "x-guidance")):
            continue
        if key == "uniqueItems" and value is False:
            continue
        if key in NOT_ENFORCED:
            raise UserError(
                f"JSON schema keyword '{key}' at {_where(path)} cannot be enforced; leave it out and check the answer"
            )
        raise UserError(f"no JSON schema keyword '{_word(key)}' (at {_where(path)}) is known; {nearest(key, ENFORCED)}")
    kinds = place.get("type", ())
    for kind in [kinds] if not isinstance(kinds, list | tuple) else kinds:
        if kind not in TYPES:
            raise UserError(f"'type' at {_where(path)} must be among {', '.join(TYPES)}, got {_short(kind)}")
    if "format" in place and place["format"] not in FORMATS:
        raise UserError(
            f"JSON schema format {_short(place['format'])} at {_where(path)} cannot be enforced; "
            f"known are {', '.join(FORMATS)}"
        )


def _refuse_wrong_ref(place: Schema, path: tuple[str, ...], places: Mapping[tuple[str, ...], Any]) -> None:
    if "$ref" not in place:
        return
    ref = place["$ref"]
    if not isinstance(ref, str) or not re.fullmatch(r"#(/.*)?", ref, re.DOTALL):
        raise UserError(f"$ref {_short(ref)} at {_where(path)} must point into the same schema (#/$defs/name)")
    steps = [unquote(step).replace("~1", "/").replace("~0", "~") for step in ref[1:].split("/")[1:]]
    if tuple(steps) not in places:
        raise UserError(f"$ref {_short(ref)} at {_where(path)} points to no schema")


def _refuse_loose(place: Schema, path: tuple[str, ...]) -> None:
    """Refuse what the library takes but does not hold to."""
    count, required = place.get("minProperties", 0), place.get("required", ())
    if not isinstance(required, list | tuple):
        raise UserError(f"'required' at {_where(path)} must be an array of names, got {_short(required)}")
    # It counts the names of an object used as a map without asking whether they differ.
    if isinstance(count, int) and count > max(1, len(required)):
        raise UserError(f"minProperties {count} at {_where(path)} cannot be enforced beyond the required properties")
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(place.get(key), bool):
            raise UserError(f"'{key}' at {_where(path)} must be a number, as in JSON Schema 2020-12")


def _options(given: Any) -> Schema:
    """What a schema may ask of the JSON's spelling under `x-guidance`: nothing that makes it other than JSON."""
    if not isinstance(given, dict):
        raise UserError(f"'x-guidance' must be an object, got {_short(given)}")
    known = ("whitespace_flexible", *_OPTIONS)
    for key, value in given.items():
        if key not in known:
            raise UserError(f"x-guidance option '{_word(key)}' is not taken; {nearest(key, known)}")
        if key == "whitespace_flexible":
            is_sound = isinstance(value, bool)
        else:
            is_sound = isinstance(value, str) and _OPTIONS[key].fullmatch(value) is not None
        if not is_sound:
            raise UserError(f"x-guidance option '{key}' would allow more than JSON: {_short(value)}")
    return dict(given)


def _nesting(text: str) -> int:
    """How deep objects and arrays stand in each other, strings aside."""
    depth = deepest = 0
    for mark in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text, re.DOTALL):
        if mark[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark[0] in "]}":
            depth -= 1
    return deepest


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _where(path: tuple[str, ...]) -> str:
    return "#" + "".join(f"/{_word(step)}" for step in path)[:200]


def _word(text: str) -> str:
    """A name as it may stand in a message of one line."""
    return json.dumps(text, ensure_ascii=False)[1:-1][:100]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
