"""A look at the server from outside: what does it run, what must data be like, what does its clock show?"""

import time
from dataclasses import dataclass
from typing import cast, get_args

from pydantic import ValidationError

import fedpft
from fedpft.config import SiloPrivacyTerms, TaskName, TlsSection
from fedpft.errors import RefusedByServer
from fedpft.wire.channel import SILO_KEY, dial, persist
from fedpft.wire.v1 import federation_pb2 as pb
from fedpft.wire.v1.federation_pb2_grpc import FederationServiceStub


def series(version: str) -> list[str]:
    """Major and minor number, which must be the same on both sides."""
    return version.split(".")[:2]


ANSWER_SECONDS = 30.0  # longest wait for one answer


@dataclass(frozen=True)
class Terms:
    """What a silo's data must be like.

    max_tokens: texts are cut after so many.
    characters_per_token: of the server's public texts; 0.0 where samples are images.
    secure_aggregation: whether the server learns sums over silos only.
    silo_privacy: how much those say of a whole silo at most; None: as much as they do.
    """

    task: TaskName
    labels: tuple[str, ...]
    max_tokens: int
    characters_per_token: float
    secure_aggregation: bool = False
    silo_privacy: SiloPrivacyTerms | None = None


@dataclass(frozen=True)
class Greeting:
    """What the server answered.

    clock_ahead_seconds: of this machine's clock; known to half of `seconds`, the time that the answer took.
    terms: None if the server is of a version that does not say.
    """

    package_version: str
    clock_ahead_seconds: float
    seconds: float
    terms: Terms | None = None

    def check_version(self, address: str) -> None:
        """Raises RefusedByServer if the two sides do not fit together."""
        there, here = self.package_version, fedpft.__version__
        if series(there) != series(here):
            raise RefusedByServer(f"{address} runs fedpft {there}, this machine {here}", f"install fedpft {there} here")


def greet(address: str, tls: TlsSection | None, *, name: str | None, timeout_seconds: float) -> Greeting:
    """Says hello over a connection of its own.

    Args:
        name: the silo's, where there is no certificate to carry it.
        timeout_seconds: longest time to try in.

    Raises:
        ServerUnreachable, CertificateError: with the reason.
        FedPFTError: what the server answered.
    """
    metadata = () if name is None else ((SILO_KEY, name),)
    with dial(address, tls) as channel:
        stub = FederationServiceStub(channel)  # type: ignore[no-untyped-call]

        def ask() -> Greeting:
            asked = time.time()
            request = pb.HelloRequest(package_version=fedpft.__version__)
            answer = stub.Hello(request, metadata=metadata, timeout=min(timeout_seconds, ANSWER_SECONDS))
            answered = time.time()
            ahead = answer.time_ms / 1000 - (asked + answered) / 2
            return Greeting(answer.package_version, ahead, answered - asked, _terms(answer))

        return persist(lambda _: ask(), address, tls, timeout_seconds=timeout_seconds)


def _terms(answer: pb.HelloResponse) -> Terms | None:
    if answer.task not in get_args(TaskName):
        return None
    task = cast(TaskName, answer.task)
    said = tuple(answer.labels), answer.max_tokens, answer.characters_per_token, answer.secure_aggregation
    return Terms(task, *said, _silo_privacy(answer))


def _silo_privacy(answer: pb.HelloResponse) -> SiloPrivacyTerms | None:
    if not answer.HasField("silo_privacy"):
        return None
    said = answer.silo_privacy
    try:
        return SiloPrivacyTerms(epsilon=said.epsilon, delta=said.delta, clip=said.clip, rounds=said.rounds)
    except ValidationError:
        raise RefusedByServer(
            "the server's silo_privacy is none that can be", "ask the server's operator what it runs"
        ) from None
