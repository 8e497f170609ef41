"""The pocket family: n-gram tables that respect documents, a start that predicts nothing, roles, and its dial."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import ConfigError
from fledge.layers.attention import RowContext, SegmentContext
from fledge.models.pocket import QK_GAIN, Pocket, PocketConfig, squared_relu

CONFIG = PocketConfig(vocab_size=31, width=16, num_layers=3, num_heads=2, table_rows=128)


def built(config: PocketConfig = CONFIG, seed: int = 0) -> Pocket:
    model = Pocket(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def lively(config: PocketConfig = CONFIG) -> Pocket:
    model = built(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model


def test_depth_is_the_one_dial() -> None:
    shapes = {d: PocketConfig.from_depth(d, 4096) for d in (1, 4, 6, 12)}
    assert [(c.width, c.num_heads, c.num_layers) for c in shapes.values()] == [
        (64, 1, 1),
        (128, 2, 4),
        (192, 3, 6),
        (384, 6, 12),
    ]


@pytest.mark.parametrize(
    "bad",
    [{"width": 17}, {"num_heads": 3}, {"width": 2}, {"num_layers": 0}, {"table_rows": -1}, {"vocab_size": 0}],
)
def test_a_shape_that_cannot_be_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        PocketConfig(**{"vocab_size": 31, "width": 16, "num_layers": 3, "num_heads": 2, **bad})


def test_a_new_model_predicts_the_uniform_distribution() -> None:
    logprobs = built().next_logprobs(torch.tensor([[3, 4, 5]]))
    torch.testing.assert_close(logprobs.exp(), torch.full((1, 3, 31), 1 / 31))


def test_initialisation_follows_the_seed_and_nothing_else() -> None:
    torch.manual_seed(5)
    one = built(seed=7)
    torch.manual_seed(6)
    other = built(seed=7)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.tokens.weight, built(seed=8).tokens.weight)


def test_the_future_does_not_reach_the_past() -> None:
    model = lively()
    tokens = torch.randint(0, 31, (1, 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 31
    torch.testing.assert_close(model.next_logprobs(tokens)[0, :6], model.next_logprobs(changed)[0, :6])
    assert not torch.allclose(model.next_logprobs(tokens)[0, 6], model.next_logprobs(changed)[0, 6])


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    left=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_packed_and_padded_documents_read_as_if_alone(lengths: list[int], left: int, seed: int) -> None:
    model = lively()
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(0, 31, (n,), generator=generator) for n in lengths]
    tokens = torch.cat([torch.zeros(left, dtype=torch.int64), *documents])[None]
    numbers = [torch.zeros(left), *(torch.full((n,), i + 1) for i, n in enumerate(lengths))]
    context = SegmentContext(torch.cat(numbers).int()[None])
    logits = model.unembed(model.hidden(model.embed(tokens, context), context))[0, left:]
    start = 0
    for document in documents:
        alone = model.next_logprobs(document[None])[0]
        packed = logits[start : start + len(document)].log_softmax(-1)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
        start += len(document)


def test_each_table_sees_exactly_its_n_gram() -> None:
    """Changing the token two back moves the trigram row only, three back none; the current token moves both."""
    model = built()

    def rows(ids: list[int]) -> list[int]:
        tokens = torch.tensor([ids])
        context = RowContext(tokens)
        return [int(model._hash(tokens, length, context)[0, -1]) for length in (2, 3)]

    base = rows([9, 8, 7, 6])
    assert rows([1, 8, 7, 6]) == base
    assert rows([9, 1, 7, 6])[0] == base[0]
    assert rows([9, 1, 7, 6])[1] != base[1]
    assert rows([9, 8, 1, 6])[0] != base[0]
    assert rows([9, 8, 7, 1])[0] != base[0]


def test_hashes_spread_bigrams_over_the_table() -> None:
    """Every bigram of 31 tokens into 961 rows: as many distinct rows as throwing balls, 1 - 1/e of them, or more."""
    model = Pocket(PocketConfig(31, 16, 1, 2, table_rows=961))
    first, second = torch.meshgrid(torch.arange(31), torch.arange(31), indexing="ij")
    tokens = torch.stack((first.flatten(), second.flatten()), dim=1)
    rows = model._hash(tokens, 2, RowContext(tokens))[:, 1]
    assert int(rows.min()) >= 0
    assert len(rows.unique()) > 0.55 * 961


def test_only_tables_have_sparse_gradients_and_only_on_looked_up_rows() -> None:
    model = lively()
    tokens = torch.tensor([[3, 4, 5]])
    model.next_logprobs(tokens)[0, -1, 6].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.is_sparse == (model.roles()[name] == "table"), name
    table = model.get_parameter("tables.0.weight").grad
    assert table is not None
    assert len(table.coalesce().indices()[0]) == 3


def test_roles_name_every_parameter() -> None:
    model = built()
    roles = model.roles()
    assert roles.keys() == dict(model.named_parameters()).keys()
    assert {name for name, role in roles.items() if role == "table"} == {"tables.0.weight", "tables.1.weight"}
    assert {name for name, role in roles.items() if role == "embedding"} == {
        "tokens.weight",
        "first_values.weight",
        "last_values.weight",
    }
    assert roles["head.weight"] == "head"
    assert roles["head.bias"] == roles["blocks.0.mix"] == "gain"
    assert roles["blocks.2.down.weight"] == "matrix"


def test_resetting_tables_changes_tables_only() -> None:
    model = lively()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.reset_tables(torch.Generator().manual_seed(9))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (model.roles()[name] != "table"), name


def test_a_model_without_tables_has_none() -> None:
    model = lively(PocketConfig(31, 16, 2, 2, table_rows=0))
    assert "table" not in model.roles().values()
    assert model.next_logprobs(torch.tensor([[1, 2]])).shape == (1, 2, 31)


def test_scores_are_normalised_queries_and_keys_times_the_gain() -> None:
    """The largest score a model can form is QK_GAIN x sqrt(head width), however large the weights are."""
    model = lively()
    seen = []

    class Spy(RowContext):
        def attend(self, site, q_BTHK, k_BTGK, v_BTGK, *, window=None, bias=None, scale=None):  # type: ignore[no-untyped-def]
            scores = q_BTHK.transpose(1, 2) @ k_BTGK.permute(0, 2, 3, 1)
            seen.append(float(scores.detach().abs().max() * scale))
            return super().attend(site, q_BTHK, k_BTGK, v_BTGK, window=window, bias=bias, scale=scale)

    tokens = torch.tensor([[1, 2, 3, 4]])
    model.hidden(model.embed(tokens, Spy(tokens)), Spy(tokens))
    assert len(seen) == 3
    assert max(seen) == pytest.approx(QK_GAIN * CONFIG.head_width**0.5, rel=0.5)
    assert max(seen) <= QK_GAIN * CONFIG.head_width**0.5 * 1.001


def test_ids_up_to_a_million_hash_without_overflow() -> None:
    model = Pocket(PocketConfig(2, 16, 1, 2, table_rows=1000))
    tokens = torch.full((1, 3), 2**20 - 1)
    exact = (2**20 - 1) * (0x9E3779B1 + 0x85EBCA77 + 0xC2B2AE3D)
    assert exact < 2**63
    assert int(model._hash(tokens, 3, RowContext(tokens))[0, 2]) == (exact ^ (exact >> 15)) % 1000


def test_squared_relu_is_its_formula_and_goes_back_as_autograd_would() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert squared_relu(x).tolist() == [0.0, 0.0, 0.0, 0.25, 9.0]
    (gradient,) = torch.autograd.grad((squared_relu(x) * torch.arange(1.0, 6.0)).sum(), x)
    assert gradient.tolist() == [0.0, 0.0, 0.0, 4.0, 30.0]
