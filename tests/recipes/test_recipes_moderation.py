"""A moderation model from the user's own texts, end to end on a tiny trunk: trained, thresholded, measured, served."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fledge import cli
from fledge.config import to_json
from fledge.data.filters import document_key
from fledge.data.labelled import LabelledText
from fledge.errors import ConfigError, DataError
from fledge.formats.checkpoint import CheckpointInfo, load_model, save_model
from fledge.infer.scoring import embed
from fledge.models.pocket import Pocket, PocketConfig
from fledge.recipes.moderation import ModerationOrder, plan_of, train_moderation
from fledge.recipes.moderation_card import figures_of
from fledge.recipes.moderation_data import cleared, merged, side_of
from fledge.recipes.moderation_plan import ModerationData
from fledge.safety.categories import LEARNT
from fledge.safety.classifier import read_classifier
from fledge.text.chat import ChatRenderer
from fledge.text.subwords import TokenizerConfig
from fledge.text.tokenizer import train_tokenizer
from fledge.types import Provenance

ORIGIN = Provenance("test", "1", "CC0")
WORDS = ("garden", "rain", "tea", "book", "walk", "music", "breakfast", "sea", "stone", "window", "river", "cloud")


class Quiet:
    def stage(self, name: str, status: str, note: str) -> None: ...
    def step(self, stage: str, step: int, num_steps: int, metrics: Any) -> None: ...


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and texts of which the rude ones say "blarg"."""
    folder = tmp_path_factory.mktemp("moderation")
    draw = random.Random(0)
    rows = []
    for number in range(600):
        words = [draw.choice(WORDS) for _ in range(4)]
        is_rude = number % 3 == 0
        if is_rude:
            words[draw.randrange(4)] = "blarg"
        labels = dict.fromkeys(LEARNT, False) | {"harassment": is_rude}
        rows.append({"text": " ".join(words), "labels": labels})
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row["text"] for row in rows]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=400))  # type: ignore[arg-type]
    config = PocketConfig(vocab_size=tokenizer.vocab_size, width=32, num_layers=1, num_heads=1, table_rows=256)
    model = Pocket(config)
    model.init_weights(torch.Generator().manual_seed(0))
    info = CheckpointInfo("pocket", to_json(config), "pretrain", tokenizer.hash, ChatRenderer(tokenizer).hash)
    save_model(folder / "tiny", model, tokenizer, info)
    return folder


def order(world: Path, **changes: Any) -> ModerationOrder:
    settings = ("fit.epochs=10", "fit.lr=3e-3", "max_false_share=0.1", "stride=16", "window=24")
    given = {"data": (world / "own.jsonl",), "is_only_own": True, "runs": world / "runs", "overrides": settings}
    return ModerationOrder(str(world / "tiny"), **{**given, **changes})


@pytest.fixture(scope="module")
def folder(world: Path) -> Path:
    return train_moderation(order(world), Quiet())


def test_what_was_learnt_holds_on_texts_that_were_not_trained_on(folder: Path) -> None:
    classifier = read_classifier(folder)
    found = classifier.info.figures["latin"]["harassment"]
    assert found.is_measured
    assert found.positives < 200
    assert found.precision is not None
    assert found.recall is not None
    assert found.precision > 0.7
    assert found.recall > 0.7
    loaded = load_model(folder / "model")
    for text, is_rude in (("garden blarg tea", True), ("garden rain tea", False)):
        vectors = embed(loaded.model, classifier.rows(text)).detach().numpy()  # type: ignore[arg-type]
        assert ("harassment" in classifier.verdict(text, vectors).flagged) == is_rude


def test_a_category_without_positives_is_unmeasured_and_the_card_says_so(folder: Path) -> None:
    info = read_classifier(folder).info
    assert not info.figures["latin"]["hate"].is_measured
    card = (folder / "card.md").read_text(encoding="utf-8")
    assert "| hate | 0 |" in card
    assert "unmeasured, never flags" in card
    assert "| sexual/minors | 0 | 0 | | | | never learnt, never flags |" in card
    assert "## Chinese\n\nNo held-out positives: every category is unmeasured" in card


def test_the_trunk_it_began_with_is_its_parent_and_is_left_as_it_was(world: Path, folder: Path) -> None:
    start, made = load_model(world / "tiny"), load_model(folder / "model")
    assert made.info.parents == {"start": start.hash}
    assert made.hash != start.hash


def test_a_finished_run_is_kept_and_a_changed_file_is_another(world: Path, folder: Path) -> None:
    before = (folder / "head.safetensors").read_bytes()
    assert train_moderation(order(world), Quiet()) == folder
    assert (folder / "head.safetensors").read_bytes() == before
    other = world / "other.jsonl"
    other.write_text((world / "own.jsonl").read_text() + '{"text": "more", "labels": {}}\n')
    assert plan_of(order(world, data=(other,))).data.hash != plan_of(order(world)).data.hash


def test_the_commands_show_the_card_and_judge_a_text(
    world: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["moderation", "card", "--runs", str(world / "runs")]) == 0
    assert "# Moderation model: card" in capsys.readouterr().out
    assert cli.main(["moderation", "check", "garden blarg tea", "--json", "--runs", str(world / "runs")]) == 0
    assert json.loads(capsys.readouterr().out)["flagged"] == ["harassment"]
    assert cli.main(["moderation", "check", "x", "--model", "none", "--runs", str(world)]) == 2
    assert "fledge moderation train" in capsys.readouterr().err


def test_orders_that_cannot_be_carried_out_are_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match="--only-own"):
        plan_of(order(world, data=()))
    with pytest.raises(DataError, match="no such file"):
        plan_of(order(world, data=(world / "none.jsonl",)))
    with pytest.raises(ConfigError, match="stride"):
        plan_of(order(world, overrides=("window=16", "stride=16")))


# The data.


def text(said: str, group: str = "g", **labels: bool) -> LabelledText:
    return LabelledText(said, labels, group, "people", ORIGIN)


def test_what_speaks_of_minors_in_a_sexual_way_is_dropped_whatever_its_label() -> None:
    kept = [text("a girl at school reads"), text("they had sex", sexual=True), text("violent teenagers", violence=True)]
    dropped = [text("teenagers", sexual=True), text("an underage nude"), text("porn with a 15 year old", illicit=True)]
    assert list(cleared([*kept, *dropped])) == kept


def test_a_text_of_two_sources_is_one_with_all_that_is_known() -> None:
    [one] = merged([text("Same  text", hate=True, violence=False), text("Same text", violence=True, illicit=False)])
    assert one.labels == {"hate": True, "violence": True, "illicit": False}


def test_texts_of_one_group_are_on_one_side_and_shares_are_about_right() -> None:
    plan = ModerationData()
    sides = [side_of(text(f"{i} {k}", group=str(i)), plan, 0) for i in range(2000) for k in range(2)]
    assert all(first == second for first, second in zip(sides[::2], sides[1::2], strict=True))
    assert abs(sides.count("held_out") / len(sides) - plan.held_out_share) < 0.05
    assert abs(sides.count("tune") / len(sides) - plan.tune_share) < 0.03
    assert len({document_key(str(i)) for i in range(10)}) == 10


def test_figures_are_those_of_the_confusion_worked_by_hand() -> None:
    k = LEARNT.index("hate")
    scores = np.zeros((5, len(LEARNT)))
    scores[:, k] = [0.9, 0.8, 0.2, 0.7, 0.9]
    texts = [text("a", hate=True), text("b", hate=False), text("c", hate=True), text("d", hate=True), text("e")]
    found = figures_of(texts, scores, dict.fromkeys(LEARNT, 0.5))["hate"]
    assert (found.positives, found.negatives) == (3, 1)
    assert (found.precision, found.recall) == (pytest.approx(2 / 3, abs=1e-4), pytest.approx(2 / 3, abs=1e-4))
