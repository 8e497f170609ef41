"""An answer's text as its tokens come: whole characters only, and never a part of a stop string.

Bytes of half a character wait in `text.tokenizer.StreamDecoder`. Text that may be the beginning of a stop string is
withheld until more of it decides. Where an answer is cut does not depend on where its tokens begin and end: it stops at
the first character that completes a stop string; if that completes several, before the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

from fledge.text.tokenizer import StreamDecoder, Tokenizer


class AnswerText:
    """The text of one answer. What `push` and `finish` return, joined, is the text, without the stop string.

    `continues`: it goes on with another text (`types.Request`).
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, continues: bool = False) -> None:
        self._decoder = StreamDecoder(tokenizer, within=continues)
        self._stops = tuple(stops)
        self._held = ""  # the longest end of the text that begins a stop string

    def push(self, token_id: int) -> tuple[str, bool]:
        """(the text that this token sets free, whether it completes a stop string and the answer ends)."""
        return self._release(self._decoder.push(token_id))

    def finish(self) -> str:
        """What was withheld, now that nothing follows; U+FFFD if the tokens end within a character."""
        text, is_stopped = self._release(self._decoder.flush())
        if is_stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str) -> tuple[str, bool]:
        if not self._stops or not new:
            return new, False
        text = self._held + new
        cut = _first_stop(text, self._stops)
        if cut is not None:
            self._held = ""
            return text[:cut], True
        num_free = len(text) - _undecided(text, self._stops)
        self._held = text[num_free:]
        return text[:num_free], False


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first, the longest of those complete at once."""
    starts = ((text.find(stop), len(stop)) for stop in stops)
    found = [(start + length, start) for start, length in starts if start >= 0]
    return min(found)[1] if found else None


def _undecided(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` with which a stop string begins."""
    return max(
        next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0) for stop in stops
    )
