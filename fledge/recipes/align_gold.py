"""The gold judge of an alignment run: a reward model that is never trained against looks at the policy now and then.

Gao et al. 2022 (2210.10760): while the proxy that is trained against goes on rising, gold rises, turns and falls. Both
are plotted over the distance travelled, d = sqrt(KL); for reinforcement learning gold follows

    R(d) = d (alpha - beta log d)

Proxy, gold and KL are had from the same answers to the same held-out prompts. Falls in a row end the run (C58).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fledge.formats.checkpoint import LoadedModel
from fledge.models.scalar import ScalarModel
from fledge.recipes.align_data import Asking, read_lines
from fledge.recipes.align_offline import row_logprobs
from fledge.recipes.align_settings import FitSettings
from fledge.recipes.answers import Asked, chat_answers, score_answers
from fledge.recipes.report import Curve, Fact, Series
from fledge.rl.rewards import Records, RewardSum
from fledge.rl.rollout import EpisodeShape, lay_out
from fledge.rl.saving import trainable

LOOKS = "gold.jsonl"
MIN_POINTS = 4  # for a fit of two coefficients that says something
FIT_POINTS = 40


@dataclass
class GoldWatch:
    """What a judge that is never trained against says of the policy, and whether it is time to stop.

    `best` holds the weights of the highest gold score so far.
    """

    judge: ScalarModel
    asked: Sequence[Asking]
    every: int
    falls: int
    scores: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def look(self, score: float, policy: nn.Module) -> None:
        """Take in one more gold score of the policy as it is."""
        if not self.scores or score > max(self.scores):
            self.best = {name: tensor.clone() for name, tensor in trainable(policy).items()}
        self.scores.append(score)

    @property
    def is_over(self) -> bool:
        """The last `falls` looks were each below the one before."""
        last = self.scores[-self.falls - 1 :]
        return len(last) > self.falls and all(later < earlier for earlier, later in pairwise(last))


@dataclass(frozen=True)
class Look:
    """One look: gold and proxy score of the same answers, and how far they are from the reference, in nats an answer.

    `proxy` is None where no reward could be had for any of them.
    """

    gold: float
    proxy: float | None
    kl: float


@dataclass(frozen=True)
class Scene:
    """What a look needs beside the policy: the reference, the run's rewards, the shape of episodes, the seed."""

    reference: LoadedModel
    rewards: RewardSum
    shape: EpisodeShape
    seed: int

    def proxy_of(self, asked: Sequence[Asking]) -> RewardSum:
        """The run's rewards for these prompts instead of the training ones."""
        records = Records.of([asking.ids for asking in asked], [asking.record for asking in asked])
        return replace(self.rewards, records=records, max_failed=1.0, failures=[])


def look_at(policy: Any, watch: GoldWatch, scene: Scene) -> Look:
    """Have the policy answer, and judge, reward and measure these answers."""
    speaking = replace(scene.reference, model=policy)
    pad_id = speaking.tokenizer.pad_id
    asked = Asked([asking.conversation for asking in watch.asked], scene.shape.response_length)
    said = chat_answers(speaking, asked, scene.seed)
    rows = [(asking.ids, completion.ids) for asking, completion in zip(watch.asked, said, strict=True)]
    gold = float(score_answers(watch.judge, rows, pad_id).mean())
    proxy = scene.proxy_of(watch.asked)
    episodes = lay_out([ids for ids, _ in rows], said, scene.shape)
    scores_B = proxy(episodes.to(next(policy.parameters()).device))
    proxy.figures()  # forget them: the next round's figures are of its own episodes
    paid_B = scores_B[~scores_B.isnan()]
    fit = FitSettings(lr=1.0, max_length=scene.shape.prompt_length + scene.shape.response_length)
    gaps = np.subtract(row_logprobs(speaking, rows, fit), row_logprobs(scene.reference, rows, fit))
    return Look(gold, float(paid_B.mean()) if len(paid_B) else None, float(gaps.mean()))


def gold_report(folder: Path) -> tuple[tuple[Fact, ...], tuple[Curve, ...]]:
    """(facts, chart) of the looks that a stage left in `gold.jsonl`; nothing without any."""
    looks = read_lines(folder / LOOKS)
    if len(looks) < 2:
        return (), ()
    best = max(looks, key=lambda look: look["gold"])
    facts = (
        Fact("best gold score", best["gold"], f"after round {best['step']}"),
        Fact("gold score, last less first", looks[-1]["gold"] - looks[0]["gold"]),
    )
    in_order = sorted(looks, key=lambda look: look["kl"])
    distances = [max(look["kl"], 0.0) ** 0.5 for look in in_order]
    series = [
        Series.of(label, distances, [look[name] for look in in_order])
        for name, label in (("proxy", "reward trained on (proxy)"), ("gold", "gold judge"))
    ]
    note = "Both of the same answers to held-out prompts (Gao et al. 2022, figure 1)."
    found = fitted(distances, [look["gold"] for look in in_order])
    if found is not None:
        alpha, beta, start = found
        first = min(d for d in distances if d > 0)
        drawn = [first + (max(distances) - first) * n / FIT_POINTS for n in range(FIT_POINTS + 1)]
        values = [start + d * (alpha - beta * float(np.log(d))) for d in drawn]
        series.append(Series.of("fit of gold", drawn, values))
        note += f" Fit: {start:.2f} + d ({alpha:.2f} − {beta:.2f} log d)."
    return facts, (Curve("Proxy and gold reward", "d = square root of KL", "score", tuple(series), note=note),)


def fitted(distances: Sequence[float], gold: Sequence[float]) -> tuple[float, float, float] | None:
    """(alpha, beta, start) of gold = start + d (alpha - beta log d), by least squares; None for too few points, and
    where gold does not rise and turn (beta of 0 or less), so that the form says nothing.

    Gao et al. 2022, section 3.1, equation for reinforcement learning; their scores start at 0, ours where they do.
    """
    points = [(d, score) for d, score in zip(distances, gold, strict=True) if d > 0]
    if len(points) < MIN_POINTS or len({round(d, 6) for d, _ in points}) < MIN_POINTS:
        return None
    d_N = np.array([d for d, _ in points])
    design_N3 = np.stack([d_N, -d_N * np.log(d_N), np.ones_like(d_N)], axis=1)
    (alpha, beta, start), *_ = np.linalg.lstsq(design_N3, np.array([score for _, score in points]), rcond=None)
    return (float(alpha), float(beta), float(start)) if beta > 0 else None
