"""A silo's whole life: look at one's own files, enrol if they fit, fetch the proxy, train round after round, go."""

import logging
from pathlib import Path

from fedpft import faults, machine, parallel
from fedpft.config import PrivacySection, ShareSection, SiloConfig
from fedpft.data.batches import round_window
from fedpft.data.samples import Samples
from fedpft.errors import ConfigError, InvalidUpdate, RefusedByServer, RoundOver, StaleProxy
from fedpft.model import quantized
from fedpft.parallel import Ranks
from fedpft.privacy import wholesilo
from fedpft.proxy.bundle import compressed_neurons
from fedpft.silo import data
from fedpft.silo.budget import Budget
from fedpft.silo.connection import SAME_VERSION, Enrolment, ServerConnection
from fedpft.silo.follower import Beginning, SharedRound, follow
from fedpft.silo.learner import Learner
from fedpft.silo.ondisk import DataOnDisk
from fedpft.silo.summing import Summing, check_agreed
from fedpft.silo.work import Update, Work, opened
from fedpft.training import epochs_of
from fedpft.wire.certificates import check_certificates
from fedpft.wire.hello import Terms
from fedpft.wire.status import sanitised
from fedpft.wire.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)


def run(config: SiloConfig) -> None:
    """Takes part in a federation until it is finished; goes on where an earlier process stopped.

    Of several processes, as torchrun starts them, rank 0 does that, and the others train with it.

    Raises:
        ConfigError, CertificateError, DataError: this side's own files are not in order; nothing was sent.
        RefusedByServer: the server does not want this silo, or broke the federation off.
        FedPFTError: any other of docs/errors.md.
    """
    ranks = parallel.joined(sharded=config.limits.sharded)
    config = config.model_copy(update={"device": ranks.device(config.device)})
    (follow if ranks.rank else _lead)(config, ranks)
    parallel.part(ranks)


def _lead(config: SiloConfig, ranks: Ranks) -> None:
    machine.prepare(config.device, config.threads)
    if config.limits.weights != "full":
        quantized.library()  # before anybody waits for this silo
    name = check_certificates(config.tls, "silo") if config.tls is not None else str(config.insecure_name)
    on_disk = DataOnDisk(config.data.path)
    participant: Participant | None = None
    try:
        samples, terms = data.prepare(config)
        # Faults are explained within the connection too: what is said to the server then comes after it.
        with opened(config.work) as work, ServerConnection(config) as server, faults.explaining(config.work, "work"):
            secure = terms.secure_aggregation  # nobody is told then how many samples there are
            enrolment = server.enrol(0 if secure else len(samples))
            log.info("%s: enrolled at %s with %d samples", name, config.server, len(samples))
            agreed = enrolment.settings.secure_aggregation
            check_agreed(config, said=secure, terms=agreed, said_private=terms.silo_privacy)
            if (hidden := terms.silo_privacy) is not None:
                noise = wholesilo.multiplier(hidden)  # before anything was trained
                server.record("silo_privacy", **hidden.model_dump(), noise=noise)
            work.join(enrolment, name)
            if not secure:
                offer_again(server, work, config.share)
            participant = Participant(name, config, samples, terms, on_disk, work, enrolment, server, ranks)
            begin_with(server, work, on_disk, len(samples))
            participant.take_part()
            ranks.tell("")
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


def begin_with(server: ServerConnection, work: Work, data: DataOnDisk, samples: int) -> None:
    """Says it if the data is another than this silo last began with in this federation; from here on it counts."""
    joined = work.joined()
    if joined is not None and joined.data not in ("", data.read):
        log.warning("%s changed since this silo last read it: from now on it trains on %d samples", data.path, samples)
        server.record("data changed", sha256=data.read, before=joined.data, samples=samples, effect="from now on")
    work.note_data(data.read)


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

    round: the last that was begun; 0 before.
    """

    def __init__(
        self,
        name: str,
        config: SiloConfig,
        samples: Samples,
        terms: Terms,
        on_disk: DataOnDisk,
        work: Work,
        enrolment: Enrolment,
        server: ServerConnection,
        ranks: Ranks,
    ) -> None:
        """Fetches the proxy, unless it is there, and says what is to be known to the other ranks.

        Args:
            samples: this silo's, as they fit `terms`.

        Raises:
            DataError: the tokenizer finds no token in a text, or the data changed since the silo started.
            ModelError: the proxy is none.
            RefusedByServer: the proxy is for another task or other labels than the server said before.
        """
        self.name, self.config, self.settings = name, config, enrolment.settings
        self.round = 0
        self._work, self._server, self._on_disk, self._ranks = work, server, on_disk, ranks
        bundle = server.fetch_proxy(enrolment)
        ranks.tell(Beginning(name=name, settings=self.settings, terms=terms, bundle=bundle).model_dump_json())
        self.learner = Learner(bundle, self.settings, config.device, config.limits)
        proxy = self.learner.proxy
        if (proxy.task, proxy.labels) != (terms.task, terms.labels):
            raise RefusedByServer("the proxy is for other labels than the server named before", "start the silo again")
        self.dataset = self.learner.encode(samples, on_disk, config.data, work.tokens_path)
        if self.dataset.cut:
            log.warning("%s", self.dataset.describe_cut(name, proxy.max_tokens))
        ranks.tell(on_disk.read)
        allowed = PrivacySection.stricter(config.privacy, self.settings.training.privacy)
        self._budget: Budget | None = None
        if allowed is not None:
            self._budget = Budget(work.path, allowed, len(self.dataset), enrolment.run_id)
            if ranks.size > 1:
                raise ConfigError("privacy: is for one process, not for several", "start the silo without torchrun")
        self._packing = self.learner.way_to_pack(name, self.dataset, ranks)
        self._summing: Summing | None = None
        if self.settings.secure_aggregation is not None:
            if self.settings.secure_aggregation.silo_privacy is None:  # with it nobody is to learn how many there are
                self._check_samples(self.settings.secure_aggregation.most_samples)
            self._summing = Summing(name, config, work, server, compressed_neurons(bundle))

    def take_part(self) -> None:
        """Does what the server asks until the federation is finished; RefusedByServer if it is broken off."""
        while True:
            assignment = self._server.next_assignment()
            match assignment.WhichOneof("task"):
                case "train":
                    try:
                        self.do(assignment.train)
                    except RoundOver as error:
                        log.warning("%s: too late: %s", self.name, error.message)
                case "stage" if self._summing is not None:
                    try:
                        self._summing.do(assignment.stage)
                    except RoundOver as error:
                        log.warning("%s: too late: %s", self.name, error.message)
                case "finished":
                    return
                case "aborted":
                    raise RefusedByServer(
                        f"the server broke the federation off: {sanitised(assignment.aborted.reason)}",
                        "ask the server's operator when it starts again",
                    )
                case other:
                    raise RefusedByServer(
                        f"the server gave an assignment that this silo does not know ({other})", SAME_VERSION
                    )

    def do(self, train: pb.Train) -> None:
        """One round; RoundOver if it ended before this silo was through."""
        self.round = train.round
        if self._summing is not None:
            self._summing.check_round(train.round)
        self._look_at_data()
        update = self._work.update(self.config.share)
        if update is None or not update.answers(train):
            update = self.train(train)
        if self._summing is not None:
            self._server.fetch(train.adapter, *self._work.received(train.adapter))  # if it is gone since the training
            self._summing.begin(train, update, self._server.settings)
            return
        counted_now = submit(self._server, self._work, update, attempt=train.attempt)
        log.info(
            "%s: round %d of %d: %s",
            self.name,
            train.round,
            self.settings.training.rounds,
            "sent" if counted_now else "the server had this update already",
        )

    def train(self, train: pb.Train) -> Update:
        """Trains on the round's adapter and version of the proxy; the update is in `work` afterwards."""
        start, patches = self._fetch(train)
        shared = SharedRound(
            round=train.round,
            version=train.proxy_version,
            patches=tuple(patches),
            adapter=start,
            count_inactivity=train.count_inactivity and self.config.share.inactivity,
        )
        self._ranks.tell(shared.model_dump_json())
        for patch in patches:
            self.learner.bring_to(train.proxy_version, patch)
        return self.learner.train(
            self.name,
            self.dataset,
            train,
            start,
            self._work,
            limits=self.config.limits,
            share=self.config.share,
            packing=self._packing,
            ranks=self._ranks,
            budget=self._budget,
        )

    def _check_samples(self, most: int) -> None:
        """Before the training, which would be for nothing."""
        epochs = epochs_of(self.settings.training, self.config.limits)
        _, samples = round_window(len(self.dataset), epochs, 0)
        if samples > most:
            raise InvalidUpdate(
                f"{self.name} trains on {samples} samples in a round, but secure_aggregation.most_samples is {most}",
                "set limits.max_local_epochs in silo.yaml, or have the server raise secure_aggregation.most_samples",
            )

    def _look_at_data(self) -> None:
        if (now := self._on_disk.changed()) is not None:
            log.warning(
                "%s: %s changed since it was read: takes effect when this silo is started again",
                self.name,
                self._on_disk.path,
            )
            self._server.record(
                "data changed", round=self.round, sha256=now, before=self._on_disk.read, effect="at the next start"
            )

    def _fetch(self, train: pb.Train) -> tuple[Path, list[Path]]:
        """The file of the round's adapter, and those that bring the proxy to the round's version."""
        version = self.learner.version
        if train.proxy_version < version:
            raise StaleProxy(
                f"this silo has version {version} of the proxy, round {train.round} is on {train.proxy_version}",
                "restart the silo: it begins with version 0 again",
            )
        wanted = [train.adapter]
        if train.proxy_version > version:
            wanted.append(train.patch if train.proxy_version == version + 1 else train.snapshot)
        self._work.keep_received(wanted)
        start, *patches = [self._server.fetch(file, *self._work.received(file)) for file in wanted]
        return start, patches
