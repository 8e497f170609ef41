"""Patterns over names of modules, beside Python's own engine, and where that would take for ever."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.formats.name_patterns import NamePattern

NAMES = [
    *(f"model.layers.{i}.{module}" for i in (0, 1, 10) for module in ("self_attn.q_proj", "mlp.down_proj", "mlp.up")),
    "lm_head",
    "q_proj",
    "x",
    "",
    "a.",
    "transformer.h.3.attn.c_attn",
]
PATTERNS = [
    "q_proj", "^q_proj", "^model.layers.1.mlp.up$", "layers.0.self_attn.q_proj", "proj", "x", "", "^", "$",
    r"layers\.(0|1)\..*", r".*\.layers\.\d+\.mlp\.(?:up|down_proj)", r"[^.]+_proj", r"layers\.1?0\..*proj$",
    r"(self_attn|mlp)\.\w+", r"mlp\..{2}", r"\w{2,4}", r"[a-z_]{6,}", r"\S+?\.q_proj", "up|x|lm_head", r"1{1}\.mlp\.up",
    r"(a|)+", r"(model\.)?layers\.[0-9]+\.(mlp|self_attn)\.(up|q_proj)", r"h\.[]3]\.attn\.c_attn", r"l*m*_head",
    r"\.up", r"(x*)*", r"((up)?(.)?){0,3}", r"a\.", r"mlp\.{1}up{,1}", r"(^|lm)_?head", r"(q_proj)$", r"[\w.]+\-?proj",
]  # fmt: skip


def theirs(pattern: str, name: str) -> bool:
    """What PEFT asks."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_it_matches_in_python(pattern: str) -> None:
    own = NamePattern(pattern)
    for name in NAMES:
        assert own.matches(name) == theirs(pattern, name), name


pieces = st.recursive(
    st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a.]", r"\w", "^", "$", ""]),
    lambda inner: (
        st.lists(inner, min_size=2, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "*?"])).map(
            lambda both: f"(?:{both[0]}){both[1]}"
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(pieces, st.text("ab.", max_size=8))
def test_any_pattern_matches_what_it_matches_in_python(pattern: str, name: str) -> None:
    assert NamePattern(pattern).matches(name) == theirs(pattern, name)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "((a*)*)*b", "(a|a)*b", "(.*a){20}b", "a*a*a*a*a*a*a*a*a*a*b", r"((\w?){9}){9}b", "(((a?)?)+)+b"],
)
def test_a_pattern_over_which_python_lingers_is_matched_at_once(pattern: str) -> None:
    own = NamePattern(pattern)
    began = time.process_time()
    assert not own.matches("a" * 60)
    assert own.matches("a" * 60 + "b")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("(a", "is not closed"),
        ("a)", "closes nothing"),
        ("[a", "is not closed"),
        ("[[a]", "holds another"),
        ("[z-a]", "is not supported"),
        ("*a", "repeats nothing"),
        ("a**", "repeated already"),
        ("a++", "repeated already"),
        ("a{3,1}", "counts to less"),
        ("(?=a)b", "look ahead"),
        ("(?P<n>a)(?P=n)", "look ahead"),
        (r"(a)\1", r"'\\1' is not supported"),
        (r"\bq", r"'\\b' is not supported"),
        ("a\\", "is not supported"),
        ("(((a{90}){90}){90}){90}", "counts too far"),
        ("(" * 2000 + ")" * 2000, "too deep"),
    ],
)
def test_what_is_no_pattern_or_needs_a_memory_is_refused(pattern: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        NamePattern(pattern)
