"""Tool calls: shown, held to, read while they come. That a model is held to a grammar is tests/infer's matter."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer
from fledge.text.tools import (
    STYLES,
    CallDelta,
    CallReader,
    Tool,
    call_grammar,
    read_calls,
    show_tools,
)
from fledge.types import CallPart, Conversation, Message, TextPart

HERMES, LLAMA3 = STYLES["hermes"], STYLES["llama3"]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("weather", "Tells the weather.", json.dumps(CITY))
CLOCK = Tool("clock")


def call(name: str, arguments: object) -> str:
    return CallPart(name, json.dumps(arguments)).text


def pieces(text: str, cuts: list[int], style=HERMES, names=("f", "g")) -> list[str | CallDelta]:
    """What is read of a text that comes in pieces."""
    reader = CallReader(style, names)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    out = [piece for start, end in pairwise(edges) for piece in reader.push(text[start:end])]
    return out + reader.finish()


def told(out: list[str | CallDelta]) -> tuple[str, dict[int, tuple[str, str]]]:
    """All text, and the calls by index: name and arguments. Every call begins with its name and id."""
    text = "".join(piece for piece in out if isinstance(piece, str))
    calls: dict[int, tuple[str, str]] = {}
    for delta in (piece for piece in out if isinstance(piece, CallDelta)):
        if delta.name is not None:
            assert (delta.index, delta.id, delta.arguments) == (len(calls), f"call_{len(calls)}", "")
            calls[delta.index] = delta.name, ""
        name, arguments = calls[delta.index]
        calls[delta.index] = name, arguments + delta.arguments
    return text, calls


def test_a_tool_is_read_from_the_apis_form_and_written_back() -> None:
    given = {
        "type": "function",
        "function": {"name": "weather", "description": "d", "parameters": CITY, "strict": True},
    }
    tool = Tool.of(given)
    assert (tool.name, tool.description, tool.strict) == ("weather", "d", True)
    assert tool.to_json()["function"]["parameters"] == CITY
    assert Tool.of(given["function"]) == tool
    assert Tool.of({"name": "clock"}) == CLOCK


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"type": "custom", "name": "x"}, "only tools of type 'function'"),
        ({"type": "function", "function": {}}, "a tool needs a name"),
        ({"name": "a b"}, "1 to 64 letters"),
        ({"name": "x" * 65}, "1 to 64 letters"),
        ({"name": "x", "parameters": {"type": "string"}}, "must be a JSON schema of type object"),
        (
            {"name": "x", "parameters": [1]},
            "must be a JSON schema of type object|is an object, true or false",
        ),
        ({"name": "x", "description": 3}, "is no text"),
        ({"name": "x", "strict": True, "parameters": {"propertyNames": {}}}, "tool 'x': .*'propertyNames'"),
    ],
)
def test_tools_that_are_none_are_refused(given: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Tool.of(given)


def test_only_a_strict_tool_insists_on_every_keyword() -> None:
    odd = Tool("x", parameters=json.dumps({"type": "object", "propertyNames": {"maxLength": 3}}))
    assert odd.enforced()["type"] == "object"
    with pytest.raises(UserError, match="'propertyNames'"):
        replace(odd, strict=True)


def test_the_tools_stand_in_the_system_message() -> None:
    tools = tuple(json.dumps(tool.to_json()) for tool in (WEATHER, CLOCK))
    for messages in (
        (Message.of("user", "hi"),),
        (Message.of("system", "Be kind."), Message.of("user", "hi")),
    ):
        shown = show_tools(Conversation(messages, tools))
        assert [message.role for message in shown.messages] == ["system", "user"]
        text = shown.messages[0].text
        assert text.startswith("Be kind.\n\n" if len(messages) == 2 else "You can call")
        assert '{"name": "weather", "description": "Tells the weather.", "parameters"' in text
        assert call("NAME", {})[:30] in text
        assert shown.tools == ()
    plain = Conversation.of(("user", "hi"))
    assert show_tools(plain) is plain


def test_a_choice_that_names_no_tool_and_names_that_are_not_unique_are_refused() -> None:
    with pytest.raises(UserError, match="tool_choice 'wether' names no tool; known are weather, clock"):
        call_grammar([WEATHER, CLOCK], "wether", HERMES)
    with pytest.raises(UserError, match="names no tool"):
        call_grammar([], "required", HERMES)
    with pytest.raises(UserError, match="names of their own"):
        call_grammar([CLOCK, CLOCK], "auto", HERMES)
    with pytest.raises(UserError, match="at most 128"):
        call_grammar([Tool(f"t{i}") for i in range(129)], "auto", HERMES)
    assert call_grammar([], "auto", HERMES) is None
    assert call_grammar([], "none", HERMES) is None


FIRST = {"a": '}"{', "b": [1, {"c": "\\\\"}]}
EXAMPLE = f"hi\n{call('f', FIRST)}\n{call('g', {})} bye <b"


def test_text_and_calls_are_told_apart() -> None:
    text, calls = told(pieces(EXAMPLE, []))
    assert text == "hi\n bye <b"
    assert {index: (name, json.loads(arguments)) for index, (name, arguments) in calls.items()} == {
        0: ("f", FIRST),
        1: ("g", {}),
    }


@settings(deadline=None)
@given(st.lists(st.integers(0, len(EXAMPLE)), max_size=30))
def test_where_the_text_is_cut_makes_no_difference(cuts: list[int]) -> None:
    assert told(pieces(EXAMPLE, cuts)) == told(pieces(EXAMPLE, []))


def test_arguments_are_passed_on_as_they_come() -> None:
    reader = CallReader(HERMES, ["f"])
    assert reader.push('<tool_call>\n{"name": "f", "arg') == []
    assert reader.push('uments": ') == []
    assert reader.push('{"a"') == [CallDelta(0, "", "f", "call_0"), CallDelta(0, '{"a"')]
    assert reader.push(': "x\\') == [CallDelta(0, ': "x')]  # what the backslash means is not known yet
    assert reader.push('"y"}') == [CallDelta(0, '\\"y"}')]
    assert reader.push("}\n</tool_call>") == []
    assert reader.finish() == []


def test_text_that_may_open_a_call_waits_and_comes_out_if_it_does_not() -> None:
    reader = CallReader(HERMES, ["f"])
    assert reader.push("a <tool") == ["a "]
    assert reader.push("box>") == ["<toolbox>"]
    assert reader.push("<tool_ca") == []
    assert reader.finish() == ["<tool_ca"]


@pytest.mark.parametrize(
    "text",
    [
        call("unknown", {}),
        "<tool_call>\nno json\n</tool_call>",
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "f", "argu',
        "<tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        "a\ud7ff</tool_call> \U0001f600",
        "",
        " \n",
    ],
)
def test_what_is_no_call_comes_out_as_the_text_that_it_is(text: str) -> None:
    for cuts in ([], list(range(len(text)))):
        got, calls = told(pieces(text, cuts))
        assert not calls
        assert got.replace("\n", "") == text.replace("\n", "")


def test_calls_spelled_in_other_ways_are_understood() -> None:
    for text in (
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        '<tool_call> { "name" : "f" , "arguments" : {"a": 1} }\n\n</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
    ):
        assert told(pieces(text, [])) == ("", {0: ("f", '{"a": 1}')})


def test_an_answer_that_is_cut_short_leaves_its_arguments_unfinished() -> None:
    assert told(pieces('<tool_call>\n{"name": "f", "arguments": {"a": "b', [])) == (
        "",
        {0: ("f", '{"a": "b')},
    )


def test_llama3_calls_are_the_whole_message() -> None:
    text = '{"name": "f", "parameters": {"a": {"b": 1}}}'
    for cuts in ([], list(range(len(text)))):
        assert told(pieces(text, cuts, LLAMA3)) == ("", {0: ("f", '{"a": {"b": 1}}')})
        assert told(pieces(f" x {text}", cuts, LLAMA3)) == (f" x {text}", {})
        assert told(pieces('{"name": "z", "parameters": {}}', cuts, LLAMA3))[1] == {}


def test_a_message_is_read_back_as_it_was_written() -> None:
    message = Message(
        "assistant",
        (TextPart("Let me see.\n"), CallPart("f", '{"a": 1}', "call_0"), CallPart("g", "{}", "call_1")),
    )
    assert read_calls(message.text, HERMES, ["f", "g"]) == message
    assert read_calls("plain", HERMES, ["f"]) == Message.of("assistant", "plain")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from("fg"), st.dictionaries(st.text(max_size=5), json_values, max_size=3))),
    st.text(alphabet="ab \n", max_size=5),
    st.lists(st.integers(0, 300), max_size=20),
)
def test_every_call_comes_back_however_it_is_cut(calls: list[tuple[str, dict]], before: str, cuts: list[int]) -> None:
    text = before + "\n".join(call(name, arguments) for name, arguments in calls)
    said, got = told(pieces(text, cuts))
    assert [(name, json.loads(arguments)) for name, arguments in got.values()] == calls
    assert said.strip() == before.strip()


def test_our_own_template_tells_the_tools_and_the_prompt_stays_a_prefix() -> None:
    tokenizer = train_tokenizer(["tool weather clock hello"], TokenizerConfig("bpe", 300))
    renderer = ChatRenderer(tokenizer)
    tools = (json.dumps(WEATHER.to_json()),)
    asked = Conversation((Message.of("user", "hi"),), tools)
    answered = replace(asked, messages=(*asked.messages, Message("assistant", (CallPart("weather", "{}"),))))
    ids = renderer.render(answered).ids
    assert ids[: len(renderer.prompt(asked))] == renderer.prompt(asked)
    assert "Tells the weather." in tokenizer.decode(ids)
    message, _ = renderer.parse(ids)
    assert read_calls(message.text, HERMES, ["weather"]).parts == (CallPart("weather", "{}", "call_0"),)
