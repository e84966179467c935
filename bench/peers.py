"""Every operator's candidates: our kernel and its peers over one set of inputs, and what all of them must return.

A peer is how the same job is done without our kernel: the published code's expression, plain eager torch, eager with a
hook, torch.compile, cublasLt's epilogues. N tokens, D hidden size, F FFN neurons of the FM, K neurons of the sub-FFN,
U updated neurons, L layers.
"""

import functools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import Run
from fedpft import kernels
from fedpft.kernels import cases, reference
from fedpft.kernels.reference import ACTIVATIONS

PRODUCTS = "products"  # the matrix products of an FFN alone: its ceiling, no peer
EPS = {"relu": 0.0, "gelu": 0.01, "gelu_tanh": 0.01, "silu": 0.01}
CHECKED_TOKENS = 64  # at each end; the reference in float64 on all of them would take longer than the measurement


@dataclass
class Prepared:
    """The candidates over one set of inputs; a text in place of a call says why there is none."""

    runs: dict[str, Run | str]
    check: Callable[[str, Sequence[Tensor]], float]  # candidate, what it returned -> error in units of the tolerance
    input_bytes: int


# Peers that more than one operator has


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def no_compile(device: str, quick: bool = False) -> str:
    """Why torch.compile is not among the peers, or nothing."""
    if quick:
        return "left out by --quick"
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler"
    return ""


def close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> float:
    """The largest error in units of the tolerance, a share of the output's largest value; NaN counts as infinite."""
    assert len(found) == len(wanted), (len(found), len(wanted))
    worst = 0.0
    for value, exact in zip(found, wanted, strict=True):
        assert value.shape == exact.shape, (value.shape, exact.shape)
        value, exact = value.detach().double(), exact.detach().double()
        error = float((value - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
        worst = max(worst, math.inf if math.isnan(error) else error / tolerance)
    return worst


def size_of(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


# neuron_saliency


def published_saliency(layer: Sequence[Tensor]) -> Tensor:
    """As the published code writes it."""
    *rows, w_out = layer
    score: Tensor = torch.cat([*rows, w_out.t()], dim=1).norm(dim=1)
    return score


def two_norms(layer: Sequence[Tensor]) -> Tensor:
    *rows, w_out = layer
    score: Tensor = torch.linalg.vector_norm(w_out, dim=0)
    for w in rows:
        score = torch.hypot(score, torch.linalg.vector_norm(w, dim=1))
    return score


def squares(layer: Sequence[Tensor]) -> Tensor:
    *rows, w_out = layer
    energy = w_out.float().square().sum(0)
    for w in rows:
        energy = energy + w.float().square().sum(1)
    return energy.sqrt()


def saliency(L: int, D: int, F_: int, gated: bool, dtype: torch.dtype, device: str, quick: bool) -> Prepared:
    shapes = [*[(F_, D)] * (1 + gated), (D, F_)]
    layers = [[torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(L)]
    w_in, w_out = [layer[0] for layer in layers], [layer[-1] for layer in layers]
    w_gate = [layer[1] for layer in layers] if gated else []
    exact = functools.cache(lambda: torch.stack([squares([w.double() for w in layer]) for layer in layers]))

    def per_layer(score: Callable[[Sequence[Tensor]], Tensor]) -> Run:
        return lambda: (torch.stack([score(layer) for layer in layers]),)

    runs: dict[str, Run | str] = {
        "kernel": lambda: (kernels.neuron_saliency(w_in, w_gate, w_out),),
        "published": per_layer(published_saliency),
        "two norms": per_layer(two_norms),
        "squares": per_layer(squares),
        "compile": no_compile(device, quick) or per_layer(compiled(squares)),
    }

    def check(_: str, found: Sequence[Tensor]) -> float:
        return close(found, [exact()], cases.TOLERANCES[dtype])

    return Prepared(runs, check, size_of(*[w for layer in layers for w in layer]))


# inactivity_count


def eager_count(z: Tensor, mask: Tensor | None, activation: str, eps: float) -> Tensor:
    inactive = ACTIVATIONS[activation].forward(z).abs() <= eps
    return (inactive if mask is None else inactive & mask[:, None]).sum(0)


def published_count(z: Tensor) -> Tensor:
    """As the published code's hook: exact zeros, padding included."""
    return (torch.relu(z) == 0).sum(dim=0)


def inactivity(N: int, K: int, activation: str, masked: bool, dtype: torch.dtype, device: str, quick: bool) -> Prepared:
    z = torch.randn(N, K, device=device).to(dtype)
    mask = torch.rand(N, device=device) < 0.8 if masked else None
    eps = EPS[activation]
    zeros_only = "counts zeros only, without mask"
    runs: dict[str, Run | str] = {
        "kernel": lambda: (kernels.inactivity_count(z, mask, activation, eps),),
        "published": zeros_only if activation != "relu" or masked else lambda: (published_count(z),),
        "eager": lambda: (eager_count(z, mask, activation, eps),),
        "compile": no_compile(device, quick) or (lambda: (compiled(eager_count)(z, mask, activation, eps),)),
    }

    def check(_: str, found: Sequence[Tensor]) -> float:
        return count_error(found[0], [(z, mask)], activation, eps, dtype)

    return Prepared(runs, check, size_of(z))


def count_error(
    counts: Tensor, chunks: Sequence[tuple[Tensor, Tensor | None]], activation: str, eps: float, dtype: torch.dtype
) -> float:
    """0 if counts are in the range that rounding of act(z) allows (see fedpft/kernels/check.py), else infinite."""
    slack = 4 * cases.TOLERANCES[dtype]
    low, high = (
        torch.stack([reference.inactivity_count(z.double(), mask, activation, eps + s) for z, mask in chunks]).sum(0)
        for s in (-slack, slack)
    )
    return 0.0 if bool(((low <= counts) & (counts <= high)).all()) else math.inf


# sub_ffn


class EagerFfn(nn.Module):
    """The FFN as a transformer holds it: nn.Linear modules, frozen. The hook counts what `inactive` says."""

    def __init__(self, ffn: cases.Ffn, activation: str, inactive: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.up = _linear(ffn.w_in, ffn.b_in)
        self.gate = None if ffn.w_gate is None else _linear(ffn.w_gate, ffn.b_gate)
        self.down = _linear(ffn.w_out.t().contiguous(), ffn.b_out)
        self.activation = Pointwise(activation)
        self.counts: list[Tensor] = []
        if inactive is not None:
            self.activation.register_forward_hook(lambda *found: self.counts.append(inactive(found[-1]).sum(dim=0)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        result: Tensor = self.down(hidden)
        return result


class Pointwise(nn.Module):
    """A named activation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ACTIVATIONS[name].forward

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def ffn_function(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    eps: float | None,
) -> tuple[Tensor, ...]:
    """What torch.compile gets; w_out as nn.Linear holds it."""
    act = ACTIVATIONS[activation].forward
    z = F.linear(x, w_in, b_in)
    active = act(z if w_gate is None else F.linear(x, w_gate, b_gate))
    y = F.linear(active if w_gate is None else active * z, w_out, b_out)
    return (y,) if eps is None else (y, (active.detach().abs() <= eps).sum(0))


_drawn = functools.lru_cache(maxsize=1)(cases.make_ffn)  # sets differ in place alone: drawing takes longer than copying


def make_ffn(N: int, D: int, K: int, dtype: torch.dtype, device: str, gated: bool) -> tuple[cases.Ffn, Tensor]:
    """An FFN with tokens that require a gradient, and the gradient of y."""
    ffn = _drawn(N, D, K, dtype=dtype, gated=gated, bias=not gated)
    moved: dict[str, Any] = {n: None if t is None else t.to(device, copy=True) for n, t in vars(ffn).items()}
    moved["x"].requires_grad_()
    return cases.Ffn(**moved), torch.randn(N, D, device=device).to(dtype)


def sub_ffn(
    N: int, D: int, K: int, activation: str, gated: bool, dtype: torch.dtype, device: str, quick: bool
) -> Prepared:
    """Forward and the gradient of x of a frozen FFN, without and with the count."""
    ffn, grad_y = make_ffn(N, D, K, dtype, device, gated)
    x, eps, b_out = ffn.x, EPS[activation], cast(Tensor, ffn.b_out)
    plain, hooked, zeros = (
        EagerFfn(ffn, activation, inactive)
        for inactive in (None, lambda active: active.detach().abs() <= eps, lambda active: active.detach() == 0)
    )

    def ours(count: bool, compact: bool = False) -> Run:
        def run() -> tuple[Tensor, ...]:
            found = kernels.sub_ffn(x, *ffn.weights, activation=activation, eps=eps, count=count, compact=compact)
            y, *counts = found if isinstance(found, tuple) else (found,)
            return y, torch.autograd.grad(y, x, grad_y)[0], *counts

        return run

    def eager(module: EagerFfn) -> Run:
        def run() -> tuple[Tensor, ...]:
            module.counts.clear()
            y = module(x)
            return y, torch.autograd.grad(y, x, grad_y)[0], *module.counts

        return run

    def inductor(eps: float | None) -> Run:
        def run() -> tuple[Tensor, ...]:
            arguments = (ffn.w_in, ffn.b_in, ffn.w_gate, ffn.b_gate, plain.down.weight, ffn.b_out, activation, eps)
            y, *counts = compiled(ffn_function)(x, *arguments)
            return y, torch.autograd.grad(y, x, grad_y)[0], *counts

        return run

    def cublas_lt() -> tuple[Tensor, ...]:
        """ReLU in the epilogue of the first product; the hidden value itself is what backward needs."""
        with torch.no_grad():
            hidden = cublas_lt_hidden(ffn, activation)
            grad_z = torch.ops.aten.threshold_backward(grad_y @ ffn.w_out.t(), hidden, 0)
            return torch.addmm(b_out, hidden, ffn.w_out), grad_z @ ffn.w_in

    ceiling = [plain_products(x, ffn.w_in, ffn.w_out, grad_y)]
    if ffn.w_gate is not None:
        ceiling.append(gate_products(x, ffn.w_gate))
    why_not = no_compile(device, quick)
    epilogue = device == "cuda" and activation == "relu" and not gated
    runs: dict[str, Run | str] = {
        "kernel": ours(False),
        "kernel + count": ours(True),
        "kernel + count, compact": ours(True, compact=True),
        "eager": eager(plain),
        "eager + hook": eager(hooked),
        "published hook": eager(zeros) if activation == "relu" else "counts zeros only",
        "compile": why_not or inductor(None),
        "compile + count": why_not or inductor(eps),
        "cublasLt": cublas_lt if epilogue else "its epilogues fit ReLU on CUDA only",
        PRODUCTS: lambda: [products() for products in ceiling],
    }
    wanted = functools.cache(lambda: ffn_wanted(ffn, grad_y, activation))

    def check(name: str, found: Sequence[Tensor]) -> float:
        y, grad_x, *counts = found
        some = ends(N)
        tolerance = cases.TOLERANCES[dtype]
        rough = max(tolerance, cases.TOLERANCES[torch.bfloat16]) if name == "kernel + count, compact" else tolerance
        worst = max(close([y[some]], wanted()[:1], tolerance), close([grad_x[some]], wanted()[1:], rough))
        for count in counts:
            gate = (ffn.w_in, ffn.b_in) if ffn.w_gate is None else (ffn.w_gate, ffn.b_gate)
            with torch.no_grad():
                chunks = [(F.linear(part, *gate), None) for part in x.split(2048)]
                worst = max(worst, count_error(count, chunks, activation, eps, dtype))
        return worst

    return Prepared(runs, check, size_of(x, grad_y, *ffn.weights))


def cublas_lt_hidden(ffn: cases.Ffn, activation: str) -> Tensor:
    """The first product with bias and activation in its epilogue; on CUDA alone is that one kernel."""
    b_in = cast(Tensor, ffn.b_in)
    hidden: Tensor = torch._addmm_activation(b_in, ffn.x, ffn.w_in.t(), use_gelu=activation == "gelu_tanh")
    return hidden


def plain_products(x: Tensor, w_in: Tensor, w_out: Tensor, grad_y: Tensor, *, backward: bool = True) -> Run:
    """The products of a plain FFN and of its gradient of x, into memory that is there already."""
    hidden = torch.empty(x.shape[0], w_in.shape[0], dtype=x.dtype, device=x.device)
    other, y = torch.empty_like(hidden), torch.empty_like(grad_y)

    @torch.no_grad()
    def products() -> None:
        torch.mm(x, w_in.t(), out=hidden)
        torch.mm(hidden, w_out, out=y)
        if backward:
            torch.mm(grad_y, w_out.t(), out=other)
            torch.mm(other, w_in, out=y)

    return products


def gate_products(x: Tensor, w_gate: Tensor) -> Run:
    """The two products more that a gated FFN has."""
    hidden = torch.empty(x.shape[0], w_gate.shape[0], dtype=x.dtype, device=x.device)
    grad_x = torch.empty_like(x)

    @torch.no_grad()
    def products() -> None:
        torch.mm(x, w_gate.t(), out=hidden)
        torch.mm(hidden, w_gate, out=grad_x)

    return products


def sub_ffn_inference(
    N: int, D: int, K: int, activation: str, dtype: torch.dtype, device: str, quick: bool
) -> Prepared:
    """Forward alone, where nothing is kept."""
    ffn, grad_y = make_ffn(N, D, K, dtype, device, gated=False)
    x, b_out, module = ffn.x.detach(), cast(Tensor, ffn.b_out), EagerFfn(ffn, activation, None)
    arguments = (x, ffn.w_in, ffn.b_in, None, None, module.down.weight, ffn.b_out, activation, None)

    def cublas_lt() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (torch.addmm(b_out, cublas_lt_hidden(ffn, activation), ffn.w_out),)

    def kernel() -> tuple[Tensor, ...]:
        found = kernels.sub_ffn(x, *ffn.weights, activation=activation)
        return (found,) if isinstance(found, Tensor) else found

    runs: dict[str, Run | str] = {
        "kernel": kernel,
        "eager": lambda: (module(x),),
        "compile": no_compile(device, quick) or (lambda: compiled(ffn_function)(*arguments)),
        "cublasLt": cublas_lt if device == "cuda" else "on CUDA only",
        PRODUCTS: plain_products(x, ffn.w_in, ffn.w_out, grad_y, backward=False),
    }
    wanted = functools.cache(lambda: ffn_wanted(ffn, grad_y, activation)[:1])

    def check(_: str, found: Sequence[Tensor]) -> float:
        return close([found[0][ends(N)]], wanted(), cases.TOLERANCES[dtype])

    return Prepared(runs, check, size_of(x, *ffn.weights))


def ends(N: int) -> Tensor:
    """The first and the last tokens, which are checked against float64."""
    return torch.arange(N) if N <= 2 * CHECKED_TOKENS else torch.arange(-CHECKED_TOKENS, CHECKED_TOKENS)


def ffn_wanted(ffn: cases.Ffn, grad_y: Tensor, activation: str, neurons: Tensor | None = None) -> list[Tensor]:
    """y and the gradient of x in float64, of the tokens at both ends."""
    some = ends(ffn.x.shape[0])
    with torch.no_grad():
        wide: Any = [None if w is None else w.double() for w in ffn.weights]
        operator: Any = reference.sub_ffn
        y, saved, _ = operator(ffn.x[some].double(), *wide, neurons, None, activation, 0.0, False, True, False)
        w_in, _, w_gate, _, w_out, _ = wide
        grads = grad_y[some].double()
        return [y, reference.sub_ffn_backward(grads, saved, w_in, w_gate, w_out, neurons, activation, False)]


# sub_ffn over a set of neurons


def neuron_set(N: int, D: int, F_: int, K: int, dtype: torch.dtype, device: str, quick: bool) -> Prepared:
    """Forward and the gradient of x over K of F neurons, against the same kernel on weights packed beforehand."""
    ffn, grad_y = make_ffn(N, D, F_, dtype, device, gated=False)
    x = ffn.x
    neurons = torch.randperm(F_, generator=torch.Generator().manual_seed(5))[:K].sort().values.to(device)
    packed: Any = [None if w is None else w[neurons] if w.shape[0] == F_ else w for w in ffn.weights[:5]] + [ffn.b_out]
    w_out_linear = ffn.w_out.t().contiguous()

    def kernel(weights: Any, neurons: Tensor | None) -> Run:
        def run() -> tuple[Tensor, ...]:
            operator: Any = kernels.sub_ffn
            y = operator(x, *weights, activation="gelu", neurons=neurons)
            return y, torch.autograd.grad(y, x, grad_y)[0]

        return run

    def eager(function: Callable[..., tuple[Tensor, ...]]) -> Run:
        def run() -> tuple[Tensor, ...]:
            (y,) = function(x, ffn.w_in, ffn.b_in, w_out_linear, ffn.b_out, neurons)
            return y, torch.autograd.grad(y, x, grad_y)[0]

        return run

    runs: dict[str, Run | str] = {
        "kernel": kernel(ffn.weights, neurons),
        "packed": kernel(packed, None),
        "eager, gathered": eager(gathered_function),
        "compile": no_compile(device, quick) or eager(compiled(gathered_function)),
        PRODUCTS: plain_products(x, packed[0], packed[4], grad_y),
    }
    wanted = functools.cache(lambda: ffn_wanted(ffn, grad_y, "gelu", neurons))

    def check(_: str, found: Sequence[Tensor]) -> float:
        return close([value[ends(N)] for value in found], wanted(), cases.TOLERANCES[dtype])

    return Prepared(runs, check, size_of(x, grad_y, *ffn.weights))


def gathered_function(
    x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, neurons: Tensor
) -> tuple[Tensor, ...]:
    """The rows copied out, then a dense FFN; w_out as nn.Linear holds it."""
    return (F.linear(F.gelu(F.linear(x, w_in[neurons], b_in[neurons])), w_out[:, neurons], b_out),)


# sub_ffn_train


def split_form(x: Tensor, updated: Sequence[Tensor], fixed: Sequence[Tensor], b_out: Tensor) -> Tensor:
    """Two chains, added."""
    y = F.linear(F.gelu(F.linear(x, updated[0], updated[1])), updated[2], b_out)
    return y + F.linear(F.gelu(F.linear(x, fixed[0], fixed[1])), fixed[2])


def cat_form(x: Tensor, updated: Sequence[Tensor], fixed: Sequence[Tensor], b_out: Tensor) -> Tensor:
    """The two groups' weights joined at every call, as the published code does, then one chain."""
    w_in, b_in = torch.cat([updated[0], fixed[0]]), torch.cat([updated[1], fixed[1]])
    return F.linear(F.gelu(F.linear(x, w_in, b_in)), torch.cat([updated[2], fixed[2]], dim=1), b_out)


def train(N: int, D: int, K: int, U: int, dtype: torch.dtype, device: str, quick: bool) -> Prepared:
    """Forward, and the gradients of x, of the first U neurons and of the output bias."""
    ffn, grad_y = make_ffn(N, D, K, dtype, device, gated=False)
    x, b_in, b_out = ffn.x, cast(Tensor, ffn.b_in), cast(Tensor, ffn.b_out).clone().requires_grad_()
    views: Any = [None if rows is None else rows.requires_grad_() for rows in ffn.updated(U)]
    # The peers' leaves, with w_out as nn.Linear holds it.
    whole = [ffn.w_in.clone(), b_in.clone(), ffn.w_out.t().contiguous()]
    updated = [w[:U].clone() for w in whole[:2]] + [whole[2][:, :U].contiguous()]
    fixed = [w[U:].clone() for w in whole[:2]] + [whole[2][:, U:].contiguous()]
    for leaf in updated:
        leaf.requires_grad_()

    def kernel() -> tuple[Tensor, ...]:
        operator: Any = kernels.sub_ffn_train
        y = operator(x, *ffn.weights[:5], b_out, *views, activation="gelu")
        leaves = [x, *[view for view in views if view is not None], b_out]
        return y, *torch.autograd.grad(y, leaves, grad_y)

    def form(function: Callable[..., Tensor]) -> Run:
        def run() -> tuple[Tensor, ...]:
            y = function(x, updated, fixed, b_out)
            grad_x, grad_in, grad_b_in, grad_out, grad_b_out = torch.autograd.grad(y, [x, *updated, b_out], grad_y)
            return y, grad_x, grad_in, grad_b_in, grad_out.t(), grad_b_out

        return run

    hidden, other = (torch.empty(N, K, dtype=dtype, device=device) for _ in range(2))
    rows, tokens = torch.empty_like(ffn.w_in[:U]), torch.empty_like(grad_y)

    def products() -> None:
        with torch.no_grad():
            torch.mm(x, ffn.w_in.t(), out=hidden)
            torch.mm(hidden, ffn.w_out, out=tokens)
            torch.mm(grad_y, ffn.w_out.t(), out=other)
            torch.mm(other, ffn.w_in, out=tokens)
            torch.mm(other[:, :U].t(), x, out=rows)
            torch.mm(hidden[:, :U].t(), grad_y, out=rows)

    runs: dict[str, Run | str] = {
        "kernel": kernel,
        "split": form(split_form),
        "cat": form(cat_form),
        "compile": no_compile(device, quick) or form(compiled(split_form)),
        PRODUCTS: products,
    }

    @functools.cache
    def wanted() -> list[Tensor]:
        with torch.no_grad():
            wide: Any = [None if w is None else w.double() for w in (x, *ffn.weights)]
            operator: Any = reference.sub_ffn_train
            y, saved = operator(*wide, *[None] * 5, "gelu", True)
            w_in, w_out, grads = ffn.w_in.double(), ffn.w_out.double(), grad_y.double()
            found = reference.sub_ffn_train_backward(grads, wide[0], saved, w_in, None, w_out, U, "gelu", True)
            return [y, *[grad for grad in found if grad.numel()]]

    def check(_: str, found: Sequence[Tensor]) -> float:
        return close(found, wanted(), cases.TOLERANCES[dtype])

    return Prepared(runs, check, size_of(x, grad_y, *ffn.weights))


# activation_moments

PANEL, TOKENS = 1024, 256  # of the peers: rows of the triangle at a time, and tokens whose products float32 sums


def eager_values(x: Tensor, ffn: cases.Ffn, activation: str) -> Tensor:
    """What an FFN's neurons pass on, (N, F)."""
    act, z = ACTIVATIONS[activation].forward, F.linear(x, ffn.w_in, ffn.b_in)
    return act(z) if ffn.w_gate is None else act(F.linear(x, ffn.w_gate, ffn.b_gate)) * z


def add_eager_moments(total: Tensor, second: Tensor, values: Tensor) -> None:
    """The sums in float64, the products in the values' type: hardly more of them than the triangle."""
    total += values.sum(0, dtype=torch.float64)
    if second.dim() == 1:
        second += values.square().sum(0, dtype=torch.float64)
        return
    for start in range(0, len(total), PANEL):
        rows, left, right = second[start : start + PANEL, start:], values[:, start : start + PANEL], values[:, start:]
        if values.dtype == torch.float64:
            rows.addmm_(left.t(), right)
        else:
            rows += left.t() @ right


def moments(
    N: int, D: int, F_: int, activation: str, gated: bool, products: bool, dtype: torch.dtype, device: str, quick: bool
) -> Prepared:
    """One call, which adds to sums of before."""
    ffn, _ = make_ffn(N, D, F_, dtype, device, gated)
    x = ffn.x.detach()
    total = torch.zeros(F_, dtype=torch.float64, device=device)
    second = torch.zeros((F_, F_) if products else (F_,), dtype=torch.float64, device=device)
    before = total.clone(), second.clone()

    def kernel() -> tuple[Tensor, ...]:
        kernels.activation_moments(total, second, x, *ffn.weights[:4], activation=activation)
        return total, second

    def eager(tokens: int, wide: torch.dtype) -> Run:
        def run() -> tuple[Tensor, ...]:
            for part in x.split(tokens):
                add_eager_moments(total, second, eager_values(part, ffn, activation).to(wide))
            return total, second

        return run

    hidden, product = (torch.empty(n, F_, device=device) for n in (N, F_ if products else 0))
    wide_x, wide_in = x.float(), ffn.w_in.float()

    def ceiling() -> None:
        for _ in range(1 + gated):
            torch.mm(wide_x, wide_in.t(), out=hidden)
        for start in range(0, len(product), TOKENS):
            rows = product.view(-1)[: TOKENS * (F_ - start)].view(-1, F_ - start)[: F_ - start]
            torch.mm(hidden[:, start : start + TOKENS].t(), hidden[:, start:], out=rows)

    runs: dict[str, Run | str] = {
        "kernel": kernel,
        "eager, float64": eager(N, torch.float64),
        "eager, float32": eager(N, torch.float32),
        "eager, float32 blocks": eager(TOKENS, torch.float32),
        PRODUCTS: ceiling,
    }

    @functools.cache
    def wanted() -> tuple[Tensor, Tensor]:
        sums = torch.zeros_like(total), torch.zeros_like(second)
        wide: Any = [None if t is None else t.double() for t in (x, *ffn.weights[:4])]
        reference.activation_moments(*sums, *wide, None, None, activation)
        return sums

    def check(_: str, found: Sequence[Tensor]) -> float:
        added = [sums - old for sums, old in zip(found, before, strict=True)]
        for sums, old in zip(found, before, strict=True):
            old.copy_(sums)
        return close([added[0], added[1].triu() if products else added[1]], wanted(), cases.TOLERANCES[dtype])

    return Prepared(runs, check, size_of(x, *ffn.weights[:4], total, second))


# alignment_loss


def eager_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """The formula as docs/method.md writes it."""
    student, teacher = student.float(), teacher.float()
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    return ((teacher - student) / teacher.square().mean().sqrt()).square().mean()


def sums_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """The same as a quotient of two sums; the mask is a factor, so that shapes do not depend on it."""
    student, teacher = (t if t.dtype == torch.float64 else t.float() for t in (student, teacher))
    error, energy = (teacher - student).square().sum(1), teacher.square().sum(1)
    if mask is not None:
        error, energy = error * mask, energy * mask
    return error.sum() / energy.sum()


def alignment(N: int, D: int, masked: bool, dtype: torch.dtype, device: str, quick: bool) -> Prepared:
    """Forward and the gradient of the student."""
    student, teacher = (torch.randn(N, D, device=device).to(dtype) for _ in range(2))
    student.requires_grad_()
    mask = torch.rand(N, device=device) < 0.8 if masked else None

    def of(function: Callable[..., Tensor]) -> Run:
        def run() -> tuple[Tensor, ...]:
            loss = function(student, teacher, mask)
            return loss, torch.autograd.grad(loss, student)[0]

        return run

    runs: dict[str, Run | str] = {
        "kernel": of(kernels.alignment_loss),
        "eager": of(eager_loss),
        "eager, sums": of(sums_loss),
        "compile": no_compile(device, quick) or of(compiled(sums_loss)),
    }

    @functools.cache
    def wanted() -> list[Tensor]:
        wide = student.detach().double().requires_grad_()
        loss = sums_loss(wide, teacher.double(), mask)
        return [loss.detach(), torch.autograd.grad(loss, wide)[0]]

    def check(_: str, found: Sequence[Tensor]) -> float:
        return close(found, wanted(), cases.TOLERANCES[dtype])

    return Prepared(runs, check, size_of(student, teacher))


# quantize_blocks and dequantize_accumulate

BLOCK = 256


def quantise(size: int, device: str, quick: bool) -> Prepared:
    x = torch.randn(size, device=device)
    runs: dict[str, Run | str] = {
        "kernel": lambda: kernels.quantize_blocks(x, BLOCK),
        "eager": lambda: reference.quantize_blocks(x, BLOCK),
        "compile": no_compile(device, quick) or (lambda: compiled(reference.quantize_blocks)(x, BLOCK)),
    }

    def check(_: str, found: Sequence[Tensor]) -> float:
        q, scales = reference.quantize_blocks(x.double(), BLOCK)
        # A value halfway between two steps may go to either.
        return max(close(found[:1], [q], 1.0 / 127.0), close(found[1:], [scales], cases.TOLERANCES[torch.float32]))

    return Prepared(runs, check, size_of(x))


def accumulate(size: int, device: str, quick: bool) -> Prepared:
    q, scales = reference.quantize_blocks(torch.randn(size, device=device), BLOCK)
    total = torch.zeros(size, device=device)
    previous = total.clone()
    weight = 1.0 / 3.0

    def of(function: Callable[..., None]) -> Run:
        def run() -> tuple[Tensor, ...]:
            function(total, q, scales, weight, BLOCK)
            return (total,)

        return run

    runs: dict[str, Run | str] = {
        "kernel": of(kernels.dequantize_accumulate),
        "eager": of(reference.dequantize_accumulate),
        "compile": no_compile(device, quick) or of(compiled(reference.dequantize_accumulate)),
    }

    def check(_: str, found: Sequence[Tensor]) -> float:
        wanted = previous.double()
        reference.dequantize_accumulate(wanted, q, scales.double(), weight, BLOCK)
        previous.copy_(total)  # every call adds to the same total
        return close(found, [wanted], cases.TOLERANCES[torch.float32])

    return Prepared(runs, check, size_of(total, q, scales))


# mask_update


def mask(size: int, masks: int, device: str, quick: bool) -> Prepared:
    """A chunk of a vector; half of the masks are taken off."""
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(size, generator=draw)
    after, added, scale = before + 0.01 * torch.randn(size, generator=draw), masks // 2, 2.0**20
    streams = torch.randint(-(1 << 31), 1 << 31, (masks + 1, size), generator=draw, dtype=torch.int64).int()
    words, odd = torch.empty(size, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)

    def of(function: Callable[..., None]) -> Run:
        def run() -> tuple[Tensor, ...]:
            function(words, odd, before, after, streams, added, scale, 1.0)
            return (words,)

        return run

    def in_place(words: Tensor, odd: Tensor, *_: Any) -> None:
        change = after.double().sub_(before)
        chance = streams[0].bitwise_and(0xFFFFFF).double().mul_(2.0**-24)
        odd[0] += (change.abs() > 1.0).sum()
        words.copy_(change.clamp_(-1.0, 1.0).mul_(scale).add_(chance).floor_())
        for number, row in enumerate(streams[1:]):
            words.add_(row, alpha=1 if number < added else -1)

    runs: dict[str, Run | str] = {
        "kernel": of(kernels.mask_update),
        "eager": of(reference.mask_update),
        "eager, in place": of(in_place),
        "compile": no_compile(device, quick) or of(compiled(reference.mask_update)),
    }

    def check(_: str, found: Sequence[Tensor]) -> float:
        wanted = torch.empty_like(words)
        reference.mask_update(wanted, torch.zeros_like(odd), before, after, streams, added, scale, 1.0)
        return close(found, [wanted], 2.0**-33)  # less than one step of the largest word

    return Prepared(runs, check, size_of(words, before, after, streams))
