"""How a family's published checkpoints name things: read by formats/huggingface.py, written down in each model file.

A `Published` is one make of checkpoint (GPT2LMHeadModel, LlamaForCausalLM, ...) as literal tables, so that reading
and writing are the same tables read in two directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

RawConfig = dict[str, Any]  # config.json


# Fields that any config.json may hold and that change no logit: where it comes from, what the ids of special tokens
# are (the tokenizer's matter), how a text is sampled, what `transformers` returns beside the logits.
IDLE = frozenset(
    {
        "_name_or_path", "architectures", "dtype", "model_type", "torch_dtype", "transformers_version",
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class",
        "do_sample", "max_length", "min_length", "task_specific_params", "temperature", "top_k", "top_p",
        "id2label", "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "use_cache",
    }
)  # fmt: skip


def _nothing_more(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Published:
    """One make of published checkpoint.

    `fields`: a field of config.json -> (field of our config, value where config.json leaves it out).
    `fixed`: a field of config.json -> the values with which it means what we compute, the first being the default.
    `ours`: fields of our config that are the same in every checkpoint of this make.
    `idle`: fields of config.json that change nothing we compute, besides those of IDLE.
    `weights`: a published name, `*` standing for a layer's number -> the parameters of ours it holds, side by side
    along their outputs. `prefix` stands before every published name but the head's; old files leave it out.
    `transposed`: published names stored inputs first. `buffers`: published names of what is computed, not learned.
    `read_more(raw)` takes the fields it knows out of config.json and returns fields of ours; `ConfigError` for what
    we do not compute. `write_more(config)` is its inverse.
    """

    architecture: str
    model_type: str
    prefix: str
    fields: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, tuple[Any, ...]]
    ours: Mapping[str, Any]
    idle: frozenset[str]
    weights: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    read_more: Callable[[RawConfig], dict[str, Any]] = field(default=_nothing_more)
    write_more: Callable[[Any], RawConfig] = field(default=_nothing_more)
