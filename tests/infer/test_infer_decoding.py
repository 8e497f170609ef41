"""Decoding from buffers that stay in place, plain and compiled, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_infer_adapters import adapter_of
from test_infer_engine import GREEDY, PROMPTS, Words, asking, assert_all_free, engine_of
from test_infer_naive import build, run

from fledge.errors import ConfigError
from fledge.infer import kernels
from fledge.infer.decoding import MAX_ROWS, CompiledDecoder
from fledge.infer.engine import Engine, EngineConfig
from fledge.infer.naive import generate, generate_uncached
from fledge.infer.paged import Pages, attend_pages
from fledge.infer.runner import probe_sites
from fledge.types import SamplingParams


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """In place of compiling: the functions as they are, in the order in which they would be compiled."""
    asked: list[Callable[..., Any]] = []

    def keep(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        asked.append(function)
        return function

    monkeypatch.setattr(torch, "compile", keep)
    return asked


@pytest.mark.parametrize("name", ["gpt-window", "llama-grouped", "pocket"])
def test_answers_from_fixed_buffers_equal_the_oracle(name: str, graphs: list[Any]) -> None:
    model = build(name).eval()
    engine = engine_of(model, compile=True, max_live=6)
    truth = run(generate_uncached, model, PROMPTS, GREEDY)
    assert [own.ids for [own] in engine.generate(asking(PROMPTS, GREEDY))] == [c.ids for c in truth]
    params = SamplingParams(max_tokens=12, seed=4)
    sampled = run(generate, model, PROMPTS[:3], params)
    assert [own.ids for [own] in engine.generate(asking(PROMPTS[:3], params))] == [c.ids for c in sampled]
    assert_all_free(engine)
    assert len(graphs) == 2  # for one answer, and for several
    assert graphs[0].__code__ is not graphs[1].__code__  # torch would take one graph for both of them


def test_the_tokens_that_a_graph_is_made_with_are_written_to_nobodys_block(graphs: list[Any]) -> None:
    model = build("pocket").eval()
    pages = Pages(probe_sites(model), 6, 4, torch.device("cpu"))
    for store in (*pages.keys.values(), *pages.values.values()):
        store.fill_(7.0)
    decoder = CompiledDecoder(model, pages)
    with torch.inference_mode():
        tables = np.array([[2], [4], [5]])
        logits = decoder.run(np.array([9, 9, 9]), np.array([0, 0, 0]), tables)
        again = decoder.run(np.array([9]), np.array([0]), tables[:1])
    assert logits.shape == (3, model.vocab_size)
    torch.testing.assert_close(logits[1:], logits[:1].expand(2, -1))
    torch.testing.assert_close(again, logits[:1])
    for store in (*pages.keys.values(), *pages.values.values()):
        touched = (store != 7.0).flatten(2).any(dim=2)
        assert touched.nonzero().tolist() == [[2, 0], [4, 0], [5, 0], [6, 0]]


@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_table_outgrows_its_graph_only_where_its_width_costs(graphs: list[Any], has_kernel: bool) -> None:
    model = build("llama").eval()
    pages = Pages(probe_sites(model), 200, 1, torch.device("cpu"))
    pages.attend = kernels.paged_attention if has_kernel else attend_pages
    decoder = CompiledDecoder(model, pages)
    with torch.inference_mode():
        for length in (1, 64, 65, 128, 129, 200):
            decoder.run(np.array([9]), np.array([length - 1]), np.arange(length)[None])
    assert len(graphs) == (2 if has_kernel else 4)  # one is for several answers


def test_more_answers_than_a_graph_takes_run_uncompiled(graphs: list[Any]) -> None:
    model = build("pocket").eval()
    engine = Engine(model, Words(), EngineConfig(num_blocks=99, compile=True))
    prompts = [PROMPTS[0]] * (MAX_ROWS + 1)
    got = engine.generate(asking(prompts, GREEDY))
    assert {own.ids for [own] in got} == {run(generate_uncached, model, PROMPTS[:1], GREEDY)[0].ids}


def test_while_adapters_are_loaded_steps_run_uncompiled(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama-grouped").eval()
    engine = engine_of(model, compile=True)
    truth = run(generate_uncached, model, PROMPTS[:2], GREEDY)
    calls: list[int] = []
    inner = CompiledDecoder.run
    monkeypatch.setattr(CompiledDecoder, "run", lambda self, *given: (calls.append(1), inner(self, *given))[1])
    used = []
    for is_loaded in (False, True, False):
        if is_loaded:
            engine.load_adapter("a", adapter_of(model, 0, ("query", "up")))
        calls.clear()
        assert [own.ids for [own] in engine.generate(asking(PROMPTS[:2], GREEDY))] == [c.ids for c in truth]
        used.append(bool(calls))
        if is_loaded:
            engine.unload_adapter("a")
    assert used == [True, False, True]


def test_what_cannot_be_compiled_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        raise RuntimeError("no compiler at all\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ConfigError, match="cannot be compiled here: no compiler at all; leave compile off"):
        engine_of(build("pocket").eval(), compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-window", "llama-grouped", "pocket"])
def test_compiled_answers_equal_the_oracle(name: str) -> None:
    model = build(name).eval()
    engine = engine_of(model, compile=True, max_live=4)
    truth = run(generate_uncached, model, PROMPTS, GREEDY)
    assert [own.ids for [own] in engine.generate(asking(PROMPTS, GREEDY))] == [c.ids for c in truth]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    engine.update_weights({}, "two")
    truth = run(generate_uncached, model, PROMPTS, GREEDY)
    assert [own.ids for [own] in engine.generate(asking(PROMPTS, GREEDY))] == [c.ids for c in truth]
