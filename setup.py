"""Builds fedpft._C with CMake and Ninja; everything else about the package stands in pyproject.toml.

Environment:
    FEDPFT_KERNELS=0  install without compiled kernels: every operator runs its pure-torch reference.
    FEDPFT_CUDA, TORCH_CUDA_ARCH_LIST, CUTLASS_DIR
                      what CUDA kernels are built, and for which GPUs; see docs/kernels.md.
    CXX, CUDACXX, ... compilers and their options, as CMake reads them.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
WITHOUT = "set FEDPFT_KERNELS=0 to do without compiled kernels"
COMPILERS = ("c++", "g++", "clang++")  # as CMake looks for them
# CMake reads these only when it first sees a build directory.
READ_ONCE = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH")


class CMakeBuild(build_ext):
    """Runs CMake in one build directory for each set of options.

    The directory is kept, so a second build compiles only what changed; another set of options never meets what
    CMake remembers of this one.
    """

    def build_extension(self, ext: Extension) -> None:
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "pybind11_DIR": pybind11_directory(),
            "TORCH_DIR": torch_directory(),
            "FEDPFT_VERSION": self.distribution.get_version(),
            "FEDPFT_CUDA": os.environ.get("FEDPFT_CUDA", "auto"),
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            "CUTLASS_DIR": os.environ.get("CUTLASS_DIR", ""),
        }
        cmake = find_tool("cmake")
        find_tool(*(os.environ.get("CXX", "").split()[:1] or COMPILERS), what="a C++17 compiler")
        find_python_headers()

        options = [f"-D{name}={value}" for name, value in settings.items()]
        surroundings = [cmake, sys.prefix, shutil.which("nvcc"), *(os.environ.get(name) for name in READ_ONCE)]
        digest = hashlib.sha256(repr([options, surroundings]).encode()).hexdigest()[:8]
        build = SOURCE / "build" / f"cmake-{sys.implementation.cache_tag}-{digest}"
        # Of one environment, so not among the options that count: pip and make call its Python by different names.
        options.append(f"-DPython_EXECUTABLE={sys.executable}")
        run([cmake, "-G", "Ninja", "-S", str(SOURCE), "-B", str(build), *options])
        run([cmake, "--build", str(build)])

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not copy2: with an old time of its own, setuptools would not put it over a newer library of other options.
        shutil.copyfile(build / target.name, target)


def find_tool(*names: str, what: str = "") -> str:
    """Path of the first of these programs, looked for beside this Python first; ends the build if there is none."""
    for name in names:
        if found := shutil.which(name, path=TOOLS):
            return found
    wanted = f"{what} ({' or '.join(names)})" if what else names[0]
    raise SystemExit(f"fedpft: {wanted} was not found -> install it, or {WITHOUT}")


def find_python_headers() -> None:
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise SystemExit(
            f"fedpft: {header} was not found"
            f" -> install this Python's headers, such as Debian's package python3-dev, or {WITHOUT}"
        )


def package_directory(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"fedpft: {name} was not found"
            f" -> install it, since pip install --no-build-isolation builds with what is there, or {WITHOUT}"
        )
    return Path(spec.origin).parent


def pybind11_directory() -> str:
    package_directory("pybind11")
    import pybind11

    return pybind11.get_cmake_dir()


def torch_directory() -> Path:
    directory = package_directory("torch")
    version = importlib.metadata.version("torch")
    if [int(part) for part in version.split(".")[:2]] < [2, 11]:
        raise SystemExit(f"fedpft: torch {version} is too old -> install torch 2.11 or newer")
    return directory


def run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"fedpft: {' '.join(command[:2])} failed (exit {error.returncode}) -> see its output above"
        ) from None


def extensions() -> list[Extension]:
    return [] if os.environ.get("FEDPFT_KERNELS") == "0" else [Extension("fedpft._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
