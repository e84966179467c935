"""The closed-form start of the distillation against an ordinary least-squares solver."""

import copy
from typing import Any

import pytest
import tiny
import torch
from conftest import ModelFactory
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft.config import AdapterSection
from fedpft.data.batches import evaluation_batches, sample
from fedpft.data.text import TextDataset
from fedpft.errors import DataError, ModelError
from fedpft.model.adapters import Probes, attach
from fedpft.model.architectures import ARCHITECTURES, layer_outputs, layers_of
from fedpft.model.subffn import sub_ffns
from fedpft.proxy.closed_form import CANDIDATES, fit_output_projections
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import Selection, select

K = 24
SEEN_BEFORE_A_NORM = {"bert", "roberta", "xlm-roberta", "electra", "mpnet", "distilbert", "deberta-v2"}  # post-norm
SEEN_BEFORE_A_NORM |= {"gemma2", "gemma3_text"}  # one on the FFN's output alone
every_kind = pytest.mark.parametrize("model_type", tiny.KINDS)


FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
}


def pair(make_fm: ModelFactory, model_type: str) -> tuple[nn.Module, nn.Module, Selection]:
    fm = make_fm(model_type)
    attach(fm, AdapterSection(rank=2), seed=0)
    selection = select(fm, tiny.by_weights(neurons=K))
    return cut(fm, selection), fm, selection


def seen_at(model: nn.Module, model_type: str, layer: int, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Input of a layer's FFN, and the residual stream after it, or its output if that is normalised before it is added.

    Found without the code under test, at the tokens that are there.
    """
    names, seen, module = tiny.NAMES[model_type], {}, layers_of(model)[layer]
    hooks = [
        module.get_submodule(ARCHITECTURES[model_type].ffn).register_forward_pre_hook(
            lambda _m, x: seen.update(x=x[0])
        ),
        module.get_submodule(names.output_norm or names.norm).register_forward_pre_hook(
            lambda _m, x: seen.update(sum=x[0])
        ),
        module.register_forward_hook(lambda _m, _x, y: seen.update(out=y[0] if isinstance(y, tuple) else y)),
    ]
    tiny.logits(model, inputs)
    for hook in hooks:
        hook.remove()
    stream = seen["sum"] if model_type in SEEN_BEFORE_A_NORM else seen["out"]
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(stream.shape[:2]) > 0
    return seen["x"].view(stream.shape)[real], stream[real]


@pytest.mark.parametrize("model_type", [name for name in tiny.KINDS if name != "mixtral"])  # all its FFNs are mixtures
def test_fit_is_the_least_squares_solution(model_type: str, make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, model_type)
    public = tiny.dataset(model_type, 40, labelled=False)
    inputs, path = public.batch(torch.arange(40)), list(sub_ffns(proxy))[2]
    ffn = proxy.get_submodule(path)
    x, ours = seen_at(proxy, model_type, 2, inputs)
    _, theirs = seen_at(fm, model_type, 2, inputs)

    z = F.linear(x, ffn.w_in, ffn.b_in).double()
    function = FUNCTIONS[ffn.activation]
    values = function(z) if ffn.w_gate is None else function(F.linear(x, ffn.w_gate).double()) * z
    scale = fm.dinov2.encoder.layer[2].layer_scale2.lambda1.detach() if model_type == "dinov2" else 1.0
    design = values if ffn.b_out is None else torch.cat([values, torch.ones(len(values), 1)], dim=1)
    wanted = ((theirs - ours) / scale).double()
    solution = torch.linalg.lstsq(design, wanted, driver="gelsd").solution  # a neuron may be silent: no full rank
    before = [parameter.detach().clone() for parameter in (ffn.w_out, ffn.b_out) if parameter is not None]

    fit_output_projections(proxy, fm, ((2, 2),), public, samples=40, batch=7, seed=0, ridge=1e-12)
    after = [parameter.detach() for parameter in (ffn.w_out, ffn.b_out) if parameter is not None]
    change = torch.cat([(new - old).double().view(-1, new.shape[-1]) for new, old in zip(after, before, strict=True)])
    # what it adds for these tokens; of weights that are as good the two ways may find others
    torch.testing.assert_close(design @ change, design @ solution, rtol=1e-3, atol=1e-3)


@every_kind
def test_fit_brings_the_residual_streams_together(model_type: str, make_fm: ModelFactory) -> None:
    proxy, fm, selection = pair(make_fm, model_type)
    unseen = tiny.dataset(model_type, 30, labelled=False, seed=9).batch(torch.arange(30))

    def error(layer: int) -> float:
        ours, theirs = (seen_at(model, model_type, layer, unseen)[1] for model in (proxy, fm))
        return float((ours - theirs).norm() / theirs.norm())

    before = error(1), error(2)
    public = tiny.dataset(model_type, 200, labelled=False)
    fit_output_projections(proxy, fm, selection.matched, public, samples=200, batch=50, seed=0)
    assert error(1) < 0.95 * before[0]
    assert error(2) < 0.95 * before[1]


@every_kind
@pytest.mark.parametrize("others", [{}, {"probes": 0.5, "ridge": "held_out"}], ids=["plain", "probes"])
def test_fit_changes_output_projections_and_biases_of_compressed_layers_only(
    others: dict[str, Any], model_type: str, make_fm: ModelFactory
) -> None:
    proxy, fm, selection = pair(make_fm, model_type)
    before, fm_before = tiny.snapshot(proxy), tiny.snapshot(fm)
    flags = {name: parameter.requires_grad for name, parameter in proxy.named_parameters()}
    public = tiny.dataset(model_type, 20)
    fit_output_projections(proxy, fm, selection.matched, public, samples=20, batch=8, seed=0, **others)
    ffns = list(sub_ffns(proxy).items())[1:3]
    wanted = {
        f"{part}.{name}"
        for path, ffn in ffns
        for part, inner in tiny.parts(path, ffn)
        for name in ("w_out", "b_out")
        if getattr(inner, name) is not None
    }
    assert tiny.changed(before, proxy.state_dict()) == wanted
    assert tiny.changed(fm_before, fm.state_dict()) == set()
    assert {name: parameter.requires_grad for name, parameter in proxy.named_parameters()} == flags


def test_fit_on_fewer_tokens_than_neurons_stays_sane(make_fm: ModelFactory) -> None:
    proxy, fm, selection = pair(make_fm, "bert")
    before = tiny.snapshot(proxy)
    fit_output_projections(proxy, fm, selection.matched, tiny.dataset("bert", 1), samples=1, batch=1, seed=0)
    for path in list(sub_ffns(proxy))[1:3]:
        weights = proxy.state_dict()[f"{path}.w_out"]
        assert bool(torch.isfinite(weights).all())
        assert weights.norm() < 3 * before[f"{path}.w_out"].norm()


def test_fit_uses_a_sample_of_all_and_nothing_else(make_fm: ModelFactory) -> None:
    every, chosen = tiny.dataset("gpt2", 30, labelled=False), sample(30, 10, 0, "closed form")
    assert int(chosen.max()) >= 10, "the first stand for nobody"
    batch = every.batch(chosen)
    lengths = batch["attention_mask"].sum(dim=1)
    drawn = TextDataset(batch["input_ids"][batch["attention_mask"].bool()].int(), lengths, tiny.PADDING, None)
    states = []
    for public in (every, drawn):
        proxy, fm, selection = pair(make_fm, "gpt2")
        fit_output_projections(proxy, fm, selection.matched, public, samples=10, batch=4, seed=0)
        states.append(proxy.state_dict())
    assert tiny.changed(*states) == set()


def test_neurons_that_are_all_silent_stay_as_they_are(make_fm: ModelFactory) -> None:
    proxy, fm, selection = pair(make_fm, "bert")
    ffn = list(sub_ffns(proxy).values())[1]
    ffn.activation = "relu"
    with torch.no_grad():
        ffn.b_in.fill_(-1e6)
    before = ffn.w_out.clone()
    fit_output_projections(
        proxy, fm, selection.matched, tiny.dataset("bert", 20, labelled=False), samples=20, batch=8, seed=0
    )
    assert torch.equal(ffn.w_out, before)
    assert bool(ffn.b_out.isfinite().all())


def test_nothing_is_fitted_where_layers_were_dropped_and_outputs_are_normalised(make_fm: ModelFactory) -> None:
    states = []
    for model_type in ("gemma2", "llama"):
        fm = make_fm(model_type)
        selection = select(fm, tiny.by_weights(keep="layers", layers=3))
        proxy = cut(fm, selection)
        before = tiny.snapshot(proxy)
        public = tiny.dataset(model_type, 20, labelled=False)
        fit_output_projections(proxy, fm, selection.matched, public, samples=20, batch=8, seed=0)
        states.append(tiny.changed(before, proxy.state_dict()))
    assert states == [set(), {"model.layers.1.mlp.w_out"}]


# --- what it was before it had these keys ---


@pytest.mark.parametrize("model_type", ["vit", "dinov2"])  # no padding: rows are multiplied as they are looked at
def test_fit_without_probes_has_the_bits_of_the_plain_regression(model_type: str, make_fm: ModelFactory) -> None:
    proxy, fm, selection = pair(make_fm, model_type)
    plain, public = copy.deepcopy(proxy), tiny.dataset(model_type, 20)
    fit_output_projections(proxy, fm, selection.matched, public, samples=20, batch=8, seed=0)
    for layer, _ in selection.matched:
        ffn, gram, cross = list(sub_ffns(plain).values())[layer], torch.zeros(K + 1, K + 1).double(), 0.0
        scale = fm.dinov2.encoder.layer[layer].layer_scale2.lambda1.detach() if model_type == "dinov2" else 1.0
        for _, inputs in evaluation_batches(public, 8):
            x, ours = seen_at(plain, model_type, layer, inputs)
            _, theirs = seen_at(fm, model_type, layer, inputs)
            with torch.no_grad():
                values = ffn.values(x)
            design = torch.cat([values, torch.ones(len(values), 1)], dim=1).double()
            gram, cross = gram + design.t() @ design, cross + design.t() @ ((theirs - ours) / scale).double()
        penalty = 1e-3 * gram.diagonal()[:-1].mean() * torch.ones(K + 1).double()
        penalty[-1] = 0.0
        solution = torch.linalg.solve(gram + penalty.diag(), cross)
        ffn.add_to_output(solution[:-1], solution[-1])
    assert tiny.changed(plain.state_dict(), proxy.state_dict()) == set()


# --- probes ---


@every_kind
def test_proxy_that_is_whole_stays_as_it_is(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    attach(fm, AdapterSection(rank=2), seed=0)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons="all")))
    before, public = tiny.snapshot(proxy), tiny.dataset(model_type, 60)
    fit_output_projections(proxy, fm, ((1, 1), (2, 2)), public, samples=60, batch=20, seed=0, probes=1.0)
    for name in tiny.changed(before, proxy.state_dict()):
        torch.testing.assert_close(proxy.state_dict()[name], before[name], rtol=0.0, atol=1e-3)


def changes(model: nn.Module, probes: Probes, seed: int, inputs: dict[str, Tensor]) -> Tensor:
    """Of the hidden states after layer 2 under a probe."""
    with torch.no_grad():
        (before,) = layer_outputs(model, [2], inputs)
        with probes.drawn(seed):
            (after,) = layer_outputs(model, [2], inputs)
    return (after - before)[inputs["attention_mask"].bool()] if "attention_mask" in inputs else after - before


def jacobian_error(proxy: nn.Module, fm: nn.Module, inputs: dict[str, Tensor]) -> float:
    """How far the proxy's hidden states change otherwise than the FM's, over probes that no fit has seen."""
    errors, probes = [], Probes(proxy, fm)
    for seed in range(1000, 1008):
        ours, theirs = (changes(model, probes, seed, inputs) for model in (proxy, fm))
        errors.append(float((ours - theirs).norm() / theirs.norm()))
    return sum(errors) / len(errors)


def test_probes_bring_the_jacobian_nearer_to_the_fms(make_fm: ModelFactory) -> None:
    unseen = tiny.dataset("gpt2", 60, labelled=False, seed=9).batch(torch.arange(60))
    public, errors = tiny.dataset("gpt2", 200, labelled=False), []
    for weight, seed in ((0.0, 0), (3.0, 0), (3.0, 1)):
        proxy, fm, selection = pair(make_fm, "gpt2")
        fit_output_projections(proxy, fm, selection.matched, public, samples=200, batch=10, seed=seed, probes=weight)
        errors.append(jacobian_error(proxy, fm, unseen))
    assert max(errors[1:]) < 0.95 * errors[0]


# --- the ridge ---


def taken_ridge(make_fm: ModelFactory, samples: int, batch: int) -> float:
    """The ridge that `held_out` has taken: with which all samples give the same weights."""
    public, fitted = tiny.dataset("bert", samples, labelled=False), {}
    for ridge in ("held_out", *CANDIDATES):
        proxy, fm, _ = pair(make_fm, "bert")
        fit_output_projections(proxy, fm, ((1, 1),), public, samples=samples, batch=batch, seed=0, ridge=ridge)
        fitted[ridge] = list(sub_ffns(proxy).values())[1].w_out.detach()
    distances = {ridge: float((fitted[ridge] - fitted["held_out"]).norm()) for ridge in CANDIDATES}
    nearest = min(distances, key=distances.__getitem__)
    assert distances[nearest] < 1e-3 * fitted["held_out"].norm()
    return nearest


def test_held_out_ridge_is_large_where_tokens_are_few_and_small_where_they_are_many(make_fm: ModelFactory) -> None:
    assert taken_ridge(make_fm, samples=3, batch=1) >= 0.1  # some 20 tokens for 24 neurons
    assert taken_ridge(make_fm, samples=300, batch=30) <= 1e-2


def test_a_ridge_cannot_be_held_out_of_one_sample(make_fm: ModelFactory) -> None:
    proxy, fm, selection = pair(make_fm, "bert")
    with pytest.raises(DataError, match="closed_form_ridge: held_out"):
        fit_output_projections(
            proxy, fm, selection.matched, tiny.dataset("bert", 1), samples=8, batch=8, seed=0, ridge="held_out"
        )


def test_few_samples_are_held_out_in_smaller_batches(make_fm: ModelFactory) -> None:
    proxy, fm, selection = pair(make_fm, "bert")
    before = tiny.snapshot(proxy)
    fit_output_projections(
        proxy, fm, selection.matched, tiny.dataset("bert", 8), samples=8, batch=8, seed=0, ridge="held_out"
    )
    assert tiny.changed(before, proxy.state_dict())


@pytest.mark.parametrize("ridge", [1e-3, "held_out"])
def test_a_model_that_is_not_finite_is_named_and_nothing_is_written(make_fm: ModelFactory, ridge: Any) -> None:
    proxy, fm, selection = pair(make_fm, "bert")
    with torch.no_grad():
        layers_of(fm)[1].get_parameter("output.dense.bias")[0] = torch.inf
    before = tiny.snapshot(proxy)
    with pytest.raises(ModelError, match=r"closed form of the proxy's layer 1: .* not finite"):
        fit_output_projections(
            proxy, fm, selection.matched, tiny.dataset("bert", 20), samples=20, batch=5, seed=0, ridge=ridge
        )
    assert tiny.changed(before, proxy.state_dict()) == set()


def test_refit_of_no_neuron_is_one_of_the_bias(make_fm: ModelFactory) -> None:
    proxy, fm, selection = pair(make_fm, "bert")
    before, public = tiny.snapshot(proxy), tiny.dataset("bert", 20)
    none = {1: torch.tensor([], dtype=torch.int64), 2: torch.tensor([], dtype=torch.int64)}
    fit_output_projections(proxy, fm, selection.matched, public, samples=20, batch=5, seed=0, updated=none)
    changed = tiny.changed(before, proxy.state_dict())
    assert {name.rpartition(".")[2] for name in changed} == {"b_out"}
