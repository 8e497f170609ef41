"""Where PPO's networks come from, what trains, and what is held once."""

from __future__ import annotations

import rl_toy as toy
import torch

from fledge.models.pocket import Pocket, PocketConfig
from fledge.models.scalar import ScalarModel
from fledge.rl.actors import Actors, share_equal


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pocket(seed: int = 0) -> Pocket:
    model = Pocket(PocketConfig(toy.VOCAB, 32, 2, 1, table_rows=64))
    model.init_weights(seeded(seed))
    return model


def reward_model_of(policy: Pocket) -> ScalarModel:
    """A reward model as it comes from disk: all of its own, tables equal to the policy's, scale not 1."""
    model = ScalarModel.from_trunk("pocket", policy, generator=seeded(3), freeze_roles=())
    model.normalise(0.5, 2.0)
    return model


def test_c41_value_function_starts_as_the_reward_model_head_and_scale_included():
    policy = pocket()
    reward = reward_model_of(policy)
    actors = Actors.start(policy, reward)
    assert actors.value is not reward
    for name, tensor in reward.state_dict().items():
        assert torch.equal(actors.value.state_dict()[name], tensor), name
    assert actors.value.head.weight is not reward.head.weight
    assert actors.value.head.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_a_reward_model_that_came_frozen_gives_a_value_function_that_trains():
    policy, reward = pocket(), reward_model_of(pocket()).requires_grad_(False)
    for _ in range(2):  # the first start leaves it frozen
        value = Actors.start(policy, reward).value
        trained = {name for name, parameter in value.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, role in value.roles().items() if role != "table"}
        assert value.head.weight is not reward.head.weight
        assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_c45_reference_is_an_equal_copy_that_never_trains():
    policy = pocket()
    actors = Actors.start(policy, reward_model_of(policy))
    assert not any(parameter.requires_grad for parameter in actors.reference.parameters())
    assert policy.head.weight.requires_grad
    assert actors.reference.head.weight is not policy.head.weight
    for name, tensor in policy.state_dict().items():
        assert torch.equal(actors.reference.state_dict()[name], tensor)


def test_frozen_tables_are_held_once_by_all_four_networks():
    policy = pocket()
    reward = reward_model_of(policy)
    actors = Actors.start(policy, reward)
    tables = {id(model.tables[0].weight) for model in (policy, actors.reference, actors.value.trunk, reward.trunk)}
    assert len(tables) == 1
    assert not policy.tables[0].weight.requires_grad


def test_tables_that_differ_are_not_shared():
    policy, other = pocket(), pocket(seed=5)
    before = other.tables[0].weight.detach().clone()
    share_equal(policy, other, ("table",))
    assert torch.equal(other.tables[0].weight, before)
    assert other.tables[0].weight is not policy.tables[0].weight


def test_without_frozen_roles_tables_train_in_policy_and_value_function():
    policy = pocket()
    actors = Actors.start(policy, reward_model_of(policy), freeze_roles=())
    assert policy.tables[0].weight.requires_grad
    assert actors.value.trunk.tables[0].weight.requires_grad
    assert not actors.reference.tables[0].weight.requires_grad
    assert actors.reference.tables[0].weight is not policy.tables[0].weight
    assert actors.value.trunk.tables[0].weight is not policy.tables[0].weight


def test_c38_all_networks_are_in_evaluation_mode():
    policy = pocket().train()
    actors = Actors.start(policy, reward_model_of(policy))
    models = (actors.policy, actors.reference, actors.value)
    assert not any(module.training for model in models for module in model.modules())
