"""The owner's side before any silo is there: FM and public data in, proxy out."""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from fedpft import atomic, machine
from fedpft.config import ServerConfig
from fedpft.data.batches import EncodedDataset
from fedpft.data.chat import with_template
from fedpft.data.rows import are_large
from fedpft.data.samples import Samples
from fedpft.data.text import characters_per_token
from fedpft.digests import Digests, differences
from fedpft.errors import ConfigError, ModelError
from fedpft.evaluation import Gap, measure_gap
from fedpft.model import adapters, loading
from fedpft.model.architectures import architecture_of
from fedpft.model.compatibility import check_travels, make_fit
from fedpft.model.mapped import Shards, held, hold_on_disk
from fedpft.model.precision import dtype_of, name_of
from fedpft.model.streaming import place
from fedpft.parallel import ALONE, Ranks
from fedpft.progress import progress
from fedpft.proxy.bundle import Proxy, check_finite, load_proxy, save_bundle
from fedpft.proxy.cut import cut, in_memory
from fedpft.proxy.distillation import layer_level
from fedpft.proxy.holdings import check_holdings
from fedpft.proxy.journal import Journal
from fedpft.proxy.selection import Selection, load_selection, save_selection, select
from fedpft.proxy.widths import add_widths
from fedpft.server.identity import (
    JOURNAL,
    Contents,
    check_cut_from,
    check_unchanged,
    contents,
    kept_digests,
    label_list,
    proxy_files,
    settings,
)
from fedpft.server.outbox import BUNDLE_SUFFIXES, sendable
from fedpft.tasks import TASKS

log = logging.getLogger(__name__)

SELECTION = "selection.safetensors"
IN_USE = "proxy-in-use"  # in `out`: the weights of a proxy that stays on disk, as alignments change them


@dataclass(frozen=True)
class Owner:
    """What only the server has. `model` carries an untrained adapter, and so does the attention of a proxy cut from it.

    contents: of the files that all of it was read from.
    characters_per_token: of the public texts; 0.0 for images.
    untrained: the adapter with which the FM is what it was; None if part of its head was drawn, so that it was nothing.
    """

    model: nn.Module
    processor: Any
    labels: tuple[str, ...]
    public: EncodedDataset
    test: EncodedDataset | None
    contents: Contents
    characters_per_token: float
    untrained: adapters.Adapter | None


@dataclass
class Record:
    """What the making of a proxy has shown, kept beside it as record.json.

    Attributes:
        losses: of the layer-level distillation, one a step.
        gaps: (stage, gap between proxy and FM).
        seconds: by phase.
        model: digests of the files of the FM that it was cut from; empty if an earlier version made it.
        files: digests of the proxy directory's own other files; the same.
    """

    losses: list[float] = field(default_factory=list)
    gaps: list[tuple[str, Gap]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the body's time to a phase."""
        begun = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun


@dataclass(frozen=True)
class Built:
    """A proxy directory and what is in it: bundle/ is for the silos, the rest stays.

    files: digests of what was read, by name.
    """

    directory: Path
    proxy: Proxy
    selection: Selection
    record: Record
    files: dict[str, str] = field(default_factory=dict)

    @property
    def bundle(self) -> Path:
        """The files that the silos receive."""
        return self.directory / "bundle"


def load_owner(config: ServerConfig, digests: Digests) -> Owner:
    """Reads FM, labels, public and test data; every fault in them ends here, before a silo is bothered."""
    machine.prepare(config.device, config.threads)
    found = contents(config, digests)
    section, task = config.model, TASKS[config.model.task]
    labels = label_list(config)
    public = task.read_public(config.public_data, config.columns, config.encoding)
    tested = None
    if config.test_data is not None:
        tested = task.read_labelled(config.test_data, config.columns, labels, config.encoding)
    model, processor = load_fm(config, labels)
    adapters.attach(model, config.adapter, seed=config.seed)

    def encoded(samples: Samples, name: str) -> EncodedDataset:
        for warning in samples.warnings:
            log.warning("%s", warning)
        cache = config.out / "cache" / f"{name}.safetensors" if are_large(_files(samples.path)) else None
        dataset = task.encode(samples, processor, section.max_tokens, cache=cache)
        if dataset.cut:
            log.warning("%s", dataset.describe_cut(samples.path, section.max_tokens))
        return dataset

    test = None if tested is None else encoded(tested, "test")
    length = 0.0
    if task.has_tokens:
        length = characters_per_token(public.texts(), processor, seed=config.seed)
    untrained = None if model.is_drawn else adapters.extract(model)
    owner = Owner(model, processor, labels, encoded(public, "public"), test, found, length, untrained)
    check_unchanged(config, found, digests)
    return owner


def _files(data: Path) -> Iterable[Path]:
    return (data,) if data.is_file() else filter(Path.is_file, data.rglob("*"))


def load_fm(config: ServerConfig, labels: Sequence[str]) -> tuple[nn.Module, Any]:
    """The FM, and its tokenizer or image processor; ModelError if they are not fit for a federation."""
    section = config.model
    if not config.adapter.rank and not TASKS[section.task].head:
        raise ConfigError(f"adapter.rank is 0, and {section.task} has no head: nothing would train", "set it to 8, say")
    if config.distillation.logit_term and TASKS[section.task].head:
        raise ConfigError(
            f"distillation.logit_term is about a head that the FM has; for {section.task} it gets one that is yet to "
            "be trained",
            "set it to 0",
        )
    model = loading.load_model(
        section.path,
        section.task,
        labels,
        seed=config.seed,
        dtype=section.dtype,
        hold=section.hold,
        memory=machine.memory_bytes(config.device),
    )
    if config.proxy.widths and architecture_of(model).experts is not None:
        raise ModelError(
            f"proxy.widths: {section.path} is a mixture of experts, of whose proxy every silo has all",
            "leave widths out",
        )
    place(model, config.device, config.out)
    processor = loading.load_processor(section.path, section.task)
    if section.chat_template is not None:
        with_template(processor, section.chat_template)
    with tempfile.TemporaryDirectory() as received:
        check_travels(processor, section.task, Path(received))
        if odd := sorted(path.name for path in Path(received).iterdir() if not sendable(path)):
            raise ModelError(
                f"{section.path}: the tokenizer or image processor has a file {odd[0]}, which no silo is sent",
                f"save it as a tokenizer.json; what is sent are plain files: {', '.join(BUNDLE_SUFFIXES)}",
            )
    make_fit(model, processor, section.task, section.max_tokens)
    return model, processor


class Construction(BaseModel):
    """What rank 0 tells the others of the proxy that they are to make with it.

    directory: that it writes.
    about: as of its :class:`Journal`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: Path
    about: str


def build_proxy(config: ServerConfig, owner: Owner, directory: Path, ranks: Ranks = ALONE) -> Built:
    """Saliency, construction, layer-level distillation (method.md, sections 0 to 2); writes a proxy directory.

    record.json is written last: a directory without it is not whole, and :func:`load_built` refuses it.

    Args:
        ranks: this is rank 0; the others :func:`help_build`.

    Raises:
        ConfigError: there are other ranks, and nothing for them to do.
    """
    looks = config.proxy.importance in ("variance", "leverage")
    if ranks.size > 1 and not (looks or config.distillation.steps or config.distillation.closed_form_samples):
        raise ConfigError(
            "several processes share what looks at public_data, and here nothing does",
            "start one process, or set distillation.steps or closed_form_samples",
        )
    record = Record(model=owner.contents["model.path"])
    journal = Journal(directory / JOURNAL, about := _follows_from(config, owner, ranks))
    ranks.tell(Construction(directory=directory, about=about).model_dump_json())
    with record.timed("construction"):
        log.info("proxy.importance: %s: choosing neurons", config.proxy.importance)
        selection = select(owner.model, config.proxy, owner.public, seed=config.seed, journal=journal, ranks=ranks)
        check_holdings(selection, config.proxy)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "record.json").unlink(missing_ok=True)
        shutil.rmtree(directory / "bundle", ignore_errors=True)
        log.info("cutting the proxy")
        model, shards = _cut(config, owner, selection, directory / "bundle")
        compressed = tuple(student for student, _ in selection.matched)
        proxy = Proxy(model, owner.processor, config.model.task, owner.labels, config.model.max_tokens, compressed)
    built = Built(directory, proxy, selection, record)
    record_gap(config, owner, built, "cut")
    save_selection(selection, directory / SELECTION)
    with record.timed("distillation"):
        record.losses = _distil(config, owner, selection, model, journal, ranks)
    check_finite(model, "the layer-level distillation")
    if config.distillation.steps or config.distillation.closed_form_samples:
        record_gap(config, owner, built, "distilled")
    save_bundle(proxy, built.bundle, shards, turns=selection.turns)
    if config.proxy.widths:
        with record.timed("widths"):
            _add_widths(config, owner, selection, directory, journal, ranks)
    record.files = proxy_files(directory, Digests())
    atomic.write_text(directory / "record.json", json.dumps(asdict(record)))
    journal.clear()
    log.info("proxy written to %s", directory)
    return built


def help_build(config: ServerConfig, ranks: Ranks) -> None:
    """What a rank beside rank 0 has of :func:`build_proxy`: its parts of the samples. It writes nothing that stays.

    Raises:
        RankLost: rank 0 or another rank ended; any other as of :func:`load_owner`.
    """
    logging.getLogger().setLevel(logging.WARNING)  # rank 0 says the rest
    told = Construction.model_validate_json(ranks.tell())
    journal = Journal(told.directory / JOURNAL, told.about, is_own=False)
    owner = load_owner(config, kept_digests(config))
    selection = select(owner.model, config.proxy, owner.public, seed=config.seed, journal=journal, ranks=ranks)
    shutil.rmtree(own := config.out / f"{IN_USE}-{ranks.rank}", ignore_errors=True)
    model, _ = _cut(config, owner, selection, own)
    shutil.rmtree(own, ignore_errors=True)  # what is mapped stays, without a name, until the process ends
    _distil(config, owner, selection, model, journal, ranks)
    if config.proxy.widths:
        _add_widths(config, owner, selection, told.directory, journal, ranks)


def _distil(
    config: ServerConfig, owner: Owner, selection: Selection, model: nn.Module, journal: Journal, ranks: Ranks
) -> list[float]:
    """The layer-level distillation of a proxy's model, in place, alike on every rank; returns the loss of each step."""
    steps = config.distillation.steps if selection.matched else 0
    with progress("layer-level distillation", steps) as report:
        return layer_level(
            model,
            owner.model,
            selection.matched,
            owner.public,
            config.distillation,
            seed=config.seed,
            progress=report,
            layers=selection.layers,
            task=TASKS[config.model.task],
            journal=journal,
            ranks=ranks,
        )


def _add_widths(
    config: ServerConfig, owner: Owner, selection: Selection, directory: Path, journal: Journal, ranks: Ranks
) -> None:
    add_widths(
        directory / "bundle",
        config.proxy.widths,
        owner.model,
        selection,
        owner.public,
        config.distillation,
        config.adapter,
        seed=config.seed,
        device=config.device,
        scratch=directory / JOURNAL,
        journal=journal,
        ranks=ranks,
    )


def _cut(config: ServerConfig, owner: Owner, selection: Selection, files: Path) -> tuple[nn.Module, Shards | None]:
    """The proxy's model; if the FM is on disk, so is the proxy, in these files."""
    if held(owner.model) is None:
        return cut(owner.model, selection, in_memory), None
    shards = Shards(files)
    model = cut(owner.model, selection, shards.put)
    hold_on_disk(model, shards.held)
    place(model, config.device, config.out)
    return model, shards


def _follows_from(config: ServerConfig, owner: Owner, ranks: Ranks) -> str:
    """A digest of all that the making of a proxy follows from."""
    versions = [metadata.version(name) for name in ("fedpft", "torch", "transformers")]
    known = [settings(config), owner.contents, versions, *([ranks.size] if ranks.size > 1 else [])]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def load_built(config: ServerConfig, owner: Owner, directory: Path, digests: Digests) -> Built:
    """Reads a proxy directory and attaches an untrained adapter.

    Raises:
        ModelError: it is not whole, was changed since it was built, or was built from another FM or for another task.
    """
    record = read_record(directory)
    check_cut_from(config, directory, record.model, owner.contents["model.path"])
    files = proxy_files(directory, digests)
    check_as_built(directory, record, files)
    work = None
    if held(owner.model) is not None:
        shutil.rmtree(work := config.out / IN_USE, ignore_errors=True)
        work.mkdir(parents=True)
        check_unchanged(config, owner.contents, digests)  # while the proxy was cut from it, or since
    proxy = load_proxy(directory / "bundle", work)
    if work is not None:
        shutil.rmtree(work)  # what is mapped stays, without a name, until the process ends
    check_made_for(config, directory, proxy, dtype_of(owner.model))
    selection = load_selection(directory / SELECTION)
    check_holdings(selection, config.proxy)
    place(proxy.model, config.device, config.out)
    adapters.attach(proxy.model, config.adapter, seed=config.seed)
    return Built(directory, proxy, selection, record, files)


def check_made_for(config: ServerConfig, directory: Path, proxy: Proxy, dtype: torch.dtype) -> None:
    """Raises ModelError if a proxy is for another task, other labels or texts of another length, or of another type.

    Args:
        dtype: what the FM is held in.
    """
    section = config.model
    if (proxy.task, proxy.labels) != (section.task, label_list(config)):
        other = "another task" if proxy.task != section.task else f"other labels than {section.labels}"
        raise ModelError(f"{directory}: built for {other}", "build the proxy again")
    if TASKS[proxy.task].has_tokens and proxy.max_tokens != section.max_tokens:
        raise ModelError(
            f"{directory}: built for texts of {proxy.max_tokens} tokens, model.max_tokens is {section.max_tokens}",
            "set model.max_tokens to the proxy's, or build the proxy again",
        )
    if (held := dtype_of(proxy.model)) != dtype:
        raise ModelError(
            f"{directory}: built in {name_of(held)}, the FM is held in {name_of(dtype)}",
            f"set model.dtype: {name_of(held)}, or build the proxy again",
        )


def read_record(directory: Path) -> Record:
    """A proxy directory's record.json; ModelError if there is none."""
    try:
        raw = json.loads((directory / "record.json").read_text(encoding="utf-8"))
        gaps = [(stage, Gap.from_json(gap)) for stage, gap in raw["gaps"]]
        return Record(raw["losses"], gaps, raw["seconds"], dict(raw.get("model", {})), dict(raw.get("files", {})))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory}: not a whole proxy directory ({error})", "run fedpft build-proxy") from None


def check_as_built(directory: Path, record: Record, files: Mapping[str, str]) -> None:
    """Raises ModelError if a proxy directory's files are not those that its record names, if it names any."""
    if record.files and (what := differences(record.files, files)):
        raise ModelError(f"{directory}: is not as it was built: {what}", "restore it, or build the proxy again")


def record_gap(config: ServerConfig, owner: Owner, built: Built, stage: str) -> None:
    """Notes how far the proxy is from the FM now."""
    with built.record.timed("alignment_gap"):
        gap = measure(config, owner, built.proxy.model, built.selection)
    if gap is not None:
        built.record.gaps.append((stage, gap))


def measure(config: ServerConfig, owner: Owner, model: nn.Module, selection: Selection) -> Gap | None:
    """How far a proxy's model is from the FM; None without LoRA, without a compressed layer, or if nobody wants it."""
    samples = config.evaluation.gap_samples
    if not config.adapter.rank or not selection.matched or not samples:
        return None
    log.info("measuring the proxy's distance from the FM")
    task, pairs = TASKS[config.model.task], selection.matched
    seed, test = config.seed, owner.test
    return measure_gap(task, model, owner.model, pairs, owner.public, samples=samples, seed=seed, test=test)
