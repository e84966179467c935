"""Keys and certificates while a federation runs: revoked, renewed, of a new authority. Real handshakes on loopback."""

import contextlib
import json
import shutil
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fedpft.wire  # isort: skip  (sets gRPC's environment before grpc is imported)
import grpc
import pytest

from fedpft.config import ServerTlsSection, TlsSection
from fedpft.errors import CertificateError, ServerUnreachable
from fedpft.provision import Authority, drop_old_authority, provision, renew, replace_authority, revoke
from fedpft.server.admission import Admission
from fedpft.server.servicer import FederationServicer
from fedpft.wire.certificates import Revocations, check_certificates, read_kit
from fedpft.wire.channel import SERVER_OPTIONS, dial, listen
from fedpft.wire.hello import Terms, greet
from fedpft.wire.v1.federation_pb2_grpc import add_FederationServiceServicer_to_server

LONG_SECONDS = 60.0  # no test waits so long unless it fails


def tls(kit):
    return TlsSection(ca=kit / "ca.pem", certificate=kit / "certificate.pem", key=kit / "key.pem")


def server_tls(kit):
    return ServerTlsSection(**dict(tls(kit)), revoked=kit / "revoked.json")


@pytest.fixture
def kits(tmp_path):
    provision(tmp_path / "kits", ["north", "south"])
    return tmp_path / "kits"


TERMS = Terms("sequence-classification", ("0", "1"), max_tokens=8, characters_per_token=2.0)


class Doorkeeper(FederationServicer):
    """The server's RPCs without a federation behind them; remembers whom it let in, and whom no round waits for."""

    def __init__(self, section):
        self.seen, self.failed = [], []
        self.admission = Admission(section, lambda silo, reason: self.failed.append((silo, reason)))
        super().__init__(None, None, None, None, "", "", self.admission, TERMS)

    def Hello(self, request, context):  # noqa: N802
        answer = super().Hello(request, context)
        self.seen.append(self.admission.sender(context))
        return answer


@pytest.fixture
def door(kits):
    """A server with the kit of `kits`, and its address."""
    keeper = Doorkeeper(server_tls(kits / "server"))
    server = grpc.server(ThreadPoolExecutor(2), options=SERVER_OPTIONS)
    add_FederationServiceServicer_to_server(keeper, server)
    port = listen(server, "127.0.0.1:0", server_tls(kits / "server"))
    server.start()
    keeper.address = f"127.0.0.1:{port}"
    yield keeper
    server.stop(None).wait()


def knock(door, kit, seconds=LONG_SECONDS):
    """A new connection, and one call."""
    return greet(door.address, tls(kit), name=None, timeout_seconds=seconds)


@contextlib.contextmanager
def handshake(door, kit, **limits):
    """A handshake alone."""
    host, port = door.address.split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(kit / "ca.pem")
    context.load_cert_chain(kit / "certificate.pem", kit / "key.pem")
    context.set_alpn_protocols(["h2"])
    for name, value in limits.items():
        setattr(context, name, value)
    with (
        socket.create_connection((host, int(port)), timeout=LONG_SECONDS) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        yield secured


def test_hello_tells_version_and_clock_to_whoever_has_a_certificate(door, kits):
    greeting = knock(door, kits / "silos/north")
    assert greeting.package_version == fedpft.__version__
    assert abs(greeting.clock_ahead_seconds) <= greeting.seconds / 2 + 0.001  # the same clock; milliseconds travel


# --- revocation -------------------------------------------------------------------------------------------------------


def test_a_revoked_silo_is_shut_out_at_once_and_the_others_go_on(door, kits):
    knock(door, kits / "silos/north"), knock(door, kits / "silos/south")
    revoke(kits, ["north"])
    with pytest.raises(CertificateError, match=r"was revoked on 20\d\d-"):
        knock(door, kits / "silos/north")
    knock(door, kits / "silos/south")
    assert door.seen == ["north", "south", "south"]
    assert door.failed == [("north", "its certificate was revoked")]


def test_a_round_does_not_wait_for_a_revoked_silo_that_is_silent(door, kits):
    knock(door, kits / "silos/north"), knock(door, kits / "silos/south")
    revoke(kits, ["north"])
    knock(door, kits / "silos/south")
    assert door.failed == [("north", "its certificate was revoked")]


def test_the_connection_that_a_revoked_silo_holds_is_of_no_use(door, kits):
    with dial(door.address, tls(kits / "silos/north")) as channel:
        call = channel.unary_unary("/fedpft.wire.v1.FederationService/Hello")
        call(b"", timeout=LONG_SECONDS)
        revoke(kits, ["north"])
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=LONG_SECONDS)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_renewed_silo_comes_in_with_its_new_certificate_and_not_with_the_old_one(door, kits, tmp_path):
    shutil.copytree(kits / "silos/north", tmp_path / "stolen")
    revoke(kits, ["north"])
    renew(kits, ["north"])
    knock(door, kits / "silos/north")
    with pytest.raises(CertificateError, match="was revoked"):
        knock(door, tmp_path / "stolen")
    assert door.failed == [], "whoever has the old certificate cannot push the silo out"


def test_an_old_certificate_is_good_until_it_is_revoked(door, kits, tmp_path):
    shutil.copytree(kits / "silos/north", tmp_path / "old")
    renew(kits, ["north"])
    knock(door, tmp_path / "old"), knock(door, kits / "silos/north")
    revoke(kits, ["north"])
    for kit in (tmp_path / "old", kits / "silos/north"):
        with pytest.raises(CertificateError, match="was revoked"):
            knock(door, kit)


@pytest.mark.parametrize("content", ["", '[{"name": "north", "ser', "{}", '[{"name": "north"}]', None])
def test_a_torn_list_lets_nobody_in_until_it_is_mended(content, door, kits, caplog):
    path = kits / "server/revoked.json"
    whole = path.read_text()
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ServerUnreachable, match="cannot tell which certificates are revoked"):
        knock(door, kits / "silos/south", seconds=0.5)
    assert door.seen == []
    assert "no silo is let in" in caplog.text
    assert "revoked.json" in caplog.text
    assert door.failed == [], "it is not the silo's fault, and it keeps trying"
    path.write_text(whole)
    knock(door, kits / "silos/south")


def test_a_server_does_not_start_on_a_torn_list(kits):
    (kits / "server/revoked.json").write_text("[")
    with pytest.raises(CertificateError, match=r"revoked\.json"):
        Revocations(kits / "server/revoked.json")
    with pytest.raises(CertificateError, match=r"revoked\.json"):
        check_certificates(server_tls(kits / "server"), "server")


def test_a_caller_whose_certificate_cannot_be_seen_is_nobody(kits):
    class Context:
        def auth_context(self):
            return {"x509_common_name": [b"north"]}

    with pytest.raises(CertificateError):
        Admission(server_tls(kits / "server"), lambda silo, reason: None).sender(Context())


def test_without_a_list_nothing_is_revoked(kits):
    Revocations(None).check((kits / "silos/north/certificate.pem").read_bytes())


# --- the server's own certificate -------------------------------------------------------------------------------------


def shown(door, kit):
    """The serial number of the certificate that the server shows."""
    with handshake(door, kit) as secured:
        return int(secured.getpeercert()["serialNumber"], 16)


def registered(kits, name):
    lines = (kits / "authority/issued.jsonl").read_text().splitlines()
    return [int(entry["serial"], 16) for entry in map(json.loads, lines) if entry["name"] == name]


def test_a_renewed_server_certificate_is_taken_up_without_a_restart(door, kits):
    assert [shown(door, kits / "silos/north")] == registered(kits, "server")
    renew(kits, ["server"])
    first, second = registered(kits, "server")
    assert shown(door, kits / "silos/north") == second != first
    knock(door, kits / "silos/north")


@pytest.mark.parametrize("fault", ["another key", "nonsense", "a silo's", "missing"])
def test_a_server_keeps_its_certificate_until_a_new_one_is_whole(fault, door, kits, caplog):
    kit = kits / "server"
    whole = (kit / "certificate.pem").read_bytes()
    other = Authority.load(kits / "authority").kit("server", hosts=["127.0.0.1"], days=1)
    if fault == "missing":
        (kit / "certificate.pem").unlink()
    else:
        wrong = {
            "another key": other["certificate.pem"],
            "nonsense": b"nonsense",
            "a silo's": (kits / "silos/north/certificate.pem").read_bytes(),
        }
        (kit / "certificate.pem").write_bytes(wrong[fault])
    for _ in range(2):
        assert [shown(door, kits / "silos/north")] == registered(kits, "server")
    assert caplog.text.count("goes on with the key and certificate it has") == 1
    assert "certificate.pem" in caplog.text
    (kit / "certificate.pem").write_bytes(other["certificate.pem"] if fault == "another key" else whole)
    (kit / "key.pem").write_bytes(other["key.pem"] if fault == "another key" else (kit / "key.pem").read_bytes())
    same = [shown(door, kits / "silos/north")] == registered(kits, "server")
    assert same == (fault != "another key"), "a kit that arrives file by file is taken up once it is whole"


def test_tls_below_1_3_is_refused_by_a_server_whose_kit_can_change(door, kits):
    renew(kits, ["server"])
    with handshake(door, kits / "silos/north") as secured:
        assert secured.version() == "TLSv1.3"
    with (
        pytest.raises((ssl.SSLError, OSError)),
        handshake(door, kits / "silos/north", maximum_version=ssl.TLSVersion.TLSv1_2),
    ):
        pass


def test_a_client_without_a_certificate_is_refused(door, kits):
    credentials = grpc.ssl_channel_credentials((kits / "server/ca.pem").read_bytes())
    with grpc.secure_channel(door.address, credentials) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/fedpft.wire.v1.FederationService/Hello")(b"", timeout=LONG_SECONDS)
    assert door.seen == []


# --- another authority ------------------------------------------------------------------------------------------------


def test_one_authority_follows_another_and_nobody_is_shut_out_meanwhile(door, kits, tmp_path):
    """Each silo gets its renewed kit at another time; `north` and `south` are what the silos have in their hands."""
    north, south = (Path(shutil.copytree(kits / "silos" / name, tmp_path / name)) for name in ("north", "south"))
    replace_authority(kits)
    knock(door, north), knock(door, south)  # both of the old authority, as the server is
    shutil.copytree(kits / "silos/north", north, dirs_exist_ok=True)
    knock(door, north), knock(door, south)
    drop_old_authority(kits)
    knock(door, north)  # which trusts both still
    with pytest.raises(CertificateError, match=r"certificate of the server at .* is not accepted"):
        knock(door, south)
    shutil.copy(kits / "silos/north/ca.pem", south)
    with pytest.raises(CertificateError, match="does not accept this side's certificate"):
        knock(door, south)
    for name in ("north", "south"):
        knock(door, kits / "silos" / name)
    assert door.seen == ["north", "south", "north", "south", "north", "north", "south"]


def test_a_kit_is_of_any_authority_in_its_bundle_but_of_no_other(kits):
    kit = kits / "silos/north"
    replace_authority(kits)
    assert read_kit(tls(kit), "silo").name == "north"
    (kit / "ca.pem").write_bytes(Authority.create().pem + Authority.create().pem)
    with pytest.raises(CertificateError, match="was not signed by"):
        read_kit(tls(kit), "silo")
