"""The weighted mean against sums written out by hand."""

import functools
import operator
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpft.aggregation import weighted_mean


def test_mean_is_weighted_by_samples() -> None:
    assert weighted_mean([(torch.tensor([1.0, 2.0]), 1), (torch.tensor([5.0, 2.0]), 3)]).tolist() == [4.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_of_one_silo_is_its_update_bit_for_bit(dtype: torch.dtype) -> None:
    tensor = torch.cat([torch.randn(1000) * 1e-3, torch.tensor([0.1, -0.0, 1e-7])]).to(dtype)
    result = weighted_mean([(tensor, 777)])
    assert result.dtype == dtype
    assert torch.equal(result.view(torch.uint8), tensor.view(torch.uint8))


def test_sum_does_not_lose_a_small_update_beside_a_large_one() -> None:
    terms = [(torch.tensor([1.0]), 1)] + [(torch.tensor([1.0 + 2**-23]), 1)] * 3
    assert weighted_mean(terms).item() == torch.tensor(1.0 + 0.75 * 2**-23, dtype=torch.float32).item()


silos = st.lists(
    st.tuples(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), st.integers(1, 10**6)),
    min_size=1,
    max_size=6,
)


@given(silos)
def test_mean_is_the_exact_one_to_the_last_float32_digit(silos: list[tuple[list[float], int]]) -> None:
    result = weighted_mean((torch.tensor(values), weight) for values, weight in silos)
    total = sum(weight for _, weight in silos)
    for place in range(3):
        exact = sum(Fraction(values[place]) * weight for values, weight in silos) / total
        largest = max(abs(values[place]) for values, _ in silos)
        assert result[place].item() == pytest.approx(float(exact), rel=2**-23, abs=max(largest * 2**-45, 2**-149))


@given(silos)
def test_the_bits_are_those_of_float64_sums_in_the_given_order(silos: list[tuple[list[float], int]]) -> None:
    """Python's own float is that float64."""
    result = weighted_mean((torch.tensor(values), weight) for values, weight in silos)
    for place in range(3):
        first, *others = (values[place] * weight for values, weight in silos)
        plain = functools.reduce(operator.add, others, first) / sum(weight for _, weight in silos)
        assert torch.equal(result[place].view(torch.int32), torch.tensor(plain, dtype=torch.float32).view(torch.int32))


def test_terms_are_not_changed() -> None:
    first, second = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    weighted_mean([(first, 2), (second, 5)])
    assert first.tolist() == second.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("weight", [0, -3])
def test_weight_that_is_no_number_of_samples_is_refused(weight: int) -> None:
    with pytest.raises(ValueError, match="positive number of samples"):
        weighted_mean([(torch.ones(1), weight)])


@pytest.mark.parametrize("other", [torch.ones(2), torch.ones(1, dtype=torch.float64)])
def test_a_term_of_another_shape_or_dtype_is_refused(other: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="same shape and dtype"):
        weighted_mean([(torch.ones(1), 1), (other, 1)])


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no term"):
        weighted_mean([])
