import datetime
import json
import shutil
import stat

import pytest
from cryptography import x509

from fedpft import atomic, cli
from fedpft.config import TlsSection, load_silo_config
from fedpft.errors import CertificateError, ConfigError
from fedpft.provision import Authority, drop_old_authority, provision, renew, replace_authority, revoke
from fedpft.wire.certificates import check_certificates, read_kit, read_revoked, signed


def tls(kit):
    return TlsSection(ca=kit / "ca.pem", certificate=kit / "certificate.pem", key=kit / "key.pem")


def write(directory, files):
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    (directory / "key.pem").chmod(0o600)
    return directory


def test_every_kit_is_ready_for_use(tmp_path):
    made = provision(tmp_path, ["north", "south"])
    assert made == [tmp_path / "authority", tmp_path / "server", tmp_path / "silos/north", tmp_path / "silos/south"]
    assert check_certificates(tls(tmp_path / "server"), "server") == "server"
    for silo in ("north", "south"):
        kit = tmp_path / "silos" / silo
        assert check_certificates(tls(kit), "silo") == silo
        config = load_silo_config(kit / "silo.yaml")
        assert config.server == "127.0.0.1:8470"
        assert config.tls == tls(kit)


def test_keys_are_for_their_owner_only(tmp_path):
    provision(tmp_path, ["north"])
    for key in tmp_path.rglob("key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    keys = {path.read_bytes() for path in tmp_path.rglob("key.pem")}
    assert len(keys) == 3, "no two kits share a key"
    assert not list((tmp_path / "silos").rglob("authority*"))


def test_hosts_go_into_certificate_and_silo_yaml(tmp_path):
    provision(tmp_path, ["north"], hosts=["fed.example.org", "10.1.2.3"], port=443)
    certificate = x509.load_pem_x509_certificate((tmp_path / "server/certificate.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["fed.example.org", "10.1.2.3"]
    assert load_silo_config(tmp_path / "silos/north/silo.yaml").server == "fed.example.org:443"


def test_an_ipv6_host_is_bracketed(tmp_path):
    provision(tmp_path, ["north"], hosts=["::1"])
    assert load_silo_config(tmp_path / "silos/north/silo.yaml").server == "[::1]:8470"


def test_a_silo_can_be_added_later(tmp_path):
    provision(tmp_path, ["north"], hosts=["fed.example.org"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    assert provision(tmp_path, ["south"]) == [tmp_path / "silos/south"]
    assert {path: path.read_bytes() for path in before} == before
    assert check_certificates(tls(tmp_path / "silos/south"), "silo") == "south"
    assert load_silo_config(tmp_path / "silos/south/silo.yaml").server == "fed.example.org:8470"
    ca = {(tmp_path / "silos" / silo / "ca.pem").read_bytes() for silo in ("north", "south")}
    assert len(ca) == 1


def test_nothing_is_overwritten(tmp_path):
    provision(tmp_path, ["north"])
    with pytest.raises(ConfigError, match=r"north is there already"):
        provision(tmp_path, ["south", "north"])
    assert not (tmp_path / "silos/south").exists(), "nothing is made if anything is in the way"
    with pytest.raises(ConfigError, match="server is there already"):
        provision(tmp_path, ["south"], hosts=["elsewhere"])


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "n" * 64, "nörd", "a b", "server"])
def test_a_name_that_is_unfit_for_a_file_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="cannot be a silo's name"):
        provision(tmp_path, [name])
    assert list(tmp_path.iterdir()) == []


def test_a_name_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="named twice"):
        provision(tmp_path, ["north", "north"])


def test_an_unusable_host_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a host name nor"):
        provision(tmp_path, ["north"], hosts=["hö"])
    assert list(tmp_path.iterdir()) == []


def test_certificates_are_valid_for_a_day_at_least(tmp_path):
    with pytest.raises(ConfigError, match="0 days"):
        provision(tmp_path, ["north"], days=0)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_authority_is_named(tmp_path):
    provision(tmp_path, ["north"])
    (tmp_path / "authority/key.pem").write_bytes((tmp_path / "server/key.pem").read_bytes())
    with pytest.raises(CertificateError, match=r"authority: key\.pem is not the key of ca\.pem"):
        provision(tmp_path, ["south"])


def test_every_certificate_is_registered(tmp_path):
    provision(tmp_path, ["north"])
    renew(tmp_path, ["north", "server"])
    lines = (tmp_path / "authority/issued.jsonl").read_text().splitlines()
    issued = [json.loads(line) for line in lines]
    assert [entry["name"] for entry in issued] == ["server", "north", "north", "server"]
    assert all(entry.keys() == {"name", "serial", "not_after", "issued_at"} for entry in issued)
    for name, kit in (("north", tmp_path / "silos/north"), ("server", tmp_path / "server")):
        assert [int(e["serial"], 16) for e in issued if e["name"] == name][-1] == certificate_of(kit).serial_number


# --- renewal ----------------------------------------------------------------------------------------------------------


def certificate_of(kit):
    return x509.load_pem_x509_certificate((kit / "certificate.pem").read_bytes())


def test_a_renewed_kit_has_a_new_key_and_everything_else_as_it_was(tmp_path):
    provision(tmp_path, ["north"], hosts=["fed.example.org", "10.1.2.3"], days=10)
    kit = tmp_path / "silos/north"
    (kit / "silo.yaml").write_text("edited: by its owner")
    (kit / "work").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert renew(tmp_path, ["north", "server"], days=20) == [kit, tmp_path / "server"]
    changed = {path.relative_to(tmp_path).as_posix() for path in before if path.read_bytes() != before[path]}
    pairs = {f"{place}/{name}.pem" for place in ("silos/north", "server") for name in ("certificate", "key")}
    assert changed == {*pairs, "authority/issued.jsonl"}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before.keys()
    assert read_kit(tls(kit), "silo").days_left == 19
    assert read_kit(tls(tmp_path / "server"), "server").name == "server"
    names = certificate_of(tmp_path / "server").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["fed.example.org", "10.1.2.3"]
    for key in tmp_path.rglob("key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert key.read_bytes().count(b"BEGIN") == 1, "the old key is gone"


def test_the_server_can_be_given_other_hosts(tmp_path):
    provision(tmp_path, ["north"])
    renew(tmp_path, ["server"], hosts=["new.example.org"])
    names = certificate_of(tmp_path / "server").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["new.example.org"]
    with pytest.raises(ConfigError, match="hosts are for the server"):
        renew(tmp_path, ["north"], hosts=["new.example.org"])


def stopped(change, writes, monkeypatch):
    """Whether a change stops at its write of that number."""
    replacing, left = atomic.replacing, [writes]

    def power_cut(path):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "replacing", power_cut)
        try:
            change()
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("writes", range(6))
@pytest.mark.parametrize("name", ["north", "server"])
def test_a_kit_is_whole_wherever_a_renewal_stops(name, writes, tmp_path, monkeypatch):
    """Six files are written: the register, ca.pem and key.pem with old and new, the certificate, and both alone."""
    provision(tmp_path, ["north"])
    kit, role = (tmp_path / "server", "server") if name == "server" else (tmp_path / "silos/north", "silo")
    old = certificate_of(kit)
    assert stopped(lambda: renew(tmp_path, [name]), writes, monkeypatch)
    assert read_kit(tls(kit), role).name == name
    assert (certificate_of(kit) == old) == (writes < 4)
    renew(tmp_path, [name])
    assert read_kit(tls(kit), role).name == name
    assert (kit / "key.pem").read_bytes().count(b"BEGIN") == 1


def test_what_is_not_there_cannot_be_renewed(tmp_path):
    provision(tmp_path, ["north"])
    before = certificate_of(tmp_path / "silos/north")
    with pytest.raises(ConfigError, match="west is not there") as caught:
        renew(tmp_path, ["north", "west"])
    assert "--silos west" in caught.value.remedy
    assert certificate_of(tmp_path / "silos/north") == before
    with pytest.raises(ConfigError, match="cannot be a silo's name"):
        renew(tmp_path, ["../server"])


def test_a_kit_whose_key_was_handed_over_and_deleted_can_be_renewed(tmp_path):
    provision(tmp_path, ["north"])
    (tmp_path / "silos/north/key.pem").unlink()
    renew(tmp_path, ["north"])
    assert read_kit(tls(tmp_path / "silos/north"), "silo").name == "north"


# --- revocation -------------------------------------------------------------------------------------------------------


def test_a_new_server_kit_names_an_empty_list(tmp_path):
    provision(tmp_path, ["north"])
    assert "revoked: server/revoked.json" in (tmp_path / "server/tls.yaml").read_text()
    assert read_revoked(tmp_path / "server/revoked.json") == []


def test_all_certificates_that_a_silo_ever_had_are_revoked_once(tmp_path):
    provision(tmp_path, ["north", "south"])
    first = certificate_of(tmp_path / "silos/north").serial_number
    renew(tmp_path, ["north"])
    second = certificate_of(tmp_path / "silos/north").serial_number
    path = revoke(tmp_path, ["north"])
    assert path == tmp_path / "server/revoked.json"
    entries = read_revoked(path)
    assert [(entry.name, int(entry.serial, 16)) for entry in entries] == [("north", first), ("north", second)]
    assert revoke(tmp_path, ["north"]) == path
    assert read_revoked(path) == entries, "the time of the revocation stays"


def test_the_certificate_of_a_kit_older_than_the_register_is_revoked(tmp_path):
    provision(tmp_path, ["north"])
    (tmp_path / "authority/issued.jsonl").unlink()
    (tmp_path / "server/revoked.json").unlink()
    (entry,) = read_revoked(revoke(tmp_path, ["north"]))
    assert int(entry.serial, 16) == certificate_of(tmp_path / "silos/north").serial_number


def test_a_silo_is_revoked_after_its_kit_was_removed(tmp_path):
    provision(tmp_path, ["north"])
    shutil.rmtree(tmp_path / "silos/north")
    (entry,) = read_revoked(revoke(tmp_path, ["north"]))
    assert entry.name == "north"


def test_who_has_no_certificate_and_the_server_cannot_be_revoked(tmp_path):
    provision(tmp_path, ["north"])
    with pytest.raises(ConfigError, match="issued to 'west'"):
        revoke(tmp_path, ["north", "west"])
    with pytest.raises(ConfigError, match="silos read no list"):
        revoke(tmp_path, ["server"])
    assert read_revoked(tmp_path / "server/revoked.json") == []


def test_a_torn_register_is_named(tmp_path):
    provision(tmp_path, ["north"])
    (tmp_path / "authority/issued.jsonl").write_text('{"name": "nor')
    with pytest.raises(CertificateError, match=r"issued\.jsonl"):
        revoke(tmp_path, ["north"])


def test_renewed_and_revoked_at_once_only_the_new_certificate_is_good(tmp_path, monkeypatch, capsys):
    def fedpft(*options):
        monkeypatch.setattr("sys.argv", ["fedpft", "provision", "--out", str(tmp_path), *options])
        assert cli.main() == 0
        return capsys.readouterr().out

    assert "made" in fedpft("--silos", "north", "south")
    old = certificate_of(tmp_path / "silos/north").serial_number
    said = fedpft("--renew", "north", "--revoke", "north")
    assert "renewed" in said
    assert "revoked north" in said
    revoked = [int(entry.serial, 16) for entry in read_revoked(tmp_path / "server/revoked.json")]
    assert revoked == [old]
    assert certificate_of(tmp_path / "silos/north").serial_number != old


# --- another authority ------------------------------------------------------------------------------------------------


def accepts(kit, other):
    """Whether whoever has the one kit lets in whoever has the other."""
    authorities = x509.load_pem_x509_certificates((kit / "ca.pem").read_bytes())
    return any(signed(certificate_of(other), authority) for authority in authorities)


def authorities_in(directory):
    """How many each ca.pem holds."""
    return {path.read_bytes().count(b"BEGIN") for path in directory.rglob("ca.pem")}


def test_a_rotation_leaves_every_kit_of_the_new_authority_alone(tmp_path):
    provision(tmp_path, ["north", "south"])
    server, silos = tmp_path / "server", [tmp_path / "silos" / name for name in ("north", "south")]
    before = {kit: certificate_of(kit) for kit in (server, *silos)}
    assert replace_authority(tmp_path, days=20) == [tmp_path / "authority", server, *silos]
    assert authorities_in(tmp_path) == {2}
    assert [kit for kit in before if certificate_of(kit) == before[kit]] == [server]
    assert drop_old_authority(tmp_path, days=20) == [server, *silos, tmp_path / "authority"]
    assert authorities_in(tmp_path) == {1}
    assert not [kit for kit in before if certificate_of(kit) == before[kit]]
    assert {read_kit(tls(kit), "silo").days_left for kit in silos} == {19}
    assert read_kit(tls(server), "server").days_left == 19
    provision(tmp_path, ["west"])
    assert accepts(server, tmp_path / "silos/west")
    for key in tmp_path.rglob("key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.parametrize("step", [replace_authority, drop_old_authority])
def test_a_rotation_that_stops_anywhere_shuts_nobody_out_and_can_be_made_again(step, tmp_path, monkeypatch):
    for writes in range(100):
        kits = tmp_path / str(writes)
        provision(kits, ["north", "south"])
        if step is drop_old_authority:
            replace_authority(kits)
        torn = stopped(lambda kits=kits: step(kits), writes, monkeypatch)
        server = kits / "server"
        for silo in (kits / "silos/north", kits / "silos/south"):
            assert read_kit(tls(silo), "silo").name == silo.name
            assert accepts(server, silo)
            assert accepts(silo, server)
        assert read_kit(tls(server), "server").name == "server"
        if not torn:
            break
        step(kits)
        if step is replace_authority:
            drop_old_authority(kits)
        assert authorities_in(kits) == {1}
    assert writes > 8


def test_an_old_authority_is_not_dropped_while_a_kit_is_of_it(tmp_path):
    provision(tmp_path, ["north"])
    with pytest.raises(ConfigError, match="no old authority"):
        drop_old_authority(tmp_path)
    old = shutil.copytree(tmp_path / "silos/north", tmp_path / "old")
    replace_authority(tmp_path)
    shutil.copytree(old, tmp_path / "silos/north", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="north is of the old authority") as caught:
        drop_old_authority(tmp_path)
    assert "--renew north" in caught.value.remedy
    assert authorities_in(tmp_path / "authority") == {2}
    renew(tmp_path, ["north"])
    drop_old_authority(tmp_path)


def test_a_rotation_makes_no_new_kit_for_who_was_revoked(tmp_path):
    provision(tmp_path, ["north", "south"])
    revoke(tmp_path, ["north"])
    before = certificate_of(tmp_path / "silos/north")
    replace_authority(tmp_path)
    drop_old_authority(tmp_path)
    assert certificate_of(tmp_path / "silos/north") == before
    assert not accepts(tmp_path / "server", tmp_path / "silos/north")
    assert accepts(tmp_path / "server", tmp_path / "silos/south")


def test_the_command_rotates_and_lets_no_second_one_in(tmp_path, monkeypatch, capsys):
    def fedpft(*options):
        monkeypatch.setattr("sys.argv", ["fedpft", "provision", "--out", str(tmp_path / "kits"), *options])
        return cli.main(), capsys.readouterr()

    assert fedpft("--silos", "north")[0] == 0
    for option in ("--new-authority", "--drop-old-authority"):
        code, said = fedpft(option)
        assert code == 0
        assert f"changed {tmp_path / 'kits/silos/north'}\n" in said.out
    assert authorities_in(tmp_path) == {1}
    with atomic.locked(tmp_path / "kits", "--out"):
        code, said = fedpft("--renew", "north")
    assert code == ConfigError.exit_code
    assert "in use by another process" in said.err
    assert fedpft("--renew", "north")[0] == 0


# --- a look at one's own kit ------------------------------------------------------------------------------------------


@pytest.fixture
def authority():
    return Authority.create()


@pytest.mark.parametrize("name", ["ca.pem", "certificate.pem", "key.pem"])
def test_a_missing_or_broken_file_is_named(name, tmp_path, authority):
    kit = write(tmp_path / "kit", authority.kit("north", hosts=None, days=1))
    (kit / name).write_text("nonsense")
    with pytest.raises(CertificateError, match=name):
        check_certificates(tls(kit), "silo")
    (kit / name).unlink()
    with pytest.raises(CertificateError, match=f"{name}: no such file"):
        check_certificates(tls(kit), "silo")


def test_an_expired_certificate_is_refused(tmp_path, authority):
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    kit = write(tmp_path / "kit", authority.kit("north", hosts=None, days=30, valid_from=past))
    with pytest.raises(CertificateError, match=r"certificate\.pem expired on 2020-01-31"):
        check_certificates(tls(kit), "silo")


def test_a_certificate_of_the_future_points_at_the_clock(tmp_path, authority):
    future = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=2)
    kit = write(tmp_path / "kit", authority.kit("north", hosts=None, days=30, valid_from=future))
    with pytest.raises(CertificateError, match="valid only from") as caught:
        check_certificates(tls(kit), "silo")
    assert "clock" in caught.value.remedy


@pytest.mark.parametrize(("days", "warned"), [(29, True), (40, False)])
def test_a_certificate_that_expires_soon_is_warned_about(days, warned, tmp_path, authority, caplog):
    kit = write(tmp_path / "kit", authority.kit("north", hosts=None, days=days))
    assert check_certificates(tls(kit), "silo") == "north"
    assert ("certificate.pem expires on" in caplog.text) == warned
    assert read_kit(tls(kit), "silo").days_left == days - 1


def test_the_key_of_another_kit_is_refused(tmp_path, authority):
    kit = write(tmp_path / "kit", authority.kit("north", hosts=None, days=1))
    (kit / "key.pem").write_bytes(authority.kit("north", hosts=None, days=1)["key.pem"])
    with pytest.raises(CertificateError, match=r"key\.pem is not the key of .*certificate\.pem"):
        check_certificates(tls(kit), "silo")


def test_the_certificate_of_another_authority_is_refused(tmp_path, authority):
    kit = write(tmp_path / "kit", authority.kit("north", hosts=None, days=1))
    (kit / "ca.pem").write_bytes(Authority.create().pem)
    with pytest.raises(CertificateError, match=r"was not signed by .*ca\.pem"):
        check_certificates(tls(kit), "silo")


def test_the_kit_of_the_other_role_is_refused(tmp_path, authority):
    kit = write(tmp_path / "kit", authority.kit("server", hosts=["localhost"], days=1))
    with pytest.raises(CertificateError, match="not a silo's certificate"):
        check_certificates(tls(kit), "silo")


def test_a_readable_key_is_warned_about(tmp_path, authority, caplog):
    kit = write(tmp_path / "kit", authority.kit("north", hosts=None, days=1))
    (kit / "key.pem").chmod(0o644)
    check_certificates(tls(kit), "silo")
    assert "chmod 600" in caplog.text
