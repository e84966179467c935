"""What every benchmark needs: interleaved times, peak memory, the machine's ceilings and facts, the commit.

times = interleaved({"ours": ours, "theirs": theirs})      # {"ours": Times(...), ...}
peak = peak_bytes(prepare, "ours", 2)                      # prepare("ours", 2) returns what is run in a fresh process
facts = provenance("cpu")                                  # machine, versions, commit, date: for the JSON
"""

import ctypes
import datetime
import gc
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedpft.kernels import build_info

Run = Callable[[], Any]

LEAST, LEAST_LONG, MOST = 5, 3, 50  # repetitions; LEAST_LONG for what takes over LONG_SECONDS a call
LONG_SECONDS = 0.4
SETTINGS = ("MALLOC_", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "FEDPFT_", "TORCH", "CUDA_")  # what can change a figure
WARM_UP_ROUNDS = {"cpu": 1, "cuda": 3}
BEYOND_CACHE = 4  # inputs are rotated through so many times the last-level cache


@dataclass(frozen=True)
class Times:
    """Seconds of one candidate: the median, the quartiles, and how many calls were timed."""

    median_seconds: float
    quartiles_seconds: tuple[float, float]
    repetitions: int

    @staticmethod
    def of(seconds: list[float]) -> "Times":
        """Of the single times; at least two."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return Times(median, (low, high), len(seconds))


def interleaved(
    *sets: Mapping[str, Run],
    device: str = "cpu",
    budget_seconds: float = 1.0,
    least: int | None = None,
    warmed: bool = False,
) -> dict[str, Times]:
    """Times all candidates in turns, so that a drift of the machine's speed hits all of them alike.

    Args:
        sets: the same candidates over different inputs. Each call takes the next set, so that with sets that exceed
            the caches together (see `sets_beyond_cache`) every call finds its inputs in memory. One set: warm.
        device: "cpu", or "cuda": device time between two events, the host being ahead.
        budget_seconds: for each candidate; all share it, and take more if `least` repetitions need more.
        least: repetitions at least; default LEAST, or LEAST_LONG where a call takes over LONG_SECONDS.
        warmed: every candidate has run before, so that the CPU needs no warm-up.
    """
    timer = _CudaTimer() if device == "cuda" else _time_on_cpu
    calls = 0

    def one_round() -> dict[str, float]:
        nonlocal calls
        seconds = {}
        for name in sets[0]:
            seconds[name] = timer(sets[calls % len(sets)][name])
            calls += 1
        return seconds

    for _ in range(0 if warmed and device == "cpu" else WARM_UP_ROUNDS[device]):
        one_round()
    begun = time.perf_counter()
    rounds = [one_round()]
    if least is None:
        least = LEAST_LONG if max(rounds[0].values()) > LONG_SECONDS else LEAST
    budget = budget_seconds * len(sets[0])
    while len(rounds) < least or (len(rounds) < MOST and time.perf_counter() - begun < budget):
        rounds.append(one_round())
    return {name: Times.of([seconds[name] for seconds in rounds]) for name in sets[0]}


def _time_on_cpu(run: Run) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


class _CudaTimer:
    """Device time of a call. The device first sleeps while the host enqueues, so that host time is not counted."""

    SLEEP_CYCLES = 4_000_000  # 2 ms at 2 GHz; the host needs well under 1 ms for one forward and backward

    def __init__(self) -> None:
        self.begun, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Run) -> float:
        torch.cuda._sleep(self.SLEEP_CYCLES)
        self.begun.record()
        run()
        self.ended.record()
        self.ended.synchronize()
        return float(self.begun.elapsed_time(self.ended)) / 1e3


def cache_bytes(device: str) -> int:
    """The largest cache: the last level one core sees, or the device's L2."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    return max(caches().values(), default=32 << 20)


def caches() -> dict[str, int]:
    """Bytes of the first core's data caches, by level."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
    return found


def sets_beyond_cache(set_bytes: int, device: str) -> int:
    """How many sets of inputs, each of so many bytes, are well beyond the caches together."""
    return max(2, -(-BEYOND_CACHE * cache_bytes(device) // max(1, set_bytes)))


class Bandwidth:
    """Calls that read, or copy, `buffer_bytes` beyond the caches as fast as torch can: what a kernel can reach at best.

    They are timed beside the kernel, in turns, because the machine's speed drifts.
    """

    def __init__(self, device: str) -> None:
        self.buffer_bytes = max(64 << 20, 2 * BEYOND_CACHE * cache_bytes(device))
        source = torch.ones(self.buffer_bytes // 4, device=device)
        target = torch.empty_like(source)
        reads: dict[str, Run] = {"sum": source.sum, "max": source.max}
        times = interleaved(reads, device=device, budget_seconds=0.3)
        fastest = min(reads, key=lambda name: times[name].median_seconds)
        self.runs: dict[str, Run] = {"read": reads[fastest], "copy": lambda: target.copy_(source)}
        self.moved_bytes = {"read": self.buffer_bytes, "copy": 2 * self.buffer_bytes}  # a copy reads and writes


def peak_bytes(prepare: Callable[..., Run], *arguments: Any, device: str = "cpu") -> int:
    """Memory at the highest point of one call, above what stands before it: inputs and weights are not in it.

    `prepare(*arguments)` returns the call. On CPU both are picklable, and all runs in a fresh process: one call to warm
    up, then the resident memory's high-water mark is reset and read around a second call. On CUDA: of the allocator.
    """
    if device == "cuda":
        return _cuda_peak(prepare(*arguments))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fedpft.kernels"])  # imported once, not in every child
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as child:
        return child.submit(_cpu_peak, prepare, arguments, torch.get_num_threads()).result()


def _cuda_peak(run: Run) -> int:
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()  # what the call returns counts as its memory, as on CPU
    torch.cuda.synchronize()
    del kept
    return int(torch.cuda.max_memory_allocated() - before)


def _cpu_peak(prepare: Callable[..., Run], arguments: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    run = prepare(*arguments)
    run()
    reset_peak()
    before = _status_bytes("VmRSS")
    kept = run()
    peak = peak_resident_bytes() - before
    del kept
    return peak


def reset_peak() -> None:
    """Lets this process's high-water mark begin at what it really needs now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc kept would be reused unseen
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """The most memory of this process since then."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1]) << 10


def provenance(device: str) -> dict[str, Any]:
    """Where, with what and when something was measured."""
    build = build_info()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **commit(),
        "device": device,
        "machine": machine(device),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "compiler": build["compiler"],
            "fedpft": build,
        },
    }


def commit() -> dict[str, Any]:
    """Of the working tree, and whether it differs; FEDPFT_COMMIT names it where git's directory is not at hand."""
    if given := os.environ.get("FEDPFT_COMMIT"):
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return {"commit": "unknown", "dirty": None}
    if found.returncode:
        return {"commit": "unknown", "dirty": None}
    name = found.stdout.strip()
    return {"commit": name.removesuffix("-dirty"), "dirty": name.endswith("-dirty")}


def machine(device: str) -> dict[str, Any]:
    """The processor, its cores and caches; on CUDA also the device and its driver."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", about, re.MULTILINE)
    facts: dict[str, Any] = {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "caches_bytes": caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_l2_bytes": properties.L2_cache_size,
            "gpu_processors": properties.multi_processor_count,
            "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0],
        }
    return facts
