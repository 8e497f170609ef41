"""The wire types of /v1/chat/completions, and what becomes of each of its fields.

Source: openapi 2.3.0, `CreateChatCompletionRequest`. `CHAT_FIELDS` is the table that docs/api.md shows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints

from fledge.serve.wire import Answer, FieldRule, Metadata, Name, Wire, extras_of

Stop = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class ContentPart(Wire):
    """Text, or a refusal of the assistant's; other kinds are known by their names and refused."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Wire):
    model_config = ConfigDict(extra="allow")
    name: str
    arguments: str


class ToolCall(Wire):
    model_config = ConfigDict(extra="allow")
    id: str
    type: str = "function"
    function: FunctionCall | None = None


class ChatMessage(Wire):
    """Of the assistant's messages client libraries send back what they noted in them; other messages have no more
    than is named here."""

    model_config = ConfigDict(extra="allow")
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    refusal: str | None = None
    audio: dict[str, Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    # What an assistant's message holds when a client sends back what it got.
    annotations: list[Any] | None = None


class FunctionSpec(Wire):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Wire):
    model_config = ConfigDict(extra="allow")
    type: str
    function: FunctionSpec | None = None


class JsonSchemaSpec(Wire):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaSpec | None = None


class ModerationMode(Wire):
    mode: Literal["score", "block"]


class ModerationPolicy(Wire):
    input: ModerationMode | None = None
    output: ModerationMode | None = None


class ModerationWish(Wire):
    """Moderation of this request and its answer; without a policy both are scored."""

    model: str
    policy: ModerationPolicy | None = None


class StreamOptions(Wire):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None  # beyond the published document, named as vLLM names it

    @property
    def is_counted_throughout(self) -> bool:
        return bool(self.include_usage and self.continuous_usage_stats)


class Sampling(Wire):
    """What chat and plain completions share."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Beyond the published document, named as vLLM names them.
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None


TokenCount = Annotated[int, Field(ge=0, lt=2**31)]


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    metadata: Metadata | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: TokenCount | None = None
    max_tokens: TokenCount | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionSpec], Field(min_length=1, max_length=128)] | None = None
    function_call: str | dict[str, Any] | None = None
    store: bool | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    moderation: ModerationWish | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    service_tier: str | None = None
    web_search_options: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=64)] | None = None

    @property
    def inert_parts(self) -> list[str]:
        """Parts of honoured fields that are without effect here, messages aside."""
        schema = None if self.response_format is None else self.response_format.json_schema
        found = [] if schema is None or schema.description is None else ["response_format.json_schema.description"]
        for i, tool in enumerate(self.tools or ()):
            found += extras_of(tool, "tools", f"tools[{i}]") if tool.type == "function" else []
        return found


class ChatUpdate(Wire):
    metadata: Metadata | None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    service_tier: str
    system_fingerprint: str
    metadata: dict[str, str] | None = None
    moderation: dict[str, Any] | None = None


def _only_text(modalities: Any) -> str | None:
    return None if modalities == ["text"] else "this server answers in text; the only modality is 'text'"


SAMPLING_FIELDS = (
    FieldRule("model", "honoured", "a model, one of its checkpoints, or an alias"),
    FieldRule("temperature", "honoured", "from 0, the likeliest token, to 2"),
    FieldRule("top_p", "honoured", "0 takes the likeliest token alone"),
    FieldRule("frequency_penalty", "honoured", ""),
    FieldRule("presence_penalty", "honoured", ""),
    FieldRule("logit_bias", "honoured", "by token id; see /tokenize"),
    FieldRule("seed", "honoured", "the same request with the same seed gets the same answer from the same model"),
    FieldRule("stop", "honoured", "up to 4 texts, found across the borders of tokens and never part of the answer"),
    FieldRule("n", "honoured", ""),
    FieldRule("stream", "honoured", ""),
    FieldRule(
        "stream_options",
        "honoured",
        "usage in the last event (in each, with vLLM's `continuous_usage_stats`), padding against guessing lengths; "
        "without `stream` it has nothing to act on",
    ),
    FieldRule("user", "inert", "the key says who asks"),
)
EXTENSION_FIELDS = (
    FieldRule("top_k", "extension", "draw from the k likeliest tokens"),
    FieldRule("min_p", "extension", "drop tokens below this share of the likeliest one's probability"),
    FieldRule("repetition_penalty", "extension", "Keskar et al. 2019"),
    FieldRule("min_tokens", "extension", "the answer does not end before"),
    FieldRule("ignore_eos", "extension", "the answer does not end before `max_tokens`: for measuring speed"),
)
CHAT_FIELDS = (
    *SAMPLING_FIELDS,
    FieldRule(
        "messages",
        "honoured",
        "text; parts of other kinds are refused by name. What a client notes in the assistant's own messages, or in a "
        "part beside its text, is inert",
    ),
    FieldRule("metadata", "honoured", "kept with a stored completion"),
    FieldRule("logprobs", "honoured", "of the model's own distribution, before temperature and penalties"),
    FieldRule("top_logprobs", "honoured", "needs `logprobs`"),
    FieldRule("max_completion_tokens", "honoured", "without it, what the context leaves"),
    FieldRule("max_tokens", "honoured", "the deprecated name; `max_completion_tokens` goes before it"),
    FieldRule(
        "response_format",
        "honoured",
        "enforced while the answer is drawn; a schema that cannot be is refused",
    ),
    FieldRule("tools", "honoured", "functions; their arguments are held to the schema. Custom tools are refused"),
    FieldRule("tool_choice", "honoured", "enforced while the answer is drawn"),
    FieldRule("parallel_tool_calls", "honoured", ""),
    FieldRule("functions", "honoured", "the deprecated form; `tools` goes before it"),
    FieldRule("function_call", "honoured", "the deprecated form; `tool_choice` goes before it"),
    FieldRule("store", "honoured", ""),
    FieldRule("modalities", "honoured", "text only", _only_text),
    FieldRule("audio", "inert", "says how audio would sound; the answers are text"),
    FieldRule("prediction", "inert", "only ever a matter of speed; the answer is the same"),
    FieldRule(
        "moderation", "honoured", "by the server's moderation model, if it has one; `block` ends what is flagged"
    ),
    FieldRule("reasoning_effort", "inert", "the models here were not taught to reason apart from the answer"),
    FieldRule("verbosity", "inert", "the models here were not taught it; ask for a length in words"),
    FieldRule("service_tier", "inert", "there is one tier, 'default'"),
    FieldRule("web_search_options", "inert", "the server reaches no network, so nothing is searched"),
    FieldRule("prompt_cache_key", "inert", "equal beginnings of prompts are found without it"),
    FieldRule("prompt_cache_retention", "inert", "the cache keeps what it has room for"),
    FieldRule("prompt_cache_options", "inert", "the cache keeps what it has room for"),
    FieldRule("safety_identifier", "inert", "the key says who asks"),
    *EXTENSION_FIELDS,
)
