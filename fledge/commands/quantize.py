"""`fledge quantize MODEL --to int8`: a smaller, faster checkpoint of the same model, and what it costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fledge.errors import ConfigError, RunError

MEGABYTE = 1_000_000
FORMATS = ("int8", "int4")  # those of infer/quantize.py, which is not imported to print a help text
LIMIT = 200  # documents of a source: enough for the third decimal


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("quantize", help="make a smaller, faster checkpoint of a model")
    parser.add_argument("model", metavar="RUN[:STAGE]", help="a run, a stage of one, or a checkpoint folder")
    parser.add_argument("--to", choices=FORMATS, required=True, help="bits of a weight")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to make (default: beside the model)")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="layers to leave as they are, by name")
    parser.add_argument(
        "--source", nargs="+", default=[], metavar="NAME", help="measure on these sources, not on the run's own text"
    )
    parser.add_argument("--limit", type=int, default=LIMIT, help="documents a source (default: %(default)s; 0: none)")
    parser.add_argument("--row-length", type=int, help="tokens read at once (default: as in pretraining)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders live (default: %(default)s)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object instead of sentences")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a model that cannot be quantised or a folder that is there already."""
    from fledge.formats.checkpoint import load_model
    from fledge.infer.quantize import save_quantized
    from fledge.recipes.measure import MeasureOrder, language
    from fledge.recipes.runs import resolve_model

    if args.limit < 0:
        raise ConfigError(f"--limit {args.limit}: expected 0 or more")
    directory = resolve_model(args.model, args.runs)
    out = args.out or directory.with_name(f"{directory.name}-{args.to}")
    if out.exists():
        raise RunError(f"{out} exists already; name another folder with --out, or remove it")
    order = MeasureOrder(sources=tuple(args.source), limit=args.limit, row_length=args.row_length)
    loaded = load_model(directory)
    before = language(loaded, directory, order) if args.limit else {}
    hashed = save_quantized(out, loaded, args.to, args.skip)
    after = language(loaded, directory, order) if args.limit else {}
    found = {
        "directory": str(out),
        "hash": hashed,
        "bytes": (out / "model.safetensors").stat().st_size,
        "bytes_before": (directory / "model.safetensors").stat().st_size,
        "bits_per_byte": after.get("bits_per_byte"),
        "bits_per_byte_before": before.get("bits_per_byte"),
    }
    print(json.dumps(found) if args.as_json else _sentences(found, args.to))
    return 0


def _sentences(found: dict[str, Any], target: str) -> str:
    size, before = found["bytes"] / MEGABYTE, found["bytes_before"] / MEGABYTE
    lines = [f"{found['directory']}: {target}, {size:.1f} MB of {before:.1f}, {found['hash'][:12]}"]
    if found["bits_per_byte"] is None:
        lines.append("no held-out text to measure on; name some with --source")
    else:
        now, then = found["bits_per_byte"], found["bits_per_byte_before"]
        lines.append(f"bits per byte of held-out text: {now:.4f}, {now - then:+.4f} by rounding")
    lines.append(f"talk with it: fledge chat {found['directory']}")
    return "\n".join(lines)
