"""fledge's own checkpoint: a directory that says what it is.

    run.json              family, config, hashes of tokenizer and template, parents, sha256 of the files beside it
    model.safetensors     weights; a tied parameter is stored once and named in run.json
    tokenizer.json        the tokenizer the ids mean something in
    template.json         the chat template of an imported model; without it, fledge's own

A training state, from which an interrupted stage goes on, is a directory `state-<step>` with `state.safetensors`
and `state.json`. Reading infers nothing from file names or tensor shapes, and verifies every hash.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fledge
from fledge.config import from_json, to_json
from fledge.errors import CheckpointError
from fledge.files import TEMPORARY_SUFFIX, sha256_file, write_directory, write_json
from fledge.formats.gguf_tensors import Blocks
from fledge.formats.packed import pack, unpack
from fledge.layers.soft_prompt import SoftPrompt
from fledge.registry import load_family
from fledge.text.chat import ChatRenderer, Renderer
from fledge.text.prefixed import PrefixedRenderer
from fledge.text.template import ImportedTemplate, TemplateRenderer
from fledge.text.tokenizer import Tokenizer

FORMAT = 1


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself. `parents` maps a role ("base", "reference", ...) to a checkpoint hash.

    `packed` maps the matrices that are stored block-quantised, as they were imported, to their format. `quantized` maps
    the modules that are replaced by quantised ones (infer/quantize.py) to theirs. `soft_prompt` is how many learned
    tokens stand before everything the model reads (layers/soft_prompt.py).
    """

    family: str
    config: dict[str, Any]
    stage: str
    tokenizer_hash: str
    template_hash: str
    parents: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    step: int = 0
    tied: dict[str, str] = field(default_factory=dict)
    packed: dict[str, str] = field(default_factory=dict)
    quantized: dict[str, str] = field(default_factory=dict)
    soft_prompt: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    fledge_version: str = fledge.__version__


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory. `hash` is the sha256 of its weights and identifies it in lineages."""

    model: nn.Module
    tokenizer: Tokenizer
    renderer: Renderer
    info: CheckpointInfo
    hash: str
    directory: Path

    @property
    def template(self) -> ImportedTemplate | None:
        """The chat template it was imported with, None for fledge's own: what `save_model` wants to be told."""
        renderer = self.renderer.inner if isinstance(self.renderer, PrefixedRenderer) else self.renderer
        return renderer.template if isinstance(renderer, TemplateRenderer) else None

    @property
    def soft_ids(self) -> tuple[int, ...]:
        """The ids of its soft prompt, which the renderer puts before every conversation; none without one."""
        return self.model.soft_ids if isinstance(self.model, SoftPrompt) else ()


def save_model(
    directory: Path,
    model: nn.Module,
    tokenizer: Tokenizer,
    info: CheckpointInfo,
    template: ImportedTemplate | None = None,
    blocks: Mapping[str, Blocks] | None = None,
) -> str:
    """Write a checkpoint, whole or not at all; returns its hash (sha256 of model.safetensors).

    `template` is that of an imported model, None for fledge's own. `blocks` holds, by name, parameters that came
    block-quantised and whose values are those of `model` still: they are stored so.
    """
    weights, tied = _untied(model.state_dict())
    packed = {name: kept for name, kept in (blocks or {}).items() if name in weights}
    for name, kept in packed.items():
        assert weights.pop(name).shape == kept.shape, name
        weights |= pack(name, kept)
    described = {**to_json(info), "tied": tied, "packed": {name: kept.kind for name, kept in packed.items()}}
    hashes: dict[str, str] = {}

    def fill(temporary: Path) -> None:
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(temporary / "tokenizer.json")
        if template is not None:
            write_json(temporary / "template.json", to_json(template))
        for name in sorted(path.name for path in temporary.iterdir()):
            hashes[name] = sha256_file(temporary / name)
        write_json(temporary / "run.json", {"format": FORMAT, "files": hashes, **described})

    write_directory(directory, fill)
    return hashes["model.safetensors"]


def read_info(directory: Path) -> tuple[CheckpointInfo, dict[str, str]]:
    """What a checkpoint says it is, and the hashes its files must have; reads no weights."""
    path = directory / "run.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: not a fledge checkpoint (no run.json in it); name RUN or RUN:STAGE")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, files = data.pop("format"), data.pop("files")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); remove {directory} and make it again") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: format {version}, this fledge reads {FORMAT}; use the fledge that wrote it")
    return from_json(CheckpointInfo, data), files


def load_model(
    directory: Path,
    *,
    device: torch.device | None = None,
    prepare: Callable[[nn.Module, CheckpointInfo], None] | None = None,
    with_soft_prompt: bool = False,
) -> LoadedModel:
    """Read a checkpoint, verifying every hash; `CheckpointError` names the file that is missing or altered.

    `prepare` changes the model before its weights are read; a quantised checkpoint needs that of infer/quantize.py.
    A caller that puts `soft_ids` before what it asks says `with_soft_prompt`; any other is refused a model with one.
    """
    info, files = read_info(directory)
    if info.soft_prompt and not with_soft_prompt:
        raise CheckpointError(
            f"{directory}: a model with a soft prompt of {info.soft_prompt} tokens, which chat, complete and compare "
            "read; for anything else name the model it was made from, or train with --lora instead"
        )
    for name, expected in files.items():
        _verify(directory / name, expected)
    config_class, model_class = load_family(info.family)
    with _Undrawn():
        model: nn.Module = model_class(from_json(config_class, info.config))
    if prepare is not None:
        prepare(model, info)
    elif info.quantized:
        raise CheckpointError(
            f"{directory}: quantised, which is for generating and measuring only; use the model it was made from"
        )
    if info.soft_prompt:
        model = SoftPrompt(model, range(info.soft_prompt))
    weights = load_file(directory / "model.safetensors")
    weights |= {name: kept.expand() for name, kept in _blocks(info, weights).items()}
    for parts in info.packed:
        for part in ("codes", "scales", "offsets"):
            weights.pop(f"{parts}.{part}", None)
    for name, source in info.tied.items():
        weights[name] = weights[source]
    model.load_state_dict(weights)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    if tokenizer.hash != info.tokenizer_hash:
        raise CheckpointError(f"{directory / 'tokenizer.json'}: not the tokenizer that this model was trained with")
    renderer = _renderer(tokenizer, directory / "template.json" if "template.json" in files else None)
    if renderer.hash != info.template_hash:
        raise CheckpointError(f"{directory}: made with another chat template; use the fledge that wrote it")
    model.eval()
    if isinstance(model, SoftPrompt):
        renderer = PrefixedRenderer(renderer, model.soft_ids)
    hashed = files["model.safetensors"]
    return LoadedModel(model.to(device or torch.device("cpu")), tokenizer, renderer, info, hashed, directory)


class _Undrawn(TorchFunctionMode):
    """Within it nothing is drawn: weights that are read over anyway stay as they were allocated, which takes most of
    the time out of loading."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def load_blocks(loaded: LoadedModel) -> dict[str, Blocks]:
    """The matrices of a checkpoint that are stored block-quantised, by the name of their parameter, not expanded.

    For running them without quantising a second time (infer/quantize.py). Their `expand()` is what `load_model` gave.
    """
    return _blocks(loaded.info, load_file(loaded.directory / "model.safetensors"))


def _blocks(info: CheckpointInfo, tensors: Mapping[str, Tensor]) -> dict[str, Blocks]:
    return {name: unpack(name, kind, tensors) for name, kind in info.packed.items()}


def _renderer(tokenizer: Tokenizer, path: Path | None) -> Renderer:
    if path is None:
        return ChatRenderer(tokenizer)
    try:
        return TemplateRenderer(tokenizer, from_json(ImportedTemplate, json.loads(path.read_text(encoding="utf-8"))))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; import the model again") from error


def save_state(parent: Path, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Write a training state and then remove the older ones; a crash at any moment leaves one that is whole."""

    def fill(temporary: Path) -> None:
        save_file(_separate(tensors), temporary / "state.safetensors")
        written = sha256_file(temporary / "state.safetensors")
        write_json(
            temporary / "state.json", {"format": FORMAT, "step": step, "sha256": written, "scalars": dict(scalars)}
        )

    write_directory(parent / f"state-{step:08d}", fill)
    for older in [*(directory for _, directory in _states(parent)[:-1]), *parent.glob(f"state-*{TEMPORARY_SUFFIX}")]:
        shutil.rmtree(older)


def load_state(parent: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """(step, tensors, scalars) of the newest training state in `parent`, or None if there is none."""
    states = _states(parent)
    if not states:
        return None
    step, directory = states[-1]
    try:
        data = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        expected, scalars = data["sha256"], data["scalars"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / 'state.json'}: damaged ({error}); remove {directory}") from error
    _verify(directory / "state.safetensors", expected)
    return step, load_file(directory / "state.safetensors"), scalars


def clear_states(parent: Path) -> None:
    """Remove the training states of a stage that has finished, and after them what it kept beside them as `state-*`:
    whoever finds a state finds that too. One that is half removed is not found: a crash at any moment leaves none."""
    for _, directory in reversed(_states(parent)):
        directory.rename(directory.with_name(f"{directory.name}{TEMPORARY_SUFFIX}"))
    for rest in parent.glob("state-*"):
        if rest.is_dir():
            shutil.rmtree(rest)
        else:
            rest.unlink()


def _states(parent: Path) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(r"state-(\d{8})", entry.name), entry) for entry in parent.glob("state-*"))
    return sorted((int(match[1]), entry) for match, entry in matches if match)


def _verify(path: Path, expected: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; remove its folder and run the same command again to make it anew")
    if sha256_file(path) != expected:
        raise CheckpointError(
            f"{path}: truncated or altered (its sha256 is not the recorded one); "
            "restore it, or remove its folder and run the same command again to make it anew"
        )


def _untied(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each storage once; `tied` maps the further names of a tensor to the one it is stored under."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_of: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in first_of:
            tied[name] = first_of[key]
        else:
            first_of[key] = name
            kept[name] = tensor.detach().contiguous().cpu()
    return kept, tied


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as the format wants them."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        separate[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return separate
