"""A silo that holds only the neurons of the proxy that matter most."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedpft.config import AdapterSection, LimitsSection, RoundSettings, SimulationConfig, TrainingSection
from fedpft.demo.run import run_federation
from fedpft.errors import ModelError
from fedpft.model.adapters import frozen_state
from fedpft.model.subffn import NEURON_PARAMETERS, sub_ffns
from fedpft.proxy.bundle import Proxy, apply_patch, load_proxy, of_part, of_whole, patch, save_bundle, width_within
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import select
from fedpft.proxy.updating import apoz
from fedpft.silo.learner import Learner
from fedpft.simulation.run import simulate

FM = Callable[[str], Any]
K = 6
each_form = pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "vit"])  # with biases and without, gated


def written(fm: Any, model_type: str, directory: Path) -> Proxy:
    selection = select(fm, tiny.by_weights(neurons=K))
    task = tiny.task_of(model_type)
    compressed = tuple(student for student, _ in selection.matched)
    proxy = Proxy(cut(fm, selection), tiny.processor(model_type), task, tiny.LABELS, 12, compressed)
    save_bundle(proxy, directory, turns=selection.turns)
    return proxy


def without(proxy: Proxy, kept: dict[str, Tensor]) -> None:
    """Silences all other neurons of the whole proxy: their output weights are 0."""
    for module, ffn in sub_ffns(proxy.model).items():
        if module in kept:
            others = torch.ones(ffn.neurons, dtype=torch.bool).index_fill(0, kept[module], False)
            with torch.no_grad():
                ffn.w_out[others] = 0.0  # type: ignore[index]


@each_form
@pytest.mark.parametrize("width", [0.1, 0.5, 0.7])
def test_a_narrow_proxy_is_the_whole_one_without_the_other_neurons(
    model_type: str, width: float, make_fm: FM, tmp_path: Path
) -> None:
    whole = written(make_fm(model_type), model_type, tmp_path)
    narrow = load_proxy(tmp_path, width=width)
    counts = [ffn.neurons for ffn in sub_ffns(narrow.model).values()]
    assert counts == [tiny.F, *[max(1, round(width * K))] * 2, tiny.F]
    without(whole, dict(narrow.held))
    inputs = tiny.batch(model_type)
    torch.testing.assert_close(tiny.logits(narrow.model, inputs), tiny.logits(whole.model, inputs))


def test_those_that_matter_most_stay(make_fm: FM, tmp_path: Path) -> None:
    fm = make_fm("bert")
    selection = select(fm, tiny.by_weights(neurons=K))
    written(fm, "bert", tmp_path)
    narrow = load_proxy(tmp_path, width=0.5)
    for layer, places in zip(narrow.compressed, narrow.held.values(), strict=True):
        saliency = selection.saliency[layer][selection.neurons[layer]]
        others = [place for place in range(K) if place not in places.tolist()]
        assert saliency[places].min() >= saliency[others].max()


def test_the_whole_width_is_the_proxy_as_ever(make_fm: FM, tmp_path: Path) -> None:
    whole = written(make_fm("bert"), "bert", tmp_path)
    loaded = load_proxy(tmp_path, width=1.0)
    assert not loaded.held
    assert tiny.changed(tiny.snapshot(whole.model), loaded.model.state_dict()) == set()


@each_form
def test_a_patch_does_to_the_part_what_it_does_to_the_whole(model_type: str, make_fm: FM, tmp_path: Path) -> None:
    whole = written(make_fm(model_type), model_type, tmp_path)
    narrow = load_proxy(tmp_path, width=0.5)
    updated = {layer: torch.tensor([0, 2, 3, 5]) for layer in whole.compressed}
    generator = torch.Generator().manual_seed(0)
    modules = sub_ffns(whole.model)
    with torch.no_grad():
        for layer, rows in updated.items():
            ffn = list(modules.values())[layer]
            for name in NEURON_PARAMETERS:
                if (parameter := getattr(ffn, name)) is not None:
                    parameter[rows] += torch.randn(parameter[rows].shape, generator=generator)
    apply_patch(narrow.model, of_part(patch(whole.model, updated, []), narrow))
    ours = sub_ffns(narrow.model)
    for module, places in narrow.held.items():
        for name in NEURON_PARAMETERS:
            if (parameter := getattr(modules[module], name)) is not None:
                assert torch.equal(parameter[places], getattr(ours[module], name))


def test_what_a_narrow_silo_counts_counts_for_what_it_has(make_fm: FM, tmp_path: Path) -> None:
    written(make_fm("bert"), "bert", tmp_path)
    narrow = load_proxy(tmp_path, width=0.5)
    own = {str(layer): torch.tensor([1, 2, 3]) for layer in narrow.compressed}
    own |= {f"{layer}.tokens": torch.tensor(4) for layer in narrow.compressed}
    found = of_whole(own, narrow)
    everybody = {str(layer): torch.full((K,), 6) for layer in narrow.compressed}
    everybody |= {f"{layer}.tokens": torch.tensor(8) for layer in narrow.compressed}
    shares = apoz([found, everybody])
    for layer, places in zip(narrow.compressed, narrow.held.values(), strict=True):
        expected = torch.full((K,), 6 / 8, dtype=torch.float64)
        expected[places] = torch.tensor([7, 8, 9], dtype=torch.float64) / 12
        assert torch.equal(shares[layer], expected)
        assert apoz([found])[layer].count_nonzero() == 3  # nothing is known of the others


@each_form
def test_as_many_neurons_as_fit_into_the_memory_allowed(model_type: str, make_fm: FM, tmp_path: Path) -> None:
    written(make_fm(model_type), model_type, tmp_path)

    def taken(width: float) -> int:
        return sum(tensor.nbytes for tensor in frozen_state(load_proxy(tmp_path, width=width).model).values())

    bytes_of = [taken(sixteenths / 16) for sixteenths in range(1, 17)]
    assert len(set(bytes_of)) == K  # several widths have the same neurons
    for room in bytes_of:
        assert taken(width_within(tmp_path, room)) == room
        if room > bytes_of[0]:
            assert taken(width_within(tmp_path, room - 1)) == max(less for less in bytes_of if less < room)
    assert width_within(tmp_path, 2**40) == 1.0
    with pytest.raises(ModelError, match=r"limits\.memory_gib: .* with the smallest width, 0\.0625, not") as caught:
        width_within(tmp_path, bytes_of[0] - 1)
    assert "limits.weights" in caught.value.remedy


def test_a_silo_takes_what_fits(make_fm: FM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(make_fm("bert"), "bert", tmp_path)
    half = load_proxy(tmp_path, width=0.5)
    room = sum(tensor.nbytes for tensor in frozen_state(half.model).values()) / 2**30
    settings = RoundSettings(seed=0, adapter=AdapterSection(), training=TrainingSection(), inactive_below=0.0)
    with caplog.at_level("INFO"):
        learner = Learner(tmp_path, settings, "cpu", LimitsSection(memory_gib=room))
    assert learner.proxy.loaded_neurons == half.loaded_neurons
    assert "limits.memory_gib" in caplog.text
    whole = Learner(tmp_path, settings, "cpu", LimitsSection(memory_gib=1.0))
    assert not whole.proxy.held
    with_ffn = settings.model_copy(update={"adapter": AdapterSection(ffn=True)})
    with pytest.raises(ModelError, match=r"limits\.memory_gib: the federation trains LoRA on the FFN"):
        Learner(tmp_path, with_ffn, "cpu", LimitsSection(memory_gib=room))


@pytest.mark.parametrize("other", [{"width": 0.5}, {"weights": "int8"}, {"sharded": True}], ids=str)
def test_memory_goes_with_nothing_that_it_would_have_to_know_of(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="memory_gib"):
        LimitsSection(memory_gib=1.0, **other)


def test_a_mixture_has_no_parts(make_fm: FM, tmp_path: Path) -> None:
    written(make_fm("mixtral"), "mixtral", tmp_path)
    with pytest.raises(ModelError, match="cannot be had in part"):
        load_proxy(tmp_path, width=0.5)


def test_lora_on_the_ffn_needs_all_neurons(make_fm: FM, tmp_path: Path) -> None:
    written(make_fm("bert"), "bert", tmp_path)
    settings = RoundSettings(seed=0, adapter=AdapterSection(ffn=True), training=TrainingSection(), inactive_below=0.0)
    with pytest.raises(ModelError, match=r"limits\.width: .*every silo needs all"):
        Learner(tmp_path, settings, "cpu", LimitsSection(width=0.5))


def settings_of(tmp_path: Path, fm: Path) -> dict[str, Any]:
    """Data in files, and what a server.yaml says of them."""
    rows = [{"text": f"red {n % 5} box", "label": tiny.LABELS[n % 2]} for n in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "public.jsonl").write_text("\n".join(json.dumps({"text": f"a blue {n} cup"}) for n in range(24)))
    (tmp_path / "labels.txt").write_text("\n".join(tiny.LABELS))
    return {
        "threads": 1,
        "model": {"path": str(fm), "labels": str(tmp_path / "labels.txt"), "max_tokens": 12},
        "proxy": {"neurons": K, "importance_samples": 8},
        "distillation": {"closed_form_samples": 8, "batch": 2},
        "alignment": {"counts": "silos", "every_rounds": 1, "steps": 2},
        "adapter": {"rank": 2, "alpha": 4.0},
        "training": {"rounds": 2, "batch": 4},
        "public_data": str(tmp_path / "public.jsonl"),
        "test_data": str(tmp_path / "data.jsonl"),
    }


@pytest.mark.parametrize("narrow", [0.0, 0.6, 1.0])
def test_wide_and_narrow_silos_make_one_federation(narrow: float, fm_directory: FM, tmp_path: Path) -> None:
    values = settings_of(tmp_path, fm_directory("bert"))
    simulation = {"data": str(tmp_path / "data.jsonl"), "silos": 4, "narrow_fraction": narrow}
    made = []
    for out in ("one", "two"):
        config = SimulationConfig.model_validate(values | {"out": str(tmp_path / out), "simulation": simulation})
        summary = simulate(config)
        made.append(load_file(tmp_path / out / "adapter.safetensors"))
        assert {"proxy", "plugged_in"} <= summary["metrics"].keys()
    assert all(tiny.same_bits(made[0][name], made[1][name]) for name in made[0])


def test_silos_of_two_sizes_as_processes(fm_directory: FM, tmp_path: Path) -> None:
    server = settings_of(tmp_path, fm_directory("bert")) | {"listen": "127.0.0.1:0", "insecure_loopback": True}
    server["federation"] = {"silos": ["wide", "narrow"]}
    silos = {
        name: {
            "insecure_loopback": True,
            "insecure_name": name,
            "data": {"path": str(tmp_path / "data.jsonl")},
            "threads": 1,
            "limits": {"width": width},
        }
        for name, width in (("wide", 1.0), ("narrow", 0.5))
    }
    summary = run_federation(tmp_path, server, silos)
    assert [entry["silos"] for entry in summary["rounds"]] == [2, 2]
    logs = {name: (tmp_path / f"silo-{name}.log").read_text() for name in silos}
    assert f"of its {2 * (tiny.F + K)} FFN neurons, {2 * (tiny.F + K // 2)}" in logs["narrow"]
    assert "limits.width" not in logs["wide"]
