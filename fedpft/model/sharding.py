"""A proxy whose frozen layers lie in pieces on the ranks of a silo, by torch's `fully_shard` (FSDP2).

Each rank holds 1 / ranks of every layer's rows, and of the input embeddings' unless the output layer is the same
tensor. Before a layer computes, forward and backward, the ranks gather it, and give it back afterwards; so all of them
must compute at the same time. What is gathered is bit for bit what was there. What trains, and what else is outside of
the layers, every rank has whole.
"""

import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fedpft.model.architectures import base_of, config_of, layers_of
from fedpft.model.mapped import held


def shard(model: nn.Module, device: str) -> None:
    """Spreads a proxy over the ranks; every rank does it, with the same proxy. In place.

    A model on disk is read layer by layer, into this rank's pieces. Afterwards nothing of it is on disk.

    Args:
        device: this rank's; the pieces are there, but the rest stays where it is.
    """
    files = held(model)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for module in (*_embeddings(model), *layers_of(model)):
        whole = {each for each in module.parameters() if each.requires_grad or not each.dim()}
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        if files is not None:
            files.release()
    base = base_of(model)  # has no pieces of its own: within its pass the ranks gather a layer ahead
    view = rf"FSDP2-wrapped module \(FSDP{type(base).__name__}\) returned a view"  # which nobody writes on
    warnings.filterwarnings("ignore", view, UserWarning)
    fully_shard(base, mesh=mesh, reshard_after_forward=True, ignored_params=set(base.parameters()))
    if files is not None:
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor) and parameter in files:
                parameter.data = parameter.data.clone()
        del model.held


def put(target: Tensor, place: Tensor | None, value: Tensor) -> None:
    """`target[place] = value`; of a tensor in pieces each rank writes what it has.

    Args:
        place: rows, (n,) int64; None: all of them.
    """
    if not isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        if place is None:
            target.copy_(value)
        else:
            target.index_copy_(0, place.to(target.device), value)
        return
    piece, mesh = target.to_local(), target.device_mesh
    first = mesh.get_local_rank() * -(-len(target) // mesh.size())  # as `torch.chunk` cuts
    rows = (torch.arange(len(target)) if place is None else place) - first
    own = (rows >= 0) & (rows < len(piece))
    piece[rows[own].to(piece.device)] = value[own].to(piece)


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Those of words, which can be as large as many layers."""
    if not hasattr(config_of(model.config), "vocab_size"):
        return
    words, out = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(words, nn.Embedding) and (out is None or out.weight is not words.weight):
        yield words
