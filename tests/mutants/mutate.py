"""`make mutants`: inject the bugs of the catalogue one at a time and see which fast test catches each, and how soon.

    python tests/mutants/mutate.py [--list] [--only NAME ...] [--jobs N]

Every mutant gets a copy of package and tests of its own in a temporary folder; the checkout is only read. There the
fast tests of rl/, objectives/ and text/chat.py run, those of the mutated file first, up to the first failure. A mutant
that no test catches has survived: a test is missing, and the exit status is 1. So it is if the catalogue does not fit
the code, or if the tests fail without a mutant. What was found is written into the table in docs/alignment.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

import pytest
from mutant import Mutant, MutantError
from mutants import CATALOGUE

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "alignment.md"
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"
PARTS = ("fledge", "tests", "pyproject.toml")
TESTS = ("tests/rl", "tests/objectives", "tests/text/test_text_chat.py")
_ROW = re.compile(r"\| ([\w-]+) \|.*\| (\d+) \| \d+ \|$")  # name, rank
_SURVIVED = "**survived**"
# A run that takes this much longer than all tests do without a mutant hangs.
PATIENCE = 6.0


@dataclass(frozen=True)
class Outcome:
    """`test` caught the mutant as the `rank`-th that ran, `seconds` after the start; None: nothing did."""

    mutant: Mutant
    test: str | None
    rank: int
    seconds: float


class Runs:
    """The processes that run tests, so that all of them end with this one, whatever ends it.

    They are forked from a server that has imported what takes long and no mutant touches.
    """

    def __init__(self) -> None:
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload(["numpy", "torch", "safetensors.torch", "tokenizers"])
        self._alive: set[BaseProcess] = set()
        self._is_over = False

    def finished(self, folder: Path, tests: Sequence[str], told: Path, seconds: float | None) -> bool:
        """Run the tests of `folder`, silently, up to the first failure; false if they had to be ended in time."""
        process = self._server.Process(target=run_tests, args=(str(folder), list(tests), str(told)))
        process.start()
        self._alive.add(process)
        if self._is_over:  # asked to end while this one was being started
            self._end(process)
        try:
            process.join(seconds)
            return process.exitcode is not None
        finally:
            self._end(process)

    def end_all(self) -> None:
        """End every process, now and from now on."""
        self._is_over = True
        for process in tuple(self._alive):
            self._end(process)

    def _end(self, process: BaseProcess) -> None:
        if process.is_alive():
            process.kill()
            with suppress(ProcessLookupError):  # what it started itself, if it came as far as a group of its own
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
        self._alive.discard(process)


def run_tests(folder: str, tests: list[str], told: str) -> None:
    """What a process of `Runs` does: pytest on a copy of the package, its outcome written to `told`."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder
    sys.dont_write_bytecode = False  # what the first run compiles, the copies have
    pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=no", f"--junitxml={told}", *tests])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the catalogue and end")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone, and their rows of the table")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: %(default)s)")
    args = parser.parse_args()
    try:
        chosen = chosen_of(args.only)
        for mutant in CATALOGUE:
            mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
    except MutantError as error:
        print(error, file=sys.stderr)
        return 1
    if args.list:
        print("\n".join(f"{mutant.name:<34} {mutant.file:<38} {mutant.what}" for mutant in chosen))
        return 0
    signal.signal(signal.SIGTERM, _stop)
    os.environ["OMP_NUM_THREADS"] = "1"  # a mutant a core
    runs = Runs()
    try:
        with closing(hunt(chosen, runs, max(1, args.jobs))) as outcomes:
            return report(chosen, outcomes)
    except MutantError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing is left behind", file=sys.stderr)
        return 130
    finally:
        runs.end_all()


def chosen_of(names: Sequence[str] | None) -> tuple[Mutant, ...]:
    """The mutants of these names, all by default. MutantError for a name that is none."""
    known = {mutant.name: mutant for mutant in CATALOGUE}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise MutantError(f"no mutant is called {', '.join(unknown)}; --list shows them")
    return CATALOGUE if names is None else tuple(known[name] for name in names)


def hunt(chosen: Sequence[Mutant], runs: Runs, jobs: int) -> Generator[Outcome]:
    """The outcome of every mutant, in order, as soon as it is known. MutantError if the tests fail without one."""
    with tempfile.TemporaryDirectory(prefix="fledge-mutants-") as place:
        clean = Path(place) / "clean"
        copy_parts(ROOT, clean)
        began = time.monotonic()
        failed = verdict(runs, clean, TESTS, None).failed
        if failed is not None:
            raise MutantError(f"{failed} fails without any mutant; mend that first")
        limit = PATIENCE * (time.monotonic() - began)
        print(f"{len(chosen)} mutants; all fast tests pass without one in {time.monotonic() - began:.0f} s", flush=True)
        with gathered(jobs, runs) as threads:
            yield from threads.map(lambda mutant: one(mutant, clean, runs, limit), chosen)


@contextmanager
def gathered(jobs: int, runs: Runs) -> Iterator[ThreadPoolExecutor]:
    """Threads that are not waited for when something ends the hunt early."""
    threads = ThreadPoolExecutor(jobs)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        runs.end_all()
        threads.shutdown(wait=True)


def one(mutant: Mutant, clean: Path, runs: Runs, limit: float) -> Outcome:
    """Inject one mutant into a copy of its own, and run the tests until one fails."""
    with tempfile.TemporaryDirectory(dir=clean.parent) as place:
        copy = Path(place) / "copy"
        shutil.copytree(clean, copy)
        mutant.inject(copy)
        began, passed = time.monotonic(), 0
        for tests in order_of(mutant.file):
            result = verdict(runs, copy, tests, limit)
            if result.failed is not None:
                return Outcome(mutant, result.failed, passed + result.ran, time.monotonic() - began)
            passed += result.ran
        return Outcome(mutant, None, passed, time.monotonic() - began)


def copy_parts(root: Path, to: Path) -> None:
    """What the tests need of the checkout, without what was compiled from it."""
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for part in PARTS:
        source = root / part
        if source.is_dir():
            shutil.copytree(source, to / part, ignore=ignored)
        else:
            shutil.copy2(source, to / part)


def order_of(file: str) -> list[list[str]]:
    """The tests in the order they run for a mutant of `file`: its own, then those of its folder and all others."""
    folder, name = Path(file).parts[1:3]
    own = ROOT / "tests" / folder / f"test_{folder}_{name}"
    files = [path for part in TESTS for path in _test_files(ROOT / part)]
    rest = sorted((path for path in files if path != own), key=lambda path: path.parent != own.parent)  # stable
    parts = ([own] if own in files else [], rest)
    return [[str(path.relative_to(ROOT)) for path in part] for part in parts if part]


def _test_files(path: Path) -> list[Path]:
    return sorted(path.glob("test_*.py")) if path.is_dir() else [path]


@dataclass(frozen=True)
class Verdict:
    """How many tests ran, and the last of them if it failed."""

    ran: int
    failed: str | None


def verdict(runs: Runs, folder: Path, tests: Sequence[str], limit: float | None) -> Verdict:
    """Run tests up to the first failure. MutantError if they cannot be collected: a mutant that breaks an import
    proves nothing."""
    told = folder / "report.xml"
    told.unlink(missing_ok=True)
    if not runs.finished(folder, tests, told, limit):
        return Verdict(0, f"no end within {limit:.0f} s")
    if not told.exists():
        return Verdict(0, "the test process died")
    cases = list(ElementTree.parse(told).iter("testcase"))
    for place, case in enumerate(cases, start=1):
        if case.find("error") is not None and not case.get("classname"):
            raise MutantError(f"{case.get('name')} cannot be collected in {folder}")
        if case.find("failure") is not None or case.find("error") is not None:
            return Verdict(place, f"{str(case.get('classname')).replace('.', '/')}.py::{case.get('name')}")
    if not cases:
        raise MutantError(f"no test ran in {folder}")
    return Verdict(len(cases), None)


def report(chosen: Sequence[Mutant], outcomes: Iterator[Outcome]) -> int:
    """Print every outcome as it comes, write the table; 1 if a mutant survived."""
    began, found = time.monotonic(), []
    for outcome in outcomes:
        found.append(outcome)
        caught = f"{outcome.test} (test {outcome.rank})" if outcome.test else "SURVIVED"
        print(f"[{len(found)}/{len(chosen)}] {outcome.mutant.name}: {caught}, {outcome.seconds:.0f} s", flush=True)
    survivors = [outcome.mutant.name for outcome in found if outcome.test is None]
    minutes = (time.monotonic() - began) / 60
    print(f"{len(found) - len(survivors)} of {len(found)} caught in {minutes:.0f} min")
    for name in survivors:
        print(f"  survived: {name}")
    write_table(PAGE, found)
    return int(bool(survivors))


def write_table(page: Path, found: Sequence[Outcome]) -> None:
    """Put the outcomes between the markers of the page, in place of what it says of these mutants so far."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    told, _, after = rest.partition(END)
    rows = {match[1]: line for line in told.splitlines() if (match := _ROW.match(line))}
    rows |= {outcome.mutant.name: row_of(outcome) for outcome in found}
    lines = [rows[mutant.name] for mutant in CATALOGUE if mutant.name in rows]
    page.write_text(f"{before}{BEGIN}\n{table_of(lines)}{END}{after}", encoding="utf-8")


def table_of(lines: Sequence[str]) -> str:
    ranks = sorted(int(match[2]) for line in lines if (match := _ROW.match(line)) and _SURVIVED not in line)
    summary = f"{len(ranks)} of {len(lines)} caught"
    if ranks:
        summary += f"; half of them by the {ranks[len(ranks) // 2]}th test that ran or before"
    head = ("| mutant | file | the bug | caught by | rank | seconds |", "|---|---|---|---|---:|---:|")
    return "\n".join((f"{summary}.", "", *head, *lines)) + "\n"


def row_of(outcome: Outcome) -> str:
    mutant, test = outcome.mutant, outcome.test
    told = _SURVIVED if test is None else f"`{re.sub(r'^.*::', '', test)}`".replace("|", "\\|")
    file = mutant.file.removeprefix("fledge/")
    return f"| {mutant.name} | `{file}` | {mutant.what} | {told} | {outcome.rank} | {outcome.seconds:.0f} |"


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
