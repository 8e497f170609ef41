"""One of several processes of `test_rl_ranks.py`: run as `rl_ranks.py NUMBER COUNT FOLDER`, joined by gloo."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import rl_toy as toy
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from fledge.errors import CheckpointError, TrainingHalted
from fledge.models.scalar import ScalarModel
from fledge.rl.actors import Actors, PolicyPair
from fledge.rl.gathering import gather
from fledge.rl.grpo import GRPO, GRPOConfig
from fledge.rl.kl import KLConfig
from fledge.rl.ppo import PPO, PPOConfig
from fledge.rl.reward import RewardConfig
from fledge.rl.rollout import Episodes
from fledge.rl.world import World
from fledge.train.optim import OptimConfig
from fledge.train.parallel import ALONE, Ranks

ROUNDS = 2
PROMPTS = sorted(set(toy.prompts(400)))[:40]  # no two are equal
OPTIM = OptimConfig.adamw(3e-4, decay=0.0, eps=1e-5)
# Everything that speaks of a whole round or a whole minibatch: whitening, running moments, an adaptive price, clipping.
PPO_CONFIG = toy.config(
    rounds=ROUNDS,
    episodes=16,
    minibatch=8,
    epochs=2,
    kl=KLConfig(beta=0.05, target=2.0, horizon=64),
    reward=RewardConfig(normalise=True, clip=3.0),
    pretrain_weight=0.5,
    clip_norm=0.2,
    forward_rows=3,
    policy_optim=OPTIM,
    value_optim=OPTIM,
)
GRPO_CONFIG = GRPOConfig(
    rounds=ROUNDS,
    prompts=4,
    group=4,
    minibatch=8,
    normalise="token",
    prompt_length=toy.PROMPT,
    response_length=toy.RESPONSE,
    pretrain_weight=0.5,
    clip_norm=0.2,
    forward_rows=3,
    optim=OPTIM,
    warmup_rounds=0,
)


def by_prompt(model: Any, prompts: Any, params: Any, generator: torch.Generator) -> list[Any]:
    """A sampler whose answer follows from the prompt, its place among equal ones, and the policy: the same answers
    however many processes share the prompts."""
    sampler, said, seen = toy.world().sampler, [], dict[tuple[int, ...], int]()
    for prompt in prompts:
        seen[tuple(prompt)] = number = seen.get(tuple(prompt), 0) + 1
        own = torch.Generator().manual_seed(sum(token * 31**place for place, token in enumerate(prompt)) + number)
        said += sampler(model, [prompt], params, own)
    return said


def sometimes_failing(episodes: Episodes) -> Tensor:
    """The share of "a", or no score at all for a quarter of the first letters of an answer."""
    return torch.where(episodes.tokens_BT[:, toy.PROMPT] % 4 == 3, torch.nan, toy.share_of_a(episodes))


def world_of(ranks: Ranks, **changes: Any) -> World:
    return replace(toy.world(pretrain=toy.pretrain_mix()), **{"prompts": PROMPTS, "ranks": ranks, **changes})


def ppo_of(ranks: Ranks, config: PPOConfig = PPO_CONFIG, **changes: Any) -> PPO:
    policy = toy.language_model(0)
    judge = ScalarModel.from_trunk("llama", policy, generator=torch.Generator().manual_seed(1))
    return PPO(config, Actors.start(policy, judge), world_of(ranks, **changes))


def grpo_of(ranks: Ranks, config: GRPOConfig = GRPO_CONFIG, **changes: Any) -> GRPO:
    return GRPO(config, PolicyPair.start(toy.language_model(0)), world_of(ranks, **changes))


def history(run: PPO | GRPO, rounds: int = ROUNDS) -> dict[str, Any]:
    """What a run tells: figures, what was said, advantages and the weights in the end."""
    done = [run.round() for _ in range(rounds)]
    return {
        "metrics": [one.metrics for one in done],
        "prompts": [[list(prompt) for prompt in one.prompts] for one in done],
        "answers": [[list(said.ids) for said in one.completions] for one in done],
        "texts": [[said.text for said in one.completions] for one in done],
        "advantages": [one.rollout.advantages_BT.tolist() for one in done],
        "masks": [one.rollout.action_mask_BT.tolist() for one in done],
        "scalars": run.scalars(),
        "weights": {name: tensor.clone() for name, tensor in run.tensors().items()},
    }


def runs(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Every run that is compared: "own" ones draw with each process's own noise, "again" is the same once more."""
    redrawing = replace(GRPO_CONFIG, redraws=2, group=2, minibatch=8)
    return {
        **shared_runs(ranks),
        "ppo-own": history(ppo_of(ranks), rounds=1),
        "ppo-again": history(ppo_of(ranks), rounds=1),
        "grpo-own": history(grpo_of(ranks, redrawing, scorer=rarely)),
    }


def shared_runs(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Runs with the same answers however many processes there are; some of PPO's have no reward."""
    return {
        "ppo-shared": history(ppo_of(ranks, scorer=sometimes_failing, sampler=by_prompt)),
        "grpo-shared": history(grpo_of(ranks, sampler=by_prompt)),
    }


def rarely(episodes: Episodes) -> Tensor:
    """Most groups have no spread."""
    return (toy.share_of_a(episodes) > 0.3).float()


def answers_to_one_prompt(ranks: Ranks) -> dict[str, list[list[int]]]:
    """What this process alone says where all ask the same prompt."""
    ppo, grpo = ppo_of(ranks, prompts=PROMPTS[:1]), grpo_of(ranks, prompts=PROMPTS[:1])
    draw = GRPO_CONFIG.draw(ranks.count)
    gathered, _ = gather(draw, grpo.world, grpo.actors.policy, grpo.shape, 0)
    said = {"ppo": ppo._sample()[1], "grpo": gathered.completions}
    return {name: [list(completion.ids) for completion in completions] for name, completions in said.items()}


def draws_where_one_lacks_spread(ranks: Ranks) -> int:
    """The cursor after a round of which only the second process's groups have scores that are all the same."""

    def scorer(episodes: Episodes) -> Tensor:
        return torch.arange(len(episodes.tokens_BT)).float() * (1 - ranks.number)

    grpo = grpo_of(ranks, scorer=scorer)
    draw = replace(GRPO_CONFIG, redraws=2).draw(ranks.count)
    return gather(draw, grpo.world, grpo.actors.policy, grpo.shape, 0)[1]


def refusals(ranks: Ranks, folder: Path) -> dict[str, str]:
    """What is said where the processes differ, or one of them sees what is no number."""
    found = {}
    policy = toy.language_model(0)
    with torch.no_grad():
        next(policy.parameters()).add_(ranks.number)
    judge = ScalarModel.from_trunk("llama", policy, generator=torch.Generator().manual_seed(1))
    try:
        PPO(PPO_CONFIG, Actors.start(policy, judge), world_of(ranks))
    except CheckpointError as why:
        found["weights"] = str(why)

    def infinite(episodes: Episodes) -> Tensor:
        return toy.share_of_a(episodes) + (float("inf") if ranks.number else 0.0)

    try:
        ppo_of(ranks, scorer=infinite, dump_folder=folder / "dumps").round()
    except TrainingHalted as why:
        found["infinite"] = str(why)
    return found


def saved(found: Mapping[str, dict[str, Any]], folder: Path, number: int) -> dict[str, Any]:
    """The runs without their weights, which go to a file."""
    tensors = {f"{run}/{name}": tensor for run, told in found.items() for name, tensor in told["weights"].items()}
    save_file(tensors, folder / f"weights-{number}.safetensors")
    return {run: {key: value for key, value in told.items() if key != "weights"} for run, told in found.items()}


if __name__ == "__main__":
    me, count, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=me, world_size=count)
    ours = Ranks.joined() if count > 1 else ALONE
    told_of = {**saved(runs(ours), place, me), "refusals": refusals(ours, place)}
    told_of |= {"alike": answers_to_one_prompt(ours), "draws": draws_where_one_lacks_spread(ours)}
    (place / f"told-{me}.json").write_text(json.dumps(told_of))
    dist.destroy_process_group()
