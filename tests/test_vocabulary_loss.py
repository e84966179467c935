"""The loss over a vocabulary: equal to the plain one over all logits, which it never holds."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedpft.tasks.vocabulary_loss import NOT_LEARNED, linear_cross_entropy, linear_divergence, token_losses

N, D, V = 37, 24, 301
# Of the value, and of the gradient's norm. In bfloat16 (float16) a gradient is rounded once a chunk and once in
# backward, the plain one once or twice elsewhere: some 2^-8 (2^-11).
TOLERANCES = {torch.float32: (1e-6, 2e-6), torch.bfloat16: (1e-5, 4e-3), torch.float16: (1e-5, 1e-3)}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.3},
    "all": {"bias": True, "softcap": 4.0, "scale": 1.7},
}


def case(dtype: torch.dtype, form: dict[str, Any], tokens: int = N) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype)
    targets = torch.randint(V, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.3] = NOT_LEARNED
    named = {**form, "bias": torch.randn(V, generator=generator).to(dtype)} if "bias" in form else form
    return hidden, weight, targets, named


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    logits = F.linear(hidden, weight, bias).float() * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, **named: Any) -> Tensor:
    return F.cross_entropy(logits_of(hidden, weight, **named), targets, ignore_index=NOT_LEARNED, reduction="sum")


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_value_and_gradient_are_those_of_the_plain_loss(dtype: torch.dtype, form: str, chunk: int | None) -> None:
    hidden, weight, targets, named = case(dtype, FORMS[form])
    ours = linear_cross_entropy(hidden, weight, targets, chunk=chunk, **named)
    assert (ours.dtype, ours.shape) == (torch.float32, ())
    (gradient,) = torch.autograd.grad(ours * 0.25, hidden)
    theirs = plain(hidden, weight, targets, **named)
    (wanted,) = torch.autograd.grad(theirs * 0.25, hidden)
    of_value, of_gradient = TOLERANCES[dtype]
    assert ours.item() == pytest.approx(theirs.item(), rel=of_value)
    assert gradient.dtype == dtype
    assert distance(gradient, wanted) <= of_gradient
    assert not gradient[targets == NOT_LEARNED].any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_divergence_and_its_gradient_are_those_over_all_logits(
    dtype: torch.dtype, form: str, chunk: int | None
) -> None:
    hidden, weight, targets, named = case(dtype, FORMS[form])
    teacher = (hidden.detach().float() + torch.randn(N, D)).to(dtype)
    ours = linear_divergence(hidden, weight, targets, teacher=teacher, chunk=chunk, **named)
    assert ours.dtype == torch.float32
    (ours / 3).backward()
    gradient = hidden.grad
    hidden.grad = None
    there = targets != NOT_LEARNED
    student, wanted = (logits_of(each, weight, **named)[there].log_softmax(-1) for each in (hidden, teacher))
    theirs = F.kl_div(student, wanted, reduction="sum", log_target=True)
    (theirs / 3).backward()
    value, slope = TOLERANCES[dtype]
    assert distance(ours, theirs) < 10 * value, "a difference of two sums"
    assert distance(gradient, hidden.grad) < 2 * slope
    assert torch.equal(gradient[~there], torch.zeros_like(gradient[~there]))
    assert abs(float(linear_divergence(hidden, weight, targets, teacher=hidden.detach(), **named))) < 1e-4


def test_a_batch_counts_as_its_tokens() -> None:
    hidden, weight, targets, _ = case(torch.float32, {}, tokens=36)
    flat = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(flat, linear_cross_entropy(hidden.view(4, 9, D), weight, targets.view(4, 9)))
    assert (token_losses(hidden.view(4, 9, D), weight, targets.view(4, 9))[0].shape) == (4, 9)


def test_where_nothing_is_learned_the_loss_is_nothing() -> None:
    hidden, weight, targets, _ = case(torch.float32, {})
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, NOT_LEARNED))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets, _ = case(torch.float32, {})
    with torch.no_grad():
        hidden.mul_(1e4)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == pytest.approx(plain(hidden, weight, targets).item(), rel=1e-6)
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_many_tokens_in_bfloat16_are_added_up_in_float32() -> None:
    hidden, weight, targets, _ = case(torch.bfloat16, {}, tokens=5000)
    with torch.no_grad():
        exact = F.cross_entropy(F.linear(hidden, weight).double(), targets, reduction="sum")
        assert linear_cross_entropy(hidden, weight, targets, chunk=3).item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_head_that_trains_is_refused() -> None:
    hidden, weight, targets, _ = case(torch.float32, {})
    weight.requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(ValueError, match="frozen"):
        linear_divergence(hidden, weight, targets, teacher=hidden.detach())
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_losses_of_single_tokens_are_those_of_the_plain_loss(form: str, chunk: int | None) -> None:
    hidden, weight, targets, named = case(torch.float32, FORMS[form])
    losses, right = token_losses(hidden, weight, targets, chunk=chunk, **named)
    logits = logits_of(hidden, weight, **named)
    wanted = F.cross_entropy(logits, targets, reduction="none", ignore_index=NOT_LEARNED)
    torch.testing.assert_close(losses, wanted.detach(), rtol=1e-5, atol=1e-6)
    assert not losses.requires_grad
    assert torch.equal(right, logits.argmax(-1) == targets)
    targets = logits.argmax(-1).where(targets != NOT_LEARNED, NOT_LEARNED)
    _, right = token_losses(hidden, weight, targets, chunk=chunk, **named)
    assert torch.equal(right, targets != NOT_LEARNED)


def test_single_tokens_where_nothing_is_learned() -> None:
    hidden, weight, targets, _ = case(torch.float32, {})
    losses, right = token_losses(hidden, weight, torch.full_like(targets, NOT_LEARNED))
    assert not losses.any()
    assert not right.any()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return made


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_all_logits_are_never_held(softcap: float | None) -> None:
    hidden, weight, targets, _ = case(torch.float32, {})
    with Largest() as plainly:
        plain(hidden, weight, targets, softcap=softcap).backward()
    assert plainly.elements == N * V
    with Largest() as ours:
        linear_cross_entropy(hidden, weight, targets, softcap=softcap, chunk=4).backward()
        token_losses(hidden, weight, targets, softcap=softcap, chunk=4)
        linear_divergence(hidden, weight, targets, teacher=hidden.detach(), softcap=softcap, chunk=4).backward()
    assert ours.elements == max(4 * V, V * D)  # weight.t() counts as one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemma_2_costs_what_transformers_says(dtype: torch.dtype) -> None:
    """Its logits are capped, and its head is tied to the embedding."""
    config = transformers.Gemma2Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to(dtype)
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(1))
    theirs = model(input_ids=tokens, labels=tokens).loss
    hidden = model.base_model(input_ids=tokens).last_hidden_state
    ours = linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, tokens[:, 1:], softcap=0.5)
    assert ours.item() / 16 == pytest.approx(theirs.item(), rel=1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.slow
def test_the_bench_measures_what_it_compares(tmp_path: Path) -> None:
    import json

    path = tmp_path / "vocabulary.json"
    command = [sys.executable, "-m", "bench.vocabulary", "--quick", "--threads", "1", "--json", str(path)]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True, timeout=240
    )
    found = json.loads(path.read_text(encoding="utf-8"))
    (row,) = found["rows"]
    assert {"date", "commit", "machine", "versions"} <= found.keys()
    assert row["candidates"]["ours"]["peak_bytes"] < 0.5 * row["candidates"]["plain"]["peak_bytes"]
    assert row["candidates"]["ours"]["loss_apart"] < 1e-5
    assert "| float32 | 512 | 64 | 50,000 |" in run.stdout
