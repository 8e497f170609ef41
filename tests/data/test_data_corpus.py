"""The corpus: what is held out is held out everywhere, the yield is told, the files are checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fledge.data.corpus import Corpus, Ingredient, tokenize_corpus, tokenizer_sample, write_corpus
from fledge.data.filters import FilterConfig, document_key, example_text
from fledge.errors import DataError

FILTERS = FilterConfig(min_chars=1, validation_share=0.2)


class Utf8Encoder:
    vocab_size, end_of_text_id, hash = 257, 0, "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + 1 for byte in text.encode()] for text in texts]


@pytest.fixture
def folders(tmp_path: Path) -> list[Ingredient]:
    """Two folders with texts in common, and chats that say what texts say."""
    for name, numbers in (("one", range(80)), ("two", range(40, 120))):
        (tmp_path / name).mkdir()
        for number in numbers:
            (tmp_path / name / f"{number}.txt").write_text(
                f"question {number}\nanswer {number}" + "\n" * (name == "two")
            )
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"question {n}"},
                {"role": "assistant", "content": f"answer {n}"},
            ]
        }
        for n in range(100, 200)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return [
        Ingredient(name, str(tmp_path / path))
        for name, path in (("one", "one"), ("two", "two"), ("chats", "chats.jsonl"))
    ]


def build(ingredients: list[Ingredient], tmp_path: Path, name: str = "corpus") -> Corpus:
    return write_corpus(ingredients, tmp_path / name, cache=tmp_path / "cache", seed=0, filters=FILTERS)


def test_no_validation_document_is_trained_on_whatever_source_or_form(
    folders: list[Ingredient], tmp_path: Path
) -> None:
    corpus = build(folders, tmp_path)
    sides = [[document_key(example_text(e)) for e in corpus.examples(side)] for side in ("train", "validation")]
    assert len(sides[0]) + len(sides[1]) == len(set(sides[0]) | set(sides[1])) == 200
    assert len(sides[1]) > 20
    # Built from each source alone, every text is on the side it is on in the whole.
    held_out = set(sides[1])
    for ingredient in folders:
        alone = build([ingredient], tmp_path, "alone")
        assert {document_key(example_text(e)) for e in alone.examples("validation")} <= held_out
        assert not {document_key(example_text(e)) for e in alone.examples("train")} & held_out


def test_the_yield_is_told_for_every_source(folders: list[Ingredient], tmp_path: Path) -> None:
    corpus = build(folders, tmp_path)
    assert corpus.sources == ("one", "two", "chats")
    two = corpus.yields["two"]
    assert (two["read"], two["dropped"]) == (80, {"duplicate": 40})
    assert two["kept"]["train"] + two["kept"]["validation"] == 40
    assert corpus.yields["chats"]["dropped"] == {"duplicate": 20}
    assert len(list(corpus.texts("all"))) == 120
    assert len(list(corpus.chats("all"))) == 80
    assert {e.provenance.source for e in corpus.examples("train", ["two"])} == {"two"}
    with pytest.raises(DataError, match="holds no source 'three'"):
        list(corpus.examples("train", ["three"]))


def test_the_same_seed_gives_the_same_corpus_and_a_limit_takes_a_part(
    folders: list[Ingredient], tmp_path: Path
) -> None:
    corpus = build(folders, tmp_path)
    assert build(folders, tmp_path, "again").hash == corpus.hash
    part = build([Ingredient("one", folders[0].path, limit_bytes=400)], tmp_path, "part")
    texts = {example_text(e) for e in part.examples("all")}
    assert 0.8 * 400 < sum(map(len, texts)) <= 400
    assert texts < {example_text(e) for e in corpus.examples("all", ["one"])}


def test_shards_of_both_sides_hold_the_documents_and_not_the_chats(folders: list[Ingredient], tmp_path: Path) -> None:
    corpus = build(folders, tmp_path)
    made = tokenize_corpus(corpus, Utf8Encoder(), tmp_path / "shards")
    for side, shards in made.items():
        texts = [e.text for e in corpus.texts(side)]
        assert shards.num_documents == len(texts)
        assert [bytes(i - 1 for i in shards.document(n)[1:-1]).decode() for n in range(len(texts))] == texts
    only = tokenize_corpus(corpus, Utf8Encoder(), tmp_path / "shards", sources=["two"])
    assert only["train"].sources == ("two",)


def test_the_tokenizer_sample_is_train_text_and_gives_small_sources_a_floor(
    folders: list[Ingredient], tmp_path: Path
) -> None:
    corpus = build(folders, tmp_path)
    held_out = {part for e in corpus.examples("validation") for part in example_text(e).split()}
    sample = list(tokenizer_sample(corpus, 1_000_000, seed=0))
    assert len(sample) == len(list(corpus.texts("train"))) + 2 * len(list(corpus.chats("train")))
    numbers = {word for word in held_out if word.isdigit()}
    assert numbers
    assert not numbers & {word for text in sample for word in text.split()}
    small = list(tokenizer_sample(corpus, 900, seed=0, floor_share=0.0))
    assert 400 < sum(map(len, small)) < 1400
    assert len(list(tokenizer_sample(corpus, 900, seed=0, floor_share=1.0))) > len(small)


def test_a_truncated_or_altered_corpus_is_refused_by_name(folders: list[Ingredient], tmp_path: Path) -> None:
    corpus = build(folders, tmp_path)
    path = corpus.folder / "train.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"answer 1", b"answer 2", 1))
    Corpus.open(corpus.folder)
    with pytest.raises(DataError, match=r"train\.jsonl was altered"):
        Corpus.open(corpus.folder, verify=True)
    path.write_bytes(content.replace(b"}\n", b"\0\n", 1))
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: altered"):
        list(Corpus.open(corpus.folder).examples("train"))
    path.write_bytes(content[:-5])
    with pytest.raises(DataError, match="truncated or altered; delete"):
        Corpus.open(corpus.folder)


def test_sources_that_give_nothing_are_refused_with_the_reasons(folders: list[Ingredient], tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.txt").write_bytes(b"\0")
    (tmp_path / "bad/b.txt").write_text("\x01\x02\x03\x04")
    bad = Ingredient("bad", str(tmp_path / "bad"))
    with pytest.raises(DataError, match=r"a\.txt has a NUL byte"):
        build([bad], tmp_path)
    with pytest.raises(DataError, match=r"'bad' at .* gave no training document out of 1 read .*control") as caught:
        build([Ingredient("bad", bad.path, skip_bad=True)], tmp_path)
    assert "NUL byte" in str(caught.value)
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(DataError, match="gave no training document"):
        build([Ingredient("again", folders[0].path), Ingredient("one", folders[0].path)], tmp_path)
    for wrong in ([folders[0], folders[0]], []):
        with pytest.raises(DataError, match="expected one source or more, none twice"):
            build(wrong, tmp_path)
    with pytest.raises(DataError, match="unknown source 'nothing'"):
        build([Ingredient("nothing")], tmp_path)


def test_progress_is_told(folders: list[Ingredient], tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    write_corpus(
        folders,
        tmp_path / "c",
        cache=tmp_path,
        seed=0,
        filters=FILTERS,
        progress=lambda *told_now: told.append(told_now),
    )
    assert told == [("one", 80), ("two", 40), ("chats", 80)]
