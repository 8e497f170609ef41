"""Chat templates as programs: what they may do, and what ends them."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest

from fledge.errors import TokenizerError, UserError
from fledge.text import sandbox
from fledge.text.sandbox import MAX_SOURCE_CHARS, ChatProgram

MESSAGES = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yo"}]


def rendered(source: str, **variables: Any) -> str:
    program = ChatProgram(source, lambda: datetime(2024, 7, 26))
    return program.render({"messages": MESSAGES, **variables})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m['role'] ~ ':' ~ loop.index0 }},{% endfor %}", "user:0,assistant:1,"),
        ("{{ messages[0].content|trim }}{{ messages[0].content.strip() }}", "hihi"),
        ("{{ messages[::-1][0].role.upper() }}{{ messages[-1]['content'][:1] }}", "ASSISTANTy"),
        ("{% set ns = namespace(n=1) %}{% for i in range(3) %}{% set ns.n = ns.n * 2 %}{% endfor %}{{ ns.n }}", "8"),
        ("{% macro tag(x) %}<{{ x }}>{% endmacro %}{{ tag('a') + tag(1) }}", "<a><1>"),
        ("{{ messages|map(attribute='role')|join('-') }}", "user-assistant"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|list|length }}", "1"),
        ("{{ {'a': '鸟<'}|tojson }} {{ [1, 2]|tojson(indent=2) }}", '{"a": "鸟<"} [\n  1,\n  2\n]'),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "01345678"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("a\n  {%- if true %}b{% endif %}\n    {% if true %}\nc{% endif %}", "abc"),
        ("{{ 'a-b'.split('-')[1] }}{{ 'x'|replace('x', 'yy') }}{{ 'a\nb'|indent(2) }}", "byya\n  b"),
        ("{{ undefined_thing is defined }}{{ tools is none }}{{ messages[0].absent }}", "FalseFalse"),
        ("{{ 'yes' if 'i' in messages[0].content and not messages[0].content.startswith('x') }}", "yes"),
        ("{{ (messages[0].content ~ 1)|length }}{{ 7 % 3 }}{{ 7 // 2 }}", "513"),
    ],
)  # fmt: skip
def test_what_chat_templates_use_works_as_in_transformers(source: str, expected: str) -> None:
    assert rendered(source) == expected


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(UserError, match="does not take this conversation: roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages|attr('__class__') }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__code__.x }}",
        "{{ messages.__init__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ lipsum.__globals__ }}",
        "{{ cycler('a').next() }}",
        "{{ self.__init__.__globals__ }}x{{ self.missing() }}",
        "{% include 'file' %}",
        "{% import 'file' as f %}",
        "{{ 2 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'a'|center(1000000000) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ [1]|tojson(indent=1000000000) }}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    ],
)
def test_nothing_else_is_within_reach(source: str) -> None:
    with pytest.raises(UserError):
        rendered(source)


GROW = "{%% set ns = namespace(x='aaaaaaaaaaaaaaaa') %%}{%% for i in range(99) %%}%s{%% endfor %%}{{ ns.x }}"
NEST = "{%% set ns = namespace(x=['a']) %%}{%% for i in range(99) %%}{%% set ns.x = [ns.x, ns.x] %%}{%% endfor %%}%s"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}" + "a" * 150_000 + "{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        GROW % "{% set ns.x = ns.x ~ ns.x %}",
        GROW % "{% set ns.x = ns.x + ns.x %}",
        GROW % "{% set ns.x = ns.x|replace('a', 'aaaa') %}",
        GROW % "{% set ns.x = ns.x.replace('a', 'aaaa') %}",
        GROW % "{% set ns.x = [ns.x, ns.x]|join %}",
        GROW % "{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}",
        GROW % "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}",
        NEST % "{{ ns.x }}",
        NEST % "{{ ns.x|tojson }}",
        NEST % "{{ ns.x|string|length }}",
        "{{ ('a' * 1000000).join(range(99999)|list) }}",
        "{{ range(99999)|map('string')|join('a' * 1000000) }}",
        "{{ (['x' * 1000000] * 10000)|map('upper')|list|length }}",
        "{{ 'a\n'|indent(1000000000, true) }}",
        "{% set ns = namespace(x=3) %}{% for a in range(999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% macro a() %}" + "x" * 1000 + "{% endmacro %}{% for i in range(99999) %}{{ a() }}{% endfor %}",
    ],
)  # fmt: skip
def test_work_without_end_and_texts_without_end_are_cut_short(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    start = time.thread_time()
    with pytest.raises(UserError, match="refused"):
        rendered(source)
    assert time.thread_time() - start < 2.0  # a single step may take a while beyond the limit


@pytest.mark.parametrize("source", ["{% if %}", "{{ 'a' ", "{{ x|no_such_filter }}", "{% bird %}", "{{ " + "(" * 9999])
def test_what_is_no_template_is_refused_when_it_is_read(source: str) -> None:
    with pytest.raises(TokenizerError, match="no Jinja that can be read"):
        ChatProgram(source)


def test_a_template_of_a_book_s_length_is_not_read() -> None:
    with pytest.raises(TokenizerError, match="at most 200000 are read"):
        ChatProgram("a" * (MAX_SOURCE_CHARS + 1))


def test_a_program_renders_again_after_an_error() -> None:
    program = ChatProgram("{{ 1 // n }}")
    with pytest.raises(UserError, match="division"):
        program.render({"n": 0})
    assert program.render({"n": 1}) == "1"
