"""The CUDA half of the extension, built by a plain C++ compiler and run on CPU tensors; see tests/cuda_emulator/.

Everything in csrc/cuda/ but REPLACED and the files that include CUTLASS is built: kernels, launchers, and the host code
that checks arguments and allocates. Memory is guarded: an access before or behind a tensor is an error.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils._pytree import tree_map

from fedpft.kernels.check import changed_arguments
from fedpft.kernels.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
REPLACED = ("stream.cpp", "ffn_gemm.cpp")  # by files in tests/cuda_emulator/
LIBRARY = "emulated.so"
PLACEMENTS = {"aligned": 1, "at the end": 2}  # of a tensor in its pages


class Emulator:
    """`call(operator, arguments)` runs an operator's CUDA kernel."""

    def __init__(self, directory: Path) -> None:
        """Builds the library in `directory`, unless another worker has."""
        sources = sorted(path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp"))
        sources = [path for path in sources if path.name not in REPLACED and "<cutlass/" not in path.read_text()]
        with FileLock(directory / "lock"):
            if not (path := directory / LIBRARY).exists():
                compile_library(sources + sorted((ROOT / "tests/cuda_emulator").glob("*.cpp")), directory)
        for name, schema in SCHEMAS.items():
            torch.library.define(f"fedpft_emulated::{name}", " ".join(schema.split()))
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))

    def call(
        self, operator: str, arguments: tuple[Any, ...], *, placement: str = "aligned", backwards: bool = False
    ) -> Any:
        """What the kernel returns for copies of the arguments, and these copies.

        Args:
            placement: one of PLACEMENTS; "at the end" a tensor is aligned to no more than the size of its type.
            backwards: threads and blocks run in the opposite order.
        """
        kernel = getattr(torch.ops.fedpft_emulated, operator).default
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        self.guard(placement)
        self._library.emulator_reverse(backwards)
        try:
            copies = tree_map(lambda value: _copy(value) if isinstance(value, Tensor) else value, arguments)
            return kernel.redispatch(key, *copies), copies
        finally:
            self.guard(None)

    def guard(self, placement: str | None) -> None:
        """From now on tensors on the CPU lie between pages that are not there; None: as usual."""
        self._library.emulator_guard(PLACEMENTS[placement] if placement else 0)

    def operator(self, name: str, **options: Any) -> Callable[..., Any]:
        """As a function of the operator's arguments; one that works in place changes what it was given."""

        def run(*arguments: Any) -> Any:
            result, copies = self.call(name, arguments, **options)
            if result is None:
                for index in changed_arguments(name):
                    arguments[index].copy_(copies[index])
            return result

        return run


def _copy(tensor: Tensor) -> Tensor:
    """With the same strides, and no memory but what they reach."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((reach if tensor.numel() else 0,), (1,))
    return torch.empty(memory.shape, dtype=tensor.dtype).copy_(memory).as_strided(tensor.shape, tensor.stride())


def compile_library(sources: list[Path], directory: Path) -> Path:
    """A shared library of CUDA sources, and of C++ sources that go with them."""
    torch_directory = Path(torch.__path__[0])
    common = [str(COMPILER), "-O1", "-g", "-fPIC", "-fvisibility=hidden"]
    common += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-isystem", str(torch_directory / "include")]
    emulated = ["-std=c++17", f"-I{ROOT / 'tests/cuda_emulator'}", f"-I{ROOT / 'csrc/cuda'}"]
    emulated += ["-DFEDPFT_LIBRARY=fedpft_emulated", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    emulated += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]

    def compile_source(source: Path) -> str:
        options = ["-std=c++20"] if source.name == "guarded_allocator.cpp" else emulated
        target = str(directory / f"{source.name}.o")
        _run([*common, *options, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, sources))
    linked = directory / f"{LIBRARY}.part"
    _run([*common, "-shared", *objects, "-o", str(linked), f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-lc10"])
    return linked.rename(directory / LIBRARY)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
