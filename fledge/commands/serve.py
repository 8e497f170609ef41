"""`fledge serve [RUN[:STAGE] | MODEL ...]`: models behind OpenAI's API, for programs and the chat page alike."""

from __future__ import annotations

import argparse
import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import uvicorn

from fledge.commands.serving import database_url, moderation_folder, server_folder
from fledge.commands.speaking import COMPILE_HELP
from fledge.errors import UserError
from fledge.infer.engine import CacheType
from fledge.recipes.runs import resolve_model
from fledge.safety.classifier import checked_thresholds
from fledge.safety.guard import GuardConfig
from fledge.serve.app import make_app, make_state
from fledge.serve.errors import ApiError
from fledge.serve.hub import Hub, ModelEntry
from fledge.serve.loading import CACHE_BYTES, ProcessLoader, read_renderer
from fledge.serve.moderation import Moderator, open_moderator
from fledge.serve.state import ServerConfig, State
from fledge.serve.workers import OwnWorker
from fledge.store.blobs import Blobs
from fledge.store.database import Database
from fledge.store.keys import KeyRequest, create_key, list_keys
from fledge.store.pages import now

WORKER_IDLE_SECONDS = 60


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help="serve models with OpenAI's API")
    parser.add_argument("models", metavar="MODEL", nargs="*", help="RUN, RUN:STAGE, or a checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1", help="(default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--alias",
        metavar="NAME=MODEL",
        action="append",
        default=[],
        help="another name for one of the models",
    )
    parser.add_argument(
        "--adapter",
        metavar="NAME=MODEL=FOLDER",
        action="append",
        default=[],
        help="one of the models with the PEFT adapter in a folder, under a name of its own: they share the weights in "
        "memory, and their requests run side by side",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders live (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of the engines, as torch calls it (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of each engine (default: as many as torch takes)")
    parser.add_argument("--cache-mb", type=int, default=CACHE_BYTES >> 20, help="of keys and values, for each model")
    parser.add_argument(
        "--cache-type",
        choices=get_args(CacheType),
        default="model",
        help="float16 keeps keys and values at half precision: twice as many positions in the same memory, read in "
        "half the time; answers differ a little (default: %(default)s, as the model computes them)",
    )
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        help="a smaller model that guesses ahead for those of its tokenizer: faster where it is often right, and the "
        "answers stay the same",
    )
    parser.add_argument("--compile", action="store_true", help=f"{COMPILE_HELP}; not while a model has adapters")
    parser.add_argument("--memory-mb", type=int, help="for all models; those least used make room (default: no limit)")
    _add_moderation(parser)
    parser.add_argument("--no-worker", action="store_true", help="leave fine-tuning jobs to `fledge worker` elsewhere")
    parser.set_defaults(run=run)


def _add_moderation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--moderation",
        metavar="RUN",
        help="the moderation model (default: the run 'moderation', if there is one, for /v1/moderations alone)",
    )
    parser.add_argument(
        "--moderate",
        choices=("none", "input", "output", "both"),
        help="what is blocked in-line where it is flagged (default: both with --moderation, else none)",
    )
    parser.add_argument(
        "--threshold", metavar="CATEGORY=SCORE", action="append", default=[], help="in place of a measured threshold"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; answers in progress are given time to end."""
    entries = model_entries(args.models, args.alias, args.runs, args.adapter)
    if args.cache_mb < 1 or (args.memory_mb is not None and args.memory_mb < 1):
        raise UserError("--cache-mb and --memory-mb are at least 1")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads}: at least 1")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # the steps of a migration are nobody's news
    draft = None if args.draft is None else resolve_model(args.draft, args.runs).resolve()
    engine = {"cache_bytes": args.cache_mb << 20, "cache_type": args.cache_type, "compile": args.compile}
    loader = ProcessLoader(engine, args.device, args.threads, draft)
    _refuse_idle_draft(loader, entries)
    return asyncio.run(_serve(args, entries, loader))


def _refuse_idle_draft(loader: ProcessLoader, entries: Sequence[ModelEntry]) -> None:
    """`UserError` if the draft model has the tokens of none of the models."""
    paths = [entry.path for entry in entries if entry.path is not None]
    if loader.draft is not None and not any(loader.draft_for(read_renderer(path)[0].tokenizer) for path in paths):
        raise UserError(f"--draft {loader.draft}: none of the models has its tokenizer, so it would guess for nobody")


def model_entries(
    names: Sequence[str], aliases: Sequence[str], runs: Path, adapters: Sequence[str] = ()
) -> list[ModelEntry]:
    """The models by the names that clients use; `UserError` for one that is not there or named twice."""
    found = [ModelEntry(name, now(), "fledge", path=resolve_model(name, runs).resolve()) for name in names]
    for alias in aliases:
        name, equals, target = alias.partition("=")
        if not equals or not name or target not in names:
            raise UserError(f"--alias {alias}: expected NAME=MODEL with a MODEL that is served")
        found.append(ModelEntry(name, now(), "fledge", target=target))
    for adapter in adapters:
        name, target, folder = [*adapter.split("=", 2), "", ""][:3]
        if not name or target not in names or not (Path(folder) / "adapter_config.json").is_file():
            raise UserError(
                f"--adapter {adapter}: expected NAME=MODEL=FOLDER with a MODEL that is served and a FOLDER that holds "
                "an adapter_config.json"
            )
        found.append(ModelEntry(name, now(), "fledge", target=target, adapter=Path(folder).resolve()))
    taken = [entry.name for entry in found]
    if twice := {name for name in taken if taken.count(name) > 1}:
        raise UserError(f"two models are named '{min(twice)}'")
    return found


async def _serve(args: argparse.Namespace, entries: Sequence[ModelEntry], loader: ProcessLoader) -> int:
    database = Database(database_url())
    await database.open()
    try:
        listener = bound(args.host, args.port)
        await _first_key(database, args.host)
        max_bytes = None if args.memory_mb is None else args.memory_mb << 20
        blobs = Blobs(server_folder() / "blobs")
        guard, moderator = moderation_of(args, loader)
        config = ServerConfig(guard=guard)
        state = make_state(config, database, blobs, loader, entries, max_bytes, moderator)
        async with _worker(args, database):
            await _listen(state, args.host, listener)
    finally:
        await database.close()
    return 0


def moderation_of(args: argparse.Namespace, loader: ProcessLoader) -> tuple[GuardConfig, Moderator | None]:
    """What is moderated in-line, and by which model; `UserError` for a model or a threshold that cannot be used."""
    wanted = args.moderate or ("none" if args.moderation is None else "both")
    guard = GuardConfig(
        input="block" if wanted in ("input", "both") else "off",
        output="block" if wanted in ("output", "both") else "off",
    )
    folder = moderation_folder(args.moderation or "moderation", args.runs)
    thresholds = checked_thresholds(dict(_threshold(text) for text in args.threshold))
    if folder is None:
        if args.moderation is not None or wanted != "none" or thresholds:
            name = args.moderation or "moderation"
            raise UserError(f"no moderation model '{name}' in {args.runs}; make one: fledge moderation train RUN")
        return guard, None
    moderator = open_moderator(folder, thresholds=thresholds, device=loader.device, num_threads=loader.num_threads)
    return guard, moderator


def _threshold(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return name, float(value)
    except ValueError as error:
        raise UserError(f"--threshold {text}: expected CATEGORY=SCORE, for example hate=0.8") from error


@asynccontextmanager
async def _worker(args: argparse.Namespace, database: Database) -> AsyncIterator[None]:
    """The process that runs fine-tuning jobs, started when there is one; it has the engines' threads."""
    if args.no_worker:
        yield
        return
    threads = () if args.threads is None else ("--threads", str(args.threads))
    command = (sys.executable, "-m", "fledge", "worker", "--idle-seconds", str(WORKER_IDLE_SECONDS), *threads)
    task = asyncio.create_task(OwnWorker(database, command).run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, for which nothing has been loaded yet; `UserError` if it cannot be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: expected 1 to 65535, or 0 for any that is free")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as stack:
            found = stack.enter_context(socket.socket(family, kind))
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            stack.pop_all()
    except UnicodeError as error:
        raise UserError(f"--host {host[:80]}: no name of a machine") from error
    except OSError as error:
        remedy = "end what listens there, or name another --port" if error.errno == errno.EADDRINUSE else "see --host"
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}; {remedy}") from error
    return found


async def _listen(state: State, host: str, listener: socket.socket) -> None:
    config = uvicorn.Config(
        make_app(state),
        log_config=None,
        access_log=False,  # guard.py writes its own
        server_header=False,
        timeout_graceful_shutdown=int(state.config.drain_seconds),
    )
    server = uvicorn.Server(config)
    await _warm(state.hub)
    shown = f"[{host}]" if ":" in host else host
    print(f"fledge serves on http://{shown}:{listener.getsockname()[1]}/v1; Ctrl-C ends it", flush=True)
    # uvicorn raises the signal that ended it once more when all is drained; there is still something to close then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    await server.serve(sockets=[listener])


async def _warm(hub: Hub) -> None:
    """Load the first model. `UserError`, of whatever kind it was, if it cannot be: here the operator is the client."""
    if hub.default is None:
        return
    try:
        await hub.warm(hub.default)
    except ApiError as error:
        raise UserError(f"{hub.default}: {error.__cause__ or error}") from error


async def _first_key(database: Database, host: str) -> None:
    """On this machine alone the first key makes itself; before others can reach the server, somebody must."""
    if any(row.revoked_at is None for row in await list_keys(database)):
        return
    if not _is_loopback(host):
        raise UserError(f"--host {host} can be reached by others and there is no key yet; `fledge keys create` first")
    key, _ = await create_key(database, KeyRequest("local", "first"))
    print(f"The first API key, shown once: {key}", flush=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
