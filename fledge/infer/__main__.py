"""`python -m fledge.infer DESCRIPTOR PARENT`: the engine's own process. Started by infer/process.py, not by hand."""

from __future__ import annotations

import sys

from fledge.infer import hosted, worker

if __name__ == "__main__":
    worker.run(sys.argv[1:], hosted.load)
