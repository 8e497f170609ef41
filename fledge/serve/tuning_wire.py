"""The wire types of /v1/fine_tuning, and what becomes of each field.

Source: openapi 2.3.0, `CreateFineTuningJobRequest`, `FineTuningJob`, `FineTuningJobEvent`, `FineTuningJobCheckpoint`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from fledge.serve.wire import Answer, FieldRule, Metadata, Name, Wire
from fledge.store.tables import TuningCheckpointRow, TuningEventRow, TuningJobRow

Auto = Literal["auto"]
BatchSize = Annotated[int, Field(ge=1, le=256)] | Auto
Epochs = Annotated[int, Field(ge=1, le=50)] | Auto
Multiplier = Annotated[float, Field(gt=0, le=1000)] | Auto
Count = Annotated[int, Field(ge=1, lt=2**31)] | Auto
METHODS = ("supervised", "dpo", "reinforcement")


class Hyperparameters(Wire):
    batch_size: BatchSize = "auto"
    learning_rate_multiplier: Multiplier = "auto"
    n_epochs: Epochs = "auto"


class DPOHyperparameters(Hyperparameters):
    beta: Annotated[float, Field(gt=0, le=2)] | Auto = "auto"


class ReinforcementHyperparameters(Hyperparameters):
    reasoning_effort: Literal["default", "low", "medium", "high"] = "default"
    compute_multiplier: Annotated[float, Field(gt=0.00001, le=10)] | Auto = "auto"
    eval_interval: Count = "auto"
    eval_samples: Count = "auto"


class SupervisedMethod(Wire):
    hyperparameters: Hyperparameters | None = None


class DPOMethod(Wire):
    hyperparameters: DPOHyperparameters | None = None


class ReinforcementMethod(Wire):
    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters | None = None


class Method(Wire):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedMethod | None = None
    dpo: DPOMethod | None = None
    reinforcement: ReinforcementMethod | None = None


class WandB(Wire):
    project: Annotated[str, StringConstraints(max_length=256)]
    name: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class Integration(Wire):
    type: Literal["wandb"]
    wandb: WandB


class TuningRequest(Wire):
    model: Name
    training_file: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    validation_file: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]*$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    metadata: Metadata | None = None


TUNING_FIELDS = (
    FieldRule("model", "honoured", "any model that is served and trains: a run, an import, a result of fine-tuning"),
    FieldRule("training_file", "honoured", "chats, preferences, or prompts with what the grader asks for; 10 at least"),
    FieldRule("validation_file", "honoured", "without one a part of the training file is held out"),
    FieldRule("suffix", "honoured", "part of the result's name"),
    FieldRule("seed", "honoured", "the same job with the same seed gives the same weights, bit for bit"),
    FieldRule(
        "method", "honoured", "of `reinforcement`, `reasoning_effort`, `eval_interval`, `eval_samples` are inert"
    ),
    FieldRule("hyperparameters", "honoured", "the deprecated place; `method` goes before it"),
    FieldRule("integrations", "inert", "the server reaches no network; metrics are in the events and the result file"),
    FieldRule("metadata", "honoured", ""),
)


class TuningJob(Answer):
    """`paused` is an extension: the published states have none for a job that waits to be resumed."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    error: dict[str, Any] | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str]
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    integrations: list[dict[str, Any]] | None
    seed: int
    estimated_finish: int | None
    method: dict[str, Any]
    metadata: dict[str, str] | None
    paused: bool


class TuningEvent(Answer):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class TuningCheckpoint(Answer):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class TuningJobs(Answer):
    object: Literal["list"]
    data: list[TuningJob]
    has_more: bool


class TuningEvents(Answer):
    object: Literal["list"]
    data: list[TuningEvent]
    has_more: bool


class TuningCheckpoints(Answer):
    object: Literal["list"]
    data: list[TuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


def resolved(body: TuningRequest) -> dict[str, Any]:
    """The method of a job, with every number of its type either given or "auto"."""
    method = body.method or Method(type="supervised")
    given: Any = getattr(method, method.type)
    kinds: dict[str, type[Hyperparameters]] = {
        "supervised": Hyperparameters,
        "dpo": DPOHyperparameters,
        "reinforcement": ReinforcementHyperparameters,
    }
    numbers = given.hyperparameters if given is not None else None
    if numbers is None and body.hyperparameters is not None:
        numbers = kinds[method.type](**body.hyperparameters.model_dump())
    found: dict[str, Any] = {"hyperparameters": (numbers or kinds[method.type]()).model_dump()}
    if isinstance(given, ReinforcementMethod):
        found["grader"] = given.grader
    return {"type": method.type, method.type: found}


def show_job(row: TuningJobRow) -> dict[str, Any]:
    kind = row.method["type"]
    numbers = row.method[kind].get("hyperparameters") or {}
    shared = ("batch_size", "learning_rate_multiplier", "n_epochs")
    return {
        "id": row.id,
        "object": "fine_tuning.job",
        "created_at": row.created_at,
        "error": row.error,
        "fine_tuned_model": row.fine_tuned_model,
        "finished_at": row.finished_at,
        "hyperparameters": {name: numbers.get(name, "auto") for name in shared},
        "model": row.model,
        "organization_id": row.owner,
        "result_files": row.result_files,
        "status": "queued" if row.status == "paused" else row.status,
        "trained_tokens": row.trained_tokens,
        "training_file": row.training_file,
        "validation_file": row.validation_file,
        "integrations": row.integrations,
        "seed": row.seed,
        "estimated_finish": row.estimated_finish,
        "method": row.method,
        "metadata": row.labels,
        "paused": row.status == "paused" or row.wanted == "pause",
    }


def show_event(row: TuningEventRow) -> dict[str, Any]:
    shown = {"id": row.id, "object": "fine_tuning.job.event", "created_at": row.created_at}
    return {**shown, "level": row.level, "message": row.message, "type": row.type, "data": row.data}


def show_checkpoint(row: TuningCheckpointRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": row.created_at,
        "fine_tuned_model_checkpoint": row.model,
        "fine_tuning_job_id": row.job_id,
        "step_number": row.step_number,
        "metrics": row.metrics,
    }
