"""Refinement after plug-in: what it brings together, what it leaves alone, and where there is nothing to do."""

import copy

import pytest
import tiny
import torch
from conftest import ModelFactory
from torch import Tensor, nn

from fedpft.config import AdapterSection, PlugInSection
from fedpft.data.batches import EncodedDataset
from fedpft.errors import ModelError
from fedpft.model.adapters import attach, scale_lora, without_lora
from fedpft.model.architectures import layer_outputs, layers_of
from fedpft.proxy.cut import cut
from fedpft.proxy.refinement import change_loss, refine, scale_layers
from fedpft.proxy.selection import select
from fedpft.tasks import TASKS

K = 24
WATCHED = ((1, 1), (2, 2), (3, 3))
LAYERS = tuple(range(tiny.L))
some_kinds = pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "vit", "gemma2", "mixtral"])


def plugged_in(make_fm: ModelFactory, model_type: str, **settings: object) -> tuple[nn.Module, nn.Module]:
    """An FM and its proxy with the same adapter, which does something everywhere."""
    fm = make_fm(model_type)
    attach(fm, AdapterSection(rank=2, alpha=4), seed=0)
    with torch.no_grad():
        for name, parameter in fm.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
    return fm, cut(fm, select(fm, tiny.by_weights(**(settings or {"neurons": K}))))


def data(model_type: str, samples: int = 400, seed: int = 0) -> EncodedDataset:
    return tiny.dataset(model_type, samples, labelled=False, seed=seed)


def held_out(model_type: str) -> dict[str, Tensor]:
    return data(model_type, 30, seed=9).batch(torch.arange(30))


def refined(fm: nn.Module, proxy: nn.Module, model_type: str, **settings: object) -> list[float]:
    section = PlugInSection(**{"steps": 12, "batch": 20, "learning_rate": 5e-3, **settings})
    task = TASKS[tiny.task_of(model_type)]
    return refine(fm, proxy, WATCHED, task, data(model_type), section, seed=0, progress=lambda _step, _loss: None)


def scaled(fm: nn.Module, proxy: nn.Module, model_type: str) -> list[float]:
    return scale_layers(fm, proxy, LAYERS, data(model_type, 40), batch=7, seed=0)


@pytest.mark.parametrize(("model_type", "steps"), [("bert", 12), ("gpt2", 12), ("vit", 12), ("llama", 40)])
def test_refined_towards_the_change_the_fm_changes_as_the_proxy_did(
    model_type: str, steps: int, make_fm: ModelFactory
) -> None:
    fm, proxy = plugged_in(make_fm, model_type)
    unseen = held_out(model_type)
    before = float(change_loss(fm, proxy, WATCHED, unseen).detach())
    refined(fm, proxy, model_type, steps=steps)
    assert float(change_loss(fm, proxy, WATCHED, unseen).detach()) < 0.93 * before


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "vit"])
def test_refined_towards_the_proxy_the_fm_answers_as_it_does(model_type: str, make_fm: ModelFactory) -> None:
    fm, proxy = plugged_in(make_fm, model_type)
    task, unseen = TASKS[tiny.task_of(model_type)], held_out(model_type)
    before = float(task.soft_loss(fm, proxy, unseen).detach())
    refined(fm, proxy, model_type, towards="proxy")
    assert float(task.soft_loss(fm, proxy, unseen).detach()) < 0.8 * before


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_the_change_is_that_of_tuning_relative_to_the_proxys(model_type: str, make_fm: ModelFactory) -> None:
    fm, proxy = plugged_in(make_fm, model_type)
    inputs, found = held_out(model_type), []
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
    untuned_fm, untuned_proxy = copy.deepcopy(fm), copy.deepcopy(proxy)
    for model in (untuned_fm, untuned_proxy):
        scale_lora(model, 0.0)
    with torch.no_grad():
        for layer, _ in WATCHED:
            H, H_0, h, h_0 = (
                layer_outputs(model, [layer], inputs)[0][real] for model in (fm, untuned_fm, proxy, untuned_proxy)
            )
            found.append(((H - H_0) - (h - h_0)).square().sum() / (h - h_0).square().sum())
    assert float(change_loss(fm, proxy, WATCHED, inputs).detach()) == pytest.approx(float(sum(found)) / 3, rel=1e-4)


@pytest.mark.parametrize("towards", ["change", "proxy"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_nothing_but_the_fms_lora_changes(model_type: str, towards: str, make_fm: ModelFactory) -> None:
    fm, proxy = plugged_in(make_fm, model_type)
    states = [tiny.snapshot(model) for model in (fm, proxy)]
    flags = [[p.requires_grad for p in model.parameters()] for model in (fm, proxy)]
    scaled(fm, proxy, model_type)
    refined(fm, proxy, model_type, towards=towards, steps=2)
    changed = tiny.changed(states[0], tiny.snapshot(fm))
    assert changed == {name for name in states[0] if ".lora_" in name}
    assert tiny.changed(states[1], tiny.snapshot(proxy)) == set()
    assert [[p.requires_grad for p in model.parameters()] for model in (fm, proxy)] == flags
    assert all(p.grad is None for model in (fm, proxy) for p in model.parameters())


@pytest.mark.parametrize("towards", ["change", "proxy"])
def test_the_same_seed_gives_the_same_bits_and_another_one_others(towards: str, make_fm: ModelFactory) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        fm, proxy = plugged_in(make_fm, "bert")
        section = PlugInSection(steps=3, batch=10, towards=towards)
        task = TASKS["sequence-classification"]
        refine(fm, proxy, WATCHED, task, data("bert"), section, seed=seed, progress=lambda _step, _loss: None)
        states.append(tiny.snapshot(fm))
    assert tiny.changed(states[0], states[1]) == set()
    assert tiny.changed(states[0], states[2])


def test_a_proxy_that_is_the_fm_asks_for_no_change(make_fm: ModelFactory) -> None:
    fm, _ = plugged_in(make_fm, "bert")
    before, same = tiny.snapshot(fm), copy.deepcopy(fm)
    assert refined(fm, same, "bert") == [0.0] * 12
    assert tiny.changed(before, tiny.snapshot(fm)) == set()


@some_kinds
def test_a_proxy_with_all_neurons_does_as_the_fm_does(model_type: str, make_fm: ModelFactory) -> None:
    fm, proxy = plugged_in(make_fm, model_type, neurons="all")
    assert float(change_loss(fm, proxy, WATCHED, held_out(model_type)).detach()) < 1e-8
    assert scaled(fm, proxy, model_type) == pytest.approx([1.0] * tiny.L, abs=1e-4)


def test_tuning_that_changed_nothing_asks_for_nothing(make_fm: ModelFactory) -> None:
    fm, _ = plugged_in(make_fm, "bert")
    scale_lora(fm, 0.0)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=K)))
    before = tiny.snapshot(fm)
    assert scaled(fm, proxy, "bert") == [1.0] * tiny.L
    assert refined(fm, proxy, "bert", steps=2) == [0.0, 0.0]
    assert tiny.changed(before, tiny.snapshot(fm)) == set()


@some_kinds
def test_scales_are_the_least_squares_factors_of_each_layers_own_change(model_type: str, make_fm: ModelFactory) -> None:
    fm, proxy = plugged_in(make_fm, model_type)
    before = tiny.snapshot(fm)
    factors = scaled(fm, proxy, model_type)
    assert factors[0] == pytest.approx(1.0, abs=1e-5), "the first layer is whole, and sees the same"
    assert max(abs(factor - 1.0) for factor in factors) > 0.01
    inputs = data(model_type, 40).batch(torch.arange(40))
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...

    def change(model: nn.Module, layer: int) -> Tensor:
        with torch.no_grad():
            tuned = layer_outputs(model, [layer], inputs)[0]
            with without_lora(layers_of(model)[layer]):
                return (tuned - layer_outputs(model, [layer], inputs)[0])[real].double().flatten()

    for layer, factor in enumerate(factors):
        own = copy.deepcopy(fm)  # the layers before it are scaled already, it is not
        scale_lora(layers_of(own)[layer], 1.0 / factor)
        ours, theirs = change(own, layer), change(proxy, layer)
        assert float(ours @ theirs / (ours @ ours)) == pytest.approx(factor, rel=1e-3)
        for name, tensor in layers_of(fm)[layer].named_parameters():
            if ".lora_" in name:
                path = next(full for full in before if full.endswith(f".{layer}.{name}"))
                wanted = before[path] * (factor if ".lora_B." in name else 1.0)
                torch.testing.assert_close(tensor.detach(), wanted, rtol=1e-6, atol=0.0)


def test_layers_that_the_proxy_lacks_are_not_scaled_but_trained(make_fm: ModelFactory) -> None:
    fm, proxy = plugged_in(make_fm, "bert", keep="layers", layers=3)
    with torch.no_grad():
        scale_lora(layers_of(fm)[1], 0.0)
    kept = (0, 2, 3)
    before = tiny.snapshot(fm)
    assert len(scale_layers(fm, proxy, kept, data("bert", 40), batch=7, seed=0)) == 3
    assert not [name for name in tiny.changed(before, tiny.snapshot(fm)) if ".layer.1." in name]
    pairs, unseen = ((1, 2), (2, 3)), held_out("bert")
    gap = float(change_loss(fm, proxy, pairs, unseen).detach())
    section, task = PlugInSection(steps=12, batch=10, learning_rate=5e-3), TASKS["sequence-classification"]
    refine(fm, proxy, pairs, task, data("bert"), section, seed=0, progress=lambda _step, _loss: None)
    assert float(change_loss(fm, proxy, pairs, unseen).detach()) < 0.9 * gap
    assert layers_of(fm)[1].attention.self.query.lora_B["default"].weight.any()


def test_refinement_that_diverges_ends_there(make_fm: ModelFactory) -> None:
    fm, proxy = plugged_in(make_fm, "bert")
    with torch.no_grad():
        for model in (fm, proxy):
            layers_of(model)[0].output.LayerNorm.weight.fill_(1e38)
    with pytest.raises(ModelError, match=r"step \d+ after plug-in: loss or adapter is not finite"):
        refined(fm, proxy, "bert")
    with pytest.raises(ModelError, match=r"layer \d: the scale of its LoRA is nan"):
        scaled(fm, proxy, "bert")
