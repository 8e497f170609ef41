"""Summarize-from-feedback: comparisons of two summaries of a post, and ratings of single ones on axes.

`{"info": {"id", "post", "title", "subreddit"}, "summaries": [{"text", "policy"}, ...], "choice", "worker", "batch",
"split", "extra": {"confidence"}}`, or `"summary": {"text", "policy", "axes": {"overall": 1..7}}` instead. A comparison
becomes a ranking of two. The part of the published split stands in the source, as "user/train".
Source: Stiennon et al. 2020 (2009.01325) and its data; the prompt is the one of its code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.records import BadRow, Intake, Row, each
from fledge.types import Conversation, Judgement, Provenance, Ranking, RatedExample

_REDDIT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
_REDDIT_PARTS = re.compile(r"\ASUBREDDIT: r/([^\n]*)\n\nTITLE: ([^\n]*)\n\nPOST: (.*)\n\nTL;DR:\Z", re.DOTALL)
_NEWS = "Article: {article}\n\nTL;DR:"  # the CNN/DM part has articles and no titles
_NEWS_PARTS = re.compile(r"\AArticle: (.*)\n\nTL;DR:\Z", re.DOTALL)


def recognises(record: Mapping[str, Any]) -> bool:
    return "info" in record and ({"summaries", "choice"} <= set(record) or "summary" in record)


def read(rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]:
    """A ranking a comparison, a rated answer a rating."""
    yield from each(rows, intake, lambda row: [_rating(row, intake) if row.has("summary") else _ranking(row, intake)])


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """Rows; `DataError` for prompts that are not posts, and for rankings of more than two."""
    for example in examples:
        if isinstance(example, Ranking) and sorted(example.ranks) == [1, 2]:
            summaries = [
                {"text": text, "policy": maker} for text, maker in zip(example.completions, example.makers, strict=True)
            ]
            yield {"info": _info(example), "summaries": summaries, "choice": example.ranks.index(1), **_told(example)}
        elif isinstance(example, RatedExample):
            summary = {"text": example.completion, "policy": example.maker, "axes": {"overall": example.rating}}
            yield {"info": _info(example), "summary": summary, **_told(example)}
        else:
            raise cannot_write(example, "summaries", "it is neither a ranking of two nor a rating")


def _ranking(row: Row, intake: Intake) -> Ranking:
    summaries, choice = row.objects("summaries"), row.number("choice")
    if len(summaries) != 2 or choice not in (0, 1):
        detail = f"{len(summaries)} summaries and choice {choice:g}, expected two and 0 or 1; drop the row"
        raise BadRow("not two answers", row.where, detail)
    texts = tuple(each.text("text").strip() for each in summaries)
    if texts[0] == texts[1]:
        raise BadRow("identical answers", row.where, "both summaries are the same text; drop the row")
    makers = tuple(each.optional_text("policy") or "unknown" for each in summaries)
    ranks = (1, 2) if choice == 0 else (2, 1)
    return Ranking(
        _prompt(row), texts, ranks, (True, True), makers, _origin(row, intake), _judgement(row), shown=(1, 2)
    )


def _rating(row: Row, intake: Intake) -> RatedExample:
    summary = row.object("summary")
    rating, maker = summary.object("axes").number("overall"), summary.optional_text("policy")
    text = summary.text("text").strip()
    return RatedExample(_prompt(row), text, rating, _origin(row, intake), (), maker, _judgement(row))


def _prompt(row: Row) -> Conversation:
    info = row.object("info")
    if info.has("article"):
        text = _NEWS.format(article=info.text("article"))
    else:
        told = {key: info.text(key, may_be_empty=True) for key in ("subreddit", "title")}
        text = _REDDIT.format(post=info.text("post"), **told)
    return Conversation.of(("user", text))


def _judgement(row: Row) -> Judgement:
    extra = row.object("extra") if row.has("extra") else None
    confidence = extra.optional_number("confidence") if extra else None
    return Judgement("human", row.optional_text("worker"), confidence, row.optional_text("batch"))


def _origin(row: Row, intake: Intake) -> Provenance:
    split, info = row.optional_text("split"), row.object("info")
    source = f"{intake.source}/{split}" if split else intake.source
    return Provenance(source, info.optional_text("id") or row.identity, intake.licence)


def _info(example: Ranking | RatedExample) -> dict[str, Any]:
    text = example.prompt.messages[-1].text if len(example.prompt.messages) == 1 else ""
    if post := _REDDIT_PARTS.match(text):
        told = {"id": example.provenance.id, "subreddit": post[1], "title": post[2], "post": post[3]}
        return told
    if article := _NEWS_PARTS.match(text):
        return {"id": example.provenance.id, "article": article[1]}
    raise cannot_write(example, "summaries", "its prompt is no post to be summarised")


def _told(example: Ranking | RatedExample) -> dict[str, Any]:
    judgement = example.judgement or Judgement()
    _, slash, split = example.provenance.source.rpartition("/")
    told: dict[str, Any] = {"worker": judgement.labeler, "batch": judgement.batch, "split": split if slash else None}
    if judgement.confidence is not None:
        told["extra"] = {"confidence": judgement.confidence}
    return {key: value for key, value in told.items() if value is not None}
