"""A silo that holds the proxy's matrices in 8 or 4 bits."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from devices import each_device
from safetensors.torch import load_file, save_file
from test_training import settings, train
from test_width import settings_of, written
from torch import Tensor, nn

from fedpft.config import FewBits, LimitsSection, RoundSettings, SimulationConfig
from fedpft.demo.run import run_federation
from fedpft.errors import ConfigError, ModelError
from fedpft.model import adapters
from fedpft.model.adapters import attach
from fedpft.model.loading import load_model
from fedpft.model.lora import lora_linear
from fedpft.model.quantized import AT_ONCE, BLOCK, QuantizedWeight, dense_bytes, held_bytes, quantizable, quantized
from fedpft.proxy.bundle import Proxy, apply_patch, load_proxy
from fedpft.silo.learner import Learner
from fedpft.simulation.run import simulate

FM = Callable[[str], Any]
FORMS: tuple[FewBits, ...] = get_args(FewBits)
each_form = pytest.mark.parametrize("form", FORMS)
# Each kind of architecture with one of the forms
each_kind = pytest.mark.parametrize(
    ("model_type", "form"), [(kind, FORMS[place % len(FORMS)]) for place, kind in enumerate(tiny.KINDS)]
)
# NormalFloat's values, as the paper's appendix E gives them, to four digits
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
LEVELS = {"int8": torch.arange(-127, 128) / 127, "int4": torch.tensor(NF4)}
# A step is a level's distance to the next; bitsandbytes looks between rounded levels, and rounds to the weight's type.
SLACK = {torch.float32: 1e-3, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator)
    return drawn * torch.logspace(-3, 3, rows)[:, None]


def largest_of_blocks(weight: Tensor) -> Tensor:
    """For each value the largest size in its block."""
    blocks = nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(2, keepdim=True).expand_as(blocks)
    return largest.flatten(1)[:, : weight.shape[1]]


# --- one weight -------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 192, 576])
@pytest.mark.parametrize("dtype", SLACK)
@each_device
def test_each_value_is_the_nearest_that_there_is(form: FewBits, columns: int, dtype: torch.dtype, device: str) -> None:
    weight = matrix(9, columns).to(dtype)
    held = quantized(weight.to(device), form)
    assert (held.shape, held.dtype) == (weight.shape, dtype)
    share = weight.float() / largest_of_blocks(weight.float())
    nearest = (share[..., None] - LEVELS[form]).abs().amin(-1)
    found = (held.dense().cpu().float() - weight.float()).abs() / largest_of_blocks(weight.float())
    assert (found - nearest).max() < SLACK[dtype]


def test_a_large_weight_is_the_same_as_its_rows() -> None:
    weight = matrix(2 * AT_ONCE // 512 + 3, 512)  # quantised in three parts
    for form in FORMS:
        rows = torch.cat([quantized(part, form).dense() for part in weight.split(100)])
        assert tiny.same_bits(quantized(weight, form).dense(), rows)


@each_form
def test_zeros_stay(form: FewBits) -> None:
    assert not quantized(torch.zeros(3, 70), form).dense().any()


@each_form
def test_it_takes_the_bits_that_it_says(form: FewBits) -> None:
    held = quantized(matrix(16, 256), form)
    assert held.held_bytes == sum(each.untyped_storage().nbytes() for each in (held.codes, held.scales))
    bits = 8 * held.held_bytes / (16 * 256)
    assert bits == {"int8": 8.5, "int4": 4.5}[form]


@each_form
def test_the_order_in_which_rows_are_written_leaves_no_trace(form: FewBits) -> None:
    whole, changed = matrix(12, 70), matrix(12, 70, seed=1)
    held, again = quantized(whole, form), quantized(whole, form)
    for rows in ([3, 1], [8, 3]):
        held.index_copy_(0, torch.tensor(rows), changed[rows])
    again.index_copy_(0, torch.tensor([8, 1, 3]), changed[[8, 1, 3]])
    expected = whole.index_copy(0, torch.tensor([1, 3, 8]), changed[[1, 3, 8]])
    assert tiny.same_bits(held.dense(), again.dense())
    assert tiny.same_bits(held.dense(), quantized(expected, form).dense())
    held.copy_(changed)
    assert tiny.same_bits(held.dense(), quantized(changed, form).dense())


def test_nothing_is_written_where_it_would_be_lost() -> None:
    held = quantized(matrix(4, 70), "int4")
    for write in (
        lambda: held.__setitem__(2, 1.0),
        lambda: held.add_(1.0),
        lambda: held[1:3].fill_(0.0),
        lambda: held.t().copy_(torch.zeros(70, 4)),
    ):
        before = held.dense()
        with pytest.raises(TypeError):
            write()
        assert tiny.same_bits(held.dense(), before)
    assert "int4" in repr(held)


@each_form
def test_a_linear_layer_keeps_few_bits_for_backward(form: FewBits) -> None:
    layer = nn.Linear(70, 40)
    layer.weight = nn.Parameter(quantized(layer.weight, form), requires_grad=False)
    x, kept = torch.randn(3, 5, 70, requires_grad=True), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t):
        y = layer(x)
    assert all(isinstance(tensor, QuantizedWeight) for tensor in kept if tensor.shape[-2:] in ((70, 40), (40, 70)))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(y) @ layer.weight.detach().dense())


@each_form
@pytest.mark.parametrize("dtype", list(SLACK))
def test_lora_goes_through_few_bits_in_any_type(form: FewBits, dtype: torch.dtype) -> None:
    held = quantized(torch.randn(40, 70).to(dtype), form)
    x, a, b = (torch.randn(size) for size in ((12, 70), (2, 70), (40, 2)))
    gradients = []
    for weight in (held, held.dense()):
        leaves = [x.to(dtype).requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        y = lora_linear(leaves[0], weight, None, *leaves[1:], scale=2.0, dropout=0.0)
        gradients.append(torch.autograd.grad(y.float().square().sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        assert tiny.same_bits(ours, theirs)


def test_it_moves_with_its_module() -> None:
    layer = nn.Linear(70, 40)
    layer.weight = nn.Parameter(quantized(layer.weight, "int4"), requires_grad=False)
    before = layer.weight.detach().dense()
    layer.to("cpu").to(torch.bfloat16)
    assert isinstance(layer.weight, QuantizedWeight)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.dense().dtype == torch.bfloat16
    assert tiny.same_bits(layer.to(torch.float32).weight.dense(), before)


# --- a proxy ----------------------------------------------------------------------------------------------------------


def as_dense(model: nn.Module) -> nn.Module:
    """The same with plain tensors of the coarse values."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, QuantizedWeight):
                setattr(module, name, nn.Parameter(parameter.detach().dense(), requires_grad=False))
    return model


def with_adapter(proxy: Proxy, wanted: RoundSettings) -> nn.Module:
    """LoRA's B is drawn: of 0, it would leave A without a gradient."""
    attach(proxy.model, wanted.adapter, seed=wanted.seed)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in proxy.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return proxy.model


@each_kind
def test_the_layers_matrices_are_held_so_and_nothing_else(
    form: FewBits, model_type: str, make_fm: FM, tmp_path: Path
) -> None:
    written(make_fm(model_type), model_type, tmp_path)
    full, held = (load_proxy(tmp_path, weights=form).model for form in ("full", form))
    coarse = {name for name, each in held.named_parameters() if isinstance(each, QuantizedWeight)}
    assert coarse == quantizable(full)
    assert len(coarse) >= 4 * tiny.L  # attention and FFN of each layer
    before = full.state_dict()
    for name, tensor in held.state_dict().items():
        if name in coarse:
            assert tiny.same_bits(tensor.dense(), quantized(before[name], form).dense())
        else:
            assert tiny.same_bits(tensor, before[name])
    inputs = tiny.batch(model_type)
    # the operators that a quantised weight meets compute what they do with its values
    assert torch.equal(tiny.logits(held, inputs), tiny.logits(as_dense(held), inputs))


@each_kind
def test_training_is_that_on_the_coarse_values(form: FewBits, model_type: str, make_fm: FM, tmp_path: Path) -> None:
    written(make_fm(model_type), model_type, tmp_path)
    wanted, found = settings(dropout=0.3), []
    for dense, limits in ((False, {}), (False, {"checkpointing": True}), (True, {})):
        proxy = load_proxy(tmp_path, weights=form)
        model = with_adapter(proxy, wanted)
        if dense:
            as_dense(model)
        compressed = {"compressed": proxy.compressed, "count_inactivity": True}
        data, limit = tiny.dataset(model_type, 8), LimitsSection(**limits)
        found.append(train(model, data, wanted, limits=limit, **compressed))
        held = {name for name, each in model.named_parameters() if isinstance(each, QuantizedWeight)}
        assert bool(held) is not dense
    for other in found[1:]:
        assert tiny.changed(found[0].adapter, other.adapter) == set()
        assert tiny.changed(found[0].inactivity or {}, other.inactivity or {}) == set()


@each_device
@pytest.mark.parametrize("model_type", ["bert", "llama", "vit"])
def test_gradients_are_near_those_on_the_full_weights(
    model_type: str, device: str, make_fm: FM, tmp_path: Path
) -> None:
    written(make_fm(model_type), model_type, tmp_path)
    wanted, gradients = settings(), {}
    batch = {name: each.to(device) for name, each in tiny.dataset(model_type, 16).batch(torch.arange(16)).items()}
    for form in ("full", *FORMS):
        model = with_adapter(load_proxy(tmp_path, weights=form, device=device), wanted).to(device)
        with adapters.training(model, 0.0):
            model(**batch).loss.backward()
        parts = [each.grad.flatten() for name, each in model.named_parameters() if ".lora_" in name]
        gradients[form] = torch.cat(parts)
    full = gradients["full"]
    off = {form: float((gradients[form] - full).norm() / full.norm()) for form in FORMS}
    # Weights are off by 0.5 % (1/127/sqrt(12) of a block's largest) and by 8 %; layers of random numbers multiply that.
    assert 0 < off["int8"] < 0.1
    assert 8 * off["int8"] < off["int4"] < 32 * off["int8"]


def kept_bytes(model: nn.Module, wanted: RoundSettings, data: Any) -> int:
    """What autograd keeps for backward in one step beside the parameters, each memory once."""
    kept = dict.fromkeys(map(memory, model.parameters()), 0)
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(memory(tensor), 0 if isinstance(tensor, QuantizedWeight) else tensor.untyped_storage().nbytes())
        alive.append(tensor)  # or another tensor could take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train(model, data, wanted)
    return sum(kept.values())


def memory(tensor: Tensor) -> int:
    own = tensor.codes if isinstance(tensor, QuantizedWeight) else tensor
    return own.untyped_storage().data_ptr()


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "mixtral"])
def test_memory_falls_in_a_step_too(model_type: str, tmp_path: Path) -> None:
    size = {"n_embd": 128} if model_type == "gpt2" else {"hidden_size": 128, "head_dim": 32}  # whole blocks
    directory = tiny.write_model(model_type, tmp_path / "fm", **size)
    fm = load_model(directory, tiny.task_of(model_type), tiny.LABELS, seed=0)
    written(fm, model_type, tmp_path / "proxy")
    wanted, data, held, kept = settings(), tiny.dataset(model_type, 4), {}, {}
    for form in ("full", *FORMS):
        model = load_proxy(tmp_path / "proxy", weights=form).model
        parameters = [dict(model.named_parameters())[name] for name in quantizable(model)]
        held[form] = held_bytes(parameters)
        assert dense_bytes(parameters) == held["full"]
        attach(model, wanted.adapter, seed=0)
        kept[form] = kept_bytes(model, wanted, data)
    assert held["int8"] == held["full"] * 8.5 / 32
    assert held["int4"] == held["full"] * 4.5 / 32
    assert kept["int8"] == kept["int4"] == kept["full"]  # no dense copy of any weight stays for backward


@pytest.mark.parametrize("model_type", ["bert", "llama", "mixtral"])
def test_a_patch_and_a_snapshot_bring_it_to_the_same(model_type: str, make_fm: FM, tmp_path: Path) -> None:
    proxy = written(make_fm(model_type), model_type, tmp_path)
    name = next(name for name in sorted(quantizable(proxy.model)) if name.endswith("w_out"))
    whole = next(name for name in sorted(quantizable(proxy.model)) if name.endswith(".weight"))
    state = proxy.model.state_dict()

    def patch(seed: int, rows: list[int]) -> dict[str, Tensor]:
        values = matrix(len(rows), tiny.D, seed)
        return {f"{name}@rows": torch.tensor(rows, dtype=torch.int32), f"{name}@values": values}

    first, second = patch(1, [0, 3]), patch(2, [1])
    snapshot = {key: torch.cat([first[key], second[key]]) for key in first}
    for form in FORMS:
        one, other = (load_proxy(tmp_path, weights=form).model for _ in range(2))
        apply_patch(one, first)
        apply_patch(one, second | {whole: 2 * state[whole]})
        apply_patch(other, snapshot | {whole: 2 * state[whole]})
        for key in (name, whole):
            ours, theirs = one.state_dict()[key].dense(), other.state_dict()[key].dense()
            assert tiny.same_bits(ours, theirs)
        expected = state[name].index_copy(0, snapshot[f"{name}@rows"].long(), snapshot[f"{name}@values"])
        assert tiny.same_bits(one.state_dict()[name].dense(), quantized(expected, form).dense())


def test_a_narrow_proxy_can_be_coarse_too(make_fm: FM, tmp_path: Path) -> None:
    written(make_fm("bert"), "bert", tmp_path)
    narrow, held = (load_proxy(tmp_path, width=0.5, weights=form).model.state_dict() for form in ("full", "int8"))
    for name, tensor in held.items():
        if isinstance(tensor, QuantizedWeight):
            assert tiny.same_bits(tensor.dense(), quantized(narrow[name], "int8").dense())


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_what_is_no_number_is_found_before_it_is_lost(fault: float, make_fm: FM, tmp_path: Path) -> None:
    proxy = written(make_fm("bert"), "bert", tmp_path)
    name = min(quantizable(proxy.model))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][1, 2] = fault
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} holds NaN or infinity"):
        load_proxy(tmp_path, weights="int8")


# --- a silo -----------------------------------------------------------------------------------------------------------


def test_lora_on_the_ffn_needs_checkpointing(make_fm: FM, tmp_path: Path) -> None:
    written(make_fm("bert"), "bert", tmp_path)
    wanted = settings(dropout=0.3)
    wanted = wanted.model_copy(update={"adapter": wanted.adapter.model_copy(update={"ffn": True})})
    with pytest.raises(ModelError, match=r"limits\.weights: .*keeps its sum with LoRA in full -> set limits\.checkp"):
        Learner(tmp_path, wanted, "cpu", LimitsSection(weights="int4"))
    limits, found = LimitsSection(weights="int4", checkpointing=True), []
    for dense in (False, True):
        model = Learner(tmp_path, wanted, "cpu", limits).proxy.model
        model = as_dense(model) if dense else model
        found.append(train(model, tiny.dataset("bert", 8), wanted, limits=limits).adapter)
    assert tiny.changed(*found) == set()


def test_a_missing_library_is_an_error_with_its_remedy(
    make_fm: FM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(make_fm("bert"), "bert", tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match=r"limits\.weights needs bitsandbytes.*pip install 'fedpft\[quantized\]'"):
        Learner(tmp_path, settings(), "cpu", LimitsSection(weights="int4"))
    Learner(tmp_path, settings(), "cpu")


@pytest.mark.parametrize(("share", "form"), [(0.6, "int4"), (1.0, "int8")])
def test_full_and_coarse_silos_make_one_federation(share: float, form: str, fm_directory: FM, tmp_path: Path) -> None:
    values = settings_of(tmp_path, fm_directory("bert"))
    simulation = {"data": str(tmp_path / "data.jsonl"), "silos": 4, "narrow_fraction": share, "narrow_width": 1.0}
    made = []
    for out, weights in (("one", form), ("two", form), ("full", "full")):
        changed = {"out": str(tmp_path / out), "simulation": simulation | {"narrow_weights": weights}}
        summary = simulate(SimulationConfig.model_validate(values | changed))
        made.append(load_file(tmp_path / out / "adapter.safetensors"))
        assert {"proxy", "plugged_in"} <= summary["metrics"].keys()
    assert tiny.changed(made[0], made[1]) == set()
    assert made[0].keys() == made[2].keys()
    assert tiny.changed(made[0], made[2])


@pytest.mark.slow
def test_silos_of_two_forms_as_processes(fm_directory: FM, tmp_path: Path) -> None:
    server = settings_of(tmp_path, fm_directory("llama")) | {"listen": "127.0.0.1:0", "insecure_loopback": True}
    server["federation"] = {"silos": ["full", "coarse"]}
    silos = {
        name: {
            "insecure_loopback": True,
            "insecure_name": name,
            "data": {"path": str(tmp_path / "data.jsonl")},
            "threads": 1,
            "limits": limits,
        }
        for name, limits in (("full", {}), ("coarse", {"weights": "int4"}))
    }
    summary = run_federation(tmp_path, server, silos)
    assert [entry["silos"] for entry in summary["rounds"]] == [2, 2]
    assert "limits.weights: its weights take" in (tmp_path / "silo-coarse.log").read_text()
    assert "limits.weights" not in (tmp_path / "silo-full.log").read_text()
