"""An FM that stays on disk: the same proxy, the same product, in little memory, and after a `kill -9` too."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedpft.config import AdapterSection, DistillationSection, ProxySection, SimulationConfig
from fedpft.errors import ModelError
from fedpft.evaluation import measure_gap
from fedpft.model import adapters, loading
from fedpft.model.architectures import ARCHITECTURES, layer_outputs, layers_of
from fedpft.model.mapped import MappedTensors, Shards, copies, held, hold_on_disk
from fedpft.model.streaming import Visits, at_hand, place, stream
from fedpft.model.walk import Scratch, keep_states
from fedpft.parallel import ALONE, Ranks
from fedpft.proxy.bundle import Proxy, load_proxy, save_bundle
from fedpft.proxy.cut import cut
from fedpft.proxy.distillation import layer_level
from fedpft.proxy.journal import Journal
from fedpft.proxy.selection import Selection, select
from fedpft.server import construction
from fedpft.simulation.run import simulate
from fedpft.tasks import TASKS

FM = Callable[[str], Path]
MIXTURES = [kind for kind, row in ARCHITECTURES.items() if row.experts is not None]
UNLIKE = ("bert", "deberta-v2", "gpt2", "llama", "gemma2", "vit")  # of the others each is much like one of these
every_kind = pytest.mark.parametrize("model_type", [kind for kind in ARCHITECTURES if kind not in MIXTURES])

PROXY = ProxySection(neurons=5, importance="leverage", importance_samples=16)
DISTILLATION = DistillationSection(closed_form_samples=16, steps=0, batch=4)
LORA = AdapterSection(rank=2, alpha=4.0, dropout=0.0)


def load(directory: Path, model_type: str, hold: Any, **named: Any) -> Any:
    return loading.load_model(directory, tiny.task_of(model_type), tiny.LABELS, seed=0, hold=hold, **named)


def made(
    fm: Any,
    model_type: str,
    directory: Path,
    journal: Journal | None = None,
    steps: int = 0,
    mode: str = "whole",
    place: Callable[..., None] = place,
    seen: Callable[[Any], None] = lambda _: None,
    most: int | None = None,
    ranks: Ranks = ALONE,
    **distillation: Any,
) -> tuple[Selection, Proxy]:
    """A distilled proxy of the FM, written to a directory as construction.py writes it."""
    public = tiny.dataset(model_type, 24, labelled=False)
    selection = select(fm, PROXY, public, seed=0, journal=journal, ranks=ranks)
    shards = None if held(fm) is None else Shards(directory)
    model = cut(fm, selection) if shards is None else cut(fm, selection, shards.put)
    if shards is not None:
        hold_on_disk(model, shards.held)
        place(model, "cpu", directory)
        seen(model)
    compressed = tuple(student for student, _ in selection.matched)
    settings = DISTILLATION.model_copy(update={"steps": steps, "mode": mode, "learning_rate": 0.01} | distillation)
    layer_level(
        model,
        fm,
        selection.matched,
        public,
        settings,
        seed=0,
        progress=lambda *_: None,
        journal=journal,
        most=most,
        ranks=ranks,
    )
    proxy = Proxy(model, tiny.processor(model_type), tiny.task_of(model_type), tiny.LABELS, 12, compressed)
    save_bundle(proxy, directory, shards)
    return selection, proxy


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in loading.weight_files(directory) for name, tensor in load_file(file).items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not tiny.same_bits(ours[name], theirs[name])]


# --- the FM -----------------------------------------------------------------------------------------------------------


@every_kind
def test_an_fm_on_disk_computes_what_it_does_in_memory(model_type: str, fm_directory: FM) -> None:
    directory, inputs = fm_directory(model_type), tiny.batch(model_type)
    in_memory, on_disk = (load(directory, model_type, hold) for hold in ("memory", "disk"))
    assert held(in_memory) is None
    files = held(on_disk)
    assert files is not None
    assert all(parameter in files for parameter in layers_of(on_disk).parameters())
    assert tiny.same_bits(tiny.logits(on_disk, inputs), tiny.logits(in_memory, inputs))


def test_what_is_stored_in_another_type_is_in_memory(tmp_path: Path) -> None:
    directory = tiny.write_model("bert", tmp_path / "fm")
    fm = load(directory, "bert", "disk", dtype="bfloat16")
    files = held(fm)
    assert files is not None
    assert not any(parameter in files for parameter in layers_of(fm).parameters())
    assert {parameter.dtype for parameter in layers_of(fm).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_is_in_memory(model_type: str, fm_directory: FM, caplog: pytest.LogCaptureFixture) -> None:
    assert held(load(fm_directory(model_type), model_type, "disk")) is None
    assert "all of it is in memory" in caplog.text


def test_auto_goes_by_the_machines_memory(fm_directory: FM, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = fm_directory("bert")
    size = sum(file.stat().st_size for file in loading.weight_files(directory))
    for memory, on_disk in ((size / loading.IN_MEMORY - 10, True), (size / loading.IN_MEMORY + 10, False)):
        monkeypatch.setattr("fedpft.machine.memory_bytes", lambda memory=memory: memory)
        assert (held(load(directory, "bert", "auto")) is not None) == on_disk


def test_nan_on_disk_is_named(tmp_path: Path) -> None:
    directory = tiny.write_model("bert", tmp_path / "fm")
    tensors = load_file(directory / loading.WEIGHTS)
    name = next(name for name in tensors if "layer.2" in name)
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, directory / loading.WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} holds NaN"):
        load(directory, "bert", "disk")


def test_gradients_go_through_an_fm_on_disk(fm_directory: FM) -> None:
    gradients = []
    for hold in ("memory", "disk"):
        fm = load(fm_directory("bert"), "bert", hold)
        adapters.attach(fm, LORA, seed=0)
        with torch.no_grad():
            for parameter in adapters.lora_parameters(fm):
                parameter.add_(0.01)
        fm(**tiny.batch("bert")).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in fm.parameters() if parameter.requires_grad])
    assert all(tiny.same_bits(a, b) for a, b in zip(*gradients, strict=True))


# --- its files --------------------------------------------------------------------------------------------------------


def test_what_is_written_to_a_writable_tensor_is_in_its_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(5), "b": torch.ones(3, 2, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    files = MappedTensors([tmp_path / "x.safetensors"], writable=True)
    files.tensors["a"][2] = 7.0
    files.release()
    assert files.tensors["a"].tolist() == [0, 0, 7, 0, 0]
    files.flush()
    found = load_file(tmp_path / "x.safetensors")
    assert found["a"].tolist() == [0, 0, 7, 0, 0]
    assert found["b"].tolist() == [[1, 1]] * 3


def test_every_type_and_form_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    tensors = {str(kind): torch.arange(7).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "bool": torch.tensor([True, False, True])}
    save_file(tensors, tmp_path / "x.safetensors", {"some": "metadata of odd length"})
    assert_same(copies([tmp_path / "x.safetensors"]), tensors)
    assert_same(MappedTensors([tmp_path / "x.safetensors"]).tensors, tensors)


def test_shards_are_what_transformers_loads(tmp_path: Path) -> None:
    fm = load(tiny.write_model("gpt2", tmp_path / "fm"), "gpt2", "disk")
    loading.save_parts(fm, tiny.processor("gpt2"), tmp_path / "again", adapters.merged_parts(fm))
    assert len(loading.weight_files(tmp_path / "again")) == 1 + len(layers_of(fm))
    again = load(tmp_path / "again", "gpt2", "memory")
    assert tiny.same_bits(tiny.logits(again, tiny.batch("gpt2")), tiny.logits(fm, tiny.batch("gpt2")))


# --- the proxy --------------------------------------------------------------------------------------------------------


@every_kind
def test_a_proxy_cut_from_disk_is_the_one_cut_in_memory(model_type: str, fm_directory: FM, tmp_path: Path) -> None:
    found = {}
    for hold in ("memory", "disk"):
        fm = load(fm_directory(model_type), model_type, hold)
        adapters.attach(fm, LORA, seed=0)
        found[hold], _ = made(fm, model_type, tmp_path / hold)
    assert all(torch.equal(a, b) for a, b in zip(found["memory"].neurons, found["disk"].neurons, strict=True))
    assert_same(weights(tmp_path / "disk"), weights(tmp_path / "memory"))
    loaded = [load_proxy(tmp_path / hold).model for hold in ("memory", "disk")]
    (tmp_path / "work").mkdir()
    loaded.append(load_proxy(tmp_path / "disk", tmp_path / "work").model)
    first, *others = [tiny.logits(model, tiny.batch(model_type)) for model in loaded]
    assert all(tiny.same_bits(first, other) for other in others)


def test_a_proxy_in_use_leaves_its_files_as_they_are(fm_directory: FM, tmp_path: Path) -> None:
    made(load(fm_directory("bert"), "bert", "disk"), "bert", tmp_path / "bundle")
    before = weights(tmp_path / "bundle")
    (tmp_path / "work").mkdir()
    proxy = load_proxy(tmp_path / "bundle", tmp_path / "work").model
    with torch.no_grad():
        for parameter in proxy.parameters():
            parameter.add_(1.0)
    assert_same(weights(tmp_path / "bundle"), before)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("hold", "mode"), [("memory", "whole"), ("disk", "whole"), ("disk", "layers")])
def test_a_construction_that_is_killed_anywhere_goes_on_to_the_same_bits(
    hold: str, mode: str, fm_directory: FM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpft.proxy.distillation.NOTED", 2)
    journal = Journal(tmp_path / "kept", "a")
    made(load(fm_directory("bert"), "bert", hold), "bert", tmp_path / "whole", journal, steps=5, mode=mode)
    # two layers' neurons, their closed forms, and the steps: of each, or of all and twice
    assert len(list((tmp_path / "kept").iterdir())) == (6 if mode == "layers" else 5)
    note = Journal.note
    for at in range(1, 7):
        noted: list[str] = []

        def counting(self: Journal, step: str, found: dict[str, Tensor], last: int, into: list[str] = noted) -> None:
            note(self, step, found)
            into += [step] if self._directory is not None else []
            if len(into) == last:
                raise Killed

        def make(into: str, last: int) -> None:
            fm = load(fm_directory("bert"), "bert", hold)
            with monkeypatch.context() as counted:
                counted.setattr(Journal, "note", partialmethod(counting, last=last))
                made(fm, "bert", tmp_path / into, Journal(tmp_path / "kept", "a"), steps=5, mode=mode)

        shutil.rmtree(tmp_path / "kept")
        with pytest.raises(Killed):
            make("torn", at)
        make("again", -1)
        assert len(noted) == 6  # each step is made once
        assert_same(weights(tmp_path / "again"), weights(tmp_path / "whole"))
        shutil.rmtree(tmp_path / "torn", ignore_errors=True)
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "qwen3_moe", "vit"])
def test_steps_layer_by_layer_bring_the_proxy_nearer(model_type: str, fm_directory: FM, tmp_path: Path) -> None:
    fm = load(fm_directory(model_type), model_type, "memory")
    inputs, errors = tiny.dataset(model_type, 24, labelled=False).batch(torch.arange(24)), []
    for steps in (0, 30):
        selection, proxy = made(fm, model_type, tmp_path / str(steps), steps=steps, mode="layers")
        assert not any(parameter.requires_grad for parameter in proxy.model.parameters())
        pairs = list(selection.matched)
        with torch.no_grad():
            ours = layer_outputs(proxy.model, [student for student, _ in pairs], inputs)
            theirs = layer_outputs(fm, [teacher for _, teacher in pairs], inputs)
        errors.append([float((a - b).square().mean()) for a, b in zip(ours, theirs, strict=True)])
    assert sum(errors[1]) < 0.98 * sum(errors[0])


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_steps_layer_by_layer_are_the_same_from_disk(model_type: str, fm_directory: FM, tmp_path: Path) -> None:
    for hold, mode in (("memory", "layers"), ("disk", "auto")):
        fm = load(fm_directory(model_type), model_type, hold)
        made(fm, model_type, tmp_path / hold, steps=3, mode=mode)
    assert_same(weights(tmp_path / "disk"), weights(tmp_path / "memory"))


def test_a_journal_of_something_else_or_a_torn_one_is_no_journal(tmp_path: Path) -> None:
    Journal(tmp_path, "a").note("step", {"x": torch.ones(2)})
    assert Journal(tmp_path, "b").recall("step") is None
    recalled = Journal(tmp_path, "a").recall("step")
    assert recalled is not None
    assert recalled["x"].tolist() == [1, 1]
    file = tmp_path / "step.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert Journal(tmp_path, "a").recall("step") is None
    assert Journal(tmp_path, "a").kept("step", lambda: {"x": torch.zeros(1)})["x"].tolist() == [0]


# --- a whole run ------------------------------------------------------------------------------------------------------


def settings_of(tmp_path: Path, fm: Path, hold: str) -> dict[str, Any]:
    """What a simulation.yaml says."""
    simulation = {"data": str(tmp_path / "data.jsonl"), "silos": 2, "partition": {"kind": "iid"}}
    refitted = {"closed_form_samples": 8}
    return tiny.federation(tmp_path, fm, model={"hold": hold}, alignment=refitted, simulation=simulation)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_a_federation_from_disk_comes_to_the_same_product(model_type: str, fm_directory: FM, tmp_path: Path) -> None:
    for hold in ("memory", "disk"):
        values = settings_of(tmp_path, fm_directory(model_type), hold)
        simulate(SimulationConfig.model_validate(values | {"out": str(tmp_path / hold)}))
    ours, theirs = tmp_path / "disk", tmp_path / "memory"
    for name in ("adapter.safetensors", "patch.safetensors"):
        assert_same(load_file(ours / name), load_file(theirs / name))
    assert_same(weights(ours / "merged"), weights(theirs / "merged"))
    results = [json.loads((out / "summary.json").read_text())["metrics"] for out in (ours, theirs)]
    assert results[0] == results[1]
    configs = [json.loads((out / "merged/config.json").read_text()) for out in (ours, theirs)]
    assert configs[0] == configs[1]


def test_an_fm_on_disk_that_is_written_to_meanwhile_is_named(
    fm_directory: FM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings_of(tmp_path, Path(shutil.copytree(fm_directory("bert"), tmp_path / "fm")), "disk")

    def written(*arguments: Any, **named: Any) -> Any:
        with (tmp_path / "fm" / loading.WEIGHTS).open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\0")
        return construct(*arguments, **named)

    construct = construction.layer_level
    monkeypatch.setattr(construction, "layer_level", written)
    with pytest.raises(ModelError, match=r"changed while it was read: model\.path .*model\.safetensors was changed"):
        simulate(SimulationConfig.model_validate(values | {"out": str(tmp_path / "out")}))
    assert not (tmp_path / "out" / "merged").exists()


MEASURED = """
import resource, sys
from pathlib import Path
import torch
from fedpft.config import ProxySection
from fedpft.model import loading
from fedpft.model.mapped import Shards
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import select

loading.load_model(Path(sys.argv[2]), "sequence-classification", ["a"], seed=0, hold="disk")  # to have it all imported
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fm = loading.load_model(Path(sys.argv[1]), "sequence-classification", ["a"], seed=0, hold="disk")
selection = select(fm, ProxySection(neurons=64, importance="weights"))
cut(fm, selection, Shards(Path(sys.argv[3])).put)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_an_fm_is_cut_in_the_memory_of_two_layers(tmp_path: Path) -> None:
    """32 layers of 4 MiB: all of them would be 128 MiB, and the proxy 60."""
    for name, layers in (("large", 32), ("small", 1)):
        sizes = {"num_hidden_layers": layers, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
        tiny.write_model("llama", tmp_path / name, **sizes)
    whole = sum(file.stat().st_size for file in loading.weight_files(tmp_path / "large"))
    assert whole > 100 << 20
    command = [sys.executable, "-c", MEASURED, *(str(tmp_path / name) for name in ("large", "small", "bundle"))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) << 10 < 32 << 20


# --- on a GPU, here another place in the memory of the CPU ------------------------------------------------------------


class Places(TorchDispatchMode):
    """Fails where something that is on disk is computed with together with something that would be on a GPU.

    What comes of the one is as good as on disk too, and what comes of the other on the GPU, copies apart.
    """

    COPIES = ("aten._to_copy.default", "aten.copy_.default")  # which may bring a tensor to another device

    def __init__(self) -> None:
        super().__init__()
        self.disk, self.gpu = set[int](), set[int]()  # addresses
        self.kept: list[Tensor] = []  # so that no address is used again
        self.computed = 0

    def add(self, model: Any) -> None:
        files = held(model)
        assert files is not None
        for tensor in (*model.parameters(), *model.buffers()):
            self._put(self.disk if tensor in files else self.gpu, tensor)

    def _put(self, place: set[int], tensor: Tensor) -> None:
        place.add(tensor.untyped_storage().data_ptr())
        self.kept.append(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
        numbers = {
            each.untyped_storage().data_ptr() for each in given if each.is_floating_point() and each.dim() and len(each)
        }
        on_disk, on_gpu, copies = numbers & self.disk, numbers & self.gpu, str(function) in self.COPIES
        assert copies or not (on_disk and on_gpu), f"{function} of both"
        found = function(*arguments, **(named or {}))
        self.computed += bool(on_gpu)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and (on_disk or on_gpu):
                place = leaf.untyped_storage().data_ptr()
                if place not in self.disk and place not in self.gpu:
                    self._put(self.gpu if on_gpu or copies else self.disk, leaf)
        return found


def streamed(model: Any, _device: Any, scratch: Path) -> None:
    """As `place` on a GPU."""
    if (files := held(model)) is not None:
        keep_states(model, scratch)
        stream(model, files, torch.device("cpu"))


@pytest.mark.parametrize(
    ("model_type", "mode"),
    [
        *(
            pytest.param(kind, "layers", marks=() if kind in UNLIKE else pytest.mark.slow)
            for kind in ARCHITECTURES
            if kind not in MIXTURES
        ),
        ("bert", "whole"),
        ("llama", "whole"),
    ],
)
def test_layers_are_on_the_device_while_they_compute(
    model_type: str, mode: str, fm_directory: FM, tmp_path: Path
) -> None:
    public, task, found, gaps = tiny.dataset(model_type, 24, labelled=False), TASKS[tiny.task_of(model_type)], [], []
    for hold in ("memory", "disk"):
        fm, directory, places = load(fm_directory(model_type), model_type, hold), tmp_path / hold, Places()
        adapters.attach(fm, LORA, seed=0)
        if hold == "disk":
            streamed(fm, None, tmp_path)
            places.add(fm)
        with places if hold == "disk" else nullcontext():
            selection, proxy = made(fm, model_type, directory, steps=2, mode=mode, place=streamed, seen=places.add)
            pairs = selection.matched
            gaps.append(measure_gap(task, proxy.model, fm, pairs, public, samples=4, seed=0))
            if hold == "disk":
                assert places.computed > 100
        for model in (fm, proxy.model):
            files = held(model)
            assert files is None or all(p in files for n, p in layers_of(model).named_parameters() if "lora" not in n)
        found.append(weights(directory))
    assert_same(*found)
    assert gaps[0] == gaps[1]


def test_no_more_than_two_layers_are_on_the_device(
    fm_directory: FM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fm, there, most = load(fm_directory("bert"), "bert", "disk"), set[int](), list[int]()
    adapters.attach(fm, LORA, seed=0)
    here = Visits.here

    @contextmanager
    def counting(visits: Visits, **named: Any) -> Iterator[None]:
        with here(visits, **named):
            before = id(visits) in there
            there.add(id(visits))
            most.append(len(there))
            yield
            if not before:
                there.remove(id(visits))

    monkeypatch.setattr(Visits, "here", counting)
    streamed(fm, None, tmp_path)
    made(fm, "bert", tmp_path / "proxy", steps=2, mode="layers", place=streamed)
    assert max(most) == 2
    assert not there


@pytest.mark.parametrize("model_type", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_federation_whose_layers_are_copied_to_the_device_comes_to_the_same_product(
    model_type: str, fm_directory: FM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hold in ("memory", "disk"):
        monkeypatch.setattr(construction, "place", streamed)
        values = settings_of(tmp_path, fm_directory(model_type), hold)
        values |= {"plug_in": {"layer_scales": True, "steps": 2, "batch": 2}, "adapter": {"rank": 2, "ffn": True}}
        simulate(SimulationConfig.model_validate(values | {"out": str(tmp_path / hold)}))
    ours, theirs = tmp_path / "disk", tmp_path / "memory"
    for name in ("adapter.safetensors", "patch.safetensors"):
        assert_same(load_file(ours / name), load_file(theirs / name))
    assert_same(weights(ours / "merged"), weights(theirs / "merged"))


def test_a_pass_that_fails_leaves_no_layer_on_the_device(fm_directory: FM, tmp_path: Path) -> None:
    fm = load(fm_directory("bert"), "bert", "disk")
    streamed(fm, None, tmp_path)
    files, layer = held(fm), layers_of(fm)[1]
    assert files is not None

    def fail() -> None:
        with at_hand(fm, [0, 1]):
            assert not any(parameter in files for parameter in layer.parameters())
            raise Killed

    with pytest.raises(Killed):
        fail()
    assert all(parameter in files for parameter in layer.parameters())


def test_states_are_in_a_file_and_come_back_as_they_were(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "new")
    tensors = [torch.randn(3, n, 4).to(dtype) for n in (2, 5) for dtype in (torch.float32, torch.bfloat16)]
    gets = [scratch.put(tensor) for tensor in tensors]
    end = scratch.size
    for get, tensor in zip(gets, tensors, strict=True):
        assert tiny.same_bits(get(), tensor)
    gets[1:3] = [scratch.put(tensor + 1) for tensor in tensors[1:3]]  # each before its place is free
    gets[3] = scratch.put(tensors[3])
    assert all(tiny.same_bits(get(), tensor + 1) for get, tensor in zip(gets[1:3], tensors[1:3], strict=True))
    assert tiny.same_bits(gets[0](), tensors[0])
    assert scratch.size < 2 * end
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.cuda
@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2", "vit"])
@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_an_fm_on_disk_computes_on_a_gpu(model_type: str, mode: str, fm_directory: FM, tmp_path: Path) -> None:
    public, task, found, gaps = tiny.dataset(model_type, 24, labelled=False), TASKS[tiny.task_of(model_type)], [], []

    def on_gpu(model: Any, _device: Any, scratch: Path) -> None:
        place(model, "cuda", scratch)

    for hold in ("memory", "disk"):
        fm = load(fm_directory(model_type), model_type, hold)
        on_gpu(fm, None, tmp_path)
        adapters.attach(fm, LORA, seed=0)
        selection, proxy = made(fm, model_type, tmp_path / hold, steps=2, mode=mode, place=on_gpu)
        assert {parameter.device.type for parameter in adapters.lora_parameters(fm)} == {"cuda"}
        gaps.append(measure_gap(task, proxy.model, fm, selection.matched, public, samples=4, seed=0))
        found.append(weights(tmp_path / hold))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)
    assert gaps[1].hidden_error == pytest.approx(gaps[0].hidden_error, rel=1e-3)
    assert gaps[1].gradient_cosine == pytest.approx(gaps[0].gradient_cosine, rel=1e-3)
