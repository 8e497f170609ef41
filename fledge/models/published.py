"""How a family's published checkpoints name things: read by formats/huggingface.py, written down in each model file.

A `Published` is one make of checkpoint (GPT2LMHeadModel, LlamaForCausalLM, ...) as literal tables, so that reading
and writing are the same tables read in two directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

RawConfig = dict[str, Any]  # config.json


def _nothing_more(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Published:
    """One make of published checkpoint.

    `fields`: a field of config.json -> (field of our config, value where config.json leaves it out).
    `fixed`: a field of config.json -> the values with which it means what we compute, the first being the default.
    `ours`: fields of our config that are the same in every checkpoint of this make.
    `idle`: fields of config.json that change nothing we compute.
    `weights`: a published name, `*` standing for a layer's number -> the parameters of ours it holds, side by side
    along their outputs. `prefix` stands before every published name but those in `unprefixed`.
    `transposed`: published names stored inputs first. `buffers`: published names of what is computed, not learned.
    `read_more` takes the fields it knows out of config.json and returns fields of ours; `write_more` is its inverse.
    """

    architecture: str
    model_type: str
    prefix: str
    fields: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, tuple[Any, ...]]
    ours: Mapping[str, Any]
    idle: frozenset[str]
    weights: Mapping[str, tuple[str, ...]]
    head: str = "lm_head.weight"
    transposed: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    read_more: Callable[[RawConfig], dict[str, Any]] = field(default=_nothing_more)
    write_more: Callable[[Any], RawConfig] = field(default=_nothing_more)
