"""The owner's side before any silo is there: FM and public data in, proxy out."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedpft import adapters, atomic, machine, models
from fedpft.config import ServerConfig
from fedpft.datasets import EncodedDataset, encode, read_label_list, read_labelled, read_unlabelled
from fedpft.distillation import layer_level
from fedpft.errors import ModelError
from fedpft.evaluation import Gap, measure_gap
from fedpft.progress import progress
from fedpft.proxy import Proxy, Selection, cut, load_proxy, load_selection, save_bundle, save_selection, select

log = logging.getLogger(__name__)

GAP_SAMPLES = 16  # public samples on which proxy and FM are compared


@dataclass(frozen=True)
class Owner:
    """What only the server has. `model` carries an untrained adapter, and so does every proxy cut from it."""

    model: nn.Module
    processor: Any
    labels: tuple[str, ...]
    public: EncodedDataset
    test: EncodedDataset | None


@dataclass
class Record:
    """What the making of a proxy has shown, kept beside it as record.json.

    Attributes:
        losses: of the layer-level distillation, one a step.
        gaps: (stage, gap between proxy and FM).
        seconds: by phase.
    """

    losses: list[float] = field(default_factory=list)
    gaps: list[tuple[str, Gap]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the body's time to a phase."""
        begun = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun


@dataclass(frozen=True)
class Built:
    """A proxy directory and what is in it: bundle/ is for the silos, the rest stays."""

    directory: Path
    proxy: Proxy
    selection: Selection
    record: Record

    @property
    def bundle(self) -> Path:
        """The files that the silos receive."""
        return self.directory / "bundle"


def load_owner(config: ServerConfig) -> Owner:
    """Reads FM, labels, public and test data; every fault in them ends here, before a silo is bothered."""
    machine.prepare(config.device, config.threads)
    section = config.model
    labels = read_label_list(section.labels)
    public = read_unlabelled(config.public_data, config.columns, section.task)
    tested = None
    if config.test_data is not None:
        tested = read_labelled(config.test_data, config.columns, section.task, labels)
    model = models.load_model(section.path, section.task, labels, seed=config.seed).to(config.device)
    processor = models.load_processor(section.path, section.task)
    models.pad_alike(model, processor)
    adapters.attach(model, config.adapter, seed=config.seed)

    def encoded(inputs: list[str], classes: Tensor | None) -> EncodedDataset:
        return encode(inputs, classes, processor, section.task, section.max_tokens)

    test = None if tested is None else encoded(tested.inputs, tested.labels)
    return Owner(model, processor, labels, encoded(public, None), test)


def build_proxy(config: ServerConfig, owner: Owner, directory: Path) -> Built:
    """Saliency, construction, layer-level distillation (method.md, sections 0 to 2); writes a proxy directory.

    record.json is written last: a directory without it is not whole, and :func:`load_built` refuses it.
    """
    (directory / "record.json").unlink(missing_ok=True)
    record = Record()
    with record.timed("construction"):
        selection = select(owner.model, config.proxy)
        model = cut(owner.model, selection)
        compressed = tuple(student for student, _ in selection.matched)
        proxy = Proxy(model, owner.processor, config.model.task, owner.labels, config.model.max_tokens, compressed)
    built = Built(directory, proxy, selection, record)
    record_gap(config, owner, built, "cut")
    steps = config.distillation.steps if selection.matched else 0
    with record.timed("distillation"), progress("layer-level distillation", steps) as report:
        record.losses = layer_level(
            model,
            owner.model,
            selection.matched,
            owner.public,
            config.distillation,
            seed=config.seed,
            progress=report,
        )
    if config.distillation.steps or config.distillation.closed_form_samples:
        record_gap(config, owner, built, "distilled")
    save_bundle(proxy, built.bundle)
    save_selection(selection, directory / "selection.safetensors")
    atomic.write_text(directory / "record.json", json.dumps(asdict(record)))
    log.info("proxy written to %s", directory)
    return built


def load_built(config: ServerConfig, directory: Path) -> Built:
    """Reads a proxy directory and attaches an untrained adapter; ModelError if it is not whole or not for this task."""
    try:
        raw = json.loads((directory / "record.json").read_text(encoding="utf-8"))
        gaps = [(stage, Gap.from_json(gap)) for stage, gap in raw["gaps"]]
        record = Record(raw["losses"], gaps, raw["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory}: not a whole proxy directory ({error})", "run fedpft build-proxy") from None
    proxy = load_proxy(directory / "bundle")
    if proxy.labels != read_label_list(config.model.labels):
        raise ModelError(f"{directory}: built for other labels than {config.model.labels}", "build the proxy again")
    proxy.model.to(config.device)
    adapters.attach(proxy.model, config.adapter, seed=config.seed)
    return Built(directory, proxy, load_selection(directory / "selection.safetensors"), record)


def record_gap(config: ServerConfig, owner: Owner, built: Built, stage: str) -> None:
    """Notes how far the proxy is from the FM now."""
    with built.record.timed("alignment_gap"):
        gap = measure(config, owner, built.proxy.model, built.selection)
    if gap is not None:
        built.record.gaps.append((stage, gap))


def measure(config: ServerConfig, owner: Owner, model: nn.Module, selection: Selection) -> Gap | None:
    """How far a proxy's model is from the FM; None if there is no LoRA or no compressed layer to measure."""
    if not config.adapter.rank or not selection.matched:
        return None
    return measure_gap(model, owner.model, selection.matched, owner.public, samples=GAP_SAMPLES, seed=config.seed)
