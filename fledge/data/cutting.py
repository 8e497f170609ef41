"""Cutting long texts into documents at natural places. Joined again, the pieces are the text, character for character.

Prose is cut between paragraphs; Python between top-level definitions, and inside a long class between methods.
Why not leave code files whole: with rows of a few hundred tokens most rows would then start in the middle of
something, and fill-in-the-middle would rarely see a whole function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Places to cut, the best first: blank line, line end, sentence end (Latin and Chinese), white space.
_BREAKS = tuple(re.compile(pattern) for pattern in (r"\n[ \t]*\n+", r"\n", r"[.!?]\s+|[。！？…]+", r"\s+"))

TAIL_CHARS = 2_048
CODE_SMALL_CHARS = 800  # neighbouring definitions smaller than this travel together
CODE_LARGE_CHARS = 3_000  # a definition larger than this is cut between its methods
_TOP = re.compile(r"^(?:@|def |class |async def |if __name__)", re.MULTILINE)
_METHOD = re.compile(r"^[ \t]+(?:@|def |class |async def )", re.MULTILINE)
_DECORATOR = re.compile(r"^[ \t]*@")


def cut_prose(text: str, max_chars: int) -> list[str]:
    """Pieces of at most `max_chars` characters, cut at the last good place in the second half of each."""
    pieces = []
    start = 0
    while len(text) - start > max_chars:
        end = _break_before(text, start + max_chars // 2, start + max_chars)
        pieces.append(text[start:end])
        start = end
    if start < len(text):
        pieces.append(text[start:])
    return pieces


def cut_python(text: str, small: int = CODE_SMALL_CHARS, large: int = CODE_LARGE_CHARS) -> list[str]:
    """Top-level definitions, small neighbours merged up to `small`, those beyond `large` cut between methods."""
    blocks: list[str] = []
    for block in _blocks(text, _TOP):
        if len(block) <= large:
            blocks.append(block)
        else:
            blocks.extend(_merged(_blocks(block, _METHOD), small))
    return list(_merged(blocks, small))


def _break_before(text: str, low: int, high: int) -> int:
    """The end of the last break of the best kind in text[low:high]; `high` where there is none of any kind."""
    for pattern in _BREAKS:
        for start in (
            max(low, high - TAIL_CHARS),
            low,
        ):  # most texts have one near the end: no need to see them all
            ends = [match.end() for match in pattern.finditer(text, start, high)]
            if ends:
                return ends[-1]
    return high


def _blocks(text: str, opening: re.Pattern[str]) -> Iterator[str]:
    """The text cut before every line that matches, except that decorators stay with what they decorate."""
    starts = [0]
    after_decorator = False
    for match in opening.finditer(text):
        start = match.start()
        if not after_decorator and start > 0:
            starts.append(start)
        after_decorator = _DECORATOR.match(match.group()) is not None
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        if end > start:
            yield text[start:end]


def _merged(blocks: list[str] | Iterator[str], small: int) -> Iterator[str]:
    held = ""
    for block in blocks:
        if held and len(held) + len(block) > small:
            yield held
            held = ""
        held += block
    if held:
        yield held
