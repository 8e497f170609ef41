"""The rows that the tests of OpenAI's own client ask for, and how they are put back before each test.

Those tests were written against a mock that answers anything; they name models, files and responses. Here these are
aliases and rows of an ordinary database, and nothing in fledge knows them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete

from fledge.serve.chat_answer import Delta
from fledge.store.blobs import Blobs
from fledge.store.database import Database
from fledge.store.keys import KeyRequest, create_key
from fledge.store.tables import (
    Base,
    BatchRow,
    CompletionRow,
    ConversationItemRow,
    ConversationRow,
    FileRow,
    ModelRow,
    PermissionRow,
    ResponseRow,
    TuningCheckpointRow,
    TuningEventRow,
    TuningJobRow,
)

KEY, OWNER = "My API Key", "conformance"
ALIASES = (
    *("gpt-6-astra", "gpt-4o-mini", "gpt-3.5-turbo-instruct", "text-embedding-3-small", "model"),
    "omni-moderation-2024-09-26",
)
MODERATOR = "model"
WHEN = 1_700_000_000


async def restore(database: Database, blobs: Blobs) -> None:
    """Empty every table and fill it with the seeds."""
    digest = blobs.put(b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    async with database.writing() as session:
        for table in reversed(Base.metadata.sorted_tables):
            await session.execute(delete(table))
        session.add_all([*_models(), *_files(digest), *_completions(), *_responses(), *_jobs(), *_batches()])
        session.add(ConversationRow(id="conv_123", created_at=WHEN, owner=OWNER, labels={"foo": "string"}))
        await session.flush()  # what these refer to must be there
        session.add_all([*_job_parts(), *_permissions(), *_conversation_items()])
    await create_key(database, KeyRequest(OWNER), KEY)


def _models() -> list[Base]:
    names = ("ft:gpt-4o-mini:acemeco:suffix:abc123", *SHARED)
    return [ModelRow(id=name, created_at=WHEN, owner=OWNER, owned_by=OWNER, path="tuned") for name in names]


def _files(digest: str) -> list[Base]:
    about: dict[str, Any] = {
        "created_at": WHEN,
        "owner": OWNER,
        "filename": "a.jsonl",
        "bytes": 88,
        "sha256": digest,
    }
    purposes = {"file_id": "fine-tune", "file-abc123": "fine-tune", "after": "batch", "input_file_id": "batch"}
    return [FileRow(id=name, purpose=purpose, status="processed", **about) for name, purpose in purposes.items()]


def _completions() -> list[Base]:
    return [_completion("completion_id", "gpt-6-astra"), _completion("after", "model")]


def _completion(name: str, model: str) -> CompletionRow:
    said: Delta = {"role": "assistant", "content": "b", "refusal": None}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": "stop"}
    body = {"id": name, "object": "chat.completion", "created": WHEN, "model": model, "choices": [choice]}
    body |= {"service_tier": "default", "system_fingerprint": "fp_0"}
    body |= {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
    messages = [
        {"id": "after", "role": "assistant", "content": "a"},
        {"id": "next", "role": "assistant", "content": "b"},
    ]
    labels = {"foo": "string"}
    return CompletionRow(
        id=name, created_at=WHEN, owner=OWNER, model=model, labels=labels, messages=messages, body=body
    )


def _responses() -> list[Base]:
    names = ("resp_677efb5139a88190b512bc3fef8e535d", "response_id", "previous_response_id", "resp_123")
    return [_response(name) for name in names]


def _response(name: str) -> ResponseRow:
    part = {"type": "output_text", "text": "b", "annotations": [], "logprobs": []}
    said = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [part]}
    asked = {
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": [{"type": "input_text", "text": "a"}],
    }
    settings = {
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "temperature": 1.0,
        "top_p": 1.0,
    }
    body = {
        "id": name,
        "object": "response",
        "created_at": WHEN,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": "gpt-6-astra",
        **settings,
        "output": [said],
    }
    inputs = [{"id": "after", **asked}, {"id": "next", **asked}]
    return ResponseRow(
        id=name,
        created_at=WHEN,
        owner=OWNER,
        status="completed",
        is_background=True,
        inputs=inputs,
        body=body,
    )


JOB = "ft-AF1WoRqd3aJAHsqc9NY7iL8F"
# The models whose permissions the tests ask for; one is called as a job is elsewhere.
SHARED = ("ft:gpt-4o-mini-2024-07-18:org:weather:B7R9VjQd", JOB)


def _jobs() -> list[Base]:
    files: dict[str, Any] = {"training_file": "file-abc123", "validation_file": None, "result_files": []}
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}}
    about = {"owner": OWNER, "status": "running", "model": "gpt-4o-mini", "seed": 1, "method": method, **files}
    return [TuningJobRow(id=name, created_at=WHEN, labels={"foo": "string"}, **about) for name in ("after", JOB)]


def _job_parts() -> list[Base]:
    event = {"level": "info", "type": "message", "message": "a", "data": {}}
    checkpoint = {"model": "ft:a", "step_number": 1, "metrics": {"step": 1.0, "train_loss": 1.0}}
    names = ("after", "next")
    rows: list[Base] = [TuningEventRow(id=f"{name}", created_at=WHEN, job_id=JOB, **event) for name in names]
    return rows + [TuningCheckpointRow(id=f"{name}", created_at=WHEN, job_id=JOB, **checkpoint) for name in names]


def _batches() -> list[Base]:
    """Running, by a server that is not this one."""
    about: dict[str, Any] = {"owner": OWNER, "endpoint": "/v1/responses", "input_file_id": "input_file_id"}
    about |= {"completion_window": "24h", "status": "in_progress", "worker": "another", "leased_until": 2**40}
    about |= {"times": {"in_progress_at": WHEN}, "counts": {"total": 2, "completed": 1, "failed": 0}, "extra": {}}
    return [BatchRow(id=name, created_at=WHEN, **about) for name in ("after", "batch_id")]


def _permissions() -> list[Base]:
    names = {"after": SHARED[1], "cp_zc4Q7MP6XxulcVzj4MZdwsAB": SHARED[0]}
    return [
        PermissionRow(id=name, created_at=WHEN, owner=OWNER, model=model, project_id="project_id")
        for name, model in names.items()
    ]


def _conversation_items() -> list[Base]:
    part = {"type": "input_text", "text": "a"}
    said = {"type": "message", "status": "completed", "role": "user", "content": [part]}
    return [
        ConversationItemRow(
            id=f"conv_123/{name}", created_at=WHEN, conversation_id="conv_123", body={"id": name, **said}
        )
        for name in ("after", "msg_abc")
    ]
