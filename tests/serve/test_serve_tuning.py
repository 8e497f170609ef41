"""/v1/fine_tuning as its users see it; the worker that runs the jobs is under test in tests/recipes."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from serve_fakes import Server

from fledge.store import tuning
from fledge.store.database import Database
from fledge.store.models import register_model
from fledge.store.pages import now
from fledge.store.tables import ModelRow, TuningCheckpointRow

pytestmark = pytest.mark.anyio
JOBS = "/v1/fine_tuning/jobs"
GRADERS = "/v1/fine_tuning/alpha/graders"
EQ = {
    "type": "string_check",
    "name": "same",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
}


async def upload(client: httpx2.AsyncClient, purpose: str = "fine-tune") -> str:
    made = await client.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": purpose})
    found: str = made.json()["id"]
    return found


async def begin(client: httpx2.AsyncClient, **others: Any) -> dict[str, Any]:
    answer = await client.post(JOBS, json={"model": "fake", "training_file": await upload(client), **others})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_job_is_made_as_published_and_listed_by_its_metadata(client: httpx2.AsyncClient) -> None:
    numbers = {"n_epochs": 3, "batch_size": "auto"}
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5, **numbers}}}
    job = await begin(client, method=method, suffix="mine", seed=7, metadata={"a": "b"})
    assert (job["object"], job["status"], job["seed"]) == ("fine_tuning.job", "validating_files", 7)
    assert job["hyperparameters"] == {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.5
    other = await begin(client, hyperparameters={"n_epochs": 2})
    assert other["method"]["supervised"]["hyperparameters"]["n_epochs"] == 2
    listed = (await client.get(JOBS)).json()
    assert [one["id"] for one in listed["data"]] == [other["id"], job["id"]]
    chosen = (await client.get(f"{JOBS}?metadata[a]=b")).json()
    assert [one["id"] for one in chosen["data"]] == [job["id"]]
    assert (await client.get(f"{JOBS}/{job['id']}")).json() == job
    events = (await client.get(f"{JOBS}/{job['id']}/events")).json()
    assert events["data"][0]["object"] == "fine_tuning.job.event"


@pytest.mark.parametrize(
    ("wrong", "param", "status"),
    [
        ({"model": "nope"}, "model", 404),
        ({"training_file": "file-nope"}, "training_file", 404),
        ({"validation_file": "file-nope"}, "validation_file", 404),
        ({"suffix": ""}, "suffix", 400),
        ({"seed": -1}, "seed", 400),
        ({"seed": 2**31}, "seed", 400),
        ({"method": {"type": "magic"}}, "method.type", 400),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement.grader", 400),
        (
            {"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "score_model"}}}},
            "method.reinforcement.grader",
            400,
        ),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", 400),
        ({"nope": 1}, "nope", 400),
    ],
)
async def test_what_cannot_be_trained_is_refused_by_name(
    client: httpx2.AsyncClient, wrong: dict[str, Any], param: str, status: int
) -> None:
    body = {"model": "fake", "training_file": await upload(client), **wrong}
    answer = await client.post(JOBS, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


async def test_a_file_for_something_else_does_not_train(client: httpx2.AsyncClient) -> None:
    answer = await client.post(JOBS, json={"model": "fake", "training_file": await upload(client, "batch")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_file_purpose")


async def test_inert_fields_are_named_in_a_header(client: httpx2.AsyncClient) -> None:
    integrations = [{"type": "wandb", "wandb": {"project": "p"}}]
    reinforcement = {"grader": EQ, "hyperparameters": {"eval_interval": 3, "n_epochs": 1}}
    body = {"model": "fake", "training_file": await upload(client), "integrations": integrations}
    body["method"] = {"type": "reinforcement", "reinforcement": reinforcement}
    answer = await client.post(JOBS, json=body)
    assert answer.status_code == 200, answer.text
    place = "method.reinforcement.hyperparameters.eval_interval"
    assert answer.headers["x-fledge-inert"] == f"integrations, {place}"
    assert answer.json()["integrations"] == integrations, "more is told than was asked"


async def test_a_waiting_job_is_paused_resumed_and_cancelled_at_once(client: httpx2.AsyncClient) -> None:
    job = (await begin(client))["id"]
    paused = (await client.post(f"{JOBS}/{job}/pause")).json()
    assert (paused["status"], paused["paused"]) == ("queued", True)
    resumed = (await client.post(f"{JOBS}/{job}/resume")).json()
    assert (resumed["status"], resumed["paused"]) == ("validating_files", False)
    assert (await client.post(f"{JOBS}/{job}/cancel")).json()["status"] == "cancelled"
    for what in ("cancel", "pause", "resume"):
        again = await client.post(f"{JOBS}/{job}/{what}")
        assert (again.status_code, again.json()["error"]["code"]) == (400, "invalid_job_status")


async def running(client: httpx2.AsyncClient, database: Database) -> str:
    """The id of a new job that the worker "w" has taken."""
    job: str = (await begin(client))["id"]
    await tuning.settle_check(database, job, None)
    await tuning.lease_job(database, "w")
    return job


async def test_a_running_job_is_asked_and_obeys_later(client: httpx2.AsyncClient, server: Server) -> None:
    database = server.state.database
    job = await running(client, database)
    asked = (await client.post(f"{JOBS}/{job}/pause")).json()
    assert (asked["status"], asked["paused"]) == ("running", True)
    assert await tuning.look_at_job(database, job, "w") == (True, "pause")
    assert not (await client.post(f"{JOBS}/{job}/resume")).json()["paused"]
    assert (await client.post(f"{JOBS}/{job}/cancel")).json()["status"] == "running"
    assert await tuning.look_at_job(database, job, "w") == (True, "cancel")


async def test_a_job_that_is_to_be_cancelled_is_not_called_back(client: httpx2.AsyncClient, server: Server) -> None:
    database = server.state.database
    job = await running(client, database)
    await client.post(f"{JOBS}/{job}/cancel")
    for what in ("pause", "resume"):
        answer = await client.post(f"{JOBS}/{job}/{what}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_job_status")
    assert (await client.post(f"{JOBS}/{job}/cancel")).status_code == 200
    assert await tuning.look_at_job(database, job, "w") == (True, "cancel")


async def test_a_pause_that_its_dead_worker_never_saw_is_taken_back(client: httpx2.AsyncClient, server: Server) -> None:
    database = server.state.database
    job = await running(client, database)
    await client.post(f"{JOBS}/{job}/pause")
    await tuning.release_jobs(database, "w")
    assert not (await client.post(f"{JOBS}/{job}/resume")).json()["paused"]
    await tuning.lease_job(database, "v")
    assert await tuning.look_at_job(database, job, "v") == (True, None)


async def test_checkpoints_answer_under_their_names_and_are_shared_by_permission(
    client: httpx2.AsyncClient, server: Server
) -> None:
    job = (await begin(client))["id"]
    row = TuningCheckpointRow(id="c1", created_at=now(), job_id=job, model="ft:fake:x", step_number=4)
    row.metrics = {"step": 4.0, "train_loss": 1.5}
    model = ModelRow(id="ft:fake:x", created_at=now(), owner="alice", owned_by="alice", path="tuned")
    await tuning.add_tuning_checkpoint(server.state.database, row, model)
    listed = (await client.get(f"{JOBS}/{job}/checkpoints")).json()["data"]
    assert [(one["fine_tuned_model_checkpoint"], one["step_number"]) for one in listed] == [("ft:fake:x", 4)]
    hello = {"model": "ft:fake:x", "messages": [{"role": "user", "content": "Hi"}]}
    assert (await client.post("/v1/chat/completions", json=hello)).status_code == 200
    place = "/v1/fine_tuning/checkpoints/ft:fake:x/permissions"
    async with server.client("bob") as bob:
        assert (await bob.post("/v1/chat/completions", json=hello)).status_code == 404
        granted = (await client.post(place, json={"project_ids": ["bob"]})).json()
        assert (await bob.post("/v1/chat/completions", json=hello)).status_code == 200
        assert (await bob.get(place)).status_code == 404
        assert (await bob.delete("/v1/models/ft:fake:x")).status_code == 403
        listed = (await client.get(place)).json()
        assert [one["project_id"] for one in listed["data"]] == ["bob"]
        gone = await client.delete(f"{place}/{granted['data'][0]['id']}")
        assert gone.json() == {"id": granted["data"][0]["id"], "object": "checkpoint.permission", "deleted": True}
        assert (await client.delete(f"{place}/{granted['data'][0]['id']}")).status_code == 404
        assert (await bob.post("/v1/chat/completions", json=hello)).status_code == 404


async def test_a_key_without_the_scope_trains_nothing(server: Server) -> None:
    from fledge.store.keys import KeyRequest, create_key

    server.keys["carol"], _ = await create_key(server.state.database, KeyRequest("carol", scopes=("generate",)))
    async with server.client("carol") as carol:
        assert (await carol.get(JOBS)).status_code == 403
        assert (await carol.post(f"{GRADERS}/validate", json={"grader": EQ})).status_code == 403


async def test_graders_are_validated_and_run(client: httpx2.AsyncClient) -> None:
    assert (await client.post(f"{GRADERS}/validate", json={"grader": EQ})).json() == {"grader": EQ}
    source = "def grade(sample, item):\n    return 2.0 if sample['output_text'] == item['answer'] else 1 / 0"
    python = {"type": "python", "name": "p", "source": source}
    multi = {"type": "multi", "name": "m", "graders": {"a": EQ, "b": python}, "calculate_output": "a + b"}
    body = {"grader": multi, "model_sample": "x", "item": {"answer": "x"}}
    found = (await client.post(f"{GRADERS}/run", json=body)).json()
    assert (found["reward"], found["sub_rewards"]) == (3.0, {"a": 1.0, "b": 2.0})
    assert not any(found["metadata"]["errors"].values())
    failed = (await client.post(f"{GRADERS}/run", json={**body, "model_sample": "y"})).json()
    assert (failed["reward"], failed["metadata"]["errors"]["python_grader_runtime_error"]) == (0.0, True)
    assert "ZeroDivisionError" in failed["metadata"]["errors"]["python_grader_runtime_error_details"]
    missing = (await client.post(f"{GRADERS}/run", json={"grader": EQ, "model_sample": "y"})).json()
    assert missing["metadata"]["errors"]["invalid_variable_error"]
    bad = await client.post(f"{GRADERS}/validate", json={"grader": {**python, "source": "def grade(:"}})
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_grader")


async def test_a_model_that_was_registered_since_is_served_without_a_restart(
    client: httpx2.AsyncClient, server: Server
) -> None:
    await register_model(server.state.database, "ft:new", owner="alice", path="tuned")
    assert (await client.get("/v1/models/ft:new")).status_code == 200
