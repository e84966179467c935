"""One silo's local fine-tuning: LoRA and head on the frozen proxy (method.md, section 3)."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fedpft.config import LimitsSection, RoundSettings, Schedule, TrainingSection
from fedpft.data.batches import EncodedDataset, lots, round_window
from fedpft.data.language import LanguageDataset
from fedpft.errors import DataError
from fedpft.gradients import Gradients, PlainGradients, Private, PrivateGradients
from fedpft.model import adapters
from fedpft.model.architectures import in_head
from fedpft.model.checkpointing import checkpointing
from fedpft.model.packing import Way, packed_inputs
from fedpft.model.precision import TASK_SCALE, dtype_of, loss_scaler
from fedpft.model.subffn import compacting, counting, totals
from fedpft.parallel import ALONE, Ranks
from fedpft.seeding import derive_seed
from fedpft.tasks import Task

AT_ONCE = 64  # samples of a private step, whose batches are large, that a gradient is kept of; unless `limits` says


@dataclass(frozen=True)
class LocalResult:
    """What one silo has to say about one round.

    Attributes:
        adapter: the trained adapter.
        samples: n_i, the samples it was trained on.
        metrics: `train_loss` (mean over what the task's loss counts), `seconds`, `tokens` (without padding; images:
            samples).
        inactivity: for each compressed layer `"<layer>"`: (K,) int64 inactive tokens, and `"<layer>.tokens"`: () int64,
            the tokens they are out of; None if nobody asked.
    """

    adapter: dict[str, Tensor]
    samples: int
    metrics: dict[str, float]
    inactivity: dict[str, Tensor] | None


def train_round(
    task: Task,
    model: nn.Module,
    dataset: EncodedDataset,
    settings: RoundSettings,
    *,
    silo: str,
    round: int,
    compressed: tuple[int, ...],
    count_inactivity: bool,
    limits: LimitsSection,
    packing: Way | None = None,
    shift: Tensor | None = None,
    ranks: Ranks = ALONE,
    private: Private | None = None,
) -> LocalResult:
    """Trains the adapter in `model` for one round, in place.

    The optimizer starts afresh each round, as in federated averaging. Only LoRA's own dropout is on: the frozen
    modules stay as the server sees them when it aligns.

    With `training.frozen_a` LoRA's A stays, and its mean over silos too, bit for bit: mean(B_i) A = mean(B_i A)
    (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313).

    Args:
        task: whose loss is minimised.
        model: proxy with the round's adapter loaded.
        silo: its name, which seeds the order of its samples and its dropout.
        round: 1 for the first.
        compressed: layers whose inactive neurons are counted.
        packing: how the model keeps rows of a language model apart that stand in one sequence; None: they do not.
        shift: the silo's :meth:`Task.logit_shift`, (C,), for its loss; None: the plain loss.
        ranks: that train together, on the same data. Each returns the same but for `seconds`.
        private: each step has every sample with the probability :func:`~fedpft.gradients.sampling_rate`, and goes by
            their clipped gradients' noised sum over `training.batch`; `gradient_clip` has no part in it. For one rank,
            without packing, and not for float16. None: plain training.

    Raises:
        ModelError: LoRA is given what is of no single sample, and there is to be a gradient of each.
        DataError: the loss is not finite.
    """
    training = settings.training
    start, count = round_window(len(dataset), epochs_of(training, limits), round - 1)
    steps = -(-count // training.batch)
    device, dtype = next(model.parameters()).device, dtype_of(model)
    shift = None if shift is None else shift.to(device)
    order_seed = derive_seed(settings.seed, "order", silo)
    begun, loss_sum, weights, tokens = time.monotonic(), 0.0, 0, 0
    random_devices = [device] if device.type == "cuda" else []
    lora_trains = adapters.training(model, settings.adapter.dropout, frozen_a=training.frozen_a)
    counted = counting(model, compressed if count_inactivity else (), settings.inactive_below)
    with lora_trains, _sparing(model, limits), counted as counters, torch.random.fork_rng(devices=random_devices):
        optimizer, scaler = _optimizer(model, training), loss_scaler(model, TASK_SCALE)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        begun_with = [parameter.detach().clone() for parameter in parameters] if training.proximal else []
        torch.manual_seed(derive_seed(settings.seed, "dropout", silo, round, *ranks.others))

        def loss_of(part: dict[str, Tensor]) -> Tensor:
            part = {name: value.to(device) for name, value in part.items()}
            mask = part.get("attention_mask")
            for counter in counters.values():
                counter.mask = None if mask is None else mask.flatten().bool()
            inputs = part if packing is None else packed_inputs(part, packing, dtype)
            return task.loss(model, inputs) if shift is None else task.shifted_loss(model, inputs, shift)

        gradients: Gradients
        if private is None:
            gradients = PlainGradients(task, model, parameters, loss_of, scaler, ranks, training.gradient_clip)
            at_once = training.batch
            order = list(lots(dataset, batch=training.batch, start=start, count=count, seed=order_seed))
        else:
            gradients = PrivateGradients(task, model, parameters, loss_of, private, len(dataset), training.batch)
            at_once = AT_ONCE
            order = [private.secret.sample(len(dataset), gradients.rate) for _ in range(steps)]
        most = min(limits.max_batch or at_once, ranks.largest(training.batch))
        batches = [_parts(dataset, lot, most, packing) for lot in order]
        wanted = (torch.cat([lot[:0], *ranks.own(parts)]) for lot, parts in zip(order, batches, strict=True))
        for step, (lot, parts, _) in enumerate(zip(order, batches, dataset.ahead(wanted), strict=True)):
            optimizer.zero_grad()  # at the start: a round that failed on this model left gradients
            for group in optimizer.param_groups:
                done = (round - 1 + step / steps) / training.rounds
                group["lr"] = group["initial_lr"] * rate_share(training.schedule, done)
            built = [_built(dataset, part, lot, packing) for part in ranks.own(parts)]
            # before .to: on a GPU what is read back afterwards has to be waited for
            weight = int(sum(ranks.in_order(list(map(task.weight, built)), len(parts))))
            tokens += sum(map(_tokens, built))
            losses = gradients.make(built, weight, len(parts), partial(_built, dataset, lot[:1], lot, packing))
            for found in ranks.in_order(losses, len(parts)):
                loss_sum += found * weight
            weights += weight
            if not loss_sum < float("inf"):
                raise DataError(
                    f"round {round}, step {step + 1}: the training loss is not finite",
                    "look for extreme inputs in this silo's data, or have the server lower training.learning_rate",
                )
            scaler.unscale_(optimizer)
            if training.proximal:
                _pull_back(parameters, begun_with, training.proximal)
            gradients.clip()
            scaler.step(optimizer)
            scaler.update()
    counts = ranks.total({**totals(counters), "tokens": torch.tensor(tokens)})
    tokens = int(counts.pop("tokens"))
    metrics = {"train_loss": loss_sum / max(weights, 1), "seconds": time.monotonic() - begun, "tokens": float(tokens)}
    return LocalResult(adapters.extract(model), count, metrics, counts if count_inactivity else None)


def epochs_of(training: TrainingSection, limits: LimitsSection) -> float:
    """Which share of its samples a silo goes through in a round."""
    return min(training.local_epochs, limits.max_local_epochs or training.local_epochs)


def rate_share(schedule: Schedule, done: float) -> float:
    """What is left of a rate when this share of all rounds' steps is done, in [0, 1].

    The cosine is that of SGDR without restarts (Loshchilov and Hutter 2017, arXiv 1608.03983).
    """
    match schedule:
        case "linear":
            return 1.0 - done
        case "cosine":
            return (1.0 + math.cos(math.pi * done)) / 2.0
        case "constant":
            return 1.0


@contextmanager
def _sparing(model: nn.Module, limits: LimitsSection) -> Iterator[None]:
    """While open, a step keeps as little for its backward pass as the silo wants."""
    with ExitStack() as stack:
        if limits.compact:
            stack.enter_context(compacting(model))
        if limits.checkpointing:
            stack.enter_context(checkpointing(model))
        yield


def _pull_back(parameters: list[nn.Parameter], begun_with: list[Tensor], mu: float) -> None:
    """Adds FedProx's term (Li et al. 2020, arXiv 1812.06127) to the gradients: mu (A - A_r) of mu/2 ||A - A_r||^2.

    As a gradient, not as part of the loss: it counts once a step, however many parts a batch has, and the loss that a
    silo reports stays that of its data. Before clipping, since it belongs to what is minimised. AdamW divides each
    gradient by its own size, so a step stays as long as the rate says: mu turns it back as far as mu ||A - A_r||
    compares with the rest of the gradient.
    """
    for parameter, start in zip(parameters, begun_with, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start, alpha=mu)


def _optimizer(model: nn.Module, training: TrainingSection) -> torch.optim.AdamW:
    head: list[nn.Parameter] = []
    lora: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if in_head(model, name) else lora).append(parameter)
    groups = [(lora, training.learning_rate), (head, training.head_learning_rate or training.learning_rate)]
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "initial_lr": rate} for parameters, rate in groups if parameters],
        weight_decay=training.weight_decay,
        eps=training.adam_epsilon,
        fused=True,
    )


def _parts(dataset: EncodedDataset, lot: Tensor, most: int, packing: Way | None) -> list[Tensor]:
    """Which samples are in each part of a batch: at most `most`, or as many tokens as those can have, if packed."""
    if packing is not None and isinstance(dataset, LanguageDataset):
        return dataset.fitted(lot, int(dataset.lengths.max()) * (most if packing == "rows" else 1))
    return [lot[start : start + most] for start in range(0, len(lot), most)]


def _built(dataset: EncodedDataset, part: Tensor, lot: Tensor, packing: Way | None) -> dict[str, Tensor]:
    if packing is not None and isinstance(dataset, LanguageDataset):
        return dataset.sequence(part)
    return dataset.batch(part, lot)


def _tokens(part: dict[str, Tensor]) -> int:
    """Without padding; of images the samples."""
    if "attention_mask" in part:
        return int(part["attention_mask"].sum())
    return part["input_ids"].numel() if "input_ids" in part else len(part["labels"])
