"""The wire types of /v1/responses, and what becomes of each field.

Source: openapi 2.3.0, `CreateResponse`, `Response`, `InputItem`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints

from fledge.serve.chat_wire import ModerationWish, Sampling, TokenCount
from fledge.serve.wire import Answer, FieldRule, IncludeName, Metadata, Name, Wire, extras_of

LOGPROBS = "message.output_text.logprobs"  # what of `include` there is


class InputPart(Wire):
    """A part of a message; what is no text is known by its name and refused."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None
    refusal: str | None = None


ItemId = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00/]*$")]


class InputItem(Wire):
    """Something said or called before."""

    model_config = ConfigDict(extra="allow")
    type: str | None = None
    id: ItemId | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    encrypted_content: Annotated[str, StringConstraints(max_length=20971520)] | None = None

    @property
    def kind(self) -> str:
        """Its type. Without one it is a message, or a reference if all it has is an id."""
        return self.type or ("item_reference" if self.model_fields_set == {"id"} else "message")


class ResponseTool(Wire):
    model_config = ConfigDict(extra="allow")
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Wire):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseStreamOptions(Wire):
    include_obfuscation: bool | None = None


class ConversationRef(Wire):
    id: str


def notes_in(items: Sequence[InputItem], place: str) -> list[str]:
    """What items hold that is read by nobody, and so without effect."""
    found = []
    for i, item in enumerate(items):
        found += extras_of(item, place, f"{place}[{i}]")
        for k, part in enumerate(item.content if isinstance(item.content, list) else ()):
            found += extras_of(part, f"{place}.content", f"{place}[{i}].content[{k}]")
    return found


class EarlierContext(Wire):
    """What is asked now, and where to find what came before: common to a response, its count and its compaction."""

    input: str | list[InputItem] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationRef | None = None

    @property
    def inert_parts(self) -> list[str]:
        """Parts of honoured fields that are without effect here."""
        return notes_in(self.input, "input") if isinstance(self.input, list) else []


class ResponseContext(EarlierContext):
    """What decides which tokens the model reads: common to a response and to counting its tokens."""

    model: Name | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @property
    def inert_parts(self) -> list[str]:
        found = super().inert_parts
        for i, tool in enumerate(self.tools or ()):
            found += extras_of(tool, "tools", f"tools[{i}]")
        if self.text is not None and self.text.verbosity is not None:
            found.append("text.verbosity")
        if self.text is not None and self.text.format is not None and self.text.format.description is not None:
            found.append("text.format.description")
        return found


class CountRequest(ResponseContext):
    personality: str | None = None


class ResponseRequest(ResponseContext):
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_output_tokens: TokenCount | None = None
    max_tool_calls: TokenCount | None = None
    metadata: Metadata | None = None
    include: list[IncludeName] | None = None
    prompt: dict[str, Any] | None = None
    moderation: ModerationWish | None = None
    context_management: list[dict[str, Any]] | None = None
    image: dict[str, Any] | None = None
    access_programs: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=64)] | None = None
    user: str | None = None

    @property
    def inert_parts(self) -> list[str]:
        idle = [f"include.{name}" for name in dict.fromkeys(self.include or ()) if name != LOGPROBS]
        return [*super().inert_parts, *idle]

    def sampling(self, model: str) -> Sampling:
        return Sampling(model=model, temperature=self.temperature, top_p=self.top_p)


class ResponseObject(Answer):
    id: str
    object: Literal["response"]
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None


INPUT_FIELD = FieldRule(
    "input",
    "honoured",
    "texts, calls and their results, references to what stored responses said; other items are refused by name, what "
    "else an item holds is inert",
)
CONTEXT_FIELDS = (
    FieldRule("model", "honoured", "without it, the first model that the server was started with"),
    INPUT_FIELD,
    FieldRule("instructions", "honoured", ""),
    FieldRule("previous_response_id", "honoured", ""),
    FieldRule("conversation", "honoured", "its items come first, and what is said is added to it"),
    FieldRule("tools", "honoured", "functions; built-in tools are refused by name"),
    FieldRule("tool_choice", "honoured", "enforced while the answer is drawn"),
    FieldRule("parallel_tool_calls", "honoured", ""),
    FieldRule("text", "honoured", "the format is enforced; `verbosity` is inert"),
    FieldRule("reasoning", "inert", "the models here were not taught to reason apart from the answer"),
    FieldRule("truncation", "honoured", "`auto` drops the oldest messages that are not the system's"),
)
COUNT_FIELDS = (
    *CONTEXT_FIELDS,
    FieldRule("personality", "inert", "the models here were not taught it"),
)
RESPONSE_FIELDS = (
    *CONTEXT_FIELDS,
    FieldRule("background", "honoured", "needs `store`"),
    FieldRule("store", "honoured", "true if not given"),
    FieldRule("stream", "honoured", ""),
    FieldRule("stream_options", "honoured", ""),
    FieldRule("temperature", "honoured", ""),
    FieldRule("top_p", "honoured", ""),
    FieldRule("top_logprobs", "honoured", "with `message.output_text.logprobs` in `include`"),
    FieldRule("max_output_tokens", "honoured", "without it, what the context leaves"),
    FieldRule("max_tool_calls", "inert", "counts built-in tools, of which there are none"),
    FieldRule("metadata", "honoured", ""),
    FieldRule("include", "honoured", "log-probabilities; what belongs to tools that there are none of is inert"),
    FieldRule("prompt", "refused", "there are no stored prompts; send the text"),
    FieldRule(
        "moderation", "honoured", "by the server's moderation model, if it has one; `block` ends what is flagged"
    ),
    FieldRule("context_management", "inert", "nothing is compacted; `truncation` says what happens when it is full"),
    FieldRule("image", "inert", "says how images would be read; there are none"),
    FieldRule("access_programs", "inert", "there are none"),
    FieldRule("prompt_cache_key", "inert", "equal beginnings of prompts are found without it"),
    FieldRule("prompt_cache_retention", "inert", "the cache keeps what it has room for"),
    FieldRule("prompt_cache_options", "inert", "the cache keeps what it has room for"),
    FieldRule("service_tier", "inert", "there is one tier, 'default'"),
    FieldRule("safety_identifier", "inert", "the key says who asks"),
    FieldRule("user", "inert", "the key says who asks"),
)
