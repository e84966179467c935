"""The build: what is installed, what is loaded, and that a failed build says so in one line."""

import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
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
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git checkout")
needs_setuptools = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="no setuptools")
needs_library = pytest.mark.skipif(not kernels.build_info()["compiled"], reason="fedpft._C is not built")


def run(command: list[str], where: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    merged = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=where, env=merged, capture_output=True, text=True, check=False)


def build(directory: Path, what: str, **environment: str) -> Path:
    """Builds an sdist or a wheel of this checkout; what CMake has compiled for this environment is used again."""
    aside = [option for step in ("egg_info -e", "build -b") for option in (*step.split(), str(directory))]
    done = run([sys.executable, "setup.py", "-q", *aside, what, "-d", str(directory)], **environment)
    assert done.returncode == 0, done.stderr
    (built,) = [path for path in directory.iterdir() if path.suffix in (".gz", ".whl")]
    return built


def tracked() -> set[str]:
    """What git has or, not being told to ignore it, would take: a new file counts before it is added."""
    done = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"])
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


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


@needs_source
def test_no_native_source_writes_to_a_stream() -> None:
    # Where the compiler links libstdc++ into the library, a stream crashes on locale facets of another libstdc++.
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    found = {
        path.name: re.findall(r"STD_TORCH_CHECK|<\w*(?:stream|iomanip|locale)>", path.read_text()) for path in sources
    }
    assert len(found) > 30
    assert {name: uses for name, uses in found.items() if uses} == {}


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


@pytest.fixture
def bare_machine(tmp_path: Path) -> Callable[[str], "subprocess.CompletedProcess[str]"]:
    """Runs setup.py on a machine that has what a build needs, as links in a directory, but for one thing."""

    def attempt(without: str) -> "subprocess.CompletedProcess[str]":
        programs, packages = tmp_path / "bin", tmp_path / "packages"
        programs.mkdir()
        packages.mkdir()
        (programs / "python").symlink_to(os.path.realpath(sys.executable))
        for name in {"cmake", "ninja", "c++"} - {without}:
            (programs / name).symlink_to("/bin/true")
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith(without):
                (packages / entry.name).symlink_to(entry)
        hide_headers = (
            "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'\n" if without == "headers" else ""
        )
        script = (
            f"{hide_headers}import runpy, sys; sys.argv = ['setup.py', '-q', 'build_ext']; runpy.run_path('setup.py')"
        )
        command = [str(programs / "python"), "-S", "-c", script]
        return run(command, PATH=str(programs), PYTHONPATH=str(packages), CXX="", FEDPFT_CUDA="0")

    return attempt


@needs_source
@needs_setuptools
@pytest.mark.parametrize(
    ("without", "message"),
    [
        (
            "c++",
            r"a C\+\+17 compiler \(c\+\+ or g\+\+ or clang\+\+\) was not found -> install it, or set FEDPFT_KERNELS=0",
        ),
        ("cmake", r"cmake was not found -> install it, or"),
        ("ninja", r"ninja was not found -> install it, or"),
        ("headers", r"/nowhere/Python.h was not found -> install this Python's headers, such as Debian's"),
        ("pybind11", r"pybind11 was not found -> install it, since pip install --no-build-isolation"),
        ("torch", r"torch was not found -> install it, since pip install --no-build-isolation"),
    ],
)
def test_what_a_build_needs_and_does_not_find_is_one_line_with_a_remedy(
    bare_machine: Callable[[str], "subprocess.CompletedProcess[str]"], without: str, message: str
) -> None:
    done = bare_machine(without)
    assert done.returncode == 1
    assert re.fullmatch(f"fedpft: {message}.*\n", done.stderr), done.stderr


@needs_source
@needs_setuptools
def test_without_kernels_no_compiler_is_needed(tmp_path: Path) -> None:
    wheel = build(tmp_path, "bdist_wheel", PATH=str(tmp_path), FEDPFT_KERNELS="0")
    assert wheel.name == f"fedpft-{fedpft.__version__}-py3-none-any.whl"


@needs_git
@needs_setuptools
def test_the_sdist_is_the_repository(tmp_path: Path) -> None:
    with tarfile.open(build(tmp_path, "sdist")) as archive:
        packed = {"/".join(member.name.split("/")[1:]) for member in archive if member.isfile()}
    only_for_git = {name for name in tracked() if name.startswith((".ci/", ".pre-commit")) or ".gitignore" in name}
    added = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert packed - added == tracked() - only_for_git


@needs_git
@needs_setuptools
@needs_library
def test_a_wheel_holds_the_package_alone_and_passes_the_doctor(tmp_path: Path) -> None:
    wheel = build(tmp_path, "bdist_wheel")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"fedpft-{fedpft.__version__}-{tag}-{tag}-linux_")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    library = f"fedpft/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert packed == {library} | {name for name in tracked() if name.startswith("fedpft/")}

    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    assert run([*pip, str(wheel)]).returncode == 0
    done = run([str(installed / "bin" / "fedpft"), "doctor"], where=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "compiled=True" in done.stdout


@pytest.mark.hours
@needs_source
@needs_setuptools
def test_the_sdist_alone_builds_a_wheel(tmp_path: Path) -> None:
    sdist = build(tmp_path, "sdist")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    done = run([*pip, "-w", str(tmp_path), str(sdist)], where=tmp_path, FEDPFT_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert zipfile.ZipFile(wheel).testzip() is None
    assert any(name.startswith("fedpft/_C") for name in zipfile.ZipFile(wheel).namelist())


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
