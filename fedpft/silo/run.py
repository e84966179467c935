"""A silo's whole life: look at one's own files, enrol, fetch the proxy, train round after round, go."""

import logging
from pathlib import Path

from torch import Tensor

from fedpft import adapters, datasets, faults, machine
from fedpft.config import ShareSection, SiloConfig
from fedpft.datafiles import read_rows
from fedpft.errors import InvalidUpdate, RefusedByServer, RoundOver, StaleProxy
from fedpft.proxy import apply_patch, load_proxy
from fedpft.silo.connection import SAME_VERSION, Enrolment, ServerConnection
from fedpft.silo.work import Update, Work, opened
from fedpft.training import train_round
from fedpft.wire.certificates import check_certificates
from fedpft.wire.encoding import encode
from fedpft.wire.status import sanitised
from fedpft.wire.tensors import Group, read_tensors
from fedpft.wire.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)


def run(config: SiloConfig) -> None:
    """Takes part in a federation until it is finished; goes on where an earlier process stopped.

    Raises:
        ConfigError, CertificateError, DataError: this side's own files are not in order; nothing was sent.
        RefusedByServer: the server does not want this silo, or broke the federation off.
        FedPFTError: any other of docs/errors.md.
    """
    machine.prepare(config.device, config.threads)
    name = check_certificates(config.tls, "silo") if config.tls is not None else str(config.insecure_name)
    # Task and label list come with the proxy; all that can be known about the file without them is checked now.
    samples = len(read_rows(config.data.path, [("label", config.data.columns.label)]))
    participant: Participant | None = None
    try:
        # Faults are explained within the connection too: what is said to the server then comes after it.
        with opened(config.work) as work, ServerConnection(config) as server, faults.explaining(config.work, "work"):
            enrolment = server.enrol(samples)
            log.info("%s: enrolled at %s with %d samples", name, config.server, samples)
            work.join(enrolment)
            offer_again(server, work, config.share)
            participant = Participant(name, config, work, enrolment, server)
            participant.take_part()
    except KeyboardInterrupt:
        place = f"in round {participant.round}" if participant and participant.round else "before its first round"
        log.info("%s: stopped %s; run it again, it goes on from there", name, place)
        raise
    log.info("%s: the federation is finished", name)


def offer_again(server: ServerConnection, work: Work, share: ShareSection) -> None:
    """Offers the update that an earlier process left, unless the server told that one that it counts."""
    update = work.update(share)
    if update is None or update.counted:
        return
    try:
        submit(server, work, update, attempt=0)
        log.info("round %d: the update of before the restart counts", update.round)
    except (RoundOver, StaleProxy, InvalidUpdate) as error:
        log.warning("round %d: the update of before the restart does not count: %s", update.round, error.message)


def submit(server: ServerConnection, work: Work, update: Update, *, attempt: int) -> bool:
    """Offers and sends an update that is kept in `work`; whether it counts only now. Raises as the server answers."""
    header = pb.UpdateHeader(
        round=update.round,
        attempt=attempt,
        proxy_version=update.proxy_version,
        samples=update.samples,
        metrics=update.metrics,
        file=work.update_file.announcement(),
    )
    try:
        now = server.submit(header, work.update_file)
    except (StaleProxy, InvalidUpdate):  # it will never count; after RoundOver, a restarted server may still ask for it
        work.drop_update()
        raise
    work.count_update(update)
    return now


class Participant:
    """A silo that has enrolled, with its data and its proxy.

    version: of the proxy.
    round: the last that was begun; 0 before.
    """

    def __init__(
        self, name: str, config: SiloConfig, work: Work, enrolment: Enrolment, server: ServerConnection
    ) -> None:
        """Fetches the proxy, unless it is there.

        Raises:
            DataError: the data has a label that the server's list has not.
            ModelError: the proxy is none.
        """
        self.name, self.config, self.settings = name, config, enrolment.settings
        self.version = self.round = 0
        self._work, self._server = work, server
        self.proxy = load_proxy(server.fetch_proxy(enrolment))
        task, labels = self.proxy.task, self.proxy.labels
        samples = datasets.read_labelled(config.data.path, config.data.columns, task, labels)
        self.dataset = datasets.encode(
            samples.inputs, samples.labels, self.proxy.processor, task, self.proxy.max_tokens
        )
        adapters.attach(self.proxy.model, self.settings.adapter, seed=self.settings.seed)
        self.proxy.model.to(config.device)

    def take_part(self) -> None:
        """Does what the server asks until the federation is finished; RefusedByServer if it is broken off."""
        while True:
            task = self._server.next_task()
            match task.WhichOneof("task"):
                case "train":
                    try:
                        self.do(task.train)
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
                    raise RefusedByServer(f"the server set a task that this silo does not know ({other})", SAME_VERSION)

    def do(self, task: pb.Train) -> None:
        """One round; RoundOver if it ended before this silo was through."""
        self.round = task.round
        update = self._work.update(self.config.share)
        if update is None or not update.answers(task):
            update = self.train(task)
        counted_now = submit(self._server, self._work, update, attempt=task.attempt)
        log.info(
            "%s: round %d of %d: %s",
            self.name,
            task.round,
            self.settings.training.rounds,
            "sent" if counted_now else "the server had this update already",
        )

    def train(self, task: pb.Train) -> Update:
        """Trains on the round's adapter and version of the proxy; the update is in `work` afterwards."""
        start = self._fetch(task)
        adapters.load(self.proxy.model, read_tensors(start, "adapter"))
        result = train_round(
            self.proxy.model,
            self.dataset,
            self.settings,
            silo=self.name,
            round=task.round,
            compressed=self.proxy.compressed,
            count_inactivity=task.count_inactivity and self.config.share.inactivity,
            limits=self.config.limits,
        )
        log.info(
            "%s: round %d of %d: loss %.4f, %d samples, %.1f s",
            self.name,
            task.round,
            self.settings.training.rounds,
            result.metrics["train_loss"],
            result.samples,
            result.metrics["seconds"],
        )
        groups: dict[Group, dict[str, Tensor]]
        groups, residual = encode(
            result.adapter,
            read_tensors(start, "adapter"),
            self.settings.training.update_encoding,
            self._work.residual(task.round),
        )
        if result.inactivity is not None:
            groups["inactivity"] = result.inactivity
        shared: dict[str, float] = {name: result.metrics[name] for name in self.config.share.metrics}
        return self._work.keep_update(task, groups, residual, samples=result.samples, metrics=shared)

    def _fetch(self, task: pb.Train) -> Path:
        """Brings the proxy to the round's version; returns the file of the round's adapter."""
        if task.proxy_version < self.version:
            raise StaleProxy(
                f"this silo has version {self.version} of the proxy, and round {task.round} is on {task.proxy_version}",
                "restart the silo: it begins with version 0 again",
            )
        wanted = [task.adapter]
        if task.proxy_version > self.version:
            wanted.append(task.patch if task.proxy_version == self.version + 1 else task.snapshot)
        self._work.keep_received(wanted)
        start, *patches = [self._server.fetch(file, *self._work.received(file)) for file in wanted]
        for patch in patches:
            apply_patch(self.proxy.model, read_tensors(patch, "patch"))
            self.version = task.proxy_version
        return start
