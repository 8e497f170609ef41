"""Fill in the middle: the parts recompose the document, the paper's two orders, one function of seed and epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.fim import OVERHEAD, FimConfig, FimDocuments, FimTokens, rearrange, restore
from fledge.data.pack import PackedRows, ShardDocuments
from fledge.data.shards import write_shards
from fledge.errors import ConfigError
from fledge.types import Piece, Provenance, TextExample

TOKENS = FimTokens(prefix=7, suffix=8, middle=9, end_of_text=0)


class LetterEncoder:
    """Tokens of their own for letters; 0 to 9 stay free for special ones."""

    vocab_size, end_of_text_id, hash = 200, 0, "letters"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]


def test_the_two_orders_are_those_of_the_paper() -> None:
    ids = np.array([11, 12, 13, 14, 15], np.int32)
    assert rearrange(ids, (1, 3), False, TOKENS).tolist() == [0, 7, 11, 8, 14, 15, 9, 12, 13, 0]
    assert rearrange(ids, (1, 3), True, TOKENS).tolist() == [0, 7, 8, 14, 15, 9, 11, 12, 13, 0]


@given(st.data(), st.lists(st.integers(10, 99), max_size=30), st.booleans())
def test_prefix_middle_and_suffix_recompose_the_document(data: st.DataObject, ids: list[int], is_spm: bool) -> None:
    first = data.draw(st.integers(0, len(ids)))
    second = data.draw(st.integers(first, len(ids)))
    text = np.array(ids, np.int32)
    arranged = rearrange(text, (first, second), is_spm, TOKENS)
    assert len(arranged) == len(ids) + 5 == len(ids) + OVERHEAD + 1
    assert restore(arranged, TOKENS).tolist() == ids


@pytest.fixture
def plain(tmp_path: Path) -> ShardDocuments:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), size=size)) for size in rng.integers(1, 60, size=120)]
    examples = [TextExample(text, Provenance("code", str(n), "MIT")) for n, text in enumerate(texts)]
    return ShardDocuments(write_shards(examples, LetterEncoder(), tmp_path / "s"))


def pieces_of(documents: FimDocuments | ShardDocuments, row_length: int, epoch: int) -> list[Piece]:
    packed = PackedRows(documents, row_length, seed=0)
    first = sum(packed.num_rows(e) for e in range(epoch))
    return [p for row in range(first, first + packed.num_rows(epoch)) for p in packed.row(row)]


def is_rearranged(piece: Piece) -> bool:
    return bool(len(piece.ids) > 1 and piece.ids[1] == TOKENS.prefix)


@pytest.mark.parametrize("row_length", [5, 16, 100])
def test_every_text_token_is_predicted_exactly_once_an_epoch(plain: ShardDocuments, row_length: int) -> None:
    mixed = pieces_of(FimDocuments(plain, FimConfig(), TOKENS, seed=1), row_length, epoch=1)
    assert any(map(is_rearranged, mixed))
    assert not all(map(is_rearranged, mixed))
    targets = Counter(int(token) for piece in mixed for token in piece.ids[1:] if token >= 10)
    expected = Counter(int(t) for n in range(120) for t in plain.shards.document(n)[1:-1])
    assert targets == expected
    assert all(piece.ids[-1] == TOKENS.end_of_text for piece in mixed if is_rearranged(piece))
    assert all(len(piece.loss_mask) == len(piece.ids) for piece in mixed)


def test_rearranged_stretches_restore_whole_documents_that_fit_a_row(plain: ShardDocuments) -> None:
    mixed = pieces_of(FimDocuments(plain, FimConfig(rate=1.0), TOKENS, seed=1), 100, epoch=0)
    restored = sorted(restore(piece.ids, TOKENS).tolist() for piece in mixed)
    assert restored == sorted(plain.shards.document(n)[1:-1].tolist() for n in range(120))


def test_rate_and_order_shares_are_about_what_was_asked(plain: ShardDocuments) -> None:
    documents = FimDocuments(plain, FimConfig(rate=0.5, spm_share=0.25), TOKENS, seed=1)
    mixed = [piece for epoch in range(10) for piece in pieces_of(documents, 100, epoch)]
    rearranged = [piece for piece in mixed if is_rearranged(piece)]
    assert len(rearranged) / len(mixed) == pytest.approx(0.5, abs=0.05)
    # PSM with an empty prefix looks like SPM; in a long document that is rare.
    long = [piece for piece in rearranged if len(piece.ids) > 40]
    assert sum(piece.ids[2] == TOKENS.suffix for piece in long) / len(long) == pytest.approx(0.25, abs=0.09)
    assert not any(map(is_rearranged, pieces_of(FimDocuments(plain, FimConfig(rate=0.0), TOKENS, 1), 100, 0)))


def test_the_same_seed_and_epoch_give_the_same_pieces_and_another_epoch_others(plain: ShardDocuments) -> None:
    def ids(seed: int, epoch: int) -> list[list[int]]:
        return [p.ids.tolist() for p in pieces_of(FimDocuments(plain, FimConfig(), TOKENS, seed), 32, epoch)]

    assert ids(1, 1) == ids(1, 1)
    assert sorted(ids(1, 0)) != sorted(ids(1, 1))
    assert sorted(ids(1, 0)) != sorted(ids(2, 0))
    left_alone = [{tuple(piece) for piece in ids(1, epoch) if piece[1] != TOKENS.prefix} for epoch in (0, 1)]
    assert left_alone[0] - left_alone[1]


def test_rows_too_short_and_shares_out_of_range_are_refused(plain: ShardDocuments) -> None:
    with pytest.raises(ConfigError, match="expected more than 4"):
        PackedRows(FimDocuments(plain, FimConfig(), TOKENS, seed=1), 4, seed=0)
    with pytest.raises(ConfigError, match=r"rate must be between 0 and 1, got 1\.5"):
        FimConfig(rate=1.5)
