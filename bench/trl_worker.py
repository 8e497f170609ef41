"""TRL as a peer of bench/trl_peer.py: run by an interpreter that has trl, asked in lines of JSON.

    {"do": "sft", "model": folder, "rows": [{"input_ids", "labels"}], ...settings}          -> losses, seconds
    {"do": "reward", "model": folder, "rows": [{"chosen_ids", "rejected_ids"}], ...}         -> losses, seconds
    {"do": "dpo", "model": folder, "rows": [{"prompt", "chosen", "rejected"}: ids], ...}     -> losses, seconds
    {"do": "grpo", "model": folder, "rows": [prompt ids], "group": n, ...}                   -> rewards, seconds
    {"do": "ppo", "model": folder, "scorer": folder, "rows": [prompt ids], ...}              -> scores, seconds

    {"do": "versions"}                                                                       -> versions, has_ppo

The answer has `values`, one a step, and `marks`: [wall seconds, processor seconds] before the first step and after each
one. Needs no fledge. `PYTHON trl_worker.py THREADS FOLDER`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

END, PAD, LETTER_A = 0, 1, 2
Order = dict[str, Any]
Rows = list[dict[str, Any]]


def share_of_a(ids: Sequence[int]) -> float:
    """The reward of the methods that learn from a Python function: the share of "a" among the letters."""
    letters = [token for token in ids if token >= LETTER_A]
    return sum(token == LETTER_A for token in letters) / max(len(letters), 1)


def marks_now() -> tuple[float, float]:
    """(wall seconds, seconds of the processor) of this process."""
    return time.perf_counter(), time.process_time()


def name_of(token: int) -> str:
    return {END: "<end>", PAD: "<pad>"}.get(token, f"w{token}")


def text_of(ids: Sequence[int]) -> str:
    return "".join(f" {name_of(token)}" for token in ids)


def tokenizer_of(vocab_size: int) -> Any:
    """One word a token, so that ids survive being text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({name_of(token): token for token in range(vocab_size)}, unk_token=name_of(PAD)))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=name_of(END), pad_token=name_of(PAD), padding_side="left"
    )


def settings(order: Order, folder: str, **more: Any) -> dict[str, Any]:
    """What every trainer is told: the peer's optimizer and batch, float32, nothing recomputed, nothing saved."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": order["batch"],
        "learning_rate": order["lr"],
        "adam_beta1": order["betas"][0],
        "adam_beta2": order["betas"][1],
        "adam_epsilon": order["eps"],
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": order["seed"],
        **more,
    }


def stopwatch(marks: list[tuple[float, float]], logs: list[dict[str, float]]) -> Any:
    """A callback that marks the time of the beginning and of every step, and keeps what was logged."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(marks_now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(marks_now())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            logged.append(logs)

    logged = logs
    return Stopwatch()


def listening(trainer_class: Any, losses: list[float]) -> Any:
    """The trainer, its losses kept as they are: what it logs is rounded."""

    class Listening(trainer_class):  # type: ignore[misc, unused-ignore]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    return Listening


def offline(order: Order, trainer_class: Any, config: Any, rows: Rows, **more: Any) -> dict[str, Any]:
    from datasets import Dataset

    marks: list[tuple[float, float]] = []
    losses: list[float] = []
    trainer = listening(trainer_class, losses)(
        model=order["model"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(order["vocab"]),
        callbacks=[stopwatch(marks, [])],
        **more,
    )
    trainer.train()
    return {"values": losses, "marks": marks}


def in_order(order: Order, folder: str, **more: Any) -> dict[str, Any]:
    """Settings of a method that walks through its rows once, in the order they were given."""
    return settings(order, folder, max_steps=order["steps"], train_sampling_strategy="sequential", **more)


def sft(order: Order, folder: str) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    told = in_order(order, folder, max_grad_norm=order["clip"], max_length=order["length"], shuffle_dataset=False)
    return offline(order, SFTTrainer, SFTConfig(**told), order["rows"])


def reward(order: Order, folder: str) -> dict[str, Any]:
    from trl import RewardConfig, RewardTrainer

    told = in_order(order, folder, max_grad_norm=order["clip"], max_length=order["length"])
    return offline(order, RewardTrainer, RewardConfig(**told), order["rows"])


def dpo(order: Order, folder: str) -> dict[str, Any]:
    from trl import DPOConfig, DPOTrainer

    rows = [{name: text_of(ids) for name, ids in row.items()} for row in order["rows"]]
    told = in_order(order, folder, max_grad_norm=order["clip"], max_length=order["length"], beta=order["beta"])
    return offline(order, DPOTrainer, DPOConfig(**told), rows)


def grpo(order: Order, folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [share_of_a(ids) for ids in completion_ids]

    config = GRPOConfig(
        **settings(order, folder, max_steps=order["steps"], max_grad_norm=order["clip"]),
        num_generations=order["group"],
        max_completion_length=order["response"],
        beta=order["beta"],
        temperature=1.0,
        loss_type="grpo",
        use_bias_correction_kl=False,
    )
    marks: list[tuple[float, float]] = []
    logs: list[dict[str, float]] = []
    trainer = GRPOTrainer(
        model=order["model"],
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text_of(ids)} for ids in order["rows"]]),
        processing_class=tokenizer_of(order["vocab"]),
        callbacks=[stopwatch(marks, logs)],
    )
    trainer.train()
    return {"values": [log["reward"] for log in logs if "reward" in log], "marks": marks}


def ppo(order: Order, folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, reference = (AutoModelForCausalLM.from_pretrained(order["model"]) for _ in range(2))
    judge, value = (AutoModelForSequenceClassification.from_pretrained(order["scorer"], num_labels=1) for _ in range(2))
    config = PPOConfig(
        **settings(order, folder),
        total_episodes=order["batch"] * order["steps"],
        num_ppo_epochs=order["epochs"],
        response_length=order["response"],
        stop_token="eos",
        temperature=1.0,
        kl_coef=order["beta"],
        vf_coef=1.0,
        num_sample_generations=0,
    )
    marks: list[tuple[float, float]] = []
    logs: list[dict[str, float]] = []
    trainer = PPOTrainer(
        config,
        tokenizer_of(order["vocab"]),
        policy,
        reference,
        judge,
        Dataset.from_list([{"input_ids": ids} for ids in order["rows"]]),
        value,
        eval_dataset=Dataset.from_list([{"input_ids": ids} for ids in order["rows"][:1]]),
        callbacks=[stopwatch(marks, logs)],
    )
    trainer.train()
    return {"values": [log["objective/scores"] for log in logs if "objective/scores" in log], "marks": marks}


def versions(order: Order, folder: str) -> dict[str, Any]:
    import torch
    import transformers
    import trl

    told = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {**told, "has_ppo": importlib.util.find_spec("trl.experimental.ppo") is not None}


METHODS = {"versions": versions, "sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo, "ppo": ppo}


def main() -> None:
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    answers = sys.stdout
    for line in sys.stdin:
        order = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):  # trainers print
            answer = METHODS[order.pop("do")](order, sys.argv[2])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
