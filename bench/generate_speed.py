"""The engine's generation beside `transformers.generate`: the same weights, prompts and number of tokens, in one run.

    OMP_NUM_THREADS=2 .venv/bin/python bench/generate_speed.py
    .venv/bin/python bench/generate_speed.py --family gpt --width 512 --layers 8 --batch 1 32 --sample

The two take turns, so that a busy machine slows both; `ratio` is the median of their turns' time ratios. Greedy tokens
are compared: at the first difference (a near tie that rounding decides) the row's later tokens need not agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from fledge.formats.huggingface import save_huggingface
from fledge.infer.engine import CacheType, Engine, EngineConfig
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.text.tokenizer import Tokenizer
from fledge.types import Request, SamplingParams

VOCAB, PAD = 8192, 1
WIDTH_PER_HEAD = 64
_NUMBERS = count()


def build(family: str, width: int, num_layers: int, max_positions: int) -> GPT | Llama:
    """A randomly initialised model; llama with two query heads a key head."""
    num_heads = width // WIDTH_PER_HEAD
    if family == "gpt":
        model: GPT | Llama = GPT(GPTConfig(VOCAB, width, num_layers, num_heads, max_positions))
    else:
        mlp_width = 64 * round(width * 8 / 3 / 64)  # SwiGLU with the parameters of a 4 x width MLP
        model = Llama(LlamaConfig(VOCAB, width, num_layers, num_heads, num_heads // 2, mlp_width, max_positions))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def twin(family: str, model: GPT | Llama) -> Any:
    """The same weights as a `transformers` model."""
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(family, model, Path(folder) / "model")
        return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()


class Ids:
    """A tokenizer of a model with random weights: its ids mean nothing."""

    pad_id, opening = PAD, None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        return b"x"


def engine_of(model: Any, *, is_compiled: bool, cache_type: CacheType = "model") -> Engine:
    tokenizer = cast(Tokenizer, Ids(model.vocab_size))
    return Engine(model, tokenizer, EngineConfig(cache_bytes=1 << 29, compile=is_compiled, cache_type=cache_type))


def requests(
    prompts: Sequence[Sequence[int]], params: SamplingParams, stop_ids: frozenset[int] = frozenset()
) -> list[Request]:
    return [Request(f"request {next(_NUMBERS)}", tuple(prompt), params, stop_ids=stop_ids) for prompt in prompts]


def ours(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    engine.update_weights({}, f"weights {next(_NUMBERS)}")  # so that no prompt is found in the cache
    return [list(completion.ids) for (completion,) in engine.generate(requests(prompts, params))]


def theirs(
    model: Any, prompts: Sequence[Sequence[int]], params: SamplingParams, stop_ids: frozenset[int] = frozenset()
) -> list[list[int]]:
    width = max(map(len, prompts))
    tokens_BT = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    seen_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    is_sampled = params.temperature > 0
    options = {"temperature": params.temperature, "top_k": params.top_k or 0} if is_sampled else {}
    config = transformers.GenerationConfig(
        max_new_tokens=params.max_tokens,
        min_new_tokens=None,
        do_sample=is_sampled,
        pad_token_id=PAD,
        eos_token_id=sorted(stop_ids) or None,
        **options,
    )
    with torch.inference_mode():
        out_BT = model.generate(input_ids=tokens_BT, attention_mask=seen_BT, generation_config=config)
    answers: list[list[int]] = out_BT[:, width:].tolist()
    return answers


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, engine: Engine, peer: Any, batch: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(batch)
    shortest = args.prompt // 2 if args.uneven else args.prompt
    lengths = torch.randint(shortest, args.prompt + 1, (batch,), generator=random).tolist()
    prompts = [torch.randint(2, VOCAB, (length,), generator=random).tolist() for length in lengths]
    params = SamplingParams(max_tokens=args.tokens, temperature=1.0 if args.sample else 0.0)
    mine, other = ours(engine, prompts, params), theirs(peer, prompts, params)  # warms both up
    agreeing = sum(a == b for a, b in zip(mine, other, strict=True))
    assert all(len(a) == len(b) == args.tokens for a, b in zip(mine, other, strict=True))
    turns = [
        (seconds(lambda: ours(engine, prompts, params)), seconds(lambda: theirs(peer, prompts, params)))
        for _ in range(args.repeats)
    ]
    made = batch * args.tokens
    return {
        "batch": batch,
        "fledge_tokens_per_second": round(made / statistics.median(mine for mine, _ in turns), 1),
        "transformers_tokens_per_second": round(made / statistics.median(other for _, other in turns), 1),
        "ratio": round(statistics.median(other / mine for mine, other in turns), 2),
        "equal_rows": None if args.sample else f"{agreeing}/{batch}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("gpt", "llama"), default="llama")
    parser.add_argument("--width", type=int, default=256, help=f"a multiple of {2 * WIDTH_PER_HEAD}")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to make for each prompt")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="our steps of up to eight answers as compiled code")
    parser.add_argument("--sample", action="store_true", help="temperature 1 instead of greedy")
    parser.add_argument("--uneven", action="store_true", help="prompts of half to whole length")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = build(args.family, args.width, args.layers, args.prompt + args.tokens)
    peer = twin(args.family, model)
    engine = engine_of(model, is_compiled=args.compile)
    setting = {
        **vars(args),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(setting))
    for batch in args.batch:
        print(json.dumps(measure(args, engine, peer, batch)), flush=True)


if __name__ == "__main__":
    main()
