"""Connections: mutual TLS 1.3 and keep-alive on both sides; on the silo's, patience with a server that is away.

TLS. Each side shows a certificate of the federation's own authority and demands one of the other; a silo also checks
that the server's certificate is made out to the host it dials. `fedpft.wire` keeps TLS 1.2 out. A silo reads its key
once, the server whenever its files have changed.
"""

import contextlib
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import grpc

from fedpft.config import TlsSection
from fedpft.errors import CertificateError, FedPFTError, PortInUse, ServerUnreachable, TransferCorrupt
from fedpft.wire.certificates import fitting_key, read_kit, stamp_of
from fedpft.wire.status import CLASSES, answered, error_of
from fedpft.wire.transfer import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Cancellable(Protocol):
    """A gRPC call at a silo, or its context at the server."""

    def cancel(self) -> object:
        """Ends it."""


MESSAGE_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
# A silo trains for hours between two calls: pings keep firewalls from forgetting the connection, and tell within
# 40 s if the other side is gone.
SILO_OPTIONS = [
    *MESSAGE_OPTIONS,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # the waiting is done here, by `persist`
    ("grpc.enable_http_proxy", 0),  # the address in silo.yaml is where the silo connects, whatever http_proxy says
]
SERVER_OPTIONS = [
    *MESSAGE_OPTIONS,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # else a second server on the same port would silently share its silos
]

SILO_KEY = "fedpft-silo"  # metadata: a silo's name where there is no certificate to carry it
WORK_KEY = "fedpft-work-bin"  # metadata: two numbers of ID_BYTES made up for a silo's work directory and its process
ID_BYTES = 16

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0
TELL_SECONDS = 60.0  # between two lines about a server that stays away
CORRUPT_ATTEMPTS = 3
IDLE_SECONDS = 120.0  # longest silence in the middle of a transfer
PROBES = 3
PROBE_SECONDS = 5.0
PROBE_PAUSE_SECONDS = 0.2


def check_listen(address: str) -> None:
    """Raises PortInUse if a server could not listen on host:port now, so that nobody waits for a proxy in vain."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError:
        raise _cannot_listen(address) from None


def listen(server: grpc.Server, address: str, tls: TlsSection | None) -> int:
    """Binds a server to host:port, without TLS if `tls` is None; returns the port, the real one for port 0.

    Raises:
        PortInUse: something else listens there, or the host is not this machine's.
        CertificateError: naming the file of the kit that is not in order.
    """
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, _server_credentials(tls))
    except RuntimeError:
        port = 0
    if port == 0:
        raise _cannot_listen(address)
    return int(port)


def _server_credentials(tls: TlsSection) -> grpc.ServerCredentials:
    """Takes up a renewed kit with the next connection, as soon as it is whole; those that are open stay open."""
    files = (tls.ca, tls.certificate, tls.key)
    stamp = stamp_of(*files)  # before the files are read, so that no change goes unseen

    def configuration() -> grpc.ServerCertificateConfiguration:
        kit = read_kit(tls, "server")
        return grpc.ssl_server_certificate_configuration([(kit.key, kit.certificate)], kit.ca)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called before each handshake; None: as before."""
        nonlocal stamp
        if (now := stamp_of(*files)) == stamp:
            return None
        stamp = now
        try:
            renewed = configuration()
        except CertificateError as error:
            log.error("the server goes on with the key and certificate it has: %s", error)
            return None
        log.info("%s: changed, and taken up", tls.certificate)
        return renewed

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=True)


def _cannot_listen(address: str) -> PortInUse:
    return PortInUse(
        f"cannot listen on {address}: the port is taken, or the host is not an address of this machine",
        "stop the other process or change `listen` in server.yaml",
    )


def dial(address: str, tls: TlsSection | None) -> grpc.Channel:
    """A channel to the server; it connects with the first call."""
    if tls is None:
        return grpc.insecure_channel(address, options=SILO_OPTIONS)
    credentials = grpc.ssl_channel_credentials(tls.ca.read_bytes(), fitting_key(tls), tls.certificate.read_bytes())
    return grpc.secure_channel(address, credentials, options=SILO_OPTIONS)


def pauses() -> Iterator[float]:
    """Seconds to wait between attempts: doubling, with jitter so that silos do not come back all at once."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield random.uniform(0.5, 1.0) * pause
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


Progress = Callable[[], None]


def persist(
    attempt: Callable[[Progress], Answer],
    address: str,
    tls: TlsSection | None,
    *,
    timeout_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """Calls the server until it answers; only what waiting, or another try, can mend is tried again.

    Args:
        attempt: one or more RPCs; it may be called many times. It calls its argument whenever it has come further than
            ever before, and patience then begins anew.
        timeout_seconds: longest wait without progress since the first failure.

    Raises:
        ServerUnreachable: no answer within that time.
        CertificateError: the server is there, but the certificates of the two sides do not fit.
        TransferCorrupt: CORRUPT_ATTEMPTS transfers in a row were broken.
        FedPFTError: what the server answered.
    """
    broken, waiting = 0, pauses()
    began: float | None = None
    told: float | None = None

    def progress() -> None:
        nonlocal broken, waiting, began
        broken, waiting, began = 0, pauses(), None

    while True:
        try:
            answer = attempt(progress)
        except TransferCorrupt as error:
            fault: FedPFTError | None = error
        except TimeoutError as error:  # the watchdog's
            fault, reason = None, str(error)
        except grpc.RpcError as error:
            fault = error_of(error)
            if isinstance(fault, ServerUnreachable):
                reason, fault = fault.message if answered(error) else diagnose(address, tls), None
            elif error.code() in CLASSES and not isinstance(fault, TransferCorrupt):
                raise fault from None
            # What no server of ours answers may be a message with a flipped bit: like a broken transfer.
        else:
            if told is not None:
                log.info("the server at %s answers again", address)
            return answer
        if fault is not None:
            broken += 1
            if broken == CORRUPT_ATTEMPTS:
                raise fault
            log.warning("%s; trying again", fault.message)
            continue
        now, pause = clock(), next(waiting)
        began = now if began is None else began
        if now - began + pause > timeout_seconds:
            raise ServerUnreachable(
                f"the server at {address} did not answer for {timeout_seconds:g} s ({reason})",
                "check `server` in silo.yaml, that the server runs, and that firewalls let TCP through",
            )
        if told is None or now - told >= TELL_SECONDS:
            log.info("the server at %s does not answer (%s); trying again", address, reason)
            told = now
        sleep(pause)


class Watchdog:
    """Cancels a stream in which nothing has moved for some time; what moves slowly may take as long as it likes."""

    def __init__(self, seconds: float = IDLE_SECONDS) -> None:
        self._seconds = seconds
        self._moved = time.monotonic()
        self._over = threading.Event()
        self._fired = False

    def rearm(self) -> None:
        """Something moved."""
        self._moved = time.monotonic()

    @contextlib.contextmanager
    def guarding(self, call: Cancellable) -> Iterator[None]:
        """While open, the call is cancelled after so many seconds without `rearm`; once for each watchdog.

        Raises:
            TimeoutError: in place of what the body raised, if it was cancelled here.
        """
        self.rearm()
        threading.Thread(target=self._watch, args=(call,), daemon=True).start()
        try:
            yield
        except Exception:
            if self._fired:
                raise TimeoutError(f"nothing moved for {self._seconds:g} s") from None
            raise
        finally:
            self._over.set()

    def _watch(self, call: Cancellable) -> None:
        while (left := self._moved + self._seconds - time.monotonic()) > 0:
            if self._over.wait(left):
                return
        self._fired = True
        call.cancel()


def diagnose(address: str, tls: TlsSection | None) -> str:
    """Finds out with a handshake of its own why the server could not be reached; a few words.

    gRPC reports a refused connection and a refused certificate alike, but only the first can pass by waiting.

    Raises:
        CertificateError: one side does not accept the other's certificate.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        for _ in range(PROBES):
            with socket.create_connection((host, int(port)), timeout=PROBE_SECONDS) as connection:
                if tls is None or _is_welcome(connection, host, address, tls):
                    return "the connection broke"
            time.sleep(PROBE_PAUSE_SECONDS)
    except socket.gaierror:
        return f"the name {host} is not known"
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or "no connection").lower()
    raise _not_accepted(address, "it hangs up on seeing it")


def _is_welcome(connection: socket.socket, host: str, address: str, tls: TlsSection) -> bool:
    """Whether the server goes on talking after the handshake.

    With TLS 1.3 a silo's part of the handshake is over before the server has looked at the silo's certificate, so only
    the first read tells. A content server opens HTTP/2 with a settings frame; gRPC hangs up without an alert if the
    certificate does not please it, which a server that is just going down does too: hence several probes.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(tls.ca)
    context.load_cert_chain(tls.certificate, tls.key)
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            return secured.recv(1) != b""
    except ssl.SSLCertVerificationError as error:
        raise CertificateError(
            f"the certificate of the server at {address} is not accepted: {error.verify_message.rstrip('.')}",
            "check that `server` is a host named in that certificate, and that tls.ca is this federation's authority",
        ) from None
    except ssl.SSLEOFError:
        raise ConnectionResetError(None, "it broke the connection off") from None
    except ssl.SSLError as error:
        reason = (error.reason or "handshake failed").lower().replace("_", " ")
        if "alert" in reason:
            raise _not_accepted(address, reason) from None
        raise CertificateError(
            f"what listens at {address} does not speak TLS 1.3: {reason}", "check `server` in silo.yaml"
        ) from None


def _not_accepted(address: str, reason: str) -> CertificateError:
    return CertificateError(
        f"the server at {address} does not accept this side's certificate: {reason}",
        "check that the kit is this federation's and has not expired, or ask the server's operator",
    )
