"""How much neurons matter, and which of them stay, against what the FM's own modules are seen to pass on."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ModelFactory
from torch import Tensor, nn
from torch.nn import functional

from fedpft.config import ProxySection
from fedpft.data.batches import sample
from fedpft.data.text import TextDataset
from fedpft.errors import ModelError
from fedpft.model.architectures import ARCHITECTURES, layers_of
from fedpft.proxy import importance
from fedpft.proxy.bundle import Proxy, load_proxy, save_bundle
from fedpft.proxy.cut import cut, parameter_counts
from fedpft.proxy.holdings import check_holdings
from fedpft.proxy.importance import Ranking, by_saliency, eliminate
from fedpft.proxy.selection import Selection, load_selection, save_selection, select, select_for_size

K = 16
POST_NORM = {"bert", "roberta", "xlm-roberta", "electra", "mpnet", "distilbert", "deberta-v2"}
WAYS = ("weights", "variance", "leverage", "random")
every_type = pytest.mark.parametrize("model_type", tiny.CONFIGS)


def passed_on(fm: nn.Module, model_type: str, place: int, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """What a layer's neurons pass on, (N, F) of each expert, and the stream S (N, D); at the tokens that are there."""
    names, seen, layer = tiny.NAMES[model_type], {}, layers_of(fm)[place]
    mixture = place in tiny.MIXTURES.get(model_type, ())
    before_norm = names.output_norm or (names.norm if model_type in POST_NORM else None)
    watched = {"values": layer.get_submodule("mlp.experts" if mixture else names.w_out[0])}
    watched |= {} if before_norm is None else {"norm": layer.get_submodule(before_norm)}
    hooks = [
        module.register_forward_pre_hook(lambda _m, given, name=name: seen.update({name: given}))
        for name, module in watched.items()
    ]
    hooks.append(layer.register_forward_hook(lambda _m, _x, y: seen.update(out=y[0] if isinstance(y, tuple) else y)))
    tiny.logits(fm, inputs)
    for hook in hooks:
        hook.remove()
    stream = seen["out"] if before_norm is None else seen["norm"][0]
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(stream.shape[:2]) > 0
    if not mixture:
        return [seen["values"][0].view(*stream.shape[:2], -1)[real].double()], stream[real].double()
    x, chosen, shares = (value[real.flatten()] for value in seen["values"])
    found = []
    for expert, ffn in enumerate(tiny.ffns(fm.state_dict(), model_type, place)):
        share = (shares * (chosen == expert)).sum(1, keepdim=True)
        found.append((share * functional.silu(x @ ffn["w_gate"].t()) * (x @ ffn["w_in"].t())).double())
    return found, stream[real].double()


def second_moments(values: list[Tensor], *, about_mean: bool) -> list[Tensor]:
    """A + r I of each expert."""
    found = []
    for a in values:
        a = a - a.mean(0) if about_mean else a
        found.append(a.t() @ a / len(a))
    ridge = importance.RIDGE * torch.stack([a.diagonal() for a in found]).mean()
    return [a + ridge * torch.eye(len(a)) for a in found]


def outputs(fm: nn.Module, model_type: str, place: int) -> list[Tensor]:
    """Each expert's output weights (F, D), as they come into the stream."""
    path = ARCHITECTURES[model_type].scale
    scale = 1.0 if path is None else layers_of(fm)[place].get_parameter(path).detach()
    return [(ffn["w_out"] * scale).double() for ffn in tiny.ffns(fm.state_dict(), model_type, place)]


def error_without(a: Tensor, w_out: Tensor, kept: Tensor) -> float:
    """tr((W - V)^T A (W - V)) of the best V that is zero but for the kept neurons, by an ordinary solver."""
    left = w_out.clone()
    left[kept] -= torch.linalg.solve(a[kept][:, kept], a[kept] @ w_out)
    return float(torch.trace(left.t() @ a @ left))


def chosen(fm: nn.Module, model_type: str, samples: int = 40, **settings: Any) -> Selection:
    public = tiny.dataset(model_type, samples, labelled=False)
    return select(fm, ProxySection(**{"neurons": K, "importance_samples": samples, **settings}), public, seed=3)


def everything(model_type: str, samples: int = 40) -> dict[str, Tensor]:
    return tiny.dataset(model_type, samples, labelled=False).batch(torch.arange(samples))


# --- variance ---


@every_type
def test_variance_is_that_of_what_a_neuron_adds_to_the_stream(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    selection = chosen(fm, model_type, importance="variance")
    for place in (1, 2):
        values, stream = passed_on(fm, model_type, place, everything(model_type))
        spreads = second_moments(values, about_mean=True)
        weights = outputs(fm, model_type, place)
        wanted = torch.stack([a.diagonal() * w.square().sum(1) for a, w in zip(spreads, weights, strict=True)])
        wanted = (wanted / stream.square().sum(1).mean()).sqrt()
        found = selection.saliency[place].double().view(wanted.shape)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.max()))
        assert torch.equal(selection.neurons[place], by_saliency(selection.saliency[place]).kept(K))


def test_variance_finds_the_one_neuron_that_varies_though_its_weights_are_small(make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    ffn = tiny.ffn(fm.state_dict(), "bert", 1)
    for name in ("w_in", "w_out"):
        ffn[name][5] *= 0.5
    others = torch.arange(tiny.F) != 5
    ffn["b_in"][others] = -50.0  # under GELU: silent
    assert chosen(fm, "bert", importance="variance", neurons=1).neurons[1].tolist() == [5]
    assert 5 not in chosen(fm, "bert", importance="weights", neurons=tiny.F - 1).neurons[1].tolist()


# --- leverage ---


def correlated(neurons: int, rank: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A + r I and W of an FFN whose neurons say much the same."""
    a = torch.randn(tokens, rank, dtype=torch.float64) @ torch.randn(rank, neurons, dtype=torch.float64)
    a += 0.3 * torch.randn(tokens, neurons, dtype=torch.float64)
    (second,) = second_moments([a], about_mean=True)
    return second, torch.randn(neurons, 24, dtype=torch.float64)


@pytest.mark.parametrize("neurons", [1, 7, 40, 200])
def test_costs_of_an_elimination_add_up_to_the_least_squares_error(neurons: int) -> None:
    a, w_out = correlated(neurons, 6)
    costs, order = eliminate(a, w_out)
    assert sorted(order.tolist()) == list(range(neurons))
    for gone in {1, neurons // 3, neurons // 2, neurons - 1, neurons} - {0}:
        kept = order[gone:].sort().values
        assert float(costs[order[:gone]].sum()) == pytest.approx(error_without(a, w_out, kept), rel=1e-9)


def test_first_to_go_is_the_neuron_that_the_others_make_up_for_best() -> None:
    a, w_out = correlated(12, 4)
    errors = [error_without(a, w_out, torch.tensor([k for k in range(12) if k != j])) for j in range(12)]
    assert int(eliminate(a, w_out)[1][0]) == min(range(12), key=errors.__getitem__)


def test_elimination_in_turns_is_hardly_worse_than_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    a, w_out = correlated(200, 6)
    left = []
    for turn in (importance.TURN, 10**6):
        monkeypatch.setattr(importance, "TURN", turn)
        costs, order = eliminate(a, w_out)
        left.append(float(costs[order[:150]].sum()))
    assert left[0] < 1.02 * left[1]


def test_of_duplicates_one_goes_and_the_other_stays() -> None:
    values = torch.randn(500, 64, dtype=torch.float64)
    (a,) = second_moments([values.repeat(1, 2)], about_mean=True)
    w_out = 0.1 + torch.rand(64, 24, dtype=torch.float64)
    order = eliminate(a, w_out.repeat(2, 1))[1]
    assert sorted((order[:64] % 64).tolist()) == list(range(64))


def test_a_large_neuron_that_has_a_twin_goes_before_a_small_one_that_has_none() -> None:
    values, w_out = torch.randn(500, 40, dtype=torch.float64), torch.ones(40, 24, dtype=torch.float64)
    values[:, 30], w_out[[11, 30]], w_out[5] = values[:, 11], 3.0, 0.5
    (a,) = second_moments([values], about_mean=True)
    order = eliminate(a, w_out)[1].tolist()
    assert {order[0], order[-1]} == {11, 30}
    assert order[1] == 5


@every_type
def test_leverage_leaves_less_error_than_other_choices_and_says_how_much(
    model_type: str, make_fm: ModelFactory
) -> None:
    fm = make_fm(model_type)
    selections = {way: chosen(fm, model_type, importance=way) for way in WAYS}
    for place in (1, 2):
        values, stream = passed_on(fm, model_type, place, everything(model_type))
        parts, weights = tiny.ffns(fm.state_dict(), model_type, place), outputs(fm, model_type, place)
        spreads = second_moments(values, about_mean="b_out" in parts[0])

        errors = {}
        for way, selection in selections.items():
            kept = selection.neurons[place].view(len(parts), -1)
            errors[way] = sum(error_without(a, w, k) for a, w, k in zip(spreads, weights, kept, strict=True))
        assert errors["leverage"] < 0.97 * min(errors["weights"], errors["random"]), errors
        assert errors["leverage"] <= 1.01 * errors["variance"], errors
        squares = selections["leverage"].saliency[place].double().square()
        lost = squares.sum() - squares.gather(-1, selections["leverage"].neurons[place]).sum()
        assert float(lost * stream.square().sum(1).mean()) == pytest.approx(errors["leverage"], rel=1e-2)


def test_elimination_on_one_token_stays_sane(make_fm: ModelFactory) -> None:
    selection = chosen(make_fm("bert"), "bert", samples=1, importance="leverage")
    assert all(bool(saliency.isfinite().all()) for saliency in selection.saliency)
    assert [len(set(neurons.tolist())) for neurons in selection.neurons] == [tiny.F, K, K, tiny.F]


# --- all of them ---


def test_experts_that_no_token_asked_keep_their_largest_output_weights(make_fm: ModelFactory) -> None:
    fm = make_fm("mixtral")
    weight = tiny.ffns(fm.state_dict(), "mixtral", 1)[0]["w_out"]
    layers_of(fm)[1].get_submodule("mlp.experts").register_forward_pre_hook(
        lambda _m, given: (given[0], 1 + given[1] % 2, given[2])  # 1 or 2, never 0
    )
    for way in ("variance", "leverage"):
        selection = chosen(fm, "mixtral", importance=way)
        wanted = by_saliency(weight.norm(dim=1)).kept(K)
        assert torch.equal(selection.neurons[1][0], wanted)
        assert float(selection.saliency[1][0].max()) < float(selection.saliency[1][1:].max())


@pytest.mark.parametrize("way", ["variance", "leverage"])
def test_measures_take_a_sample_of_all_and_nothing_else(way: str, make_fm: ModelFactory) -> None:
    every, drawn = tiny.dataset("gpt2", 30, labelled=False), sample(30, 10, 3, "importance")
    batch = every.batch(drawn)
    tokens = batch["input_ids"][batch["attention_mask"].bool()].int()
    part = TextDataset(tokens, batch["attention_mask"].sum(dim=1), tiny.PADDING, None)
    settings = ProxySection(neurons=K, importance=way, importance_samples=10)
    found = [select(make_fm("gpt2"), settings, public, seed=3).saliency[2] for public in (every, part, every)]
    assert tiny.same_bits(found[0], found[1])
    assert tiny.same_bits(found[0], found[2])
    other = select(make_fm("gpt2"), settings, every, seed=4).saliency[2]
    assert not torch.equal(other, found[0])


def test_chance_is_the_seeds(make_fm: ModelFactory) -> None:
    fm, settings = make_fm("qwen3_moe"), ProxySection(neurons=K, importance="random")
    once, again, other = (select(fm, settings, seed=seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, once.neurons, again.neurons))
    assert [torch.equal(a, b) for a, b in zip(once.neurons, other.neurons, strict=True)] == [True, False, False, True]
    assert not torch.equal(once.neurons[1][0], once.neurons[1][1])
    assert not torch.equal(once.neurons[1][0], once.neurons[2])


@pytest.mark.parametrize("way", ["variance", "leverage"])
def test_measuring_leaves_the_fm_as_it_is(way: str, make_fm: ModelFactory) -> None:
    fm = make_fm("opt")
    before = tiny.snapshot(fm)

    def modules() -> list[tuple[type, int]]:
        hooks = ("_forward_pre_hooks", "_forward_hooks")
        return [(type(module), sum(len(getattr(module, kind)) for kind in hooks)) for module in fm.modules()]

    found = modules()
    chosen(fm, "opt", importance=way)
    assert tiny.changed(before, fm.state_dict()) == set()
    assert modules() == found


@pytest.mark.parametrize("way", ["variance", "leverage"])
def test_an_fm_that_is_not_finite_is_named(way: str, make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    tiny.ffn(fm.state_dict(), "bert", 2)["b_in"][3] = torch.inf
    with pytest.raises(ModelError, match="layer 2 of the FM is not finite on public_data"):
        chosen(fm, "bert", importance=way)


def test_measures_without_public_samples_are_a_fault_of_the_caller(make_fm: ModelFactory) -> None:
    with pytest.raises(TypeError, match="needs public samples"):
        select(make_fm("bert"), ProxySection(neurons=K, importance="variance"))


# --- a different K for each layer ---


def test_a_neuron_is_worth_no_less_than_those_that_go_before_it() -> None:
    alone = Ranking(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 1, 2]), unit=2.0)
    assert alone.worth().tolist() == [4.5, 4.5, 2.0]
    experts = Ranking(torch.tensor([[1.0, 3.0], [2.0, 1.0]]), torch.tensor([[1, 0], [0, 1]]))
    assert experts.worth().tolist() == [13.0, 2.0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["bert", "mixtral"])
def test_global_spread_keeps_the_total_and_its_bounds(way: str, model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    for count in (1, 2, K, tiny.F - 1, tiny.F):
        settings = {"importance": way, "spread": "global", "neurons": count, "keep_layers": (3,)}
        counts = [neurons.shape[-1] for neurons in chosen(fm, model_type, samples=8, **settings).neurons]
        assert sum(counts[:3]) == 3 * count
        assert counts[3] == tiny.F
        assert min(counts[:3]) >= count / 4
        assert max(counts[:3]) <= max(count, tiny.F - 1)


def test_a_layer_that_does_little_gets_few_neurons_and_one_that_does_much_gets_more(make_fm: ModelFactory) -> None:
    for way in ("variance", "leverage"):
        fm = make_fm("llama")
        for layer, factor in ((1, 1e-3), (2, 3.0)):
            tiny.ffn(fm.state_dict(), "llama", layer)["w_out"].mul_(factor)
        counts = [len(n) for n in chosen(fm, "llama", importance=way, spread="global", keep_layers=()).neurons]
        assert counts[1] == K / 4
        assert counts[2] == max(counts) > K
        assert sum(counts) == 4 * K


def test_neurons_of_a_layer_go_in_its_own_order_whatever_its_share(make_fm: ModelFactory) -> None:
    fm = make_fm("gpt2")
    selection = chosen(fm, "gpt2", importance="leverage", spread="global")
    for layer in (1, 2):
        count = len(selection.neurons[layer])
        equal = chosen(fm, "gpt2", importance="leverage", neurons=count)
        assert torch.equal(equal.neurons[layer], selection.neurons[layer])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "opt", "gemma2", "qwen3_moe", "mixtral"])
def test_a_proxy_of_unequal_layers_travels(way: str, model_type: str, make_fm: ModelFactory, tmp_path: Path) -> None:
    fm = make_fm(model_type)
    for layer, factor in ((1, 0.5), (2, 2.0)):
        for ffn in tiny.ffns(fm.state_dict(), model_type, layer):
            for name in ("w_in", "w_out"):
                ffn[name].mul_(factor)
    selection = chosen(fm, model_type, samples=8, importance=way, spread="global", keep_layers=(-1,))
    check_holdings(selection, ProxySection())
    assert selection.matched == ((0, 0), (1, 1), (2, 2))
    assert way in ("weights", "random") or len({neurons.shape[-1] for neurons in selection.neurons}) > 2
    model, task = cut(fm, selection), tiny.task_of(model_type)
    assert parameter_counts(model) == parameter_counts(
        cut(fm, select_for_size(fm, ProxySection(neurons=K, importance=way, spread="global", keep_layers=(-1,))))
    )
    save_bundle(Proxy(model, tiny.processor(model_type), task, tiny.LABELS, 12, (0, 1, 2)), tmp_path / "bundle")
    save_selection(selection, tmp_path / "selection.safetensors")
    inputs = tiny.batch(model_type)
    assert tiny.same_bits(tiny.logits(load_proxy(tmp_path / "bundle").model, inputs), tiny.logits(model, inputs))
    assert all(map(torch.equal, load_selection(tmp_path / "selection.safetensors").neurons, selection.neurons))
