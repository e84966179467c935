"""The adapter: attach, extract, load, check, plug in, merge, and the two ways it is saved."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from conftest import ModelFactory
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpft.config import AdapterSection
from fedpft.errors import InvalidUpdate, ModelError
from fedpft.model.adapters import (
    Adapter,
    Probes,
    attach,
    check,
    extract,
    frozen_state,
    load,
    merge,
    plug_in,
    read,
    save_peft,
)
from fedpft.model.architectures import ARCHITECTURES, layers_of
from fedpft.model.loading import load_model, save_model
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import Selection, select

FM = Callable[[str], Path]
RANK = 2
SETTINGS = AdapterSection(rank=RANK, alpha=6.0)
SCALE = 3.0  # alpha / rank
EVERY = (torch.arange(tiny.F),) * tiny.L  # neurons of a proxy that keeps all
every_architecture = pytest.mark.parametrize("model_type", ARCHITECTURES)


def tuned(model: nn.Module, seed: int = 1) -> Adapter:
    """An adapter for the model in which no tensor is what it was at the start."""
    generator = torch.Generator().manual_seed(seed)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in sorted(extract(model).items())}


def attention_weights(model_type: str, layer: int) -> list[str]:
    prefix = tiny.NAMES[model_type].layer.format(layer)
    return [f"{prefix}{path}" for path in ARCHITECTURES[model_type].attention]


def adapted_by_hand(fm: nn.Module, model_type: str, adapter: Adapter) -> dict[str, Tensor]:
    """The FM's state dict with W + (alpha / rank) B A in each attention projection, and the adapter's head."""
    state = tiny.snapshot(fm)
    for layer in range(tiny.L):
        for name in attention_weights(model_type, layer):
            change = SCALE * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
            state[f"{name}.weight"] += change.t() if ARCHITECTURES[model_type].transposed else change
    return state | {name: tensor for name, tensor in adapter.items() if ".lora_" not in name}


@every_architecture
def test_adapter_is_lora_on_every_attention_projection_and_the_head(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    plain = fm.state_dict().keys()
    attach(fm, SETTINGS, seed=0)
    wanted = {
        f"{name}.lora_{which}.weight"
        for layer in range(tiny.L)
        for name in attention_weights(model_type, layer)
        for which in "AB"
    } | tiny.head_names(plain, model_type)
    adapter = extract(fm)
    assert adapter.keys() == wanted
    assert all(t.shape[0] == RANK for name, t in adapter.items() if "lora_A" in name)
    trained = {name.replace(".default.", ".") for name, p in fm.named_parameters() if p.requires_grad}
    assert trained == wanted
    assert not any(module.training for module in fm.modules())


def test_untrained_adapter_is_drawn_from_the_seed_and_nothing_else(make_fm: ModelFactory) -> None:
    drawn = []
    for number, seed in enumerate((4, 4, 5)):
        torch.manual_seed(number)
        fm = make_fm("bert")
        attach(fm, SETTINGS, seed=seed)
        drawn.append(extract(fm))
    assert tiny.changed(drawn[0], drawn[1]) == set()
    assert {name for name in drawn[0] if "lora_A" in name} == tiny.changed(drawn[0], drawn[2])
    assert not any(tensor.any() for name, tensor in drawn[0].items() if "lora_B" in name)


def test_attaching_leaves_the_callers_random_numbers_alone(make_fm: ModelFactory) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    attach(make_fm("bert"), SETTINGS, seed=0)
    assert torch.equal(torch.rand(3), wanted)


@every_architecture
def test_plugging_in_an_untouched_adapter_leaves_the_fm_bit_for_bit(model_type: str, make_fm: ModelFactory) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    state, wanted = tiny.snapshot(fm), tiny.logits(fm, inputs)
    attach(fm, SETTINGS, seed=0)
    proxy = cut(fm, select(fm, tiny.by_weights()))
    plug_in(fm, extract(proxy), range(tiny.L), EVERY)
    assert tiny.changed(state, frozen_state(fm)) == set()
    assert tiny.same_bits(tiny.logits(fm, inputs), wanted)
    merge(fm)
    assert tiny.changed(state, fm.state_dict()) == set()
    assert tiny.same_bits(tiny.logits(fm, inputs), wanted)


@every_architecture
def test_plugged_in_fm_has_b_times_a_added_to_its_weights(model_type: str, make_fm: ModelFactory) -> None:
    fm, by_hand, inputs = make_fm(model_type), make_fm(model_type), tiny.batch(model_type)
    attach(fm, SETTINGS, seed=0)
    adapter = tuned(fm)
    before = tiny.logits(fm, inputs)
    by_hand.load_state_dict(adapted_by_hand(by_hand, model_type, adapter))
    wanted = tiny.logits(by_hand, inputs)
    assert (wanted - before).abs().max() > 0.01
    plug_in(fm, adapter, range(tiny.L), EVERY)
    torch.testing.assert_close(tiny.logits(fm, inputs), wanted, rtol=1e-5, atol=1e-5)
    merge(fm)
    torch.testing.assert_close(dict(fm.state_dict()), dict(by_hand.state_dict()), rtol=1e-6, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in fm.parameters())


@every_architecture
def test_merged_directory_is_loaded_by_plain_transformers(
    model_type: str, make_fm: ModelFactory, tmp_path: Path
) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    attach(fm, SETTINGS, seed=0)
    plug_in(fm, tuned(fm), range(tiny.L), EVERY)
    wanted = tiny.logits(fm, inputs)
    merge(fm)
    save_model(fm, tiny.processor(model_type), tmp_path)
    loaded = tiny.AUTO[tiny.task_of(model_type)].from_pretrained(tmp_path).eval()
    torch.testing.assert_close(tiny.logits(loaded, inputs), wanted, rtol=1e-5, atol=1e-5)
    assert tiny.changed(fm.state_dict(), loaded.state_dict()) == set()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # rank 0: there is no LoRA to find
@pytest.mark.parametrize(
    ("model_type", "rank", "labels"),
    [
        (name, RANK, (*tiny.LABELS, "ice")) for name in (*ARCHITECTURES, "bert without pooler")
    ]  # another head than the FM's
    + [(name, 0, tiny.LABELS) for name in ("bert", "distilbert", "vit", "gpt2", "bert without pooler")],
)
def test_adapter_and_merged_directory_are_the_plugged_in_model_wherever_they_are_loaded(
    model_type: str, rank: int, labels: tuple[str, ...], fm_directory: FM, tmp_path: Path
) -> None:
    kind, directory = model_type, None
    if model_type == "bert without pooler":
        kind, directory = "bert", tiny.without_pooler(tmp_path / "fm")
    directory, task = directory or fm_directory(kind), tiny.task_of(kind)
    fm, inputs = load_model(directory, task, labels, seed=0), tiny.batch(kind)
    attach(fm, settings := AdapterSection(rank=rank, alpha=6.0), seed=0)
    untouched = tiny.logits(fm, inputs)
    plug_in(fm, tuned(fm), range(tiny.L), EVERY)
    wanted = tiny.logits(fm, inputs)
    assert (wanted - untouched).abs().max() > 0.01
    save_peft(fm, settings, tmp_path / "adapter", base=str(directory), task=task)
    tiny.processor(kind).save_pretrained(tmp_path / "adapter")
    merge(fm)
    save_model(fm, tiny.processor(kind), tmp_path / "merged")
    loaders = {
        "sequence-classification": peft.AutoPeftModelForSequenceClassification,
        "image-classification": peft.AutoPeftModel,
    }
    options: dict[str, Any] = {}  # none are needed where the FM's own config.json has as many labels
    if labels != tiny.LABELS:
        options = {"id2label": dict(enumerate(labels)), "ignore_mismatched_sizes": True}
    for seed in (1, 2):
        torch.manual_seed(seed)  # what is drawn anew at each load would show
        loaded = loaders[task].from_pretrained(str(tmp_path / "adapter"), **options).eval()
        torch.testing.assert_close(tiny.logits(loaded, inputs), wanted, rtol=1e-6, atol=1e-6)
    merged = tiny.AUTO[task].from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(merged, inputs), wanted, rtol=1e-5, atol=1e-5)
    assert tuple(merged.config.id2label.values()) == labels


@every_architecture
def test_adapter_of_a_proxy_with_fewer_layers_goes_to_the_layers_it_was_cut_from(
    model_type: str, make_fm: ModelFactory
) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    attach(fm, SETTINGS, seed=0)
    selection = select(fm, tiny.by_weights(keep="layers", layers=3))
    assert selection.layers == (0, 2, 3)
    proxy = cut(fm, selection)
    adapter = tuned(proxy)
    plug_in(fm, tuned(fm, seed=9), range(tiny.L), EVERY)  # what an earlier round may have left behind
    plug_in(fm, adapter, selection.layers, selection.neurons)
    found = extract(fm)
    for on_proxy, on_fm in ((0, 0), (1, 2), (2, 3)):
        for ours, theirs in zip(
            attention_weights(model_type, on_proxy), attention_weights(model_type, on_fm), strict=True
        ):
            for which in ("lora_A.weight", "lora_B.weight"):
                assert torch.equal(found[f"{theirs}.{which}"], adapter[f"{ours}.{which}"])
    for name in attention_weights(model_type, 1):
        assert not found[f"{name}.lora_B.weight"].any()
    with_dropped = tiny.logits(fm, inputs)
    for name in ARCHITECTURES[model_type].attention:
        layer = layers_of(fm)[1]
        layer.set_submodule(name, layer.get_submodule(name).base_layer)
    assert torch.equal(tiny.logits(fm, inputs), with_dropped)  # LoRA on the dropped layer had no effect


def damaged(adapter: Adapter, change: str) -> tuple[Adapter, str]:
    """An adapter with one fault, and the tensor that has it."""
    name = sorted(adapter)[3]
    broken = dict(adapter)
    if change == "missing":
        del broken[name]
    elif change == "unknown":
        broken[name := "bert.encoder.layer.9.lora_A.weight"] = torch.zeros(1)
    elif change == "shape":
        broken[name] = adapter[name].t().contiguous()
    elif change == "dtype":
        broken[name] = adapter[name].double()
    else:
        broken[name] = adapter[name].clone()
        broken[name].view(-1)[-1] = float(change)
    return broken, name


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype", "nan", "inf", "-inf"])
def test_update_that_does_not_fit_is_refused_with_sender_and_tensor(change: str, make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    attach(fm, SETTINGS, seed=0)
    like = extract(fm)
    broken, name = damaged(tuned(fm), change)
    with pytest.raises(InvalidUpdate) as caught:
        check(broken, like, "silo 'north'")
    assert "silo 'north'" in caught.value.message
    assert repr(name) in caught.value.message
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidUpdate):
        load(fm, broken)
    assert tiny.changed(like, extract(fm)) == set()  # nothing of it went in


def test_update_that_fits_passes(make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    attach(fm, SETTINGS, seed=0)
    check(tuned(fm), extract(fm), "silo 'north'")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "nan"])
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 2, 3)], ids=["all layers", "three layers"])
def test_adapter_that_does_not_fit_is_not_plugged_in(
    change: str, layers: tuple[int, ...], make_fm: ModelFactory
) -> None:
    fm = make_fm("bert")
    attach(fm, SETTINGS, seed=0)
    settings = tiny.by_weights(keep="layers", layers=len(layers))
    before = tiny.snapshot(fm)
    broken, name = damaged(tuned(cut(fm, select(fm, settings))), change)
    with pytest.raises(InvalidUpdate, match=name):
        plug_in(fm, broken, layers, EVERY)
    assert tiny.changed(before, fm.state_dict()) == set()


@pytest.mark.parametrize("layers", [(0, 2, 3), (0, 3)])
def test_adapter_of_a_deeper_proxy_is_not_plugged_in(layers: tuple[int, ...], make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    attach(fm, SETTINGS, seed=0)
    with pytest.raises(InvalidUpdate, match="unknown tensor"):
        plug_in(fm, tuned(fm), layers, EVERY)


def test_adapter_without_its_head_is_not_plugged_in(make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    attach(fm, SETTINGS, seed=0)
    adapter = tuned(cut(fm, select(fm, tiny.by_weights(keep="layers", layers=3))))
    del adapter["classifier.weight"]
    with pytest.raises(InvalidUpdate, match=r"lacks the tensor 'classifier\.weight'"):
        plug_in(fm, adapter, (0, 2, 3), EVERY)


@every_architecture
def test_loaded_adapter_is_extracted_again_bit_for_bit(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    attach(fm, SETTINGS, seed=0)
    frozen, adapter = {n: t.clone() for n, t in frozen_state(fm).items()}, tuned(fm)
    load(fm, adapter)
    assert tiny.changed(adapter, extract(fm)) == set()
    assert tiny.changed(frozen, frozen_state(fm)) == tiny.head_names(frozen, model_type)


def test_extracted_adapter_does_not_follow_the_model(make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    attach(fm, SETTINGS, seed=0)
    before = extract(fm)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    load(fm, tuned(fm))
    assert tiny.changed(kept, before) == set()


@every_architecture
def test_proxy_and_fm_have_the_same_adapter(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    attach(fm, SETTINGS, seed=0)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=8)))
    assert tiny.changed(extract(fm), extract(proxy)) == set()


@every_architecture
def test_rank_0_is_the_head_alone(model_type: str, make_fm: ModelFactory) -> None:
    fm, plain = make_fm(model_type), make_fm(model_type)
    attach(fm, AdapterSection(rank=0), seed=0)
    head = tiny.head_names(plain.state_dict(), model_type)
    assert head
    assert extract(fm).keys() == head
    assert tiny.changed(plain.state_dict(), fm.state_dict()) == set()
    adapter = tuned(fm)
    plug_in(fm, adapter, range(tiny.L), EVERY)
    merge(fm)
    assert tiny.changed(plain.state_dict(), fm.state_dict()) == head
    assert tiny.changed(adapter, {name: fm.state_dict()[name] for name in head}) == set()


def test_frozen_state_has_the_fms_names_and_shares_its_memory(make_fm: ModelFactory) -> None:
    fm = make_fm("llama")
    names = list(fm.state_dict())
    attach(fm, SETTINGS, seed=0)
    state = frozen_state(fm)
    assert sorted(state) == sorted(names)
    state["model.layers.0.self_attn.q_proj.weight"].fill_(7.0)
    assert layers_of(fm)[0].self_attn.q_proj.base_layer.weight[0, 0] == 7.0


def test_adapter_file_comes_back(make_fm: ModelFactory, tmp_path: Path) -> None:
    fm = make_fm("bert")
    attach(fm, SETTINGS, seed=0)
    adapter = tuned(fm)
    save_file(adapter, tmp_path / "adapter.safetensors")
    assert tiny.changed(adapter, read(tmp_path / "adapter.safetensors")) == set()


@pytest.mark.parametrize("content", [None, b"", b"not an adapter, but long enough"])
def test_file_that_is_no_adapter_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="not an adapter"):
        read(path)


# --- probes ---


def probed_pair(
    make_fm: ModelFactory, model_type: str = "bert", **settings: object
) -> tuple[nn.Module, nn.Module, Selection]:
    """Proxy and FM with the same tuned adapter."""
    fm = make_fm(model_type)
    attach(fm, SETTINGS, seed=0)
    load(fm, tuned(fm))
    selection = select(fm, tiny.by_weights(**(settings or {"neurons": 16})))
    return cut(fm, selection), fm, selection


def moved_by(model: nn.Module, probes: Probes, seed: int) -> dict[str, Tensor]:
    """What a probe adds to each tensor that it touches."""
    before = extract(model)
    with probes.drawn(seed):
        after = extract(model)
    return {name: after[name] - before[name] for name in tiny.changed(before, after)}


@pytest.mark.parametrize("model_type", tiny.KINDS)
def test_probe_moves_lora_of_fm_and_proxy_alike_and_by_its_size(model_type: str, make_fm: ModelFactory) -> None:
    proxy, fm, _ = probed_pair(make_fm, model_type)
    probes = Probes(proxy, fm)
    ours, theirs = (moved_by(model, probes, 5) for model in (proxy, fm))
    assert ours.keys() == theirs.keys() == {name for name in extract(fm) if ".lora_B." in name}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    sizes, adapter, weights = [], extract(fm), frozen_state(fm)
    for name, b in theirs.items():
        weight = weights[name.replace("lora_B.", "")]
        sizes.append(float(SCALE * (b @ adapter[name.replace("lora_B", "lora_A")]).norm() / weight.norm()))
    assert 0.08 < sum(sizes) / len(sizes) < 0.12
    assert 0.04 < min(sizes) <= max(sizes) < 0.2


def test_probes_are_those_of_their_seed(make_fm: ModelFactory) -> None:
    proxy, fm, _ = probed_pair(make_fm)
    first, again, other = (moved_by(fm, Probes(proxy, fm), seed) for seed in (5, 5, 6))
    assert tiny.changed(first, again) == set()
    assert tiny.changed(first, other) == first.keys()


def test_probe_of_a_proxy_with_fewer_layers_moves_those_that_it_has(make_fm: ModelFactory) -> None:
    proxy, fm, selection = probed_pair(make_fm, keep="layers", layers=3)
    assert selection.layers == (0, 2, 3)
    probes = Probes(proxy, fm, selection.layers)
    ours, theirs = (moved_by(model, probes, 5) for model in (proxy, fm))
    renamed = {
        name.replace(f"layer.{index}.", f"layer.{layer}."): change
        for name, change in ours.items()
        for index, layer in enumerate(selection.layers)
        if f"layer.{index}." in name
    }
    assert renamed.keys() == theirs.keys()
    assert all(torch.equal(renamed[name], theirs[name]) for name in theirs)


def test_lora_is_what_it_was_after_a_probe_even_one_that_fails(make_fm: ModelFactory) -> None:
    proxy, fm, _ = probed_pair(make_fm)
    before = [(parameter, parameter.detach().clone()) for model in (proxy, fm) for parameter in model.parameters()]
    flags = [parameter.requires_grad for parameter, _ in before]
    with pytest.raises(KeyboardInterrupt), Probes(proxy, fm).drawn(0):
        raise KeyboardInterrupt
    after = [parameter for model in (proxy, fm) for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in after] == flags
    for (parameter, value), now in zip(before, after, strict=True):
        assert now is parameter
        assert tiny.same_bits(now.detach(), value)


def test_backward_after_a_probe_is_that_of_the_model_that_was_probed(make_fm: ModelFactory) -> None:
    proxy, fm, _ = probed_pair(make_fm)
    probes, inputs, gradients = Probes(proxy, fm), tiny.batch("bert"), []
    path = "bert.encoder.layer.0.attention.self.query.base_layer.weight"
    moved = copy.deepcopy(fm)
    with torch.no_grad():
        for name, change in moved_by(fm, probes, 1).items():
            moved.get_parameter(name.replace(".weight", ".default.weight")).add_(change)
    for model in (fm, moved):
        leaf = model.get_parameter(path).requires_grad_(True)
        with probes.drawn(1) if model is fm else nullcontext():
            output = model(**inputs).logits.square().sum()
        (gradient,) = torch.autograd.grad(output, leaf)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


def test_model_without_lora_cannot_be_probed(make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    with pytest.raises(ValueError, match="has no LoRA"):
        Probes(cut(fm, select(fm, tiny.by_weights(neurons=8))), fm)
