"""What the wire types of all resources share: strictness, lists, metadata, and the table of fields.

A field of a request is honoured, inert (accepted, without effect here; the answer names it in a header), or refused
by name. Each resource has one table that says so; its routes obey it and the documentation is made from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Query
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fledge.serve.errors import ApiError, refused
from fledge.store.pages import Cursor, Order, UnknownCursor


class Wire(BaseModel):
    """A value in a request. Unknown fields, other types and numbers that are none are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Answer(BaseModel):
    """A value in an answer; only the documentation is made from it, for speed nothing is checked."""

    model_config = ConfigDict(protected_namespaces=())


class Deleted(Answer):
    id: str
    object: str
    deleted: bool


class ErrorBody(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: ErrorBody


# PostgreSQL holds no NUL in a text.
MetadataKey = Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00]*$")]
MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
MAX_NOTES = 16  # inert parts of fields that a header tells of

FieldState = Literal["honoured", "inert", "refused", "extension"]


@dataclass(frozen=True)
class FieldRule:
    """What becomes of a field. `note` says how or why; `refuses` gives the complaint about values that cannot be
    honoured, None for the others."""

    name: str
    state: FieldState
    note: str
    refuses: Callable[[Any], str | None] | None = None


def obey(rules: Sequence[FieldRule], body: BaseModel, inert_parts: Sequence[str] = ()) -> dict[str, str]:
    """Refuse what the table refuses; the header that names the inert fields of this request, and parts of fields."""
    inert = list(dict.fromkeys(inert_parts))[:MAX_NOTES]
    for rule in rules:
        value = getattr(body, rule.name, None)
        if value is None or rule.name not in body.model_fields_set:
            continue
        complaint = rule.note if rule.state == "refused" else rule.refuses(value) if rule.refuses else None
        if complaint is not None:
            raise refused(f"'{rule.name}' is not supported: {complaint}", rule.name, "unsupported_parameter")
        if rule.state == "inert":
            inert.append(rule.name)
    return {"x-fledge-inert": ", ".join(inert)} if inert else {}


def extras_of(value: BaseModel, what: str, place: str) -> list[str]:
    """What a value holds beside the fields that are read, as `what.NAME`: it is without effect. 400, naming the place,
    for what is no name of a field: the names stand in a header."""
    found = []
    for name in value.model_extra or ():
        if not _FIELD.fullmatch(name):
            raise unknown_field(f"{place}.{name[:64]}")
        found.append(f"{what}.{name}")
    return found


def unknown_field(place: str) -> ApiError:
    return refused(f"Unrecognized request argument supplied: {place}", place, "unknown_parameter")


def list_answer(items: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page as the published lists have it."""
    ids = (items[0]["id"], items[-1]["id"]) if items else ("", "")  # published as texts, never null
    return {"object": "list", "data": items, "first_id": ids[0], "last_id": ids[1], "has_more": has_more}


def page_of(items: Sequence[dict[str, Any]], cursor: Cursor) -> tuple[list[dict[str, Any]], bool]:
    """A page of a list that is held in memory, and whether more follow; items have ids."""
    ordered = list(items) if cursor.order == "asc" else list(items)[::-1]
    if cursor.after is not None:
        ids = [item["id"] for item in ordered]
        if cursor.after not in ids:
            raise UnknownCursor(f"no entry '{cursor.after[:100]}' in this list to go on from")
        ordered = ordered[ids.index(cursor.after) + 1 :]
    return ordered[: cursor.limit], len(ordered) > cursor.limit


Limit = Annotated[int, Query(ge=0, le=100)]
After = Annotated[str | None, Query(max_length=256)]
# `IncludeEnum` of openapi 2.3.0. What is unknown is refused: a misspelt wish would be ignored without a word.
IncludeName = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


_Names = list[IncludeName] | None


def _included(
    include: Annotated[_Names, Query(max_length=16)] = None,
    bracketed: Annotated[_Names, Query(alias="include[]", max_length=16, include_in_schema=False)] = None,
) -> list[IncludeName]:
    """The published clients write a list in a query with brackets, which the published document does not tell."""
    return [*(include or ()), *(bracketed or ())]


Include = Annotated[list[IncludeName], Depends(_included)]


def _paged(first: Order) -> Any:
    """A dependency: the stretch of a list that a request asks for, in this order unless it says otherwise."""

    def cursor(limit: Limit = 20, order: Order = first, after: After = None) -> Cursor:
        return Cursor(limit, order, after)

    return Depends(cursor)


NewestFirst = Annotated[Cursor, _paged("desc")]
OldestFirst = Annotated[Cursor, _paged("asc")]
