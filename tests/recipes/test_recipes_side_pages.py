"""The pages beside a card: self-contained, made from one file alone, true to it, and safe with whatever models say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fledge.config import from_json, to_json
from fledge.errors import RunError
from fledge.evals import reward_health as health
from fledge.evals.reward_health import Share
from fledge.recipes.episodes_page import MAX_ROUNDS, episodes_html
from fledge.recipes.health_page import ANCHORS, HealthReport, findings, health_page, read_health
from fledge.recipes.pages import render_page
from fledge.types import Conversation, Judgement, Provenance, Ranking

ORIGIN = Provenance("中文问答", "1", "CC0")


def report(**changes: Any) -> HealthReport:
    """Of twenty rankings, one of them in the wrong order."""
    prompt = Conversation.of(("user", "好吗？"))
    some = [
        health.Scored(
            Ranking(prompt, ("好的", "不好"), (1, 2), (True, True), ("human", "sft"), ORIGIN,
                    Judgement("human", "安娜", confidence=5), shown=(1, 2)),
            (1.0, 0.0) if n else (0.0, 1.0),
        )
        for n in range(20)
    ]  # fmt: skip
    pairs = health.comparisons(some)
    bins = health.reliability(pairs, 0)
    found = HealthReport(
        1, "judge", ("a" * 64,), 20, health.accuracy(pairs, 0), health.groups(pairs, health.source_of, 0),
        health.groups(pairs, health.labeler_of, 0), health.by_confidence(pairs, 0),
        health.groups(pairs, health.makers_of, 0), bins, health.calibration_error(bins),
        health.lengths(some, pairs, 0), health.positions(pairs, 0), None, None,
        (health.probed("empty answer", "nothing is said", [-1.0] * 20, 0),
         health.probed("flattery around it", "praise", [1.0] * 20, 0),
         health.probed("cut off", "it stops", [], 0)),
    )  # fmt: skip
    return replace(found, **changes)


def refuses_the_network(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href)=["'](?!#)[^"']*:""", page)
    assert "@import" not in page


def test_the_health_page_shows_every_figure_with_its_interval_and_the_human_ceiling() -> None:
    found = report()
    page = render_page(health_page(found))
    refuses_the_network(page)
    assert "<script" not in page
    for text in (
        "95.0 [",
        "中文问答",
        "安娜",
        "human over sft",
        "Reliability diagram",
        "77.3 [76.0, 78.6]",
        "2203.02155",
    ):
        assert text in page, text
    for who, *_ in ANCHORS:
        assert who in page
    for verdict in ("resists", "FOOLED", "does not apply"):
        assert verdict in page
    assert "nothing was judged twice" in page
    assert render_page(health_page(found)) == page


def test_the_health_report_is_read_back_from_its_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "health.json"
    path.write_text(json.dumps(to_json(report())), encoding="utf-8")
    assert read_health(path) == report()
    assert from_json(HealthReport, to_json(report())) == report()
    path.write_text(json.dumps({**to_json(report()), "format": 2}), encoding="utf-8")
    with pytest.raises(RunError, match="format 2"):
        read_health(path)


def test_findings_are_reached_where_the_interval_says_so() -> None:
    claims = {claim.text.partition(":")[0]: claim.reached for claim in findings(report())}
    assert claims["held-out pairs in the right order"]
    assert claims["empty answer"]
    assert not claims["flattery around it"]
    assert "cut off" not in claims
    by_chance = report(accuracy=Share(0.6, 0.4, 0.8, 10, 10), calibration_error=0.3)
    assert [claim.reached for claim in findings(by_chance)][:2] == [False, False]


def episode(step: int, **changes: Any) -> dict[str, Any]:
    line = {
        "stage": "ppo", "step": step, "prompt": "你好吗？", "answer": "好的<", "ended": True, "score": 0.5 * step,
        "tokens": [7, 8, 9], "pieces": ["", "好", "的<"], "kl": [0.1, -0.2, 0.3], "values": [0.0, 0.1, 0.2],
        "advantages": [1.0, -1.0, 0.5],
    }  # fmt: skip
    return {**line, **changes}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_table_of_episodes_holds_every_token_of_every_round(tmp_path: Path) -> None:
    lines = [episode(step, score=None if step == 2 else 1.0) for step in (1, 2, 2, 3)]
    page = episodes_html(write(tmp_path / "episodes.jsonl", lines), "run", "ppo")
    refuses_the_network(page)
    rounds = data_of(page)["rounds"]
    assert [(r["step"], len(r["episodes"])) for r in rounds] == [(1, 1), (2, 2), (3, 1)]
    first = rounds[0]["episodes"][0]
    assert first["pieces"] == ["", "好", "的<"]
    assert (first["kl"], first["values"], first["advantages"]) == ([0.1, -0.2, 0.3], [0.0, 0.1, 0.2], [1.0, -1.0, 0.5])
    assert rounds[1]["episodes"][0]["score"] is None
    assert "4 episodes of 3 rounds" in page


def test_what_a_model_says_cannot_leave_its_place_on_the_page(tmp_path: Path) -> None:
    nasty = "</script><script>alert(1)</script><!-- \x00"
    lines = [episode(1, prompt=nasty, pieces=["", nasty, "x"])]
    page = episodes_html(write(tmp_path / "episodes.jsonl", lines), "<b>run</b>", "ppo")
    assert page.count("</script>") == 2
    block = page.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&") & set(block)  # nor can it begin a comment, within which an end would not count
    assert "<b>run</b>" not in page
    assert "alert(1)</script>" not in page
    assert data_of(page)["rounds"][0]["episodes"][0]["prompt"].startswith("</script>")


def test_long_runs_are_shown_at_even_rounds_and_say_so(tmp_path: Path) -> None:
    lines = [episode(step) for step in range(1, 1001)]
    page = episodes_html(write(tmp_path / "episodes.jsonl", lines), "run", "grpo")
    steps = [r["step"] for r in data_of(page)["rounds"]]
    assert len(steps) == MAX_ROUNDS
    assert (steps[0], steps[-1]) == (1, 1000)
    assert f"{MAX_ROUNDS} of them on this page" in page


def test_a_torn_line_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "episodes.jsonl", [episode(1)])
    path.write_bytes(path.read_bytes() + b'{"step": 2, "pro')
    assert len(data_of(episodes_html(path, "run", "ppo"))["rounds"]) == 1
    path.write_bytes(b"{broken}\n" + path.read_bytes())
    with pytest.raises(RunError, match="line 1"):
        episodes_html(path, "run", "ppo")


def test_a_method_without_a_value_function_offers_none(tmp_path: Path) -> None:
    page = episodes_html(write(tmp_path / "episodes.jsonl", [episode(1, values=[])]), "run", "grpo")
    assert '<option value="values"' not in page
    assert '<option value="kl"' in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_the_script_of_the_table_runs_and_draws_the_last_round(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    lines = [episode(1), episode(2)]
    path.write_text(episodes_html(write(tmp_path / "e.jsonl", lines), "run", "ppo"), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    assert '<output id="where">2 of 2</output>' in done.stdout
    assert done.stdout.count('class="tok"') == 2  # two tokens make up the first character
    assert ">好<" in done.stdout
