"""Nothing that the proxy has no place for gets into a file for the silos."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpft.config import AdapterSection
from fedpft.errors import ModelError
from fedpft.model import adapters
from fedpft.model.subffn import sub_ffns
from fedpft.proxy.bundle import patch as patch_of
from fedpft.proxy.cut import cut
from fedpft.proxy.distillation import ffn_norms
from fedpft.proxy.selection import select
from fedpft.server.egress import Egress
from fedpft.wire.tensors import read_tensors

ADAPTER = {"lora_A": torch.ones(2, 3), "head": torch.zeros(4, dtype=torch.bfloat16)}
PROXY = {"ffn.w_in": torch.ones(5, 3), "ffn.b_out": torch.ones(3)}


@pytest.fixture
def egress(tmp_path: Path) -> Egress:
    save_file(PROXY, tmp_path / "model.safetensors")
    return Egress(tmp_path, ADAPTER)


def rows(*chosen: int, name: str = "ffn.w_in", wide: int = 3) -> dict[str, Tensor]:
    return {
        f"{name}@rows": torch.tensor(chosen, dtype=torch.int32),
        f"{name}@values": torch.zeros(len(chosen), wide),
    }


def test_adapters_and_patches_of_the_proxy_are_written(egress: Egress, tmp_path: Path) -> None:
    egress.write(tmp_path / "adapter", "adapter", ADAPTER)
    assert read_tensors(tmp_path / "adapter", "adapter").keys() == ADAPTER.keys()
    patch = rows(4, 0) | {"ffn.b_out": torch.zeros(3)}
    egress.write(tmp_path / "patch", "patch", patch)
    assert read_tensors(tmp_path / "patch", "patch").keys() == patch.keys()


@pytest.mark.parametrize("model_type", ["bert", "llama", "phi3", "gemma2"])
def test_what_an_alignment_makes_of_the_proxy_passes_and_of_the_fm_does_not(
    model_type: str, make_fm: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    model = make_fm(model_type)
    selection = select(model, tiny.by_weights(neurons=5, keep_layers=(0,)))
    kept, whole = cut(model, selection), cut(model, select(model, tiny.by_weights(neurons="all")))
    state = {name: tensor.contiguous() for name, tensor in adapters.frozen_state(kept).items()}
    save_file(state, tmp_path / "model.safetensors")
    for each in (kept, model):
        adapters.attach(each, AdapterSection(rank=2), seed=0)
    egress = Egress(tmp_path, adapters.extract(kept))
    egress.check_adapter(adapters.extract(kept))
    updated = {layer: torch.arange(5) for layer, _ in selection.matched}
    assert updated
    egress.check_patch(patch_of(kept, updated, ffn_norms(kept, list(updated))))
    ffns = list(sub_ffns(whole).values())
    everything = {layer: torch.arange(ffns[layer].neurons) for layer in updated}
    with pytest.raises(ModelError, match=r"w_in@\w+' of the patch for the silos is \(\d+,.* the proxy has \(5,"):
        egress.check_patch(patch_of(whole, everything, []))
    for name, tensor in adapters.frozen_state(model).items():
        if ".mlp." in name or ".intermediate." in name:
            with pytest.raises(ModelError, match="the proxy has no such tensor"):
                egress.check_patch({name: tensor})


@pytest.mark.parametrize(
    "patch",
    [
        {"ffn.w_in": torch.ones(20, 3)},  # all of the FM's neurons
        {"ffn.w_in": torch.ones(5, 3, dtype=torch.float64)},
        {"encoder.w": torch.ones(1)},
        rows(0, name="encoder.w"),
        rows(0, 1, wide=4),
        rows(*range(6)),  # more neurons than the proxy has
        rows(0, 1) | {"ffn.w_in@rows": torch.zeros(3, dtype=torch.int32)},
        {"ffn.w_in@rows": torch.tensor([0]), "ffn.w_in@values": torch.zeros(1, 3)},
        {"ffn.w_in@rows": torch.zeros(1, 1, dtype=torch.int32), "ffn.w_in@values": torch.zeros(1, 3)},
        {"ffn.w_in@values": torch.zeros(1, 3)},
        {"ffn.w_in@other": torch.zeros(5, 3)},
        {"lora_A": torch.ones(2, 3)},
    ],
)
def test_a_patch_of_anything_else_is_refused(patch: dict[str, Tensor], egress: Egress, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"of the patch for the silos is .* it was not written"):
        egress.write(tmp_path / "patch", "patch", patch)
    assert not (tmp_path / "patch").exists()


@pytest.mark.parametrize(
    ("adapter", "fault"),
    [
        (ADAPTER | {"ffn.w_in": torch.ones(20, 3)}, r"'ffn.w_in' .* is \(20, 3\) torch.float32, the proxy has no such"),
        ({"lora_A": ADAPTER["lora_A"]}, r"'head' .* is missing"),
        (ADAPTER | {"lora_A": torch.ones(20, 3)}, r"'lora_A' .* is \(20, 3\) torch.float32, the proxy has \(2, 3\)"),
        (ADAPTER | {"head": torch.zeros(4)}, r"'head' .* is \(4,\) torch.float32"),
    ],
)
def test_an_adapter_of_anything_else_is_refused(
    adapter: dict[str, Tensor], fault: str, egress: Egress, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=fault):
        egress.write(tmp_path / "adapter", "adapter", adapter)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("group", ["adapter", "patch"])
def test_what_holds_no_numbers_is_not_written(
    group: Literal["adapter", "patch"], value: float, egress: Egress, tmp_path: Path
) -> None:
    name, tensors = ("head", dict(ADAPTER)) if group == "adapter" else ("ffn.w_in@values", rows(0, 1))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = value
    with pytest.raises(ModelError, match=f"{name} of the {group} for the silos holds NaN or infinity"):
        egress.write(tmp_path / group, group, tensors)
    assert not (tmp_path / group).exists()
