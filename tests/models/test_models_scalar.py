"""Reward and value models: initialisation, normalisation, sharing, and what padding must not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fledge.config import from_json, to_json
from fledge.errors import ConfigError
from fledge.layers.attention import SegmentContext
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.pocket import Pocket, PocketConfig
from fledge.models.scalar import ScalarConfig, ScalarModel, twin
from fledge.objectives.scores import read_scores
from fledge.registry import load_family

LLAMA = LlamaConfig(20, 32, 2, 2, 1, 64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def llama_scalar() -> ScalarModel:
    model = ScalarModel(ScalarConfig("llama", to_json(LLAMA)))
    model.init_weights(seeded())
    return model


def pocket() -> Pocket:
    model = Pocket(PocketConfig(20, 32, 2, 1, table_rows=64))
    model.init_weights(seeded())
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.normal_(0, 0.2, generator=seeded(1))
            block.down.weight.normal_(0, 0.2, generator=seeded(2))
    return model


def score(model: ScalarModel, tokens: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
    segments = torch.ones_like(tokens) if segments is None else segments
    with torch.no_grad():
        return model.scores(tokens, SegmentContext(segments))


def test_c12_head_starts_with_spread_one_over_root_of_width_plus_one_and_bias_zero():
    model = ScalarModel(ScalarConfig("llama", to_json(replace(LLAMA, width=1024, num_layers=1))))
    model.reset_head(seeded())
    assert model.head.weight.std().item() == pytest.approx(1025**-0.5, rel=0.1)
    assert model.head.bias.item() == 0


def test_head_is_the_same_for_the_same_seed_and_differs_for_another():
    a, b, c = llama_scalar(), llama_scalar(), llama_scalar()
    c.reset_head(seeded(9))
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_c13_same_input_has_the_same_score_even_in_training_mode_with_a_trunk_that_drops():
    config = GPTConfig(20, 32, 2, 2, 16, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5)
    model = ScalarModel(ScalarConfig("gpt", to_json(config)))
    model.init_weights(seeded())
    model.train()
    tokens = torch.randint(0, 20, (3, 7), generator=seeded())
    assert torch.equal(score(model, tokens), score(model, tokens))


def test_c17_normalised_scores_have_mean_zero_and_spread_one_and_the_scale_is_stored_with_the_weights():
    model = llama_scalar()
    tokens = torch.randint(0, 20, (16, 9), generator=seeded())
    for _ in range(2):  # a second time must leave the scale as it is
        last = score(model, tokens)[:, -1].double()
        model.normalise(float(last.mean()), float(last.std(correction=0)))
        now = score(model, tokens)[:, -1].double()
        assert abs(float(now.mean())) < 1e-3
        assert float(now.std(correction=0)) == pytest.approx(1, abs=1e-3)
    restored = ScalarModel(model.config)
    restored.load_state_dict(model.state_dict())
    assert torch.equal(score(restored, tokens), score(model, tokens))


def test_c17_each_normalisation_acts_on_what_the_model_says_at_that_moment():
    model = llama_scalar()
    tokens = torch.randint(0, 20, (4, 9), generator=seeded())
    raw = score(model, tokens)
    model.normalise(3.0, 2.0)
    once = score(model, tokens)
    model.normalise(1.0, 0.5)
    assert torch.allclose(once, (raw - 3) / 2, atol=1e-6)
    assert torch.allclose(score(model, tokens), (once - 1) / 0.5, atol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_normalisation_that_would_destroy_the_scores_is_refused(mean, std):
    with pytest.raises(ValueError, match="positive std"):
        llama_scalar().normalise(mean, std)


@pytest.mark.parametrize("family", ["llama", "pocket"])
def test_c19_score_is_the_same_whatever_side_the_padding_stands_on(family):
    model = llama_scalar() if family == "llama" else ScalarModel.from_trunk("pocket", pocket(), generator=seeded())
    ids = torch.randint(2, 20, (1, 6), generator=seeded())
    pad, ones = torch.full((1, 3), 1), torch.ones(1, 6, dtype=torch.int64)
    alone = score(model, ids)
    none = torch.zeros(1, 3, dtype=torch.int64)
    left = score(model, torch.cat((pad, ids), 1), torch.cat((none, ones), 1))[:, 3:]
    right = score(model, torch.cat((ids, pad), 1), torch.cat((ones, none), 1))[:, :6]
    assert torch.allclose(left, alone, atol=1e-5)
    assert torch.allclose(right, alone, atol=1e-5)


def test_score_at_a_token_does_not_depend_on_later_tokens():
    model = llama_scalar()
    tokens = torch.randint(0, 20, (2, 8), generator=seeded())
    changed = tokens.clone()
    changed[:, 5:] = 3
    assert torch.allclose(score(model, tokens)[:, :5], score(model, changed)[:, :5], atol=1e-6)
    assert not torch.allclose(score(model, tokens)[:, 5:], score(model, changed)[:, 5:])


def test_from_trunk_copies_what_trains_and_shares_the_frozen_tables():
    trunk = pocket()
    model = ScalarModel.from_trunk("pocket", trunk, generator=seeded())
    shared = {name for name, p in trunk.named_parameters() if p is dict(model.trunk.named_parameters())[name]}
    assert shared == {"tables.0.weight", "tables.1.weight"}
    assert not any(trunk.get_parameter(name).requires_grad for name in shared)
    assert trunk.head.weight.requires_grad, "the policy's own head must go on training"
    for name, parameter in trunk.named_parameters():
        assert torch.equal(parameter, model.trunk.get_parameter(name))


def test_without_frozen_roles_everything_is_copied_and_trains():
    trunk = pocket()
    model = ScalarModel.from_trunk("pocket", trunk, generator=seeded(), freeze_roles=())
    assert not {id(p) for p in trunk.parameters()} & {id(p) for p in model.parameters()}
    assert trunk.get_parameter("tables.0.weight").requires_grad
    assert model.trunk.get_parameter("tables.0.weight").requires_grad


def test_roles_name_exactly_the_parameters_that_train_and_every_one_of_them_gets_a_gradient():
    model = ScalarModel.from_trunk("pocket", pocket(), generator=seeded(), freeze_roles=())
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(model.roles()) == training
    tokens = torch.randint(0, 20, (4, 9), generator=seeded())
    model.scores(tokens, SegmentContext(torch.ones_like(tokens))).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == training


def test_twin_owns_what_trains_and_its_buffers_and_shares_what_is_frozen():
    model = ScalarModel.from_trunk("pocket", pocket(), generator=seeded())
    other = twin(model)
    for name, parameter in model.named_parameters():
        assert (other.get_parameter(name) is parameter) == (not parameter.requires_grad), name
        assert torch.equal(other.get_parameter(name), parameter)
    other.normalise(3.0, 2.0)
    assert model.mean.item() == 0


def test_config_survives_json_and_the_registry_builds_the_model():
    config_class, model_class = load_family("scalar")
    config = ScalarConfig("llama", to_json(LLAMA))
    assert from_json(config_class, to_json(config)) == config
    model = model_class(config)
    tokens, segments = torch.randint(0, 20, (2, 5), generator=seeded()), torch.ones(2, 5)
    x = model.embed(tokens, SegmentContext(segments))
    assert torch.equal(read_scores(model, x, segments), model.scores(tokens, SegmentContext(segments)))
    assert model.vocab_size == 20


def test_trunk_that_is_not_a_causal_family_is_refused():
    with pytest.raises(ConfigError, match="causal"):
        ScalarConfig("ngram", {})


def test_unused_language_head_of_a_trunk_is_frozen_but_tied_embeddings_train():
    tied = Llama(replace(LLAMA, is_head_tied=True))
    tied.init_weights(seeded())
    assert ScalarModel.from_trunk("llama", tied, generator=seeded()).trunk.tokens.weight.requires_grad
    untied = ScalarModel.from_trunk("llama", Llama(LLAMA), generator=seeded())
    assert not untied.trunk.head.weight.requires_grad


def test_gpt_with_learned_positions_serves_as_trunk():
    trunk = GPT(GPTConfig(20, 32, 2, 2, 16))
    model = ScalarModel.from_trunk("gpt", trunk, generator=seeded())
    assert score(model, torch.randint(0, 20, (2, 5), generator=seeded())).shape == (2, 5)
