"""The engine against the oracle: the same tokens, whatever else runs, however prompts are cut, cached and preempted."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_infer_naive import STOPS, VOCAB, build, prompts_of, run

from fledge.errors import ConfigError, UserError
from fledge.infer.answers import _Randomness
from fledge.infer.causal import CausalModel
from fledge.infer.engine import Engine, EngineConfig
from fledge.infer.naive import generate, generate_uncached
from fledge.infer.quantize import quantize
from fledge.infer.sampling import uniforms
from fledge.layers.lora import Adapter, LoraConfig, Pair
from fledge.objectives.logprobs import target_logprobs
from fledge.types import Completion, Request, SamplingParams, TokenEvent

GREEDY = SamplingParams(max_tokens=10, temperature=0.0)
BLOCK = 4


class Words:
    """A tokenizer whose tokens are numbers."""

    vocab_size, pad_id, opening = VOCAB, 1, None

    def token_bytes(self, token_id: int) -> bytes:
        return f"{token_id} ".encode()


class Bytes:
    """A tokenizer whose tokens are bytes."""

    vocab_size, pad_id, opening = 256, 1, None

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def engine_of(model: CausalModel, tokenizer=None, **options) -> Engine:
    return Engine(model, tokenizer or Words(), EngineConfig(**{"num_blocks": 60, "block_size": BLOCK, **options}))


def asking(prompts: Sequence[Sequence[int]], params: SamplingParams, **more) -> list[Request]:
    """Prompt i with seed `params.seed + i`, as `naive.generate` counts."""
    return [
        Request(f"{params.seed}-{i}", tuple(prompt), replace(params, seed=params.seed + i), stop_ids=STOPS, **more)
        for i, prompt in enumerate(prompts)
    ]


def drain(engine: Engine) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def assert_all_free(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    engine._scheduler.blocks.check()
    assert not engine._written
    assert not engine._runner._tables._rows


# Prompts that begin alike, one a multiple of the block, one twice, one a block and a token.
PREFIX = prompts_of([12], seed=5)[0]
PROMPTS = [PREFIX, PREFIX[:9], [*PREFIX, 7], PREFIX, *prompts_of([1, 20, 5, BLOCK], seed=6)]


# Every block, band, grouping and table; what is left out differs from these by a number only.
@pytest.fixture(scope="module", params=["gpt", "gpt-post-norm", "gpt-window", "llama-grouped", "pocket"])
def model(request: pytest.FixtureRequest) -> CausalModel:
    return build(request.param).eval()


@pytest.fixture(scope="module")
def truth(model: CausalModel) -> list[Completion]:
    return run(generate_uncached, model, PROMPTS, GREEDY)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_step_tokens": 1, "max_live": 1},
        pytest.param({"max_step_tokens": 7, "max_live": 3}, marks=pytest.mark.slow),
        {"max_step_tokens": BLOCK, "max_live": 4},
        pytest.param({"block_size": 1, "num_blocks": 240}, marks=pytest.mark.slow),
        {"num_blocks": 11},
    ],
    ids=["whole", "chunks of 1", "chunks of 7", "chunks of a block", "blocks of 1", "preempted"],
)
def test_greedy_answers_equal_the_oracle(model: CausalModel, truth: list[Completion], options: dict[str, int]) -> None:
    engine = engine_of(model, **options)
    for num in (len(PROMPTS), 4):  # the second time the prompts are found in the cache, some of them wholly
        got = [own for [own] in engine.generate(asking(PROMPTS[:num], GREEDY))]
        assert [c.ids for c in got] == [c.ids for c in truth[:num]]
        assert [(c.text.strip(), c.finish_reason) for c in got] == [(c.text, c.finish_reason) for c in truth[:num]]
    assert_all_free(engine)
    stats = engine.stats()
    assert stats.num_cached_tokens > 0
    assert (stats.num_preempted > 0) == (options == {"num_blocks": 11})


def test_a_wholly_cached_prompt_runs_its_last_token_only(model: CausalModel, truth: list[Completion]) -> None:
    engine = engine_of(model)
    first, second = (drain_one(engine, request) for request in asking([PREFIX, PREFIX], GREEDY))
    assert [event.id for event in first] == [event.id for event in second] == list(truth[0].ids)
    assert (first[0].num_cached, second[0].num_cached) == (0, len(PREFIX) - BLOCK)


def drain_one(engine: Engine, request: Request) -> list[TokenEvent]:
    engine.submit(request)
    return drain(engine)[request.id]


def test_sampled_answers_equal_the_oracle_with_the_same_seed(model: CausalModel) -> None:
    engine = engine_of(model)
    for params in (
        SamplingParams(max_tokens=12, seed=4),
        SamplingParams(max_tokens=12, seed=30, temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
        SamplingParams(max_tokens=12, seed=60, presence_penalty=0.7, frequency_penalty=0.4, min_tokens=9),
    ):
        slow = run(generate_uncached, model, PROMPTS[:5], params)
        for [fast], expected in zip(engine.generate(asking(PROMPTS[:5], params)), slow, strict=True):
            assert fast.ids == expected.ids
            assert fast.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_log_probabilities_equal_the_trainers(model: CausalModel) -> None:
    engine = engine_of(model, max_step_tokens=64)
    params = SamplingParams(max_tokens=12, seed=9)
    engine.generate(asking([PREFIX], replace(params, seed=1)))  # the prompt's own must be found despite the cache
    requests = [replace(r, top_logprobs=3, prompt_logprobs=2) for r in asking(PROMPTS, params)]
    for request in requests:
        engine.submit(request)
    told = drain(engine)
    for request in requests:
        events = told[request.id]
        ids = [*request.prompt_ids, *(event.id for event in events)]
        tokens_1T = torch.tensor([ids])
        with torch.no_grad():
            logprobs_TV = model.next_logprobs(tokens_1T)[0]
            expected_T = target_logprobs(logprobs_TV[None, :-1], tokens_1T[:, 1:])[0]
        found = [*events[0].prompt, *(event.model for event in events)]
        assert [own.logprob for own in found] == pytest.approx(expected_T.tolist(), abs=1e-4)
        for place, own in enumerate(found):
            best = logprobs_TV[place].topk(len(own.top))
            assert [token for token, _ in own.top] == best.indices.tolist()
            assert own.rank == 1 + int((logprobs_TV[place] > logprobs_TV[place, ids[place + 1]]).sum())
        assert {len(own.top) for own in events[0].prompt} <= {2}
        assert {len(event.model.top) for event in events} == {3}
    for [score], request in zip(([s] for s in engine.score([r.prompt_ids for r in requests])), requests, strict=True):
        assert score == pytest.approx([own.logprob for own in told[request.id][0].prompt], abs=1e-4)


@pytest.fixture(scope="module")
def llama() -> CausalModel:
    return build("llama-grouped").eval()


@pytest.fixture(scope="module")
def pocket() -> CausalModel:
    return build("pocket").eval()


some_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 70),
    top_p=st.none() | st.floats(0.05, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([(), ((7, 2.5), (9, -math.inf))]),
    allowed_ids=st.none() | st.just(tuple(range(2, 40))),
)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_mixture_of_requests_at_any_times_gives_each_its_own_answer(
    pocket: CausalModel, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=7))
    prompts = [
        [*PREFIX, *prompt][-length:] for length, prompt in zip(lengths, prompts_of(lengths, seed=1), strict=True)
    ]
    params = [data.draw(some_params) for _ in prompts]
    arrivals = [data.draw(st.integers(0, 12)) for _ in prompts]
    budget = data.draw(st.sampled_from([3, 8, 64]))
    engine = engine_of(pocket, num_blocks=data.draw(st.sampled_from([10, 60])), max_step_tokens=budget, max_live=3)
    events: dict[str, list[TokenEvent]] = {}
    for step in range(1000):
        for number, arrival in enumerate(arrivals):
            if arrival == step:
                tenant = str(number % 2)
                engine.submit(Request(str(number), tuple(prompts[number]), params[number], STOPS, tenant=tenant))
        if step > max(arrivals) and not engine.has_work:
            break
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    assert_all_free(engine)
    for number, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        [expected] = run(generate, pocket, [prompt], own)
        assert tuple(event.id for event in events[str(number)]) == expected.ids
        assert events[str(number)][-1].finish_reason == expected.finish_reason


class Scripted(torch.nn.Module):
    """Says the token of its script that stands at the position read, one script for each first token of a prompt."""

    def __init__(self, scripts: dict[int, list[int]], vocab_size: int = 256) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.config = type("Config", (), {"max_positions": None})()
        table = torch.full((vocab_size, 64), 0)
        for first, script in scripts.items():
            table[first, : len(script)] = torch.tensor(script)
        self.register_buffer("table", table)

    def embed(self, tokens_BT, context):
        first_BT = tokens_BT
        for steps in range(1, 64):
            earlier_BT = context.earlier(tokens_BT, steps, -1)
            first_BT = torch.where(earlier_BT >= 0, earlier_BT, first_BT)
        said_BT = self.table[first_BT, context.positions_BT]
        return said_BT[..., None].float()

    def hidden(self, x_BTD, context):
        return context.attend(0, x_BTD[..., None], x_BTD[..., None], x_BTD[..., None])[..., 0] * 0 + x_BTD

    def unembed(self, x_BTD):
        logits = torch.where(torch.arange(self.vocab_size) == x_BTD, 50.0, -50.0)
        return torch.where(x_BTD < 0, torch.nan, logits)


def say(scripts: dict[int, bytes | list[int]], **options) -> dict[int, list[TokenEvent]]:
    """The events of one greedy answer for each script; token 0 ends it."""
    engine = engine_of(Scripted({first: list(script) for first, script in scripts.items()}), Bytes())
    params = SamplingParams(temperature=0.0, max_tokens=options.pop("max_tokens", 20))
    for first in scripts:
        engine.submit(Request(str(first), (first,), params, frozenset({0}), **options))
    told = drain(engine)
    assert_all_free(engine)
    return {first: told[str(first)] for first in scripts}


def test_a_stop_string_that_spans_tokens_is_withheld_and_never_leaks() -> None:
    [events] = say({9: b"Hi User: more"}, stop=("User:", "\n\n")).values()
    assert [event.text for event in events] == ["H", "i", " ", "", "", "", "", ""]
    assert events[-1].finish_reason == "stop"
    assert [event.id for event in events] == list(b"Hi User:")


def test_what_only_began_like_a_stop_string_is_told() -> None:
    [events] = say({9: b"a User: b"}, stop=("User!",)).values()
    assert "".join(event.text for event in events) == "a User: b"
    assert [event.text for event in events[2:7]] == ["", "", "", "", "User:"]


def test_an_answer_that_ends_with_the_beginning_of_a_stop_string_keeps_it() -> None:
    for script, max_tokens, reason in ((b"ab\0", 20, "stop"), (b"abc", 2, "length")):
        [events] = say({9: script}, stop=("bX",), max_tokens=max_tokens).values()
        assert "".join(event.text for event in events) == "ab"
        assert events[-1].finish_reason == reason


def test_a_stream_never_carries_half_a_character() -> None:
    script = "é中🐦。".encode() + b"\0"
    [events] = say({9: script}).values()
    assert [event.text for event in events] == ["", "é", "", "", "中", "", "", "", "🐦", "", "", "。", ""]
    [cut] = say({9: script}, max_tokens=4).values()
    assert [event.text for event in cut] == ["", "é", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_prediction_that_is_no_number_ends_its_own_answer_only() -> None:
    told = say({9: [*b"ab", -1, *b"cd"], 10: b"abcdef\0"})
    assert [(event.id, event.finish_reason) for event in told[9]] == [(97, None), (98, None), (-1, "error")]
    assert bytes(event.id for event in told[10]) == b"abcdef\0"


def test_several_answers_share_their_prompt_and_draw_with_seeds_of_their_own(llama: CausalModel) -> None:
    engine = engine_of(llama)
    params = SamplingParams(max_tokens=10, seed=3)
    [answers] = engine.generate([Request("a", tuple(PREFIX), params, STOPS, n=4)])
    assert [answer.ids for answer in answers] == [c.ids for c in run(generate, llama, [PREFIX] * 4, params)]
    stats = engine.stats()
    assert stats.num_cached_tokens == 3 * (len(PREFIX) - BLOCK)
    assert_all_free(engine)


def test_the_best_answers_are_those_of_the_highest_mean_log_probability(llama: CausalModel) -> None:
    params = SamplingParams(max_tokens=10, seed=3, temperature=1.5)
    engine = engine_of(llama)
    [answers] = engine.generate([Request("a", tuple(PREFIX), params, STOPS, n=2, best_of=6)])
    every = run(generate, llama, [PREFIX] * 6, params)
    means = []
    for one in every:
        [scores] = engine.score([[*PREFIX, *one.ids]])
        means.append(sum(scores[-len(one.ids) :]) / len(one.ids))
    best = sorted(range(6), key=lambda number: -means[number])[:2]
    assert [answer.ids for answer in answers] == [every[number].ids for number in best]
    assert best != [0, 1]


def test_the_best_of_several_carries_what_was_asked_of_the_prompt(llama: CausalModel) -> None:
    engine = engine_of(llama)
    params = SamplingParams(max_tokens=4, seed=3)
    engine.submit(Request("a", tuple(PREFIX), params, best_of=3, prompt_logprobs=0, top_logprobs=0))
    events = drain(engine)["a"]
    assert len(events[0].prompt) == len(PREFIX) - 1
    assert {event.index for event in events} == {0}
    assert all(event.model is not None for event in events)


def test_a_prompt_that_is_read_again_after_preemption_is_told_once(llama: CausalModel) -> None:
    engine = engine_of(llama, num_blocks=13)
    params = SamplingParams(max_tokens=20, seed=3)
    engine.submit(Request("b", tuple(PREFIX), params))
    engine.submit(Request("a", tuple(PREFIX), params, best_of=2, prompt_logprobs=0))
    told = drain(engine)
    assert engine.stats().num_preempted > 0
    [expected] = engine.score([PREFIX])
    assert [own.logprob for own in told["a"][0].prompt] == pytest.approx(expected, abs=1e-4)


def test_a_cancelled_request_ends_within_one_step_and_frees_its_blocks(llama: CausalModel) -> None:
    engine = engine_of(llama)
    [first, second] = asking([PREFIX, PREFIX], replace(GREEDY, max_tokens=30))
    engine.submit(replace(first, n=2, params=replace(first.params, temperature=1.0)))
    engine.submit(second)
    engine.step()
    assert engine.cancel(first.id)
    assert not engine.cancel("nobody")
    ended = [(e.request_id, e.index, e.id) for e in engine.step() if e.finish_reason == "cancelled"]
    assert ended == [(first.id, 0, -1), (first.id, 1, -1)]
    assert not engine.cancel(first.id)
    rest = drain(engine)
    assert set(rest) == {second.id}
    assert_all_free(engine)


def test_a_request_that_can_never_run_is_refused_by_name(llama: CausalModel) -> None:
    engine = engine_of(llama, num_blocks=10)
    good = Request("a", (5, 6), SamplingParams(max_tokens=4))
    engine.submit(good)
    refused = {
        "prompt is empty": replace(good, id="b", prompt_ids=()),
        "model knows 0 to 60": replace(good, id="b", prompt_ids=(5, 61)),
        "ids -1 to 5": replace(good, id="b", prompt_ids=(5, -1)),
        "64 positions": replace(good, id="b", prompt_ids=(5,) * 60, params=SamplingParams(max_tokens=5)),
        "positions of cache": replace(good, id="b", prompt_ids=(5,) * 38),
        "a request 'a' already": good,
        "no adapter 'x'": replace(good, id="b", adapter="x"),
        "logit_bias and stop_ids name ids 61": replace(
            good, id="b", params=SamplingParams(logit_bias=((61, 1.0),), max_tokens=4)
        ),
        "stop_ids name ids 3 to 61": replace(good, id="b", stop_ids=frozenset({3, 61})),
        "stop_ids name ids -1": replace(good, id="b", stop_ids=frozenset({-1})),
        "bias of infinity": replace(good, id="b", params=SamplingParams(logit_bias=((6, math.inf),), max_tokens=4)),
        "infinity leaves": replace(good, id="b", params=SamplingParams(logit_bias=((6, 1e39),), max_tokens=4)),
        "64 bits": replace(good, id="b", params=SamplingParams(seed=2**63, max_tokens=4)),
    }
    for complaint, request in refused.items():
        with pytest.raises(UserError, match=complaint):
            engine.submit(request)
    with pytest.raises(UserError, match="prompt is empty"):
        engine.generate([replace(good, id="c"), replace(good, id="d", prompt_ids=())])
    assert set(drain(engine)) == {"a"}
    assert_all_free(engine)


extreme_numbers = st.sampled_from([1e-300, 0.5, 1e6, 1e39, 1e300])
extreme_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 5),
    temperature=extreme_numbers,
    top_k=st.none() | st.sampled_from([1, 10**9, 2**62]),
    top_p=st.none() | st.sampled_from([1e-300, 1.0]),
    min_p=st.none() | st.sampled_from([1e-300, 1.0]),
    seed=st.sampled_from([-(2**63), 2**63 - 5]),
    presence_penalty=st.sampled_from([0.0, -1e300, 1e300]),
    frequency_penalty=st.sampled_from([0.0, -1e300, 1e300]),
    repetition_penalty=st.sampled_from([1.0, 1e-300, 1e300]),
    logit_bias=st.sampled_from([(), ((3, -math.inf), (3, 1e37), (4, -1e300)), ((5, 1e30),) * 5000]),
    allowed_ids=st.none() | st.sampled_from([(1,), (2, 2), tuple(range(VOCAB)) * 9]),
)


@settings(max_examples=25, deadline=None)
@given(
    params=extreme_params,
    stop_ids=st.frozensets(st.integers(0, VOCAB - 1)),
    min_tokens=st.integers(0, 1),
    stop=st.sampled_from([(), ("7", "x" * 9000), (" ",)]),
    told=st.none() | st.integers(0, 128),
)
def test_whatever_is_asked_for_no_step_fails(
    llama: CausalModel, params: SamplingParams, stop_ids: frozenset[int], min_tokens: int, stop, told
) -> None:
    engine = engine_of(llama)
    params = replace(params, min_tokens=min_tokens)
    more = {"stop_ids": stop_ids, "stop": stop, "top_logprobs": told, "prompt_logprobs": told, "n": 2}
    engine.submit(Request("a", tuple(PREFIX), params, **more))
    engine.submit(Request("b", (5,), replace(GREEDY, max_tokens=4)))
    told_of = drain(engine)
    assert {event.finish_reason for event in told_of["a"]} <= {None, "stop", "length", "error"}
    assert (
        tuple(event.id for event in told_of["b"]) == run(generate, llama, [[5]], replace(GREEDY, max_tokens=4))[0].ids
    )
    assert_all_free(engine)


def test_random_numbers_are_drawn_as_they_are_needed_and_are_those_of_the_whole_row() -> None:
    params = SamplingParams(max_tokens=1000, seed=-7)
    drawn = _Randomness(params.seed)
    places = [0, 63, 64, 500, 3, 999]
    assert [drawn.number(place) for place in places] == uniforms(1, params, None)[0, places].tolist()


def test_what_cannot_be_an_engine_is_refused(llama: CausalModel) -> None:
    with pytest.raises(UserError, match="256 tokens, the model only 61"):
        engine_of(llama, Bytes())
    with pytest.raises(ConfigError, match="max_step_tokens"):
        engine_of(llama, max_live=8, max_step_tokens=4)
    with pytest.raises(ConfigError, match="cache_type is one of model, float16, got 'int8'"):
        engine_of(llama, cache_type="int8")
    with pytest.raises(UserError, match="does not hold a block"):
        Engine(llama, Words(), EngineConfig(cache_bytes=1000))
    assert Engine(llama, Words(), EngineConfig(cache_bytes=100_000)).stats().num_blocks > 5


def test_a_cache_of_half_precision_takes_half_the_memory_and_answers_depend_on_nothing_else(llama: CausalModel) -> None:
    exact, params = engine_of(llama), SamplingParams(max_tokens=10, seed=4)
    [expected] = exact.generate(asking([PREFIX], params))[0]
    found = []
    for options in (
        {},
        {"max_step_tokens": 1, "max_live": 1},
        {"max_step_tokens": 7, "max_live": 3},
        {"num_blocks": 11},
    ):
        engine = engine_of(llama, cache_type="float16", **options)
        for _ in range(2):  # the second time from the cache
            found.append([own for [own] in engine.generate(asking(PROMPTS, params))])
    for told in found[1:]:
        assert [own.ids for own in told] == [own.ids for own in found[0]]
        for own, other in zip(told, found[0], strict=True):
            # A last digit of float32 may decide how a key is rounded to half precision, so not to 1e-5.
            assert own.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    rounded = found[0][0].logprobs[0]
    assert rounded != expected.logprobs[0]
    assert rounded == pytest.approx(expected.logprobs[0], abs=1e-2)
    assert engine_of(llama, cache_type="float16").stats().cache_bytes == exact.stats().cache_bytes // 2


def test_generating_leaves_the_events_of_others_to_step(llama: CausalModel) -> None:
    engine = engine_of(llama)
    [own, other] = asking([PREFIX, PREFIX[:5]], GREEDY)
    engine.submit(other)
    [[answer]] = engine.generate([own])
    told = drain(engine)
    expected = run(generate, llama, [PREFIX, PREFIX[:5]], GREEDY)
    assert answer.ids == expected[0].ids
    assert tuple(event.id for event in told[other.id]) == expected[1].ids


def test_after_an_update_answers_are_those_of_the_new_weights() -> None:
    model, other = build("llama-grouped"), opposite()
    engine = engine_of(model)
    [before] = engine.generate(asking([PREFIX], GREEDY))[0]
    running = asking([PREFIX], replace(GREEDY, max_tokens=8))[0]
    engine.submit(running)
    said = [event.id for _ in range(3) for event in engine.step()]
    engine.update_weights(dict(other.state_dict()), "two")
    said += [event.id for event in drain(engine)[running.id]]
    [expected] = run(generate_uncached, other, [[*PREFIX, *said[:3]]], replace(GREEDY, max_tokens=5))
    assert tuple(said[3:]) == expected.ids
    [after] = engine.generate(asking([PREFIX], GREEDY))[0]
    assert after.ids == run(generate_uncached, other, [PREFIX], GREEDY)[0].ids != before.ids
    assert engine.stats().weights_version == "two"
    for wrong, complaint in (
        ({"x": torch.zeros(1)}, "no weight 'x'"),
        ({"tokens.weight": torch.zeros(1)}, "got"),
    ):
        with pytest.raises(UserError, match=complaint):
            engine.update_weights(wrong, "three")
    assert engine.stats().weights_version == "two"


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_prompt_that_is_being_read_when_weights_change_is_told_by_the_new_ones_alone(num_steps: int) -> None:
    model, other = build("llama-grouped"), opposite()
    engine = engine_of(model, max_step_tokens=BLOCK, max_live=1)
    engine.submit(Request("a", tuple(PREFIX), GREEDY, prompt_logprobs=1, n=2, best_of=3))
    for _ in range(num_steps):
        engine.step()
    read_before = list(next(iter(engine._jobs.values())).prompt)
    engine.update_weights(dict(other.state_dict()), "two")
    told = [own.logprob for own in drain(engine)["a"][0].prompt]
    if num_steps == 3:  # it was read to its end before
        assert told == [own.logprob for own in read_before]
    else:
        assert len(read_before) == num_steps * BLOCK
        assert told == pytest.approx(engine.score([PREFIX])[0], abs=1e-4)


def opposite() -> CausalModel:
    model = build("llama-grouped").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    return model


def test_new_weights_reach_the_layers_around_which_adapters_are_wrapped() -> None:
    other = opposite()
    engine = engine_of(build("llama-grouped"))
    name = "blocks.0.attention.query"
    engine.load_adapter("a", Adapter(LoraConfig(rank=1), {name: Pair(torch.ones(1, 32), torch.ones(32, 1), 9.0)}))
    engine.update_weights(dict(other.state_dict()), "two")
    [truth] = run(generate_uncached, other, [PREFIX], GREEDY)
    [[plain]] = engine.generate(asking([PREFIX], GREEDY))
    [[adapted]] = engine.generate(asking([PREFIX], replace(GREEDY, seed=1), adapter="a"))
    assert plain.ids == truth.ids != adapted.ids
    engine.unload_adapter("a")
    engine.update_weights({f"{name}.weight": torch.zeros(32, 32)}, "three")
    [[zeroed]] = engine.generate(asking([PREFIX], GREEDY))
    with torch.no_grad():
        other.get_parameter(f"{name}.weight").zero_()
    assert zeroed.ids == run(generate_uncached, other, [PREFIX], GREEDY)[0].ids


def test_new_weights_of_a_quantised_model_are_quantised_anew() -> None:
    model, other = build("llama-grouped"), opposite()
    weights = {name: own.clone() for name, own in other.state_dict().items()}
    for own in (model, other):
        quantize(own, "int8")
    engine = engine_of(model)
    engine.update_weights(weights, "two")
    [[answer]] = engine.generate(asking([PREFIX], GREEDY))
    assert answer.ids == engine_of(other).generate(asking([PREFIX], GREEDY))[0][0].ids


def test_a_model_in_training_mode_runs_without_dropout_and_gets_its_mode_back(llama: CausalModel) -> None:
    model = build("gpt")
    model.drop.p = 0.9
    model.train()
    model.blocks.eval()
    modes = [module.training for module in model.modules()]
    engine = engine_of(model)
    got = [own.ids for [own] in engine.generate(asking(PROMPTS[:3], GREEDY))]
    assert [module.training for module in model.modules()] == modes
    assert got == [c.ids for c in run(generate_uncached, model.eval(), PROMPTS[:3], GREEDY)]


def test_tenants_do_not_share_prefixes(llama: CausalModel) -> None:
    engine = engine_of(llama)
    for number, tenant in enumerate(("a", "b", "a")):
        events = drain_one(engine, Request(str(number), tuple(PREFIX), GREEDY, tenant=tenant))
        assert events[0].num_cached == (len(PREFIX) - BLOCK if number == 2 else 0)


def test_embeddings_are_of_length_one_and_do_not_depend_on_their_neighbours(pocket: CausalModel) -> None:
    engine = engine_of(pocket)
    rows = prompts_of([3, 9, 1, 9])
    together = engine.embed(rows)
    assert together.shape == (4, 32)
    assert torch.allclose(together.norm(dim=1), torch.ones(4))
    for row, vector in zip(rows, together, strict=True):
        assert torch.allclose(engine.embed([row])[0], vector, atol=1e-5)


def storm(num_requests: int, model: CausalModel) -> None:
    """Requests at random times, of random kinds, a third of them cancelled at some point."""
    rng = random.Random(num_requests)
    engine = engine_of(model, num_blocks=25, max_live=8, max_step_tokens=32)
    ended: dict[tuple[str, int], str] = {}
    alive: list[str] = []
    expected = number = 0
    while number < num_requests or engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 4])):
            if number < num_requests:
                request = random_request(rng, number)
                engine.submit(request)
                alive.append(request.id)
                expected += request.n
                number += 1
        if alive and rng.random() < 0.2:
            engine.cancel(alive.pop(rng.randrange(len(alive))))
        for event in engine.step():
            key = event.request_id, event.index
            assert key not in ended, f"{key} goes on after its end"
            if event.finish_reason is not None:
                ended[key] = event.finish_reason
    assert len(ended) == expected
    assert set(ended.values()) == {"stop", "length", "cancelled"}
    assert_all_free(engine)


def random_request(rng: random.Random, number: int) -> Request:
    prompt = PREFIX[: rng.randrange(13)] + [rng.randrange(5, VOCAB) for _ in range(rng.randrange(1, 9))]
    params = SamplingParams(max_tokens=rng.randrange(1, 12), temperature=rng.choice([0.0, 1.0]), seed=number)
    n = rng.choice([1, 1, 1, 2])
    best_of = rng.choice([None, n + 1])
    return Request(str(number), tuple(prompt), params, STOPS, tenant=rng.choice("abc"), n=n, best_of=best_of)


def test_random_requests_with_random_cancellations_leave_every_block_free() -> None:
    storm(150, build("llama-grouped").eval())


@pytest.mark.slow
def test_ten_thousand_random_requests_with_random_cancellations_leave_every_block_free() -> None:
    storm(10_000, build("llama-grouped").eval())
