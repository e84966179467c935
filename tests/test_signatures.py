"""What one silo signs and another believes, by the certificates of the federation."""

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpft.config import TlsSection
from fedpft.errors import CertificateError
from fedpft.provision import provision
from fedpft.wire.signatures import Signer, Verifier

KEYS = {
    "EC": lambda: ec.generate_private_key(ec.SECP256R1()),
    "RSA": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kits")
    provision(directory, ["north", "south"])
    return directory


def tls(kit):
    return TlsSection(ca=kit / "ca.pem", certificate=kit / "certificate.pem", key=kit / "key.pem")


def of_another_maker(directory, key, *, days=1, usage=ExtendedKeyUsageOID.CLIENT_AUTH):
    """A kit whose authority, and certificate, were made with other tools than fedpft's."""
    directory.mkdir()
    authority, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subjects = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("authority", "north")]

    def certificate(subject, public, until):
        builder = x509.CertificateBuilder().issuer_name(subjects[0]).subject_name(subject).public_key(public)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - datetime.timedelta(days=30)).not_valid_after(until)

    ca = certificate(subjects[0], authority.public_key(), now + datetime.timedelta(days=9))
    ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    own = certificate(subjects[1], key.public_key(), now + datetime.timedelta(days=days))
    own = own.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    (directory / "ca.pem").write_bytes(ca.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM))
    (directory / "certificate.pem").write_bytes(own.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM))
    (directory / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return tls(directory)


@pytest.mark.parametrize("kind", KEYS)
def test_a_signature_names_who_signed_whatever_the_key(tmp_path, kind):
    section = of_another_maker(tmp_path / "kit", KEYS[kind]())
    signer, verifier = Signer(section), Verifier(section.ca)
    signature = signer.sign(b"message")
    assert verifier.name(signer.certificate, b"message", signature) == "north"
    for message, wrong in ((b"another", signature), (b"message", signature[:-1] + b"\0\0"), (b"message", b"")):
        with pytest.raises(CertificateError, match="the signature is not that of north"):
            verifier.name(signer.certificate, message, wrong)


def test_a_certificate_of_another_authority_is_not_believed(kits, tmp_path):
    provision(tmp_path / "other", ["north"])
    signer = Signer(tls(tmp_path / "other" / "silos" / "north"))
    with pytest.raises(CertificateError, match="was not signed by this federation's authority"):
        Verifier(kits / "server" / "ca.pem").name(signer.certificate, b"message", signer.sign(b"message"))


def test_the_server_cannot_pose_as_a_silo(kits):
    signer = Signer(tls(kits / "server"))
    with pytest.raises(CertificateError, match="is not a silo's certificate"):
        Verifier(kits / "server" / "ca.pem").name(signer.certificate, b"message", signer.sign(b"message"))


def test_an_expired_certificate_is_not_believed(tmp_path):
    section = of_another_maker(tmp_path / "kit", KEYS["EC"](), days=-1)
    with pytest.raises(CertificateError, match="the certificate of north expired"):
        Verifier(section.ca).name(section.certificate.read_bytes(), b"message", Signer(section).sign(b"message"))


@pytest.mark.parametrize("shown", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\n" + b"A" * 20_000])
def test_what_is_no_certificate_is_refused(kits, shown):
    with pytest.raises(CertificateError, match="what was shown is no certificate"):
        Verifier(kits / "server" / "ca.pem").name(shown, b"message", b"")
