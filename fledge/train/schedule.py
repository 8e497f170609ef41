"""Learning-rate schedules as a multiplier of every rate's peak, a pure function of the step.

`linear` is the trapezoid of warm-up, plateau and linear cool-down (Zhai et al. 2022 and, for language models, Hägele
et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations"). `cosine` is Loshchilov &
Hutter 2017 down to `final`, as GPT-3 and InstructGPT use it. `constant` is what PPO uses after its warm-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """`num_steps` in all. `warmup_steps` rise linearly from `1/warmup_steps` (the first step is not lost at 0).

    linear: 1 until `cooldown` (a share of `num_steps`) is left, then straight down to `final`.
    cosine: half a wave from 1 after the warm-up to `final`. constant: 1 after the warm-up.
    """

    kind: Literal["linear", "cosine", "constant"]
    num_steps: int
    warmup_steps: int = 0
    cooldown: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not 0 <= self.warmup_steps <= self.num_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must lie within num_steps {self.num_steps} of 1 or more"
            )
        if not (0 <= self.cooldown <= 1 and 0 <= self.final <= 1):
            raise ValueError(f"cooldown {self.cooldown} and final {self.final} must lie between 0 and 1")

    def scale(self, step: int) -> float:
        """The multiplier for step `step`, counted from 0; `final` (or 1 for constant) from `num_steps` on."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.kind == "cosine":
            done = min(1.0, (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps))
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
        left = max(0.0, self.num_steps - step)
        ramp = max(1.0, min(self.cooldown * self.num_steps, self.num_steps - self.warmup_steps))
        return self.final + (1 - self.final) * min(1.0, left / ramp)
