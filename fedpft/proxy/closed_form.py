"""The start of layer-level distillation: each output projection from a linear regression, in closed form.

What a dropped neuron did for the tokens of the public data, the kept ones can do in part: their output weights and the
output bias are refitted, layer by layer, so that the proxy's residual stream comes as near to the FM's as it can.

    minimise  || a dW + db - (S - s) ||^2 + r ||dW||^2

a (N, K) what the kept neurons pass on, S and s (N, D) the residual streams of FM and proxy right after the FFN's output
was added to them, N tokens, K neurons, D hidden size. The normal equations need only sums over tokens.

**Choice:** not in the paper, whose distillation starts from the weights as they were cut. One pass over a few hundred
public samples halves the hidden-state error before the first step; docs/results.md has the figures.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpft.data.batches import EncodedDataset, evaluation_batches, sample
from fedpft.model.architectures import architecture_of, layer_outputs, layers_of
from fedpft.model.subffn import SubFFN

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
    device = next(proxy.parameters()).device
    chosen = sample(len(public), samples, seed, "closed form")
    for student, teacher in matched:
        layer = layers_of(proxy)[student]
        ffn = layer.get_submodule(row.ffn)
        assert isinstance(ffn, SubFFN)
        scale = layer.get_parameter(row.scale).detach() if row.scale is not None else 1.0
        equations = _NormalEquations(ffn.neurons, ffn.w_out.shape[1], device)
        with torch.no_grad():
            for _, inputs in evaluation_batches(public, batch, chosen):
                inputs = {name: value.to(device) for name, value in inputs.items()}
                mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
                x, ours = _stream(proxy, student, inputs)
                _, theirs = _stream(model, teacher, inputs)
                real = slice(None) if mask is None else mask
                equations.add(ffn.values(x[real]).flatten(0, -2), ((theirs - ours) / scale)[real].flatten(0, -2))
            weights, bias = equations.solve(with_bias=ffn.b_out is not None)
            ffn.w_out.add_(weights)
            if ffn.b_out is not None:
                ffn.b_out.add_(bias)


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


def _stream(model: nn.Module, layer: int, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The input of a layer's FFN, and the residual stream after the FFN's output was added; both (B, T, D)."""
    row, module = architecture_of(model), layers_of(model)[layer]
    seen: dict[str, Tensor] = {}
    points = {"ffn": row.ffn} | ({"stream": row.norm} if row.post_norm else {})
    hooks = [
        module.get_submodule(path).register_forward_pre_hook(lambda _m, given, name=name: seen.update({name: given[0]}))
        for name, path in points.items()
    ]
    try:
        (after,) = layer_outputs(model, [layer], inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen["ffn"], seen.get("stream", after)
