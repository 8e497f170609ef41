"""fledge's exceptions.

ValueError
  UserError              what was given, what was expected, what to do: one line, exit code 2, no traceback
    ConfigError          an unknown key, a wrong type, a contradiction in a recipe or an override
    DataError            a file or record that cannot be used
    TokenizerError       a tokenizer that cannot be trained, loaded or used as asked
    CheckpointError      an artifact that is missing, truncated, altered or of another make
    RunError             a run folder that is busy, full, changed or unknown
RuntimeError
  TrainingHalted         training met NaN or a broken invariant; the offending batch is on disk
  Interrupted            Ctrl-C or SIGTERM arrived; the state is saved
  EngineError            the engine could not do what was asked, through no fault of the request
    EngineDied           its process ended while the request ran; it is started again
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """For the end of a complaint about an unknown name: the known one it resembles, else all that are known."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(names)}"


class UserError(ValueError):
    """Something the user gave cannot be used. `str(error)` is one line: what, where, and the way out."""


class ConfigError(UserError):
    pass


class DataError(UserError):
    pass


class TokenizerError(UserError):
    pass


class CheckpointError(UserError):
    pass


class RunError(UserError):
    pass


class TrainingHalted(RuntimeError):
    pass


class Interrupted(RuntimeError):
    pass


class EngineError(RuntimeError):
    pass


class EngineDied(EngineError):
    pass
