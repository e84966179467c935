"""A silo that holds only the neurons of the proxy that matter most, refitted for them where the server says so."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedpft.config import (
    AdapterSection,
    DistillationSection,
    LimitsSection,
    RoundSettings,
    SimulationConfig,
    TrainingSection,
    load_silo_config,
)
from fedpft.demo.run import run_federation
from fedpft.digests import Digests
from fedpft.errors import ModelError
from fedpft.model import adapters, loading
from fedpft.model.adapters import frozen_state
from fedpft.model.architectures import layer_outputs, layers_of
from fedpft.model.mapped import Shards, held, hold_on_disk
from fedpft.model.quantized import quantized
from fedpft.model.streaming import place
from fedpft.model.subffn import NEURON_PARAMETERS, sub_ffns
from fedpft.proxy import widths
from fedpft.proxy.bundle import Proxy, apply_patch, load_proxy, of_part, of_whole, patch, save_bundle, width_within
from fedpft.proxy.closed_form import fit_output_projections
from fedpft.proxy.corrections import is_used
from fedpft.proxy.cut import cut
from fedpft.proxy.distillation import layer_level
from fedpft.proxy.journal import Journal
from fedpft.proxy.selection import Selection, select
from fedpft.proxy.updating import apoz
from fedpft.proxy.widths import add_widths
from fedpft.server.construction import build_proxy, load_fm, load_owner
from fedpft.server.identity import proxy_files
from fedpft.silo.explain import explain
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
    return tiny.federation(tmp_path, fm, proxy={"neurons": K}, alignment={"counts": "silos"})


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
    server["proxy"] |= {"widths": [0.25, 0.5]}
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
    assert f"of its {2 * (tiny.F + K)} FFN neurons, {2 * (tiny.F + K // 2)}, refitted for that" in logs["narrow"]
    assert "limits.width" not in logs["wide"]
    fetched = {name: [path.name for path in (tmp_path / f"work-{name}").glob("proxy-*/width-*")] for name in silos}
    assert fetched["wide"] == []
    assert sorted(fetched["narrow"]) == ["width-0.5-00001.safetensors", "width-0.5-00002.safetensors"]
    assert "lora_A" in explain(load_silo_config(tmp_path / "silo-narrow.yaml"))


# --- refitted for widths that the server announces --------------------------------------------------------------------

CLOSED_FORM = DistillationSection(closed_form_samples=24, batch=4)
LORA = AdapterSection(rank=2, alpha=4.0, dropout=0.0)


def refitted(
    fm: Any, model_type: str, directory: Path, of: tuple[float, ...] = (0.5,), neurons: int = K
) -> tuple[Selection, Proxy]:
    """A bundle as construction.py makes it, with widths."""
    public = tiny.dataset(model_type, 24, labelled=False)
    adapters.attach(fm, LORA, seed=0)
    selection = select(fm, tiny.by_weights(neurons=neurons))
    shards = None if held(fm) is None else Shards(directory)
    model = cut(fm, selection) if shards is None else cut(fm, selection, shards.put)
    if shards is not None:
        hold_on_disk(model, shards.held)
        place(model, "cpu", directory.with_suffix(".scratch"))
    layer_level(model, fm, selection.matched, public, CLOSED_FORM, seed=0, progress=lambda *_: None)
    compressed = tuple(student for student, _ in selection.matched)
    proxy = Proxy(model, tiny.processor(model_type), tiny.task_of(model_type), tiny.LABELS, 12, compressed)
    save_bundle(proxy, directory, shards, turns=selection.turns)
    if of:
        others: dict[str, Any] = {"seed": 0, "device": "cpu", "scratch": directory.with_suffix(".scratch")}
        add_widths(directory, of, fm, selection, public, CLOSED_FORM, LORA, journal=Journal(), **others)
    return selection, proxy


def files_of(directory: Path, *, widths: bool) -> dict[str, bytes]:
    wanted = [path for path in directory.iterdir() if path.name.startswith("width-") == widths]
    return {path.name: path.read_bytes() for path in wanted if path.name != "proxy.json"}


def corrections(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("width-0.5-*") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("model_type", "dtype"), [("bert", "float32"), ("gpt2", "float32"), ("llama", "bfloat16"), ("vit", "float32")]
)
def test_a_width_that_is_announced_is_refitted_for_its_neurons(
    model_type: str, dtype: Any, fm_directory: FM, tmp_path: Path
) -> None:
    task, public = tiny.task_of(model_type), tiny.dataset(model_type, 24, labelled=False)
    fm = loading.load_model(fm_directory(model_type), task, tiny.LABELS, seed=0, dtype=dtype)
    selection, _ = refitted(fm, model_type, tmp_path / "plain", ())
    refitted(fm, model_type, tmp_path / "refitted")
    fitted, plain = (load_proxy(tmp_path / "plain", width=0.5).model for _ in range(2))
    adapters.attach(fitted, LORA, seed=0)
    named: dict[str, Any] = {"samples": 24, "batch": 4, "seed": 0, "ridge": "held_out"}
    fit_output_projections(fitted, fm, selection.matched, public, **named)
    found = load_proxy(tmp_path / "refitted", width=0.5).model
    wanted, before, after = (frozen_state(model) for model in (fitted, plain, found))
    for name, tensor in after.items():  # what was changed is rounded, and then the sum
        eps, most = torch.finfo(tensor.dtype).eps, float((tensor - before[name]).abs().max())
        torch.testing.assert_close(tensor, wanted[name], rtol=eps, atol=eps * most)
    changed = {name.rpartition(".")[2] for name in tiny.changed(before, after)}
    assert changed == ({"w_out"} if model_type == "llama" else {"w_out", "b_out"})

    def error(model: Any) -> float:
        students, teachers = (list(layers) for layers in zip(*selection.matched, strict=True))
        inputs = public.batch(torch.arange(24))
        with torch.no_grad():
            both = zip(layer_outputs(model, students, inputs), layer_outputs(fm, teachers, inputs), strict=True)
        return sum(float((ours - theirs).float().square().mean()) for ours, theirs in both)

    assert error(found) < 0.995 * error(plain)


def test_the_whole_proxy_has_the_same_bits_whatever_else_is_announced(make_fm: FM, tmp_path: Path) -> None:
    for of in ((), (0.5, 0.25)):
        refitted(make_fm("bert"), "bert", tmp_path / str(len(of)), of)
    assert files_of(tmp_path / "0", widths=False) == files_of(tmp_path / "2", widths=False)
    assert not files_of(tmp_path / "0", widths=True)
    assert len(files_of(tmp_path / "2", widths=True)) == 4
    described = [json.loads((tmp_path / name / "proxy.json").read_text()) for name in ("0", "2")]
    assert described[1] == described[0] | {"widths": [0.5, 0.25]}  # without any it is as of earlier versions


@each_form
def test_a_patch_for_a_refitted_part_is_corrected_too(model_type: str, make_fm: FM, tmp_path: Path) -> None:
    _, whole = refitted(make_fm(model_type), model_type, tmp_path)
    narrow, rows = load_proxy(tmp_path, width=0.5), torch.tensor([0, 2, 3, 5])
    modules, before = sub_ffns(whole.model), tiny.snapshot(narrow.model)
    with torch.no_grad():
        for layer in whole.compressed:
            for name in (*NEURON_PARAMETERS, "b_out"):
                if (parameter := getattr(list(modules.values())[layer], name)) is not None:
                    part = slice(None) if name == "b_out" else rows
                    parameter[part] += torch.randn_like(parameter[part])
    sent = patch(whole.model, dict.fromkeys(whole.compressed, rows), [])
    apply_patch(narrow.model, of_part(sent, narrow))
    changes, ours = corrections(tmp_path), sub_ffns(narrow.model)
    assert len(changes) == (2 if model_type == "llama" else 4)
    for module, places in narrow.held.items():
        for name in (*NEURON_PARAMETERS, "b_out"):
            if (wanted := getattr(modules[module], name)) is not None:
                wanted = wanted if name == "b_out" else wanted[places]
                wanted = wanted + changes.get(f"{module}.{name}", torch.zeros(()))
                assert torch.equal(getattr(ours[module], name), wanted)
        assert not torch.equal(getattr(ours[module], "w_out"), before[f"{module}.w_out"])  # noqa: B009
        with pytest.raises(ModelError, match=r"w_out.* does not fit"):
            apply_patch(narrow.model, of_part({f"{module}.w_out": torch.zeros(K, tiny.D)}, narrow))


def test_another_width_is_the_plain_part_and_says_so(
    make_fm: FM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refitted(make_fm("bert"), "bert", tmp_path / "plain", ())
    refitted(make_fm("bert"), "bert", tmp_path / "refitted", (0.5, 0.2))
    for width in (0.5, 0.2, 1.0):
        load_proxy(tmp_path / "refitted", width=width)
    other = load_proxy(tmp_path / "plain", width=0.7)
    assert not caplog.text
    found = load_proxy(tmp_path / "refitted", width=0.7)
    assert "width 0.7: the proxy was refitted for 0.5, 0.2, not for this one" in caplog.text
    assert found.corrections is None
    assert tiny.changed(tiny.snapshot(found.model), other.model.state_dict()) == set()


def test_memory_chooses_among_the_widths_that_are_announced(make_fm: FM, tmp_path: Path) -> None:
    refitted(make_fm("bert"), "bert", tmp_path, (0.5, 0.2))
    states = [frozen_state(load_proxy(tmp_path, width=width).model).values() for width in (1.0, 0.5, 0.2)]
    whole, half, fifth = (sum(tensor.nbytes for tensor in state) for state in states)
    for room, width in ((whole, 1.0), (whole - 1, 0.5), (half, 0.5), (half - 1, 0.2), (fifth, 0.2)):
        assert width_within(tmp_path, room) == width
    with pytest.raises(ModelError, match=r"limits\.memory_gib: .* with the smallest width, 0\.2, not"):
        width_within(tmp_path, fifth - 1)


def test_a_silo_uses_the_files_of_its_width_alone() -> None:
    files = ["model.safetensors", "width-0.5-00001.safetensors", "width-0.55-00001.safetensors", "proxy.json"]

    def used(limits: LimitsSection) -> list[str]:
        return [file for file in files if is_used(file, limits)]

    assert used(LimitsSection()) == ["model.safetensors", "proxy.json"]
    assert used(LimitsSection(width=0.5)) == ["model.safetensors", "width-0.5-00001.safetensors", "proxy.json"]
    assert used(LimitsSection(memory_gib=1.0)) == files


def test_a_width_whose_files_are_not_all_there_is_none(make_fm: FM, tmp_path: Path) -> None:
    refitted(make_fm("bert"), "bert", tmp_path)
    (tmp_path / "width-0.5-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the files width-0\.5-\* do not fit .*b_out"):
        load_proxy(tmp_path, width=0.5)
    load_proxy(tmp_path)


def test_a_refitted_part_can_be_coarse_too(make_fm: FM, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    refitted(make_fm("bert"), "bert", tmp_path)
    full, coarse = (load_proxy(tmp_path, width=0.5, weights=form).model.state_dict() for form in ("full", "int8"))
    changes = corrections(tmp_path)
    for name in (name for name in changes if name.endswith("w_out")):
        assert tiny.same_bits(coarse[name].dense(), quantized(full[name], "int8").dense())  # type: ignore[operator]


@pytest.mark.parametrize("model_type", ["bert", "llama", "vit"])
def test_widths_from_disk_are_those_from_memory(
    model_type: str, fm_directory: FM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds, on_disk = tuple[Any, ...](("memory", "disk")), list[bool]()

    def seen(narrow: Any, *arguments: Any, **named: Any) -> list[float]:
        files, frozen = held(narrow), (p for n, p in layers_of(narrow).named_parameters() if ".lora_" not in n)
        on_disk.append(files is not None and all(parameter in files for parameter in frozen))
        return layer_level(narrow, *arguments, **named)

    monkeypatch.setattr(widths, "layer_level", seen)
    for hold in holds:
        fm = loading.load_model(fm_directory(model_type), tiny.task_of(model_type), tiny.LABELS, seed=0, hold=hold)
        refitted(fm, model_type, tmp_path / hold, (0.5, 0.2))
    assert on_disk == [False, False, True, True]  # as the FM is
    assert files_of(tmp_path / "disk", widths=True) == files_of(tmp_path / "memory", widths=True)
    (tmp_path / "work").mkdir()
    there = load_proxy(tmp_path / "disk", tmp_path / "work", width=0.5).model
    assert held(there) is not None
    here = load_proxy(tmp_path / "disk", width=0.5).model
    assert tiny.changed(tiny.snapshot(here), there.state_dict()) == set()


class Killed(Exception):
    pass


@pytest.mark.parametrize(("hold", "at"), [("memory", (3, 4)), ("disk", range(1, 9))], ids=["memory", "disk"])
def test_widths_whose_making_is_killed_anywhere_go_on_to_the_same_bits(
    hold: str, at: Sequence[int], fm_directory: FM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings_of(tmp_path, fm_directory("bert"))
    values["proxy"] |= {"widths": [0.2, 0.5]}
    values["model"] |= {"hold": hold}
    values |= {"out": str(tmp_path / "out"), "simulation": {"data": str(tmp_path / "data.jsonl"), "silos": 2}}
    config = SimulationConfig.model_validate(values)
    made: list[str] = []

    def build(directory: Path, last: int) -> None:
        def counting(step: str, do: Callable[..., None], is_counted: Callable[..., bool], *arguments: Any) -> None:
            do(*arguments)
            made.extend([step] * is_counted(*arguments))
            if len(made) == last:
                raise Killed

        noted = partial(counting, "note", Journal.note, lambda journal, *_: "width-" in str(journal._directory))
        saved = partial(counting, "save", widths.save_correction, lambda *_: True)
        with monkeypatch.context() as patched:
            patched.setattr(widths, "save_correction", saved)
            patched.setattr(Journal, "note", lambda *arguments: noted(*arguments))
            build_proxy(config, load_owner(config, Digests()), directory)

    build(tmp_path / "whole", -1)
    whole = proxy_files(tmp_path / "whole", Digests())
    assert made == ["note", "note", "save", "save"] * 2  # of two layers and two widths
    assert len([name for name in whole if "width-" in name]) == 4
    assert "widths" in json.loads((tmp_path / "whole" / "record.json").read_text())["seconds"]
    for last in at:
        made.clear()
        with pytest.raises(Killed):
            build(tmp_path / "torn", last)
        assert not (tmp_path / "torn" / "record.json").exists()
        build(tmp_path / "torn", -1)
        assert proxy_files(tmp_path / "torn", Digests()) == whole
        assert made.count("note") == 4  # each is made once
        assert len(list((tmp_path / "torn").iterdir())) == 3  # nothing is left of what was on disk meanwhile
        shutil.rmtree(tmp_path / "torn")


def test_a_simulation_has_the_widths_that_it_announces(fm_directory: FM, tmp_path: Path) -> None:
    made, moved = {}, {}
    for name, share, of in (("wide", 0.0, [0.5]), ("plain", 1.0, []), ("refitted", 1.0, [0.5])):
        values = settings_of(tmp_path, fm_directory("bert")) | {"out": str(tmp_path / name)}
        values["proxy"] |= {"widths": of}
        simulation = {"data": str(tmp_path / "data.jsonl"), "silos": 2, "narrow_fraction": share}
        moved[name] = simulate(SimulationConfig.model_validate(values | {"simulation": simulation}))["bytes"]["down"]
        made[name] = load_file(tmp_path / name / "adapter.safetensors")
    assert tiny.changed(made["plain"], made["refitted"])
    own = sum(path.stat().st_size for path in (tmp_path / "refitted" / "proxy" / "bundle").glob("width-*"))
    assert moved["refitted"] - moved["wide"] == 2 * own


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("proxy", {"widths": [1.0]}, "1 is no share between 0 and 1"),
        ("proxy", {"widths": [0.5, 0.0]}, "0 is no share between 0 and 1"),
        ("proxy", {"widths": [0.5, 0.25, 0.5]}, "0.5 is there twice"),
        ("proxy", {"widths": [0.5], "keep": "layers", "layers": 3}, "keep: layers goes without widths"),
        ("proxy", {"widths": [0.5], "neurons": "all", "allow_whole": True}, "neurons: all goes without widths"),
        ("distillation", {"closed_form_samples": 0}, "proxy.widths needs distillation.closed_form_samples"),
        ("adapter", {"ffn": True}, "proxy.widths goes without adapter.ffn: true"),
    ],
)
def test_widths_that_cannot_be_are_refused(section: str, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, tmp_path) | {"out": str(tmp_path / "out")}
    settings["simulation"] = {"data": str(tmp_path / "data.jsonl"), "silos": 2}
    settings["proxy"] |= {"widths": [0.25, 0.5]}
    assert SimulationConfig.model_validate(settings).proxy.widths == (0.5, 0.25)
    settings[section] = settings[section] | values
    with pytest.raises(ValueError, match=said):
        SimulationConfig.model_validate(settings)


def test_a_mixture_has_no_widths(fm_directory: FM, tmp_path: Path) -> None:
    values = settings_of(tmp_path, fm_directory("mixtral")) | {"out": str(tmp_path / "out")}
    values["proxy"] |= {"widths": [0.5]}
    values["simulation"] = {"data": str(tmp_path / "data.jsonl"), "silos": 2}
    with pytest.raises(ModelError, match=r"proxy\.widths: .* is a mixture of experts"):
        load_fm(SimulationConfig.model_validate(values), tiny.LABELS)


def test_a_proxy_that_lost_no_neurons_has_no_widths(make_fm: FM, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"proxy\.widths: no layer of the proxy lost neurons"):
        refitted(make_fm("bert"), "bert", tmp_path, neurons=tiny.F)
