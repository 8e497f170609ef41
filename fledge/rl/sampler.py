"""Rollouts through the engine: the answers that RL learns from come from the code that serves (docs/architecture.md,
seam 2).

The engine runs the very policy that trains, whose weights change in place between rounds; each round tells it so, so
that no key or value of an older policy is ever attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fledge.errors import TrainingHalted
from fledge.infer.engine import Engine, EngineConfig
from fledge.text.tokenizer import Tokenizer
from fledge.types import Completion, Request, SamplingParams

BLOCK_SIZE = 16
# Prompts of a round are read together, not in small turns: nobody waits for the first token.
PROMPT_TOKENS_A_STEP = 4096


class EngineSampler:
    """A `rl.rollout.Sampler`. One engine is kept for the model last asked; it holds what the largest call needs."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._model: Any = None
        self._engine: Engine | None = None
        self._num_calls = 0

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        generator: torch.Generator,
    ) -> list[Completion]:
        """One answer a prompt, in their order, each drawn with a seed of its own from `generator`.

        `TrainingHalted` if the policy's prediction is not a number: nothing can be learned from such a round.
        """
        if not prompts:
            return []
        engine = self._engine_for(model, prompts, params)
        self._num_calls += 1
        engine.update_weights({}, str(self._num_calls))
        seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
        requests = [
            Request(str(place), tuple(prompt), replace(params, seed=seed), stop_ids=self._stop_ids)
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        completions = [completion for (completion,) in engine.generate(requests)]
        for place, completion in enumerate(completions):
            if completion.finish_reason == "error":
                raise TrainingHalted(
                    f"the policy's prediction for answer {place} is not a number; its weights are damaged"
                )
        return completions

    def _engine_for(self, model: Any, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Engine:
        """The engine of this model, made anew for another model or a larger call."""
        # One block more for each: the scheduler admits nobody who could not grow beside all that run, and a round whose
        # answers do not all begin together takes more steps.
        needed = sum(-(-(len(prompt) + params.max_tokens) // BLOCK_SIZE) + 1 for prompt in prompts)
        engine = self._engine if self._model is model else None
        if engine is None or (engine.config.num_blocks or 0) < needed or engine.config.max_live < len(prompts):
            config = EngineConfig(
                block_size=BLOCK_SIZE,
                num_blocks=needed,
                max_live=len(prompts),
                max_step_tokens=max(PROMPT_TOKENS_A_STEP, len(prompts)),
            )
            engine = Engine(model, self._tokenizer, config)
            self._model, self._engine = model, engine
        return engine
