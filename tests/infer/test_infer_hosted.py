"""The engine loaded from a checkpoint: what is damaged is refused by name; in its process it says what it says here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fledge.config import to_json
from fledge.errors import CheckpointError, ConfigError, UserError
from fledge.formats.checkpoint import CheckpointInfo, load_model, save_model
from fledge.formats.peft import save_adapter
from fledge.infer.engine import Engine, EngineConfig
from fledge.infer.hosted import HostedEngine, load
from fledge.infer.messages import Start
from fledge.infer.process import EngineProcess
from fledge.infer.quantize import quantize
from fledge.layers.lora import Adapter, LoraConfig, Pair
from fledge.models.gpt import GPT, GPTConfig
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer
from fledge.types import Request, SamplingParams

SETTINGS = {"num_blocks": 40, "block_size": 4, "max_live": 8}


def write_checkpoint(directory: Path, *, damaged: bool = False, text: str = "the rain in the garden, 园里下雨") -> Path:
    tokenizer = train_tokenizer([text] * 20, TokenizerConfig(vocab_size=300))
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=2, max_positions=64))
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that its answers vary
            parameter.normal_(0.0, 0.5, generator=generator)
        if damaged:
            next(model.parameters())[3, 5] = torch.nan
    info = CheckpointInfo(
        family="gpt",
        config=to_json(model.config),
        stage="pretrain",
        tokenizer_hash=tokenizer.hash,
        template_hash=ChatRenderer(tokenizer).hash,
    )
    save_model(directory, model, tokenizer, info)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hosted") / "model")


@pytest.fixture
def hosted(checkpoint: Path) -> HostedEngine:
    return load(Start(str(checkpoint), SETTINGS))


def requests() -> list[Request]:
    params = SamplingParams(max_tokens=9, temperature=0.8, seed=3)
    return [
        Request("first", (5, 6, 7, 8, 9, 10), params, n=2),
        Request("second", (5, 6, 7, 8, 9, 11), replace(params, temperature=0.0), top_logprobs=2),
        Request("third", (12,), params, prompt_logprobs=1),
    ]


def test_a_checkpoint_with_nan_in_it_is_refused_by_the_name_of_the_weight(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", damaged=True)
    with pytest.raises(CheckpointError, match=r"model: weight '\S+' holds NaN or infinity"):
        load(Start(str(directory)))


@pytest.mark.parametrize(("target", "where"), [("int8", "scales"), ("int4", "packed")])
def test_a_quantised_checkpoint_with_nan_in_it_is_refused_by_the_name_of_the_weight(
    target: Any, where: str, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(["the rain in the garden"] * 20, TokenizerConfig(vocab_size=300))
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, width=32, num_layers=1, num_heads=2, max_positions=64))
    name = "blocks.0.mlp.up"
    hashes = tokenizer.hash, ChatRenderer(tokenizer).hash
    own = CheckpointInfo("gpt", to_json(model.config), "pretrain", *hashes, quantized=quantize(model, target))
    for kind in ("whole", "damaged"):
        if kind == "damaged":
            layer: Any = model.get_submodule(name)
            (layer.scales if target == "int8" else layer.numbers)[..., 3] = torch.nan
        save_model(tmp_path / kind, model, tokenizer, own)
    load(Start(str(tmp_path / "whole"), SETTINGS))
    with pytest.raises(CheckpointError, match=rf"weight '{name}.{where}' holds NaN or infinity"):
        load(Start(str(tmp_path / "damaged"), SETTINGS))


def test_what_is_no_checkpoint_or_no_setting_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a fledge checkpoint"):
        load(Start(str(tmp_path)))
    with pytest.raises(ConfigError, match="unknown key 'num_block'; did you mean 'num_blocks'"):
        load(Start(str(checkpoint), {"num_block": 3}))


def test_new_weights_are_read_from_a_file_and_used(hosted: HostedEngine, checkpoint: Path, tmp_path: Path) -> None:
    rows = [[5, 6, 7]]
    before = hosted.score(rows)
    model = load_model(checkpoint).model
    weights = {name: 1.5 * weight for name, weight in model.state_dict().items()}
    save_file({name: weight.clone() for name, weight in weights.items()}, tmp_path / "new.safetensors")
    hosted.update_weights(str(tmp_path / "new.safetensors"), "v2")
    model.load_state_dict(weights)
    expected = model.next_logprobs(torch.tensor(rows))[0, [0, 1], [6, 7]]  # type: ignore[operator]
    assert hosted.score(rows)[0] == pytest.approx(expected.tolist(), abs=1e-5)
    assert hosted.score(rows) != before
    assert hosted.stats().weights_version == "v2"


@pytest.mark.parametrize("harm", ["missing", "truncated", "nonsense", "nan", "unknown", "shape"])
def test_new_weights_that_are_damaged_change_nothing(
    hosted: HostedEngine, checkpoint: Path, tmp_path: Path, harm: str
) -> None:
    before = hosted.score([[5, 6, 7]])
    weights = load_model(checkpoint).model.state_dict()
    weights = {name: weight.clone() + 1 for name, weight in weights.items()}
    name = next(iter(weights))
    path = tmp_path / "new.safetensors"
    if harm == "nan":
        weights[name][0, 0] = torch.nan
    elif harm == "unknown":
        weights["surplus"] = torch.ones(2)
    elif harm == "shape":
        weights[name] = torch.ones(3)
    save_file(weights, path)
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif harm == "nonsense":
        path.write_bytes(b"\xff" * 64)
    with pytest.raises(
        UserError, match="surplus" if harm == "unknown" else name if harm == "shape" else "new.safetensors"
    ):
        hosted.update_weights(str(path), "v2")
    assert hosted.score([[5, 6, 7]]) == before
    assert hosted.stats().weights_version == ""


def write_adapter(checkpoint: Path, directory: Path, seed: int) -> None:
    model = load_model(checkpoint).model
    generator = torch.Generator().manual_seed(seed)
    name, layer = next((name, m) for name, m in model.named_modules() if hasattr(m, "in_features"))
    a = torch.randn(2, layer.in_features, generator=generator)
    b = 5 * torch.randn(layer.out_features, 2, generator=generator)
    save_adapter(Adapter(LoraConfig(rank=2, alpha=2.0), {name: Pair(a, b, 1.0)}), model, directory)


def test_adapters_are_read_from_their_directories_and_leave_with_their_names(
    hosted: HostedEngine, checkpoint: Path, tmp_path: Path
) -> None:
    def said(adapter: str | None) -> list[int]:
        params = SamplingParams(max_tokens=12, temperature=0.0)
        hosted.submit(Request("r", (5, 6, 7), params, adapter=adapter))
        events = []
        while hosted.has_work:
            events += hosted.step()
        return [event.id for event in events]

    for seed, name in enumerate(["one", "two"]):
        write_adapter(checkpoint, tmp_path / name, seed)
        hosted.load_adapter(name, str(tmp_path / name))
    answers = {name: said(name) for name in (None, "one", "two")}
    assert len({tuple(answer) for answer in answers.values()}) == 3
    hosted.unload_adapter("one")
    with pytest.raises(UserError, match="no adapter 'one' is loaded"):
        said("one")
    assert said("two") == answers["two"]
    with pytest.raises(CheckpointError, match="nowhere"):
        hosted.load_adapter("three", str(tmp_path / "nowhere"))


def test_a_process_that_was_killed_comes_again_with_all_its_weights_and_adapters(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Weights in two files of which neither is whole, and an adapter over them."""
    state = load_model(checkpoint).model.state_dict()
    names = sorted(state)
    for number, own in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: (1 + number / 4) * state[name] for name in own}, tmp_path / f"{number}.safetensors")
    write_adapter(checkpoint, tmp_path / "adapter", 0)
    request = Request("r", (5, 6, 7), SamplingParams(max_tokens=12, temperature=0.0))

    def said(process: EngineProcess) -> list[Any]:
        asked = [replace(request, adapter=name) for name in (None, "polite")]
        return [process.score([[5, 6, 7]]), *([event.id for event in process.submit(one)] for one in asked)]

    with EngineProcess(checkpoint, SETTINGS, num_threads=1) as process:
        untouched = process.score([[5, 6, 7]])
        for number in (1, 2):
            process.update_weights(tmp_path / f"{number}.safetensors", str(number))
        process.load_adapter("polite", tmp_path / "adapter")
        before, pid = said(process), process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        while process.pid == pid:
            time.sleep(0.01)
        assert said(process) == before
        assert before[0] != untouched
        assert before[1] != before[2]
        assert process.stats()["weights_version"] == "2"


@pytest.fixture(scope="module")
def process(checkpoint: Path) -> Iterator[EngineProcess]:
    with EngineProcess(checkpoint, SETTINGS, num_threads=1) as process:
        yield process


def test_in_its_process_the_engine_gives_the_same_events(process: EngineProcess, checkpoint: Path) -> None:
    loaded = load_model(checkpoint)
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(**SETTINGS))  # type: ignore[arg-type]
    for request in requests():  # one after the other, so that the caches are alike
        engine.submit(request)
        expected = []
        while engine.has_work:
            expected += engine.step()
        assert list(process.submit(request)) == expected
    assert process.score([[5, 6, 7], [8, 9]]) == engine.score([[5, 6, 7], [8, 9]])
    assert np.array_equal(process.embed([[5, 6, 7], [8]]), engine.embed([[5, 6, 7], [8]]).numpy())
    assert (process.vocab_size, process.max_positions) == (loaded.tokenizer.vocab_size, 64)
    assert process.stats()["num_output_tokens"] == engine.stats().num_output_tokens


def test_many_requests_at_once_leave_every_block_of_the_process_free(process: EngineProcess) -> None:
    streams = [process.submit(replace(request, id=f"{i} {request.id}")) for i in range(10) for request in requests()]
    for number, stream in enumerate(streams):
        if number % 3 == 2:
            stream.close()
        else:
            assert {event.finish_reason for event in stream} == {None, "length"}
    stats = process.stats()
    assert stats["num_running"] == stats["num_waiting"] == 0
    assert stats["num_free_blocks"] == stats["num_blocks"] == 40


def test_a_request_that_the_engine_refuses_is_refused_through_the_process(process: EngineProcess) -> None:
    with pytest.raises(UserError, match="more than the model's 64 positions"):
        list(process.submit(Request("long", (5,) * 60, SamplingParams(max_tokens=9))))
    with pytest.raises(UserError, match="the prompt is empty"):
        process.score([[]])


def test_a_draft_model_is_named_by_its_path_and_changes_no_answer(
    process: EngineProcess, checkpoint: Path, tmp_path: Path
) -> None:
    asked = [replace(request, prompt_logprobs=None, n=1) for request in requests()]
    plain = [[event.id for event in process.submit(request)] for request in asked]
    with EngineProcess(checkpoint, SETTINGS, num_threads=1, draft=checkpoint) as drafting:
        assert [[event.id for event in drafting.submit(request)] for request in asked] == plain
        stats = drafting.stats()
        assert stats["num_draft_tokens"] == stats["num_accepted_tokens"] > 0  # it guesses for itself
        assert stats["num_steps"] < process.stats()["num_steps"]
    never = load(Start(str(checkpoint), {**SETTINGS, "num_draft": 2}, draft=str(checkpoint)))
    assert never._engine.config.num_draft == 2


def test_a_draft_model_that_cannot_guess_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    damaged = write_checkpoint(tmp_path / "damaged", damaged=True)
    other = write_checkpoint(tmp_path / "other", text="something else altogether")
    for draft, complaint in {
        damaged: "holds NaN or infinity",
        other: "must share a tokenizer",
        tmp_path: "not a fledge checkpoint",
    }.items():
        with pytest.raises(UserError, match=complaint):
            load(Start(str(checkpoint), SETTINGS, draft=str(draft)))
    with pytest.raises(ConfigError, match="num_draft 0"):
        load(Start(str(checkpoint), {"num_draft": 0}, draft=str(checkpoint)))
