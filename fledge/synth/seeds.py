"""fledge's own seed tasks for Self-Instruct, in English and Chinese (seed_tasks.json), or the user's."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from fledge.data.reading import Drops
from fledge.data.records import Intake
from fledge.data.self_instruct import Task, read_tasks
from fledge.synth.instruct_texts import Language

LICENCE = "Apache-2.0"  # fledge's


def seed_tasks(path: Path | None = None, *, language: Language = "en", bad: Drops | None = None) -> list[Task]:
    """The tasks of the file at `path`, whatever their language; without one, fledge's own of `language`.

    Raises `DataError` for a file that cannot be read or holds none; bad rows are refused, or counted in `bad`.
    """
    if path is not None:
        return read_tasks(path, Intake("seeds", bad))
    with as_file(files("fledge.synth") / "seed_tasks.json") as own:
        tasks = read_tasks(own, Intake("fledge-seeds", licence=LICENCE))
    return [task for task in tasks if task.id.startswith(f"{language}_")]
