"""A pytest plugin for the client's tests: before each, the server's database is what the seeds say."""

from __future__ import annotations

import os
import socket

import pytest


@pytest.fixture(autouse=True)
def _restored() -> None:
    with socket.create_connection(("127.0.0.1", int(os.environ["FLEDGE_CONTROL_PORT"])), timeout=120) as control:
        control.settimeout(120)
        assert control.recv(16) == b"restored"
