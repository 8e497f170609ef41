"""How a run is shown: a live line in a terminal, plain lines in a log, JSON lines for programs."""

from __future__ import annotations

import json
import sys
import time

from fledge.types import Metrics

LOG_EVERY_SECONDS = 10.0
TERMINAL_EVERY_SECONDS = 0.2
# At most a line of them. A round of PPO is known by its mean score; `score` is that of a reward model's batch.
SHOWN = ("loss", "accuracy", "score", "score_mean", "kl", "tokens_per_second")


class JsonLines:
    """Every event as one JSON object on standard output."""

    def stage(self, name: str, status: str, note: str) -> None:
        print(json.dumps({"event": "stage", "stage": name, "status": status, "note": note}), flush=True)

    def step(self, stage: str, step: int, num_steps: int, metrics: Metrics) -> None:
        fields = {"event": "step", "stage": stage, "step": step, "num_steps": num_steps, **metrics}
        print(json.dumps(fields), flush=True)


class Lines:
    """One line per stage, one now and then (a live one in a terminal) for the steps within."""

    def __init__(self) -> None:
        self._out = sys.stderr
        self._is_live = self._out.isatty()
        self._every = TERMINAL_EVERY_SECONDS if self._is_live else LOG_EVERY_SECONDS
        self._shown_at = 0.0
        self._first: tuple[str, int, float] = ("", 0, 0.0)

    def stage(self, name: str, status: str, note: str) -> None:
        self._write(f"{name:<12} {status}{': ' + note if note else ''}")

    def step(self, stage: str, step: int, num_steps: int, metrics: Metrics) -> None:
        now = time.monotonic()
        if self._first[0] != stage:
            self._first = (stage, step, now)
        if now - self._shown_at < self._every and step < num_steps:
            return
        self._shown_at = now
        done, seconds = step - self._first[1], now - self._first[2]
        left = f"{duration((num_steps - step) * seconds / done)} left" if done else ""
        rate = f"{done / seconds:.1f} steps/s" if done and seconds else ""
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        line = f"{stage:<12} {step}/{num_steps}  {rate}  {shown}  {left}"
        self._write(line, is_passing=self._is_live and step < num_steps)

    def _write(self, line: str, *, is_passing: bool = False) -> None:
        before, after = ("\r\x1b[2K", "" if is_passing else "\n") if self._is_live else ("", "\n")
        self._out.write(f"{before}{line}{after}")
        self._out.flush()


def duration(seconds: float) -> str:
    """As m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
