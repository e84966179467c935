"""The FFN operators on CUDA, run by the emulator; fused multiplies are plain loops there, see fused_multiplies.cpp."""

from typing import Any

import pytest
import torch
from emulation import PLACEMENTS, Emulator
from torch import Tensor

from fedpft.kernels import reference
from fedpft.kernels.cases import TOLERANCES, Case, cases, make_ffn
from fedpft.kernels.check import compare

OPERATORS = ("sub_ffn", "sub_ffn_backward", "sub_ffn_train", "sub_ffn_train_backward", "activation_moments")
CASES = [case for case in cases() if case.operator in OPERATORS]
GROUPS = sorted({(case.operator, case.dtype) for case in CASES}, key=str)


def group(operator: str, dtype: torch.dtype) -> list[Case]:
    return [case for case in CASES if (case.operator, case.dtype) == (operator, dtype)]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("operator", "dtype"), GROUPS)
def test_operator_agrees_with_its_reference(
    emulator: Emulator, operator: str, dtype: torch.dtype, placement: str
) -> None:
    for case in group(operator, dtype):
        error, tolerance = compare(case, run=emulator.operator(operator, placement=placement))
        assert error <= tolerance, str(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_threads_and_blocks_changes_no_bit(emulator: Emulator, dtype: torch.dtype) -> None:
    for case in group("sub_ffn", dtype) + group("sub_ffn_backward", dtype) + group("activation_moments", dtype):
        results = [emulator.call(case.operator, case.arguments, backwards=way) for way in (False, True)]
        for first, second in zip(*(torch.utils._pytree.tree_leaves(result) for result in results), strict=True):
            assert not isinstance(first, Tensor) or torch.equal(first, second), str(case)


@pytest.mark.parametrize("gated", [False, True])
def test_a_set_of_neurons_may_be_larger_than_a_block(emulator: Emulator, gated: bool) -> None:
    N, D, F, K = 9, 8, 2300, 2100
    ffn = make_ffn(N, D, F, dtype=torch.float64, gated=gated)
    neurons = torch.randperm(F, generator=torch.Generator().manual_seed(0))[:K]
    for compact in (False, True):
        full: tuple[Any, ...] = (ffn.x, *ffn.weights, neurons, ffn.mask, "silu", 0.05, True, True, compact)
        expected, (actual, _) = reference.sub_ffn(*full), emulator.call("sub_ffn", full)
        for index in range(3):
            torch.testing.assert_close(actual[index], expected[index])
        inputs = (ffn.x, expected[1], ffn.w_in, ffn.w_gate, ffn.w_out, neurons, "silu", compact)
        grad_x, _ = emulator.call("sub_ffn_backward", inputs)
        torch.testing.assert_close(grad_x, reference.sub_ffn_backward(*inputs))


def test_moments_of_more_tokens_than_are_held_and_more_neurons_than_a_panel(emulator: Emulator) -> None:
    ffn = make_ffn(2100, 4, 1060, dtype=torch.float64)
    sums = torch.ones(1060, dtype=torch.float64), torch.full((1060, 1060), 2.0, dtype=torch.float64)
    case = Case("activation_moments", "", torch.float64, (*sums, ffn.x, *ffn.weights[:4], None, ffn.mask, "relu"))
    error, tolerance = compare(case, run=emulator.operator(case.operator))
    assert error <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("updated", "gated"), [(0, False), (24, True), (72, False)])
def test_without_a_gradient_of_x_only_the_updated_neurons_are_reached(
    emulator: Emulator, dtype: torch.dtype, updated: int, gated: bool
) -> None:
    ffn = make_ffn(136, 64, 72, dtype=dtype, gated=gated)
    saved = reference.sub_ffn_train(ffn.x, *ffn.weights, *ffn.updated(updated), "gelu_tanh", True)[1]
    saved[..., updated:] = torch.nan
    case = Case(
        "sub_ffn_train_backward",
        "no-grad-x",
        dtype,
        (ffn.x, ffn.x, saved, ffn.w_in, ffn.w_gate, ffn.w_out, updated, "gelu_tanh", False),
    )
    error, tolerance = compare(case, run=emulator.operator(case.operator))
    assert error <= tolerance


def test_a_wrong_shape_is_refused(emulator: Emulator) -> None:
    ffn = make_ffn(6, 4, 5, dtype=torch.float32)
    arguments: list[Any] = [ffn.x, *ffn.weights, None, None, "gelu", 0.0, False, False, False]
    for position, name in ((1, "w_in"), (2, "b_in"), (5, "w_out"), (6, "b_out")):
        wrong = arguments.copy()
        value = wrong[position]
        assert isinstance(value, Tensor)
        wrong[position] = value[..., :-1]
        with pytest.raises(RuntimeError, match=f"{name} has a wrong shape"):
            emulator.call("sub_ffn", tuple(wrong))
