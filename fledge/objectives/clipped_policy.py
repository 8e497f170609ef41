"""PPO's policy loss: the clipped surrogate, over the tokens that are actions.

    rho_t = exp(log pi(a_t) - log pi_old(a_t))        loss_t = max(-A_t rho_t, -A_t clip(rho_t, 1 - eps, 1 + eps))

`action_logprobs` is the one place that turns a model into the distribution actions are drawn from: temperature and
banned ids are the same for the sampler, the old, the new and the reference policy.

Source: Schulman et al. 2017 (1707.06347), eq. 7; dual clip: Ye et al. 2020 (1912.09729), eq. 5.
Suffixes: B episodes, T positions (prompt and response), R response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.batches import Loss, Rollout, Term
from fledge.layers.attention import SegmentContext
from fledge.objectives.logprobs import target_logprobs
from fledge.objectives.next_token import Trunk
from fledge.objectives.padding import Group, without_padding

MAX_LOG_RATIO = 20.0  # exp(20) is far outside any clip range and far from overflow in float32


@dataclass(frozen=True)
class ActionSpace:
    """What an action is: one of the last `response_length` tokens of a row, drawn at `temperature`, never banned."""

    response_length: int
    temperature: float = 1.0
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.response_length < 1 or self.temperature <= 0:
            raise ValueError(f"response_length and temperature must be positive, got {self}")

    def logits(self, logits: Tensor) -> Tensor:
        """Logits (..., V) of the distribution that actions are drawn from, float32."""
        scaled = logits.float() if self.temperature == 1 else logits.float() / self.temperature
        if not self.banned_ids:
            return scaled
        banned = torch.tensor(self.banned_ids, dtype=torch.int64, device=logits.device)
        return scaled.index_fill(-1, banned, float("-inf"))


def action_logprobs(model: Trunk, x: Tensor, tokens_BT: Tensor, segments_BT: Tensor, space: ActionSpace) -> Tensor:
    """Log-probability of every response token (B, T), 0 over the prompt; the logit at t - 1 speaks of token t.

    `x` is what `embed` returned. A banned token has minus infinity. This is the costly region, without sparse
    gradients, that a caller may compile.
    """
    x_BTD = model.hidden(x, SegmentContext(segments_BT))
    logits_BRV = space.logits(model.unembed(x_BTD[:, -space.response_length - 1 : -1]))
    logprobs_BR = target_logprobs(logits_BRV, tokens_BT[:, -space.response_length :])
    return F.pad(logprobs_BR, (tokens_BT.shape[1] - space.response_length, 0))


PolicyRegion = Callable[[Trunk, Tensor, Tensor, Tensor, ActionSpace], Tensor]


def token_logprobs(
    model: Trunk, tokens_BT: Tensor, segments_BT: Tensor, space: ActionSpace, region: PolicyRegion | None = None
) -> Tensor:
    """`action_logprobs` of whole rows by a compiled `region`; if None eagerly, without the padding, where it is 0."""
    if region is not None:
        return region(model, model.embed(tokens_BT, SegmentContext(segments_BT)), tokens_BT, segments_BT, space)
    prompt_width = tokens_BT.shape[1] - space.response_length

    def logprobs_of(group: Group, segments_bL: Tensor) -> Tensor:
        # What comes before the first response of the group needs no logits; the first token of a row never has any.
        num_prompt_b = ((group.columns_bL < prompt_width) & group.inside_bL).sum(dim=1)
        num_others = max(1, int(num_prompt_b.min()))
        own = replace(space, response_length=max(1, segments_bL.shape[1] - num_others))
        tokens_bL = group.of(tokens_BT)
        x = model.embed(tokens_bL, SegmentContext(segments_bL))
        logprobs_bL = action_logprobs(model, x, tokens_bL, segments_bL, own)
        return torch.where(group.columns_bL < prompt_width, 0.0, logprobs_bL)

    return without_padding(logprobs_of, segments_BT)


@dataclass(frozen=True)
class ClippedPolicy:
    """`clip` is epsilon; with `dual_clip` c > 1 a negative advantage costs at most c times itself."""

    space: ActionSpace
    clip: float = 0.2
    dual_clip: float | None = None
    region: PolicyRegion | None = None

    def __post_init__(self) -> None:
        check_clip(self.clip, None, self.dual_clip)

    def collate(self, examples: Sequence[Rollout]) -> Rollout:
        """Rollouts are batches already: exactly one is passed through."""
        (rollout,) = examples
        return rollout

    def loss(self, model: Trunk, batch: Rollout) -> Loss:
        """Term `policy`: sum over actions. Figures: see `policy_stats` and `ratio_extremes`."""
        logprobs_BT = token_logprobs(model, batch.tokens_BT, batch.segments_BT, self.space, self.region)
        return self.loss_of(logprobs_BT, batch)

    def loss_of(self, logprobs_BT: Tensor, batch: Rollout) -> Loss:
        """`loss`, of what the model said: `token_logprobs` of the batch."""
        mask_BT, count = batch.action_mask_BT, batch.counts["policy"]
        # Positions that are no action may hold a banned token of log-probability minus infinity: keep them out.
        log_ratio_BT = torch.where(mask_BT > 0, logprobs_BT - batch.old_logprobs_BT, 0.0)
        loss_BT = clipped_policy_loss(log_ratio_BT, batch.advantages_BT, self.clip, self.dual_clip)
        terms = {"policy": Term((loss_BT * mask_BT).sum(), count)}
        stats = policy_stats(log_ratio_BT.detach(), batch, self.clip)
        return Loss(terms, stats, *ratio_extremes(log_ratio_BT.detach(), mask_BT))


def check_clip(clip: float, clip_high: float | None, dual_clip: float | None) -> None:
    """ValueError for bounds that bound nothing."""
    if not 0 < clip < 1:
        raise ValueError(f"clip must lie between 0 and 1, got {clip}")
    if clip_high is not None and not clip <= clip_high < float("inf"):
        raise ValueError(f"clip_high must be at least clip {clip}, got {clip_high}; None makes them equal")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}; None switches it off")


def clipped_policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    clip: float,
    dual_clip: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """The loss of each action; `log_ratio` is new minus old log-probability, `clip_high` bounds from above if given."""
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    high = clip if clip_high is None else clip_high
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


@torch.no_grad()
def policy_stats(
    log_ratio_BT: Tensor, batch: Rollout, clip: float, clip_high: float | None = None
) -> dict[str, tuple[Tensor, float]]:
    """Means over actions of `approx_kl` (old to new, k3) and `clip_fraction`."""
    ratio_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    mask_BT = batch.action_mask_BT
    count = float(mask_BT.sum())
    high = clip if clip_high is None else clip_high
    # Clipped: past the bound that holds for the advantage's sign, so that the action's gradient is zero.
    is_clipped_BT = torch.where(batch.advantages_BT > 0, ratio_BT > 1 + high, ratio_BT < 1 - clip)
    return {
        "approx_kl": (((ratio_BT - 1 - log_ratio_BT) * mask_BT).sum(), count),
        "clip_fraction": ((is_clipped_BT * mask_BT).sum(), count),
    }


@torch.no_grad()
def ratio_extremes(log_ratio_BT: Tensor, mask_BT: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(`ratio_min`), (`ratio_max`, `ratio_gap`): the extremes of rho and of |rho - 1| over the actions of this batch;
    nothing of a batch without any, as where no episode's reward could be had."""
    ratios = log_ratio_BT[mask_BT > 0].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if not ratios.numel():
        return {}, {}
    return {"ratio_min": ratios.min()}, {"ratio_max": ratios.max(), "ratio_gap": (ratios - 1).abs().max()}
