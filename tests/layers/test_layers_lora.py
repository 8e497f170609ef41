"""LoRA against the formula and against PEFT: one adapter in training, many in one batch, tied heads, other kinds of
linear layer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.errors import ConfigError, UserError
from fledge.layers.lora import (
    Adapter,
    AdapterBank,
    LoraConfig,
    Pair,
    add_lora,
    merge_lora,
    plain_state,
    put_adapter,
    remove_lora,
    take_adapter,
    unmerge_lora,
)
from fledge.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(31, 16, 2, 2, 1, 24, is_head_tied=True)
TOKENS_BT = torch.arange(12).view(2, 6)


def model_of(seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    return Llama(CONFIG).eval()


def adapter_of(
    model: nn.Module, seed: int, targets: tuple[str, ...] | None = ("query", "up", "head"), rank: int = 3
) -> Adapter:
    """One that changes answers."""
    generator = torch.Generator().manual_seed(seed)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = {n: m for n, m in linears.items() if targets is None or n.endswith(targets)}
    pairs = {
        name: Pair(
            torch.randn(rank, m.in_features, generator=generator),
            torch.randn(m.out_features, rank, generator=generator),
            0.3,
        )
        for name, m in chosen.items()
    }
    return Adapter(LoraConfig(rank), pairs)


def merged(seed: int, adapter: Adapter) -> Llama:
    """The model with the adapter in its weights, by plain arithmetic; the head gets a weight of its own."""
    model = model_of(seed)
    with torch.no_grad():
        for name, pair in adapter.pairs.items():
            linear = model.get_submodule(name)
            linear.weight = nn.Parameter(linear.weight + pair.scale * pair.b @ pair.a)
    return model


def test_a_new_adapter_changes_nothing_and_trains_nothing_but_itself() -> None:
    model = model_of()
    before = model.next_logprobs(TOKENS_BT)
    trained = add_lora(model, LoraConfig(4))
    assert torch.equal(model.next_logprobs(TOKENS_BT), before)
    assert [p for p in model.parameters() if p.requires_grad] == trained
    assert len(trained) == 2 * 2 * 7  # A and B of seven layers in each of two blocks; not of the head
    model.next_logprobs(TOKENS_BT).sum().backward()
    assert all(p.grad is not None for p in trained)
    assert model.tokens.weight.grad is None


@pytest.mark.parametrize(("is_stabilised", "scale"), [(False, 3.0), (True, 6.0)])
def test_training_gives_the_outputs_and_gradients_of_the_formula(is_stabilised: bool, scale: float) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(10, 6))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    a, b = add_lora(model, LoraConfig(4, 12.0, is_rank_stabilised=is_stabilised))
    nn.init.normal_(b)
    x = torch.randn(5, 10)
    w = (weight + scale * b.detach() @ a.detach()).requires_grad_()
    torch.testing.assert_close(model(x), F.linear(x, w, bias))
    for y in (model(x), F.linear(x, w, bias)):
        y.square().sum().backward()
    torch.testing.assert_close(
        a.grad, scale * b.detach().T @ w.grad, rtol=1e-5, atol=1e-4
    )  # the chain rule through W + scale B A
    torch.testing.assert_close(b.grad, scale * w.grad @ a.detach().T, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("is_stabilised", [False, True])
def test_training_gives_the_outputs_and_gradients_of_peft(is_stabilised: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(10, 6))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(10, 6)),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"], use_rslora=is_stabilised),
    )
    wrapped = theirs.base_model.model[0]
    wrapped.base_layer.load_state_dict(base[0].state_dict())
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    nn.init.normal_(b)
    config = LoraConfig(4, 12.0, is_rank_stabilised=is_stabilised)
    own = add_lora(base, config)
    put_adapter(base, Adapter(config, {"0": Pair(a.detach(), b.detach(), config.scale)}))
    x = torch.randn(5, 10)
    torch.testing.assert_close(base(x), theirs(x))
    for model in (base, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(own[0].grad, a.grad)
    torch.testing.assert_close(own[1].grad, b.grad)


def test_a_is_drawn_as_peft_draws_it_and_from_the_generator_given() -> None:
    drawn = [
        add_lora(nn.Sequential(nn.Linear(400, 3)), LoraConfig(8), torch.Generator().manual_seed(5))[0] for _ in "ab"
    ]
    assert torch.equal(*drawn)
    reference = nn.init.kaiming_uniform_(torch.empty(8, 400), a=math.sqrt(5))
    assert drawn[0].abs().max() <= 1 / math.sqrt(400)
    assert drawn[0].std().item() == pytest.approx(reference.std().item(), rel=0.05)


def test_dropout_falls_on_the_adapters_input_alone_and_only_in_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 4, bias=False))
    add_lora(model, LoraConfig(2, dropout=0.5))
    with torch.no_grad():
        model[0].b.normal_()
    x = torch.ones(1, 200)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    outputs = torch.stack([model(x) for _ in range(1000)])
    error = outputs.std(0) / 1000**0.5
    assert error.min() > 0
    assert ((outputs.mean(0) - model.eval()(x)).abs() < 4 * error).all()


def test_merging_gives_the_same_outputs_and_unmerging_the_same_bits() -> None:
    model = model_of()
    config = LoraConfig(3, targets=("query", "down", "head"))
    add_lora(model, config)
    adapter = adapter_of(model_of(), seed=4, targets=config.targets)
    put_adapter(model, adapter)
    loose, before = model.next_logprobs(TOKENS_BT), {k: v.clone() for k, v in model.state_dict().items()}
    merge_lora(model)
    torch.testing.assert_close(model.next_logprobs(TOKENS_BT), loose, atol=1e-5, rtol=0)
    assert not torch.equal(
        model.state_dict()["blocks.0.attention.query.base.weight"],
        before["blocks.0.attention.query.base.weight"],
    )
    assert torch.equal(model.tokens.weight, before["tokens.weight"])  # the head was tied to it, and no longer is
    merge_lora(model)  # twice is once
    torch.testing.assert_close(model.next_logprobs(TOKENS_BT), loose, atol=1e-5, rtol=0)
    unmerge_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.base.weight is model.tokens.weight
    merge_lora(model)
    remove_lora(model)
    assert type(model.head) is nn.Linear
    torch.testing.assert_close(
        model.next_logprobs(TOKENS_BT), merged(0, adapter).next_logprobs(TOKENS_BT), atol=1e-5, rtol=0
    )


def test_an_adapter_taken_from_one_model_works_in_another() -> None:
    config = LoraConfig(3, targets=("value",))
    first, second = model_of(), model_of()
    add_lora(first, config)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if name.endswith(".b"):
                parameter.normal_()
    adapter = take_adapter(first, config)
    add_lora(second, config)
    put_adapter(second, adapter)
    assert torch.equal(first.next_logprobs(TOKENS_BT), second.next_logprobs(TOKENS_BT))
    bank_model = model_of()
    bank = AdapterBank(bank_model)
    bank.load("x", adapter)
    bank.route([("x", TOKENS_BT.numel())])
    torch.testing.assert_close(bank_model.next_logprobs(TOKENS_BT), first.next_logprobs(TOKENS_BT))


def test_every_row_of_a_mixed_batch_is_what_the_merged_model_gives_alone() -> None:
    model = model_of()
    bank = AdapterBank(model)
    adapters = {
        "a": adapter_of(model, 1),
        "b": adapter_of(model, 2, None, rank=1),
        "c": adapter_of(model, 3, ("down",)),
    }
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    rows_BT = torch.randint(31, (7, 5), generator=torch.Generator().manual_seed(0))
    owners = ["a", None, "b", "a", "c", None, "b"]  # some in two runs, some in one, some without
    bank.route([(owner, 5) for owner in owners])
    together = model.next_logprobs(rows_BT)
    for row, owner in enumerate(owners):
        alone = merged(0, adapters[owner]) if owner else model_of()
        torch.testing.assert_close(together[row], alone.next_logprobs(rows_BT[row : row + 1])[0], atol=2e-4, rtol=0)
        others = [other for other in adapters if other != owner]
        for other in others:  # the adapters do differ
            assert not torch.allclose(
                together[row], merged(0, adapters[other]).next_logprobs(rows_BT[row : row + 1])[0], atol=0.01
            )


def test_rows_without_an_adapter_are_untouched_bit_for_bit_and_cost_no_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    plain = model.next_logprobs(TOKENS_BT)
    bank = AdapterBank(model)
    bank.load("a", adapter_of(model, 1))
    bank.route([("a", 6), (None, 6)])
    mixed = model.next_logprobs(TOKENS_BT)
    assert torch.equal(mixed[1], plain[1])
    assert not torch.allclose(mixed[0], plain[0], atol=0.01)
    bank.route(())
    monkeypatch.setattr(Tensor, "__matmul__", lambda *_: pytest.fail("a product was taken"))
    assert torch.equal(model.head(torch.ones(1, 16)), F.linear(torch.ones(1, 16), model.tokens.weight))


def test_the_last_adapter_leaves_the_model_as_it_was() -> None:
    model = model_of()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    bank = AdapterBank(model)
    first, second = adapter_of(model, 1), adapter_of(model, 2, ("up",))
    bank.load("a", first)
    bank.load("b", second)
    assert bank.names == ("a", "b")
    plain = plain_state(model)
    assert plain.keys() == model_of().state_dict().keys()
    assert all(plain[name] is parameter for name, parameter in parameters.items())
    bank.unload("a")
    assert type(model.head) is nn.Linear
    assert type(model.blocks[0].mlp.up) is not nn.Linear
    bank.unload("b")
    assert dict(model.named_modules()) == modules
    with pytest.raises(UserError, match="no adapter 'b' is loaded"):
        bank.unload("b")


class Halved(nn.Module):
    """A linear layer of another make, as a quantised one is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", (linear.weight.detach() * 64).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype) / 64)


def test_layers_of_another_make_take_adapters_but_nothing_is_merged_into_them() -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(Halved(nn.Linear(8, 5, bias=False)))

    pair = Pair(torch.randn(2, 8), torch.randn(5, 2), 0.5)
    x = torch.randn(4, 8)
    expected = build()(x) + 0.5 * x @ pair.a.T @ pair.b.T
    served = build()
    bank = AdapterBank(served)
    bank.load("q", Adapter(LoraConfig(2), {"0": pair}))
    bank.route([("q", 4)])
    torch.testing.assert_close(served(x), expected)
    trained = build()
    add_lora(trained, LoraConfig(2))
    put_adapter(trained, Adapter(LoraConfig(2), {"0": pair}))
    torch.testing.assert_close(trained(x), expected)
    with pytest.raises(UserError, match="'0', which is quantised"):
        merge_lora(trained)


def test_bfloat16_layers_answer_in_bfloat16() -> None:
    model = nn.Sequential(nn.Linear(8, 5)).to(torch.bfloat16)
    bank = AdapterBank(model)
    bank.load("q", Adapter(LoraConfig(2), {"0": Pair(torch.randn(2, 8), torch.randn(5, 2), 0.5)}))
    bank.route([("q", 1), (None, 1)])
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing() -> None:
    model = model_of()
    bank = AdapterBank(model)
    good = adapter_of(model, 1)
    wrong = {
        "no linear layer 'blocks.0.attention.quarry'; did you mean": {"blocks.0.attention.quarry": good.pairs["head"]},
        r"for 'head' are \(3, 16\) and \(24, 3\)": {"head": good.pairs["blocks.0.mlp.up"]},
        "no linear layer 'tokens'": {"tokens": good.pairs["head"]},
        "no numbers": {"head": Pair(torch.full((3, 16), math.nan), torch.zeros(31, 3), 1.0)},
    }
    with pytest.raises(UserError, match="adapts nothing"):
        bank.load("x", Adapter(LoraConfig(3), {}))
    for complaint, pairs in wrong.items():
        with pytest.raises(UserError, match=complaint):
            bank.load("x", Adapter(LoraConfig(3), {**good.pairs, **pairs}))
        assert type(model.head) is nn.Linear
    bank.load("x", good)
    with pytest.raises(UserError, match="loaded already"):
        bank.load("x", good)
    with pytest.raises(UserError, match="no linear layer's name ends with 'qery'; did you mean 'query'"):
        add_lora(model_of(), LoraConfig(targets=("qery",)))
    twice = model_of()
    add_lora(twice, LoraConfig())
    with pytest.raises(UserError, match="has an adapter already"):
        add_lora(twice, LoraConfig())
    other = model_of()
    add_lora(other, LoraConfig(3, targets=("value",)))
    with pytest.raises(UserError, match="differ in the modules"):
        put_adapter(other, good)


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": math.inf}, {"dropout": 1.0}, {"targets": ()}])
def test_settings_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError):
        LoraConfig(**options)


def test_rows_that_were_not_routed_are_an_error_of_ours() -> None:
    model = model_of()
    bank = AdapterBank(model)
    bank.load("a", adapter_of(model, 1))
    bank.route([("a", 5)])
    with pytest.raises(AssertionError, match="12 rows came, 5 were routed"):
        model.next_logprobs(TOKENS_BT)
