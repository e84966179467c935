"""The start of a distillation: each output projection from a linear regression, in closed form.

What a dropped neuron did for the tokens of the public data, the kept ones can do in part: their output weights and the
output bias are refitted, layer by layer, so that the proxy's residual stream comes as near to the FM's as it can.

    minimise  || a dW + db - (S - s) ||^2 + lambda c^2 || (a' - a) dW - ((S' - S) - (s' - s)) ||^2 + r ||dW||^2

a (N, K) what the kept neurons pass on, S and s (N, D) the residual streams of FM and proxy right after the FFN's output
was added to them, N tokens, K neurons (of all experts of a mixture), D hidden size. a', S' and s' are the same under a
probe, a random LoRA put on both models; c = rms(S) / rms(S' - S), of a batch, so that at lambda = 1 both parts count
the same. The second brings the proxy's Jacobian to the FM's, along directions in which training can move LoRA, and with
it the gradient. The normal equations need only sums over tokens.

During the federation both models carry the silos' adapter, a (N, U) is of the neurons that are updated, and dW theirs.

Where the FFN's output goes through a norm before it is added (Gemma), no linear fit brings the streams together: the
norm undoes any change of size. There S and s are the outputs of the FFNs before that norm, so that the proxy's FFN does
for its own stream what the FM's does for the FM's. Where whole layers were dropped that says nothing of the dropped
ones, and the weights stay as they were cut.

**Choice:** not in the paper, whose distillation starts from the weights as they were cut. One pass over a few hundred
public samples halves the hidden-state error before the first step; docs/results.md has the figures.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fedpft.data.batches import EncodedDataset, sample
from fedpft.errors import DataError, ModelError
from fedpft.finite import is_finite
from fedpft.model.adapters import Probes
from fedpft.model.architectures import architecture_of, config_of, is_post_norm, layers_of
from fedpft.model.precision import wide
from fedpft.model.streaming import at_hand
from fedpft.model.subffn import SubExperts, SubFFN, sub_ffns
from fedpft.model.walk import LayerWalk
from fedpft.parallel import ALONE, Ranks
from fedpft.progress import progress
from fedpft.proxy.journal import Found, Journal
from fedpft.proxy.parts import Part, Parts
from fedpft.seeding import derive_seed

# r, in units of the mean square of a neuron's value: regression on fewer tokens than neurons stays sane
Ridge = float | Literal["held_out"]
CANDIDATES = tuple(10.0**power for power in range(-5, 2))
HELD_OUT = 5  # of so many batches one


def fit_output_projections(
    proxy: nn.Module,
    model: nn.Module,
    matched: Sequence[tuple[int, int]],
    public: EncodedDataset,
    *,
    samples: int,
    batch: int,
    seed: int,
    ridge: Ridge = 1e-3,
    probes: float = 0.0,
    layers: Sequence[int] | None = None,
    updated: Mapping[int, Tensor] | None = None,
    journal: Journal | None = None,
    then: "Callable[[int, Sequence[Lot], Sequence[int]], None] | None" = None,
    most: int | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Refits the output projection and bias of every compressed layer, in place, from the first layer to the last.

    Args:
        proxy, model: student and teacher; with `probes` both carry the same LoRA, which stays as it is.
        matched: (proxy layer, FM layer) pairs, in the order of the layers.
        public: unlabelled samples, of which `samples` are drawn with the seed, and used `batch` at a time.
        ridge: r; `held_out`: of CANDIDATES the one that does best on every fifth batch, in each layer by itself, with
            which the layer is then fitted on all.
        probes: lambda.
        layers: as of :class:`Probes`.
        updated: proxy layer -> (U,) int64 neurons whose output weights are refitted; None: all of them.
        journal: keeps each layer's.
        then: is given each layer when it is refitted, before the next is looked at, this rank's parts of the batches,
            whose proxy stands before it and whose FM behind the layer that it is to be like, and how many parts each
            batch has.
        most: samples that are computed at once; None: all of a batch, or a part for each rank. With probes c is a
            part's.
        ranks: that look at the batches together, each with a proxy of its own that becomes the same.

    Raises:
        DataError: there is no batch to hold out.
        ModelError: FM or proxy is not finite on the samples.
    """
    row = architecture_of(proxy)
    if row.output_norm is not None and len(layers_of(proxy)) < len(layers_of(model)):
        return
    device, ffns = next(proxy.parameters()).device, list(sub_ffns(proxy).values())
    chosen = sample(len(public), samples, seed, "closed form")
    if ridge == "held_out":
        batch = min(batch, max(1, len(chosen) // HELD_OUT))
    moving = Probes(proxy, model, layers) if probes else None
    parts = Parts(public, chosen, batch, most=most, ranks=ranks)
    with torch.no_grad(), progress("closed form", len(matched), "layer") as report:
        lots = [
            Lot(proxy, model, LayerWalk(proxy, part.inputs), LayerWalk(model, part.inputs), part)
            for part in parts.own(device)
        ]
        if ridge == "held_out" and len(parts.counts) < 2:
            raise DataError(
                "closed_form_ridge: held_out needs two of closed_form_samples, of which one is held out",
                "ask for more of them and give public_data the rows, or name a number",
            )
        fit = _Fit(proxy, model, lots, ridge, moving, probes, seed, ranks)
        for done, (student, teacher) in enumerate(matched, 1):
            layer, ffn = layers_of(proxy)[student], ffns[student]
            own = None if updated is None else updated[student].to(device)
            with at_hand(proxy, [student], writing=True):
                scale = layer.get_parameter(row.scale).detach() if row.scale is not None else 1.0
                found = partial(fit.of_layer, student, teacher, ffn, own, scale)
                solution = (journal or Journal()).kept(f"closed-form-{student}", found)["solution"].to(device)
                weights = solution.new_zeros(ffn.neurons, solution.shape[1])
                weights[slice(None) if own is None else own] = solution[:-1]
                ffn.add_to_output(weights, solution[-1])
                if then is not None:
                    fit.bring(student, teacher + 1)
                    then(student, lots, parts.counts)
            report(done)


class _Fit:
    """The regression of a layer at a time.

    Args:
        lots: this rank's parts of batches on their way, which come along layer by layer.
        moving, probes, seed: lambda, and what draws the probes, if there are any.
    """

    def __init__(
        self,
        proxy: nn.Module,
        model: nn.Module,
        lots: "Sequence[Lot]",
        ridge: Ridge,
        moving: Probes | None,
        probes: float,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._proxy, self._model, self._lots, self._ranks = proxy, model, lots, ranks
        self._ridge, self._moving, self._probes, self._seed = ridge, moving, probes, seed
        self._moved = [lot.again() for lot in lots] if moving else []

    def of_layer(
        self, student: int, teacher: int, ffn: SubFFN | SubExperts, updated: Tensor | None, scale: Tensor | float
    ) -> Found:
        """`solution`: dW above db, (U + 1, D) float64, the same on all ranks.

        Raises:
            ModelError: FM or proxy is not finite on the samples.
        """
        self.bring(student, teacher)
        neurons = ffn.neurons if updated is None else len(updated)
        hidden, device = config_of(self._model.config).hidden_size, next(self._proxy.parameters()).device
        sums = [_NormalEquations(neurons, hidden, device) for _ in range(2 if self._ridge == "held_out" else 1)]
        with at_hand(self._model, [teacher]):
            self._add(sums[0], sums[-1], ffn, updated, scale)
        for equations in sums:
            self._ranks.collect((equations.gram, equations.cross))
        solution = torch.empty_like(sums[0].cross)
        if not self._ranks.rank:
            solution = self._solved(sums[0], sums[-1], ffn)
            if not is_finite(solution):
                raise ModelError(
                    f"the closed form of the proxy's layer {student}: FM or proxy is not finite on public_data",
                    "set model.dtype: bfloat16 or float32",
                )
        self._ranks.share([solution])
        return {"solution": solution}

    def _add(
        self,
        seen: "_NormalEquations",
        unseen: "_NormalEquations",
        ffn: SubFFN | SubExperts,
        updated: Tensor | None,
        scale: Tensor | float,
    ) -> None:
        """What this rank has to add: to the same equations twice, or to those of the batches that are held out."""
        own: Tensor | slice = slice(None) if updated is None else updated
        for number, lot in enumerate(self._lots):
            equations = unseen if lot.part.batch % HELD_OUT == 1 else seen
            a, theirs, ours = lot.at(ffn)
            equations.add(a[:, own], (theirs - ours) / scale)
            if self._moving is not None:
                with self._probe(lot):
                    a_moved, theirs_moved, ours_moved = self._moved[number].at(ffn)
                change = theirs_moved - theirs
                share = self._probes * theirs.square().mean() / change.square().mean()
                weight = share.sqrt() if change.any() else 0.0
                wanted = (change - (ours_moved - ours)) / scale
                equations.add(weight * (a_moved - a)[:, own], weight * wanted, constant=0.0)

    def _solved(self, seen: "_NormalEquations", unseen: "_NormalEquations", ffn: SubFFN | SubExperts) -> Tensor:
        if not ffn.has_output_bias:
            seen.leave_out_bias()
            unseen.leave_out_bias()
        if isinstance(self._ridge, str):
            r = min(CANDIDATES, key=lambda candidate: unseen.error(seen.solve(candidate)))
            seen.join(unseen)
        else:
            r = self._ridge
        return seen.solve(r)

    def bring(self, ours: int, theirs: int) -> None:
        """Lets all batches leave the layers before these behind, in the proxy and in the FM."""
        lots, moved = self._lots, self._moved
        for layer in range(lots[0].ours.position, ours) if lots else ():
            with at_hand(self._proxy, [layer]):
                self._advance([lot.ours for lot in lots], [lot.ours for lot in moved])
        for layer in range(lots[0].theirs.position, theirs) if lots else ():
            with at_hand(self._model, [layer]):
                self._advance([lot.theirs for lot in lots], [lot.theirs for lot in moved])

    def _advance(self, walks: Sequence[LayerWalk], moved: Sequence[LayerWalk]) -> None:
        for walk in walks:
            walk.advance()
        for lot, walk in zip(self._lots, moved, strict=False):
            with self._probe(lot):
                walk.advance()

    def _probe(self, lot: "Lot") -> AbstractContextManager[None]:
        assert self._moving is not None
        return self._moving.drawn(derive_seed(self._seed, "closed form, probe", lot.part.batch))


@dataclass
class Lot:
    """A part of a batch on its way through proxy and FM."""

    proxy: nn.Module
    model: nn.Module
    ours: LayerWalk
    theirs: LayerWalk
    part: Part

    def again(self) -> "Lot":
        """The same batch on a way of its own, from where it is now."""
        return replace(self, ours=copy(self.ours), theirs=copy(self.theirs))

    def at(self, ffn: SubFFN | SubExperts) -> tuple[Tensor, Tensor, Tensor]:
        """a (N, K), S and s (N, D) at the next layer of each, which the proxy does not leave: it is to be refitted."""
        given, ours, _ = look(self.proxy, self.ours, ffn)
        _, theirs, after = look(self.model, self.theirs, None)
        self.theirs.advance(after)
        real = self.part.real
        values = ffn.values(*given).flatten(0, -2)[real]
        return wide(values), wide(theirs).flatten(0, 1)[real], wide(ours).flatten(0, 1)[real]


class _NormalEquations:
    """Sums over tokens, in float64: (K + 1, K + 1) and (K + 1, D). The last column of ones stands for the bias."""

    def __init__(self, neurons: int, hidden: int, device: torch.device) -> None:
        self.gram = torch.zeros(neurons + 1, neurons + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(neurons + 1, hidden, dtype=torch.float64, device=device)

    def add(self, values: Tensor, wanted: Tensor, constant: float = 1.0) -> None:
        """values: (N, K), wanted: (N, D). constant: what the bias adds to a row."""
        extended = torch.cat([values, values.new_full((len(values), 1), constant)], dim=1).double()
        self.gram += extended.t() @ extended
        self.cross += extended.t() @ wanted.double()

    def join(self, others: "_NormalEquations") -> None:
        """Adds the sums over other tokens."""
        self.gram += others.gram
        self.cross += others.cross

    def leave_out_bias(self) -> None:
        """From here on the bias of a solution is 0."""
        self.gram[-1, :-1] = self.gram[:-1, -1] = self.cross[-1] = 0.0

    def solve(self, ridge: float) -> Tensor:
        """dW above db, (K + 1, D) float64."""
        spread = self.gram.diagonal()[:-1].mean()
        # Neurons that are all silent have no spread; whatever the penalty, their weights then stay as they are.
        penalty = (ridge * spread if spread > 0 else 1.0) * torch.ones_like(self.gram.diagonal())
        penalty[-1] = 0.0
        solution: Tensor = torch.linalg.solve(self.gram + penalty.diag(), self.cross)
        return solution

    def error(self, solution: Tensor) -> float:
        """The sum of squares that a solution leaves on these tokens, less what it is without one."""
        return float((solution * (self.gram @ solution - 2.0 * self.cross)).sum())


def look(model: nn.Module, walk: LayerWalk, ffn: nn.Module | None) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """What the next layer's `ffn` is called with, S or s as the head of this file says, and the layer's output."""
    row, module = architecture_of(model), layers_of(model)[walk.position]
    called: list[tuple[Tensor, ...]] = [()]
    seen: list[Tensor] = []
    hooks = []
    if ffn is not None:
        hooks.append(ffn.register_forward_pre_hook(lambda _m, given: called.append(given)))
    if (norm := row.output_norm or (row.norm if is_post_norm(model) else None)) is not None:
        hooks.append(module.get_submodule(norm).register_forward_pre_hook(lambda _m, given: seen.append(given[0])))
    try:
        after = walk.output()
    finally:
        for hook in hooks:
            hook.remove()
    return called[-1], seen[0] if seen else after, after
