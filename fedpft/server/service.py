"""The server as the algorithm sees it: silos are waited for, rounds are run, patches are published."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import grpc
from torch import Tensor

from fedpft import atomic
from fedpft.config import RoundSettings, ServerConfig
from fedpft.federation import AbortRequested, Federation, FinishRequested, PatchPublished
from fedpft.server.inbox import Inbox
from fedpft.server.live import LiveFederation
from fedpft.server.outbox import Outbox
from fedpft.server.servicer import FederationServicer
from fedpft.server.updates import Update
from fedpft.wire.certificates import check_certificates
from fedpft.wire.channel import SERVER_OPTIONS, listen
from fedpft.wire.federation_pb2_grpc import add_FederationServicer_to_server

FAREWELL_SECONDS = 10.0  # for silos to hear that the federation is over
CLOSING_SECONDS = 2.0  # for the replies that are on their way

__all__ = ["FederationServer", "Update"]


class FederationServer:
    """Blocking, for one thread; the silos are served by threads of its own.

    On disk, under OUT: `address`, `outgoing/` (what silos can fetch beside the proxy), `updates/`.
    """

    def __init__(self, config: ServerConfig, bundle: Path, settings: RoundSettings) -> None:
        """Args:
            bundle: directory of the proxy's files, every one of which is sent to every silo.
            settings: sent to every silo.

        Raises:
            ModelError: the bundle is not one.
            CertificateError: a file of config.tls is missing or does not fit.
        """
        if config.tls is not None:
            check_certificates(config.tls, "server")
        self._config = config
        section = config.federation
        self._live = LiveFederation(
            Federation(
                section.silos,
                min_silos=section.min_silos,
                sample_fraction=section.sample_fraction,
                seed=settings.seed,
            )
        )
        self._inbox = Inbox(bundle, config.out / "updates")
        self._outbox = Outbox(bundle, config.out / "outgoing")
        servicer = FederationServicer(
            self._live, self._inbox, self._outbox, settings.model_dump_json(), certified=config.tls is not None
        )
        threads = ThreadPoolExecutor(2 * len(section.silos) + 4, thread_name_prefix="rpc")
        self._server = grpc.server(threads, options=SERVER_OPTIONS)
        add_FederationServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]

    def start(self) -> str:
        """Listens; returns host:port with the real port, which also stands in OUT/address. Raises PortInUse."""
        port = listen(self._server, self._config.listen, self._config.tls)
        self._server.start()
        address = f"{self._config.listen.rpartition(':')[0]}:{port}"
        atomic.write_text(self._config.out / "address", address + "\n")
        return address

    def wait_for_silos(self) -> None:
        """Blocks until all silos are enrolled or, once the deadline has passed, min_silos are; else QuorumLost."""
        self._live.await_enrolment(self._config.federation.round_deadline_seconds)

    def run_round(self, round: int, adapter: dict[str, Tensor], *, count_inactivity: bool) -> list[Update]:
        """Sends an adapter to the round's silos and blocks until their updates are there.

        Args:
            round: above that of every round before.
            adapter: what the silos start from; also the pattern of names, shapes and dtypes for what they send.

        Returns:
            The updates that count, in the order of the silos' names. Their tensors are read from disk when asked for,
            which works until the next round starts.

        Raises:
            QuorumLost: naming each missing silo with the reason.
        """
        self._outbox.put_adapter(round, adapter)
        self._inbox.open_round(round, adapter, count_inactivity=count_inactivity)
        return self._inbox.updates(self._live.await_round(round, self._config.federation.round_deadline_seconds))

    def publish_patch(self, tensors: Mapping[str, Tensor]) -> int:
        """Changes the proxy: every silo gets this patch before its next round. Returns the proxy's new version."""
        self._outbox.put_patch(tensors)
        self._live.handle(PatchPublished())
        return self._live.proxy_version

    def finish(self) -> None:
        """Tells the silos that they may go; blocks until those that are there have heard it."""
        self._live.handle(FinishRequested())
        self._part()

    def abort(self, reason: str) -> None:
        """Tells the silos that the federation broke off, and why, in words fit for all of them."""
        self._live.handle(AbortRequested(reason))
        self._part()

    def close(self) -> None:
        """Stops listening. May be called more than once."""
        self._server.stop(CLOSING_SECONDS).wait()

    @property
    def bytes_down(self) -> int:
        """Payload bytes sent: proxies, adapters, patches."""
        return self._outbox.bytes_down

    @property
    def bytes_up(self) -> int:
        """Payload bytes received: updates."""
        return self._inbox.bytes_up

    def __enter__(self) -> "FederationServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _part(self) -> None:
        self._live.await_farewell(FAREWELL_SECONDS)
        self._inbox.clear()
