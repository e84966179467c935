"""What a silo has to say in a round as one vector of 32-bit words, whose sum over silos is exact in integers.

    entries     w_i (A_i - A_r) 2^f of each value of the adapter, rounded at random so that its mean is right
    counts      DIGITS words each, of 16 bits: n_i, w_i, the shared metrics, the inactivity counts

Words add modulo 2^32. Nothing wraps: an entry is at most most_samples x max_entry x 2^f (config.py chooses f so that
MOST_SILOS of them stay below 2^31), a digit below 2^16. So the sum is that of the integers, in whatever order they are
added, and the sum of masked words, which do wrap, comes to the same once the masks are taken off.

Rounding: floor(x + u), u of 24 bits from a stream of AES-256-CTR whose key is a hash of seed, round and silo. Its mean
is x but for 2^-24, and its error below 1; so each value of the mean of S silos is off by less than S 2^-f / w, w the
sum of their weights. That the stream is no secret does not matter: only the rounded words are hidden, by the masks.

L words of the vector, S silos, K neurons of a layer of the proxy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpft.config import SecureTerms
from fedpft.errors import InvalidUpdate
from fedpft.kernels import mask_update
from fedpft.privacy.masking import CHUNK_WORDS, Mask, Streams, hashed

DIGIT_BITS, DIGITS = 16, 3
LARGEST_COUNT = (1 << DIGIT_BITS * DIGITS) - 1
WEIGHT_UNITS = 1 << 16  # of a weight of 1
METRIC_UNITS = 1 << 20  # of a loss of 1, or of a second
# Summed over the silos that share them; each is followed by how many those are.
SUMMED_METRICS = ("train_loss", "seconds", "tokens", "skipped_rows", "cut_texts", "cut_completions")
_SUMMABLE = (torch.float32, torch.bfloat16, torch.float16)  # which float32 holds exactly
_IN_UNITS = frozenset({"train_loss", "seconds"})


@dataclass(frozen=True)
class Layout:
    """Where everything is in the vector; the same for all silos of a round.

    shapes: of the adapter's tensors, by name in order.
    neurons: layer -> K of the layers whose inactivity is asked for, in order.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    neurons: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], neurons: Mapping[int, int]) -> "Layout":
        """From both in any order."""
        return cls(tuple(sorted(shapes.items())), tuple(sorted(neurons.items())))

    @property
    def entries(self) -> int:
        """Values of the adapter."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def counts(self) -> int:
        """Numbers that follow them."""
        return 2 + 2 * len(SUMMED_METRICS) + 2 * sum(count for _, count in self.neurons)

    @property
    def words(self) -> int:
        """L."""
        return self.entries + DIGITS * self.counts


@dataclass(frozen=True)
class Contribution:
    """What one silo puts in.

    start, trained: the adapter before and after the round, of the layout's shapes; float32, or what that can hold.
    weight: w_i, at least 0.
    metrics: of SUMMED_METRICS those that the silo shares.
    inactivity: "<layer>": (K,) int64, "<layer>.tokens": () or (K,) int64; None if the silo keeps it to itself.
    """

    start: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    samples: int
    weight: float
    metrics: Mapping[str, float]
    inactivity: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Total:
    """What all of them put in, together.

    change: sum of w_i (A_i - A_r), float64, by name; weight: sum of w_i.
    metrics: name -> sum over the silos that share it, and how many those are.
    inactivity: "<layer>" and "<layer>.tokens": (K,) int64; None if nobody was asked, or nobody shares it.
    """

    change: dict[str, Tensor]
    samples: int
    weight: float
    metrics: dict[str, tuple[float, int]]
    inactivity: dict[str, Tensor] | None


def rounding_key(seed: int, silo: str, round: int) -> bytes:
    """Of the stream that rounds a silo's entries in a round: the same in every attempt, and in a simulation."""
    return hashed("rounding", seed, silo, round)


def encode(
    what: Contribution, layout: Layout, terms: SecureTerms, key: bytes, masks: Sequence[Mask] = ()
) -> tuple[Tensor, int]:
    """(L,) int32 with the masks on it, and how many values of the change were beyond `terms.max_entry`, and cut to it.

    Args:
        key: as of :func:`rounding_key`.

    Raises:
        InvalidUpdate: a value is not finite, or the silo's weight or samples are more than was agreed on.
    """
    if not 0 <= what.weight <= terms.most_samples or not 1 <= what.samples <= terms.most_samples:
        raise InvalidUpdate(
            f"{what.samples} samples of weight {what.weight:g} in a round, but secure_aggregation.most_samples is "
            f"{terms.most_samples}",
            "set limits.max_local_epochs in silo.yaml, or have the server raise secure_aggregation.most_samples",
        )
    before, after = (_flat(adapter, layout) for adapter in (what.start, what.trained))
    numbers = _digits(_counts(what, layout)).flatten()
    ordered = sorted(masks, key=lambda mask: -mask[1])
    added, scale = sum(sign > 0 for _, sign in ordered), what.weight * 2.0**terms.fraction_bits
    streams = Streams([key, *(own for own, _ in ordered)])
    words, odd = torch.empty(layout.words, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    for out, one, other in zip(
        *(each.split(CHUNK_WORDS) for each in (words[: layout.entries], before, after)), strict=True
    ):
        if len(out):
            mask_update(out, odd, one, other, streams.next(len(out)), added, scale, terms.max_entry)
    cut, endless = odd.tolist()
    if endless:
        raise InvalidUpdate(
            "after the training the adapter holds NaN or infinity", "lower the learning rate, look at the data"
        )
    tail = words[layout.entries :].copy_(numbers)
    for chunk in tail.split(CHUNK_WORDS):
        rows = streams.next(len(chunk))[1:]
        for (_, sign), row in zip(ordered, rows, strict=True):
            chunk.add_(row, alpha=sign)
    return words, cut


def decode(words: Tensor, layout: Layout, terms: SecureTerms, silos: int) -> Total:
    """The sum of `silos` vectors, (L,) int32.

    Raises:
        InvalidUpdate: no such sum can be: a silo did not follow the protocol, or a mask is still on it.
    """
    entries, counts = words[: layout.entries], words[layout.entries :].view(-1, DIGITS).long()
    largest = terms.largest_sum(silos)
    lowest, highest = (int(bound) for bound in entries.aminmax()) if entries.numel() else (0, 0)
    digits_fit = bool(((counts >= 0) & (counts < silos << DIGIT_BITS)).all())
    if not (-largest <= lowest and highest <= largest and digits_fit):
        raise _impossible(silos)
    numbers = (counts << torch.arange(DIGITS) * DIGIT_BITS).sum(dim=1)
    samples, weight = int(numbers[0]), int(numbers[1]) / WEIGHT_UNITS
    if not silos <= samples <= silos * terms.most_samples or weight > silos * terms.most_samples:
        raise _impossible(silos)
    place, change = 0, {}
    for name, shape in layout.shapes:
        size = math.prod(shape)
        change[name] = entries[place : place + size].double().div_(2.0**terms.fraction_bits).view(shape)
        place += size
    metrics, place = {}, 2
    for name in SUMMED_METRICS:
        total, sharers = int(numbers[place]), int(numbers[place + 1])
        if sharers > silos:
            raise _impossible(silos)
        if sharers:
            metrics[name] = (total / METRIC_UNITS if name in _IN_UNITS else float(total), sharers)
        place += 2
    return Total(change, samples, weight, metrics, _inactivity(numbers[place:], layout, silos))


def _counts(what: Contribution, layout: Layout) -> Tensor:
    """(counts,) int64."""
    numbers = [what.samples, round(what.weight * WEIGHT_UNITS)]
    for name in SUMMED_METRICS:
        if name in what.metrics:
            value = what.metrics[name] * (METRIC_UNITS if name in _IN_UNITS else 1)
            numbers += [min(max(round(value), 0), LARGEST_COUNT), 1]
        else:
            numbers += [0, 0]
    parts = [torch.tensor(numbers)]
    for layer, neurons in layout.neurons:
        if what.inactivity is None:
            parts += [torch.zeros(2 * neurons, dtype=torch.int64)]
        else:
            inactive, tokens = what.inactivity[str(layer)], what.inactivity[f"{layer}.tokens"]
            parts += [inactive, tokens.expand(neurons)]
    return torch.cat(parts)


def _digits(numbers: Tensor) -> Tensor:
    if int(numbers.min()) < 0 or int(numbers.max()) > LARGEST_COUNT:
        raise InvalidUpdate(
            f"a count is {int(numbers.max())}, at most {LARGEST_COUNT} can be", "train on fewer tokens in a round"
        )
    return (numbers[:, None] >> torch.arange(DIGITS) * DIGIT_BITS).bitwise_and_((1 << DIGIT_BITS) - 1).int()


def _inactivity(numbers: Tensor, layout: Layout, silos: int) -> dict[str, Tensor] | None:
    found: dict[str, Tensor] = {}
    place = 0
    for layer, neurons in layout.neurons:
        inactive, tokens = numbers[place : place + neurons], numbers[place + neurons : place + 2 * neurons]
        if bool((inactive > tokens).any()):
            raise _impossible(silos)
        found |= {str(layer): inactive, f"{layer}.tokens": tokens}
        place += 2 * neurons
    return found if any(bool(tokens.any()) for tokens in found.values()) else None


def _flat(adapter: Mapping[str, Tensor], layout: Layout) -> Tensor:
    parts = []
    for name, shape in layout.shapes:
        tensor = adapter[name]
        if tensor.dtype not in _SUMMABLE or tuple(tensor.shape) != shape:
            raise InvalidUpdate(
                f"{name!r} is {tuple(tensor.shape)} {tensor.dtype}, which secure aggregation cannot add as {shape}",
                "run the same version of fedpft on both sides",
            )
        parts.append(tensor.detach().cpu().float().flatten())
    return torch.cat(parts) if parts else torch.empty(0)


def _impossible(silos: int) -> InvalidUpdate:
    return InvalidUpdate(
        f"the sum over {silos} silos is none that silos could have put in",
        "look for a silo that does not run this version of fedpft",
    )
