"""Short question-and-answer exchanges on many subjects, English and Chinese.

Source: the PyPI package chatterbot-corpus (BSD-3-Clause). Its files are YAML of one narrow shape (a list of lists of
strings under "conversations:"), read here by a reader for just that shape, which spares a dependency.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fledge.data.filters import select
from fledge.data.package import Package, fetch, member_names, read_member
from fledge.data.reading import Split
from fledge.errors import DataError
from fledge.types import ChatExample, Conversation, Message, Provenance, Role

PACKAGE = Package(
    "pypi",
    "chatterbot-corpus",
    "1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
LICENCE = "BSD-3-Clause"

# A new list, one whose inner dash the file forgot (it happens once), or the next string of the same list.
_ITEM = re.compile(r"^(?P<dash>- -|-|  -)(?: (?P<value>.*))?$")
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\", "/": "/", " ": " ", "\n": ""}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)


def examples(split: Split, *, cache: Path, seed: int) -> Iterator[ChatExample]:
    """The English exchanges."""
    yield from select(_exchanges("english", "chatterbot", cache), split, seed)


def chinese_examples(split: Split, *, cache: Path, seed: int) -> Iterator[ChatExample]:
    """The Chinese exchanges, in simplified characters."""
    yield from select(_exchanges("chinese", "chatterbot-zh", cache), split, seed)


def read_conversations(text: str, where: str) -> list[list[str]]:
    """The lists of strings under "conversations:"; `DataError` for a line outside the shape this reads."""
    conversations: list[list[str]] = []
    _, _, body = text.partition("conversations:")
    pending: list[str] = []
    for number, line in enumerate(body.split("\n")):
        match = _ITEM.match(line)
        if match is None:
            if line.strip() and not line.startswith("    ") and not line.startswith("#"):
                raise DataError(f"{where}: line {number} under conversations is {line[:40]!r}: expected a list item")
            pending.append(line)
            continue
        if conversations:
            conversations[-1].append(_scalar(pending))
        if match["dash"].startswith("-"):
            conversations.append([])
        pending = [match["value"] or ""]
    if conversations:
        conversations[-1].append(_scalar(pending))
    return conversations


def _exchanges(language: str, source: str, cache: Path) -> Iterator[ChatExample]:
    archive = fetch(PACKAGE, cache)
    for member in member_names(archive, f"chatterbot_corpus/data/{language}/", ".yml"):
        text = read_member(archive, member).decode("utf-8").replace("\r\n", "\n")
        for number, turns in enumerate(read_conversations(text, member)):
            conversation = _conversation(turns)
            if conversation is not None:
                name = f"{Path(member).stem}#{number}"
                yield ChatExample(conversation, Provenance(source, name, LICENCE))


def _conversation(turns: Sequence[str]) -> Conversation | None:
    """Alternating turns up to the last answer; None where a turn is empty or there is no answer."""
    whole = turns[: len(turns) // 2 * 2]
    if not whole or not all(turn.strip() for turn in whole):
        return None
    roles: tuple[Role, Role] = ("user", "assistant")
    return Conversation(tuple(Message.of(roles[number % 2], turn.strip()) for number, turn in enumerate(whole)))


def _scalar(lines: Sequence[str]) -> str:
    """A YAML string from the lines it stands on: plain, quoted, or a literal block."""
    first, *rest = (line.strip() for line in lines)
    if first in ("|", "|-", "|+"):
        return "\n".join(line[4:] for line in lines[1:]).strip("\n")
    folded = _folded([first, *rest])
    if folded.startswith("'"):
        return folded[1:].rstrip().removesuffix("'").replace("''", "'")
    if folded.startswith('"'):
        return _ESCAPE.sub(_unescaped, folded[1:].rstrip().removesuffix('"'))
    return re.split(r"\s#", folded)[0].strip()


def _folded(lines: Sequence[str]) -> str:
    """Lines joined as YAML folds them: one line end is a space, an empty line is a line end."""
    text = ""
    for number, line in enumerate(lines):
        if number == 0 or not line:
            text += line if line else "\n"
        elif text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1] + line
        else:
            text += line if text.endswith("\n") else f" {line}"
    return text.rstrip("\n")


def _unescaped(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    return chr(int(code, 16)) if code else _ESCAPES.get(match[4], match[4])
