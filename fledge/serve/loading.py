"""Checkpoint folders become served models: the tokenizer and the template here, the weights in the engine's process.

No torch: of the checkpoint only what says what it is, tokenizer.json and template.json are read.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fledge.config import from_json
from fledge.errors import CheckpointError, TokenizerError
from fledge.files import sha256_file
from fledge.infer.process import EngineProcess
from fledge.serve.engine import FIM_NAMES, ProcessEngine, ServedModel
from fledge.text.chat import ChatRenderer, Renderer
from fledge.text.template import ImportedTemplate, TemplateRenderer
from fledge.text.tokenizer import Tokenizer
from fledge.text.tools import STYLES, CallStyle

CACHE_BYTES = 512 << 20
_OVERHEAD_BYTES = 512 << 20  # a Python process with torch in it


@dataclass(frozen=True)
class ProcessLoader:
    """One process a model. `engine` are settings of `infer.engine.EngineConfig`.

    The checkpoint `draft` guesses ahead for the models that have its tokens; others are served without.
    """

    engine: Mapping[str, Any] = field(default_factory=lambda: {"cache_bytes": CACHE_BYTES})
    device: str = "cpu"
    num_threads: int | None = None
    draft: Path | None = None

    def size(self, path: Path) -> int:
        """What serving it takes at most, in bytes. A draft model has as many blocks of cache of its own."""
        folders = [path] if self.draft is None else [path, self.draft]
        cache_bytes = int(self.engine.get("cache_bytes", CACHE_BYTES))
        return sum(_weight_bytes(folder) + cache_bytes for folder in folders) + _OVERHEAD_BYTES

    def draft_for(self, tokenizer: Tokenizer) -> Path | None:
        """The draft model, if it has the tokens of this tokenizer. `UserError` if it cannot be read."""
        if self.draft is None or not read_renderer(self.draft)[0].tokenizer.has_tokens_of(tokenizer):
            return None
        return self.draft

    async def adapt(self, model: ServedModel, name: str, adapter: Path) -> ServedModel:
        await model.engine.load_adapter(name, adapter)
        own = await asyncio.to_thread(sha256_file, adapter / "adapter_model.safetensors")
        both = hashlib.sha256(f"{model.fingerprint} {own}".encode()).hexdigest()
        return replace(model, adapter=name, fingerprint=both)

    async def load(self, name: str, path: Path) -> ServedModel:
        renderer, described = await asyncio.to_thread(read_renderer, path)
        draft = await asyncio.to_thread(self.draft_for, renderer.tokenizer)
        process = await asyncio.to_thread(
            EngineProcess, path, self.engine, device=self.device, num_threads=self.num_threads, draft=draft
        )
        engine = ProcessEngine(process)
        try:
            capacity = await engine.stats()
        except BaseException:
            await engine.close()
            raise
        positions = int(capacity["num_blocks"]) * int(self.engine.get("block_size", 16))
        context = positions if process.max_positions is None else min(positions, process.max_positions)
        return ServedModel(
            name,
            renderer,
            engine,
            context,
            described["files"]["model.safetensors"],
            style_of(renderer),
            fim_ids_of(renderer.tokenizer) if was_taught_to_fill_in(path, described) else None,
        )


def _weight_bytes(folder: Path) -> int:
    weights = folder / "model.safetensors"
    return weights.stat().st_size if weights.is_file() else 0


def read_renderer(path: Path) -> tuple[Renderer, dict[str, Any]]:
    """How conversations become tokens for the checkpoint at `path`, and what its run.json says.

    `CheckpointError` if there is none, or its tokenizer or template is not the one it was written with.
    """
    try:
        described = json.loads((path / "run.json").read_text(encoding="utf-8"))
        files = {str(name): str(digest) for name, digest in described["files"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint that can be read ({error}); name RUN or RUN:STAGE") from error
    for name in ("tokenizer.json", "template.json"):
        if name in files and (not (path / name).is_file() or sha256_file(path / name) != files[name]):
            raise CheckpointError(f"{path / name}: missing or altered; make or import the model again")
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    if "template.json" not in files:
        return ChatRenderer(tokenizer), described
    template = json.loads((path / "template.json").read_text(encoding="utf-8"))
    return TemplateRenderer(tokenizer, from_json(ImportedTemplate, template)), described


def style_of(renderer: Renderer) -> CallStyle:
    """How the model writes calls, by what its template says of them."""
    if isinstance(renderer, ChatRenderer):
        return STYLES["fledge"]
    source = renderer.template.source if isinstance(renderer, TemplateRenderer) else ""
    is_llama = '"parameters"' in source and "<tool_call>" not in source
    return STYLES["llama3" if is_llama else "hermes"]


def was_taught_to_fill_in(path: Path, described: Mapping[str, Any]) -> bool:
    """Whether the code stage, which trains on rearranged documents (data/fim.py), is behind the model: it is that
    stage's own, or a later one of the same run."""
    stage = described.get("stage")
    has_code = (path.parent.parent / "code" / "manifest.json").is_file()
    return stage == "code" or (has_code and stage not in ("pretrain", None) and path.name == "model")


def fim_ids_of(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    """The tokens that frame a prefix, a suffix and what stands between; None if there are none."""
    try:
        prefix, suffix, middle = (tokenizer.special_id(name) for name in FIM_NAMES)
    except TokenizerError:
        return None
    return prefix, suffix, middle
