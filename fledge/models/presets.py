"""The published sizes of all families, by name: one look-up over the `PRESETS` tables of the model files."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch

from fledge.errors import ConfigError, nearest
from fledge.registry import FAMILIES, load_family


def presets() -> dict[str, tuple[str, Any]]:
    """Name -> (family, config), in the order of the registry and of each family's table."""
    return {
        name: (row.name, config)
        for row in FAMILIES
        if row.published
        for name, config in importlib.import_module(row.module).PRESETS.items()
    }


def preset(name: str) -> tuple[str, Any]:
    """(family, config) of that name; `ConfigError` with the nearest name if there is none."""
    known = presets()
    if name not in known:
        raise ConfigError(f"unknown model '{name}'; {nearest(name, known)}")
    return known[name]


def count_parameters(family: str, config: Any) -> int:
    """Parameters of a model, a tied head counted once. The layers of a published model are alike: two are enough."""
    one, two = (_count(family, dataclasses.replace(config, num_layers=number)) for number in (1, 2))
    num_layers: int = config.num_layers
    return one + (num_layers - 1) * (two - one)


def _count(family: str, config: Any) -> int:
    with torch.device("meta"):
        model: torch.nn.Module = load_family(family)[1](config)
    return sum(parameter.numel() for parameter in model.parameters())
