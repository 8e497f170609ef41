"""How much of the engine every tenant has had: the virtual token counters of fair queueing. Plain Python.

Whoever has been served least is served next; over any time in which two tenants both wait, the service they get
differs by a constant that does not grow with that time. Source: Sheng et al. 2024, "Fairness in Serving Large
Language Models", algorithm 2 (VTC) and theorem 4.4.
"""

from __future__ import annotations

from collections.abc import Collection

# Section 4.1: a token of a prompt costs 1, a token of an answer 2 (the prices of the day).
INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2
# Counters of so many tenants that have left are kept, whatever the number of those that are here.
_SPARE = 1024


class Ledger:
    """Tenant -> weighted tokens of service. Nobody's counter falls while he is here."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._last_left: str | None = None

    def __getitem__(self, tenant: str) -> int:
        return self._served[tenant]

    def __len__(self) -> int:
        return len(self._served)

    def read(self, tenant: str, num_tokens: int) -> None:
        """The engine computed `num_tokens` of the tenant's prompts."""
        self._served[tenant] += INPUT_WEIGHT * num_tokens

    def wrote(self, tenant: str, num_tokens: int) -> None:
        """The engine drew `num_tokens` for the tenant."""
        self._served[tenant] += OUTPUT_WEIGHT * num_tokens

    def lift(self, tenant: str, waiting: Collection[str]) -> None:
        """The tenant, of whom nothing waits, sends a request; `waiting` are those of whom something does.

        It has no credit from the time when it asked for nothing (lines 7 to 13): it starts level with the least
        served of those who wait or, if there are none, with the last who did.
        """
        if waiting:
            floor = min(self._served[other] for other in waiting)
        else:
            floor = self._served.get(self._last_left, 0) if self._last_left is not None else 0
        self._served[tenant] = max(self._served.get(tenant, 0), floor)

    def left(self, tenant: str) -> None:
        """Nothing of the tenant waits any more."""
        self._last_left = tenant

    def prune(self, present: Collection[str]) -> None:
        """Forget the least served of those who are not `present`, once there are many: `lift` would raise them."""
        if len(self._served) <= 2 * (len(present) + _SPARE):
            return
        gone = sorted(self._served.keys() - set(present) - {self._last_left}, key=self.__getitem__)
        for tenant in gone[: max(len(gone) - _SPARE, 0)]:
            del self._served[tenant]
