"""The owner's distillation on several processes: the bits of one with the same parts, and after a killed rank too."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import yaml
from faults import await_
from safetensors.torch import load_file, save_file
from test_large import DISTILLATION, load, made, weights
from test_parallel import RANKS
from test_run import Digits, digits, server_settings  # noqa: F401  (digits is a fixture)
from test_sharding import run_ranks
from torch import Tensor

from fedpft.config import AdapterSection, DistillationSection, Dtype, ProxySection
from fedpft.errors import ConfigError
from fedpft.model.adapters import attach
from fedpft.model.loading import load_model
from fedpft.model.subffn import sub_ffns
from fedpft.parallel import ALONE, Ranks
from fedpft.proxy.cut import cut
from fedpft.proxy.distillation import layer_level
from fedpft.proxy.selection import select
from fedpft.server.construction import build_proxy

SAMPLES, MOST = 11, 3  # of a batch of 5
# model type, type of its values, what else is asked for
CASES: dict[str, tuple[str, Dtype, dict[str, Any]]] = {
    "plain": ("bert", "auto", {}),
    "images": ("vit", "auto", {"weight_term": 0.0}),
    "probes": ("llama", "auto", {"probe_term": 0.5, "local": True}),
    "bfloat16": ("llama", "bfloat16", {}),
    "mixture": ("mixtral", "auto", {}),
}

# model type, where the FM is, what is asked for
MADE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "refitted": ("bert", "memory", {"closed_form_ridge": "held_out"}),
    "probed": ("gpt2", "memory", {"closed_form_probes": 0.5}),
    "refitted mixture": ("mixtral", "memory", {}),
    "images by layer": ("vit", "memory", {"steps": 3, "mode": "layers", "batch": 3}),
    "from disk": ("llama", "disk", {"steps": 3, "mode": "auto", "weight_term": 0.5}),
    "then whole": ("bert", "disk", {"steps": 3, "mode": "whole"}),
    "rank 1 without a part": ("bert", "memory", {"steps": 3, "mode": "layers", "batch": 1}),
}


def constructed(directory: Path, name: str, out: Path, ranks: Ranks, most: int | None) -> dict[str, Tensor]:
    """Neurons chosen, and all that is distilled."""
    model_type, hold, others = MADE[name]
    fm = load(directory / model_type, model_type, hold)
    attach(fm, AdapterSection(rank=2), seed=0)
    selection, _ = made(fm, model_type, out, most=most, ranks=ranks, **others)
    chosen = {f"neurons.{layer}": neurons.contiguous() for layer, neurons in enumerate(selection.neurons)}
    return weights(out) | chosen | {f"saliency.{n}": each for n, each in enumerate(selection.saliency)}


def distilled(directory: Path, name: str, ranks: Ranks, most: int | None) -> dict[str, Tensor]:
    model_type, dtype, others = CASES[name]
    fm = load_model(directory / model_type, tiny.task_of(model_type), tiny.LABELS, seed=0, dtype=dtype)
    attach(fm, AdapterSection(rank=2), seed=0)
    selection = select(fm, tiny.by_weights(neurons=24))
    proxy = cut(fm, selection)
    if ranks.rank:  # only rank 0 has refitted it
        for layer, _ in selection.matched:
            for parameter in list(sub_ffns(proxy).values())[layer].parameters():
                parameter.data.mul_(1.1)
    settings = DistillationSection(steps=5, batch=5, learning_rate=5e-3, closed_form_samples=0, **others)
    losses = layer_level(
        proxy,
        fm,
        selection.matched,
        tiny.dataset(model_type, SAMPLES, labelled=False),
        settings,
        seed=0,
        progress=lambda _step, _loss: None,
        most=most,
        ranks=ranks,
    )
    frozen = {key: tensor.contiguous().clone() for key, tensor in proxy.state_dict().items()}
    return frozen | {"losses": torch.tensor(losses, dtype=torch.float64)}


def be_rank(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=RANKS)
    for name in CASES:
        save_file(distilled(directory, name, Ranks(rank, RANKS), None), directory / f"{name}-{rank}")
    for name in MADE:
        out = directory / f"made by {rank}" / name
        save_file(constructed(directory, name, out, Ranks(rank, RANKS), None), directory / f"{name}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, fm_directory: Callable[[str], Path]) -> Path:
    directory = tmp_path_factory.mktemp("distilled")
    for model_type in {case[0] for case in (*CASES.values(), *MADE.values())}:
        (directory / model_type).symlink_to(fm_directory(model_type))
    run_ranks(be_rank, directory, codes=[0] * RANKS)
    return directory


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", CASES)
def test_ranks_distil_what_one_process_with_the_same_parts_distils_bit_for_bit(name: str, done: Path) -> None:
    alone = distilled(done, name, ALONE, MOST)
    for rank in range(RANKS):
        assert tiny.changed(alone, load_file(done / f"{name}-{rank}")) == set()
    whole = distilled(done, name, ALONE, None)
    assert tiny.changed(alone, whole) >= {"losses"}  # each part is relative to its own size
    torch.testing.assert_close(alone["losses"], whole["losses"], rtol=0.2, atol=0.0)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", MADE)
def test_ranks_make_the_proxy_of_one_process_with_the_same_parts_but_for_rounding(
    name: str, done: Path, tmp_path: Path
) -> None:
    """Only sums in float64 are added up in another order."""
    made_by = [load_file(done / f"{name}-{rank}") for rank in range(RANKS)]
    assert tiny.changed(*made_by) == set()
    settings = MADE[name][2]
    most = -(-settings.get("batch", DISTILLATION.batch) // RANKS)
    alone = constructed(done, name, tmp_path / "alone", ALONE, most)
    for key, value in alone.items():
        torch.testing.assert_close(made_by[0][key], value, rtol=1e-4, atol=1e-6)
    if name.startswith("refitted"):  # else something of each part is relative to its own size
        whole = constructed(done, name, tmp_path / "whole", ALONE, None)
        for key, value in alone.items():
            torch.testing.assert_close(whole[key], value, rtol=1e-4, atol=1e-6)


# --- under torchrun ---------------------------------------------------------------------------------------------------


class Build:
    """`fedpft build-proxy` on several processes."""

    def __init__(self, config: Path, out: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command += ["-m", "fedpft.cli", "build-proxy", "--config", str(config), "--out", str(out)]
        self.log = out.with_suffix(".log")
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def rank(self, number: int) -> int:
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if f"\0RANK={number}\0" in f"\0{Path(f'/proc/{child}/environ').read_bytes().decode()}":
                return int(child)
        raise AssertionError(f"no rank {number}")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kept"), [("whole", "distillation"), ("layers", "closed-form-*")])
def test_after_a_killed_rank_the_same_command_ends_with_the_same_proxy(
    mode: str,
    kept: str,
    digits: Digits,  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = server_settings(digits, ("north",)) | {"out": str(tmp_path / "out")}
    settings["distillation"] = {"steps": 300, "batch": 8, "weight_term": 0.0, "mode": mode}
    settings["proxy"]["widths"] = [0.5] if mode == "layers" else []
    config = tmp_path / "server.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")

    whole = Build(config, tmp_path / "whole")
    assert whole.process.wait(600) == 0, whole.log.read_text()

    torn = Build(config, tmp_path / "torn")
    noted = lambda: list(tmp_path.rglob(f"{kept}.safetensors"))  # noqa: E731
    await_("the first steps to be kept", lambda: noted() or torn.process.poll() is not None)
    os.kill(torn.rank(1), signal.SIGKILL)
    assert torn.process.wait(600) != 0
    assert noted()
    assert not (tmp_path / "torn" / "record.json").exists()

    again = Build(config, tmp_path / "torn")
    assert again.process.wait(600) == 0, again.log.read_text()
    one, other = (tmp_path / name for name in ("whole", "torn"))
    files = sorted(path.name for path in (one / "bundle").glob("*.safetensors"))
    assert len(files) == (3 if mode == "layers" else 2)
    for file in files:
        assert tiny.changed(*(load_file(each / "bundle" / file) for each in (one, other))) == set()
    losses = [json.loads((each / "record.json").read_text(encoding="utf-8"))["losses"] for each in (one, other)]
    assert len(losses[0]) == 300  # of one layer, that is compressed
    assert losses[0] == losses[1]


def test_where_nothing_looks_at_public_data_there_is_nothing_to_share(tmp_path: Path) -> None:
    class Config:
        proxy = ProxySection(importance="weights")
        distillation = DistillationSection(steps=0, closed_form_samples=0)

    with pytest.raises(ConfigError, match="several processes share what looks at public_data"):
        build_proxy(Config(), None, tmp_path, Ranks(0, RANKS))  # type: ignore[arg-type]
