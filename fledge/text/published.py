"""A published tokenizer with all that its makers say of it, and how it becomes ours. Layer 2.

What the formats read (a Hugging Face directory, a GGUF file) arrives here as one `PublishedTokenizer`;
`adopt_published` makes of it a `Tokenizer` and the `ImportedTemplate` that chats with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from fledge.errors import TokenizerError, UserError
from fledge.text.chat import ROLES, ChatRenderer, ChatTemplate
from fledge.text.foreign import MARKER, adopt_imported, give_back, parse
from fledge.text.sandbox import ChatProgram
from fledge.text.template import ImportedTemplate
from fledge.text.tokenizer import Tokenizer
from fledge.types import Role

# For models that come without a template. The first is what most chat models of its tokens were taught.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class PublishedTokenizer:
    """`data` is a tokenizer.json. Tokens go by their makers' names.

    `bos` begins a text if `begins` is true, `ends` are those at which generation stops, `pad` fills up rows and may be
    one of these. `template` is Jinja.
    """

    data: bytes
    bos: str | None = None
    ends: tuple[str, ...] = ()
    pad: str | None = None
    begins: bool = False
    template: str | None = None


def adopt_published(published: PublishedTokenizer, vocab_size: int) -> tuple[Tokenizer, ImportedTemplate]:
    """Our tokenizer and template for a model of `vocab_size` rows; `TokenizerError` if they do not belong together.

    A document begins with `bos` where its makers put it there, else with `<|endoftext|>` if there is such a token,
    else with the first of `ends`.
    """
    added = {token["content"]: token["special"] for token in parse(published.data)["added_tokens"]}
    document = published.bos if published.begins else None
    if document is None and added.get("<|endoftext|>"):
        document = "<|endoftext|>"
    document = document or next(iter(published.ends), published.bos)
    if document is None:
        special = [token for token, is_special in added.items() if is_special]
        raise TokenizerError(f"has no token that begins or ends a text; its special ones are {special}")
    source = published.template
    if source is None:
        source = CHATML if {"<|im_start|>", "<|im_end|>"} <= added.keys() else PLAIN
    used = {*published.ends, *_framing(added, published.bos, _written(source, published.bos))}
    data, names = adopt_imported(published.data, vocab_size, document, published.pad, used)
    ends = tuple(dict.fromkeys(published.ends))
    template = ImportedTemplate(source, published.bos, ends[0] if ends else None, ends, names, published.begins)
    return Tokenizer(data), template


def _written(source: str, bos: str | None) -> str:
    """A template with what it makes of small conversations: some put their tokens together out of parts."""
    program, texts = ChatProgram(source), [source]
    about = {"bos_token": bos or "", "eos_token": "", "add_generation_prompt": True}
    tried: tuple[tuple[Role, ...], ...] = (("user",), ("system", "user"), ("user", "assistant"), ("user", "tool"))
    for roles in tried:
        messages = [{"role": role, "content": "a"} for role in roles]
        with suppress(UserError):  # a template may refuse a role
            texts.append(program.render({"messages": messages, **about}))
    return "\n".join(texts)


def _framing(added: Mapping[str, bool], bos: str | None, written: str) -> Iterator[str]:
    """The added tokens that a template writes around what is said; their makers have not always marked them special.

    Not the pairs `<x>` and `</x>`: they stand within what is said, as `<think>` and `<tool_call>` do.
    """
    for token, is_special in added.items():
        name = token.strip("</>")
        is_pair = added.keys() >= {f"<{name}>", f"</{name}>"}
        frames = is_special or (MARKER.fullmatch(token) and (token == bos or not is_pair))
        if frames and (token == bos or token in written):
            yield token


def publish_imported(data: bytes, template: ImportedTemplate) -> PublishedTokenizer:
    """What `adopt_published` was given: `data` is the tokenizer.json that it made, `template` its other result.

    Padding that had an unused id of its own becomes the first of the ends again, as most makers have it.
    """
    published = give_back(data, template.names)
    pad = next((name for name, ours in template.names.items() if ours == "<|pad|>"), None)
    has_name = pad in {token["content"] for token in parse(published)["added_tokens"]}
    return PublishedTokenizer(
        published,
        template.bos_token,
        template.stops,
        pad if has_name else next(iter(template.stops), None),
        template.begins,
        template.source,
    )


def publish_own(data: bytes, renderer: ChatRenderer) -> PublishedTokenizer:
    """A tokenizer of fledge's with its own template, told in Jinja.

    Theirs will read special tokens in a user's text as such; ours never does (docs/architecture.md, seam 1).
    """
    template = ChatTemplate()
    turns = "{" + ", ".join(f"'{role}': '{getattr(template, role)}'" for role in ROLES) + "}"
    source = (
        f"{{% set turns = {turns} %}}{{{{ '{template.start}' }}}}{{% for message in messages %}}"
        f"{{{{ turns[message['role']] + message['content'] + '{template.end}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{template.assistant}' }}}}{{% endif %}}"
    )
    tokenizer = renderer.tokenizer
    ends = (template.end, tokenizer.pieces([tokenizer.end_of_text_id])[0])
    return PublishedTokenizer(data, template.start, ends, tokenizer.pieces([tokenizer.pad_id])[0], False, source)
