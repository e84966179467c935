"""Looks at this machine and says what to mend."""

import platform
from importlib import metadata
from pathlib import Path

import torch
import yaml

from fedpft import kernels
from fedpft.config import load_server_config, load_silo_config
from fedpft.errors import FedPFTError
from fedpft.kernels.check import check_operators
from fedpft.server.run import VERSIONED
from fedpft.wire.certificates import check_certificates


def examine(config: Path | None) -> None:
    """Prints versions, the kernels against their references, and the state of a kit if a YAML file is given.

    Raises:
        FedPFTError: something has to be mended before a federation can run on this machine.
    """
    print(f"python {platform.python_version()} on {platform.platform()}, {torch.get_num_threads()} threads")
    print(", ".join(f"{name} {metadata.version(name)}" for name in VERSIONED))
    print("kernels: " + ", ".join(f"{name}={value}" for name, value in kernels.build_info().items()))
    wrong = [result for result in check_operators() if not result.passed]
    for result in wrong:
        print(f"  {result}")
    print("operators agree with their references" if not wrong else f"{len(wrong)} operators are wrong")
    if config is not None:
        _examine_kit(config)
    if wrong:
        raise FedPFTError(
            f"{len(wrong)} operators are wrong on this machine", "build the extension again: make install"
        )


def _examine_kit(path: Path) -> None:
    raw = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    silo = isinstance(raw, dict) and "server" in raw
    tls = (load_silo_config(path) if silo else load_server_config(path)).tls
    if tls is not None:
        name = check_certificates(tls, "silo" if silo else "server")
        print(f"{path}: in order, certificate of {name}")
