"""Soft prompts: at first they are the tokens they start as; only they train; caches and sampling know them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fledge.errors import ConfigError
from fledge.infer.naive import generate
from fledge.layers.soft_prompt import SoftPrompt
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.llama import Llama, LlamaConfig
from fledge.models.pocket import Pocket, PocketConfig
from fledge.objectives.next_token import NextToken
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.types import Piece, SamplingParams

PAD, VOCAB = 1, 20
MAKERS = {
    "llama": lambda: Llama(LlamaConfig(VOCAB, 32, 2, 2, 1, 64)),
    "gpt": lambda: GPT(GPTConfig(VOCAB, 32, 2, 2, 64)),
    "pocket": lambda: Pocket(PocketConfig(VOCAB, 16, 2, 1, table_rows=32)),
}


def trunk(name: str = "llama"):
    model = MAKERS[name]()
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_soft_prompt_is_at_first_the_tokens_it_starts_as(name):
    model = trunk(name)
    soft = SoftPrompt(model, [5, 9, 3])
    with torch.no_grad():
        expected = model.next_logprobs(torch.tensor([[5, 9, 3, 7, 8]]))
        found = soft.next_logprobs(torch.tensor([[*soft.soft_ids, 7, 8]]))
    assert torch.allclose(found[..., :VOCAB], expected, atol=1e-5)
    assert (found[..., VOCAB:] == float("-inf")).all()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_family_can_have_one_and_is_left_as_it_was_without_it(name):
    model = trunk(name)
    soft = SoftPrompt(model, [5, 9])
    tokens = torch.tensor([[7, 8, 2, 4]])
    with torch.no_grad():
        assert torch.allclose(soft.next_logprobs(tokens)[..., :VOCAB], model.next_logprobs(tokens), atol=1e-6)
        assert torch.isfinite(soft.next_logprobs(torch.tensor([[*soft.soft_ids, 7, 8]]))[..., :VOCAB]).all()


def test_only_the_prompt_trains_and_it_learns():
    model = trunk()
    with torch.no_grad():
        model.head.weight.mul_(10)
    soft = SoftPrompt(model, [5, 9, 3, 6])
    before = {name: tensor.clone() for name, tensor in soft.trunk.state_dict().items()}
    objective = NextToken(12, PAD)
    ids = torch.tensor([*soft.soft_ids, 7, 8, 11, 12], dtype=torch.int32).numpy()
    mask = torch.tensor([0.0] * 6 + [1.0] * 2).numpy()
    batch = objective.collate([(Piece(ids, mask),)])
    optimizers = OptimizerSet(soft, OptimConfig.adamw(0.1, decay=0.0))
    losses = [train_step(soft, optimizers, [(objective, batch)])["loss"] for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    assert [name for name, parameter in soft.named_parameters() if parameter.requires_grad] == ["prompt"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in soft.trunk.state_dict().items())


def test_sampling_reads_the_prompt_through_the_cache_and_never_says_it():
    soft, model = SoftPrompt(trunk(), [5, 9, 3]), trunk()
    params = SamplingParams(max_tokens=8, temperature=0.0)
    asked = {"stop_ids": frozenset(), "pad_id": PAD, "decode": str, "generator": torch.Generator()}
    found = generate(soft, [(*soft.soft_ids, 7, 8), (*soft.soft_ids, 4)], params, **asked)
    expected = generate(model, [(5, 9, 3, 7, 8), (5, 9, 3, 4)], params, **asked)
    assert [one.ids for one in found] == [one.ids for one in expected]
    hot = generate(soft, [soft.soft_ids] * 8, replace(params, temperature=5.0), **asked)
    assert max(token for one in hot for token in one.ids) < VOCAB


@pytest.mark.parametrize("ids", [[], [VOCAB], [-1]])
def test_prompt_that_starts_as_no_token_is_refused(ids):
    with pytest.raises(ConfigError, match="starts as at least one token"):
        SoftPrompt(trunk(), ids)
