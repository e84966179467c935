"""Several rows in one sequence without seeing each other: how a model is told, whether it listens, and on CUDA the
attention that never looks across.

A packed batch (`LanguageDataset.packed`) has input_ids and position_ids that start at 0 with each row. Most models of
transformers build from such positions the mask of each kind of layer; some read no positions there and need the mask
made for them; some cannot be told (ALiBi, recurrent layers). On CUDA `loading.attend_within_rows` lets a model be told
where rows end. That is measured on the model itself, not looked up.

N  tokens of a packed sequence
R  rows in it
H  heads, of which the keys may have fewer
D  size of a head
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import varlen

from fedpft.seeding import derive_seed

Way = Literal["rows", "positions", "mask"]

VARLEN_ARGUMENTS = {"scale", "window_size", "enable_gqa"}  # torch >= 2.12 has all of them
HALVES = (torch.bfloat16, torch.float16)  # that flash attention takes
WIDEST_HEAD = 256  # that flash attention takes
ROWS_APART = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # rounding through a deep model


def packed_inputs(batch: dict[str, Tensor], way: Way, dtype: torch.dtype) -> dict[str, Any]:
    """A packed batch as a model takes it that is told in this way; dtype: of the model's hidden states."""
    if way == "mask":
        return {**batch, "attention_mask": block_mask(batch["position_ids"], dtype)}
    return {**batch, **row_ends(batch["position_ids"])} if way == "rows" else batch


def block_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, N, N), added to the scores: 0 where a token sees a token before it in its own row, else the least number.

    Args:
        position_ids: (1, N) int64, 0 where a row begins.
    """
    row = (position_ids[0] == 0).cumsum(0)
    seen = (row[:, None] == row).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


@torch.no_grad()
def way_to_pack(decoder: Callable[..., Any], *, vocabulary: int, longest: int, device: torch.device) -> Way | None:
    """How this model keeps packed rows apart: the first way that gives each row the hidden states it has alone.

    A sliding window shorter than the rows, or positions scaled by the longest row, show only in rows that long.

    Args:
        decoder: the model without its output layer, in eval mode: takes input_ids and more, returns an object with
            last_hidden_state (1, N, D).
        vocabulary: ids below this are drawn.
        longest: tokens of the longest row to be packed.

    Returns:
        None if there is none: rows must not be packed.
    """
    generator = torch.Generator().manual_seed(derive_seed(0, "packing"))
    lengths = [max(longest, 3), max(longest // 3, 2), 1, max(longest // 2, 2)]
    rows = [torch.randint(vocabulary, (length,), generator=generator).to(device) for length in lengths]
    alone = [decoder(input_ids=row[None]).last_hidden_state[0] for row in rows]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    batch = {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}
    ways: tuple[Way, ...] = ("positions", "mask")
    if has_varlen() and device.type == "cuda" and alone[0].dtype in HALVES:
        ways = ("rows", *ways)
    for way in ways:
        try:
            packed = decoder(**packed_inputs(batch, way, alone[0].dtype)).last_hidden_state[0]
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            continue  # it takes no positions, or no such mask
        apart = [
            float((one.float() - other.float()).norm() / one.float().norm())
            for one, other in zip(alone, packed.split(lengths), strict=True)
        ]
        if max(apart) <= ROWS_APART[alone[0].dtype]:
            return way
    return None


# --- on CUDA ----------------------------------------------------------------------------------------------------------


def has_varlen() -> bool:
    """Whether this torch has the attention over rows of various lengths, with all that a model can ask of it."""
    return inspect.signature(varlen.varlen_attn).parameters.keys() >= VARLEN_ARGUMENTS


def row_ends(position_ids: Tensor) -> dict[str, Any]:
    """What tells `varlen_attention` where rows end, by the names under which transformers hands it through a model.

    Args:
        position_ids: (1, N) int64, 0 where a row begins.

    Returns:
        cu_seq_lens_q, cu_seq_lens_k: (R + 1,) int32; max_length_q, max_length_k: the longest row.
    """
    begins = (position_ids[0] == 0).nonzero().squeeze(1)
    ends = torch.cat([begins, begins.new_tensor([position_ids.shape[1]])]).to(torch.int32)
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """An attention for transformers' AttentionInterface: `varlen_attn` for a packed sequence, else `otherwise`.

    otherwise: transformers' own for the same mask: it takes what flash attention does not, float32, dropout, a softcap.
    """

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query: (1, H, N, D); key, value: (1, H or fewer, N, D). Returns (1, N, H, D), and no weights."""
        if cu_seq_lens_q is None or max_length_q is None or not _fits(query, key, value, dropout, softcap):
            found: tuple[Tensor, Tensor | None] = otherwise(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
                **others,
            )
            return found
        output: Any = varlen.varlen_attn(
            query[0].transpose(0, 1).contiguous(),
            key[0].transpose(0, 1).contiguous(),
            value[0].transpose(0, 1).contiguous(),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1, 0) if sliding_window is None else (sliding_window - 1, 0),  # itself is not counted
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return output[None], None

    return attention


def _fits(query: Tensor, key: Tensor, value: Tensor, dropout: float, softcap: float | None) -> bool:
    sizes = {part.shape[-1] for part in (query, key, value)}
    return (
        has_varlen()
        and query.is_cuda
        and query.dtype in HALVES
        and query.shape[0] == 1
        and len(sizes) == 1
        and max(sizes) <= WIDEST_HEAD
        and not dropout
        and softcap is None
    )
