"""How much each neuron of the FM matters, by each of the measures that `proxy.importance` names.

D hidden size, F FFN neurons, N tokens, E experts of a mixture. w_j (D,) is row j of an FFN's output weights, a (N, F)
what its neurons pass on to them, S (N, D) the residual stream right after the FFN's output was added to it, A (F, F)
the covariance of a over tokens, and r I a small ridge. The square of a saliency adds up over neurons:

    weights     s_j^2 = the sum of squares of all weights of neuron j
    variance    s_j^2 = (A + r I)_jj ||w_j||^2 / mean ||S||^2
    leverage    s_j^2 = ||w_j||^2 / [(A + r I)^-1]_jj / mean ||S||^2     when it is j's turn to go
    random      s_j is drawn evenly from 0 to 1

For `leverage` the neurons go one after the other, always one whose loss the others can make up for best. Their output
weights then do make up for it, so that the next are judged by what they have become. s_j^2 is the squared error of the
FFN's output that its going adds, in shares of the stream. An FFN without output bias cannot make up for a mean: there A
is the mean of a a^T.

Each expert of a mixture is an FFN of its own, whose a is 0 at the tokens that it is not asked.

Sources: `weights` is the paper's, `variance` FLAP (arXiv 2312.11983), `leverage` Optimal Brain Surgeon, carried to
whole neurons by OSSCAR (arXiv 2403.12983); MoDeGPT (arXiv 2408.09632) scores them by ridge leverage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fedpft import kernels
from fedpft.config import ProxySection
from fedpft.data.batches import EncodedDataset, sample
from fedpft.errors import ModelError
from fedpft.model import architectures
from fedpft.model.mapped import release
from fedpft.model.streaming import at_hand
from fedpft.model.subffn import ffn_path, projections, sub_ffn_of
from fedpft.model.walk import LayerWalk
from fedpft.parallel import ALONE, Ranks
from fedpft.progress import progress
from fedpft.proxy.closed_form import look
from fedpft.proxy.journal import Found, Journal
from fedpft.proxy.parts import Part, Parts
from fedpft.seeding import derive_seed

RIDGE = 1e-3  # r, in units of the mean of A's diagonal; an elimination on fewer tokens than neurons stays sane
BATCH = 16  # public samples at a time
# Of N neurons left the N / TURN cheapest go at a time, at most MOST, chosen one by one among twice as many: duplicates
# are cheap together, and no longer once one of them is gone.
TURN, MOST = 16, 256


@dataclass(frozen=True)
class Ranking:
    """How much the neurons of one FFN matter, or those of each expert of a mixture.

    Attributes:
        saliency: s_j, (F,) or (E, F) float32.
        order: the neurons' indices, from the one that stays longest to the first to go, of the same shape, int64.
        unit: what makes squares comparable from layer to layer, once they are divided by it.
    """

    saliency: Tensor
    order: Tensor
    unit: float = 1.0

    def kept(self, count: int) -> Tensor:
        """The `count` neurons that stay longest, ascending: (K,) or (E, K) int64."""
        return self.order[..., :count].sort().values

    def worth(self) -> Tensor:
        """What one neuron more is worth, or one of each expert, never more than the one before it: (F,) float64."""
        squares = self.saliency.double().square().gather(-1, self.order).view(-1, self.order.shape[-1]).sum(0)
        return squares.flip(0).cummax(0).values.flip(0) / self.unit


def by_saliency(saliency: Tensor, unit: float = 1.0) -> Ranking:
    """The largest stay longest; of equal ones the lower index does."""
    return Ranking(saliency, torch.sort(saliency, descending=True, stable=True).indices, unit)


def by_weights(model: nn.Module) -> list[Ranking]:
    """Of every layer of the FM."""
    found = []
    for layer in architectures.layers_of(model):
        ffns = projections(model, layer)
        w_in, w_gate, w_out = ([ffn[name] for ffn in ffns if name in ffn] for name in ("w_in", "w_gate", "w_out"))
        norms = kernels.neuron_saliency(w_in, w_gate, [weight.t() for weight in w_out]).cpu()
        found.append(by_saliency(norms if len(ffns) > 1 else norms[0], float(norms.double().square().sum())))
        release(model)
    return found


def by_chance(ranking: Ranking, seed: int, layer: int) -> Ranking:
    """The order of a draw, over the same neurons."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "random neurons", layer))
    drawn = torch.rand(ranking.saliency.shape, generator=generator)
    return by_saliency(drawn, float(drawn.double().square().sum()))


def by_activations(
    model: nn.Module,
    layers: Sequence[int],
    public: EncodedDataset,
    settings: ProxySection,
    *,
    seed: int,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> dict[int, Ranking]:
    """Of the given layers of the FM, ascending, in one pass over public samples: `variance` or `leverage`.

    Args:
        journal: keeps each layer's.
        ranks: that share the samples, and all come to the same.

    Raises:
        ModelError: what the neurons pass on is not finite.
    """
    device = next(model.parameters()).device
    chosen = sample(len(public), settings.importance_samples, seed, "importance")
    found: dict[int, Ranking] = {}
    with torch.no_grad(), progress(f"proxy.importance: {settings.importance}", len(layers), "layer") as report:
        parts = Parts(public, chosen, BATCH, ranks=ranks).own(device)
        walks = [(LayerWalk(model, part.inputs), part) for part in parts]
        for layer in layers:
            rank = partial(_ranking, model, layer, walks, ranks, leverage=settings.importance == "leverage")
            ranked = (journal or Journal()).kept(f"importance-{layer}", rank)
            found[layer] = Ranking(ranked["saliency"], ranked["order"])
            report(len(found))
    return found


def eliminate(a: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    """Takes all neurons away, always one whose loss the others can make up for best; of equal ones the higher index.

    Args:
        a: A + r I, (F, F) float64.
        w_out: (F, D) float64.

    Returns:
        What the going of each adds to min_V tr((W - V)^T (A + r I) (W - V)), V zero for those that are gone, (F,); and
        in which order they go, (F,) int64.
    """
    inverse, w_out = torch.cholesky_inverse(torch.linalg.cholesky(a)), w_out.clone()
    left, costs, turns = torch.arange(len(a)), torch.zeros(len(a), dtype=torch.float64), []
    while len(left):
        gone, added = _cheapest(inverse, w_out, max(1, min(len(left) // TURN, MOST)))
        costs[left[gone]] = added
        turns.append(left[gone])
        stay = torch.ones(len(left), dtype=torch.bool).index_fill_(0, gone, False).nonzero().squeeze(1)
        # What is gone is zero from here on: by the others' best answer, and by the inverse of what is left of A.
        rows, own = inverse[stay], torch.linalg.cholesky(inverse[gone][:, gone])
        shares = torch.cholesky_solve(rows[:, gone].t(), own).t()
        w_out = w_out[stay].addmm_(shares, w_out[gone], alpha=-1)
        inverse = rows.index_select(1, stay).addmm_(shares, rows[:, gone].t(), alpha=-1)
        left = left[stay]
    return costs, torch.cat(turns)


def _cheapest(inverse: Tensor, w_out: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which `count` neurons go next, in their order, and what each adds to the error, float64.

    The others' answer to each is taken into account among twice as many of the cheapest, by the same formulas.
    """
    costs = w_out.square().sum(1) / inverse.diagonal()
    near = len(costs) - 1 - costs.flip(0).argsort(stable=True)[: 2 * count]
    h, g = inverse[near][:, near], w_out[near] @ w_out[near].t()
    here, gone, added = torch.ones(len(near), dtype=torch.bool), [], []
    for _ in range(count):
        costs = torch.where(here, g.diagonal() / h.diagonal(), torch.inf)
        first = int(costs.argmin())
        here[first] = False
        gone.append(first)
        added.append(float(costs[first]))
        share, line = h[first] / h[first, first], h[first].clone()
        half = g[first] - g[first, first] / 2 * share
        h.addr_(share, line, alpha=-1)
        g.addr_(share, half, alpha=-1).addr_(half, share, alpha=-1)
    return near[gone], torch.tensor(added, dtype=torch.float64).clamp(min=0)


def _ranking(
    model: nn.Module, place: int, walks: Sequence[tuple[LayerWalk, Part]], ranks: Ranks, *, leverage: bool
) -> Found:
    """A layer's :class:`Ranking`, by the names of its tensors."""
    for passed in range(walks[0][0].position, place) if walks else ():
        with at_hand(model, [passed]):
            for walk, _ in walks:
                walk.advance()
    with at_hand(model, [place]):
        ffns = projections(model, architectures.layers_of(model)[place])
        moments = [_Moments(len(ffn["w_out"]), ffn["w_out"].device, products=leverage) for ffn in ffns]
        stream = _summed(model, place, walks, moments)
        ranks.collect([stream, *(each for moment in moments for each in moment.sums)])
        shape = (len(ffns), len(ffns[0]["w_out"])) if len(ffns) > 1 else (len(ffns[0]["w_out"]),)
        found = {"saliency": torch.empty(shape), "order": torch.empty(shape, dtype=torch.int64)}
        if not ranks.rank:
            found = _judged(model, place, moments, stream, leverage=leverage)
    ranks.share(found.values())
    return found


def _summed(
    model: nn.Module, place: int, walks: Sequence[tuple[LayerWalk, Part]], moments: "Sequence[_Moments]"
) -> Tensor:
    """Adds to the moments what the layer's neurons pass on; its tokens, and their sum of ||S||^2: (2,) float64."""
    layer = architectures.layers_of(model)[place]
    ffn, called = sub_ffn_of(model, layer), layer.get_submodule(ffn_path(model, layer))
    total = torch.zeros(2, dtype=torch.float64, device=moments[0].total.device)
    for walk, part in walks:
        given, stream, after = look(model, walk, called)
        walk.advance(after)
        ffn.add_moments([moment.sums for moment in moments], *(value.flatten(0, -2)[part.real] for value in given))
        stream = stream.flatten(0, -2)[part.real].double()
        total += torch.stack([stream.new_tensor(len(stream)), stream.square().sum()])
    return total


def _judged(
    model: nn.Module, place: int, moments: "Sequence[_Moments]", stream: Tensor, *, leverage: bool
) -> dict[str, Tensor]:
    """A layer's ranking by the sums over all tokens."""
    row, layer = architectures.architecture_of(model), architectures.layers_of(model)[place]
    ffns, (tokens, energy) = projections(model, layer), stream.tolist()
    scale = layer.get_parameter(row.scale).double() if row.scale is not None else 1.0
    spreads = [moment.spread(int(tokens), about_mean=not leverage or "b_out" in ffns[0]).cpu() for moment in moments]
    if not torch.stack([stream.cpu()[1], *(spread.sum() for spread in spreads)]).isfinite().all():
        raise ModelError(
            f"layer {place} of the FM is not finite on public_data",
            "hold it in another model.dtype, or set proxy.importance: weights",
        )
    # One for all experts: those that no token asked have the order of their output weights, and are worth next to none.
    diagonals = torch.stack([spread.diagonal() if leverage else spread for spread in spreads])
    ridge = (RIDGE * diagonals.mean()).clamp(min=torch.finfo(torch.float32).tiny)
    unit = max(energy / tokens, torch.finfo(torch.float32).tiny)
    outputs = [(ffn["w_out"].double() * scale).cpu() for ffn in ffns]
    if not leverage:
        squares = (diagonals + ridge) * torch.stack([w_out.square().sum(1) for w_out in outputs])
        saliency = (squares / unit).sqrt().float()
        ranking = by_saliency(saliency if len(ffns) > 1 else saliency[0])
        return {"saliency": ranking.saliency, "order": ranking.order}
    found = [eliminate(spread + ridge * torch.eye(len(spread)), w) for spread, w in zip(spreads, outputs, strict=True)]
    saliency = torch.stack([(costs / unit).sqrt().float() for costs, _ in found])
    order = torch.stack([turns.flip(0) for _, turns in found])
    return {"saliency": saliency, "order": order} if len(ffns) > 1 else {"saliency": saliency[0], "order": order[0]}


class _Moments:
    """Sums over tokens, in float64: what F neurons pass on, (F,), and its squares (F,) or its products (F, F)."""

    def __init__(self, neurons: int, device: torch.device, *, products: bool) -> None:
        shape = (neurons, neurons) if products else (neurons,)
        self.total = torch.zeros(neurons, dtype=torch.float64, device=device)
        self.second = torch.zeros(shape, dtype=torch.float64, device=device)

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """What :func:`kernels.activation_moments` adds to. Tokens at which all neurons pass on 0 may be left out."""
        return self.total, self.second

    def spread(self, tokens: int, *, about_mean: bool) -> Tensor:
        """Variances (F,) or covariances (F, F); about 0 instead of the mean they are mean squares and products."""
        mean = self.total / tokens
        if self.second.dim() == 1:
            return (self.second / tokens - about_mean * mean.square()).clamp(min=0)
        upper = self.second / tokens  # nothing is below its diagonal
        return upper + upper.triu(1).t() - about_mean * torch.outer(mean, mean)
