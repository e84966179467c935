"""Looks at this machine and says what to mend: one line a check, and every check is made, whatever the others found."""

import os
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
import yaml

import fedpft
from fedpft import atomic, faults, kernels
from fedpft.config import ServerConfig, SiloConfig, TlsSection, load_server_config, load_silo_config
from fedpft.datafiles import read_rows
from fedpft.datasets import read_label_list, read_labelled, read_unlabelled
from fedpft.errors import CertificateError, ConfigError, FedPFTError, ModelError, PortInUse, RefusedByServer
from fedpft.kernels.check import check_operators
from fedpft.machine import check_device
from fedpft.server import ledger
from fedpft.server.run import VERSIONED
from fedpft.wire.certificates import Role, exposure, read_kit, read_revoked
from fedpft.wire.channel import check_listen
from fedpft.wire.hello import Greeting, greet, series

T = TypeVar("T")

GIB = 1 << 30
FREE_BYTES = GIB  # what a disk should have left at least
CONNECT_SECONDS = 5.0
CLOCK_SECONDS = 60.0  # how far two clocks may be apart


class Worry(Exception):
    """It works today, but should be mended. One line, with the remedy."""


def examine(config: Path | None) -> None:
    """Prints a line for each check: ok, warning or WRONG, and what to mend.

    Args:
        config: a server.yaml or silo.yaml; without one, only what every machine needs is checked.

    Raises:
        FedPFTError: of the class of the first check that found something wrong.
    """
    findings = _Findings()
    findings.check("versions", _versions)
    findings.check("kernels", _kernels)
    if config is not None:
        loaded = findings.check("configuration", lambda: _load(config), lambda _: f"{config}: all keys are known")
        if isinstance(loaded, SiloConfig):
            _examine_silo(findings, loaded)
        elif isinstance(loaded, ServerConfig):
            _examine_server(findings, loaded)
    findings.close()


class _Findings:
    """Makes checks, and prints them one by one."""

    def __init__(self) -> None:
        self._made = 0
        self._wrong: list[FedPFTError] = []

    def check(self, subject: str, look: Callable[[], T], text: Callable[[T], str] = str) -> T | None:
        """Returns what was seen; None if something is wrong, or worries.

        Args:
            look: raises FedPFTError or Worry.
            text: says in a few words what was seen.
        """
        self._made += 1
        try:
            seen = look()
        except Worry as worry:
            print(f"warning  {subject:14}{worry}", flush=True)
        except Exception as error:
            self._wrong.append(faults.explained(error))
            print(f"WRONG    {subject:14}{' '.join(str(self._wrong[-1]).split())}", flush=True)
        else:
            print(f"ok       {subject:14}{text(seen)}", flush=True)
            return seen
        return None

    def close(self) -> None:
        """Raises an error of the class of the first that was found."""
        if self._wrong:
            first = self._wrong[0]
            raise type(first)(f"{len(self._wrong)} of {self._made} checks went wrong", "mend what is marked WRONG")


# --- every machine ----------------------------------------------------------------------------------------------------


def _versions() -> str:
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in VERSIONED)
    return f"{packages}; python {platform.python_version()}, {platform.platform()}, {torch.get_num_threads()} threads"


def _kernels() -> str:
    built = ", ".join(f"{name}={value}" for name, value in kernels.build_info().items())
    results = check_operators()
    if wrong := [str(result) for result in results if not result.passed]:
        raise FedPFTError(
            f"{len(wrong)} operators are not their references: {'; '.join(wrong)} ({built})",
            "build the extension again: make install",
        )
    return f"{len(results)} operators agree with their references ({built})"


# --- both sides -------------------------------------------------------------------------------------------------------


def _load(path: Path) -> ServerConfig | SiloConfig:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        raw = None  # what is wrong is said below
    return load_silo_config(path) if isinstance(raw, dict) and "server" in raw else load_server_config(path)


def _certificate(tls: TlsSection, role: Role) -> str:
    kit = read_kit(tls, role)
    if kit.warnings:
        raise Worry("; ".join(kit.warnings))
    return f"{tls.certificate}: {kit.name}, {kit.days_left} days left"


def _key(path: Path) -> str:
    try:
        warning = exposure(path)
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}", "put the kit's files where `tls` names them") from None
    if warning:
        raise Worry(warning)
    return f"{path}: for its owner only"


def _writable(directory: Path, key: str) -> str:
    place = atomic.standing(directory, key)
    atomic.try_out(place, key)
    if key == "out":
        ledger.try_out(place)
    return f"{directory}: can be {'written to' if place == directory else 'made'}"


def _space(directory: Path, key: str, wanted: int) -> str:
    free, wanted = shutil.disk_usage(atomic.standing(directory, key)).free, max(wanted, FREE_BYTES)
    if free < wanted:
        raise Worry(f"{directory}: {free / GIB:.1f} GiB free, {wanted / GIB:.1f} may be needed -> make room")
    return f"{directory}: {free / GIB:.1f} GiB free, {wanted / GIB:.1f} are enough"


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


# --- a silo -----------------------------------------------------------------------------------------------------------


def _examine_silo(findings: _Findings, config: SiloConfig) -> None:
    if (tls := config.tls) is not None:
        findings.check("certificate", lambda: _certificate(tls, "silo"))
        findings.check("key", lambda: _key(tls.key))
    greeting = findings.check("connection", lambda: _connection(config), lambda seen: _greeting(config, seen))
    if greeting is not None:
        findings.check("clock", lambda: _clock(greeting))
    findings.check("data", lambda: _silo_data(config))
    findings.check("device", lambda: check_device(config.device))
    findings.check("work", lambda: _writable(config.work, "work"))
    # The proxy of another federation comes beside those that are there.
    findings.check("disk", lambda: _space(config.work, "work", _bytes(config.work)))


def _connection(config: SiloConfig) -> Greeting:
    greeting = greet(config.server, config.tls, name=config.insecure_name, timeout_seconds=CONNECT_SECONDS)
    there, here = greeting.package_version, fedpft.__version__
    if series(there) != series(here):
        raise RefusedByServer(
            f"{config.server} runs fedpft {there}, this machine {here}", f"install fedpft {there} here"
        )
    return greeting


def _greeting(config: SiloConfig, greeting: Greeting) -> str:
    how = "TLS 1.3, both certificates accepted" if config.tls is not None else "without TLS"
    return f"{config.server} answers: {how}, fedpft {greeting.package_version} there, {fedpft.__version__} here"


def _clock(greeting: Greeting) -> str:
    ahead = greeting.clock_ahead_seconds
    if abs(ahead) > CLOCK_SECONDS:
        raise Worry(
            f"the server's is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's -> "
            "set both clocks, with NTP"
        )
    return f"{abs(ahead):.1f} s from the server's, measured to {greeting.seconds / 2:.1f} s"


def _silo_data(config: SiloConfig) -> str:
    rows = read_rows(config.data.path, [("label", config.data.columns.label)])
    return f"{config.data.path}: {len(rows)} labelled rows"


# --- a server ---------------------------------------------------------------------------------------------------------


def _examine_server(findings: _Findings, config: ServerConfig) -> None:
    if (tls := config.tls) is not None:
        findings.check("certificate", lambda: _certificate(tls, "server"))
        findings.check("key", lambda: _key(tls.key))
        if (revoked := tls.revoked) is not None:
            findings.check("revoked", lambda: f"{revoked}: {len(read_revoked(revoked))} certificates")
    findings.check("listen", lambda: _listen(config))
    findings.check("model", lambda: _model(config))
    findings.check("data", lambda: _server_data(config))
    findings.check("device", lambda: check_device(config.device))
    findings.check("out", lambda: _writable(config.out, "out"))
    # OUT receives the adapted FM and a proxy, which is smaller than the FM.
    findings.check("disk", lambda: _space(config.out, "out", 2 * _bytes(config.model.path)))


def _listen(config: ServerConfig) -> str:
    try:
        check_listen(config.listen)
    except PortInUse:
        if _in_use(config.out):
            return f"{config.listen} is taken, and {config.out} is in use: this server is running"
        raise
    return f"{config.listen} is free"


def _in_use(out: Path) -> bool:
    if not (out / "lock").exists():
        return False
    try:
        with atomic.locked(out, "out"):
            return False
    except ConfigError:
        return True


def _model(config: ServerConfig) -> str:
    path = config.model.path
    if not os.access(path / "config.json", os.R_OK):
        raise ModelError(f"{path}: holds no config.json that this user can read", "name the FM's directory in `model`")
    return f"{path}: {_bytes(path) / GIB:.2f} GiB"


def _server_data(config: ServerConfig) -> str:
    task, labels = config.model.task, read_label_list(config.model.labels)
    public = read_unlabelled(config.public_data, config.columns, task)
    found = f"{config.public_data}: {len(public)} rows"
    if config.test_data is not None:
        test = read_labelled(config.test_data, config.columns, task, labels)
        found += f"; {config.test_data}: {len(test.inputs)} rows"
    return f"{found}; {config.model.labels}: {len(labels)} labels"
