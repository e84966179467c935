"""In which type numbers are held: FM and proxy as `model.dtype` has it, all that trains in float32.

bfloat16 has 8 significant bits and float16 11. That is enough for a weight that stands still, and too little for one
that trains: a step of less than 1/512 of it, as most are, would leave it where it was. Hence adapter, task head and
what the optimizer steps are float32, and so are the sums of losses.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a loss is multiplied with in float16, to begin with. A task's loss is a mean over samples or tokens; the slope of
# a distillation's is spread over every element of the hidden states.
TASK_SCALE, DISTILLATION_SCALE = 2.0**8, 2.0**16


def dtype_of(model: nn.Module) -> torch.dtype:
    """That of an FM or a proxy, and of its hidden states."""
    return next(model.parameters()).dtype


def name_of(dtype: torch.dtype) -> str:
    """As `model.dtype` and a config.json call it."""
    return str(dtype).removeprefix("torch.")


def wide(tensor: Tensor) -> Tensor:
    """As float32; what is wider stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def hold_wide(model: nn.Module, modules: Iterable[str]) -> None:
    """Holds some modules in float32, whatever the others are in. What they are given is widened on its way in."""
    for module in map(model.get_submodule, modules):
        for parameter in module.parameters():
            parameter.data = wide(parameter.data)
        module.register_forward_pre_hook(_in_its_type)


def narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Brings every parameter to one type. Buffers stay: what is computed once, such as frequencies, is float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def loss_scaler(model: nn.Module, scale: float) -> torch.amp.GradScaler:
    """Multiplies a loss so that float16 can hold its gradients; leaves out a step with one that it cannot hold.

    With the other types it does nothing: they reach from 1e-38 to 1e38, float16 from 6e-8 to 65504.
    """
    device = next(model.parameters()).device.type
    return torch.amp.GradScaler(device, init_scale=scale, enabled=dtype_of(model) == torch.float16)


class Masters:
    """What an optimizer steps in place of parameters of a narrow type: float32 copies of them.

    That of a parameter that is float32 is the parameter's own memory, so that there all this does nothing.

    wide: the copies, for the optimizer.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.wide = [wide(parameter.detach()) for parameter in parameters]

    def take_gradients(self) -> None:
        """Moves the parameters' gradients to the copies."""
        for parameter, copy in zip(self._parameters, self.wide, strict=True):
            copy.grad = None if parameter.grad is None else wide(parameter.grad)
            parameter.grad = None

    def round(self) -> None:
        """Writes the copies into the parameters, rounded to their type."""
        for parameter, copy in zip(self._parameters, self.wide, strict=True):
            if parameter.dtype != copy.dtype:
                parameter.data.copy_(copy)


def _in_its_type(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    numbers = [isinstance(value, Tensor) and value.is_floating_point() for value in given]
    return tuple(value.to(dtype_of(module)) if number else value for value, number in zip(given, numbers, strict=True))
