"""Cached generation against the oracle that runs the whole model for every token, over every causal family."""

from __future__ import annotations

import codecs
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fledge.errors import UserError
from fledge.infer.cache import CacheContext
from fledge.infer.naive import CausalModel, _close_ranks, generate, generate_uncached, stream
from fledge.layers.rope import Llama3Scaling
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.ngram import NGram, NGramConfig
from fledge.models.pocket import Pocket, PocketConfig
from fledge.types import Completion, SamplingParams

VOCAB, PAD = 61, 1
STOPS = frozenset({2, 3, 4})
GREEDY = SamplingParams(max_tokens=14, temperature=0.0)

CONFIGS: dict[str, GPTConfig | LlamaConfig | PocketConfig] = {
    "gpt": GPTConfig(VOCAB, 24, 2, 3, max_positions=40),
    "gpt-post-norm": GPTConfig(VOCAB, 24, 2, 2, max_positions=40, block="post_norm"),
    "gpt-window": GPTConfig(VOCAB, 24, 3, 3, max_positions=40, window=4),
    "llama": LlamaConfig(VOCAB, 32, 2, 4, 4, 48),
    "llama-grouped": LlamaConfig(
        VOCAB,
        32,
        2,
        4,
        2,
        48,
        max_positions=64,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16),
        is_head_tied=True,
    ),
    "pocket": PocketConfig(VOCAB, 32, 3, 2, table_rows=97),
    "pocket-no-tables": PocketConfig(VOCAB, 32, 2, 2, table_rows=0),
}


def build(name: str) -> CausalModel:
    """A model of random weights with opinions: every matrix is large enough that its answers vary."""
    config = CONFIGS[name]
    kinds = {GPTConfig: GPT, LlamaConfig: Llama, PocketConfig: Pocket}
    model: nn.Module = kinds[type(config)](config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.5 / math.sqrt(parameter.shape[1]), generator=generator)
    return model  # type: ignore[return-value]


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, VOCAB) for _ in range(length)] for length in lengths]


def text_of(ids) -> str:
    return " ".join(map(str, ids))


def run(how, model: CausalModel, prompts: list[list[int]], params: SamplingParams, **more) -> list[Completion]:
    return how(model, prompts, params, stop_ids=STOPS, pad_id=PAD, decode=text_of, **more)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> CausalModel:
    return build(request.param)


@pytest.mark.parametrize(
    "lengths",
    [[1], [1, 9, 4, 2, 7], *(pytest.param(some, marks=pytest.mark.slow) for some in ([6], [5, 5, 5]))],
)
def test_greedy_answers_equal_the_oracle_for_any_batch(model: CausalModel, lengths: list[int]) -> None:
    prompts = prompts_of(lengths)
    fast, slow = run(generate, model, prompts, GREEDY), run(generate_uncached, model, prompts, GREEDY)
    assert [c.ids for c in fast] == [c.ids for c in slow]
    assert [(c.text, c.finish_reason) for c in fast] == [(c.text, c.finish_reason) for c in slow]


def test_sampled_answers_and_their_log_probabilities_equal_the_oracle(model: CausalModel) -> None:
    prompts = prompts_of([3, 1, 8, 8])
    for params in (
        SamplingParams(max_tokens=12, seed=4),
        SamplingParams(max_tokens=12, temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
    ):
        for fast, slow in zip(
            run(generate, model, prompts, params), run(generate_uncached, model, prompts, params), strict=True
        ):
            assert fast.ids == slow.ids
            assert fast.logprobs == pytest.approx(slow.logprobs, abs=1e-4)


SHAPED = SamplingParams(
    max_tokens=12,
    seed=4,
    presence_penalty=0.6,
    frequency_penalty=0.4,
    repetition_penalty=1.3,
    logit_bias=((7, 3.0), (9, -math.inf)),
    allowed_ids=tuple(range(2, 40)),
    min_tokens=5,
)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shaped_answers_equal_the_oracle_row_by_row(model: CausalModel, temperature: float) -> None:
    prompts = prompts_of([3, 1, 8, 8, 2])
    params = replace(SHAPED, temperature=temperature)
    fast, slow = run(generate, model, prompts, params), run(generate_uncached, model, prompts, params)
    assert [c.ids for c in fast] == [c.ids for c in slow]
    plain = run(generate, model, prompts, replace(GREEDY, temperature=temperature, max_tokens=12, seed=4))
    assert [c.ids for c in fast] != [c.ids for c in plain]
    for completion in fast:
        assert len(completion.ids) >= 5
        assert not STOPS & set(completion.ids[:4])
        assert set(completion.ids) <= set(range(2, 40)) - {9}
    [prompt], events = prompts[:1], stream(model, prompts[0], params, stop_ids=STOPS, pad_id=PAD, decoder=Words())
    assert tuple(event.id for event in events) == run(generate, model, [prompt], params)[0].ids


def test_ids_that_the_model_does_not_know_are_refused(model: CausalModel) -> None:
    for how in (generate, generate_uncached):
        with pytest.raises(UserError, match="logit_bias and stop_ids name ids 61 to 61"):
            run(how, model, [[5]], SamplingParams(logit_bias=((61, 1.0),)))


def test_c5_cached_log_probabilities_equal_one_full_forward(model: CausalModel) -> None:
    prompts = prompts_of([2, 7, 5])
    params = SamplingParams(max_tokens=12, seed=9)
    for prompt, completion in zip(prompts, run(generate, model, prompts, params), strict=True):
        tokens_1T = torch.tensor([[*prompt, *completion.ids]])
        with torch.no_grad():
            logprobs_TV = model.next_logprobs(tokens_1T)[0]
        logprobs_TV[:, PAD] = -math.inf  # banned when drawn, so banned when scored (C22)
        logprobs_TV = logprobs_TV.log_softmax(-1)
        expected = [float(logprobs_TV[len(prompt) - 1 + step, token]) for step, token in enumerate(completion.ids)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_c2_a_left_padded_prompt_gives_the_logits_of_the_prompt_alone(model: CausalModel) -> None:
    prompts = prompts_of([3, 9])
    context = CacheContext([3, 9], capacity=9)
    tokens_BT = torch.tensor([[PAD] * 6 + prompts[0], prompts[1]])
    with torch.no_grad():
        context.feed(tokens_BT)
        logits_BTV = model.unembed(model.hidden(model.embed(tokens_BT, context), context))
        for row, prompt in enumerate(prompts):
            got = logits_BTV[row, 9 - len(prompt) :].log_softmax(-1)
            assert torch.allclose(got, model.next_logprobs(torch.tensor([prompt]))[0], atol=1e-5)


def test_a_sampled_answer_does_not_depend_on_its_neighbours(model: CausalModel) -> None:
    prompts = prompts_of([4, 2, 9, 1, 6])
    together = run(generate, model, prompts, SamplingParams(max_tokens=14, seed=20))
    for row, prompt in enumerate(prompts):
        [alone] = run(generate, model, [prompt], SamplingParams(max_tokens=14, seed=20 + row))
        assert alone.ids == together[row].ids


def test_the_tests_above_saw_rows_end_at_different_times(model: CausalModel) -> None:
    completions = run(generate, model, prompts_of([4] * 24), SamplingParams(max_tokens=14, seed=20))
    assert len({len(c.ids) for c in completions}) > 3
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert not STOPS & set(c.ids[:-1])
        assert (c.ids[-1] in STOPS) == (c.finish_reason == "stop")
        assert len(c.ids) == len(c.logprobs)
        assert len(c.ids) == 14 or c.finish_reason == "stop"
        assert c.text == text_of(c.ids[:-1] if c.finish_reason == "stop" else c.ids)


def test_streaming_gives_the_tokens_of_generate(model: CausalModel) -> None:
    [prompt] = prompts_of([5])
    params = SamplingParams(max_tokens=14, seed=2)
    [expected] = run(generate, model, [prompt], params)
    events = list(stream(model, prompt, params, stop_ids=STOPS, pad_id=PAD, decoder=Words()))
    assert tuple(e.id for e in events) == expected.ids
    assert [e.logprob for e in events] == pytest.approx(expected.logprobs, abs=1e-6)
    assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + [expected.finish_reason]
    assert "".join(e.text for e in events).strip() == expected.text


class Words:
    """A stream decoder that says every id as a number."""

    def push(self, token_id: int) -> str:
        return f"{token_id} "

    def flush(self) -> str:
        return ""


class Scripted(nn.Module):
    """Says the tokens of a script one after the other, whatever it reads; NaN once the script is at an end."""

    def __init__(self, script: list[int], max_positions: int | None = None) -> None:
        super().__init__()
        self.vocab_size, self.script = 256, script
        self.config = type("Config", (), {"max_positions": max_positions})()
        self.register_buffer("told", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def embed(self, tokens_BT, context):
        return context.positions_BT[..., None].float()

    def hidden(self, x_BTD, context):
        return x_BTD

    def unembed(self, x_BTD):
        assert not self.drop.training
        step = int(x_BTD[0, -1, 0])
        logits_BTV = torch.full((*x_BTD.shape[:2], self.vocab_size), -50.0)
        logits_BTV[..., self.script[step] if step < len(self.script) else slice(None)] = (
            50.0 if step < len(self.script) else math.nan
        )
        return logits_BTV

    def next_logprobs(self, tokens_BT):
        assert not self.drop.training
        return self.unembed(torch.arange(tokens_BT.shape[1])[None, :, None].float()).log_softmax(-1)


class Utf8:
    """A stream decoder whose ids are bytes."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self.decoder.decode(bytes([token_id]))

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


def test_a_stream_never_shows_half_a_character() -> None:
    script = [*"é中".encode(), 0]
    events = list(stream(Scripted(script), [9], SamplingParams(), stop_ids={0}, pad_id=1, decoder=Utf8()))
    assert [e.text for e in events] == ["", "é", "", "", "中", ""]
    assert events[-1].finish_reason == "stop"


def test_a_stream_that_is_cut_within_a_character_says_so_at_its_end() -> None:
    script = [*"a中".encode()]
    params = SamplingParams(max_tokens=2)
    events = list(stream(Scripted(script), [9], params, stop_ids={0}, pad_id=1, decoder=Utf8()))
    assert [e.text for e in events] == ["a", "\N{REPLACEMENT CHARACTER}"]
    assert events[-1].finish_reason == "length"


@pytest.mark.parametrize("how", [generate, generate_uncached])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_answers_nan_is_refused(how, temperature: float) -> None:
    params = SamplingParams(max_tokens=4, temperature=temperature)
    with pytest.raises(UserError, match="token 2 is not a number"):
        how(Scripted([5, 6]), [[9]], params, stop_ids=(), pad_id=1, decode=text_of)


def test_the_pad_id_is_never_drawn() -> None:
    for params in (SamplingParams(max_tokens=1, temperature=0.0), SamplingParams(max_tokens=1)):
        [completion] = generate(Scripted([77]), [[9]], params, stop_ids=(), pad_id=77, decode=text_of)
        assert completion.ids != (77,)


@pytest.mark.parametrize("how", [generate, generate_uncached])
def test_the_model_runs_without_dropout_and_gets_its_mode_back(how) -> None:
    model = Scripted([5, 6])
    model.train()
    model.drop.eval()
    before = [module.training for module in model.modules()]
    how(model, [[9]], SamplingParams(max_tokens=2), stop_ids=(), pad_id=1, decode=text_of)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(UserError):
        how(model, [[9]], SamplingParams(max_tokens=3), stop_ids=(), pad_id=1, decode=text_of)
    assert [module.training for module in model.modules()] == before


def test_between_two_tokens_of_a_stream_the_model_is_in_its_own_mode() -> None:
    model = Scripted([5, 6, 7])
    model.train()
    events = stream(model, [9], SamplingParams(max_tokens=3), stop_ids=(), pad_id=1, decoder=Words())
    for _ in events:
        assert model.training
        assert model.drop.training
        assert not torch.is_inference_mode_enabled()


def test_generating_leaves_gradients_working() -> None:
    model = build("pocket")
    run(generate, model, prompts_of([3, 5]), GREEDY)
    loss = -model.next_logprobs(torch.tensor(prompts_of([6])))[0, :, 5].sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("how", [generate, generate_uncached])
def test_no_prompts_give_no_completions(how) -> None:
    assert run(how, build("gpt"), [], GREEDY) == []


def refusals(prompt: list[int], max_tokens: int, model: CausalModel):
    params = SamplingParams(max_tokens=max_tokens)
    yield lambda: run(generate, model, [[5], prompt], params)
    yield lambda: run(generate_uncached, model, [[5], prompt], params)
    yield lambda: stream(model, prompt, params, stop_ids=STOPS, pad_id=PAD, decoder=Words())


def test_an_empty_prompt_is_refused() -> None:
    for ask in refusals([], 3, build("gpt")):
        with pytest.raises(UserError, match="empty"):
            ask()


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    for bad in ([VOCAB], [-1, 5]):
        for ask in refusals(bad, 3, build("gpt")):
            with pytest.raises(UserError, match=f"model knows 0 to {VOCAB - 1}"):
                ask()


def test_a_prompt_without_room_for_its_answer_is_refused_naming_both_lengths() -> None:
    model = build("gpt")  # 40 positions
    for ask in refusals([5] * 31, 10, model):
        with pytest.raises(UserError, match=r"31 tokens and max_tokens 10 .* 40 positions"):
            ask()
    [completion] = run(generate, model, [[5] * 30], SamplingParams(max_tokens=10, temperature=0.0))
    assert len(completion.ids) <= 10


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_closing_ranks_keeps_who_goes_on_and_moves_as_few_as_possible(is_going: list[bool]) -> None:
    going = [place for place, goes in enumerate(is_going) if goes]
    order = _close_ranks(going)
    assert sorted(order) == going
    assert sum(new != old for new, old in enumerate(order)) == sum(place >= len(going) for place in going)


@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    greedy=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_any_batch_answers_as_its_rows_do_alone(lengths: list[int], seed: int, greedy: bool) -> None:
    model, prompts = build("gpt-window"), prompts_of(lengths, seed)
    params = SamplingParams(max_tokens=10, temperature=0.0 if greedy else 1.0, seed=seed)
    expected = run(generate_uncached, model, prompts, params)
    assert [c.ids for c in run(generate, model, prompts, params)] == [c.ids for c in expected]


def test_an_n_gram_answers_through_the_oracle() -> None:
    model = NGram.fit([np.array([5, 6, 7, 5, 6, 7, 5, 6, 7])], NGramConfig(VOCAB, 3))
    [completion] = run(generate_uncached, model, [[5, 6]], SamplingParams(max_tokens=4, temperature=0.0))
    assert completion.ids == (7, 5, 6, 7)
