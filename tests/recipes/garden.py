"""A small world for ring tests: a folder of prose and chats made on the spot, and overrides that make a ring tiny.

Prose is what the standard library says about itself; code is the standard library; nothing needs a network.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

from fledge.data.package import cache_home

MODULES = (
    "argparse array ast asyncio base64 bisect calendar collections configparser contextlib copy csv datetime decimal",
    "difflib dis email enum fileinput fractions functools gettext glob gzip hashlib heapq html http inspect io",
    "ipaddress itertools json logging mailbox math mimetypes numbers operator optparse os pathlib pdb pickletools",
    "platform pprint random re sched secrets selectors shelve shlex shutil signal socket sqlite3 ssl statistics",
    "string struct subprocess tarfile tempfile textwrap threading timeit token trace traceback turtle types unittest",
    "urllib uuid wave weakref",
)
THINGS = ("the garden", "your day", "a walk", "the rain", "breakfast", "a good book", "the sea", "music", "天气", "茶")
OPENERS = ("What about {}?", "Tell me about {}.", "Do you like {}?", "I dreamt of {} last night.", "你喜欢{}吗?")
REPLIES = ("I like {}, and you?", "Oh, {}! That is my favourite.", "Not today, maybe {} tomorrow.", "我喜欢{}。")

TINY = (
    "corpus.prose=[]",
    "corpus.chats=[]",
    "corpus.limits={\"stdlib\": 120000}",
    "corpus.filters.validation_share=0.15",
    "tokenizer.vocab_size=400",
    "pretrain.fit.steps=5",
    "code.fit.steps=3",
    "sft.fit.steps=3",
    "rankings.prompts=12",
    "rankings.held_out=6",
    "rankings.batch=8",
    "ppo.rounds=3",
    "ppo.prompt_length=80",
    "ppo.response_length=40",
    "ppo.episodes=8",
    "ppo.minibatch=8",
    "evaluation.prompts=8",
    "evaluation.resamples=200",
)  # fmt: skip


def plant(folder: Path) -> Path:
    """Write the folder; the same text every time."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    said = [text for name in " ".join(MODULES).split() for text in _docstrings(name)]
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for number in range(240):
            messages = []
            for _ in range(draw.randint(1, 4)):
                thing = draw.choice(THINGS)
                messages.append({"role": "user", "content": draw.choice(OPENERS).format(thing) + f" ({number})"})
                messages.append({"role": "assistant", "content": draw.choice(REPLIES).format(thing)})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return folder


def command(garden: Path, runs: Path, *more: str) -> list[str]:
    """The command line that raises a tiny sprout from the garden."""
    overrides = [argument for override in TINY for argument in ("--set", override)]
    start = [sys.executable, "-m", "fledge", "raise", "sprout", "--text", str(garden), "--runs", str(runs)]
    return [*start, *overrides, *more]


def environment(home: Path) -> dict[str, str]:
    """Without a network and with one thread, so that tests neither wait nor race; with the kernels that this machine
    has built already, because building them takes longer than a tiny ring."""
    kernels = cache_home() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "kernels").exists():
        (home / "kernels").symlink_to(kernels)
    return {**os.environ, "FLEDGE_HOME": str(home), "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}


def raise_tiny(garden: Path, runs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    home = runs.parent / "home"
    return subprocess.run(
        command(garden, runs, *more), env=environment(home), capture_output=True, text=True, check=False, timeout=300
    )


def _docstrings(name: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some modules deprecate a name by warning at a look
        module = import_module(name)
        members = [value for _, value in inspect.getmembers(module)]
        documented = [module, *(value for value in members if inspect.isfunction(value) or inspect.isclass(value))]
        found = [inspect.getdoc(value) for value in documented]
    return sorted({text for text in found if text and len(text) > 80})
