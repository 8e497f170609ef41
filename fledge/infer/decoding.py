"""Decoding compiled: the step in which every answer takes one token, as one graph for each number of answers.

Small models spend most of such a step outside their matrix products, between operators; torch.compile's C++ removes
that. Only for up to `MAX_ROWS` answers at once: beyond, the products rule and there is little to win. Everything the
graph reads is written into buffers that stay where they are; fewer answers than a graph has rows are filled up with
rows that write to the pages' spare block.

Compiling takes some seconds for each graph (the first time on a machine half a minute), when it is first needed: after
a start, and when answers outgrow the tables' width, which then doubles. Compiled and eager code round differently, so
an answer may in rare ties differ from an uncompiled engine's.

Shapes: N answers, R rows of a graph, M blocks of a table, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fledge.errors import ConfigError
from fledge.infer.causal import CausalModel
from fledge.infer.paged import Layout, PagedContext, Pages

Ints = NDArray[np.int64]

MAX_ROWS = 32
_FINE_ROWS = 8  # up to here the next power of two, from here on the next multiple: filling up costs products
_NARROWEST = 64  # blocks of a table


@dataclass(frozen=True)
class _Buffers:
    """The inputs of one graph: tensors, and the same memory as arrays to write to."""

    tokens_R: Ints
    positions_R: Ints
    slots_R: Ints
    lengths_R: Ints
    tables_RM: Ints
    layout: Layout
    tokens_1R: Tensor


class CompiledDecoder:
    """`model` over `pages`, one token for each of up to `MAX_ROWS` answers. CPU only.

    `ConfigError` if nothing can be compiled here.
    """

    def __init__(self, model: CausalModel, pages: Pages) -> None:
        if pages.device.type != "cpu":
            raise ConfigError(f"compiled decoding is for the CPU; the model is on {pages.device}")
        self._model, self._pages = model, pages
        self._graphs: dict[tuple[int, int], Callable[[Tensor, Layout], Tensor]] = {}
        self._buffers: dict[tuple[int, int], _Buffers] = {}
        try:
            with torch.inference_mode():
                nothing = np.zeros((1, 1), dtype=np.int64)
                self.run(nothing[0], nothing[0], nothing + pages.num_blocks)
        except Exception as error:
            # Whatever a toolchain can do wrong (no compiler, no headers, a read-only cache) surfaces here.
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigError(f"the model cannot be compiled here: {reason}; leave compile off") from error

    def run(self, tokens_N: Ints, positions_N: Ints, tables_NM: Ints) -> Tensor:
        """logits_NV of what follows each token, at its position of the sequence whose blocks its table tells.

        To be run within `evaluating`. Writes the tokens' keys and values to the pages. N is at most `MAX_ROWS`.
        """
        num, width = tables_NM.shape
        shape = _rows_for(num), max(_NARROWEST, 1 << (width - 1).bit_length())
        is_new = shape not in self._buffers
        if is_new:
            self._buffers[shape] = self._new_buffers(*shape)
            self._graphs[shape] = self._new_graph()
        held, size = self._buffers[shape], self._pages.block_size
        held.tokens_R[:num], held.positions_R[:num] = tokens_N, positions_N
        held.lengths_R[:num] = positions_N + 1
        held.slots_R[:num] = tables_NM[np.arange(num), positions_N // size] * size + positions_N % size
        held.tables_RM[:num, :width] = tables_NM
        # What fills up says one token at the start of a sequence of its own, in the spare block.
        held.positions_R[num:], held.lengths_R[num:] = 0, 1
        held.slots_R[num:] = self._pages.num_blocks * size
        held.tables_RM[num:, 0] = self._pages.num_blocks
        with _silence() if is_new else nullcontext():
            return self._graphs[shape](held.tokens_1R, held.layout)[:num]

    def _new_buffers(self, num_rows: int, width: int) -> _Buffers:
        tokens_R, positions_R, slots_R, lengths_R = (np.zeros(num_rows, dtype=np.int64) for _ in range(4))
        tables_RM = np.zeros((num_rows, width), dtype=np.int64)
        tables = torch.from_numpy(tables_RM)
        layout = Layout(
            positions_T=torch.from_numpy(positions_R),
            slots_T=torch.from_numpy(slots_R),
            rows_T=torch.arange(num_rows),
            tables_NM=tables,
            tables_QM=tables,
            lengths_Q=torch.from_numpy(lengths_R),
            chunks=(),
        )
        tokens_1R = torch.from_numpy(tokens_R)[None]
        return _Buffers(tokens_R, positions_R, slots_R, lengths_R, tables_RM, layout, tokens_1R)

    def _new_graph(self) -> Callable[[Tensor, Layout], Tensor]:
        """A function of its own for every shape, so that none looks through the guards of the others."""
        model, pages = self._model, self._pages

        def step(tokens_1R: Tensor, layout: Layout) -> Tensor:
            context = PagedContext(pages, layout, tokens_1R)
            return model.unembed(model.hidden(model.embed(tokens_1R, context), context))[0]

        # torch keeps its graphs by code object, and closures of one function share theirs.
        step.__code__ = step.__code__.replace()
        # The C++ wrapper calls kernel after kernel without going back to Python.
        options: dict[str, str | int | bool | Callable[..., Any]] = {"cpp_wrapper": True, "guard_filter_fn": _no_guards}
        return torch.compile(step, dynamic=False, fullgraph=True, options=options)


def _no_guards(guards: Sequence[object]) -> list[bool]:
    """None need be checked: a graph has its code object for itself and meets one shape only, and the model and pages it
    reads are always the same. With 124M parameters the checks took a fifteenth of a step."""
    return [False] * len(guards)


def _rows_for(num: int) -> int:
    """Rows of the graph for so many answers."""
    return 1 << (num - 1).bit_length() if num <= _FINE_ROWS else -(-num // _FINE_ROWS) * _FINE_ROWS


@contextmanager
def _silence() -> Iterator[None]:
    """While torch compiles, it warns of things of its own making."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
