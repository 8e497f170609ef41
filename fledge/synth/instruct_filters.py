"""What Self-Instruct drops: proposed instructions and made instances that no text model should be taught from.

A filter of instructions is a function from text to a reason, or None. Source: Wang et al. 2023 (2212.10560), section
2.2 and the code published with it, whose English rules stand here with their Chinese counterparts.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from fledge.data.self_instruct import Instance
from fledge.synth.instruct_texts import Language
from fledge.synth.rouge import tokens_of

MIN_TOKENS = {"en": 4, "zh": 5}  # the paper drops three words or fewer; a Chinese word has about 1.5 characters
MAX_TOKENS = {"en": 150, "zh": 225}
# What a model of text cannot see or do.
KEYWORDS: dict[Language, tuple[str, ...]] = {
    "en": (
        *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
        *("draw", "plot", "go to"),
    ),
    "zh": ("图片", "图像", "照片", "图表", "截图", "文件", "地图", "画一", "绘制", "视频", "音频", "链接"),
}
# A program to be written has no one right answer to learn from; the paper leaves these out.
PROGRAMS: dict[Language, tuple[str, ...]] = {
    "en": ("write a program",),
    "zh": ("写一个程序", "编写一个程序", "编写程序", "请写一个程序", "请编写一个程序", "写一段程序"),
}
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")

Filter = Callable[[str, Language], str | None]


def too_short(text: str, language: Language) -> str | None:
    return "too short" if len(tokens_of(text)) < MIN_TOKENS[language] else None


def too_long(text: str, language: Language) -> str | None:
    return "too long" if len(tokens_of(text)) > MAX_TOKENS[language] else None


def keyword(text: str, language: Language) -> str | None:
    """Whole words in English; anywhere in Chinese, which does not part its words."""
    said = f" {' '.join(re.findall(r'[a-z]+', text.lower()))} "
    in_english = any(f" {word} " in said for word in KEYWORDS["en"])
    in_chinese = language == "zh" and any(word in text for word in KEYWORDS["zh"])
    return "needs more than text" if in_english or in_chinese else None


def program(text: str, language: Language) -> str | None:
    starts = PROGRAMS["en"] + PROGRAMS[language]
    return "asks for a program" if text.lower().startswith(starts) else None


def punctuation(text: str, language: Language) -> str | None:
    is_mark = unicodedata.category(text[:1] or " ")[0] in "PS"
    return "begins with punctuation" if is_mark else None


def wrong_script(text: str, language: Language) -> str | None:
    """English instructions begin in ASCII; Chinese ones hold a Chinese character."""
    if language == "zh":
        return None if _CHINESE.search(text) else "not in the language"
    return None if text[:1].isascii() else "not in the language"


FILTERS: tuple[Filter, ...] = (too_short, too_long, keyword, program, punctuation, wrong_script)


def reason_against(instruction: str, language: Language) -> str | None:
    """Why an instruction is dropped, by the first filter that objects; None if none does."""
    return next((reason for check in FILTERS if (reason := check(instruction, language))), None)


def sound_instances(instances: Sequence[Instance], *, at_most: int) -> tuple[list[Instance], Counter[str]]:
    """(the instances that are kept, what was dropped by reason).

    Dropped are: those without an output, with the input repeated as output, ending in a colon (something is missing);
    all instances of an input that was given different outputs; repetitions; and what goes beyond `at_most`.
    """
    dropped: Counter[str] = Counter()
    sound: list[Instance] = []
    for instance in instances:
        reason = _fault(instance)
        if reason is None:
            sound.append(instance)
        else:
            dropped[reason] += 1
    outputs: dict[str, set[str]] = {}
    for instance in sound:
        outputs.setdefault(instance.input, set()).add(instance.output)
    agreed = [instance for instance in sound if len(outputs[instance.input]) == 1]
    unique = list(dict.fromkeys(agreed))
    dropped["one input, several outputs"] += len(sound) - len(agreed)
    dropped["repeated"] += len(agreed) - len(unique)
    dropped["more than asked for"] += max(0, len(unique) - at_most)
    return unique[:at_most], +dropped


def _fault(instance: Instance) -> str | None:
    if not instance.output.strip():
        return "empty output"
    if instance.input.strip() == instance.output.strip():
        return "output repeats the input"
    if instance.input.rstrip().endswith((":", "：")) or instance.output.rstrip().endswith((":", "：")):
        return "ends in a colon"
    return None
