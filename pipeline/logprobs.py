"""Log-probs of the policy's tokens and turns, without ever holding [batch, length, vocabulary].

The model's own forward runs, so every wrapper around it (DDP, FSDP, DeepSpeed, PEFT, gradient checkpointing, autocast)
does its work. Only the output layer behaves otherwise for that one call: it takes the hidden states that stand before a
token of the policy, and reduces their logits to the log-probs of the tokens that follow. Logits are kept for the
backward pass while they are few, in the precision that they come in; those of further positions are computed again, in
chunks. What leaves the model as `logits` are the log-probs, so that wrappers which watch a model's outputs (DDP looking
for unused parameters, FSDP and DeepSpeed hooking the backward pass) see them.

Models that change their logits after the output layer (Gemma's soft cap, Cohere's and Granite's scales) get the same
change here, and keep none. That it is the same is checked in every call, on a few numbers: a model which does anything
else to its logits is refused, never silently wrong.

Shapes: B rows, L positions, T turns, n policy tokens of the batch, H hidden size, V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F  # noqa: N812 (the field's name for it)
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline import packing

CHUNK = 1024
"""Most positions whose logits exist in float32 at once, and that meet the output layer at once beyond those kept."""
KEPT = 2**26
"""Most logits that are kept for the backward pass, 128 MiB in bfloat16, and their gradient is as large: with Llama 2's
vocabulary those of 2,097 positions, which is more than most trajectories have of the policy's."""


def kept_positions(config: Any) -> int:
    """How many positions keep their logits, by the model's configuration; none where it changes logits afterwards."""
    if any(change is not None for change in _changes_of_logits(config)):
        return 0
    return int(KEPT // config.get_text_config().vocab_size)


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    turn_index: Tensor,
    chunk: int = CHUNK,
    *,
    twins: bool = False,
) -> Tensor:
    """The log-prob of each of the policy's tokens, given everything before it.

    Within `packing.packed_attention` the rows are computed as one, without padding.

    Args:
        model: a Hugging Face causal language model, wrapped or not.
        input_ids: [B, L], padded on either side.
        attention_mask: [B, L], 0 on padding.
        turn_index: [B, L], the policy's turn number, -1 on context and padding.
        chunk: most positions whose logits exist in float32 at once.
        twins: whether row B/2 + r may begin as row r does: chosen and rejected of a pair. What is alike is computed
            once, where rows are packed.

    Returns:
        [B, L] float32. Position i holds log pi(token i | tokens before i); 0 where no token is the policy's.

    Raises:
        ValueError: a row begins with a token of the policy, `chunk` is below 1, or the model does not compute its
            logits in a way that is known here.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1.")
    is_policy = (turn_index >= 0) & (attention_mask > 0)
    # The token before must be a real one: nothing predicts the first token of a row, wherever padding puts it.
    if not (is_policy[:, 1:] & (attention_mask[:, :-1] > 0)).sum() == is_policy.sum():
        raise ValueError("A row begins with a token of the policy: nothing predicts it. Put a prompt before it.")
    causal_lm = causal_lm_of(model)
    arguments: dict[str, Any] = {"use_cache": False}
    if causal_lm.config._attn_implementation == packing.NAME:
        packed = packing.pack(input_ids, attention_mask, turn_index, twins=twins)
        arguments |= packed.arguments()
        places, own = packed.places, packed.own
    else:
        arguments |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if "position_ids" in inspect.signature(causal_lm.forward).parameters:
            arguments["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        places, own = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids), attention_mask > 0
    wanted = is_policy & own
    before = places.roll(1, dims=1)[wanted]
    with _reduced_output(causal_lm, arguments["input_ids"].shape, before, input_ids[wanted], chunk):
        found = model(**arguments).logits
    logprobs = torch.zeros(input_ids.shape, dtype=torch.float32, device=found.device).masked_scatter(wanted, found)
    return logprobs if not twins else logprobs.where(own, _of_twins(logprobs)) * is_policy


def _of_twins(values: Tensor) -> Tensor:
    """Row r for both row r and row B/2 + r."""
    return values[: len(values) // 2].repeat(2, 1)


def turn_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    turn_index: Tensor,
    chunk: int = CHUNK,
    *,
    twins: bool = False,
) -> Tensor:
    """The log-prob of every turn, log pi(a_t | s_t): the sum of its tokens' log-probs.

    Arguments and errors as for `token_logprobs`.

    Returns:
        [B, T] float32, T the most turns in the batch; 0 beyond a trajectory's last turn.
    """
    return sum_turns(token_logprobs(model, input_ids, attention_mask, turn_index, chunk, twins=twins), turn_index)


def sum_turns(logprobs: Tensor, turn_index: Tensor) -> Tensor:
    """Sum token log-probs by turn.

    Args:
        logprobs: [B, L] from `token_logprobs`.
        turn_index: [B, L].

    Returns:
        [B, T], T the most turns in the batch.
    """
    turns = torch.arange(int(turn_index.max()) + 1, device=turn_index.device)
    # A masked sum and no scatter_add, whose order of additions is not fixed on GPUs.
    of_turn = turn_index[:, None, :] == turns[:, None]
    return (logprobs[:, None, :] * of_turn).sum(dim=2)


class _LogProbs(torch.autograd.Function):
    """The log-softmax of logits [n, V] at targets [n], in float32; of what is [n, V], the logits alone are kept.

    The logits are one product of the output layer: gradients of parts would be added up in the precision of autocast.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.chunk = chunk
        pieces = zip(torch.split(logits, chunk), torch.split(targets, chunk), strict=True)
        return torch.cat([_at(F.log_softmax(some, dim=-1, dtype=torch.float32), those) for some, those in pieces])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        found = torch.empty_like(logits)
        parts = (torch.split(one, ctx.chunk) for one in (found, logits, targets, gradient))
        for to, some, those, weight in zip(*parts, strict=True):
            probabilities = F.softmax(some, dim=-1, dtype=torch.float32)
            probabilities[torch.arange(len(those), device=those.device), those] -= 1
            to.copy_(probabilities.mul_(-weight[:, None]))
        return found, None, None


def _at(values: Tensor, targets: Tensor) -> Tensor:
    """Of each row of [n, V] the value at its target."""
    return values.gather(-1, targets[:, None])[:, 0]


@contextlib.contextmanager
def _reduced_output(
    causal_lm: PreTrainedModel, shape: torch.Size, before: Tensor, targets: Tensor, chunk: int
) -> Iterator[None]:
    """While open, the model gives the log-probs of `targets`, [n] float32, as its logits.

    Args:
        causal_lm: the model, inside whatever wraps it.
        shape: of the token ids that it will be called with.
        before: [n], in the flattened input the positions whose next token is a target.
        targets: [n] token ids.
        chunk: positions whose logits exist in float32 at a time.
    """
    head = _innermost(causal_lm.get_output_embeddings())
    head_forward = head.forward
    change, kept = _change_of_logits(causal_lm.config), kept_positions(causal_lm.config)
    reduced: list[Tensor] = []

    def logprobs(hidden: Tensor, some: Tensor) -> Tensor:
        found: Tensor = _LogProbs.apply(change(head_forward(hidden)), some, chunk)  # type: ignore[no-untyped-call]
        return found

    def reduced_forward(hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != shape:
            raise ValueError(
                f"{type(causal_lm).__name__} gives its output layer {tuple(hidden.shape)} for input ids of "
                f"{tuple(shape)}: a model that is not known here."
            )
        chosen = hidden.flatten(0, 1)[before]
        pieces = [logprobs(chosen[:kept], targets[:kept])] if kept else []
        if len(chosen) > kept or not kept:  # without a token of the policy one piece is there, too, and empty
            pieces += [
                checkpoint(logprobs, *piece, use_reentrant=False)
                for piece in zip(torch.split(chosen[kept:], chunk), torch.split(targets[kept:], chunk), strict=True)
            ]
        # FSDP warns of views: hence cat of what has three dimensions already, and clone below.
        pieces.append(torch.tensor(_PROBE, device=hidden.device))
        return torch.cat([piece[None, :, None] for piece in pieces], dim=1)

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        # FSDP and DeepSpeed hook the very tensor that leaves a module: it must be on the way to the loss. DeepSpeed's
        # hooks, which run before this one, have put another in place of what forward returned.
        reduced.append(output)

    def put_logprobs(_: nn.Module, __: Any, output: Any) -> Any:
        if len(reduced) != 1 or not torch.equal(output.logits, change(reduced[0])):
            raise ValueError(
                f"{type(causal_lm).__name__} changes its logits after the output layer in a way that is not known "
                "here: add it to pipeline.logprobs._change_of_logits."
            )
        output.logits = reduced[0][0, : -len(_PROBE), 0].clone()
        return output

    # Instance attributes shadow methods; deleting the attribute brings the method back.
    shadowed = head.__dict__.get("forward")
    hooks = [head.register_forward_hook(keep), causal_lm.register_forward_hook(put_logprobs, prepend=True)]
    head.forward = reduced_forward
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        del head.forward
        if shadowed is not None:
            head.forward = shadowed


_PROBE = [-300.0, -20.0, -1.5, -0.1, 0.0, 0.7, 3.0, 40.0]
"""Goes through the rest of the model's forward beside the log-probs, to see what it does to logits."""


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model with an output layer, inside whatever wraps it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            if module.config.is_encoder_decoder:
                raise ValueError(f"{type(module).__name__} is an encoder-decoder; a causal language model is needed.")
            return module
    raise ValueError(f"{type(model).__name__} holds no Hugging Face model with an output layer.")


def _innermost(head: nn.Module) -> nn.Module:
    """The output layer itself, where FSDP has wrapped it alone: the wrapper gathers its weights around our call."""
    return head.module if isinstance(head, FullyShardedDataParallel) else head


def _changes_of_logits(config: Any) -> tuple[float | None, float | None, float | None]:
    """What the model does to its logits after the output layer: a soft cap, a factor and a divisor, None without."""
    return (
        getattr(config, "final_logit_softcapping", None),  # Gemma 2 and later
        getattr(config, "logit_scale", None),  # Cohere
        getattr(config, "logits_scaling", None),  # Granite
    )


def _change_of_logits(config: Any) -> Callable[[Tensor], Tensor]:
    """The same as a function, in float32 where it changes anything."""
    cap, scale, divisor = _changes_of_logits(config)

    def change(logits: Tensor) -> Tensor:
        if cap is not None:
            logits = torch.tanh(logits.float() / cap) * cap
        if scale is not None:
            logits = logits.float() * scale
        return logits.float() / divisor if divisor is not None else logits

    return change
