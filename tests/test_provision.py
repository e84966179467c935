import datetime
import stat

import pytest
from cryptography import x509

from fedpft.config import TlsSection, load_silo_config
from fedpft.errors import CertificateError, ConfigError
from fedpft.provision import Authority, provision
from fedpft.wire.certificates import check_certificates


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


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "n" * 64, "nörd", "a b"])
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
