"""The tables of fields: complete against the published document, and what docs/api.md shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from fledge.serve.app import ROUTERS
from fledge.serve.batches import BATCH_FIELDS, BatchRequest
from fledge.serve.chat_wire import CHAT_FIELDS, ChatRequest
from fledge.serve.compaction import COMPACT_FIELDS, CompactRequest
from fledge.serve.completions_wire import COMPLETION_FIELDS, CompletionRequest
from fledge.serve.conversations import CONVERSATION_FIELDS, ConversationRequest
from fledge.serve.embeddings import EMBEDDING_FIELDS, EmbeddingRequest
from fledge.serve.graders import RUN_FIELDS, VALIDATE_FIELDS, RunRequest, ValidateRequest
from fledge.serve.moderations import MODERATION_FIELDS, ModerationRequest
from fledge.serve.rerank import RERANK_FIELDS, RerankRequest
from fledge.serve.responses_wire import COUNT_FIELDS, RESPONSE_FIELDS, CountRequest, ResponseRequest
from fledge.serve.tuning_wire import TUNING_FIELDS, TuningRequest
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
    "CompactResponseMethodPublicBody": (COMPACT_FIELDS, CompactRequest),
    "CreateConversationBody": (CONVERSATION_FIELDS, ConversationRequest),
    "CreateBatchRequest": (BATCH_FIELDS, BatchRequest),
    "CreateFineTuningJobRequest": (TUNING_FIELDS, TuningRequest),
    "RunGraderRequest": (RUN_FIELDS, RunRequest),
    "ValidateGraderRequest": (VALIDATE_FIELDS, ValidateRequest),
    "Rerank": (RERANK_FIELDS, RerankRequest),  # Jina's and Cohere's; of no published document here
}
PAGES = (
    ("/v1/chat/completions", "CreateChatCompletionRequest"),
    ("/v1/responses", "CreateResponse"),
    ("/v1/responses/input_tokens", "TokenCountsBody"),
    ("/v1/completions", "CreateCompletionRequest"),
    ("/v1/embeddings", "CreateEmbeddingRequest"),
    ("/v1/moderations", "CreateModerationRequest"),
    ("/v1/responses/compact", "CompactResponseMethodPublicBody"),
    ("/v1/conversations", "CreateConversationBody"),
    ("/v1/batches", "CreateBatchRequest"),
    ("/v1/fine_tuning/jobs", "CreateFineTuningJobRequest"),
    ("/v1/fine_tuning/alpha/graders/run", "RunGraderRequest"),
    ("/v1/fine_tuning/alpha/graders/validate", "ValidateGraderRequest"),
    ("/v1/rerank", "Rerank"),
)
# What of the published document is not served, by how its paths begin, and why.
NOT_SERVED = {
    "/assistants, /threads": "deprecated; `/v1/responses` and `/v1/conversations` do what they did",
    "/audio, /images, /videos, /realtime": "the models here read and write text",
    "/vector_stores, /evals, /containers, /skills, /chatkit": "products of their own beside the models",
    "/uploads": "an upload is one request here, up to 512 MiB",
    "/organization, /projects": "`fledge keys` says who may do what",
    "/content_provenance_checks": "a service of the publisher's own",
}


def table(name: str) -> str:
    rows = [f"| `{rule.name}` | {rule.state} | {rule.note} |" for rule in TABLES[name][0]]
    return "\n".join(["| field | | |", "|---|---|---|", *rows])


def endpoints() -> str:
    """Every route, a path a row, in the order of the app."""
    methods: dict[str, list[str]] = {}
    for router in ROUTERS:
        for route in router.routes:
            path, found = route.path, route.methods  # type: ignore[attr-defined]
            methods.setdefault(path.replace(":path}", "}"), []).extend(sorted(found))
    rows = [f"| `{path}` | {', '.join(found)} |" for path, found in methods.items()]
    return "\n".join(["| endpoint | methods |", "|---|---|", *rows])


def not_served() -> str:
    rows = [f"| {', '.join(f'`{path}`' for path in paths.split(', '))} | {why} |" for paths, why in NOT_SERVED.items()]
    return "\n".join(["| published | why it is not served |", "|---|---|", *rows])


def published(name: str) -> set[str]:
    if not DOCUMENT.is_file():
        pytest.skip(f"the published document is not at {DOCUMENT}")
    schemas = json.loads(DOCUMENT.read_text(encoding="utf-8"))["components"]["schemas"]
    if name not in schemas:
        return set()

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


def test_the_page_shows_every_endpoint_and_what_is_not_served() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert f"## Endpoints\n\n{endpoints()}\n" in page
    assert f"\n{not_served()}\n" in page


def test_every_published_path_is_served_or_said_not_to_be() -> None:
    if not DOCUMENT.is_file():
        pytest.skip(f"the published document is not at {DOCUMENT}")
    served = {row.split("`")[1] for row in endpoints().splitlines()[2:]}
    starts = tuple(start for paths in NOT_SERVED for start in paths.split(", "))
    for path in json.loads(DOCUMENT.read_text(encoding="utf-8"))["paths"]:
        plain = path.partition("?")[0]
        assert f"/v1{plain}" in served or plain.startswith(starts), path
