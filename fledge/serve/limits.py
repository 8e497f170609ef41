"""Budgets of requests and tokens a minute, for each key, and what they say of themselves in headers.

A token bucket (Turner 1986): it holds a minute's worth, and fills up evenly. A request is charged with its prompt and
the most it may generate, and given back what it did not; so a budget is never overdrawn and the headers are true
when they are sent. Buckets are this process's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fledge.serve.errors import ApiError

Kind = Literal["requests", "tokens"]
_MAX_ADDRESSES = 10_000  # remembered


class Bucket:
    """`per_minute` tokens at most, of which `level` are left."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    @property
    def level(self) -> float:
        time_now = self._clock()
        gained = (time_now - self._filled_at) * self.per_minute / 60
        self._level, self._filled_at = min(self.per_minute, self._level + gained), time_now
        return self._level

    def take(self, amount: int) -> float:
        """Take `amount` and return 0, or take nothing and return the seconds until there is enough."""
        missing = amount - self.level
        if missing > 0:
            return missing * 60 / self.per_minute
        self._level -= amount
        return 0.0

    def give(self, amount: int) -> None:
        self._level = min(self.per_minute, self.level + amount)

    @property
    def reset_seconds(self) -> float:
        """Until the bucket is full again."""
        return (self.per_minute - self.level) * 60 / self.per_minute


@dataclass(frozen=True)
class Budgets:
    """The buckets of a key; None is no limit."""

    requests: Bucket | None
    tokens: Bucket | None

    def charge(self, kind: Kind, amount: int) -> None:
        """429 if the budget does not hold `amount`."""
        bucket = self.requests if kind == "requests" else self.tokens
        if bucket is None:
            return
        if amount > bucket.per_minute:
            raise _exceeded(kind, f"this request needs {amount}, the key has {bucket.per_minute} a minute", None)
        wait = bucket.take(amount)
        if wait > 0:
            raise _exceeded(
                kind, f"the key's {bucket.per_minute} a minute are used up; try again in {wait:.3g} s", wait
            )

    def give_back(self, amount: int) -> None:
        """Return tokens that were charged and not generated."""
        if self.tokens is not None and amount > 0:
            self.tokens.give(amount)

    def headers(self) -> dict[str, str]:
        found = {}
        for kind, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{kind}"] = str(int(bucket.level))
                found[f"x-ratelimit-reset-{kind}"] = spell_duration(bucket.reset_seconds)
        return found


def _exceeded(kind: Kind, why: str, wait: float | None) -> ApiError:
    """`wait` None: no waiting helps, so the client is told not to try again."""
    headers = {"x-should-retry": "false"}
    if wait is not None:
        headers = {"retry-after": str(int(wait) + 1), "retry-after-ms": str(int(wait * 1000) + 1)}
    message = f"Rate limit reached for {kind}: {why}"
    return ApiError(429, message, kind=kind, code="rate_limit_exceeded", headers=headers)


def spell_duration(seconds: float) -> str:
    """As the published headers spell it: `6m0s`, `1.5s`, `20ms`."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{int(rest)}s" if minutes else f"{rest:.3g}s"


class Limiter:
    """The budgets of every key that was used since the server started."""

    def __init__(self) -> None:
        self._budgets: dict[str, Budgets] = {}

    def budgets(self, key_id: str, requests: int | None, tokens: int | None) -> Budgets:
        """Those of a key; new ones where its limits have changed."""
        found = self._budgets.get(key_id)
        if found is None or (_size(found.requests), _size(found.tokens)) != (requests, tokens):
            found = Budgets(_bucket(requests), _bucket(tokens))
            self._budgets[key_id] = found
        return found


class Attempts:
    """Wrong keys, by the address that they come from: so many a minute are answered as such, the rest are told to wait.

    A right key is never held up by what others behind the same address try.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, Bucket] = {}

    def failed(self, address: str) -> None:
        """429 once an address has had its share."""
        bucket = self._buckets.get(address)
        if bucket is None:
            if len(self._buckets) >= _MAX_ADDRESSES:
                self._buckets = {key: kept for key, kept in self._buckets.items() if kept.level < kept.per_minute}
            if len(self._buckets) >= _MAX_ADDRESSES:
                self._buckets.clear()
            bucket = self._buckets[address] = Bucket(self._per_minute, self._clock)
        wait = bucket.take(1)
        if wait > 0:
            raise ApiError(
                429,
                f"Too many wrong API keys from this address; try again in {wait:.3g} s",
                kind="requests",
                code="rate_limit_exceeded",
                headers={"retry-after": str(int(wait) + 1), "x-should-retry": "false"},
            )


def _size(bucket: Bucket | None) -> int | None:
    return None if bucket is None else bucket.per_minute


def _bucket(per_minute: int | None) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute)
