"""A fine-tuning job of the published API as an alignment run: its files, its order, its names.

    supervised -> sft, dpo -> dpo, reinforcement -> grpo with the job's grader as verifier

Files are OpenAI's (data/openai_tuning.py); reinforcement has one prompt a line, `messages`, beside whatever its grader
asks of the `item`. A job's folder holds its data and its run, which goes on where it stopped like every other.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fledge.data.feedback import FeedbackExample
from fledge.data.interchange import read
from fledge.data.prompt_split import split_by_prompt
from fledge.data.reading import lines
from fledge.errors import DataError
from fledge.files import write_file
from fledge.recipes.align import AlignOrder, plan_of
from fledge.store.tables import TuningJobRow
from fledge.types import ChatExample, PairExample, PromptExample

METHODS: Mapping[str, str] = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
_KINDS: Mapping[str, tuple[type[FeedbackExample], str]] = {
    "supervised": (ChatExample, 'chats, {"messages": [...]}'),
    "dpo": (PairExample, 'preferences, {"input": ..., "preferred_output": ..., "non_preferred_output": ...}'),
    "reinforcement": (PromptExample, 'prompts, {"messages": [...]}, that end with the user'),
}
MIN_EXAMPLES = 10  # as published
NUM_CHECKPOINTS = 2  # beside the result
SAVE_SECONDS = 15.0
ADAPTER_BYTES, ADAPTER_RANK = 1 << 30, 16  # weights from this size on are trained by an adapter
_SHARES = (0.1, 0.2, 0.3, 0.5)  # held out of a training file that comes alone: the first that leaves some on both sides
_GROUP, _MINIBATCH = 8, 32


@dataclass(frozen=True)
class JobFolder:
    """Where a job's data and its run lie."""

    path: Path

    @classmethod
    def of(cls, folder: Path, job_id: str) -> JobFolder:
        """That of a job in the server's folder."""
        return cls(folder / "tuning" / job_id)

    @property
    def training(self) -> Path:
        return self.path / "training.jsonl"

    @property
    def validation(self) -> Path:
        return self.path / "validation.jsonl"

    def run(self, method: str) -> Path:
        return self.path / "run" / METHODS[method]


class FileError(DataError):
    """A file of a job that cannot be learned from; `param` says which."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def take_in(job: TuningJobRow, folder: JobFolder, contents: Mapping[str, Path]) -> None:
    """Put the job's data into its folder, in a format that the run reads, and look through them.

    `contents` are the blobs of `training_file` and, if there is one, `validation_file`. `FileError` names what is
    wrong and where.
    """
    kind = job.method["type"]
    for param, source in contents.items():
        place = folder.training if param == "training_file" else folder.validation
        write_file(place, partial(_write_prompts if kind == "reinforcement" else _copy, source, param))
        examples = _examples(kind, place, param)
        if param == "training_file" and len(examples) < MIN_EXAMPLES:
            raise FileError(param, f"the file has {len(examples)} examples, at least {MIN_EXAMPLES} are needed")
        if param == "training_file" and "validation_file" not in contents:
            _share(examples)


def order_of(job: TuningJobRow, folder: JobFolder) -> AlignOrder:
    """The order that the job comes to. `UserError` for a model that does not train or numbers that make no sense."""
    assert job.base_path is not None
    kind = job.method["type"]
    numbers = {k: v for k, v in (job.method[kind].get("hyperparameters") or {}).items() if v != "auto"}
    has_validation = folder.validation.is_file()
    examples = _examples(kind, folder.training, "training_file")
    weights = Path(job.base_path) / "model.safetensors"
    is_large = weights.is_file() and weights.stat().st_size >= ADAPTER_BYTES
    overrides = [f"checkpoints={NUM_CHECKPOINTS}", f"save_seconds={SAVE_SECONDS}"]
    if not has_validation:
        overrides.append(f"data.held_out_share={_share(examples)}")
    overrides += _reinforced(numbers, len(examples)) if kind == "reinforcement" else _fitted(numbers)
    order = AlignOrder(
        method=METHODS[kind],
        model=job.base_path,
        data=(folder.training,),
        format="verl" if kind == "reinforcement" else "openai",
        held_out=folder.validation if has_validation else None,
        lora=ADAPTER_RANK if is_large else None,
        verifiers=[("grader", 1.0, {"grader": job.method[kind]["grader"]})] if kind == "reinforcement" else (),
        seed=job.seed,
        overrides=tuple(overrides),
        name="run",
        runs=folder.path,
    )
    multiplier = numbers.get("learning_rate_multiplier")
    if multiplier is None:
        return order
    settings = plan_of(order).train
    rate = settings.fit.lr if hasattr(settings, "fit") else settings.optim.matrix.lr
    return AlignOrder(**{**vars(order), "lr": rate * multiplier})


def result_name(job: TuningJobRow, step: int | None = None) -> str:
    """What the result, or the checkpoint of a step, is served as: `ft:BASE:OWNER:SUFFIX:ID`, as published."""
    base = re.sub(r"[^\w.-]+", "-", job.model.rstrip("/").rpartition("/")[2]) or "model"
    owner, suffix = (re.sub(r"[^\w.-]+", "-", text)[:64] for text in (job.owner, job.suffix or ""))
    name = f"ft:{base[:80]}:{owner}:{suffix}:{job.id[-12:]}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def step_data(kind: str, step: int, num_steps: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """A step's metrics by their published names; the run's own where there is none."""
    found = {"train_loss": metrics.get("loss")}
    if kind == "reinforcement":
        found = {"train_mean_reward": metrics.get("reward/grader"), "train_kl": metrics.get("kl")}
    elif kind == "supervised":
        found["train_mean_token_accuracy"] = metrics.get("accuracy")
        found["full_valid_loss"] = metrics.get("held_out_loss")
        found["full_valid_mean_token_accuracy"] = metrics.get("held_out_accuracy")
    else:
        found |= {"train_reward_accuracy": metrics.get("accuracy"), "train_reward_margin": metrics.get("margin")}
    kept = {name: value for name, value in found.items() if value is not None}
    return {"step": step, "total_steps": num_steps, **kept}


def result_table(folder: JobFolder, kind: str) -> str:
    """Every step's metrics as comma-separated values."""
    stage = METHODS[kind]
    with (folder.path / "run" / "metrics.jsonl").open(encoding="utf-8") as file:
        told = [record for record in map(json.loads, file) if record["stage"] == stage]
    rows = [step_data(kind, record["step"], len(told), record) for record in told]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "total_steps"))
    table = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    return "\n".join(table) + "\n"


def checkpoints_in(folder: JobFolder, kind: str) -> dict[int, Path]:
    """The models that the run has left behind so far, by step."""
    found = folder.run(kind).glob("checkpoint-*/run.json")
    return {int(path.parent.name.removeprefix("checkpoint-")): path.parent for path in sorted(found)}


# Data.


def _examples(kind: str, place: Path, param: str) -> list[FeedbackExample]:
    wanted, told = _KINDS[kind]
    try:
        examples = list(read(place, name="verl" if kind == "reinforcement" else "openai"))
    except DataError as error:
        raise FileError(param, str(error).replace(f"{place}", place.name)) from error
    for number, example in enumerate(examples, start=1):
        if not isinstance(example, wanted):
            raise FileError(param, f"example {number} is of another kind; the method '{kind}' learns from {told}")
    return examples


def _share(examples: list[FeedbackExample]) -> float:
    """How much of a file that comes alone is held out."""
    for share in _SHARES:
        sides = split_by_prompt(examples, share=share)
        if sides.train and sides.validation:
            return share
    raise FileError("training_file", "its prompts begin alike, so none can be held out; bring a validation_file")


def _copy(source: Path, param: str, place: Path) -> None:
    shutil.copyfile(source, place)


def _write_prompts(source: Path, param: str, place: Path) -> None:
    """Rows of reinforcement as prompts with a record, which keeps the whole row as `item`."""
    with place.open("w", encoding="utf-8") as file:
        for number, row in _rows(source, param):
            record = {
                "data_source": "item",
                "prompt": row.get("messages"),
                "reward_model": {"style": "rule"},
                "extra_info": {"item": row},
            }
            if not isinstance(record["prompt"], list) or not record["prompt"]:
                raise FileError(param, f"line {number}: expected 'messages', a list of at least one")
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _rows(source: Path, param: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from _parsed(source, param)
    except FileError:
        raise
    except DataError as error:  # where the file lies is not its owner's matter
        raise FileError(param, str(error).replace(f"{source}", "the file")) from error


def _parsed(source: Path, param: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines(source):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FileError(param, f"line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise FileError(param, f"line {number}: expected an object")
        yield number, row


# Numbers.


def _fitted(numbers: Mapping[str, Any]) -> list[str]:
    places = {"n_epochs": "train.fit.epochs", "batch_size": "train.fit.batch", "beta": "train.beta"}
    return [f"{place}={numbers[name]}" for name, place in places.items() if name in numbers]


def _reinforced(numbers: Mapping[str, Any], num_prompts: int) -> list[str]:
    """Prompts a round, answers a prompt, and rounds.

    A minibatch divides what a round draws (rl/grpo.py), at every step of the overriding as well; so groups are of 8, or
    of 4 where the prompts are even.
    """
    prompts = numbers.get("batch_size", 8)
    group = max(1, round(_GROUP * numbers.get("compute_multiplier", 1) / 8)) * 8
    if numbers.get("compute_multiplier", 1) < 0.75 and prompts % 2 == 0:
        group = 4
    minibatch = max(size for size in range(8, _MINIBATCH + 1) if prompts * group % size == 0)
    overrides = ["train.minibatch=8", f"train.prompts={prompts}", f"train.group={group}"]
    overrides.append(f"train.minibatch={minibatch}")
    if "n_epochs" in numbers:
        rounds = numbers["n_epochs"] * -(-num_prompts // prompts)
        overrides += [f"train.warmup_rounds={min(4, rounds // 4)}", f"train.rounds={rounds}"]
    return overrides
