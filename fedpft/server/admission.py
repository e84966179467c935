"""Who is calling: the name in the certificate, unless that certificate was revoked."""

from collections.abc import Callable

import grpc

from fedpft.config import ServerTlsSection
from fedpft.errors import CertificateError
from fedpft.server.live import Place
from fedpft.wire.certificates import Revocations
from fedpft.wire.channel import ID_BYTES, SILO_KEY, WORK_KEY


def place_of(context: grpc.ServicerContext) -> Place:
    """Where the caller says that it runs."""
    said = next((bytes(value) for key, value in context.invocation_metadata() if key == WORK_KEY), b"")
    return Place(said[:ID_BYTES], said[ID_BYTES:])


class Admission:
    """Thread-safe: every RPC asks."""

    def __init__(self, tls: ServerTlsSection | None, fail: Callable[[str, str], None]) -> None:
        """Args:
            tls: None: silos do not prove who they are, they merely say so, in metadata.
            fail: called with a silo and the reason why no round need wait for it any more.

        Raises:
            CertificateError: the list of revoked certificates cannot be read.
        """
        self._certified, self._fail = tls is not None, fail
        self._revocations = Revocations(tls.revoked if tls is not None else None)
        self._shown: dict[str, bytes] = {}  # silo -> the certificate that it was last let in with

    def sender(self, context: grpc.ServicerContext) -> str:
        """The silo's name.

        Raises:
            CertificateError: it has none, or its certificate was revoked.
            ServerUnreachable: whether it was cannot be told now.
        """
        if self._certified:
            shown = context.auth_context()
            names = [str(name, "utf-8") for name in shown.get("x509_common_name", ())]
            certificates = list(shown.get("x509_pem_cert", ()))
        else:
            names = [str(value) for key, value in context.invocation_metadata() if key == SILO_KEY]
            certificates = []
        if len(names) != 1 or len(certificates) != self._certified:
            raise CertificateError("the silo's certificate has no common name", "ask for a new kit")
        for certificate in certificates:
            self._check(names[0], certificate)
        return names[0]

    def _check(self, silo: str, certificate: bytes) -> None:
        """Any call shuts out all that were revoked meanwhile: one that is silent would keep its round waiting.

        A revoked certificate fails its silo only as long as that has not come with another: whoever stole the old one
        must not be able to push the silo out that now has a new one.
        """
        self._shown.setdefault(silo, certificate)
        for name, shown in list(self._shown.items()):
            try:
                self._revocations.check(shown)
            except CertificateError:
                if self._shown.pop(name, None) is not None:
                    self._fail(name, "its certificate was revoked")
        self._revocations.check(certificate)
        self._shown[silo] = certificate
