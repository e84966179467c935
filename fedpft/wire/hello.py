"""A look at the server from outside: does it answer, what does it run, what does its clock show? Nothing changes."""

import time
from dataclasses import dataclass

from fedpft.config import TlsSection
from fedpft.wire.channel import SILO_KEY, dial, persist
from fedpft.wire.v1 import federation_pb2 as pb
from fedpft.wire.v1.federation_pb2_grpc import FederationServiceStub


def series(version: str) -> list[str]:
    """Major and minor number, which must be the same on both sides."""
    return version.split(".")[:2]


@dataclass(frozen=True)
class Greeting:
    """What the server answered.

    clock_ahead_seconds: of this machine's clock; known to half of `seconds`, the time that the answer took.
    """

    package_version: str
    clock_ahead_seconds: float
    seconds: float


def greet(address: str, tls: TlsSection | None, *, name: str | None, timeout_seconds: float) -> Greeting:
    """Says hello over a connection of its own.

    Args:
        name: the silo's, where there is no certificate to carry it.
        timeout_seconds: longest wait for an answer, and longest time to try in.

    Raises:
        ServerUnreachable, CertificateError: with the reason.
        FedPFTError: what the server answered.
    """
    metadata = () if name is None else ((SILO_KEY, name),)
    with dial(address, tls) as channel:
        stub = FederationServiceStub(channel)  # type: ignore[no-untyped-call]

        def ask() -> Greeting:
            asked = time.time()
            answer = stub.Hello(pb.HelloRequest(), metadata=metadata, timeout=timeout_seconds)
            answered = time.time()
            ahead = answer.time_ms / 1000 - (asked + answered) / 2
            return Greeting(answer.package_version, ahead, answered - asked)

        return persist(lambda _: ask(), address, tls, timeout_seconds=timeout_seconds)
