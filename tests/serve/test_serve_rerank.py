"""/v1/rerank: order, shape, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serve_fakes import FakeEngine, FakeStream, Server, serving, tokenizer

from fledge.store.keys import KeyRequest, create_key
from fledge.types import Request, TokenEvent, TokenLogprobs

pytestmark = pytest.mark.anyio
DOCUMENTS = ["rain and snow", "the lazy dog jumps", "a quick fox"]


class ReadingStream(FakeStream):
    """Finds a query likelier the more of its tokens stand in the prompt before it."""

    def _event(self, *given: Any) -> TokenEvent:
        event: TokenEvent = super()._event(*given)
        ids = self._request.prompt_ids
        told = [TokenLogprobs(-0.1 if ids[i] in ids[:i] else -5.0, 1, ()) for i in range(1, len(ids))]
        return replace(event, prompt=tuple(told) if event.prompt else ())


class ReadingEngine(FakeEngine):
    def submit(self, request: Request) -> FakeStream:
        return ReadingStream(self, request)


async def rank(client: httpx2.AsyncClient, path: str = "/v1/rerank", **others: Any) -> dict[str, Any]:
    body = {"model": "fake", "query": "lazy dog", "documents": DOCUMENTS, **others}
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_the_document_that_explains_the_query_comes_first(tmp_path: Path) -> None:
    async with serving(tmp_path, engine=ReadingEngine()) as server, server.client() as client:
        found = await rank(client)
        assert found["results"][0]["index"] == 1
        assert found["results"][0]["document"] == {"text": DOCUMENTS[1]}
        scores = [one["relevance_score"] for one in found["results"]]
        assert scores == sorted(scores, reverse=True)
        assert all(0 < score <= 1 for score in scores)
        assert found["usage"]["total_tokens"] == sum(len(one.prompt_ids) for one in server.engine.requests)
        for path in ("/rerank", "/v2/rerank"):
            assert (await rank(client, path))["results"] == found["results"]
        top = await rank(client, top_n=1, return_documents=False)
        assert top["results"] == [{"index": 1, "relevance_score": scores[0]}]
        assert len((await rank(client, documents=[{"text": "a"}, "b"]))["results"]) == 2


async def test_long_documents_are_cut_and_a_long_query_is_refused(client: httpx2.AsyncClient, server: Server) -> None:
    long = "fox " * 5000
    await rank(client, documents=[long])
    assert len(server.engine.requests[-1].prompt_ids) < 4096
    await rank(client, documents=[long], max_tokens_per_doc=5)
    query = tokenizer().encode("lazy dog")
    assert len(server.engine.requests[-1].prompt_ids) == 1 + 5 + len(query)
    answer = await client.post("/v1/rerank", json={"model": "fake", "query": long, "documents": ["a"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    "wrong", [{"documents": []}, {"documents": ["a"] * 1001}, {"query": ""}, {"top_n": -1}, {"model": "nope"}, {"x": 1}]
)
async def test_what_cannot_be_ranked_is_refused(client: httpx2.AsyncClient, wrong: dict[str, Any]) -> None:
    answer = await client.post("/v1/rerank", json={"model": "fake", "query": "q", "documents": ["a"], **wrong})
    assert answer.status_code in (400, 404)


async def test_ranking_costs_the_keys_budget(server: Server) -> None:
    request = KeyRequest("carol", tokens_per_minute=60)
    server.keys["carol"], _ = await create_key(server.state.database, request)
    documents: Sequence[str] = ["the lazy dog jumps over the quick fox"] * 20
    async with server.client("carol") as carol:
        answer = await carol.post("/v1/rerank", json={"model": "fake", "query": "dog", "documents": documents})
        assert answer.status_code == 429
