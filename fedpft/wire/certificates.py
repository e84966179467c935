"""A look at one side's own key and certificates before it dials: what is wrong is said by file, not by a handshake."""

import datetime
import logging
import stat
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpft.config import TlsSection
from fedpft.errors import CertificateError

log = logging.getLogger(__name__)

Role = Literal["server", "silo"]
USAGE = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "silo": ExtendedKeyUsageOID.CLIENT_AUTH}
NEW_KIT = "ask the operator of the federation's authority for a new kit (`fedpft provision`)"


def check_certificates(tls: TlsSection, role: Role) -> str:
    """Checks that the three files exist, parse, fit each other, are valid today and made for this role.

    Returns:
        The name in the certificate: a silo is known to the server by it.

    Raises:
        CertificateError: naming the file.
    """
    authority = _certificate(tls.ca)
    certificate = _certificate(tls.certificate)
    try:
        key = load_pem_private_key(_read(tls.key), password=None)
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{tls.key}: not a PEM private key without password ({error})", NEW_KIT) from None
    if key.public_key() != certificate.public_key():
        raise CertificateError(
            f"{tls.key} is not the key of {tls.certificate}", "name the two files of one and the same kit"
        )
    if tls.key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("%s can be read by others than its owner: chmod 600 it", tls.key)
    for path, each in ((tls.ca, authority), (tls.certificate, certificate)):
        _check_dates(path, each)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise CertificateError(
            f"{tls.certificate} was not signed by {tls.ca}", "name the files of one and the same federation"
        ) from None
    _check_role(tls.certificate, certificate, role)
    return _name(tls.certificate, certificate)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(
            f"{path}: no such file", "put the kit's files where the section `tls` names them"
        ) from None
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read ({error.strerror})", "let this user read it") from None


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError:
        raise CertificateError(f"{path}: not a PEM certificate", NEW_KIT) from None


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise CertificateError(f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC", NEW_KIT)
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{path} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            "check this machine's clock",
        )


def _check_role(path: Path, certificate: x509.Certificate, role: Role) -> None:
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return  # a certificate without this extension is good for either role
    if USAGE[role] not in usages:
        raise CertificateError(f"{path} is not a {role}'s certificate", f"use the kit made for the {role}")


def _name(path: Path, certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise CertificateError(f"{path} has no common name", NEW_KIT)
    return str(names[0].value)
