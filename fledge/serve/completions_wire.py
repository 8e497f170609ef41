"""The wire types of /v1/completions, and what becomes of each of its fields.

Source: openapi 2.3.0, `CreateCompletionRequest`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fledge.serve.chat_wire import EXTENSION_FIELDS, SAMPLING_FIELDS, Sampling, TokenCount
from fledge.serve.wire import Answer, FieldRule

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=2048)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=2048)]
# Of the union's types the first that fits is taken; a list of numbers is one prompt.
TextsOrTokens = Annotated[str | Tokens | Texts | TokenLists, Field(union_mode="left_to_right")]


class CompletionRequest(Sampling):
    prompt: TextsOrTokens | None = None
    suffix: str | None = None
    max_tokens: TokenCount | None = 16
    best_of: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]


COMPLETION_FIELDS = (
    *SAMPLING_FIELDS,
    FieldRule(
        "prompt",
        "honoured",
        "a text, tokens, or a list of either; a text begins a document, tokens stand alone",
    ),
    FieldRule("suffix", "honoured", "for models that were trained to fill in; others refuse it"),
    FieldRule("max_tokens", "honoured", "16 if not given; with 0 and `echo` the prompt alone is scored"),
    FieldRule("best_of", "honoured", "by mean log-probability; not with `stream`. 0 is as if not given"),
    FieldRule("echo", "honoured", "the prompt stands before the answer, with `logprobs` it has its own"),
    FieldRule(
        "logprobs",
        "honoured",
        "of the model's own distribution, before temperature and penalties; of every token, the last one too",
    ),
    *EXTENSION_FIELDS,
)


def as_prompts(given: TextsOrTokens | None) -> list[str | list[int]]:
    """The prompts one by one; without any, the empty text."""
    if given is None or isinstance(given, str):
        return [given or ""]
    if isinstance(given[0], int):
        return [given]
    return list(given)
