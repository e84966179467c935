"""FM and proxy in a narrow type: what is held in which, and how far a federation in bfloat16 is from one in float32."""

import json
import logging
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import test_causal_lm as lm
import tiny
import torch
import transformers
from bits import bits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpft.config import (
    AdapterSection,
    AlignmentSection,
    DistillationSection,
    Dtype,
    LimitsSection,
    RoundSettings,
    ServerConfig,
    TrainingSection,
)
from fedpft.demo.run import run_federation
from fedpft.errors import DataError, ModelError
from fedpft.model import adapters, loading
from fedpft.model.architectures import ARCHITECTURES, head_of, in_head
from fedpft.model.lora import lora_linear
from fedpft.model.precision import DTYPES, Masters, dtype_of
from fedpft.products import add_product
from fedpft.proxy.bundle import Proxy, apply_patch, load_proxy, patch, save_bundle
from fedpft.proxy.cut import cut
from fedpft.proxy.distillation import ffn_norms, layer_level, neuron_level
from fedpft.proxy.selection import select
from fedpft.server.construction import check_made_for
from fedpft.tasks import TASKS
from fedpft.training import LocalResult, train_round

FM = Callable[[str], Path]
LORA = AdapterSection(rank=4, alpha=8.0, dropout=0.0)
K = 40
SOME = ["bert", "modernbert", "vit", "gpt2", "opt", "llama", "gemma2", "qwen3_moe"]
# How far apart two runs may be of which one is in float32. A rounding is up to 2^-8 or 2^-11 of a number; what comes of
# it after some layers and steps was looked at: half of this, or less. docs/language-models.md has a real model's.
APART: dict[Dtype, float] = {"bfloat16": 0.1, "float16": 0.03}
FEDERATION_APART = 0.1  # nats a token, of 6


def stored(directory: Path, target: Path, dtype: Callable[[str], torch.dtype]) -> Path:
    """A copy of an FM with each tensor stored in a type that depends on its name."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    tensors = {name: tensor.to(dtype(name)) for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def types_of(model: nn.Module) -> dict[bool, set[torch.dtype]]:
    """Of what trains (True) and of what does not."""
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for name, parameter in model.named_parameters():
        found[".lora_" in name or in_head(model, name)].add(parameter.dtype)
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    """In units of the wanted one's norm."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def answers_apart(model_type: str, found: Tensor, wanted: Tensor) -> float:
    """`distance` of logits `[B, C]`. Of a mixture the median sample's: at a near tie a router takes another expert for
    a rounding, and that one sample's answer is another."""
    if model_type not in tiny.MIXTURES:
        return distance(found, wanted)
    return statistics.median(distance(a, b) for a, b in zip(found, wanted, strict=True))


@dataclass
class Trip:
    """What one way through all of the method came to."""

    distillation: list[float]
    round: LocalResult
    start: adapters.Adapter
    plugged_in: Tensor
    merged: Tensor
    sent: nn.Module
    received: nn.Module
    directory: Path

    @property
    def change(self) -> Tensor:
        """Of the adapter in the round."""
        return torch.cat([(self.round.adapter[name] - self.start[name]).flatten() for name in sorted(self.start)])


def travel(model_type: str, directory: Path, root: Path, dtype: Dtype, device: str = "cpu") -> Trip:
    """Load, cut, distil, send, train a round, plug in, merge, and load the product with transformers."""
    task, inputs, data = tiny.task_of(model_type), tiny.batch(model_type), tiny.dataset(model_type, 24)
    fm = loading.load_model(directory, task, tiny.LABELS, seed=0, dtype=dtype).to(device)
    adapters.attach(fm, LORA, seed=0)
    selection = select(fm, tiny.by_weights(neurons=K))
    proxy = cut(fm, selection)
    losses = layer_level(
        proxy,
        fm,
        selection.matched,
        tiny.dataset(model_type, 32, labelled=False, seed=1),
        DistillationSection(closed_form_samples=16, closed_form_ridge=1e-3, steps=6, batch=8, learning_rate=6e-4),
        seed=0,
        progress=lambda _step, _loss: None,
    )
    whole = Proxy(proxy, tiny.processor(model_type), task, tiny.LABELS, 12, (1, 2))
    save_bundle(whole, root / "bundle")
    received = load_proxy(root / "bundle").model.to(device)
    adapters.attach(received, LORA, seed=0)
    start = adapters.extract(received)
    result = train_round(
        TASKS[task],
        received,
        data,
        RoundSettings(
            seed=0,
            adapter=LORA,
            training=TrainingSection(rounds=1, batch=8, local_epochs=2, learning_rate=0.005),
            inactive_below=0.01,
        ),
        silo="north",
        round=1,
        compressed=(1, 2),
        count_inactivity=True,
        limits=LimitsSection(max_batch=4),
    )
    adapters.plug_in(fm.cpu(), result.adapter, selection.layers, selection.neurons)
    plugged_in = tiny.logits(fm, inputs)
    adapters.merge(fm)
    loading.save_model(fm, tiny.processor(model_type), root / "merged")
    merged = tiny.AUTO[task].from_pretrained(root / "merged").eval()
    return Trip(losses, result, start, plugged_in, tiny.logits(merged, inputs), proxy, received, root)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", SOME)
def test_all_of_the_method_in_a_narrow_type_comes_to_what_float32_comes_to(
    model_type: str, dtype: Dtype, fm_directory: FM, tmp_path: Path
) -> None:
    wide, found = (travel(model_type, fm_directory(model_type), tmp_path / name, name) for name in ("float32", dtype))
    kind, apart = DTYPES[dtype], APART[dtype]
    assert types_of(found.received) == types_of(found.sent) == {True: {torch.float32}, False: {kind}}
    assert bits(adapters.frozen_state(found.received)) != bits(adapters.frozen_state(wide.received))
    assert {tensor.dtype for tensor in found.round.adapter.values()} == {torch.float32}
    assert found.distillation == pytest.approx(wide.distillation, rel=apart)
    assert found.round.metrics["train_loss"] == pytest.approx(wide.round.metrics["train_loss"], rel=apart)
    assert float(torch.cosine_similarity(found.change, wide.change, dim=0)) > 1.0 - apart
    assert answers_apart(model_type, found.plugged_in, wide.plugged_in) < apart
    assert answers_apart(model_type, found.merged, found.plugged_in) < apart
    merged = load_file(tmp_path / dtype / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {kind}
    for directory in ("merged", "bundle"):
        assert json.loads((tmp_path / dtype / directory / "config.json").read_text())["dtype"] == dtype


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", [*SOME, "clip"])
def test_all_of_the_method_on_a_gpu_comes_to_what_a_cpu_comes_to(
    model_type: str, dtype: Dtype, fm_directory: FM, tmp_path: Path
) -> None:
    wide = travel(model_type, fm_directory(model_type), tmp_path / "cpu", "float32")
    found = travel(model_type, fm_directory(model_type), tmp_path / "cuda", dtype, "cuda")
    apart = APART.get(dtype, 0.01)
    assert found.distillation == pytest.approx(wide.distillation, rel=apart)
    assert found.round.metrics["train_loss"] == pytest.approx(wide.round.metrics["train_loss"], rel=apart)
    assert float(torch.cosine_similarity(found.change, wide.change, dim=0)) > 1.0 - apart
    assert answers_apart(model_type, found.plugged_in, wide.plugged_in) < apart
    assert found.round.inactivity is not None
    assert wide.round.inactivity is not None
    tokens = int(wide.round.inactivity["1.tokens"])
    for name, counts in wide.round.inactivity.items():  # a value at the threshold falls on either side of it
        assert int((found.round.inactivity[name] - counts).abs().max()) <= max(1, apart * tokens)


def test_what_the_silos_hold_is_what_the_server_holds_bit_for_bit(fm_directory: FM, tmp_path: Path) -> None:
    """Before and after an alignment, whose patch is in the proxy's type."""
    trip = travel("llama", fm_directory("llama"), tmp_path, "bfloat16")
    ours, theirs = trip.sent, trip.received
    adapters.load(ours, trip.start)
    adapters.load(theirs, trip.start)
    assert tiny.changed(tiny.snapshot(ours), tiny.snapshot(theirs)) == set()
    before, updated = tiny.snapshot(ours), {1: torch.tensor([3, 0, 7]), 2: torch.arange(9)}
    fm = loading.load_model(fm_directory("llama"), "sequence-classification", tiny.LABELS, seed=0, dtype="bfloat16")
    adapters.attach(fm, LORA, seed=0)
    public = tiny.dataset("llama", 32, labelled=False, seed=1)
    neuron_level(
        ours,
        fm,
        [(1, 1), (2, 2)],
        updated,
        public,
        AlignmentSection(steps=3, batch=8, learning_rate=3e-3),
        seed=0,
        round=1,
        progress=lambda _step, _loss: None,
    )
    changes = patch(ours, updated, ffn_norms(ours, [1, 2]))
    assert {tensor.dtype for name, tensor in changes.items() if "@rows" not in name} == {torch.bfloat16}
    apply_patch(theirs, changes)
    assert len(tiny.changed(before, tiny.snapshot(ours))) > 4
    assert tiny.changed(tiny.snapshot(ours), tiny.snapshot(theirs)) == set()
    batch = tiny.batch("llama")
    assert torch.equal(tiny.logits(ours, batch), tiny.logits(theirs, batch))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_weight_of_a_dropped_neuron_is_sent_in_a_narrow_type(dtype: Dtype, fm_directory: FM, tmp_path: Path) -> None:
    fm = loading.load_model(fm_directory("bert"), "sequence-classification", tiny.LABELS, seed=0, dtype=dtype)
    selection = select(fm, tiny.by_weights(neurons=K))
    task = "sequence-classification"
    save_bundle(Proxy(cut(fm, selection), tiny.processor("bert"), task, tiny.LABELS, 12, (1, 2)), tmp_path / "bundle")
    content = b"".join(path.read_bytes() for path in sorted((tmp_path / "bundle").iterdir()))
    kept = set(selection.neurons[1].tolist())
    for neuron in range(tiny.F):
        for name, rows in tiny.ffn(fm.state_dict(), "bert", 1).items():
            if name != "b_out" and rows.dim() > 1:
                for held in (rows[neuron], rows[neuron].float()):
                    is_there = bits(held)[0] in content
                    assert is_there == (neuron in kept and held.dtype == DTYPES[dtype]), (name, neuron)


# --- what an FM is held in --------------------------------------------------------------------------------------------


def load(directory: Path, dtype: Dtype = "auto") -> nn.Module:
    return loading.load_model(directory, "sequence-classification", tiny.LABELS, seed=0, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_auto_is_what_the_fm_is_stored_in(
    kind: torch.dtype, held: torch.dtype, fm_directory: FM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fm = load(stored(fm_directory("bert"), tmp_path / "fm", lambda _: kind))
    assert dtype_of(fm) == fm.config.dtype == held
    assert types_of(fm) == {True: {torch.float32}, False: {held}}
    assert f"the FM is held in {str(held)[6:]}" in caplog.text
    assert "all are held" not in caplog.text


def test_of_a_mixed_checkpoint_the_type_of_most_values_counts_and_it_is_said(
    fm_directory: FM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def kind(name: str) -> torch.dtype:
        return torch.float32 if "LayerNorm" in name else torch.bfloat16

    directory = stored(fm_directory("bert"), tmp_path / "fm", kind)
    assert types_of(load(directory)) == {True: {torch.float32}, False: {torch.bfloat16}}
    norms = sum(t.numel() for name, t in load_file(directory / "model.safetensors").items() if "LayerNorm" in name)
    assert f"are stored as BF16, {norms} as F32: all are held in bfloat16; model.dtype chooses" in caplog.text
    assert dtype_of(load(directory, "float32")) == torch.float32


def test_auto_looks_at_every_shard(fm_directory: FM, tmp_path: Path) -> None:
    directory = stored(fm_directory("llama"), tmp_path / "fm", lambda _: torch.bfloat16)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.bfloat16)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    assert dtype_of(load(directory)) == torch.bfloat16


def test_numbers_too_large_for_float16_are_named_with_the_way_out(fm_directory: FM, tmp_path: Path) -> None:
    directory = stored(fm_directory("bert"), tmp_path / "fm", lambda _: torch.float32)
    tensors = load_file(directory / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.bias"][3] = 1e5
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layer\.1\.output\.dense\.bias holds NaN or infinity in float16") as caught:
        load(directory, "float16")
    assert "bfloat16" in caught.value.remedy
    load(directory, "bfloat16")


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "bert without pooler"])
def test_a_drawn_head_is_the_same_whatever_the_fm_is_held_in(model_type: str, fm_directory: FM, tmp_path: Path) -> None:
    kind, directory = model_type, None
    if model_type == "bert without pooler":
        kind, directory = "bert", tiny.without_pooler(tmp_path / "fm")
    task, labels = tiny.task_of(kind), (*tiny.LABELS, "ice")
    wide, narrow = (
        loading.load_model(directory or fm_directory(kind), task, labels, seed=5, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    assert wide.is_drawn
    assert narrow.is_drawn
    own = {name: t.shape for name, t in load_file((directory or fm_directory(kind)) / "model.safetensors").items()}
    drawn = set()
    for (name, ours), theirs in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        if in_head(wide, name) and own.get(name) != ours.shape:
            drawn.add(name)
            assert tiny.same_bits(ours.detach(), theirs.detach()), name
        else:
            assert torch.equal(ours.bfloat16(), theirs.bfloat16()), name
    assert drawn


def test_a_proxy_of_another_type_than_the_fm_is_refused(fm_directory: FM, tmp_path: Path) -> None:
    values = lm.settings_of(tmp_path, labels="labels.txt") | {"out": str(tmp_path / "out")}
    values["model"] |= {"task": "sequence-classification", "max_tokens": 12, "labels": str(tmp_path / "labels.txt")}
    (tmp_path / "labels.txt").write_text("\n".join(tiny.LABELS), encoding="utf-8")
    config = ServerConfig.model_validate(values)
    proxy = Proxy(load(fm_directory("bert")), None, "sequence-classification", tiny.LABELS, 12, (1, 2))
    check_made_for(config, tmp_path, proxy, torch.float32)
    with pytest.raises(ModelError, match="built in float32, the FM is held in bfloat16") as caught:
        check_made_for(config, tmp_path, proxy, torch.bfloat16)
    assert "model.dtype: float32" in caught.value.remedy


def test_a_bundle_whose_weights_are_of_another_type_than_it_says_is_refused(fm_directory: FM, tmp_path: Path) -> None:
    fm = load(fm_directory("bert"), "bfloat16")
    task, proxy = "sequence-classification", cut(fm, select(fm, tiny.by_weights(neurons=K)))
    save_bundle(Proxy(proxy, tiny.processor("bert"), task, tiny.LABELS, 12, (1, 2)), tmp_path / "bundle")
    load_proxy(tmp_path / "bundle")
    path = tmp_path / "bundle" / "config.json"
    config = path.read_text()
    for said, message in (("float32", "is torch.bfloat16, not torch.float32"), ("float64", "dtype is float64")):
        path.write_text(config.replace('"bfloat16"', f'"{said}"'))
        with pytest.raises(ModelError, match=message):
            load_proxy(tmp_path / "bundle")


# --- what trains ------------------------------------------------------------------------------------------------------


def test_small_steps_add_up_in_a_narrow_parameter() -> None:
    parameter, alone = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    masters = Masters([parameter])
    optimizers = [torch.optim.SGD(each, lr=1e-3) for each in (masters.wide, [alone])]
    for _ in range(40):
        for each in (parameter, alone):
            each.sum().backward()
        masters.take_gradients()
        for optimizer in optimizers:
            optimizer.step()
        masters.round()
        alone.grad = None
    assert torch.equal(alone, torch.ones(3, dtype=torch.bfloat16))  # a step is less than half a unit in the last place
    assert torch.equal(parameter, torch.full((3,), 0.96, dtype=torch.bfloat16))
    assert parameter.grad is None


def test_a_float32_parameter_is_its_own_master() -> None:
    parameter = nn.Parameter(torch.ones(3))
    masters = Masters([parameter])
    assert masters.wide[0].data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_lora_in_float32_on_a_narrow_layer(kind: torch.dtype, dropout: float) -> None:
    n, d, e, r = 33, 24, 20, 4
    x, weight, bias = (torch.randn(shape).to(kind) for shape in ((n, d), (e, d), (e,)))
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((r, d), (e, r)))
    out = torch.randn(n, e)

    def through(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        y = lora_linear(tensors[0], *tensors[1:3], *tensors[3:], scale=0.5, dropout=dropout)
        return (y, *torch.autograd.grad((y * out.to(y.dtype)).sum(), tensors[3:]))

    found = through(x, weight, bias, a, b)
    wanted = through(*(t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, bias, a, b)))
    assert [tensor.dtype for tensor in found] == [kind, torch.float32, torch.float32]
    for ours, theirs in zip(found, wanted, strict=True):
        assert distance(ours, theirs) < 4 * torch.finfo(kind).eps


def test_training_computes_what_evaluation_does_but_for_rounding(fm_directory: FM) -> None:
    """peft's own layer, which evaluation goes through, multiplies with A and B in float32."""
    fm, inputs = load(fm_directory("llama"), "bfloat16"), tiny.batch("llama")
    adapters.attach(fm, LORA, seed=0)
    generator = torch.Generator().manual_seed(0)
    tuned = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in adapters.extract(fm).items()}
    adapters.load(fm, tuned)
    evaluated = tiny.logits(fm, inputs)
    with adapters.training(fm, 0.0):
        trained = tiny.logits(fm, inputs)
    assert not torch.equal(trained, evaluated)
    assert distance(trained, evaluated) < APART["bfloat16"]


def test_a_task_head_is_float32_and_gets_its_input_so(fm_directory: FM) -> None:
    fm = load(fm_directory("modernbert"), "bfloat16")
    given: dict[str, torch.dtype] = {}
    for name in head_of(fm):
        fm.get_submodule(name).register_forward_pre_hook(
            lambda _m, inputs, name=name: given.update({name: inputs[0].dtype})
        )
    logits = tiny.logits(fm, tiny.batch("modernbert"))
    assert logits.dtype == torch.float32
    assert given == dict.fromkeys(head_of(fm), torch.float32)


def test_merging_rounds_once(fm_directory: FM) -> None:
    """W and B A alpha / R are added in float32: a change is not rounded before it is added."""
    fm = load(fm_directory("llama"), "bfloat16")
    adapters.attach(fm, LORA, seed=0)
    generator = torch.Generator().manual_seed(0)
    tuned = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in adapters.extract(fm).items()}
    adapters.load(fm, tuned)
    before = tiny.snapshot(fm)
    adapters.merge(fm)
    name = "model.layers.1.self_attn.q_proj"
    change = 2.0 * tuned[f"{name}.lora_B.weight"].double() @ tuned[f"{name}.lora_A.weight"].double()
    wanted = before[f"{name}.base_layer.weight"].double() + change
    error = (fm.get_parameter(f"{name}.weight").double() - wanted).abs()
    assert bool((error <= 2.0**-8 * wanted.abs() * 1.001).all())


def test_a_merged_weight_that_float16_cannot_hold_is_named(fm_directory: FM) -> None:
    fm = load(fm_directory("llama"), "float16")
    adapters.attach(fm, LORA, seed=0)
    adapters.load(fm, {name: torch.full_like(t, 200.0) for name, t in adapters.extract(fm).items()})
    with pytest.raises(ModelError, match=r"q_proj: its weight with LoRA is too large for float16"):
        adapters.merge(fm)


def one_step(fm: nn.Module) -> Tensor:
    """What a round of one step changes in LoRA's B."""
    adapters.attach(fm, LORA, seed=0)
    settings = RoundSettings(seed=0, adapter=LORA, training=TrainingSection(rounds=1, batch=8), inactive_below=0.01)
    arguments: dict[str, Any] = {"silo": "north", "round": 1, "compressed": (), "count_inactivity": False}
    task, data = TASKS["sequence-classification"], tiny.dataset("llama", 8)
    found = train_round(task, fm, data, settings, **arguments, limits=LimitsSection()).adapter
    return torch.cat([tensor.flatten() for name, tensor in sorted(found.items()) if "lora_B" in name])


def test_gradients_too_small_for_float16_arrive(fm_directory: FM) -> None:
    """Those behind a head that is nearly 0 are 1e-7, of which float16 has one digit."""
    found = []
    for dtype in ("float32", "float16"):
        fm = load(fm_directory("llama"), dtype)
        with torch.no_grad():
            fm.get_parameter("score.weight").mul_(1e-5)
        found.append(one_step(fm))
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.95


def test_float16_that_overflows_ends_in_a_clear_error(fm_directory: FM) -> None:
    fm = load(fm_directory("llama"), "float16")
    with torch.no_grad():
        fm.get_parameter("model.norm.weight").mul_(6e4)
    with pytest.raises(DataError, match="the training loss is not finite"):
        one_step(fm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inner", [1, 7, 8, 21])
def test_a_product_is_rounded_once(dtype: torch.dtype, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpft.products.WIDENED", 7)
    left, right, before = (torch.randn(size) for size in ((5, inner), (inner, 6), (5, 6)))
    right, total = right.to(dtype), before.to(dtype, copy=True)
    wanted, close = total.double() + left.double() @ right.double(), max(0.51 * torch.finfo(dtype).eps, 1e-5)
    assert add_product(total, left, right) is total
    torch.testing.assert_close(total.double(), wanted, rtol=close, atol=1e-6)
    by_columns = right.t().contiguous().t()
    again = add_product(before.to(dtype), left, by_columns)
    torch.testing.assert_close(again.double(), wanted, rtol=close, atol=1e-6)


# --- a federation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """OUT and summary of the same federation with the same decoder, stored in float32 and in bfloat16."""
    found = {}
    for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        root = tmp_path_factory.mktemp(name)
        stored(lm.write_fm(root / "as-written"), root / "fm", lambda _, kind=kind: kind)
        settings = lm.settings_of(root)
        settings["training"]["learning_rate"] = 0.006  # where a round is no leap, which would magnify any difference
        found[name] = (root / "out", run_federation(root, settings, lm.silos_of(root)))
    return found


@pytest.mark.slow
def test_a_federation_in_bfloat16_comes_to_what_one_in_float32_comes_to(
    runs: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    wide, narrow = (runs[name][1] for name in ("float32", "bfloat16"))
    for row in ("zero_shot", "proxy", "plugged_in"):
        found, wanted = narrow["metrics"][row]["loss"], wide["metrics"][row]["loss"]
        assert found == pytest.approx(wanted, abs=FEDERATION_APART), row
    gain = wide["metrics"]["zero_shot"]["loss"] - wide["metrics"]["plugged_in"]["loss"]
    assert gain > 5 * FEDERATION_APART  # or the comparison would say nothing
    assert narrow["bytes"]["up"] == pytest.approx(wide["bytes"]["up"], rel=0.01)  # adapters are float32 in both
    sizes = [(runs[name][0] / "proxy" / "bundle" / "model.safetensors").stat().st_size for name in runs]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_the_product_in_bfloat16_loads_where_people_load_it(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    out, summary = runs["bfloat16"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "merged")
    dataset = lm.encoded(Path(summary["config"]["test_data"]), tokenizer)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(out / "adapter").eval()
    assert dtype_of(merged) == merged.config.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in load_file(out / "adapter" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    for model in (merged, adapted):
        with torch.no_grad():
            losses = lm.plain_losses(model, dataset.batch(torch.arange(5))).double()
        loss = float(losses.sum() / (losses != 0).sum())
        assert loss == pytest.approx(summary["metrics"]["plugged_in"]["loss"], abs=FEDERATION_APART)
