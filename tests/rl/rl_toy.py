"""A world small enough for PPO to be watched: counting in an alphabet of 18 letters, with a model of 64 channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from fledge.batches import TokenBatch
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.scalar import ScalarModel
from fledge.objectives.next_token import NextToken
from fledge.rl.actors import Actors
from fledge.rl.kl import KLConfig
from fledge.rl.ppo import PPO, PPOConfig, PretrainMix, World
from fledge.rl.rollout import Episodes, naive_sampler
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.types import Piece

END, PAD, LETTER_A, VOCAB = 0, 1, 2, 20
PROMPT, RESPONSE = 6, 12
CONFIG = LlamaConfig(VOCAB, 64, 2, 4, 2, 128)
OBJECTIVE = NextToken(PROMPT + RESPONSE, PAD)


def counting(generator: torch.Generator, num_rows: int) -> TokenBatch:
    """Documents that count upwards from a random letter, skipping back to "a" now and then, and end somewhere."""
    rows = []
    for _ in range(num_rows):
        letter, ids = int(torch.randint(0, 18, (), generator=generator)), [END]
        for chance in torch.rand(PROMPT + RESPONSE - 1, generator=generator).tolist():
            ids.append(LETTER_A + letter)
            letter = 0 if chance < 0.1 else (letter + 1) % 18
            if len(ids) > PROMPT and chance > 0.85:
                break
        ids.append(END)
        piece = Piece(torch.tensor(ids, dtype=torch.int32).numpy(), torch.ones(len(ids)).numpy())
        rows.append((piece,))
    return OBJECTIVE.collate(rows)


@cache
def _pretrained(num_steps: int) -> dict[str, Tensor]:
    model = Llama(CONFIG)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    optimizers = OptimizerSet(model, OptimConfig.adamw(3e-3, decay=0.0))
    for _ in range(num_steps):
        train_step(model, optimizers, [(OBJECTIVE, counting(generator, 32))], clip_norm=1.0)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def language_model(num_steps: int = 100) -> Llama:
    """A fresh copy of the toy language model after `num_steps` of pretraining."""
    model = Llama(CONFIG)
    model.load_state_dict(_pretrained(num_steps))
    return model.eval()


def prompts(num: int = 40, seed: int = 5) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, PROMPT - 1, (num,), generator=generator).tolist()
    starts = torch.randint(0, 18, (num,), generator=generator).tolist()
    return [
        (END, *(LETTER_A + (start + step) % 18 for step in range(length)))
        for length, start in zip(lengths, starts, strict=True)
    ]


def share_of_a(episodes: Episodes) -> Tensor:
    """The score that PPO is to raise: the share of "a" among the letters of an answer."""
    is_letter_BT = (episodes.tokens_BT >= LETTER_A) * episodes.action_mask_BT
    is_a_BT = (episodes.tokens_BT == LETTER_A) * episodes.action_mask_BT
    return is_a_BT.sum(1) / is_letter_BT.sum(1).clamp(min=1)


def length(episodes: Episodes) -> Tensor:
    return episodes.action_mask_BT.sum(1) / RESPONSE


def pretrain_mix() -> PretrainMix:
    return PretrainMix(OBJECTIVE, lambda step, rows: counting(torch.Generator().manual_seed(1000 + step), rows))


def world(scorer=share_of_a, **changes) -> World:
    sampler = naive_sampler(pad_id=PAD, stop_ids=frozenset({END}), decode=decode)
    return World(prompts(), PAD, frozenset({END}), END, sampler, scorer, **changes)


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token - LETTER_A) if token >= LETTER_A else "." for token in ids)


def config(**changes) -> PPOConfig:
    optim = OptimConfig.adamw(1e-3, decay=0.0, eps=1e-5)
    base = PPOConfig(
        rounds=30,
        episodes=64,
        minibatch=64,
        epochs=4,
        prompt_length=PROMPT,
        response_length=RESPONSE,
        kl=KLConfig(beta=0.02),
        pretrain_weight=0.0,
        policy_optim=optim,
        value_optim=optim,
        warmup_rounds=0,
    )
    return replace(base, **changes)


def ppo(the_config: PPOConfig | None = None, the_world: World | None = None) -> PPO:
    """PPO on the toy language model, with a value function whose head is drawn anew."""
    policy = language_model()
    judge = ScalarModel.from_trunk("llama", policy, generator=torch.Generator().manual_seed(1))
    return PPO(the_config or config(), Actors.start(policy, judge), the_world or world())
