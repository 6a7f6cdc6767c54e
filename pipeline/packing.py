"""A batch of trajectories as one row without padding, in which what a pair's two sides begin with stands once.

Attention is the only place where a token meets others, so there, and only there, the row is taken apart: each
trajectory attends to itself, on torch's fastest kernels and, unless the model has windows, with no mask. Everything
else sees one long row of real tokens. A rejected trajectory's attention runs over the whole of it, the beginning that
it shares with its chosen one included; all other work on that beginning is done once. Nothing is approximated: the
numbers are those of padded rows but for the order of sums (tests/test_packing.py).

What a token sees, a window for one, a model says by the mask that it asks transformers for. Asked within a packed row,
transformers gives it what makes that mask for each trajectory. A model that does otherwise is found out by a few
tokens before its first row, and stays padded.

Packing sequences: Krell et al. 2021, arXiv 2107.02027. Sharing a pair's prompt: Wang & Hegde 2024, arXiv 2410.20305,
who do it by a mask.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.runs import is_main_process

NAME = "packed"
"""Of the attention, among transformers' implementations."""
MULTIPLE = 64
"""Rows are filled up to a multiple of so many tokens: oneDNN and CUDA's libraries prepare a kernel for every new shape,
which takes a fifth of a short training on a CPU."""
LAYERS = {"full_attention", "sliding_attention"}
PROBE = 24
"""Tokens of each of the two rows by which a model is tried."""


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

    def arguments(self) -> dict[str, Any]:
        """What the forward of a model within `packed_attention` takes."""
        everywhere = torch.ones_like(self.input_ids)  # else transformers would guess from the positions what is packed
        return {
            "input_ids": self.input_ids,
            "attention_mask": everywhere,
            "position_ids": self.positions,
            "packing": self,
        }


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
    """Whether, by its configuration, a model's tokens meet in attention alone, of a kind that `attend` computes."""
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

    Every forward pass within needs the arguments of a `Packing`; a model that cannot be packed is left alone. One whose
    configuration lets it be packed is tried, in two passes over a few tokens; if it fails, a sentence says so.
    """
    name = NAME if can_pack(model) and _is_alike_packed(model) else model.config._attn_implementation
    with _attention(model, name):
        yield


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _is_alike_packed(model: PreTrainedModel) -> bool:
    """Whether two rows of tokens that begin alike have the same log-probs packed as they have in rows of their own."""
    ids = torch.arange(2 * PROBE, device=model.device).view(2, -1)
    ids[1, : PROBE // 2] = ids[0, : PROBE // 2]
    ids %= model.get_input_embeddings().num_embeddings
    everywhere, training = torch.ones_like(ids), model.training
    packing = pack(ids, everywhere, torch.zeros_like(ids), twins=True)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            alone = model(input_ids=ids, attention_mask=everywhere, use_cache=False).logits
            with _attention(model, NAME):
                together = model(**packing.arguments(), use_cache=False).logits[0, packing.places]
        apart = (together.float().log_softmax(-1) - alone.float().log_softmax(-1)).abs()
        difference = apart.mean(-1).max().item()  # of the vocabulary the mean, for rounding has outliers
        why = f"its log-probs come out {difference:.2g} apart"
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # wherever it meets the mask
        difference, why = float("inf"), f"packed, it fails ({' '.join(str(error).split())})"
    finally:
        model.train(training)
    alike = bool(difference < _tolerance(model))
    if not alike and is_main_process():
        sys.stderr.write(f"{type(model).__name__} cannot be packed, and is computed with padding: {why}\n")
    return alike


def _tolerance(model: PreTrainedModel) -> float:
    """How far apart log-probs may come out by rounding, in the mean over the vocabulary."""
    return 1e-4 if all(weight.dtype == torch.float32 for weight in model.parameters()) else 0.3


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Callable[[int], Tensor | None] | None,
    packing: Packing,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, one trajectory after the other, as transformers calls it.

    Args:
        module: the attention layer.
        query: [1, heads, N, width]; key and value alike, with their own number of heads.
        key: see `query`.
        value: see `query`.
        attention_mask: from `_mask_of_each`; None where a token sees all before it.
        packing: of the row.
        arguments: scaling and dropout.

    Returns:
        [1, N, heads, width], and no weights.

    Raises:
        ValueError: the model wants of attention what is not computed here.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if arguments.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} needs {unknown[0]}, which packed attention does not compute.")
    if isinstance(attention_mask, Tensor):
        raise ValueError(f"{type(module).__name__} makes a mask of its own, which packed attention does not compute.")
    pieces = []
    for places, shared in zip(packing.rows, packing.shared, strict=True):
        of_row = [tensor[:, :, places] for tensor in (query, key, value)]
        mask = attention_mask(of_row[0].shape[2]) if attention_mask else None
        output, _ = sdpa_attention_forward(module, *of_row, mask, **arguments)
        pieces.append(output[:, shared:])
    return torch.cat(pieces, dim=1), None


def _mask_of_each(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **seen: Any,
) -> Callable[[int], Tensor | None]:
    """What takes the place of a packed row's mask, as transformers calls it.

    Args:
        batch_size: of the row, as are the lengths and offsets.
        q_length: see `batch_size`.
        kv_length: see `batch_size`.
        q_offset: see `batch_size`.
        kv_offset: see `batch_size`.
        attention_mask: all ones.
        seen: what a token sees, in transformers' terms.

    Returns:
        Of a trajectory's length L its mask [1, 1, L, L] bool, as it is where the trajectory stands alone; None where a
        token sees all before it. Layers share it.

    Raises:
        ValueError: what a token sees depends on more than how far it is from another.
    """
    if not seen["allow_is_causal_skip"]:  # a model has joined a mask of its own to the causal one
        raise ValueError("It asks for a mask that packed attention does not compute.")
    return functools.cache(lambda length: sdpa_mask(1, length, length, **seen))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask_of_each)
