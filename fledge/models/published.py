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
# are (the tokenizer's matter), how a text is sampled, what `transformers` returns beside the logits and by which of its
# own kernels. Much of it stands only in files that were written whole, without leaving defaults out.
IDLE = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation",
        "dtype", "finetuning_task", "gradient_checkpointing", "model_type", "name_or_path", "tf_legacy_loss",
        "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16",
        "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "prefix", "sep_token_id",
        "tokenizer_class",
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty",
        "suppress_tokens", "task_specific_params", "temperature", "top_k", "top_p", "typical_p",
        "chunk_size_feed_forward", "cross_attention_hidden_size", "id2label", "label2id", "output_attentions",
        "output_hidden_states", "output_scores", "problem_type", "return_dict", "return_dict_in_generate",
        "tie_encoder_decoder", "use_cache",
    }
)  # fmt: skip
# And those that change nothing at these values alone.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_decoder": (False, True),  # a decoder is one either way
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
}


def _nothing_more(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Published:
    """One make of published checkpoint.

    `fields`: a field of config.json -> (field of our config, value where config.json leaves it out).
    `fixed`: a field of config.json -> the values with which it means what we compute, the first being the default;
    those of FIXED besides.
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
