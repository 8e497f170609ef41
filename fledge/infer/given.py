"""What a client has given its engine, so that the next process can be given it again. No torch in here.

Layer 5, beneath process.py. A file of weights may hold some of the model's tensors only, so the newest value of each
may stand in another file: every file is kept in mind that holds the newest value of any.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fledge.infer.messages import Weights


@dataclass
class Given:
    """Weights in the order they were taken, and adapters' paths by name."""

    adapters: dict[str, str] = field(default_factory=dict)
    _updates: list[tuple[Weights, frozenset[str]]] = field(default_factory=list)

    @property
    def weights(self) -> list[Weights]:
        return [weights for weights, _ in self._updates]

    def take(self, weights: Weights, names: Iterable[str]) -> None:
        """The tensors `names` were taken from this file. The last file is kept for its version, whatever it holds."""
        self._updates.append((weights, frozenset(names)))
        kept: list[tuple[Weights, frozenset[str]]] = []
        newer: set[str] = set()
        for update in reversed(self._updates):
            if not kept or not update[1] <= newer:
                kept.append(update)
            newer |= update[1]
        self._updates = kept[::-1]
