"""The engine: many requests at once over one model, for serving, RL rollouts and evals alike.

Request -> `submit` -> its answers -> scheduler.plan -> runner.run -> choosing.choose -> scheduler.commit -> events.
Sources: Kwon et al. 2023 (paged memory), Yu et al. 2022 (continuous batching); the other files of this folder name
their own. The oracle is naive.py: an answer has the same tokens there, whatever else the engine does meanwhile.

Shapes: W positions wanted, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from fledge.errors import ConfigError, UserError
from fledge.formats import peft
from fledge.infer import scoring
from fledge.infer.adapters import Adapters
from fledge.infer.answers import Answer, Job
from fledge.infer.causal import CausalModel, device_of, evaluating
from fledge.infer.choosing import Choice
from fledge.infer.decoding import CompiledDecoder
from fledge.infer.float_linear import few_rows, float_linears
from fledge.infer.paged import Pages
from fledge.infer.quantize import assign
from fledge.infer.runner import Runner, count_blocks, probe_sites
from fledge.infer.scheduler import Scheduler, SchedulerConfig, SchedulerStats
from fledge.infer.sequence import Live, Span
from fledge.infer.shaping import check_ids
from fledge.infer.speculate import DraftModel, NgramProposer, Speculator
from fledge.infer.stepping import Stepper, Written
from fledge.layers.lora import Adapter
from fledge.text.tokenizer import Tokenizer
from fledge.types import Completion, Grammar, Request, TokenEvent

CacheType = Literal["model", "float16"]


@dataclass(frozen=True)
class EngineConfig:
    """`cache_bytes` of keys and values, in blocks of `block_size` positions; `num_blocks` says it in blocks instead.

    At most `max_live` answers are written at once, and a step runs at most `max_step_tokens` positions. `compile` runs
    steps of few answers as compiled code (decoding.py); None leaves it off, because it makes the first answers wait.
    Up to `num_draft` tokens are guessed ahead and checked at once (speculate.py); the answers stay the same.
    `cache_type` "float16" keeps keys and values at half precision: twice as many positions in the same memory, which
    long or many answers read in half the time; answers then differ from the oracle's by that rounding. "model" keeps
    them as the model computes them.
    """

    cache_bytes: int = 1 << 30
    block_size: int = 16
    num_blocks: int | None = None
    max_live: int = 64
    max_step_tokens: int = 512
    compile: bool | None = None
    num_draft: int = 0
    cache_type: CacheType = "model"

    def __post_init__(self) -> None:
        if min(self.cache_bytes, self.block_size) < 1:
            raise ConfigError(f"cache_bytes and block_size must be at least 1, got {self}")
        if self.num_draft < 0:
            raise ConfigError(f"num_draft must be 0 or more, got {self.num_draft}")
        if self.cache_type not in get_args(CacheType):
            raise ConfigError(f"cache_type is one of {', '.join(get_args(CacheType))}, got {self.cache_type!r}")

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """Of keys and values in the cache; None is the model's own."""
        return torch.float16 if self.cache_type == "float16" else None


@dataclass(frozen=True)
class EngineStats(SchedulerStats):
    """What the engine has done since it was made. `weights_version` is that of the last `update_weights`."""

    num_requests: int
    num_steps: int
    step_seconds: float
    cache_bytes: int
    weights_version: str


class Engine:
    """Not thread-safe: one owner calls everything, `step` as long as there `has_work`.

    The model stays the caller's: it is run in evaluation mode and handed back in the mode it had. A caller that
    changes its weights must say so by `update_weights`, be it with an empty mapping. A `draft_model` of the same
    vocabulary guesses ahead where `num_draft` asks for it, with as many blocks of cache of its own; without one the
    text itself is looked through.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        draft_model: CausalModel | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self._model, self._tokenizer = model, tokenizer
        self._device = device_of(model)
        _check_vocabulary(model, tokenizer)
        sites = probe_sites(model, self.config.kept_dtype)
        self._position_bytes = sum(shape.num_bytes for shape in sites.values())
        size = self.config.block_size
        num_blocks = self.config.num_blocks or count_blocks(sites, size, self.config.cache_bytes)
        self._scheduler = Scheduler(
            SchedulerConfig(num_blocks, size, self.config.max_live, self.config.max_step_tokens)
        )
        self._adapters = Adapters(cast(nn.Module, model))
        self._linears = float_linears(model)
        pages = Pages(sites, num_blocks, size, self._device)
        self._runner = Runner(model, pages, self._compile(pages))
        self._stepper = Stepper(model, tokenizer, self._runner, self._adapters)
        self._speculator = self._speculate(draft_model)
        self._jobs: dict[str, Job] = {}
        self._written: dict[int, Written] = {}  # by live.id
        self._outbox: list[TokenEvent] = []
        self._num_lives = self._num_requests = self._num_steps = 0
        self._step_seconds = 0.0
        self._weights_version = ""

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._outbox)

    def submit(self, request: Request) -> None:
        """Queue a request; its events come from `step`. `UserError` if it can never run, and then nothing is queued."""
        self._check(request)
        job = Job(request, tuple(self._begin(request, index) for index in range(request.best_of or request.n)))
        self._jobs[request.id] = job
        self._num_requests += 1
        for answer in job.answers:
            self._written[answer.live.id] = Written(job, answer)
            # The prompt's own log-probabilities need every position of it run, once.
            reads_all = request.prompt_logprobs is not None and answer.index == 0
            self._scheduler.add(answer.live, reads_all=reads_all)

    def is_prepared(self, grammar: Grammar) -> bool:
        """Whether a request with this grammar is submitted without delay."""
        return self._stepper.knows(grammar)

    def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar for requests to come, which may take a second. The only method that may be called from
        another thread, one call at a time, while the owner calls others. `UserError` if it cannot be used."""
        self._stepper.grammars.check(grammar)

    def cancel(self, request_id: str) -> bool:
        """End a request now; the next `step` says so for each of its answers. False if there is none of that name."""
        job = self._jobs.get(request_id)
        if job is None:
            return False
        for answer in job.answers:
            if answer.finish_reason is None:
                self._outbox += job.tell(answer.end("cancelled"))
                self._drop(answer)
        return True

    def step(self) -> list[TokenEvent]:
        """Run the model once over whatever is due, and tell what came of it. Without work: no events."""
        events, self._outbox = self._outbox, []
        began = time.perf_counter()
        if self._speculator is not None:
            self._speculator.propose(of.answer for of in self._written.values())
        plan = self._scheduler.plan()
        if plan is None:
            return events
        with self._evaluating(), few_rows(self._linears):
            choices = self._stepper.run(plan, self._written)
        drawn = {span.live.id: self._accept(span, own, events) for span, own in choices}
        self._scheduler.commit(plan, drawn)
        for live_id in drawn:
            answer = self._written[live_id].answer
            if answer.finish_reason is not None:
                self._drop(answer)
        self._num_steps += 1
        self._step_seconds += time.perf_counter() - began
        return events

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The answers to these requests, n each, in their order. What happens to others meanwhile is told by `step`."""
        own: dict[str, list[TokenEvent]] = {}
        try:
            for request in requests:
                self.submit(request)
                own[request.id] = []
        except UserError:
            for request_id in own:
                self.cancel(request_id)
            self._outbox = [event for event in self._outbox if event.request_id not in own]
            raise
        others: list[TokenEvent] = []
        while any(request_id in self._jobs for request_id in own) or self._outbox:
            for event in self.step():
                own.get(event.request_id, others).append(event)
        self._outbox = others
        return [[_complete(own[r.id], index) for index in range(r.n)] for r in requests]

    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The natural log-probability of every token of a row but its first, as the trainer computes it."""
        for row in rows:
            self._check_ids(row)
        self._adapters.route()
        with self._evaluating():
            return scoring.score(self._model, rows)

    def embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(N, D) float32 on the CPU, of length 1: the mean of each row's hidden states, normalised."""
        for row in rows:
            self._check_ids(row)
        self._adapters.route()
        with self._evaluating():
            return scoring.embed(self._model, rows)

    def update_weights(self, weights: Mapping[str, Tensor], version: str) -> None:
        """Put new values into parameters and buffers of these names, between two steps.

        Nothing computed with the old ones is used again: the prefix cache is emptied, and answers in progress go on
        from the tokens they have. Float weights of layers that are quantised are quantised anew. `UserError`, and
        nothing changed, for an unknown name or another shape.
        """
        assign(cast(nn.Module, self._model), {self._adapters.place(name): own for name, own in weights.items()})
        self._scheduler.flush()
        for job in self._jobs.values():
            job.forget_half_read()
        self._weights_version = version

    def load_adapter(self, name: str, adapter: Adapter | Path) -> None:
        """Hold a LoRA adapter, or the one in a PEFT directory, for requests that name it. `UserError` if it does not
        fit or the name is taken."""
        if isinstance(adapter, Path):
            adapter = peft.load_adapter(adapter, cast(nn.Module, self._model))
        self._adapters.load(name, adapter)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. `UserError` if there is none of that name or an answer in progress needs it."""
        if any(job.request.adapter == name for job in self._jobs.values()):
            raise UserError(f"the adapter '{name}' is in use; cancel its requests or wait for them")
        self._adapters.unload(name)

    def stats(self) -> EngineStats:
        return EngineStats(
            **asdict(self._scheduler.stats()),
            num_requests=self._num_requests,
            num_steps=self._num_steps,
            step_seconds=self._step_seconds,
            cache_bytes=self._position_bytes * self.config.block_size * self._scheduler.config.num_blocks,
            weights_version=self._weights_version,
        )

    def _begin(self, request: Request, index: int) -> Answer:
        live = Live(
            id=self._num_lives,
            tokens=list(request.prompt_ids),
            num_prompt=len(request.prompt_ids),
            max_tokens=request.params.max_tokens,
            tenant=request.tenant,
            salt=f"{len(request.tenant)}:{request.tenant}:{self._adapters.salt(request.adapter)}",
        )
        self._num_lives += 1
        grammar = request.grammar
        matcher = None if grammar is None else self._stepper.grammars.matcher(grammar, request.stop_ids)
        return Answer(request, index, live, self._tokenizer, matcher, self._device)

    def _compile(self, pages: Pages) -> CompiledDecoder | None:
        if not self.config.compile:
            return None
        with evaluating(self._model), few_rows(self._linears):
            return CompiledDecoder(self._model, pages)

    def _speculate(self, draft_model: CausalModel | None) -> Speculator | None:
        num_draft, blocks = self.config.num_draft, self._scheduler.blocks
        if num_draft == 0:
            if draft_model is not None:
                raise ConfigError("a draft model guesses nothing with num_draft 0; set it to 1 or more")
            return None
        if draft_model is None:
            return Speculator(NgramProposer(), num_draft)
        if draft_model.vocab_size != self._model.vocab_size:
            raise UserError(
                f"the draft model has {draft_model.vocab_size} tokens, the model {self._model.vocab_size}; they must "
                "share a tokenizer"
            )
        proposer = DraftModel(draft_model, self._stepper.banned, blocks.num_blocks, blocks.block_size)
        return Speculator(proposer, num_draft)

    def _accept(self, span: Span, choices: Sequence[Choice], events: list[TokenEvent]) -> list[int]:
        """The tokens that the answer goes on with: as many as follow the draft, and one more.

        Every position was drawn as if there were no draft, so what is kept is what would have been drawn one by one.
        """
        job, answer = self._written[span.live.id]
        tokens: list[int] = []
        for place, choice in enumerate(choices):
            event = answer.take(choice)
            events += job.tell(event)
            tokens.append(choice.token)
            is_as_drafted = place < span.num_draft and choice.token == span.live.draft[place]
            if answer.finish_reason is not None or not is_as_drafted:
                break
        if self._speculator is not None and span.num_draft:
            self._speculator.observe(span.live, span.num_draft, len(tokens) - 1)
        return tokens

    def _drop(self, answer: Answer) -> None:
        """The answer has ended: its blocks are free."""
        self._scheduler.finish(answer.live.id)
        self._runner.forget(answer.live)
        if self._speculator is not None:
            self._speculator.forget(answer.live)
        job = self._written.pop(answer.live.id).job
        if job.is_finished:
            self._jobs.pop(job.request.id, None)

    # What is refused

    def _check(self, request: Request) -> None:
        params = request.params
        if request.id in self._jobs:
            raise UserError(f"there is a request '{request.id}' already; give each its own id")
        self._check_ids(request.prompt_ids, params.max_tokens)
        check_ids(params, self._model.vocab_size, request.stop_ids)
        self._scheduler.check_fit(len(request.prompt_ids), params.max_tokens)
        if not -(2**63) <= params.seed < 2**63 - (request.best_of or request.n):
            raise UserError(f"the seed {params.seed} is not a number of 64 bits")
        self._adapters.require(request.adapter)
        if request.grammar is not None:
            self._stepper.grammars.check(request.grammar)

    def _check_ids(self, ids: Sequence[int], max_tokens: int = 0) -> None:
        vocab_size, longest = self._model.vocab_size, self._model.config.max_positions
        if not ids:
            raise UserError("the prompt is empty; give it at least one token")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise UserError(
                f"the prompt holds token ids {min(ids)} to {max(ids)}, the model knows 0 to {vocab_size - 1}; encode "
                "it with the model's own tokenizer"
            )
        if longest is not None and len(ids) + max_tokens > longest:
            raise UserError(
                f"a prompt of {len(ids)} tokens and max_tokens {max_tokens} are more than the model's {longest} "
                "positions; shorten the prompt or ask for fewer tokens"
            )

    def _evaluating(self) -> AbstractContextManager[object]:
        # Looking at every module costs more than a step of a small model, so only the root is asked.
        return evaluating(self._model) if self._model.training else torch.inference_mode()


def _check_vocabulary(model: CausalModel, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}; they do not belong "
            "together, load the tokenizer that the model was trained with"
        )


def _complete(events: Sequence[TokenEvent], index: int) -> Completion:
    """The answer that these events tell."""
    own = [event for event in events if event.index == index]
    said = [event for event in own if event.id >= 0]
    reason = own[-1].finish_reason
    assert reason is not None, "the answer has not ended"
    return Completion(
        "".join(event.text for event in own),
        tuple(event.id for event in said),
        tuple(event.logprob for event in said),
        reason,
    )
