"""Micro-batches side by side on a CPU: each on a thread of its own with its share of the cores.

A small model spends its step on hundreds of short operations, and splitting each of them over the cores makes the
cores wait for each other hundreds of times. Cutting the batch instead makes them meet once. Gradients are added in the
order of the micro-batches, so that a step is the same to the bit however the threads fall.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

R = TypeVar("R")


def lanes_of(model: nn.Module, wanted: int) -> int:
    """How many micro-batches may run at a time: `wanted`, on a CPU with as many cores, for a model without dropout.

    Dropout draws from one generator for the whole process, and threads would draw in an order that changes.
    """
    is_cpu = next(model.parameters()).device.type == "cpu"
    return min(wanted, torch.get_num_threads()) if is_cpu and not draws(model) else 1


def draws(model: nn.Module) -> bool:
    """Whether a forward pass of this model, in the mode it is in, draws random numbers."""
    return any(_dropout(module) > 0 for module in model.modules() if module.training)


def _dropout(module: nn.Module) -> float:
    """The highest dropout that a module or its config names; 0 if neither does."""
    probabilities = [module.p] if isinstance(module, nn.Dropout) else []
    for place in (module, getattr(module, "config", None)):
        named = vars(place).items() if hasattr(place, "__dict__") else ()
        probabilities += [value for name, value in named if "dropout" in name and isinstance(value, float)]
    return max(probabilities, default=0.0)


def side_by_side(works: Sequence[Callable[[], R]], lanes: int) -> list[R]:
    """Results in order, `lanes` works at a time; the first error of a work is raised once all have ended."""
    if lanes <= 1 or len(works) <= 1:
        return [work() for work in works]
    futures = [_pool(lanes, torch.get_num_threads() // lanes).submit(work) for work in works]
    for future in futures:
        future.exception()  # nobody goes on while a lane still reads the weights
    return [future.result() for future in futures]


@functools.cache
def _pool(lanes: int, threads: int) -> ThreadPoolExecutor:
    """Threads with `threads` cores each, all of them started."""
    ours = torch.get_num_threads()
    pool = ThreadPoolExecutor(lanes, "lane", initializer=_take, initargs=(max(1, threads),))
    all_started = threading.Barrier(lanes + 1)
    for _ in range(lanes):
        pool.submit(all_started.wait)
    all_started.wait()
    torch.set_num_threads(ours)  # threads that start later take the last number that anyone set
    return pool


def _take(threads: int) -> None:
    """This thread's operations run on `threads` cores from now on."""
    torch.get_num_threads()  # a thread's first operation sets the number for all; that must lie behind us
    torch.set_num_threads(threads)


def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Sequence[Tensor | None]]) -> None:
    """`.grad` of each parameter becomes the sum over micro-batches, in their order; None where no one has any."""
    for parameter, parts in zip(parameters, zip(*gradients, strict=True), strict=True):
        present: list[Any] = [part for part in parts if part is not None]
        if present:
            parameter.grad = functools.reduce(lambda total, part: total + part, present)
