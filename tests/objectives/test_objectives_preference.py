"""DPO and IPO: known answers, sums over completions, masked prompts, soft labels, shared rows, cached references."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fledge.errors import DataError
from fledge.models.llama import Llama, LlamaConfig
from fledge.objectives.completions import completion_logprobs
from fledge.objectives.preference import Preference, PreferenceIds, preference_loss, smoothed, with_reference
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet

PAD, VOCAB = 1, 20
OBJECTIVE = Preference(max_length=16, pad_id=PAD)


def model(seed: int = 0) -> Llama:
    llama = Llama(LlamaConfig(VOCAB, 32, 2, 2, 1, 64))
    llama.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        llama.head.weight.mul_(20)
    return llama.eval()


def pair(seed: int = 0, lengths=(4, 3, 6), **fields) -> PreferenceIds:
    generator = torch.Generator().manual_seed(seed)
    prompt, first, second = (tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist()) for n in lengths)
    return PreferenceIds(prompt, first, second, **fields)


def by_hand(llama: Llama, prompt, completion) -> float:
    """The slow twin: one sequence, one token at a time."""
    total = 0.0
    for place, token in enumerate(completion):
        with torch.no_grad():
            total += float(llama.next_logprobs(torch.tensor([[*prompt, *completion[:place]]]))[0, -1, token])
    return total


def figures(loss) -> dict[str, float]:
    return {name: float(total.detach()) / count for name, (total, count) in loss.stats.items()}


def test_c51_loss_of_a_policy_that_is_its_reference_is_log_two():
    batch = OBJECTIVE.collate([pair(), pair(1), pair(2, preference=0.3)])
    loss = replace(OBJECTIVE, reference=model()).loss(model(), batch)
    term = loss.terms["preference"]
    assert float(term.sum.detach()) / term.count == pytest.approx(math.log(2), abs=1e-6)
    assert figures(loss)["margin"] == 0
    assert figures(loss)["accuracy"] == 0.5


def test_c51_known_answer_of_dpo():
    gap = torch.tensor(2.0 - -1.0)
    assert preference_loss(gap, torch.tensor(1.0), 0.1).item() == pytest.approx(0.554355, abs=1e-6)
    assert preference_loss(-gap, torch.tensor(0.0), 0.1).item() == pytest.approx(0.554355, abs=1e-6)


def test_known_answer_of_ipo_and_its_minimum():
    assert preference_loss(torch.tensor(3.0), torch.tensor(1.0), 0.1, "ipo").item() == pytest.approx(4.0)
    assert preference_loss(torch.tensor(5.0), torch.tensor(1.0), 0.1, "ipo").item() == 0
    assert preference_loss(torch.tensor(3.0), torch.tensor(0.75), 0.1, "ipo").item() == pytest.approx(0.75 * 4 + 16)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.8])
def test_soft_label_is_met_where_the_implied_probability_equals_it(target):
    gap = torch.tensor(math.log(target / (1 - target)) / 0.1, requires_grad=True)
    preference_loss(gap, torch.tensor(target), 0.1).backward()
    assert gap.grad.item() == pytest.approx(0, abs=1e-7)


def test_label_smoothing_is_the_expected_loss_under_flipped_labels():
    gap, smoothing = torch.tensor(1.7), 0.2
    right, wrong = (preference_loss(gap, torch.tensor(label), 0.1) for label in (1.0, 0.0))
    target = smoothed(torch.tensor(1.0), smoothing)
    assert smoothed(torch.tensor([0.0, 0.3, 0.5]), smoothing).tolist() == pytest.approx([0.2, 0.38, 0.5])
    assert preference_loss(gap, target, 0.1).item() == pytest.approx(float(0.8 * right + 0.2 * wrong), abs=1e-6)
    batch = OBJECTIVE.collate([pair()])
    plain, soft = (
        replace(OBJECTIVE, reference=model(1), label_smoothing=s).loss(model(), batch).terms["preference"].sum
        for s in (0.0, smoothing)
    )
    assert float(plain.detach()) != pytest.approx(float(soft.detach()))


def test_c51_log_probability_is_the_sum_over_the_completion_with_the_prompt_masked():
    policy, reference, examples = model(), model(1), [pair(), pair(3, (2, 7, 1))]
    loss = replace(OBJECTIVE, reference=reference).loss(policy, OBJECTIVE.collate(examples))
    total, rewards = 0.0, []
    for example in examples:
        first, second = (
            by_hand(policy, example.prompt, ids) - by_hand(reference, example.prompt, ids)
            for ids in (example.first, example.second)
        )
        total += math.log1p(math.exp(-0.1 * (first - second)))
        rewards.append((first, second))
    assert float(loss.terms["preference"].sum.detach()) == pytest.approx(total, abs=1e-4)
    found = figures(loss)
    assert found["chosen_reward"] == pytest.approx(0.1 * sum(first for first, _ in rewards) / 2, abs=1e-4)
    assert found["rejected_reward"] == pytest.approx(0.1 * sum(second for _, second in rewards) / 2, abs=1e-4)
    assert found["margin"] == pytest.approx(found["chosen_reward"] - found["rejected_reward"], abs=1e-5)
    chosen = sum(by_hand(policy, example.prompt, example.first) for example in examples) / 2
    assert found["chosen_logprob"] == pytest.approx(chosen, abs=1e-4)


def test_preferred_second_completion_is_the_chosen_one():
    example = pair()
    turned = PreferenceIds(example.prompt, example.second, example.first, preference=0.0)
    objective = replace(OBJECTIVE, reference=model(1))
    here, there = (objective.loss(model(), OBJECTIVE.collate([given])) for given in (example, turned))
    assert float(here.terms["preference"].sum.detach()) == pytest.approx(
        float(there.terms["preference"].sum.detach()), abs=1e-5
    )
    assert figures(here) == pytest.approx(figures(there), abs=1e-5)


def test_pair_without_preference_teaches_but_is_not_counted_in_the_figures():
    objective = replace(OBJECTIVE, reference=model(1))
    loss = objective.loss(model(), OBJECTIVE.collate([pair(), pair(1, preference=0.5)]))
    assert loss.terms["preference"].count == 2
    assert loss.stats["accuracy"][1] == 1


def test_c51_cached_reference_equals_a_fresh_one():
    batch, reference = OBJECTIVE.collate([pair(), pair(3, (2, 7, 1))]), model(1)
    cached = with_reference(batch, reference, rows=3)
    fresh = replace(OBJECTIVE, reference=reference).loss(model(), batch).terms["preference"].sum
    assert OBJECTIVE.loss(model(), cached).terms["preference"].sum.detach().item() == pytest.approx(
        fresh.detach().item(), abs=1e-5
    )
    given = [
        pair(reference=tuple(cached.reference_N[:2].tolist())),
        pair(3, (2, 7, 1), reference=tuple(cached.reference_N[2:].tolist())),
    ]
    assert torch.allclose(OBJECTIVE.collate(given).reference_N, cached.reference_N)
    assert OBJECTIVE.collate([given[0], pair(4)]).reference_N is None


def test_every_completion_passes_through_the_model_once_however_many_pairs_it_is_in():
    prompt, answers = (3, 4), [(5, 6), (7,), (8, 9, 10)]
    pairs = [PreferenceIds(prompt, answers[i], answers[j], weight=1 / 3) for i, j in ((0, 1), (0, 2), (1, 2))]
    batch, seen, policy = OBJECTIVE.collate(pairs), [], model()

    def counted(*args):
        seen.append(args[1].shape[0])
        return completion_logprobs(*args)

    assert batch.tokens_NT.shape == (3, 5)
    assert batch.counts == {"preference": pytest.approx(1.0)}
    objective = replace(OBJECTIVE, region=counted)
    together = objective.loss(policy, replace(batch, reference_N=torch.zeros(3))).terms["preference"]
    assert seen == [3]
    unweighed = objective.collate([replace(one, weight=1.0) for one in pairs])
    whole = objective.loss(policy, replace(unweighed, reference_N=torch.zeros(3))).terms["preference"]
    assert float(together.sum.detach()) == pytest.approx(float(whole.sum.detach()) / 3, abs=1e-5)
    each = [replace(OBJECTIVE.collate([one]), reference_N=torch.zeros(2)) for one in pairs]
    alone = [objective.loss(policy, one).terms["preference"].sum.detach() for one in each]
    assert float(together.sum.detach()) == pytest.approx(float(sum(alone)), abs=1e-5)


def test_gradient_does_not_depend_on_how_the_batch_is_cut():
    examples = [pair(seed, (3, 2 + seed, 5)) for seed in range(4)]
    optim, norms = OptimConfig.adamw(1e-3), []
    for parts in ([examples], [examples[:1], examples[1:]]):
        policy, objective = model(), replace(OBJECTIVE, reference=model(1))
        step = train_step(policy, OptimizerSet(policy, optim), [(objective, objective.collate(p)) for p in parts])
        norms.append((step["loss"], step["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_reference_gets_no_gradient():
    reference = model(1)
    replace(OBJECTIVE, reference=reference).loss(model(), OBJECTIVE.collate([pair()])).terms[
        "preference"
    ].sum.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_dpo_raises_the_preferred_completion_above_the_other():
    policy, objective = model(), replace(OBJECTIVE, reference=model())
    optimizers, batch = OptimizerSet(policy, OptimConfig.adamw(1e-3, decay=0.0)), objective.collate([pair(), pair(1)])
    steps = [train_step(policy, optimizers, [(objective, batch)]) for _ in range(15)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert steps[-1]["accuracy"] == 1
    assert steps[-1]["margin"] > 0.5


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: PreferenceIds((2,), (3,), (3,)), "same completion twice"),
        (lambda: PreferenceIds((2,), (3,), (4,), preference=1.5), "probability"),
        (lambda: PreferenceIds((2,), (3,), (4,), weight=0.0), "positive"),
        (lambda: OBJECTIVE.collate([PreferenceIds((2,), (3,), ())]), "at least one"),
        (lambda: OBJECTIVE.collate([PreferenceIds((), (3,), (4,))]), "at least one"),
        (lambda: OBJECTIVE.collate([pair(0, (10, 7, 2))]), "more than 16"),
        (lambda: OBJECTIVE.collate([]), "at least one completion"),
    ],
)
def test_pair_that_cannot_be_learned_from_is_refused(make, complaint):
    with pytest.raises(DataError, match=complaint):
        make()


@pytest.mark.parametrize(
    "wrong", [{"beta": 0.0}, {"kind": "slic"}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}]
)
def test_options_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError):
        replace(OBJECTIVE, **wrong)


def test_missing_reference_is_told():
    with pytest.raises(ValueError, match="reference"):
        OBJECTIVE.loss(model(), OBJECTIVE.collate([pair()]))
