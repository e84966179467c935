"""One silo's local fine-tuning: LoRA and head on the frozen proxy (method.md, section 3)."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpft.config import LimitsSection, RoundSettings, TrainingSection
from fedpft.data.batches import EncodedDataset, batches, round_window
from fedpft.errors import DataError
from fedpft.model import adapters
from fedpft.model.architectures import in_head
from fedpft.model.subffn import InactivityCounter, SubFFN, sub_ffns
from fedpft.seeding import derive_seed


@dataclass(frozen=True)
class LocalResult:
    """What one silo has to say about one round.

    Attributes:
        adapter: the trained adapter.
        samples: n_i, the samples it was trained on.
        metrics: `train_loss` (mean over samples), `seconds`, `tokens` (without padding; images: samples).
        inactivity: for each compressed layer `"<layer>"`: (K,) int64 inactive tokens, and `"<layer>.tokens"`: () int64,
            the tokens they are out of; None if nobody asked.
    """

    adapter: dict[str, Tensor]
    samples: int
    metrics: dict[str, float]
    inactivity: dict[str, Tensor] | None


def train_round(
    model: nn.Module,
    dataset: EncodedDataset,
    settings: RoundSettings,
    *,
    silo: str,
    round: int,
    compressed: tuple[int, ...],
    count_inactivity: bool,
    limits: LimitsSection,
) -> LocalResult:
    """Trains the adapter in `model` for one round, in place.

    The optimizer starts afresh each round, as in federated averaging. Only LoRA's own dropout is on: the frozen
    modules stay as the server sees them when it aligns.

    Args:
        model: proxy with the round's adapter loaded.
        silo: its name, which seeds the order of its samples and its dropout.
        round: 1 for the first.
        compressed: layers whose inactive neurons are counted.

    Raises:
        DataError: the loss is not finite.
    """
    training, epochs = settings.training, settings.training.local_epochs
    epochs = min(epochs, limits.max_local_epochs or epochs)
    start, count = round_window(len(dataset), epochs, round - 1)
    steps = -(-count // training.batch)
    counters = _count_inactivity(model, compressed, settings.inactive_below) if count_inactivity else {}
    optimizer = _optimizer(model, training)
    device = next(model.parameters()).device
    order_seed = derive_seed(settings.seed, "order", silo)
    begun, loss_sum, tokens = time.monotonic(), 0.0, 0
    random_devices = [device] if device.type == "cuda" else []
    with adapters.training(model, settings.adapter.dropout), torch.random.fork_rng(devices=random_devices):
        torch.manual_seed(derive_seed(settings.seed, "dropout", silo, round))
        for step, batch in enumerate(batches(dataset, batch=training.batch, start=start, count=count, seed=order_seed)):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1.0 - (round - 1 + step / steps) / training.rounds)
            size = len(batch["labels"])
            for part in _split(batch, limits.max_batch or size):
                mask = part.get("attention_mask")
                tokens += len(part["labels"]) if mask is None else int(mask.sum())  # not after .to: it would wait
                part = {name: value.to(device) for name, value in part.items()}
                for counter in counters.values():
                    counter.mask = None if mask is None else part["attention_mask"].flatten().bool()
                share = len(part["labels"]) / size
                loss: Tensor = model(**part).loss * share
                loss.backward()
                loss_sum += float(loss.detach()) * size
            if not loss_sum < float("inf"):
                raise DataError(
                    f"round {round}, step {step + 1}: the training loss is not finite",
                    "look for extreme inputs in this silo's data, or have the server lower training.learning_rate",
                )
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], training.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
    for ffn in sub_ffns(model).values():
        ffn.inactivity = None
    inactivity = {str(layer): counter.counts.cpu() for layer, counter in counters.items()} | {
        f"{layer}.tokens": torch.tensor(int(counter.tokens)) for layer, counter in counters.items()
    }
    metrics = {"train_loss": loss_sum / count, "seconds": time.monotonic() - begun, "tokens": float(tokens)}
    return LocalResult(adapters.extract(model), count, metrics, inactivity if count_inactivity else None)


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
        fused=True,
    )


def _count_inactivity(model: nn.Module, compressed: tuple[int, ...], eps: float) -> dict[int, InactivityCounter]:
    ffns: list[SubFFN] = list(sub_ffns(model).values())
    counters = {}
    for layer in compressed:
        counts = torch.zeros(ffns[layer].neurons, dtype=torch.int64, device=ffns[layer].w_in.device)
        counters[layer] = ffns[layer].inactivity = InactivityCounter(eps, counts)
    return counters


def _split(batch: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(batch["labels"]), size):
        yield {name: value[start : start + size] for name, value in batch.items()}
