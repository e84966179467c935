"""What the rounds of a run have on disk: what each starts from, what arrived for it, and the ledger's row of it.

It is the same whatever way the silos are reached: over the wire, or in a simulation.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from fedpft.config import RoundSettings, ServerConfig
from fedpft.federation import Federation, Open, StartAttempt, StartRound, StartStage, Substitute
from fedpft.privacy.fixedpoint import Layout
from fedpft.server.inbox import Inbox
from fedpft.server.ledger import Ledger, RoundRow
from fedpft.server.outcome import Sum
from fedpft.server.updates import Update
from fedpft.wire.tensors import write_tensors
from fedpft.wire.transfer import Payload


def federation_of(config: ServerConfig, *, simulated: bool = False) -> Federation:
    """The state machine of a run, at its beginning; simulated silos need no stages to add up."""
    section, terms = config.federation, config.secure_terms
    return Federation(
        section.silos,
        min_silos=section.min_silos,
        sample_fraction=section.sample_fraction,
        fewest=config.fewest_updates,
        seed=config.seed,
        threshold=terms.threshold if terms is not None and not simulated else None,
    )


class RoundFiles:
    """One round is open at a time.

    inbox: where updates arrive.
    open_round: the round that takes updates; None before the first.
    adapter: the one that it starts from.
    patch, snapshot: to the present version of the proxy, from the one before and from any; None for version 0.
    """

    def __init__(self, config: ServerConfig, bundle: Path, settings: RoundSettings, ledger: Ledger) -> None:
        """Raises ModelError if the bundle is none."""
        self._ledger, self._terms = ledger, config.secure_terms
        self.inbox = Inbox(
            bundle,
            ledger,
            training=settings.training,
            max_norm=config.federation.max_update_norm,
            secure=self._terms is not None,
        )
        self.open_round: int | None = None
        self.adapter: Payload | None = None
        self.patch: Payload | None = None
        self.snapshot: Payload | None = None

    def resume(self, federation: Federation) -> frozenset[str]:
        """Puts state machine and files where the ledger says the run stopped; returns the silos that were there.

        A round that was open is open again, with one attempt more.

        Raises:
            CheckpointError: what a former process left is torn or changed.
        """
        version = len(self._ledger.recorded("alignment"))
        if version:
            self.put_patch(version)
        last = self._ledger.last_round()
        if last is None:
            return frozenset()
        attempt = last.attempt + 1
        counted: dict[int, list[str]] = {}
        for row in self._ledger.updates():
            counted.setdefault(row.round, []).append(row.silo)
        sums = {each["round"]: each for each in self._ledger.recorded("sum")}
        counted |= {round: each["silos"] for round, each in sums.items()}
        aggregated = self._ledger.entered(self._ledger.adapter_path(last.round))
        if last.round in sums and (not aggregated or self._ledger.sum_path(last.round).exists()):
            self.open(last.round, count_inactivity=last.count_inactivity)
            aggregated = True
        elif not aggregated:
            last = dataclasses.replace(last, silos=self._bound(last))
            self._ledger.begin_round(dataclasses.replace(last, attempt=attempt))
            self.open(last.round, count_inactivity=last.count_inactivity)
            self.updates(last.round)  # a torn one ends the start here
        federation.resume(
            StartRound(last.round, attempt, last.silos),
            present=last.present,
            counted=counted,
            proxy_version=version,
            aggregated=aggregated,
            lost=[
                silo for each in self._ledger.recorded("lost") if each["round"] == last.round for silo in each["silos"]
            ],
        )
        return frozenset(last.present)

    def _bound(self, last: RoundRow) -> tuple[str, ...]:
        """The silos of the round that goes on: if some may have helped to open its sum, those whose sum that was."""
        stages = {
            each["stage"]: tuple(each["silos"])
            for each in self._ledger.recorded("stage")
            if (each["round"], each["attempt"]) == (last.round, last.attempt)
        }
        return stages["signatures"] if "reveals" in stages else last.silos

    def open(self, round: int, *, count_inactivity: bool) -> None:
        """From now on the round takes updates; it starts from the adapter of the one before."""
        self.adapter = self._ledger.verified(self._ledger.adapter_path(round - 1))
        self.inbox.open_round(round, self.adapter.path, count_inactivity=count_inactivity)
        self.open_round = round

    def enter(self, picked: StartRound | Substitute | StartAttempt, present: Collection[str]) -> None:
        """The silos of the open round, out of those that are present."""
        self._ledger.begin_round(
            RoundRow(
                picked.round,
                picked.attempt,
                picked.silos,
                tuple(sorted(present)),
                count_inactivity=self.inbox.counts_inactivity,
            )
        )

    @property
    def layout(self) -> Layout:
        """What is where in the vectors of the open round's silos."""
        return self.inbox.opened_with()[1]

    def record_stage(self, action: StartStage) -> None:
        """A stage of an attempt at the round's sum."""
        entry = {"attempt": action.attempt, "stage": action.stage.name.lower(), "silos": action.silos}
        self._ledger.record("stage", action.round, {"round": action.round, **entry})

    def keep_sum(self, action: Open, words: Tensor) -> None:
        """The sum of a round, which it has from now on, whatever happens to this process."""
        path = self._ledger.sum_path(action.round)
        write_tensors(path, {"sum": {"words": words}})
        self._ledger.enter_file(path)
        entry = {"round": action.round, "attempt": action.attempt, "silos": action.silos}
        self._ledger.record("sum", action.round, entry)

    def sum(self, round: int) -> Sum | None:
        """What `keep_sum` has kept; None if it has not, or the round is closed."""
        kept = [each for each in self._ledger.recorded("sum") if each["round"] == round]
        if not kept or self._terms is None:
            return None
        path = self._ledger.verified(self._ledger.sum_path(round)).path
        start, layout = self.inbox.opened_with()
        return Sum(path, start, layout, self._terms, len(kept[-1]["silos"]))

    def close_round(self) -> None:
        """Deletes what there is of a round's silos; the ledger keeps who sent what."""
        self.inbox.close_round()
        for path in self._ledger.out.glob("rounds/*/sum.safetensors"):
            path.unlink()

    def lose(self, round: int, silos: Collection[str]) -> None:
        """The round has lost its quorum, for want of these silos."""
        self._ledger.record("lost", round, {"round": round, "silos": sorted(silos)})

    def updates(self, round: int) -> list[Update]:
        """The updates that a round counts, in the order of the silos' names; read until the round is closed."""
        return self.inbox.updates(round, self._ledger.adapter_path(round - 1))

    def put_patch(self, version: int) -> None:
        """The proxy has this version now, which the ledger has."""
        self.patch = self._ledger.verified(self._ledger.patch_path(version))
        self.snapshot = self._ledger.verified(self._ledger.snapshot_path(version))
