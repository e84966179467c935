"""The operators on a GPU: values, tracing, streams, graphs, determinism. Skipped where there is none."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bits import bits
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fedpft import kernels
from fedpft.kernels import reference
from fedpft.kernels.cases import Case, cases, make_ffn
from fedpft.kernels.check import changed_arguments, compare, kernel_of
from fedpft.kernels.schemas import SCHEMAS

pytestmark = pytest.mark.cuda
ALL_CASES = list(cases())
OPERATORS = [name for name in SCHEMAS if name != "mask_update"]  # which is for the CPU only
# A case of each operator that is large enough for several blocks, in float32 and in a type that has fused multiplies.
TYPICAL: dict[tuple[str, torch.dtype], Case] = {}
for _case in ALL_CASES:
    if _case.dtype in (torch.float32, torch.bfloat16) and _case.label.startswith(
        "even-tiles" if _case.operator.startswith("sub_ffn") else "even"
    ):
        TYPICAL.setdefault((_case.operator, _case.dtype), _case)
FUSED = [c for c in TYPICAL.values() if c.operator.startswith("sub_ffn") and c.dtype == torch.bfloat16]


@pytest.fixture(
    params=[*((c, "0") for c in TYPICAL.values()), *((c, "1") for c in FUSED)],
    ids=lambda param: f"{param[0]}{'-fused' if param[1] == '1' else ''}",
)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A typical one; the FFN's in half types also by the fused multiplies, where the library has them."""
    found, fused = request.param
    monkeypatch.setenv("FEDPFT_FUSED_FFN", fused)
    return found


def on_gpu(arguments: tuple[Any, ...], device: str = "cuda") -> tuple[Any, ...]:
    moved: tuple[Any, ...] = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, arguments)
    return moved


def operator(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(torch.ops.fedpft, name).default
    return found


def outputs(name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What the operator returns; for one that works in place, what it made of a copy."""
    changed = changed_arguments(name)
    arguments = tuple(value.clone() if i in changed else value for i, value in enumerate(arguments))
    result = operator(name)(*arguments)
    if result is None:
        return [arguments[i] for i in changed]
    return [t for t in tree_leaves(result) if isinstance(t, Tensor)]


def test_every_operator_has_a_typical_case() -> None:
    assert {name for name, dtype in TYPICAL if dtype == torch.float32} == set(OPERATORS)
    assert set(OPERATORS) - {name for name, dtype in TYPICAL if dtype == torch.bfloat16} == {"dequantize_accumulate"}


@pytest.mark.skipif(not kernels.build_info()["cuda"], reason="built without CUDA kernels")
@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_kernels_are_the_ones_that_run(name: str) -> None:
    assert kernel_of(name, "cuda") == "cuda"


@pytest.mark.parametrize(
    ("name", "fused"),
    [*((n, "0") for n in OPERATORS), *((n, "1") for n in OPERATORS if n.startswith("sub_ffn"))],
)
def test_operator_agrees_with_its_reference(name: str, fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPFT_FUSED_FFN", fused)
    for case in ALL_CASES:
        if case.operator == name:
            error, tolerance = compare(case, "cuda")
            assert error <= tolerance, str(case)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_passes_opcheck(name: str) -> None:
    arguments = on_gpu(TYPICAL[name, torch.float32].arguments)
    if name in ("sub_ffn", "sub_ffn_train", "alignment_loss"):
        arguments = (arguments[0].detach().requires_grad_(), *arguments[1:])
    torch.library.opcheck(operator(name), arguments)


def test_the_same_call_gives_the_same_bits(case: Case) -> None:
    name, arguments = case.operator, on_gpu(case.arguments)
    first = bits(outputs(name, arguments))
    assert all(bits(outputs(name, arguments)) == first for _ in range(4))


def test_a_graph_replays_with_changed_inputs(case: Case) -> None:
    name, arguments = case.operator, on_gpu(case.arguments)
    outputs(name, arguments)  # loads the kernels: not something to do while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(name, arguments)
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert bits(captured) == bits(outputs(name, arguments))


def test_work_is_queued_on_the_current_stream(case: Case) -> None:
    name, arguments = case.operator, on_gpu(case.arguments)
    expected = bits(outputs(name, arguments))
    floating = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.is_floating_point()]
    kept = [tensor.clone() for tensor in floating]
    stream = torch.cuda.Stream()
    for tensor in floating:
        tensor.zero_()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would still find the zeros
        for tensor, values in zip(floating, kept, strict=True):
            tensor.copy_(values)
        results = outputs(name, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    assert bits(results) == expected


def test_a_thread_that_has_not_used_the_gpu_yet_can(case: Case) -> None:
    """As that of torch's backward; the allocator has memory already, so nothing else makes a context current."""
    arguments = on_gpu(case.arguments)
    expected = bits(outputs(case.operator, arguments))
    with ThreadPoolExecutor(1) as pool:
        assert bits(pool.submit(outputs, case.operator, arguments).result()) == expected


def test_a_compiled_step_without_graph_breaks_matches_eager() -> None:
    ffn = make_ffn(136, 64, 72, dtype=torch.float32, gated=True)
    x, *weights, mask = on_gpu((ffn.x, *ffn.weights, ffn.mask))
    teacher = torch.randn_like(x)

    def loss(x: Tensor) -> Tensor:
        y, counts = kernels.sub_ffn(x, *weights, activation="gelu", count=True, eps=0.1, mask=mask)
        saliency = kernels.neuron_saliency([weights[0]], [], [weights[4].t()])
        q, scales = kernels.quantize_blocks(y.detach().reshape(-1))
        found = kernels.inactivity_count(y, mask, "silu", 0.1).sum() + counts.sum() + q.sum()
        return kernels.alignment_loss(y, teacher, mask) + found + saliency.sum() + scales.sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = x.detach().requires_grad_()
        value = function(leaf)
        gradients.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_tensor_on_another_device_is_named() -> None:
    ffn = make_ffn(8, 8, 8, dtype=torch.float32)
    x, *weights = on_gpu((ffn.x, *ffn.weights))
    w_in = [weights[0]]
    q, scales = kernels.quantize_blocks(x[0])
    with pytest.raises(TypeError, match=r"w_out\[0\]: is torch.float32 on cpu"):
        kernels.neuron_saliency(w_in, [], [ffn.w_out.t()])
    with pytest.raises(TypeError, match="mask: is on cpu"):
        kernels.inactivity_count(x, ffn.mask, "relu", 0.0)
    with pytest.raises(TypeError, match=r"teacher: is torch\.float32 on cpu"):
        kernels.alignment_loss(x, ffn.x, None)
    with pytest.raises(RuntimeError, match="scales has a wrong shape, dtype or device"):
        torch.ops.fedpft.dequantize_accumulate(x[0].clone(), q, scales.cpu(), 1.0, 256)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_work_runs_on_the_device_of_its_tensors(case: Case) -> None:
    name, arguments = case.operator, case.arguments
    torch.cuda.set_device(0)
    results = outputs(name, on_gpu(arguments, "cuda:1"))
    assert {result.device.index for result in results} == {1}
    assert torch.cuda.current_device() == 0
    assert bits(results) == bits(outputs(name, on_gpu(arguments, "cuda:0")))


def test_equal_neurons_have_equal_saliency() -> None:
    row = torch.randn(1, 1000, device="cuda")
    saliency = kernels.neuron_saliency([row.expand(301, -1)], [], [row.t().expand(-1, 301).contiguous()])[0]
    assert saliency.unique().numel() == 1


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0, 2.0**-149, 3e38])
def test_quantisation_of_extreme_values_is_that_of_the_reference(value: float) -> None:
    x = torch.randn(10_000)
    x[777] = value
    q, scales = kernels.quantize_blocks(x.cuda())
    expected_q, expected_scales = reference.quantize_blocks(x, 256)
    torch.testing.assert_close(scales.cpu(), expected_scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(q.cpu(), expected_q)


def needs_gpu_memory(gibibytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory")


@pytest.mark.slow
def test_more_than_2_to_the_31_values_are_quantised() -> None:
    needs_gpu_memory(32)
    n = 2**31 + 1000
    x = torch.randn(n, device="cuda")
    q, scales = kernels.quantize_blocks(x)
    total = torch.zeros_like(x)
    kernels.dequantize_accumulate(total, q, scales, 1.0)
    for part in (slice(0, 10_000), slice(2**31 - 5000, n)):
        steps = scales.repeat_interleave(256)[part] if part.start == 0 else scales[-40:].max()
        assert ((total[part] - x[part]).abs() <= 0.501 * steps).all()
    assert total[-1000:].count_nonzero() > 900


@pytest.mark.slow
def test_hidden_states_of_more_than_2_to_the_31_elements_are_compared() -> None:
    needs_gpu_memory(32)
    N, D = 2**20 + 3, 2048 + 8
    teacher = torch.ones(N, D, dtype=torch.bfloat16, device="cuda")
    student = teacher.clone()
    student[-1] = 3.0
    loss = kernels.alignment_loss(student.requires_grad_(), teacher, None)
    assert loss.item() == pytest.approx(4.0 / N, rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert student.grad[:-1].count_nonzero() == 0
    torch.testing.assert_close(
        student.grad[-1].float(), torch.full((D,), 4.0 / (N * D), device="cuda"), rtol=1e-2, atol=0
    )
    student.grad = None
    counts = kernels.inactivity_count(student.detach(), None, "relu", 1.0)
    assert (counts == N - 1).all()
