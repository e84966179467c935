"""The rounds of a run, from the first that is not closed: send out, average, plug in, align, measure.

A round passes through these steps. Each puts its result on disk and into the ledger before the next begins, and
follows from the results before it, the seed and the data alone; so a restarted server does the steps that have no
result yet, and comes to the same bits.

    begun          the ledger's row of the round           (FederationServer)
    updates        a file and a row for each               (FederationServer)
    averaged       rounds/<r>/optimizer.safetensors, if the server's optimizer has a state, then adapter.safetensors
    aligned        patches/patch-<n>, snapshot-<n>, and the journal's "alignment"
    closed         the journal's "round"; the updates are deleted, and the optimizer's state of the round before
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fedpft import faults
from fedpft.aggregation import server_optimizer
from fedpft.aggregation.server_optimizer import KEPT
from fedpft.config import RoundSettings, ServerConfig
from fedpft.data.batches import sample
from fedpft.errors import LedgerUnusable, QuorumLost
from fedpft.evaluation import Gap, evaluate
from fedpft.model import adapters
from fedpft.model.adapters import Adapter
from fedpft.model.subffn import sub_ffns
from fedpft.privacy import wholesilo
from fedpft.progress import progress
from fedpft.proxy.bundle import Proxy, apply_patch, patch
from fedpft.proxy.distillation import ffn_norms, neuron_level
from fedpft.proxy.updating import updated_neurons
from fedpft.server.construction import Built, Owner, record_gap
from fedpft.server.egress import Egress
from fedpft.server.ledger import Ledger
from fedpft.server.outcome import Outcome, Single, Sum
from fedpft.server.updates import Update
from fedpft.tasks import TASKS
from fedpft.wire.hello import Terms
from fedpft.wire.tensors import Group, read_tensors, write_tensors

log = logging.getLogger(__name__)


class Silos(Protocol):
    """The silos as the rounds see them, whatever way they are reached; each method as FederationServer's."""

    @property
    def bytes_down(self) -> int:
        """Payload bytes that went to them."""

    @property
    def bytes_up(self) -> int:
        """Payload bytes that came from them."""

    def start(self) -> object:
        """They can be reached."""

    def wait_for_silos(self) -> None:
        """Enough of them are there."""

    def run_round(self, round: int, *, count_inactivity: bool) -> list[Update] | Sum:
        """They train."""

    def updates(self, round: int) -> list[Update] | Sum:
        """What they trained."""

    def close_round(self) -> None:
        """Deletes it."""

    def publish_patch(self) -> int:
        """They train on another version of the proxy from now on."""

    def finish(self) -> None:
        """They can go."""

    def abort(self, reason: str) -> None:
        """They have to go."""

    def close(self) -> None:
        """They cannot be reached any more."""

    def curves(self) -> dict[str, Any]:
        """What report.html draws of them alone: who has what, where this side knows it."""


Reach = Callable[[ServerConfig, Path, RoundSettings, Ledger, Terms], Silos]  # arguments as of FederationServer


class Rounds:
    """Afterwards proxy and FM carry the last round's adapter.

    closed: for each closed round what the journal has of it.
    """

    def __init__(self, config: ServerConfig, owner: Owner, built: Built, ledger: Ledger, reach: Reach) -> None:
        """Brings proxy and FM to where the ledger says they were; CheckpointError if what it names is not there."""
        self.config, self.owner, self.built, self.record, self.ledger = config, owner, built, built.record, ledger
        settings = RoundSettings(
            seed=config.seed,
            adapter=config.adapter,
            training=config.training,
            inactive_below=config.alignment.inactive_below,
            label_diversity=config.aggregation.asks_for_diversity,
            secure_aggregation=config.secure_terms,
        )
        self.closed: list[dict[str, Any]] = ledger.recorded("round")
        self._earlier = self.closed[-1]["bytes"] if self.closed else {"down": 0, "up": 0}
        self._egress = Egress(built.bundle, adapters.extract(built.proxy.model))
        self._restore()
        proxy = built.proxy
        secure, agreed = config.federation.secure_aggregation, config.secure_terms
        private = None if agreed is None else agreed.silo_privacy
        terms = Terms(proxy.task, proxy.labels, proxy.max_tokens, owner.characters_per_token, secure, private)
        if agreed is not None and private is not None:
            values = adapters.trained_values(proxy.model, frozen_a=config.training.frozen_a)
            log.info("%s", wholesilo.describe(agreed, values))
        self._silos = reach(config, built.bundle, settings, ledger, terms)

    def complete(self) -> Adapter:
        """Runs what is left of the rounds, and tells the silos that it is over; returns the last adapter.

        Raises:
            KeyboardInterrupt, QuorumLost, LedgerUnusable, OSError of a disk: the silos are not told, because the run
                can be gone on with: they keep trying to reach the server.
        """
        try:
            self._silos.start()
            self._run(self.config.training.rounds)
        finally:
            with faults.tidying("the server's port"):
                self._silos.close()
        return self._adapter(self.config.training.rounds)

    def _run(self, total: int) -> None:
        try:
            if len(self.closed) < total:
                with self.record.timed("enrolment"):
                    self._silos.wait_for_silos()
            for number in range(len(self.closed) + 1, total + 1):
                self._round(number)
            self._delete_passing(total)
            self._silos.finish()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | QuorumLost | LedgerUnusable) or faults.is_of_the_disk(error):
                log.warning(
                    "stopped with %d of %d rounds closed; the same command goes on from there", len(self.closed), total
                )
            else:
                with faults.tidying("the silos' farewell"):
                    self._silos.abort(f"the server stopped: {type(error).__name__}")
            raise

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
            if KEPT[self.config.aggregation.optimizer] and len(self.closed) < self.config.training.rounds:
                self._optimizer_file()  # a torn one ends the start here
            self.record.seconds |= self.closed[-1]["seconds"]
            log.info("going on after round %d of %d", len(self.closed), self.config.training.rounds)
        elif not self.ledger.entered(untrained := self.ledger.adapter_path(0)):
            self._save(untrained, "adapter", adapters.extract(proxy))

    def _save(self, path: Path, group: Literal["adapter", "patch"], tensors: dict[str, Tensor]) -> None:
        self._egress.write(path, group, tensors)
        self.ledger.enter_file(path)

    def _adapter(self, round: int) -> Adapter:
        return read_tensors(self.ledger.verified(self.ledger.adapter_path(round)).path, "adapter")

    def _load(self, adapter: Adapter) -> None:
        adapters.load(self.built.proxy.model, adapter)
        selection = self.built.selection
        adapters.plug_in(self.owner.model, adapter, selection.layers, selection.neurons)

    def _round(self, number: int) -> None:
        every, total = self.config.alignment.every_rounds, self.config.training.rounds
        # Nobody would train on what an alignment after the last round changes.
        align = bool(every and self.built.selection.matched) and number % every == 0 and number < total
        path = self.ledger.adapter_path(number)
        with self.record.timed("rounds"):
            if self.ledger.entered(path):
                outcome = _outcome(self._silos.updates(number))
            else:
                counted = align and self.config.alignment.asks_silos
                outcome = _outcome(self._silos.run_round(number, count_inactivity=counted))
                self._save(path, "adapter", self._aggregated(number, outcome))
        self._load(self._adapter(number))
        alignment_loss = self._align(number, outcome) if align else None
        scores = self._measure(number)
        entry = {
            "round": number,
            "train_loss": outcome.train_loss(),
            "score": scores and scores["plugged_in"],
            "alignment_loss": alignment_loss,
            "silos": outcome.silos,
            "silo_seconds": outcome.silo_seconds(),
            **outcome.summed(),
        }
        closed = {
            "entry": entry,
            "scores": scores,
            "data": outcome.told(),
            "seconds": self.record.seconds,
            "bytes": self.traffic(),
        }
        self.ledger.record("round", number, closed)
        self.closed.append(closed)
        self._delete_passing(number)
        log.info("round %d of %d: %s", number, total, json.dumps(entry))

    def _aggregated(self, number: int, outcome: Outcome) -> Adapter:
        """The adapter after a round. The state of the server's optimizer that goes with it is on disk then."""
        section, ledger = self.config.aggregation, self.ledger
        mean = outcome.mean(section, self.config.training.batch)
        if self.closed:
            moments = {moment: read_tensors(self._optimizer_file(), moment) for moment in KEPT[section.optimizer]}
        else:
            moments = server_optimizer.beginning(mean, section)
        adapter, moments = server_optimizer.step(outcome.start_tensor, mean, moments, section)
        if moments:
            path, groups = ledger.optimizer_path(number), dict[Group, Adapter](moments.items())
            write_tensors(path, groups)
            ledger.enter_file(path)
        return adapter

    def _optimizer_file(self) -> Path:
        """What the server's optimizer carries from the last closed round into the next."""
        return self.ledger.verified(self.ledger.optimizer_path(len(self.closed))).path

    def _delete_passing(self, number: int) -> None:
        """Once a round is closed: its updates, and the optimizer's states but the one with which the next begins."""
        self._silos.close_round()
        for path in self.ledger.out.glob("rounds/*/optimizer.safetensors"):
            if path != self.ledger.optimizer_path(number) or number == self.config.training.rounds:
                path.unlink()

    def _align(self, number: int, outcome: Outcome) -> float | None:
        """Neuron-level distillation towards the FM that carries the round's adapter; sends out what changed.

        Returns:
            The last step's loss; None if there was no step, or no silo shares its inactivity counts.
        """
        done = {entry["round"]: entry for entry in self.ledger.recorded("alignment")}
        if number not in done:
            counts = outcome.inactivity()
            if not counts and self.config.alignment.asks_silos:
                log.warning("round %d: no silo shares its inactivity counts, so the proxy stays as it is", number)
                return None
            done[number] = self._aligned(number, counts)
        losses = done[number]["loss"]
        return losses[-1] if losses else None

    def _aligned(self, number: int, counts: list[dict[str, Tensor]]) -> dict[str, Any]:
        section, proxy, ledger = self.config.alignment, self.built.proxy.model, self.ledger
        matched, public, seed = self.built.selection.matched, self.owner.public, self.config.seed
        known = len(self.record.gaps)
        record_gap(self.config, self.owner, self.built, f"round {number}, before")
        title = f"neuron-level distillation after round {number}"
        with self.record.timed("alignment"), progress(title, section.steps) as report:
            updated = updated_neurons(
                proxy, self.owner.model, matched, public, section, counts, seed=seed, round=number
            )
            losses = neuron_level(
                proxy,
                self.owner.model,
                matched,
                updated,
                public,
                section,
                seed=seed,
                round=number,
                progress=report,
                layers=self.built.selection.layers,
            )
        record_gap(self.config, self.owner, self.built, f"round {number}, after")
        version = len(ledger.recorded("alignment")) + 1
        self._save(ledger.patch_path(version), "patch", patch(proxy, updated, ffn_norms(proxy, list(updated))))
        self._save(ledger.snapshot_path(version), "patch", snapshot(self.built.proxy))
        gaps = [(stage, asdict(gap)) for stage, gap in self.record.gaps[known:]]
        entry = {"round": number, "loss": losses, "gaps": gaps}
        ledger.record("alignment", number, entry)
        self._silos.publish_patch()
        ledger.snapshot_path(version - 1).unlink(missing_ok=True)
        return entry

    def _measure(self, number: int) -> dict[str, float] | None:
        """The headline of proxy and plugged-in FM after a round, where the configuration wants it measured."""
        section, test, task = self.config.evaluation, self.owner.test, TASKS[self.config.model.task]
        if test is None or not section.every_rounds or number % section.every_rounds:
            return None
        models = {"proxy": self.built.proxy.model, "plugged_in": self.owner.model}
        chosen = sample(len(test), section.samples_per_round, self.config.seed, "test")  # the same in every round
        with self.record.timed("evaluation"):
            found = {name: evaluate(task, model, test, section.batch, chosen) for name, model in models.items()}
        return {name: metrics[task.headline.name] for name, metrics in found.items()}

    def silos_data(self) -> dict[str, dict[str, int]]:
        """What each silo told of its data: the samples that it enrolled with, at most, and COUNTS if it shares them."""
        told = {silo: counts for closed in self.closed for silo, counts in closed["data"].items()}
        enrolled = {entry["silo"]: entry["samples"] for entry in self.ledger.recorded("enrolled")}
        return {silo: counts | {"samples": enrolled[silo]} for silo, counts in told.items() if silo in enrolled}

    def silos_curves(self) -> dict[str, Any]:
        """What there is to draw of the silos beside that."""
        return self._silos.curves()

    def traffic(self) -> dict[str, int]:
        """Payload bytes of the run; what a killed process moved since its last closed round is not in it."""
        down, up = self._silos.bytes_down, self._silos.bytes_up
        return {"down": self._earlier["down"] + down, "up": self._earlier["up"] + up}


def snapshot(proxy: Proxy) -> dict[str, Tensor]:
    """All that alignments ever change, as it is now: a patch for any version of the proxy."""
    model, neurons = proxy.model, {}
    for layer, ffn in enumerate(sub_ffns(model).values()):
        if layer in proxy.compressed:
            neurons[layer] = torch.arange(ffn.neurons)
    return patch(model, neurons, ffn_norms(model, proxy.compressed))


def _outcome(found: list[Update] | Sum) -> Outcome:
    return found if isinstance(found, Sum) else Single(found)
