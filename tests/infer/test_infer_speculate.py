"""Speculative decoding: the same answers as without, greedy or sampled, and guesses that are worth something."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import jsonschema
import pytest
import torch
from test_infer_engine import (
    GREEDY,
    PREFIX,
    PROMPTS,
    Words,
    asking,
    assert_all_free,
    drain,
    engine_of,
    random_request,
)
from test_infer_naive import VOCAB, build, run

from fledge.errors import ConfigError, UserError
from fledge.infer.causal import CausalModel
from fledge.infer.engine import Engine, EngineConfig
from fledge.infer.naive import generate, generate_uncached
from fledge.infer.sequence import Live
from fledge.infer.speculate import NgramProposer, Speculator, Wish
from fledge.models.llama import Llama, LlamaConfig
from fledge.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from fledge.text.tools import STYLES, Tool, call_grammar
from fledge.types import Grammar, Request, SamplingParams


@pytest.fixture(scope="module")
def model() -> CausalModel:
    return build("llama-grouped").eval()


def near(name: str, noise: float) -> CausalModel:
    """A model that mostly agrees with `build(name)`."""
    model = build(name).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


def drafting(model: CausalModel, draft_model: CausalModel | None, num_draft: int = 3, **options) -> Engine:
    config = EngineConfig(**{"num_blocks": 60, "block_size": 4, "num_draft": num_draft, **options})
    return Engine(model, Words(), config, draft_model)


def draft_of(name: str) -> CausalModel | None:
    return {
        "n-grams": None,
        "itself": build("llama-grouped").eval(),
        "near": near("llama-grouped", 0.02),
    }.get(name, build("gpt").eval())


TIGHT = {"num_blocks": 16, "max_step_tokens": 9, "max_live": 4}


# The stranger reads fewer positions than the longest answers need.
@pytest.mark.parametrize(
    ("who", "options"),
    [
        *((who, {}) for who in ("n-grams", "itself", "near", "stranger")),
        *((who, TIGHT) for who in ("n-grams", "near")),
        *(pytest.param(who, TIGHT, marks=pytest.mark.slow) for who in ("itself", "stranger")),
    ],
)
def test_answers_are_the_same_with_speculation(model: CausalModel, who: str, options: dict[str, int]) -> None:
    long = replace(GREEDY, max_tokens=20)
    prompts = [*PROMPTS[2:], PREFIX[:4] * 4]
    truth = run(generate_uncached, model, prompts, long)
    engine = drafting(model, draft_of(who), **options)
    for _ in range(2):
        assert [own.ids for [own] in engine.generate(asking(prompts, long))] == [c.ids for c in truth]
    for params in (
        SamplingParams(max_tokens=20, seed=7, temperature=0.6),
        SamplingParams(max_tokens=20, seed=70, top_p=0.8, repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=6),
    ):
        slow = run(generate, model, prompts, params)
        assert [own.ids for [own] in engine.generate(asking(prompts, params))] == [c.ids for c in slow]
    assert_all_free(engine)
    stats = engine.stats()
    assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens
    if who == "itself":
        assert stats.num_accepted_tokens > 0.8 * stats.num_draft_tokens


def test_a_model_that_drafts_for_itself_takes_a_fraction_of_the_steps(model: CausalModel) -> None:
    params = SamplingParams(max_tokens=20, seed=7)
    steps = []
    for engine in (engine_of(model), drafting(model, draft_of("itself"))):
        engine.generate([replace(request, stop_ids=frozenset()) for request in asking([PREFIX], params)])
        steps.append(engine.stats().num_steps)
    assert steps == [20, 6]  # the prompt's step draws one; then 4, 4, 4, 4 and the 3 that are left


def test_drafting_frees_everything_under_random_cancellations(model: CausalModel) -> None:
    import random

    rng = random.Random(0)
    engine = drafting(model, near("llama-grouped", 0.02), num_blocks=25, max_live=8, max_step_tokens=32)
    for number in range(60):
        engine.submit(random_request(rng, number))
        engine.step()
        if rng.random() < 0.3:
            engine.cancel(str(rng.randrange(number + 1)))
    drain(engine)
    assert_all_free(engine)
    proposer = engine._speculator._proposer
    assert not proposer._shadows
    assert proposer._blocks.num_free == proposer._blocks.num_blocks


def test_sampled_tokens_follow_the_models_distribution(model: CausalModel) -> None:
    """Chi-square over the second token of 1000 answers, which is mostly drawn after a guess."""
    num_seeds, params = 1000, SamplingParams(max_tokens=3, temperature=1.0, top_k=6)
    draft_model = near("llama-grouped", 0.01)
    engine = drafting(model, draft_model, num_draft=2, num_blocks=600, max_live=64)
    requests = [Request(str(seed), tuple(PREFIX), replace(params, seed=seed)) for seed in range(num_seeds)]
    answers = [own.ids for [own] in engine.generate(requests)]
    stats = engine.stats()
    assert 0.2 < stats.num_accepted_tokens / stats.num_draft_tokens < 0.95  # both ways are taken often
    [first, _] = Counter(ids[0] for ids in answers).most_common(1)[0]
    seconds = Counter(ids[1] for ids in answers if ids[0] == first)
    total = seconds.total()
    with torch.no_grad():
        logprobs_V = model.next_logprobs(torch.tensor([[*PREFIX, first]]))[0, -1]
    logprobs_V[1] = -math.inf
    kept = logprobs_V.topk(6)
    probs = dict(zip(kept.indices.tolist(), kept.values.softmax(-1).tolist(), strict=True))
    assert set(seconds) <= set(probs)
    chi_square = sum((seconds[token] - total * p) ** 2 / (total * p) for token, p in probs.items())
    assert total > 200
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in 1000


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def talking(tokenizer: Tokenizer, noise: float = 0.0) -> CausalModel:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(tokenizer.vocab_size + 3, 32, 2, 2, 1, 48, is_head_tied=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def held_to_grammars(tokenizer: Tokenizer) -> list[Request]:
    """Prompts full of what could be guessed: the form itself, stop tokens, and ids that the tokenizer lacks."""
    end, beyond = tokenizer.special_id("<|end|>"), tokenizer.vocab_size + 1
    spelled = tokenizer.encode('{"city":"Rome","days":2} ')
    prompts = [spelled * 2, [*tokenizer.encode('{"'), beyond, end] * 3, [*tokenizer.encode('{"city":"'), end] * 3]
    schema = Grammar("json_schema", json.dumps(WEATHER))
    call = call_grammar([Tool("weather", parameters=json.dumps(WEATHER))], "required", STYLES["hermes"])
    asked = [(prompt, grammar) for prompt in prompts for grammar in (schema, Grammar("regex", "[a-z]{4}[0-9]+"), call)]
    return [
        Request(
            f"{number} at {temperature}",
            tuple(prompt),
            SamplingParams(max_tokens=40, temperature=temperature, seed=number),
            stop_ids=frozenset({end}),
            grammar=grammar,
        )
        for temperature in (0.0, 0.7)
        for number, (prompt, grammar) in enumerate([*asked, (spelled, None)])
    ]


def test_answers_under_a_grammar_are_the_same_with_speculation() -> None:
    texts = ['{"city":"Rome","days":2} <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}']
    tokenizer = train_tokenizer(texts, TokenizerConfig("bpe", 330))
    requests = held_to_grammars(tokenizer)
    model, config = talking(tokenizer), EngineConfig(num_blocks=200, block_size=8)
    plain = [own for [own] in Engine(model, tokenizer, config).generate(requests)]
    for request, answer in zip(requests, plain, strict=True):
        assert answer.finish_reason in ("stop", "length")
        if request.grammar is not None and request.grammar.kind == "json_schema" and answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), WEATHER)
    for draft_model in (None, talking(tokenizer), talking(tokenizer, 0.02)):
        engine = Engine(model, tokenizer, replace(config, num_draft=4), draft_model)
        for request, expected, [got] in zip(requests, plain, engine.generate(requests), strict=True):
            same = (got.ids, got.text, got.finish_reason) == (expected.ids, expected.text, expected.finish_reason)
            assert same, (request.id, expected, got)
            assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert_all_free(engine)
        assert engine.stats().num_accepted_tokens > 50


def wish_of(tokens: list[int], limit: int) -> Wish:
    return Wish(Live(0, tokens, 1, 99), None, limit)


def test_n_grams_continue_as_the_text_did_before() -> None:
    proposer = NgramProposer()
    live = Live(0, [1, 2, 3, 4, 5, 9, 1, 2, 3], 9, 99)
    assert proposer.propose([Wish(live, None, 3)]) == [[4, 5, 9]]
    live.tokens += [4, 7, 2, 3]
    assert proposer.propose([Wish(live, None, 3)]) == [[4, 7, 2]]  # the latest time, not the first
    live.tokens += [8, 8]
    assert proposer.propose([Wish(live, None, 3)]) == [[]]
    proposer.forget(live)
    assert proposer.propose([wish_of([5], 3), wish_of([5, 5, 5], 2)]) == [[], [5]]


def test_the_longest_ending_that_was_seen_decides() -> None:
    assert NgramProposer().propose([wish_of([7, 1, 2, 50, 9, 1, 2, 60, 7, 1, 2], 1)]) == [[50]]


def test_a_sequence_whose_guesses_fail_gets_fewer() -> None:
    class Fixed:
        def propose(self, wishes):
            return [[1] * wish.limit for wish in wishes]

        def forget(self, live): ...

    class Said:
        live = Live(0, [1, 2], 1, 99, num_computed=1, blocks=[0])

    speculator = Speculator(Fixed(), 8)
    sizes = []
    for num_accepted in (8, 0, 1, 2, 1, 2, 8):
        speculator.propose([Said()])
        num_draft = len(Said.live.draft)
        sizes.append(num_draft)
        speculator.observe(Said.live, num_draft, min(num_accepted, num_draft))
    assert sizes == [8, 8, 1, 2, 4, 2, 4]


def test_a_draft_model_of_another_vocabulary_is_refused(model: CausalModel) -> None:
    class Other:
        vocab_size = VOCAB + 1

    with pytest.raises(UserError, match="share a tokenizer"):
        drafting(model, Other())
    with pytest.raises(ConfigError, match="num_draft 0"):
        drafting(model, model, num_draft=0)
    with pytest.raises(ConfigError, match="0 or more"):
        drafting(model, None, num_draft=-1)
