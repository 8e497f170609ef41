"""`fledge worker`: run the fine-tuning jobs of a server. `fledge serve` starts one by itself when there is work."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from typing import Any

from fledge.commands.serving import database_url, server_folder
from fledge.errors import ConfigError

# Of one that a server started: whoever waits for an answer goes before a job.
_NICENESS = 10


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("worker", help="run the fine-tuning jobs of a server")
    parser.add_argument("--threads", type=int, help="(default: as many as torch takes)")
    parser.add_argument("--idle-seconds", type=float, help="end when there was no job for so long (default: never)")
    parser.add_argument("--name", help="of this worker (default: one that no other has)")
    parser.add_argument(
        "--attached", action="store_true", help="end with whoever holds the other end of standard input"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Work until Ctrl-C or SIGTERM; a job that runs then goes on with the next worker."""
    import torch

    from fledge.recipes.worker import WorkerOrder, work, worker_name

    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads {args.threads}: at least 1")
        torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    if args.attached:
        os.nice(_NICENESS)
        threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    work(WorkerOrder(database_url(), server_folder(), args.name or worker_name(), args.idle_seconds))
    return 0


def _end_with_parent() -> None:
    """Standard input ends when the process at its other end does, however it does."""
    while os.read(0, 1):  # not by sys.stdin, whose lock would be held when this process ends by itself
        pass
    os.kill(os.getpid(), signal.SIGTERM)
