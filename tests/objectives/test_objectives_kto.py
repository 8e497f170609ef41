"""KTO: known answers, the baseline of the whole batch, weights of both kinds, mismatched pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fledge.errors import DataError
from fledge.models.llama import Llama, LlamaConfig
from fledge.objectives.kto import KTO, balanced_weights, kto_loss, mismatch, with_kto_reference
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet

PAD, VOCAB = 1, 20
OBJECTIVE = KTO(max_length=12, pad_id=PAD)


def model(seed: int = 0) -> Llama:
    llama = Llama(LlamaConfig(VOCAB, 32, 2, 2, 1, 64))
    llama.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        llama.head.weight.mul_(20)
    return llama.eval()


def verdicts(num: int = 6):
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(torch.randint(2, VOCAB, (2 + n % 3,), generator=generator).tolist()) for n in range(2 * num)]
    return mismatch([(drawn[2 * n], drawn[2 * n + 1], n % 3 != 0) for n in range(num)], max_length=12)


def test_known_answers_of_both_kinds():
    gain, kinds = torch.tensor([2.0, 2.0, 0.5]), torch.tensor([True, False, True])
    found = kto_loss(gain, kinds, torch.tensor(0.5), beta=0.1, weights=(1.0, 1.5))
    above = 1 / (1 + math.exp(-0.1 * 1.5))
    assert found.tolist() == pytest.approx([1 - above, 1.5 * above, 0.5], abs=1e-6)


def test_loss_of_a_policy_that_is_its_reference_is_half_its_weights():
    objective = replace(OBJECTIVE, reference=model(), desirable_weight=1.0, undesirable_weight=1.2)
    loss = objective.loss(model(), objective.collate(verdicts()))
    assert float(loss.terms["kto"].sum.detach()) == pytest.approx(0.5 * (4 + 2 * 1.2), abs=1e-5)
    assert float(loss.stats["kl_baseline"][0]) == 0


def test_baseline_is_the_mean_over_mismatched_rows_and_never_negative_and_has_no_gradient():
    policy, reference = model(), model(1)
    objective = replace(OBJECTIVE, reference=reference)
    batch = objective.collate(verdicts())
    mean = float(objective._gain(policy, batch, slice(6, None)).detach().mean())
    swapped = replace(OBJECTIVE, reference=policy)
    values = [objective.baseline(policy, [batch]).item(), swapped.baseline(reference, [batch]).item()]
    assert values == pytest.approx([max(0.0, mean), max(0.0, -mean)], abs=1e-5)
    assert min(values) == 0.0 < max(values)
    assert not objective.baseline(policy, [batch]).requires_grad


def test_gradient_does_not_depend_on_how_the_batch_is_cut_if_the_baseline_is_of_the_whole():
    examples, found = verdicts(), []
    for parts in ([examples], [examples[:2], examples[2:]]):
        policy, objective = model(), replace(OBJECTIVE, reference=model(1))
        batches = [objective.collate(part) for part in parts]
        z0 = objective.baseline(policy, batches) + 0.25
        pairs = [(objective, replace(batch, baseline=z0)) for batch in batches]
        step = train_step(policy, OptimizerSet(policy, OptimConfig.adamw(1e-3)), pairs)
        found.append((step["loss"], step["grad_norm"], step["kl_baseline"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_cached_reference_equals_a_fresh_one():
    batch, reference = OBJECTIVE.collate(verdicts()), model(1)
    cached = with_kto_reference(batch, reference, rows=5)
    fresh = replace(OBJECTIVE, reference=reference).loss(model(), batch).terms["kto"].sum
    assert OBJECTIVE.loss(model(), cached).terms["kto"].sum.detach().item() == pytest.approx(
        fresh.detach().item(), abs=1e-5
    )
    numbers = cached.reference_N.tolist()
    given = [replace(v, reference=(numbers[n], numbers[n + 6])) for n, v in enumerate(verdicts())]
    assert torch.allclose(OBJECTIVE.collate(given).reference_N, cached.reference_N)


def test_stranger_comes_from_the_next_example_with_another_prompt_and_is_cut_to_fit():
    a, b = (2, 3), (4,)
    found = mismatch([(a, (5,), True), (a, (6,), False), (b, (7, 8, 9), True)], max_length=4)
    assert [verdict.stranger for verdict in found] == [(7, 8), (7, 8), (5,)]
    with pytest.raises(DataError, match="two different prompts"):
        mismatch([(a, (5,), True), (a, (6,), False)], max_length=4)


def test_weights_let_the_rarer_kind_count_as_much_as_the_other():
    assert balanced_weights(30, 10) == (1.0, 3.0)
    assert balanced_weights(10, 30) == (3.0, 1.0)
    with pytest.raises(DataError, match="both kinds"):
        balanced_weights(0, 3)


def test_kto_moves_both_kinds_apart():
    policy, objective = model(), replace(OBJECTIVE, reference=model())
    optimizers, batch = OptimizerSet(policy, OptimConfig.adamw(1e-3, decay=0.0)), objective.collate(verdicts())
    steps = [train_step(policy, optimizers, [(objective, batch)]) for _ in range(15)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05
    assert steps[-1]["desirable_reward"] > 0 > steps[-1]["undesirable_reward"]
    assert steps[-1]["accuracy"] >= 0.8


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"desirable_weight": 0.0}, {"undesirable_weight": -1.0}])
def test_options_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match="positive"):
        replace(OBJECTIVE, **wrong)


def test_missing_reference_is_told():
    with pytest.raises(ValueError, match="reference"):
        OBJECTIVE.loss(model(), OBJECTIVE.collate(verdicts()))
