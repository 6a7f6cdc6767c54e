"""What a model takes of a GPU's memory, from its configuration alone: no weight is read, none is made.

Counts are exact: the model is built on torch's `meta` device by the code that builds the real one, and its forward runs
on fake tensors (shapes without contents), where everything that is kept for the backward pass is counted.

- Weights, gradients and AdamW's two moments are float32; the frozen base of a LoRA policy keeps its checkpoint's
  precision (pipeline/models.py), or is held in 4 bits (pipeline/qlora.py).
- Under autocast every float32 weight of a linear layer has a bfloat16 copy while the model computes.
- With gradient checkpointing a layer's activations exist only while it is computed again, one layer at a time.
- The output layer has logits of `CHUNK` positions in float32 at once and keeps `KEPT` at most (pipeline/logprobs.py).

Not counted: the libraries' own memory, fragmentation, and what single operations need in passing.
tests/test_memory.py holds the numbers against real training steps.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline import qlora
from pipeline.config import ModelConfig
from pipeline.logprobs import CHUNK, kept_positions
from pipeline.models import add_lora
from pipeline.packing import MULTIPLE, can_pack

MOMENTS = 2
"""AdamW's numbers for each trained weight."""

PASSING = 1.5
"""A layer that is computed again takes its activations and, in passing, gradients of some of them: about so many times
the activations, as the steps of tests/test_memory.py do."""

UNMASKED = "sdpa_without_mask"
"""Attention as training has it. On fake tensors transformers would lay a mask over it, which takes memory of its own;
one whose name has no mask function gets none."""
AttentionInterface.register(UNMASKED, sdpa_attention_forward)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Numbers of weights."""

    total: int
    """All, a LoRA adapter included."""
    trained: int
    base_bytes: int
    """Bytes of the frozen ones."""
    embedding: int
    """Of the input embedding."""
    head: int
    """Of the output layer; what is tied to the embedding counts here, too."""
    layer: int
    """Of the largest decoder layer."""
    used: int
    """That a token is multiplied with in the decoder layers: of a mixture, the experts that it is sent to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass."""

    activations: int
    """Copies of weights left out."""
    again: int
    """Of one decoder layer that is computed again, with gradient checkpointing, and gone through."""
    copies: int
    """Of weights in another precision, while they are there: with checkpointing in the forward pass alone."""
    output: int
    """Of the output layer: its weight in bfloat16, the logits that are kept and their gradient, and the softmax of one
    chunk's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Bytes on each GPU."""

    weights: int
    gradients: int
    optimizer: int
    passing: int
    """Activations, and what else is there for a part of a step, at the moment when that is most."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.passing


def build(sizes: Any, config: ModelConfig, *, gpu: bool = True) -> Any:
    """The model that training would load, on the `meta` device: shapes and precisions without memory.

    A base in 4 bits has the shapes and the precision that it is dequantised to, and is marked; `count` knows its bytes.

    Args:
        sizes: its configuration.
        config: says whether a LoRA adapter comes on top, and whether of a base in 4 bits.
        gpu: whether as on a GPU, where the base of a LoRA policy keeps its checkpoint's precision.
    """
    dtype = sizes.dtype if config.lora_rank and gpu and sizes.dtype else torch.float32
    with torch.device("meta"):  # a copy, for it notes the precision in its configuration
        model = add_lora(AutoModelForCausalLM.from_config(copy.deepcopy(sizes), dtype=dtype), config, seed=0)
    _base(model).is_loaded_in_4bit = config.load_in_4bit
    return model


def count(model: Any) -> Parameters:
    """The numbers of a model's weights."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    layers = _layers(model)
    experts = sum(weight.numel() for name, weight in layers.named_parameters() if ".experts." in name)
    return Parameters(
        total=total,
        trained=trained,
        base_bytes=_frozen_bytes(model),
        embedding=model.get_input_embeddings().weight.numel(),
        head=model.get_output_embeddings().weight.numel(),
        layer=max(sum(weight.numel() for weight in layer.parameters()) for layer in layers),
        used=sum(weight.numel() for weight in layers.parameters()) - round(experts * (1 - _share_used(model.config))),
    )


def kept(model: Any, lengths: Sequence[int], *, rows: int = 1, bf16: bool = False, checkpointing: bool = False) -> Kept:
    """What a training step keeps of a micro-batch, whose trajectories are one pass.

    Packed they are one row; what a pair's sides share is not taken off. Models that cannot be packed are padded.

    Args:
        model: from `build`.
        lengths: tokens of each trajectory of an example: one of SFT, two of a pair.
        rows: examples of the micro-batch.
        bf16: whether autocast computes in bfloat16.
        checkpointing: whether activations are computed again in the backward pass.

    Raises:
        ValueError: the model's forward depends on what its tensors hold.
    """
    if can_pack(_base(model)):
        rows, length = 1, -(-rows * sum(lengths) // MULTIPLE) * MULTIPLE
    else:
        rows, length = rows * len(lengths), max(lengths)
    activations, copies = _saved(model, rows, length, bf16=bf16, checkpointing=False)
    again = 0
    if checkpointing:
        whole = activations
        activations, _ = _saved(model, rows, length, bf16=bf16, checkpointing=True)
        again = round(PASSING * (whole - activations) / len(_layers(model)))
    head = model.get_output_embeddings().weight
    copy_of_head = 2 * head.numel() if bf16 and head.dtype == torch.float32 else 0
    logits = head.shape[0] * _bytes_a_number(kept_positions(_base(model).config), rows * length, bf16=bf16)
    return Kept(activations=activations, again=again, copies=copies, output=copy_of_head + logits)


def _bytes_a_number(most: int, positions: int, *, bf16: bool) -> int:
    """Bytes of the logits of so many positions, and of what is made of them, for each number of the vocabulary.

    The positions beyond the most that keep their logits come first in the backward pass, chunk by chunk.
    """
    kept, size = min(most, positions), 2 if bf16 else 4
    softmax = 4 + 4 * bf16  # in float32, and on a CPU so is what it is of
    first = size * kept + (2 * size + softmax) * min(CHUNK, positions - kept)
    return max(first, 2 * size * kept + softmax * min(CHUNK, kept))


def training(model: Any, kept: Kept, *, gpus: int = 1, sharded: bool = False) -> Training:
    """The most that each GPU holds in a training step.

    With DDP every GPU has all weights, gradients, moments, and the gradients once more in DDP's buckets. Sharded (FSDP)
    each has its part, and gathers the embedding, the output layer, and two decoder layers at a time; what trains is
    gathered, and its gradients are added up, in float32.

    Args:
        model: from `build`.
        kept: from `kept`.
        gpus: how many share the work.
        sharded: whether they share the weights, too.
    """
    parameters = count(model)
    trained, parts, sharded = 4 * parameters.trained, gpus if sharded else 1, sharded and gpus > 1
    outside = parameters.embedding + (0 if _is_tied(model) else parameters.head)
    each = (trained + parameters.base_bytes) / parameters.total
    gathered = round(each * (outside + 2 * parameters.layer)) if sharded else 0
    forward_ends = kept.activations + kept.copies + kept.output
    backward_begins = kept.activations + max(kept.again, kept.output)
    return Training(
        weights=-(-(trained + parameters.base_bytes) // parts),
        gradients=-(-trained // parts) + (trained if gpus > 1 and not sharded else 0),
        optimizer=-(-MOMENTS * trained // parts),
        passing=gathered + max(forward_ends, backward_begins),
    )


def scoring(model: Any, kept: Kept) -> Training:
    """What the stage `reference` holds on each GPU: the whole model, and the layer or the chunk that it is at.

    Of a layer what training keeps of it, which is the most that it may come to: without gradients some goes earlier.

    Args:
        model: from `build`.
        kept: from `kept` with checkpointing, which tells one layer from the others.
    """
    parameters = count(model)
    return Training(
        weights=4 * parameters.trained + parameters.base_bytes,
        gradients=0,
        optimizer=0,
        passing=kept.copies + max(round(kept.again / PASSING), kept.output),
    )


def _saved(model: Any, rows: int, length: int, *, bf16: bool, checkpointing: bool) -> tuple[int, int]:
    """Bytes that a forward pass up to the output layer saves: activations, and copies of weights."""
    found: dict[int, tuple[Tensor, bool]] = {}  # the tensors are held, so that no storage's address comes twice
    with _fake(model, bf16=bf16, checkpointing=checkpointing) as fake:
        weights = {_address(weight) for weight in fake.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            if _address(tensor) not in weights:
                found.setdefault(_address(tensor), (tensor, _is_copy_of_a_weight(tensor)))
            return tensor

        ids = torch.zeros(rows, length, dtype=torch.long)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            last = _base(fake).get_decoder()(input_ids=ids, use_cache=False)
        sizes = dict.fromkeys((False, True), 0)
        for tensor, copied in found.values():
            sizes[copied] += tensor.untyped_storage().nbytes()
        del last
    return sizes[False], sizes[True]


@contextlib.contextmanager
def _fake(model: Any, *, bf16: bool, checkpointing: bool) -> Iterator[Any]:
    """The model on fake tensors of the CPU, which autocast treats as it treats real ones.

    Raises:
        ValueError: its forward depends on what its tensors hold.
    """
    mixture = _share_used(_base(model).config) < 1
    fake = copy.deepcopy(model)
    if mixture and bf16:
        fake = fake.to(torch.bfloat16)  # a mixture's grouped products are refused in autocast on fake tensors
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake.to_empty(device="cpu")
            _base(fake).tie_weights()
            _base(fake).set_attn_implementation(UNMASKED)
            fake.train()
            if checkpointing:
                fake.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            yield fake
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"{type(_base(model)).__name__} cannot be counted without its weights: its forward depends on what its "
            f"tensors hold ({error}). Try it with a small micro_batch_size on the GPU itself."
        ) from None


def _frozen_bytes(model: Any) -> int:
    """Bytes of the weights that are not trained; in 4 bits are those that an adapter sits on."""
    adapted = [layer.get_base_layer().weight for layer in model.modules() if isinstance(layer, LoraLayer)]
    small = {id(weight) for weight in adapted} if qlora.is_in_4bit(model) else set()
    return sum(
        qlora.bytes_of(weight.numel()) if id(weight) in small else weight.numel() * weight.element_size()
        for weight in model.parameters()
        if not weight.requires_grad
    )


def _base(model: Any) -> Any:
    """The model of transformers, inside a LoRA policy or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _layers(model: Any) -> nn.ModuleList:
    """The decoder layers: the largest list of modules."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=lambda layers: sum(weight.numel() for weight in layers.parameters()))


def _is_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _share_used(sizes: Any) -> float:
    """The share of a mixture's experts that a token is sent to; 1 where there are none."""
    experts = getattr(sizes, "num_experts", None) or getattr(sizes, "num_local_experts", None)
    return getattr(sizes, "num_experts_per_tok", experts) / experts if experts else 1.0


def _address(tensor: Tensor) -> int:
    """The same for tensors that share their memory."""
    return int(tensor.untyped_storage()._cdata)


def _is_copy_of_a_weight(tensor: Tensor) -> bool:
    """Whether autocast made it of a weight, for the computation alone."""
    made_by = (tensor if tensor._base is None else tensor._base).grad_fn
    if made_by is None or made_by.name() != "ToCopyBackward0":
        return False
    source = made_by.next_functions[0][0]
    return source is not None and source.name() == "torch::autograd::AccumulateGrad"
