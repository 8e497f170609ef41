"""Adapters per request: a mixed batch answers as the merged models do alone, and nothing cached crosses over."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_infer_engine import BLOCK, GREEDY, PROMPTS, STOPS, assert_all_free, drain, engine_of
from test_infer_naive import build, run
from torch import nn

from fledge.errors import UserError
from fledge.formats.peft import save_adapter
from fledge.infer.causal import CausalModel
from fledge.infer.naive import generate
from fledge.infer.quantize import quantize
from fledge.layers.lora import Adapter, AdapterLinear, LoraConfig, Pair, add_lora, put_adapter
from fledge.types import Request, SamplingParams

SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, seed=3)


def adapter_of(model: CausalModel, seed: int, ends: tuple[str, ...]) -> Adapter:
    """One that changes what is said."""
    generator = torch.Generator().manual_seed(seed)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(ends)}
    pairs = {
        name: Pair(
            torch.randn(2, m.in_features, generator=generator),
            torch.randn(m.out_features, 2, generator=generator) * 0.3,
            1.0,
        )
        for name, m in linears.items()
    }
    return Adapter(LoraConfig(2), pairs)


def merged(model: CausalModel, adapter: Adapter) -> CausalModel:
    """A copy of the model with the adapter in its weights."""
    own = copy.deepcopy(model)
    with torch.no_grad():
        for name, pair in adapter.pairs.items():
            linear = own.get_submodule(name)
            linear.weight = nn.Parameter(linear.weight + pair.scale * pair.b @ pair.a)
    return own


ENDS = {"a": ("query", "value", "up", "head"), "b": ("down", "output", "out")}


# A tied head, a window; grouped queries; a head with a bias. The oracle's tests know that all of them decode.
@pytest.fixture(scope="module", params=["gpt-window", "llama-grouped", "pocket"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def asked(params: SamplingParams) -> list[Request]:
    """The same prompts under one adapter, under the other and under none."""
    return [
        Request(
            f"{owner}-{i}",
            tuple(prompt),
            replace(params, seed=params.seed + i),
            stop_ids=STOPS,
            adapter=owner,
        )
        for i, prompt in enumerate(PROMPTS)
        for owner in ("a", None, "b")
    ]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_mixed_batch_answers_as_the_merged_models_do_alone(name: str, params: SamplingParams) -> None:
    model = build(name)
    adapters = {owner: adapter_of(model, seed, ENDS[owner]) for seed, owner in enumerate(ENDS)}
    models = {None: model} | {owner: merged(model, adapter) for owner, adapter in adapters.items()}
    expected = {owner: run(generate, own, PROMPTS, params) for owner, own in models.items()}
    assert len({tuple(answer.ids for answer in own) for own in expected.values()}) == 3
    own = copy.deepcopy(model)
    tight = {"max_step_tokens": 7, "max_live": 5, "num_blocks": 14}  # small pieces, and preemptions
    for options in ({}, tight):
        engine = engine_of(own, **options)
        for owner, adapter in adapters.items():
            engine.load_adapter(owner, adapter)
        requests = asked(params)
        for request, [answer] in zip(requests, engine.generate(requests), strict=True):
            want = expected[request.adapter][int(request.id.rpartition("-")[2])]
            assert answer.ids == want.ids
            assert answer.logprobs == pytest.approx(want.logprobs, abs=2e-4)
        assert_all_free(engine)
        for owner in adapters:
            engine.unload_adapter(owner)
        assert not any(isinstance(module, AdapterLinear) for module in own.modules())


def test_nothing_cached_under_one_adapter_serves_another_nor_the_next_of_its_name() -> None:
    model = build("llama")
    engine = engine_of(model)
    prompt = tuple(PROMPTS[0])  # three whole blocks

    def cached(owner: str | None, tag: str) -> int:
        engine.submit(Request(tag, prompt, GREEDY, adapter=owner))
        return drain(engine)[tag][0].num_cached

    engine.load_adapter("a", adapter_of(model, 0, ENDS["a"]))
    engine.load_adapter("b", adapter_of(model, 1, ENDS["b"]))
    assert [cached("a", "1"), cached(None, "2"), cached("b", "3")] == [0, 0, 0]
    assert min(cached("a", "4"), cached(None, "5"), cached("b", "6")) >= 2 * BLOCK
    engine.unload_adapter("a")
    engine.load_adapter("a", adapter_of(model, 2, ENDS["a"]))
    assert cached("a", "7") == 0


def test_the_prompts_log_probabilities_are_the_adapters() -> None:
    model = build("gpt")
    adapter = adapter_of(model, 0, ENDS["a"])
    tokens_1T = torch.tensor([PROMPTS[5]])
    with torch.no_grad():
        logprobs_TV = merged(model, adapter).next_logprobs(tokens_1T)[0]
    want = logprobs_TV[:-1].gather(1, tokens_1T[0, 1:, None])[:, 0].tolist()
    engine = engine_of(model)
    engine.load_adapter("a", adapter)
    engine.submit(Request("x", tuple(PROMPTS[5]), GREEDY, adapter="a", prompt_logprobs=0))
    engine.submit(Request("y", tuple(PROMPTS[5]), GREEDY, prompt_logprobs=0))
    events = drain(engine)
    assert [one.logprob for one in events["x"][0].prompt] == pytest.approx(want, abs=2e-4)
    assert [one.logprob for one in events["y"][0].prompt] != pytest.approx(want, abs=2e-4)


def test_scores_and_embeddings_are_the_models_own_and_weights_keep_their_names() -> None:
    model, other = build("llama-grouped"), build("llama-grouped")
    engine = engine_of(model)
    scores, vectors = engine.score(PROMPTS[:2]), engine.embed(PROMPTS[:2])
    engine.load_adapter("a", adapter_of(model, 0, ENDS["a"]))
    engine.generate([Request("x", tuple(PROMPTS[0]), GREEDY, adapter="a")])
    assert engine.score(PROMPTS[:2]) == scores
    assert torch.equal(engine.embed(PROMPTS[:2]), vectors)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    engine.update_weights(dict(other.state_dict()), "2")
    assert engine.score(PROMPTS[:2]) == engine_of(other).score(PROMPTS[:2])


def test_a_peft_directory_is_loaded_by_its_path(tmp_path: Path) -> None:
    model = build("llama")
    adapter = adapter_of(model, 0, ("query", "up"))
    save_adapter(adapter, model, tmp_path / "adapter")
    engine = engine_of(model)
    engine.load_adapter("disk", tmp_path / "adapter")
    engine.load_adapter("memory", adapter)
    requests = [Request(owner, tuple(PROMPTS[0]), GREEDY, adapter=owner) for owner in ("disk", "memory")]
    [[disk], [memory]] = engine.generate(requests)
    assert disk.ids == memory.ids


def test_adapters_that_are_missing_taken_or_in_use_are_refused() -> None:
    model = build("llama")
    engine = engine_of(model)
    with pytest.raises(UserError, match="no adapter 'a' is loaded"):
        engine.submit(Request("x", (5, 6), GREEDY, adapter="a"))
    assert not engine.has_work
    engine.load_adapter("a", adapter_of(model, 0, ENDS["a"]))
    with pytest.raises(UserError, match="'a' is loaded already"):
        engine.load_adapter("a", adapter_of(model, 1, ENDS["b"]))
    with pytest.raises(UserError, match="no adapter 'b' is loaded; known are a"):
        engine.submit(Request("x", (5, 6), GREEDY, adapter="b"))
    engine.submit(Request("x", (5, 6), GREEDY, adapter="a"))
    engine.step()
    with pytest.raises(UserError, match="'a' is in use"):
        engine.unload_adapter("a")
    engine.cancel("x")
    engine.unload_adapter("a")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_models_take_adapters(kind: str) -> None:
    model = build("llama")
    adapter = adapter_of(model, 0, ("query", "up"))
    quantize(model, kind)
    alone = copy.deepcopy(model)
    add_lora(alone, LoraConfig(2, targets=("query", "up")))
    put_adapter(alone, adapter)
    want = run(generate, alone, PROMPTS, GREEDY)
    plain = run(generate, model, PROMPTS, GREEDY)
    assert [answer.ids for answer in want] != [answer.ids for answer in plain]
    engine = engine_of(model)
    engine.load_adapter("a", adapter)
    answers = engine.generate([request for request in asked(GREEDY) if request.adapter != "b"])
    for place, [answer] in enumerate(answers):
        assert answer.ids == (plain if place % 2 else want)[place // 2].ids
