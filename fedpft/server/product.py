"""What a run comes to: what the plugged-in FM is worth beside what it is compared with, and the product's files."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpft import atomic
from fedpft.config import ServerConfig
from fedpft.data.batches import sample
from fedpft.evaluation import Difference, LogitOffset, Metrics, answers, difference, evaluate
from fedpft.model import adapters, loading
from fedpft.model.mapped import held
from fedpft.progress import progress
from fedpft.proxy.refinement import refine, scale_layers
from fedpft.server.construction import Built, Owner
from fedpft.tasks import TASKS

log = logging.getLogger(__name__)

SHOWN_ANSWERS = 5


@dataclass(frozen=True)
class Worth:
    """What was measured on the test data; nothing without any.

    metrics: row -> metric -> value.
    answers: row -> what it made of each test sample, as the task has it.
    gain: by how much the plugged-in FM is better than the tuned proxy.
    written: some of the test samples as they were answered in words: what was `asked` and what was `wanted`, and what
        each row wrote.
    """

    metrics: dict[str, Metrics] = field(default_factory=dict)
    answers: dict[str, list[Any]] = field(default_factory=dict)
    gain: Difference | None = None
    written: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Refined:
    """What the refinement after plug-in did.

    before: the FM's adapter as it was plugged in.
    layer_scales: of each of the proxy's layers, if that was wanted.
    losses: of each step.
    """

    before: adapters.Adapter
    layer_scales: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def refine_product(config: ServerConfig, owner: Owner, built: Built) -> Refined | None:
    """Refines the plugged-in FM's adapter, in place, as `plug_in` has it; None if there is nothing to do.

    FM and proxy carry the last round's adapter. It follows from that, the seed and the public data alone, so that a
    restarted server, `fedpft evaluate` and `fedpft plug-in` come to the same bits.
    """
    settings, selection, seed = config.plug_in, built.selection, config.seed
    # A proxy with all neurons is the FM: there the adapter does what it did.
    if not settings.is_on or not config.adapter.rank or not selection.matched:
        return None
    model, proxy = owner.model, built.proxy.model
    refined = Refined(adapters.extract(model))
    last = (len(selection.layers) - 1, selection.layers[-1])
    watched = tuple(dict.fromkeys((*selection.matched, last)))
    with built.record.timed("refinement"), progress("refinement after plug-in", settings.steps) as report:
        if settings.layer_scales:
            refined.layer_scales.extend(
                scale_layers(model, proxy, selection.layers, owner.public, batch=settings.batch, seed=seed)
            )
            log.info("scales of LoRA after plug-in: %s", " ".join(f"{scale:.3f}" for scale in refined.layer_scales))
        refined.losses.extend(
            refine(model, proxy, watched, TASKS[built.proxy.task], owner.public, settings, seed=seed, progress=report)
        )
    return refined


def measure_worth(config: ServerConfig, owner: Owner, built: Built, refined: Refined | None) -> Worth:
    """The rows that one federation fills: the FM as it was, if it has a head; the tuned proxy; the plugged-in FM.

    If the product was refined it is also measured as it was before.
    """
    test, section, task = owner.test, config.evaluation, TASKS[built.proxy.task]
    if test is None:
        return Worth()
    chosen = sample(len(test), section.written_samples, config.seed, "written")
    wanted = task.wanted(owner.processor, test, chosen)
    metrics = {} if task.baseline is None else {task.baseline[0]: task.baseline_score(test)}
    written = [{"asked": asked, "wanted": answer} for asked, answer in wanted]
    answered: dict[str, list[Any]] = {}
    everything = torch.arange(len(test))

    def measure(row: str, model: nn.Module) -> None:
        log.info("evaluation: %s", row)
        answered[row] = answers(task, model, test, section.batch, everything)
        metrics[row] = task.score(answered[row], test, everything)
        if wanted:
            texts = task.write(model, owner.processor, test, chosen, section.batch)
            metrics[row] |= task.score_written(texts, [answer for _, answer in wanted])
            for entry, text in zip(written, texts, strict=True):
                entry[row] = text

    if owner.untrained is not None:
        with _carrying(owner.model, owner.untrained):
            measure("zero_shot", owner.model)
    if not task.head:
        log.info("evaluation: proxy_zero_shot")
        with adapters.without_lora(built.proxy.model):
            metrics["proxy_zero_shot"] = evaluate(task, built.proxy.model, test, section.batch)
    measure("proxy", built.proxy.model)
    if section.logit_offset and not task.head:
        log.info("evaluation: logit_offset")
        metrics["logit_offset"] = evaluate(task, LogitOffset(owner.model, built.proxy.model), test, section.batch)
    if refined is not None:
        with _carrying(owner.model, refined.before):
            measure("plugged_in_raw", owner.model)
    measure("plugged_in", owner.model)
    gain = difference(task, answered["plugged_in"], answered["proxy"], test)
    return Worth(metrics, answered, gain, written[:SHOWN_ANSWERS])


@contextmanager
def _carrying(model: nn.Module, adapter: adapters.Adapter) -> Iterator[None]:
    tuned = adapters.extract(model)
    adapters.load(model, adapter)
    try:
        yield
    finally:
        adapters.load(model, tuned)


def save_product(owner: Owner, config: ServerConfig, out: Path) -> None:
    """The plugged-in FM as a PEFT adapter and merged; merging comes last, because it ends the adapter's life."""
    log.info("writing the product to %s", out)
    base = config.product.base_model_name or str(config.model.path)
    adapters.save_peft(owner.model, config.adapter, out / "adapter", base=base, task=config.model.task)
    owner.processor.save_pretrained(out / "adapter")
    if owner.test is not None:
        directory = out / "benchmark"
        for name, text in TASKS[config.model.task].benchmark(directory, owner.processor, owner.test).items():
            directory.mkdir(exist_ok=True)
            atomic.write_text(directory / name, text)
    if held(owner.model) is not None:
        loading.save_parts(owner.model, owner.processor, out / "merged", adapters.merged_parts(owner.model))
        return
    adapters.merge(owner.model)
    loading.save_model(owner.model, owner.processor, out / "merged")
