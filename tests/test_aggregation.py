"""Means and server optimizers against their formulas written out by hand, and what hostile silos can do."""

import functools
import operator
from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpft.aggregation import robust
from fedpft.aggregation.mean import normalized_mean, weighted_mean
from fedpft.aggregation.robust import krum, median, squared_distances, trimmed_mean
from fedpft.aggregation.server_optimizer import beginning, step
from fedpft.config import AggregationSection


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


# --- unlike numbers of steps ------------------------------------------------------------------------------------------


def nova(start: np.ndarray, terms: list[tuple[np.ndarray, int]], batch: int) -> np.ndarray:
    """FedNova as its paper writes it: normalized gradients d_i, then one step of the effective number of them."""
    n = np.array([samples for _, samples in terms])
    p, t = n / n.sum(), np.ceil(n / batch)
    d = [(start - trained) / steps for (trained, _), steps in zip(terms, t, strict=True)]
    return start - (p * t).sum() * sum(share * each for share, each in zip(p, d, strict=True))


@given(silos, st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), st.integers(1, 300))
def test_unlike_steps_are_normalized_as_in_the_paper(
    silos: list[tuple[list[float], int]], begun: list[float], batch: int
) -> None:
    terms = [(torch.tensor(values), samples) for values, samples in silos]
    result = normalized_mean(torch.tensor(begun), iter(terms), batch)
    wanted = nova(np.array(begun), [(np.array(values), samples) for values, samples in silos], batch)
    assert result.dtype == torch.float32
    # Weights may add up to far more than 1, of changes that cancel.
    scale = 2e3 * sum(samples for _, samples in silos) / min(samples for _, samples in silos)
    np.testing.assert_allclose(result.double().numpy(), wanted, rtol=2**-23, atol=scale * 2**-45)


def test_a_silo_of_more_steps_does_not_pull_farther() -> None:
    """Two silos that move 1 a step: 30 samples in 3 steps to the right, 10 in one to the left."""
    start, right, left = torch.zeros(1), torch.tensor([3.0]), torch.tensor([-1.0])
    terms = [(right, 30), (left, 10)]
    assert weighted_mean(terms).item() == 0.75 * 3 - 0.25 * 1
    assert normalized_mean(start, terms, 10).item() == (0.75 * 1 - 0.25 * 1) * (0.75 * 3 + 0.25 * 1)


def test_beside_a_large_silo_the_changes_add_up() -> None:
    """Four small silos of one step, one of 1,000 steps, which all move by 1: the docstring's warning."""
    terms = [(torch.ones(1), 10)] * 4 + [(torch.ones(1), 10_000)]
    assert 4.9 < normalized_mean(torch.zeros(1), terms, 10).item() < 5


@given(st.lists(st.integers(33, 64), min_size=1, max_size=5))
def test_silos_of_equal_steps_have_the_weighted_mean(samples: list[int]) -> None:
    start, *trained = torch.randn(len(samples) + 1, 50, generator=torch.Generator().manual_seed(0))
    terms = list(zip(trained, samples, strict=True))
    torch.testing.assert_close(normalized_mean(start, terms, 32), weighted_mean(terms), rtol=1e-6, atol=1e-7)


def test_normalized_means_refuse_what_weighted_ones_do() -> None:
    with pytest.raises(ValueError, match="positive number of samples"):
        normalized_mean(torch.ones(1), [(torch.ones(1), 0)], 1)
    with pytest.raises(ValueError, match="same shape and dtype"):
        normalized_mean(torch.ones(2), [(torch.ones(1), 1)], 1)
    with pytest.raises(ValueError, match="no term"):
        normalized_mean(torch.ones(2), [], 1)


# --- silos that lie ---------------------------------------------------------------------------------------------------

values = st.floats(-1e3, 1e3, width=32)
rows = st.integers(1, 8).flatmap(lambda n: st.lists(st.lists(values, min_size=4, max_size=4), min_size=n, max_size=n))


def tensors(rows: Sequence[Sequence[float]]) -> list[torch.Tensor]:
    return [torch.tensor(row).view(2, 2) for row in rows]


@given(rows, st.data())
def test_a_trimmed_mean_is_the_mean_of_what_lies_between(rows: list[list[float]], data: st.DataObject) -> None:
    trimmed = data.draw(st.integers(0, (len(rows) - 1) // 2))
    result = trimmed_mean(tensors(rows), trimmed)
    between = np.sort(np.array(rows), axis=0)[trimmed : len(rows) - trimmed]
    assert (result.shape, result.dtype) == ((2, 2), torch.float32)
    np.testing.assert_allclose(result.flatten(), between.mean(axis=0), rtol=2**-23, atol=1e-10)
    np.testing.assert_allclose(median(tensors(rows)).flatten(), np.median(rows, axis=0), rtol=2**-23, atol=1e-10)


@given(rows, st.data())
def test_the_order_of_the_silos_does_not_change_a_bit(rows: list[list[float]], data: st.DataObject) -> None:
    rows = [[value + 0.0 for value in row] for row in rows]  # of two zeros, either sign may be the smaller
    other = data.draw(st.permutations(rows))
    for mean in (functools.partial(trimmed_mean, trimmed=0), median):
        assert torch.equal(mean(tensors(rows)).view(torch.int32), mean(tensors(other)).view(torch.int32))


@given(rows, st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4)))
def test_few_liars_cannot_leave_the_range_of_the_others(honest: list[list[float]], lies: list[list[float]]) -> None:
    liars = min(len(lies), len(honest) - 1)
    every = tensors(honest + lies[:liars])
    lowest, highest = np.min(honest, axis=0), np.max(honest, axis=0)
    for result in (trimmed_mean(every, liars), median(every)):
        found = result.flatten().double().numpy()
        assert ((lowest <= found) & (found <= highest)).all()


def test_nothing_trimmed_is_the_plain_mean() -> None:
    every = list(torch.randn(7, 300, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(trimmed_mean(every, 0), weighted_mean((each, 1) for each in every), rtol=2**-22, atol=0)
    assert torch.equal(trimmed_mean(every[:1], 0), every[0])
    assert torch.equal(median(every[:1]), every[0])


@pytest.mark.parametrize("trimmed", [2, 3, -1])
def test_more_cannot_be_trimmed_than_there_is(trimmed: int) -> None:
    with pytest.raises(ValueError, match=f"of 4 tensors, {trimmed} cannot be left out"):
        trimmed_mean(list(torch.ones(4, 1)), trimmed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_what_no_silo_changes_stays_as_it_is(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    terms = [(tensor, 7), (tensor, 3), (tensor, 90)]
    settings = AggregationSection(optimizer="adam")
    moments = beginning({"t": tensor}, settings)
    means = [weighted_mean(terms), trimmed_mean([tensor] * 3, 1), median([tensor] * 4)]
    means += [
        normalized_mean(tensor, terms, 8),
        step({"t": tensor}.__getitem__, {"t": tensor}, moments, settings)[0]["t"],
    ]
    for mean in means:
        assert mean.dtype == dtype
        assert torch.equal(mean, tensor)
    assert squared_distances([tensor] * 3).tolist() == [[0.0] * 3] * 3


def test_wide_tensors_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)))
    whole = trimmed_mean(every, 1), squared_distances(every)
    monkeypatch.setattr(robust, "COLUMNS", 4)
    assert torch.equal(trimmed_mean(every, 1), whole[0])
    torch.testing.assert_close(squared_distances(every), whole[1])


def krum_by_hand(rows: np.ndarray, byzantine: int) -> list[int]:
    scores = []
    for number, row in enumerate(rows):
        others = sorted(float(((row - other) ** 2).sum()) for i, other in enumerate(rows) if i != number)
        scores.append(sum(others[: len(rows) - byzantine - 2]))
    order = sorted(range(len(rows)), key=scores.__getitem__)
    return sorted(order[: len(rows) - byzantine])


@pytest.mark.parametrize(("silos", "byzantine"), [(3, 0), (5, 1), (6, 1), (9, 3), (40, 10)])
def test_krum_keeps_those_that_are_near_to_most(silos: int, byzantine: int) -> None:
    every = torch.randn(silos, 6, 5, generator=torch.Generator().manual_seed(silos))
    wanted = krum_by_hand(every.flatten(1).double().numpy(), byzantine)
    assert krum(squared_distances(list(every)), byzantine) == wanted
    assert len(wanted) == silos - byzantine


def test_distances_of_updates_that_are_nearly_equal_do_not_cancel() -> None:
    """Products of values of 1000 have errors far above a square of 1e-4."""
    every = [torch.full((30,), 1000.0) + number * 2**-13 for number in range(30)]
    wanted = [[30 * ((a - b) * 2**-13) ** 2 for b in range(30)] for a in range(30)]
    torch.testing.assert_close(squared_distances(every), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)


@given(st.integers(0, 3), st.integers(0, 4), st.integers(10**3, 10**18), st.randoms(use_true_random=False))
def test_krum_leaves_out_liars_that_agree_with_each_other(byzantine: int, more: int, lie: int, draw: Random) -> None:
    honest = [torch.tensor([draw.uniform(-1, 1) for _ in range(4)]) for _ in range(byzantine + 3 + more)]
    every = [(each, True) for each in honest] + [(torch.full((4,), float(lie)), False)] * byzantine
    draw.shuffle(every)
    kept = krum(squared_distances([each for each, _ in every]), byzantine)
    assert len(kept) == len(honest)
    assert all(every[number][1] for number in kept)


def test_krum_of_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="4 updates are too few for Krum with 1"):
        krum(torch.zeros(4, 4), 1)


@pytest.mark.parametrize(
    ("fraction", "updates", "trimmed"),
    [(0.0, 9, 0), (0.1, 3, 1), (0.2, 9, 1), (0.2, 10, 2), (0.29, 100, 29), (0.49, 3, 1)],
)
def test_the_trimmed_share_is_rounded_down_but_never_to_nothing(fraction: float, updates: int, trimmed: int) -> None:
    assert AggregationSection(mean="trimmed", trimmed_fraction=fraction).trimmed(updates) == trimmed


@given(st.floats(0.0, 0.5, exclude_max=True), st.integers(3, 1000))
def test_three_updates_or_more_can_always_be_trimmed(fraction: float, updates: int) -> None:
    settings = AggregationSection(mean="trimmed", trimmed_fraction=fraction)
    assert settings.fewest_updates <= 3
    assert updates - 2 * settings.trimmed(updates) >= 1


# --- the server's optimizer -------------------------------------------------------------------------------------------


def by_hand(optimizer: str, start: float, means: Sequence[float], rate: float) -> list[float]:
    """The papers' algorithms on one number; the mean of a round is where the silos came to, relative to its start."""
    x, m, v, found = start, 0.0, 0.25**2, []
    for change in means:
        if optimizer == "momentum":
            m = 0.5 * m + change
            x += rate * m
        elif optimizer == "none":
            x += rate * change
        else:
            m = 0.5 * m + 0.5 * change
            if optimizer == "adam":
                v = 0.75 * v + 0.25 * change**2
            else:
                v = v - 0.25 * change**2 * (1 if v > change**2 else -1 if v < change**2 else 0)
            x += rate * m / (v**0.5 + 0.25)
        found.append(x)
    return found


@pytest.mark.parametrize("optimizer", ["none", "momentum", "adam", "yogi"])
def test_rounds_of_the_optimizer_are_those_of_its_paper(optimizer: Any) -> None:
    settings = AggregationSection(optimizer=optimizer, learning_rate=0.3, beta1=0.5, beta2=0.75, epsilon=0.25)
    adapter = {"x": torch.tensor([1.0], dtype=torch.float64), "y": torch.zeros(2, 2)}
    moments, changes = beginning(adapter, settings), (0.5, -2.0, 0.01, 0.25)
    for number, wanted in enumerate(by_hand(optimizer, 1.0, changes, 0.3)):
        mean = {"x": adapter["x"] + changes[number], "y": adapter["y"]}
        before = {moment: {name: t.clone() for name, t in each.items()} for moment, each in moments.items()}
        adapter, after = step(adapter.__getitem__, mean, moments, settings)
        assert adapter["x"].item() == pytest.approx(wanted, rel=1e-12)
        assert adapter["y"].tolist() == [[0.0, 0.0], [0.0, 0.0]], "what no silo changes stays"
        for moment, each in before.items():
            assert all(torch.equal(moments[moment][name], tensor) for name, tensor in each.items())
        moments = after
        assert all(tensor.dtype == torch.float64 for each in moments.values() for tensor in each.values())


def test_without_an_optimizer_the_mean_is_taken_bit_for_bit() -> None:
    mean = {"x": torch.tensor([1e-30, 3.3, -0.0])}
    start = {"x": torch.tensor([1e30, -7.7, 0.0])}
    adapter, moments = step(start.__getitem__, mean, {}, AggregationSection())
    assert torch.equal(adapter["x"].view(torch.int32), mean["x"].view(torch.int32))
    assert moments == {}


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_the_squares_of_a_hostile_update_do_not_stop_the_optimizer(optimizer: Any) -> None:
    settings = AggregationSection(optimizer=optimizer, learning_rate=1e-3)
    adapter = {"x": torch.zeros(1)}
    moments = beginning(adapter, settings)
    for mean in (3e38, -3e38, 1.0):
        adapter, moments = step(adapter.__getitem__, {"x": torch.tensor([mean])}, moments, settings)
        assert bool(adapter["x"].isfinite().all())
        assert all(bool(each["x"].isfinite().all()) for each in moments.values())


def test_rates_follow_the_optimizer_unless_they_are_given() -> None:
    rates = [AggregationSection(optimizer=each).rate for each in ("none", "momentum", "adam", "yogi")]
    assert rates == [1.0, 1.0, 0.01, 0.01]
    assert AggregationSection(optimizer="adam", learning_rate=1.0).rate == 1.0
