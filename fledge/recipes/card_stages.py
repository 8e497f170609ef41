"""The stages of the ring as the run card knows them: title, one sentence, and which metrics share a chart.

A table of words, nothing else. A stage that is not in it (a later invention) still gets its section on the card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from fledge.recipes.card_curves import Chart

LOSS = Chart(
    "Loss",
    "nats a token",
    {
        "loss/next_token": "training",
        "validation_loss": "validation",
        "validation_loss_nats": "validation",
    },
    zoom=True,
)
BITS = Chart(
    "Bits per byte",
    "bits per byte",
    {
        "bits_per_byte": "training",
        "validation_bits_per_byte": "validation",
        "bits_per_byte_prose": "prose",
        "bits_per_byte_code": "code",
    },
    zoom=True,
)
ACCURACY = Chart("Next token guessed right", "share", {"accuracy": "training", "validation_accuracy": "validation"})
UPKEEP = (
    Chart(
        "Gradient norm",
        "norm before clipping",
        {"grad_norm": "policy", "value_grad_norm": "value"},
        zoom=True,
        minor=True,
    ),
    Chart("Learning rate", "factor of its peak", {"lr_scale": "learning rate"}, minor=True),
    Chart("Speed", "tokens a second", {"tokens_per_second": "tokens a second"}, minor=True),
)
LANGUAGE = (LOSS, BITS, ACCURACY, *UPKEEP)
RANKING = (
    Chart(
        "Ranking loss",
        "nats a pair",
        {"loss/ranking": "training", "validation_loss": "validation"},
    ),
    Chart("Pairs ranked right", "share", {"accuracy": "training", "validation_accuracy": "validation"}),
    Chart("Margin between the pair", "reward", {"margin": "margin"}),
    *UPKEEP,
)
POLICY = (
    Chart(
        "Reward",
        "reward-model score",
        {
            "score_mean": "score",
            "shaped_score_mean": "after shaping",
            "episode_reward": "with the KL penalty",
        },
    ),
    Chart("Gold judge, never trained against", "gold score", {"gold_score": "gold score"}),
    Chart("KL to the SFT model", "nats an answer", {"kl": "KL"}, target="ppo.kl.target"),
    Chart("Price of KL", "β", {"beta": "β"}),
    Chart("Entropy", "nats a token", {"entropy": "entropy"}),
    Chart("Length of an answer", "tokens", {"response_length": "length"}),
    Chart("Answers that end", "share", {"end_rate": "end rate"}),
    Chart(
        "Policy and value loss",
        "loss",
        {"loss/policy": "policy", "loss/value": "value"},
        minor=True,
    ),
    Chart("Value explained", "explained variance", {"explained_variance": "explained variance"}, minor=True),
    Chart("Ratios clipped", "share", {"clip_fraction": "policy", "value_clip_fraction": "value"}, minor=True),
    *UPKEEP,
)


# What a step also logs but no chart needs: totals that the cost table has, and the sum of charted losses.
UNCHARTED = ("loss", "step_seconds", "seconds", "tokens", "flops", "num_steps", "round", "time")


@dataclass(frozen=True)
class StageKind:
    """`name` is the stage's folder; `part_of` names the stage whose place in the ring it shares."""

    name: str
    title: str
    blurb: str
    charts: tuple[Chart, ...] = ()
    part_of: str | None = None
    short: str | None = None  # where the title is too long


STAGES = (
    StageKind("corpus", "Corpus", "Raw text is gathered, filtered and split by the hash of each document."),
    StageKind(
        "tokenizer",
        "Tokenizer",
        "A vocabulary is learned from the corpus, code and the user's text included.",
    ),
    StageKind("pretrain", "Pretraining", "The model learns to predict the next token of prose.", LANGUAGE),
    StageKind("code", "Code", "Pretraining goes on with more code, some of it with the middle to fill in.", LANGUAGE),
    StageKind(
        "sft",
        "Supervised fine-tuning",
        "It learns to answer, from conversations between people.",
        LANGUAGE,
        short="SFT",
    ),
    StageKind("rankings", "Rankings", "Answers of people and of earlier stages, ranked.", (), "reward"),
    StageKind("reward", "Reward model", "A copy learns to rank answers as people would.", RANKING),
    StageKind(
        "gold",
        "Gold judge",
        "A second judge, other seed and other prompts, never trained against.",
        RANKING,
        "reward",
    ),
    StageKind("ppo", "PPO", "The model is rewarded for better answers and held near where it started.", POLICY),
    StageKind("evaluation", "Evaluation", "What the whole ring brought, on text and prompts never trained on."),
)

# A stage that some recipes add to the ring; the others' cards do not miss it.
CONTROL = StageKind(
    "control", "PPO without the mix", "The same PPO without pretraining rows, to see what they are worth.", POLICY
)

PREFERENCE = (
    Chart("Loss", "a pair", {"loss/preference": "training", "loss/kto": "training"}),
    Chart("Preferred by the implicit reward", "share", {"accuracy": "training"}),
    Chart(
        "Implicit reward",
        "beta x log-ratio",
        {
            "chosen_reward": "chosen",
            "rejected_reward": "rejected",
            "desirable_reward": "desirable",
            "undesirable_reward": "undesirable",
        },
    ),
    *UPKEEP,
)
# The stages of `fledge align` in the order they may come; sft, reward and ppo are those of the ring.
ALIGN_STAGES = (
    StageKind("data", "Data", "Rows are read, checked and split by prompt."),
    StageKind("reference", "Reference", "What the frozen start says to every answer, once."),
    StageKind("samples", "Samples", "Answers are drawn and scored."),
    StageKind("sft", "Supervised fine-tuning", "It learns to answer as shown.", LANGUAGE, short="SFT"),
    StageKind("reward", "Reward model", "A copy learns to rank answers as people would.", RANKING),
    StageKind("dpo", "DPO", "It learns from pairs, held near where it started.", PREFERENCE),
    StageKind("ipo", "IPO", "It learns from pairs, held near where it started.", PREFERENCE),
    StageKind("kto", "KTO", "It learns from answers found good or bad.", PREFERENCE),
    StageKind("ppo", "PPO", "It is rewarded for better answers and held near where it started.", POLICY),
    StageKind("grpo", "GRPO", "Answers to a prompt compete within their group.", POLICY),
    StageKind("rloo", "RLOO", "Answers to a prompt compete within their group.", POLICY),
    StageKind("best-of-n", "Best of n", "It imitates the best of several of its own answers.", LANGUAGE),
    StageKind("feedme", "FeedME", "It imitates demonstrations and its own best answers, again and again.", LANGUAGE),
    StageKind("outcome", "Outcome", "What it came to, on prompts it never trained on."),
    StageKind("health", "Health", "How far a reward model can be trusted; health.html has it all."),
)
_MEMBER = re.compile(r"reward-(\d+)")  # of an ensemble of reward models


def stages_of(plan: object) -> tuple[StageKind, ...]:
    """The stages a run of this plan may have: those of the ring, or of `fledge align`."""
    return ALIGN_STAGES if is_alignment(plan) else STAGES


def is_alignment(plan: object) -> bool:
    return isinstance(plan, dict) and "method" in plan


def kind_of(name: str) -> StageKind:
    """The row of that name; for a stage unknown to the ring, one made from its name."""
    known = {kind.name: kind for kind in (*ALIGN_STAGES, CONTROL, *STAGES)}
    if member := _MEMBER.fullmatch(name):
        return replace(known["reward"], name=name, title=f"Reward model {member[1]}")
    return known.get(name) or StageKind(name, name.replace("_", " ").capitalize(), "")
