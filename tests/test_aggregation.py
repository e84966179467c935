"""The weighted mean against sums written out by hand."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpft.aggregation import WeightedMean


def mean_of(*updates: tuple[dict[str, torch.Tensor], int]) -> dict[str, torch.Tensor]:
    mean = WeightedMean()
    for tensors, weight in updates:
        mean.add(tensors, weight)
    return mean.result()


def test_mean_is_weighted_by_samples() -> None:
    result = mean_of(
        ({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[4.0]])}, 1),
        ({"a": torch.tensor([5.0, 2.0]), "b": torch.tensor([[0.0]])}, 3),
    )
    assert {name: tensor.tolist() for name, tensor in result.items()} == {"a": [4.0, 2.0], "b": [[1.0]]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_of_one_silo_is_its_update_bit_for_bit(dtype: torch.dtype) -> None:
    adapter = {"a": (torch.randn(1000) * 1e-3).to(dtype), "b": torch.tensor([0.1, -0.0, 1e-7]).to(dtype)}
    result = mean_of((adapter, 777))
    for name, tensor in adapter.items():
        assert result[name].dtype == dtype
        assert torch.equal(result[name].view(torch.uint8), tensor.view(torch.uint8))


def test_sum_does_not_lose_a_small_update_beside_a_large_one() -> None:
    updates = [({"a": torch.tensor([1.0])}, 1)] + [({"a": torch.tensor([1.0 + 2**-23])}, 1)] * 3
    assert mean_of(*updates)["a"].item() == torch.tensor(1.0 + 0.75 * 2**-23, dtype=torch.float32).item()


updates = st.lists(
    st.tuples(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), st.integers(1, 10**6)),
    min_size=1,
    max_size=6,
)


@given(updates)
def test_mean_is_the_exact_one_to_the_last_float32_digit(silos: list[tuple[list[float], int]]) -> None:
    result = mean_of(*(({"a": torch.tensor(values)}, weight) for values, weight in silos))["a"]
    total = sum(weight for _, weight in silos)
    for place in range(3):
        exact = sum(Fraction(values[place]) * weight for values, weight in silos) / total
        largest = max(abs(values[place]) for values, _ in silos)
        assert result[place].item() == pytest.approx(float(exact), rel=2**-23, abs=max(largest * 2**-45, 2**-149))


@given(updates)
def test_same_updates_in_the_same_order_give_the_same_bits(silos: list[tuple[list[float], int]]) -> None:
    once, again = (mean_of(*(({"a": torch.tensor(values)}, weight) for values, weight in silos))["a"] for _ in range(2))
    assert torch.equal(once.view(torch.int32), again.view(torch.int32))


def test_updates_are_not_changed_by_adding_them() -> None:
    first, second = torch.ones(2), torch.ones(2)
    mean_of(({"a": first}, 2), ({"a": second}, 5))
    assert first.tolist() == second.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("weight", [0, -3])
def test_weight_that_is_no_number_of_samples_is_refused(weight: int) -> None:
    with pytest.raises(ValueError, match="positive number of samples"):
        WeightedMean().add({"a": torch.ones(1)}, weight)


def test_update_with_other_tensors_is_refused() -> None:
    mean = WeightedMean()
    mean.add({"a": torch.ones(1)}, 1)
    with pytest.raises(ValueError, match="same tensors"):
        mean.add({"b": torch.ones(1)}, 1)


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no update"):
        WeightedMean().result()
