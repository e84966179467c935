"""One side's own key and certificates, looked at before it dials: what is wrong is said by file, not by a handshake.

And, at the server, the list of certificates that are shut out.
"""

import datetime
import functools
import json
import logging
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpft.config import ServerTlsSection, TlsSection
from fedpft.errors import CertificateError, ServerUnreachable

log = logging.getLogger(__name__)

Role = Literal["server", "silo"]
USAGE = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "silo": ExtendedKeyUsageOID.CLIENT_AUTH}
NEW_KIT = "ask the operator of the federation's authority for a new kit (`fedpft provision`)"
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)
WARNING_DAYS = 30  # before a certificate expires


@dataclass(frozen=True)
class Kit:
    """What the three files held at one moment; it fits together, and is good for its role today.

    name: in the certificate; a silo is known to the server by it.
    ca, certificate, key: PEM.
    days_left: until the certificate, or the authority's own, expires.
    warnings: of those that expire soon, each one line with the remedy.
    """

    name: str
    ca: bytes
    certificate: bytes
    key: bytes
    days_left: int
    warnings: tuple[str, ...]


def check_certificates(tls: TlsSection, role: Role) -> str:
    """As :func:`read_kit`, and the server's list of revoked ones; logs the warnings.

    Returns:
        The name in the certificate.
    """
    kit = read_kit(tls, role)
    if isinstance(tls, ServerTlsSection) and tls.revoked is not None:
        read_revoked(tls.revoked)
    for warning in (*kit.warnings, exposure(tls.key)):
        if warning:
            log.warning("%s", warning)
    return kit.name


def exposure(key: Path) -> str:
    """What to do if others than its owner can read the key; empty if they cannot."""
    exposed = key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return f"{key} can be read by others than its owner -> chmod 600 {key}" if exposed else ""


def read_kit(tls: TlsSection, role: Role) -> Kit:
    """Reads the three files, and checks that they fit each other, are valid today and made for this role.

    Raises:
        CertificateError: naming the file.
    """
    ca, pem = _read(tls.ca), _read(tls.certificate)
    authorities, certificate = _parse(tls.ca, ca), _parse(tls.certificate, pem)[0]
    key = _fitting_key(tls, certificate)
    _check_dates(tls.certificate, certificate)
    issuer = next((authority for authority in authorities if signed(certificate, authority)), None)
    if issuer is None:
        raise CertificateError(
            f"{tls.certificate} was not signed by {tls.ca}", "name the files of one and the same federation"
        )
    _check_dates(tls.ca, issuer)
    _check_role(tls.certificate, certificate, role)
    warnings = []
    for path, each, remedy in ((tls.certificate, certificate, "renew it"), (tls.ca, issuer, "rotate the authority")):
        if days_left(each) < WARNING_DAYS:
            until = f"{each.not_valid_after_utc:%Y-%m-%d}"
            warnings.append(f"{path} expires on {until}, in {days_left(each)} days -> {remedy}: docs/operating.md")
    days = min(days_left(certificate), days_left(issuer))
    return Kit(common_name(certificate, tls.certificate), ca, pem, key, days, tuple(warnings))


def fitting_key(tls: TlsSection) -> bytes:
    """The private key (PEM) that fits the certificate: while a kit is renewed, its key.pem holds the old and the new.

    Raises:
        CertificateError: no key there fits.
    """
    return _fitting_key(tls, parse(tls.certificate)[0])


def parse(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one; CertificateError if it cannot be read."""
    return _parse(path, _read(path))


def signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the one was signed by the other."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def days_left(certificate: x509.Certificate) -> int:
    """Whole days until it expires."""
    return (certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days


# --- revocation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Revoked:
    """An entry of the list: whose certificate, its serial number in hexadecimal, and since when (UTC) it is void."""

    name: str
    serial: str
    revoked_at: str


def read_revoked(path: Path) -> list[Revoked]:
    """The list that `fedpft provision --revoke` writes; CertificateError if it is missing or torn."""
    try:
        entries = json.loads(_read(path))
        if not isinstance(entries, list):
            raise TypeError("not a list")
        revoked = [Revoked(**entry) for entry in entries]
        for entry in revoked:
            int(entry.serial, 16)
    except (ValueError, TypeError) as error:
        raise CertificateError(
            f"{path}: cannot be read as the list of revoked certificates ({error})",
            "put the authority's copy in its place",
        ) from None
    return revoked


class Revocations:
    """The list as the server uses it: read again whenever the file changes. Thread-safe."""

    def __init__(self, path: Path | None) -> None:
        """None: nothing is revoked. Raises CertificateError if the list cannot be read."""
        self._path = path
        self._known: tuple[object, dict[int, str]] = (None, {})
        if path is not None:
            self._current(path)

    def check(self, certificate: bytes) -> None:
        """Looks a certificate (PEM) up.

        Raises:
            CertificateError: it was revoked.
            ServerUnreachable: the list cannot be read. Nobody is let in then; silos try again until it is mended.
        """
        if self._path is None:
            return
        try:
            revoked = self._current(self._path)
        except CertificateError as error:
            log.error("no silo is let in: %s", error)
            raise ServerUnreachable(
                "the server cannot tell which certificates are revoked", "ask the server's operator to look at its log"
            ) from None
        when = revoked.get(_serial(certificate))
        if when is not None:
            raise CertificateError(
                f"this certificate was revoked on {when}",
                "ask the operator of the federation's authority for a new kit",
            )

    def _current(self, path: Path) -> dict[int, str]:
        stamp = stamp_of(path)
        known, revoked = self._known
        if stamp is None or stamp != known:
            revoked = {int(entry.serial, 16): entry.revoked_at for entry in read_revoked(path)}
            self._known = (stamp, revoked)
            log.info("%s: %d certificates are revoked", path, len(revoked))
        return revoked


def stamp_of(*paths: Path) -> object:
    """Another value as soon as one of these files has changed; None if one is missing."""
    try:
        return tuple((found.st_mtime_ns, found.st_size, found.st_ino) for found in (path.stat() for path in paths))
    except OSError:
        return None


@functools.lru_cache(maxsize=1024)
def _serial(certificate: bytes) -> int:
    return x509.load_pem_x509_certificate(certificate).serial_number


def check_good_for(certificate: x509.Certificate, whose: str, role: Role) -> None:
    """Raises CertificateError if it is not valid today, or made for the other role."""
    _check_dates(whose, certificate)
    _check_role(whose, certificate, role)


# --- one file ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(
            f"{path}: no such file", "put the kit's files where the section `tls` names them"
        ) from None
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read ({error.strerror})", "let this user read it") from None


def _parse(path: Path, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise CertificateError(f"{path}: not a PEM certificate", NEW_KIT) from None


def _fitting_key(tls: TlsSection, certificate: x509.Certificate) -> bytes:
    content = _read(tls.key)
    try:
        for pem in PRIVATE_KEY.findall(content) or [content]:
            if load_pem_private_key(pem, password=None).public_key() == certificate.public_key():
                return bytes(pem) + b"\n"
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{tls.key}: not a PEM private key without password ({error})", NEW_KIT) from None
    raise CertificateError(
        f"{tls.key} is not the key of {tls.certificate}", "name the two files of one and the same kit"
    )


def _check_dates(path: Path | str, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise CertificateError(f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC", NEW_KIT)
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{path} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            "check this machine's clock",
        )


def _check_role(path: Path | str, certificate: x509.Certificate, role: Role) -> None:
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return  # a certificate without this extension is good for either role
    if USAGE[role] not in usages:
        raise CertificateError(f"{path} is not a {role}'s certificate", f"use the kit made for the {role}")


def common_name(certificate: x509.Certificate, path: Path | str) -> str:
    """By which a silo is known; CertificateError if there is not just one."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise CertificateError(f"{path} has no common name", NEW_KIT)
    return str(names[0].value)
