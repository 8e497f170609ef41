"""The literal table of model families. One row names everything that other code needs to find a family.

Nothing here imports a model: `load_family` does so by name when one is wanted.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from fledge.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """`module` holds `config` (a frozen dataclass) and `model`; `kind` says what the model offers.

    `published` lists the `model_type`s of Hugging Face directories whose layouts `module.PUBLISHED` writes down.
    causal: `next_logprobs`, `embed`, `hidden`, `unembed`. counts: `next_logprobs` only. scalar: one number a token.
    """

    name: str
    year: int
    kind: str
    paper: str
    module: str
    config: str
    model: str
    published: tuple[str, ...] = ()


FAMILIES = (
    Family(
        "ngram",
        1995,
        "counts",
        "Kneser & Ney 1995; Chen & Goodman 1999",
        "fledge.models.ngram",
        "NGramConfig",
        "NGram",
    ),
    Family(
        "gpt",
        2018,
        "causal",
        "Radford et al. 2018, 2019; Brown et al. 2020",
        "fledge.models.gpt",
        "GPTConfig",
        "GPT",
        ("gpt2", "openai-gpt"),
    ),
    Family(
        "llama",
        2023,
        "causal",
        "Touvron et al. 2023",
        "fledge.models.llama",
        "LlamaConfig",
        "Llama",
        ("llama",),
    ),
    Family(
        "qwen",
        2024,
        "causal",
        "Yang et al. 2024, 2025",
        "fledge.models.qwen",
        "QwenConfig",
        "Qwen",
        ("qwen2", "qwen3"),
    ),
    Family(
        "pocket",
        2026,
        "causal",
        "this project; sources in the file",
        "fledge.models.pocket",
        "PocketConfig",
        "Pocket",
    ),
    Family(
        "scalar",
        2022,
        "scalar",
        "Ouyang et al. 2022, section 3.5",
        "fledge.models.scalar",
        "ScalarConfig",
        "ScalarModel",
    ),
)


def family(name: str) -> Family:
    """The row of that name; `ConfigError` with the nearest name if there is none."""
    for row in FAMILIES:
        if row.name == name:
            return row
    names = [row.name for row in FAMILIES]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"unknown model family '{name}': known are {', '.join(names)}{hint}")


def load_family(name: str) -> tuple[type[Any], type[Any]]:
    """(config class, model class) of a family; imports its file."""
    row = family(name)
    module = importlib.import_module(row.module)
    return getattr(module, row.config), getattr(module, row.model)
