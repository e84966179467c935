"""What several test files share: a tiny FM of each architecture, written once, a fresh copy for every test."""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import forks
import pytest
import tiny
import torch
from torch import nn

from fedpft.demo import run
from fedpft.model.loading import load_model

if TYPE_CHECKING:
    from emulation import Emulator

# The workers, and the processes that tests start, share the machine's cores. With several threads for each of them,
# which wait for each other, the tests take some times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ModelFactory = Callable[[str], nn.Module]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked `cuda` needs a device, wherever it stands."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order_of_tests() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _processes_are_forked() -> Iterator[None]:
    """Those of federations that a test runs itself. Those of a `fedpft demo` are started as a user's are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "_process", forks.process)
        yield


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """What ranks compute with, so that one process comes to the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fm_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model type -> directory of a tiny FM."""
    written: dict[str, Path] = {}

    def directory(model_type: str) -> Path:
        if model_type not in written:
            written[model_type] = tiny.write_model(model_type, tmp_path_factory.mktemp(f"the-owners-{model_type}"))
        return written[model_type]

    return directory


@pytest.fixture(scope="session")
def _loaded(fm_directory: Callable[[str], Path]) -> ModelFactory:
    loaded: dict[str, nn.Module] = {}

    def load(model_type: str) -> nn.Module:
        if model_type not in loaded:
            loaded[model_type] = load_model(fm_directory(model_type), tiny.task_of(model_type), tiny.LABELS, seed=0)
        return loaded[model_type]

    return load


@pytest.fixture
def make_fm(_loaded: ModelFactory) -> ModelFactory:
    """model type -> a tiny FM of the test's own."""
    return lambda model_type: copy.deepcopy(_loaded(model_type))


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> "Emulator":
    """The CUDA kernels, run by this machine's CPU."""
    import emulation

    if emulation.COMPILER is None:
        pytest.skip("no C++ compiler")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return emulation.Emulator(tmp_path_factory.mktemp("cuda_emulator"))
    shared = tmp_path_factory.getbasetemp().parent / "cuda_emulator"
    shared.mkdir(exist_ok=True)
    return emulation.Emulator(shared)
