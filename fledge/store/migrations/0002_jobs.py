"""What running jobs need: leases of batches and their finished lines, where a tuning job begins; permissions and
conversations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("batches", sa.Column("worker", sa.String(length=64), nullable=True))
    op.add_column("batches", sa.Column("leased_until", sa.BigInteger(), nullable=True))
    op.add_column("tuning_jobs", sa.Column("base_path", sa.Text(), nullable=True))
    _batch_lines()
    _model_permissions()
    _conversations()
    _conversation_items()


def _listed() -> tuple[sa.Column[int], sa.Column[str], sa.Column[int]]:
    return (
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
    )


def _batch_lines() -> None:
    op.create_table(
        "batch_lines",
        sa.Column("batch_id", sa.String(length=255), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("is_error", sa.Boolean(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_batch_lines_batch_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("batch_id", "number", name=op.f("pk_batch_lines")),
    )


def _model_permissions() -> None:
    op.create_table(
        "model_permissions",
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("model", sa.String(length=255), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        *_listed(),
        sa.ForeignKeyConstraint(["model"], ["models.id"], name=op.f("fk_model_permissions_model"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_model_permissions")),
        sa.UniqueConstraint("id", name=op.f("uq_model_permissions_id")),
    )
    op.create_index("ix_model_permissions_page", "model_permissions", ["owner", "seq"], unique=False)
    op.create_index(op.f("ix_model_permissions_model"), "model_permissions", ["model"], unique=False)
    op.create_index(op.f("ix_model_permissions_project_id"), "model_permissions", ["project_id"], unique=False)


def _conversations() -> None:
    op.create_table(
        "conversations",
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("labels", sa.JSON(none_as_null=True), nullable=True),
        *_listed(),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_conversations")),
        sa.UniqueConstraint("id", name=op.f("uq_conversations_id")),
    )
    op.create_index("ix_conversations_page", "conversations", ["owner", "seq"], unique=False)


def _conversation_items() -> None:
    op.create_table(
        "conversation_items",
        sa.Column("conversation_id", sa.String(length=255), nullable=False),
        sa.Column("body", sa.JSON(none_as_null=True), nullable=False),
        *_listed(),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name=op.f("fk_conversation_items_conversation_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_conversation_items")),
        sa.UniqueConstraint("id", name=op.f("uq_conversation_items_id")),
    )
    op.create_index(
        op.f("ix_conversation_items_conversation_id"), "conversation_items", ["conversation_id"], unique=False
    )
