"""`python -m bench.vocabulary`: the loss over a large vocabulary, chunked as ours is, plain, and as torch has it.

Forward and backward to the hidden states through a frozen output layer, each token learned. Peak memory is above hidden
states and weight, each candidate in a fresh process; times are interleaved, over fewer tokens. How far loss and
gradient are from the plain ones is measured beside. torch's own (2.13 or newer) is given our chunk: its default on a
CPU in float32 is two rows.

N  tokens
D  hidden size
V  words
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Run, interleaved, peak_bytes, provenance
from fedpft.command import run_command
from fedpft.tasks.vocabulary_loss import LOGITS_BYTES, linear_cross_entropy

CANDIDATES = ("ours", "torch", "plain")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """timed_tokens: of the calls that are timed, where a few say as much as all."""

    dtype: str
    tokens: int
    hidden: int
    words: int
    timed_tokens: int

    @property
    def chunk(self) -> int:
        return LOGITS_BYTES // (4 * self.words)


CASES = (Case("float32", 4096, 576, 150_000, 512), Case("bfloat16", 4096, 576, 150_000, 512))
QUICK = (Case("float32", 512, 64, 50_000, 64),)


def prepare(name: str, case: Case, device: str) -> Run:
    """A call that returns loss and gradient of the hidden states."""
    generator = torch.Generator().manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.tokens, case.hidden, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(case.words, case.hidden, generator=generator) / case.hidden**0.5).to(device, dtype)
    targets = torch.randint(case.words, (case.tokens,), generator=generator).to(device)

    def run() -> tuple[Tensor, Tensor]:
        hidden.grad = None
        loss = _loss(name, hidden, weight, targets, case.chunk)
        loss.backward()
        assert hidden.grad is not None
        return loss.detach(), hidden.grad

    return run


def _loss(name: str, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    if name == "ours":
        return linear_cross_entropy(hidden, weight, targets)
    if name == "plain":
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(chunk, len(hidden)))
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def measured(case: Case, device: str) -> dict[str, Any]:
    """One row: each candidate's peak memory, times, and distance from the plain loss and its gradient."""
    names = [name for name in CANDIDATES if name != "torch" or hasattr(F, "linear_cross_entropy")]
    few = replace(case, tokens=case.timed_tokens)
    runs = {name: prepare(name, few, device) for name in names}
    loss, gradient = runs["plain"]()
    gradient = gradient.float()
    candidates: dict[str, dict[str, Any]] = {}
    for name in names:
        found, of_hidden = runs[name]()
        candidates[name] = {
            "loss_apart": float((found.float() - loss.float()).abs() / loss.float()),
            "gradient_apart": float((of_hidden.float() - gradient).norm() / gradient.norm()),
        }
    for name, times in interleaved(runs, device=device, warmed=True).items():
        candidates[name] |= {"seconds": asdict(times), "seconds_of_tokens": few.tokens}
    del runs, gradient
    for name in names:
        candidates[name]["peak_bytes"] = peak_bytes(prepare, name, case, device, device=device)
    return {**asdict(case), "chunk": case.chunk, "logits_bytes": 4 * case.tokens * case.words, "candidates": candidates}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """As Markdown."""
    lines = [
        "| dtype | tokens | hidden size | words | loss | peak memory | ms a token | loss apart | gradient apart |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        shape = f"| {row['dtype']} | {row['tokens']:,} | {row['hidden']:,} | {row['words']:,} |"
        for name, one in row["candidates"].items():
            token = one["seconds"]["median_seconds"] / one["seconds_of_tokens"]
            apart = " | ".join("0" if not one[key] else f"{one[key]:.0e}" for key in ("loss_apart", "gradient_apart"))
            lines.append(f"{shape} {name} | {one['peak_bytes'] / 2**20:,.0f} MiB | {1e3 * token:.2f} | {apart} |")
    return lines


def main() -> int:
    """Measures, prints the table, and writes it with its provenance."""
    parser = argparse.ArgumentParser(prog="python -m bench.vocabulary", description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, help="default: bench/results/vocabulary-DEVICE.json; of --quick: nowhere")
    arguments = parser.parse_args()

    def command() -> None:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        rows = []
        path = arguments.json or (None if arguments.quick else RESULTS / f"vocabulary-{arguments.device}.json")
        for case in QUICK if arguments.quick else CASES:
            rows.append(measured(case, arguments.device))
            print("\n".join(table(rows[-1:])), flush=True)
            if path is not None:
                results = {**provenance(arguments.device), "rows": rows}
                path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
