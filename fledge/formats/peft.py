"""PEFT adapter directories <-> `layers.lora.Adapter`: `adapter_config.json` beside `adapter_model.safetensors`.

Modules have the names of the Hugging Face model there (`base_model.model.model.layers.0.self_attn.q_proj`); the tables
of the model file (`PUBLISHED`) say which of ours they are. Strict: a setting that changes what is computed, or a tensor
that is no part of a plain LoRA pair, is refused by name. Source: the `peft` library's documentation of its checkpoints.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fledge.errors import CheckpointError
from fledge.files import read_object, write_directory, write_json
from fledge.formats.huggingface import linear, make_of, published_modules, published_weight
from fledge.formats.name_patterns import NamePattern
from fledge.layers.lora import Adapter, Linear, LoraConfig, Pair
from fledge.registry import FAMILIES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
START, ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
# Where an adapter comes from, and how it was trained: what it computes is in its tensors, its ranks and its alphas.
IDLE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
        "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
        "target_modules", "task_type",
    }
)  # fmt: skip
FIXED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the model as well
}
DEFAULTS: Mapping[str, Any] = {
    "r": 8,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "alpha_pattern": {},
    "rank_pattern": {},
}
COPY = ".base_layer"  # within the name of a weight that PEFT saved along with the pair beside it
MAX_PATTERN_STATES = 200_000  # of all patterns of a file together: 40 MB


def load_adapter(directory: Path, model: nn.Module) -> Adapter:
    """The adapter in `directory`, for `model`, in float32. `CheckpointError` names what does not belong to it or is
    unsupported.

    A module that is one in Hugging Face and several in ours (GPT-2's `c_attn`) gives each the same A and its part of B.
    """
    settings = _read_settings(directory / CONFIG)
    tensors = _read_tensors(directory / WEIGHTS)
    family = _family_of(model)
    modules = published_modules(family, model)
    rank, alphas = settings["r"], settings["alpha_pattern"]
    pairs: dict[str, Pair] = {}
    names = {key.removesuffix(end).removeprefix(START) for end in ENDS for key in tensors if key.endswith(end)}
    for name in sorted(name for name in names if tensors.keys() & {START + name + end for end in ENDS}):
        if name not in modules:
            raise CheckpointError(f"{directory}: adapts '{name}', which {type(model).__name__} does not have")
        a, b = (tensors.pop(f"{START}{name}{end}", None) for end in ENDS)
        parts = [part for ours in modules[name] if (part := linear(model, ours)) is not None]
        _check(directory, name, a, b, parts)
        assert a is not None
        assert b is not None
        alpha = next((own for pattern, own in alphas.items() if pattern.matches(name)), settings["lora_alpha"])
        scale = _scale(alpha, len(a), settings["use_rslora"])
        rows_of = b.split([part.out_features for part in parts])
        for ours, rows in zip(modules[name], rows_of, strict=True):
            pairs[ours] = Pair(a.clone(), rows.clone(), scale)
    for key, copy in sorted(tensors.items()):
        _require_copy(directory, key, copy, published_weight(family, model, key.removeprefix(START).replace(COPY, "")))
    if not pairs:
        raise CheckpointError(f"{directory / WEIGHTS}: holds no adapter")
    targets = tuple(sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in pairs}))
    return Adapter(
        LoraConfig(rank, settings["lora_alpha"], settings["lora_dropout"], settings["use_rslora"], targets), pairs
    )


def save_adapter(adapter: Adapter, model: nn.Module, directory: Path, *, base: str | None = None) -> None:
    """Write `adapter`, made for `model`, so that PEFT reads it; the directory must not exist. `base` is the name or
    path of the model for PEFT. `CheckpointError` if a module it adapts has no name in Hugging Face's layout."""
    if directory.exists():
        raise CheckpointError(f"{directory}: exists already; name a directory that does not")
    family = _family_of(model)
    modules, left = published_modules(family, model), dict(adapter.pairs)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, ours in modules.items():
        own = [left.pop(part, None) for part in ours]
        if not any(own):
            continue
        a, b, scale = _joined(own, [_width(model, part) for part in ours])
        tensors |= {START + name + end: part for end, part in zip(ENDS, (a, b), strict=True)}
        ranks[name] = len(a)
        alphas[name] = scale * (math.sqrt(len(a)) if adapter.config.is_rank_stabilised else len(a))
    if left:
        raise CheckpointError(
            f"no Hugging Face layout names the modules that are adapted: {', '.join(sorted(left)[:3])}"
        )
    config = adapter.config
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.is_rank_stabilised,
        "bias": "none",
        "fan_in_fan_out": bool(make_of(family, model).transposed),
        "target_modules": _targets(sorted(ranks), modules),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != config.alpha},
    }

    def fill(temporary: Path) -> None:
        write_json(temporary / CONFIG, settings)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})

    write_directory(directory, fill)


def _family_of(model: nn.Module) -> str:
    found = [row.name for row in FAMILIES if row.module == type(model).__module__]
    assert found, f"{type(model)} is of no family"
    return found[0]


def _scale(alpha: float, rank: int, is_rank_stabilised: bool) -> float:
    return alpha / (math.sqrt(rank) if is_rank_stabilised else rank)


# Reading.


def _read_settings(path: Path) -> dict[str, Any]:
    """Rank, alpha and what else we compute by; everything else must be what it is when it does nothing."""
    given = read_object(path)
    for key, accepted in FIXED.items():
        value = given.pop(key, accepted[0])
        if value not in accepted:
            raise CheckpointError(f"{path}: {key} {value!r} is not supported: known is {accepted[0]!r}")
    settings = {key: given.pop(key, default) for key, default in DEFAULTS.items()}
    for key, value in settings.items():
        kind = type(DEFAULTS[key])
        if not (_is_number(value) if kind is float else type(value) is kind):
            raise CheckpointError(f"{path}: {key} {value!r} must be a {kind.__name__}")
    other = sorted(key for key, value in given.items() if key not in IDLE and value)
    if other:
        raise CheckpointError(f"{path}: {other[0]} {given[other[0]]!r} is not supported; fledge runs plain LoRA")
    floats = {key: float(settings[key]) for key in ("lora_alpha", "lora_dropout")}
    return {**settings, **floats, "alpha_pattern": _read_alphas(path, settings["alpha_pattern"])}


def _read_alphas(path: Path, given: Mapping[str, Any]) -> dict[NamePattern, float]:
    """Alphas of single modules; of the patterns that match a module's name the first counts, as in PEFT."""
    alphas: dict[NamePattern, float] = {}
    num_states = 0
    for text, alpha in given.items():
        if not _is_number(alpha):
            raise CheckpointError(f"{path}: alpha_pattern gives '{text}' {alpha!r}, which must be a float")
        try:
            alphas[NamePattern(text)] = float(alpha)
        except ValueError as error:
            raise CheckpointError(f"{path}: alpha_pattern '{text}' cannot be used: {error}") from error
        num_states += next(reversed(alphas)).num_states
        if num_states > MAX_PATTERN_STATES:
            raise CheckpointError(f"{path}: alpha_pattern holds more patterns than any model has modules")
    return alphas


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, not too large to be a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickles = sorted(file.name for file in path.parent.glob("adapter_model.bin"))
        reason = "is a pickle, which fledge does not read; save it as safetensors" if pickles else "is not there"
        raise CheckpointError(f"{path.parent}: {(pickles or [WEIGHTS])[0]} {reason}")
    try:
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
        }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch it again") from error


def _check(directory: Path, name: str, a: Tensor | None, b: Tensor | None, parts: Sequence[Linear]) -> None:
    if a is None or b is None:
        raise CheckpointError(f"{directory}: '{name}' has one half of its pair only")
    inputs, outputs = parts[0].in_features, sum(part.out_features for part in parts)
    if a.ndim != 2 or b.ndim != 2 or not 0 < len(a) == b.shape[1] or (b.shape[0], a.shape[1]) != (outputs, inputs):
        raise CheckpointError(
            f"{directory}: '{name}' has a pair of shapes {tuple(a.shape)}, {tuple(b.shape)}: "
            f"the model makes it (rank, {inputs}), ({outputs}, rank)"
        )
    if not all(part.is_floating_point() and torch.isfinite(part).all() for part in (a, b)):
        raise CheckpointError(f"{directory}: '{name}' holds infinite or undefined values, or none that are floats")


def _require_copy(directory: Path, key: str, copy: Tensor, weight: Tensor | None) -> None:
    """Whether a tensor beside the pairs is the model's own weight again, as PEFT saves it when the head is adapted."""
    if weight is None:
        raise CheckpointError(f"{directory / WEIGHTS}: '{key}' is no part of a LoRA pair of this model")
    own = weight.detach().to("cpu", torch.float32)
    if not any(torch.equal(copy, own.to(dtype).float()) for dtype in (torch.float32, torch.bfloat16, torch.float16)):
        raise CheckpointError(
            f"{directory / WEIGHTS}: '{key}' is not the model's own weight; fledge runs plain LoRA, so merge the "
            "adapter into its model with PEFT first"
        )


# Writing.


def _width(model: nn.Module, name: str) -> int:
    part = linear(model, name)
    assert part is not None, name
    return part.out_features


def _joined(pairs: Sequence[Pair | None], widths: Sequence[int]) -> tuple[Tensor, Tensor, float]:
    """One pair for modules that are one in Hugging Face. Where they do not share A their pairs stand side by side in
    a pair of all their ranks together, each scale within its B."""
    kept = [pair for pair in pairs if pair is not None]
    first = kept[0]
    if len(kept) == len(pairs) and all(torch.equal(p.a, first.a) and p.scale == first.scale for p in kept):
        return first.a.contiguous(), torch.cat([pair.b for pair in kept]), first.scale
    a = torch.cat([pair.a for pair in kept])
    b = a.new_zeros(sum(widths), len(a))
    row = column = 0
    for pair, width in zip(pairs, widths, strict=True):
        if pair is not None:
            rank = len(pair.a)
            b[row : row + width, column : column + rank] = pair.b * (pair.scale / first.scale)
            column += rank
        row += width
    return a, b, first.scale


def _targets(adapted: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
    """The shortest names that mean just these modules: ends where every module of that end is adapted."""
    ends = {name.rpartition(".")[2] for name in adapted}
    meant = sorted(name for name in modules if name.rpartition(".")[2] in ends)
    return sorted(ends) if meant == list(adapted) else list(adapted)
