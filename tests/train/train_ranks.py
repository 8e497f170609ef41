"""One of several processes of `test_train_parallel.py`: run as `train_ranks.py NUMBER COUNT FOLDER`, joined by gloo."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import train_toy as toy
from safetensors.torch import save_file
from torch import Tensor, nn

from fledge.errors import TrainingHalted
from fledge.train.loop import Pairs, train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.train.parallel import Ranks

ROWS = toy.text_rows(3, 7)  # with uneven masks, so that every share has a count of its own
CLIP = 0.5


def step_of(ranks: Ranks, clip_norm: float | None) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """(metrics, gradients, weights) of one step on this process's share of the documents."""
    model = toy.pocket_state().model
    pairs: Pairs = [(toy.OBJECTIVE, toy.OBJECTIVE.collate([ROWS[place]])) for place in ranks.own(len(ROWS)).tolist()]
    metrics = train_step(model, OptimizerSet(model, OptimConfig.by_role()), pairs, clip_norm=clip_norm, ranks=ranks)
    named = dict(model.named_parameters())
    gradients = {name: weight.grad.to_dense().clone() for name, weight in named.items() if weight.grad is not None}
    return metrics, gradients, toy.copied(named)


class Bad:
    """An objective whose loss is no number in one process alone."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def loss(self, model: Any, batch: Any) -> Any:
        loss = toy.ToyObjective().loss(model, batch)
        if self.ranks.number:
            term = loss.terms["square"]
            loss.terms["square"] = type(term)(term.sum * float("nan"), term.count)  # type: ignore[index]
        return loss


def halt_of(ranks: Ranks) -> str:
    model = toy.ToyModel()
    batch = toy.ToyBatch(torch.ones(3), torch.zeros(3), torch.ones(3))
    try:
        train_step(model, OptimizerSet(model, toy.plain_config()), [(Bad(ranks), batch)], ranks=ranks)
    except TrainingHalted as why:
        return str(why)
    return "no halt"


def uneven_of(ranks: Ranks) -> dict[str, Any]:
    """Gradients that one process has and another has not, dense and row-sparse, and what is told of each process."""
    dense, absent, only_first = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    table = nn.Parameter(torch.zeros(5, 2))
    dense.grad = torch.tensor([1.0, 2.0]) * (ranks.number + 1)
    if ranks.number == 0:
        only_first.grad = torch.ones(2)
        rows = torch.tensor([[3, 3, 1]])
        table.grad = torch.sparse_coo_tensor(rows, torch.ones(3, 2), (5, 2), check_invariants=False)
    ranks.add_gradients([dense, absent, only_first, table])
    assert table.grad is not None
    return {
        "dense": dense.grad.tolist(),
        "absent": absent.grad is None,
        "only_first": only_first.grad.tolist(),
        "table": table.grad.to_dense().tolist(),
        "touched": table.grad.coalesce().indices()[0].tolist(),
        "told": ranks.told({"number": ranks.number, "text": "é" * ranks.number, "tiny": 0.1 + ranks.number}),
        "gathered": ranks.gathered(torch.tensor([[ranks.number, 7]])).tolist(),
        "bools": ranks.gathered(torch.tensor([ranks.number == 0])).tolist(),
    }


def main(number: int, count: int, folder: Path, work: Callable[[Ranks], Any]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=count)
    ranks = Ranks.joined()
    told = work(ranks)
    (folder / f"told-{number}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    place = Path(sys.argv[3])

    def everything(ranks: Ranks) -> dict[str, Any]:
        torch.set_num_threads(1)
        found: dict[str, Any] = {}
        for name, clip_norm in (("whole", None), ("clipped", CLIP)):
            metrics, gradients, weights = step_of(ranks, clip_norm)
            save_file(gradients, place / f"{name}-gradients-{ranks.number}.safetensors")
            save_file(weights, place / f"{name}-weights-{ranks.number}.safetensors")
            found[name] = metrics
        return {**found, "halt": halt_of(ranks), "uneven": uneven_of(ranks)}

    main(int(sys.argv[1]), int(sys.argv[2]), place, everything)
