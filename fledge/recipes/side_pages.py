"""The pages that stand beside a run's card: a reward model's health, and what a policy said round by round.

Each is made from one file that a stage left, and from nothing else, so it can be made again at any time.
"""

from __future__ import annotations

from pathlib import Path

from fledge.files import write_text
from fledge.recipes.card import SidePage
from fledge.recipes.episodes_page import EPISODES, episodes_html
from fledge.recipes.health_page import HEALTH, health_page, read_health
from fledge.recipes.pages import render_page


def write_side_pages(run: Path) -> tuple[SidePage, ...]:
    """Write the pages that the finished stages of the run folder allow; which there are."""
    found = []
    report = run / "health" / HEALTH
    if report.is_file():
        write_text(run / "health.html", render_page(health_page(read_health(report))))
        found.append(SidePage("health", "Health of the reward model", "health.html"))
    for file in sorted(run.glob(f"*/{EPISODES}")):
        stage = file.parent.name
        write_text(run / f"episodes-{stage}.html", episodes_html(file, run.resolve().name, stage))
        found.append(SidePage(stage, "What was said, token by token", f"episodes-{stage}.html"))
    return tuple(found)
