"""`fledge tokenizer train | show | report`: learn a vocabulary, look at its pieces, measure how well it fits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fledge.commands.progress import JsonLines, Lines
from fledge.commands.typed import standard_input
from fledge.data.catalogue import SOURCES, source
from fledge.data.filters import DEFAULT, example_text, undecodable
from fledge.data.folder import path_examples
from fledge.data.gpt2_vocabulary import load_gpt2
from fledge.data.package import cache_home
from fledge.data.reading import Drops, Split
from fledge.errors import TokenizerError, UserError
from fledge.recipes.runs import find_run, resolve_model
from fledge.text.report import Fit, fit_metrics, fits
from fledge.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

KINDS = ("bpe", "wordpiece", "unigram")
REPORTED_SOURCES = ("wikipedia", "stdlib", "chitchat", "hsk")
PIECE_STYLES = ("black on cyan", "black on yellow", "black on green", "black on magenta")
SHOWN_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(0x20), 0x7F)}
BYTES_PER_MEGABYTE = 1_000_000


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("tokenizer", help="train, show and measure tokenizers")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_train(actions)
    show = actions.add_parser("show", help="the tokens of a text")
    show.add_argument("tokenizer", metavar="FILE_OR_RUN", help="a tokenizer.json, a folder with one, or a run")
    show.add_argument("text", help="the text; - reads standard input")
    show.add_argument("--json", action="store_true", help="ids and pieces as one JSON object")
    show.set_defaults(run=run, action=_show)
    report = actions.add_parser("report", help="bytes per token per source, beside GPT-2's vocabulary")
    report.add_argument("tokenizer", metavar="FILE_OR_RUN", help="a tokenizer.json, a folder with one, or a run")
    _add_text_arguments(report)
    report.add_argument("--megabytes", type=float, default=1.0, help="text read of each source (default %(default)s)")
    report.add_argument("--without-gpt2", action="store_true", help="do not fetch GPT-2's vocabulary")
    report.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    report.set_defaults(run=run, action=_report)


def run(args: argparse.Namespace) -> int:
    code: int = args.action(args)
    return code


def _add_train(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = actions.add_parser("train", help="learn a vocabulary from text")
    _add_text_arguments(train)
    train.add_argument("--kind", choices=KINDS, default=TokenizerConfig.kind, help="default %(default)s")
    train.add_argument(
        "--vocab", type=int, default=TokenizerConfig.vocab_size, help="tokens at most (default %(default)s)"
    )
    train.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write")
    train.add_argument("--json", action="store_true", help="JSON lines on standard output")
    train.set_defaults(run=run, action=_train)


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(row.name for row in SOURCES)
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="PATH", help="files or folders of text")
    parser.add_argument("--source", nargs="+", default=[], metavar="NAME", help=f"named sources: {names}")


def _train(args: argparse.Namespace) -> int:
    if not args.text and not args.source:
        raise TokenizerError("no text to learn from; name some with --text PATH or --source NAME")
    if args.out.exists():
        raise TokenizerError(f"{args.out} exists already; name another file with --out, or remove it")
    config = TokenizerConfig(args.kind, args.vocab)
    bad = Drops()
    listener = JsonLines() if args.json else Lines()
    texts = _Counted(_training_texts(args, bad, listener))
    tokenizer = train_tokenizer(texts, config)
    tokenizer.save(args.out)
    if args.json:
        facts = {"kind": config.kind, "vocabulary": tokenizer.vocab_size, "bytes": texts.num_bytes}
        done = {"event": "done", "file": str(args.out), "sha256": tokenizer.hash, **facts, "left_out": bad.to_json()}
        print(json.dumps(done))
        return 0
    megabytes = texts.num_bytes / BYTES_PER_MEGABYTE
    print(f"{args.out}: {config.kind}, {tokenizer.vocab_size} tokens from {megabytes:.2f} MB of text")
    print(f"sha256 {tokenizer.hash}")
    if tokenizer.vocab_size < config.vocab_size:
        print(f"{config.vocab_size} tokens were asked for: this text holds no more")
    if bad.counts:
        print(f"left out: {bad}", file=sys.stderr)
    return 0


def _training_texts(args: argparse.Namespace, bad: Drops, listener: JsonLines | Lines) -> Iterator[str]:
    """The texts to learn from; the listener is told how many of the files and sources have been read."""
    readers = [(str(path), _path_texts(path, bad)) for path in args.text]
    readers += [(name, _source_texts(name, "train")) for name in args.source]
    for number, (name, texts) in enumerate(readers, start=1):
        first = next(texts, None)  # refuses what cannot be read before anything is said of it
        listener.stage("tokenizer", "reading", name)
        yield from (chain([first], texts) if first is not None else ())
        listener.step("tokenizer", number, len(readers), {})
    listener.stage("tokenizer", "learning", f"{args.vocab} tokens")


def _show(args: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(args.tokenizer)
    text = standard_input() if args.text == "-" else args.text
    ids = tokenizer.encode(text)
    pieces = tokenizer.pieces(ids)
    if args.json:
        print(json.dumps({"ids": ids, "pieces": pieces}, ensure_ascii=False))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    shown = [piece.translate(SHOWN_ESCAPES) for piece in pieces]
    # Without colours nothing but a bar would show where a token ends.
    console.print(Text("" if console.is_terminal else "|").join(_painted(shown)))
    console.print(" ".join(map(str, ids)))
    num_bytes = len(text.encode())
    console.print(f"{len(ids)} tokens, {num_bytes} bytes, {num_bytes / max(len(ids), 1):.2f} bytes per token")
    return 0


def _report(args: argparse.Namespace) -> int:
    if args.megabytes <= 0:
        raise UserError(f"--megabytes must be above 0, got {args.megabytes:g}")
    tokenizers = {"this": load_tokenizer(args.tokenizer)}
    if not args.without_gpt2:
        tokenizers["gpt2"] = load_gpt2(cache_home())
    bad = Drops()
    readers = {str(path): _path_texts(path, bad) for path in args.text}
    names = args.source or ([] if args.text else REPORTED_SOURCES)
    readers |= {name: _source_texts(name, "validation") for name in names}
    limit = int(args.megabytes * BYTES_PER_MEGABYTE)
    rows = fits(tokenizers, {name: _first_bytes(texts, limit) for name, texts in readers.items()})
    if args.json:
        print(json.dumps(fit_metrics(rows), ensure_ascii=False))
    else:
        _print_table(rows, tokenizers)
    if bad.counts:
        print(f"left out: {bad}", file=sys.stderr)
    return 0


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, of a folder that holds one, of a run, or of RUN:STAGE."""
    path = Path(spec)
    if path.is_file():
        return Tokenizer.load(path)
    if (path / "tokenizer.json").is_file():
        return Tokenizer.load(path / "tokenizer.json")
    folder = resolve_model(spec) if ":" in spec else find_run(spec) / "tokenizer"
    return Tokenizer.load(folder / "tokenizer.json")


def _print_table(rows: Iterable[Fit], tokenizers: dict[str, Tokenizer]) -> None:
    table = Table("source", title="bytes per token (higher is better)")
    table.add_column("bytes", justify="right")
    for name, tokenizer in tokenizers.items():
        table.add_column(f"{name} ({tokenizer.vocab_size:,})", justify="right")
    for row in rows:
        table.add_row(row.source, f"{row.num_bytes:,}", *(f"{row.bytes_per_token(name):.3f}" for name in tokenizers))
    Console().print(table)


def _painted(pieces: list[str]) -> Iterator[Text]:
    for number, piece in enumerate(pieces):
        yield Text(piece, PIECE_STYLES[number % len(PIECE_STYLES)])


def _path_texts(path: Path, bad: Drops) -> Iterator[str]:
    """The texts of the user's files; what cannot be used is counted in `bad`."""
    for example in path_examples(path, "user", bad=bad):
        text = example_text(example)
        reason = undecodable(text, DEFAULT)
        if reason is None:
            yield text
        else:
            bad.add(reason, example.provenance.id)


def _source_texts(name: str, split: Split) -> Iterator[str]:
    return map(example_text, source(name).open(split, cache=cache_home(), seed=0))


def _first_bytes(texts: Iterator[str], limit: int) -> list[str]:
    """Whole texts from the beginning until they hold `limit` bytes."""
    kept: list[str] = []
    size = 0
    for text in texts:
        kept.append(text)
        size += len(text.encode())
        if size >= limit:
            break
    return kept


class _Counted:
    """Hands texts on and counts their bytes."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.num_bytes += len(text.encode())
            yield text
