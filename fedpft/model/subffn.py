"""The feed-forward part of a proxy's layer: a chosen set of neurons, stored neuron by neuron.

    y = act(x W_in^T + b_in) W_out + b_out                               plain
    y = (act(x W_gate^T + b_gate) * (x W_in^T + b_in)) W_out + b_out     gated

D hidden size, F the FM's FFN size, K neurons here, U neurons being updated, N tokens, R rank of LoRA, E experts of a
mixture, M of which see a token.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpft import kernels
from fedpft.errors import ModelError
from fedpft.kernels import reference
from fedpft.model.architectures import activation_of, architecture_of
from fedpft.model.precision import wide

# The kernels' argument names. Row j of each is neuron j; b_out belongs to no neuron.
NEURON_PARAMETERS = ("w_in", "b_in", "w_gate", "b_gate", "w_out")


@dataclass
class InactivityCounter:
    """Counts, for every neuron of one layer's FFN, the tokens at which it is inactive (method.md, section 4).

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
    """K neurons of one FFN, frozen, and LoRA on them if there is any.

    Parameters:
        w_in: (K, D), b_in: (K,) or None. Input projection, "up" of a gated FFN.
        w_gate: (K, D) or None, b_gate: (K,) or None. Only a gated FFN has them.
        w_out: (K, D), the transpose of the output projection, b_out: (D,) or None.
        lora_A, lora_B: after `attach_lora`, by the projections' names, float32, in the shapes that LoRA has on the FM's
            projections, but with K for F.
        lora_enabled: whether the FFN computes with it, as peft's layers are told by `enable_adapters`.
        compact: whether bfloat16 is good enough for what the frozen neurons keep for backward.

    With LoRA the kernels get W + s B A, rounded to W's type once, as `merge` rounds it in the FM. So LoRA has no
    dropout here: its mask would lie between B A and the input, inside of the fused FFN.
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
        self.lora_A: nn.ParameterDict | None = None
        self.lora_B: nn.ParameterDict | None = None
        self.lora_enabled = True
        self.compact = False
        self._lora_scale, self._one_gated = 0.0, False
        self._training: dict[str, Any] | None = None  # sub_ffn_train's tensors while training_neurons is open
        self._order: Tensor | slice = slice(None)  # in which the neurons stand there

    @property
    def neurons(self) -> int:
        """K."""
        return self.w_in.shape[0]

    def attach_lora(self, rank: int, scale: float, *, one_gated: bool) -> None:
        """Puts LoRA on every projection: A drawn from torch's generator as peft draws it, B zero.

        Args:
            rank: R. Of each projection A is (R, inputs) and B (outputs, R).
            scale: s.
            one_gated: gate and input are one projection of the FM, with one A: their B is (2 K, R), the gate in front.
        """
        neurons, hidden = self.w_in.shape
        shapes = {"w_in": (hidden, 2 * neurons if one_gated else neurons), "w_out": (neurons, hidden)}
        if self._neuron_parameters()["w_gate"] is not None and not one_gated:
            shapes["w_gate"] = (hidden, neurons)
        a, b = nn.ParameterDict(), nn.ParameterDict()
        for name, (inputs, outputs) in shapes.items():
            drawn = nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5))
            a[name] = nn.Parameter(drawn.to(self.w_in.device))
            b[name] = nn.Parameter(torch.zeros(outputs, rank, device=self.w_in.device))
        self.lora_A, self.lora_B, self._lora_scale, self._one_gated = a, b, scale, one_gated

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        kernel, weights = self._kernel()
        weights |= {"b_out": self.b_out, "activation": self.activation}
        counter = self.inactivity if self._training is None else None
        if counter is None:
            return cast(Tensor, kernel(x, **weights))
        y, counts = kernel(x, **weights, mask=counter.mask, eps=counter.eps, count=True)
        counter.counts += counts
        counter.tokens += x[..., 0].numel() if counter.mask is None else counter.mask.sum()
        return cast(Tensor, y)

    def values(self, x: Tensor) -> Tensor:
        """What each neuron passes on to the output projection: (..., D) -> (..., K)."""
        weights = self._weights()
        w_gate = weights["w_gate"]
        up = nn.functional.linear(x, weights["w_in"], weights["b_in"])
        gate = up if w_gate is None else nn.functional.linear(x, w_gate, weights["b_gate"])
        active = reference.ACTIVATIONS[self.activation].forward(gate)
        return active if w_gate is None else active * up

    def add_moments(self, sums: Sequence[tuple[Tensor, Tensor]], x: Tensor, *, shares: Tensor | None = None) -> None:
        """As :meth:`SubExperts.add_moments`, of the one FFN that there is. shares: (N,) factors, or None."""
        ((total, second),) = sums
        weights = self._weights()
        del weights["w_out"]
        kernels.activation_moments(total, second, x, **weights, activation=self.activation, shares=shares)

    def product(self) -> Tensor:
        """W_out W_in, (D, D): what the FFN would be without its activation (method.md, section 2). Differentiable.

        LoRA is not in it, as it is not in what it is compared with.
        """
        if self._training is None:
            return self.w_out.t() @ self.w_in
        updated_in, updated_out = self._training["updated_in"], self._training["updated_out"]
        fixed_in, fixed_out = (self._training[name][len(updated_in) :] for name in ("w_in", "w_out"))
        product: Tensor = updated_out.t() @ updated_in + fixed_out.t() @ fixed_in
        return product

    @property
    def has_output_bias(self) -> bool:
        """Whether there is a b_out."""
        return self.b_out is not None

    def add_to_output(self, weights: Tensor, bias: Tensor) -> None:
        """Adds (K, D) to the neurons' output weights, and (D,) to the output bias if there is one. In place."""
        with torch.no_grad():
            self.w_out.add_(weights)
            if self.b_out is not None:
                self.b_out.add_(bias)

    def places(self, neurons: Tensor) -> dict[str, Tensor]:
        """Where neurons are: the submodule that has them (here always this module itself, "") -> their rows in it."""
        return {"": neurons}

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
            _updated(name): None if tensor is None else nn.Parameter(tensor[:updated])
            for name, tensor in ordered.items()
        }
        self._training, self._order = {**ordered, **leaves}, order
        bias = [] if self.b_out is None else [self.b_out]
        for parameter in bias:
            parameter.requires_grad_(True)
        try:
            yield [leaf for leaf in leaves.values() if leaf is not None] + bias
        finally:
            self._training, self._order = None, slice(None)
            with torch.no_grad():
                for name, tensor in ordered.items():
                    if tensor is not None:
                        getattr(self, name)[order] = tensor
            for parameter in bias:
                parameter.requires_grad_(False).grad = None

    def _kernel(self) -> tuple[Callable[..., Tensor | tuple[Tensor, Tensor]], dict[str, Any]]:
        """The operator that has the gradients of whatever trains now, and what it wants of the neurons."""
        if self.lora_A is None and self._training is not None:
            return kernels.sub_ffn_train, dict(self._training)
        weights = self._weights()
        if not torch.is_grad_enabled() or not any(w is not None and w.requires_grad for w in weights.values()):
            return kernels.sub_ffn, weights | {"compact": self.compact}
        updated = self.neurons if self._training is None else len(self._training["updated_in"])
        views = {_updated(name): None if w is None else w[:updated] for name, w in weights.items()}
        return kernels.sub_ffn_train, {name: None if w is None else w.detach() for name, w in weights.items()} | views

    def _weights(self) -> dict[str, Any]:
        """What the neurons compute with, differentiable: W, or W + s B A.

        A sum is formed anew in each pass: kept, it would be stale after any step of A, B or W.
        """
        weights: dict[str, Any] = {**self._neuron_parameters()}
        if (opened := self._training) is not None:
            parts = {name: (opened[_updated(name)], opened[name]) for name in weights if opened[name] is not None}
            weights |= {name: torch.cat([leaf, whole[len(leaf) :]]) for name, (leaf, whole) in parts.items()}
        for name, change in self._lora_changes().items():
            summed = wide(weights[name]) + change[self._order]
            weights[name] = summed.to(weights[name].dtype)
        return weights

    def _lora_changes(self) -> dict[str, Tensor]:
        """s B A of each of the neurons' weights, (K, D)."""
        if self.lora_A is None or self.lora_B is None or not self.lora_enabled:
            return {}
        changes = {name: self._lora_scale * (self.lora_B[name] @ a) for name, a in self.lora_A.items()}
        changes["w_out"] = changes["w_out"].t()
        if self._one_gated:
            changes["w_gate"], changes["w_in"] = changes["w_in"].chunk(2)
        return changes

    def _neuron_parameters(self) -> dict[str, nn.Parameter | None]:
        return {name: getattr(self, name) for name in NEURON_PARAMETERS}


class SubExperts(nn.Module):
    """K neurons of each expert of a mixture, frozen. It takes the place of the experts; their router stays as it is.

    To all that counts, updates or sends neurons it is one FFN of E K neurons, expert by expert. A neuron does nothing
    for the tokens that its expert does not see, and so is inactive there.
    """

    def __init__(self, experts: Sequence[SubFFN]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.inactivity: InactivityCounter | None = None

    @property
    def neurons(self) -> int:
        """E K."""
        return len(self.experts) * self._experts[0].neurons

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """x: (N, D), chosen: (N, M) int64 experts of each token, shares: (N, M) of each in the sum -> (N, D)."""
        y, counter = torch.zeros_like(x), self.inactivity
        real = None
        if counter is not None:
            real = torch.ones_like(x[:, 0], dtype=torch.bool) if counter.mask is None else counter.mask
            counter.tokens += int(real.sum())
        for index, expert in enumerate(self._experts):
            tokens, place = torch.where(chosen == index)
            if counter is not None and real is not None:
                counts = counter.counts[self._rows(index)]
                counts += real.sum() - real[tokens].sum()
                expert.inactivity = InactivityCounter(counter.eps, counts, mask=real[tokens])
            if len(tokens):
                part = expert(x[tokens]) * shares[tokens, place, None]  # wider than x, where the router is
                y = y.index_add(0, tokens, part.to(y.dtype))
            expert.inactivity = None
        return y

    def values(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """What each neuron passes on to the output projection, 0 where its expert is not asked: (N, E K)."""
        values = x.new_zeros(len(x), self.neurons)
        for index, expert in enumerate(self._experts):
            tokens, place = torch.where(chosen == index)
            values[tokens, self._rows(index)] = expert.values(x[tokens]) * shares[tokens, place, None]
        return values

    def add_moments(self, sums: Sequence[tuple[Tensor, Tensor]], x: Tensor, chosen: Tensor, shares: Tensor) -> None:
        """Adds what each neuron passes on, summed over tokens, and its squares or products. In place.

        sums: of each expert what :func:`kernels.activation_moments` adds to.
        """
        for index, (expert, own) in enumerate(zip(self._experts, sums, strict=True)):
            tokens, place = torch.where(chosen == index)
            expert.add_moments([own], x[tokens], shares=shares[tokens, place])

    def product(self) -> Tensor:
        """W_out W_in of each expert, (E, D, D)."""
        return torch.stack([expert.product() for expert in self._experts])

    @property
    def has_output_bias(self) -> bool:
        """No expert has one."""
        return False

    def add_to_output(self, weights: Tensor, bias: Tensor) -> None:
        """Adds (E K, D) to the neurons' output weights. In place."""
        for index, expert in enumerate(self._experts):
            expert.add_to_output(weights[self._rows(index)], bias)

    def places(self, neurons: Tensor) -> dict[str, Tensor]:
        """Where neurons are: the expert's submodule -> their rows in it."""
        return {f".experts.{index}": rows for index, rows in enumerate(self._split(neurons))}

    @contextmanager
    def training_neurons(self, neurons: Tensor | None) -> Iterator[list[nn.Parameter]]:
        """As :meth:`SubFFN.training_neurons`."""
        rows = [None] * len(self.experts) if neurons is None else self._split(neurons)
        with ExitStack() as stack:
            yield [
                parameter
                for expert, own in zip(self._experts, rows, strict=True)
                for parameter in stack.enter_context(expert.training_neurons(own))
            ]

    @property
    def _experts(self) -> list[SubFFN]:
        return cast(list[SubFFN], list(self.experts))

    def _rows(self, expert: int) -> slice:
        each = self.neurons // len(self.experts)
        return slice(expert * each, (expert + 1) * each)

    def _split(self, neurons: Tensor) -> list[Tensor]:
        spans = [self._rows(index) for index in range(len(self.experts))]
        return [neurons[(neurons >= span.start) & (neurons < span.stop)] - span.start for span in spans]


def projections(model: nn.Module, layer: nn.Module) -> list[dict[str, Tensor]]:
    """The FFN of one of the FM's layers, or those of its experts, as views of the FM's own tensors.

    Returns:
        Of each those of the SubFFN's parameters that it has: w_in, w_gate, w_out: (F, D), b_in, b_gate: (F,), b_out:
        (D,).

    Raises:
        ModelError: the model is a variant whose FFN is not where the table says.
    """
    row = architecture_of(model)
    if (experts := _experts(model, layer)) is not None:
        both = (experts.get_parameter(name).detach() for name in ("gate_up_proj", "down_proj"))
        return [_gated(first) | {"w_out": last.t()} for first, last in zip(*both, strict=True)]
    found: dict[str, Tensor] = {}
    for kind, path in (("in", row.input), ("gate", row.gate), ("out", row.output)):
        if path is None or (kind == "gate" and path == row.input):
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
        weight = weight.t() if row.transposed != (kind == "out") else weight
        bias = None if bias is None else bias.detach()
        if kind == "in" and row.gate == row.input:
            found |= _gated(weight, bias)
        else:
            found |= {f"w_{kind}": weight} if bias is None else {f"w_{kind}": weight, f"b_{kind}": bias}
    return [found]


def sub_ffn_of(model: nn.Module, layer: nn.Module, neurons: Tensor | None = None) -> SubFFN | SubExperts:
    """What could stand where a layer of the FM has its FFN, or the weights of its experts (:func:`ffn_path`).

    Args:
        neurons: (K,) int64; of experts (E, K), or (K,) for the same of each; None: all of them.
    """
    whole, activation = projections(model, layer), activation_of(model)
    if neurons is None:
        neurons = torch.arange(len(whole[0]["w_in"]))
    ffns = [
        SubFFN({name: part[kept] if name in NEURON_PARAMETERS else part for name, part in ffn.items()}, activation)
        for ffn, kept in zip(whole, neurons.expand(len(whole), -1), strict=True)
    ]
    return ffns[0] if _experts(model, layer) is None else SubExperts(ffns)


def ffn_path(model: nn.Module, layer: nn.Module) -> str:
    """The module of a layer whose place a SubFFN or SubExperts takes."""
    row = architecture_of(model)
    return row.ffn if _experts(model, layer) is None else str(row.experts)


def replace_ffn(model: nn.Module, layer: nn.Module, neurons: Tensor) -> None:
    """Puts what :func:`sub_ffn_of` makes of the given neurons into its place. In place."""
    ffn, path = sub_ffn_of(model, layer, neurons), ffn_path(model, layer)
    layer.set_submodule(path, ffn)
    if isinstance(ffn, SubFFN):
        for absorbed in architecture_of(model).absorbed:
            layer.set_submodule(absorbed, nn.Identity())


def sub_ffns(model: nn.Module) -> dict[str, SubFFN | SubExperts]:
    """What stands for each layer's FFN in a proxy, by its module name, in the order of the layers."""
    found: dict[str, SubFFN | SubExperts] = {}
    for name, module in model.named_modules():
        if isinstance(module, SubFFN | SubExperts) and name.rpartition(".experts.")[0] not in found:
            found[name] = module
    return found


def _updated(name: str) -> str:
    """What sub_ffn_train calls the rows of one of NEURON_PARAMETERS that train."""
    return f"updated_{name.removeprefix('w_')}"


@contextmanager
def counting(model: nn.Module, layers: Sequence[int], eps: float) -> Iterator[dict[int, InactivityCounter]]:
    """While open, the inactive neurons of these layers of a proxy are counted."""
    ffns, device = list(sub_ffns(model).values()), next(model.parameters()).device
    counters = {}
    for layer in layers:
        counts = torch.zeros(ffns[layer].neurons, dtype=torch.int64, device=device)
        counters[layer] = ffns[layer].inactivity = InactivityCounter(eps, counts)
    try:
        yield counters
    finally:
        for layer in layers:
            ffns[layer].inactivity = None


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """While open, nothing is counted in a proxy, or in one layer of it; then it goes on within :func:`counting`."""
    counters = [(ffn, ffn.inactivity) for ffn in sub_ffns(module).values()]
    for ffn, _ in counters:
        ffn.inactivity = None
    try:
        yield
    finally:
        for ffn, counter in counters:
            ffn.inactivity = counter


@contextmanager
def compacting(model: nn.Module) -> Iterator[None]:
    """While open, a proxy's frozen FFNs keep their activation's slope in bfloat16 for backward (`kernels.sub_ffn`)."""
    ffns = [module for module in model.modules() if isinstance(module, SubFFN)]
    for ffn in ffns:
        ffn.compact = True
    try:
        yield
    finally:
        for ffn in ffns:
            ffn.compact = False


def totals(counters: Mapping[int, InactivityCounter]) -> dict[str, Tensor]:
    """What was counted, on the CPU: layer -> (K,) int64 inactive tokens, and "<layer>.tokens" -> () int64 of all."""
    counts = {str(layer): counter.counts.cpu() for layer, counter in counters.items()}
    return counts | {f"{layer}.tokens": torch.tensor(int(counter.tokens)) for layer, counter in counters.items()}


def _gated(weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    """Both projections of a gated FFN that are one: (2 F, D), and (2 F,) if there is a bias; the gate is in front."""
    gate, up = weight.chunk(2)
    found = {"w_gate": gate, "w_in": up}
    if bias is not None:
        found["b_gate"], found["b_in"] = bias.chunk(2)
    return found


def _experts(model: nn.Module, layer: nn.Module) -> nn.Module | None:
    """The module that holds the weights of a layer's experts, if it has any."""
    path = architecture_of(model).experts
    if path is None or not any(name == path for name, _ in layer.named_modules()):
        return None
    return layer.get_submodule(path)
