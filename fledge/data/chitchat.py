"""7,168 chats between two strangers, written by people (the BYU chit-chat collection of 2018).

The one who speaks first is the user, the other the assistant. Source: the PyPI package chitchat-dataset (MIT).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fledge.data.filters import select
from fledge.data.package import Package, member_text
from fledge.data.reading import Split
from fledge.types import ChatExample, Conversation, Message, Provenance, Role

PACKAGE = Package(
    "pypi",
    "chitchat-dataset",
    "0.9.0",
    "chitchat_dataset-0.9.0-py3-none-any.whl",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
)
LICENCE = "MIT"
MEMBER = "chitchat_dataset/dataset.json"


def examples(split: Split, *, cache: Path, seed: int) -> Iterator[ChatExample]:
    """Whole chats that hold at least one exchange."""
    yield from select(_chats(cache), split, seed)


def as_conversation(turns: Sequence[Sequence[dict[str, Any]]]) -> Conversation:
    """Alternating user and assistant messages from runs of one sender's lines.

    The lines of a run are joined by newlines, as they were sent; empty ones go; neighbouring runs of one sender are
    one message; messages after the last answer go, because nobody answers them.
    """
    spoken: list[tuple[str, list[str]]] = []
    for turn in turns:
        for line in turn:
            text = line["text"].strip()
            if not text:
                continue
            if spoken and spoken[-1][0] == line["sender"]:
                spoken[-1][1].append(text)
            else:
                spoken.append((line["sender"], [text]))
    whole = spoken[: len(spoken) // 2 * 2]
    roles: tuple[Role, Role] = ("user", "assistant")
    return Conversation(
        tuple(Message.of(roles[number % 2], "\n".join(texts)) for number, (_, texts) in enumerate(whole))
    )


def _chats(cache: Path) -> Iterator[ChatExample]:
    for name, chat in json.loads(member_text(PACKAGE, MEMBER, cache)).items():
        conversation = as_conversation(chat["messages"])
        if conversation.messages:
            yield ChatExample(conversation, Provenance("chitchat", name, LICENCE))
