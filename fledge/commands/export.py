"""`fledge export MODEL --to FORMAT OUT`: a model of fledge's for other programs to run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fledge.errors import UserError, nearest

HUGGINGFACE, GGUF = "huggingface", "gguf"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("export", help="write a model for transformers, vLLM or llama.cpp")
    parser.add_argument("model", metavar="MODEL", help="a run, RUN:STAGE, an imported model, or a checkpoint folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the directory or the .gguf file to make")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="huggingface[:float32|bfloat16|float16], or gguf[:F32|F16|BF16|Q8_0|Q4_0|Q4_1|Q5_0|Q5_1]; "
        "without a type nothing is lost",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs live (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a model that cannot be read, or that the format cannot hold."""
    from fledge.formats.checkpoint import load_model
    from fledge.formats.export import export_gguf, export_huggingface
    from fledge.formats.gguf_tensors import WRITTEN
    from fledge.formats.huggingface import DTYPES
    from fledge.recipes.runs import resolve_model

    to, _, kind = args.to.partition(":")
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    kinds = {HUGGINGFACE: tuple(dtypes), GGUF: WRITTEN}
    if to not in kinds:
        raise UserError(f"--to {to}: unknown; {nearest(to, kinds)}")
    if kind and kind not in kinds[to]:
        raise UserError(f"--to {args.to}: {to} is not written as {kind}; {nearest(kind, kinds[to])}")
    loaded = load_model(resolve_model(args.model, args.runs))
    if to == HUGGINGFACE:
        export_huggingface(loaded, args.out, dtype=dtypes[kind or "float32"])
    elif not export_gguf(loaded, args.out, kind or None):
        print(
            "note: llama.cpp has no rule that cuts text into words as this tokenizer does; GPT-2's is written instead, "
            "and some texts will become other tokens there",
            file=sys.stderr,
        )
    print(f"{args.out}: {loaded.info.family} of stage {loaded.info.stage}, {args.to}")
    return 0
