"""Answers drawn to prompts, to be judged by a model afterwards: several to a prompt, each from a seed of its own.

What `fledge constitution label` and `rules` ask of a model before they judge (Bai et al. 2022, 2212.08073, section 4.1:
two answers a prompt, at temperature 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fledge.config import check_range, to_json
from fledge.errors import ConfigError
from fledge.synth.constitutional import prompts_hash
from fledge.synth.dialogue_texts import PHRASES, answer_prompt, next_speakers
from fledge.synth.generating import Ask, Generator, Progress, unwatched
from fledge.synth.journal import open_journal
from fledge.text.constitution import Language
from fledge.types import PromptExample, SamplingParams


@dataclass(frozen=True)
class AnswerConfig:
    """`answers` to every prompt; `maker` names the model, whose work is not gone on with by another."""

    maker: str = ""
    language: Language = "en"
    answers: int = 2
    seed: int = 0
    batch: int = 32
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=256))

    def __post_init__(self) -> None:
        check_range(self, "seed", 0)
        if min(self.answers, self.batch) < 1:
            raise ConfigError(f"answers and batch must be at least 1, got {self.answers} and {self.batch}")


def draw_answers(
    model: Generator,
    prompts: Sequence[PromptExample],
    config: AnswerConfig,
    journal_path: Path | None = None,
    progress: Progress = unwatched,
) -> list[tuple[str, ...]]:
    """The answers to each prompt, white space around them aside; one may be empty, and two may be the same.

    With a journal, a killed run goes on where it stopped; `RunError` if it is of other work.
    """
    what = {"answers": to_json(config), "prompts": prompts_hash(prompts)}
    phrases = PHRASES[config.language]
    with open_journal(journal_path, what) as journal:
        for start in range(len(journal.entries), len(prompts), config.batch):
            batch = range(start, min(start + config.batch, len(prompts)))
            asks = [
                Ask(
                    answer_prompt(prompts[n].prompt, phrases),
                    replace(config.sampling, seed=seed),
                    next_speakers(phrases),
                    prompts[n].prompt,
                )
                for n in batch
                for seed in _seeds(config, n)
            ]
            replies = iter(model.generate(asks))
            for _ in batch:
                journal.append({"answers": [next(replies).text.strip() for _ in range(config.answers)]})
            progress("answers", len(journal.entries), len(prompts))
        return [tuple(entry["answers"]) for entry in journal.entries]


def _seeds(config: AnswerConfig, number: int) -> list[int]:
    rng = np.random.default_rng([config.seed, number])
    return [int(rng.integers(1 << 31)) for _ in range(config.answers)]
