"""What a mutant is: one piece of text in one file, and the wrong text in its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class MutantError(Exception):
    """A mutant that does not fit the code it is to be injected into."""


@dataclass(frozen=True)
class Mutant:
    """`old` stands exactly once in `file` (a path in the repository) and `new` is put there; `what` tells the bug."""

    name: str
    file: str
    old: str
    new: str
    what: str

    def apply(self, source: str) -> str:
        """The mutated source. MutantError unless `old` occurs once, differs from `new`, and the result parses."""
        count = source.count(self.old)
        if count != 1:
            raise MutantError(f"{self.name}: its old text occurs {count} times in {self.file}, expected once")
        if self.old == self.new:
            raise MutantError(f"{self.name}: it changes nothing")
        mutated = source.replace(self.old, self.new)
        try:
            compile(mutated, self.file, "exec")
        except SyntaxError as error:
            raise MutantError(f"{self.name}: {self.file} no longer parses: {error}") from error
        return mutated

    def inject(self, root: Path) -> None:
        """Apply it to the file below `root`."""
        path = root / self.file
        path.write_text(self.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
