"""Who trains in the place of the silos: this process, a pool of processes, or a Ray cluster. The bytes are the same."""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from fedpft.config import LimitsSection, RoundSettings, ShareSection, SimulationConfig
from fedpft.errors import ConfigError, FedPFTError, OutOfMemory
from fedpft.seeding import derive_seed
from fedpft.silo.budget import Budget
from fedpft.silo.learner import Learner
from fedpft.silo.work import Update
from fedpft.simulation.data import WAY_OUT, SilosData
from fedpft.wire.v1 import federation_pb2 as pb

LARGEST_DRAW = float(1 << 63)
SHARE = ShareSection()  # a simulated silo keeps nothing back


def falls_on(fraction: float, seed: int, *purpose: str | int) -> bool:
    """A draw with the seed, which is true for that share of all purposes."""
    return derive_seed(seed, *purpose) < fraction * LARGEST_DRAW


def limits_of(config: SimulationConfig, silo: str) -> LimitsSection:
    """What a silo loads of the proxy, and how."""
    section = config.simulation
    narrow = falls_on(section.narrow_fraction, config.seed, "narrow", silo)
    return LimitsSection(width=section.narrow_width, weights=section.narrow_weights) if narrow else LimitsSection()


@dataclasses.dataclass(frozen=True)
class Job:
    """A silo's part in a round. start: file of the adapter; snapshot: of the proxy's version, None for 0."""

    silo: str
    train: pb.Train
    start: Path
    snapshot: Path | None


@dataclasses.dataclass(frozen=True)
class Done:
    """A silo has trained, or has not: `fault` says why."""

    silo: str
    trained: Update | None
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Post:
    """What it takes to train in the place of any silo."""

    bundle: Path
    settings: RoundSettings
    data: SilosData

    @property
    def device(self) -> str:
        """Torch's name of where silos train."""
        return self.data.config.device

    @property
    def threads(self) -> int:
        """Of torch on the CPU, for one silo."""
        return self.data.config.simulation.threads

    @property
    def kinds(self) -> set[LimitsSection]:
        """The limits that any silo has."""
        return {self.limits(silo) for silo in self.data.sizes}

    def limits(self, silo: str) -> LimitsSection:
        """What a silo loads of the proxy, and how."""
        return limits_of(self.data.config, silo)


class Worker:
    """Trains for one silo after the other."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._learners = {kind: Learner(post.bundle, post.settings, post.device, kind) for kind in post.kinds}

    def do(self, job: Job) -> Done:
        """Trains; what was trained before this process was killed is not trained again."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self._post.threads)
        try:
            return Done(job.silo, self._train(job))
        except (OutOfMemory, OSError):
            raise  # of this machine, not of the silo
        except FedPFTError as error:
            return Done(job.silo, None, error.message)
        finally:
            torch.set_num_threads(threads)

    def _train(self, job: Job) -> Update:
        work = self._post.data.work(job.silo)
        work.path.mkdir(parents=True, exist_ok=True)
        if (trained := work.update(SHARE)) is not None and trained.answers(job.train):
            return trained
        limits = self._post.limits(job.silo)
        learner = self._learners[limits]
        proxy = learner.proxy
        if job.snapshot is not None and job.train.proxy_version != learner.version:
            learner.bring_to(job.train.proxy_version, job.snapshot)
        config = self._post.data.config
        dataset = learner.task.encode(
            self._post.data.samples(job.silo),
            proxy.processor,
            proxy.max_tokens,
            bad_rows=config.simulation.bad_rows,
            way_out=WAY_OUT,
        )
        packing = learner.way_to_pack(job.silo, dataset)
        allowed = config.training.privacy
        budget = None if allowed is None else Budget(work.path, allowed, len(dataset))
        return learner.train(
            job.silo,
            dataset,
            job.train,
            job.start,
            work,
            limits=limits,
            share=SHARE,
            packing=packing,
            budget=budget,
        )


class Crew(Protocol):
    """One or several workers."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        """Does the jobs, in any order."""

    def close(self) -> None:
        """Lets them go."""


class _Alone:
    """In this process; the worker is made when there is the first job."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._worker: Worker | None = None

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        for job in jobs:
            self._worker = self._worker or Worker(self._post)
            yield self._worker.do(job)

    def close(self) -> None:
        self._worker = None


class _Pool:
    """In processes of their own, each with a proxy of its own. They end with this one, even if it is killed."""

    def __init__(self, post: Post, processes: int) -> None:
        context = get_context("spawn")
        theirs, self._ours = context.Pipe(duplex=False)  # which closes when this process ends
        self._pool = ProcessPoolExecutor(processes, context, _begin, (post, theirs))

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        try:
            futures = [self._pool.submit(_do, job) for job in jobs]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise _killed("fewer --processes") from None

    def close(self) -> None:
        self._ours.close()  # whatever is still trained, after an error or Ctrl-C, is not waited for
        self._pool.shutdown(cancel_futures=True)


class _Ray:
    """On a Ray cluster, all of whose nodes see the same files; with as many workers as it has CPUs or GPUs to give."""

    def __init__(self, post: Post, ray: Any) -> None:
        from ray.util import ActorPool

        on_gpu = torch.device(post.device).type == "cuda"
        count = int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0)) // (1 if on_gpu else post.threads)
        if not count:
            raise ConfigError("--ray: the cluster has nothing to train on", "add a node to it")
        wanted = {"num_gpus": 1} if on_gpu else {"num_cpus": post.threads}
        remote = ray.remote(**wanted)(Worker)
        self._ray, self._actors = ray, [remote.remote(post) for _ in range(count)]
        self._pool = ActorPool(self._actors)

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        try:
            yield from self._pool.map_unordered(lambda actor, job: actor.do.remote(job), list(jobs))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayActorError:
            raise _killed("fewer CPUs in the cluster") from None

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)


def _killed(fewer: str) -> FedPFTError:
    return FedPFTError(
        "a process of the simulation was killed, most likely for want of memory",
        f"start it again with {fewer}; it goes on from there",
    )


def cluster(address: str) -> Any:
    """The module `ray`, connected to a cluster; ConfigError if there is no such module or cluster."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs ray, which is not installed", "pip install 'fedpft[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--ray {address}: no cluster there ({error})", "start one with `ray start`") from None
    return ray


def crew(post: Post, processes: int, ray: Any) -> Crew:
    """Whoever is to do it. ray: as of :func:`cluster`, or None; ConfigError if it has nothing to train on."""
    if ray is not None:
        return _Ray(post, ray)
    return _Alone(post) if processes == 1 else _Pool(post, processes)


_alone: _Alone | None = None  # of a process of a pool


def _begin(post: Post, parent: Connection) -> None:
    """In a process of a pool. What can fail, such as reading the proxy, is left to its first job, which can say so."""
    global _alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets this one go
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _alone = _Alone(post)


def _end_with(parent: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)  # at any moment, as if killed


def _do(job: Job) -> Done:
    assert _alone is not None
    return next(_alone.run([job]))
