"""Runs every operator on this machine and compares it with its reference in float64."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedpft.kernels import reference
from fedpft.kernels.cases import TOLERANCES, Case, cases
from fedpft.kernels.library import build_info
from fedpft.kernels.schemas import SCHEMAS


@dataclass(frozen=True)
class CheckResult:
    """The worst case of one operator and dtype on one device.

    `kernel` is what ran: an instruction set, "cuda", or "reference". `error` is a share of the output's largest value.
    """

    operator: str
    dtype: torch.dtype
    device: str
    kernel: str
    cases: int
    worst_case: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every case was within its tolerance (a value that is not a number is not)."""
        return self.error <= self.tolerance


def check_operators() -> list[CheckResult]:
    """One result for each operator, dtype and device of this machine, in that order."""
    everything = list(cases())
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    results = []
    for operator in SCHEMAS:
        for dtype in TOLERANCES:
            chosen = [case for case in everything if (case.operator, case.dtype) == (operator, dtype)]
            results += [_check(chosen, device) for device in devices if chosen]
    return results


def kernel_of(operator: str, device: str) -> str:
    """What the dispatcher runs for an operator on a device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fedpft::{operator}", key):
        return "reference"
    return build_info()["capability"] if device == "cpu" else device


def compare(case: Case, device: str = "cpu", run: Callable[..., Any] | None = None) -> tuple[float, float]:
    """Error and tolerance of the output that comes nearest to its tolerance, or goes furthest beyond it.

    `run` is called with the arguments in place of the operator.
    """
    operator = getattr(torch.ops.fedpft, case.operator).default
    changed = changed_arguments(case.operator)
    wide = _run(getattr(reference, case.operator), _move(case.arguments, device, torch.float64), changed)
    actual = _run(run or operator, _move(case.arguments, device), changed)
    pairs = [(0.0, TOLERANCES[case.dtype])]
    for index, (value, wanted) in enumerate(zip(actual, wide, strict=True)):
        tolerance = max(TOLERANCES[case.dtype], TOLERANCES.get(value.dtype, 0.0))
        if value.shape != wanted.shape:
            pairs.append((math.inf, tolerance))
        elif value.dtype == torch.int64:
            pairs.append((_count_error(case, index, value, tolerance), tolerance))
        elif value.numel():
            error = _largest(_difference(value, wanted)) / max(_largest(wanted[wanted.isfinite()]), 1e-30)
            pairs.append((error, 1.0 / 127.0 if value.dtype == torch.int8 else tolerance))
    return max(pairs, key=_closeness)


def _closeness(pair: tuple[float, float]) -> float:
    """Error in units of the tolerance; not a number counts as infinite."""
    return math.inf if math.isnan(pair[0]) else pair[0] / pair[1]


def _check(chosen: list[Case], device: str) -> CheckResult:
    (error, tolerance), case = max(((compare(case, device), case) for case in chosen), key=lambda e: _closeness(e[0]))
    kernel = kernel_of(case.operator, device)
    return CheckResult(case.operator, case.dtype, device, kernel, len(chosen), case.label, error, tolerance)


def changed_arguments(operator: str) -> list[int]:
    """Where the arguments stand that an operator works on in place."""
    arguments = getattr(torch.ops.fedpft, operator).default._schema.arguments
    return [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]


def _run(function: Any, arguments: tuple[Any, ...], changed: Sequence[int] = ()) -> list[Tensor]:
    """The outputs; for an operator that works in place, copies of the arguments that it changed."""
    arguments = tuple(a.clone() if i in changed else a for i, a in enumerate(arguments))
    result = function(*arguments)
    if result is None:
        return [arguments[i] for i in changed]
    return [result] if isinstance(result, Tensor) else list(result)


def _move(arguments: tuple[Any, ...], device: str, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """The arguments on the device, floating tensors in `dtype` if given; what is right already stays as it is."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    moved: tuple[Any, ...] = tree_map(move, arguments)
    return moved


def _count_error(case: Case, index: int, counts: Tensor, tolerance: float) -> float:
    """By how many tokens counts leave the range that rounding of act(z) allows: those at eps -/+ the tolerance."""
    if not counts.numel():
        return 0.0
    position = {"inactivity_count": 3, "sub_ffn": 10}[case.operator]
    low, high = (
        _run(getattr(reference, case.operator), _with_eps(case, position, shift, counts.device.type))[index]
        for shift in (-4 * tolerance, 4 * tolerance)
    )
    return max(_largest((low - counts).clamp(min=0)), _largest((counts - high).clamp(min=0)))


def _with_eps(case: Case, position: int, shift: float, device: str) -> tuple[Any, ...]:
    wide = _move(case.arguments, device, torch.float64)
    return *wide[:position], wide[position] + shift, *wide[position + 1 :]


def _difference(value: Tensor, wanted: Tensor) -> Tensor:
    """0 where both are the same infinity or both not a number; where one alone is, the difference is not finite."""
    value, wanted = value.double(), wanted.double()
    same = (value == wanted) | (value.isnan() & wanted.isnan())
    return (value - wanted).masked_fill(same, 0.0)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def table(results: Iterable[CheckResult]) -> str:
    """The results as text, one line each."""
    lines = [f"{'operator':24} {'dtype':9} {'device':7} {'kernel':10} {'cases':>5} {'error':>8} {'allowed':>8}"]
    for r in results:
        dtype = str(r.dtype).removeprefix("torch.")
        verdict = "" if r.passed else f"  FAILED: {r.worst_case}"
        numbers = f"{r.cases:5d} {r.error:8.1e} {r.tolerance:8.1e}"
        lines.append(f"{r.operator:24} {dtype:9} {r.device:7} {r.kernel:10} {numbers}{verdict}")
    return "\n".join(lines)
