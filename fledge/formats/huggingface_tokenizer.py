"""The tokenizer of a Hugging Face directory, with its chat template and special tokens.

`tokenizer.json` holds the vocabulary; what its makers say of it stands in `tokenizer_config.json`, `config.json`,
`generation_config.json` and, of late, `chat_template.jinja`. Source: `transformers`' documentation of these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge.errors import CheckpointError, TokenizerError
from fledge.text.foreign import parse
from fledge.text.published import PublishedTokenizer

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MODEL_SETTINGS = ("generation_config.json", "config.json")


def read_tokenizer(directory: Path) -> PublishedTokenizer:
    """The tokenizer of `directory`; `CheckpointError` names the file that is missing, damaged or contradictory.

    It ends an answer at the tokenizer's `eos_token` and at every `eos_token_id` of the model's own settings.
    """
    path = directory / TOKENIZER
    try:
        data = path.read_bytes()
        layout = parse(data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); a model comes with one") from error
    except TokenizerError as error:
        raise CheckpointError(f"{path}: {error}") from error
    settings = _settings(directory / SETTINGS)
    special = {name: _content(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
    names = (
        {token_id: token for token, token_id in layout["model"].get("vocab", {}).items()} if _has_ids(layout) else {}
    )
    names |= {token["id"]: token["content"] for token in layout["added_tokens"]}
    ends = [special["eos"], *(names.get(token_id) for token_id in _end_ids(directory))]
    return PublishedTokenizer(
        data,
        special["bos"],
        tuple(dict.fromkeys(token for token in ends if token is not None)),
        special["pad"],
        special["bos"] is not None and _begins(settings, layout, special["bos"]),
        _template(directory, settings),
    )


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object; fetch it again")
    return data


def _has_ids(layout: Mapping[str, Any]) -> bool:
    return isinstance(layout["model"].get("vocab"), dict)


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


def _begins(settings: Mapping[str, Any], layout: Mapping[str, Any], bos: str) -> bool:
    """Whether a text begins with `bos`: the setting says so, or else the file's post-processor puts it there."""
    says = settings.get("add_bos_token")
    return (
        says if isinstance(says, bool) else f'"{bos}"' in json.dumps(layout.get("post_processor"), ensure_ascii=False)
    )


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
