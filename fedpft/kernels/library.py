"""Loads the compiled kernels, `fedpft._C`, over the references, and says what was loaded."""

import hashlib
import importlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

from fedpft import __version__

_log = logging.getLogger(__name__)
_information: dict[str, Any] = {
    "version": __version__,
    "compiled": False,
    "cuda": False,
    "nvcc": "",
    "cuda_architectures": [],
    "cutlass": [],
    "capabilities": [],
    "capability": "reference",
    "compiler": "",
    "torch_target": "",
}


def load() -> None:
    """Imports `fedpft._C`, which registers its kernels; without it every operator runs its reference.

    Raises:
        ImportError: the library is there, but does not load or was built for other operator signatures.
    """
    if importlib.util.find_spec("fedpft._C") is None:
        _log.warning("fedpft._C is not built: the operators run their pure-torch references, which are slower")
        return
    built = importlib.import_module("fedpft._C").build_info()
    schemas = hashlib.sha256(Path(__file__).with_name("schemas.py").read_bytes()).hexdigest()
    if built.pop("schemas") != schemas:
        raise ImportError("fedpft._C was built for other operator signatures: build it again (pip install -e .)")
    _information.update(built, compiled=True)


def build_info() -> dict[str, Any]:
    """What runs the operators on this machine.

    Keys: version, compiled (bool), cuda (bool: CUDA kernels are built), nvcc (its version), cuda_architectures (those
    of the plain CUDA kernels, as CMake spells them), cutlass (those that the GEMMs of CUTLASS are built for),
    capabilities (list of the instruction sets that were compiled, best last), capability (the one in use, or
    "reference"), compiler, torch_target (least torch).
    """
    return dict(_information)
