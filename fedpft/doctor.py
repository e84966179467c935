"""Looks at this machine and says what to mend: one line a check, and every check is made, whatever the others found."""

import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn

import fedpft
from fedpft import atomic, faults, kernels
from fedpft.config import ServerConfig, SiloConfig, TlsSection, load_server_config, load_silo_config
from fedpft.data.samples import Samples
from fedpft.digests import Digests
from fedpft.errors import CertificateError, ConfigError, FedPFTError, PortInUse
from fedpft.kernels.check import check_operators
from fedpft.machine import check_device
from fedpft.model import adapters, quantized
from fedpft.model.precision import dtype_of, name_of
from fedpft.privacy import wholesilo
from fedpft.proxy.bundle import load_proxy
from fedpft.proxy.cut import cut
from fedpft.proxy.holdings import check_holdings, format_holdings, holdings
from fedpft.proxy.selection import load_selection, select_for_size
from fedpft.server import ledger
from fedpft.server.construction import check_as_built, check_made_for, load_fm, read_record
from fedpft.server.identity import (
    UNKNOWN_FM,
    check_begun,
    check_cut_from,
    check_proxy,
    contents,
    kept_digests,
    label_list,
    model_files,
    proxy_files,
    settings,
)
from fedpft.server.run import VERSIONED
from fedpft.silo import data
from fedpft.silo.ondisk import data_now
from fedpft.silo.work import Work
from fedpft.tasks import TASKS
from fedpft.wire.certificates import Kit, Role, exposure, read_kit, read_revoked
from fedpft.wire.channel import check_listen
from fedpft.wire.hello import Greeting, Terms, greet

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


def _certificate(tls: TlsSection, role: Role) -> Kit:
    kit = read_kit(tls, role)
    if kit.warnings:
        raise Worry("; ".join(kit.warnings))
    return kit


def _validity(tls: TlsSection, kit: Kit) -> str:
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
    kit = None
    if (tls := config.tls) is not None:
        kit = findings.check("certificate", lambda: _certificate(tls, "silo"), lambda kit: _validity(tls, kit))
        findings.check("key", lambda: _key(tls.key))
    greeting = findings.check("connection", lambda: _connection(config), lambda seen: _greeting(config, seen))
    if greeting is not None:
        findings.check("clock", lambda: _clock(greeting))
        if (terms := greeting.terms) is not None:
            findings.check("privacy", lambda: _privacy(config, terms))
    findings.check("data", lambda: _silo_data(config, greeting.terms if greeting is not None else None))
    findings.check("device", lambda: check_device(config.device))
    if (weights := config.limits.weights) != "full":
        findings.check("weights", quantized.library, lambda _: f"{weights}: bitsandbytes is there")
    findings.check("work", lambda: _writable(config.work, "work"))
    findings.check("federation", lambda: _joined(config, config.insecure_name if kit is None else kit.name))
    # The proxy of another federation comes beside those that are there.
    findings.check("disk", lambda: _space(config.work, "work", _bytes(config.work)))


def _connection(config: SiloConfig) -> Greeting:
    greeting = greet(config.server, config.tls, name=config.insecure_name, timeout_seconds=CONNECT_SECONDS)
    greeting.check_version(config.server)
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


def _privacy(config: SiloConfig, terms: Terms) -> str:
    data.check_required(config, secure=terms.secure_aggregation, private=terms.silo_privacy)
    if (private := terms.silo_privacy) is not None:
        noise = wholesilo.multiplier(private)
        return (
            f"silo_privacy: epsilon {private.epsilon:g} at delta {private.delta:g} for this whole silo over "
            f"{private.rounds} rounds, noise of {noise:.2f} times what it can change in a sum"
        )
    if terms.secure_aggregation:
        return f"secure aggregation: the server learns sums over {config.smallest_sum} silos or more"
    return "the server learns each silo's adapter, sample count and shared metrics; `require` can demand otherwise"


def _silo_data(config: SiloConfig, terms: Terms | None) -> str:
    """As `run` looks at it; without the server's answer, what can be known alone."""
    examination = data.examine(config)
    if terms is None:
        if (fault := examination.fault(config.data.bad_rows, data.WAY_OUT)) is not None:
            raise fault
        usable = examination.rows - len(examination.faults)
        return f"{config.data.path}: {usable} labelled rows; the server did not say which labels there are"
    samples = data.fit(examination, config, terms)
    found = f"{config.data.path}: {len(samples)} labelled rows"
    found += f" of {len(terms.labels)} labels" if terms.labels else ""
    if TASKS[terms.task].has_tokens:
        found += f"; {data.describe_lengths(config, samples, terms)}"
    return _unless_warned(found, samples)


def _unless_warned(found: str, *files: Samples) -> str:
    if warnings := [warning for samples in files for warning in samples.warnings]:
        raise Worry("; ".join([found, *warnings]))
    return found


def _joined(config: SiloConfig, name: str | None) -> str:
    work = Work(config.work)
    joined = work.joined()
    if joined is None:
        return f"{config.work}: none was joined yet"
    if name is not None and joined.name not in ("", name):
        raise Worry(f"{config.work}: is the work directory of {joined.name} -> give each silo its own `work`")
    if joined.data not in ("", data_now(config, work.proxy_path(joined))):
        raise Worry(
            f"{config.data.path}: changed since this silo last began with it -> put it back, or it counts from the "
            "next start on"
        )
    return f"{config.work}: goes on with the federation that it joined"


# --- a server ---------------------------------------------------------------------------------------------------------


def _examine_server(findings: _Findings, config: ServerConfig) -> None:
    if (tls := config.tls) is not None:
        findings.check("certificate", lambda: _certificate(tls, "server"), lambda kit: _validity(tls, kit))
        findings.check("key", lambda: _key(tls.key))
        if (revoked := tls.revoked) is not None:
            findings.check("revoked", lambda: f"{revoked}: {len(read_revoked(revoked))} certificates")
    findings.check("listen", lambda: _listen(config))
    device = findings.check("device", lambda: check_device(config.device))
    digests = kept_digests(config)  # one for all checks: the FM is hashed once
    # The FM is looked at in any case.
    usable = config if device is not None else config.model_copy(update={"device": "cpu"})
    labels = findings.check("labels", lambda: label_list(config), lambda seen: _labels(config, seen))
    fm, processor = None, None
    if labels is not None and (
        loaded := findings.check("model", lambda: load_fm(usable, labels), lambda seen: _model(config, seen[0]))
    ):
        fm, processor = loaded
    if fm is not None:
        proxy = findings.check("proxy", lambda: _proxy(config, fm, digests), lambda seen: _size(config, fm, seen))
        findings.check("privacy", lambda: _server_privacy(config, proxy))
    findings.check("data", lambda: _server_data(config, labels, processor))
    findings.check("out", lambda: _writable(config.out, "out"))
    findings.check("run", lambda: _run(config, digests))
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


def _labels(config: ServerConfig, labels: tuple[str, ...]) -> str:
    if config.model.labels is None:
        return f"{config.model.task} has none"
    return f"{config.model.labels}: {len(labels)} labels"


def _model(config: ServerConfig, fm: nn.Module) -> str:
    path, section, held = config.model.path, config.model, name_of(dtype_of(fm))
    fit = f"fit for {section.task} of up to {section.max_tokens} tokens"
    return f"{path}: {_bytes(path) / GIB:.2f} GiB, held in {held}, {fit}"


def _proxy(config: ServerConfig, fm: nn.Module, digests: Digests) -> nn.Module:
    """The proxy that there is, on disk, or one of the size that it will have, without values."""
    if (path := config.proxy_path) is None:
        selection = select_for_size(fm, config.proxy)
        check_holdings(selection, config.proxy)
        return cut(fm, selection, lambda part: {name: tensor.to("meta") for name, tensor in part.items()})
    record = read_record(path)
    if record.model:
        check_cut_from(config, path, record.model, model_files(config, digests))
        check_as_built(path, record, proxy_files(path, digests))
    proxy = load_proxy(path / "bundle", on_disk=True)
    check_made_for(config, path, proxy, dtype_of(fm))
    check_holdings(load_selection(path / "selection.safetensors"), config.proxy)
    if not record.model:
        raise Worry(f"{path}: {UNKNOWN_FM} -> build it again, or be sure that it was cut from {config.model.path}")
    return proxy.model


def _size(config: ServerConfig, fm: nn.Module, proxy: nn.Module) -> str:
    known = "" if config.proxy_path is None else f"{config.proxy_path}: as it was cut from {config.model.path}; "
    return known + format_holdings(holdings(fm, proxy))


def _server_privacy(config: ServerConfig, proxy: nn.Module | None) -> str:
    terms = config.secure_terms
    if terms is None:
        return "this server learns each silo's adapter and sample count; federation.secure_aggregation leaves it sums"
    if terms.silo_privacy is None:
        return f"secure aggregation: this server learns sums over {terms.min_silos} silos or more"
    if proxy is None:
        return "secure aggregation and silo_privacy: what it costs is known once `proxy` is in order"
    adapters.attach(proxy, config.adapter, seed=config.seed)
    return wholesilo.describe(terms, adapters.trained_values(proxy, frozen_a=config.training.frozen_a))


def _server_data(config: ServerConfig, labels: tuple[str, ...] | None, processor: Any) -> str:
    """As far as label list and tokenizer are in order, which are other checks' findings."""
    section, encoding, task = config.model, config.encoding, TASKS[config.model.task]
    files = [task.read_public(config.public_data, config.columns, encoding)]
    if config.test_data is not None and labels is not None:
        files.append(task.read_labelled(config.test_data, config.columns, labels, encoding))
    found = [f"{samples.path}: {len(samples)} rows" for samples in files]
    if task.has_tokens and processor is not None:
        longest = section.max_tokens
        for samples in files:
            found.append(task.encode(samples, processor, longest).describe_cut(samples.path.name, longest))
    return _unless_warned("; ".join(found), *files)


def _run(config: ServerConfig, digests: Digests) -> str:
    if _in_use(config.out):
        return f"{config.out}: a server is running there"
    begun = ledger.look(config.out)
    if begun is None:
        return f"{config.out}: none was begun yet"
    begun.check_config(config.out, settings(config))
    check_begun(config, begun.contents, contents(config, digests))
    check_proxy(config.proxy_path or config.out / "proxy", digests, [begun.proxy] if begun.proxy else [])
    return f"{config.out}: {'is finished' if begun.finished else 'can be gone on with'}, with these files"
