"""The CUDA kernels, run by the emulator of tests/cuda_emulator/: indexing, bounds, barriers, arithmetic, order."""

import ctypes
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import bits
from emulation import PLACEMENTS, Emulator, compile_library

from fedpft.kernels import reference
from fedpft.kernels.cases import TOLERANCES, cases
from fedpft.kernels.check import compare

OPERATORS = (
    "neuron_saliency",
    "inactivity_count",
    "alignment_loss",
    "alignment_loss_backward",
    "quantize_blocks",
    "dequantize_accumulate",
)
CASES = {name: [case for case in cases() if case.operator == name] for name in OPERATORS}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernel_agrees_with_its_reference(emulator: Emulator, operator: str, placement: str) -> None:
    for case in CASES[operator]:
        error, tolerance = compare(case, run=emulator.operator(operator, placement=placement))
        assert error <= tolerance, str(case)


@pytest.mark.parametrize("operator", OPERATORS)
def test_order_of_threads_and_blocks_changes_no_bit(emulator: Emulator, operator: str) -> None:
    # The types differ in nothing that an order could change.
    for case in (case for case in CASES[operator] if case.dtype == torch.float32):
        forwards, backwards = (emulator.call(operator, case.arguments, backwards=way) for way in (False, True))
        assert bits(forwards) == bits(backwards), str(case)


# ------------------------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_saliency_is_accurate_to_float32_rounding(emulator: Emulator, dtype: torch.dtype) -> None:
    w_in, w_out = torch.randn(40, 2048).to(dtype), torch.randn(2048, 40).to(dtype)
    exact = (w_in.double().square().sum(1) + w_out.double().square().sum(0)).sqrt()
    saliency = emulator.operator("neuron_saliency")([w_in], [], [w_out])[0]
    torch.testing.assert_close(saliency.double(), exact, rtol=1.2e-7, atol=0)


def test_equal_neurons_have_equal_saliency(emulator: Emulator) -> None:
    row = torch.randn(1, 1000)
    weights = [row.expand(301, -1)], [], [row.t().expand(-1, 301).contiguous()]
    assert emulator.operator("neuron_saliency")(*weights).unique().numel() == 1


@pytest.mark.parametrize("value", [math.inf, math.nan, 60000.0])
def test_saliency_of_extreme_weights_is_that_of_the_reference(emulator: Emulator, value: float) -> None:
    w_in, w_out = torch.ones(4, 64).half(), torch.ones(64, 4).half()
    w_in[1, 63] = w_out[3, 2] = value
    expected = reference.neuron_saliency([w_in], [], [w_out])
    torch.testing.assert_close(emulator.operator("neuron_saliency")([w_in], [], [w_out]), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_counts_are_those_of_the_activation_everywhere(emulator: Emulator, activation: str, dtype: torch.dtype) -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 65504.0, -65504.0])
    z = torch.cat([torch.linspace(-12, 12, 501), special]).to(dtype)
    for eps in (1e-6, 0.05, 0.1699, 0.1701, 2.0):
        counts = emulator.operator("inactivity_count")(z[None].contiguous(), None, activation, eps)
        wide = z.double()
        # Where rounding in float32 decides, either is right.
        low, high = (reference.inactivity_count(wide[None], None, activation, eps * r) for r in (1 - 1e-5, 1 + 1e-5))
        assert ((low <= counts) & (counts <= high)).all(), eps


def test_relu_counts_exact_zeros(emulator: Emulator) -> None:
    z = torch.tensor([[-1.0, 2.0], [0.0, 3.0], [-math.inf, 1e-45], [math.nan, -0.0]])
    assert emulator.operator("inactivity_count")(z, None, "relu", 0.0).tolist() == [3, 1]


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("teacher", [0.0, math.nan, math.inf])
def test_alignment_loss_of_extreme_states_is_that_of_the_reference(
    emulator: Emulator, teacher: float, rows: int
) -> None:
    states = torch.ones(rows, 8), torch.full((rows, 8), teacher)
    for student in (states[0], states[1]):
        expected = reference.alignment_loss(student, states[1], None)
        torch.testing.assert_close(
            emulator.operator("alignment_loss")(student, states[1], None), expected, equal_nan=True
        )


def test_what_the_mask_hides_may_be_anything(emulator: Emulator) -> None:
    student, teacher = torch.randn(9, 8), torch.randn(9, 8)
    mask = torch.arange(9) % 3 != 0
    loss, inverse_energy = emulator.operator("alignment_loss")(student, teacher, mask)
    student[~mask], teacher[~mask] = math.nan, math.inf
    assert torch.equal(emulator.operator("alignment_loss")(student, teacher, mask)[0], loss)
    grad = emulator.operator("alignment_loss_backward")(torch.ones(()), inverse_energy, student, teacher, mask)
    assert grad[mask].isfinite().all()
    assert grad[~mask].count_nonzero() == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.0, 2.0**-149, 3e38])
@pytest.mark.parametrize("block", [64, 5000])
def test_quantisation_of_extreme_values_is_that_of_the_reference(emulator: Emulator, block: int, value: float) -> None:
    for x in (torch.randn(10_000), torch.full((10_000,), value)):
        x[777] = value
        q, scales = emulator.operator("quantize_blocks")(x, block)
        expected_q, expected_scales = reference.quantize_blocks(x, block)
        torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(q, expected_q)
        total, expected = torch.ones(10_000), torch.ones(10_000)
        emulator.operator("dequantize_accumulate")(total, q, scales, 0.5, block)
        reference.dequantize_accumulate(expected, q, scales, 0.5, block)
        torch.testing.assert_close(total, expected, equal_nan=True)


# ------------------------------------------------------------------------------------------------ arguments

STATES = torch.ones(4, 3)
WRONG: list[tuple[str, str, tuple[Any, ...]]] = [
    ("neuron_saliency: a weight", "neuron_saliency", ([STATES], [], [STATES])),
    ("neuron_saliency: a weight", "neuron_saliency", ([STATES], [STATES.half()], [STATES.t()])),
    ("neuron_saliency: unsupported dtype", "neuron_saliency", ([STATES.long()], [], [STATES.t().long()])),
    ("inactivity_count: mask", "inactivity_count", (STATES, torch.ones(3) > 0, "relu", 0.0)),
    ("inactivity_count: unknown activation tanh", "inactivity_count", (STATES, None, "tanh", 0.0)),
    ("alignment_loss: teacher", "alignment_loss", (STATES, STATES[:2], None)),
    ("backward: grad has", "alignment_loss_backward", (torch.ones(1), torch.ones(()), STATES, STATES, None)),
    ("quantize_blocks: block", "quantize_blocks", (STATES[0], 0)),
    ("dequantize_accumulate: scales", "dequantize_accumulate", (STATES[0], STATES[0].char(), STATES[0], 1.0, 3)),
]


@pytest.mark.parametrize(("text", "operator", "arguments"), WRONG)
def test_a_direct_call_cannot_leave_its_tensors(
    emulator: Emulator, text: str, operator: str, arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(RuntimeError, match=text):
        emulator.call(operator, arguments)


# ------------------------------------------------------------------------------------------------ the emulator itself

FAULTS = """
#include "launch.h"

using namespace fedpft::cuda;

__global__ void outside(int* values) { values[threadIdx.x * 4096] = 1; }
__global__ void unaligned(double* values) { *reinterpret_cast<double*>(reinterpret_cast<char*>(values) + 1) = 1; }
__global__ void diverging(int* values) {
  if (threadIdx.x < 40) __syncthreads();
  values[0] = 1;
}
__global__ void racing(int* values) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  values[threadIdx.x] = shared[63 - threadIdx.x];
}
__global__ void waiting(int* values) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  values[threadIdx.x] = shared[63 - threadIdx.x] + __shfl_xor_sync(kAllLanes, static_cast<int>(threadIdx.x), 1);
}

#define RUN(kernel, type)                                                             \\
  extern "C" __attribute__((visibility("default"))) int run_##kernel(type* values) {   \\
    return launch(kernel, dim3(1), dim3(64), nullptr, values);                         \\
  }
RUN(outside, int)
RUN(unaligned, double)
RUN(diverging, int)
RUN(racing, int)
RUN(waiting, int)
"""


def test_the_emulator_finds_faults(emulator: Emulator, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "faults.cu"
    source.write_text(FAULTS)
    library = ctypes.CDLL(str(compile_library([source], tmp_path)))
    values = (ctypes.c_int * 64)()

    def results(name: str) -> tuple[list[int], list[int]]:
        found = []
        for way in (0, 1):
            library.emulator_reverse(way)
            assert library[name](values) == 0
            found.append(list(values))
        return found[0], found[1]

    assert results("run_waiting") == ([63 - i + (i ^ 1) for i in range(64)],) * 2
    forwards, backwards = results("run_racing")
    assert forwards != backwards
    library.emulator_reverse(0)
    assert library.run_diverging(values) == 719
    assert "a barrier that not all threads reach at block (0, 0, 0), thread (0, 0, 0)" in capfd.readouterr().err
    assert library.run_unaligned(values) == 700
    assert "undefined behaviour" in capfd.readouterr().err
    emulator.guard("at the end")
    try:
        small = torch.zeros(4096, dtype=torch.int32)
    finally:
        emulator.guard(None)
    assert library.run_outside(ctypes.c_void_p(small.data_ptr())) == 700
    assert "memory that is not there at block (0, 0, 0), thread (1, 0, 0)" in capfd.readouterr().err
