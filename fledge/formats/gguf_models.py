"""GGUF files <-> our models: which architectures, and what GGUF calls their settings and their weights.

The tables follow llama.cpp's (src/llama-arch.cpp, gguf-py). Two things differ from a Hugging Face directory: the
architecture `llama` turns neighbouring channels of queries and keys where we and Hugging Face turn channels K/2 apart,
so their rows are stored in another order; and Llama 3's stretched frequencies are stored as a tensor of divisors.
Strict: a setting or a tensor that is not in the tables is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fledge.config import to_json
from fledge.errors import CheckpointError, ConfigError
from fledge.formats.gguf import GGUFFile, Outgoing
from fledge.formats.gguf_tensors import Blocks, stack_blocks
from fledge.formats.huggingface import fill_parameters, make_empty, refusing
from fledge.layers.rope import Llama3Scaling, frequencies, stretch
from fledge.registry import load_family

FREQUENCIES = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
LLAMA3_BOUNDS = (
    1.0,
    4.0,
    8192,
)  # low, high, original positions of every stretched Llama; the file holds the divisors
HEAD_WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
# Settings whose defaults no reader agrees on.
NEEDED = ("context_length", "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# Settings that mean what we compute at these values alone.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "expert_count": (0,),
    "expert_used_count": (0,),
}

_SHARED = {
    "attn_norm.weight": ("attention_norm.weight",),
    "attn_output.weight": ("attention.output.weight",),
    "ffn_norm.weight": ("mlp_norm.weight",),
    "ffn_up.weight": ("mlp.up.weight",),
    "ffn_down.weight": ("mlp.down.weight",),
}
_PARTS = {"attn_q": "query", "attn_k": "key", "attn_v": "value"}
_GATED = {
    **_SHARED,
    **{f"{theirs}.weight": (f"attention.{ours}.weight",) for theirs, ours in _PARTS.items()},
    "ffn_gate.weight": ("mlp.gate.weight",),
}
_FUSED = {**_SHARED, "attn_qkv.weight": tuple(f"attention.{ours}.weight" for ours in _PARTS.values())}
_QKV_BIASES = {f"{theirs}.bias": (f"attention.{ours}.bias",) for theirs, ours in _PARTS.items()}
_HEAD_NORMS = {
    "attn_q_norm.weight": ("attention.query_norm.weight",),
    "attn_k_norm.weight": ("attention.key_norm.weight",),
}
_ENDS = {EMBEDDING: ("tokens.weight",), "output_norm.weight": ("final_norm.weight",), HEAD: ("head.weight",)}
_SIZES = {
    "embedding_length": "width",
    "block_count": "num_layers",
    "context_length": "max_positions",
    "attention.head_count": "num_heads",
}
_GATED_SIZES = {
    **_SIZES,
    "feed_forward_length": "mlp_width",
    "attention.head_count_kv": "num_kv_heads",
    "rope.freq_base": "rope_base",
    "attention.layer_norm_rms_epsilon": "norm_eps",
}
_QWEN_SIZES = {**_GATED_SIZES, "attention.key_length": "head_width"}


@dataclass(frozen=True)
class Layout:
    """One architecture.

    `settings`: GGUF's key, without the architecture before it -> field of our config. `ends` and `layer`: GGUF's name
    (in `layer` after "blk.N.") -> the parameters it holds (in `layer` after "blocks.N."), side by side along their
    outputs. `ours`: fields of our config that are the same in every such model. `turned` says that queries and keys
    have their rows in the order of neighbouring channels.
    """

    architecture: str
    family: str
    settings: Mapping[str, str]
    ends: Mapping[str, tuple[str, ...]]
    layer: Mapping[str, tuple[str, ...]]
    ours: Mapping[str, Any] = field(default_factory=dict)
    turned: bool = False


def _with_biases(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    def bias(name: str) -> str:
        return name.removesuffix("weight") + "bias"

    return {**names, **{bias(name): tuple(map(bias, ours)) for name, ours in names.items()}}


LAYOUTS = (
    Layout("llama", "llama", _GATED_SIZES, _ENDS, _GATED, turned=True),
    Layout(
        "gpt2",
        "gpt",
        {**_SIZES, "attention.layer_norm_epsilon": "norm_eps"},
        {**_ENDS, "output_norm.bias": ("final_norm.bias",), "position_embd.weight": ("positions.weight",)},
        _with_biases(_FUSED),
        {"block": "pre_norm", "window": None},
    ),
    Layout("qwen2", "qwen", _QWEN_SIZES, _ENDS, {**_GATED, **_QKV_BIASES}, {"attention": "biased"}),
    Layout("qwen3", "qwen", _QWEN_SIZES, _ENDS, {**_GATED, **_HEAD_NORMS}, {"attention": "normed"}),
)


class Place(NamedTuple):
    """The parameters that a stored tensor holds, and whether their rows are turned."""

    ours: tuple[str, ...]
    is_turned: bool


@dataclass(frozen=True)
class GGUFModel:
    """A model read from a file. `blocks` holds, by parameter name, the matrices whose quantisation can be kept."""

    family: str
    model: nn.Module
    blocks: Mapping[str, Blocks]


def read_model(file: GGUFFile) -> GGUFModel:
    """The model of a file, on the CPU in float32, in evaluation mode. `CheckpointError` names what does not fit."""
    layout = _layout_of_file(file)
    with refusing(file.path):
        model = make_empty(layout.family, _read_config(layout, file), len(file.entries))
    places = _stored_places(layout, file, model)
    found: dict[str, Tensor] = {}
    blocks: dict[str, Blocks] = {}
    for name, place in places.items():
        parts = _rows(file, name, place, model)
        tensor, kept = file.tensor(name), file.blocks(name)
        found |= {ours: tensor[rows] for ours, rows in zip(place.ours, parts, strict=True)}
        if kept is not None:
            blocks |= {ours: kept.rows(rows) for ours, rows in zip(place.ours, parts, strict=True)}
    fill_parameters(model, found, file.path)
    return GGUFModel(layout.family, model.eval(), blocks)


def _layout_of_file(file: GGUFFile) -> Layout:
    if file.get("split.count", int, 1) != 1:
        raise CheckpointError(f"{file.path}: one of several files of a model; join them with llama.cpp's gguf-split")
    architecture = file.get("general.architecture", str)
    for layout in LAYOUTS:
        if layout.architecture == architecture:
            return layout
    known = ", ".join(layout.architecture for layout in LAYOUTS)
    raise CheckpointError(f"{file.path}: architecture {architecture!r} is not supported: known are {known}")


# Settings.


def _read_config(layout: Layout, file: GGUFFile) -> dict[str, Any]:
    """The fields of our config; `ConfigError` names the first setting that we do not compute."""
    start = f"{layout.architecture}."
    given = {key.removeprefix(start): _plain(value) for key, value in file.metadata.items() if key.startswith(start)}
    config: dict[str, Any] = {**layout.ours, "vocab_size": _embedding_rows(file)}
    for key in layout.settings:
        if key in NEEDED and key not in given:
            raise ConfigError(f"no {start}{key}")
    config |= {ours: given.pop(key) for key, ours in layout.settings.items() if key in given}
    if given.pop("vocab_size", config["vocab_size"]) != config["vocab_size"]:
        raise ConfigError(f"{start}vocab_size is not the {config['vocab_size']} rows of {EMBEDDING}")
    for key, accepted in FIXED.items():
        value = given.pop(key, accepted[0])
        if value not in accepted:
            raise ConfigError(f"{start}{key} {value!r} is not supported: known is {accepted[0]!r}")
    fields = load_family(layout.family)[0].__dataclass_fields__
    if "rope_base" in fields:
        config.setdefault("rope_base", 10000.0)  # the specification's default
    if "num_kv_heads" in fields:
        config.setdefault("num_kv_heads", config.get("num_heads"))
    if "head_width" in fields:
        config.setdefault("head_width", _default_head_width(config))
    if "is_head_tied" in fields:
        config["is_head_tied"] = HEAD not in file.entries
    _check_widths(layout, given, config)
    if layout.turned and FREQUENCIES in file.entries:
        config["rope_scaling"] = _read_stretch(file, config)
    if given:
        raise ConfigError(f"not a setting of {layout.architecture} that fledge knows: {', '.join(sorted(given))}")
    return config


def _plain(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _embedding_rows(file: GGUFFile) -> int:
    if EMBEDDING not in file.entries:
        raise ConfigError(f"no tensor '{EMBEDDING}'")
    return file.entries[EMBEDDING].shape[0]


def _check_widths(layout: Layout, given: dict[str, Any], config: dict[str, Any]) -> None:
    """Take out the settings that only say a width again; `ConfigError` if they say another one."""
    head_width, width = config.get("head_width", _default_head_width(config)), config["width"]
    for key in HEAD_WIDTHS:
        if given.pop(key, head_width) != head_width:
            raise ConfigError(f"{layout.architecture}.{key} is not supported: known is the head width, {head_width}")
    if "feed_forward_length" not in layout.settings and given.pop("feed_forward_length", 4 * width) != 4 * width:
        raise ConfigError(f"{layout.architecture}.feed_forward_length is not supported: known is {4 * width}")


def _default_head_width(config: Mapping[str, Any]) -> int:
    width, num_heads = config.get("width"), config.get("num_heads")
    if not isinstance(width, int) or not isinstance(num_heads, int) or num_heads < 1:
        raise ConfigError("embedding_length and attention.head_count must be there, as positive numbers")
    return width // num_heads


def _read_stretch(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's stretched rotation, found again from its divisors; `ConfigError` if they are of another kind."""
    divisors = file.tensor(FREQUENCIES)
    scaling = Llama3Scaling(float(divisors.max()), *LLAMA3_BOUNDS)
    expected = _divisors(config["width"] // config["num_heads"], config.get("rope_base", 10000.0), scaling)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise ConfigError(f"{FREQUENCIES} are not Llama 3's (from 8192 positions, bounds 1 and 4): not supported")
    fields: dict[str, Any] = to_json(scaling)
    return fields


def _divisors(head_width: int, base: float, scaling: Llama3Scaling) -> Tensor:
    theta = frequencies(head_width, base)
    return theta / stretch(theta, scaling)


# Weights.


def _places(layout: Layout, num_layers: int) -> dict[str, Place]:
    """Every name that a model of `num_layers` may have."""
    places = {name: Place(ours, False) for name, ours in layout.ends.items()}
    for layer in range(num_layers):
        for name, ours in layout.layer.items():
            is_turned = layout.turned and name.startswith(("attn_q.", "attn_k."))
            places[f"blk.{layer}.{name}"] = Place(tuple(f"blocks.{layer}.{one}" for one in ours), is_turned)
    return places


def _stored_places(layout: Layout, file: GGUFFile, model: nn.Module) -> dict[str, Place]:
    """What the file holds of `model`; a matrix that is stored twice because it is tied, in its finer format only."""
    places = _places(layout, int(model.config.num_layers))  # type: ignore[union-attr, arg-type]
    owned = {name for name, _ in model.named_parameters()}
    stored = set(file.entries) - ({FREQUENCIES} if layout.turned else set())
    _require_none({name for name, place in places.items() if owned.issuperset(place.ours)} - stored, "missing", file)
    _require_none(stored - set(places), "unexpected", file)
    found = {name: places[name] for name in sorted(stored)}
    if HEAD in stored and "head.weight" not in owned:
        embedding, head = file.entries[EMBEDDING].num_bytes, file.entries[HEAD].num_bytes
        del found[HEAD if embedding >= head else EMBEDDING]
        found |= {EMBEDDING: places[EMBEDDING]} if embedding >= head else {HEAD: Place(("tokens.weight",), False)}
    return found


def _require_none(names: set[str], trouble: str, file: GGUFFile) -> None:
    if names:
        first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise CheckpointError(f"{file.path}: {len(names)} {trouble} tensor(s): {first}")


def _rows(file: GGUFFile, name: str, place: Place, model: nn.Module) -> tuple[Tensor, ...]:
    """For each parameter of `place`, which rows of the stored tensor it is, in its own order."""
    shapes = [model.get_parameter(ours).shape for ours in place.ours]
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if file.entries[name].shape != expected:
        found = file.entries[name].shape
        raise CheckpointError(f"{file.path}: tensor '{name}' is of shape {found}: the settings make it {expected}")
    rows = torch.arange(expected[0])
    if place.is_turned:
        head_width: int = model.config.head_width  # type: ignore[union-attr, assignment]
        rows = rows.view(-1, head_width // 2, 2).mT.flatten()  # neighbours apart: 0, 2, 4, ... then 1, 3, 5, ...
    return tuple(rows.split([shape[0] for shape in shapes]))


# From models.


def settings_of(family_name: str, model: nn.Module) -> dict[str, Any]:
    """The metadata that describes `model`; `CheckpointError` if no architecture of GGUF computes it."""
    layout, config = _layout_of_model(family_name, model), model.config
    found: dict[str, Any] = {"general.architecture": layout.architecture}
    for key, ours in {**layout.settings, "vocab_size": "vocab_size"}.items():
        value = getattr(config, ours)
        if value is None:
            raise CheckpointError(f"GGUF needs {key}; the model leaves {ours} open")
        found[f"{layout.architecture}.{key}"] = value
    if "feed_forward_length" not in layout.settings:
        found[f"{layout.architecture}.feed_forward_length"] = 4 * int(config.width)  # type: ignore[union-attr, arg-type]
    if "head_width" in layout.settings.values():
        found[f"{layout.architecture}.attention.value_length"] = config.head_width  # type: ignore[union-attr]
    if "rope.freq_base" in layout.settings:
        found[f"{layout.architecture}.rope.dimension_count"] = config.head_width  # type: ignore[union-attr]
    return found


def tensors_of(
    family_name: str, model: nn.Module, kind: str | None, blocks: Mapping[str, Blocks] | None = None
) -> Iterator[Outgoing]:
    """Everything there is to write.

    Matrices have the format `kind`; what has one axis, and learned positions, F32; and with four or five bits the
    embedding and the head keep eight, as llama.cpp's own files do: they cost little and their errors cost much.
    A matrix of `blocks` that has its format already, or any if `kind` is None, is written as it came; without `kind`
    the rest is F32, so that nothing is lost.
    """
    layout, parameters = _layout_of_model(family_name, model), dict(model.named_parameters())
    head_width = getattr(model.config, "head_width", 1)
    for name, place in _places(layout, int(model.config.num_layers)).items():  # type: ignore[union-attr, arg-type]
        if not parameters.keys() >= set(place.ours):
            continue
        own = [parameters[ours].detach() for ours in place.ours]
        shape = (sum(len(part) for part in own), *own[0].shape[1:])
        rows = _turned(shape[0], head_width) if place.is_turned else None
        kept = _kept(blocks or {}, place)
        wanted = _kind_for(name, len(shape), kind or (kept.kind if kept is not None else "F32"))
        if kept is not None and kept.kind == wanted:
            yield Outgoing(name, shape, wanted, partial(_block_rows, kept, rows))
        else:
            yield Outgoing(name, shape, wanted, partial(_tensor_rows, own, rows))
    scaling = getattr(model.config, "rope_scaling", None)
    if scaling is not None:
        divisors = _divisors(head_width, model.config.rope_base, scaling)  # type: ignore[union-attr, arg-type]
        yield Outgoing(FREQUENCIES, tuple(divisors.shape), "F32", lambda: divisors)


def _kept(blocks: Mapping[str, Blocks], place: Place) -> Blocks | None:
    """The stored matrix, if all its parts are there in one format."""
    parts = [blocks[ours] for ours in place.ours if ours in blocks]
    is_whole = len(parts) == len(place.ours) and len({part.kind for part in parts}) == 1
    return stack_blocks(parts) if is_whole else None


def _turned(num_rows: int, head_width: int) -> Tensor:
    """The order that brings channels K/2 apart side by side."""
    return torch.arange(num_rows).view(-1, 2, head_width // 2).mT.flatten()


def _tensor_rows(parts: Sequence[Tensor], rows: Tensor | None) -> Tensor:
    tensor = torch.cat(list(parts))
    return tensor if rows is None else tensor[rows.to(tensor.device)]


def _block_rows(blocks: Blocks, rows: Tensor | None) -> Blocks:
    return blocks if rows is None else blocks.rows(rows)


def _kind_for(name: str, num_axes: int, kind: str) -> str:
    if num_axes == 1 or name.startswith("position"):
        return "F32"
    return "Q8_0" if name in (EMBEDDING, HEAD) and kind.startswith(("Q4", "Q5")) else kind


def _layout_of_model(family_name: str, model: nn.Module) -> Layout:
    for layout in LAYOUTS:
        if layout.family == family_name and all(getattr(model.config, k) == v for k, v in layout.ours.items()):
            return layout
    able = ", ".join(sorted({layout.family for layout in LAYOUTS}))
    raise CheckpointError(
        f"no GGUF architecture computes this {family_name} ({model.config}); there are some for {able}"
    )
