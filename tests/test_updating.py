"""Which neurons an alignment updates: each choice picks what it says, from whatever counts it is to look at."""

import pytest
import tiny
import torch
from conftest import ModelFactory
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft import kernels
from fedpft.config import AdapterSection, AlignmentSection
from fedpft.errors import ModelError
from fedpft.model.adapters import attach
from fedpft.model.architectures import layer_outputs
from fedpft.model.subffn import sub_ffns
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import select
from fedpft.proxy.updating import apoz, highest, updated_neurons

K = 24
MATCHED = ((1, 1), (2, 2))


def counts(layer: int, inactive: list[int], tokens: int) -> dict[str, Tensor]:
    return {str(layer): torch.tensor(inactive), f"{layer}.tokens": torch.tensor(tokens)}


def test_least_active_neurons_are_those_of_most_inactive_tokens() -> None:
    assert highest(apoz([counts(3, [5, 9, 0, 7], 10)]), 0.5)[3].tolist() == [1, 3]


def test_silos_counts_are_summed_before_neurons_are_chosen() -> None:
    # By shares the neurons would have 0.9 + 0.1 and 0.2 + 0.5; by sums 9 + 10 and 2 + 50 of 110.
    silos = [counts(1, [9, 2], 10), counts(1, [10, 50], 100)]
    assert highest(apoz(silos), 0.5)[1].tolist() == [1]


def test_every_layer_is_ranked_by_itself_with_its_own_denominator() -> None:
    silos = [
        counts(1, [1, 2, 3], 3) | counts(2, [30, 20, 10], 100),
        counts(1, [3, 0, 0], 3) | counts(2, [0, 0, 5], 100),
    ]
    chosen = highest(apoz(silos), 1 / 3)
    assert {layer: neurons.tolist() for layer, neurons in chosen.items()} == {1: [0], 2: [0]}


@pytest.mark.parametrize(("fraction", "number"), [(0.0, 0), (0.3, 3), (0.55, 6), (1.0, 10)])
def test_fraction_says_how_many_are_updated(fraction: float, number: int) -> None:
    chosen = highest(apoz([counts(1, list(range(10)), 10)]), fraction)[1]
    assert chosen.tolist() == list(range(10 - number, 10))


def test_of_equally_inactive_neurons_the_lower_index_is_updated() -> None:
    assert highest(apoz([counts(1, [4, 4, 4, 4], 5)]), 0.5)[1].tolist() == [0, 1]


def test_layer_without_a_token_does_not_divide_by_0() -> None:
    assert highest(apoz([counts(1, [0, 0], 0)]), 0.5)[1].tolist() == [0]


# --- each choice ---

SAMPLES = 20  # fewer than either choice looks at: all of them count


def pair(make_fm: ModelFactory, model_type: str) -> tuple[nn.Module, nn.Module]:
    """A proxy and its FM, which carry an adapter."""
    fm = make_fm(model_type)
    attach(fm, AdapterSection(rank=2), seed=0)
    return cut(fm, select(fm, tiny.by_weights(neurons=K))), fm


def choose(
    proxy: nn.Module,
    fm: nn.Module,
    model_type: str,
    silos: list[dict[str, Tensor]],
    *,
    round: int = 1,
    updated_fraction: float = 0.5,
    **settings: object,
) -> dict[int, list[int]]:
    section = AlignmentSection(batch=SAMPLES, updated_fraction=updated_fraction, **settings)
    public = tiny.dataset(model_type, SAMPLES, labelled=False)
    found = updated_neurons(proxy, fm, MATCHED, public, section, silos, seed=0, round=round)
    return {layer: neurons.tolist() for layer, neurons in found.items()}


def inactive_by_hand(proxy: nn.Module, layer: int, eps: float) -> Tensor:
    """Of each neuron of a BERT's layer at how many public tokens it is inactive, (K,)."""
    ffn, inputs, seen = list(sub_ffns(proxy).values())[layer], tiny.dataset("bert", SAMPLES).batch(ALL), {}
    hook = ffn.register_forward_pre_hook(lambda _m, x: seen.update(x=x[0]))
    tiny.logits(proxy, {name: value for name, value in inputs.items() if name != "labels"})
    hook.remove()
    active = F.gelu(F.linear(seen["x"], ffn.w_in, ffn.b_in)).abs() > eps
    return (~active)[inputs["attention_mask"].bool()].sum(0)


ALL = torch.arange(SAMPLES)


def test_silos_counts_say_which_are_least_and_which_most_active(make_fm: ModelFactory) -> None:
    proxy, fm = pair(make_fm, "bert")
    silos = [counts(1, list(range(K)), K) | counts(2, list(range(K))[::-1], K)]
    low, high = list(range(K // 2)), list(range(K // 2, K))
    assert choose(proxy, fm, "bert", silos, counts="silos") == {1: high, 2: low}
    assert choose(proxy, fm, "bert", silos, counts="silos", update="active") == {1: low, 2: high}


@pytest.mark.parametrize("update", ["inactive", "active"])
def test_public_counts_are_the_servers_own(update: str, make_fm: ModelFactory) -> None:
    proxy, fm = pair(make_fm, "bert")
    found = choose(proxy, fm, "bert", [], update=update, counts="public", inactive_below=0.1)
    assert found.keys() == {1, 2}
    for layer, neurons in found.items():
        wanted = inactive_by_hand(proxy, layer, 0.1)
        assert len(wanted.unique()) > K // 3
        order = wanted.sort(descending=update == "inactive", stable=True).indices
        assert neurons == order[: K // 2].sort().values.tolist()
    assert all(ffn.inactivity is None for ffn in sub_ffns(proxy).values())


def test_random_neurons_are_others_in_each_round_and_layer(make_fm: ModelFactory) -> None:
    proxy, fm = pair(make_fm, "bert")
    first, again, later = (choose(proxy, fm, "bert", [], update="random", round=number) for number in (1, 1, 2))
    assert first == again
    assert first != later
    assert first[1] != first[2]
    for neurons in first.values():
        assert neurons == sorted(set(neurons))
        assert len(neurons) == K // 2


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2", "vit", "mixtral"])
def test_neurons_of_the_largest_gradient_are_those_of_it_taken_one_by_one(
    model_type: str, make_fm: ModelFactory
) -> None:
    proxy, fm = pair(make_fm, model_type)
    inputs = tiny.dataset(model_type, SAMPLES, labelled=False).batch(ALL)
    before = tiny.snapshot(proxy)
    fraction = 3 / list(sub_ffns(proxy).values())[1].neurons
    found = choose(proxy, fm, model_type, [], update="gradient", updated_fraction=fraction)
    assert tiny.changed(before, tiny.snapshot(proxy)) == set()
    assert all(parameter.grad is None for parameter in proxy.parameters())

    mask = inputs["attention_mask"].flatten().bool() if "attention_mask" in inputs else None
    with torch.no_grad():
        wanted = layer_outputs(fm, [1, 2], inputs)

    def norm(layer: int, neuron: int) -> float:
        ffn = list(sub_ffns(proxy).values())[layer]
        with ffn.training_neurons(torch.tensor([neuron])) as parameters:
            alone = [p for p in parameters if p is not getattr(ffn, "b_out", None) and p.numel()]
            pairs = zip(layer_outputs(proxy, [1, 2], inputs), wanted, strict=True)
            loss = sum(kernels.alignment_loss(h.flatten(0, 1), t.flatten(0, 1), mask) for h, t in pairs)
            gradients = torch.autograd.grad(loss, alone, allow_unused=True)
        return float(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm())

    for layer, neurons in found.items():
        total = list(sub_ffns(proxy).values())[layer].neurons
        norms = {neuron: norm(layer, neuron) for neuron in range(total)}
        assert len(neurons) == 3
        assert set(neurons) == set(sorted(norms, key=lambda neuron: -norms[neuron])[:3])


def test_gradient_that_is_not_finite_chooses_nothing(make_fm: ModelFactory) -> None:
    proxy, fm = pair(make_fm, "bert")
    with torch.no_grad():
        list(sub_ffns(proxy).values())[1].w_out.fill_(float("inf"))
    with pytest.raises(ModelError, match="layer 1: the gradient by which neurons are chosen is not finite"):
        choose(proxy, fm, "bert", [], update="gradient")
