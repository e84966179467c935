"""An update with fewer bits: how far off it may be, and that nothing of it is lost."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpft.config import TrainingSection
from fedpft.errors import InvalidUpdate
from fedpft.wire.encoding import BLOCK, ENCODINGS, Encoding, decode, encode, layout
from fedpft.wire.tensors import Spec, TensorFile, write_tensors

LOSSY = ENCODINGS[1:]


def arrived(groups: dict, start: dict[str, Tensor], encoding: Encoding) -> dict[str, Tensor]:
    return {
        name: decode(
            Spec.of(tensor),
            encoding,
            start=lambda tensor=tensor: tensor,
            stored=lambda group, name=name: groups[group][name],
        )
        for name, tensor in start.items()
    }


def adapter(seed: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 33), "b": (256,), "c": (), "d": (1, 257), "empty": (0, 3)}
    tensors = {name: (size * torch.randn(shape, generator=random)).to(dtype) for name, shape in shapes.items()}
    return tensors | {"steps": torch.tensor([seed])}


def test_the_encodings_are_those_of_the_configuration() -> None:
    assert get_args(TrainingSection.model_fields["update_encoding"].annotation) == ENCODINGS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_is_exact(dtype: torch.dtype) -> None:
    start, trained = adapter(0, dtype), adapter(1, dtype)
    groups, residual = encode(trained, start, "exact", {})
    assert residual == {}
    for name, tensor in arrived(groups, start, "exact").items():
        assert tensor.dtype == trained[name].dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), trained[name].flatten().view(torch.uint8))


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_encoded_update_is_within_its_bound(encoding: Encoding, dtype: torch.dtype) -> None:
    start = adapter(0, dtype)
    trained = {name: (tensor + 1e-2 * adapter(1, dtype)[name]).to(tensor.dtype) for name, tensor in start.items()}
    groups, residual = encode(trained, start, encoding, {})
    for name, tensor in arrived(groups, start, encoding).items():
        assert (tensor.shape, tensor.dtype) == (start[name].shape, start[name].dtype)
        if not tensor.is_floating_point() or not tensor.numel():
            assert torch.equal(tensor, trained[name])
            assert name not in residual
            continue
        change = (trained[name].double() - start[name].double()).abs()
        rounding = {"bfloat16": change * 2**-8, "int8": change.max() / 127 / 2}[encoding]
        final = trained[name].double().abs() * torch.finfo(dtype).eps
        error = trained[name].double() - tensor.double()
        assert bool((error.abs() <= 1.01 * (rounding + final)).all())
        assert residual[name].dtype == torch.float32
        torch.testing.assert_close(residual[name].double(), error, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("encoding", LOSSY)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 1e-2, 10.0]), values=st.integers(1, 3 * BLOCK))
def test_error_feedback_brings_every_change_to_the_server(
    encoding: Encoding, seed: int, scale: float, values: int
) -> None:
    """After any number of rounds the server lacks the last residual, and nothing more."""
    random = torch.Generator().manual_seed(seed)
    server = {"a": torch.randn(values, generator=random).double()}
    silo, residual, largest = {"a": server["a"].clone()}, {}, 0.0
    for _ in range(12):
        change = scale * torch.randn(values, generator=random).double()
        silo["a"] += change
        groups, residual = encode({"a": server["a"] + change}, server, encoding, residual)
        server = arrived(groups, server, encoding)
        largest = max(largest, float(change.abs().max()))
        torch.testing.assert_close(server["a"] + residual["a"], silo["a"], rtol=0, atol=1e-6 * largest)
    assert float(residual["a"].abs().max()) <= largest / 100


def test_without_the_residual_small_changes_would_be_lost() -> None:
    """A block's largest value hides the small ones from int8; they arrive in later rounds."""
    server, residual = {"a": torch.zeros(2)}, {}
    for _ in range(100):
        trained = {"a": server["a"] + torch.tensor([1.0, 1e-3])}
        groups, residual = encode(trained, server, "int8", residual)
        server = arrived(groups, server, "int8")
    assert server["a"][1].item() == pytest.approx(0.1, abs=1 / 127)
    alone, _ = encode({"a": torch.tensor([1.0, 1e-3])}, {"a": torch.zeros(2)}, "int8", {})
    assert alone["delta"]["a"][1] == 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_same_training_gives_the_same_bytes(encoding: Encoding, tmp_path: Path) -> None:
    start, trained = adapter(0), adapter(1)
    _, residual = encode(trained, start, encoding, {})
    for path in (tmp_path / "once", tmp_path / "again"):
        write_tensors(path, encode(trained, start, encoding, residual)[0])
    assert (tmp_path / "once").read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_change_is_no_change(encoding: Encoding) -> None:
    start = adapter(0)
    groups, residual = encode(start, start, encoding, {})
    for name, tensor in arrived(groups, start, encoding).items():
        assert torch.equal(tensor, start[name])
    assert not any(tensor.any() for tensor in residual.values())


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_leave_the_silo(encoding: Encoding, value: float) -> None:
    trained = adapter(1)
    trained["d"][0, 256] = value
    with pytest.raises(InvalidUpdate, match=r"'d' holds NaN") as caught:
        encode(trained, adapter(0), encoding, {})
    assert "learning rate" in caught.value.remedy


def test_a_change_that_the_encoding_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidUpdate, match="too large for bfloat16"):
        encode({"a": torch.full((3,), 3.4e38)}, {"a": torch.zeros(3)}, "bfloat16", {})


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_holds_what_the_layout_says(encoding: Encoding, tmp_path: Path) -> None:
    start, trained = adapter(0), adapter(1)
    groups, _ = encode(trained, start, encoding, {})
    write_tensors(tmp_path / "x", groups)
    specs = {
        f"{group}/{name}": spec
        for name, tensor in start.items()
        for group, spec in layout(Spec.of(tensor), encoding).items()
    }
    file = TensorFile(tmp_path / "x")
    assert file.specs == specs
    for name, tensor in arrived(groups, start, encoding).items():
        read = decode(
            Spec.of(start[name]),
            encoding,
            start=lambda name=name: start[name],
            stored=lambda group, name=name: file.tensor(group, name),
        )
        assert torch.equal(read, tensor)


def test_int8_is_a_quarter_of_the_bytes() -> None:
    like = Spec(torch.float32, (1024, 768))
    assert sum(spec.nbytes for spec in layout(like, "int8").values()) == like.nbytes / 4 * (1 + 4 / BLOCK)
