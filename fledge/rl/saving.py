"""Named tensors of everything a run trains, out and back in: how every algorithm of rl/ is resumed to the bit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fledge.errors import CheckpointError


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that train, by name; not copies."""
    return {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}


def load_trainable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the weights that train. CheckpointError, with nothing changed, if names or shapes differ."""
    weights = trainable(model)
    if {name: w.shape for name, w in weights.items()} != {name: t.shape for name, t in tensors.items()}:
        raise CheckpointError("the saved state is of other models; was it made with another plan?")
    for name, weight in weights.items():
        weight.copy_(tensors[name])


def flat(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{"group": {"name": t}} as {"group/name": t}."""
    return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


def group_of(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors named "<group>/<name>", by name."""
    return {key.removeprefix(f"{group}/"): t for key, t in tensors.items() if key.startswith(f"{group}/")}
