"""Proxies of several sizes out of one: the output weights of each are refitted for the neurons that it has.

A narrow proxy is the whole one without the neurons that matter least, whose output weights were fitted together with
theirs. Refitted for what is left they come nearer to the FM; what that changes is sent to the silos beside the proxy.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from fedpft.config import AdapterSection, DistillationSection
from fedpft.data.batches import EncodedDataset
from fedpft.errors import ModelError
from fedpft.model import adapters, loading
from fedpft.model.mapped import MappedTensors, held, release
from fedpft.model.precision import wide
from fedpft.model.streaming import place
from fedpft.parallel import ALONE, Ranks
from fedpft.proxy.bundle import DESCRIPTION, Proxy, check_finite, load_proxy
from fedpft.proxy.corrections import REFITTED, save_correction
from fedpft.proxy.distillation import layer_level
from fedpft.proxy.journal import Journal
from fedpft.proxy.selection import Selection

log = logging.getLogger(__name__)


def add_widths(
    bundle: Path,
    widths: Sequence[float],
    model: nn.Module,
    selection: Selection,
    public: EncodedDataset,
    settings: DistillationSection,
    adapter: AdapterSection,
    *,
    seed: int,
    device: str,
    scratch: Path,
    journal: Journal,
    ranks: Ranks = ALONE,
) -> None:
    """Refits the proxy of a bundle for each width, writes what that changes into the bundle, and announces the widths.

    Args:
        model: the FM; if it is on disk, so is each narrow proxy.
        public: unlabelled samples; the closed form takes those that the whole proxy was refitted on.
        settings: of which there are no steps.
        adapter: untrained, on both models.
        scratch: a directory for what is on disk meanwhile.
        journal: keeps each layer's closed form, for each width.
        ranks: that refit together, once rank 0 has written the bundle. It alone writes.

    Raises:
        ModelError: the proxy cannot be had in part, or is not finite on the samples.
    """
    if not selection.turns:
        raise ModelError(
            "proxy.widths: no layer of the proxy lost neurons, so that it cannot be had in part",
            "leave widths out, or lower proxy.neurons",
        )
    closed_form = settings.model_copy(update={"steps": 0})
    ranks.tell()
    for width in widths:
        log.info("proxy.widths: refitting for width %g", width)
        narrow = _narrow(bundle, width, None if held(model) is None else scratch / f"narrow-{ranks.rank}")
        place(narrow.model, device, scratch)
        adapters.attach(narrow.model, adapter, seed=seed)
        layer_level(
            narrow.model,
            model,
            selection.matched,
            public,
            closed_form,
            seed=seed,
            progress=lambda _step, _loss: None,
            layers=selection.layers,
            journal=journal.within(f"width-{width:g}"),
            ranks=ranks,
        )
        if not ranks.rank:
            check_finite(narrow.model, f"proxy.widths: the proxy of width {width:g}")
            _save(narrow, bundle, width)
    if ranks.rank:
        return
    description = json.loads((bundle / DESCRIPTION).read_text(encoding="utf-8"))
    (bundle / DESCRIPTION).write_text(json.dumps(description | {"widths": widths}, indent=1), encoding="utf-8")


def _narrow(bundle: Path, width: float, work: Path | None) -> Proxy:
    """The part of the proxy, as it is; with a directory its weights stay on disk."""
    if work is None:
        return load_proxy(bundle, width=width)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    proxy = load_proxy(bundle, work, width=width)
    shutil.rmtree(work)  # what is mapped stays, without a name
    return proxy


def _save(narrow: Proxy, bundle: Path, width: float) -> None:
    whole, state = MappedTensors(loading.weight_files(bundle)), adapters.frozen_state(narrow.model)
    for number, (module, places) in enumerate(narrow.held.items(), 1):
        changes = {}
        for name in (f"{module}.{part}" for part in REFITTED):
            if name in state:
                before = whole.tensors[name][places] if name.endswith("w_out") else whole.tensors[name]
                changes[name] = (wide(state[name].cpu()) - wide(before)).to(before.dtype)
        save_correction(bundle, width, number, changes)
        whole.release()
        release(narrow.model)
