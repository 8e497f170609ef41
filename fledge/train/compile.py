"""torch.compile where it pays, and a clean eager path where it cannot run.

Only pure regions are compiled (a trunk with its head and loss: see `next_token_sums`); look-ups with row-sparse
gradients, the optimizer and the loop stay eager. Compiled and eager code round differently, so the choice is made
once a run and remembered: a resumed run never flips it (`resolve`).
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from fledge.errors import RunError

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# torch gives up after 8 shapes of one function; a worker that runs job after job meets more.
SHAPES_PER_PROCESS = 256
# Measured on two cores with the pocket model: what eager training costs (docs/log.md).
EAGER_COST = "training takes about 1.5 times as long"


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch would call for CPU kernels, or None."""
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++")
    found = (shutil.which(candidate) for candidate in candidates if candidate)
    return next((path for path in found if path), None)


@functools.cache
def obstacle(device_type: str) -> str | None:
    """Why torch.compile cannot run here, in a few words, or None if it can: a tiny function is compiled to see."""
    if device_type == "cpu" and cpp_compiler() is None:
        return "there is no C++ compiler"
    probe = torch.compile(lambda x: (x * 2 + 1).sum(), dynamic=False)
    try:
        probe(torch.ones(8, device=device_type))
    except Exception as error:
        # Whatever a toolchain can do wrong (no headers, a read-only cache, no Triton) surfaces here and only here.
        return f"a test compilation failed: {str(error).strip().splitlines()[0][:200]}"
    return None


def resolve(wanted: bool | None, recorded: bool | None, device: torch.device) -> bool:
    """Whether to compile. `wanted` None means where it works; `recorded` is what the run did when it began.

    RunError if the run began compiled and this machine cannot, or if compilation is demanded and cannot be had.
    Logs what eager training costs when there was no choice.
    """
    if recorded is False or (recorded is None and wanted is False):
        return False
    reason = obstacle(device.type)
    if reason is None:
        return True
    if recorded:
        raise RunError(
            f"this run was begun with compiled code, but {reason}; mend that, or start a run under a new name"
        )
    if wanted:
        raise RunError(f"compiled training was asked for, but {reason}; mend that, or leave the choice open")
    log.warning("not compiling: %s; %s", reason, EAGER_COST)
    return False


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as one compiled graph per shape, never a dynamic one; a graph break is an error, not a slowdown."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, SHAPES_PER_PROCESS)
    fast = torch.compile(function, dynamic=False, fullgraph=True)
    first = threading.Lock()
    is_compiled = False

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            # Dynamo looks at `.grad` of what `embed` returned, and torch warns of its own look.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            return fast(*args, **kwargs)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal is_compiled
        if not is_compiled:
            with first:  # lanes that begin together would each compile the same graph, one after the other
                if not is_compiled:
                    result = run(*args, **kwargs)
                    is_compiled = True
                    return result
        return run(*args, **kwargs)

    return call
