"""Hugging Face directories <-> models: `config.json` beside `model.safetensors`, whole or in shards with an index.

What a family's published checkpoints are called stands in its model file (`PUBLISHED`, see models/published.py); this
file only walks those tables, in one direction to read and in the other to write. Strict both ways: a field or a
weight that is not in the tables is refused by name, never skipped. Pickled weights (`.bin`) are not read at all.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fledge.config import from_json
from fledge.errors import CheckpointError, ConfigError
from fledge.files import read_object, write_directory, write_json, write_text
from fledge.layers.lora import Linear, plain_state
from fledge.models.published import FIXED, IDLE, Published
from fledge.registry import FAMILIES, family, load_family

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # the size at which `transformers` long split its own files
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Place(NamedTuple):
    """Where a stored tensor goes: the parameters it holds, side by side along their outputs."""

    ours: tuple[str, ...]
    is_transposed: bool


def load_huggingface(directory: Path, *, dtype: torch.dtype = torch.float32) -> tuple[str, nn.Module]:
    """(family, model) of `directory`: on the CPU, in evaluation mode, cast to `dtype` from whatever its files hold.

    `CheckpointError` names the file, and the field or the weights: a model type or a setting that we do not compute;
    weights that are missing, unexpected, of another shape, not finite, or kept as a pickle; a truncated file.
    """
    path = directory / CONFIG
    raw = read_object(path)
    family_name, make = _find_make(raw, path)
    files = _stored_names(directory)
    with refusing(path):
        model = make_empty(family_name, _read_config(raw, make), len(files))
    fill_parameters(model, _read_weights(directory, files, make, model, dtype), directory)
    return family_name, model.eval()


def save_huggingface(
    family_name: str,
    model: nn.Module,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    token_ids: Mapping[str, int] | None = None,
    companions: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` so that `transformers` reads it. The directory must not exist, and appears whole or not at all.

    `token_ids` may hold those of TOKEN_IDS. `companions` are further text files by name (tokenizer.json).
    `CheckpointError` if the directory exists or no published layout holds such a model.
    """
    if directory.exists():
        raise CheckpointError(f"{directory}: exists already; name a directory that does not")
    make = make_of(family_name, model)
    ids = {key: (token_ids or {}).get(key) for key in TOKEN_IDS}
    raw = {**_write_config(model, make), "dtype": DTYPES[dtype], **ids}
    weights = _published_weights(model, make, dtype)

    def fill(temporary: Path) -> None:
        write_json(temporary / CONFIG, raw)
        for name, text in (companions or {}).items():
            write_text(temporary / name, text)
        _write_shards(temporary, weights, max_shard_bytes)

    write_directory(directory, fill)


# Which make of checkpoint, and its config.


def _find_make(raw: Mapping[str, Any], path: Path) -> tuple[str, Published]:
    model_type = raw.get("model_type")
    for row in FAMILIES:
        for make in importlib.import_module(row.module).PUBLISHED if model_type in row.published else ():
            if make.model_type == model_type:
                return row.name, make
    known = ", ".join(name for row in FAMILIES for name in row.published)
    raise CheckpointError(f"{path}: model_type {model_type!r} is not supported: known are {known}")


def make_of(family_name: str, model: nn.Module) -> Published:
    """The published layout that holds `model`; `CheckpointError` if there is none."""
    row = family(family_name)
    for make in importlib.import_module(row.module).PUBLISHED if row.published else ():
        if all(getattr(model.config, name) == value for name, value in make.ours.items()):
            return make  # type: ignore[no-any-return]
    able = ", ".join(row.name for row in FAMILIES if row.published)
    raise CheckpointError(
        f"no Hugging Face layout holds this {family_name} ({model.config}); there are some for {able}"
    )


def _read_config(raw: Mapping[str, Any], make: Published) -> dict[str, Any]:
    """The fields of our config as JSON values; `ConfigError` names the first field we do not compute."""
    left = {key: value for key, value in raw.items() if key not in IDLE | make.idle}
    config = {**make.ours, **make.read_more(left)}
    for key, accepted in {**FIXED, **make.fixed}.items():
        value = left.pop(key, accepted[0])
        if value not in accepted:
            raise ConfigError(f"{key} {value!r} is not supported: known is {accepted[0]!r}")
    for key, (ours, default) in make.fields.items():
        config[ours] = left.pop(key, default)
    if left:
        raise ConfigError(f"not a setting of {make.architecture} that fledge knows: {', '.join(sorted(left))}")
    return config


def _write_config(model: nn.Module, make: Published) -> dict[str, Any]:
    fields = {key: getattr(model.config, ours) for key, (ours, _) in make.fields.items()}
    for key, value in fields.items():
        if value is None:
            raise CheckpointError(f"{make.architecture} needs {key}; the model leaves {make.fields[key][0]} open")
    fixed = {key: accepted[0] for key, accepted in make.fixed.items()}
    name = {"architectures": [make.architecture], "model_type": make.model_type}
    return {**name, **fields, **make.write_more(model.config), **fixed}


def published_modules(family_name: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every linear layer by the name its makers' model gives it -> our modules that it holds, side by side."""
    make = make_of(family_name, model)
    found = {}
    for name, place in _places(make, model.config.num_layers).items():  # type: ignore[union-attr, arg-type]
        ours = tuple(one.removesuffix(".weight") for one in place.ours)
        if name.endswith(".weight") and all(linear(model, one) for one in ours):
            found[_stored_as(make, name).removesuffix(".weight")] = ours
    return found


def linear(model: nn.Module, name: str) -> Linear | None:
    """The linear layer of that name, quantised or adapted ones too; None if there is none."""
    with contextlib.suppress(AttributeError):
        module = model.get_submodule(name)
        return module if isinstance(module, Linear) else None
    return None


def _stored_as(make: Published, name: str) -> str:
    return name if name.startswith("lm_head.") else make.prefix + name


# A model of the makers' sizes.


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Makes a `CheckpointError` that names `path` of whatever a settings file that lies does to our arithmetic."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {str(error).partition(chr(10))[0]}") from error


def make_empty(family_name: str, config: Mapping[str, Any], num_weights: int) -> nn.Module:
    """A model without values, in no memory, for `fill_parameters`; `num_weights` are there to fill it."""
    config_class, model_class = load_family(family_name)
    read = from_json(config_class, config)
    if read.num_layers > num_weights:  # before a million layers are built
        raise ConfigError(f"{read.num_layers} layers, where there are {num_weights} weights")
    with torch.device("meta"):
        model: nn.Module = model_class(read)
    return model


# Weights: from files to parameters.


def _places(make: Published, num_layers: int) -> dict[str, Place]:
    """Every published name, without prefix, that a model of `num_layers` may have."""
    places: dict[str, Place] = {}
    for published, ours in make.weights.items():
        for layer in range(num_layers if "*" in published else 1):
            names = tuple(name.replace("*", str(layer)) for name in ours)
            places[published.replace("*", str(layer))] = Place(names, published in make.transposed)
    return places


def _read_weights(
    directory: Path, stored: Mapping[str, Path], make: Published, model: nn.Module, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors, cast and shaped, for the names of all parameters of `model`; a tied head also under its own name."""
    num_layers = int(model.config.num_layers)  # type: ignore[union-attr, arg-type]
    places = _places(make, num_layers)
    owned = {name for name, _ in model.named_parameters()}
    buffers = {name.replace("*", str(layer)) for name in make.buffers for layer in range(num_layers)}
    files: dict[str, tuple[Path, str]] = {}  # published name without prefix -> file, name in it
    for full_name, path in stored.items():
        name = full_name.removeprefix(make.prefix)
        if name in files:
            raise CheckpointError(f"{directory}: '{full_name}' and '{files[name][1]}' are the same weight")
        if name not in buffers:
            files[name] = (path, full_name)
    required = {name for name, place in places.items() if owned.issuperset(place.ours)}
    _require_none(required - set(files), "missing", directory, make)
    _require_none(set(files) - set(places), "unexpected", directory, make)
    weights: dict[str, Tensor] = {}
    for name, (path, full_name) in files.items():
        shapes = [model.get_parameter(ours).shape for ours in places[name].ours]
        with _reading(path) as file:
            tensor = file.get_tensor(full_name)
        try:
            parts = _take_apart(tensor, places[name], shapes, dtype)
        except ValueError as error:
            raise CheckpointError(f"{path}: '{full_name}' {error}") from error
        weights.update(zip(places[name].ours, parts, strict=True))
    return weights


def _require_none(names: set[str], trouble: str, directory: Path, make: Published) -> None:
    if names:
        first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise CheckpointError(f"{directory}: {len(names)} {trouble} weight(s) for {make.architecture}: {first}")


def _take_apart(tensor: Tensor, place: Place, shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
    """The parameters that `tensor` holds; ValueError says what is wrong with it."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"is of type {tensor.dtype}: expected a float of 16 bits or more")
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if place.is_transposed:
        expected = expected[::-1]
    if tensor.shape != expected:
        raise ValueError(f"is of shape {tuple(tensor.shape)}: {CONFIG} makes it {expected}")
    tensor = tensor.to(dtype)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"holds infinite or undefined values as {DTYPES[dtype]}")
    ours = tensor.T if place.is_transposed else tensor
    return [part.clone(memory_format=torch.contiguous_format) for part in ours.split([s[0] for s in shapes])]


def fill_parameters(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Put `weights` in the place of all parameters; what was tied stays tied.

    `CheckpointError`, naming `source`, if a tied parameter is there twice and the two differ.
    """
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = {name: nn.Parameter(weights[name]) for name in name_of.values()}
    for module in model.modules():
        for key, old in list(module.named_parameters(recurse=False)):
            setattr(module, key, parameters[name_of[id(old)]])
    for name in weights.keys() - parameters.keys():
        if not torch.equal(model.get_parameter(name), weights[name]):
            raise CheckpointError(f"{source}: its config ties the head to the embedding, but they differ")


# Weights: from parameters to files.


def _published_weights(model: nn.Module, make: Published, dtype: torch.dtype) -> dict[str, Tensor]:
    """Published name -> tensor, on the CPU; a tied head is left out, as `transformers` leaves it out."""
    parameters = dict(model.named_parameters())
    weights: dict[str, Tensor] = {}
    for name, place in _places(make, model.config.num_layers).items():  # type: ignore[union-attr, arg-type]
        if not parameters.keys() >= set(place.ours):
            continue
        tensor = _put_together([parameters.pop(ours) for ours in place.ours], place).to("cpu", dtype)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"'{name}' holds numbers that {DTYPES[dtype]} cannot hold; write float32 or bfloat16")
        weights[_stored_as(make, name)] = tensor.contiguous()
    assert not parameters, f"{make.architecture} has no name for {sorted(parameters)}"
    return weights


def _put_together(parts: Sequence[Tensor], place: Place) -> Tensor:
    tensor = torch.cat([part.detach() for part in parts])
    return tensor.T if place.is_transposed else tensor


def published_weight(family_name: str, model: nn.Module, name: str) -> Tensor | None:
    """The weight that its makers call `name`, in their shape; None if there is none, or it is quantised."""
    make, own = make_of(family_name, model), plain_state(model)
    place = _places(make, model.config.num_layers).get(name.removeprefix(make.prefix))  # type: ignore[union-attr, arg-type]
    if place is None or not own.keys() >= set(place.ours):
        return None
    return _put_together([own[ours] for ours in place.ours], place)


def _write_shards(directory: Path, weights: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in weights.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / WEIGHTS, metadata={"format": "pt"})
        return
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in weights.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


# Files.


def _stored_names(directory: Path) -> dict[str, Path]:
    """Every tensor that the directory holds -> its file."""
    if (directory / WEIGHTS).exists():
        with _reading(directory / WEIGHTS) as file:
            return dict.fromkeys(file.keys(), directory / WEIGHTS)
    if not (directory / INDEX).exists():
        pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
        raise CheckpointError(
            f"{directory}: {pickles[0]} is a pickle, which fledge does not read; save the model as safetensors"
            if pickles
            else f"{directory}: expected {WEIGHTS} or {INDEX}, found neither"
        )
    listed = read_object(directory / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{directory / INDEX}: expected a 'weight_map' of weights and file names")
    for name in sorted(set(listed.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{directory / INDEX}: '{name}' is not the name of a file beside it")
        with _reading(directory / name) as file:
            held = set(file.keys())
        placed = {weight for weight, file_name in listed.items() if file_name == name}
        if lacking := placed - held:
            raise CheckpointError(f"{directory / INDEX}: places '{min(lacking)}' in {name}, which does not hold it")
        if surplus := held - placed:
            raise CheckpointError(f"{directory / name}: holds '{min(surplus)}', which {INDEX} does not place there")
    return {weight: directory / name for weight, name in listed.items()}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, UnicodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch it again") from error
