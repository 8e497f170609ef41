"""A made-up run folder, complete and plausible, for tests of the run card. The figures are invented."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np

from fledge.config import config_hash, to_json
from fledge.files import write_json
from fledge.formats.checkpoint import FORMAT, CheckpointInfo
from fledge.recipes.report import (
    Answer,
    Bars,
    Claim,
    Curve,
    Fact,
    Interval,
    Licence,
    Reference,
    Sample,
    Series,
    StageReport,
    Table,
    write_report,
)
from fledge.recipes.runs import Cost, Manifest, write_manifest

STAGES = ("corpus", "tokenizer", "pretrain", "code", "sft", "rankings", "reward", "gold", "ppo", "evaluation")
SCRIPT = '<script>alert("x")</script><img src=x onerror=alert(1)>'

PARENTS = {
    "pretrain": {},
    "code": {"base": "pretrain"},
    "sft": {"base": "code"},
    "reward": {"trunk": "sft"},
    "gold": {"trunk": "sft"},
    "ppo": {"reference": "sft", "reward": "reward"},
}
NEEDS = {
    "tokenizer": ("corpus",),
    "pretrain": ("corpus", "tokenizer"),
    "code": ("corpus", "tokenizer", "pretrain"),
    "sft": ("tokenizer", "code"),
    "rankings": ("sft", "pretrain"),
    "reward": ("sft", "rankings"),
    "gold": ("sft", "rankings"),
    "ppo": ("sft", "reward", "corpus"),
    "evaluation": ("pretrain", "code", "sft", "ppo", "gold"),
}
COSTS = {
    "corpus": Cost(9.4, 0, 0.0, None, 310 << 20),
    "tokenizer": Cost(3.1, 0, 0.0, None, 420 << 20),
    "pretrain": Cost(262.0, 3_932_160, 5.9e13, 0.412, 1490 << 20),
    "code": Cost(71.0, 983_040, 1.47e13, 0.405, 1510 << 20),
    "sft": Cost(48.5, 655_360, 9.8e12, 0.39, 1430 << 20),
    "rankings": Cost(22.0, 120_000, 0.0, None, 1390 << 20),
    "reward": Cost(41.0, 410_000, 6.1e12, 0.31, 1720 << 20),
    "gold": Cost(40.2, 405_000, 6.1e12, 0.31, 1720 << 20),
    "ppo": Cost(133.0, 512_000, 2.2e13, 0.22, 2210 << 20),
    "evaluation": Cost(52.0, 260_000, 1.3e12, None, 1630 << 20),
}


def fake_run(runs: Path, *, stages: tuple[str, ...] = STAGES, prompt: str = "What is the capital of France?") -> Path:
    """A finished run named `pocket`, of which only `stages` have run."""
    run = runs / "pocket"
    run.mkdir(parents=True)
    write_json(
        run / "plan.json",
        {
            "recipe": "pocket",
            "seed": 0,
            "depth": 4,
            "ppo": {"kl": {"target": 6.0}},
            "model": {"width": 128, "num_layers": 4},
        },
    )
    _metrics(run, stages)
    digests: dict[str, str] = {}
    for stage in stages:
        folder = run / stage
        folder.mkdir()
        write_report(folder / "report.json", _reports(prompt)[stage])
        outputs = {"report.json": _sha(f"{stage} report")}
        if stage == "tokenizer":
            outputs["tokenizer.json"] = _sha("tokenizer")
        if stage in PARENTS:
            outputs |= _checkpoint(run, stage, "model", {r: _weights(p, "model") for r, p in PARENTS[stage].items()})
        if stage == "ppo":
            outputs |= _checkpoint(run, stage, "ema", {"policy": _weights("ppo", "model")})
        inputs = {need: digests[need] for need in NEEDS.get(stage, ()) if need in digests}
        versions = {
            "fledge": "0.1.0",
            "torch": "2.13.0",
            "python": "3.12.11",
            "machine": "Linux x86_64",
            "threads": "2",
        }
        write_manifest(folder, Manifest(stage, inputs, outputs, COSTS[stage], versions))
        digests[stage] = config_hash(outputs)
    return run


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _weights(stage: str, name: str) -> str:
    return _sha(f"{stage}/{name} weights")


def _checkpoint(run: Path, stage: str, name: str, parents: dict[str, str]) -> dict[str, str]:
    info = CheckpointInfo("pocket", {}, stage, _sha("tokenizer"), _sha("template"), parents)
    files = {"model.safetensors": _weights(stage, name), "tokenizer.json": _sha("tokenizer")}
    write_json(run / stage / name / "run.json", {"format": FORMAT, "files": files, **to_json(info)})
    return {f"{name}/{file}": sha for file, sha in files.items()}


def _metrics(run: Path, stages: tuple[str, ...]) -> None:
    noise = np.random.default_rng(0)
    lines = []
    shapes = {"pretrain": (1920, 8.3, 2.75, 200), "code": (480, 3.1, 2.3, 120), "sft": (320, 3.4, 2.6, 60)}
    for stage, (steps, start, end, scale) in shapes.items():
        for step in range(1, steps + 1 if stage in stages else 1):
            loss = end + (start - end) * math.exp(-step / scale) + 0.4 * math.exp(-step / 600) + noise.normal(0, 0.08)
            lines.append(
                {
                    "stage": stage,
                    "step": step,
                    "loss": loss,
                    "loss/next_token": loss,
                    "count/next_token": 2048.0,
                    "accuracy": 0.45 - 0.09 * loss / 2.7 + noise.normal(0, 0.01),
                    "step_seconds": 0.136,
                    "grad_norm": abs(noise.normal(0.6, 0.12)) + 4 * math.exp(-step / 20),
                    "lr_scale": min(step / 40, 1, (steps - step) / steps * 2),
                    "tokens_per_second": 15000 + noise.normal(0, 300),
                }
            )
    for stage in ("reward", "gold"):
        for step in range(1, 101 if stage in stages else 1):
            loss = 0.69 - 0.25 * (1 - math.exp(-step / 30)) + noise.normal(0, 0.03)
            lines.append(
                {
                    "stage": stage,
                    "step": step,
                    "loss": loss,
                    "loss/ranking": loss,
                    "margin": 1.2 - loss,
                    "accuracy": min(1.0, 1.2 - loss * 0.9),
                }
            )
    for step in range(1, 41 if "ppo" in stages else 1):
        done = 1 - math.exp(-step / 14)
        lines.append(
            {
                "stage": "ppo",
                "step": step,
                "score_mean": -0.1 + 1.5 * done + noise.normal(0, 0.1),
                "gold_score": -0.05 + 0.8 * done + noise.normal(0, 0.08),
                "kl": 6 * done + noise.normal(0, 0.4),
                "round": step,
                "beta": 0.15 + 0.0006 * step,
                "entropy": 2.6 - 0.5 * done + noise.normal(0, 0.03),
                "response_length": 18 + 5 * done + noise.normal(0, 0.7),
                "end_rate": min(1.0, 0.78 + 0.2 * done + noise.normal(0, 0.02)),
                "loss/policy": noise.normal(-0.01, 0.004),
                "loss/value": 0.3 - 0.2 * done,
                "clip_fraction": 0.08 + noise.normal(0, 0.01),
                "explained_variance": 0.1 + 0.6 * done,
            }
        )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def _answers(prompt: str, *texts: str) -> Sample:
    stages = ("pretrain", "code", "sft", "ppo")
    return Sample(
        prompt,
        tuple(
            Answer(s, t, ended=None if s in ("pretrain", "code") else s == "ppo")
            for s, t in zip(stages, texts, strict=True)
        ),
    )


def _reports(prompt: str) -> dict[str, StageReport]:
    samples = (
        _answers(
            prompt,
            " is the capital of the French department of the Seine, and the seat of the",
            "\n    return capital\n\ndef france(self):",
            "I think it's Paris, isn't it? I have never been there but I would love to go one day and",
            "It's Paris! Have you ever been there?",
        ),
        _answers(
            "你好,你喜欢看书吗?",
            "书中记载了许多关于中国古代的历史,",
            "# 书\nname = '书'",
            "我很喜欢看书,尤其是小说。你呢,最近在",
            "我很喜欢!你最近在看什么书?",
        ),
        _answers(
            "Write a function that adds two numbers.",
            " The function is defined as the sum of",
            "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b",
            "I am not very good at that. What do you do for",
            "Sure, I can try. def add(a, b): return a + b",
        ),
        _answers(
            SCRIPT,
            SCRIPT,
            "print('<b>')",
            "That looks like code. & I don't know what it",
            "Is that a web page?",
        ),
        _answers(
            "I had a bad day.",
            " It was the first day of the season",
            "day = 'bad'",
            "I am sorry to hear that. What happened? I had a",
            "I'm sorry to hear that. What happened?",
        ),
    )
    rng = np.random.default_rng(1)
    steps = [float(s) for s in range(0, 1921, 120)]
    val = Series.of("Wikipedia", steps, [1.41 + 1.5 * math.exp(-s / 300) + 0.01 * rng.normal() for s in steps])
    code = Series.of("Python", steps, [2.02 + 1.4 * math.exp(-s / 300) + 0.01 * rng.normal() for s in steps])
    return {
        "corpus": StageReport(
            "corpus",
            Fact("kept", 8_412_233, "bytes"),
            facts=(Fact("documents", 14210), Fact("left out", 0.083, "%")),
            tables=(
                Table.of(
                    "Yield by source and filter",
                    ["source", "read", "encoding", "length", "exact duplicates", "kept", "kept %", "licence"],
                    [
                        ["Wikipedia introductions", 10203, 2, 412, 31, 9758, 0.9564, "CC BY-SA 4.0"],
                        ["Python standard library", 2310, 0, 210, 44, 2056, 0.89, "PSF-2.0"],
                        ["Recipes", 1804, 0, 12, 96, 1696, 0.94, "CC0"],
                        ["chitchat", 7168, 0, 88, 20, 7060, 0.985, "MIT"],
                    ],
                ),
            ),
            licences=(
                Licence("Wikipedia introductions", "CC BY-SA 4.0", 9758, 6_102_113, "pretraining, tokenizer"),
                Licence("Python standard library", "PSF-2.0", 2056, 1_804_002, "code"),
                Licence("chitchat", "MIT", 7060, 900_213, "SFT, rankings, prompts"),
            ),
        ),
        "tokenizer": StageReport(
            "tokenizer",
            Fact("vocabulary", 4096, "tokens, byte-level BPE"),
            tables=(
                Table.of(
                    "Bytes per token",
                    ["source", "this tokenizer", "GPT-2 (50,257)"],
                    [["Wikipedia", 3.41, 4.38], ["Python", 2.98, 2.31], ["chats", 3.62, 4.21]],
                    "More bytes per token means shorter sequences; GPT-2's vocabulary is twelve times larger.",
                ),
            ),
        ),
        "pretrain": StageReport(
            "pretrain",
            Fact("on prose", 1.41, "bits per byte"),
            parameters=4_120_576,
            facts=(Fact("padding", 0.031, "%"),),
            claims=(
                Claim(
                    "Prose, bits per byte below the best Kneser-Ney n-gram on the same tokens",
                    0.119,
                    ">=",
                    0.10,
                    "%",
                ),
            ),
            bars=(
                Bars.of(
                    "Bits per byte beside Kneser-Ney",
                    "bits per byte",
                    ["Wikipedia", "Recipes", "Python"],
                    {
                        "pocket": [1.41, 1.22, 2.02],
                        "KN 5-gram": [1.60, 1.41, 2.11],
                        "KN 3-gram": [1.64, 1.44, 2.2],
                        "KN 2-gram": [1.87, 1.66, 2.61],
                    },
                    highlight="pocket",
                    note="Interpolated modified Kneser-Ney, trained on the same tokens.",
                ),
            ),
            curves=(
                Curve(
                    "Validation",
                    "step",
                    "bits per byte",
                    (val, code),
                    (Reference("best n-gram, Wikipedia", 1.60),),
                    zoom=True,
                ),
            ),
            tables=(
                Table.of(
                    "Bits per byte by source",
                    ["source", "pocket", "KN 2", "KN 3", "KN 5", "below best %"],
                    [
                        ["Wikipedia", 1.412, 1.871, 1.643, 1.602, 0.119],
                        ["Recipes", 1.22, 1.66, 1.44, 1.41, 0.135],
                    ],
                ),
            ),
        ),
        "code": StageReport(
            "code",
            Fact("on code, from 2.02", 1.73, "bits per byte"),
            claims=(Claim("The code stage lowers bits per byte on code", -0.29, "<", 0.0, "bits per byte"),),
            tables=(
                Table.of(
                    "Bits per byte before and after",
                    ["held out", "before", "after", "change"],
                    [["code", 2.021, 1.731, -0.29], ["prose", 1.412, 1.447, 0.035]],
                ),
            ),
        ),
        "sft": StageReport(
            "sft",
            Fact("answers that end", 0.81, "%"),
            facts=(Fact("conversations", 6100), Fact("padding", 0.012, "%")),
            samples=samples,
        ),
        "rankings": StageReport("rankings", Fact("rankings", 2410)),
        "reward": StageReport(
            "reward",
            Fact("pairs ranked right", 0.734, "%"),
            tables=(
                Table.of(
                    "Accuracy on held-out pairs",
                    ["pair", "pairs", "accuracy % "],
                    [
                        ["human over sft", 1210, Interval(0.71, 0.684, 0.736, 0.5)],
                        ["sft over base", 1204, Interval(0.79, 0.767, 0.813, 0.5)],
                        ["length-matched", 402, Interval(0.61, 0.56, 0.66, 0.5)],
                    ],
                ),
                Table.of(
                    "Calibration",
                    ["stated probability %", "pairs", "right %"],
                    [[0.55, 610, 0.56], [0.65, 540, 0.63], [0.75, 480, 0.71], [0.9, 784, 0.84]],
                ),
            ),
        ),
        "gold": StageReport(
            "gold",
            Fact("pairs ranked right", 0.741, "%"),
            tables=(
                Table.of(
                    "Accuracy on held-out pairs",
                    ["pair", "pairs", "accuracy %"],
                    [["length-matched", 398, Interval(0.52, 0.471, 0.569, 0.5)]],
                ),
            ),
        ),
        "ppo": StageReport(
            "ppo",
            Fact("wins over SFT", 0.561, "%"),
            claims=(
                Claim(
                    "Gold-judged win rate of PPO over SFT, lower bound of the 95 % interval",
                    0.49996,
                    ">",
                    0.5,
                    "%",
                ),
                Claim("The gold score was measured after training", None, ">", 0.0, ""),
            ),
            facts=(Fact("KL", 5.8, "nats an answer"), Fact("rounds", 40, "of 64 episodes")),
        ),
        "evaluation": StageReport(
            "evaluation",
            Fact("claims reached", "3 of 4"),
            tables=(
                Table.of(
                    "Win rate over the stage before, by the gold judge",
                    ["stage", "over", "prompts", "win rate %", "length-controlled %"],
                    [
                        [
                            "code",
                            "base",
                            256,
                            Interval(0.47, 0.43, 0.51, 0.5),
                            Interval(0.481, 0.44, 0.522, 0.5),
                        ],
                        [
                            "sft",
                            "code",
                            256,
                            Interval(0.83, 0.79, 0.87, 0.5),
                            Interval(0.79, 0.74, 0.84, 0.5),
                        ],
                        [
                            "ppo",
                            "sft",
                            256,
                            Interval(0.561, 0.52, 0.60, 0.5),
                            Interval(0.44, 0.40, 0.48, 0.5),
                        ],
                    ],
                    "Both orders, ties count half; bootstrap over prompts.",
                ),
                Table.of(
                    "How the answers are",
                    ["stage", "KL to SFT", "entropy", "tokens", "ends %"],
                    [
                        ["base", None, 3.4, 48.0, 0.02],
                        ["sft", 0.0, 2.6, 18.2, 0.81],
                        ["ppo", 5.8, 2.1, 22.9, 0.98],
                    ],
                ),
            ),
        ),
    }
