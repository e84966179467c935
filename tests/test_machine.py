"""The device and the threads that a YAML file asks for: found wanting before anything else happens."""

import pytest
import torch

from fedpft.errors import ConfigError, OutOfMemory
from fedpft.machine import check_device, prepare


def test_a_device_that_is_there_computes() -> None:
    assert check_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "CPU", "nonsense", "", "meta", "hpu", "cuda:99", "mtia"])
def test_a_device_that_cannot_compute_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^device: {name}: ") as caught:
        prepare(name, None)
    assert "\n" not in caught.value.message
    assert "cpu" in caught.value.remedy


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()])
def test_a_device_without_memory_says_so(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(OutOfMemory, match="device: cuda: out of memory"):
        check_device("cuda")


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        prepare("cpu", before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
