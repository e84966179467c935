"""What one silo signs and another believes: signatures by the keys of the federation's certificates."""

import functools
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from fedpft.config import TlsSection
from fedpft.errors import CertificateError
from fedpft.wire.certificates import check_good_for, common_name, fitting_key, parse, signed

LONGEST_CERTIFICATE_BYTES = 1 << 14
_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
_REMEDY = "ask the federation's authority whose certificate that is"


class Signer:
    """One's own. certificate: PEM, without those that may follow it."""

    def __init__(self, tls: TlsSection) -> None:
        """Reads the kit; CertificateError if it does not fit together, or its key is none that can sign."""
        self._key = load_pem_private_key(fitting_key(tls), password=None)
        self.certificate = _pem(parse(tls.certificate)[0])

    def sign(self, message: bytes) -> bytes:
        """ECDSA or RSA-PSS with SHA-256, or Ed25519, as the key is."""
        match self._key:
            case ec.EllipticCurvePrivateKey():
                return self._key.sign(message, ec.ECDSA(hashes.SHA256()))
            case rsa.RSAPrivateKey():
                return self._key.sign(message, _PSS, hashes.SHA256())
            case ed25519.Ed25519PrivateKey():
                return self._key.sign(message)
        raise CertificateError("this side's key is of a kind that cannot sign", "ask for a new kit")


class Verifier:
    """Believes those whose certificate the authority signed."""

    def __init__(self, authority: Path) -> None:
        """authority: PEM, one or several; CertificateError if it cannot be read."""
        self._authorities = parse(authority)
        self._believed = functools.lru_cache(maxsize=1024)(self._believe)

    def name(self, certificate: bytes, message: bytes, signature: bytes) -> str:
        """Of the silo that signed a message.

        Raises:
            CertificateError: its certificate (PEM) is not a silo's of this authority, or the signature is wrong.
        """
        name, shown = self._believed(certificate)
        check_good_for(shown, f"the certificate of {name}", "silo")
        key = shown.public_key()
        try:
            match key:
                case ec.EllipticCurvePublicKey():
                    key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
                case rsa.RSAPublicKey():
                    key.verify(signature, message, _PSS, hashes.SHA256())
                case ed25519.Ed25519PublicKey():
                    key.verify(signature, message)
                case _:
                    raise CertificateError(f"the key of {name} is of a kind that cannot sign", _REMEDY)
        except InvalidSignature:
            raise CertificateError(f"the signature is not that of {name}", _REMEDY) from None
        return name

    def _believe(self, certificate: bytes) -> tuple[str, x509.Certificate]:
        try:
            if len(certificate) > LONGEST_CERTIFICATE_BYTES:
                raise ValueError("too long")
            shown = x509.load_pem_x509_certificate(certificate)
        except ValueError:
            raise CertificateError("what was shown is no certificate", _REMEDY) from None
        if not any(signed(shown, authority) for authority in self._authorities):
            raise CertificateError("a certificate was not signed by this federation's authority", _REMEDY)
        return common_name(shown, "a certificate that was shown"), shown


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
