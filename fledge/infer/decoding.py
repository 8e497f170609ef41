"""Decoding compiled: the step in which every answer takes one token, as one graph for one answer and one for more.

Small models spend most of such a step outside their matrix products, between operators; torch.compile's C++ removes
that. Only for up to `MAX_ROWS` answers at once: beyond, the products rule and there is little to win. Everything a
graph reads is written into buffers that stay where they are.

Compiling takes its time (the first time on a machine most of a minute for a model of a few layers, minutes for one of
thirty, later a tenth of that): at the start and, where attention has no kernel and gathers whole tables, when answers
outgrow their width, which then doubles. Compiled and eager code round differently, so an answer may in rare ties differ
from an uncompiled engine's.

Shapes: N answers, R rows of a buffer, M blocks of a table, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo import mark_dynamic

from fledge.errors import ConfigError
from fledge.infer.causal import CausalModel
from fledge.infer.paged import Layout, PagedContext, Pages, attend_pages

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

MAX_ROWS = 32
_NARROWEST = 64  # blocks of a table, where its width costs


class _Buffers:
    """The inputs of the graphs whose tables have one width, for `MAX_ROWS` answers: arrays, and the same as tensors."""

    def __init__(self, width: int) -> None:
        self.tokens_R, self.positions_R, self.slots_R, self.lengths_R = np.zeros((4, MAX_ROWS), dtype=np.int64)
        self.tables_RM = np.zeros((MAX_ROWS, width), dtype=np.int64)
        self._rows_R = torch.arange(MAX_ROWS)

    def inputs(self, num: int) -> tuple[Tensor, Layout]:
        """(tokens_1N, layout) of the first `num` rows."""
        tokens_N, positions_N, slots_N, lengths_N, tables_NM = (
            torch.from_numpy(array[:num])
            for array in (self.tokens_R, self.positions_R, self.slots_R, self.lengths_R, self.tables_RM)
        )
        layout = Layout(
            positions_T=positions_N,
            slots_T=slots_N,
            rows_T=self._rows_R[:num],
            tables_NM=tables_NM,
            tables_QM=tables_NM,
            lengths_Q=lengths_N,
            chunks=(),
        )
        return tokens_N[None], layout


class CompiledDecoder:
    """`model` over `pages`, one token for each of up to `MAX_ROWS` answers. CPU only.

    `ConfigError` if nothing can be compiled here.
    """

    def __init__(self, model: CausalModel, pages: Pages) -> None:
        if pages.device.type != "cpu":
            raise ConfigError(f"compiled decoding is for the CPU; the model is on {pages.device}")
        self._model, self._pages = model, pages
        self._narrowest = _NARROWEST if pages.attend is attend_pages else _longest(model, pages)
        self._graphs: dict[tuple[bool, int], Callable[[Tensor, Layout], Tensor]] = {}
        self._buffers: dict[int, _Buffers] = {}
        log.warning("compiling the model (some seconds; the first time on this machine up to minutes)")
        try:
            with torch.inference_mode():
                for num in (1, 2):
                    zeros_N = np.zeros(num, dtype=np.int64)
                    self.run(zeros_N, zeros_N, np.full((num, 1), pages.num_blocks))
        except Exception as error:
            # Whatever a toolchain can do wrong (no compiler, no headers, a read-only cache) surfaces here.
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigError(f"the model cannot be compiled here: {reason}; leave compile off") from error

    def run(self, tokens_N: Ints, positions_N: Ints, tables_NM: Ints) -> Tensor:
        """logits_NV of what follows each token, at its position of the sequence whose blocks its table tells.

        To be run within `evaluating`. Writes the tokens' keys and values to the pages. N is at most `MAX_ROWS`.
        """
        num, held_width = tables_NM.shape
        width = max(self._narrowest, 1 << (held_width - 1).bit_length())
        held, size = self._buffers.setdefault(width, _Buffers(width)), self._pages.block_size
        held.tokens_R[:num], held.positions_R[:num] = tokens_N, positions_N
        held.lengths_R[:num] = positions_N + 1
        held.slots_R[:num] = tables_NM[np.arange(num), positions_N // size] * size + positions_N % size
        held.tables_RM[:num, :held_width] = tables_NM
        tokens_1N, layout = held.inputs(num)
        kind = num > 1, width
        if kind in self._graphs:
            return self._graphs[kind](tokens_1N, layout)
        self._graphs[kind] = self._new_graph()
        if num > 1:
            _vary(tokens_1N, layout)
        with _silence():
            return self._graphs[kind](tokens_1N, layout)

    def _new_graph(self) -> Callable[[Tensor, Layout], Tensor]:
        """A function of its own for every shape, so that none looks through the guards of the others."""
        model, pages = self._model, self._pages

        def step(tokens_1N: Tensor, layout: Layout) -> Tensor:
            context = PagedContext(pages, layout, tokens_1N)
            return model.unembed(model.hidden(model.embed(tokens_1N, context), context))[0]

        # torch keeps its graphs by code object, and closures of one function share theirs.
        step.__code__ = step.__code__.replace()
        # The C++ wrapper calls kernel after kernel without going back to Python. Compiled apart from them, and so
        # optimised less, it is as fast and there in half the time.
        options: dict[str, str | int | bool | Callable[..., Any]] = {
            "cpp_wrapper": True,
            "cpp_wrapper_build_separate": True,
            "guard_filter_fn": _no_guards,
        }
        return torch.compile(step, dynamic=False, fullgraph=True, options=options)


def _longest(model: CausalModel, pages: Pages) -> int:
    """Blocks of the longest table that there can be, as a power of two."""
    limit: int | None = model.config.max_positions
    blocks = pages.num_blocks if limit is None else min(pages.num_blocks, -(-limit // pages.block_size))
    return 1 << (blocks - 1).bit_length()


def _vary(tokens_1N: Tensor, layout: Layout) -> None:
    """Tell torch that there may be 2 to `MAX_ROWS` rows. What assumes any less is an error while it compiles."""
    mark_dynamic(tokens_1N, 1, min=2, max=MAX_ROWS)
    for rows in (layout.positions_T, layout.slots_T, layout.rows_T, layout.tables_NM, layout.lengths_Q):
        mark_dynamic(rows, 0, min=2, max=MAX_ROWS)


def _no_guards(guards: Sequence[object]) -> list[bool]:
    """None need be checked: a graph has its code object for itself and meets only the shapes that it was made for, and
    the model and pages it reads are always the same. With 124M parameters the checks took a fifteenth of a step."""
    return [False] * len(guards)


@contextmanager
def _silence() -> Iterator[None]:
    """While torch compiles, it warns of things of its own making."""
    inductor = logging.getLogger("torch._inductor")
    level = inductor.level
    inductor.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        inductor.setLevel(level)
