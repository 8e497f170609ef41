"""Generating text, the plain way: the oracle that runs the whole model for every token, and the cached path.

`generate_uncached` is what generation means; `generate` and `stream` give the same tokens faster, with the dense
cache of cache.py. RL rollouts, evals and the commands call those two.

Shapes: B rows still going, T new positions, V vocabulary, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fledge.errors import UserError
from fledge.infer.cache import CacheContext
from fledge.infer.causal import CausalModel, device_of, evaluating
from fledge.infer.sampling import sample, uniforms
from fledge.infer.shaping import Shaper, check_ids
from fledge.layers.attention import Context, RowContext
from fledge.types import Completion, FinishReason, SamplingParams, TokenEvent

__all__ = ["CausalModel", "Decode", "Decoder", "generate", "generate_uncached", "stream"]

Decode = Callable[[Sequence[int]], str]


class Decoder(Protocol):
    """Turns ids into text as they come, holding back half characters (text.tokenizer.StreamDecoder)."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


@runtime_checkable
class _Trunk(Protocol):
    """A family that has logits, and not only log-probabilities: penalties treat the two differently."""

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor: ...
    def hidden(self, x_BTD: Tensor, context: Context) -> Tensor: ...
    def unembed(self, x_BTD: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _Draw:
    """Token `id` of row `row`, as drawn; `finish_reason` when it is the row's last."""

    row: int
    id: int
    logprob: float
    finish_reason: FinishReason | None


def generate(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    stop_ids: Collection[int],
    pad_id: int,
    decode: Decode,
    generator: torch.Generator | None = None,
) -> list[Completion]:
    """One completion a prompt, in their order, all decoded together.

    A row ends with the first of `stop_ids` it draws or after `params.max_tokens`, and then leaves the batch. `pad_id`
    fills short prompts on the left and is never drawn. Without a `generator`, row b draws with seed `params.seed + b`.
    The model runs in evaluation mode without gradients and is left as it was. Raises `UserError` for a prompt that is
    empty, holds an id outside the vocabulary, or leaves no room for `max_tokens` more within `config.max_positions`.
    """
    _check(model, prompts, params, pad_id)
    random_BN = uniforms(len(prompts), params, generator).to(device_of(model))
    with evaluating(model):
        return _collect(len(prompts), _decode(model, prompts, params, stop_ids, pad_id, random_BN), decode)


def generate_uncached(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    stop_ids: Collection[int],
    pad_id: int,
    decode: Decode,
    generator: torch.Generator | None = None,
) -> list[Completion]:
    """The oracle: as `generate`, but every prompt alone and the whole model over the whole text for every token."""
    _check(model, prompts, params, pad_id)
    random_BN = uniforms(len(prompts), params, generator).to(device_of(model))
    draws = _decode_uncached(model, prompts, params, stop_ids, pad_id, random_BN)
    with evaluating(model):
        return _collect(len(prompts), draws, decode)


def stream(
    model: CausalModel,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    stop_ids: Collection[int],
    pad_id: int,
    decoder: Decoder,
    generator: torch.Generator | None = None,
) -> Iterator[TokenEvent]:
    """One completion, token by token as it is drawn: the same tokens as `generate` gives for this prompt alone.

    The events' texts joined are the completion's text. Arguments and errors as for `generate`, raised at the call. A
    `decoder` serves one stream.
    """
    _check(model, [prompt], params, pad_id)
    random_BN = uniforms(1, params, generator).to(device_of(model))
    draws = _decode(model, [prompt], params, stop_ids, pad_id, random_BN)
    return _events(model, draws, decoder)


def _events(model: CausalModel, draws: Iterator[_Draw], decoder: Decoder) -> Iterator[TokenEvent]:
    while True:
        with evaluating(model):  # left between tokens, so the caller finds the model as it was
            draw = next(draws, None)
        if draw is None:
            return
        yield _event(draw, decoder)


def _event(draw: _Draw, decoder: Decoder) -> TokenEvent:
    text = "" if draw.finish_reason == "stop" else decoder.push(draw.id)
    if draw.finish_reason is not None:
        text += decoder.flush()
    return TokenEvent(draw.id, draw.logprob, text, draw.finish_reason)


def _decode(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int],
    pad_id: int,
    random_BN: Tensor,
) -> Iterator[_Draw]:
    """The cached loop: every step feeds the last token of each row that still goes on, and draws its next.

    To be run within `evaluating`.
    """
    if not prompts:
        return
    device = random_BN.device
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    context = CacheContext(lengths, width + params.max_tokens - 1, device)
    tokens_BT = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    rows = list(range(len(prompts)))  # rows[b]: which prompt stands in row b of the batch
    shapers = [Shaper(params, prompt, stop_ids, device) for prompt in prompts]
    for step in range(params.max_tokens):
        context.feed(tokens_BT)
        x_BTD = model.hidden(model.embed(tokens_BT, context), context)
        logits_BV = model.unembed(x_BTD[:, -1:])[:, 0]
        shaped_BV = _shape(logits_BV, [shapers[row] for row in rows])
        tokens_B, logprobs_B = sample(shaped_BV, params, random_BN[:, step], [pad_id])
        draws = list(_draws(rows, tokens_B, logprobs_B, step, params, stop_ids))
        for draw in draws:
            shapers[draw.row].push(draw.id)
        yield from draws
        going = [place for place, draw in enumerate(draws) if draw.finish_reason is None]
        if not going:
            return
        if len(going) < len(rows):
            order = _close_ranks(going)
            context.keep(order)
            rows = [rows[place] for place in order]
            tokens_B, random_BN = tokens_B[order], random_BN[order]
        tokens_BT = tokens_B[:, None]


def _decode_uncached(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int],
    pad_id: int,
    random_BN: Tensor,
) -> Iterator[_Draw]:
    """What `_decode` must amount to. To be run within `evaluating`."""
    for row, prompt in enumerate(prompts):
        tokens_1T = torch.tensor([list(prompt)], device=random_BN.device)
        shaper = Shaper(params, prompt, stop_ids, random_BN.device)
        for step in range(params.max_tokens):
            shaped_1V = _shape(_last_logits(model, tokens_1T), [shaper])
            token_1, logprob_1 = sample(shaped_1V, params, random_BN[row : row + 1, step], [pad_id])
            [draw] = _draws([row], token_1, logprob_1, step, params, stop_ids)
            shaper.push(draw.id)
            yield draw
            if draw.finish_reason is not None:
                break
            tokens_1T = torch.cat((tokens_1T, token_1[:, None]), dim=1)


def _last_logits(model: CausalModel, tokens_BT: Tensor) -> Tensor:
    """(B, V): what the model says after the last token; of one that counts (n-grams) the log-probabilities."""
    speaker: object = model
    if not isinstance(speaker, _Trunk):
        return model.next_logprobs(tokens_BT)[:, -1]
    context = RowContext(tokens_BT)
    return model.unembed(model.hidden(model.embed(tokens_BT, context), context)[:, -1:])[:, 0]


def _shape(logits_BV: Tensor, shapers: Sequence[Shaper]) -> Tensor:
    """float32 logits as every row's shaper leaves them."""
    if not any(shaper.has_effect for shaper in shapers):
        return logits_BV
    scores_BV = logits_BV.float().clone()
    for scores_V, shaper in zip(scores_BV, shapers, strict=True):
        shaper.apply(scores_V)
    return scores_BV


def _close_ranks(going: Sequence[int]) -> list[int]:
    """The same places, reordered so that as many as can stay: the last ones move into the gaps before them."""
    size = len(going)
    staying, moving = {place for place in going if place < size}, (place for place in going if place >= size)
    return [place if place in staying else next(moving) for place in range(size)]


def _draws(
    rows: Sequence[int],
    tokens_B: Tensor,
    logprobs_B: Tensor,
    step: int,
    params: SamplingParams,
    stop_ids: Collection[int],
) -> Iterator[_Draw]:
    """What a step drew, told row by row with whether the row ends here."""
    is_last = step + 1 == params.max_tokens
    for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
        if math.isnan(logprob):
            raise UserError(
                f"the model's prediction for token {step} is not a number; its weights are damaged, raise it again"
            )
        yield _Draw(row, token, logprob, "stop" if token in stop_ids else "length" if is_last else None)


def _collect(num_prompts: int, draws: Iterable[_Draw], decode: Decode) -> list[Completion]:
    """The completions that a run of draws, in any order of rows, adds up to."""
    ids: list[list[int]] = [[] for _ in range(num_prompts)]
    logprobs: list[list[float]] = [[] for _ in range(num_prompts)]
    reasons: list[FinishReason] = ["length"] * num_prompts
    for draw in draws:
        ids[draw.row].append(draw.id)
        logprobs[draw.row].append(draw.logprob)
        reasons[draw.row] = draw.finish_reason or "length"
    return [
        Completion(decode(own[:-1] if reason == "stop" else own), tuple(own), tuple(logs), reason)
        for own, logs, reason in zip(ids, logprobs, reasons, strict=True)
    ]


def _check(model: CausalModel, prompts: Sequence[Sequence[int]], params: SamplingParams, pad_id: int) -> None:
    """Refuse what cannot be generated; see `generate`."""
    assert 0 <= pad_id < model.vocab_size, f"pad id {pad_id} is outside the vocabulary of {model.vocab_size}"
    check_ids(params, model.vocab_size)
    longest: int | None = model.config.max_positions
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt is empty; give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise UserError(
                f"the prompt holds token ids {min(prompt)} to {max(prompt)}, the model knows 0 to "
                f"{model.vocab_size - 1}; encode it with the model's own tokenizer"
            )
        if longest is not None and len(prompt) + params.max_tokens > longest:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} are more than the model's "
                f"{longest} positions; shorten the prompt or ask for fewer tokens"
            )
