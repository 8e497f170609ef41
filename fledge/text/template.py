"""Chat templates of imported models: conversations <-> tokens as the model's makers wrote them down, in Jinja.

Layer 2. `TemplateRenderer` stands wherever `ChatRenderer` does. What a user writes never reaches the template: it runs
in text/sandbox.py over placeholders, its own text is encoded with its special tokens by id, and the contents are
encoded apart, so that no content becomes a special token, opens a turn or closes one. What a template does to a
content still happens where it shows: white space that it trims is trimmed, and tags such as `</think>` that it looks
for it finds, unless they are special tokens. The variables are those of `transformers`' `apply_chat_template`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from typing import Any

from fledge.config import config_hash
from fledge.errors import TokenizerError, UserError
from fledge.text.sandbox import ChatProgram
from fledge.text.tokenizer import Tokenizer
from fledge.text.tools import Tool, show_tools
from fledge.text.veil import PRIVATE, Veil
from fledge.types import CallPart, Conversation, Message, Rendered, Role, Termination

_TAG = re.compile(r"</?\w+>")


@dataclass(frozen=True)
class ImportedTemplate:
    """A chat template with what it needs to know of its tokenizer.

    `source` is Jinja. `bos_token` and `eos_token` are what it sees under these names. At `stops` generation ends, and
    the one that ends a turn is found by rendering one. Tokens have their makers' names here; `names` maps those that
    our tokenizer calls otherwise to our name. With `begins` their tokenizer puts `bos_token` before every text.
    """

    source: str
    bos_token: str | None = None
    eos_token: str | None = None
    stops: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    begins: bool = False


@dataclass(frozen=True)
class _Run:
    """A stretch of rendered ids. `message` is whose content it is, None for the template's own text."""

    ids: tuple[int, ...]
    message: int | None


class TemplateRenderer:
    """Renders and parses conversations with an imported template; the interface of `ChatRenderer`.

    `end_id` ends the assistant's turn. `TokenizerError` if the template cannot be read or names tokens that the
    tokenizer lacks; `UserError` from `prompt` and `render` for a conversation that the template does not take.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ImportedTemplate, now: Callable[[], datetime] = datetime.now
    ) -> None:
        if PRIVATE.search(template.source):
            raise TokenizerError("the chat template holds private-use characters (U+E000 to U+E0FF)")
        self.tokenizer = tokenizer
        self.template = template
        self.hash = config_hash(template)
        self._program = ChatProgram(template.source, now)
        self._special = self._special_names()
        self._special_pattern = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))))
        self._tags = frozenset(_TAG.findall(template.source)) - self._special.keys()
        self._asks_for_calls = "tool_calls" in template.source
        stops = {self._id_of(name) for name in template.stops}
        self.end_id = self._end_of_turn(stops)
        self.stop_ids = frozenset({*stops, self.end_id, tokenizer.end_of_text_id})

    def prompt(self, conversation: Conversation) -> tuple[int, ...]:
        """The conversation with the assistant's turn opened."""
        return _joined(self._runs(self._shown(conversation), is_open=True))

    def render(self, conversation: Conversation, *, ended: bool = True) -> Rendered:
        """The whole conversation. The mask is true on what the assistant says and the token that ends its turn.

        `UserError` if what it says does not follow on the prompt for it, or is not followed by `end_id`: a template
        that rewrites what was said before can be talked with, but nothing can be learned from it.
        """
        conversation = self._shown(conversation)
        messages = conversation.messages
        runs = list(self._runs(conversation, is_open=False))
        ids = list(_joined(runs))
        mask = [False] * len(ids)
        end = len(ids)
        for place, message in enumerate(messages):
            if message.role == "assistant":
                start = self._prefix_length(replace(conversation, messages=messages[:place]), ids)
                end = self._turn_end(runs, place, ids, start)
                mask[start : end + 1] = [message.is_learned] * (end + 1 - start)
        if not ended and messages and messages[-1].role == "assistant":
            ids, mask = ids[:end], mask[:end]
        return Rendered(tuple(ids), tuple(mask))

    def parse(self, ids: Sequence[int]) -> tuple[Message, Termination]:
        """The last turn in `ids`: a rendered conversation, a prompt with what was generated after it, or that alone
        (then it is the assistant's). The text goes to the first framing token or to the end of `ids`."""
        start = 0
        role: Role = "assistant"
        for name, opening in self._openings.items():
            place = _last_place(ids, opening)
            if place is not None and (place + len(opening), len(opening)) > (
                start,
                len(self._openings.get(role, ())),
            ):
                start, role = place + len(opening), name
        framing = self.tokenizer.framing_ids
        stop = next((i for i in range(start, len(ids)) if ids[i] in framing), len(ids))
        has_ended = stop < len(ids) and ids[stop] == self.end_id
        text = ids[start:stop]
        closing = self._closings.get(role, ())
        if has_ended and closing and tuple(text[-len(closing) :]) == closing:
            text = text[: -len(closing)]
        termination = Termination.END_OF_TURN if has_ended else Termination.TRUNCATED
        return Message.of(role, self.tokenizer.decode(text)), termination

    # Rendering.

    def _shown(self, conversation: Conversation) -> Conversation:
        """The conversation with its tools in the system message, for a template that knows no tools."""
        return conversation if "tools" in self.template.source else show_tools(conversation)

    def _runs(self, conversation: Conversation, *, is_open: bool) -> Iterator[_Run]:
        """The template's output, cut into its own text and the contents, each encoded apart."""
        veil = Veil(self._special_pattern, self._tags)
        messages = [self._bare(veil, number, message) for number, message in enumerate(conversation.messages)]
        tools = [veil.json(Tool.of(json.loads(tool)).to_json()) for tool in conversation.tools] or None
        variables = {**self._variables(messages, is_open=is_open), "tools": tools}

        def without_margins() -> str:
            bare = [{**message, "content": veil.without_margins(message["content"])} for message in messages]
            return self._program.render({**variables, "messages": bare})

        text = self._program.render(variables)
        lifted = list(veil.lift(text, without_margins))
        yield from self._encoded(lifted if self.tokenizer.opening is None else self._spaced(lifted, conversation))

    def _encoded(self, lifted: Iterable[tuple[str, int | None]]) -> Iterator[_Run]:
        """The ids of texts; of those that follow on a special token as the tokenizer opens a text there."""
        is_opening = True
        for text, number in lifted:
            place = 0
            for match in self._special_pattern.finditer(text) if number is None else ():
                before = self.tokenizer.encode(text[place : match.start()], within=not is_opening)
                yield _Run((*before, self._special[match[0]]), None)
                place, is_opening = match.end(), self.tokenizer.opening == "always"
            yield _Run(tuple(self.tokenizer.encode(text[place:], within=not is_opening)), number)
            is_opening = is_opening and place == len(text)

    def _spaced(
        self, lifted: Sequence[tuple[str, int | None]], conversation: Conversation
    ) -> Iterator[tuple[str, int | None]]:
        """The spaces that the template writes before a content go to that content: these tokenizers spell a word with
        the space before it. Not before an answer that the template asks for with the space already written."""
        spaces = ""
        for place, (text, number) in enumerate(lifted):
            following = lifted[place + 1][1] if place + 1 < len(lifted) else None
            is_answer = (
                following is not None and following >= 0 and conversation.messages[following].role == "assistant"
            )
            own, moved = text.rstrip(" "), ""
            if number is None and following is not None and not (is_answer and self._asks_with_space):
                moved = text[len(own) :]
            yield spaces + text[: len(text) - len(moved)], number
            spaces = moved

    def _variables(self, messages: Sequence[Mapping[str, Any]], *, is_open: bool) -> dict[str, Any]:
        """What a template sees, as `transformers` names it."""
        return {
            "messages": messages,
            "tools": None,
            "documents": None,
            "bos_token": self.template.bos_token or "",
            "eos_token": self.template.eos_token or "",
            "add_generation_prompt": is_open,
        }

    def _bare(self, veil: Veil, number: int, message: Message) -> dict[str, Any]:
        """A message as the template sees it. Calls are given apart to a template that asks for them."""
        calls = [part for part in message.parts if isinstance(part, CallPart)] if self._asks_for_calls else []
        text = "".join(part.text for part in message.parts if part not in calls)
        if message.role == "assistant" and not text.strip():
            text = ""  # white space alone would melt into the template's own
        bare: dict[str, Any] = {"role": message.role, "content": veil.content(number, text, message.role)}
        if calls:
            bare["tool_calls"] = [veil.json(_as_json(call), number) for call in calls]
        named = {"name": message.name, "tool_call_id": message.call_id}
        return {**bare, **{key: veil.json(value) for key, value in named.items() if value is not None}}

    def _prefix_length(self, before: Conversation, ids: Sequence[int]) -> int:
        prompt = self.prompt(before)
        if tuple(ids[: len(prompt)]) != prompt:
            raise UserError(
                "the model's chat template writes a conversation otherwise than it asks for its answers, so that "
                "nothing can be learned from it; chat with the model, or train it with a template of fledge's"
            )
        return len(prompt)

    def _turn_end(self, runs: Sequence[_Run], message: int, ids: Sequence[int], start: int) -> int:
        """The place of the token that ends a message of the assistant's, which begins at `start`."""
        starts = _starts(runs)
        own = [starts[number] + len(run.ids) for number, run in enumerate(runs) if run.message == message]
        later = [starts[number] for number, run in enumerate(runs) if run.message is not None and run.message > message]
        # An empty answer has no run of its own.
        for place in range(max(own, default=start), min(later, default=len(ids))):
            if ids[place] == self.end_id:
                return place
        raise UserError(
            "the model's chat template does not end every answer with the same token, so that nothing can be learned "
            "from it; chat with the model, or train it with a template of fledge's"
        )

    # What the template says of itself, found by rendering small conversations.

    def _special_names(self) -> dict[str, int]:
        """Every special token by its maker's name, but for padding, which no template mentions (text/published.py)."""
        theirs = {ours: name for name, ours in self.template.names.items()}
        tokenizer = self.tokenizer
        ids = {tokenizer.pieces([i])[0]: i for i in tokenizer.special_ids if i != tokenizer.pad_id}
        return {theirs.get(name, name): token_id for name, token_id in ids.items()}

    def _id_of(self, name: str) -> int:
        return self.tokenizer.special_id(self.template.names.get(name, name))

    def _tried(self, *roles: Role, is_open: bool = False) -> list[_Run]:
        """The runs of a conversation of one-word messages by `roles`; none if the template does not take it."""
        try:
            return list(self._runs(Conversation.of(*((role, "a") for role in roles)), is_open=is_open))
        except UserError:
            return []

    def _end_of_turn(self, stops: Set[int]) -> int:
        """The first special token after an answer, else a stop, else the end of a text."""
        runs = self._tried("user", "assistant")
        after = next((number for number, run in enumerate(runs) if run.message == 1), len(runs)) + 1
        special = self.tokenizer.special_ids
        following = (token_id for run in runs[after:] for token_id in run.ids if token_id in special)
        return next(following, min(stops, default=self.tokenizer.end_of_text_id))

    @cached_property
    def _asks_with_space(self) -> bool:
        """Whether the text that asks for an answer ends with a space."""
        try:
            return self._program.render(self._variables([{"role": "user", "content": "a"}], is_open=True)).endswith(" ")
        except UserError:
            return False

    @cached_property
    def _openings(self) -> dict[Role, tuple[int, ...]]:
        """The ids that open each role's turn, from a special token on; without one a turn cannot be found again."""
        found: dict[Role, tuple[int, ...]] = {}
        tried: tuple[tuple[Role, tuple[Role, ...]], ...] = (
            ("system", ("system", "user")),
            ("user", ("user", "assistant", "user")),
            ("tool", ("user", "assistant", "tool")),
        )
        for role, roles in tried:
            place = roles.index(role, 1) if role != "system" else 0
            runs = self._tried(*roles)
            found[role] = self._opening(_between(runs, place - 1 if place else None, place))
        found["assistant"] = self._opening(_between(self._tried("user", is_open=True), 0, None))
        return {role: ids for role, ids in found.items() if ids}

    @cached_property
    def _closings(self) -> dict[Role, tuple[int, ...]]:
        """The ids of the template's own that stand between a message and the end of its turn."""
        found = {}
        for place, role in ((1, "assistant"), (2, "tool"), (2, "user")):
            runs = self._tried(*("user", "assistant", role)[: place + 1]) if place == 2 else self._tried("user", role)  # type: ignore[arg-type]
            after = _between(runs, place, None)
            found[role] = after[: after.index(self.end_id)] if self.end_id in after else ()
        return found  # type: ignore[return-value]

    def _opening(self, between: tuple[int, ...]) -> tuple[int, ...]:
        """What opens a turn, of what stands between two contents: the end of the turn before is left out."""
        if self.end_id in between:
            between = between[len(between) - between[::-1].index(self.end_id) :]
        special = self.tokenizer.special_ids
        places = [place for place, token_id in enumerate(between) if token_id in special]
        bos = self.template.bos_token
        if len(places) > 1 and bos is not None and between[places[0]] == self._special.get(bos):
            del places[0]
        return between[places[0] :] if places else ()


def _as_json(call: CallPart) -> dict[str, Any]:
    """A call in OpenAI's form, its arguments as a mapping where they are one, as templates of `transformers` expect."""
    try:
        arguments: Any = json.loads(call.arguments)
    except ValueError:
        arguments = call.arguments
    about = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return about if call.id is None else {**about, "id": call.id}


def _joined(runs: Iterable[_Run]) -> tuple[int, ...]:
    return tuple(token_id for run in runs for token_id in run.ids)


def _starts(runs: Sequence[_Run]) -> list[int]:
    return [0, *accumulate(len(run.ids) for run in runs)]


def _between(runs: Sequence[_Run], first: int | None, second: int | None) -> tuple[int, ...]:
    """The ids between the contents of two messages, None for the beginning or the end; none if one is not there."""
    owners = [run.message for run in runs]
    if not all(message is None or message in owners for message in (first, second)):
        return ()
    start = 0 if first is None else len(owners) - owners[::-1].index(first)
    end = len(runs) if second is None else owners.index(second)
    return _joined(runs[start:end])


def _last_place(ids: Sequence[int], wanted: tuple[int, ...]) -> int | None:
    """Where `wanted` stands last in `ids`."""
    places = range(len(ids) - len(wanted), -1, -1)
    return next((place for place in places if tuple(ids[place : place + len(wanted)]) == wanted), None)
