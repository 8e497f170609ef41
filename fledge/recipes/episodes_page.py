"""The browsable table of what a policy said: one page out of `episodes.jsonl`, with a script of its own, no network.

Every token is coloured by its KL, value or advantage and says all three when it is pointed at; a table below the text
has them as figures. Rounds are stepped through; within a round episodes are sorted by score.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fledge.errors import RunError
from fledge.recipes import card_format as say
from fledge.recipes.card_stages import kind_of
from fledge.recipes.pages import page_environment
from fledge.recipes.report import Curve, Series

EPISODES = "episodes.jsonl"
MAX_ROUNDS = 200  # on one page; of more, evenly spaced ones


@dataclass(frozen=True)
class EpisodesView:
    """What the template is given. `data` is JSON for the page's script."""

    title: str
    lead: str
    curves: tuple[Curve, ...]
    metrics: tuple[tuple[str, str, str], ...]
    data: Markup


def episodes_html(file: Path, run: str, stage: str) -> str:
    """The whole page; `RunError` for a damaged file. A torn last line, written while a process died, is left out."""
    episodes = _read(file)
    steps = sorted({episode["step"] for episode in episodes})
    shown = _spaced(steps, MAX_ROUNDS)
    kept = [episode for episode in episodes if episode["step"] in set(shown)]
    left_out = f", {len(shown)} of them on this page" if len(shown) < len(steps) else ""
    view = EpisodesView(
        title=f"{run}: what {kind_of(stage).title} said",
        lead=f"{len(episodes)} episodes of {len(steps)} rounds{left_out}",
        curves=_curves(kept, shown),
        metrics=_metrics(kept),
        data=_script_json({"rounds": [_round(kept, step) for step in shown]}),
    )
    text: str = page_environment().get_template("episodes.html.j2").render(view=view)
    return say.printable(text)


def _read(file: Path) -> list[dict[str, Any]]:
    found = []
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{file} line {number} is not JSON ({error}); delete that line") from error
    return found


def _spaced(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, the first and the last among them."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(n * (len(steps) - 1) / (count - 1))] for n in range(count)]


def _metrics(episodes: Sequence[dict[str, Any]]) -> tuple[tuple[str, str, str], ...]:
    """(key, name, what it is) of what can be shown; the value only where there is a value function."""
    rows = [
        ("advantages", "advantage", "how much better than expected; what the step pushes up or down"),
        ("kl", "KL", "log pi - log pi_ref, in nats: how far from the reference"),
    ]
    if any(episode["values"] for episode in episodes):
        rows.append(("values", "value", "the score that the value function expects from here"))
    return tuple(rows)


def _curves(episodes: Sequence[dict[str, Any]], steps: Sequence[int]) -> tuple[Curve, ...]:
    """The score and the KL of the episodes on the page, each the mean of its round."""

    def mean(step: int, of: Any) -> float | None:
        found = [value for e in episodes if e["step"] == step and (value := of(e)) is not None]
        return sum(found) / len(found) if found else None

    scores = [mean(step, lambda episode: episode["score"]) for step in steps]
    distances = [mean(step, lambda episode: sum(episode["kl"])) for step in steps]
    return (
        Curve("Score of these episodes", "round", "score", (Series.of("score", steps, scores),)),
        Curve("KL of these episodes", "round", "nats an answer", (Series.of("KL", steps, distances),)),
    )


def _round(episodes: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """A round for the script; older files have no `pieces`, then the answer stands as one."""
    rows = []
    for episode in (e for e in episodes if e["step"] == step):
        tokens = episode.get("pieces") or [episode["answer"], *[""] * (len(episode["tokens"]) - 1)]
        rows.append(
            {
                "prompt": episode["prompt"],
                "score": episode["score"],
                "ended": episode.get("ended"),
                "pieces": tokens,
                "ids": episode["tokens"],
                "kl": episode["kl"],
                "values": episode["values"],
                "advantages": episode["advantages"],
            }
        )
    return {"step": step, "episodes": rows}


def _script_json(data: Any) -> Markup:
    """JSON that may stand inside a script element: nothing in it can close the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
