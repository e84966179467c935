"""What leaves an institution, in words and numbers, for whoever has to approve it: `fedpft silo --explain`."""

from collections.abc import Iterable
from pathlib import Path

import fedpft
from fedpft.config import AdapterSection, PrivacySection, SiloConfig, SiloPrivacyTerms
from fedpft.errors import ConfigError, ModelError
from fedpft.model import adapters
from fedpft.model.subffn import sub_ffns
from fedpft.privacy.fixedpoint import SUMMED_METRICS
from fedpft.proxy.bundle import Proxy, load_proxy
from fedpft.silo.budget import Budget
from fedpft.silo.data import WAY_OUT, examine
from fedpft.silo.work import Joined, Work
from fedpft.wire.certificates import check_certificates
from fedpft.wire.encoding import Encoding, layout
from fedpft.wire.tensors import Spec

LABEL = 16  # characters of the first column

ENCODINGS: dict[Encoding, str] = {
    "exact": "exact: each tensor as it is after the training",
    "bfloat16": "bfloat16: what the training changed in each tensor, 2 bytes a value",
    "int8": "int8: what the training changed in each tensor, 1 byte a value and 4 for each 256 values",
}


def explain(config: SiloConfig) -> str:
    """Everything that this configuration lets out; connects to nobody and trains nothing.

    Raises:
        CertificateError, DataError: as `run` would.
    """
    examination = examine(config)
    if (fault := examination.fault(config.data.bad_rows, WAY_OUT)) is not None:
        raise fault
    work = Work(config.work)
    joined = work.joined()
    proxy = None if joined is None else _received(work.proxy_path(joined))
    secure = bool(config.require) or config.silo_privacy is not None  # which is of sums alone
    secure = secure or (joined is not None and joined.settings.secure_aggregation is not None)
    sections = {
        "To whom": _peer(config),
        "Before it enrols": [
            _row("question", "what the data must be like; nothing goes with it but the version below")
        ],
        "On enrolment, and again whenever the server or this silo was restarted": [
            *_samples(config, examination.rows - len(examination.faults), secure),
            _row("version", f"{fedpft.__version__}, of fedpft"),
        ],
        "With each call": [
            _row("two numbers", "made up at random: one kept in the work directory, one of the process; by them the"),
            _row("", "server knows two processes with the same kit apart"),
        ],
        "In each round that the server picks this silo for": (
            _secure(config, joined, proxy) if secure else _plain(config, joined, proxy)
        ),
        "When it ends with an error": [_row("notice", "that it leaves; the reason stays here")],
        "Never": [
            _row("data", "no text, image or label, and no number that belongs to one sample"),
            _row("names", "no path or file name of this machine, and no text of its errors or log"),
            _row("connections", "none but to that server, and none from outside: this silo listens on no port"),
            _row(
                "",
                "(started by torchrun, its processes meet on this machine's loopback, torchrun on a port of its own)",
            ),
        ],
        "On record": [
            _row("audit log", str(config.work / "audit.jsonl")),
            _row("", "each transfer with time, server, size and SHA-256; `fedpft audit` verifies and prints it"),
            _row("last update", f"{work.update_path}: the very bytes, as safetensors"),
        ],
        "To let less out, in silo.yaml": [
            _row("share", "metrics: [train_loss]   only the metrics that are named; []: none"),
            _row("", "inactivity: false       no inactivity counts; the server does without them"),
            _row("limits", "max_local_epochs: 0.5   fewer samples in a round"),
            _row("privacy", "epsilon: 8   no more than so much of any sample; `fedpft privacy` prints what was spent"),
            _row(
                "require", "[secure_aggregation]   no federation in which the server learns more than sums over silos"
            ),
            _row("", "[secure_aggregation, silo_privacy]   nor one whose sums have no noise that hides a whole silo"),
        ],
    }
    parts = ["What leaves this institution when this silo runs. Nothing was sent to print this."]
    parts += ["\n".join([title, *rows]) for title, rows in sections.items()]
    return "\n\n".join(parts)


def privacy_report(config: SiloConfig) -> str:
    """What was spent of the samples' privacy, and what is left; looks at silo.yaml and `work` alone.

    Raises:
        ConfigError: there is no privacy in silo.yaml, and no federation was joined that asks for it.
        DataError: the data cannot be read.
        CheckpointError: work/privacy.json cannot be.
    """
    work = Work(config.work)
    joined = work.joined()
    if (allowed := _allowed(config, joined)) is None:
        raise ConfigError("privacy: is not in silo.yaml", "set privacy: {epsilon: 8} there, to spend no more than that")
    examination = examine(config)
    run = "" if joined is None else joined.run_id
    budget = Budget(work.path, allowed, examination.rows - len(examination.faults), run)
    lines = budget.describe()
    if joined is not None and (steps := budget.planned(joined.settings, config.limits)) is not None:
        lines.append(f"left: {budget.rounds_left(steps)} more rounds of federation {run}, as it was joined")
    return "\n".join(lines)


METRICS = (
    "skipped_rows: how many rows were left out; cut_texts: how many texts were too long for the",
    "model and were cut; cut_completions: of how many the answer was; label_diversity: if the server",
    "asks, how likely it is that two samples have different labels",
)


def _samples(config: SiloConfig, usable: int, secure: bool) -> list[str]:
    if secure:
        return [_row("samples", "not how many there are: secure aggregation (docs/privacy.md)")]
    return [
        _row("samples", f"{usable}"),
        _row("", f"how many rows of {config.data.path} can be used; not sent with secure aggregation"),
    ]


def _plain(config: SiloConfig, joined: Joined | None, proxy: Proxy | None) -> list[str]:
    return [
        *_adapter(joined, proxy),
        _row("", "The adapter is made from the data: whoever studies it can learn something of them."),
        _row("samples", "how many of the samples the round's training went through"),
        _row("metrics", ", ".join(config.share.metrics) or "none"),
        *(_row("", line) for line in METRICS),
        *_inactivity(config.share.inactivity, proxy),
        *_private(config, joined),
    ]


def _secure(config: SiloConfig, joined: Joined | None, proxy: Proxy | None) -> list[str]:
    terms = None if joined is None else joined.settings.secure_aggregation
    fewest = max(config.smallest_sum, 2 if terms is None else terms.min_silos)
    private = None if terms is None else terms.silo_privacy
    return [
        _row("keys", "made for this attempt alone, signed with this silo's certificate, of which a copy goes along"),
        _row("shares", "of this silo's secrets, sealed for each other silo; the server cannot open them"),
        _row("vector", "all of the following as one list of 32-bit words under masks, which look like chance"),
        _row("signature", "of the list of silos whose sum is to be opened"),
        _row("shares", f"of what is left of masks in a sum over {fewest} silos or more, once enough have signed it"),
        _row("", "The server learns the sum over all these silos, and nothing else of any of them:"),
        *_adapter(joined, proxy, shown_encoding=False),
        *(_counted(config, proxy) if private is None else _hidden(private)),
        *_private(config, joined),
    ]


def _counted(config: SiloConfig, proxy: Proxy | None) -> list[str]:
    summed = [name for name in config.share.metrics if name in SUMMED_METRICS]
    return [
        _row("samples", "how many of the samples the round's training went through, and the weight that follows"),
        _row("metrics", ", ".join(summed) or "none"),
        _row("", "each with how many silos share it: if no other does, it is this silo's"),
        *_inactivity(config.share.inactivity, proxy),
    ]


def _hidden(private: SiloPrivacyTerms) -> list[str]:
    promise = f"epsilon {private.epsilon:g} at delta {private.delta:g} over {private.rounds} rounds"
    return [
        _row("", f"Its change in the round, shrunk to norm {private.clip:g}, with noise of this silo's own on it."),
        _row("", f"All noise together hides each whole silo: {promise}."),
        _row("", "No samples, no metrics, no inactivity."),
    ]


def _peer(config: SiloConfig) -> list[str]:
    if config.tls is None:
        return [
            _row("server", f"{config.server}, on this machine and without TLS (insecure_loopback: for tests)"),
            _row("known there as", f"{config.insecure_name}, which is merely said (insecure_name)"),
        ]
    return [
        _row("server", f"{config.server}, over TLS 1.3, with a certificate that {config.tls.ca} signed"),
        _row("known there as", f"{check_certificates(config.tls, 'silo')}, by {config.tls.certificate}"),
        _row("", "That certificate, this machine's address and gRPC's version show in every connection."),
    ]


def _received(bundle: Path) -> Proxy | None:
    """The proxy, if it has been received whole."""
    try:
        return load_proxy(bundle)
    except ModelError:
        return None


def _adapter(joined: Joined | None, proxy: Proxy | None, *, shown_encoding: bool = True) -> list[str]:
    if joined is None or proxy is None:
        return [
            _row("adapter", "two small matrices (LoRA) beside each query, key, value and attention output projection"),
            _row("", "of the proxy, and if the server asks beside those of its FFNs, and its task head."),
            _row("", "No proxy was received yet: run this again when one was, and every tensor is listed here"),
            *([_row("encoding", "as the server asks:")] if shown_encoding else []),
            *(_row("", text) for text in ENCODINGS.values() if shown_encoding),
        ]
    encoding = joined.settings.training.update_encoding
    specs = _adapter_specs(proxy, joined.settings.adapter, joined.settings.seed)
    sent = {name: sum(part.nbytes for part in layout(spec, encoding).values()) for name, spec in specs.items()}
    return [
        _row("adapter", f"{len(specs)} tensors, {sum(sent.values())} bytes:"),
        *_table((name, str(list(s.shape)), str(s.dtype)[6:], f"{sent[name]} bytes") for name, s in specs.items()),
        *([_row("encoding", ENCODINGS[encoding])] if shown_encoding else []),
    ]


def _adapter_specs(proxy: Proxy, settings: AdapterSection, seed: int) -> dict[str, Spec]:
    adapters.attach(proxy.model, settings, seed=seed)
    return {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in adapters.extract(proxy.model).items()}


def _inactivity(shared: bool, proxy: Proxy | None) -> list[str]:
    if not shared:
        return [_row("inactivity", "nothing, even if the server asks (share.inactivity is false)")]
    rows = [
        _row("inactivity", "if the server asks: at how many tokens each neuron of a compressed layer of the proxy was"),
        _row("", "inactive, and out of how many; sums over all samples of the round"),
    ]
    if proxy is None:
        return rows
    neurons = [ffn.neurons for ffn in sub_ffns(proxy.model).values()]
    return rows + _table(
        (f"layer {layer}", f"[{neurons[layer]}] and []", "int64", f"{8 * (neurons[layer] + 1)} bytes")
        for layer in proxy.compressed
    )


def _allowed(config: SiloConfig, joined: Joined | None) -> PrivacySection | None:
    """The differential privacy that the silo keeps to."""
    return PrivacySection.stricter(config.privacy, None if joined is None else joined.settings.training.privacy)


def _private(config: SiloConfig, joined: Joined | None) -> list[str]:
    if (allowed := _allowed(config, joined)) is None:
        return []
    return [
        _row(
            "privacy", f"differential: epsilon {allowed.epsilon:g} at delta {allowed.delta:g}, for any one sample and"
        ),
        _row("", "all rounds together. The adapter is trained with noise, no inactivity counts are sent, and of the"),
        _row("", "metrics only `seconds`."),
    ]


def _row(label: str, text: str) -> str:
    return f"  {label:<{LABEL}}{text}"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows of four cells, in columns; the last is flush right."""
    cells = list(rows)
    widths = [max((len(row[column]) for row in cells), default=0) for column in range(4)]
    return [
        _row("", f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}")
        for name, shape, dtype, size in cells
    ]
