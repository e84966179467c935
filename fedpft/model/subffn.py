"""The feed-forward part of a proxy's layer: a chosen set of neurons, stored neuron by neuron.

    y = act(x W_in^T + b_in) W_out + b_out                               plain
    y = (act(x W_gate^T + b_gate) * (x W_in^T + b_in)) W_out + b_out     gated

D hidden size, F the FM's FFN size, K neurons here, U neurons being updated, N tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpft import kernels
from fedpft.errors import ModelError
from fedpft.kernels import reference
from fedpft.model.architectures import activation_of, architecture_of

# The kernels' argument names. Row j of each is neuron j; b_out belongs to no neuron.
NEURON_PARAMETERS = ("w_in", "b_in", "w_gate", "b_gate", "w_out")


@dataclass
class InactivityCounter:
    """Counts, for every neuron of one SubFFN, the tokens at which it is inactive (method.md, section 4).

    Attributes:
        eps: a neuron is inactive at a token if |act(z)| <= eps.
        counts: (K,) int64, inactive tokens so far.
        tokens: tokens so far; under a mask a tensor on its device, so that no step waits for a GPU.
        mask: (N,) bool, the tokens of the next forward pass that count; None: all of them.
    """

    eps: float
    counts: Tensor
    tokens: int | Tensor = 0
    mask: Tensor | None = None


class SubFFN(nn.Module):
    """K neurons of one FFN, frozen.

    Parameters:
        w_in: (K, D), b_in: (K,) or None. Input projection, "up" of a gated FFN.
        w_gate: (K, D) or None, b_gate: (K,) or None. Only a gated FFN has them.
        w_out: (K, D), the transpose of the output projection, b_out: (D,) or None.
    """

    w_in: nn.Parameter
    w_out: nn.Parameter
    b_out: nn.Parameter | None

    def __init__(self, parameters: Mapping[str, Tensor], activation: str) -> None:
        super().__init__()
        for name in (*NEURON_PARAMETERS, "b_out"):
            value = parameters.get(name)
            copy = None if value is None else value.detach().clone(memory_format=torch.contiguous_format)
            self.register_parameter(name, None if copy is None else nn.Parameter(copy, requires_grad=False))
        self.activation = activation
        self.inactivity: InactivityCounter | None = None
        self._training: dict[str, Any] | None = None  # sub_ffn_train's tensors while training_neurons is open

    @property
    def neurons(self) -> int:
        """K."""
        return self.w_in.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        if self._training is not None:
            return kernels.sub_ffn_train(x, **self._training, b_out=self.b_out, activation=self.activation)
        weights: dict[str, Any] = {**self._neuron_parameters(), "b_out": self.b_out, "activation": self.activation}
        counter = self.inactivity
        if counter is None:
            return cast(Tensor, kernels.sub_ffn(x, **weights))
        y, counts = kernels.sub_ffn(x, **weights, mask=counter.mask, eps=counter.eps, count=True)
        counter.counts += counts
        counter.tokens += x[..., 0].numel() if counter.mask is None else counter.mask.sum()
        return y

    def values(self, x: Tensor) -> Tensor:
        """What each neuron passes on to the output projection: (..., D) -> (..., K)."""
        parameters = self._neuron_parameters()
        w_gate = parameters["w_gate"]
        up = nn.functional.linear(x, self.w_in, parameters["b_in"])
        gate = up if w_gate is None else nn.functional.linear(x, w_gate, parameters["b_gate"])
        active = reference.ACTIVATIONS[self.activation].forward(gate)
        return active if w_gate is None else active * up

    def product(self) -> Tensor:
        """W_out W_in, (D, D): what the FFN would be without its activation (method.md, section 2). Differentiable."""
        if self._training is None:
            return self.w_out.t() @ self.w_in
        updated_in, updated_out = self._training["updated_in"], self._training["updated_out"]
        fixed_in, fixed_out = (self._training[name][len(updated_in) :] for name in ("w_in", "w_out"))
        product: Tensor = updated_out.t() @ updated_in + fixed_out.t() @ fixed_in
        return product

    @contextmanager
    def training_neurons(self, neurons: Tensor | None) -> Iterator[list[nn.Parameter]]:
        """While open, the given neurons and the output bias can be trained; the others stand still.

        The kernel wants the updated neurons in front, so that their gradients need no copy: the weights are
        reordered on entry, and written back in their own order on exit.

        Args:
            neurons: (U,) int64, without repetition; None: all K.

        Yields:
            The trainable parameters.
        """
        chosen = torch.zeros(self.neurons, dtype=torch.bool, device=self.w_in.device)
        chosen[slice(None) if neurons is None else neurons.to(chosen.device)] = True
        order, updated = torch.argsort(~chosen, stable=True), int(chosen.sum())
        ordered = {name: None if p is None else p.detach()[order] for name, p in self._neuron_parameters().items()}
        leaves = {
            f"updated_{name.removeprefix('w_')}": None if tensor is None else nn.Parameter(tensor[:updated])
            for name, tensor in ordered.items()
        }
        self._training = {**ordered, **leaves}
        bias = [] if self.b_out is None else [self.b_out]
        for parameter in bias:
            parameter.requires_grad_(True)
        try:
            yield [leaf for leaf in leaves.values() if leaf is not None] + bias
        finally:
            self._training = None
            with torch.no_grad():
                for name, tensor in ordered.items():
                    if tensor is not None:
                        getattr(self, name)[order] = tensor
            for parameter in bias:
                parameter.requires_grad_(False).grad = None

    def _neuron_parameters(self) -> dict[str, nn.Parameter | None]:
        return {name: getattr(self, name) for name in NEURON_PARAMETERS}


def projections(model: nn.Module, layer: nn.Module) -> dict[str, Tensor]:
    """The FFN of one of the FM's layers: those of the SubFFN's parameters that it has, as views of the FM's own.

    Returns:
        w_in, w_gate, w_out: (F, D), b_in, b_gate: (F,), b_out: (D,).

    Raises:
        ModelError: the model is a variant whose FFN is not where the table says.
    """
    row, found = architecture_of(model), {}
    for kind, path in (("in", row.input), ("gate", row.gate), ("out", row.output)):
        if path is None:
            continue
        try:
            projection = layer.get_submodule(path)
        except AttributeError:
            raise ModelError(
                f"a layer of this {model.config.model_type} has no {path!r}",  # type: ignore[union-attr]
                "its FFN is a variant that fedpft/model/architectures.py does not describe",
            ) from None
        weight, bias = projection.get_parameter("weight").detach(), getattr(projection, "bias", None)
        # `Conv1D` has its neurons where `nn.Linear` has them not
        found[f"w_{kind}"] = weight.t() if row.transposed != (kind == "out") else weight
        if bias is not None:
            found[f"b_{kind}"] = bias.detach()
    return found


def replace_ffn(model: nn.Module, layer: nn.Module, neurons: Tensor) -> None:
    """Puts a SubFFN of the given neurons, (K,) int64, in the place of a layer's FFN. In place."""
    row = architecture_of(model)
    parameters = {
        name: value[neurons] if name in NEURON_PARAMETERS else value
        for name, value in projections(model, layer).items()
    }
    layer.set_submodule(row.ffn, SubFFN(parameters, activation_of(model)))
    if row.absorbed is not None:
        layer.set_submodule(row.absorbed, nn.Identity())


def sub_ffns(model: nn.Module) -> dict[str, SubFFN]:
    """Every SubFFN of a proxy by its module name, in the order of the layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SubFFN)}
