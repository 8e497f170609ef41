"""Float layers while the engine runs: few rows by the kernel, the model itself as it was."""

from __future__ import annotations

import pytest
import torch
from test_infer_engine import GREEDY, PROMPTS, asking, engine_of
from test_infer_naive import build
from torch import nn

from fledge.infer import float_linear, kernels
from fledge.infer.float_linear import MOST_ROWS, FewRowsLinear, few_rows, float_linears

needs_kernels = pytest.mark.skipif(not kernels.load().is_compiled, reason="no C++ compiler")


@needs_kernels
def test_layers_are_of_their_own_class_again_even_after_an_error() -> None:
    model = build("llama-grouped")
    linears = float_linears(model)
    assert len(linears) == sum(isinstance(module, nn.Linear) for module in model.modules())
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def fail_within() -> None:
        with few_rows(linears):
            assert {type(linear) for linear in linears} == {FewRowsLinear}
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_within()
    assert {type(linear) for linear in linears} == {nn.Linear}
    assert before == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


@needs_kernels
@pytest.mark.parametrize(("rows", "by_kernel"), [(1, True), (MOST_ROWS, True), (MOST_ROWS + 1, False)])
def test_only_few_rows_of_float32_take_the_kernel(rows: int, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(kernels, "linear_float", lambda x, *_: seen.append(x.shape) or x.new_zeros(len(x), 3))
    linear = nn.Linear(8, 3)
    with torch.inference_mode(), few_rows([linear]):
        linear(torch.ones(rows, 8))
    assert len(seen) == by_kernel
    half = nn.Linear(8, 3).bfloat16()
    with torch.inference_mode(), few_rows([half]):
        half(torch.ones(1, 8, dtype=torch.bfloat16))
    assert len(seen) == by_kernel


def test_models_of_other_types_and_machines_without_kernels_keep_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert float_linears(build("pocket").bfloat16()) == ()
    monkeypatch.setattr(
        float_linear.kernels, "load", lambda: kernels.Kernels(torch.library.Library("x", "FRAGMENT"), "none")
    )
    assert float_linears(build("pocket")) == ()


@needs_kernels
@pytest.mark.parametrize("name", ["gpt-window", "llama-grouped", "pocket"])
def test_an_answer_has_the_same_logprobs_to_the_bit_whoever_is_beside_it(name: str) -> None:
    """With few rows a step every operator of it keeps them apart."""
    model = build(name).eval()
    engine = engine_of(model, max_live=8)
    together = [own for [own] in engine.generate(asking(PROMPTS, GREEDY))]
    alone = [own for prompt in PROMPTS for [own] in engine_of(model, max_live=8).generate(asking([prompt], GREEDY))]
    assert [own.ids for own in together] == [own.ids for own in alone]
    assert [own.logprobs for own in together] == [own.logprobs for own in alone]
