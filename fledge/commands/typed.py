"""What is typed at a command or piped into it, as text."""

from __future__ import annotations

import sys

from fledge.errors import UserError


def standard_input() -> str:
    """All of standard input; `UserError` if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 at byte {error.start}; convert it first") from error
