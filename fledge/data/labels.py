"""Labels: rankings of K answers, ratings and single verdicts, of humans, models and rules, in one typed JSONL.

    {"type": "ranking", "prompt": [...], "completions": [...], "ranks": [1, 2, 2, 4], "makers": [...], ...}
    {"type": "pair", "prompt": [...], "completions": [chosen, rejected], "probability": 0.6, ...}
    {"type": "verdict", "prompt": [...], "completion": "...", "label": true, "probability": 0.9, ...}
    {"type": "rating", "prompt": [...], "completion": "...", "rating": 7, "flags": [...], ...}

Without "type" a line with "ranks" is a ranking. Rank 1 is best and equal ranks are ties; a ranking needs two answers
and two different ranks. Each line may carry who judged (feedback.py) and its origin as `source`, `id`, `licence`; a
ranking also `logprobs` (of each answer's tokens), `shown` (the place of each) and `ended`. No standard exists for
rankings; the nearest are OpenAssistant's `rank` and InstructGPT's K answers a prompt (Ouyang et al. 2022, section 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

from fledge.data.feedback import (
    FeedbackExample,
    cannot_write,
    judgement_record,
    probability_record,
    read_judgement,
    read_probability,
)
from fledge.data.messages import read_tools, read_turns, require_prompt, write_messages, write_tools
from fledge.data.records import BadRow, Intake, Row, each, kind_of
from fledge.types import Conversation, PairExample, Provenance, Ranking, RatedExample, UnpairedExample

TYPES = ("ranking", "pair", "verdict", "rating")


def recognises(record: Mapping[str, Any]) -> bool:
    """A line that names its type, or a ranking."""
    return "prompt" in record and (record.get("type") in TYPES or {"completions", "ranks"} <= set(record))


def read(rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]:
    """An example a line."""
    yield from each(rows, intake, lambda row: [_example(row, row.provenance(intake))])


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """Lines that `read` reads as the same examples; `DataError` for what is no label."""
    for example in examples:
        origin = example.provenance
        yield {**_record(example), "source": origin.source, "id": origin.id, "licence": origin.licence}


def pairs_of(ranking: Ranking) -> list[PairExample]:
    """Every two answers of which one is ranked better: at most K(K-1)/2 pairs, the better one first; ties give none."""
    pairs = []
    for i, j in combinations(range(len(ranking.ranks)), 2):
        if ranking.ranks[i] == ranking.ranks[j]:
            continue
        best, worst = (i, j) if ranking.ranks[i] < ranking.ranks[j] else (j, i)
        origin = ranking.provenance
        shown = None
        if ranking.shown is not None:
            shown = "chosen" if ranking.shown[best] < ranking.shown[worst] else "rejected"
        pair = PairExample(
            ranking.prompt,
            ranking.completions[best],
            ranking.completions[worst],
            Provenance(origin.source, f"{origin.id}#{best}>{worst}", origin.licence),
            judgement=ranking.judgement,
            shown_first=shown,  # type: ignore[arg-type]  # mypy widens the literals of a conditional to str
        )
        pairs.append(pair)
    return pairs


def checked_ranks(ranks: list[int], num_completions: int, where: str) -> tuple[int, ...]:
    """Ranks that a reward model can learn from: one an answer, at least two answers, not all of them tied."""
    if len(ranks) != num_completions:
        detail = f"{num_completions} completions and {len(ranks)} ranks, expected one each; mend or drop the row"
        raise BadRow("lengths differ", where, detail)
    if num_completions < 2:
        raise BadRow("one completion", where, "nothing is compared, expected two or more; drop the row")
    if len(set(ranks)) < 2:
        raise BadRow("all answers tie", where, "a ranking needs two different ranks; drop the row")
    return tuple(ranks)


def _example(row: Row, origin: Provenance) -> FeedbackExample:
    kind = row.record.get("type") or "ranking"
    if kind not in TYPES:
        raise BadRow("unknown type", row.where, f"{kind_of(kind)}, expected one of {', '.join(TYPES)}; mend it")
    messages = read_turns(row, "prompt", "user")
    require_prompt(messages, f"{row.where}, prompt")
    prompt = Conversation(messages, read_tools(row))
    if kind == "ranking":
        return _ranking(row, prompt, origin)
    if kind == "pair":
        return _pair(row, prompt, origin)
    answer, judgement = row.text("completion"), read_judgement(row, default=None)
    if kind == "verdict":
        return UnpairedExample(prompt, answer, row.flag("label"), origin, read_probability(row), judgement)
    flags = tuple(row.checked(flag, "flags") for flag in row.items("flags")) if row.has("flags") else ()
    return RatedExample(prompt, answer, row.number("rating"), origin, flags, row.optional_text("maker"), judgement)


def _ranking(row: Row, prompt: Conversation, origin: Provenance) -> Ranking:
    completions = _texts(row, "completions")
    count = len(completions)
    ranks = checked_ranks([_whole(row, rank, "ranks") for rank in row.items("ranks")], count, row.where)
    judgement = read_judgement(row, default=None)
    version = judgement.policy_version if judgement else None
    makers = _texts(row, "makers") if row.has("makers") else (version or "unknown",) * count
    ended = tuple(row.flag_of(v, "ended") for v in row.items("ended")) if row.has("ended") else (True,) * count
    shown = tuple(_whole(row, v, "shown") for v in row.items("shown")) if row.has("shown") else None
    logprobs = _logprobs(row) if row.has("logprobs") else None
    for key, values in (("makers", makers), ("ended", ended), ("shown", shown), ("logprobs", logprobs)):
        if values is not None and len(values) != count:
            detail = f"{count} completions and {len(values)} of {key}, expected one each; mend or drop the row"
            raise BadRow("lengths differ", row.where, detail)
    return Ranking(prompt, completions, ranks, ended, makers, origin, judgement, logprobs, shown)


def _pair(row: Row, prompt: Conversation, origin: Provenance) -> PairExample:
    completions = _texts(row, "completions")
    if len(completions) != 2:
        raise BadRow("not two answers", row.where, f"a pair has 2 completions, got {len(completions)}; drop the row")
    if completions[0] == completions[1]:
        raise BadRow("identical answers", row.where, "both completions are the same text; drop the row")
    scores = tuple(row.number_of(value, "scores") for value in row.items("scores")) if row.has("scores") else None
    shown = tuple(_whole(row, v, "shown") for v in row.items("shown")) if row.has("shown") else None
    if any(values is not None and len(values) != 2 for values in (scores, shown)):
        raise BadRow("lengths differ", row.where, "a pair has two scores and two places shown; mend or drop the row")
    return PairExample(
        prompt,
        *completions,
        origin,
        read_probability(row),
        row.optional_number("margin"),
        (scores[0], scores[1]) if scores else None,
        read_judgement(row, default=None),
        None if shown is None else "chosen" if shown[0] < shown[1] else "rejected",
    )


def _texts(row: Row, key: str) -> tuple[str, ...]:
    return tuple(row.checked(value, f"{key}[{place}]") for place, value in enumerate(row.items(key)))


def _whole(row: Row, value: Any, key: str) -> int:
    number = row.number_of(value, key)
    if number != int(number) or number < 1:
        raise BadRow("wrong type", f"{row.where}, {key}", f"expected whole numbers from 1, got {number:g}; mend it")
    return int(number)


def _logprobs(row: Row) -> tuple[tuple[float, ...], ...]:
    lists = [row.object_of({"of": value}, f"logprobs[{n}]") for n, value in enumerate(row.items("logprobs"))]
    return tuple(tuple(each.number_of(value, "of") for value in each.items("of")) for each in lists)


def _record(example: FeedbackExample) -> dict[str, Any]:
    if not isinstance(example, Ranking | PairExample | UnpairedExample | RatedExample):
        raise cannot_write(example, "labels")
    prompt = {"prompt": write_messages(example.prompt.messages), **write_tools(example.prompt)}
    judged = judgement_record(example.judgement)
    if isinstance(example, Ranking):
        return {"type": "ranking", **prompt, **_ranking_record(example), **judged}
    if isinstance(example, PairExample):
        return {"type": "pair", **prompt, **_pair_record(example), **judged}
    if isinstance(example, UnpairedExample):
        verdict = {"completion": example.completion, "label": example.is_desirable}
        return {"type": "verdict", **prompt, **verdict, **probability_record(example.probability), **judged}
    rating: dict[str, Any] = {"completion": example.completion, "rating": example.rating}
    flags = {"flags": list(example.flags)} if example.flags else {}
    maker = {"maker": example.maker} if example.maker else {}
    return {"type": "rating", **prompt, **rating, **flags, **maker, **judged}


def _ranking_record(ranking: Ranking) -> dict[str, Any]:
    record: dict[str, Any] = {
        "completions": list(ranking.completions),
        "ranks": list(ranking.ranks),
        "makers": list(ranking.makers),
    }
    if not all(ranking.ended):
        record["ended"] = list(ranking.ended)
    if ranking.logprobs is not None:
        record["logprobs"] = [list(values) for values in ranking.logprobs]
    if ranking.shown is not None:
        record["shown"] = list(ranking.shown)
    return record


def _pair_record(pair: PairExample) -> dict[str, Any]:
    record: dict[str, Any] = {"completions": [pair.chosen, pair.rejected], **probability_record(pair.probability)}
    if pair.margin is not None:
        record["margin"] = pair.margin
    if pair.scores is not None:
        record["scores"] = list(pair.scores)
    if pair.shown_first is not None:
        record["shown"] = [1, 2] if pair.shown_first == "chosen" else [2, 1]
    return record
