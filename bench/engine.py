"""The engine beside its peers, in one run: ratios, and shares of the time that reading the same bytes takes.

    .venv/bin/python bench/engine.py                          # every case that needs nothing else
    .venv/bin/python bench/engine.py --case gpt small --repeats 9
    .venv/bin/python bench/engine.py --case smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf --llama-python PYTHON

    gpt       a 124M gpt, random weights, beside transformers.generate (float32, cached, one prompt); at once: 1, 4, 32
    small     14M parameters read a token, beside the plain eager loop (infer/naive.py)
    rollout   many prompts sampled at once, as PPO does, beside transformers.generate with the same batch
    smollm2   SmolLM2-135M, 4 bits, beside llama.cpp over the same file; PYTHON has llama-cpp-python

The measured take turns, so that a busy machine slows them alike; a ratio is the median of the turns' ratios. `roofline`
is the time to read a buffer of exactly the bytes a step streams (weights of the linear layers, keys and values) over
the time the step took. One JSON object a line.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import torch
import transformers
from generate_speed import PAD, engine_of, requests, theirs, twin
from roofline import Roofline, clocks
from torch import nn

from fledge.formats.gguf import read_gguf
from fledge.formats.gguf_models import read_model
from fledge.infer import naive
from fledge.infer.engine import CacheType, Engine
from fledge.infer.quantize import quantize
from fledge.infer.quantized import Int4Linear, Int8Linear
from fledge.infer.runner import probe_sites
from fledge.models.gpt import GPT
from fledge.models.gpt import PRESETS as GPT_SIZES
from fledge.models.llama import Llama, LlamaConfig
from fledge.types import SamplingParams


def seconds(call: Callable[[], Any]) -> float:
    start = clocks.now()
    call()
    return clocks.now() - start


def whole(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> float:
    """Seconds for the answers, prompts included: none of them is found in the cache of an earlier turn."""
    engine.update_weights({}, f"turn {clocks.now()}")
    return seconds(lambda: engine.generate(requests(prompts, params)))


def steps(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> float:
    """Seconds for a step of decoding, once all prompts are read: the median."""
    for request in requests(prompts, params):
        engine.submit(request)
    began: set[str] = set()
    while len(began) < len(prompts):
        began |= {event.request_id for event in engine.step()}
    found = []
    while engine.has_work:
        start = clocks.now()
        events = engine.step()
        if len(events) == len(prompts):  # the last steps may have fewer
            found.append(clocks.now() - start)
    return statistics.median(found)


def streamed_bytes(model: Any, positions: int, kept_dtype: torch.dtype | None) -> int:
    """What a step must read: the weights of the linear layers, and so many positions' keys and values."""
    weights = 0
    for module in cast(nn.Module, model).modules():
        if isinstance(module, Int8Linear | Int4Linear):
            weights += sum(buffer.nbytes for buffer in module.buffers())
        elif isinstance(module, nn.Linear):
            weights += module.weight.nbytes
    return weights + positions * sum(shape.num_bytes for shape in probe_sites(model, kept_dtype).values())


def prompts_of(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(batch)
    return torch.randint(2, vocab_size, (batch, length), generator=random).tolist()


def turns(number: int, *measured: Callable[[], float]) -> list[tuple[float, ...]]:
    for one in measured:
        one()  # warm
    return [tuple(one() for one in measured) for _ in range(number)]


def medians(rows: Sequence[tuple[float, ...]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def tell(**what: Any) -> None:
    print(
        json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in what.items()}),
        flush=True,
    )


def share_of_roofline(args: argparse.Namespace, engine: Engine, model: Any, batch: int) -> dict[str, float]:
    """Milliseconds of a decoding step and of the roofline, and the share."""
    prompts = prompts_of(model.vocab_size, batch, args.prompt)
    params = SamplingParams(max_tokens=args.tokens, temperature=0.0)
    num_bytes = streamed_bytes(model, batch * (args.prompt + args.tokens // 2), engine.config.kept_dtype)
    roofline = Roofline(num_bytes, args.threads, args.folder)
    rows = turns(args.repeats, lambda: steps(engine, prompts, params), roofline.seconds)
    step, floor = medians(rows)
    share = statistics.median(floor / step for step, floor in rows)
    return {"step_ms": 1e3 * step, "streamed_mb": num_bytes / 1e6, "roofline_ms": 1e3 * floor, "roofline": share}


def variants(model: Any, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        own = model if name == "float32" else copy.deepcopy(model)
        if name != "float32":
            quantize(own, cast(Any, name))
        yield name, own


def gpt(args: argparse.Namespace) -> None:
    """Targets: int8 3.5 times, 32 at once 25 times transformers' rate with one prompt; roofline 0.85 and 0.7."""
    model = GPT(GPT_SIZES["gpt2-124m"]).eval()
    peer = twin("gpt", model)
    params = SamplingParams(max_tokens=args.tokens, temperature=0.0)
    alone = prompts_of(model.vocab_size, 1, args.prompt)
    for name, own in variants(model, args.formats):
        engine = engine_of(own, is_compiled=args.compile, cache_type=args.cache_type)
        for batch in args.batch:
            many = prompts_of(model.vocab_size, batch, args.prompt)
            rows = turns(
                args.repeats,
                lambda engine=engine, many=many: whole(engine, many, params),
                lambda: seconds(lambda: theirs(peer, alone, params)),
            )
            mine, other = medians(rows)
            ratio = statistics.median(batch * other / mine for mine, other in rows)
            about = share_of_roofline(args, engine, own, batch)
            rates = {"tokens_per_second": batch * args.tokens / mine, "transformers": args.tokens / other}
            tell(case="gpt", format=name, batch=batch, **rates, ratio=ratio, **about)


def small_model() -> Llama:
    """13.8M parameters read a token: 6 layers of 384, 8192 tokens."""
    model = Llama(LlamaConfig(8192, 384, 6, 6, 6, 1024, 1024))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def small(args: argparse.Namespace) -> None:
    """Target: 1.5 times the plain loop."""
    model = small_model()
    params = SamplingParams(max_tokens=args.tokens, temperature=0.0)
    prompts = prompts_of(model.vocab_size, 1, args.prompt)

    def plain() -> float:
        decode: Callable[[Sequence[int]], str] = lambda ids: ""  # noqa: E731
        return seconds(lambda: naive.generate(model, prompts, params, stop_ids=(), pad_id=PAD, decode=decode))

    for name, own in variants(model, args.formats):
        engine = engine_of(own, is_compiled=args.compile, cache_type=args.cache_type)
        rows = turns(args.repeats, lambda engine=engine: whole(engine, prompts, params), plain)
        mine, other = medians(rows)
        ratio = statistics.median(other / mine for mine, other in rows)
        about = share_of_roofline(args, engine, own, 1)
        tell(
            case="small",
            format=name,
            tokens_per_second=args.tokens / mine,
            plain=args.tokens / other,
            ratio=ratio,
            **about,
        )


def rollout(args: argparse.Namespace) -> None:
    """Target: 3 times transformers.generate. Sampled, prompts of uneven lengths, answers that end when they will, as in
    PPO; log-probabilities on our side only. The ratio is of the rates of tokens that belong to an answer."""
    model = small_model()
    peer = twin("llama", model)
    params = SamplingParams(max_tokens=args.tokens, temperature=1.0)
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.prompt // 4, args.prompt + 1, (args.rollouts,), generator=random).tolist()
    prompts = [torch.randint(2, model.vocab_size, (length,), generator=random).tolist() for length in lengths]
    # Random weights say every token about as often as any other: so many of them make answers of that length.
    num_stops = round(model.vocab_size / args.mean_length) if args.mean_length else 0
    stops = frozenset(range(2, 2 + num_stops))

    def ours_rate(engine: Engine) -> float:
        engine.update_weights({}, f"turn {clocks.now()}")
        start = clocks.now()
        answers = [list(own.ids) for [own] in engine.generate(requests(prompts, params, stops))]
        return useful(answers, stops) / (clocks.now() - start)

    def their_rate() -> float:
        start = clocks.now()
        answers = theirs(peer, prompts, params, stops)
        return useful(answers, stops) / (clocks.now() - start)

    for name, own in variants(model, args.formats):
        engine = engine_of(own, is_compiled=args.compile, cache_type=args.cache_type)
        rows = turns(max(3, args.repeats // 2), lambda engine=engine: ours_rate(engine), their_rate)
        mine, other = medians(rows)
        ratio = statistics.median(mine / other for mine, other in rows)
        about = {"prompts": args.rollouts, "mean_length": args.mean_length}
        tell(case="rollout", format=name, **about, tokens_per_second=mine, transformers=other, ratio=ratio)


def useful(answers: Sequence[Sequence[int]], stops: frozenset[int]) -> int:
    """Tokens before the first stop; what comes after it fills up a row. One more for the stop itself."""
    total = 0
    for answer in answers:
        ends = (place for place, token in enumerate(answer) if token in stops)
        total += 1 + next(ends, len(answer) - 1)
    return total


@contextmanager
def llama_cpp(args: argparse.Namespace) -> Iterator[Callable[..., dict[str, Any]]]:
    worker = Path(__file__).with_name("llamacpp_worker.py")
    command = [args.llama_python, str(worker), args.gguf, str(args.threads), args.clock]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(**order: Any) -> dict[str, Any]:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield ask
        process.stdin.close()


def smollm2(args: argparse.Namespace) -> None:
    """Targets: 1.3 times llama.cpp alone, twice from 4 at once, at equal or better likelihood of the same ids."""
    if not args.gguf or not args.llama_python:
        sys.exit("the case smollm2 needs --gguf FILE and --llama-python PYTHON")
    read = read_model(read_gguf(Path(args.gguf)))
    model: Any = read.model
    quantize(model, "int4", blocks=read.blocks)
    engine = engine_of(model, is_compiled=args.compile, cache_type=args.cache_type)
    params = SamplingParams(max_tokens=args.tokens, temperature=0.0)
    with llama_cpp(args) as ask:
        for batch in args.batch:
            prompts = prompts_of(model.vocab_size, batch, args.prompt)
            order = {"do": "decode", "prompt": prompts[0], "batch": batch, "tokens": args.tokens}
            rows = turns(
                args.repeats,
                lambda prompts=prompts: steps(engine, prompts, params),
                lambda order=order: ask(**order)["seconds"] / args.tokens,
            )
            mine, other = medians(rows)
            ratio = statistics.median(other / mine for mine, other in rows)
            about = share_of_roofline(args, engine, model, batch)
            rates = {"tokens_per_second": batch / mine, "llama_cpp": batch / other}
            tell(case="smollm2", format="int4", batch=batch, **rates, ratio=ratio, **about)
        if args.text is not None:
            compare_likelihoods(args, engine, ask)


def compare_likelihoods(args: argparse.Namespace, engine: Engine, ask: Callable[..., dict[str, Any]]) -> None:
    """Both read the same ids of the same text; bits per byte of each."""
    from fledge.formats.gguf_tokenizer import read_tokenizer
    from fledge.text.published import adopt_published

    published = read_tokenizer(read_gguf(Path(args.gguf)))
    tokenizer, _ = adopt_published(published, engine._model.vocab_size)
    text = args.text.read_text(encoding="utf-8")[: args.text_characters]
    ids = [tokenizer.end_of_text_id, *tokenizer.encode(text)]
    rows = [ids[first : first + 1024] for first in range(0, len(ids), 1024)]
    rows = [row for row in rows if len(row) > 1]
    bits = 1 / (len(text.encode()) * 0.6931471805599453)
    mine = -sum(map(sum, engine.score(rows)))
    tell(
        case="smollm2",
        bits_per_byte=mine * bits,
        llama_cpp_bits_per_byte=sum(ask(do="nats", rows=rows)["nats"]) * bits,
        tokens=len(ids),
    )


CASES = {"gpt": gpt, "small": small, "rollout": rollout, "smollm2": smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["gpt", "small", "rollout"])
    parser.add_argument("--formats", nargs="+", choices=("float32", "int8", "int4"), default=["float32", "int8"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 32], help="requests at once")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to make for each prompt")
    parser.add_argument("--rollouts", type=int, default=64, help="prompts of the case rollout")
    parser.add_argument("--mean-length", type=int, default=20, help="of rollouts, about; 0: none ends before --tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--cache-type", choices=get_args(CacheType), default="model", help="float16 halves what many answers read"
    )
    parser.add_argument("--no-compile", action="store_false", dest="compile", help="run the engine's steps uncompiled")
    parser.add_argument("--gguf", help="of the case smollm2")
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--text", type=Path, help="text to compare likelihoods on, in the case smollm2")
    parser.add_argument("--text-characters", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread on a busy machine"
    )
    args = parser.parse_args()
    if args.clock == "cpu":
        args.threads = 1
        clocks.now = time.process_time
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tell(
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=args.threads,
        clock=args.clock,
        compile=args.compile,
        cache_type=args.cache_type,
    )
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in args.case:
            CASES[name](args)


if __name__ == "__main__":
    main()
