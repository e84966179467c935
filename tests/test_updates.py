"""An update at the server: all of it is looked at before it counts, and the mean is taken tensor by tensor."""

import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpft.aggregation.mean import normalized_mean, weighted_mean
from fedpft.aggregation.robust import median, trimmed_mean
from fedpft.config import AggregationSection
from fedpft.errors import InvalidUpdate, ModelError, TransferCorrupt
from fedpft.proxy.bundle import compressed_neurons
from fedpft.server.updates import Update, aggregate, check_update, largest_update_bytes
from fedpft.wire.encoding import ENCODINGS, Encoding, encode
from fedpft.wire.tensors import Group, Spec, TensorFile, read_tensors, write_tensors

NEURONS = {1: 3, 4: 2}
COUNTS = {
    "1": torch.tensor([0, 3, 5]),
    "1.tokens": torch.tensor(5),
    "4": torch.tensor([0, 0]),
    "4.tokens": torch.tensor(5),
}


def adapter(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "lora_A": torch.randn(2, 300, generator=random),
        "head": torch.randn(4, generator=random).bfloat16(),
        "bias": torch.randn((), generator=random),
    }


@pytest.fixture
def start(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "start", {"adapter": adapter(0)})
    return tmp_path / "start"


Maker = Callable[..., Update]


@pytest.fixture
def make(start: Path, tmp_path: Path) -> Maker:
    """An update as a silo makes it."""

    def update(
        seed: int = 1,
        encoding: Encoding = "exact",
        counts: dict[str, Tensor] | None = None,
        *,
        silo: str = "north",
        samples: int = 10,
        metrics: dict[str, float] | None = None,
        change: Callable[[dict[Group, dict[str, Tensor]]], Any] = lambda groups: None,
    ) -> Update:
        groups, _ = encode(adapter(seed), adapter(0), encoding, {})
        groups["inactivity"] = dict(counts or {})
        change(groups)
        path = tmp_path / f"{silo}-{seed}"
        write_tensors(path, groups)
        return Update(
            silo, samples, {"train_loss": 1.0} if metrics is None else metrics, path, TensorFile(start), encoding
        )

    return update


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_a_silo_makes_is_accepted(encoding: Encoding, make: Maker, start: Path) -> None:
    update = make(1, encoding, COUNTS, metrics={"train_loss": 0.3, "seconds": 1.0, "tokens": 5.0})
    check_update(update, NEURONS, max_norm=1e3, most_samples=10)
    assert update.path.stat().st_size <= largest_update_bytes(TensorFile(start), NEURONS)
    assert update.specs.keys() == update.adapter.keys() == adapter(1).keys()
    for name, tensor in update.adapter.items():
        assert tensor.dtype == adapter(1)[name].dtype
        torch.testing.assert_close(tensor, adapter(1)[name], rtol=0, atol=0 if encoding == "exact" else 0.05)
    assert update.inactivity is not None
    assert all(torch.equal(update.inactivity[name], COUNTS[name]) for name in COUNTS)


def test_a_silo_may_count_each_neuron_out_of_its_own_tokens(make: Maker) -> None:
    check_update(make(counts=COUNTS | {"1.tokens": torch.tensor([0, 4, 5])}), NEURONS)


def test_a_silo_may_keep_counts_and_metrics_to_itself(make: Maker) -> None:
    update = make(metrics={})
    check_update(update, NEURONS)
    assert update.inactivity is None


def put(group: Group, name: str, tensor: Tensor) -> Callable[[dict[Group, dict[str, Tensor]]], None]:
    def change(groups: dict[Group, dict[str, Tensor]]) -> None:
        groups.setdefault(group, {})[name] = tensor

    return change


def drop(group: Group, name: str) -> Callable[[dict[Group, dict[str, Tensor]]], None]:
    def change(groups: dict[Group, dict[str, Tensor]]) -> None:
        del groups[group][name]

    return change


NAN = torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("encoding", "change", "fault"),
    [
        ("exact", drop("adapter", "bias"), "lacks the tensor 'adapter/bias'"),
        ("exact", put("adapter", "model", torch.ones(1)), "unknown tensor 'adapter/model'"),
        ("exact", put("patch", "head", torch.ones(1)), "unknown tensor 'patch/head'"),
        ("exact", put("delta", "head", torch.ones(4)), "unknown tensor 'delta/head'"),
        ("exact", put("adapter", "bias", torch.ones(1)), r"'adapter/bias' is \(1,\) torch.float32, not \(\) "),
        ("exact", put("adapter", "head", torch.ones(4)), "not .4,. torch.bfloat16"),
        ("exact", put("adapter", "bias", NAN), "'bias' holds NaN"),
        ("exact", put("adapter", "head", torch.full((4,), float("inf")).bfloat16()), "'head' holds NaN or inf"),
        ("bfloat16", put("adapter", "bias", torch.ones(())), "unknown tensor 'adapter/bias'"),
        ("bfloat16", put("delta", "bias", NAN.bfloat16()), "'bias' holds NaN"),
        ("bfloat16", drop("delta", "head"), "lacks the tensor 'delta/head'"),
        ("int8", drop("scale", "lora_A"), "lacks the tensor 'scale/lora_A'"),
        ("int8", put("scale", "lora_A", torch.ones(4)), r"'scale/lora_A' is \(4,\)"),
        ("int8", put("scale", "lora_A", torch.tensor([1.0, -1.0, 0.0])), "scale of 'lora_A' is negative"),
        ("int8", put("scale", "lora_A", torch.tensor([1.0, NAN, 0.0])), "scale of 'lora_A' is negative or no number"),
        ("int8", put("scale", "lora_A", torch.full((3,), float("inf"))), "'lora_A' holds NaN or infinity"),
        ("int8", put("scale", "head", torch.full((1,), 3e38)), "'head' holds NaN or infinity"),
        ("exact", drop("inactivity", "4"), "lacks the tensor 'inactivity/4'"),
        ("exact", drop("inactivity", "4.tokens"), "lacks the tensor 'inactivity/4.tokens'"),
        ("exact", put("inactivity", "2", torch.tensor([1])), "unknown tensor 'inactivity/2'"),
        ("exact", put("inactivity", "1", torch.tensor([1, 2])), r"'inactivity/1' is \(2,\)"),
        ("exact", put("inactivity", "1", torch.ones(3)), "'inactivity/1' is .3,. torch.float32"),
        ("exact", put("inactivity", "1", torch.tensor([0, 6, 1])), "layer 1 counts 0 to 6 of 5 tokens"),
        ("exact", put("inactivity", "1", torch.tensor([-1, 0, 1])), "layer 1 counts -1 to 1 of 5"),
        ("exact", put("inactivity", "1.tokens", torch.tensor([0, 2, 5])), "layer 1 counts 0 to 5 of 5 tokens"),
        ("exact", put("inactivity", "1.tokens", torch.tensor([-1, 3, 5])), "layer 1 counts 0 to 5 of 5 tokens"),
        ("exact", put("inactivity", "1.tokens", torch.tensor([5, 5])), r"'inactivity/1.tokens' is \(2,\)"),
        ("exact", put("inactivity", "4.tokens", torch.tensor(0)), "layer 4 counts 0 to 0 of 0 tokens"),
        ("exact", put("inactivity", "4.tokens", torch.tensor(2**63 - 1)), "layer 4 counts 0 to 0 of 92233"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(encoding: Encoding, change: Any, fault: str, make: Maker) -> None:
    with pytest.raises(InvalidUpdate, match=f"north: .*{fault}"):
        check_update(make(1, encoding, COUNTS, change=change), NEURONS)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"samples": 0}, "trained on 0 samples"),
        ({"samples": 11}, "trained on 11 samples, not on 1 to 10"),
        ({"metrics": {"train_loss": float("nan")}}, "'train_loss' is nan"),
        ({"metrics": {"patients": 3.0}}, "metric 'patients' is unknown"),
        ({"metrics": {"cut_texts": -1.0}}, "metric 'cut_texts' is -1.0, no count"),
        ({"metrics": {"skipped_rows": 0.5}}, "metric 'skipped_rows' is 0.5, no count"),
        ({"metrics": {"label_diversity": 1.5}}, "'label_diversity' is 1.5, not in"),
        ({"metrics": {"skipped_rows": 1e300}}, "metric 'skipped_rows' is 1e\\+300, no count"),
    ],
)
def test_a_wrong_number_is_refused(wrong: dict[str, Any], fault: str, make: Maker) -> None:
    with pytest.raises(InvalidUpdate, match=f"north: .*{fault}"):
        check_update(make(**wrong), NEURONS, most_samples=10)


def test_counts_that_nobody_asked_for_are_refused(make: Maker) -> None:
    with pytest.raises(InvalidUpdate, match="unknown tensor 'inactivity/1'"):
        check_update(make(counts=COUNTS), {})


@pytest.mark.parametrize("enrolled", [None, 2**64])
def test_more_samples_than_any_count_holds_are_refused(enrolled: int | None, make: Maker) -> None:
    """Whatever the silo said when it enrolled: the mean could not hold them."""
    with pytest.raises(InvalidUpdate, match="trained on 18446744073709551615 samples"):
        check_update(make(samples=2**64 - 1), NEURONS, most_samples=enrolled)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_norm_of_the_change_is_bounded(encoding: Encoding, make: Maker) -> None:
    update = make(1, encoding)
    norm = sum(
        float((tensor.double() - adapter(0)[name].double()).square().sum()) for name, tensor in update.adapter.items()
    )
    check_update(update, {}, max_norm=norm**0.5 * 1.001)
    with pytest.raises(InvalidUpdate, match=rf"north: the L2 norm of the change is {norm**0.5:.6g}, more than 0.01"):
        check_update(update, {}, max_norm=0.01)


def test_a_file_of_another_format_is_corrupt(make: Maker) -> None:
    update = make()
    update.path.write_bytes(b"PK\3\4" * 100)
    with pytest.raises(TransferCorrupt, match="not safetensors"):
        check_update(update, NEURONS)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_mean_is_the_same_in_any_order_of_arrival(encoding: Encoding, make: Maker) -> None:
    updates = [make(seed, encoding, silo=f"silo{seed}", samples=seed) for seed in (1, 2, 3)]
    means = [aggregate(order, AggregationSection(), 32) for order in (updates, updates[::-1])]
    for name in adapter(0):
        plain = weighted_mean([(update.adapter[name], update.samples) for update in updates])
        for mean in means:
            assert mean[name].dtype == plain.dtype
            assert torch.equal(mean[name].flatten().view(torch.uint8), plain.flatten().view(torch.uint8))


ROBUST: list[dict[str, Any]] = [{"mean": "trimmed"}, {"mean": "median"}, {"mean": "krum"}]
PLAIN: list[dict[str, Any]] = [{}, {"weights": "equal"}, {"weights": "steps"}]


def bits(mean: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: tensor.flatten().view(torch.uint8).tolist() for name, tensor in mean.items()}


@pytest.mark.parametrize("rule", [*PLAIN, *ROBUST], ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_mean_is_the_same_in_any_order_of_arrival(encoding: Encoding, rule: Any, make: Maker) -> None:
    updates = [make(seed, encoding, silo=f"silo{seed}", samples=7 * seed) for seed in (1, 2, 3, 4, 5)]
    settings = AggregationSection(**rule)
    mean = aggregate(updates, settings, 8)
    assert [Spec.of(tensor) for tensor in mean.values()] == list(updates[0].specs.values())
    for order in (updates[::-1], [updates[number] for number in (3, 0, 4, 1, 2)]):
        assert bits(aggregate(order, settings, 8)) == bits(mean)


def test_the_rules_are_those_that_are_named(make: Maker) -> None:
    updates = [make(seed, silo=f"silo{seed}", samples=7 * seed) for seed in (1, 2, 3, 4, 5)]
    for name, start in adapter(0).items():
        every = [update.tensor(name) for update in updates]
        terms = [(tensor, update.samples) for tensor, update in zip(every, updates, strict=True)]
        for rule, wanted in (
            ({"weights": "equal"}, weighted_mean((tensor, 1) for tensor in every)),
            ({"weights": "steps"}, normalized_mean(start, terms, 8)),
            ({"mean": "trimmed", "trimmed_fraction": 0.0}, trimmed_mean(every, 0)),
            ({"mean": "trimmed", "trimmed_fraction": 0.4}, trimmed_mean(every, 2)),
            ({"mean": "median"}, median(every)),
        ):
            mean = aggregate(updates, AggregationSection.model_validate(rule), 8)
            assert bits({name: mean[name]}) == bits({name: wanted}), (rule, name)


@pytest.mark.parametrize(
    ("told", "weights"),
    [
        ([0.5, 0.25, 0.0], [20, 15, 0]),
        ([0.5, None, 0.0], [20, 15, 0]),  # what is not told is taken for the mean of the others
        ([0.0, 0.0, 0.0], [10, 15, 30]),
        ([None, None, None], [10, 15, 30]),
    ],
)
def test_a_silo_weighs_by_how_far_its_labels_differ(told: list[float | None], weights: list[int], make: Maker) -> None:
    samples = (10, 15, 30)
    updates = [
        make(
            seed, silo=f"silo{seed}", samples=samples[seed], metrics={} if value is None else {"label_diversity": value}
        )
        for seed, value in enumerate(told)
    ]
    mean = aggregate(updates, AggregationSection(weights="diversity"), 8)
    for name, tensor in mean.items():
        terms = [(update.tensor(name), weight) for update, weight in zip(updates, weights, strict=True) if weight]
        torch.testing.assert_close(tensor, weighted_mean(terms), rtol=1e-6, atol=1e-6)


def shout(groups: dict[Group, dict[str, Tensor]]) -> None:
    for tensor in groups["adapter"].values():
        tensor.fill_(1e6)


@pytest.mark.parametrize("rule", [*PLAIN, *ROBUST], ids=str)
def test_one_silo_that_shouts_is_heard_by_the_weighted_means_alone(
    rule: Any, make: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    updates = [make(seed, silo=f"silo{seed}") for seed in (1, 2, 3, 4)]
    updates.append(make(5, silo="a-liar", samples=1_000_000, change=shout))
    mean = aggregate(updates, AggregationSection(**rule), 10)
    largest = max(float(tensor.float().abs().max()) for tensor in mean.values())
    assert (largest > 1e5) if rule in PLAIN else (largest < 5), "what the honest silos have"
    assert ("krum leaves out a-liar" in caplog.text) == (rule == {"mean": "krum"})


def test_krum_judges_an_update_by_all_of_its_tensors(make: Maker) -> None:
    """Each of two silos is the farthest in one tensor alone; what is in the middle in every tensor stays."""

    def bias(value: float) -> Callable[[dict[Group, dict[str, Tensor]]], None]:
        return put("adapter", "bias", torch.tensor(value))

    updates = [make(1, silo=f"silo{number}", change=bias(number / 10)) for number in range(5)]
    updates.append(make(1, silo="odd", change=bias(50.0)))
    mean = aggregate(updates, AggregationSection(mean="krum"), 1)
    assert mean["bias"].item() == pytest.approx(0.2)
    assert torch.equal(mean["lora_A"], adapter(1)["lora_A"])


def test_the_mean_of_one_exact_update_is_that_update(make: Maker) -> None:
    mean = aggregate([make(1, samples=7)], AggregationSection(), 32)
    assert list(mean) == sorted(mean, key=list(mean).index)
    for name, tensor in adapter(1).items():
        assert torch.equal(mean[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


@pytest.mark.parametrize("rule", [*PLAIN, *ROBUST], ids=str)
def test_a_mean_reads_one_tensor_of_each_silo_at_a_time(
    rule: Any, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = [make(seed, silo=f"silo{seed}") for seed in (1, 2, 3, 4, 5)]
    read: list[str] = []
    plain = TensorFile.tensor

    def recording(file: TensorFile, group: Group, name: str) -> Tensor:
        if file in [update.file for update in updates]:
            read.append(name)
        return plain(file, group, name)

    monkeypatch.setattr(TensorFile, "tensor", recording)
    aggregate(updates, AggregationSection(**rule), 32)
    wanted = [name for name in updates[0].specs for _ in updates]
    if rule == {"mean": "krum"}:  # once to compare all of the updates, then those that it keeps
        wanted += [name for name in updates[0].specs for _ in updates[1:]]
    assert read == wanted


@pytest.mark.parametrize("rule", [*PLAIN, *ROBUST], ids=str)
def test_a_mean_keeps_no_more_in_memory_than_one_tensor(
    rule: Any, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The robust ones that of each silo. Each tensor that is read lies in memory of its own, made by torch.empty."""
    updates = [make(seed, silo=f"silo{seed}") for seed in (1, 2, 3, 4, 5)]
    empty, alive, most = torch.empty, list[weakref.ref[np.ndarray]](), 0

    def counting(size: Any, *, dtype: torch.dtype) -> Tensor:
        nonlocal most
        if dtype is not torch.uint8:
            return empty(size, dtype=dtype)
        memory = np.empty(size, dtype=np.uint8)
        alive.append(weakref.ref(memory))
        most = max(most, sum(each() is not None for each in alive))
        return torch.from_numpy(memory)

    monkeypatch.setattr(torch, "empty", counting)
    aggregate(updates, AggregationSection(**rule), 32)
    assert most == {"steps": 3}.get(rule.get("weights"), 2) if rule in PLAIN else most == len(updates)


def test_the_largest_update_has_room_for_every_encoding(tmp_path: Path) -> None:
    like = {f"{'x' * 200}.{number}": torch.zeros(1, dtype=torch.float16) for number in range(3000)}
    write_tensors(tmp_path / "start", {"adapter": like})
    for encoding in ENCODINGS:
        groups, _ = encode(like, like, encoding, {})
        write_tensors(tmp_path / encoding, groups)
        assert (tmp_path / encoding).stat().st_size <= largest_update_bytes(TensorFile(tmp_path / "start"), {})


def test_a_bundle_without_a_readable_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "proxy.json").write_text('{"neurons": [3, 3, 2], "compressed": [1]}')
    assert compressed_neurons(tmp_path) == {1: 3}
    (tmp_path / "proxy.json").write_text('{"neurons": [3], "compressed": [1]}')
    with pytest.raises(ModelError, match=r"proxy\.json"):
        compressed_neurons(tmp_path)


def test_update_files_are_read_back(make: Maker) -> None:
    update = make(1, "int8")
    assert read_tensors(update.path, "delta").keys() == update.specs.keys()
