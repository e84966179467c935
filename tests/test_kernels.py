"""Operators: values, derivatives, tracing and argument checks.

Cases and tolerances are those of fedpft/kernels/cases.py. N tokens, D hidden size, F or K neurons, U updated neurons.
"""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedpft import kernels
from fedpft.kernels import reference
from fedpft.kernels.cases import TOLERANCES, Case, Ffn, cases, make_ffn
from fedpft.kernels.check import check_operators, compare, kernel_of, table
from fedpft.kernels.schemas import SCHEMAS

ALL_CASES = list(cases())
# opcheck takes no value that is not a number for equal to itself.
NOT_FOR_OPCHECK = ("tiles", "301", "ragged-relu", "ragged-gelu_tanh", "counted", "masked", "inf", "-inf", "nan")
OPCHECK_CASES = [
    case for case in ALL_CASES if case.dtype == torch.float32 and not case.label.startswith(NOT_FOR_OPCHECK)
]


def with_gradient(case: Case) -> tuple[Any, ...]:
    """The case's arguments, with a gradient wanted for what the operator differentiates."""
    differentiated = {"sub_ffn": (0,), "sub_ffn_train": (0, 6, 7, 8, 9, 10, 11), "alignment_loss": (0,)}
    wanted = differentiated.get(case.operator, ()) if case.operator != "sub_ffn" or case.arguments[12] else ()

    def prepare(index: int, value: Any) -> Any:
        return value.detach().requires_grad_() if index in wanted and value is not None else value

    return tuple(prepare(index, value) for index, value in enumerate(case.arguments))


def test_every_operator_has_cases() -> None:
    assert {case.operator for case in ALL_CASES} == set(SCHEMAS)


@pytest.mark.parametrize("operator", SCHEMAS)
def test_operator_agrees_with_its_reference(operator: str) -> None:
    for case in ALL_CASES:
        if case.operator == operator:
            error, tolerance = compare(case)
            assert error <= tolerance, str(case)


@pytest.mark.parametrize("operator", SCHEMAS)
def test_operator_passes_opcheck(operator: str) -> None:
    seen: set[str] = set()
    for case in OPCHECK_CASES:
        kind = case.label.split("-")[0]
        if case.operator == operator and kind not in seen:
            seen.add(kind)
            torch.library.opcheck(getattr(torch.ops.fedpft, operator).default, with_gradient(case))


def test_reference_is_the_fallback_of_every_operator() -> None:
    for operator in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fedpft::{operator}", "CompositeExplicitAutograd")


@pytest.mark.skipif(not kernels.build_info()["compiled"], reason="fedpft._C is not built")
def test_compiled_kernels_are_the_ones_that_run() -> None:
    info = kernels.build_info()
    assert info["capability"] in info["capabilities"]
    for operator in SCHEMAS:
        assert kernel_of(operator, "cpu") == info["capability"]


@pytest.mark.skipif(not kernels.build_info()["compiled"], reason="fedpft._C is not built")
@pytest.mark.parametrize("capability", kernels.build_info()["capabilities"])
def test_every_instruction_set_passes_the_check(capability: str) -> None:
    environment = {**os.environ, "FEDPFT_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fedpft.kernels"], env=environment, capture_output=True, text=True, check=False
    )
    if "this machine does not have it" in done.stderr:
        pytest.skip(f"no {capability} here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"capability: {capability}" in done.stdout


def test_check_reports_an_operator_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.alignment_loss_backward
    monkeypatch.setattr(reference, "alignment_loss_backward", lambda *arguments: 1.1 * right(*arguments))
    wrong = [result for result in check_operators() if not result.passed]
    assert {result.operator for result in wrong} == {"alignment_loss_backward"}
    assert "FAILED" in table(wrong)


# ------------------------------------------------------------------------------------------------ saliency


@pytest.mark.parametrize("transposed", [False, True])
def test_saliency_keeps_the_neurons_of_the_published_expression(transposed: bool) -> None:
    torch.manual_seed(0)
    F, D, K = 1536, 384, 384
    w_in = torch.randn(D, F).t() if transposed else torch.randn(F, D)
    w_out = torch.randn(F, D).t() if transposed else torch.randn(D, F)
    published = torch.cat([w_in, w_out.t()], dim=1).norm(dim=1)
    saliency = kernels.neuron_saliency([w_in], [], [w_out])[0]
    torch.testing.assert_close(saliency, published, rtol=1e-6, atol=0)
    assert torch.equal(saliency.topk(K).indices.sort().values, published.topk(K).indices.sort().values)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_saliency_is_accurate_to_float32_rounding_whatever_the_weights_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    w_in, w_out = torch.randn(33, 2048).to(dtype), torch.randn(2048, 33).to(dtype)
    exact = (w_in.double().square().sum(1) + w_out.double().square().sum(0)).sqrt()
    torch.testing.assert_close(
        kernels.neuron_saliency([w_in], [], [w_out])[0].double(), exact, rtol=1.2e-7 if has_kernel() else 1e-6, atol=0
    )


def test_saliency_of_large_float16_weights_does_not_overflow() -> None:
    large = torch.full((2, 64), 60000.0, dtype=torch.float16)
    assert kernels.neuron_saliency([large], [large], [large.t()])[0].tolist() == pytest.approx(
        [60000.0 * math.sqrt(192)] * 2, rel=1e-3
    )
    small = torch.full((2, 64), 2.0**-24, dtype=torch.float16)  # the smallest subnormal
    assert kernels.neuron_saliency([small], [], [small.t()])[0].tolist() == pytest.approx(
        [2.0**-24 * math.sqrt(128)] * 2
    )


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_saliency_does_not_hide_values_that_are_not_finite(dtype: torch.dtype, value: float) -> None:
    w_in = torch.ones(3, 70).to(dtype)
    w_in[1, 69] = value
    finite = kernels.neuron_saliency([w_in], [], [torch.ones(70, 3).to(dtype)])[0].isfinite()
    assert finite.tolist() == [True, False, True]


def test_equal_neurons_have_equal_saliency() -> None:
    row = torch.randn(1, 100)
    saliency = kernels.neuron_saliency([row.expand(301, -1)], [], [row.t().expand(-1, 301).contiguous()])[0]
    assert saliency.unique().numel() == 1


# ------------------------------------------------------------------------------------------------ FFN


def has_kernel() -> bool:
    return bool(kernels.build_info()["compiled"])


def eager(x: Tensor, ffn: Ffn, activation: str) -> Tensor:
    """The FFN as a model's modules compute it, written apart from reference.py."""
    act: Callable[[Tensor], Tensor] = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
    }[activation]
    z = x @ ffn.w_in.t() + (0 if ffn.b_in is None else ffn.b_in)
    if ffn.w_gate is not None:
        hidden = act(x @ ffn.w_gate.t() + (0 if ffn.b_gate is None else ffn.b_gate)) * z
    else:
        hidden = act(z)
    return hidden @ ffn.w_out + (0 if ffn.b_out is None else ffn.b_out)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_sub_ffn_is_the_ffn_of_a_model(activation: str, gated: bool) -> None:
    ffn = make_ffn(41, 16, 24, dtype=torch.float64, gated=gated)
    x = ffn.x.requires_grad_()
    y = kernels.sub_ffn(x, *ffn.weights, activation=activation)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y, eager(x, ffn, activation))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(eager(x, ffn, activation).square().sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_gradcheck_of_sub_ffn(activation: str, gated: bool) -> None:
    ffn = make_ffn(5, 4, 6, dtype=torch.float64, gated=gated)
    assert torch.autograd.gradcheck(
        lambda x: kernels.sub_ffn(x, *ffn.weights, activation=activation), ffn.x.requires_grad_()
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("updated", [2, 6])
def test_gradcheck_of_sub_ffn_train(updated: int, gated: bool) -> None:
    ffn = make_ffn(5, 4, 6, dtype=torch.float64, gated=gated)
    assert ffn.b_out is not None
    views = [None if view is None else view.detach().requires_grad_() for view in ffn.updated(updated)]
    leaves = [ffn.x.requires_grad_(), ffn.b_out.requires_grad_(), *(view for view in views if view is not None)]
    full = (*ffn.weights[:5], ffn.b_out)
    assert torch.autograd.gradcheck(
        lambda *_: kernels.sub_ffn_train(ffn.x, *full, *views, activation="gelu"),  # type: ignore[arg-type]
        leaves,
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_sub_ffn_train_counts_as_sub_ffn_does(gated: bool, grad: bool) -> None:
    ffn = make_ffn(300, 8, 12, dtype=torch.float64, gated=gated)
    x, mask = ffn.x.view(3, 100, 8).requires_grad_(grad), torch.arange(300).view(3, 100) % 7 > 1
    given = {"activation": "gelu", "eps": 0.1, "count": True}
    for seen in (None, mask):
        y, counts = kernels.sub_ffn_train(x, *ffn.weights, *ffn.updated(5), mask=seen, **given)  # type: ignore[arg-type]
        wanted, expected = kernels.sub_ffn(x, *ffn.weights, mask=seen, **given)  # type: ignore[arg-type]
        torch.testing.assert_close(y, wanted)
        assert torch.equal(counts, expected)
        assert y.requires_grad == grad
        assert 0 < int(counts.sum()) < 300 * 12
    with pytest.raises(ValueError, match="mask: has shape"):
        kernels.sub_ffn_train(x, *ffn.weights, *ffn.updated(5), mask=mask[0], **given)  # type: ignore[arg-type]


def test_an_optimizer_step_on_the_updated_views_changes_the_full_weights() -> None:
    ffn = make_ffn(8, 4, 6, dtype=torch.float32)
    views = [None if view is None else view.detach().requires_grad_() for view in ffn.updated(2)]
    before = ffn.w_out.clone()
    optimizer = torch.optim.SGD([view for view in views if view is not None], lr=0.1)
    kernels.sub_ffn_train(ffn.x, *ffn.weights, *views, activation="gelu").square().sum().backward()  # type: ignore[arg-type]
    optimizer.step()
    assert not torch.equal(ffn.w_out[:2], before[:2])
    assert torch.equal(ffn.w_out[2:], before[2:])


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_compact_mode_gives_the_gradient_to_bfloat16_rounding(activation: str) -> None:
    ffn = make_ffn(300, 24, 48, dtype=torch.float32, gated=True)
    grads = []
    for compact in (False, True):
        x = ffn.x.detach().requires_grad_()
        y = kernels.sub_ffn(x, *ffn.weights, activation=activation, compact=compact)
        assert isinstance(y, Tensor)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    assert 0 < error < 2**-8


@pytest.mark.skipif(not has_kernel(), reason="fedpft._C is not built")
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_activation_is_accurate_to_float32_rounding(activation: str) -> None:
    z = torch.cat([torch.linspace(-10, 10, 40_001), torch.tensor([-1e18, -90.0, -30.0, 0.0, -0.0, 30.0, 90.0, 1e18])])
    one = torch.ones(1, 1)
    x = z[:, None].requires_grad_()
    y = kernels.sub_ffn(x, one, None, None, None, one, None, activation=activation)
    assert isinstance(y, Tensor)
    (slope,) = torch.autograd.grad(y.sum(), x)

    def error(actual: Tensor, exact: Tensor) -> float:
        return float(((actual[:, 0].double() - exact).abs() / exact.abs().clamp(min=1.0)).max())

    wide, act = z.detach().double(), reference.ACTIVATIONS[activation]
    assert error(y.detach(), act.forward(wide)) < 2e-7
    assert error(slope, act.backward(torch.ones_like(wide), wide)) < 3e-6


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_a_value_that_is_not_a_number_stays_one(activation: str) -> None:
    x = torch.zeros(20, 20)
    x[3, 5] = math.nan
    y = kernels.sub_ffn(x, torch.eye(20), None, None, None, torch.eye(20), None, activation=activation)
    assert isinstance(y, Tensor)
    assert y.isnan().any(1).nonzero().tolist() == [[3]]


def test_counts_are_those_of_inactivity_count_and_of_the_gate() -> None:
    ffn = make_ffn(700, 16, 24, dtype=torch.float64, gated=True)
    assert ffn.w_gate is not None
    assert ffn.b_gate is not None
    result = kernels.sub_ffn(ffn.x, *ffn.weights, activation="silu", mask=ffn.mask, eps=0.05, count=True)
    gate = ffn.x @ ffn.w_gate.t() + ffn.b_gate
    assert torch.equal(result[1], kernels.inactivity_count(gate, ffn.mask, "silu", 0.05))
    assert 0 < int(result[1].sum()) < 700 * 24


def test_relu_counts_exact_zeros_and_padding_does_not_count() -> None:
    z = torch.tensor([[-1.0, 2.0], [0.0, 3.0], [-5.0, -5.0]])
    assert kernels.inactivity_count(z, None, "relu", 0.0).tolist() == [3, 1]
    assert kernels.inactivity_count(z, torch.tensor([True, True, False]), "relu", 0.0).tolist() == [2, 0]


def test_chosen_neurons_are_the_only_ones_used() -> None:
    ffn = make_ffn(10, 8, 12, dtype=torch.float32, gated=True)
    neurons = torch.tensor([7, 0, 3])
    rows = {name: getattr(ffn, name)[neurons] for name in ("w_in", "b_in", "w_gate", "b_gate", "w_out")}
    chosen = dataclasses.replace(ffn, **rows)
    expected = kernels.sub_ffn(ffn.x, *chosen.weights, activation="silu", count=True)
    actual = kernels.sub_ffn(ffn.x, *ffn.weights, activation="silu", count=True, neurons=neurons)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_neurons_may_repeat_and_stand_in_any_order() -> None:
    ffn = make_ffn(40, 24, 60, dtype=torch.float64, gated=True, strided=True)
    neurons = torch.randint(60, (2 * 600,), generator=torch.Generator().manual_seed(5))[::2]
    rows = {name: getattr(ffn, name)[neurons] for name in ("w_in", "b_in", "w_gate", "b_gate", "w_out")}
    results = []
    for case, chosen in ((ffn, neurons), (dataclasses.replace(ffn, **rows), None)):
        x = ffn.x.detach().requires_grad_()
        y, counts = kernels.sub_ffn(x, *case.weights, activation="gelu", neurons=chosen, count=True, eps=0.1)
        results.append((y, counts, *torch.autograd.grad(y.square().sum(), x)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(not has_kernel(), reason="fedpft._C is not built")
@pytest.mark.parametrize("wrong", [-1, 12])
def test_a_neuron_that_the_weights_do_not_have_is_named(wrong: int) -> None:
    ffn = make_ffn(10, 8, 12, dtype=torch.float32)
    neurons = torch.tensor([3, wrong, 0])
    with pytest.raises(RuntimeError, match=f"neurons: has {wrong} at position 1"):
        kernels.sub_ffn(ffn.x, *ffn.weights, activation="gelu", neurons=neurons)
    saved = torch.zeros(1, 10, 3)
    with pytest.raises(RuntimeError, match=f"neurons: has {wrong} at position 1"):
        torch.ops.fedpft.sub_ffn_backward(ffn.x, saved, ffn.w_in, None, ffn.w_out, neurons, "gelu", False)


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of every tensor that a call allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in events if event.nbytes() > 0]


@pytest.mark.skipif(not has_kernel(), reason="fedpft._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_whole_weight_is_copied_or_widened(dtype: torch.dtype) -> None:
    K, D = 4096, 64
    ffn = make_ffn(8, D, 2 * K, dtype=dtype)
    x = ffn.x.requires_grad_()

    def call() -> None:
        y = kernels.sub_ffn(x, *ffn.weights, activation="gelu", neurons=torch.arange(K), count=True)[0]
        y.sum().backward()

    call()
    assert 0 < max(allocations(call)) < K * D * 4 / 4


@pytest.mark.skipif(not has_kernel(), reason="fedpft._C is not built")
@pytest.mark.parametrize("compact", [False, True])
def test_only_what_backward_reads_is_as_large_as_the_hidden_values(compact: bool) -> None:
    N, K = 4096, 1024
    ffn = make_ffn(N, 8, K, dtype=torch.float32)
    x, threads = ffn.x.requires_grad_(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        sizes = allocations(
            lambda: kernels.sub_ffn(x, *ffn.weights, activation="gelu", compact=compact).sum().backward()  # type: ignore[union-attr]
        )
    finally:
        torch.set_num_threads(threads)
    assert [size for size in sizes if size >= N * K] == [N * K * (2 if compact else 4)]


@pytest.mark.parametrize("train", [False, True])
def test_backward_may_run_twice(train: bool) -> None:
    ffn = make_ffn(300, 8, 12, dtype=torch.float32, gated=True)
    x = ffn.x.requires_grad_()
    if train:
        y = kernels.sub_ffn_train(x, *ffn.weights, *ffn.updated(5), activation="gelu")  # type: ignore[arg-type]
    else:
        y = kernels.sub_ffn(x, *ffn.weights, activation="gelu")  # type: ignore[assignment]
    first, second = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("input_grad", [False, True])
@pytest.mark.parametrize(("N", "D", "K", "U"), [(0, 4, 5, 2), (3, 0, 4, 2), (3, 4, 0, 0), (7, 4, 5, 0), (700, 4, 5, 5)])
def test_gradients_of_empty_dimensions_and_of_no_neuron(N: int, D: int, K: int, U: int, input_grad: bool) -> None:
    draw = torch.Generator().manual_seed(17)
    grad_y, x, w_in, w_gate, w_out = (
        torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in [(N, D)] * 2 + [(K, D)] * 3
    )
    for gate in (None, w_gate):
        saved = torch.randn(1 if gate is None else 2, N, K, dtype=torch.float64, generator=draw)
        arguments = (grad_y, x, saved, w_in, gate, w_out, U, "silu", input_grad)
        actual = torch.ops.fedpft.sub_ffn_train_backward(*arguments)
        for value, expected in zip(actual, reference.sub_ffn_train_backward(*arguments), strict=True):
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("tokens", [40, 257, 1061])
def test_the_same_training_step_gives_the_same_bits(tokens: int) -> None:
    ffn = make_ffn(tokens, 24, 40, dtype=torch.float32, gated=True)
    arguments: tuple[Any, ...] = (ffn.x, *ffn.weights, *ffn.updated(20), "gelu", True)
    saved = reference.sub_ffn_train(*arguments)[1]
    first, second = (
        torch.ops.fedpft.sub_ffn_train_backward(ffn.x, ffn.x, saved, ffn.w_in, ffn.w_gate, ffn.w_out, 20, "gelu", True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_leading_dimensions_are_tokens() -> None:
    ffn = make_ffn(12, 8, 6, dtype=torch.float32)
    flat = kernels.sub_ffn(ffn.x, *ffn.weights, activation="relu", count=True, mask=ffn.mask)
    x, mask = ffn.x.view(3, 2, 2, 8), ffn.mask.view(3, 4)
    shaped = kernels.sub_ffn(x, *ffn.weights, activation="relu", count=True, mask=mask)
    assert shaped[0].shape == (3, 2, 2, 8)
    assert torch.equal(shaped[0].view(12, 8), flat[0])
    assert torch.equal(shaped[1], flat[1])


@pytest.mark.parametrize("tokens", [40, 255, 257, 1061])
def test_the_same_call_gives_the_same_bits(tokens: int) -> None:
    ffn = make_ffn(tokens, 24, 40, dtype=torch.float32, gated=True)
    first, second = (
        kernels.sub_ffn(ffn.x, *ffn.weights, activation="gelu", count=True, eps=0.1, mask=ffn.mask) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_threads_change_nothing_beyond_rounding() -> None:
    ffn = make_ffn(700, 24, 40, dtype=torch.float64, gated=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            results.append(kernels.sub_ffn(ffn.x, *ffn.weights, activation="gelu", count=True, eps=0.1))
    finally:
        torch.set_num_threads(threads)
    for y, counts in results[1:]:
        torch.testing.assert_close(y, results[0][0])
        assert torch.equal(counts, results[0][1])


@pytest.mark.parametrize("threads", [1, 2])
def test_inference_mode_gives_the_same_bits(threads: int) -> None:
    ffn = make_ffn(700, 24, 40, dtype=torch.float32, gated=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        expected = kernels.sub_ffn(ffn.x, *ffn.weights, activation="gelu")
        with torch.inference_mode():
            actual = kernels.sub_ffn(ffn.x.clone(), *ffn.weights, activation="gelu")
    finally:
        torch.set_num_threads(before)
    assert isinstance(expected, Tensor)
    assert isinstance(actual, Tensor)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("N", "D", "K"), [(3, 0, 4), (3, 4, 0), (0, 4, 4), (600, 4, 0)])
def test_dimensions_may_be_empty(N: int, D: int, K: int) -> None:
    x, w, bias = torch.randn(N, D), torch.randn(K, D), torch.randn(D)
    y, counts = kernels.sub_ffn(x.requires_grad_(), w, None, w, None, w, bias, activation="relu", count=True)
    y.sum().backward()
    assert y.shape == x.shape
    assert counts.shape == (K,)
    assert x.grad is not None
    if K == 0:
        assert torch.equal(y, bias.expand(N, D))
        assert x.grad.count_nonzero() == 0


def test_compiled_module_without_graph_breaks_matches_eager() -> None:
    ffn = make_ffn(20, 8, 12, dtype=torch.float32, gated=True)
    teacher = torch.randn(20, 8)

    def loss(x: Tensor) -> Tensor:
        y, counts = kernels.sub_ffn(x, *ffn.weights, activation="gelu", count=True, eps=0.1, mask=ffn.mask)
        return kernels.alignment_loss(y, teacher, ffn.mask) + counts.sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = ffn.x.detach().requires_grad_()
        value = function(x)
        gradients.append((value.detach(), torch.autograd.grad(value, x)[0]))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_second_derivatives_are_refused() -> None:
    ffn = make_ffn(4, 4, 4, dtype=torch.float64)
    x = ffn.x.requires_grad_()
    y = kernels.sub_ffn(x, *ffn.weights, activation="gelu")
    assert isinstance(y, Tensor)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


# ------------------------------------------------------------------------------------------------ moments


def moments(ffn: Ffn, *, products: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """total and second of an FFN's tokens, from zero."""
    F = ffn.w_in.shape[0]
    total, second = (torch.zeros(shape, dtype=torch.float64) for shape in ((F,), (F, F) if products else (F,)))
    kernels.activation_moments(total, second, ffn.x, *ffn.weights[:4], **{"activation": "gelu", **options})
    return total, second


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_moments_are_sums_over_what_the_output_projection_is_given(activation: str, gated: bool) -> None:
    ffn = make_ffn(70, 16, 24, dtype=torch.float64, gated=gated)
    identity = dataclasses.replace(ffn, w_out=torch.eye(24, dtype=torch.float64), b_out=None)
    shares = torch.linspace(-1, 2, 70, dtype=torch.float64)
    h = (eager(ffn.x, identity, activation) * shares[:, None])[ffn.mask]
    for products, wanted in ((False, h.square().sum(0)), (True, (h.t() @ h).triu())):
        found = moments(ffn, products=products, activation=activation, shares=shares, mask=ffn.mask)
        torch.testing.assert_close(found, (h.sum(0), wanted))


def test_moments_add_up_over_calls_and_leave_the_lower_triangle_alone() -> None:
    ffn = make_ffn(600, 8, 300, dtype=torch.float32)
    whole = moments(ffn, products=True)
    total, second = (
        torch.zeros(300, dtype=torch.float64),
        torch.full((300, 300), torch.nan, dtype=torch.float64).tril(-1),
    )
    for x in ffn.x.view(3, 200, 8).split(1):
        kernels.activation_moments(total, second, x, *ffn.weights[:4], activation="gelu")
    torch.testing.assert_close(total, whole[0])
    torch.testing.assert_close(second.triu(), whole[1].triu(), rtol=1e-6, atol=1e-4)
    below = torch.ones(300, 300, dtype=torch.bool).tril(-1)
    assert second[below].isnan().all()
    assert whole[1][below].count_nonzero() == 0


@pytest.mark.skipif(not has_kernel(), reason="fedpft._C is not built")
@pytest.mark.parametrize("tokens", [1000, 60_000])
def test_moments_of_many_tokens_are_as_exact_as_of_few(tokens: int) -> None:
    ffn = make_ffn(tokens, 8, 40, dtype=torch.float32, bias=False)
    total, second = moments(ffn, products=True, activation="relu")
    wide = [None if t is None else t.double() for t in (ffn.x, *ffn.weights[:4])]
    exact = torch.zeros_like(total), torch.zeros_like(second)
    reference.activation_moments(*exact, *wide, None, None, "relu")  # type: ignore[arg-type]
    spread = exact[1].diagonal().sqrt()
    assert ((second - exact[1]).abs() <= 2.5e-7 * torch.outer(spread, spread)).all()
    torch.testing.assert_close(total, exact[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("products", [False, True])
def test_tokens_outside_the_mask_may_be_anything(products: bool) -> None:
    ffn = make_ffn(600, 8, 20, dtype=torch.float32, gated=True)
    clean = moments(ffn, products=products, mask=ffn.mask)
    ffn.x[~ffn.mask] = math.nan
    assert all(map(torch.equal, moments(ffn, products=products, mask=ffn.mask), clean))
    ffn.x[int(ffn.mask.nonzero()[-1])] = math.nan
    assert moments(ffn, products=products, mask=ffn.mask)[1].isnan().any()


@pytest.mark.parametrize("products", [False, True])
def test_the_same_moments_have_the_same_bits(products: bool) -> None:
    ffn = make_ffn(1100, 24, 520, dtype=torch.float32, gated=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results += [moments(ffn, products=products, mask=ffn.mask) for _ in range(2)]
            assert all(map(torch.equal, results[-1], results[-2]))
    finally:
        torch.set_num_threads(threads)
    for other in results[2::2]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(("N", "D", "K"), [(0, 4, 3), (3, 0, 4), (3, 4, 0)])
@pytest.mark.parametrize("products", [False, True])
def test_moments_of_empty_dimensions(N: int, D: int, K: int, products: bool) -> None:
    ffn = Ffn(torch.randn(N, D), torch.randn(K, D), torch.ones(K), None, None, torch.randn(K, D), None, torch.ones(N))
    total, second = moments(ffn, products=products, activation="relu")
    assert torch.equal(total, torch.full((K,), 0.0 if N == 0 else 3.0).double())
    assert torch.equal(second, torch.full_like(second, 0.0 if N == 0 else 3.0).triu() if products else total)


def test_autograd_sees_that_moments_changed() -> None:
    total, second = torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    products = [torch.ones(5, dtype=torch.float64, requires_grad=True) * sums for sums in (total, second)]
    kernels.activation_moments(total, second, FFN.x, *FFN.weights[:4], activation="gelu")
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


# ------------------------------------------------------------------------------------------------ loss, quantisation


def test_alignment_loss_is_the_mean_of_method_md() -> None:
    torch.manual_seed(2)
    student, teacher = torch.randn(30, 7, dtype=torch.float64), torch.randn(30, 7, dtype=torch.float64)
    mask = torch.rand(30) < 0.5
    valid = teacher[mask]
    expected = (((valid - student[mask]) / valid.square().mean().sqrt()) ** 2).mean()
    torch.testing.assert_close(kernels.alignment_loss(student, teacher, mask), expected)
    assert torch.autograd.gradcheck(lambda s: kernels.alignment_loss(s, teacher, mask), student.requires_grad_())


def test_alignment_loss_of_no_valid_token_is_zero_with_a_zero_gradient() -> None:
    student = torch.randn(4, 3, requires_grad=True)
    loss = kernels.alignment_loss(student, torch.randn(4, 3), torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert student.grad.count_nonzero() == 0


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), max_size=200),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_quantisation_error_is_at_most_half_a_step(values: list[float], block: int, dtype: torch.dtype) -> None:
    x = torch.tensor(values).to(dtype)
    q, scales = kernels.quantize_blocks(x, block)
    total = torch.zeros(len(x))
    kernels.dequantize_accumulate(total, q, scales, 1.0, block)
    steps = scales.double().repeat_interleave(block)[: len(x)]
    # The quotient and the product are rounded to float32, the scale of the least values to a multiple of 2^-149.
    assert ((total.double() - x.double()).abs() <= 0.50002 * steps + 127 * 2.0**-149).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_quantisation_has_the_bits_of_its_reference(dtype: torch.dtype) -> None:
    for x in (torch.randn(1000), torch.arange(-127, 128) / 2, torch.randn(300) * 1e-38, torch.zeros(5)):
        actual, expected = (f(x.to(dtype), 64) for f in (kernels.quantize_blocks, reference.quantize_blocks))
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert kernels.quantize_blocks(x)[0].tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_a_running_sum_with_gaps_is_changed_in_place() -> None:
    q, scales = kernels.quantize_blocks(torch.arange(100.0), 16)
    contiguous, memory = torch.zeros(100), torch.zeros(100, 3)
    kernels.dequantize_accumulate(contiguous, q, scales, 0.5, 16)
    kernels.dequantize_accumulate(memory[:, 1], q, scales, 0.5, 16)
    assert torch.equal(memory[:, 1], contiguous)
    assert memory[:, ::2].count_nonzero() == 0


def test_autograd_sees_that_a_running_sum_changed() -> None:
    total = torch.ones(4)
    product = torch.ones(4, requires_grad=True) * total
    kernels.dequantize_accumulate(total, *kernels.quantize_blocks(torch.ones(4)), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.skipif(not has_kernel(), reason="fedpft._C is not built")
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    student, teacher, mask = torch.randn(1501, 67).to(dtype), torch.randn(1501, 67).to(dtype), torch.rand(1501) < 0.7

    def everything() -> list[Tensor]:
        s = student.detach().requires_grad_()
        loss = kernels.alignment_loss(s, teacher, mask)
        q, scales = kernels.quantize_blocks(teacher.view(-1), 100)
        total = torch.ones(q.numel())
        kernels.dequantize_accumulate(total, q, scales, 0.3, 100)
        counts = kernels.inactivity_count(teacher, mask, "gelu", 0.05)
        saliency = kernels.neuron_saliency([student], [], [teacher.t()])
        return [loss.detach(), torch.autograd.grad(loss, s)[0], q, scales, total, counts, saliency]

    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_values_too_small_for_a_scale_become_zero() -> None:
    total = torch.ones(8)
    kernels.dequantize_accumulate(total, *kernels.quantize_blocks(torch.full((8,), 2.0**-149)), 1.0)
    assert total.tolist() == [1.0] * 8


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_quantisation_does_not_hide_values_that_are_not_finite(value: float) -> None:
    x = torch.ones(512)
    x[300] = value
    total = torch.zeros(512)
    kernels.dequantize_accumulate(total, *kernels.quantize_blocks(x), 0.5)
    assert total[:256].isfinite().all()
    assert not total[300].isfinite()


# ------------------------------------------------------------------------------------------------ arguments

FFN = make_ffn(6, 4, 5, dtype=torch.float32)
GATED = make_ffn(6, 4, 5, dtype=torch.float32, gated=True)
UNGATED = (*GATED.updated(2)[:2], None, None, GATED.w_out[:2])
LONG = torch.ones(6, 4, dtype=torch.int64)


def call_sub_ffn(ffn: Ffn = FFN, x: Any = None, **changes: Any) -> Any:
    names = ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")
    weights = [changes.pop(name, getattr(ffn, name)) for name in names]
    return kernels.sub_ffn(ffn.x if x is None else x, *weights, activation="gelu", **changes)


def call_train(ffn: Ffn = FFN, updated: Any = None, **changes: Any) -> Any:
    names = ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")
    weights = [changes.get(name, getattr(ffn, name)) for name in names]
    return kernels.sub_ffn_train(ffn.x, *weights, *(updated or ffn.updated(2)), activation="gelu")


WRONG: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    ("w_in: needs", ValueError, lambda: kernels.neuron_saliency([], [], [])),
    ("w_gate: has 2", ValueError, lambda: kernels.neuron_saliency([FFN.w_in], [FFN.w_in] * 2, [FFN.w_in.t()])),
    ("w_out[0]: has shape (5, 4)", ValueError, lambda: kernels.neuron_saliency([FFN.w_in], [], [FFN.w_in])),
    ("w_out[0]: is torch.float64", TypeError, lambda: kernels.neuron_saliency([FFN.w_in], [], [FFN.w_in.t().double()])),
    ("w_in[0]: must be of", TypeError, lambda: kernels.neuron_saliency([LONG], [], [LONG.t()])),
    ("z: has shape (6,)", ValueError, lambda: kernels.inactivity_count(torch.ones(6), None, "gelu", 0.1)),
    ("mask: must be of torch.bool", TypeError, lambda: kernels.inactivity_count(FFN.x, torch.ones(6), "gelu", 0.1)),
    ("activation: must be one of relu", ValueError, lambda: kernels.inactivity_count(FFN.x, None, "tanh", 0.1)),
    ("eps: must be at least 0", ValueError, lambda: kernels.inactivity_count(FFN.x, None, "gelu", math.nan)),
    ("x: must be a tensor, not list", TypeError, lambda: call_sub_ffn(x=[1.0])),
    ("x: has shape ()", ValueError, lambda: call_sub_ffn(x=torch.tensor(1.0))),
    ("w_in: has shape (5, 4), must be (any, 3)", ValueError, lambda: call_sub_ffn(x=torch.ones(2, 3))),
    ("b_in: is torch.float16", TypeError, lambda: call_sub_ffn(b_in=torch.ones(5).half())),
    ("b_gate: given without w_gate", ValueError, lambda: call_sub_ffn(b_gate=torch.ones(5))),
    ("w_gate: has shape", ValueError, lambda: call_sub_ffn(GATED, w_gate=torch.ones(4, 4))),
    ("w_out: has shape (4, 5)", ValueError, lambda: call_sub_ffn(w_out=FFN.w_out.t())),
    ("b_out: has shape (5,)", ValueError, lambda: call_sub_ffn(b_out=torch.ones(5))),
    ("mask: has shape (5,)", ValueError, lambda: call_sub_ffn(mask=FFN.mask[:5], count=True)),
    ("neurons: must be a", TypeError, lambda: call_sub_ffn(neurons=[1, 2])),
    ("w_out: requires a gradient", ValueError, lambda: call_sub_ffn(w_out=FFN.w_out.detach().requires_grad_())),
    ("w_in: requires a gradient", ValueError, lambda: call_train(w_in=FFN.w_in.detach().requires_grad_())),
    (
        "updated_gate: must be given",
        ValueError,
        lambda: call_train(GATED, UNGATED),
    ),
    ("updated_b_in: has shape", ValueError, lambda: call_train(updated=(*FFN.updated(2)[:1], *FFN.updated(3)[1:]))),
    ("updated_out: must be a view", ValueError, lambda: call_train(updated=(*FFN.updated(2)[:4], FFN.w_out[:2] + 0))),
    ("total: must be of torch.float64", TypeError, lambda: call_moments(total=torch.zeros(5))),
    ("second: has shape (5, 4), must be (5, 5)", ValueError, lambda: call_moments(second=WIDE[:, :4])),
    ("second: must be contiguous", ValueError, lambda: call_moments(second=WIDE.t()[:5])),
    ("w_in: has shape (5, 4), must be (any, 3)", ValueError, lambda: call_moments(x=torch.ones(2, 3))),
    ("shares: has shape (5,)", ValueError, lambda: call_moments(shares=torch.ones(5))),
    ("mask: has shape (5,)", ValueError, lambda: call_moments(mask=FFN.mask[:5])),
    ("x: requires a gradient", ValueError, lambda: call_moments(x=FFN.x.detach().requires_grad_())),
    ("teacher: has shape", ValueError, lambda: kernels.alignment_loss(FFN.x, FFN.x[:3], None)),
    ("teacher: requires a", ValueError, lambda: kernels.alignment_loss(FFN.x, torch.ones(6, 4).requires_grad_(), None)),
    ("block: must be a positive", ValueError, lambda: kernels.quantize_blocks(torch.ones(4), 0)),
    ("total: must be of torch.float32", TypeError, lambda: accumulate(torch.ones(4).double())),
    ("scales: has shape (2,)", ValueError, lambda: accumulate(torch.ones(4), scales=torch.ones(2))),
]


WIDE = torch.zeros(5, 5, dtype=torch.float64)


def call_moments(total: Any = None, second: Any = WIDE, x: Any = None, **options: Any) -> None:
    total, x = WIDE[0] if total is None else total, FFN.x if x is None else x
    kernels.activation_moments(total, second, x, *FFN.weights[:4], activation="gelu", **options)


def accumulate(total: Tensor, scales: Tensor | None = None) -> None:
    q, found = kernels.quantize_blocks(torch.ones(4))
    kernels.dequantize_accumulate(total, q, found if scales is None else scales, 1.0)


@pytest.mark.parametrize(("text", "error", "call"), WRONG, ids=[text for text, _, _ in WRONG])
def test_a_wrong_argument_is_named(text: str, error: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(text)


@pytest.mark.skipif(not has_kernel(), reason="fedpft._C is not built")
def test_a_direct_call_cannot_read_past_a_tensor() -> None:
    ops, x, one = torch.ops.fedpft, FFN.x, torch.ones(())
    short = (x, FFN.w_in, torch.ones(3), None, None, FFN.w_out, None, None, None, "gelu", 0.0, False, False, False)
    q, scales = kernels.quantize_blocks(torch.ones(6), 2)
    wrong: dict[str, Callable[[], Any]] = {
        "b_in": lambda: ops.sub_ffn(*short),
        "teacher": lambda: ops.alignment_loss(x, x[:5], None),
        "inverse_energy": lambda: ops.alignment_loss_backward(one, one.double(), x, x, None),
        "mask": lambda: ops.inactivity_count(x, torch.ones(5, dtype=torch.bool), "relu", 0.0),
        "q": lambda: ops.dequantize_accumulate(torch.ones(7), q, scales, 1.0, 2),
        "scales": lambda: ops.dequantize_accumulate(torch.ones(6), q, scales[:2], 1.0, 2),
        "second": lambda: ops.activation_moments(WIDE[0], WIDE[:4], x, FFN.w_in, *[None] * 5, "gelu"),
        "shares": lambda: ops.activation_moments(WIDE[0], WIDE, x, FFN.w_in, *[None] * 3, one[None], None, "gelu"),
    }
    for name, call in wrong.items():
        with pytest.raises(RuntimeError, match=f"{name} has a wrong shape"):
            call()
