"""The corpus of a run: chosen sources, filtered, split, written down; then, once there is a tokenizer, shards.

`write_corpus` reads the sources once and leaves one JSONL file a side (each line `{"text"}` or `{"messages"}` with
source, id and licence) and a manifest with the yield of every filter. Everything later (tokenizer, shards, chats)
reads that folder, so no two stages can disagree about which document is held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fledge.data import catalogue
from fledge.data.filters import FilterConfig, Sieve, example_text, select
from fledge.data.folder import Content, path_examples
from fledge.data.jsonl import example_to_json, record_example
from fledge.data.manifest import NAME, check_file, read_manifest
from fledge.data.reading import Drops, Example, Split
from fledge.data.shards import Encoder, Shards, write_shards
from fledge.errors import DataError
from fledge.files import sha256_file, write_directory
from fledge.types import ChatExample, TextExample

KIND = "fledge corpus"
SIDES: tuple[Split, Split] = ("train", "validation")
PROGRESS_EVERY = 1000  # documents
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Ingredient:
    """A source of the corpus: one of the catalogue by `name`, or, with `path`, the user's own folder or file.

    `limit_bytes` bounds the UTF-8 bytes read, taken from a shuffle by the seed; None: all. With `skip_bad`, files and
    lines that cannot be used are counted and left out instead of refused. `only` takes the program code of a path, or
    all else. One that `may_be_empty` is not refused for yielding nothing.
    """

    name: str
    path: str | None = None
    only: Content | None = None
    limit_bytes: int | None = None
    skip_bad: bool = False
    may_be_empty: bool = False


def write_corpus(
    ingredients: Sequence[Ingredient],
    folder: Path,
    *,
    cache: Path,
    seed: int,
    filters: FilterConfig | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Read, filter and split the ingredients into `folder`, replacing it once the new one is whole.

    Earlier ingredients win where two hold the same text. `progress(source, documents)` is called now and then. Raises
    `DataError` for an unknown source, input that cannot be used and an ingredient that yields nothing; `RunError` when
    the disk is full.
    """
    names = [ingredient.name for ingredient in ingredients]
    if len(set(names)) < len(names) or not names:
        raise DataError(f"the corpus is to be made of ({', '.join(names)}): expected one source or more, none twice")
    kitchen = _Kitchen(cache, seed, Sieve(filters or FilterConfig()), progress or _silent)
    write_directory(folder, lambda workplace: kitchen.fill(workplace, ingredients))
    return Corpus.open(folder)


def read_ingredient(ingredient: Ingredient, *, cache: Path, seed: int, drops: Drops) -> Iterator[Example]:
    """The examples of an ingredient in an order shuffled by `seed`, unfiltered, both sides of the split."""
    if ingredient.path is None:
        examples = catalogue.source(ingredient.name).open("all", cache=cache, seed=seed)
    else:
        bad = drops if ingredient.skip_bad else None
        examples = select(
            path_examples(Path(ingredient.path), ingredient.name, only=ingredient.only, drops=drops, bad=bad),
            "all",
            seed,
        )
    num_bytes = 0
    for example in examples:
        num_bytes += len(example_text(example).encode("utf-8", "surrogatepass"))
        if ingredient.limit_bytes is not None and num_bytes > ingredient.limit_bytes:
            return
        yield example


class Corpus:
    """A corpus on disk. `yields[source]` says what was read, kept on each side and dropped, and why."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.yields: dict[str, dict[str, Any]] = manifest["yields"]
        self.sources: tuple[str, ...] = tuple(self.yields)
        self.hash = hashlib.sha256("".join(manifest["files"][side]["sha256"] for side in SIDES).encode()).hexdigest()

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> Corpus:
        """The corpus in `folder`; sizes are always checked, contents too if `verify`; `DataError` otherwise."""
        manifest = read_manifest(folder, KIND)
        for side in SIDES:
            facts = manifest["files"][side]
            check_file(folder / f"{side}.jsonl", facts["bytes"], facts["sha256"], verify=verify)
        return cls(folder, manifest)

    def examples(self, side: Split, sources: Iterable[str] | None = None) -> Iterator[Example]:
        """The examples of a side, in the order they were written; of all sources, or of those named."""
        wanted = self._known(sources)
        for each in SIDES if side == "all" else (side,):
            for record in _records(self.folder / f"{each}.jsonl"):
                if record["source"] in wanted:
                    yield record_example(record, record["source"], record["id"], record["licence"])

    def texts(self, side: Split, sources: Iterable[str] | None = None) -> Iterator[TextExample]:
        """The documents among `examples`."""
        return (example for example in self.examples(side, sources) if isinstance(example, TextExample))

    def chats(self, side: Split, sources: Iterable[str] | None = None) -> Iterator[ChatExample]:
        """The conversations among `examples`."""
        return (example for example in self.examples(side, sources) if isinstance(example, ChatExample))

    def _known(self, sources: Iterable[str] | None) -> set[str]:
        wanted = set(self.sources if sources is None else sources)
        if unknown := wanted - set(self.sources):
            raise DataError(f"{self.folder} holds no source '{min(unknown)}': it has {', '.join(self.sources)}")
        return wanted


def tokenizer_sample(corpus: Corpus, max_bytes: int, seed: int, *, floor_share: float = 0.05) -> Iterator[str]:
    """Training texts for a tokenizer: documents and messages of the train side, about `max_bytes` in all.

    Sources keep their proportions, except that each gets `floor_share` of `max_bytes` (or all it has), so that a small
    folder of the user's is not lost beside large sources.
    """
    sizes = {name: account["kept_bytes"]["train"] for name, account in corpus.yields.items()}
    total = max(sum(sizes.values()), 1)
    chances = {
        name: min(1.0, max(max_bytes / total, floor_share * max_bytes / max(size, 1))) for name, size in sizes.items()
    }
    rng = np.random.default_rng(seed)
    for example in corpus.examples("train"):
        if rng.random() >= chances[example.provenance.source]:
            continue
        if isinstance(example, TextExample):
            yield example.text
        else:
            yield from (message.text for message in example.conversation.messages)


def tokenize_corpus(
    corpus: Corpus, encoder: Encoder, folder: Path, *, sources: Iterable[str] | None = None
) -> dict[Split, Shards]:
    """Shards of the documents (not the conversations) of both sides, in `folder`/train and `folder`/validation.

    What is there is replaced. Raises `DataError` if a side has no document.
    """
    names = None if sources is None else tuple(sources)
    return {side: write_shards(corpus.texts(side, names), encoder, folder / side) for side in SIDES}


class _Kitchen:
    """One run of `write_corpus`: what every ingredient goes through."""

    def __init__(self, cache: Path, seed: int, sieve: Sieve, progress: Progress) -> None:
        self._cache = cache
        self._seed = seed
        self._sieve = sieve
        self._progress = progress

    def fill(self, workplace: Path, ingredients: Sequence[Ingredient]) -> None:
        unusable: dict[str, dict[str, Any]] = {}
        with ExitStack() as stack:
            files = {
                side: stack.enter_context((workplace / f"{side}.jsonl").open("w", encoding="utf-8")) for side in SIDES
            }
            for ingredient in ingredients:
                drops = Drops()
                for side, example in self._sifted(ingredient, drops):
                    files[side].write(json.dumps(example_to_json(example), ensure_ascii=False) + "\n")
                self._refuse_nothing(ingredient, drops)
                unusable[ingredient.name] = drops.to_json()
        self._write_manifest(workplace, unusable)

    def _sifted(self, ingredient: Ingredient, drops: Drops) -> Iterator[tuple[Split, Example]]:
        examples = read_ingredient(ingredient, cache=self._cache, seed=self._seed, drops=drops)
        number = 0
        for number, found in enumerate(self._sieve.sift(ingredient.name, examples), start=1):
            if number % PROGRESS_EVERY == 0:
                self._progress(ingredient.name, number)
            yield found
        self._progress(ingredient.name, number)

    def _refuse_nothing(self, ingredient: Ingredient, drops: Drops) -> None:
        account = self._sieve.yields[ingredient.name]
        if account.kept["train"] or ingredient.may_be_empty:
            return
        reasons = [f"{count} x {reason}" for reason, count in account.dropped.items()]
        said = "; ".join(filter(None, [*reasons, str(drops)])) or "nothing was dropped"
        where = f" at {ingredient.path}" if ingredient.path else ""
        raise DataError(
            f"source '{ingredient.name}'{where} gave no training document out of {account.read} read ({said}); "
            "expected UTF-8 text: add some, or leave the source out"
        )

    def _write_manifest(self, workplace: Path, unusable: dict[str, dict[str, Any]]) -> None:
        yields = {
            name: {**account.to_json(), "unusable": unusable[name]} for name, account in self._sieve.yields.items()
        }
        files = {side: workplace / f"{side}.jsonl" for side in SIDES}
        manifest = {
            "kind": KIND,
            "version": 1,
            "filters": asdict(self._sieve.config),
            "yields": yields,
            "files": {
                side: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for side, path in files.items()
            },
        }
        (workplace / NAME).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record: dict[str, Any] = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: altered ({error}); remove its folder and make it anew"
                ) from error
            yield record


def _silent(source: str, documents: int) -> None:
    """Nobody asked to be told."""
