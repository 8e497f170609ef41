"""The 13 categories of the published moderation API, and what is true of each whatever a classifier learnt.

Source: openapi 2.3.0, `CreateModerationResponse`. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MINORS = "sexual/minors"
MIN_HELD_OUT = 50  # held-out positives below which a category is unmeasured and never flags alone


@dataclass(frozen=True)
class Category:
    """`rule` is the rule of the constitution (text/constitution.py) that a refusal names. `has_images`: the published
    API scores images in it too."""

    name: str
    rule: str
    has_images: bool = False


CATEGORIES = (
    Category("hate", "no-hate"),
    Category("hate/threatening", "no-hate"),
    Category("harassment", "no-threats"),
    Category("harassment/threatening", "no-threats"),
    Category("illicit", "no-crime"),
    Category("illicit/violent", "no-dangerous-help"),
    Category("self-harm", "no-self-harm", has_images=True),
    Category("self-harm/intent", "no-self-harm", has_images=True),
    Category("self-harm/instructions", "no-self-harm", has_images=True),
    Category("sexual", "no-sexual", has_images=True),
    Category(MINORS, "no-sexual"),
    Category("violence", "no-dangerous-help", has_images=True),
    Category("violence/graphic", "no-dangerous-help", has_images=True),
)
NAMES = tuple(category.name for category in CATEGORIES)
RULE_OF = {category.name: category.rule for category in CATEGORIES}
# What a classifier learns. Nobody writes an example of the one that is missing, and none is learnt from.
LEARNT = tuple(name for name in NAMES if name != MINORS)

_HAN = re.compile(r"[㐀-䶿一-鿿豈-﫿]")
_LATIN = re.compile(r"[A-Za-zÀ-ɏ]")
_LETTER = re.compile(r"[^\W\d_]")
SCRIPTS = ("latin", "han", "other")


def script_of(text: str) -> str:
    """In which of `SCRIPTS` most of a text's letters are; each counts as measured or not on its own.

    A Chinese character says about as much as four letters and counts so. A text without letters is Latin.
    """
    han, latin = 4 * len(_HAN.findall(text)), len(_LATIN.findall(text))
    other = len(_LETTER.findall(text)) - han // 4 - latin
    return max((latin, "latin"), (han, "han"), (other, "other"), key=lambda pair: pair[0])[1]
