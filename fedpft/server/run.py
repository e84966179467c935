"""One federation from the owner's side, from start to files: proxy, rounds, plug-in, evaluation."""

import contextlib
import json
import logging
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from safetensors.torch import save_file

from fedpft import atomic, kernels
from fedpft.config import ServerConfig, dump
from fedpft.digests import Digests
from fedpft.errors import CheckpointError, ConfigError
from fedpft.model.mapped import held
from fedpft.privacy import wholesilo
from fedpft.proxy.holdings import format_holdings, holdings
from fedpft.report.page import write_report
from fedpft.server.construction import Built, Owner, Record, build_proxy, load_built, load_owner
from fedpft.server.identity import (
    ADAPTER_FILE,
    PATCH_FILE,
    Contents,
    check_begun,
    check_proxy,
    check_unchanged,
    contents,
    kept_digests,
    provenance,
    proxy_digest,
    settings,
)
from fedpft.server.ledger import Ledger, has_begun, try_out
from fedpft.server.product import Worth, measure_worth, refine_product, save_product
from fedpft.server.rounds import Reach, Rounds, snapshot
from fedpft.server.service import FederationServer
from fedpft.wire.certificates import check_certificates
from fedpft.wire.channel import check_listen

log = logging.getLogger(__name__)

VERSIONED = ("fedpft", "torch", "transformers", "peft", "grpcio", "safetensors")


def run(config: ServerConfig, reach: Reach = FederationServer) -> dict[str, Any]:
    """Runs a whole federation and writes OUT; returns what is in OUT/summary.json.

    A run that a former process began in OUT goes on where that stopped, to the same bits; one that is finished is only
    read. Each step's result is on disk and in the ledger before the next step begins.

    OUT/proxy/               the proxy directory, if the server built it
    OUT/ledger.sqlite, OUT/rounds/, OUT/patches/, OUT/audit.jsonl
                             what a restart goes on from, and what was sent to whom
    OUT/digests.json         of FM and data, so that a restart need not read them all (fedpft/digests.py)
    OUT/patch.safetensors    what the alignments made of the compressed layers
    OUT/adapter.safetensors  the last round's adapter
    OUT/adapter/             the same as a PEFT adapter for the FM, refined if `plug_in` says so
    OUT/merged/              the adapted FM, a directory that plain transformers loads
    OUT/benchmark/           for some tasks the test data as other programs measure it
    OUT/summary.json, OUT/curves.json, OUT/report.html

    Args:
        reach: makes what the rounds reach the silos by.

    Raises:
        KeyboardInterrupt: of the operator; the run can be gone on with.
        FedPFTError: docs/errors.md; after QuorumLost the run can be gone on with.
    """
    if config.tls is not None:
        check_certificates(config.tls, "server")
    if (terms := config.secure_terms) is not None and terms.silo_privacy is not None:
        wholesilo.multiplier(terms.silo_privacy)  # before the proxy is built, which may take hours
    with atomic.locked(config.out, "out"):
        for torn in config.out.rglob(".*.part"):  # of writes that were killed
            torn.unlink()
        begun = has_begun(config.out)
        directory = config.proxy_path or config.out / "proxy"
        digests = kept_digests(config)
        if begun:
            with _opened(config, contents(config, digests)) as ledger:
                check_proxy(directory, digests, ledger.recorded("proxy"))
                if ledger.recorded("finished"):
                    log.info("%s: this run is finished; a new one needs another `out`", config.out)
                    return _summary_of(config)
        try_out(config.out)
        check_listen(config.listen)
        record = Record()
        with record.timed("load"):
            owner = load_owner(config, digests)
        if not begun and config.proxy_path is None:
            build_proxy(config, owner, directory)
        # Read back even if it was built just now, so that a restart begins with the same bits. Only here does a run
        # begin: whatever was wrong up to this point can be mended and tried again in the same directory.
        built = load_built(config, owner, directory, digests)
        built.record.seconds |= record.seconds
        log.info("%s", format_holdings(holdings(owner.model, built.proxy.model)))
        with _opened(config, owner.contents) as ledger:
            if not check_proxy(directory, digests, ledger.recorded("proxy")):
                ledger.record("proxy", None, proxy_digest(directory, digests))
            digests.save()
            return _complete(config, owner, built, ledger, reach, digests)


@contextlib.contextmanager
def _opened(config: ServerConfig, found: Contents) -> Iterator[Ledger]:
    """The ledger of the run that these files belong to; CheckpointError or ConfigError if the one in OUT is another."""
    with contextlib.closing(Ledger(config.out, settings(config), found)) as ledger:
        check_begun(config, ledger.contents, found)
        yield ledger


def finished(config: ServerConfig) -> dict[str, Any]:
    """The summary of the run in OUT, which is finished and was begun with these settings and files.

    Raises:
        ConfigError: no run is there, or one that is not finished, or another.
        CheckpointError: as of :func:`run`.
    """
    if has_begun(config.out):
        digests = kept_digests(config)
        with atomic.locked(config.out, "out"), _opened(config, contents(config, digests)) as ledger:
            check_proxy(config.proxy_path or config.out / "proxy", digests, ledger.recorded("proxy"))
            if ledger.recorded("finished"):
                return _summary_of(config)
    raise ConfigError(f"{config.out}: holds no run that is finished", "run it to its end before")


def _summary_of(config: ServerConfig) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads((config.out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{config.out / 'summary.json'}: cannot be read ({error})", "restore it from a backup, or start a new run"
        ) from None
    return summary


def _complete(
    config: ServerConfig, owner: Owner, built: Built, ledger: Ledger, reach: Reach, digests: Digests
) -> dict[str, Any]:
    """Rounds, plug-in, refinement, evaluation, files; returns the summary."""
    rounds = Rounds(config, owner, built, ledger, reach)
    adapter = rounds.complete()
    # What `fedpft evaluate` and `fedpft plug-in` start from, beside the proxy directory.
    with atomic.replacing(config.out / PATCH_FILE) as written:
        save_file(snapshot(built.proxy) if ledger.recorded("alignment") else {}, written)
    made_with = provenance(config, owner.contents, built.files, Digests().of_file(config.out / PATCH_FILE))
    with atomic.replacing(config.out / ADAPTER_FILE) as written:
        save_file(adapter, written, metadata=made_with)
    refined = refine_product(config, owner, built)
    with built.record.timed("evaluation"):
        worth = measure_worth(config, owner, built, refined)
    summary = _summary(config, owner, rounds, worth, sum(tensor.numel() for tensor in adapter.values()))
    if worth.answers:
        atomic.write_text(config.out / "answers.json", json.dumps(worth.answers))
    if held(owner.model) is not None:  # it is what its files are
        check_unchanged(config, owner.contents, digests)
    save_product(owner, config, config.out)
    atomic.write_text(config.out / "summary.json", json.dumps(summary, indent=1))
    curves = _curves(built, ledger.recorded("alignment"), rounds.closed) | rounds.silos_curves()
    if refined is not None:
        curves["refinement"] = {"layer_scales": refined.layer_scales, "loss": refined.losses}
    atomic.write_text(config.out / "curves.json", json.dumps(curves))
    write_report(summary, curves, config.out / "report.html")
    ledger.record("finished", None, None)
    return summary


def _summary(
    config: ServerConfig, owner: Owner, rounds: Rounds, worth: Worth, adapter_parameters: int
) -> dict[str, Any]:
    parts = holdings(owner.model, rounds.built.proxy.model)
    totals = {side: sum(part[side] for part in parts.values()) for side in ("model", "proxy")}
    return {
        "task": config.model.task,
        "metrics": worth.metrics,
        "gain": None if worth.gain is None else asdict(worth.gain),
        "written": worth.written,
        "parameters": {
            **totals,
            **{f"{side}_transformer": total - parts["embeddings"][side] for side, total in totals.items()},
            "adapter": adapter_parameters,
        },
        "holdings": parts,
        "data": {"server": _server_data(owner), "silos": rounds.silos_data()},
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


def _server_data(owner: Owner) -> dict[str, dict[str, int]]:
    sets = {"public": owner.public, "test": owner.test}
    return {name: {"samples": len(each), **each.counts} for name, each in sets.items() if each is not None}


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
            {"round": closed["entry"]["round"], **closed["scores"]} for closed in closed_rounds if closed["scores"]
        ],
    }
