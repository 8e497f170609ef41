"""The tables of the store, as SQLAlchemy maps them. Layer 2, no torch.

Every row that a user owns carries its `owner`, and every query in this folder asks for (owner, id) at once, so that
somebody else's row and a missing one are the same. `seq` orders a table's rows and is never shown. Times are Unix
seconds. The columns that the published API shows are named as it names them (openapi 2.3.0).
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Names of constraints are the same in every database, so that a migration can name them.
_NAMES = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
_NAMES["fk"] = "fk_%(table_name)s_%(column_0_N_name)s"
Sequence = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only in a column of type INTEGER
Json = dict[str, Any]
_JSON = JSON(none_as_null=True)


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        int: BigInteger(),
        Json: _JSON,
        list[Any]: _JSON,
        list[str]: _JSON,
    }


class Listed:
    """What every table has whose rows are listed page by page."""

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(255), unique=True)
    created_at: Mapped[int]


class Owned(Listed):
    """What every table has whose rows a user owns."""

    owner: Mapped[str] = mapped_column(String(255))


class Labelled(Owned):
    """Rows that carry their owner's metadata."""

    labels: Mapped[Json | None]


class KeyRow(Listed, Base):
    """An API key. The key itself is shown once and kept as `hash`, its SHA-256; `hint` is how it ends."""

    __tablename__ = "keys"
    owner: Mapped[str] = mapped_column(String(255), index=True)
    name: Mapped[str] = mapped_column(String(255))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(8))
    scopes: Mapped[list[str]]
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    revoked_at: Mapped[int | None]


class ModelRow(Listed, Base):
    """A model by name: an alias of another (`target`), or a checkpoint (`path`). `owner` None: everybody's."""

    __tablename__ = "models"
    owner: Mapped[str | None] = mapped_column(String(255), index=True)
    owned_by: Mapped[str] = mapped_column(String(255))
    target: Mapped[str | None] = mapped_column(String(255))
    path: Mapped[str | None] = mapped_column(Text)
    job_id: Mapped[str | None] = mapped_column(String(255))


class FileRow(Owned, Base):
    """An uploaded or produced file; its content lies in the blobs under its SHA-256."""

    __tablename__ = "files"
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    expires_at: Mapped[int | None]
    status: Mapped[str] = mapped_column(String(32), default="processed")


class BatchRow(Labelled, Base):
    """A batch of requests. `times` maps a state to when it was reached, `counts` total, completed and failed; `worker`
    is the server that runs it, until its lease runs out."""

    __tablename__ = "batches"
    endpoint: Mapped[str] = mapped_column(String(255))
    input_file_id: Mapped[str] = mapped_column(String(255))
    completion_window: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(32), index=True)
    expires_at: Mapped[int | None]
    output_file_id: Mapped[str | None] = mapped_column(String(255))
    error_file_id: Mapped[str | None] = mapped_column(String(255))
    times: Mapped[Json]
    counts: Mapped[Json]
    errors: Mapped[Json | None]
    extra: Mapped[Json]
    worker: Mapped[str | None] = mapped_column(String(64))
    leased_until: Mapped[int | None]


class BatchLineRow(Base):
    """The answer to line `number`, from 0, of a batch's input; once it is here it is final."""

    __tablename__ = "batch_lines"
    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger(), primary_key=True)
    is_error: Mapped[bool]
    data: Mapped[str] = mapped_column(Text)


class TuningJobRow(Labelled, Base):
    """A fine-tuning job. `wanted` is what its owner asks of the worker ("cancel", "pause"); the worker that has it
    says so in `worker` and renews `leased_until`, so that another takes over what a dead one left. `base_path` is the
    checkpoint that `model` led to when the job was made."""

    __tablename__ = "tuning_jobs"
    status: Mapped[str] = mapped_column(String(32), index=True)
    model: Mapped[str] = mapped_column(String(255))
    base_path: Mapped[str | None] = mapped_column(Text)
    training_file: Mapped[str] = mapped_column(String(255))
    validation_file: Mapped[str | None] = mapped_column(String(255))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int]
    method: Mapped[Json]
    integrations: Mapped[list[Any] | None]
    fine_tuned_model: Mapped[str | None] = mapped_column(String(255))
    result_files: Mapped[list[str]]
    trained_tokens: Mapped[int | None]
    error: Mapped[Json | None]
    estimated_finish: Mapped[int | None]
    finished_at: Mapped[int | None]
    wanted: Mapped[str | None] = mapped_column(String(16))
    worker: Mapped[str | None] = mapped_column(String(64))
    leased_until: Mapped[int | None]


class TuningEventRow(Listed, Base):
    __tablename__ = "tuning_events"
    job_id: Mapped[str] = mapped_column(ForeignKey("tuning_jobs.id", ondelete="CASCADE"), index=True)
    level: Mapped[str] = mapped_column(String(16))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[Json]


class TuningCheckpointRow(Listed, Base):
    __tablename__ = "tuning_checkpoints"
    job_id: Mapped[str] = mapped_column(ForeignKey("tuning_jobs.id", ondelete="CASCADE"), index=True)
    model: Mapped[str] = mapped_column(String(255))
    step_number: Mapped[int]
    metrics: Mapped[Json]
    path: Mapped[str | None] = mapped_column(Text)


class PermissionRow(Owned, Base):
    """`project_id`, another owner, may use the model `model` of `owner`."""

    __tablename__ = "model_permissions"
    model: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"), index=True)
    project_id: Mapped[str] = mapped_column(String(255), index=True)


class ConversationRow(Labelled, Base):
    __tablename__ = "conversations"


class ConversationItemRow(Listed, Base):
    """What was said in a conversation, in the order of `seq`; `id` is CONVERSATION/ITEM (conversations.py)."""

    __tablename__ = "conversation_items"
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"), index=True)
    body: Mapped[Json]


class CompletionRow(Labelled, Base):
    """A stored chat completion: `body` as it was answered, `messages` as they were asked, each with an id."""

    __tablename__ = "completions"
    model: Mapped[str] = mapped_column(String(255))
    messages: Mapped[list[Any]]
    body: Mapped[Json]


class ResponseRow(Owned, Base):
    """A response of `/v1/responses`. `inputs` are its own input items, each with an id; what came before them is
    found through `previous_id`."""

    __tablename__ = "responses"
    status: Mapped[str] = mapped_column(String(32))
    previous_id: Mapped[str | None] = mapped_column(String(255))
    is_background: Mapped[bool]
    inputs: Mapped[list[Any]]
    body: Mapped[Json]


class JobRow(Owned, Base):
    """A generation that goes on without its client. `touched_at` is renewed while the server that runs it lives."""

    __tablename__ = "jobs"
    owner: Mapped[str] = mapped_column(String(255), index=True)
    kind: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16), index=True)
    touched_at: Mapped[int]
    finished_at: Mapped[int | None]
    is_cancel_wanted: Mapped[bool]
    error: Mapped[Json | None]


class JobEventRow(Base):
    """Event `number`, from 0, of a job: the JSON that its stream sends."""

    __tablename__ = "job_events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger(), primary_key=True)
    data: Mapped[str] = mapped_column(Text)


_LISTED_BY_OWNER = (FileRow, BatchRow, TuningJobRow, PermissionRow, ConversationRow, CompletionRow, ResponseRow)
OWNER_INDEXES = tuple(Index(f"ix_{row.__tablename__}_page", row.owner, row.seq) for row in _LISTED_BY_OWNER)
