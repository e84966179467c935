"""`fedpft leakage`: a federation is rehearsed, attacked, and what came of it written down.

DIR/rehearsal/        the federation, and its updates (rehearsal.py); a run that was stopped goes on from there
DIR/width-W/          others, with proxies of W times as many neurons
DIR/leakage.json, DIR/leakage.html
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpft import machine
from fedpft.config import SimulationConfig, dump
from fedpft.data.batches import EncodedDataset, sample
from fedpft.data.samples import Samples
from fedpft.digests import Digests
from fedpft.errors import ConfigError
from fedpft.leakage import labels, membership, shadows, tokens
from fedpft.leakage.labels import LabelReader
from fedpft.leakage.membership import Candidates, Scores
from fedpft.leakage.owner import Held, Thief
from fedpft.leakage.rehearsal import Rehearsal, rehearse
from fedpft.leakage.report import write
from fedpft.leakage.scores import Finding
from fedpft.leakage.shadows import Shadow
from fedpft.model.adapters import Adapter
from fedpft.model.architectures import in_head
from fedpft.proxy.bundle import mean_neurons
from fedpft.server.construction import load_owner
from fedpft.silo.learner import Learner
from fedpft.simulation.data import WAY_OUT
from fedpft.tasks import TASKS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        held_out: share of each silo's rows that it does not train on.
        rows: that membership is asked of, of all silos together, as many as there are at most.
        shadows: that are trained.
        small: updates of one step that texts are sought in.
        widths: sizes of the proxy, in units of the configured K, each a federation of its own; without any the owner's
            side is left out.
        epochs: that a thief tunes.
    """

    held_out: float = 0.25
    rows: int = 800
    shadows: int = 6
    small: int = 20
    widths: tuple[float, ...] = (0.5, 1.0)
    epochs: float = 2.0


FULL = Effort()
QUICK = Effort(rows=200, shadows=2, small=4, widths=(1.0,), epochs=1.0)


def leak(config: SimulationConfig, directory: Path, effort: Effort = FULL) -> dict[str, Any]:
    """Measures, and writes the report; returns what is in leakage.json.

    Raises:
        ConfigError: there is no test data, by which the owner's side is measured and shadows are trained.
        FedPFTError: as of `simulate`.
    """
    if config.test_data is None:
        raise ConfigError("fedpft leakage needs test_data", "name a labelled file there that no silo has")
    machine.prepare(config.device, config.threads)
    seconds: dict[str, float] = {}
    with _timed(seconds, "federation"):
        main = rehearse(config, directory / "rehearsal", effort.held_out)
    with tempfile.TemporaryDirectory() as scratch:
        findings = _attacks(main, effort, Path(scratch), seconds)
    held = _held(config, main, directory, effort, seconds)
    found = {
        "task": config.model.task,
        "finished": False,
        "silos": len(main.data.sizes),
        "findings": [asdict(each) for each in findings],
        "held": [each.to_json() for each in held],
        "effort": asdict(effort),
        "seconds": seconds,
        "versions": main.summary["versions"],
        "seed": config.seed,
        "config": dump(config),
    }
    return write(found, directory)


def first_updates(config: SimulationConfig, directory: Path, effort: Effort = FULL) -> list[Finding]:
    """Only what the first round's updates tell of labels and tokens; the federation goes no further."""
    machine.prepare(config.device, config.threads)
    run = rehearse(config, directory / "rehearsal", effort.held_out, rounds=1)
    learner = Learner(run.bundle, run.settings, run.config.device)
    rows = _Rows(run, learner, effort)
    with tempfile.TemporaryDirectory() as scratch:
        known = shadows.train(learner, run.config, run.rounds[0], rows.labelled, effort.shadows, Path(scratch))
    return _what_it_has(run, learner, rows, known)


class _Rows:
    """The rehearsal's data as the proxy takes it."""

    def __init__(self, run: Rehearsal, learner: Learner, effort: Effort) -> None:
        config, task = run.config, learner.task
        assert config.test_data is not None
        self._run, self._learner = run, learner
        self.labelled = task.read_labelled(config.test_data, config.columns, learner.proxy.labels, config.encoding)
        every = task.read_public(config.public_data, config.columns, config.encoding)
        self.public_texts = self.encoded(every)
        self.public = self.encoded(every.subset(membership.few_public(self.public_texts, config.seed)))
        trained = {update.silo for observed in run.rounds for update in observed.updates}
        self.silos = {silo: run.data.samples(silo) for silo in sorted(trained)}
        total = sum(len(samples) for samples in self.silos.values())
        share = min(1.0, effort.rows * (1.0 - effort.held_out) / total)
        self.candidates = {
            silo: Candidates(self._some(samples, share), self._some(run.data.held_out(silo), share))
            for silo, samples in self.silos.items()
        }

    def encoded(self, samples: Samples) -> EncodedDataset:
        """Rows that cannot be used were left out when they were read."""
        proxy = self._learner.proxy
        bad_rows = self._run.config.simulation.bad_rows
        return self._learner.task.encode(samples, proxy.processor, proxy.max_tokens, bad_rows=bad_rows, way_out=WAY_OUT)

    def _some(self, samples: Samples, share: float) -> EncodedDataset:
        chosen = sample(len(samples), max(1, round(share * len(samples))), self._run.config.seed, "leakage, candidates")
        return self.encoded(samples.subset(chosen))


def _attacks(run: Rehearsal, effort: Effort, scratch: Path, seconds: dict[str, float]) -> list[Finding]:
    """Of server and silos, against the silos. The first round is read for labels and tokens, the last for texts."""
    learner = Learner(run.bundle, run.settings, run.config.device)
    rows = _Rows(run, learner, effort)
    first, last = run.rounds[0], run.rounds[-1]
    findings: list[Finding] = []
    scores: dict[str, Scores] = {}
    for observed in run.rounds:
        if observed.snapshot is not None and observed.version != learner.version:
            learner.bring_to(observed.version, observed.snapshot)
        if observed is first:
            with _timed(seconds, "shadows"):
                log.info("training %d shadows", effort.shadows)
                known = shadows.train(learner, run.config, observed, rows.labelled, effort.shadows, scratch)
            with _timed(seconds, "labels and tokens"):
                findings += _what_it_has(run, learner, rows, known)
        with _timed(seconds, "membership"):
            log.info("membership, round %d", observed.number)
            membership.score_round(learner, run.config, observed, rows.candidates, rows.public, scores)
        if observed is last and run.config.adapter.rank and TASKS[run.config.model.task].has_tokens:
            with _timed(seconds, "texts"):
                log.info("texts from updates of one step")
                findings += tokens.spans(learner, run.config, observed, rows.labelled, effort.small, scratch)
    return findings + membership.findings(list(scores.values()))


def _what_it_has(run: Rehearsal, learner: Learner, rows: _Rows, known: list[Shadow]) -> list[Finding]:
    """Labels and tokens of each silo of the first round."""
    first, config = run.rounds[0], run.config
    trained, mean = {update.silo: update.adapter for update in first.updates}, first.mean(config)
    findings: list[Finding] = []
    if learner.task.head and all(shadows.has_classes(each) for each in (rows.labelled, *rows.silos.values())):
        log.info("label shares")
        reader = LabelReader(_head(learner, first.start), first.start, known)
        truth = [shadows.class_shares(rows.silos[silo]) for silo in trained]
        public = shadows.class_shares(rows.labelled)
        findings += labels.findings("single updates", [reader.read(each) for each in trained.values()], truth, public)
        findings += labels.findings("sums", [reader.read(mean)] * len(truth), truth, public)
    if config.adapter.rank and learner.task.has_tokens and not config.training.frozen_a:
        log.info("tokens")
        texts = {silo: tokens.vocabulary([rows.encoded(rows.silos[silo])]) for silo in trained}
        public_words = tokens.vocabulary([rows.public_texts, rows.encoded(rows.labelled)])
        findings += tokens.occurrence(learner, first.start, trained, mean, known, texts, public_words)
    return findings


def _head(learner: Learner, adapter: Adapter) -> list[str]:
    """The tensors with a row for each class."""
    model, classes = learner.proxy.model, len(learner.proxy.labels)
    return [name for name in sorted(adapter) if in_head(model, name) and adapter[name].shape[0] == classes]


def _held(
    config: SimulationConfig, main: Rehearsal, directory: Path, effort: Effort, seconds: dict[str, float]
) -> list[Held]:
    """For each width, smallest first."""
    if not effort.widths:
        return []
    runs: dict[float, Rehearsal] = {1.0: main}
    configured = mean_neurons(main.bundle)
    for width in effort.widths:
        if width not in runs:
            proxy = config.proxy.model_copy(update={"neurons": max(1, round(width * configured))})
            place = directory / f"width-{width:g}"
            log.info("a federation with %d neurons in a compressed layer", proxy.neurons)
            with _timed(seconds, f"federation, width {width:g}"):
                other = config.model_copy(update={"proxy": proxy, "proxy_path": None})
                runs[width] = rehearse(other, place, effort.held_out)
            shutil.rmtree(place / "observed")
    with _timed(seconds, "thief"):
        log.info("a thief tunes FM and proxies")
        owner = load_owner(main.config, Digests())
        rows = TASKS[config.model.task].encode(
            main.data.all_held_out(),
            owner.processor,
            config.model.max_tokens,
            bad_rows=config.simulation.bad_rows,
            way_out=WAY_OUT,
        )
        thief, headline = Thief(main.config, owner, rows, effort.epochs), TASKS[config.model.task].headline.name
        held = []
        for width in sorted(effort.widths):
            summary = runs[width].summary
            proxy, model = (summary["metrics"][row][headline] for row in ("proxy", "plugged_in"))
            held.append(thief.held(runs[width].bundle, summary["holdings"], (proxy, model)))
        return held


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - begun
