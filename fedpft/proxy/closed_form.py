"""The start of layer-level distillation: each output projection from a linear regression, in closed form.

What a dropped neuron did for the tokens of the public data, the kept ones can do in part: their output weights and the
output bias are refitted, layer by layer, so that the proxy's residual stream comes as near to the FM's as it can.

    minimise  || a dW + db - (S - s) ||^2 + r ||dW||^2

a (N, K) what the kept neurons pass on, S and s (N, D) the residual streams of FM and proxy right after the FFN's output
was added to them, N tokens, K neurons (of all experts of a mixture), D hidden size. The normal equations need only sums
over tokens.

Where the FFN's output goes through a norm before it is added (Gemma), no linear fit brings the streams together: the
norm undoes any change of size. There S and s are the outputs of the FFNs before that norm, so that the proxy's FFN does
for its own stream what the FM's does for the FM's. Where whole layers were dropped that says nothing of the dropped
ones, and the weights stay as they were cut.

**Choice:** not in the paper, whose distillation starts from the weights as they were cut. One pass over a few hundred
public samples halves the hidden-state error before the first step; docs/results.md has the figures.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fedpft.data.batches import EncodedDataset, evaluation_batches, sample
from fedpft.model.architectures import LayerWalk, architecture_of, is_post_norm, layers_of
from fedpft.model.precision import wide
from fedpft.model.subffn import sub_ffns

RIDGE = 1e-3  # r, in units of the mean square of a neuron's value; regression on fewer tokens than neurons stays sane


def fit_output_projections(
    proxy: nn.Module,
    model: nn.Module,
    matched: Sequence[tuple[int, int]],
    public: EncodedDataset,
    *,
    samples: int,
    batch: int,
    seed: int,
) -> None:
    """Refits the output projection and bias of every compressed layer, in place, from the first layer to the last.

    Args:
        proxy, model: student and teacher.
        matched: (proxy layer, FM layer) pairs, in the order of the layers.
        public: unlabelled samples, of which `samples` are drawn with the seed, and used `batch` at a time.
    """
    row = architecture_of(proxy)
    if row.output_norm is not None and len(layers_of(proxy)) < len(layers_of(model)):
        return
    device = next(proxy.parameters()).device
    chosen, ffns = sample(len(public), samples, seed, "closed form"), list(sub_ffns(proxy).values())
    with torch.no_grad():
        walks = []
        for inputs, real in real_inputs(public, chosen, batch, device):
            walks.append((LayerWalk(proxy, inputs), LayerWalk(model, inputs), real))
        for student, teacher in matched:
            layer, ffn = layers_of(proxy)[student], ffns[student]
            scale = layer.get_parameter(row.scale).detach() if row.scale is not None else 1.0
            equations: _NormalEquations | None = None
            for ours, theirs, real in walks:
                for walk, place in ((ours, student), (theirs, teacher)):
                    while walk.position < place:
                        walk.advance()
                given, stream, _ = look(proxy, ours, ffn)
                _, wanted, after = look(model, theirs, None)
                theirs.advance(after)
                values = ffn.values(*given).flatten(0, -2)[real]
                missing = ((wide(wanted) - wide(stream)) / scale).flatten(0, 1)[real]
                equations = equations or _NormalEquations(values.shape[1], missing.shape[1], device)
                equations.add(values, missing)
            if equations is not None:
                ffn.add_to_output(*equations.solve(with_bias=ffn.has_output_bias))


class _NormalEquations:
    """Sums over tokens, in float64: (K + 1, K + 1) and (K + 1, D). The last column of ones stands for the bias."""

    def __init__(self, neurons: int, hidden: int, device: torch.device) -> None:
        self.gram = torch.zeros(neurons + 1, neurons + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(neurons + 1, hidden, dtype=torch.float64, device=device)

    def add(self, values: Tensor, wanted: Tensor) -> None:
        """values: (N, K), wanted: (N, D)."""
        extended = torch.cat([values, values.new_ones(len(values), 1)], dim=1).double()
        self.gram += extended.t() @ extended
        self.cross += extended.t() @ wanted.double()

    def solve(self, *, with_bias: bool) -> tuple[Tensor, Tensor]:
        """dW (K, D) and db (D,), float64; without bias db is 0."""
        if not with_bias:
            self.gram[-1, :-1] = self.gram[:-1, -1] = self.cross[-1] = 0.0
        spread = self.gram.diagonal()[:-1].mean()
        # Neurons that are all silent have no spread; whatever the penalty, their weights then stay as they are.
        penalty = (RIDGE * spread if spread > 0 else 1.0) * torch.ones_like(self.gram.diagonal())
        penalty[-1] = 0.0
        solution = torch.linalg.solve(self.gram + penalty.diag(), self.cross)
        return solution[:-1], solution[-1]


def real_inputs(
    public: EncodedDataset, chosen: Tensor, batch: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Tensor | slice]]:
    """The chosen samples as a model takes them, `batch` at a time; and which of the (B T,) tokens are no padding."""
    for _, inputs in evaluation_batches(public, batch, chosen):
        inputs = {name: value.to(device) for name, value in inputs.items()}
        yield inputs, inputs["attention_mask"].bool().flatten() if "attention_mask" in inputs else slice(None)


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
