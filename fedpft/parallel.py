"""The processes that train together, as torchrun starts them: each has the models and parts of each batch.

They are one silo, or the owner who distils a proxy.

Part p of a batch is rank p % size's. Gradients, losses and counts are added up in the order of the parts, on every rank
alike, so that all ranks take the same steps, bit for bit: those of one process that has the same parts. Nothing is
pickled; what rank 0 has to say is text.

P parts of a batch
"""

import datetime
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fedpft import faults
from fedpft.errors import ConfigError, RankLost

PATIENCE = datetime.timedelta(days=30)  # rank 0 waits for its server as long as it likes; a rank that dies is noticed

Value = TypeVar("Value")


class Ranks:
    """This process among those of its party; by default it is alone, and all here leaves things as they are."""

    def __init__(self, rank: int = 0, size: int = 1, *, sharded: bool = False) -> None:
        """Args:
        sharded: the proxy lies in pieces on the ranks, so that all compute or none.
        """
        self.rank, self.size, self.sharded = rank, size, sharded

    @property
    def others(self) -> tuple[int, ...]:
        """What tells this rank's seeds from rank 0's, which are those of one process."""
        return (self.rank,) if self.rank else ()

    def own(self, parts: Sequence[Value]) -> list[Value]:
        """The parts of a batch that are this rank's."""
        return list(parts[self.rank :: self.size])

    def largest(self, batch: int) -> int:
        """Samples of a part, if a batch is to have one for each rank."""
        return -(-batch // self.size)

    def tell(self, text: str = "") -> str:
        """What rank 0 says, on every rank; the others' own text is not looked at. Waits for it."""
        if self.size == 1:
            return text
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()
        length = torch.tensor(len(content))
        with _together():
            dist.broadcast(length, 0)
            content = content if self.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    @contextmanager
    def adding(self, parameters: Sequence[Tensor], parts: int) -> Iterator[None]:
        """Within it each rank makes the gradients of one part; after it all ranks have those of all, added in order.

        Args:
            parts: at most one for each rank; those of higher ranks have none.
        """
        if self.size == 1:
            yield
            return
        sums = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        with self.computing():
            yield
        own = _flat(parameters)
        for rank in range(parts):
            given = own if rank == self.rank else torch.empty_like(own)
            with _together():
                dist.broadcast(given, rank)
            there = given[-len(parameters) :].tolist()
            for place, gradient in enumerate(_unflat(given, parameters)):
                if there[place]:
                    known = sums[place]
                    sums[place] = gradient.clone() if known is None else known.add_(gradient)
        for parameter, gradients in zip(parameters, sums, strict=True):
            parameter.grad = gradients

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around what the model computes, which other ranks may be part of; RankLost if one of those has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.sharded and (isinstance(error, dist.DistError) or "gloo" in str(error)):  # its own have no class
                raise _lost() from error
            raise

    def collect(self, sums: Iterable[Tensor]) -> None:
        """Adds to rank 0's sums those of the others, in the order of the ranks. In place; the others keep theirs."""
        for own in sums if self.size > 1 else ():
            with _together():
                if self.rank:
                    dist.send(own, 0)
                    continue
                for rank in range(1, self.size):
                    dist.recv(given := torch.empty_like(own), rank)
                    own += given

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives all ranks the values that rank 0 has. In place."""
        if self.size > 1:
            with _together():
                for tensor in map(Tensor.detach, tensors):
                    dense = tensor.contiguous()  # what travels is memory, in whatever order
                    dist.broadcast(dense, 0)
                    if dense is not tensor:
                        tensor.copy_(dense)

    def in_order(self, values: Sequence[float], parts: int) -> list[float]:
        """(P,) values of all parts, of which `values` are this rank's."""
        if self.size == 1:
            return list(values)
        own = torch.zeros(-(-parts // self.size), dtype=torch.float64)
        own[: len(values)] = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(self.size)]
        with _together():
            dist.all_gather(every, own)
        found: list[float] = torch.stack(every, 1).flatten()[:parts].tolist()
        return found

    def total(self, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over ranks of whole numbers that each has counted, int64, on the CPU."""
        if self.size > 1:
            with _together():
                for count in counts.values():
                    dist.all_reduce(count)
        return dict(counts)

    def device(self, wanted: str) -> str:
        """The one of `wanted`'s kind that is this rank's; ConfigError if they would have to share it."""
        if self.size == 1 or wanted == "cpu":
            return wanted
        if wanted != "cuda":
            raise ConfigError(
                f"device: {wanted}: {self.size} processes cannot share it",
                "set `device: cuda`, of which each process takes its own, or start one process",
            )
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        return device


ALONE = Ranks()


def joined(*, sharded: bool = False) -> Ranks:
    """Meets the other processes that torchrun started beside this one, if it did; waits until all are there.

    Raises:
        ConfigError: there is none, and the proxy is to be shared out.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        if sharded:
            raise ConfigError(
                "limits.sharded: this is the only process",
                "start several with torchrun (docs/large-models.md), or leave limits.sharded out",
            )
        return ALONE
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"] and sys.platform == "linux":
        for library in ("GLOO", "NCCL"):  # gradients stay on this machine, and nobody else's connections come in
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    with _together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), sharded=sharded)


def part(ranks: Ranks) -> None:
    """The end of what `joined` began."""
    if ranks.size > 1:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if faults.is_out_of_memory(error):
            raise
        raise _lost() from error


def _lost() -> RankLost:
    return RankLost(
        "another of torchrun's processes has ended, so this one does too",
        "see what the first of them to end says; then start the same command again: it goes on from there",
    )


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    """All gradients end to end, 0 for one that is not there, and then which are there."""
    there = torch.tensor([parameter.grad is not None for parameter in parameters])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    ends = there.to(gradients[0])
    return torch.cat([*(gradient.flatten() for gradient in gradients), ends])


def _unflat(flat: Tensor, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
    pieces = flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
    for piece, parameter in zip(pieces, parameters, strict=False):
        yield piece.view(parameter.shape)
