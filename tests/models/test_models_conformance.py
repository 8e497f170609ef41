"""What every causal family of the registry must hold, whatever is inside it."""

from __future__ import annotations

import importlib
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fledge.config import from_json, to_json
from fledge.layers.attention import RowContext, SegmentContext
from fledge.layers.rope import Llama3Scaling
from fledge.models.gpt import GPTConfig
from fledge.models.llama import LlamaConfig
from fledge.models.pocket import PocketConfig
from fledge.models.qwen import QwenConfig
from fledge.registry import FAMILIES, load_family

VOCAB = 43
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt": {
        "gpt1": GPTConfig(VOCAB, 24, 2, 3, 20, "post_norm"),
        "gpt2": GPTConfig(VOCAB, 20, 3, 4, 20),
        "gpt3-masked": GPTConfig(VOCAB, 20, 4, 4, 20, window=5),
        "gpt3-blockwise": GPTConfig(VOCAB, 20, 4, 4, 20, window=3),
    },
    "llama": {
        "plain": LlamaConfig(VOCAB, 24, 2, 3, 3, 17),
        "grouped-tied": LlamaConfig(VOCAB, 24, 3, 6, 2, 17, 20, is_head_tied=True),
        "stretched": LlamaConfig(VOCAB, 24, 2, 3, 1, 17, rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 8)),
    },
    "qwen": {
        "biased": QwenConfig(VOCAB, 24, 2, 3, 3, 8, 17, "biased"),
        "biased-grouped-tied": QwenConfig(VOCAB, 24, 3, 6, 2, 6, 17, "biased", 20, is_head_tied=True),
        "normed": QwenConfig(VOCAB, 24, 2, 3, 1, 10, 17, "normed"),
    },
    "pocket": {
        "tables": PocketConfig(VOCAB, 24, 3, 2, table_rows=61),
        "no-tables": PocketConfig(VOCAB, 24, 1, 2, table_rows=0),
    },
}
CASES = [(family, name) for family, configs in CONFIGS.items() for name in configs]
ROLES = {"matrix", "embedding", "table", "head", "gain"}
every_model = pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{f}-{n}" for f, n in CASES])


def make(family: str, name: str, seed: int = 5) -> Any:
    """A model whose every parameter is random: an initialisation that zeroes the head would hide all faults."""
    model = load_family(family)[1](CONFIGS[family][name]).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return model


def some_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
    context = RowContext(tokens_BT) if segments_BT is None else SegmentContext(segments_BT)
    found: Tensor = model.unembed(model.hidden(model.embed(tokens_BT, context), context))
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_every_causal_row_of_the_registry_is_tried() -> None:
    assert set(CONFIGS) == {row.name for row in FAMILIES if row.kind == "causal"}


@every_model
def test_shapes_and_attributes_are_those_of_the_contract(family: str, name: str) -> None:
    model = make(family, name)
    config = model.config
    tokens_BT = some_tokens(2, 7)
    context = RowContext(tokens_BT)
    x = model.embed(tokens_BT, context)
    hidden_BTD = model.hidden(x, context)
    assert x.shape[:2] == (2, 7)
    assert hidden_BTD.shape == (2, 7, config.width)
    assert model.unembed(hidden_BTD).shape == (2, 7, VOCAB)
    assert (model.vocab_size, config.vocab_size) == (VOCAB, VOCAB)
    assert config.max_positions is None or config.max_positions > 0
    assert isinstance(model, nn.Module)


@every_model
def test_forward_is_hidden(family: str, name: str) -> None:
    model = make(family, name)
    context = RowContext(tokens_BT := some_tokens(2, 7))
    x = model.embed(tokens_BT, context)
    assert torch.equal(model(x, context), model.hidden(x, context))


@every_model
def test_next_logprobs_are_float32_and_sum_to_one(family: str, name: str) -> None:
    model = make(family, name)
    tokens_BT = some_tokens(3, 11)
    logprobs_BTV = model.next_logprobs(tokens_BT)
    assert logprobs_BTV.dtype == torch.float32
    assert_close(logprobs_BTV.exp().sum(-1), torch.ones(3, 11))
    assert_close(logprobs_BTV, logits(model, tokens_BT).log_softmax(-1))
    assert model.bfloat16().next_logprobs(tokens_BT).dtype == torch.float32


@every_model
def test_no_position_sees_what_comes_after_it(family: str, name: str) -> None:
    model = make(family, name)
    tokens_BT = some_tokens(2, 12)
    before = logits(model, tokens_BT)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 7:] = (changed_BT[:, 7:] + 1) % VOCAB
    after = logits(model, changed_BT)
    assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7:], before[:, 7:], atol=1e-2)


@every_model
def test_every_position_sees_the_one_before_it(family: str, name: str) -> None:
    model = make(family, name)
    tokens_BT = some_tokens(1, 6)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 2] = (changed_BT[:, 2] + 1) % VOCAB
    assert not torch.allclose(logits(model, changed_BT)[:, 3], logits(model, tokens_BT)[:, 3], atol=1e-3)


@every_model
def test_packed_documents_have_the_logits_and_gradients_of_unpacked_ones(family: str, name: str) -> None:
    model = make(family, name)
    lengths = (4, 1, 9, 3)
    documents = [some_tokens(1, length, seed=length) for length in lengths]
    targets = [some_tokens(1, length, seed=100 + length) for length in lengths]
    segments_BT = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(lengths))[None]

    def gradients(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        model.zero_grad()
        for found_BTV, target_BT in pairs:
            nn.functional.cross_entropy(found_BTV[0], target_BT[0], reduction="sum").backward()
        dense = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None]
        return [found_BTV.detach() for found_BTV, _ in pairs], dense

    packed = logits(model, torch.cat(documents, dim=1), segments_BT)
    alone = [logits(model, document) for document in documents]
    (packed_logits,), packed_gradients = gradients([(packed, torch.cat(targets, dim=1))])
    alone_logits, alone_gradients = gradients(list(zip(alone, targets, strict=True)))
    assert_close(packed_logits, torch.cat(alone_logits, dim=1))
    assert len(packed_gradients) > 2
    for one, other in zip(packed_gradients, alone_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@every_model
@pytest.mark.parametrize("padding", [1, 3, 9])
def test_padding_on_either_side_and_neighbours_change_nothing(family: str, name: str, padding: int) -> None:
    model = make(family, name)
    tokens_BT = some_tokens(1, 8)
    expected = logits(model, tokens_BT)
    for left in {0, 1, padding}:
        noise_BT = some_tokens(3, 8 + padding, seed=left)
        segments_BT = torch.ones_like(noise_BT, dtype=torch.int32)
        segments_BT[1] = 0
        segments_BT[1, left : left + 8] = 1
        noise_BT[1, left : left + 8] = tokens_BT
        found = logits(model, noise_BT, segments_BT)
        assert torch.isfinite(found).all()
        assert_close(found[1:2, left : left + 8], expected)


@every_model
def test_roles_cover_every_parameter_exactly(family: str, name: str) -> None:
    model = make(family, name)
    roles = model.roles()
    parameters = dict(model.named_parameters())
    assert set(roles) == set(parameters)
    assert set(roles.values()) <= ROLES
    assert all(parameters[key].ndim == 2 for key, role in roles.items() if role == "matrix")
    assert all(parameters[key].ndim < 2 for key, role in roles.items() if role == "gain")
    assert any(role == "matrix" for role in roles.values())


@every_model
def test_initialisation_depends_on_the_seed_alone(family: str, name: str) -> None:
    def drawn(model_seed: int, seed: int) -> list[Tensor]:
        model = make(family, name, model_seed)
        torch.manual_seed(model_seed)
        model.init_weights(torch.Generator().manual_seed(seed))
        return [parameter.detach() for parameter in model.parameters()]

    first, again, other = drawn(1, 7), drawn(2, 7), drawn(1, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(torch.isfinite(a).all() for a in first)


@every_model
def test_a_config_survives_json(family: str, name: str) -> None:
    config = CONFIGS[family][name]
    assert from_json(load_family(family)[0], to_json(config)) == config


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[0] != "pocket"])
def test_the_shard_plan_covers_every_parameter_once_and_splits_every_matrix(family: str, name: str) -> None:
    plan: dict[str, str] = importlib.import_module(f"fledge.models.{family}").SHARD_PLAN
    roles = make(family, name).roles()
    for parameter, role in roles.items():
        ways = [way for pattern, way in plan.items() if fnmatchcase(parameter, pattern)]
        assert len(ways) == 1, parameter
        assert ways[0] in ({"column", "row"} if role == "matrix" else {"column", "vocab", "replicate"})
    assert set(plan.values()) == {"column", "row", "vocab", "replicate"}
