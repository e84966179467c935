"""One federation from the owner's side: proxy, rounds, alignments, plug-in, evaluation, files."""

import json
import logging
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedpft import adapters, atomic, kernels, models
from fedpft.adapters import Adapter
from fedpft.aggregation import WeightedMean
from fedpft.config import AdapterSection, RoundSettings, ServerConfig, dump
from fedpft.distillation import ffn_norms, least_active, neuron_level
from fedpft.evaluation import Metrics, evaluate, majority
from fedpft.progress import progress
from fedpft.proxy import parameter_counts, patch
from fedpft.report import write_report
from fedpft.server.construction import Built, Owner, Record, build_proxy, load_built, load_owner, record_gap
from fedpft.server.service import FederationServer
from fedpft.server.updates import Update
from fedpft.subffn import sub_ffns
from fedpft.wire.certificates import check_certificates
from fedpft.wire.channel import check_listen

ADAPTER_FILE = "adapter.safetensors"
PATCH_FILE = "patch.safetensors"

log = logging.getLogger(__name__)

VERSIONED = ("fedpft", "torch", "transformers", "peft", "grpcio", "safetensors")


def run(config: ServerConfig) -> dict[str, Any]:
    """Runs a whole federation and writes OUT; returns what is in OUT/summary.json.

    OUT/proxy/               the proxy directory, if the server built it
    OUT/patch.safetensors    what the alignments made of the compressed layers
    OUT/adapter.safetensors  the last round's adapter
    OUT/adapter/             the same as a PEFT adapter for the FM
    OUT/merged/              the adapted FM, a directory that plain transformers loads
    OUT/summary.json, OUT/curves.json, OUT/report.html
    """
    if config.tls is not None:
        check_certificates(config.tls, "server")
    check_listen(config.listen)
    record = Record()
    with record.timed("load"):
        owner = load_owner(config)
    directory = config.proxy_path
    built = build_proxy(config, owner, config.out / "proxy") if directory is None else load_built(config, directory)
    built.record.seconds |= record.seconds
    return _Run(config, owner, built).complete()


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
    """A federation from its first round to its files."""

    def __init__(self, config: ServerConfig, owner: Owner, built: Built) -> None:
        self.config, self.owner, self.built, self.record = config, owner, built, built.record
        self.rounds: list[dict[str, Any]] = []
        self.accuracy: list[dict[str, Any]] = []
        self.alignments: list[dict[str, Any]] = []
        settings = RoundSettings(
            seed=config.seed,
            adapter=config.adapter,
            training=config.training,
            inactive_below=config.alignment.inactive_below,
        )
        self.server = FederationServer(config, built.bundle, settings)

    def complete(self) -> dict[str, Any]:
        """Rounds, plug-in, evaluation, files."""
        try:
            self.server.start()
            with self.record.timed("enrolment"):
                self.server.wait_for_silos()
            adapter = adapters.extract(self.built.proxy.model)
            for number in range(1, self.config.training.rounds + 1):
                adapter = self._round(number, adapter)
            self.server.finish()
        except BaseException as error:
            self.server.abort(f"the server stopped: {type(error).__name__}")
            raise
        finally:
            self.server.close()
        self._save_state(adapter)
        with self.record.timed("evaluation"):
            metrics = final_metrics(self.owner, self.built, self.config.evaluation.batch)
        summary = self._summary(metrics, sum(tensor.numel() for tensor in adapter.values()))
        save_product(self.owner, self.config.adapter, self.config.out)
        atomic.write_text(self.config.out / "summary.json", json.dumps(summary, indent=1))
        curves = self._curves()
        atomic.write_text(self.config.out / "curves.json", json.dumps(curves))
        write_report(summary, curves, self.config.out / "report.html")
        return summary

    def _round(self, number: int, adapter: Adapter) -> Adapter:
        every, total = self.config.alignment.every_rounds, self.config.training.rounds
        # Nobody would train on what an alignment after the last round changes.
        align = bool(every and self.built.selection.matched) and number % every == 0 and number < total
        with self.record.timed("rounds"):
            updates = self.server.run_round(number, adapter, count_inactivity=align)
            mean = WeightedMean()
            for update in updates:
                mean.add(update.adapter, update.samples)
            adapter = mean.result()
        adapters.load(self.built.proxy.model, adapter)
        adapters.plug_in(self.owner.model, adapter, self.built.selection.layers)
        losses = self._align(number, updates) if align else []
        entry = {
            "round": number,
            "train_loss": sum(u.metrics["train_loss"] * u.samples for u in updates) / sum(u.samples for u in updates),
            "accuracy": self._measure(number),
            "alignment_loss": losses[-1] if losses else None,
            "silos": len(updates),
        }
        self.rounds.append(entry)
        log.info("round %d of %d: %s", number, total, json.dumps(entry))
        return adapter

    def _align(self, number: int, updates: list[Update]) -> list[float]:
        """Neuron-level distillation towards the FM that carries the round's adapter; sends out what changed."""
        section, proxy = self.config.alignment, self.built.proxy.model
        updated = least_active([counts for u in updates if (counts := u.inactivity)], section.updated_fraction)
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
            self.server.publish_patch(patch(proxy, updated, ffn_norms(proxy, list(updated))))
        record_gap(self.config, self.owner, self.built, f"round {number}, after")
        self.alignments.append({"stage": f"round {number}", "loss": losses})
        return losses

    def _measure(self, number: int) -> float | None:
        """Accuracy of the plugged-in FM after a round, where the configuration wants it measured."""
        section, test = self.config.evaluation, self.owner.test
        if test is None or not section.every_rounds or number % section.every_rounds:
            return None
        with self.record.timed("evaluation"):
            proxy, plugged_in = (
                evaluate(model, test, section.batch, section.samples_per_round).accuracy
                for model in (self.built.proxy.model, self.owner.model)
            )
        self.accuracy.append({"round": number, "proxy": proxy, "plugged_in": plugged_in})
        return plugged_in

    def _save_state(self, adapter: Adapter) -> None:
        """What `fedpft evaluate` and `fedpft plug-in` start from, beside the proxy directory."""
        proxy, compressed = self.built.proxy.model, self.built.proxy.compressed
        everything = {layer: torch.arange(ffn.neurons) for layer, ffn in enumerate(sub_ffns(proxy).values())}
        aligned = {layer: neurons for layer, neurons in everything.items() if layer in compressed}
        save_file(adapter, self.config.out / ADAPTER_FILE)
        save_file(patch(proxy, aligned, ffn_norms(proxy, compressed)), self.config.out / PATCH_FILE)

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
            "bytes": {"down": self.server.bytes_down, "up": self.server.bytes_up},
            "seconds": self.record.seconds,
            "rounds": self.rounds,
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
        return {
            "distillation": [curve for curve in (layer_level, *self.alignments) if curve["loss"]],
            "alignment": {
                "layers": gaps[0][1].layers if gaps else [],
                "stages": [{"stage": stage, **asdict(gap)} for stage, gap in gaps],
            },
            "saliency_kept": {
                "layers": list(range(len(selection.saliency))),
                "share": selection.saliency_kept,
            },
            "rounds": self.accuracy,
        }
