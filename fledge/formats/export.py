"""A checkpoint leaves fledge: as a Hugging Face directory for `transformers` and vLLM, or as a GGUF file for llama.cpp.

Weights, tokenizer, chat template and the tokens to stop at go along, under the names that their makers gave them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fledge.errors import CheckpointError
from fledge.formats.checkpoint import LoadedModel, load_blocks
from fledge.formats.gguf import write_gguf
from fledge.formats.gguf_models import settings_of, tensors_of
from fledge.formats.gguf_tensors import KINDS
from fledge.formats.gguf_tokenizer import tokenizer_metadata
from fledge.formats.huggingface import make_of, save_huggingface
from fledge.text.chat import ChatRenderer
from fledge.text.foreign import parse
from fledge.text.published import PublishedTokenizer, publish_imported, publish_own


def export_huggingface(loaded: LoadedModel, directory: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """`save_huggingface` with all that `transformers` needs to chat. The directory must not exist.

    `CheckpointError` if no published layout holds such a model.
    """
    make_of(loaded.info.family, loaded.model)  # refuses what has neither words nor positions of its own
    published = _published(loaded)
    config: Any = loaded.model.config
    ids = {key: _id_of(published, token) for key, token in _tokens(published).items()}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        **_tokens(published),
        "add_bos_token": published.begins,
        "clean_up_tokenization_spaces": False,
        "chat_template": published.template,
    }
    ends = sorted({token_id for token in published.ends if (token_id := _id_of(published, token)) is not None})
    save_huggingface(
        loaded.info.family,
        loaded.model,
        directory,
        dtype=dtype,
        token_ids={f"{key}_id": token_id for key, token_id in ids.items() if token_id is not None},
        companions={
            "tokenizer.json": _begun(published).decode(),
            "tokenizer_config.json": json.dumps(tokenizer_config, indent=1, ensure_ascii=False),
            "generation_config.json": json.dumps(
                {**{f"{key}_id": token_id for key, token_id in ids.items()}, "eos_token_id": ends}
            ),
        },
    )


def export_gguf(loaded: LoadedModel, path: Path, kind: str | None = None) -> bool:
    """Write a GGUF file with its matrices in the format `kind`; None loses nothing: as imported, else F32.

    Returns whether llama.cpp will cut text into words as fledge does (see `tokenizer_metadata`). `CheckpointError` if
    the file exists, no architecture of GGUF computes the model, or the format cannot hold it.
    """
    if path.exists():
        raise CheckpointError(f"{path}: exists already; name a file that does not")
    metadata = settings_of(loaded.info.family, loaded.model)
    config: Any = loaded.model.config
    vocabulary, is_exact = tokenizer_metadata(_published(loaded), config.vocab_size)
    blocks = load_blocks(loaded)
    tensors = list(tensors_of(loaded.info.family, loaded.model, kind, blocks))
    main = max(tensors, key=lambda tensor: sum(t.kind == tensor.kind for t in tensors if len(t.shape) > 1)).kind
    about = {
        "general.name": str(loaded.info.notes.get("name", loaded.directory.name)),
        "general.file_type": KINDS[main].file_type,
        "general.quantization_version": 2,
    }
    write_gguf(path, {**metadata, **about, **vocabulary}, tensors)
    return is_exact


def _published(loaded: LoadedModel) -> PublishedTokenizer:
    data = (loaded.directory / "tokenizer.json").read_bytes()
    if loaded.template is not None:
        return publish_imported(data, loaded.template)
    assert isinstance(loaded.renderer, ChatRenderer)
    return publish_own(data, loaded.renderer)


def _begun(published: PublishedTokenizer) -> bytes:
    """The tokenizer.json with the rule that puts the first token before a text, where it came without: a GGUF file and
    a tokenizer.model tell that apart, and `transformers` looks for it here."""
    layout, bos = parse(published.data), published.bos
    token_id = _id_of(published, bos)
    if not published.begins or token_id is None or layout.get("post_processor") is not None:
        return published.data
    begin, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    layout["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [token_id], "tokens": [bos]}},
    }
    return json.dumps(layout, ensure_ascii=False).encode()


def _tokens(published: PublishedTokenizer) -> dict[str, str | None]:
    return {"bos_token": published.bos, "eos_token": next(iter(published.ends), None), "pad_token": published.pad}


def _id_of(published: PublishedTokenizer, token: str | None) -> int | None:
    layout = parse(published.data)
    ids = {one["content"]: int(one["id"]) for one in layout["added_tokens"]}
    return None if token is None else ids.get(token)
