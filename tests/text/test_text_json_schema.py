"""Schemas that callers send: what is enforced comes through, what says nothing falls away, the rest is refused."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.text.json_schema import (
    ANNOTATIONS,
    ENFORCED,
    MAX_BYTES,
    MAX_NESTING,
    NOT_ENFORCED,
    parse_schema,
    reduce_schema,
)

COMPACT = {"x-guidance": {"whitespace_flexible": False}}


def reduced(text: str) -> dict:
    return reduce_schema(parse_schema(text))


def test_annotations_fall_away_at_every_level_and_property_names_are_no_keywords() -> None:
    schema = {
        "title": "t",
        "type": "object",
        "properties": {"title": {"description": "d", "type": "string", "x-mine": 1}, "not": {"default": [1]}},
        "$defs": {"examples": {"examples": [1], "items": {"title": "u", "const": {"title": 1}}}},
        "anyOf": [{"deprecated": True}, True],
        "uniqueItems": False,
    }
    assert reduce_schema(schema) == COMPACT | {
        "type": "object",
        "properties": {"title": {"type": "string"}, "not": {}},
        "$defs": {"examples": {"items": {"const": {"title": 1}}}},
        "anyOf": [{}, True],
    }


def test_the_order_of_properties_is_kept() -> None:
    names = [f"p{i}" for i in range(50, 0, -1)]
    assert list(reduced(json.dumps({"properties": {name: {} for name in names}}))["properties"]) == names


@pytest.mark.parametrize("keyword", [k for k in NOT_ENFORCED if k not in ("$id", "id")])
def test_keywords_that_cannot_be_enforced_are_refused_by_name_wherever_they_stand(keyword: str) -> None:
    for path, schema in {
        "#": {keyword: {}},
        "#/items/anyOf/1": {"items": {"anyOf": [{}, {keyword: {}}]}},
    }.items():
        with pytest.raises(UserError, match=f"'{keyword.replace('$', '[$]')}' at {path} cannot be enforced"):
            reduce_schema(schema)


def test_no_keyword_of_the_standard_is_forgotten() -> None:
    """Every keyword of the vocabularies of 2020-12 is told apart."""
    known = {*ENFORCED, *ANNOTATIONS, *NOT_ENFORCED}
    metaschemas = pytest.importorskip("jsonschema_specifications").REGISTRY
    for uri in metaschemas:
        if "2020-12/meta" in uri:
            keywords = set(metaschemas.contents(uri).get("properties", {}))
            assert keywords <= known, f"{uri}: {keywords - known}"


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"requird": ["a"]}, "no JSON schema keyword 'requird' .at #. is known; did you mean 'required'"),
        ({"properties": {"a": {"nullable": True}}}, "'nullable' .at #/properties/a. is known"),
        ({"format": "int32"}, 'format "int32" at # cannot be enforced'),
        ({"type": "strng"}, "'type' at # must be among"),
        ({"type": ["string", {}]}, "'type' at # must be among"),
        ({"$ref": "https://a.example/b"}, "must point into the same schema"),
        ({"$ref": "#anchor"}, "must point into the same schema"),
        ({"$ref": "#/$defs/a"}, "points to no schema"),
        ({"$ref": "#/default", "default": {"type": "string"}}, "points to no schema"),
        ({"$ref": 3}, "must point into the same schema"),
        ({"properties": {"a": {"$id": "x"}}}, "'[$]id' at #/properties/a cannot be enforced"),
        ({"items": [{}]}, "#/items must be a schema"),
        ({"items": 3}, "#/items must be a schema .*, got 3"),
        ({"anyOf": {}}, "'anyOf' at # must be an array of schemas"),
        ({"properties": []}, "'properties' at # must be an object of schemas"),
        ({"minProperties": 2}, "minProperties 2 at # cannot be enforced"),
        ({"required": "a"}, "'required' at # must be an array"),
        ({"exclusiveMinimum": True, "minimum": 1}, "'exclusiveMinimum' at # must be a number"),
        ({"x-guidance": {"lenient": True}}, "x-guidance option 'lenient' is not taken"),
        ({"x-guidance": {"coerce_one_of": True}}, "x-guidance option 'coerce_one_of' is not taken"),
        ({"x-guidance": {"whitespace_flexible": "yes"}}, "'whitespace_flexible' would allow more than JSON"),
        ({"x-guidance": {"item_separator": ";"}}, "'item_separator' would allow more than JSON"),
        ({"x-guidance": {"whitespace_pattern": "\\s+"}}, "'whitespace_pattern' would allow more than JSON"),
        ({"x-guidance": {"json_allowed_escapes": "x"}}, "'json_allowed_escapes' would allow more than JSON"),
        ({"x-guidance": []}, "'x-guidance' must be an object"),
        ({"items": {"x-guidance": {}}}, "'x-guidance' .at #/items. is known"),
        (False, "nothing satisfies it"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(schema: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        reduced(json.dumps(schema))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is no JSON"),
        ("{'a': 1}", "is no JSON"),
        ('{"const": NaN}', "NaN is no JSON number"),
        ('{"const": 1e999}', "is no JSON"),
        ('{"minimum": ' + "9" * 5000 + "}", "is no JSON"),
        ("[]", "is an object, true or false"),
        ('"object"', "is an object, true or false"),
        ('{"const": "\ud800"}', "half a character"),
        ('{"const": "\\ud800"}', "half a character"),
        ('{"items":' * (MAX_NESTING + 1) + "{}" + "}" * (MAX_NESTING + 1), "nested deeper than 100"),
        ("[" * 100_000, "nested deeper than 100"),
        ('{"const": "' + "a" * MAX_BYTES + '"}', f"at most {MAX_BYTES} are taken"),
    ],
)
def test_texts_that_are_no_schema_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_schema(text)


def test_brackets_in_strings_are_no_nesting() -> None:
    assert parse_schema(json.dumps({"const": '[{"\\' * 200}))


def test_a_schema_may_ask_for_white_space_of_its_own_kind() -> None:
    wish = {"item_separator": ", ?", "key_separator": r":\n[ \t]{0,2}", "json_allowed_escapes": 'n"\\'}
    assert reduce_schema({"x-guidance": wish})["x-guidance"] == {"whitespace_flexible": False, **wish}
    assert reduce_schema({"x-guidance": {"whitespace_flexible": True}})["x-guidance"]["whitespace_flexible"]


def test_references_find_names_with_odd_characters() -> None:
    for name, ref in {"a/b": "#/$defs/a~1b", "a~b": "#/$defs/a~0b", "a b": "#/$defs/a%20b"}.items():
        assert reduce_schema({"$ref": ref, "$defs": {name: {}}})["$ref"] == ref
    assert reduce_schema({"properties": {"next": {"$ref": "#"}}})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*ENFORCED, *NOT_ENFORCED, "x-guidance", "title", "?\n"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(anything)
def test_nothing_but_a_user_error_comes_of_anything(value: object) -> None:
    complaint = None
    try:
        reduced(json.dumps(value))
    except UserError as error:
        complaint = str(error)
    assert complaint is None or "\n" not in complaint


@settings(deadline=None)
@given(st.text(max_size=60))
def test_nothing_but_a_user_error_comes_of_any_text(text: str) -> None:
    with contextlib.suppress(UserError):
        reduced(text)
