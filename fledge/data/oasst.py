"""OpenAssistant: trees of messages, nested (`{"message_tree_id", "prompt": {..., "replies": [...]}}`) or one message a
row with its `parent_id`.

From a tree come a ranking for every prompt with two or more ranked replies (`rank` 0 is best), and the conversation
along the best replies. Deleted messages and ones that reviewers refused are left out with all that follows them.
Source: Köpf et al. 2023 (2304.07327), appendix on the data format.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.records import BadRow, Intake, Row, each, kind_of
from fledge.types import ChatExample, Conversation, Judgement, Message, Provenance, Ranking, Role

_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
_NAMES = {role: name for name, role in _ROLES.items()}
_MAX_DEPTH = 100  # messages on one path; the published trees have at most a dozen


@dataclass(frozen=True)
class _Node:
    """A message of a tree with its replies, the best first where they are ranked."""

    message: Message
    id: str
    rank: int | None
    maker: str
    replies: tuple[_Node, ...]


def recognises(record: Mapping[str, Any]) -> bool:
    is_tree = isinstance(record.get("prompt"), dict) and "message_id" in record["prompt"]
    return is_tree or ({"message_id", "parent_id", "role", "text"} <= set(record))


def read(rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]:
    """The examples of every tree. Messages in rows of their own are held in memory until all are read."""
    loose: list[Row] = []

    def convert(row: Row) -> list[FeedbackExample]:
        if row.has("prompt"):
            return _examples(_tree(row.object("prompt"), 0), row, intake)
        row.text("message_id")
        row.optional_text("parent_id")
        loose.append(row)
        return []

    yield from each(rows, intake, convert)
    replies: dict[str | None, list[Row]] = defaultdict(list)
    for row in loose:
        replies[row.record.get("parent_id")].append(row)
    known = {None, *(row.record["message_id"] for row in loose)}
    yield from each((row for row in loose if row.record.get("parent_id") not in known), intake, _refuse_orphan)
    yield from each(replies.get(None, []), intake, lambda row: _examples(_grown(row, replies, 0), row, intake))


def _refuse_orphan(row: Row) -> list[FeedbackExample]:
    raise BadRow(
        "no parent", row.where, f"no message has the id {row.record['parent_id']!r}; bring its tree or drop it"
    )


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """A nested tree an example: a ranking's answers as ranked replies, a conversation as a single branch.

    Reading a ranking's tree gives the conversation with its best answer as well.
    """
    for number, example in enumerate(examples):
        if not isinstance(example, Ranking | ChatExample):
            raise cannot_write(example, "oasst")
        identity = f"{number}:{example.provenance.id}"
        yield {"message_tree_id": identity, "tree_state": "ready_for_export", "prompt": _record(example, identity)}


def _tree(row: Row, depth: int) -> _Node | None:
    """A nested message; None if it was deleted or refused."""
    if not _is_kept(row, depth):
        return None
    return _node(row, [_tree(reply, depth + 1) for reply in (row.objects("replies") if row.has("replies") else [])])


def _grown(row: Row, replies: Mapping[str | None, list[Row]], depth: int) -> _Node | None:
    """A message from a row of its own, with those that name it as their parent."""
    if not _is_kept(row, depth):
        return None
    return _node(row, [_grown(child, replies, depth + 1) for child in replies.get(row.text("message_id"), [])])


def _is_kept(row: Row, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        raise BadRow("tree too deep", row.where, f"more than {_MAX_DEPTH} messages on one path; drop the tree")
    return not row.record.get("deleted") and row.record.get("review_result") is not False


def _node(row: Row, replies: list[_Node | None]) -> _Node:
    speaker = row.value("role")
    if speaker not in _ROLES:
        raise BadRow("wrong role", row.where, f"{kind_of(speaker)}, expected prompter or assistant; rename it")
    kept = [reply for reply in replies if reply is not None]
    kept.sort(key=lambda reply: (reply.rank is None, reply.rank or 0))
    rank = row.optional_number("rank")
    maker = (row.optional_text("model_name") or "model") if row.record.get("synthetic") else "human"
    message = Message.of(_ROLES[speaker], row.text("text"))
    return _Node(message, row.text("message_id"), None if rank is None else int(rank), maker, tuple(kept))


def _examples(root: _Node | None, row: Row, intake: Intake) -> list[FeedbackExample]:
    """The conversation along the best replies, if the assistant speaks in it, and every ranking of the tree."""
    if root is None:
        return []
    path, node = [root], root
    while node.replies:
        node = node.replies[0]
        path.append(node)
    while path and path[-1].message.role != "assistant":
        path.pop()
    found: list[FeedbackExample] = []
    if path:
        conversation = Conversation(tuple(node.message for node in path))
        found.append(ChatExample(conversation, Provenance(intake.source, path[-1].id, intake.licence)))
    return found + list(_rankings(root, (), intake))


def _rankings(node: _Node, before: tuple[Message, ...], intake: Intake) -> Iterator[Ranking]:
    so_far = (*before, node.message)
    ranked = [reply for reply in node.replies if reply.rank is not None and reply.message.role == "assistant"]
    ranks = tuple(reply.rank + 1 for reply in ranked if reply.rank is not None)
    if len(set(ranks)) > 1 and node.message.role == "user":
        yield Ranking(
            Conversation(so_far),
            tuple(reply.message.text for reply in ranked),
            ranks,
            (True,) * len(ranked),
            tuple(reply.maker for reply in ranked),
            Provenance(intake.source, node.id, intake.licence),
            Judgement("human"),
        )
    for reply in node.replies:
        yield from _rankings(reply, so_far, intake)


def _record(example: Ranking | ChatExample, identity: str) -> dict[str, Any]:
    is_ranking = isinstance(example, Ranking)
    conversation = example.prompt if isinstance(example, Ranking) else example.conversation
    roles = [message.role for message in conversation.messages]
    if conversation.tools or not roles or not set(roles) <= set(_NAMES) or len(roles) > _MAX_DEPTH:
        raise cannot_write(example, "oasst", "it has tools, messages of the system, or none at all")
    last = roles[-1] == "user" if is_ranking else roles[-1] == "assistant"
    if not last:
        raise cannot_write(example, "oasst", "its last message is not where the answer belongs")
    replies = _ranked_records(example, identity) if isinstance(example, Ranking) else []
    for place in range(len(roles) - 1, -1, -1):
        message = conversation.messages[place]
        node = {"message_id": f"{identity}/{place}", "role": _NAMES[message.role], "text": message.text}
        replies = [{**node, "replies": replies}]
    return replies[0]


def _ranked_records(ranking: Ranking, identity: str) -> list[dict[str, Any]]:
    nodes = []
    answers = zip(ranking.completions, ranking.ranks, ranking.makers, strict=True)
    for place, (text, rank, maker) in enumerate(answers):
        synthetic = {"synthetic": maker != "human"} | ({} if maker == "human" else {"model_name": maker})
        node = {"message_id": f"{identity}/answer{place}", "role": "assistant", "text": text, "rank": rank - 1}
        nodes.append({**node, **synthetic, "replies": []})
    return nodes
