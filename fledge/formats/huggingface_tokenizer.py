"""The tokenizer of a Hugging Face directory, with its chat template and special tokens.

`tokenizer.json` holds the vocabulary, or `tokenizer.model` alone does. What its makers say of it stands in
`tokenizer_config.json`, `config.json`, `generation_config.json` and, of late, `chat_template.jinja`, formerly in
`special_tokens_map.json` and `added_tokens.json`. Source: `transformers`' documentation of these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fledge.errors import CheckpointError, TokenizerError
from fledge.files import read_object
from fledge.formats.sentencepiece import read_sentencepiece
from fledge.text.foreign import MARKER, parse
from fledge.text.published import PublishedTokenizer
from fledge.text.sentencepiece import ADDED, Opening, layout_of

TOKENIZER, PIECES, TEMPLATE = "tokenizer.json", "tokenizer.model", "chat_template.jinja"
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # the later one is right where both speak
MODEL_SETTINGS = ("generation_config.json", "config.json")


def read_tokenizer(directory: Path) -> PublishedTokenizer:
    """The tokenizer of `directory`; `CheckpointError` names the file that is missing, damaged or contradictory.

    It ends an answer at the tokenizer's `eos_token` and at every `eos_token_id` of the model's own settings but for
    those of ordinary text: such a one is a default that nobody set right.
    """
    settings = {key: value for name in SETTINGS for key, value in _settings(directory / name).items()}
    data, named = _read(directory, settings)
    layout = parse(data)
    special = {name: _content(settings.get(f"{name}_token")) or named.get(name) for name in ("bos", "eos", "pad")}
    ends = [special["eos"], *_markers(layout, _end_ids(directory))]
    return PublishedTokenizer(
        data,
        special["bos"],
        tuple(dict.fromkeys(token for token in ends if token is not None)),
        special["pad"],
        special["bos"] is not None and _begins(settings, layout, special["bos"], bool(named)),
        _template(directory, settings),
    )


def _read(directory: Path, settings: Mapping[str, Any]) -> tuple[bytes, dict[str, str]]:
    """(a tokenizer.json, the special tokens that its source itself names): that of the directory, or one that is made
    of its tokenizer.model."""
    path = directory / TOKENIZER
    if not path.is_file() and (directory / PIECES).is_file():
        path = directory / PIECES
    try:
        if path.name == PIECES:
            return _of_pieces(directory, settings)
        data = path.read_bytes()
        parse(data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_instead(directory)}") from error
    except TokenizerError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return data, {}


def _of_pieces(directory: Path, settings: Mapping[str, Any]) -> tuple[bytes, dict[str, str]]:
    """As `transformers` makes it: with the tokens that were added later, and with a space after every special token,
    too, unless the settings deny that (`legacy`)."""
    found = read_sentencepiece(directory / PIECES)
    puts_space = found.puts_space and settings.get("add_prefix_space") is not False
    opening: Opening = "never" if not puts_space else "first" if settings.get("legacy") is False else "always"
    layout = layout_of(found.pieces, opening)
    known = {token["id"] for token in layout["added_tokens"]}
    special = {_content(settings.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    later = _settings(directory / "added_tokens.json").items()
    about: dict[str, Any] = {str(key): {"content": token, "special": token in special} for token, key in later}
    decoder = settings.get("added_tokens_decoder")
    about |= decoder if isinstance(decoder, Mapping) else {}
    for key, token in about.items():
        content, is_special = _content(token), isinstance(token, Mapping) and token.get("special") is True
        if not (key.isdecimal() and len(key) < 10 and content):
            raise CheckpointError(f"{directory}: adds a token {str(token)[:80]} of id {key[:20]}, which is none")
        if int(key) not in known:
            known.add(int(key))
            added = {"id": int(key), "content": content, **ADDED, "normalized": False, "special": is_special}
            layout["added_tokens"].append(added)
    return json.dumps(layout, ensure_ascii=False).encode(), found.names


def _instead(directory: Path) -> str:
    """What to do about a directory without a tokenizer, by what it has."""
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return "let transformers make it of vocab.json and merges.txt: load the tokenizer there and save it again"
    return "a model comes with one"


def _settings(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _markers(layout: Mapping[str, Any], token_ids: Iterable[int]) -> list[str]:
    """The tokens of these ids that stand between texts."""
    vocab = layout["model"]["vocab"]
    found = {i: token for token, i in vocab.items() if MARKER.fullmatch(token)} if isinstance(vocab, dict) else {}
    found |= {token["id"]: token["content"] for token in layout["added_tokens"]}
    return [found[token_id] for token_id in token_ids if token_id in found]


def _content(token: Any) -> str | None:
    """A token's text, from either of the two spellings."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _end_ids(directory: Path) -> list[int]:
    found: list[int] = []
    for name in MODEL_SETTINGS:
        ids = _settings(directory / name).get("eos_token_id")
        found += [token_id for token_id in (ids if isinstance(ids, list) else [ids]) if isinstance(token_id, int)]
    return found


def _begins(settings: Mapping[str, Any], layout: Mapping[str, Any], bos: str, usually: bool) -> bool:
    """Whether a text begins with `bos`: the setting says so, or the file's post-processor puts it there, or it usually
    is so."""
    says = settings.get("add_bos_token")
    is_put = f'"{bos}"' in json.dumps(layout.get("post_processor"), ensure_ascii=False)
    return says if isinstance(says, bool) else usually or is_put


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The template called "default" where there are several."""
    if (directory / TEMPLATE).is_file():
        try:
            return (directory / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory / TEMPLATE}: cannot be read ({error}); fetch it again") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
