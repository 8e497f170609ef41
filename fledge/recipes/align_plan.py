"""The plan of an alignment run: one frozen value that decides everything it does, written to plan.json before any work.

`plan_of` (align.py) makes it from the order: method, model, data; `--set a.b=c` replaces leaves. What only one method
knows stands under `train`, in the settings class of that method (align_settings.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fledge.config import check_range
from fledge.errors import ConfigError
from fledge.layers.lora import LoraConfig
from fledge.recipes.plan import MAX_SEED


@dataclass(frozen=True)
class StartPlan:
    """The model that is aligned: as the user named it, and the hash of its weights, which may not change (C45)."""

    name: str
    hash: str


@dataclass(frozen=True)
class DataPlan:
    """What is learned from. `hash` stands for the content of the files, so changed data are a changed plan.

    `safety` are files of safety demonstrations, a source of their own in the mix of sft (train.safety_share).
    `skip_bad` false: the first bad row ends the run. `held_out_share` of the prompts is kept for measuring, unless the
    file `held_out` brings others. `personal` says what becomes of personal data (data/pii.py): kept, replaced by their
    kind, or their rows left out. Of prompts that agree in their first `prefix_chars` characters the first is taken
    (None: all of them), as InstructGPT did (Ouyang et al. 2022, section 3.2).
    """

    paths: tuple[str, ...]
    hash: str
    format: str | None = None
    held_out: str | None = None
    safety: tuple[str, ...] = ()
    skip_bad: bool = False
    held_out_share: float = 0.1
    max_chars: int = 100_000
    personal: Literal["keep", "redact", "drop"] = "keep"
    prefix_chars: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share must lie between 0 and 1, got {self.held_out_share}")
        if self.prefix_chars is not None and self.prefix_chars < 1:
            raise ValueError(f"prefix_chars must be at least 1, got {self.prefix_chars}; null takes all prompts")


@dataclass(frozen=True)
class LoraPlan:
    """An adapter instead of all weights; see `layers.lora.LoraConfig`. The result is saved merged, and as adapter."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None
    is_rank_stabilised: bool = False

    def __post_init__(self) -> None:
        _ = self.config  # refuses a rank or targets that make no adapter

    @property
    def config(self) -> LoraConfig:
        return LoraConfig(self.rank, self.alpha, 0.0, self.is_rank_stabilised, self.targets)


@dataclass(frozen=True)
class RewardPart:
    """One summand of the reward: a reward model by the name of its run, a rule reward model with the rules it is asked
    about in `options` (as it is told them, by id), a verifier with its options, or a Python function, whose file
    `options` names and `hash` pins; both of these run in a confined process.

    Several models under one name are an ensemble, `members`: their mean less `caution` times their spread.
    """

    kind: Literal["model", "rules", "verifier", "function"]
    name: str
    weight: float = 1.0
    hash: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    members: tuple[StartPlan, ...] = ()
    caution: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            what = f"the reward '{self.name}' has the weight {self.weight:g}"
            raise ConfigError(f"{what}: expected a finite number other than 0; leave the part out instead")
        if not 0 <= self.caution < float("inf"):
            raise ValueError(f"caution must be 0 or more, got {self.caution}")

    @property
    def models(self) -> tuple[StartPlan, ...]:
        """The reward models of this part: none for what is no model."""
        if self.kind not in ("model", "rules"):
            return ()
        return self.members or (StartPlan(self.name, self.hash or ""),)


@dataclass(frozen=True)
class SelectPlan:
    """Which of the checkpoints of sft is kept: the one whose answers to held-out prompts this reward model scores best.

    InstructGPT chose its SFT model so, not by validation loss (Ouyang et al. 2022, section 3.5). A checkpoint is looked
    at every `every` steps (None: after every epoch), on `prompts` held-out prompts that the outcome does not use.
    """

    name: str
    hash: str
    every: int | None = None
    prompts: int = 32

    def __post_init__(self) -> None:
        if min(self.every or 1, self.prompts) < 1:
            raise ValueError(f"every and prompts must be at least 1, got {self}")


@dataclass(frozen=True)
class JudgePlan:
    """A gold judge that is never trained against: every `every` rounds it scores answers to `prompts` held-out prompts.

    `falls` falls in a row end the run, with the weights from before them (C58, after Gao et al. 2022).
    """

    name: str
    hash: str
    every: int = 5
    prompts: int = 32
    falls: int = 2

    def __post_init__(self) -> None:
        if min(self.every, self.prompts, self.falls) < 1:
            raise ValueError(f"every, prompts and falls must be at least 1, got {self}")


@dataclass(frozen=True)
class OutcomePlan:
    """What is measured afterwards: answers of before and after to `prompts` held-out prompts, `shown` on the card."""

    prompts: int = 16
    shown: int = 6
    max_tokens: int = 128

    def __post_init__(self) -> None:
        if min(self.prompts, self.max_tokens) < 1 or self.shown < 0:
            raise ValueError(f"prompts and max_tokens must be at least 1, shown at least 0, got {self}")


@dataclass(frozen=True)
class AlignPlan:
    """A whole run. `train` is the settings class of `method`.

    `soft_prompt` is the number of tokens of a soft prompt that is trained instead of weights. `episodes_kept` of every
    round of PPO and its like stand token by token in the table of episodes. `checkpoints` models are left behind on the
    way, evenly spaced, beside the last.
    """

    method: str
    seed: int
    start: StartPlan
    data: DataPlan
    lora: LoraPlan | None
    train: Any
    rewards: tuple[RewardPart, ...] = ()
    max_failed_rewards: float = 0.25
    judge: JudgePlan | None = None
    soft_prompt: int | None = None
    select: SelectPlan | None = None
    episodes_kept: int = 4
    outcome: OutcomePlan = field(default_factory=OutcomePlan)
    save_seconds: float = 45.0
    checkpoints: int = 0

    def __post_init__(self) -> None:
        for config in (self, self.train):
            if hasattr(config, "seed"):
                check_range(config, "seed", 0, MAX_SEED)
        if self.checkpoints < 0 or self.episodes_kept < 0 or self.soft_prompt == 0:
            raise ValueError(f"checkpoints and episodes_kept must be 0 or more, soft_prompt 1 or more, got {self}")

    def marks(self, steps: int) -> frozenset[int]:
        """The steps of `steps` after which a model is left behind: `checkpoints` of them, evenly, none the last."""
        parts = self.checkpoints + 1
        return frozenset(round(steps * n / parts) for n in range(1, parts)) - {0, steps}
