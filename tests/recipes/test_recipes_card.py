"""The run card: from a run folder to card.json and from that to a page."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from card_fixture import SCRIPT, STAGES, fake_run

from fledge.cli import main
from fledge.config import from_json, to_json
from fledge.errors import RunError
from fledge.recipes import card_format as say
from fledge.recipes.card import Card, build_card, read_card
from fledge.recipes.card_lineage import lineage_svg, read_lineage
from fledge.recipes.card_page import render_html, table_cells, write_card
from fledge.recipes.card_stages import kind_of
from fledge.recipes.report import Claim, Fact, Interval, StageReport, Table, read_report, write_report

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects tags, attributes and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_card(run).read_text("utf-8")


def test_card_json_gives_back_the_card(run: Path) -> None:
    card = build_card(run)
    assert from_json(Card, json.loads(json.dumps(to_json(card), allow_nan=False))) == card


def test_the_page_is_made_from_card_json_alone(run: Path, page: str, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_bytes((run / "card.json").read_bytes())
    assert render_html(read_card(tmp_path / "card.json")) == page


def test_the_same_run_gives_the_same_card(run: Path) -> None:
    assert to_json(build_card(run)) == to_json(build_card(run))


def test_the_page_is_well_formed_and_fetches_nothing(page: str) -> None:
    parsed = Page(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "video", "audio", "embed"}
    targets = [a.get("href") or a.get("src") or "" for _, a in parsed.tags if "href" in a or "src" in a]
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert not re.search(r"url\(|@import|javascript:|\son\w+=", re.sub(r"&lt;.*?&gt;", "", page))


def test_links_inside_the_page_lead_somewhere(page: str) -> None:
    tags = Page(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a in tags if a.get("href")} <= set(ids)  # type: ignore[index]


def test_what_models_and_users_wrote_is_escaped(page: str) -> None:
    assert SCRIPT not in page
    assert "&lt;script&gt;alert(" in page


def test_a_hostile_model_name_and_control_characters_are_harmless(run: Path) -> None:
    data = to_json(build_card(run))
    data["name"] = SCRIPT + "\x00"
    data["stages"][0]["report"]["headline"]["unit"] = SCRIPT
    data["plan"] = {"text": "</pre>" + SCRIPT}
    drawn = render_html(from_json(Card, data))
    Page(drawn)
    assert "<script" not in drawn
    assert "\x00" not in drawn


def test_every_chart_and_table_is_named_for_those_who_cannot_see_it(page: str) -> None:
    tags = Page(page).tags
    drawings = [a for tag, a in tags if tag == "svg" and "class" in a]
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in drawings)
    assert all("scope" in a for tag, a in tags if tag == "th")
    assert any(tag == "html" and a.get("lang") for tag, a in tags)


def test_chinese_stands_in_the_page_as_it_is(page: str) -> None:
    assert "你好,你喜欢看书吗?" in page


def test_a_target_that_was_not_reached_says_so(page: str) -> None:
    assert page.count("target NOT reached") == 2 * 2  # in the list of targets and in its stage
    assert "2 of 4</b> targets reached" in page
    assert "not measured" in page


def test_answers_of_all_stages_stand_together_in_order(run: Path) -> None:
    sample = build_card(run).samples[0]
    assert [answer.stage for answer in sample.answers] == ["pretrain", "code", "sft", "ppo"]


def test_answers_to_one_prompt_are_joined_across_reports(run: Path, tmp_path: Path) -> None:
    other = fake_run(tmp_path)
    report = read_report(other / "sft" / "report.json")
    data = to_json(report)
    data["stage"], data["samples"] = (
        "ppo",
        [{"prompt": "I had a bad day.", "answers": [{"stage": "ppo", "text": "new"}]}],
    )
    write_report(other / "ppo" / "report.json", from_json(StageReport, data))
    samples = {sample.prompt: sample for sample in build_card(other).samples}
    assert [a.text for a in samples["I had a bad day."].answers if a.stage == "ppo"] == ["new"]
    assert len(samples["I had a bad day."].answers) == 4


def test_a_run_that_has_not_gone_far_shows_what_is_missing(tmp_path: Path) -> None:
    part = fake_run(tmp_path, stages=STAGES[:3])
    (part / "code").mkdir()
    drawn = write_card(part).read_text("utf-8")
    Page(drawn)
    states = {stage.name: stage.state for stage in read_card(part / "card.json").stages}
    assert (states["pretrain"], states["code"], states["ppo"]) == ("finished", "unfinished", "not run")
    assert drawn.count("This stage has not run yet.") == 6
    assert drawn.count("was started and is not finished") == 1


def test_a_run_with_nothing_but_a_plan_has_a_card(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}", "utf-8")
    Page(write_card(tmp_path).read_text("utf-8"))


def test_a_stage_of_a_later_day_gets_its_section(tmp_path: Path) -> None:
    run = fake_run(tmp_path, stages=STAGES[:2])
    (run / "tokenizer").rename(run / "safety_layer")
    assert "Safety layer" in write_card(run).read_text("utf-8")


def test_costs_add_up(run: Path) -> None:
    card = build_card(run)
    assert card.total.seconds == pytest.approx(sum(s.cost.seconds for s in card.stages if s.cost is not None))
    assert card.total.peak_rss_bytes == 2210 << 20


def test_lineage_names_every_artifact_and_its_verified_parents(run: Path) -> None:
    nodes = {node.id: node for node in read_lineage(run)}
    ppo = {parent.role: parent.node for parent in nodes["ppo/model"].parents}
    assert ppo["reference"] == "sft/model"
    assert ppo["reward"] == "reward/model"
    assert ppo["tokenizer"] == "tokenizer"
    assert {p.role: p.node for p in nodes["ppo/ema"].parents}["policy"] == "ppo/model"
    assert "gold/model" in {p.node for p in nodes["evaluation"].parents}


def test_a_parent_that_was_altered_is_not_linked(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    path = run / "sft" / "model" / "run.json"
    data = json.loads(path.read_text("utf-8"))
    data["files"]["model.safetensors"] = "0" * 64
    path.write_text(json.dumps(data), "utf-8")
    parents = {node.id: node.parents for node in read_lineage(run)}
    assert {p.role: p.node for p in parents["ppo/model"]}["reference"] is None


@pytest.mark.parametrize(("twin", "original"), [("ppo/ema", "reward/model"), ("ppo/model", "sft/model")])
def test_weights_that_did_not_change_are_no_circle(tmp_path: Path, twin: str, original: str) -> None:
    run = fake_run(tmp_path)
    infos = {name: run / name / "run.json" for name in (twin, original)}
    files = json.loads(infos[original].read_text("utf-8"))["files"]
    infos[twin].write_text(json.dumps({**json.loads(infos[twin].read_text("utf-8")), "files": files}), "utf-8")
    nodes = {node.id: node for node in read_lineage(run)}
    assert {p.role: p.node for p in nodes["ppo/model"].parents}["reward"] == "reward/model"
    assert lineage_svg(tuple(nodes.values())).count('class="node"') == 11
    shutil.rmtree(run / original)  # now the twin alone has these weights
    assert lineage_svg(read_lineage(run)).count('class="node"') >= 10


def test_the_lineage_drawing_has_one_box_an_artifact(run: Path) -> None:
    nodes = read_lineage(run)
    drawn = lineage_svg(nodes)
    assert drawn.count('class="node"') == len(nodes) == 11
    assert ">reference</text>" in drawn


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    run = fake_run(tmp_path, stages=STAGES[:3])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "pretrain", "step": 99')
    build_card(run)


def test_damage_in_the_middle_of_metrics_is_refused_by_line(tmp_path: Path) -> None:
    run = fake_run(tmp_path, stages=STAGES[:3])
    (run / "metrics.jsonl").write_text('{"stage":"a","step":1}\n{oops\n{"stage":"a","step":2}\n', "utf-8")
    with pytest.raises(RunError, match=r"metrics\.jsonl line 2"):
        build_card(run)


def test_a_metric_without_a_chart_of_its_own_is_shown_all_the_same(tmp_path: Path) -> None:
    run = fake_run(tmp_path, stages=STAGES[:3])
    lines = [json.dumps({"stage": "pretrain", "step": n, "odd_thing": n * 1.5}) for n in range(5)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    titles = [c.title for s in build_card(run).stages if s.name == "pretrain" for c in s.report.curves]
    assert "odd thing" in titles


def test_the_kl_target_of_the_plan_is_drawn(run: Path) -> None:
    ppo = next(stage for stage in build_card(run).stages if stage.name == "ppo")
    kl = next(curve for curve in ppo.report.curves if curve.title.startswith("KL"))
    assert [reference.value for reference in kl.references] == [6.0]


@pytest.mark.parametrize("damage", ["{", '{"format": 99}', "[]", '{"format": 1, "name": 3}'])
def test_a_damaged_card_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    (tmp_path / "card.json").write_text(damage, "utf-8")
    with pytest.raises(RunError, match=r"card\.json"):
        read_card(tmp_path / "card.json")


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"plan\.json"):
        build_card(tmp_path)


def test_a_bent_claim_is_refused(tmp_path: Path) -> None:
    write_report(tmp_path / "report.json", StageReport("ppo", claims=(Claim("c", 0.4, ">", 0.5),)))
    bent = (tmp_path / "report.json").read_text("utf-8").replace('"reached": false', '"reached": true')
    (tmp_path / "report.json").write_text(bent, "utf-8")
    with pytest.raises(RunError, match="reached=True"):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("value", "comparison", "reached"),
    [
        (0.5, ">", False),
        (0.5, ">=", True),
        (0.5, "<", False),
        (0.5, "<=", True),
        (None, ">=", False),
        (float("nan"), "<", False),
    ],
)
def test_a_claim_computes_whether_it_was_reached(value: float | None, comparison: str, reached: bool) -> None:
    assert Claim("c", value, comparison, 0.5).reached is reached  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "unit"), [(0.49996, "%"), (0.4999999, "%"), (0.50001, "%"), (9.99996, "")])
def test_rounding_never_carries_a_value_to_its_threshold(value: float, unit: str) -> None:
    threshold = 0.5 if unit else 10.0
    shown, target = say.against(Claim("c", value, ">", threshold, unit))
    assert (float(shown) > float(target)) == (value > threshold)
    assert float(shown) != float(target)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: say.seconds(0.42), "0.4 s"),
        (lambda: say.seconds(75), "1 min 15 s"),
        (lambda: say.seconds(59.7), "1 min 00 s"),
        (lambda: say.seconds(4000), "1 h 07 min"),
        (lambda: say.count(1_234_567), "1.23M"),
        (lambda: say.count(999_999), "1M"),
        (lambda: say.flops(1.2e15), "1.2 PFLOP"),
        (lambda: say.num_bytes(1 << 20), "1 MiB"),
        (lambda: say.num_bytes(1536), "1.5 KiB"),
        (lambda: say.fact(Fact("x", 0.734, "%")), "73.4"),
        (lambda: say.fact(Fact("x", 73.4, "% right")), "73.4"),
        (lambda: say.fact(Fact("x", 8_412_233)), "8.41M"),
        (lambda: say.fact(Fact("x", float("inf"))), "–"),
        (lambda: say.shorten("abcdefgh", 3.0), "abcd…"),
    ],
)
def test_known_figures(call: object, expected: str) -> None:
    assert call() == expected  # type: ignore[operator]


def test_a_column_has_one_number_of_decimals() -> None:
    table = Table.of(
        "t",
        ["name", "share %", "bits", "n"],
        [["a", Interval(0.5, 0.4, 0.6), 1.5, 3.0], ["b", None, 12.25, 4.0]],
    )
    first, second = table_cells(table)
    assert [cell.text for cell in first] == ["a", "50.0 [40.0, 60.0]", "1.50", "3"]
    assert [cell.text for cell in second] == ["b", "–", "12.25", "4"]
    assert first[1].mark is not None


def test_a_table_with_a_ragged_row_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        Table.of("t", ["a", "b"], [["x"]])


def test_the_command_prints_a_summary_and_the_path(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(run)]) == 0
    out = capsys.readouterr().out
    assert "Pretraining" in out
    assert "NOT reached" in out
    assert str(run / "card.html") in out


def test_the_command_prints_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "pocket"


def test_the_command_refuses_an_unknown_run_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "nothing", "--runs", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_ppo_without_the_mix_has_the_charts_of_ppo() -> None:
    control, ppo = kind_of("control"), kind_of("ppo")
    assert control.title == "PPO without the mix"
    assert control.charts == ppo.charts


def test_a_copied_run_says_when_it_was_raised_and_not_when_it_was_copied(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    for day, stage in enumerate(STAGES, start=1):
        manifest = json.loads((run / stage / "manifest.json").read_text())
        manifest["finished"] = f"2026-03-{day:02}T08:00:00+00:00"
        (run / stage / "manifest.json").write_text(json.dumps(manifest))
    assert build_card(run).finished == f"2026-03-{len(STAGES):02}T08:00:00+00:00"
