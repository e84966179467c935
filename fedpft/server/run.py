"""One federation from the owner's side: proxy, rounds, alignments, plug-in, evaluation, files."""

import contextlib
import json
import logging
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedpft import adapters, atomic, kernels, models
from fedpft.adapters import Adapter
from fedpft.config import AdapterSection, RoundSettings, ServerConfig, dump
from fedpft.distillation import ffn_norms, least_active, neuron_level
from fedpft.errors import CheckpointError, QuorumLost
from fedpft.evaluation import Gap, Metrics, evaluate, majority
from fedpft.progress import progress
from fedpft.proxy import apply_patch, parameter_counts, patch
from fedpft.report import write_report
from fedpft.server.construction import Built, Owner, Record, build_proxy, load_built, load_owner, record_gap
from fedpft.server.egress import Egress
from fedpft.server.ledger import Ledger
from fedpft.server.service import FederationServer
from fedpft.server.updates import Update, aggregate
from fedpft.subffn import sub_ffns
from fedpft.wire.certificates import check_certificates
from fedpft.wire.channel import check_listen
from fedpft.wire.tensors import read_tensors
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
    with atomic.locked(config.out, "out"), contextlib.closing(Ledger(config.out, _identity(config))) as ledger:
        for torn in config.out.rglob(".*.part"):  # of writes that were killed
            torn.unlink()
        if ledger.recorded("finished"):
            log.info("%s: this run is finished; a new one needs another `out`", config.out)
            summary: dict[str, Any] = json.loads((config.out / "summary.json").read_text(encoding="utf-8"))
            return summary
        check_listen(config.listen)
        record = Record()
        with record.timed("load"):
            owner = load_owner(config)
        built = _proxy(config, owner, ledger)
        built.record.seconds |= record.seconds
        return _Run(config, owner, built, ledger).complete()


def _identity(config: ServerConfig) -> dict[str, Any]:
    """What a run's result depends on. Who takes part, and where, may change between a stop and going on."""
    changeable = {"out", "listen", "tls", "insecure_loopback", "threads", "federation"}
    return {key: value for key, value in dump(config).items() if key not in changeable} | {
        "sample_fraction": config.federation.sample_fraction
    }


def _proxy(config: ServerConfig, owner: Owner, ledger: Ledger) -> Built:
    """The proxy, always as read from its directory, so that it is the same after a restart; built if need be."""
    directory = config.proxy_path or config.out / "proxy"
    recorded = ledger.recorded("proxy")
    if not recorded and config.proxy_path is None:
        build_proxy(config, owner, directory)
    files = [payload(path).announcement() for path in sorted(directory.rglob("*")) if path.is_file()]
    if not recorded:
        ledger.record("proxy", None, digest(files))
    elif recorded != [digest(files)]:
        raise CheckpointError(
            f"{directory}: is not the proxy that this run began with", "restore it from a backup, or start a new run"
        )
    return load_built(config, directory)


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


class _Run:
    """A federation from its first round, or the first that is not closed, to its files."""

    def __init__(self, config: ServerConfig, owner: Owner, built: Built, ledger: Ledger) -> None:
        self.config, self.owner, self.built, self.record, self.ledger = config, owner, built, built.record, ledger
        settings = RoundSettings(
            seed=config.seed,
            adapter=config.adapter,
            training=config.training,
            inactive_below=config.alignment.inactive_below,
        )
        self.closed: list[dict[str, Any]] = ledger.recorded("round")
        self._earlier = self.closed[-1]["bytes"] if self.closed else {"down": 0, "up": 0}
        self.egress = Egress(built.bundle, adapters.extract(built.proxy.model))
        self._restore()
        self.server = FederationServer(config, built.bundle, settings, ledger)

    def complete(self) -> dict[str, Any]:
        """Rounds, plug-in, evaluation, files."""
        total = self.config.training.rounds
        try:
            self.server.start()
            if len(self.closed) < total:
                with self.record.timed("enrolment"):
                    self.server.wait_for_silos()
            for number in range(len(self.closed) + 1, total + 1):
                self._round(number)
            self.server.close_round()
            self.server.finish()
        except (KeyboardInterrupt, QuorumLost):
            log.warning(
                "stopped with %d of %d rounds closed; the same command goes on from there", len(self.closed), total
            )
            raise
        except BaseException as error:
            self.server.abort(f"the server stopped: {type(error).__name__}")
            raise
        finally:
            self.server.close()
        adapter = self._adapter(total)
        self._save_state(adapter)
        with self.record.timed("evaluation"):
            metrics = final_metrics(self.owner, self.built, self.config.evaluation.batch)
        summary = self._summary(metrics, sum(tensor.numel() for tensor in adapter.values()))
        save_product(self.owner, self.config.adapter, self.config.out)
        atomic.write_text(self.config.out / "summary.json", json.dumps(summary, indent=1))
        curves = self._curves()
        atomic.write_text(self.config.out / "curves.json", json.dumps(curves))
        write_report(summary, curves, self.config.out / "report.html")
        self.ledger.record("finished", None, None)
        return summary

    def _restore(self) -> None:
        """Brings proxy and FM to where the ledger says they were."""
        proxy, alignments = self.built.proxy.model, self.ledger.recorded("alignment")
        for entry in alignments:
            self.record.gaps += [(stage, Gap.from_json(gap)) for stage, gap in entry["gaps"]]
        if alignments:
            snapshot = self.ledger.verified(self.ledger.snapshot_path(len(alignments)))
            apply_patch(proxy, read_tensors(snapshot.path, "patch"))
        if self.closed:
            self._load(self._adapter(len(self.closed)))
            self.record.seconds |= self.closed[-1]["seconds"]
            log.info("going on after round %d of %d", len(self.closed), self.config.training.rounds)
        elif not self.ledger.entered(untrained := self.ledger.adapter_path(0)):
            self._save(untrained, "adapter", adapters.extract(proxy))

    def _save(self, path: Path, group: Literal["adapter", "patch"], tensors: dict[str, Tensor]) -> None:
        self.egress.write(path, group, tensors)
        self.ledger.enter_file(path)

    def _adapter(self, round: int) -> Adapter:
        return read_tensors(self.ledger.verified(self.ledger.adapter_path(round)).path, "adapter")

    def _load(self, adapter: Adapter) -> None:
        adapters.load(self.built.proxy.model, adapter)
        adapters.plug_in(self.owner.model, adapter, self.built.selection.layers)

    def _round(self, number: int) -> None:
        every, total = self.config.alignment.every_rounds, self.config.training.rounds
        # Nobody would train on what an alignment after the last round changes.
        align = bool(every and self.built.selection.matched) and number % every == 0 and number < total
        path = self.ledger.adapter_path(number)
        with self.record.timed("rounds"):
            if self.ledger.entered(path):
                updates = self.server.updates(number)
            else:
                updates = self.server.run_round(number, count_inactivity=align)
                self._save(path, "adapter", aggregate(updates))
        self._load(self._adapter(number))
        loss = self._align(number, updates) if align else None
        samples = sum(update.samples for update in updates)
        losses = [
            (update.metrics["train_loss"], update.samples) for update in updates if "train_loss" in update.metrics
        ]
        shared = sum(weight for _, weight in losses)
        accuracy = self._measure(number)
        entry = {
            "round": number,
            "train_loss": sum(loss * weight for loss, weight in losses) / shared if shared else None,
            "accuracy": accuracy and accuracy["plugged_in"],
            "alignment_loss": loss,
            "silos": len(updates),
            "samples": samples,
        }
        closed = {
            "entry": entry,
            "accuracy": accuracy,
            "seconds": self.record.seconds,
            "bytes": self._bytes(),
        }
        self.ledger.record("round", number, closed)
        self.closed.append(closed)
        self.server.close_round()
        log.info("round %d of %d: %s", number, total, json.dumps(entry))

    def _align(self, number: int, updates: list[Update]) -> float | None:
        """Neuron-level distillation towards the FM that carries the round's adapter; sends out what changed.

        Returns:
            The last step's loss; None if there was no step, or no silo shares its inactivity counts.
        """
        done = {entry["round"]: entry for entry in self.ledger.recorded("alignment")}
        if number not in done:
            counts = [counts for update in updates if (counts := update.inactivity)]
            if not counts:
                log.warning("round %d: no silo shares its inactivity counts, so the proxy stays as it is", number)
                return None
            done[number] = self._aligned(number, counts)
        losses = done[number]["loss"]
        return losses[-1] if losses else None

    def _aligned(self, number: int, counts: list[dict[str, Tensor]]) -> dict[str, Any]:
        section, proxy, ledger = self.config.alignment, self.built.proxy.model, self.ledger
        updated = least_active(counts, section.updated_fraction)
        known = len(self.record.gaps)
        record_gap(self.config, self.owner, self.built, f"round {number}, before")
        title = f"neuron-level distillation after round {number}"
        with self.record.timed("alignment"), progress(title, section.steps) as report:
            losses = neuron_level(
                proxy,
                self.owner.model,
                self.built.selection.matched,
                updated,
                self.owner.public,
                section,
                seed=self.config.seed,
                round=number,
                progress=report,
            )
        record_gap(self.config, self.owner, self.built, f"round {number}, after")
        version = len(ledger.recorded("alignment")) + 1
        self._save(ledger.patch_path(version), "patch", patch(proxy, updated, ffn_norms(proxy, list(updated))))
        self._save(ledger.snapshot_path(version), "patch", self._snapshot())
        gaps = [(stage, asdict(gap)) for stage, gap in self.record.gaps[known:]]
        entry = {"round": number, "loss": losses, "gaps": gaps}
        ledger.record("alignment", number, entry)
        self.server.publish_patch()
        ledger.snapshot_path(version - 1).unlink(missing_ok=True)
        return entry

    def _snapshot(self) -> dict[str, Tensor]:
        """All that alignments ever change, as it is now: a patch of any version of the proxy."""
        proxy, compressed = self.built.proxy.model, self.built.proxy.compressed
        neurons = {layer: torch.arange(ffn.neurons) for layer, ffn in enumerate(sub_ffns(proxy).values())}
        return patch(proxy, {layer: neurons[layer] for layer in compressed}, ffn_norms(proxy, compressed))

    def _measure(self, number: int) -> dict[str, float] | None:
        """Accuracy of proxy and plugged-in FM after a round, where the configuration wants it measured."""
        section, test = self.config.evaluation, self.owner.test
        if test is None or not section.every_rounds or number % section.every_rounds:
            return None
        models = {"proxy": self.built.proxy.model, "plugged_in": self.owner.model}
        with self.record.timed("evaluation"):
            return {
                name: evaluate(model, test, section.batch, section.samples_per_round).accuracy
                for name, model in models.items()
            }

    def _save_state(self, adapter: Adapter) -> None:
        """What `fedpft evaluate` and `fedpft plug-in` start from, beside the proxy directory."""
        save_file(adapter, self.config.out / ADAPTER_FILE)
        save_file(self._snapshot(), self.config.out / PATCH_FILE)

    def _bytes(self) -> dict[str, int]:
        """Payload bytes of the run; what a killed process moved since its last closed round is not in it."""
        down, up = self.server.bytes_down, self.server.bytes_up
        return {"down": self._earlier["down"] + down, "up": self._earlier["up"] + up}

    def _summary(self, metrics: dict[str, Metrics], adapter_parameters: int) -> dict[str, Any]:
        (model, model_transformer), (proxy, proxy_transformer) = (
            parameter_counts(m) for m in (self.owner.model, self.built.proxy.model)
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
            "bytes": self._bytes(),
            "seconds": self.record.seconds,
            "rounds": [closed["entry"] for closed in self.closed],
            "versions": {
                **{name: metadata.version(name) for name in VERSIONED},
                "python": platform.python_version(),
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
                "kernels": kernels.build_info(),
            },
            "seed": self.config.seed,
            "config": dump(self.config),
        }

    def _curves(self) -> dict[str, Any]:
        """What report.html draws."""
        selection, layer_level = self.built.selection, {"stage": "layer-level", "loss": self.record.losses}
        gaps = self.record.gaps
        alignments = [
            {"stage": f"round {entry['round']}", "loss": entry["loss"]} for entry in self.ledger.recorded("alignment")
        ]
        return {
            "distillation": [curve for curve in (layer_level, *alignments) if curve["loss"]],
            "alignment": {
                "layers": gaps[0][1].layers if gaps else [],
                "stages": [{"stage": stage, **asdict(gap)} for stage, gap in gaps],
            },
            "saliency_kept": {
                "layers": list(range(len(selection.saliency))),
                "share": selection.saliency_kept,
            },
            "rounds": [
                {"round": closed["entry"]["round"], **closed["accuracy"]}
                for closed in self.closed
                if closed["accuracy"]
            ],
        }
