"""How figures read on the run card and in its terminal summary: one function a unit, used by every drawing and table.

Rounding never changes what a figure says: `against` keeps enough digits that a value and its threshold stay apart.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime

from fledge.recipes.report import Cell, Claim, Fact, Interval

NOTHING = "–"
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
_COUNT_PREFIXES = ("", "k", "M", "B", "T")


def printable(text: str) -> str:
    """`text` without what neither HTML nor XML may hold (NUL and its kin become U+FFFD)."""
    return _CONTROLS.sub("\ufffd", text)


def columns_wide(text: str) -> float:
    """Rough width of `text` in units of the font size: ideographs are square, Latin letters about half as wide."""
    return sum(1.0 if unicodedata.east_asian_width(char) in "WF" else 0.55 for char in text)


def shorten(text: str, width: float) -> str:
    """`text`, cut with an ellipsis where `columns_wide` would pass `width`."""
    if columns_wide(text) <= width:
        return text
    kept = text
    while kept and columns_wide(kept) + 0.8 > width:
        kept = kept[:-1]
    return kept.rstrip() + "…"


def figure(value: float, decimals: int | None = None) -> str:
    """A plain number: whole ones with thousands separators, others with about four significant digits."""
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if decimals is None:
        decimals = decimals_for([value])
    if value != 0 and abs(value) < 10.0**-6:
        return f"{value:.2e}".replace("-", "−")
    return f"{value:,.{decimals}f}".replace("-", "−")


def decimals_for(values: Sequence[float]) -> int:
    """Decimals that give the largest of `values` about four significant digits."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest == 0:
        return 0
    return min(6, max(0, 3 - math.floor(math.log10(largest))))


def percent(share: float) -> str:
    return f"{100 * share:,.1f}".replace("-", "−")


def count(value: float | None) -> str:
    """1,234,567 -> "1.23M"; B is a thousand million."""
    return NOTHING if value is None else _scaled(value, 1000, _COUNT_PREFIXES)


def flops(value: float | None) -> str:
    """1.2e15 -> "1.2 PFLOP"."""
    return NOTHING if value is None else f"{_scaled(value, 1000, _PREFIXES, ' ')}FLOP"


def num_bytes(value: float | None) -> str:
    """Binary units: 1048576 -> "1 MiB"."""
    if value is None:
        return NOTHING
    if value < 1024:
        return f"{value:.0f} B"
    return f"{_scaled(value, 1024, _PREFIXES, ' ').replace('k', 'K')}iB"


def seconds(value: float | None) -> str:
    """0.42 -> "0.4 s", 75 -> "1 min 15 s", 4000 -> "1 h 07 min"."""
    if value is None:
        return NOTHING
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def fact(value: Fact) -> str:
    """The figure without its unit, a percentage included (its unit prints the sign)."""
    if value.value is None:
        return NOTHING
    if isinstance(value.value, str):
        return value.value
    if value.unit == "%":
        return percent(value.value)
    if abs(value.value) >= 10**5:
        return count(value.value)
    return figure(value.value) if isinstance(value.value, int) else _trimmed(value.value, decimals_for([value.value]))


def column(cells: Sequence[Cell], title: str) -> list[str]:
    """The cells of one table column as text, floats with the same number of decimals throughout."""
    share = title.rstrip().endswith("%")
    numbers = [_number(cell) for cell in cells]
    floats = [n for cell, n in zip(cells, numbers, strict=True) if n is not None and not isinstance(cell, int)]
    whole = all(float(value).is_integer() for value in floats)
    decimals = 1 if share else 0 if whole else decimals_for(floats)
    while not share and decimals > 0 and all(round(v, decimals) == round(v, decimals - 1) for v in floats):
        decimals -= 1
    return [_cell(cell, share, decimals) for cell in cells]


def against(claim: Claim) -> tuple[str, str]:
    """(value, threshold) as text, with as many digits as it takes to see on which side the value lies."""
    scale = 100.0 if claim.unit == "%" else 1.0
    threshold = claim.threshold * scale
    if claim.value is None:
        return "not measured", _threshold(threshold, 3)
    value = claim.value * scale
    decimals = 1 if scale > 1 else min(3, decimals_for([value, threshold]))
    while value != threshold and decimals < 12 and f"{value:.{decimals}f}" == f"{threshold:.{decimals}f}":
        decimals += 1
    return f"{value:,.{decimals}f}".replace("-", "−"), _threshold(threshold, decimals)


def _threshold(value: float, decimals: int) -> str:
    """A threshold that someone chose stands as chosen; one that was computed is rounded like the value beside it."""
    is_chosen = math.isclose(value, round(value, 4), rel_tol=1e-12)
    return _trimmed(value, max(decimals, 4) if is_chosen else max(decimals, 3))


def day(stamp: str | None) -> str:
    """An ISO time as "2026-01-31 14:05"; other text unchanged."""
    if stamp is None:
        return NOTHING
    try:
        return datetime.fromisoformat(stamp).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return stamp


def _scaled(value: float, base: int, prefixes: Sequence[str], gap: str = "") -> str:
    power = 0
    scaled = float(value)
    while abs(scaled) >= base * 0.9995 and power < len(prefixes) - 1:
        scaled /= base
        power += 1
    decimals = 0 if power == 0 and float(value).is_integer() else max(0, 2 - int(math.log10(max(abs(scaled), 1))))
    return f"{_trimmed(scaled, decimals)}{gap}{prefixes[power]}"


def _trimmed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def _number(cell: Cell) -> float | None:
    if isinstance(cell, Interval):
        return cell.value
    return cell if isinstance(cell, int | float) and not isinstance(cell, bool) else None


def _cell(cell: Cell, share: bool, decimals: int) -> str:
    if cell is None:
        return NOTHING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Interval):
        low, value, high = (percent(v) if share else figure(v, decimals) for v in (cell.low, cell.value, cell.high))
        return f"{value} [{low}, {high}]"
    if share:
        return percent(cell)
    return figure(cell) if isinstance(cell, int) else figure(cell, decimals)
