"""From a `Card` to its HTML page, which needs no network and no script: card.html.j2 beside this file, filled.

Jinja escapes everything; only the drawings of charts.py, card_ring.py and card_lineage.py, which escape what they are
given, go in as they are. Pages that belong to a run (side_pages.py) are written with the card.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from fledge.config import to_json
from fledge.files import write_json, write_text
from fledge.recipes import card_format as say
from fledge.recipes.card import Card, build_card, read_card, ring_picture
from fledge.recipes.card_lineage import lineage_svg
from fledge.recipes.card_stages import is_alignment, kind_of, stages_of
from fledge.recipes.pages import page_environment, table_cells
from fledge.recipes.side_pages import write_side_pages

__all__ = ["render_html", "table_cells", "write_card"]

OPEN_SAMPLES = 4  # prompts whose answers are unfolded from the start


def write_card(run: Path) -> Path:
    """Write `card.json`, then `card.html` from what that file says, and the pages it leads to; returns its path.

    Raises what `build_card` raises, and `RunError` if the folder cannot be written.
    """
    pages = write_side_pages(run)
    write_json(run / "card.json", to_json(replace(build_card(run), pages=pages)))
    page = run / "card.html"
    write_text(page, render_html(read_card(run / "card.json")))
    return page


def render_html(card: Card) -> str:
    """The whole page. The same card gives the same page, byte for byte."""
    environment = page_environment()
    numbers = {stage.name: number for stage, number in zip(card.stages, _numbers(card), strict=True)}
    page: str = environment.get_template("card.html.j2").render(
        card=card,
        ring=Markup(ring_picture(card, theme="inherit")),
        small_ring=Markup(ring_picture(card, theme="inherit", labelled=False)),
        lineage=Markup(lineage_svg(card.lineage)),
        numbers=numbers,
        open_samples=OPEN_SAMPLES,
        reached=sum(1 for entry in card.claims if entry.claim.reached),
    )
    return say.printable(page)


def _numbers(card: Card) -> list[str]:
    """The place of each stage in the ring ("6"), that of its guests with a letter ("6a"), "+" outside the ring."""
    present = {stage.name for stage in card.stages}
    kinds = [kind for kind in stages_of(card.plan) if not is_alignment(card.plan) or kind.name in present]
    places = [kind.name for kind in kinds if kind.part_of is None]
    guests: dict[str, int] = {}
    numbers = []
    for stage in card.stages:
        host = kind_of(stage.name).part_of
        if host is not None:
            numbers.append(f"{places.index(host) + 1}{'abcdef'[guests.get(host, 0)]}")
            guests[host] = guests.get(host, 0) + 1
        else:
            numbers.append(str(places.index(stage.name) + 1) if stage.name in places else "+")
    return numbers
