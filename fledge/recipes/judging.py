"""Whose answers a judge prefers: models of any runs, sizes and tokenizers, on prompts that none was trained on.

The judge reads text, rendered by its own template and tokens, and scores every answer on its own, so that both orders
come to the same (C57). What `fledge judge` calls. The comparison is that of Ouyang et al. 2022 (2203.02155), section
4.1: an aligned small model beside an unaligned one several times its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.data.corpus import Corpus
from fledge.errors import RunError, UserError
from fledge.evals import generation, win_rate
from fledge.formats.checkpoint import LoadedModel, read_info
from fledge.infer.quantize import load_model
from fledge.models.scalar import ScalarModel
from fledge.recipes.answers import Asked, base_answers, chat_answers, judge
from fledge.recipes.chats import prompts
from fledge.recipes.measure import read_plan, run_of
from fledge.recipes.runs import resolve_model
from fledge.registry import family
from fledge.train.device import default_device, raise_malloc_thresholds
from fledge.types import ChatExample, Completion, Conversation, Metrics

BASE_STAGES = ("pretrain", "code")  # models that know no chat: they continue the messages as lines of text
USUAL_TOKENS = 64  # of an answer, to prompts of the user's own


@dataclass(frozen=True)
class JudgeOrder:
    """`models` by name, the first of them set against each other one. Without `questions` they answer what the judge's
    run held out, `limit` prompts at most; without `max_tokens` an answer is as long as in that run's evaluation."""

    judge: str
    models: Sequence[str]
    questions: Sequence[str] = ()
    limit: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    num_resamples: int = 10_000


@dataclass(frozen=True)
class Side:
    """One model and its answers. `parameters` counts all of it, `matrix_parameters` what multiplies: no look-up tables,
    embeddings or gains. `asked_as` is "chat" or "text"; `manners` as in evals/generation.py."""

    name: str
    stage: str
    asked_as: str
    parameters: int
    matrix_parameters: int
    score: float
    manners: Metrics


@dataclass(frozen=True)
class Verdict:
    """How often answers of `ours` are preferred to those of `theirs`: the figures of evals/win_rate.py."""

    ours: Side
    theirs: Side
    wins: Metrics


def judged(order: JudgeOrder, runs: Path) -> list[Verdict]:
    """The first model against each of the others, one model in memory at a time beside the judge.

    `UserError` for a judge that scores nothing, a model that says nothing, or no prompt; before any answer.
    """
    if len(order.models) < 2:
        raise UserError("a judge compares two models or more; name another one")
    directories = [resolve_model(name, runs) for name in order.models]
    for directory in directories:
        _refuse_silent(directory)
    raise_malloc_thresholds()
    loaded_judge = _load_judge(resolve_model(order.judge, runs))
    asked = _asked(order, loaded_judge)
    spoken = [
        _spoken(name, directory, asked, order, loaded_judge)
        for name, directory in zip(order.models, directories, strict=True)
    ]
    ours, our_scores, our_texts = spoken[0]
    return [
        Verdict(
            ours,
            theirs,
            win_rate.evaluate_scores(
                (our_scores, scores), our_texts, texts, seed=order.seed, num_resamples=order.num_resamples
            ),
        )
        for theirs, scores, texts in spoken[1:]
    ]


def _refuse_silent(directory: Path) -> None:
    name = read_info(directory)[0].family
    if family(name).kind != "causal":
        raise RunError(f"{directory}: a {name} model gives no answers; name a stage that does")


def _load_judge(directory: Path) -> LoadedModel:
    loaded = load_model(directory, device=default_device())
    if not isinstance(loaded.model, ScalarModel):
        raise RunError(f"{directory}: a {loaded.info.family} model gives no scores; name a reward model, RUN:gold")
    return loaded


def _asked(order: JudgeOrder, loaded_judge: LoadedModel) -> Asked:
    if order.questions:
        questions = [Conversation.of(("user", question)) for question in order.questions[: order.limit]]
        return Asked(questions, order.max_tokens or USUAL_TOKENS)
    run = run_of(loaded_judge.directory)
    if run is None or not (run / "corpus" / "documents").is_dir():
        raise RunError(f"{loaded_judge.directory} lies in no run with held-out chats; give --prompt or --file")
    plan = read_plan(run)
    documents = Corpus.open(run / "corpus" / "documents").examples("validation")
    found = prompts(
        [example for example in documents if isinstance(example, ChatExample)],
        loaded_judge.renderer,
        count=order.limit or plan.evaluation.prompts,
        max_tokens=plan.ppo.prompt_length,
        seed=order.seed + 1,
    )
    if not found:
        raise RunError(f"{run}: no held-out chat fits {plan.ppo.prompt_length} tokens; give --prompt or --file")
    return Asked([prompt.conversation for prompt in found], order.max_tokens or plan.ppo.response_length)


def _spoken(
    name: str, directory: Path, asked: Asked, order: JudgeOrder, loaded_judge: LoadedModel
) -> tuple[Side, list[float], list[str]]:
    """(the side, its scores, its texts). Answers at temperature 1, the same seeds for every model."""
    loaded = load_model(directory, device=default_device())
    is_base = loaded.info.stage in BASE_STAGES
    said: list[Completion] = (base_answers if is_base else chat_answers)(loaded, asked, order.seed)
    model = loaded_judge.model
    assert isinstance(model, ScalarModel)
    scores = judge(model, loaded_judge.renderer, asked, said)
    parameters, matrices = _sizes(loaded.model)
    side = Side(
        name,
        loaded.info.stage,
        "text" if is_base else "chat",
        parameters,
        matrices,
        sum(scores) / len(scores),
        generation.describe(said),
    )
    return side, scores, [completion.text for completion in said]


def _sizes(model: Any) -> tuple[int, int]:
    """(all parameters, those of matrices)."""
    roles: dict[str, str] = model.roles()
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(counts.values()), sum(count for name, count in counts.items() if roles.get(name) in ("matrix", "head"))
