"""Small tokenizers and models as their makers publish them, shared by the tests of this folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers as library
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from fledge.config import to_json
from fledge.formats.checkpoint import CheckpointInfo, LoadedModel, load_model, save_model
from fledge.layers.rope import Llama3Scaling
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.qwen import Qwen, QwenConfig
from fledge.text.published import PublishedTokenizer, adopt_published
from fledge.text.template import TemplateRenderer

TEXTS = (
    "a bird flies out of the nest, and the nest is empty\n",
    "In 1998 it wasn't able to agree, and again it wasn't able to agree.\n\n  def area(w, h):\n    return w * h\n",
    "今天天气很好，我们去公园散步。",
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a bird.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def layout(*special: str, words: str = "gpt2", size: int = 400) -> bytes:
    """A byte-level BPE tokenizer.json with special tokens first, as SmolLM2 has them."""
    core = library.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = byte_level if words == "gpt2" else pre_tokenizers.Sequence([digits, byte_level])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS * 5, trainer)
    return core.to_str().encode()


def published(template: str | None = CHATML, *, words: str = "smollm") -> PublishedTokenizer:
    """ChatML with padding that is the end of a turn."""
    data = layout("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unused>", words=words)
    return PublishedTokenizer(data, "<|im_start|>", ("<|im_end|>",), "<|im_end|>", False, template)


def num_ids(data: bytes) -> int:
    read = json.loads(data)
    return max((*read["model"]["vocab"].values(), *(token["id"] for token in read["added_tokens"]))) + 1


VOCAB = num_ids(published().data)
# Positions of gpt and head width of Qwen3 are those that the GGUF reader of transformers takes whatever a file says.
MODELS: dict[str, Any] = {
    "llama": Llama(LlamaConfig(VOCAB, 96, 2, 6, 2, 64, 64, rope_base=700.0)),
    "llama-tied-stretched": Llama(
        LlamaConfig(VOCAB, 96, 2, 3, 1, 64, 64, 5000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192), is_head_tied=True)
    ),
    "gpt": GPT(GPTConfig(VOCAB, 96, 2, 4)),
    "qwen-2.5": Qwen(QwenConfig(VOCAB, 96, 2, 6, 2, 16, 64, "biased", 64)),
    "qwen-3-tied": Qwen(QwenConfig(VOCAB, 96, 2, 2, 1, 128, 64, "normed", 64, is_head_tied=True)),
}


def family_of(name: str) -> str:
    return name.split("-")[0]


def filled(name: str) -> Any:
    """The model with every parameter random, biases and gains too."""
    model = MODELS[name].eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


def checkpoint(directory: Path, name: str, template: str | None = CHATML) -> LoadedModel:
    """A checkpoint as an import leaves it."""
    model = filled(name)
    tokenizer, imported = adopt_published(published(template), VOCAB)
    renderer = TemplateRenderer(tokenizer, imported)
    info = CheckpointInfo(family_of(name), to_json(model.config), "imported", tokenizer.hash, renderer.hash)
    save_model(directory, model, tokenizer, info, imported)
    return load_model(directory)
