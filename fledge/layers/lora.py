"""LoRA: a linear layer plus a product of two thin matrices (Hu et al. 2021), put around it from outside.

Layer 2. A model file never mentions it. `add_lora` is for training one adapter, `AdapterBank` for serving many at
once, each row of a step by its own. Either wraps whatever maps (..., in_features) to (..., out_features): float and
quantised linear layers, the head included, be it tied to the embedding or not.

    y = base(x) + scale * B (A x)      scale = alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023, rsLoRA)

Shapes: N rows (the product of all leading dimensions), R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.errors import ConfigError, UserError, nearest

HEAD = "head"  # the families' name for what `unembed` applies


@runtime_checkable
class Linear(Protocol):
    """What can be adapted: an `nn.Module` that maps (..., in_features) to (..., out_features)."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class LoraConfig:
    """`targets` are ends of module names ("query", "mlp.up"); None: every linear layer but the head."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    is_rank_stabilised: bool = False
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not math.isfinite(self.alpha):
            raise ConfigError(f"a LoRA adapter needs a rank of at least 1 and a finite alpha, got {self}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.targets is not None and not self.targets:
            raise ConfigError("targets must name at least one module, or be None for every linear layer")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)


@dataclass(frozen=True, eq=False)
class Pair:
    """What is added to one module: `scale` * b (out, R) @ a (R, in)."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """Pairs by the name of the module they belong to, as in `model.named_modules()` before anything was wrapped."""

    config: LoraConfig
    pairs: Mapping[str, Pair]


# Training


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable pair. It begins as the layer alone: B is zero."""

    def __init__(self, base: nn.Module, config: LoraConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        assert isinstance(base, Linear)
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale, self.dropout = config.scale, config.dropout
        device = _device(base)
        self.a = nn.Parameter(torch.empty(config.rank, self.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(self.out_features, config.rank, device=device))
        bound = math.sqrt(1 / self.in_features)  # as nn.Linear draws its weight, and PEFT its A
        with torch.no_grad():
            self.a.uniform_(-bound, bound, generator=generator)
        # The weight before `merge`; in a list, so that it is no parameter of ours.
        self._kept: list[nn.Parameter] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self._kept:
            return y
        hidden = F.dropout(x, self.dropout, self.training).to(self.a.dtype)
        return y + (F.linear(F.linear(hidden, self.a), self.b) * self.scale).to(y.dtype)

    def merge(self, name: str) -> None:
        """Add the pair to the layer's weight, which gets a parameter of its own (the embedding it may be tied to
        stays as it is); the old one is kept for `unmerge`. `UserError` if the weight is quantised."""
        weight = getattr(self.base, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise UserError(
                f"an adapter cannot be merged into '{name}', which is quantised; merge it before quantising"
            )
        if not self._kept:
            delta = (self.b.double() @ self.a.double()) * self.scale
            merged = (weight.double() + delta).to(weight.dtype)
            self._kept.append(weight)
            self.base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)

    def unmerge(self) -> None:
        """The weight as it was before `merge`, bit for bit."""
        if self._kept:
            self.base.weight = self._kept.pop()


def add_lora(model: nn.Module, config: LoraConfig, generator: torch.Generator | None = None) -> list[nn.Parameter]:
    """Freeze the model and wrap its targets for training; the parameters to train, in the order of the modules.

    `generator` draws the A matrices. `UserError` for a target that no linear layer's name ends with.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UserError("the model has an adapter already; merge or remove it first")
    chosen = _targets(model, config.targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in chosen.items():
        _replace(model, name, LoraLinear(module, config, generator))
    return [parameter for _, module in _adapted(model) for parameter in (module.a, module.b)]


def take_adapter(model: nn.Module, config: LoraConfig) -> Adapter:
    """A copy of what `add_lora` put into the model, with the values of now."""
    pairs = {
        name: Pair(module.a.detach().clone(), module.b.detach().clone(), module.scale)
        for name, module in _adapted(model)
    }
    return Adapter(config, pairs)


@torch.no_grad()
def put_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Set the values of the pairs that `add_lora` put into the model. `UserError` if they are not the adapter's."""
    own = dict(_adapted(model))
    if own.keys() != adapter.pairs.keys():
        odd = sorted(own.keys() ^ adapter.pairs.keys())
        raise UserError(f"the adapter and the model differ in the modules they adapt: {', '.join(odd[:5])}")
    for name, module in own.items():
        _check_pair(name, module, adapter.pairs[name])
        if adapter.pairs[name].a.shape != module.a.shape:
            raise UserError(f"the adapter has another rank at '{name}' than the model was given")
    for name, module in own.items():
        module.a.copy_(adapter.pairs[name].a)
        module.b.copy_(adapter.pairs[name].b)
        module.scale = adapter.pairs[name].scale


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Make the adapter part of the weights, for running or saving the model without it (`remove_lora` then)."""
    for name, module in _adapted(model):
        module.merge(name)


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, bit for bit."""
    for _, module in _adapted(model):
        module.unmerge()


def remove_lora(model: nn.Module) -> None:
    """Take the wrappers off. What was merged stays merged; parameters stay frozen."""
    for name, module in list(_adapted(model)):
        _replace(model, name, module.base)


# Serving


class AdapterBank:
    """Adapters by name over one model. Before each forward pass `route` says which rows are whose.

    A module is wrapped when the first adapter that needs it is loaded, and unwrapped with the last; a step without
    adapters costs one test a module. Parameters keep their values, and their names for `plain_state`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wrapped: dict[str, AdapterLinear] = {}
        self._names: dict[str, frozenset[str]] = {}  # adapter -> modules
        self._route = _Route()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def load(self, name: str, adapter: Adapter) -> None:
        """Hold an adapter under a name. `UserError`, and nothing changed, if the name is taken or the adapter does
        not fit the model."""
        if name in self._names:
            raise UserError(f"an adapter '{name}' is loaded already; unload it first, or choose another name")
        if not adapter.pairs:
            raise UserError(f"the adapter '{name}' adapts nothing; it holds no matrices")
        plain = _plain_linears(self._model)
        for module_name, pair in adapter.pairs.items():
            if module_name not in plain:
                raise UserError(f"the model has no linear layer '{module_name}'; {nearest(module_name, plain)}")
            _check_pair(module_name, plain[module_name], pair)
        for module_name, pair in adapter.pairs.items():
            if module_name not in self._wrapped:
                self._wrapped[module_name] = AdapterLinear(plain[module_name], self._route)
                _replace(self._model, module_name, self._wrapped[module_name])
            self._wrapped[module_name].hold(name, pair)
        self._names[name] = frozenset(adapter.pairs)

    def unload(self, name: str) -> None:
        """Forget an adapter. `UserError` if there is none of that name."""
        if name not in self._names:
            raise UserError(f"no adapter '{name}' is loaded; {nearest(name, self._names)}")
        for module_name in self._names.pop(name):
            wrapper = self._wrapped[module_name]
            if wrapper.drop(name):
                _replace(self._model, module_name, wrapper.base)
                del self._wrapped[module_name]

    def place(self, name: str) -> str:
        """Where the parameter or buffer of this name (in the model without adapters) is now."""
        module, _, leaf = name.rpartition(".")
        return f"{module}.base.{leaf}" if module in self._wrapped else name

    def route(self, spans: Sequence[tuple[str | None, int]]) -> None:
        """The next inputs have these rows, side by side: (the adapter or None, how many rows). None at all: `()`."""
        rows: dict[str, list[range]] = {}
        place = 0
        for name, count in spans:
            if name is not None and count:
                rows.setdefault(name, []).append(range(place, place + count))
            place += count
        self._route.num_rows, self._route.groups = place, ()
        if not rows:
            return  # the usual step: asking a model for its device looks at every parameter
        device = _device(self._model)
        self._route.groups = [(name, _rows_of(runs, device)) for name, runs in rows.items()]


@dataclass
class _Route:
    """Which rows of the next inputs belong to which adapter."""

    num_rows: int = 0
    groups: Sequence[tuple[str, slice | Tensor]] = ()


class AdapterLinear(nn.Module):
    """A linear layer with several adapters; every row goes through the one it is routed to."""

    def __init__(self, base: nn.Module, route: _Route) -> None:
        super().__init__()
        assert isinstance(base, Linear)
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self._route = route
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}  # (in, R) and (R, out), the scale in the second

    def hold(self, name: str, pair: Pair) -> None:
        device = _device(self.base)
        a, b = pair.a.detach().to(device), (pair.b.detach().double() * pair.scale).to(pair.b.dtype).to(device)
        self._pairs[name] = a.t().contiguous(), b.t().contiguous()

    def drop(self, name: str) -> bool:
        """Forget an adapter; whether it was the last."""
        del self._pairs[name]
        return not self._pairs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        groups = self._route.groups
        if not groups:
            return y
        x_NI, y_NO = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        assert len(x_NI) == self._route.num_rows, f"{len(x_NI)} rows came, {self._route.num_rows} were routed"
        for name, rows in groups:
            if name not in self._pairs:
                continue
            a_IR, b_RO = self._pairs[name]
            delta = ((x_NI[rows].to(a_IR.dtype) @ a_IR) @ b_RO).to(y_NO.dtype)
            if isinstance(rows, slice):
                y_NO[rows] += delta
            else:
                y_NO.index_add_(0, rows, delta)
        return y_NO.view_as(y)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names they have in a model without adapters; the adapters' own are left out."""
    wrapped = [f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLinear | AdapterLinear)]
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        for prefix in wrapped:
            if name.startswith(prefix):
                name = name.replace(f"{prefix}base.", prefix, 1) if name.startswith(f"{prefix}base.") else ""
        if name:
            state[name] = tensor
    return state


# Finding and replacing modules


def _adapted(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def _plain_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by their names, those within wrappers by the wrapper's."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        plain: nn.Module = module.base if isinstance(module, AdapterLinear) else module
        is_linear = isinstance(plain, Linear)
        if is_linear and name.rpartition(".")[0] not in found:
            found[name] = plain
    return found


def _targets(model: nn.Module, ends: Sequence[str] | None) -> dict[str, nn.Module]:
    linears = _plain_linears(model)
    if ends is None:
        return {name: module for name, module in linears.items() if name != HEAD}
    for end in ends:
        if not any(_ends(name, end) for name in linears):
            known = sorted({name.rpartition(".")[2] for name in linears})
            raise UserError(f"no linear layer's name ends with '{end}'; {nearest(end, known)}")
    return {name: module for name, module in linears.items() if any(_ends(name, end) for end in ends)}


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _check_pair(name: str, module: nn.Module, pair: Pair) -> None:
    assert isinstance(module, Linear)
    rank = pair.a.shape[0]
    wanted = (rank, module.in_features), (module.out_features, rank)
    if (tuple(pair.a.shape), tuple(pair.b.shape)) != wanted:
        raise UserError(
            f"the adapter's matrices for '{name}' are {tuple(pair.a.shape)} and {tuple(pair.b.shape)}, "
            f"the model needs {wanted[0]} and {wanted[1]}"
        )
    if not (torch.isfinite(pair.a).all() and torch.isfinite(pair.b).all()):
        raise UserError(f"the adapter's matrices for '{name}' hold values that are no numbers")


def _rows_of(runs: Sequence[range], device: torch.device) -> slice | Tensor:
    if len(runs) == 1:
        return slice(runs[0].start, runs[0].stop)
    return torch.cat([torch.arange(run.start, run.stop) for run in runs]).to(device)


def _device(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
