"""An update at the server: all of it is looked at before it counts, and the mean is taken tensor by tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpft.aggregation import weighted_mean
from fedpft.errors import InvalidUpdate, ModelError, TransferCorrupt
from fedpft.server.updates import Update, aggregate, check_update, compressed_neurons, largest_update_bytes
from fedpft.wire.encoding import ENCODINGS, Encoding, encode
from fedpft.wire.tensors import Group, TensorFile, read_tensors, write_tensors

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
    means = [aggregate(order) for order in (updates, updates[::-1])]
    for name in adapter(0):
        plain = weighted_mean([(update.adapter[name], update.samples) for update in updates])
        for mean in means:
            assert mean[name].dtype == plain.dtype
            assert torch.equal(mean[name].flatten().view(torch.uint8), plain.flatten().view(torch.uint8))


def test_the_mean_of_one_exact_update_is_that_update(make: Maker) -> None:
    mean = aggregate([make(1, samples=7)])
    assert list(mean) == sorted(mean, key=list(mean).index)
    for name, tensor in adapter(1).items():
        assert torch.equal(mean[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_a_mean_holds_one_tensor_of_one_silo_at_a_time(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [make(seed, silo=f"silo{seed}") for seed in (1, 2, 3)]
    read: list[str] = []
    plain = TensorFile.tensor

    def recording(file: TensorFile, group: Group, name: str) -> Tensor:
        if file in [update.file for update in updates]:
            read.append(name)
        return plain(file, group, name)

    monkeypatch.setattr(TensorFile, "tensor", recording)
    aggregate(updates)
    assert read == [name for name in updates[0].specs for _ in updates]


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
