"""The frozen linear layer with LoRA against torch's own operators: values, gradients, dropout, and what is kept."""

import pytest
import torch
from devices import each_device
from torch import Tensor
from torch.nn import functional as F

from fedpft.model.lora import lora_linear

# N tokens, D input features, E output features, R rank; N * D is no multiple of 4
N, D, E, R = 7, 5, 6, 2
SCALE = 1.5
dropouts = pytest.mark.parametrize("dropout", [0.0, 0.4])
biases = pytest.mark.parametrize("with_bias", [True, False])


def tensors(dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
    shapes = {"x": (N, D), "weight": (E, D), "bias": (E,), "a": (R, D), "b": (E, R)}
    needed = ("x", "a", "b")
    return {n: torch.randn(s, dtype=dtype, device=device, requires_grad=n in needed) for n, s in shapes.items()}


def mask(dropout: float, device: str = "cpu") -> Tensor:
    """The mask that seed 1 draws: the identity shows it, with A = B = I and no weight."""
    torch.manual_seed(1)
    eye, ones = (t.to(device, torch.float64) for t in (torch.eye(D), torch.ones(N, D)))
    return lora_linear(ones, torch.zeros_like(eye), None, eye, eye, scale=1.0, dropout=dropout)


@each_device
@dropouts
@biases
def test_values_are_the_formula(dropout: float, with_bias: bool, device: str) -> None:
    t = tensors(device=device)
    bias = t["bias"] if with_bias else None
    kept = mask(dropout, device)
    torch.manual_seed(1)
    found = lora_linear(t["x"], t["weight"], bias, t["a"], t["b"], scale=SCALE, dropout=dropout)
    wanted = F.linear(t["x"], t["weight"], bias) + SCALE * F.linear(F.linear(t["x"] * kept, t["a"]), t["b"])
    torch.testing.assert_close(found, wanted)


@each_device
@dropouts
@biases
def test_gradients(dropout: float, with_bias: bool, device: str) -> None:
    t = tensors(device=device)
    bias = t["bias"] if with_bias else None

    def seeded(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        return lora_linear(x, t["weight"], bias, a, b, scale=SCALE, dropout=dropout)

    assert torch.autograd.gradcheck(seeded, (t["x"], t["a"], t["b"]))


def test_transposed_weight_and_batch_dimensions() -> None:
    """As gpt2 holds its weights, and as every model holds its tokens."""
    t = tensors()
    weight = t["weight"].t().contiguous().t()
    x = t["x"].detach().repeat(3, 1).view(3, N, D).requires_grad_()
    found = lora_linear(x, weight, t["bias"], t["a"], t["b"], scale=SCALE, dropout=0.0)
    wanted = F.linear(x, t["weight"] + SCALE * t["b"] @ t["a"], t["bias"])
    torch.testing.assert_close(found, wanted)
    grads = (torch.autograd.grad(y.square().sum(), (x, t["a"], t["b"])) for y in (found, wanted))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_stays_its_own(dtype: torch.dtype, device: str) -> None:
    t = tensors(dtype, device)
    y = lora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], scale=SCALE, dropout=0.4)
    y.float().square().sum().backward()
    assert {y.dtype, *(t[name].grad.dtype for name in ("x", "a", "b"))} == {dtype}


@each_device
@pytest.mark.parametrize("dropout", [1e-3, 0.1, 0.5, 0.999])
def test_mask_drops_with_the_given_probability_and_keeps_the_mean(dropout: float, device: str) -> None:
    count = 1 << 20
    x, one = (torch.ones(rows, 1, dtype=torch.float64, device=device) for rows in (count, 1))
    y = lora_linear(x, 0 * one, None, one, one, scale=1.0, dropout=dropout)
    share = float((y == 0).double().mean())
    deviation = (dropout * (1 - dropout) / count) ** 0.5
    assert abs(share - dropout) < 5 * deviation + 2**-17  # of the draw, and of the rounded probability
    assert len(y.unique()) == 2
    assert float(y.max()) == pytest.approx(1 / (1 - dropout), rel=2**-17 / (1 - dropout) * 1.01)


def test_masks_of_two_layers_differ_and_a_seed_fixes_them() -> None:
    first = mask(0.5)
    assert torch.equal(first, mask(0.5))
    eye, ones = torch.eye(D, dtype=torch.float64), torch.ones(N, D, dtype=torch.float64)
    assert not torch.equal(first, lora_linear(ones, 0 * eye, None, eye, eye, scale=1.0, dropout=0.5))


def test_kept_for_backward_are_the_input_itself_a_byte_mask_and_little_else() -> None:
    t, kept = tensors(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], scale=SCALE, dropout=0.4)
    given = {t[name].data_ptr() for name in ("x", "weight", "a", "b")}
    assert {n.data_ptr() for n in kept} >= given
    new = {tuple(tensor.shape): tensor.dtype for tensor in kept if tensor.data_ptr() not in given}
    assert new == {(N, D): torch.int8, (N, R): torch.float32}


def test_an_a_without_gradient_costs_nothing_and_changes_no_other() -> None:
    t, kept, found = tensors(torch.float32), [], []
    for trains in (True, False):
        t["a"].requires_grad_(trains)
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda n: kept.append(n.data_ptr()) or n, lambda n: n):
            y = lora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], scale=SCALE, dropout=0.4)
        assert (t["x"].data_ptr() in kept) == trains
        found.append(torch.autograd.grad(y.square().sum(), (t["x"], t["b"])))
        kept.clear()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
