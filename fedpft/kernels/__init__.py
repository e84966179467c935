"""The operators: wrappers that check their arguments. Importing this loads the compiled kernels, if they were built.

`python -m fedpft.kernels` checks every operator on this machine against its reference; docs/kernels.md has the table.
"""

from fedpft.kernels import library
from fedpft.kernels.check import CheckResult, check_operators
from fedpft.kernels.operators import (
    ACTIVATIONS,
    activation_moments,
    alignment_loss,
    dequantize_accumulate,
    inactivity_count,
    mask_update,
    neuron_saliency,
    quantize_blocks,
    sub_ffn,
    sub_ffn_train,
)

library.load()
build_info = library.build_info

__all__ = [
    "ACTIVATIONS",
    "CheckResult",
    "activation_moments",
    "alignment_loss",
    "build_info",
    "check_operators",
    "dequantize_accumulate",
    "inactivity_count",
    "mask_update",
    "neuron_saliency",
    "quantize_blocks",
    "sub_ffn",
    "sub_ffn_train",
]
