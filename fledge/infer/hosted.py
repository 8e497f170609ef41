"""The engine as its process hosts it: loaded from a checkpoint directory, weights and adapters by their paths.

What worker.py asks for (`worker.Hosted`), over engine.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fledge.config import from_json
from fledge.errors import CheckpointError, UserError
from fledge.infer.causal import CausalModel
from fledge.infer.engine import Engine, EngineConfig, EngineStats
from fledge.infer.messages import Start
from fledge.infer.quantize import load_model
from fledge.infer.quantized import Int4Linear
from fledge.infer.speculate import USUAL_DRAFT
from fledge.registry import family
from fledge.text.tokenizer import Tokenizer
from fledge.types import Grammar, Request, TokenEvent


def load(start: Start) -> HostedEngine:
    """The engine that `start` describes. `UserError` for a checkpoint that is missing, damaged or not finite."""
    if start.num_threads is not None:
        torch.set_num_threads(start.num_threads)
    config = from_json(EngineConfig, start.config)
    device = torch.device(start.device)
    loaded = load_model(Path(start.checkpoint), device=device)
    _require_finite(_numbers_of(loaded.model), start.checkpoint)
    model = cast(CausalModel, loaded.model)
    if start.draft is None:
        return HostedEngine(model, Engine(model, loaded.tokenizer, config))
    if "num_draft" not in start.config:
        config = replace(config, num_draft=USUAL_DRAFT)
    draft_model = load_draft(Path(start.draft), loaded.tokenizer, device)
    return HostedEngine(model, Engine(model, loaded.tokenizer, config, draft_model))


def load_draft(directory: Path, tokenizer: Tokenizer, device: torch.device | None = None) -> CausalModel:
    """The model that guesses ahead for one with this tokenizer. `UserError` for a checkpoint that is missing, damaged
    or not finite, that holds no causal model, or that has other tokens."""
    loaded = load_model(directory, device=device)
    if family(loaded.info.family).kind != "causal":
        raise UserError(f"{directory}: a {loaded.info.family} model guesses no tokens; name a causal one for drafts")
    if not loaded.tokenizer.has_tokens_of(tokenizer):
        raise UserError(
            f"{directory}: the draft model has other tokens than the model that it is to guess for; they must share a "
            "tokenizer"
        )
    _require_finite(_numbers_of(loaded.model), str(directory))
    return cast(CausalModel, loaded.model)


class HostedEngine:
    def __init__(self, model: CausalModel, engine: Engine) -> None:
        self._model, self._engine = model, engine

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def max_positions(self) -> int | None:
        longest: int | None = self._model.config.max_positions
        return longest

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def is_prepared(self, grammar: Grammar) -> bool:
        return self._engine.is_prepared(grammar)

    def prepare(self, grammar: Grammar) -> None:
        self._engine.prepare(grammar)

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def cancel(self, request_id: str) -> bool:
        return self._engine.cancel(request_id)

    def step(self) -> list[TokenEvent]:
        return self._engine.step()

    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._engine.score(rows)

    def embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return self._engine.embed(rows)

    def update_weights(self, path: str, version: str) -> list[str]:
        """Take the tensors of a safetensors file; their names. A damaged file or a value that is not finite changes
        nothing."""
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a safetensors file that can be read ({error})") from error
        _require_finite(weights, path)
        self._engine.update_weights(weights, version)
        return list(weights)

    def load_adapter(self, name: str, path: str) -> None:
        """Take a PEFT adapter from its directory."""
        self._engine.load_adapter(name, Path(path))

    def unload_adapter(self, name: str) -> None:
        self._engine.unload_adapter(name)

    def stats(self) -> EngineStats:
        return self._engine.stats()


def _numbers_of(model: nn.Module) -> dict[str, Tensor]:
    """All values by their names; of packed bytes the scales and minima within."""
    modules = dict(model.named_modules())
    packed = {f"{name}.packed": own.numbers for name, own in modules.items() if isinstance(own, Int4Linear)}
    return {**model.state_dict(), **packed}


def _require_finite(weights: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{where}: weight '{name}' holds NaN or infinity; the model is damaged, train it again"
            )
