"""What bench/trl_peer.py teaches: counting in an alphabet; sizes of llama, data by seed, models for the other side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from trl_worker import END, LETTER_A, PAD, share_of_a

from fledge.formats.huggingface import save_huggingface
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.scalar import ScalarModel
from fledge.objectives.next_token import NextToken
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.types import Piece

BETAS, EPS, CLIP = (0.9, 0.95), 1e-8, 1.0


@dataclass(frozen=True)
class Size:
    """A llama, the lengths of its episodes, and how it is trained: `rows` a step, `prompts` x `group` episodes."""

    model: LlamaConfig
    prompt: int
    response: int
    lr: float
    base_lr: float
    base_steps: int
    ends: float  # chance that a document ends after each letter of its answer
    rows: int = 32
    prompts: int = 8
    group: int = 8
    ppo_epochs: int = 4

    @property
    def letters(self) -> int:
        return self.model.vocab_size - LETTER_A

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig.adamw(self.lr, decay=0.0, betas=BETAS, eps=EPS)


SIZES = {
    "tiny": Size(LlamaConfig(20, 64, 2, 4, 2, 128, 32), 6, 12, lr=1e-3, base_lr=3e-3, base_steps=100, ends=0.15),
    "small": Size(
        LlamaConfig(130, 128, 3, 4, 2, 344, 64), 8, 48, lr=1e-3, base_lr=3e-3, base_steps=60, ends=0.04, ppo_epochs=1
    ),
    # Lengths as conversations have them: most answers end long before the last of a batch.
    "medium": Size(
        LlamaConfig(514, 256, 6, 8, 4, 688, 96), 16, 64, lr=3e-4, base_lr=1e-3, base_steps=60, ends=0.08, ppo_epochs=1
    ),
}


# The data.


def counted(size: Size, random: torch.Generator, step: int, length: int) -> list[int]:
    """Letters counting by `step` from anywhere, going back to "a" now and then."""
    letter, ids = int(torch.randint(0, size.letters, (), generator=random)), []
    for chance in torch.rand(length, generator=random).tolist():
        ids.append(LETTER_A + letter)
        letter = 0 if chance < 0.1 else (letter + step) % size.letters
    return ids


def prompt_of(size: Size, random: torch.Generator) -> list[int]:
    return [END, *counted(size, random, 1, int(torch.randint(1, size.prompt, (), generator=random)))]


def document(size: Size, random: torch.Generator, step: int) -> tuple[list[int], list[int]]:
    """A prompt, and an answer that counts on by `step` and ends."""
    prompt = prompt_of(size, random)
    chances = torch.rand(size.response - 1, generator=random).tolist()
    length = next((place for place, chance in enumerate(chances, 1) if chance < size.ends), len(chances))
    return prompt, [*counted(size, random, step, length), END]


def pair(size: Size, random: torch.Generator) -> tuple[list[int], list[int], list[int]]:
    """A prompt and two answers, the one with the larger share of "a" first."""
    while True:
        prompt, answers = prompt_of(size, random), []
        for share in torch.rand(2, generator=random).tolist():
            answer = document(size, random, 1)[1]
            is_a = torch.rand(len(answer), generator=random) < 0.6 * share
            answers.append([LETTER_A if a and token != END else token for a, token in zip(is_a, answer, strict=True)])
        if share_of_a(answers[0]) != share_of_a(answers[1]):
            answers.sort(key=share_of_a, reverse=True)
            return prompt, answers[0], answers[1]


def piece(prompt: Sequence[int], answer: Sequence[int], *, learns_all: bool) -> tuple[Piece]:
    ids = torch.tensor([*prompt, *answer], dtype=torch.int32)
    mask = torch.ones(len(ids))
    if not learns_all:
        mask[: len(prompt)] = 0
    return (Piece(ids.numpy(), mask.numpy()),)


def base_model(size: Size) -> Llama:
    """A llama that has learned to count."""
    random = torch.Generator().manual_seed(0)
    model, objective = Llama(size.model), NextToken(size.length, PAD)
    model.init_weights(random)
    optimizers = OptimizerSet(model, OptimConfig.adamw(size.base_lr, decay=0.0))
    for _ in range(size.base_steps):
        rows = [piece(*document(size, random, 1), learns_all=True) for _ in range(size.rows)]
        train_step(model, optimizers, [(objective, objective.collate(rows))], clip_norm=CLIP)
    return model.eval()


# Models on disk, for the other side.


def write_judge(folder: Path, name: str, judge: ScalarModel) -> None:
    """A reward model as transformers' sequence classifier: the trunk's directory, its head replaced by a score."""
    assert float(judge.head.bias.detach().abs().sum()) == 0
    assert float(judge.std) == 1
    path = folder / name
    save_huggingface("llama", judge.trunk, path, token_ids={"eos_token_id": END, "pad_token_id": PAD})
    weights = load_file(path / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if not key.startswith("lm_head")}
    save_file(
        {**kept, "score.weight": judge.head.weight.detach().clone()}, path / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((path / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
    }
    (path / "config.json").write_text(json.dumps(config))
