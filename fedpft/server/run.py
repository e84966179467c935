"""One federation from the owner's side, from start to files: proxy, rounds, plug-in, evaluation."""

import contextlib
import json
import logging
import platform
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedpft import adapters, atomic, kernels, models
from fedpft.config import AdapterSection, ServerConfig, dump
from fedpft.errors import CheckpointError
from fedpft.evaluation import Metrics, evaluate, majority
from fedpft.proxy import parameter_counts
from fedpft.report import write_report
from fedpft.server.construction import Built, Owner, Record, build_proxy, load_built, load_owner
from fedpft.server.ledger import LEDGER_FILE, Ledger, try_out
from fedpft.server.rounds import Rounds, snapshot
from fedpft.wire.certificates import check_certificates
from fedpft.wire.channel import check_listen
from fedpft.wire.transfer import digest, payload

ADAPTER_FILE = "adapter.safetensors"
PATCH_FILE = "patch.safetensors"

log = logging.getLogger(__name__)

VERSIONED = ("fedpft", "torch", "transformers", "peft", "grpcio", "safetensors")


def run(config: ServerConfig) -> dict[str, Any]:
    """Runs a whole federation and writes OUT; returns what is in OUT/summary.json.

    A run that a former process began in OUT goes on where that stopped, to the same bits; one that is finished is only
    read. Each step's result is on disk and in the ledger before the next step begins.

    OUT/proxy/               the proxy directory, if the server built it
    OUT/ledger.sqlite, OUT/rounds/, OUT/patches/, OUT/audit.jsonl
                             what a restart goes on from, and what was sent to whom
    OUT/patch.safetensors    what the alignments made of the compressed layers
    OUT/adapter.safetensors  the last round's adapter
    OUT/adapter/             the same as a PEFT adapter for the FM
    OUT/merged/              the adapted FM, a directory that plain transformers loads
    OUT/summary.json, OUT/curves.json, OUT/report.html

    Raises:
        KeyboardInterrupt: of the operator; the run can be gone on with.
        FedPFTError: docs/errors.md; after QuorumLost the run can be gone on with.
    """
    if config.tls is not None:
        check_certificates(config.tls, "server")
    with atomic.locked(config.out, "out"):
        for torn in config.out.rglob(".*.part"):  # of writes that were killed
            torn.unlink()
        begun = (config.out / LEDGER_FILE).exists()
        if begun and (summary := _finished(config)) is not None:
            return summary
        try_out(config.out)
        check_listen(config.listen)
        record = Record()
        with record.timed("load"):
            owner = load_owner(config)
        directory = config.proxy_path or config.out / "proxy"
        if not begun and config.proxy_path is None:
            build_proxy(config, owner, directory)
        # Read back even if it was built just now, so that a restart begins with the same bits. Only here does a run
        # begin: whatever was wrong up to this point can be mended and tried again in the same directory.
        built = load_built(config, directory)
        built.record.seconds |= record.seconds
        with _opened(config) as ledger:
            _check_proxy(directory, ledger)
            return _complete(config, owner, built, ledger)


def _opened(config: ServerConfig) -> AbstractContextManager[Ledger]:
    return contextlib.closing(Ledger(config.out, _identity(config)))


def _finished(config: ServerConfig) -> dict[str, Any] | None:
    """The summary of a run that is finished."""
    with _opened(config) as ledger:
        if not ledger.recorded("finished"):
            return None
    log.info("%s: this run is finished; a new one needs another `out`", config.out)
    summary: dict[str, Any] = json.loads((config.out / "summary.json").read_text(encoding="utf-8"))
    return summary


def _identity(config: ServerConfig) -> dict[str, Any]:
    """What a run's result depends on. Who takes part, and where, may change between a stop and going on."""
    changeable = {"out", "listen", "tls", "insecure_loopback", "threads", "federation"}
    return {key: value for key, value in dump(config).items() if key not in changeable} | {
        "sample_fraction": config.federation.sample_fraction
    }


def _check_proxy(directory: Path, ledger: Ledger) -> None:
    """Enters the proxy in the ledger; CheckpointError if another one stands there."""
    found = digest(payload(path).announcement() for path in sorted(directory.rglob("*")) if path.is_file())
    recorded = ledger.recorded("proxy")
    if not recorded:
        ledger.record("proxy", None, found)
    elif recorded != [found]:
        raise CheckpointError(
            f"{directory}: is not the proxy that this run began with", "restore it from a backup, or start a new run"
        )


def final_metrics(owner: Owner, built: Built, batch: int) -> dict[str, Metrics]:
    """The rows that one federation fills: tuned proxy and plugged-in FM on all test data; none without test data."""
    if owner.test is None:
        return {}
    return {
        "majority": majority(owner.test),
        "proxy": evaluate(built.proxy.model, owner.test, batch),
        "plugged_in": evaluate(owner.model, owner.test, batch),
    }


def save_product(owner: Owner, settings: AdapterSection, out: Path) -> None:
    """The plugged-in FM as a PEFT adapter and merged; merging comes last, because it ends the adapter's life."""
    adapters.save_peft(owner.model, settings, out / "adapter")
    adapters.merge(owner.model)
    models.save_model(owner.model, owner.processor, out / "merged")


def _complete(config: ServerConfig, owner: Owner, built: Built, ledger: Ledger) -> dict[str, Any]:
    """Rounds, plug-in, evaluation, files; returns the summary."""
    rounds = Rounds(config, owner, built, ledger)
    adapter = rounds.complete()
    # What `fedpft evaluate` and `fedpft plug-in` start from, beside the proxy directory.
    for name, tensors in ((ADAPTER_FILE, adapter), (PATCH_FILE, snapshot(built.proxy))):
        with atomic.replacing(config.out / name) as written:
            save_file(tensors, written)
    with built.record.timed("evaluation"):
        metrics = final_metrics(owner, built, config.evaluation.batch)
    summary = _summary(config, owner, rounds, metrics, sum(tensor.numel() for tensor in adapter.values()))
    save_product(owner, config.adapter, config.out)
    atomic.write_text(config.out / "summary.json", json.dumps(summary, indent=1))
    curves = _curves(built, ledger.recorded("alignment"), rounds.closed)
    atomic.write_text(config.out / "curves.json", json.dumps(curves))
    write_report(summary, curves, config.out / "report.html")
    ledger.record("finished", None, None)
    return summary


def _summary(
    config: ServerConfig, owner: Owner, rounds: Rounds, metrics: dict[str, Metrics], adapter_parameters: int
) -> dict[str, Any]:
    (model, model_transformer), (proxy, proxy_transformer) = (
        parameter_counts(m) for m in (owner.model, rounds.built.proxy.model)
    )
    return {
        "metrics": {row: asdict(found) for row, found in metrics.items()},
        "parameters": {
            "model": model,
            "proxy": proxy,
            "model_transformer": model_transformer,
            "proxy_transformer": proxy_transformer,
            "adapter": adapter_parameters,
        },
        "bytes": rounds.traffic(),
        "seconds": rounds.record.seconds,
        "rounds": [closed["entry"] for closed in rounds.closed],
        "versions": {
            **{name: metadata.version(name) for name in VERSIONED},
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "kernels": kernels.build_info(),
        },
        "seed": config.seed,
        "config": dump(config),
    }


def _curves(built: Built, alignments: list[dict[str, Any]], closed_rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What report.html draws."""
    selection, layer_level = built.selection, {"stage": "layer-level", "loss": built.record.losses}
    gaps = built.record.gaps
    neuron_level = [{"stage": f"round {entry['round']}", "loss": entry["loss"]} for entry in alignments]
    return {
        "distillation": [curve for curve in (layer_level, *neuron_level) if curve["loss"]],
        "alignment": {
            "layers": gaps[0][1].layers if gaps else [],
            "stages": [{"stage": stage, **asdict(gap)} for stage, gap in gaps],
        },
        "saliency_kept": {
            "layers": list(range(len(selection.saliency))),
            "share": selection.saliency_kept,
        },
        "rounds": [
            {"round": closed["entry"]["round"], **closed["accuracy"]} for closed in closed_rounds if closed["accuracy"]
        ],
    }
