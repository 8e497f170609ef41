"""Structured output: which tokens may follow, so that an answer matches a schema, a regular expression or a grammar.

Layer 5. `GrammarCompiler` turns a `types.Grammar` into one `GrammarMatcher` an answer, and fills the masks of a whole
step at once. The parsing is `llguidance`'s (Earley over a lexer of derivatives; Koo et al. 2024 and Geng et al. 2025
compare the ways). It fails closed: a grammar that is wrong, too large or not wholly enforceable is a `UserError`
before the first token, and one that meets a limit later ends its answer with an error, never with a "stop".

Shapes: N rows of a step (one per answer, and one more for each token of a draft), V vocabulary, W = V/32 packed words.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fledge.errors import UserError
from fledge.infer.grammar_guard import (
    COMPILE_STACK_BYTES,
    GrammarLimits,
    GuardedTrial,
    Vocabulary,
    new_matcher,
    on_a_stack_of,
)
from fledge.text.json_schema import MAX_BYTES, parse_schema, reduce_schema
from fledge.text.tokenizer import Tokenizer
from fledge.types import Grammar

Words = NDArray[np.uint32]
ValueT = TypeVar("ValueT")

CACHED_GRAMMARS = 64
USES_OF_A_COMPILATION = 1000  # answers share its lexer, whose states only grow; then it is compiled anew


class GrammarMatcher:
    """Where one answer stands in its grammar. Made by `GrammarCompiler.matcher`, asked through its `masks`.

    `failure` says why the answer cannot go on (a limit was met, or no token fits); it stays. `is_finished`: nothing
    more can follow, so the answer is complete without a stop token, or a stop token was pushed.
    """

    def __init__(self, grammar: Grammar, inner: Any, profile: int, stop_ids: frozenset[int]) -> None:
        self._grammar = grammar
        self._inner = inner
        self._profile = profile
        self._stop_ids = stop_ids
        self._is_stopped = False
        self.failure: str | None = None

    @property
    def is_finished(self) -> bool:
        return self._is_stopped or (self.failure is None and self._inner.is_stopped() and not self._inner.is_error())

    @property
    def may_stop(self) -> bool:
        """The answer so far satisfies the grammar."""
        return self.failure is None and bool(self._inner.is_accepting())

    def push(self, token: int) -> None:
        """Go on with a token that the last mask allowed. A token that does not fit makes the matcher fail."""
        if self.is_finished or self.failure is not None:
            self.failure = self.failure or f"token {token} came after the grammar was finished"
        elif token in self._stop_ids and self._inner.is_accepting():
            self._is_stopped = True
        elif not self._inner.consume_token(token):
            self.failure = _one_line(self._inner.get_error())
        elif token in self._stop_ids and not self.is_finished:
            self.failure = "a stop token came before the grammar was finished"

    def rollback(self, num_tokens: int) -> None:
        """Take the last `num_tokens` tokens back."""
        if self._is_stopped and num_tokens:
            self._is_stopped = False
            num_tokens -= 1
        is_done = self._inner.rollback(num_tokens) if num_tokens else True
        assert is_done, f"cannot take back {num_tokens} tokens: {self._inner.get_error()}"


@dataclass
class _Compiled:
    prototype: Any  # a matcher of the library at the start of the grammar
    num_uses: int = 0


class GrammarCompiler:
    """Grammars for one tokenizer and a model of `vocab_size` ids (of those, the ones the tokenizer lacks never fit).

    Compiled grammars are kept, the least recently used goes first; so are the refusals of those that were tried.
    `close` ends the guard's process (grammar_guard).
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int | None = None, limits: GrammarLimits | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits or GrammarLimits()
        self._vocab_size = vocab_size or tokenizer.vocab_size
        names = {i: tokenizer.pieces([i])[0] for i in sorted(tokenizer.framing_ids)}
        every = range(tokenizer.vocab_size)
        tokens = tuple(names[i].encode() if i in names else tokenizer.token_bytes(i) for i in every)
        self._special = {name: i for i, name in names.items()}
        vocabulary = Vocabulary(tokens, tuple(names), tokenizer.end_of_text_id, tokenizer.encode_spoken)
        self._library = vocabulary.of_library()
        self._executor = llguidance.LLExecutor()
        self._trial = GuardedTrial(vocabulary, self._limits)
        self._compiled: OrderedDict[Grammar, _Compiled] = OrderedDict()
        self._refused: OrderedDict[Grammar, str] = OrderedDict()  # so that none costs its time twice
        self._lock = threading.Lock()  # of these two
        self._guarding = threading.Lock()  # the guard hears one grammar at a time
        self._num_words = (tokenizer.vocab_size + 31) // 32
        self._text = self._packed(i for i in every if i not in names and tokens[i])
        self._profiles: dict[tuple[frozenset[int], frozenset[int]], int] = {}
        self._allowed_PW: Words = np.zeros((0, self._num_words), dtype=np.uint32)
        self._stops_PW: Words = np.zeros((0, self._num_words), dtype=np.uint32)

    def knows(self, grammar: Grammar) -> bool:
        """Whether it is compiled or refused already, so that asking for a matcher costs next to nothing."""
        with self._lock:
            return grammar in self._compiled or grammar in self._refused

    def check(self, grammar: Grammar) -> None:
        """Compile the grammar for `matcher`. `UserError` if it cannot be used.

        May be called by another thread than everything else.
        """
        self._compile(grammar)

    def matcher(self, grammar: Grammar, stop_ids: Collection[int]) -> GrammarMatcher:
        """A matcher at the start of the grammar. Where the answer may end, `stop_ids` are allowed (none given: the
        end of text), and nowhere else. Special tokens are allowed only where a Lark grammar names them.

        `UserError` if the grammar is malformed, too large, unsatisfiable or not wholly enforceable.
        """
        compiled = self._compile(grammar)
        compiled.num_uses += 1
        if compiled.num_uses >= USES_OF_A_COMPILATION:
            self._forget(grammar)
        stops = frozenset(i for i in stop_ids if 0 <= i < self._tokenizer.vocab_size)
        stops = stops or frozenset((self._tokenizer.end_of_text_id,))
        named = _named_specials(grammar, self._special) - {self._tokenizer.pad_id}
        return GrammarMatcher(grammar, compiled.prototype.deep_copy(), self._profile(named, stops), stops)

    def masks(self, rows: Sequence[tuple[GrammarMatcher, Sequence[int]]]) -> Tensor:
        """(N, V) bool on the CPU, true where a token may come next: for every row its matcher's next token, then the
        one after each token of its draft (a row without a draft has one mask).

        After a draft token that does not fit, what follows is undefined. A matcher that can go on with no token at
        all fails; the masks of those that have failed are all true, so that sampling stays defined.
        """
        sizes = [1 + len(draft) for _, draft in rows]
        starts = [0, *np.cumsum(sizes).tolist()]
        words_NW: Words = np.full((starts[-1], self._num_words), 0xFFFFFFFF, dtype=np.uint32)
        live = [(r, m, self._known(draft)) for r, (m, draft) in enumerate(rows) if m.failure is None]
        self._fill([(m._inner, starts[r]) for r, m, draft in live if not draft], words_NW)
        self._fill_drafted([(m._inner, starts[r], draft) for r, m, draft in live if draft], words_NW)
        profile_N = np.repeat([matcher._profile for matcher, _ in rows], sizes)
        eos = self._tokenizer.end_of_text_id
        may_stop_N = (words_NW[:, eos // 32] >> np.uint32(eos % 32)) & np.uint32(1)
        words_NW &= self._allowed_PW[profile_N]
        words_NW |= self._stops_PW[profile_N] * may_stop_N[:, None]
        is_stuck_R = (words_NW[starts[:-1]] == 0).all(axis=1)
        for r, matcher, _ in live:
            if matcher._inner.is_error() or is_stuck_R[r]:
                self._fail(matcher)
        for r, (matcher, _) in enumerate(rows):
            if matcher.failure is not None:
                words_NW[starts[r] : starts[r + 1]] = 0xFFFFFFFF
        return self._unpacked(words_NW)

    def close(self) -> None:
        self._trial.close()

    def _known(self, draft: Sequence[int]) -> list[int]:
        """A draft up to the first id that the tokenizer lacks (a prompt may hold such): the library fails on these."""
        return list(takewhile(lambda token: 0 <= token < self._tokenizer.vocab_size, draft))

    def _fill(self, rows: list[tuple[Any, int]], words_NW: Words) -> None:
        if rows:
            self._executor.unsafe_compute_mask_ptr(rows, words_NW.ctypes.data, self._num_words * 4, words_NW.shape[0])

    def _fill_drafted(self, rows: list[tuple[Any, int, list[int]]], words_NW: Words) -> None:
        if rows:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(
                rows, words_NW.ctypes.data, self._num_words * 4, words_NW.shape[0]
            )

    def _fail(self, matcher: GrammarMatcher) -> None:
        """Mark a matcher as failed, and forget the compilation it shares: its lexer may be at its limit."""
        error = _one_line(matcher._inner.get_error())
        matcher.failure = error or "no token of the vocabulary continues the grammar"
        self._forget(matcher._grammar)

    def _forget(self, grammar: Grammar) -> None:
        with self._lock:
            self._compiled.pop(grammar, None)

    def _compile(self, grammar: Grammar) -> _Compiled:
        with self._lock:
            if (known := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
                return known
        spelled = self._tried(grammar)
        # Neither the guard nor the library keeps other threads waiting meanwhile.
        prototype = on_a_stack_of(COMPILE_STACK_BYTES, lambda: new_matcher(self._library, spelled, self._limits))
        if prototype.is_error():
            raise UserError(f"the {_KINDS[grammar.kind]} cannot be used: {_one_line(prototype.get_error())}")
        with self._lock:
            return _keep(self._compiled, grammar, _Compiled(prototype))

    def _tried(self, grammar: Grammar) -> str:
        """The grammar in the library's spelling, if the guard has borne it."""
        with self._lock:
            refusal = self._refused.get(grammar)
        if refusal is None:
            spelled = _spell(grammar)
            with self._guarding:
                complaint = self._trial.complaint(spelled)
            if complaint is None:
                return spelled
            refusal = f"the {_KINDS[grammar.kind]} cannot be used: {_one_line(complaint)}"
            with self._lock:
                _keep(self._refused, grammar, refusal)
        raise UserError(refusal)

    def _profile(self, named: frozenset[int], stops: frozenset[int]) -> int:
        """The row of `_allowed_PW` and `_stops_PW` for these special tokens and these stop tokens."""
        if (named, stops) not in self._profiles:
            self._profiles[named, stops] = len(self._profiles)
            self._allowed_PW = np.vstack((self._allowed_PW, self._text | self._packed(named)))
            self._stops_PW = np.vstack((self._stops_PW, self._packed(stops)))
        return self._profiles[named, stops]

    def _packed(self, ids: Any) -> Words:
        bits = np.zeros(self._num_words * 32, dtype=np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view("<u4")

    def _unpacked(self, words_NW: Words) -> Tensor:
        size = min(self._tokenizer.vocab_size, self._vocab_size)
        bits_NV = np.unpackbits(words_NW.view(np.uint8), axis=1, count=size, bitorder="little")
        mask_NV = torch.from_numpy(bits_NV).view(torch.bool)
        return torch.nn.functional.pad(mask_NV, (0, self._vocab_size - size)) if size < self._vocab_size else mask_NV


def _keep(kept: OrderedDict[Grammar, ValueT], grammar: Grammar, value: ValueT) -> ValueT:
    """The value that is kept for the grammar, the given one if there was none; the oldest make room."""
    value = kept.setdefault(grammar, value)
    while len(kept) > CACHED_GRAMMARS:
        kept.popitem(last=False)
    return value


_KINDS = {
    "json_schema": "JSON schema",
    "json_object": "JSON object",
    "regex": "regular expression",
    "lark": "grammar",
}


def _spell(grammar: Grammar) -> str:
    """The grammar as the library reads it. `UserError` for what is wrong before it is asked."""
    if grammar.kind == "json_object":
        return _spell_schema({"type": "object"})
    if grammar.kind == "json_schema":
        return _spell_schema(parse_schema(grammar.text))
    _refuse_unreadable(grammar)
    if grammar.kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(grammar.text))
    return _spell_lark(grammar.text)


def _spell_schema(schema: Any) -> str:
    return json.dumps({"grammars": [{"json_schema": reduce_schema(schema)}]}, ensure_ascii=False)


def _spell_lark(text: str) -> str:
    """A Lark grammar whose schemas (`%json`) are reduced like any other."""
    if text.lstrip().startswith("{"):
        raise UserError("a Lark grammar starts with a rule or a %directive, not with '{'")
    for wrong, why in _NOT_IN_LARK.items():
        if re.search(wrong, text):
            raise UserError(f"the grammar cannot be used: {why}")
    decoder, spelled, end = json.JSONDecoder(), [], 0
    for match in re.finditer(r"%json\s*(?=\{)", text):
        if match.start() < end:
            continue
        try:
            _, stop = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            raise UserError("a %json block of the grammar holds no JSON object") from None
        schema = reduce_schema(parse_schema(text[match.end() : stop]))
        spelled += [text[end : match.end()], json.dumps(schema, ensure_ascii=False)]
        end = stop
    return "".join([*spelled, text[end:]])


_NOT_IN_LARK = {
    r"[\[,]\s*temperature\s*=": "temperature belongs to the request, not to a rule",
    r"[\[,]\s*stop\s*=": "stop= would take tokens back; use suffix= or lazy",
    r"allow_invalid_utf8": "an answer is UTF-8",
}


def _refuse_unreadable(grammar: Grammar) -> None:
    try:
        size = len(grammar.text.encode())
    except UnicodeEncodeError:
        raise UserError(f"the {_KINDS[grammar.kind]} holds half a character (a lone surrogate); send UTF-8") from None
    if size > MAX_BYTES:
        raise UserError(f"the {_KINDS[grammar.kind]} has {size} bytes, at most {MAX_BYTES} are taken")


def _named_specials(grammar: Grammar, special: dict[str, int]) -> frozenset[int]:
    """The special tokens that a Lark grammar writes out, `<|tool|>` or `<[5]>`."""
    if grammar.kind != "lark":
        return frozenset()
    named = {token_id for name, token_id in special.items() if name in grammar.text}
    numbered = {int(number) for number in re.findall(r"<\[(\d{1,9})\]>", grammar.text)}
    return frozenset(named | (numbered & set(special.values())))


def _one_line(error: str) -> str:
    kept = error.replace("<non-verbose/>", "").split("<backtrace>")[0]
    return " ".join(kept.split())[:300]
