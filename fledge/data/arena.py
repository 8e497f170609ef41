"""Arena battles: `{"model_a", "model_b", "winner", "conversation_a", "conversation_b", "judge", "anony", ...}`.

A battle that was won becomes a ranking of two, whose makers are the models; a tie, which ranks nothing, a pair with
probability one half. Battles in which the models had said different things before their last answers are bad rows:
there the votes are about whole conversations. Whether the names were hidden stands in the judgement's `batch`.
Source: Zheng et al. 2023 (2306.05685) and the published battles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.messages import one_answer, read_turns, require_prompt, write_messages
from fledge.data.records import BadRow, Intake, Row, each, kind_of
from fledge.types import Conversation, Judgement, Message, PairExample, Ranking

_SHOWN, _HIDDEN = "names shown", "names hidden"
_TIES = ("tie", "tie (bothbad)", "bothbad", "both_bad")
_BOTH = " | "  # between the two models of a tie


def recognises(record: Mapping[str, Any]) -> bool:
    return {"model_a", "model_b", "winner", "conversation_a", "conversation_b"} <= set(record)


def read(rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]:
    """A ranking or a tied pair a battle."""
    yield from each(rows, intake, lambda row: [_battle(row, intake)])


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """Battles; `DataError` for what is neither a ranking of two nor a tied pair of two models."""
    for example in examples:
        if isinstance(example, Ranking) and sorted(example.ranks) == [1, 2]:
            answers, models = example.completions, example.makers
            winner = ("model_a", "model_b")[example.ranks.index(1)]
        elif isinstance(example, PairExample) and example.probability == 0.5 and _models(example):
            answers, models = (example.chosen, example.rejected), _models(example)
            judgement = example.judgement or Judgement()
            winner = "tie (bothbad)" if judgement.rationale == "both bad" else "tie"
        else:
            raise cannot_write(example, "arena", "it is neither a ranking of two nor a tie of two models")
        if example.prompt.tools:
            raise cannot_write(example, "arena", "it has tools")
        talks = [write_messages([*example.prompt.messages, Message.of("assistant", text)]) for text in answers]
        battle = {"model_a": models[0], "model_b": models[1], "winner": winner}
        yield {**battle, "conversation_a": talks[0], "conversation_b": talks[1], **_told(example.judgement)}


def _battle(row: Row, intake: Intake) -> Ranking | PairExample:
    talks = [read_turns(row, key, "user") for key in ("conversation_a", "conversation_b")]
    prompts = [Conversation(talk[:-1]) for talk in talks]
    if prompts[0] != prompts[1]:
        detail = "the models had different conversations before their last answers; drop the row"
        raise BadRow("no common prompt", row.where, detail)
    require_prompt(prompts[0].messages, f"{row.where}, conversation_a")
    first = one_answer(talks[0][-1:], f"{row.where}, conversation_a")
    second = one_answer(talks[1][-1:], f"{row.where}, conversation_b")
    models = (row.text("model_a"), row.text("model_b"))
    winner = row.value("winner")
    judge = row.optional_text("judge_user") or row.optional_text("judge")
    batch = (_HIDDEN if row.flag("anony") else _SHOWN) if row.has("anony") else None
    origin = row.provenance(intake)
    if winner in _TIES:
        rationale = None if winner == "tie" else "both bad"
        judgement = Judgement("human", judge, None, batch, _BOTH.join(models), rationale=rationale)
        return PairExample(prompts[0], first, second, origin, probability=0.5, judgement=judgement)
    if winner not in ("model_a", "model_b"):
        detail = f"{kind_of(winner)}, expected model_a, model_b, tie or tie (bothbad); mend or drop the row"
        raise BadRow("wrong type", f"{row.where}, winner", detail)
    if first == second:
        raise BadRow("identical answers", row.where, "one of two equal texts was preferred; drop the row")
    ranks = (1, 2) if winner == "model_a" else (2, 1)
    judgement = Judgement("human", judge, None, batch)
    return Ranking(prompts[0], (first, second), ranks, (True, True), models, origin, judgement, shown=(1, 2))


def _models(example: PairExample) -> tuple[str, ...]:
    version = example.judgement.policy_version if example.judgement else None
    models = tuple((version or "").split(_BOTH))
    return models if len(models) == 2 else ()


def _told(judgement: Judgement | None) -> dict[str, Any]:
    if judgement is None:
        return {}
    told: dict[str, Any] = {"judge": judgement.labeler}
    if judgement.batch in (_SHOWN, _HIDDEN):
        told["anony"] = judgement.batch == _HIDDEN
    return {key: value for key, value in told.items() if value is not None}
