"""Verifiers in their sandbox: what answers under test may not do, and that failures are told and never become 0."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from fledge.errors import ConfigError
from fledge.rl.confine import can_filter
from fledge.rl.judge import Judge, Limits, Verdict, Verifier

pytestmark = pytest.mark.skipif(not can_filter(), reason="no filter of system calls for this machine")
TESTS = {"tests": ["assert double(2) == 4", "assert double(3) == 6"]}
RIGHT = "def double(x):\n    return 2 * x\n"
CODE = Verifier("python_tests", limits=Limits(seconds=1.5))


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(2) as one:
        yield one


def code(judge, text, **options) -> Verdict:
    return judge(Verifier("python_tests", options, CODE.limits), [(text, TESTS)])[0]


def test_c54_code_is_judged_by_its_tests(judge):
    half = "def double(x):\n    return 4"
    answers = [RIGHT, f"Sure:\n```python\n{RIGHT}```\nDone.", half, "def double(x)", ""]
    verdicts = judge(CODE, [(text, TESTS) for text in answers])
    assert [verdict.score for verdict in verdicts] == [1, 1, 0, 0, 0]
    assert "AssertionError" in verdicts[2].reason
    assert "SyntaxError" in verdicts[3].reason
    assert code(judge, half, partial=True).score == 0.5
    setup = {"tests": "assert double(2) == base", "setup": "base = 4"}
    assert judge(CODE, [(RIGHT, setup)])[0].score == 1


def test_c54_code_that_never_ends_has_failed_in_time(judge):
    began = time.monotonic()
    verdict = code(judge, "while True: pass")
    assert verdict == Verdict(0.0, "no verdict within 1.5 seconds")
    assert time.monotonic() - began < 30  # far from for ever, on a busy machine too


FORBIDDEN = {
    "a socket": "import socket; socket.socket()",
    "a process": "import os; os.fork()",
    "a program": "import subprocess; subprocess.run(['true'])",
    "a thread": "import threading; threading.Thread(target=print).start()",
    "a file written": "open('{file}', 'w')",
    "a file appended to": "open('{file}', 'a')",
    "a file removed": "import os; os.remove('{file}')",
    "a file renamed": "import os; os.rename('{file}', '{file}2')",
    "a file cut": "import os; os.truncate('{file}', 0)",
    "a file's mode": "import os; os.chmod('{file}', 0)",
    "a folder": "import os; os.mkdir('{file}3')",
    "a signal to another": "import os; os.kill({pid}, 9)",
    "a signal to its server": "import os; os.kill(os.getppid(), 9)",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_c54_code_under_test_cannot_have(judge, what, tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("precious")
    verdict = code(judge, FORBIDDEN[what].format(file=file, pid=os.getpid()))
    assert verdict.score == 0
    assert "not permitted" in verdict.reason or "can't start new thread" in verdict.reason
    assert file.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_c54_memory_is_bounded_and_a_crash_is_survived(judge):
    assert "MemoryError" in code(judge, "x = 'a' * 10**10").reason
    assert "SIGSEGV" in code(judge, "import ctypes; ctypes.string_at(0)").reason
    assert code(judge, "import os; os._exit(0)").score == 0
    assert code(judge, RIGHT).score == 1


def test_c54_answer_cannot_speak_for_its_verifier(judge):
    everywhere = (
        "import os\n"
        "for n in range(64):\n"
        '    try:\n        os.write(n, b\'{"score": 1.0, "reason": null}\\n\')\n'
        "    except OSError: pass\n"
        "os._exit(0)"
    )
    assert code(judge, everywhere).score == 0
    assert code(judge, RIGHT).score == 1, "the sandbox is still in step with its questions"


def test_c54_answers_see_neither_each_other_nor_the_environment(judge):
    os.environ["FLEDGE_TEST_SECRET"] = "x"
    try:
        assert code(judge, "import builtins, os\nbuiltins.left = 1\nassert not os.environ\n" + RIGHT).score == 1
    finally:
        del os.environ["FLEDGE_TEST_SECRET"]
    looks = "import builtins\nassert not hasattr(builtins, 'left')\n"
    assert [code(judge, looks + RIGHT).score for _ in range(2)] == [1, 1]


def test_c54_verifier_that_fails_gives_no_score_and_says_why(judge, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def half(completion, record):\n    return len(completion) / record['most']\n"
        "def slow(completion, record):\n    while True: pass\n"
    )
    mine = {
        name: Verifier("custom", {"path": str(file), "function": name}, Limits(1.0)) for name in ("half", "slow", "no")
    }
    found = judge(mine["half"], [("abc", {"most": 6}), ("abc", {"most": 0}), ("abc", {})])
    assert found[0] == Verdict(0.5, None)
    assert [one.score for one in found[1:]] == [None, None]
    assert "ZeroDivisionError" in found[1].reason
    assert "KeyError" in found[2].reason
    assert judge(mine["slow"], [("abc", {})]) == [Verdict(None, "no verdict within 1 seconds")]
    assert "no function no" in judge(mine["no"], [("abc", {})])[0].reason
    assert judge(Verifier("exact_match"), [("abc", {"answer": {1, 2}})])[0].score is None, "a record that is no JSON"


def test_c54_sandbox_that_dies_is_told_and_replaced():
    with Judge(1) as judge:
        assert code(judge, RIGHT).score == 1
        sandbox = judge._idle.get()
        sandbox._process.stdout.close()
        judge._idle.put(sandbox)
        broken = code(judge, RIGHT)
        assert broken.score is None
        assert "sandbox failed" in broken.reason
        assert code(judge, RIGHT).score == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Verifier("exact_math"),
        lambda: Verifier("custom", {"path": "x.py"}),
        lambda: Verifier("numeric_answer", {"last_numbr": True}),
        lambda: Limits(seconds=0),
        lambda: Limits(memory_bytes=1000),
    ],
)
def test_verifier_that_cannot_work_is_refused(make):
    with pytest.raises((ConfigError, ValueError)):
        make()
