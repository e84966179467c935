"""The build: what is installed, what is loaded, and that a failed build says so in one line."""

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fedpft
from fedpft import kernels
from fedpft.kernels import library

ROOT = Path(__file__).resolve().parents[1]
CUDA_HOMES = (os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda")
NVCC = os.environ.get("CUDACXX") or shutil.which(
    "nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in CUDA_HOMES), os.environ.get("PATH", "")])
)
needs_source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")
needs_library = pytest.mark.skipif(not kernels.build_info()["compiled"], reason="fedpft._C is not built")


def run(command: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    merged = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=merged, capture_output=True, text=True, check=False)


def test_installed_version_is_that_of_the_package() -> None:
    assert importlib.metadata.version("fedpft") == fedpft.__version__


def test_the_fedpft_command_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="fedpft")
    assert [script.value for script in scripts] == ["fedpft.cli:main"]


@needs_library
def test_build_info_says_what_was_built() -> None:
    info = kernels.build_info()
    assert info["version"] == fedpft.__version__
    assert info["cuda"] == (NVCC is not None and os.environ.get("FEDPFT_CUDA") != "0")
    assert bool(info["nvcc"]) == bool(info["cuda_architectures"]) == info["cuda"]
    assert info["capabilities"][0] == "baseline"
    assert info["compiler"]
    assert info["torch_target"] == "2.11"


def test_without_the_library_there_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        library.load()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not built" in caplog.text


def test_without_the_library_every_operator_runs_its_reference() -> None:
    hide = "import importlib.util; find = importlib.util.find_spec\n"
    hide += "importlib.util.find_spec = lambda name, *a: None if name == 'fedpft._C' else find(name, *a)\n"
    check = "from fedpft.kernels import build_info, check_operators\n"
    check += "assert build_info()['capability'] == 'reference'\n"
    check += "assert all(r.passed and r.kernel == 'reference' for r in check_operators())\n"
    done = run([sys.executable, "-c", hide + check])
    assert done.returncode == 0, done.stderr


def test_a_library_for_other_signatures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = SimpleNamespace(build_info=lambda: {"schemas": "0" * 64})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: stale)
    with pytest.raises(ImportError, match="build it again"):
        library.load()


@needs_library
def test_a_library_that_does_not_load_is_an_error() -> None:
    done = run([sys.executable, "-c", "import fedpft.kernels"], FEDPFT_CPU_CAPABILITY="abacus")
    assert done.returncode != 0
    assert "ImportError: FEDPFT_CPU_CAPABILITY=abacus: must be one of baseline" in done.stderr


@needs_source
def test_a_missing_compiler_is_one_line_with_a_remedy() -> None:
    pytest.importorskip("setuptools", minversion="77")
    done = run([sys.executable, "setup.py", "-q", "build_ext"], CXX="no-such-compiler")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "fedpft: a C++17 compiler (no-such-compiler) was not found"
        " -> install it, or set FEDPFT_KERNELS=0 to do without compiled kernels"
    )


@needs_source
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="no CMake with Ninja")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FEDPFT_CUDA": "yes"}, "FEDPFT_CUDA=yes: must be 0, 1 or auto"),
        ({"FEDPFT_CUDA": "1", "NVCC": ""}, "FEDPFT_CUDA=1, but nvcc was not found: install the CUDA toolkit"),
        (
            {"FEDPFT_CUDA": "1", "NVCC": "nvcc", "CUTLASS_DIR": "nowhere"},
            "FEDPFT_CUDA=1, but CUTLASS was not found: pip",
        ),
        ({"NVCC": "nvcc", "TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}, "TORCH_CUDA_ARCH_LIST: Hopper must look like 8.0"),
    ],
)
def test_cuda_cannot_be_asked_for_in_vain(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    pybind11 = pytest.importorskip("pybind11")
    found = {
        "TORCH_DIR": torch.__path__[0],
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
    }
    options = [f"-D{name}={value}" for name, value in {**found, **settings}.items()]
    environment = {name: value for name, value in os.environ.items() if name != "CUDACXX"}
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
