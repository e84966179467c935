"""`python -m bench.kernels`: every operator against its peers, in turns, each result checked before it is timed.

A row is one call of one operator, forward and backward where it has one; bench/peers.py says what its peers are.
Columns: the kernel's median and quartiles; its share of what this machine can do, measured in turns with it (read or
copy bandwidth, or the FFN's matrix products alone); and each peer's time over the kernel's: above 1 the kernel is
faster. Cold: the inputs rotate through more memory than the caches hold. N tokens, D hidden size, F FFN neurons of the
FM, K neurons of the sub-FFN, U updated neurons, L layers, R LoRA rank.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import measure, peers, render
from bench.measure import Bandwidth, Run, Times
from bench.peers import PRODUCTS, Prepared
from fedpft.kernels.check import kernel_of
from fedpft.kernels.schemas import SCHEMAS
from fedpft.privacy.masking import CHUNK_WORDS

FFN = "forward and gradient of x"
QUICK_BUDGET_SECONDS, BUDGET_SECONDS = 0.02, {"cpu": 0.6, "cuda": 0.1}


@dataclass(frozen=True)
class Comparison:
    """One row of the table: a call of ours and its peers, all of them candidates of one case."""

    ours: str
    peers: tuple[str, ...]
    what: str = ""


@dataclass(frozen=True)
class Case:
    """Candidates that are timed in turns; `build` draws a set of inputs for them."""

    operator: str
    label: str
    dtype: torch.dtype
    build: Callable[[], Prepared]
    rows: tuple[Comparison, ...]
    does: str  # what one call is
    ceiling: str  # "read", "copy" or PRODUCTS
    moved_bytes: int = 0  # the least that a call reads, or reads and writes
    warm: bool = False
    memory: tuple[str, ...] = ()  # whose peak memory is a floor

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator}: {self.label}, {dtype}{', warm' if self.warm else ''}"

    @property
    def candidates(self) -> tuple[str, ...]:
        """All that is timed, once each."""
        named = [name for row in self.rows for name in (row.ours, *row.peers)]
        return tuple(dict.fromkeys([*named, *([PRODUCTS] if self.ceiling == PRODUCTS else [])]))


@dataclass(frozen=True)
class Size:
    """A model's layers, one layer's FFN, and the tokens of one call."""

    L: int
    D: int
    F: int
    K: int
    N: int
    activation: str = "gelu"
    gated: bool = False


BERT_BASE = Size(L=12, D=768, F=3072, K=768, N=32 * 128)
MODELS = {
    "MiniLM": Size(L=6, D=384, F=1536, K=384, N=32 * 64),
    "BERT-base": BERT_BASE,
    "ViT-B": replace(BERT_BASE, N=32 * 197),
    "LLaMA-7B layer": Size(L=1, D=4096, F=11008, K=11008, N=64, activation="silu", gated=True),
}
UPDATES = {  # values of one update
    "LoRA of MiniLM, R 8": 6 * 4 * 2 * 8 * 384,
    "LoRA of BERT-base, R 8": 12 * 4 * 2 * 8 * 768,
    "half of BERT-base's sub-FFNs": 12 * 384 * 2 * 768,
    "LoRA of LLaMA-7B, R 8": 32 * 4 * 2 * 8 * 4096,
}
FFN_TOKENS, FFN_NEURONS = (2048, 4096, 8192, 16384), (768, 1536, 3072)
SET_TOKENS = (512, 2048, 8192)
QUICK_MODELS = {
    "tiny": Size(L=2, D=24, F=64, K=32, N=40),
    "tiny gated": Size(L=1, D=24, F=64, K=32, N=40, activation="silu", gated=True),
}


def all_cases(device: str, quick: bool = False) -> list[Case]:
    """Everything that is measured on a device, grouped by operator."""
    models = dict(QUICK_MODELS if quick else MODELS)
    if device == "cuda" and not quick:
        models["LLaMA-7B layer"] = replace(models["LLaMA-7B layer"], N=4096)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [
        *saliency_cases(models, device, quick),
        *count_cases(models, dtype, device, quick),
        *ffn_cases(models, dtype, device, quick),
        *set_cases(models, dtype, device, quick),
        *train_cases(models, dtype, device, quick),
        *moment_cases(models, dtype, device, quick),
        *alignment_cases(models, dtype, device, quick),
        *update_cases(device, quick),
        *(mask_cases(quick) if device == "cpu" else ()),
    ]


def saliency_cases(models: Mapping[str, Size], device: str, quick: bool) -> Iterator[Case]:
    rows = (Comparison("kernel", ("published", "two norms", "squares", "compile")),)
    sizes = {name: size for name, size in models.items() if name != "ViT-B"}  # as BERT-base
    if not quick:
        sizes["4096 x 11008"] = replace(sizes["LLaMA-7B layer"], gated=False)
    for name, size in sizes.items():
        for dtype in (torch.float32, torch.bfloat16) if size.D == 4096 else (torch.float32,):
            label = f"{name}, {size.L} x ({size.D}, {size.F}){', gated' if size.gated else ''}"
            build = partial(peers.saliency, size.L, size.D, size.F, size.gated, dtype, device, quick)
            moved = size.L * size.D * size.F * (2 + size.gated) * dtype.itemsize
            ceiling = "read" if device == "cpu" else "copy"
            case = Case("neuron_saliency", label, dtype, build, rows, "all layers", ceiling, moved)
            yield case
            if name in ("MiniLM", "tiny"):
                yield replace(case, warm=True)


def count_cases(models: Mapping[str, Size], dtype: torch.dtype, device: str, quick: bool) -> Iterator[Case]:
    rows = (Comparison("kernel", ("published", "eager", "compile")),)
    for name, size in models.items():
        for activation in (size.activation, "relu"):
            masked = activation != "relu"
            label = f"{name}, N {size.N}, K {size.K}, {activation}{', mask' if masked else ''}"
            build = partial(peers.inactivity, size.N, size.K, activation, masked, dtype, device, quick)
            moved = size.N * size.K * dtype.itemsize
            yield Case("inactivity_count", label, dtype, build, rows, "one layer", "read", moved)


def ffn_cases(models: Mapping[str, Size], dtype: torch.dtype, device: str, quick: bool) -> Iterator[Case]:
    rows = (
        Comparison("kernel", ("eager", "compile")),
        Comparison("kernel + count", ("eager", "eager + hook", "compile + count"), "with the count"),
    )
    small = next(iter(models))
    sizes = {name: size for name, size in models.items() if name != "BERT-base"}  # it is one of the grid
    sizes[f"{small}, few tokens"] = replace(models[small], N=512 if not quick else 8)
    grid = [] if quick else [replace(BERT_BASE, N=N, K=K) for K in FFN_NEURONS for N in FFN_TOKENS]
    sizes |= {"BERT-base" if size == BERT_BASE else f"grid {size.N} {size.K}": size for size in grid}
    for name, size in sizes.items():
        label = f"N {size.N}, D {size.D}, K {size.K}, {size.activation}{', gated' if size.gated else ''}"
        label = label if name.startswith("grid") else f"{name}, {label}"
        build = partial(peers.sub_ffn, size.N, size.D, size.K, size.activation, size.gated, dtype, device, quick)
        memory = ("eager + hook", "eager", "kernel + count", "kernel + count, compact") if size in grid else ()
        yield Case("sub_ffn", label, dtype, build, rows, FFN, PRODUCTS, memory=memory)
    size = models[small]
    cublas_lt = ("cublasLt",) if device == "cuda" else ()
    relu = (
        Comparison("kernel", ("eager", "compile", *cublas_lt)),
        Comparison("kernel + count", ("eager + hook", "published hook", "compile + count"), "with the count"),
    )
    label = f"{small}, N {size.N}, D {size.D}, K {size.K}"
    build = partial(peers.sub_ffn, size.N, size.D, size.K, "relu", False, dtype, device, quick)
    yield Case("sub_ffn", f"{label}, relu", dtype, build, relu, FFN, PRODUCTS)
    build = partial(peers.sub_ffn_inference, size.N, size.D, size.K, "gelu_tanh", dtype, device, quick)
    forward = (Comparison("kernel", ("eager", "compile", *cublas_lt)),)
    yield Case("sub_ffn", f"{label}, gelu_tanh", dtype, build, forward, "forward", PRODUCTS)


def set_cases(models: Mapping[str, Size], dtype: torch.dtype, device: str, quick: bool) -> Iterator[Case]:
    rows = (Comparison("kernel", ("packed", "eager, gathered", "compile")),)
    sizes = [replace(BERT_BASE, N=N, K=K) for K in (768, 1536) for N in SET_TOKENS]
    if device == "cuda":
        sizes.append(Size(L=1, D=4096, F=11008, K=2752, N=4096))
    for size in [next(iter(models.values()))] if quick else [*sizes, replace(MODELS["MiniLM"], N=512)]:
        label = f"N {size.N}, D {size.D}, {size.K} of {size.F} neurons, gelu"
        build = partial(peers.neuron_set, size.N, size.D, size.F, size.K, dtype, device, quick)
        does = f"{FFN}, over a set of neurons"
        yield Case("sub_ffn", label, dtype, build, rows, does, PRODUCTS, memory=("packed", "kernel"))


def train_cases(models: Mapping[str, Size], dtype: torch.dtype, device: str, quick: bool) -> Iterator[Case]:
    rows = (Comparison("kernel", ("split", "cat", "compile")),)
    for name, size in models.items():
        if size.gated or name == "ViT-B":
            continue
        for N in (size.N,) if quick else (2048, 8192):
            label = f"{name}, N {N}, D {size.D}, U {size.K // 2} of K {size.K}, gelu"
            build = partial(peers.train, N, size.D, size.K, size.K // 2, dtype, device, quick)
            yield Case("sub_ffn_train", label, dtype, build, rows, "forward and all gradients", PRODUCTS)


def moment_cases(models: Mapping[str, Size], dtype: torch.dtype, device: str, quick: bool) -> Iterator[Case]:
    rows = (Comparison("kernel", ("eager, float64", "eager, float32", "eager, float32 blocks")),)
    sizes = dict(models) if quick else {name: replace(models[name], N=1600) for name in ("MiniLM", "BERT-base")}
    if not quick:
        sizes["SmolLM2-135M"] = Size(L=30, D=576, F=1536, K=384, N=1600, activation="silu", gated=True)
    for products in (True, False):
        for name, size in sizes.items():
            label = f"{name}, N {size.N}, D {size.D}, F {size.F}, {size.activation}{', gated' if size.gated else ''}"
            shape = (size.N, size.D, size.F, size.activation, size.gated, products)
            build = partial(peers.moments, *shape, dtype, device, quick)
            does = "sums and products" if products else "sums and squares"
            label = label if products else f"{label}, squares"
            memory = ("eager, float64", "eager, float32 blocks", "kernel") if products else ()
            yield Case("activation_moments", label, dtype, build, rows, does, PRODUCTS, memory=memory)


def alignment_cases(models: Mapping[str, Size], dtype: torch.dtype, device: str, quick: bool) -> Iterator[Case]:
    rows = (Comparison("kernel", ("eager", "eager, sums", "compile")),)
    sizes = [(name, size.N, size.D, True, False) for name, size in models.items()]
    if not quick:
        sizes += [("BERT-base", 16384, 768, True, False), ("BERT-base", 16384, 768, False, False)]
        sizes += [("MiniLM", 512, 384, True, True)]
    for name, N, D, masked, warm in sizes:
        label = f"{name}, N {N}, D {D}{', mask' if masked else ''}"
        build = partial(peers.alignment, N, D, masked, dtype, device, quick)
        moved = 5 * N * D * dtype.itemsize  # both are read forward and backward, the gradient is written
        yield Case("alignment_loss", label, dtype, build, rows, "forward and gradient", "copy", moved, warm)


def update_cases(device: str, quick: bool) -> Iterator[Case]:
    rows = (Comparison("kernel", ("eager", "compile")),)
    for name, n in {"tiny": 1000}.items() if quick else UPDATES.items():
        quantise, accumulate = (partial(f, n, device, quick) for f in (peers.quantise, peers.accumulate))
        label = f"{name}, {n / 1e6:.2g}M values"
        yield Case("quantize_blocks", label, torch.float32, quantise, rows, "one update", "copy", n * (4 + 1))
        yield Case("dequantize_accumulate", label, torch.float32, accumulate, rows, "one update", "copy", n * (8 + 1))


def mask_cases(quick: bool) -> Iterator[Case]:
    """A chunk of a silo's vector, with the masks of 10 silos and of 64."""
    rows = (Comparison("kernel", ("eager", "eager, in place", "compile")),)
    for masks in (2,) if quick else (10, 64):
        n = 1000 if quick else CHUNK_WORDS
        moved = 4 * n * (4 + masks)
        build = partial(peers.mask, n, masks, "cpu", quick)
        yield Case(
            "mask_update", f"{n} words, {masks} masks", torch.float32, build, rows, "one chunk", "copy", moved, True
        )


# Measuring


def measured(case: Case, device: str, bandwidth: Bandwidth, *, quick: bool) -> list[dict[str, Any]]:
    """The rows of one case: checks every candidate, then times in turns those that are right."""
    torch._dynamo.reset()  # every case is compiled for its own sizes
    compilations = torch._dynamo.utils.counters["stats"]
    first = case.build()
    missing = {name: outcome for name in case.candidates if (outcome := _tried(first, name))}
    count = 1 if case.warm else measure.sets_beyond_cache(first.input_bytes, device)
    sets: list[dict[str, Run]] = []
    for number in range(min(count, 2) if quick else count):
        runs = (case.build() if number else first).runs
        sets.append({name: run for name, run in runs.items() if name in case.candidates and name not in missing})  # type: ignore[misc]
        if case.ceiling != PRODUCTS and not case.warm:  # whose copy would leave the cache cold for the first in turn
            sets[-1]["ceiling"] = bandwidth.runs[case.ceiling]
    budget = QUICK_BUDGET_SECONDS if quick else BUDGET_SECONDS[device]
    graphs = compilations["unique_graphs"]
    times = measure.interleaved(*sets, device=device, budget_seconds=budget, warmed=True)
    if compilations["unique_graphs"] != graphs:
        compiled = [name for name in times if name.startswith("compile")]
        missing |= {name: {"failed": "compiled again while it was timed"} for name in compiled}
    rows = [_row(case, comparison, times, missing, bandwidth, device) for comparison in case.rows]
    del first, sets
    gc.collect()  # hooks hold their modules in cycles
    return rows


def _tried(prepared: Prepared, name: str) -> dict[str, str] | None:
    """Runs a candidate once; what to write in place of its time if it is not there, fails, or is wrong."""
    run = prepared.runs[name]
    if isinstance(run, str):
        return {"not_run": run}
    try:
        found = run()
        error = 0.0 if name == PRODUCTS else prepared.check(name, found)
    except Exception as fault:  # a peer may fail in any way; the table shows it
        return {"failed": f"{type(fault).__name__}: {str(fault).strip().splitlines()[0] if str(fault) else ''}"}
    return None if error <= 1.0 else {"failed": f"wrong result, {error:.3g} times the tolerance"}


def _row(
    case: Case,
    comparison: Comparison,
    times: Mapping[str, Times],
    missing: Mapping[str, dict[str, str]],
    bandwidth: Bandwidth,
    device: str,
) -> dict[str, Any]:
    ours = times.get(comparison.ours)
    others: dict[str, Any] = {}
    for name in comparison.peers:
        shown = name.removesuffix(" + count")
        others[shown] = missing.get(name) or asdict(times[name])
        if ours and "median_seconds" in others[shown]:
            others[shown]["ratio"] = times[name].median_seconds / ours.median_seconds
    ceiling = None
    if ours and case.ceiling == PRODUCTS:
        ceiling = times[PRODUCTS].median_seconds / ours.median_seconds
    elif ours and not case.warm:
        reached = case.moved_bytes / ours.median_seconds
        ceiling = reached * times["ceiling"].median_seconds / bandwidth.moved_bytes[case.ceiling]
    return {
        "operator": case.operator,
        "case": case.label,
        "does": ", ".join(filter(None, (case.does, comparison.what))),
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "warm": case.warm,
        "runs": kernel_of(case.operator, device),
        "kernel": missing.get(comparison.ours) or asdict(times[comparison.ours]),
        "ceiling": {"of": case.ceiling, "share": ceiling},
        "peers": others,
    }


def peaks(case: Case, device: str, *, quick: bool, everything: bool) -> dict[str, Any] | None:
    """Peak memory of one call, forward and backward, of the candidates whose memory is a floor."""
    names = tuple(name for name in case.candidates if name != PRODUCTS) if everything else case.memory
    if not names:
        return None
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = measure.peak_bytes(prepared_call, device, quick, str(case), name, device=device)
        except Exception as fault:
            found[name] = f"{type(fault).__name__}: {fault}"
    dtype = str(case.dtype).removeprefix("torch.")
    return {"operator": case.operator, "case": case.label, "does": case.does, "dtype": dtype, "peak_bytes": found}


def prepared_call(device: str, quick: bool, case: str, name: str) -> Run:
    """A candidate by its names; what a fresh process starts from."""
    run = next(c for c in all_cases(device, quick) if str(c) == case).build().runs[name]
    if isinstance(run, str):
        raise ValueError(run)
    return run


def check(chosen: Sequence[Case]) -> int:
    """Runs every candidate once and prints which are not there, fail or are wrong; 1 if a kernel of ours is."""
    wrong = 0
    for case in chosen:
        torch._dynamo.reset()
        prepared = case.build()
        missing = {name: outcome for name in case.candidates if (outcome := _tried(prepared, name))}
        wrong += sum("failed" in outcome for name, outcome in missing.items() if name.startswith("kernel"))
        print(case, *(f"- {name}{render.why(outcome)}" for name, outcome in missing.items()), sep="\n", flush=True)
        del prepared
        gc.collect()
    return int(wrong > 0)


def _share(text: str) -> tuple[int, int]:
    first, every = map(int, text.split("/"))
    if not 1 <= first <= every:
        raise ValueError(text)
    return first, every


def main() -> int:
    """Parses the command line, measures row by row, writes what was measured; 1 if a kernel of ours was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--op", choices=[name for name in SCHEMAS if not name.endswith("_backward")], nargs="+")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds this text")
    parser.add_argument("--share", type=_share, default=(1, 1), metavar="I/N", help="every N-th case, from the I-th")
    parser.add_argument("--check", action="store_true", help="time nothing: compare every candidate with the reference")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="default: all cores")
    parser.add_argument("--memory", action="store_true", help="peak memory of every case, not of the floors alone")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repetitions, no torch.compile")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all that was measured here, after every case")
    parser.add_argument("--render", type=Path, metavar="PATH", help="measure nothing: print and plot such a file")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="of --render; default: docs/<name of the file>.svg")
    arguments = parser.parse_args()
    if arguments.render:
        return render.main(arguments.render, arguments.plot)
    device, quick = arguments.device, arguments.quick
    chosen = [
        case
        for case in all_cases(device, quick)
        if (not arguments.op or case.operator in arguments.op) and arguments.only in str(case)
    ]
    first, every = arguments.share
    chosen = chosen[first - 1 :: every]
    if arguments.check:
        return check(chosen)
    results: dict[str, Any] = {**measure.provenance(device), "rows": [], "memory": []}
    print(f"{render.origin(results)}\nmedian, ms; each peer's time over the kernel's", flush=True)
    for threads in arguments.threads if device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        bandwidth = Bandwidth(device)
        for case in chosen:
            rows = measured(case, device, bandwidth, quick=quick)
            results["rows"] += rows
            memory = peaks(case, device, quick=quick, everything=arguments.memory)
            if memory:
                results["memory"].append({**memory, "threads": rows[0]["threads"]})
            print(*map(render.line, rows), *([render.memory_line(memory)] if memory else []), sep="\n", flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in row["kernel"] for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
