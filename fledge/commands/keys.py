"""`fledge keys create | list | revoke`: who may use the server, and how much."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from fledge.commands.serving import database_url
from fledge.errors import UserError
from fledge.store.database import Database
from fledge.store.keys import SCOPES, KeyRequest, create_key, list_keys, revoke_key
from fledge.store.tables import KeyRow

ResultT = TypeVar("ResultT")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("keys", help="who may use the server")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a key and show it, once")
    create.add_argument("--owner", default="local", help="whose files, jobs and answers it sees (default: %(default)s)")
    create.add_argument("--name", default="default", help="to tell keys apart (default: %(default)s)")
    create.add_argument("--scopes", default="all", help=f"with commas between: {', '.join(SCOPES)} (default: all)")
    create.add_argument("--requests-per-minute", type=int, help="(default: no limit)")
    create.add_argument("--tokens-per-minute", type=int, help="(default: no limit)")
    create.set_defaults(run=run_create)
    actions.add_parser("list", help="all keys, without what only their holders know").set_defaults(run=run_list)
    revoke = actions.add_parser("revoke", help="put a key out of force, within two seconds everywhere")
    revoke.add_argument("id", metavar="KEY_ID", help="as `fledge keys list` shows it")
    revoke.set_defaults(run=run_revoke)


def run_create(args: argparse.Namespace) -> int:
    """Print the key alone, so that a script can take it. `UserError` for a scope or a budget that cannot be."""
    scopes = [scope.strip() for scope in args.scopes.split(",")]
    request = KeyRequest(args.owner, args.name, scopes, args.requests_per_minute, args.tokens_per_minute)
    key, _ = _with_database(lambda database: create_key(database, request))
    print(key)
    return 0


def run_list(_: argparse.Namespace) -> int:
    rows = _with_database(list_keys)
    Console().print(_table(rows) if rows else "no keys yet; make one with `fledge keys create`")
    return 0


def run_revoke(args: argparse.Namespace) -> int:
    """`UserError` if no key in force has this id."""
    if not _with_database(lambda database: revoke_key(database, args.id)):
        raise UserError(f"no key '{args.id}' is in force; see `fledge keys list`")
    print(f"{args.id} is revoked")
    return 0


def _table(rows: Sequence[KeyRow]) -> Table:
    table = Table("id", "owner", "name", "ends in", "scopes", "made", "requests/min", "tokens/min", "state")
    for row in rows:
        made = datetime.fromtimestamp(row.created_at, UTC).strftime("%Y-%m-%d")
        budgets = ("" if n is None else f"{n}" for n in (row.requests_per_minute, row.tokens_per_minute))
        state = "in force" if row.revoked_at is None else "revoked"
        table.add_row(row.id, row.owner, row.name, row.hint, ", ".join(row.scopes), made, *budgets, state)
    return table


def _with_database(act: Callable[[Database], Awaitable[ResultT]]) -> ResultT:
    async def run() -> ResultT:
        database = Database(database_url())
        await database.open()
        try:
            return await act(database)
        finally:
            await database.close()

    return asyncio.run(run())
