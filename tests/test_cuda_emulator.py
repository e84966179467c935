"""The CUDA kernels, run by the emulator of tests/cuda_emulator/: indexing, bounds, barriers, arithmetic, order."""

import pytest
import torch
from emulation import PLACEMENTS, Emulator

from fedpft.kernels.cases import Case, cases
from fedpft.kernels.check import compare

CASES = [case for case in cases() if not case.operator.startswith("sub_ffn")]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_agrees_with_its_reference(emulator: Emulator, case: Case, placement: str) -> None:
    error, tolerance = compare(case, run=emulator.operator(case.operator, placement=placement))
    assert error <= tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_of_threads_and_blocks_changes_no_bit(emulator: Emulator, case: Case) -> None:
    forwards, backwards = (emulator.call(case.operator, case.arguments, backwards=way) for way in (False, True))
    for first, second in zip(tensors(forwards), tensors(backwards), strict=True):
        assert torch.equal(bits(first), bits(second))


def tensors(values: object) -> list[torch.Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)
