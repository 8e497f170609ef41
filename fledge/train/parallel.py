"""The processes that train one model together, each on its share of the batch: what they add up and what they gather.

Every process holds the whole model and takes the same steps. A step's sums, counts and gradients are those of all
shares together (loop.py), so how many processes there are changes no loss and no gradient beyond rounding.

`torch.distributed` must be initialised by whoever starts the processes, with a backend that takes the tensors handed
in here: those of the model's device, and small ones of the CPU ("gloo", or "cpu:gloo,cuda:nccl").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_NONE, _SPARSE, _DENSE = 0, 1, 2


@dataclass(frozen=True)
class Ranks:
    """This process, `number` of `count`; without arguments one that is alone, for which all of this is the identity.

    Every method but `own` is a meeting: all processes must call it, in the same order. One that ends takes the others
    with it: they fail where they wait for it.
    """

    number: int = 0
    count: int = 1

    @classmethod
    def joined(cls) -> Ranks:
        """This process among those of `torch.distributed`'s default group."""
        return cls(dist.get_rank(), dist.get_world_size())

    def own(self, size: int) -> Tensor:
        """Which of `size` rows, known to all, this process takes: every `count`-th, so that shares differ by one."""
        return torch.arange(self.number, size, self.count)

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows (dimension 0) of all processes one after another; each brings as many."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def told(self, value: Any) -> list[Any]:
        """A JSON value of every process, in their order; numbers keep their bits, tuples become lists."""
        if self.count == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        row, sizes = self._padded(data)
        return [json.loads(bytes(part[:size].tolist())) for part, size in zip(row, sizes, strict=True)]

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """`.grad` of each parameter becomes the sum over processes; None where no process has one.

        A gradient that is row-sparse everywhere stays so and holds the rows that any process touched.
        """
        if self.count == 1:
            return
        held = self.gathered(torch.tensor([[_kind(parameter) for parameter in parameters]]))
        meetings = []
        for parameter, kind in zip(parameters, held.amax(dim=0).tolist(), strict=True):
            if kind == _SPARSE:
                parameter.grad = self._sparse_sum(parameter)
            elif kind == _DENSE:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
                meetings.append(dist.all_reduce(parameter.grad, async_op=True))
        for meeting in meetings:
            meeting.wait()

    def _sparse_sum(self, parameter: nn.Parameter) -> Tensor:
        rows, values = torch.empty(0, dtype=torch.int64, device=parameter.device), parameter.detach()[:0]
        if parameter.grad is not None:
            gradient = parameter.grad.coalesce()
            rows, values = gradient._indices()[0], gradient._values()
        all_rows, sizes = self._padded(rows)
        all_values, _ = self._padded(values)
        real = [slice(0, size) for size in sizes]
        found = torch.cat([part[some] for part, some in zip(all_rows, real, strict=True)])
        sums = torch.cat([part[some] for part, some in zip(all_values, real, strict=True)])
        shape = parameter.shape
        return torch.sparse_coo_tensor(found[None], sums, shape, check_invariants=False).coalesce()

    def _padded(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """(rows of all processes, one entry a process, filled up to the longest; how many of each are real)."""
        sizes: list[int] = self.gathered(torch.tensor([len(rows)])).tolist()
        filled = rows.new_zeros((1, max(sizes), *rows.shape[1:]))
        filled[0, : len(rows)] = rows
        return self.gathered(filled), sizes


ALONE = Ranks()


def _kind(parameter: nn.Parameter) -> int:
    if parameter.grad is None:
        return _NONE
    return _SPARSE if parameter.grad.is_sparse else _DENSE
