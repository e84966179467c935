"""What a process takes of its machine, looked at before it needs it: the torch device, the CPU's threads."""

import contextlib
import ctypes
import os
from pathlib import Path

import torch

from fedpft import faults
from fedpft.errors import ConfigError, OutOfMemory

LONGEST_REASON = 150  # characters of what torch says


def prepare(device: str, threads: int | None) -> None:
    """To be called before anything else is done: what the YAML file asks of this machine is there, and is set.

    Args:
        device: torch's name of it.
        threads: of torch on the CPU; None: as many as it takes by itself.

    Raises:
        ConfigError, OutOfMemory: as of :func:`check_device`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    check_device(device)


def check_device(name: str) -> str:
    """Computes something on a torch device; returns its name.

    Raises:
        ConfigError: there is no such device on this machine, or it computes nothing, such as `meta`.
        OutOfMemory: it has no memory left.
    """
    try:
        ones = torch.ones(2, 2, device=name)
        wrong = None if (ones @ ones).sum().item() == 8.0 else "it computes something else than the CPU"
    except Exception as error:  # of torch RuntimeError, AssertionError, NotImplementedError or ModuleNotFoundError
        if faults.is_out_of_memory(error):
            raise OutOfMemory(
                f"device: {name}: out of memory", f"end what else uses it, or set `device` to one of {_devices()}"
            ) from None
        wrong = (str(error).splitlines() or [type(error).__name__])[0][:LONGEST_REASON]
    if wrong is not None:
        raise ConfigError(f"device: {name}: {wrong}", f"set `device` to one of this machine's: {_devices()}")
    return name


def memory_bytes(device: str = "cpu") -> int:
    """What a process may use where it computes: a GPU's memory; the machine's, or what its container has of it."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # of no container, or `max`
            whole = min(whole, int(Path(limit).read_text(encoding="ascii")))
    return whole


def trim_heap() -> None:
    """Gives the system back what was freed between blocks that are still used.

    glibc keeps it, in holes of up to 32 MiB each: gigabytes, where many matrices of that size come and go. Other C
    libraries give it back by themselves.
    """
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _devices() -> str:
    """Those that torch finds here."""
    there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return ", ".join(there + ["mps"] * torch.backends.mps.is_available())
