"""What each method of an alignment run can be told: a settings class a method, and what it starts from.

These stand under `train` in the plan (align_plan.py), where `--set train.x=y` replaces their leaves.

Learning rates start from 3e-6 for a width of 2048 (Huang et al. 2024, 2403.17031: 3e-6 throughout at 1B) and grow
with (2048 / width)^1.5, which meets 1e-6 at 7B and what our models of 128 learn with; adapters take ten times that
(Hu et al. 2021, table 11 beside table 12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fledge.objectives.kto import KTO
from fledge.objectives.preference import Preference
from fledge.recipes.plan import FitPlan
from fledge.rl.feedme import FeedMEConfig
from fledge.rl.grpo import GRPOConfig
from fledge.rl.kl import KLConfig
from fledge.rl.ppo import PPOConfig
from fledge.train.optim import OptimConfig

MAX_LENGTH = 1024  # tokens of prompt and answer where the model reads more
REFERENCE_LR, REFERENCE_WIDTH, LORA_FACTOR = 3e-6, 2048, 10.0
SOFT_PROMPT_LR = 3e-2  # a tenth of Lester et al. 2021's, whose optimizer was Adafactor
SAFETY_SHARE = 0.1  # of the rows, where safety demonstrations are given and no share is
MAX_MEMBERS = 9  # of an ensemble of reward models


@dataclass(frozen=True)
class FitSettings:
    """Training by gradient on examples: conversations, pairs, verdicts or rankings, `batch` of them a step.

    `forward_rows` is how many pass through the model at once (memory, not mathematics). `max_length` counts the tokens
    of prompt and answer together.
    """

    lr: float
    max_length: int
    epochs: int = 1
    batch: int = 16
    forward_rows: int = 8
    decay: float = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: float = 0.1
    final: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.forward_rows) < 1 or self.max_length < 2 or not self.lr > 0:
            raise ValueError(f"lr, epochs, batch, forward_rows and max_length must be positive, got {self}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, got {self.warmup}")

    def plan(self, steps: int, rows: int, row_length: int) -> FitPlan:
        """The fit of `steps` steps; `rows` of `row_length` are what a step costs."""
        return FitPlan(
            steps=steps,
            rows=rows,
            row_length=row_length,
            optim=OptimConfig.adamw(self.lr, decay=self.decay, eps=1e-5),
            schedule=self.schedule,
            warmup=self.warmup,
            cooldown=1.0,
            final=self.final,
            clip_norm=self.clip_norm,
        )


@dataclass(frozen=True)
class PreferenceSettings:
    """DPO and IPO (objectives/preference.py)."""

    fit: FitSettings
    beta: float = 0.1
    kind: Literal["dpo", "ipo"] = "dpo"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _ = self.objective(pad_id=0)

    def objective(self, pad_id: int) -> Preference:
        """The loss; ValueError for settings that it refuses."""
        return Preference(
            self.fit.max_length, pad_id, beta=self.beta, kind=self.kind, label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True)
class KTOSettings:
    """KTO (objectives/kto.py). Weights None: the rarer kind is raised until both count the same (eq. 9)."""

    fit: FitSettings
    beta: float = 0.1
    desirable_weight: float | None = None
    undesirable_weight: float | None = None

    def __post_init__(self) -> None:
        _ = self.objective(pad_id=0, balanced=(1.0, 1.0))

    def objective(self, pad_id: int, balanced: tuple[float, float]) -> KTO:
        """The loss, with `balanced` where a weight is left open; ValueError for settings that it refuses."""
        desirable = balanced[0] if self.desirable_weight is None else self.desirable_weight
        undesirable = balanced[1] if self.undesirable_weight is None else self.undesirable_weight
        return KTO(self.fit.max_length, pad_id, self.beta, desirable, undesirable)


@dataclass(frozen=True)
class SFTSettings:
    """Imitation; `text_share` of the rows are the plain texts among the data, against forgetting.

    `safety_share` of the rows are safety demonstrations, whose own files `--safety` names.
    """

    fit: FitSettings
    text_share: float = 0.0
    safety_share: float = 0.0

    def __post_init__(self) -> None:
        if min(self.text_share, self.safety_share) < 0 or not self.text_share + self.safety_share < 1:
            raise ValueError(
                f"text_share and safety_share must be 0 or more and together below 1, got {self.text_share} and "
                f"{self.safety_share}"
            )


@dataclass(frozen=True)
class RewardSettings:
    """K-wise ranking (objectives/ranking.py). One epoch: more overfits (Ouyang et al. 2022, section 3.4).

    `members` models are trained, each with a head, an order of the data and a stage of its own ("reward", "reward-2",
    ...): an ensemble (Coste et al. 2024, 2310.02743, section 3).
    """

    fit: FitSettings
    members: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.members <= MAX_MEMBERS:
            raise ValueError(f"members must be from 1 to {MAX_MEMBERS}, got {self.members}")


@dataclass(frozen=True)
class BestOfNSettings:
    """Rejection sampling: of `samples` answers a prompt the `top` best (scoring at least `threshold`) are imitated."""

    fit: FitSettings
    samples: int = 8
    top: int = 1
    threshold: float | None = None
    temperature: float = 1.0
    prompt_length: int = 256
    response_length: int = 128
    prompts_at_once: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.top <= self.samples or min(self.prompt_length, self.response_length) < 1:
            raise ValueError(f"top must be from 1 to samples, and lengths positive, got {self}")
        if self.prompts_at_once < 1:
            raise ValueError(f"prompts_at_once must be at least 1, got {self.prompts_at_once}")


@dataclass(frozen=True)
class Scope:
    """What defaults follow from: the model's width, how much it reads at once, and whether an adapter is trained."""

    width: int
    context: int | None
    is_adapter: bool
    seed: int
    is_soft_prompt: bool = False

    @property
    def lr(self) -> float:
        """The first guess of the rate; see the head of this file. Two digits, so that plans are readable."""
        if self.is_soft_prompt:
            return SOFT_PROMPT_LR
        rate = REFERENCE_LR * (REFERENCE_WIDTH / self.width) ** 1.5 * (LORA_FACTOR if self.is_adapter else 1.0)
        return float(f"{min(rate, 5e-3):.1e}")

    @property
    def max_length(self) -> int:
        return MAX_LENGTH if self.context is None else min(MAX_LENGTH, self.context)

    @property
    def lengths(self) -> tuple[int, int]:
        """(prompt, answer) tokens of an episode."""
        room = min(384, self.max_length)
        answer = max(1, min(128, room // 3))
        return room - answer, answer


def settings_of(method: str, scope: Scope) -> Any:
    """The settings that `method` starts from."""
    return _SETTINGS[method](scope)


def with_lr(settings: Any, lr: float) -> Any:
    """The same settings at another learning rate, for every optimizer they have."""
    if hasattr(settings, "fit"):
        return replace(settings, fit=replace(settings.fit, lr=lr))
    optim = OptimConfig.adamw(lr, decay=0.0, eps=1e-5)
    if isinstance(settings, PPOConfig):
        return replace(settings, policy_optim=optim, value_optim=optim)
    return replace(settings, optim=optim)


def _fit(scope: Scope, **others: Any) -> FitSettings:
    return FitSettings(scope.lr, scope.max_length, **others)


def _ppo(scope: Scope) -> PPOConfig:
    prompt, answer = scope.lengths
    optim = OptimConfig.adamw(scope.lr, decay=0.0, eps=1e-5)
    return PPOConfig(
        rounds=40,
        episodes=32,
        minibatch=16,
        forward_rows=4,  # activations of 16 rows alone are more than all four networks of 30M parameters
        prompt_length=prompt,
        response_length=answer,
        kl=KLConfig(beta=0.05, target=6.0, horizon=2000),
        policy_optim=optim,
        value_optim=optim,
        warmup_rounds=4,
        pretrain_weight=0.0,
        ema_decay=0.95,  # 0.992 belongs to InstructGPT's 500 rounds: 40 of them would leave 72 % of the start
        seed=scope.seed,
    )


def _group(scope: Scope, base: GRPOConfig) -> GRPOConfig:
    prompt, answer = scope.lengths
    return replace(
        base,
        rounds=40,
        prompts=8,
        group=8,
        minibatch=32,
        forward_rows=16,
        prompt_length=prompt,
        response_length=answer,
        optim=OptimConfig.adamw(scope.lr, decay=0.0, eps=1e-5),
        warmup_rounds=4,
        ema_decay=0.95,
        seed=scope.seed,
    )


def _feedme(scope: Scope) -> FeedMEConfig:
    prompt, answer = scope.lengths
    optim = OptimConfig.adamw(scope.lr, decay=0.0, eps=1e-5)
    # Ratings are scores of any scale here, so the best of each prompt stand for the sevens.
    return FeedMEConfig(
        threshold=None,
        top=1,
        rows=16,
        prompt_length=prompt,
        response_length=answer,
        optim=optim,
        seed=scope.seed,
    )


def _best_of_n(scope: Scope) -> BestOfNSettings:
    prompt, answer = scope.lengths
    return BestOfNSettings(_fit(scope, epochs=2), prompt_length=prompt, response_length=answer)


_SETTINGS: Mapping[str, Callable[[Scope], Any]] = {
    "sft": lambda scope: SFTSettings(_fit(scope, epochs=2)),
    "reward": lambda scope: RewardSettings(_fit(scope)),
    "dpo": lambda scope: PreferenceSettings(_fit(scope)),
    "ipo": lambda scope: PreferenceSettings(_fit(scope), kind="ipo"),
    "kto": lambda scope: KTOSettings(_fit(scope)),
    "ppo": _ppo,
    "grpo": lambda scope: _group(scope, GRPOConfig.grpo()),
    "rloo": lambda scope: _group(scope, GRPOConfig.rloo()),
    "best-of-n": _best_of_n,
    "feedme": _feedme,
}
