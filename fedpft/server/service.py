"""The server as the algorithm sees it: silos are waited for, rounds are run, patches are published."""

import contextlib
import ctypes
import logging
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from fedpft import atomic, audit
from fedpft.audit import AuditLog
from fedpft.config import RoundSettings, ServerConfig
from fedpft.errors import CheckpointError, QuorumLost
from fedpft.federation import AbortRequested, FinishRequested, PatchPublished, Phase, Substitute
from fedpft.privacy.secagg import task_digest
from fedpft.server.admission import Admission
from fedpft.server.ledger import Ledger
from fedpft.server.live import LiveFederation, Picked
from fedpft.server.outbox import Outbox
from fedpft.server.outcome import Sum
from fedpft.server.roundfiles import RoundFiles, federation_of
from fedpft.server.servicer import FederationServicer, ReadyFrames
from fedpft.server.summing import Summing
from fedpft.server.updates import Update
from fedpft.wire.channel import SERVER_OPTIONS, listen
from fedpft.wire.hello import Terms
from fedpft.wire.signatures import Verifier
from fedpft.wire.transfer import Payload
from fedpft.wire.v1.federation_pb2_grpc import add_FederationServiceServicer_to_server

FAREWELL_SECONDS = 10.0  # for silos to hear that the federation is over
M_ARENA_MAX = -8  # of malloc.h
CLOSING_SECONDS = 2.0  # for the replies that are on their way

log = logging.getLogger(__name__)

__all__ = ["FederationServer", "Update"]


class FederationServer:
    """Blocking, for one thread; the silos are served by threads of its own.

    On disk, under OUT: `address`, `audit.jsonl`, `updates/`. What a former process of the same run left there is gone
    on with: a round that was open stays open, and takes updates as soon as the server listens.
    """

    def __init__(
        self, config: ServerConfig, bundle: Path, settings: RoundSettings, ledger: Ledger, terms: Terms
    ) -> None:
        """Args:
            bundle: directory of the proxy's files, every one of which is sent to every silo.
            settings: sent to every silo.
            ledger: of the run; the caller enters adapters and patches, this class rounds and updates.
            terms: what the silos' data must be like.

        Raises:
            ModelError: the bundle is not one.
            CertificateError: the list of revoked certificates cannot be read.
            CheckpointError: what a former process left is torn or changed.
        """
        _share_one_heap()
        self._config, self._ledger = config, ledger
        federation = federation_of(config)
        self._live = LiveFederation(federation)
        self._audit = AuditLog(config.out / "audit.jsonl")
        self._files = RoundFiles(config, bundle, settings, ledger)
        self._outbox = Outbox(bundle, self._record_sent)
        self._farewell = self._files.resume(federation)
        self._announce()
        self._summing = self._make_summing()
        if self._summing is not None and federation.phase is Phase.TRAINING:
            self._begin_sum(federation.round, federation.attempt)
        self._complete_audit(config.out / "audit.jsonl")
        servicer = FederationServicer(
            self._live,
            self._files.inbox,
            self._outbox,
            self._audit,
            settings.model_dump_json(),
            ledger.run_id,
            Admission(config.tls, self._live.fail),
            terms,
            self._summing,
        )
        threads = ThreadPoolExecutor(2 * len(federation.silos) + 4, thread_name_prefix="rpc")
        self._server = grpc.server(threads, interceptors=[ReadyFrames()], options=SERVER_OPTIONS)
        add_FederationServiceServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]

    def start(self) -> str:
        """Listens; returns host:port with the real port, which also stands in OUT/address.

        Raises:
            PortInUse: something else listens there.
            CertificateError: a file of config.tls is missing or does not fit.
        """
        port = listen(self._server, self._config.listen, self._config.tls)
        self._server.start()
        address = f"{self._config.listen.rpartition(':')[0]}:{port}"
        atomic.write_text(self._config.out / "address", address + "\n")
        self._audit.append("started", run=self._ledger.run_id)
        return address

    def wait_for_silos(self) -> None:
        """Blocks until those expected are enrolled or, once the deadline has passed, min_silos are; else QuorumLost.

        Expected are all silos or, after a restart, those that were there. A round that is open is not waited for.
        """
        self._live.await_enrolment(self._config.federation.round_deadline_seconds)

    def run_round(self, round: int, *, count_inactivity: bool) -> list[Update] | Sum:
        """Sends the adapter of the round before to the round's silos and blocks until their updates are there.

        Args:
            round: above that of every round before; its start is the ledger's adapter of `round - 1`, which is also
                the pattern of names, shapes and dtypes for what the silos send.

        Returns:
            The updates that count, in the order of the silos' names, or with secure aggregation their sum. The tensors
            are read from disk when asked for, which works until the round is closed.

        Raises:
            QuorumLost: naming each missing silo with the reason.
        """
        if (kept := self._files.sum(round)) is not None:
            return kept
        if round != self._files.open_round:
            self._files.open(round, count_inactivity=count_inactivity)
            self._announce()
        deadline = self._config.federation.round_deadline_seconds
        try:
            self._live.await_round(round, deadline, self._picked, self._summing)
        except QuorumLost:
            self._files.lose(round, self._live.failed)
            raise
        _trim_heap()
        return self.updates(round)

    def updates(self, round: int) -> list[Update] | Sum:
        """The updates that a round counts, or their sum, as :meth:`run_round` returns them."""
        return self._files.sum(round) or self._files.updates(round)

    def close_round(self) -> None:
        """Deletes the round's updates; the ledger keeps who sent what."""
        self._files.close_round()

    def publish_patch(self) -> int:
        """Changes the proxy to its next version, which the ledger has; every silo gets it before its next round.

        Returns:
            The proxy's new version.
        """
        self._files.put_patch(self._live.proxy_version + 1)
        self._announce()
        self._live.handle(PatchPublished())
        return self._live.proxy_version

    def finish(self) -> None:
        """Tells the silos that they may go; blocks until those that are there have heard it."""
        self._live.handle(FinishRequested())
        self._audit.append("finished", run=self._ledger.run_id)
        self._part()

    def abort(self, reason: str) -> None:
        """Tells the silos that the federation broke off, and why, in words fit for all of them."""
        self._live.handle(AbortRequested(reason))
        self._part()

    def close(self) -> None:
        """Stops listening. May be called more than once."""
        self._server.stop(CLOSING_SECONDS).wait()

    def curves(self) -> dict[str, Any]:
        """Nothing: what the silos have, they keep to themselves."""
        return {}

    @property
    def bytes_down(self) -> int:
        """Payload bytes sent: proxies, adapters, patches."""
        return self._outbox.bytes_down

    @property
    def bytes_up(self) -> int:
        """Payload bytes received: updates."""
        return self._files.inbox.bytes_up

    def _make_summing(self) -> Summing | None:
        """None without secure aggregation."""
        terms, config = self._config.secure_terms, self._config
        if terms is None or config.tls is None:
            return None
        seconds = config.secure_aggregation.stage_deadline_seconds
        verifier = Verifier(config.tls.ca)
        return Summing(self._ledger.run_id, terms, self._files, self._audit, verifier, seconds)

    def _picked(self, action: Picked, present: Collection[str]) -> None:
        self._files.enter(action, present)
        if self._summing is not None and not isinstance(action, Substitute):
            self._begin_sum(action.round, action.attempt)

    def _begin_sum(self, round: int, attempt: int) -> None:
        assert self._summing is not None
        assert self._files.adapter is not None
        version, counts = self._live.proxy_version, self._files.inbox.counts_inactivity
        task = task_digest(self._files.adapter.sha256, version, count_inactivity=counts)
        self._summing.begin(round, attempt, task)

    def _announce(self) -> None:
        """What the silos can fetch is what the files are now."""
        if self._files.adapter is not None:
            self._outbox.put_adapter(self._files.adapter)
        self._outbox.patch, self._outbox.snapshot = self._files.patch, self._files.snapshot

    def _complete_audit(self, path: Path) -> None:
        """Adds the lines that a process did not come to write, which was killed right after an update's row.

        Raises:
            CheckpointError: the log is another run's.
        """
        rows = {(row.round, row.silo): row for row in self._ledger.updates()}
        told, runs = set(), set()
        for entry in audit.read(path):
            if entry.event == "started":
                runs.add(entry.fields["run"])
            elif entry.fields.get("verdict") == "accept":
                told.add((entry.fields["round"], entry.fields["peer"]))
        if runs - {self._ledger.run_id}:
            raise CheckpointError(
                f"{path}: is the log of another run",
                "put back the one of this run, or move this one away",
            )
        if not runs and self._ledger.last_round() is not None:
            log.warning("%s: does not say that this run was started before: it is not the log that it began", path)
        for (round, silo), row in rows.items():
            if (round, silo) not in told:
                line = {"file": "update", "round": round, "bytes": row.bytes, "sha256": row.sha256}
                self._audit.append("received", peer=silo, **line, verdict="accept", late=True)
        for round, silo in sorted(told - rows.keys()):
            log.warning("%s has an update of %s in round %d that the ledger has lost", path, silo, round)

    def _record_sent(self, silo: str, file: Payload, offset: int) -> None:
        self._audit.append(
            "sent", peer=silo, file=file.name, bytes=file.total_bytes - offset, offset=offset, sha256=file.sha256.hex()
        )

    def _part(self) -> None:
        self._live.await_farewell(FAREWELL_SECONDS, self._farewell)


def _share_one_heap() -> None:
    """glibc gives each thread a heap of its own and keeps it: memory would grow with the number of silos."""
    with contextlib.suppress(AttributeError):  # another C library, which has no such heaps
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def _trim_heap() -> None:
    """Gives back the holes that the messages of many silos leave in it, before the sum needs memory."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
