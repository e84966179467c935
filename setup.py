"""Builds fedpft._C with CMake and Ninja; everything else about the package stands in pyproject.toml.

Environment:
    FEDPFT_KERNELS=0  install without compiled kernels: every operator runs its pure-torch reference.
    FEDPFT_CUDA, TORCH_CUDA_ARCH_LIST, CUTLASS_DIR  what CUDA kernels are built, and for which GPUs; see CMakeLists.txt.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake in a build directory that is kept, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        find_tool(os.environ.get("CXX", "c++").split()[0], "a C++17 compiler")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = SOURCE / "build" / f"cmake-{sys.implementation.cache_tag}"
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_DIR": torch_directory(),
            # Always given, or CMake would go by what the build before this one was told.
            "FEDPFT_CUDA": os.environ.get("FEDPFT_CUDA", "auto"),
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            "CUTLASS_DIR": os.environ.get("CUTLASS_DIR", ""),
            "FEDPFT_VERSION": self.distribution.get_version(),
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        run([cmake, "-G", "Ninja", "-S", str(SOURCE), "-B", str(build), *options])
        run([cmake, "--build", str(build)])


def find_tool(name: str, what: str | None = None) -> str:
    """Path of a program, looked for beside this Python first; ends the build with one line if there is none."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=search)
    if found is None:
        raise SystemExit(
            f"fedpft: {what or name} ({name}) was not found"
            " -> install it, or set FEDPFT_KERNELS=0 to do without compiled kernels"
        )
    return found


def torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("fedpft: torch was not found -> install torch first and use pip install --no-build-isolation")
    return Path(spec.origin).parent


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
