"""The engine's LoRA adapters: which are loaded, and which rows of a step go through which.

Layer 5, between engine.py and layers/lora.py. An adapter has a number that no other load of this engine has had, so
that nothing cached under its name before is taken for its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from torch import nn

from fledge.errors import UserError, nearest
from fledge.layers.lora import Adapter, AdapterBank


class Adapters:
    """The adapters over one model."""

    def __init__(self, model: nn.Module) -> None:
        self._bank = AdapterBank(model)
        self._numbers: dict[str, int] = {}
        self._next_number = count(1)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._numbers)

    def load(self, name: str, adapter: Adapter) -> None:
        """See `AdapterBank.load`."""
        self._bank.load(name, adapter)
        self._numbers[name] = next(self._next_number)

    def unload(self, name: str) -> None:
        """See `AdapterBank.unload`."""
        self._bank.unload(name)
        del self._numbers[name]

    def require(self, name: str | None) -> None:
        """`UserError` unless the adapter is loaded (None: the model alone, which always is)."""
        if name is not None and name not in self._numbers:
            raise UserError(f"no adapter '{name}' is loaded; {nearest(name, self._numbers)}")

    def salt(self, name: str | None) -> str:
        """What keeps an adapter's keys and values apart from all others."""
        return "" if name is None else str(self._numbers[name])

    def place(self, name: str) -> str:
        """See `AdapterBank.place`."""
        return self._bank.place(name)

    def route(self, spans: Sequence[tuple[str | None, int]] = ()) -> None:
        """The next inputs have these rows, side by side: (adapter, number of rows). None given: no adapters at all."""
        self._bank.route(spans if any(name is not None for name, _ in spans) else ())
