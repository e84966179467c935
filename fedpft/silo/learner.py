"""The training of a silo, apart from how it hears what to train on: a process's own, or one after the other's."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpft.config import LimitsSection, RoundSettings, ShareSection, SiloDataSection
from fedpft.data.batches import EncodedDataset
from fedpft.data.language import LanguageDataset
from fedpft.data.samples import Samples, image_paths
from fedpft.errors import ModelError
from fedpft.gradients import Private
from fedpft.model import adapters, loading
from fedpft.model.packing import Way, has_varlen, way_to_pack
from fedpft.model.precision import dtype_of
from fedpft.model.quantized import dense_bytes, held_bytes
from fedpft.model.sharding import shard
from fedpft.parallel import ALONE, Ranks
from fedpft.proxy.bundle import apply_patch, load_proxy, of_part, of_whole, width_within
from fedpft.silo import data
from fedpft.silo.budget import Budget
from fedpft.silo.ondisk import DataOnDisk
from fedpft.silo.work import Update, Work
from fedpft.tasks import TASKS
from fedpft.tasks.task import diversity
from fedpft.training import LocalResult, train_round
from fedpft.wire.encoding import encode
from fedpft.wire.tensors import Group, read_tensors
from fedpft.wire.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)


class Learner:
    """A proxy with an adapter attached, on which silos train.

    version: of the proxy.
    """

    def __init__(self, bundle: Path, settings: RoundSettings, device: str, limits: LimitsSection | None = None) -> None:
        """Reads the proxy as it was when the federation began, as far and in the form that the limits say.

        With `limits.sharded` only this rank's pieces of its layers; all ranks do it at the same time.

        Raises:
            ModelError: there is no proxy, or it cannot be had so.
            ConfigError: bitsandbytes is needed, and is not there.
        """
        limits = limits or LimitsSection()
        width = limits.width
        if limits.memory_gib is not None:
            width = width_within(bundle, int(limits.memory_gib * 2**30))
            log.info("limits.memory_gib: %g, with which its width is %g", limits.memory_gib, width)
        if width < 1.0 and settings.adapter.ffn:
            raise ModelError(
                f"limits.{'width' if limits.memory_gib is None else 'memory_gib'}: the federation trains LoRA on the "
                "FFN's neurons too, of which every silo needs all",
                "leave it out, or have the server set adapter.ffn: false",
            )
        if limits.weights != "full" and settings.adapter.ffn and not limits.checkpointing:
            raise ModelError(
                "limits.weights: the federation trains LoRA on the FFNs too, and each keeps its sum with LoRA in full",
                "set limits.checkpointing: true, with which only one does at a time, or leave limits.weights out",
            )
        log.info("reading the proxy")
        self.proxy = load_proxy(bundle, width=width, weights=limits.weights, device=device, on_disk=limits.sharded)
        self.task, self.settings, self.version = TASKS[self.proxy.task], settings, 0
        if limits.weights != "full":
            mebibytes = (each(self.proxy.model.parameters()) / 2**20 for each in (held_bytes, dense_bytes))
            log.info("limits.weights: its weights take %.1f of %.1f MiB", *mebibytes)
        if self.proxy.held:
            refitted = ", refitted for that" if self.proxy.corrections is not None else ""
            neurons = (sum(self.proxy.neurons), self.proxy.loaded_neurons)
            log.info("limits.width: of its %d FFN neurons, %d%s", *neurons, refitted)
        adapters.attach(self.proxy.model, settings.adapter, seed=settings.seed)
        if limits.sharded:
            shard(self.proxy.model, device)
        self.proxy.model.to(device)

    def bring_to(self, version: int, patch: Path) -> None:
        """Brings the proxy to a version, by a patch from the one before or a snapshot."""
        apply_patch(self.proxy.model, of_part(read_tensors(patch, "patch"), self.proxy))
        self.version = version

    def encode(self, samples: Samples, on_disk: DataOnDisk, section: SiloDataSection, cache: Path) -> EncodedDataset:
        """The samples as the proxy takes them.

        Args:
            on_disk: what they were read from, which gets the images that it names.
            cache: file for the token ids of texts.

        Raises:
            DataError: the tokenizer finds no token in a text, or the data changed while they were read.
        """
        if self.task.has_images:
            on_disk.add_images(image_paths(section.path, section.columns, section.encoding))
        dataset = self.task.encode(
            samples,
            self.proxy.processor,
            self.proxy.max_tokens,
            bad_rows=section.bad_rows,
            way_out=data.WAY_OUT,
            cache=cache,
        )
        on_disk.check_read()
        return dataset

    def way_to_pack(self, silo: str, dataset: EncodedDataset, ranks: Ranks = ALONE) -> Way | None:
        """How rows are packed, if they are to be, are a language model's, and the proxy keeps them apart exactly."""
        if not self.settings.training.packing or not isinstance(dataset, LanguageDataset):
            return None
        model: Any = self.proxy.model
        vocabulary = model.get_input_embeddings().weight.shape[0]
        longest, device = int(dataset.lengths.max()), next(model.parameters()).device
        if has_varlen() and device.type == "cuda":
            loading.attend_within_rows(model)
        with ranks.computing():
            way = way_to_pack(model.base_model, vocabulary=vocabulary, longest=longest, device=device)
        if way is None:
            log.warning("%s: rows are padded, not packed: this model cannot keep them apart exactly", silo)
        return way

    def fit(
        self,
        silo: str,
        dataset: EncodedDataset,
        adapter: dict[str, Tensor],
        *,
        round: int,
        count_inactivity: bool,
        limits: LimitsSection,
        packing: Way | None,
        ranks: Ranks = ALONE,
        private: Private | None = None,
    ) -> LocalResult:
        """Trains an adapter for a round, on every rank the same; errors as of :meth:`train`."""
        shift = None
        if private is None and self.settings.training.logit_adjustment == "own" and self.task.label_list:
            shift = self.task.logit_shift(self._label_counts(dataset))
        adapters.load(self.proxy.model, adapter)
        return train_round(
            self.task,
            self.proxy.model,
            dataset,
            self.settings,
            silo=silo,
            round=round,
            compressed=self.proxy.compressed,
            count_inactivity=count_inactivity,
            limits=limits,
            packing=packing,
            shift=shift,
            ranks=ranks,
            private=private,
        )

    def train(
        self,
        silo: str,
        dataset: EncodedDataset,
        train: pb.Train,
        start: Path,
        work: Work,
        *,
        limits: LimitsSection,
        share: ShareSection,
        packing: Way | None,
        ranks: Ranks = ALONE,
        budget: Budget | None = None,
    ) -> Update:
        """Trains on the round's adapter; the update is in `work` afterwards.

        Args:
            train: the round, which is on this version of the proxy.
            start: the file of its adapter.
            packing: as of :meth:`way_to_pack`.
            ranks: this is rank 0; the others `fit` at the same time.
            budget: of the samples' privacy; what is trained is private then, and nothing else says anything of them:
                no counts, and of the metrics only how long it took.

        Raises:
            PrivacySpent: the round would cost more than is left.
            ModelError: the proxy cannot be trained so.
            DataError: the loss is not finite.
            InvalidUpdate: what was trained cannot be sent.
        """
        log.info("%s: round %d of %d begins", silo, train.round, self.settings.training.rounds)
        steps = private = None
        if budget is not None:
            self._check_private()
            steps = budget.plan(self.settings, limits)
            private = budget.private(steps)
        told = dict[str, float]()
        if self.settings.label_diversity and self.task.label_list:
            told["label_diversity"] = diversity(self._label_counts(dataset))
        adapter = read_tensors(start, "adapter")
        result = self.fit(
            silo,
            dataset,
            adapter,
            round=train.round,
            count_inactivity=train.count_inactivity and share.inactivity and private is None,
            limits=limits,
            packing=packing if private is None else None,
            ranks=ranks,
            private=private,
        )
        if budget is not None and steps is not None:
            budget.spend(train.round, steps)
        log.info(
            "%s: round %d of %d: loss %.4f, %d samples, %.1f s",
            silo,
            train.round,
            self.settings.training.rounds,
            result.metrics["train_loss"],
            result.samples,
            result.metrics["seconds"],
        )
        groups: dict[Group, dict[str, Tensor]]
        groups, residual = encode(
            result.adapter, adapter, self.settings.training.update_encoding, work.residual(train.round)
        )
        if result.inactivity is not None:
            groups["inactivity"] = of_whole(result.inactivity, self.proxy) if self.proxy.held else result.inactivity
        weight, terms = float(result.samples), self.settings.secure_aggregation
        if terms is not None and terms.weights == "equal":
            weight = 1.0
        elif terms is not None and terms.weights == "diversity" and self.task.label_list and private is None:
            weight *= diversity(self._label_counts(dataset))
        metrics = result.metrics | dataset.counts | told
        if private is not None:
            metrics = {"seconds": metrics["seconds"]}
        shared: dict[str, float] = {name: metrics[name] for name in share.metrics if name in metrics}
        return work.keep_update(train, groups, residual, samples=result.samples, metrics=shared, weight=weight)

    def _check_private(self) -> None:
        if self.settings.adapter.ffn:
            raise ModelError(
                "privacy: the federation trains LoRA on the FFN's neurons too, which has no gradient of each sample",
                "have the server set adapter.ffn: false, or leave privacy out of silo.yaml",
            )
        if dtype_of(self.proxy.model) == torch.float16:
            raise ModelError(
                "privacy: the proxy is in float16, whose gradients are scaled",
                "have the server set model.dtype: bfloat16",
            )

    def _label_counts(self, dataset: EncodedDataset) -> Tensor:
        return self.task.label_counts(dataset, len(self.proxy.labels))
