from __future__ import annotations

import pytest
from text_samples import TEXTS, trained

from fledge.text.report import fit_metrics, fits
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer


def test_bytes_per_token_counts_bytes_of_utf8_over_all_texts_of_a_source() -> None:
    single = train_tokenizer(["a"], TokenizerConfig("bpe", 272))
    rows = fits({"bytes": single, "ours": trained()}, {"中文": ["天气", "好"], "english": list(TEXTS[:1]), "none": []})
    assert [row.source for row in rows] == ["中文", "english", "none"]
    assert rows[0].num_bytes == 9
    assert rows[0].bytes_per_token("bytes") == 1.0
    assert rows[1].bytes_per_token("ours") == pytest.approx(len(TEXTS[0]) / len(trained().encode(TEXTS[0])))
    assert rows[2].bytes_per_token("ours") == 0.0
    assert fit_metrics(rows)["bytes_per_token/bytes/中文"] == 1.0
    assert len(fit_metrics(rows)) == 6
