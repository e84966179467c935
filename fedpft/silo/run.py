"""A silo's whole life: look at one's own files, enrol, fetch the proxy, train round after round, go."""

import contextlib
import fcntl
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from fedpft import adapters, datasets
from fedpft.config import RoundSettings, SiloConfig
from fedpft.datafiles import read_rows
from fedpft.errors import ConfigError, RefusedByServer, RoundOver
from fedpft.proxy import apply_patch, load_proxy
from fedpft.silo.connection import ServerConnection
from fedpft.training import train_round
from fedpft.wire import federation_pb2 as pb
from fedpft.wire.certificates import check_certificates
from fedpft.wire.status import sanitised

log = logging.getLogger(__name__)


def run(config: SiloConfig) -> None:
    """Takes part in a federation until it is finished.

    Raises:
        ConfigError, CertificateError, DataError: this side's own files are not in order; nothing was sent.
        RefusedByServer: the server does not want this silo, or broke the federation off.
        FedPFTError: any other of docs/errors.md.
    """
    name = check_certificates(config.tls, "silo") if config.tls is not None else str(config.insecure_name)
    # Task and label list come with the proxy; all that can be known about the file without them is checked now.
    samples = len(read_rows(config.data.path, [("label", config.data.columns.label)]))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with _own_directory(config.work), ServerConnection(config) as server:
        enrolment = server.enrol(samples)
        log.info("%s: enrolled at %s with %d samples", name, config.server, samples)
        participant = Participant(name, config, enrolment.settings, server.fetch_proxy(enrolment))
        participant.take_part(server)
    log.info("%s: the federation is finished", name)


class Participant:
    """Data and proxy of a silo that has enrolled.

    version: of the proxy; the patches up to it have been applied.
    """

    def __init__(self, name: str, config: SiloConfig, settings: RoundSettings, bundle: Path) -> None:
        """Raises DataError if the data has a label that the server's list has not, ModelError for a broken proxy."""
        self.name, self.config, self.settings, self.version = name, config, settings, 0
        self.proxy = load_proxy(bundle)
        task, labels = self.proxy.task, self.proxy.labels
        samples = datasets.read_labelled(config.data.path, config.data.columns, task, labels)
        self.dataset = datasets.encode(
            samples.inputs, samples.labels, self.proxy.processor, task, self.proxy.max_tokens
        )
        adapters.attach(self.proxy.model, settings.adapter, seed=settings.seed)
        self.proxy.model.to(config.device)

    def take_part(self, server: ServerConnection) -> None:
        """Does what the server asks until the federation is finished; RefusedByServer if it is broken off."""
        while True:
            task = server.next_task()
            match task.WhichOneof("task"):
                case "train":
                    try:
                        self.train(server, task.train)
                    except RoundOver as error:
                        log.warning("%s: too late: %s", self.name, error.message)
                case "finished":
                    return
                case "aborted":
                    raise RefusedByServer(
                        f"the server broke the federation off: {sanitised(task.aborted.reason)}",
                        "ask the server's operator when it starts again",
                    )
                case other:
                    raise RefusedByServer(
                        f"the server set a task that this silo does not know ({other})",
                        "run the same version of fedpft on both sides",
                    )

    def train(self, server: ServerConnection, task: pb.Train) -> None:
        """One round; RoundOver if it ended before this silo was through."""
        if self.version != task.proxy_version:
            for patch in server.fetch_patches(self.version):
                apply_patch(self.proxy.model, patch)
                self.version += 1
        adapters.load(self.proxy.model, server.fetch_adapter(task.round))
        result = train_round(
            self.proxy.model,
            self.dataset,
            self.settings,
            silo=self.name,
            round=task.round,
            compressed=self.proxy.compressed,
            count_inactivity=task.count_inactivity,
            limits=self.config.limits,
        )
        counted = server.submit(task.round, self.version, result)
        log.info(
            "%s: round %d of %d: loss %.4f, %d samples, %.1f s%s",
            self.name,
            task.round,
            self.settings.training.rounds,
            result.metrics["train_loss"],
            result.samples,
            result.metrics["seconds"],
            "" if counted else " (the server had this update already)",
        )


@contextlib.contextmanager
def _own_directory(work: Path) -> Iterator[None]:
    """Makes and locks the work directory; two silos in one would send each other's updates."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"{work}: cannot be written to ({error.strerror})", "change `work` in silo.yaml") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{work} is in use by another silo process", "stop that one, or give each silo its own `work`"
            ) from None
        for leftover in work.glob("incoming-*"):
            shutil.rmtree(leftover)
        yield
