"""Makes the federation's own certificate authority, and from it a kit of files for the server and for each silo.

    DIRECTORY/authority/      ca.pem, key.pem, issued.jsonl (stays with whoever runs the authority)
    DIRECTORY/server/         ca.pem, certificate.pem, key.pem, tls.yaml, revoked.json
    DIRECTORY/silos/<name>/   ca.pem, certificate.pem, key.pem, silo.yaml

Keys are EC P-256, made here, without password and readable by their owner only: send each kit over a channel that
you trust. A silo's certificate is good for dialing only, the server's for being dialed only.

issued.jsonl registers every certificate before it is handed out, so that all of a silo's can be revoked. Once ca.pem
of the authority holds several certificates, the one that fits key.pem signs, and all kits trust all of them.
"""

import dataclasses
import datetime
import ipaddress
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpft import atomic
from fedpft.config import SILO_NAME
from fedpft.errors import CertificateError, ConfigError
from fedpft.wire.certificates import Revoked, parse, read_revoked, signed

SERVER = "server"
REGISTER = "issued.jsonl"
REVOKED = "revoked.json"
DEFAULT_HOSTS = ("127.0.0.1", "localhost")
DEFAULT_PORT = 8470
DEFAULT_DAYS = 365
AUTHORITY_DAYS = 3650
CLOCK_SKEW = datetime.timedelta(minutes=10)  # a kit is used at once, on machines whose clocks differ

SILO_YAML = """\
# One institution's side of the federation. Relative paths start at this file's directory.
# docs/configuration.md lists all keys.

server: {server}

tls:
  ca: ca.pem
  certificate: certificate.pem
  key: key.pem

# EDIT: your own labelled data, a CSV or TSV file with a header line, or JSON lines. It never leaves this machine.
data:
  path: data.csv
  columns:
    text: text
    label: label
"""

TLS_YAML = """\
# For server.yaml; the paths start at the directory of the file that they stand in.
listen: {listen}

tls:
  ca: {directory}/ca.pem
  certificate: {directory}/certificate.pem
  key: {directory}/key.pem
  revoked: {directory}/revoked.json
"""


def provision(
    directory: Path,
    silos: Sequence[str],
    *,
    hosts: Sequence[str] | None = None,
    port: int = DEFAULT_PORT,
    days: int = DEFAULT_DAYS,
) -> list[Path]:
    """Makes what is missing: the authority, the server's kit, and a kit for each of these silos.

    Silos can be added later: the authority and the server's kit that are there are used and stay as they are.

    Args:
        hosts: names and addresses under which silos reach the server, the first of which goes into silo.yaml; default:
            those of the server's kit or, for a new one, DEFAULT_HOSTS.
        port: goes into silo.yaml.
        days: how long the certificates are valid.

    Returns:
        The directories made.

    Raises:
        ConfigError: a kit is there already, or a name that cannot be a silo's or a host's. Nothing was made then.
        CertificateError: the authority that is there cannot be used.
    """
    server = directory / SERVER
    _check_names(silos)
    for silo in silos:
        if (directory / "silos" / silo).exists():
            raise ConfigError(f"{directory / 'silos' / silo} is there already", f"renew it: --renew {silo}")
    _check_issue(hosts, days)
    if hosts is not None and server.exists():
        raise ConfigError(f"{server} is there already, with its own host names", "leave the hosts out, or renew it")
    made = []
    if (directory / "authority").exists():
        authority = Authority.load(directory / "authority")
    else:
        authority = Authority.create()
        made.append(_make(directory / "authority", {"ca.pem": authority.pem, "key.pem": _pem(authority.key)}))
    if not server.exists():
        hosts = hosts or DEFAULT_HOSTS
        kit = _issue(directory, authority, SERVER, hosts=hosts, days=days)
        section = TLS_YAML.format(listen=json.dumps(f"{_bracketed(hosts[0])}:{port}"), directory=server.name)
        made.append(_make(server, {**kit, "tls.yaml": section.encode(), REVOKED: _listed([])}))
    address = f"{_bracketed((hosts or _hosts(server / 'certificate.pem'))[0])}:{port}"
    for silo in silos:
        kit = _issue(directory, authority, silo, hosts=None, days=days)
        text = SILO_YAML.format(server=json.dumps(address))
        made.append(_make(directory / "silos" / silo, {**kit, "silo.yaml": text.encode()}))
    return made


def renew(
    directory: Path, names: Sequence[str], *, hosts: Sequence[str] | None = None, days: int = DEFAULT_DAYS
) -> list[Path]:
    """Gives kits a new key and a new certificate of the present authority; all else in them stays as it is.

    A kit may be in use meanwhile, and whenever this stops, each is whole: see `_replace_kit`.

    Args:
        names: of silos, or `server`.
        hosts: new names and addresses for the server; default: those that it has.
        days: how long the new certificates are valid.

    Returns:
        The directories of the kits.

    Raises:
        ConfigError: there is no kit of that name. Nothing was renewed then.
        CertificateError: the authority that is there cannot be used.
    """
    kits = {name: _existing(directory, name) for name in names}
    _check_issue(hosts, days)
    if hosts is not None and SERVER not in names:
        raise ConfigError("hosts are for the server's certificate", "renew it too: --renew server")
    authority = Authority.load(directory / "authority")
    for name, kit in kits.items():
        known = (hosts or _hosts(kit / "certificate.pem")) if name == SERVER else None
        _replace_kit(kit, _issue(directory, authority, name, hosts=known, days=days))
    return list(kits.values())


def revoke(directory: Path, names: Sequence[str]) -> Path:
    """Enters every certificate that these silos were ever given into the server's list of those that are shut out.

    Returns:
        The list.

    Raises:
        ConfigError: a name that no certificate was issued to, or the server's. Nothing was revoked then.
        CertificateError: the list that is there, or the register, cannot be read.
    """
    if SERVER in names:
        raise ConfigError(
            "the server cannot be revoked: silos read no list", "make everything anew (docs/operating.md)"
        )
    path = directory / SERVER / REVOKED
    entries = read_revoked(path) if path.exists() else []
    known = {int(entry.serial, 16) for entry in entries}
    now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    for name in dict.fromkeys(names):
        serials = _issued_to(directory, name)
        if not serials:
            raise ConfigError(
                f"no certificate was issued to {name!r}", f"look into {directory / 'authority' / REGISTER}"
            )
        entries += [Revoked(name, _hex(serial), now) for serial in serials if serial not in known]
    with atomic.replacing(path) as written:
        written.write_bytes(_listed(entries))
    return path


def replace_authority(directory: Path, *, days: int = DEFAULT_DAYS) -> list[Path]:
    """Makes an authority that signs from now on, and renews every silo's kit; both sides trust old and new.

    The server keeps its certificate, which silos know that do not have their new kit yet. Kits of silos that were
    revoked stay as they are. If this stops, no kit is of an authority that the others do not trust: call it again.

    Args:
        days: how long the new certificates are valid.

    Returns:
        The directories changed.

    Raises:
        ConfigError: the server's kit is not there. Nothing was changed then.
        CertificateError: the authority that is there, or the list of revoked certificates, cannot be used.
    """
    _check_issue(None, days)
    place, server, silos = directory / "authority", _existing(directory, SERVER), _silos(directory)
    old = Authority.load(place)
    new = dataclasses.replace(Authority.create(), others=(old.certificate, *old.others))
    _replace(place / "ca.pem", new.pem)  # first, because whichever key is there then has a certificate beside it
    _replace(place / "key.pem", _pem(new.key))
    _replace(server / "ca.pem", new.pem)
    return [place, server, *renew(directory, silos, days=days)]


def drop_old_authority(directory: Path, *, days: int = DEFAULT_DAYS) -> list[Path]:
    """Ends what :func:`replace_authority` began: renews the server's kit, and takes the old authority out of every one.

    Silos have to have their renewed kits by now. If this stops, call it again.

    Args:
        days: how long the server's new certificate is valid.

    Returns:
        The directories changed.

    Raises:
        ConfigError: there is one authority only, or a silo's kit is of the old one. Nothing was changed then.
        CertificateError: the authority that is there, or the list of revoked certificates, cannot be used.
    """
    place, silos = directory / "authority", [_existing(directory, silo) for silo in _silos(directory)]
    authority = Authority.load(place)
    if not authority.others:
        raise ConfigError(f"{place}: there is no old authority", "make a new one first: --new-authority")
    for kit in silos:
        if not signed(parse(kit / "certificate.pem")[0], authority.certificate):
            raise ConfigError(f"{kit} is of the old authority", f"renew it, and hand it over: --renew {kit.name}")
    changed = [*renew(directory, [SERVER], days=days), *silos, place]  # until `place` is done this can be repeated
    for each in changed:
        _replace(each / "ca.pem", dataclasses.replace(authority, others=()).pem)
    return changed


@dataclass(frozen=True)
class Authority:
    """Signs certificates. others: those that ca.pem holds beside its own."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    others: tuple[x509.Certificate, ...] = ()

    @classmethod
    def create(cls) -> "Authority":
        """A new one."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _common_name("fedpft authority")
        now = datetime.datetime.now(datetime.UTC)
        builder = _builder(name, name, key.public_key(), now - CLOCK_SKEW, now + datetime.timedelta(AUTHORITY_DAYS))
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def load(cls, directory: Path) -> "Authority":
        """The one in a directory; CertificateError if it cannot be used."""
        try:
            key = load_pem_private_key((directory / "key.pem").read_bytes(), password=None)
            certificates = x509.load_pem_x509_certificates((directory / "ca.pem").read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise CertificateError(
                f"{directory}: no authority that can be used ({error})", "restore its ca.pem and key.pem"
            ) from None
        own = [certificate for certificate in certificates if certificate.public_key() == key.public_key()]
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not own:
            raise CertificateError(f"{directory}: key.pem is not the key of ca.pem", "restore the two files")
        others = [certificate for certificate in certificates if certificate not in own]
        return cls(key, own[0], tuple(others))

    @property
    def pem(self) -> bytes:
        """What both sides trust: its certificate, and those of the authorities that came before or come after it."""
        return b"".join(each.public_bytes(Encoding.PEM) for each in (self.certificate, *self.others))

    def kit(
        self, name: str, *, hosts: Sequence[str] | None, days: int, valid_from: datetime.datetime | None = None
    ) -> dict[str, bytes]:
        """The three files of one side.

        Args:
            name: the common name; a silo is known by it.
            hosts: for a server, its names and addresses; None for a silo.
            valid_from: default: now, and a little before.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        begin = valid_from or datetime.datetime.now(datetime.UTC) - CLOCK_SKEW
        end = min(begin + datetime.timedelta(days), self.certificate.not_valid_after_utc)
        alternatives = [_general_name(host) for host in hosts] if hosts else [x509.DNSName(name)]
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        certificate = (
            _builder(_common_name(name), self.certificate.subject, key.public_key(), begin, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return {"ca.pem": self.pem, "certificate.pem": certificate.public_bytes(Encoding.PEM), "key.pem": _pem(key)}


def _check_names(silos: Sequence[str]) -> None:
    for silo in silos:
        if not re.match(SILO_NAME, silo) or silo == SERVER:
            raise ConfigError(
                f"{silo!r} cannot be a silo's name", "use up to 63 letters, digits, _, . and -, but not `server`"
            )
        if silos.count(silo) > 1:
            raise ConfigError(f"silo {silo!r} is named twice", "name it once")


def _check_issue(hosts: Sequence[str] | None, days: int) -> None:
    for host in hosts or ():
        _general_name(host)
    if days < 1:
        raise ConfigError(f"certificates cannot be valid for {days} days", "make them valid for at least one day")


def _kit_directory(directory: Path, name: str) -> Path:
    if name != SERVER:
        _check_names([name])
    return directory / SERVER if name == SERVER else directory / "silos" / name


def _existing(directory: Path, name: str) -> Path:
    kit = _kit_directory(directory, name)
    if not kit.exists():
        raise ConfigError(f"{kit} is not there", f"make a new kit for {name}: --silos {name}")
    return kit


def _silos(directory: Path) -> list[str]:
    """Whose kits are there, but for those of whom the certificate in it was revoked."""
    path = directory / SERVER / REVOKED
    revoked = {int(entry.serial, 16) for entry in (read_revoked(path) if path.exists() else [])}
    certificates = sorted((directory / "silos").glob("[!.]*/certificate.pem"))
    return [path.parent.name for path in certificates if parse(path)[0].serial_number not in revoked]


def _issue(
    directory: Path, authority: Authority, name: str, *, hosts: Sequence[str] | None, days: int
) -> dict[str, bytes]:
    """A new kit's files; its certificate is in the register before anybody can have it."""
    kit = authority.kit(name, hosts=hosts, days=days)
    (certificate,) = x509.load_pem_x509_certificates(kit["certificate.pem"])
    entry = {
        "name": name,
        "serial": _hex(certificate.serial_number),
        "not_after": f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC",
        "issued_at": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
    }
    register = directory / "authority" / REGISTER
    before = register.read_text(encoding="utf-8") if register.exists() else ""
    atomic.write_text(register, before + json.dumps(entry) + "\n")
    return kit


def _issued_to(directory: Path, name: str) -> list[int]:
    """The serial numbers of a silo's certificates: of the register and, if that is younger than the kit, of the kit."""
    register, serials = directory / "authority" / REGISTER, []
    try:
        for line in register.read_text(encoding="utf-8").splitlines() if register.exists() else ():
            entry = json.loads(line)
            if entry["name"] == name:
                serials.append(int(entry["serial"], 16))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CertificateError(f"{register}: cannot be read ({error})", "restore it") from None
    certificate = _kit_directory(directory, name) / "certificate.pem"
    if certificate.exists():
        serials.append(parse(certificate)[0].serial_number)
    return list(dict.fromkeys(serials))


def _listed(entries: Sequence[Revoked]) -> bytes:
    return (json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1) + "\n").encode()


def _hex(serial: int) -> str:
    """As openssl prints it."""
    return serial.to_bytes((serial.bit_length() + 7) // 8).hex().upper()


def _make(directory: Path, files: dict[str, bytes]) -> Path:
    """Writes a kit: the whole directory or nothing."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))  # mode 0700, and it stays so
    try:
        for name, content in files.items():
            descriptor = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _mode(name))
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            atomic.sync(place / name)
        place.rename(directory)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return directory


def _replace_kit(directory: Path, files: dict[str, bytes]) -> None:
    """Changes a kit file by file under whoever reads it.

    Until the certificate has changed, key.pem and ca.pem hold old and new, and those who read a kit take what fits:
    at every moment, and wherever this stops, there is a key that fits the certificate.
    """
    doubled = ("ca.pem", "key.pem")
    for name in doubled:
        old = directory / name
        _replace(old, (old.read_bytes() if old.exists() else b"") + files[name])
    _replace(directory / "certificate.pem", files["certificate.pem"])
    for name in doubled:
        _replace(directory / name, files[name])


def _replace(path: Path, content: bytes) -> None:
    with atomic.replacing(path) as written:
        written.chmod(_mode(path.name))
        written.write_bytes(content)


def _mode(name: str) -> int:
    return 0o600 if name == "key.pem" else 0o644


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    begin: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise ConfigError(f"{host!r} is neither a host name nor an IP address", "mend the server's hosts") from None


def _hosts(certificate: Path) -> list[str]:
    """The names and addresses in the server's certificate."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [str(name.value) for name in names]
    except (OSError, ValueError, x509.ExtensionNotFound):
        raise CertificateError(f"{certificate}: names no host", "restore the server's kit") from None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
