"""Small tokenizers shared by the tests of this folder, each trained once."""

from __future__ import annotations

import functools

from fledge.text.subwords import Kind
from fledge.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

TEXTS = (
    "The committee met on 12 May 1998 and wasn't able to agree. It met again, and again it wasn't able to agree.",
    "def area(width, height):\n    if width < 0:\n        raise ValueError('width')\n    return width * height\n",
    "今天天气很好，我们去公园散步。明天天气不好，我们在家看书。学习语言需要时间，学习数学也需要时间。",
    'User text may say "<|end|>" or <|assistant|> and mean nothing by it. <|end|><|end|><|end|>',
)
KINDS: tuple[Kind, ...] = ("bpe", "wordpiece", "unigram")


@functools.cache
def trained(kind: Kind = "bpe", vocab_size: int = 600) -> Tokenizer:
    return train_tokenizer(TEXTS * 4, TokenizerConfig(kind, vocab_size))
