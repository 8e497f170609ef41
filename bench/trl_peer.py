"""fledge beside TRL: the same model, data, seed, batches, optimizer and number of steps, one thread each.

    OMP_NUM_THREADS=1 .venv/bin/python bench/trl_peer.py --trl-python PYTHON --clock cpu
    OMP_NUM_THREADS=1 .venv/bin/python bench/trl_peer.py --trl-python OLDER_PYTHON --clock cpu --case ppo

PYTHON is an interpreter that has trl beside the same torch; 1.12.0 is the last trl that has the (experimental) PPO.

    sft, reward, dpo    the same batches in the same order: losses agree to rounding, step by step
    grpo                each side samples its own answers: the reward, a Python function, agrees within the seeds' noise
    ppo                 as grpo, against a reward model that fledge trained and both read

The model, a llama that counts in an alphabet, is made by fledge and read by TRL from a Hugging Face directory. Both run
float32, without gradient checkpointing, in the same process for all steps; sides take turns, seed by seed. Time is that
of the steps after the first, the making of trainers excluded. One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from generate_speed import Ids
from trl_task import BETAS, CLIP, EPS, SIZES, Size, base_model, document, pair, piece, prompt_of, write_judge
from trl_worker import END, PAD, marks_now, share_of_a

from fledge.formats.huggingface import save_huggingface
from fledge.models.llama import Llama
from fledge.models.scalar import ScalarModel
from fledge.objectives.next_token import NextToken
from fledge.objectives.preference import Preference, PreferenceIds, with_reference
from fledge.objectives.ranking import KWiseRanking, RankedIds
from fledge.rl.actors import Actors, PolicyPair
from fledge.rl.grpo import GRPO, GRPOConfig
from fledge.rl.kl import KLConfig
from fledge.rl.ppo import PPO, PPOConfig
from fledge.rl.reward import RewardConfig
from fledge.rl.rollout import Episodes, RewardModelScorer, Scorer
from fledge.rl.sampler import EngineSampler
from fledge.rl.world import World
from fledge.text.tokenizer import Tokenizer
from fledge.train.device import raise_malloc_thresholds
from fledge.train.loop import Pairs, train_step
from fledge.train.optim import OptimizerSet

BETA_DPO, BETA_GRPO, BETA_PPO = 0.1, 0.04, 0.05
SCORER_SEED = 1000
TOLERANCE = 1e-3  # nats by which two sides' losses may differ after rounding has gone through all steps
Ask = Callable[..., dict[str, Any]]


# Our side: (value, marks) of a run; what is timed is what TRL's trainers do between their steps.

Told = tuple[list[float], list[tuple[float, float]]]


def stepped(steps: int, step: Callable[[int], float]) -> Told:
    marks, values = [marks_now()], []
    for index in range(steps):
        values.append(step(index))
        marks.append(marks_now())
    return values, marks


@dataclass(frozen=True)
class Bench:
    """What the cases share."""

    args: argparse.Namespace
    name: str
    size: Size
    folder: Path
    base: Llama
    scorer: ScalarModel
    ask: Ask

    def copy(self) -> Llama:
        model = Llama(self.size.model)
        model.load_state_dict(self.base.state_dict())
        return model.eval()

    def judge(self) -> ScalarModel:
        """As the base's trunk with the head that TRL reads from the directory, which has no bias."""
        judge = ScalarModel.from_trunk("llama", self.copy(), generator=torch.Generator().manual_seed(1))
        judge.head.bias.requires_grad_(False)
        return judge

    def told(self, do: str, seed: int, **more: Any) -> Told:
        size = self.size
        shared = {"vocab": size.model.vocab_size, "length": size.length, "response": size.response, "lr": size.lr}
        usual = {"model": str(self.folder / "model"), "betas": BETAS, "eps": EPS, "clip": CLIP, "batch": size.rows}
        answer = self.ask(do=do, seed=seed, steps=self.args.steps, **{**shared, **usual, **more})
        return answer["values"], answer["marks"]


def offline(bench: Bench, model: Any, pairs_of: Callable[[int], Pairs]) -> Told:
    optimizers = OptimizerSet(model, bench.size.optim)
    return stepped(bench.args.steps, lambda step: train_step(model, optimizers, pairs_of(step), clip_norm=CLIP)["loss"])


def sft(bench: Bench, seed: int) -> Iterator[Told]:
    """Counting downwards, the loss on the answer alone."""
    size, random = bench.size, torch.Generator().manual_seed(seed)
    documents = [document(size, random, -1) for _ in range(bench.args.steps * size.rows)]
    objective = NextToken(size.length, PAD)

    def pairs_of(step: int) -> Pairs:
        chosen = documents[step * size.rows : (step + 1) * size.rows]
        return [(objective, objective.collate([piece(*one, learns_all=False) for one in chosen]))]

    yield offline(bench, bench.copy(), pairs_of)
    rows = [{"input_ids": [*p, *a], "labels": [-100] * len(p) + a} for p, a in documents]
    yield bench.told("sft", seed, rows=rows)


def preferences(bench: Bench, seed: int) -> list[tuple[list[int], list[int], list[int]]]:
    random = torch.Generator().manual_seed(seed)
    return [pair(bench.size, random) for _ in range(bench.args.steps * bench.size.rows)]


def reward(bench: Bench, seed: int) -> Iterator[Told]:
    size, pairs = bench.size, preferences(bench, seed)
    objective = KWiseRanking(size.length, PAD)

    def pairs_of(step: int) -> Pairs:
        chosen = pairs[step * size.rows : (step + 1) * size.rows]
        ranked = [RankedIds(tuple(p), (tuple(a), tuple(b)), (1, 2)) for p, a, b in chosen]
        return [(objective, objective.collate(ranked))]

    yield offline(bench, bench.judge(), pairs_of)
    rows = [{"chosen_ids": p + a, "rejected_ids": p + b} for p, a, b in pairs]
    yield bench.told("reward", seed, model=str(bench.folder / "judge"), rows=rows)


def dpo(bench: Bench, seed: int) -> Iterator[Told]:
    """The reference is asked in every step on both sides."""
    size, pairs, reference = bench.size, preferences(bench, seed), bench.copy()
    objective = Preference(size.length, PAD, beta=BETA_DPO)

    def pairs_of(step: int) -> Pairs:
        chosen = pairs[step * size.rows : (step + 1) * size.rows]
        batch = objective.collate([PreferenceIds(tuple(p), tuple(a), tuple(b)) for p, a, b in chosen])
        return [(objective, with_reference(batch, reference, rows=2 * size.rows))]

    yield offline(bench, bench.copy(), pairs_of)
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs]
    yield bench.told("dpo", seed, rows=rows, beta=BETA_DPO)


def pays_shares(episodes: Episodes) -> torch.Tensor:
    """`share_of_a` of every answer: the same Python function as on the other side."""
    rows = zip(episodes.tokens_BT.tolist(), episodes.action_mask_BT.tolist(), strict=True)
    return torch.tensor([share_of_a([t for t, m in zip(ids, mask, strict=True) if m]) for ids, mask in rows])


def world(bench: Bench, prompts: list[list[int]], scorer: Scorer) -> World:
    stops = frozenset({END})
    sampler = EngineSampler(cast(Tokenizer, Ids(bench.size.model.vocab_size)), stops)
    return World(prompts, PAD, stops, END, sampler, scorer)


def asked(bench: Bench, seed: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [prompt_of(bench.size, random) for _ in range(bench.size.prompts * bench.size.group)]


def grpo(bench: Bench, seed: int) -> Iterator[Told]:
    size, prompts = bench.size, asked(bench, seed)
    episodes = size.prompts * size.group
    config = replace(
        GRPOConfig.grpo(),
        rounds=bench.args.steps,
        prompts=size.prompts,
        group=size.group,
        minibatch=episodes,
        forward_rows=episodes,
        prompt_length=size.prompt,
        response_length=size.response,
        kl=KLConfig(BETA_GRPO),
        optim=size.optim,
        warmup_rounds=0,
        clip_norm=CLIP,
        seed=seed,
    )
    run = GRPO(config, PolicyPair.start(bench.copy()), world(bench, prompts, pays_shares))
    yield stepped(bench.args.steps, lambda _: run.round().metrics["score_mean"])
    yield bench.told("grpo", seed, rows=prompts, batch=episodes, group=size.group, beta=BETA_GRPO)


def ppo(bench: Bench, seed: int) -> Iterator[Told]:
    """TRL clips no gradient here and has no bias on its value head: neither have we."""
    size, prompts = bench.size, asked(bench, seed)
    episodes = size.prompts * size.group
    config = PPOConfig(
        rounds=bench.args.steps,
        episodes=episodes,
        minibatch=episodes,
        epochs=size.ppo_epochs,
        forward_rows=2 * episodes,  # policy and value function at once
        prompt_length=size.prompt,
        response_length=size.response,
        kl=KLConfig(BETA_PPO),
        reward=RewardConfig(missing_end_score=None),
        pretrain_weight=0.0,
        policy_optim=size.optim,
        value_optim=size.optim,
        warmup_rounds=0,
        clip_norm=None,
        seed=seed,
    )
    actors = Actors.start(bench.copy(), bench.scorer)
    actors.value.head.bias.requires_grad_(False)
    run = PPO(config, actors, world(bench, prompts, RewardModelScorer(bench.scorer)))
    yield stepped(bench.args.steps, lambda _: run.round().metrics["score_mean"])
    more = {"batch": episodes, "epochs": size.ppo_epochs, "beta": BETA_PPO}
    yield bench.told("ppo", seed, scorer=str(bench.folder / "scorer"), rows=prompts, **more)


def made(args: argparse.Namespace, name: str, folder: Path, ask: Ask) -> Bench:
    """The base, and a reward model trained on a seed of its own, in memory and on disk."""
    size = SIZES[name]
    base = base_model(size)
    folder.mkdir()
    save_huggingface("llama", base, folder / "model", token_ids={"eos_token_id": END, "pad_token_id": PAD})
    unread = ScalarModel.from_trunk("llama", base, generator=torch.Generator())
    bench = Bench(args, name, size, folder, base, unread, ask)
    write_judge(folder, "judge", bench.judge())
    scorer, objective = bench.judge(), KWiseRanking(size.length, PAD)
    optimizers = OptimizerSet(scorer, size.optim)
    pairs = preferences(bench, SCORER_SEED)
    for step in range(args.steps):
        chosen = pairs[step * size.rows : (step + 1) * size.rows]
        ranked = [RankedIds(tuple(p), (tuple(a), tuple(b)), (1, 2)) for p, a, b in chosen]
        train_step(scorer, optimizers, [(objective, objective.collate(ranked))], clip_norm=CLIP)
    write_judge(folder, "scorer", scorer.requires_grad_(False))
    return replace(bench, scorer=scorer)


# What is told.


def seconds(marks: Sequence[Sequence[float]], clock: int) -> float:
    """Of a step, the first one left out: it warms up."""
    return (marks[-1][clock] - marks[1][clock]) / (len(marks) - 2)


def compare(bench: Bench, case: str) -> None:
    runs: list[tuple[Told, Told]] = []
    for seed in bench.args.seeds:
        ours, theirs = CASES[case](bench, seed)
        assert len(ours[0]) == len(theirs[0]) == bench.args.steps, f"{len(ours[0])} and {len(theirs[0])} steps"
        runs.append((ours, theirs))
    last = max(1, bench.args.steps // 5)
    mine, other = ([statistics.mean(run[side][0][-last:]) for run in runs] for side in (0, 1))
    clock = ("wall", "cpu").index(bench.args.clock)
    ratios = [seconds(t[1], clock) / seconds(o[1], clock) for o, t in runs]
    told: dict[str, Any] = {"case": case, "size": bench.name, "steps": bench.args.steps, "mean_of_last": last}
    told |= {"fledge": mine, "trl": other, "difference": statistics.mean(mine) - statistics.mean(other)}
    told |= sampled(runs, mine, other) if case in ("grpo", "ppo") else same_batches(runs)
    for name, which in (("wall", 0), ("cpu", 1)):
        told[f"fledge_{name}_ms"], told[f"trl_{name}_ms"] = (
            1e3 * statistics.median(seconds(run[side][1], which) for run in runs) for side in (0, 1)
        )
    tell(**told, ratio=statistics.median(ratios), clock=bench.args.clock)


def sampled(runs: Sequence[tuple[Told, Told]], mine: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Answers are drawn: two standard errors of the difference of means are what seeds alone would make."""
    first = [statistics.mean(run[side][0][0] for run in runs) for side in (0, 1)]
    if len(runs) < 2:
        return {"first": first}
    noise = 2 * sum(statistics.variance(side) / len(side) for side in (mine, other)) ** 0.5
    return {"first": first, "noise": noise, "agrees": abs(statistics.mean(mine) - statistics.mean(other)) <= noise}


def same_batches(runs: Sequence[tuple[Told, Told]]) -> dict[str, Any]:
    gap = max(abs(a - b) for ours, theirs in runs for a, b in zip(ours[0], theirs[0], strict=True))
    return {"largest_gap": gap, "agrees": gap <= TOLERANCE}


def tell(**what: Any) -> None:
    print(json.dumps(short(what)), flush=True)


def short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: short(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [short(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value


@contextmanager
def trl(args: argparse.Namespace, folder: Path) -> Iterator[Ask]:
    command = [args.trl_python, str(Path(__file__).with_name("trl_worker.py")), str(args.threads), str(folder)]
    errors = None if args.verbose else subprocess.DEVNULL
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": str(args.threads)}
    pipe, environment = subprocess.PIPE, {**os.environ, **offline}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(**order: Any) -> dict[str, Any]:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                sys.exit(f"{args.trl_python} cannot run trl (or ended early); --verbose shows what it says")
            answer: dict[str, Any] = json.loads(line)
            return answer

        yield ask
        process.stdin.close()


CASES = {"sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo, "ppo": ppo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="an interpreter that has trl, and the same torch and transformers")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["sft", "reward", "dpo", "grpo"])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, or rounds of the RL methods")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine")
    parser.add_argument("--verbose", action="store_true", help="let TRL's own output through")
    args = parser.parse_args()
    if not args.trl_python:
        sys.exit("bench/trl_peer.py needs --trl-python PYTHON, an interpreter that has trl beside the same torch")
    torch.set_num_threads(args.threads)
    raise_malloc_thresholds()
    with tempfile.TemporaryDirectory() as temporary, trl(args, Path(temporary) / "trainers") as ask:
        about = ask(do="versions")
        if "ppo" in args.case and not about["has_ppo"]:
            sys.exit(f"trl {about['trl']} has no PPO: 1.12.0 is the last version with trl.experimental.ppo")
        tell(**about, fledge_torch=torch.__version__, threads=args.threads, clock=args.clock)
        for name in args.size:
            bench = made(args, name, Path(temporary) / name, ask)
            for case in args.case:
                compare(bench, case)


if __name__ == "__main__":
    main()
