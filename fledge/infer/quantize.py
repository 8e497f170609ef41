"""Quantising a model from outside: its linear layers and embeddings are replaced, the model file never knows.

    int8    weights with a scale a channel, activations with one for each 128 inputs of a token
    int4    weights in groups of 32 with a scale and a minimum (GGUF's Q4_1), activations in groups of 32; the head
            and the embeddings stay at int8, where 4 bits cost most

A quantised checkpoint is a checkpoint (formats/checkpoint.py) whose run.json says which module has which format;
`load_model` here reads both kinds.

Shapes: N output channels, K inputs, G groups of I = 32 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fledge.errors import CheckpointError, UserError, nearest
from fledge.formats import checkpoint
from fledge.formats.checkpoint import CheckpointInfo, LoadedModel
from fledge.formats.gguf_tensors import Blocks
from fledge.infer import kernels
from fledge.infer.kernel_twins import INT4_GROUP, QMAX
from fledge.infer.quantized import Int4Linear, Int8Embedding, Int8Linear

Format = Literal["int8", "int4"]
FORMATS: tuple[Format, ...] = ("int8", "int4")
ROLE = "float"  # of the parent in the lineage: the checkpoint that was quantised

HEAD = "head"  # what `unembed` applies, in every family
LEAST_SIDE = 32  # a matrix with a shorter side (a value head, say) is left alone: nothing is won there
# How many steps of the grid span a group's range. 15 uses every number; 8 to 14 find the weights of a matrix that was
# on such a grid before (GGUF's Q4_0), above 15 the extremes are cut off for a finer grid.
INT4_STEPS = (15.0, 15.6, 16.2, 17.0, 18.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0)
ROWS_AT_ONCE = 1 << 20  # weights worked on at a time; bounds memory


def quantize(
    model: nn.Module, target: Format, *, skip: Sequence[str] = (), blocks: Mapping[str, Blocks] | None = None
) -> dict[str, str]:
    """Replace the layers of `model` in place; module name -> its format ("int8", "int4").

    Modules whose name, or the end of it after a dot, is in `skip` keep their weights, as do those with fewer than 32
    inputs or outputs. A head that is tied to the embedding stays tied. `blocks` are parameters that came 4-bit
    quantised: in int4 they are taken as they are. `UserError` for a name in `skip` that is no
    module's, and for weights that are not finite.
    """
    formats = {name: _format_of(name, module, target) for name, module in _layers(model)}
    for wanted in skip:
        if not any(_is_called(name, wanted) for name in formats):
            ends = sorted({name.rpartition(".")[2] for name in formats})
            raise UserError(f"no layer to skip is called '{wanted}'; {nearest(wanted, ends)}")
    formats = {name: found for name, found in formats.items() if not any(_is_called(name, end) for end in skip)}

    def tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
        kept = (blocks or {}).get(f"{name}.weight")
        if formats[name] == "int4" and kept is not None and kept.kind in ("Q4_0", "Q4_1"):
            return _packed_int4(name, *_from_blocks(kept))
        return _tensors_of(name, module.get_parameter("weight"), formats[name])

    _replace(model, formats, tensors)
    return formats


def assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put float weights, by the names they have in the model before quantisation, into a model that is quantised.

    What has been replaced is quantised anew, in place. `UserError`, and nothing changed, for an unknown name or
    another shape.
    """
    # A tied head has a name of its own in every state dict.
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, value in weights.items():
        shape = _shape_of(model, name) if name not in own else tuple(own[name].shape)
        if shape is None:
            raise UserError(f"the model has no weight '{name}'")
        if shape != tuple(value.shape):
            raise UserError(f"weight '{name}' is {shape}, got {tuple(value.shape)}")
    with torch.no_grad():
        for name, value in weights.items():
            if name in own:
                own[name].copy_(value)
            else:
                _assign_matrix(model.get_submodule(name.rpartition(".")[0]), name, value)


def save_quantized(directory: Path, source: LoadedModel, target: Format, skip: Sequence[str] = ()) -> str:
    """Quantise `source.model` in place and write it as a checkpoint whose parent is `source`; returns its hash."""
    if source.info.quantized:
        raise UserError(f"{source.directory} is quantised already; quantise the model it was made from")
    formats = quantize(source.model, target, skip=skip, blocks=checkpoint.load_blocks(source))
    parents = {**source.info.parents, ROLE: source.hash}
    info = replace(source.info, parents=parents, packed={}, quantized=formats)
    return checkpoint.save_model(directory, source.model, source.tokenizer, info, source.template)


def load_model(directory: Path, *, device: torch.device | None = None, with_soft_prompt: bool = False) -> LoadedModel:
    """`formats.checkpoint.load_model` for checkpoints with and without quantised layers."""
    return checkpoint.load_model(directory, device=device, prepare=prepare, with_soft_prompt=with_soft_prompt)


def prepare(model: nn.Module, info: CheckpointInfo) -> None:
    """Give a freshly built model the empty quantised layers that its checkpoint fills. `CheckpointError` if what that
    says of them does not fit."""
    formats = info.quantized
    if not set(formats) <= {name for name, _ in _layers(model)} or not set(formats.values()) <= set(FORMATS):
        raise CheckpointError("run.json: what it says of quantised layers does not fit the model; quantise it again")
    _replace(model, formats)


def int8_matrix(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(weight int8, scales_N): symmetric, the largest of a channel becomes 127."""
    largest_N = weight_NK.abs().amax(dim=1)
    scales_N = largest_N / QMAX
    divisor_N1 = torch.where(largest_N > 0, scales_N, 1.0)[:, None]
    return (weight_NK / divisor_N1).round().clamp(-QMAX, QMAX).to(torch.int8), scales_N


def int4_matrix(weight_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nibbles_NGI uint8, scales_NG, minima_NG float16): per group the best grid of those tried, by squared error.

    A matrix that lies on such a grid, as one imported from Q4_1 does, comes back as it was.
    """
    missing = -weight_NK.shape[1] % INT4_GROUP
    filled_NK = torch.cat((weight_NK, weight_NK[:, -1:].expand(-1, missing)), dim=1)
    groups_PI = filled_NK.reshape(-1, INT4_GROUP)
    parts = [_int4_groups(part_PI) for part_PI in groups_PI.split(ROWS_AT_ONCE // INT4_GROUP)]
    nibbles_PI, scales_P, minima_P = (torch.cat(columns) for columns in zip(*parts, strict=True))
    shape = (weight_NK.shape[0], filled_NK.shape[1] // INT4_GROUP)
    return nibbles_PI.reshape(*shape, INT4_GROUP), scales_P.reshape(shape), minima_P.reshape(shape)


def _from_blocks(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """GGUF's own numbers, as `int4_matrix` gives them."""
    offsets = -blocks.zero * blocks.scales if blocks.offsets is None else blocks.offsets
    return blocks.codes.unflatten(1, (-1, INT4_GROUP)), blocks.scales.half(), offsets.half()


def _int4_groups(weight_PI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low_P, high_P = weight_PI.amin(dim=1), weight_PI.amax(dim=1)
    best: tuple[Tensor, ...] | None = None
    for steps in INT4_STEPS:
        scale_P = (high_P - low_P) / steps
        minimum_P = low_P + scale_P * max(0.0, (steps - 15) / 2)
        tried = _fit(weight_PI, scale_P, minimum_P)
        for candidate in (tried, _fit(weight_PI, *_least_squares(weight_PI, tried[0]))):
            if best is None:
                best = candidate
                continue
            is_better_P = candidate[3] < best[3]
            if is_better_P.any():
                best = tuple(
                    torch.where(is_better_P[:, None] if new.ndim == 2 else is_better_P, new, old)
                    for new, old in zip(candidate, best, strict=True)
                )
        assert best is not None
        if not best[3].any():
            break  # exact: it came from such a grid
    assert best is not None
    return best[0].to(torch.uint8), best[1], best[2]


def _fit(weight_PI: Tensor, scale_P: Tensor, minimum_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(numbers 0..15, scale and minimum as they are stored, squared error) of a grid."""
    scale_P, minimum_P = scale_P.half(), minimum_P.half()
    divisor_P1 = torch.where(scale_P == 0, 1.0, scale_P.float())[:, None]
    numbers_PI = ((weight_PI - minimum_P.float()[:, None]) / divisor_P1).round().clamp(0, 15)
    error_PI = numbers_PI * scale_P.float()[:, None] + minimum_P.float()[:, None] - weight_PI
    return numbers_PI, scale_P, minimum_P, error_PI.square().sum(dim=1)


def _least_squares(weight_PI: Tensor, numbers_PI: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and minimum that are best for these numbers."""
    mean_P, centre_P = weight_PI.mean(dim=1), numbers_PI.mean(dim=1)
    spread_PI = numbers_PI - centre_P[:, None]
    variance_P = spread_PI.square().sum(dim=1)
    slope_P = (spread_PI * weight_PI).sum(dim=1) / torch.where(variance_P > 0, variance_P, 1.0)
    return slope_P, mean_P - slope_P * centre_P


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that can be quantised, each once, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and min(module.weight.shape) >= LEAST_SIDE:
            yield name, module


def _format_of(name: str, module: nn.Module, target: Format) -> str:
    return "int8" if isinstance(module, nn.Embedding) or name == HEAD else target


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _replace(
    model: nn.Module,
    formats: Mapping[str, str],
    tensors_of: Callable[[str, nn.Module], dict[str, Tensor]] | None = None,
) -> None:
    """Put quantised layers, empty without `tensors_of`, in the place of those named. What shared a matrix shares its
    bytes."""
    shared: dict[int, dict[str, Tensor]] = {}
    for name, module in list(_layers(model)):
        found = formats.get(name)
        if found is None:
            continue
        assert isinstance(module, nn.Linear | nn.Embedding)
        key = id(module.weight)
        tensors = shared.get(key, {}) if found == "int8" else {}
        if tensors_of is not None and not tensors:
            tensors = tensors_of(name, module)
        new = _new_layer(module, found, tensors)
        if found == "int8":
            shared[key] = {"packed": new.packed, "scales": new.scales}
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new.to(module.weight.device))


def _tensors_of(name: str, weight: Tensor, found: str) -> dict[str, Tensor]:
    weight_NK = weight.detach().float()
    if not weight_NK.isfinite().all():
        raise UserError(f"'{name}' holds weights that are no numbers; the model is damaged, raise or import it again")
    if found == "int4":
        return _packed_int4(name, *int4_matrix(weight_NK))
    bytes_NK, scales_N = int8_matrix(weight_NK)
    return {"packed": kernels.pack_int8(bytes_NK), "scales": scales_N}


def _packed_int4(name: str, nibbles_NGI: Tensor, scales_NG: Tensor, minima_NG: Tensor) -> dict[str, Tensor]:
    if not (scales_NG.isfinite().all() and minima_NG.isfinite().all()):
        raise UserError(f"'{name}' holds weights beyond what half precision can scale; leave it out with --skip {name}")
    return {"packed": kernels.pack_int4(nibbles_NGI, scales_NG, minima_NG)}


def _new_layer(module: nn.Linear | nn.Embedding, found: str, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(module, nn.Embedding):
        return Int8Embedding(module.num_embeddings, module.embedding_dim, **tensors)
    kind = Int4Linear if found == "int4" else Int8Linear
    layer = kind(module.in_features, module.out_features, **tensors)
    if module.bias is not None:
        layer.bias = module.bias.detach().clone()
    return layer


def _shape_of(model: nn.Module, name: str) -> tuple[int, int] | None:
    """The shape of a matrix that has been replaced, None if `name` is not one."""
    place, _, leaf = name.rpartition(".")
    module = dict(model.named_modules()).get(place)
    if leaf != "weight":
        return None
    if isinstance(module, Int8Embedding):
        return module.num_embeddings, module.embedding_dim
    return (module.out_features, module.in_features) if isinstance(module, Int8Linear | Int4Linear) else None


def _assign_matrix(module: nn.Module, name: str, weight: Tensor) -> None:
    assert isinstance(module, Int8Linear | Int4Linear | Int8Embedding)
    tensors = _tensors_of(name, weight, "int4" if isinstance(module, Int4Linear) else "int8")
    for leaf, value in tensors.items():
        getattr(module, leaf).copy_(value)
    if isinstance(module, Int8Linear | Int4Linear):
        module.forget_plain()
