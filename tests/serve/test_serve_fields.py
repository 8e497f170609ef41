"""The tables of fields: complete against the published document, and what docs/api.md shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from fledge.serve.chat_wire import CHAT_FIELDS, ChatRequest
from fledge.serve.completions_wire import COMPLETION_FIELDS, CompletionRequest
from fledge.serve.embeddings import EMBEDDING_FIELDS, EmbeddingRequest
from fledge.serve.moderations import MODERATION_FIELDS, ModerationRequest
from fledge.serve.responses_wire import COUNT_FIELDS, RESPONSE_FIELDS, CountRequest, ResponseRequest
from fledge.serve.wire import FieldRule

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT.parent / "shared" / "data" / "openai-openapi.json"
TABLES: dict[str, tuple[tuple[FieldRule, ...], type[BaseModel]]] = {
    "CreateChatCompletionRequest": (CHAT_FIELDS, ChatRequest),
    "CreateCompletionRequest": (COMPLETION_FIELDS, CompletionRequest),
    "CreateEmbeddingRequest": (EMBEDDING_FIELDS, EmbeddingRequest),
    "CreateModerationRequest": (MODERATION_FIELDS, ModerationRequest),
    "CreateResponse": (RESPONSE_FIELDS, ResponseRequest),
    "TokenCountsBody": (COUNT_FIELDS, CountRequest),
}
PAGES = (
    ("/v1/chat/completions", "CreateChatCompletionRequest"),
    ("/v1/responses", "CreateResponse"),
    ("/v1/responses/input_tokens", "TokenCountsBody"),
    ("/v1/completions", "CreateCompletionRequest"),
    ("/v1/embeddings", "CreateEmbeddingRequest"),
    ("/v1/moderations", "CreateModerationRequest"),
)


def table(name: str) -> str:
    rows = [f"| `{rule.name}` | {rule.state} | {rule.note} |" for rule in TABLES[name][0]]
    return "\n".join(["| field | | |", "|---|---|---|", *rows])


def published(name: str) -> set[str]:
    if not DOCUMENT.is_file():
        pytest.skip(f"the published document is not at {DOCUMENT}")
    schemas = json.loads(DOCUMENT.read_text(encoding="utf-8"))["components"]["schemas"]

    def properties(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            schema = schemas[schema["$ref"].rpartition("/")[2]]
        inner = [properties(part) for part in schema.get("allOf", [])]
        return set(schema.get("properties", {})).union(*inner)

    return properties(schemas[name])


@pytest.mark.parametrize("name", list(TABLES))
def test_every_published_field_has_a_rule(name: str) -> None:
    rules = TABLES[name][0]
    assert published(name) <= {rule.name for rule in rules}


@pytest.mark.parametrize("name", list(TABLES))
def test_every_field_that_is_read_has_one_rule_and_the_other_way_round(name: str) -> None:
    rules, model = TABLES[name]
    names = [rule.name for rule in rules]
    assert sorted(names) == sorted(model.model_fields)


@pytest.mark.parametrize(("title", "name"), PAGES)
def test_the_page_shows_the_tables(title: str, name: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert f"### {title}\n\n{table(name)}\n" in page
