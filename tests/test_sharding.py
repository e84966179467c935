"""A proxy in pieces on two ranks: the adapter of a whole one, bit for bit, with half of it in each process."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import test_causal_lm as lm
import tiny
import torch
import torch.distributed as dist
import transformers
from faults import await_
from safetensors.torch import load_file, save_file
from test_parallel import ADAM, RANKS, SAMPLES, everything
from test_training import settings
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fedpft import parallel
from fedpft.config import AdapterSection, LimitsSection, RoundSettings
from fedpft.data.batches import EncodedDataset
from fedpft.errors import ConfigError, RankLost
from fedpft.model import adapters
from fedpft.model.adapters import frozen_state
from fedpft.model.architectures import in_head, layers_of
from fedpft.model.loading import load_model
from fedpft.model.subffn import sub_ffns
from fedpft.parallel import ALONE, Ranks
from fedpft.proxy.bundle import Proxy, patch, save_bundle
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import select
from fedpft.silo.learner import Learner

SHARDED = LimitsSection(sharded=True)
PATIENCE = 300.0  # seconds
LAST = 7  # the exit code of a rank that ends in the midst of things


@dataclass(frozen=True)
class Case:
    """fm: which; settings: the round's; limits: of the ranks; alone: of one process whose batches have their parts."""

    fm: str
    settings: RoundSettings
    limits: LimitsSection = field(default_factory=LimitsSection)
    alone: LimitsSection = field(default_factory=lambda: LimitsSection(max_batch=3))


def lora(wanted: RoundSettings, **others: Any) -> RoundSettings:
    return wanted.model_copy(update={"adapter": AdapterSection(rank=2, alpha=6.0, dropout=0.0, **others)})


CASES = {kind: Case(kind, settings(batch=5, **ADAM)) for kind in tiny.KINDS}
CASES |= {
    "sparing": Case(
        "llama",
        settings(batch=5, **ADAM),
        LimitsSection(checkpointing=True, compact=True),
        LimitsSection(max_batch=3, checkpointing=True, compact=True),
    ),
    "ffn": Case("bert", lora(settings(batch=5, **ADAM), ffn=True)),
    "bfloat16": Case("llama, bfloat16", settings(batch=5, **ADAM)),
    "several parts": Case("gpt2", settings(batch=5, **ADAM), LimitsSection(max_batch=1), LimitsSection(max_batch=1)),
    "words": Case("lm", settings(batch=5, packing=False, **ADAM)),
    "tied words": Case("lm, tied", settings(batch=5, packing=False, **ADAM)),
    "packed": Case("lm", settings(batch=5, packing=True, **ADAM)),
}
DROPPING = Case("bert", settings(batch=5, dropout=0.5, **ADAM))


def write_bundle(fm: nn.Module, processor: Any, task: Any, directory: Path) -> Path:
    """And beside it a patch, as an alignment leaves it."""
    selection = select(fm, tiny.by_weights(neurons=24))
    model = cut(fm, selection)
    compressed = tuple(student for student, _ in selection.matched)
    labels = () if task == "causal-lm" else tiny.LABELS
    save_bundle(Proxy(model, processor, task, labels, 64, compressed), directory)
    ffns = list(sub_ffns(model).values())
    updated = {layer: torch.arange(0, ffns[layer].neurons, 5) for layer in compressed}
    norms = [name for name in frozen_state(model) if "norm" in name.lower() and name.endswith("weight")]
    with torch.no_grad():
        for tensor in frozen_state(model).values():
            tensor.mul_(1.1)
    tensors = {f"patch/{name}": tensor for name, tensor in patch(model, updated, norms).items()}
    save_file(tensors, directory.with_suffix(".patch"))
    return directory


def data_of(directory: Path, case: Case) -> EncodedDataset:
    if case.fm.startswith("lm"):
        return lm.encoded(directory / "rows.jsonl", transformers.AutoTokenizer.from_pretrained(directory / case.fm))
    return tiny.dataset(case.fm.partition(",")[0], SAMPLES)


def fit(learner: Learner, directory: Path, case: Case, ranks: Ranks, **limits: Any) -> dict[str, Tensor]:
    """What comes of two rounds, the second on a patched proxy."""
    dataset = data_of(directory, case)
    way = learner.way_to_pack("north", dataset, ranks)
    assert (way is not None) == (case is CASES["packed"])
    found = {}
    adapter = {name: tensor.detach().clone() for name, tensor in adapter_of(learner).items()}
    for round in (1, 2):
        if round == 2:
            learner.bring_to(1, (directory / case.fm).with_suffix(".patch"))
        result = learner.fit(
            "north",
            dataset,
            adapter,
            round=round,
            count_inactivity=True,
            limits=(case.alone if ranks is ALONE else case.limits).model_copy(update=limits),
            packing=way,
            ranks=ranks,
        )
        adapter = result.adapter
        found |= {f"{round} {name}": tensor for name, tensor in everything(result).items()}
    return found


def adapter_of(learner: Learner) -> dict[str, Tensor]:
    """With a B that is not 0, which would hide what A does."""
    found = adapters.extract(learner.proxy.model)
    return {name: torch.full_like(value, 0.1) if "lora_B" in name else value for name, value in found.items()}


def held_bytes(model: nn.Module) -> dict[str, int]:
    """What the storages of a model's frozen parameters take, inside of its layers and outside."""
    inside = {id(each) for each in layers_of(model).parameters()}
    found = {"layers": 0, "others": 0}
    for name, each in model.named_parameters():
        if ".lora_" not in name and not in_head(model, name):
            storage = each.to_local() if isinstance(each, DTensor) else each.detach()
            found["layers" if id(each) in inside else "others"] += storage.untyped_storage().nbytes()
    return found


@contextmanager
def watching(found: list[int]) -> Iterator[None]:
    """While open, puts down the memory of this process that is no file's, over and over."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            found.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def anonymous() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def be_rank(rank: int, directory: Path) -> None:
    """One of the processes: does all cases, and writes what came of them."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=RANKS)
    ranks, said = Ranks(rank, RANKS, sharded=True), dict[str, Any]()
    for name, case in CASES.items():
        learner = Learner(directory / case.fm, case.settings, "cpu", SHARDED)
        save_file(fit(learner, directory, case, ranks), directory / f"{name}-{rank}")
        said[name] = held_bytes(learner.proxy.model)
        pieces = {key: each for key, each in frozen_state(learner.proxy.model).items() if isinstance(each, DTensor)}
        whole = {key: each.full_tensor() for key, each in pieces.items()}
        save_file(whole, directory / f"{name}-{rank}-frozen")
    for shared in (True, False):
        learner = Learner(directory / DROPPING.fm, DROPPING.settings, "cpu", LimitsSection(sharded=shared))
        found = fit(learner, directory, DROPPING, Ranks(rank, RANKS, sharded=shared))
        save_file(found, directory / f"dropping-{rank}-{shared}")
    before, peaks = anonymous(), list[int]()
    with watching(peaks):
        learner = Learner(directory / "large", settings(), "cpu", SHARDED)
    said["load"] = max(peaks) - before
    said["large"] = held_bytes(learner.proxy.model)
    (directory / f"said-{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    learner = Learner(directory / "bert", CASES["bert"].settings, "cpu", SHARDED)
    if rank == 1:
        os._exit(LAST)
    try:
        fit(learner, directory, CASES["bert"], ranks)
    except RankLost as error:
        (directory / "lost").write_text(error.message, encoding="utf-8")
    os._exit(0)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, fm_directory: Callable[[str], Path]) -> Path:
    """A directory with bundles, and what two processes made of the cases."""
    directory = tmp_path_factory.mktemp("sharded")
    lm.written(directory / "rows.jsonl", [lm.question(thing) for thing in lm.COLORS] * 2)
    for name in sorted({case.fm for case in CASES.values()}):
        kind, _, other = name.partition(", ")
        if kind == "lm":
            path = lm.write_fm(directory / f"fm {name}", tied=other == "tied")
            processor = transformers.AutoTokenizer.from_pretrained(path)
            write_bundle(load_model(path, "causal-lm", (), seed=0), processor, "causal-lm", directory / name)
        else:
            task = tiny.task_of(kind)
            fm = load_model(fm_directory(kind), task, tiny.LABELS, seed=0, dtype=other or "auto")  # type: ignore[arg-type]
            write_bundle(fm, tiny.processor(kind), task, directory / name)
    large = tiny.write_model("llama", directory / "fm large", hidden_size=256, intermediate_size=4096)
    write_whole(large, directory / "large")
    run_ranks(be_rank, directory, codes=[0, LAST])
    return directory


def run_ranks(target: Callable[..., None], *arguments: Any, codes: list[int]) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, *arguments), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        await_("both ranks to end", lambda: all(process.exitcode is not None for process in processes), PATIENCE)
        assert [process.exitcode for process in processes] == codes
    finally:
        for process in processes:
            process.kill()


def write_whole(fm: Path, directory: Path) -> None:
    """A bundle that keeps all neurons."""
    model = load_model(fm, "sequence-classification", tiny.LABELS, seed=0)
    selection = select(model, tiny.by_weights(neurons=4096))
    proxy = Proxy(cut(model, selection), tiny.processor("llama"), "sequence-classification", tiny.LABELS, 64, ())
    save_bundle(proxy, directory)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", CASES)
def test_a_proxy_in_pieces_trains_what_a_whole_one_trains_bit_for_bit(name: str, done: Path) -> None:
    case = CASES[name]
    learner = Learner(done / case.fm, case.settings, "cpu")
    before = {key: tensor.clone() for key, tensor in frozen_state(learner.proxy.model).items()}
    alone = fit(learner, done, case, ALONE)
    frozen = {key: tensor.contiguous() for key, tensor in frozen_state(learner.proxy.model).items()}
    for rank in range(RANKS):
        assert tiny.changed(alone, load_file(done / f"{name}-{rank}")) == set()
        gathered = load_file(done / f"{name}-{rank}-frozen")
        assert any(".w_out" in key for key in tiny.changed({key: before[key] for key in gathered}, gathered))  # a patch
        assert tiny.changed({key: frozen[key] for key in gathered}, gathered) == set()


@pytest.mark.parametrize("name", CASES)
def test_each_rank_holds_its_share_of_the_layers(name: str, done: Path) -> None:
    whole = held_bytes(Learner(done / CASES[name].fm, CASES[name].settings, "cpu").proxy.model)
    shares = [json.loads((done / f"said-{rank}.json").read_text(encoding="utf-8"))[name] for rank in range(RANKS)]
    for share in shares:
        assert share["layers"] == pytest.approx(whole["layers"] / RANKS, rel=0.02)  # odd rows are padded
        assert share["others"] <= whole["others"]


def test_words_are_shared_out_if_the_output_layer_is_another(done: Path) -> None:
    shares = json.loads((done / "said-0.json").read_text(encoding="utf-8"))
    words = held_bytes(Learner(done / "lm", CASES["words"].settings, "cpu").proxy.model)["others"]
    assert shares["words"]["others"] < 0.8 * words  # two tables, of which one is in halves
    tied = held_bytes(Learner(done / "lm, tied", CASES["tied words"].settings, "cpu").proxy.model)["others"]
    assert shares["tied words"]["others"] == tied


def test_a_rank_loads_no_more_than_its_share_and_a_layer(done: Path) -> None:
    said = json.loads((done / "said-0.json").read_text(encoding="utf-8"))
    whole = (done / "large" / "model.safetensors").stat().st_size
    assert whole > 50e6
    assert said["large"]["layers"] == pytest.approx(whole / RANKS, rel=0.05)
    assert 0.9 * whole / RANKS < said["load"] < whole / RANKS + whole / tiny.L + 4e6


def test_ranks_without_a_part_draw_nothing(done: Path) -> None:
    """The last batch has one sample; with dropout the bits are those of ranks that have the whole proxy each."""
    for rank in range(RANKS):
        shared, whole = (load_file(done / f"dropping-{rank}-{name}") for name in (True, False))
        assert tiny.changed(whole, shared) == set()


def test_a_rank_that_ends_is_missed_while_layers_are_gathered(done: Path) -> None:
    assert "another of torchrun's processes has ended" in (done / "lost").read_text(encoding="utf-8")


def test_other_faults_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), Ranks(0, 2, sharded=True).computing():
        raise RuntimeError("shapes do not fit")


def test_what_cannot_go_together_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"limits\.sharded: this is the only process"):
        parallel.joined(sharded=True)
    with pytest.raises(ValueError, match="sharded does not go with width"):
        LimitsSection(sharded=True, width=0.5)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="not two CUDA devices")
@pytest.mark.parametrize("name", ["bert", "llama", "packed"])
def test_on_two_gpus_a_proxy_in_pieces_trains_what_a_whole_one_trains(name: str, done: Path) -> None:
    """But for a GPU's rounding: its sums have no fixed order everywhere."""
    run_ranks(be_rank_on_gpu, done, name, codes=[0, 0])
    case = CASES[name]
    learner = Learner(done / case.fm, case.settings, "cuda:0")
    alone = fit(learner, done, case, ALONE)
    for rank in range(RANKS):
        shared = load_file(done / f"{name}-{rank}-cuda")
        for key in (key for key in alone if ".lora_" in key):
            assert (shared[key] - alone[key]).norm() <= 1e-3 * alone[key].norm(), key


def be_rank_on_gpu(rank: int, directory: Path, name: str) -> None:
    os.environ |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    torch.cuda.set_device(rank)
    meeting = f"file://{directory}/meeting on GPUs, {name}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=meeting, rank=rank, world_size=RANKS)
    ranks, case = Ranks(rank, RANKS, sharded=True), CASES[name]
    learner = Learner(directory / case.fm, case.settings, f"cuda:{rank}", SHARDED)
    save_file(fit(learner, directory, case, ranks), directory / f"{name}-{rank}-cuda")
    dist.destroy_process_group()
