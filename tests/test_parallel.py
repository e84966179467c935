"""A silo of several processes: the adapter of one, over gloo on loopback; and what a killed rank leaves."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from faults import Deployment, Party, _Command, await_
from safetensors.torch import load_file, save_file
from test_run import Digits, digits, server_settings, silo_settings  # noqa: F401  (digits is a fixture)
from test_training import TASK, Recorded, settings
from torch import Tensor

from fedpft.config import LimitsSection, RoundSettings
from fedpft.data.batches import EncodedDataset
from fedpft.errors import ConfigError, DataError
from fedpft.model import adapters
from fedpft.model.loading import load_model
from fedpft.parallel import ALONE, Ranks
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import select
from fedpft.training import LocalResult, train_round

RANKS, SAMPLES = 2, 11
ADAM = {"adam_epsilon": 1e-4}  # or gradients of no size are rounding, and make full steps
# model type, settings, limits of two ranks, limits of one process whose batches have the same parts
CASES: dict[str, tuple[str, RoundSettings, LimitsSection, LimitsSection]] = {
    "a part for each": ("bert", settings(batch=5, **ADAM), LimitsSection(), LimitsSection(max_batch=3)),
    "several parts for each": (
        "bert",
        settings(batch=5, frozen_a=True, **ADAM),
        LimitsSection(max_batch=1, checkpointing=True),
        LimitsSection(max_batch=1),
    ),
    "images": ("vit", settings(batch=6, proximal=0.1, **ADAM), LimitsSection(), LimitsSection(max_batch=3)),
}
DROPPING = ("bert", settings(batch=4, dropout=0.5, learning_rate=1e-12, weight_decay=0.0), LimitsSection())


def trained(
    directory: Path,
    case: tuple[Any, ...],
    ranks: Ranks,
    samples: int = SAMPLES,
    lora_b: float = 0.1,
    data: EncodedDataset | None = None,
) -> LocalResult:
    model_type, wanted, limits = case[:3]
    fm = load_model(directory / model_type, tiny.task_of(model_type), tiny.LABELS, seed=0)
    adapters.attach(fm, wanted.adapter, seed=wanted.seed)
    model = cut(fm, select(fm, tiny.by_weights(neurons=24)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # of 0, it would hide what dropout does
            parameter.data.fill_(lora_b)
    return train_round(
        TASK,
        model,
        data or tiny.dataset(model_type, samples),
        wanted,
        silo="north",
        round=1,
        compressed=(1, 2),
        count_inactivity=True,
        limits=limits,
        ranks=ranks,
    )


def everything(result: LocalResult) -> dict[str, Tensor]:
    assert result.inactivity is not None
    told = {name: torch.tensor(value) for name, value in result.metrics.items() if name != "seconds"}
    return {**result.adapter, **result.inactivity, **told, "samples": torch.tensor(result.samples)}


def be_rank(rank: int, directory: Path) -> None:
    """One of the processes: does all cases, and writes what came of them."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=RANKS)
    ranks = Ranks(rank, RANKS)
    for name, case in CASES.items():
        save_file(everything(trained(directory, case, ranks)), directory / f"{name}-{rank}")
    taken = Recorded(tiny.dataset("bert", SAMPLES))
    trained(directory, CASES["a part for each"], ranks, data=taken)
    heard: dict[str, Any] = {"taken": taken.taken}
    heard |= {"text": ranks.tell("grün" if rank == 0 else "red"), "nothing": ranks.tell()}
    heard["dropping"] = trained(directory, DROPPING, ranks, 4).metrics["train_loss"]
    heard["like rank 0 alone"] = trained(directory, DROPPING, ALONE, 4).metrics["train_loss"]
    try:
        trained(directory, DROPPING, ranks, lora_b=float("inf"))
    except DataError as error:
        heard["fault"] = error.message
    (directory / f"heard-{rank}.json").write_text(json.dumps(heard), encoding="utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, fm_directory: Callable[[str], Path]) -> Path:
    """A directory with what two processes made of the cases."""
    directory = tmp_path_factory.mktemp("ranks")
    for model_type in ("bert", "vit"):
        (directory / model_type).symlink_to(fm_directory(model_type))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=be_rank, args=(rank, directory), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        await_("both ranks to end", lambda: all(process.exitcode is not None for process in processes))
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return directory


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", CASES)
def test_ranks_train_what_one_process_with_the_same_parts_trains_bit_for_bit(name: str, done: Path) -> None:
    model_type, wanted, _, limits = CASES[name]
    alone = everything(trained(done, (model_type, wanted, limits), ALONE))
    for rank in range(RANKS):
        assert tiny.changed(alone, load_file(done / f"{name}-{rank}")) == set()


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", CASES)
def test_ranks_train_what_one_process_with_whole_batches_trains_but_for_rounding(name: str, done: Path) -> None:
    model_type, wanted, _, _ = CASES[name]
    alone, ours = everything(trained(done, (model_type, wanted, LimitsSection()), ALONE)), load_file(done / f"{name}-0")
    assert ours["train_loss"] == pytest.approx(float(alone["train_loss"]), rel=1e-5)
    for told in ("tokens", "samples", "1.tokens", "2.tokens"):
        assert ours[told] == alone[told]
    still = everything(trained(done, (model_type, slow(wanted), LimitsSection()), ALONE))
    names = [key for key in alone if "." in key and alone[key].is_floating_point()]
    apart, moved = (sum((alone[name] - other[name]).square().sum() for name in names) ** 0.5 for other in (ours, still))
    assert apart <= 1e-3 * moved
    assert (ours["1"] - alone["1"]).abs().max() <= 1  # a value within rounding of eps


def slow(wanted: RoundSettings) -> RoundSettings:
    """The same training, which leaves the adapter where it was."""
    return wanted.model_copy(
        update={"training": wanted.training.model_copy(update={"learning_rate": 1e-12, "weight_decay": 0.0})}
    )


def test_ranks_hear_rank_0_and_fail_together(done: Path) -> None:
    heard = [json.loads((done / f"heard-{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
    assert [each["text"] for each in heard] == ["grün", "grün"]
    assert [each["nothing"] for each in heard] == ["", ""]
    assert "not finite" in heard[0]["fault"]
    assert heard[0]["fault"] == heard[1]["fault"]


def test_each_rank_builds_its_own_parts_alone(done: Path) -> None:
    taken = [json.loads((done / f"heard-{rank}.json").read_text(encoding="utf-8"))["taken"] for rank in range(RANKS)]
    assert sorted(taken[0] + taken[1]) == list(range(SAMPLES))  # batches of 5, 5 and 1, in parts of at most 3
    assert len(taken[0]) == 3 + 3 + 1


def test_each_rank_drops_of_its_own(done: Path) -> None:
    """Both ranks say the same loss, which is not the one of dropping alike in both halves."""
    heard = [json.loads((done / f"heard-{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
    assert heard[0]["dropping"] == heard[1]["dropping"]
    assert heard[0]["like rank 0 alone"] == heard[1]["like rank 0 alone"]
    assert heard[0]["dropping"] != heard[0]["like rank 0 alone"]


def test_a_device_that_ranks_would_have_to_share_is_refused() -> None:
    assert Ranks(1, 2).device("cpu") == "cpu"
    assert ALONE.device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match="device: cuda:1: 2 processes cannot share it"):
        Ranks(1, 2).device("cuda:1")


# --- under torchrun ---------------------------------------------------------------------------------------------------


class Torchrun(Party):
    """A silo of several processes."""

    def start(self, **_: Any) -> "Torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command += ["-m", self.module, "--config", str(self.config)]
        self._process = _Command(command, self.log_file, None)
        return self

    def signal(self, number: int) -> None:
        """As torchrun itself cannot pass a kill on, the ranks get it first."""
        ranks = self.ranks() if number == signal.SIGKILL else {}
        for process in (*ranks.values(), self._process.pid):
            os.kill(process, number)

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of those that are there."""
        found = {}
        for child in Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split():
            for entry in Path(f"/proc/{child}/environ").read_bytes().decode().split("\0"):
                name, _, value = entry.partition("=")
                if name == "RANK":
                    found[int(value)] = int(child)
        return found


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{}, {"sharded": True}], ids=["whole", "sharded"])
def test_a_killed_rank_ends_all_and_the_restart_goes_on(
    limits: dict[str, Any],
    digits: Digits,  # noqa: F811
    tmp_path: Path,
) -> None:
    """With alignment, so that ranks take patches up; the final adapter is that of plain silos, bit for bit."""
    wanted = server_settings(digits, ("north", "south"))
    wanted["adapter"]["dropout"], wanted["training"]["local_epochs"] = 0.0, 3.0
    plain = {name: silo_settings(digits, name) | {"limits": {"max_batch": 8}} for name in ("north", "south")}
    with Deployment(tmp_path / "plain", wanted, plain) as reference:
        reference.start()
        reference.await_end()

    shared = plain | {"north": silo_settings(digits, "north") | {"limits": limits}}
    with Deployment(tmp_path / "shared", wanted, shared) as running:
        server, south = running.server, running.silos["south"]
        north = Torchrun("north", "fedpft.silo", running.silos["north"].config)
        running.silos["north"] = north
        running.start()
        server.await_log("round 1: waiting")
        south.kill()  # so that no later round ends before it is back
        received = running.work("north") / "received"
        await_("north to train", lambda: list(received.glob("*.safetensors")) or north.has_failed())
        ranks = north.ranks()
        assert ranks.keys() == set(range(RANKS))
        os.kill(ranks[1], signal.SIGKILL)
        assert north.await_end() not in (0, -signal.SIGKILL)
        assert "another of torchrun's processes has ended" in north.log or "error: terminated" in north.log
        await_("rank 0 to be gone", lambda: not is_alive(ranks[0]))

        north.start()
        south.start()
        running.await_end()
    federated = [load_file(done.out / "adapter.safetensors") for done in (reference, running)]
    assert tiny.changed(*federated) == set()
