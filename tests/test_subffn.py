"""The SubFFN module against torch's own linear layers: forward, training some neurons, counting inactivity."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft.model.subffn import NEURON_PARAMETERS, InactivityCounter, SubExperts, SubFFN

# D hidden size, K neurons
D, K = 6, 10
plain_and_gated = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def parameters(gated: bool, *, biases: bool = True, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"w_in": (K, D), "w_out": (K, D)}
    shapes |= {"w_gate": (K, D)} if gated else {}
    shapes |= {"b_in": (K,), "b_out": (D,)} if biases else {}
    shapes |= {"b_gate": (K,)} if biases and gated else {}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def by_hand(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    z = F.linear(x, p["w_in"], p.get("b_in"))
    hidden = F.silu(F.linear(x, p["w_gate"], p.get("b_gate"))) * z if "w_gate" in p else F.silu(z)
    return F.linear(hidden, p["w_out"].t(), p.get("b_out"))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """To float32 rounding of sums of some dozen terms, in units of the whole tensor."""
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@plain_and_gated
@pytest.mark.parametrize("biases", [True, False])
def test_forward_is_the_formula(gated: bool, biases: bool) -> None:
    p, x = parameters(gated, biases=biases), torch.randn(2, 3, D)
    assert_close(SubFFN(p, "silu")(x), by_hand(x, p))


@plain_and_gated
def test_gradient_reaches_the_input_and_no_weight(gated: bool) -> None:
    p = parameters(gated)
    ffn, x = SubFFN(p, "silu"), torch.randn(4, D, requires_grad=True)
    ffn(x).square().sum().backward()
    assert not any(parameter.requires_grad for parameter in ffn.parameters())
    x_by_hand = x.detach().clone().requires_grad_()
    by_hand(x_by_hand, p).square().sum().backward()
    assert_close(x.grad, x_by_hand.grad)


def test_module_owns_its_weights() -> None:
    p = parameters(False)
    ffn = SubFFN(p, "silu")
    p["w_in"].zero_()
    assert ffn.w_in.abs().sum() > 0


@plain_and_gated
@pytest.mark.parametrize("neurons", [[7, 2, 3], [], None], ids=["three", "none", "all"])
def test_training_neurons_have_the_gradients_of_a_dense_ffn(gated: bool, neurons: list[int] | None) -> None:
    p, x = parameters(gated), torch.randn(4, D)
    dense = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    by_hand(x, dense).square().sum().backward()
    rows = torch.arange(K) if neurons is None else torch.tensor(sorted(neurons), dtype=torch.int64)
    ffn = SubFFN(p, "silu")
    with ffn.training_neurons(None if neurons is None else torch.tensor(neurons, dtype=torch.int64)) as trained:
        y = ffn(x)
        assert_close(y, by_hand(x, p))
        gradients = torch.autograd.grad(y.square().sum(), trained)
    wanted = [dense[name].grad[rows] for name in NEURON_PARAMETERS if name in p] + [dense["b_out"].grad]
    assert len(gradients) == len(wanted)
    for found, expected in zip(gradients, wanted, strict=True):
        assert_close(found, expected)


@plain_and_gated
def test_only_the_chosen_neurons_and_the_output_bias_change(gated: bool) -> None:
    p = parameters(gated)
    ffn, chosen = SubFFN(p, "silu"), torch.tensor([1, 8, 4])
    with ffn.training_neurons(chosen) as trained:
        for parameter in trained:
            assert parameter.requires_grad
            parameter.data += 1.0
    others = [row for row in range(K) if row not in chosen.tolist()]
    for name in NEURON_PARAMETERS:
        if name in p:
            now = getattr(ffn, name)
            assert torch.equal(now[others], p[name][others])
            assert torch.equal(now[chosen], p[name][chosen] + 1.0)
    assert torch.equal(ffn.b_out, p["b_out"] + 1.0)
    assert not any(parameter.requires_grad for parameter in ffn.parameters())


def test_weights_come_back_in_their_own_order_after_an_error() -> None:
    p = parameters(False)
    ffn = SubFFN(p, "silu")
    with pytest.raises(KeyError), ffn.training_neurons(torch.tensor([9, 0])):
        raise KeyError
    for name in p:
        assert torch.equal(getattr(ffn, name), p[name])
    x = torch.randn(3, D)
    assert_close(ffn(x), by_hand(x, p))


@pytest.mark.parametrize("neurons", [None, torch.tensor([5, 2])], ids=["all", "two"])
def test_product_is_w_out_times_w_in_while_training_and_at_rest(neurons: Tensor | None) -> None:
    p = parameters(False)
    ffn = SubFFN(p, "silu")
    wanted = p["w_out"].t() @ p["w_in"]
    assert_close(ffn.product(), wanted)
    dense = {name: p[name].clone().requires_grad_() for name in ("w_in", "w_out")}
    (dense["w_out"].t() @ dense["w_in"]).square().sum().backward()
    rows = torch.arange(K) if neurons is None else neurons.sort().values
    with ffn.training_neurons(neurons) as (updated_in, _, updated_out, _):
        assert_close(ffn.product(), wanted)
        found = torch.autograd.grad(ffn.product().square().sum(), [updated_in, updated_out])
    assert_close(found[0], dense["w_in"].grad[rows])
    assert_close(found[1], dense["w_out"].grad[rows])


@plain_and_gated
def test_counter_counts_the_tokens_at_which_a_neuron_does_nothing(gated: bool) -> None:
    p, x = parameters(gated), torch.randn(2, 7, D)
    ffn, eps = SubFFN(p, "silu"), 0.2
    ffn.inactivity = InactivityCounter(eps, torch.zeros(K, dtype=torch.int64))
    y = ffn(x)
    ffn.inactivity.mask = mask = torch.arange(14) % 3 > 0
    ffn(x)
    first = "gate" if gated else "in"
    inactive = F.silu(F.linear(x.flatten(0, 1), p[f"w_{first}"], p[f"b_{first}"])).abs() <= eps
    assert torch.equal(ffn.inactivity.counts, inactive.sum(0) + inactive[mask].sum(0))
    assert 0 < int(ffn.inactivity.counts.sum()) < 2 * 14 * K
    assert ffn.inactivity.tokens == 14 + int(mask.sum())
    assert_close(y, by_hand(x, p))


def test_counting_does_not_hide_the_gradient_of_the_input() -> None:
    p = parameters(False)
    ffn, x = SubFFN(p, "silu"), torch.randn(3, D, requires_grad=True)
    (wanted,) = torch.autograd.grad(ffn(x).sum(), x)
    ffn.inactivity = InactivityCounter(0.1, torch.zeros(K, dtype=torch.int64))
    (found,) = torch.autograd.grad(ffn(x).sum(), x)
    assert torch.equal(found, wanted)


def test_state_dict_holds_the_parameters_and_nothing_else() -> None:
    assert set(SubFFN(parameters(True), "silu").state_dict()) == {*NEURON_PARAMETERS, "b_out"}
    assert isinstance(SubFFN(parameters(False), "silu").w_in, nn.Parameter)


# --- with LoRA ---

R, S = 3, 1.5  # rank, scale
every_gate = pytest.mark.parametrize("gate", ["plain", "gated", "one projection"])


def with_lora(gate: str, dtype: torch.dtype = torch.float64) -> tuple[SubFFN, dict[str, Tensor]]:
    """A SubFFN with LoRA in which nothing is 0, and its weights."""
    p = {name: tensor.to(dtype) for name, tensor in parameters(gate != "plain").items()}
    ffn = SubFFN(p, "silu")
    ffn.attach_lora(R, S, one_gated=gate == "one projection")
    ffn.to(dtype)
    generator = torch.Generator().manual_seed(2)
    for parameter in ffn.lora_B.values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return ffn, p


def summed(p: dict[str, Tensor], lora: dict[str, Tensor], gate: str) -> dict[str, Tensor]:
    """W + s B A, with A and B by the names that they have in the module."""
    b_in, a_in = lora["lora_B.w_in"], lora["lora_A.w_in"]
    found = p | {"w_in": p["w_in"] + S * b_in[-K:] @ a_in}
    if gate == "one projection":
        found["w_gate"] = p["w_gate"] + S * b_in[:K] @ a_in
    elif gate == "gated":
        found["w_gate"] = p["w_gate"] + S * lora["lora_B.w_gate"] @ lora["lora_A.w_gate"]
    return found | {"w_out": p["w_out"] + S * (lora["lora_B.w_out"] @ lora["lora_A.w_out"]).t()}


def lora_of(ffn: SubFFN) -> dict[str, Tensor]:
    return {name: p for name, p in ffn.named_parameters() if name.startswith("lora_")}


@every_gate
def test_lora_and_input_have_the_gradients_of_plain_torch(gate: str) -> None:
    ffn, p = with_lora(gate)
    lora, x = lora_of(ffn), torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in lora.items()}
    assert shapes["lora_A.w_in"] == (R, D)
    assert shapes["lora_B.w_in"] == (2 * K if gate == "one projection" else K, R)
    assert (shapes["lora_A.w_out"], shapes["lora_B.w_out"]) == ((R, K), (D, R))
    assert ("lora_A.w_gate" in shapes) == (gate == "gated")
    y, wanted = ffn(x), by_hand(x, summed(p, lora, gate))
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn(y.shape, dtype=torch.float64)
    leaves = [x, *lora.values()]
    found, expected = (torch.autograd.grad((out * weight).sum(), leaves) for out in (y, wanted))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
        assert one.any()
    with torch.no_grad():
        torch.testing.assert_close(ffn(x), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ffn.values(x) @ summed(p, lora, gate)["w_out"] + p["b_out"], wanted)


@every_gate
@pytest.mark.parametrize("training", [True, False])
def test_neurons_are_counted_with_lora(gate: str, training: bool) -> None:
    ffn, p = with_lora(gate)
    x, eps, mask = torch.randn(2, 7, D, dtype=torch.float64), 0.2, torch.arange(14) % 3 > 0
    whole = summed(p, lora_of(ffn), gate)
    ffn.inactivity = InactivityCounter(eps, torch.zeros(K, dtype=torch.int64))
    with torch.set_grad_enabled(training):
        assert ffn(x).requires_grad == training
        ffn.inactivity.mask = mask
        ffn(x)
    wanted, plain = (
        (F.silu(F.linear(x.flatten(0, 1), w["w_in" if gate == "plain" else "w_gate"], b)).abs() <= eps).long()
        for w, b in ((w, w["b_in" if gate == "plain" else "b_gate"]) for w in (whole, p))
    )
    assert torch.equal(ffn.inactivity.counts, wanted.sum(0) + wanted[mask].sum(0))
    assert not torch.equal(wanted, plain)
    assert ffn.inactivity.tokens == 14 + int(mask.sum())


@every_gate
@pytest.mark.parametrize("neurons", [[7, 2, 3], [], None], ids=["three", "none", "all"])
def test_neurons_train_under_lora_that_stays(gate: str, neurons: list[int] | None) -> None:
    ffn, p = with_lora(gate)
    ffn.requires_grad_(False)
    lora, x = lora_of(ffn), torch.randn(4, D, dtype=torch.float64)
    kept = {name: tensor.clone() for name, tensor in lora.items()}
    dense = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    wanted = by_hand(x, summed(dense, lora, gate))
    wanted.square().sum().backward()
    rows = torch.arange(K) if neurons is None else torch.tensor(sorted(neurons), dtype=torch.int64)
    with ffn.training_neurons(None if neurons is None else torch.tensor(neurons, dtype=torch.int64)) as trained:
        y = ffn(x)
        torch.testing.assert_close(y, wanted)
        gradients = torch.autograd.grad(y.square().sum(), trained)
        torch.testing.assert_close(ffn.product(), p["w_out"].t() @ p["w_in"])
        for parameter in trained:
            parameter.data += 1.0
        moved = {name: tensor.clone() for name, tensor in p.items()}
        for name in NEURON_PARAMETERS:
            if name in p:
                moved[name][rows] += 1.0
        moved["b_out"] += 1.0
        torch.testing.assert_close(ffn(x), by_hand(x, summed(moved, lora, gate)))
    expected = [dense[name].grad[rows] for name in NEURON_PARAMETERS if name in p] + [dense["b_out"].grad]
    for found, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, other)
    for name in p:
        assert torch.equal(getattr(ffn, name), moved[name]), "the weights without LoRA"
    for name, tensor in lora_of(ffn).items():
        assert torch.equal(tensor, kept[name])
    torch.testing.assert_close(ffn(x), by_hand(x, summed(moved, lora, gate)))


def test_lora_that_changes_shows_in_the_next_pass() -> None:
    ffn, p = with_lora("gated")
    x = torch.randn(3, D, dtype=torch.float64)
    with torch.no_grad():
        before = ffn(x)
        ffn.lora_B["w_out"].zero_()
        ffn.w_in[0] += 1.0
        now = ffn(x)
    p = p | {"w_in": ffn.w_in}
    torch.testing.assert_close(now, by_hand(x, summed(p, lora_of(ffn), "gated")))
    assert not torch.allclose(now, before)


# --- a mixture of experts ---

E, N = 3, 11  # experts, tokens


def mixture(*, spare: int | None = None) -> tuple[SubExperts, list[dict[str, Tensor]], tuple[Tensor, Tensor, Tensor]]:
    """Experts, their weights, and what a router hands them: (N, D) tokens, (N, 2) experts of each, (N, 2) shares.

    spare: an expert that no token is sent to.
    """
    weights = [parameters(True, biases=False, seed=seed) for seed in range(E)]
    generator = torch.Generator().manual_seed(9)
    asked = [expert for expert in range(E) if expert != spare]
    draws = torch.rand(N, len(asked), generator=generator).argsort(1)[:, :2]
    routed = torch.randn(N, D, generator=generator), torch.tensor(asked)[draws], torch.rand(N, 2, generator=generator)
    return SubExperts([SubFFN(p, "silu") for p in weights]), weights, routed


def mixture_by_hand(weights: list[dict[str, Tensor]], x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Every expert for every token; the share of those that were not asked is 0."""
    share = torch.zeros(N, E).scatter(1, chosen, shares)
    return sum(share[:, e, None] * by_hand(x, p) for e, p in enumerate(weights))


@pytest.mark.parametrize("spare", [None, 1])
def test_experts_answer_for_the_tokens_that_the_router_sends_them(spare: int | None) -> None:
    experts, weights, (x, chosen, shares) = mixture(spare=spare)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, shares)] for _ in range(2))
    y, wanted = experts(ours[0], chosen, ours[1]), mixture_by_hand(weights, theirs[0], chosen, theirs[1])
    assert_close(y, wanted)
    for found, expected in zip(
        torch.autograd.grad(y.square().sum(), ours), torch.autograd.grad(wanted.square().sum(), theirs), strict=True
    ):
        assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_that_answers_in_float32_leaves_the_type_to_the_experts(dtype: torch.dtype) -> None:
    ffn, _, (x, chosen, shares) = mixture()
    wanted = ffn(x, chosen, shares)
    y = ffn.to(dtype)(x.to(dtype), chosen, shares.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y.to(wanted.dtype), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("masked", [False, True])
def test_neuron_of_an_expert_is_inactive_where_its_expert_is_not_asked(masked: bool) -> None:
    experts, weights, routed = mixture(spare=2)
    x, chosen, _ = routed
    eps, mask = 0.2, torch.arange(N) % 4 > 0
    counter = experts.inactivity = InactivityCounter(eps, torch.zeros(E * K, dtype=torch.int64))
    counter.mask = mask if masked else None
    y = experts(*routed)
    real = mask if masked else torch.ones(N, dtype=torch.bool)
    wanted = []
    for e, p in enumerate(weights):
        inactive = F.silu(F.linear(x, p["w_gate"])).abs() <= eps
        wanted.append((inactive | ~(chosen == e).any(1)[:, None])[real].sum(0))
    assert torch.equal(counter.counts, torch.cat(wanted))
    assert counter.tokens == int(real.sum())
    assert 0 < int(counter.counts[:K].sum()) < K * counter.tokens
    assert_close(y, mixture_by_hand(weights, *routed))


@pytest.mark.parametrize("neurons", [[1, K + 4, K + 2, 3 * K - 1], [], None], ids=["four", "none", "all"])
def test_neurons_of_experts_train_by_their_place_in_the_row_of_all(neurons: list[int] | None) -> None:
    experts, weights, routed = mixture()
    dense = [{name: t.clone().requires_grad_() for name, t in p.items()} for p in weights]
    mixture_by_hand(dense, *routed).square().sum().backward()
    chosen = list(range(E * K)) if neurons is None else sorted(neurons)
    before = torch.cat([p["w_out"] for p in weights])
    with experts.training_neurons(None if neurons is None else torch.tensor(neurons, dtype=torch.int64)) as trained:
        y = experts(*routed)
        assert_close(y, mixture_by_hand(weights, *routed))
        gradients = torch.autograd.grad(y.square().sum(), trained)
        for parameter in trained:
            parameter.data += 1.0
    names = ("w_in", "w_gate", "w_out")
    found = [torch.cat(gradients[kind :: len(names)]) for kind in range(len(names))]
    for gradient, name in zip(found, names, strict=True):
        assert_close(gradient, torch.cat([p[name].grad for p in dense])[chosen])
    after = torch.cat([expert.w_out for expert in experts.experts])
    assert (after != before).any(1).nonzero().flatten().tolist() == chosen


def test_place_of_a_neuron_is_its_expert_and_its_row_there() -> None:
    experts, _, _ = mixture()
    assert experts.neurons == E * K
    places = experts.places(torch.tensor([0, 9, K, 2 * K + 3]))
    assert {name: rows.tolist() for name, rows in places.items()} == {
        ".experts.0": [0, 9],
        ".experts.1": [0],
        ".experts.2": [3],
    }


def test_values_times_output_weights_is_the_output_of_a_mixture() -> None:
    experts, weights, routed = mixture(spare=0)
    values = experts.values(*routed)
    assert not values[:, :K].any()
    assert_close(values @ torch.cat([p["w_out"] for p in weights]), mixture_by_hand(weights, *routed))
    change = torch.randn(E * K, D)
    experts.add_to_output(change, torch.zeros(D))
    assert_close(experts(*routed), mixture_by_hand(weights, *routed) + values @ change)


def test_product_of_a_mixture_is_that_of_each_expert() -> None:
    experts, weights, _ = mixture()
    assert_close(experts.product(), torch.stack([p["w_out"].t() @ p["w_in"] for p in weights]))
