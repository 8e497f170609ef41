"""Stages 1 and 2: sources -> filtered documents with provenance -> a tokenizer -> memory-mapped shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fledge.data.catalogue import source
from fledge.data.corpus import SIDES, Corpus, Ingredient, tokenize_corpus, tokenizer_sample, write_corpus
from fledge.data.filters import example_text
from fledge.data.folder import Content, contents
from fledge.data.gpt2_vocabulary import load_gpt2
from fledge.data.package import cache_home, fetch, package_path
from fledge.data.reading import Example, Split
from fledge.data.shards import Shards
from fledge.errors import DataError
from fledge.recipes.chats import SHARES, part_of
from fledge.recipes.plan import USER_CODE, USER_TEXT
from fledge.recipes.report import Cell, Fact, Licence, Table
from fledge.recipes.training import Context
from fledge.text.chat import ChatRenderer
from fledge.text.report import fits
from fledge.text.tokenizer import Tokenizer, train_tokenizer
from fledge.types import ChatExample

USER_SOURCES: dict[str, Content] = {USER_TEXT: "other", USER_CODE: "code"}
TOKENIZER_SAMPLE_CHARS = 4_000_000  # more changes the vocabulary of a few thousand tokens by less than noise
MEASURED_CHARS = 200_000  # of each source, for bytes per token


def corpus_stage(context: Context) -> None:
    """Read, filter, split and write down every source of the plan."""
    plan = context.plan.corpus
    names = [*plan.prose, *plan.code, *plan.chats]
    ingredients = [Ingredient(name, limit_bytes=plan.limits.get(name)) for name in names]
    if plan.text is not None:
        found = contents(Path(plan.text))
        ingredients += [
            Ingredient(name, path=plan.text, only=kind, may_be_empty=len(found) > 1)
            for name, kind in USER_SOURCES.items()
            if kind in found
        ]
    _fetch(context, names)
    folder = context.path / "documents"
    total = len(ingredients)

    def progress(name: str, documents: int) -> None:
        done = [ingredient.name for ingredient in ingredients].index(name)
        context.listener.step(context.name, done, total, {"documents": float(documents)})

    filters = plan.filters
    corpus = write_corpus(
        ingredients, folder, cache=cache_home(), filters=filters, seed=context.plan.seed, progress=progress
    )
    _refuse_gaps(context, corpus)
    context.listener.step(context.name, total, total, {})
    context.report = replace(
        context.report,
        headline=Fact("text", sum(_bytes(account) for account in corpus.yields.values()) / 1e6, "MB"),
        tables=(_yield_table(corpus),),
        licences=tuple(_licence(context, name, account) for name, account in corpus.yields.items()),
    )


def _refuse_gaps(context: Context, corpus: Corpus) -> None:
    """`DataError` if a later stage would find nothing to train on, or nothing held out to be measured on."""
    plan = context.plan.corpus
    texts = {"prose": (*plan.prose, USER_TEXT), "code": (*plan.code, USER_CODE)}
    for side in SIDES:
        found: dict[str, Iterator[Example]] = {
            kind: corpus.texts(side, [name for name in names if name in corpus.sources])
            for kind, names in texts.items()
        }
        for kind, examples in {**found, "chats": corpus.chats(side)}.items():
            if next(examples, None) is None:
                raise DataError(_gap(kind, side, plan.filters.validation_share))
    parts = {part_of(chat) for chat in corpus.chats("train")}
    if missing := [part for part in SHARES if part not in parts]:
        raise DataError(
            f"too few conversations: none fell to '{missing[0]}'; add more, or name a source in corpus.chats"
        )


def _gap(kind: str, side: Split, share: float) -> str:
    what = {"prose": "prose", "code": "program code", "chats": "conversations"}[kind]
    if side == "train":
        return f"no {what} to train on: name a source in corpus.{kind}, or put some into the folder of --text"
    return (
        f"none of the {what} was held out to be measured on: corpus.filters.validation_share is {share:g}; "
        "raise it, or add more"
    )


def _fetch(context: Context, names: Sequence[str]) -> None:
    """Download what is not here yet, and say so: it is the one part of a run that waits for a network."""
    for name in names:
        package = source(name).package
        if package is not None and not package_path(package, cache_home()).is_file():
            context.listener.stage(context.name, "note", f"fetching {package.name} {package.version} for '{name}'")
            fetch(package, cache_home())


def tokenizer_stage(context: Context) -> None:
    """Train the tokenizer on a sample of everything, then tokenize all documents."""
    plan = context.plan
    corpus = open_corpus(context)
    sample = tokenizer_sample(corpus, TOKENIZER_SAMPLE_CHARS, plan.seed)
    tokenizer = train_tokenizer(sample, plan.tokenizer)
    tokenizer.save(context.path / "tokenizer.json")
    context.listener.step(context.name, 1, 2, {"vocabulary": float(tokenizer.vocab_size)})
    shards = tokenize_corpus(corpus, tokenizer, context.path / "shards")
    context.listener.step(context.name, 2, 2, {"tokens": float(shards["train"].num_positions)})
    context.report = replace(
        context.report,
        headline=Fact("vocabulary", tokenizer.vocab_size, "tokens"),
        facts=(
            Fact("training tokens", shards["train"].num_positions),
            Fact("validation tokens", shards["validation"].num_positions),
        ),
        tables=(_tokenizer_table(context, corpus, tokenizer),),
    )


@dataclass(frozen=True)
class Texts:
    """What the training stages read: the tokenizer, shards of both sides, and which documents are prose and code."""

    tokenizer: Tokenizer
    renderer: ChatRenderer
    train: Shards
    validation: Shards
    prose: tuple[str, ...]
    code: tuple[str, ...]


def open_texts(context: Context) -> Texts:
    plan = context.plan.corpus
    folder = context.run / "tokenizer"
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    train, validation = Shards.open(folder / "shards" / "train"), Shards.open(folder / "shards" / "validation")
    prose = tuple(name for name in (*plan.prose, USER_TEXT) if name in train.sources)
    code = tuple(name for name in (*plan.code, USER_CODE) if name in train.sources)
    return Texts(tokenizer, ChatRenderer(tokenizer), train, validation, prose, code)


def open_corpus(context: Context) -> Corpus:
    return Corpus.open(context.run / "corpus" / "documents")


def chats_of(context: Context, part: str) -> list[ChatExample]:
    """The conversations of one part: "sft", "reward", "gold", "ppo", or "validation" (held out from all)."""
    corpus = open_corpus(context)
    if part == "validation":
        return list(corpus.chats("validation"))
    return [chat for chat in corpus.chats("train") if part_of(chat) == part]


def validation_texts(context: Context, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Held-out documents by source."""
    corpus = open_corpus(context)
    texts: dict[str, list[str]] = {name: [] for name in names}
    for example in corpus.texts("validation", names):
        texts[example.provenance.source].append(example.text)
    return {name: found for name, found in texts.items() if found}


def document_numbers(shards: Shards, names: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return shards.of_sources([name for name in names if name in shards.sources])


def _bytes(account: dict[str, Any]) -> int:
    return sum(account["kept_bytes"].values())


def _yield_table(corpus: Corpus) -> Table:
    rows = []
    told: set[str] = set()  # both sources of the user's folder meet the same files
    for name, account in corpus.yields.items():
        dropped = [f"{count} {reason}" for reason, count in account["dropped"].items()]
        unread = {reason: facts for reason, facts in account["unusable"].items() if facts["first"] not in told}
        told |= {facts["first"] for facts in unread.values()}
        unread_parts = [f"not read: {f['count']} {reason} (first: {f['first']})" for reason, f in unread.items()]
        kept = account["kept"]
        left_out = ", ".join([*dropped, *unread_parts]) or "none"
        rows.append((name, account["read"], kept["train"], kept["validation"], _bytes(account), left_out))
    columns = ("source", "read", "train", "validation", "bytes kept", "left out")
    return Table.of("What was read, and what the filters kept", columns, rows)


def _licence(context: Context, name: str, account: dict[str, Any]) -> Licence:
    uses = {"prose": "pretraining", "code": "code stage", "chat": "SFT, reward model, PPO prompts"}
    users = {USER_TEXT: "pretraining and SFT", USER_CODE: "code stage"}
    use = users[name] if name in users else uses.get(source(name).kind, "")
    return Licence(name, ", ".join(account["licences"]), sum(account["kept"].values()), _bytes(account), use)


def _tokenizer_table(context: Context, corpus: Corpus, tokenizer: Tokenizer) -> Table:
    """Bytes per token of each source's held-out text, ours beside GPT-2's published vocabulary where it can be had."""
    samples = {name: list(_held_out(corpus, name, MEASURED_CHARS)) for name in corpus.sources}
    tokenizers, note = {"ours": tokenizer}, ""
    try:
        tokenizers["GPT-2"] = load_gpt2(cache_home())
    except DataError as error:
        note = f"GPT-2's vocabulary could not be had: {error}"
    columns = ("source", *(f"{name} ({each.vocab_size:,})" for name, each in tokenizers.items()))
    measured = fits(tokenizers, {name: texts for name, texts in samples.items() if texts})
    rows: list[tuple[Cell, ...]] = [(f.source, *(f.bytes_per_token(name) for name in tokenizers)) for f in measured]
    return Table.of("Bytes per token on held-out text", columns, rows, note)


def _held_out(corpus: Corpus, name: str, max_chars: int) -> Iterator[str]:
    """Held-out texts of a source, about `max_chars` characters of them."""
    left = max_chars
    for example in corpus.examples("validation", [name]):
        text = example_text(example)
        yield text
        left -= len(text)
        if left <= 0:
            return
