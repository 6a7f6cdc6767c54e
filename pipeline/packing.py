"""A batch of trajectories as one row without padding, in which what a pair's two sides begin with stands once.

Attention is the only place where a token meets others, so there, and only there, the row is taken apart: each
trajectory attends to itself, causally, on torch's fastest kernels and with no mask. Everything else sees one long row
of real tokens. A rejected trajectory's attention runs over the whole of it, the beginning that it shares with its
chosen one included; all other work on that beginning is done once. Nothing is approximated: the numbers are those of
padded rows but for the order of sums (tests/test_packing.py).

Packing sequences: Krell et al. 2021, arXiv 2107.02027. Sharing a pair's prompt: Wang & Hegde 2024, arXiv 2410.20305,
who do it by a mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "packed"
"""Of the attention, among transformers' implementations."""
MULTIPLE = 64
"""Rows are filled up to a multiple of so many tokens: oneDNN and CUDA's libraries prepare a kernel for every new shape,
which takes a fifth of a short training on a CPU."""
LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packing:
    """Where the tokens of B trajectories stand in one row of N.

    Worked example: B = 2 of which the second begins as the first, [5 6 7 8] and [5 6 9 - ].

        row        5 6 7 8 9      (N = 5)
        positions  0 1 2 3 2
        places     [[0, 1, 2, 3], [0, 1, 4, -]]
        own        [[T, T, T, T], [F, F, T, F]]
    """

    rows: tuple[Tensor | slice, ...]
    """For each trajectory the places of its tokens, in their order; a slice where they are neighbours."""
    shared: tuple[int, ...]
    """How many of a trajectory's first tokens are another one's."""
    places: Tensor
    """[B, L] where each token stands in the row; 0 on padding."""
    own: Tensor
    """[B, L] bool: the tokens that stand in the row for this trajectory."""
    input_ids: Tensor
    """[1, N]."""
    positions: Tensor
    """[1, N], within the trajectory."""


def pack(input_ids: Tensor, attention_mask: Tensor, turn_index: Tensor, *, twins: bool = False) -> Packing:
    """Put a padded batch into one row.

    Args:
        input_ids: [B, L], padded on either side.
        attention_mask: [B, L], 0 on padding.
        turn_index: [B, L].
        twins: whether row B/2 + r may begin as row r does: chosen and rejected of a pair.
    """
    rows, width = input_ids.shape
    real = attention_mask > 0
    alike = _alike(input_ids, real, turn_index) if twins else torch.zeros_like(real)
    own = real & ~alike
    places = own.flatten().cumsum(0).view(rows, width) - 1
    places = places.where(~alike, places[: rows // 2].repeat(2, 1) if twins else places) * real
    count, shared = own.sum(1).tolist(), alike.sum(1).tolist()
    filler = -sum(count) % MULTIPLE
    ids, positions = input_ids[own], (real.cumsum(1) - 1)[own]
    starts = [sum(count[:row]) for row in range(rows)]
    found: list[Tensor | slice] = [
        places[row][real[row]] if shared[row] else slice(starts[row], starts[row] + count[row]) for row in range(rows)
    ]
    if filler:
        found.append(slice(sum(count), sum(count) + filler))
    return Packing(
        rows=tuple(found),
        shared=(*shared, *([0] if filler else [])),
        places=places,
        own=own,
        input_ids=nn.functional.pad(ids, (0, filler))[None],
        positions=torch.cat([positions, torch.arange(filler, device=ids.device)])[None],
    )


def _alike(input_ids: Tensor, real: Tensor, turn_index: Tensor) -> Tensor:
    """[B, L] bool: the tokens of the second half's rows that are, with all before them, those of their twins."""
    first, second = (torch.arange(len(real), device=real.device).view(2, -1)).unbind()
    same = (input_ids[first] == input_ids[second]) & (turn_index[first] == turn_index[second])
    same &= real[first] & real[second]
    beginning = same.long().cumprod(1).bool()
    return torch.cat([torch.zeros_like(beginning), beginning])


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model's tokens meet in attention alone, of a kind that `attend` computes."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or LAYERS)
    return (
        getattr(model, "_supports_attention_backend", False)
        and not getattr(model, "_is_stateful", False)
        and kinds <= LAYERS
        and getattr(config, "attn_logit_softcapping", None) is None
        and config._attn_implementation == "sdpa"
    )


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model that can be packed is: open it around the backward pass, too, which may compute layers anew.

    Every forward pass within needs a `packing` among its arguments; a model that cannot be packed is left alone.
    """
    if not can_pack(model):
        yield
        return
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, one trajectory after the other, as transformers calls it.

    Args:
        module: the attention layer.
        query: [1, heads, N, width]; key and value alike, with their own number of heads.
        key: see `query`.
        value: see `query`.
        attention_mask: none.
        packing: of the row.
        sliding_window: how many tokens one sees at most, itself included.
        arguments: scaling and dropout.

    Returns:
        [1, N, heads, width], and no weights.

    Raises:
        ValueError: the model wants of attention what is not computed here.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if arguments.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} needs {unknown[0]}, which packed attention does not compute.")
    pieces = []
    for places, shared in zip(packing.rows, packing.shared, strict=True):
        of_row = [tensor[:, :, places] for tensor in (query, key, value)]
        mask = _window(of_row[0], sliding_window)
        output, _ = sdpa_attention_forward(module, *of_row, mask, **arguments)
        pieces.append(output[:, shared:])
    return torch.cat(pieces, dim=1), None


def _window(query: Tensor, width: int | None) -> Tensor | None:
    """[1, 1, L, L] bool: what each token of a trajectory sees through a window; none where it sees all before it."""
    length = query.shape[2]
    if width is None or length <= width:
        return None
    place = torch.arange(length, device=query.device)
    behind = place[:, None] - place
    return ((behind >= 0) & (behind < width))[None, None]


AttentionInterface.register(NAME, attend)
