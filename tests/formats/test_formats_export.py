"""Exports of an imported model and of one of ours, as `transformers` and llama.cpp see them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_samples import MODELS, TEXTS, VOCAB, checkpoint, filled, published

from fledge.config import to_json
from fledge.errors import CheckpointError
from fledge.formats.checkpoint import CheckpointInfo, LoadedModel, load_blocks, load_model, save_model
from fledge.formats.export import export_gguf, export_huggingface
from fledge.formats.gguf import read_gguf
from fledge.formats.gguf_models import read_model
from fledge.formats.gguf_tokenizer import read_tokenizer
from fledge.formats.huggingface_tokenizer import read_tokenizer as read_huggingface_tokenizer
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.scalar import ScalarModel
from fledge.text.published import PublishedTokenizer, adopt_published
from fledge.text.template import TemplateRenderer
from fledge.types import Conversation

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
import sentencepiece_samples as pieced

CHAT = Conversation.of(("user", "Empty?"), ("assistant", "12."), ("user", "天气\n?"))


def test_an_imported_model_talks_the_same_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    loaded = checkpoint(tmp_path / "model", "llama")
    export_huggingface(loaded, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": message.role, "content": message.text} for message in CHAT.messages]
    ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tuple(ids) == loaded.renderer.prompt(CHAT)
    assert theirs.generation_config.eos_token_id == [2]
    for text in TEXTS:
        assert their_tokenizer(text)["input_ids"] == loaded.tokenizer.encode(text)
    with torch.no_grad():
        found = theirs(torch.tensor([ids])).logits.log_softmax(-1)
    model: Any = loaded.model
    torch.testing.assert_close(found, model.next_logprobs(torch.tensor([ids])), atol=1e-5, rtol=1e-5)


def tokenizer_read_back(way: str, loaded: LoadedModel, folder: Path) -> PublishedTokenizer:
    if way == "gguf":
        assert export_gguf(loaded, folder)
        return read_tokenizer(read_gguf(folder))
    export_huggingface(loaded, folder)
    return read_huggingface_tokenizer(folder)


@pytest.mark.parametrize("way", ["huggingface", "gguf"])
def test_what_is_exported_is_imported_as_the_same_tokenizer_and_template(way: str, tmp_path: Path) -> None:
    loaded = checkpoint(tmp_path / "model", "qwen-3-tied")
    read = tokenizer_read_back(way, loaded, tmp_path / "out")
    tokenizer, template = adopt_published(read, VOCAB)
    assert template == loaded.template
    assert (tokenizer.pad_id, tokenizer.end_of_text_id) == (
        loaded.tokenizer.pad_id,
        loaded.tokenizer.end_of_text_id,
    )
    for text in TEXTS:
        assert tokenizer.encode(text) == loaded.tokenizer.encode(text)


def of_pieces(directory: Path) -> LoadedModel:
    """A checkpoint of a model with a vocabulary of SentencePiece's, as an import leaves it."""
    size = len(pieced.pieces())
    model = Llama(LlamaConfig(size, 48, 2, 6, 2, 64, 64))
    model.init_weights(torch.Generator().manual_seed(5))
    tokenizer, template = adopt_published(pieced.published(), size)
    hashed = TemplateRenderer(tokenizer, template).hash
    info = CheckpointInfo("llama", to_json(model.config), "imported", tokenizer.hash, hashed)
    save_model(directory, model, tokenizer, info, template)
    return load_model(directory)


def test_a_model_of_pieces_reads_and_says_the_same_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    loaded = of_pieces(tmp_path / "model")
    export_huggingface(loaded, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in pieced.TEXTS:
        if "<s>" not in text:  # which theirs takes for the token
            ids = their_tokenizer(text)["input_ids"]
            assert ids == [1, *loaded.tokenizer.encode(text)]
            assert their_tokenizer.decode(ids, skip_special_tokens=True) == text == loaded.tokenizer.decode(ids)
    ids = loaded.renderer.prompt(CHAT)
    model: Any = loaded.model
    with torch.no_grad():
        found = theirs(torch.tensor([ids])).logits.log_softmax(-1)
        torch.testing.assert_close(found, model.next_logprobs(torch.tensor([ids])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["huggingface", "gguf"])
def test_pieces_that_are_exported_are_imported_as_the_same(way: str, tmp_path: Path) -> None:
    loaded = of_pieces(tmp_path / "model")
    read = tokenizer_read_back(way, loaded, tmp_path / "out")
    tokenizer, template = adopt_published(read, len(pieced.pieces()))
    assert (template, tokenizer.opening) == (loaded.template, loaded.tokenizer.opening)
    assert tokenizer.has_tokens_of(loaded.tokenizer)
    for text in pieced.TEXTS:
        assert tokenizer.encode(text) == loaded.tokenizer.encode(text)


def quantised(directory: Path, name: str, kind: str) -> LoadedModel:
    """The checkpoint of an import from a quantised file."""
    loaded = checkpoint(directory / "plain", name)
    export_gguf(loaded, directory / "first.gguf", kind)
    read = read_model(read_gguf(directory / "first.gguf"))
    save_model(directory / "packed", read.model, loaded.tokenizer, loaded.info, loaded.template, read.blocks)
    return load_model(directory / "packed")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "gpt", "qwen-3-tied"])
def test_a_checkpoint_keeps_quantised_matrices_and_exports_them_unchanged(name: str, kind: str, tmp_path: Path) -> None:
    loaded = quantised(tmp_path, name, kind)
    assert (tmp_path / "packed/model.safetensors").stat().st_size < 0.5 * sum(
        parameter.nbytes for parameter in loaded.model.parameters()
    )
    blocks = load_blocks(loaded)
    assert blocks
    for parameter, kept in blocks.items():
        assert torch.equal(kept.expand(), loaded.model.get_parameter(parameter))
    export_gguf(loaded, tmp_path / "again.gguf")
    first, again = read_gguf(tmp_path / "first.gguf"), read_gguf(tmp_path / "again.gguf")
    assert {n: e.kind.name for n, e in first.entries.items()} == {n: e.kind.name for n, e in again.entries.items()}
    for tensor in first.entries:
        assert torch.equal(first.tensor(tensor), again.tensor(tensor))


def test_a_packed_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    loaded = quantised(tmp_path, "llama", "Q4_1")
    path = tmp_path / "packed/run.json"
    described = json.loads(path.read_text())
    described["packed"]["final_norm.weight"] = "Q8_0"
    path.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"'final_norm\.weight\.codes' is missing"):
        load_model(loaded.directory)
    described["packed"] = {"tokens.weight": "Q9"}
    path.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="unknown format 'Q9'"):
        load_model(loaded.directory)


@pytest.mark.parametrize("way", [export_huggingface, export_gguf])
def test_a_model_that_speaks_no_words_is_refused_by_name(
    way: Callable[[LoadedModel, Path], Any], tmp_path: Path
) -> None:
    judge = ScalarModel.from_trunk("llama", filled("llama"), generator=torch.Generator().manual_seed(0))
    tokenizer, template = adopt_published(published(), VOCAB)
    hashed = TemplateRenderer(tokenizer, template).hash
    info = CheckpointInfo("scalar", to_json(judge.config), "reward", tokenizer.hash, hashed)
    save_model(tmp_path / "judge", judge, tokenizer, info, template)
    with pytest.raises(CheckpointError, match="this scalar"):
        way(load_model(tmp_path / "judge"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    loaded = checkpoint(tmp_path / "model", "llama")
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export_gguf(loaded, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 1e-3), ("F16", 1e-2), ("BF16", 5e-2), ("Q8_0", 0.2)])
def test_logits_equal_those_of_llama_cpp(name: str, kind: str, tolerance: float, tmp_path: Path) -> None:
    """llama.cpp rounds activations as its matrices are rounded, and GPT's GELU to a table: F32 is exact elsewhere."""
    llama_cpp = pytest.importorskip("llama_cpp")
    loaded = checkpoint(tmp_path / "model", name)
    export_gguf(loaded, tmp_path / "m.gguf", kind)
    options = {"n_ctx": 64, "n_threads": 1, "n_gpu_layers": 0, "logits_all": True, "verbose": False}
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), type_k=0, type_v=0, **options)
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == loaded.tokenizer.encode(text)
    ids = list(range(3, 33))
    theirs.eval(ids)
    found = torch.tensor(theirs.scores[: len(ids)]).log_softmax(-1)
    reloaded: Any = read_model(read_gguf(tmp_path / "m.gguf")).model
    expected = reloaded.next_logprobs(torch.tensor([ids]))[0]
    is_exact = kind == "F32" and name != "gpt"
    torch.testing.assert_close(found, expected, atol=1e-5 if is_exact else tolerance, rtol=0)


@pytest.mark.slow
def test_llama_cpp_cuts_texts_into_the_same_pieces_and_computes_the_same(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    loaded = of_pieces(tmp_path / "model")
    export_gguf(loaded, tmp_path / "m.gguf")
    options = {"n_ctx": 64, "n_threads": 1, "n_gpu_layers": 0, "logits_all": True, "verbose": False}
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), type_k=0, type_v=0, **options)
    for text in pieced.TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == loaded.tokenizer.encode(text)
    ids = list(loaded.renderer.prompt(CHAT))
    theirs.eval(ids)
    found = torch.tensor(theirs.scores[: len(ids)]).log_softmax(-1)
    model: Any = loaded.model
    with torch.no_grad():
        torch.testing.assert_close(found, model.next_logprobs(torch.tensor([ids]))[0], atol=1e-5, rtol=0)
