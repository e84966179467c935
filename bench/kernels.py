"""`python -m bench.kernels`: the compiled CPU operators against eager torch, interleaved in one run.

Prints a Markdown table of medians and ratios; above 1 is faster than the peer. Every case is checked against its peer
before it is timed. N tokens, D hidden size, F FFN neurons of the FM, K neurons of the sub-FFN, L layers.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fedpft import kernels

EPS = 0.01
SALIENCY = {"MiniLM": (6, 384, 1536), "BERT-base": (12, 768, 3072)}
SUB_FFN = [(512, 384, 384), (4096, 384, 384), (512, 768, 768), (4096, 768, 768), (4096, 768, 3072)]
Run = Callable[[], Any]


def interleaved(runs: dict[str, Run], repetitions: int) -> dict[str, float]:
    """Median seconds of each, timed in turns, so that a drift of the machine's speed hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in [*runs, *list(runs) * repetitions]:  # the first turn of each warms up
        begun = time.perf_counter()
        runs[name]()
        seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def saliency(layers: int, hidden: int, neurons: int) -> dict[str, Run]:
    """The kernel, the published code's expression, and the sums of squares."""
    w_in = [torch.randn(neurons, hidden) for _ in range(layers)]
    w_out = [torch.randn(hidden, neurons) for _ in range(layers)]
    pairs = list(zip(w_in, w_out, strict=True))
    runs: dict[str, Run] = {
        "kernel": lambda: kernels.neuron_saliency(w_in, [], w_out),
        "published": lambda: torch.stack([torch.cat([a, b.t()], dim=1).norm(dim=1) for a, b in pairs]),
        "squares": lambda: torch.stack([(a.square().sum(1) + b.square().sum(0)).sqrt() for a, b in pairs]),
    }
    torch.testing.assert_close(runs["kernel"](), runs["published"]())
    return runs


def sub_ffn(tokens: int, hidden: int, neurons: int, *, count: bool) -> dict[str, Run]:
    """Forward and gradient of x of a frozen GELU FFN: the kernel and eager torch, both with or without the count."""
    x = torch.randn(tokens, hidden, requires_grad=True)
    w_in, w_out = torch.randn(neurons, hidden) * hidden**-0.5, torch.randn(neurons, hidden) * neurons**-0.5
    b_in, b_out, grad_y = torch.randn(neurons), torch.randn(hidden), torch.randn(tokens, hidden)
    w_out_linear = w_out.t().contiguous()

    def kernel() -> tuple[Any, ...]:
        found = kernels.sub_ffn(x, w_in, b_in, None, None, w_out, b_out, activation="gelu", eps=EPS, count=count)
        y, counts = found if isinstance(found, tuple) else (found, None)
        return torch.autograd.grad(y, x, grad_y)[0], counts

    def eager() -> tuple[Any, ...]:
        hidden_values = F.gelu(F.linear(x, w_in, b_in))
        counts = (hidden_values.detach().abs() <= EPS).sum(0) if count else None
        return torch.autograd.grad(F.linear(hidden_values, w_out_linear, b_out), x, grad_y)[0], counts

    torch.testing.assert_close(kernel()[0], eager()[0], rtol=1e-4, atol=1e-4)
    return {"kernel": kernel, "eager": eager}


def main() -> None:
    """Times every case and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        cases = {f"neuron_saliency {name}, L {s[0]}, D {s[1]}, F {s[2]}": saliency(*s) for name, s in SALIENCY.items()}
        for tokens, hidden, neurons in SUB_FFN:
            for count in (False, True):
                text = f"sub_ffn forward + dX{' + count' if count else ''}, N {tokens}, D {hidden}, K {neurons}"
                cases[text] = sub_ffn(tokens, hidden, neurons, count=count)
        for name, runs in cases.items():
            medians = interleaved(runs, arguments.repetitions)
            ratios = {peer: medians[peer] / medians["kernel"] for peer in medians if peer != "kernel"}
            rows.append({"case": name, "threads": threads, "kernel_ms": 1e3 * medians["kernel"], "ratios": ratios})
    print("| case | threads | kernel, ms | peer time / kernel time |\n| --- | --- | --- | --- |")
    for row in rows:
        ratios = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in row["ratios"].items())
        print(f"| {row['case']} | {row['threads']} | {row['kernel_ms']:.2f} | {ratios} |")
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        found = {
            "commit": commit.stdout.strip(),
            "torch": torch.__version__,
            "kernels": kernels.build_info(),
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
