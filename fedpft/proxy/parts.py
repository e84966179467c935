"""The public samples that the making of a proxy looks at: in batches, of which each rank has its parts.

B samples of a part, T sequence length of its batch
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpft.data.batches import EncodedDataset, by_length
from fedpft.parallel import ALONE, Ranks


@dataclass(frozen=True)
class Part:
    """Some samples of a batch.

    batch: its number, from 0.
    share: of the batch's tokens.
    inputs: as a model takes them, padded as in the batch.
    real: which of the (B T,) tokens are no padding.
    """

    batch: int
    share: float
    inputs: dict[str, Tensor]
    real: Tensor | slice


class Parts:
    """Batches of the chosen samples, in order of length.

    counts: how many parts each of them has.
    """

    def __init__(
        self, public: EncodedDataset, chosen: Tensor, batch: int, *, most: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        """Args:
        chosen: (m,) int64.
        most: samples of a part; None: all of a batch, or a part for each rank.
        """
        self._public, self._ranks, self._batches = public, ranks, by_length(public, batch, chosen)
        self._parts = [every.split(most or ranks.largest(batch)) for every in self._batches]
        self.counts = list(map(len, self._parts))

    def own(self, device: torch.device) -> Iterator[Part]:
        """This rank's, batch by batch."""
        own = [(every, self._ranks.own(parts)) for every, parts in zip(self._batches, self._parts, strict=True)]
        ahead = self._public.ahead(torch.cat([every[:0], *parts]) for every, parts in own)
        for (number, (every, parts)), _ in zip(enumerate(own), ahead, strict=True):
            for part in parts:
                share = int(self._public.lengths[part].sum()) / int(self._public.lengths[every].sum())
                inputs = {name: value.to(device) for name, value in self._public.batch(part, every).items()}
                mask = inputs.get("attention_mask")
                yield Part(number, share, inputs, slice(None) if mask is None else mask.bool().flatten())
