"""How long things take on GPUs, roughly: floating-point operations, or bytes of memory read, over what a GPU can do.

The GPUs' figures are NVIDIA's; what a program reaches of them is assumed and said: `MFU` of the arithmetic where there
is much of it (training, prompts), `OF_BANDWIDTH` of the memory's speed where weights are read for few tokens (replies).

Operations of a token, N weights of the decoder layers (PaLM, https://arxiv.org/abs/2204.02311, appendix B): forward
2 N, backward 4 N, of which 2 N fall away with LoRA (no gradients of the base's weights), and 2 N more where activations
are computed again. Attention at mean distance L/2 adds 2 L x width a layer forward, and twice that backward. The output
layer meets the policy's tokens alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time it brings torch with it, and the command line needs the GPUs' names alone
    from pipeline.memory import Parameters

MFU = 0.35
"""Share of the peak that training and prompts are assumed to reach; 0.3 to 0.5 is usual for dense models."""
OF_BANDWIDTH = 0.6
"""Share of the memory's bandwidth that replies are assumed to reach."""
SERVING_GB = 4
"""Memory that the engine is assumed to take beside weights and cache: CUDA, its graphs, activations of a prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What a GPU can do."""

    name: str
    flops: float
    """Dense bfloat16 operations a second, on tensor cores, added up in float32."""
    bandwidth: float
    """Bytes of its memory a second."""
    memory: float
    """Bytes."""


GPUS = {
    "a100": Gpu(name="A100 80 GB SXM", flops=312e12, bandwidth=2.039e12, memory=80e9),
    "h100": Gpu(name="H100 80 GB SXM", flops=989e12, bandwidth=3.35e12, memory=80e9),
    "h200": Gpu(name="H200 141 GB SXM", flops=989e12, bandwidth=4.8e12, memory=141e9),
    "4090": Gpu(name="GeForce RTX 4090", flops=165e12, bandwidth=1.008e12, memory=24e9),
}
"""From NVIDIA's data sheets of A100, H100 and H200 (the latter two print the figure with sparsity, 1,979; half of it
counts) and its white paper on the Ada architecture."""


def training_tokens_per_second(
    sizes: Any,
    parameters: "Parameters",
    gpu: Gpu,
    gpus: int,
    *,
    length: float,
    trained_share: float,
    checkpointing: bool,
) -> float:
    """Tokens that all GPUs together train on in a second.

    Args:
        sizes: the model's configuration.
        parameters: its numbers of weights.
        gpu: which GPU.
        gpus: how many.
        length: mean tokens of a trajectory.
        trained_share: the policy's share of the tokens.
        checkpointing: whether activations are computed again.
    """
    products = 3 if parameters.trained == parameters.total else 2
    layers: float = (products + checkpointing) * 2 * parameters.used
    attention: float = (3 + checkpointing) * 2 * length * _attention_width(sizes) * sizes.num_hidden_layers
    output: float = (products + 1) * 2 * parameters.head * trained_share  # at worst: few logits are not computed again
    return gpus * gpu.flops * MFU / (layers + attention + output)


def prompt_tokens_per_second(sizes: Any, parameters: "Parameters", gpu: Gpu, gpus: int, length: float) -> float:
    """Tokens that pass through the decoder layers in a second, forward alone."""
    attention: float = 2 * length * _attention_width(sizes) * sizes.num_hidden_layers
    return gpus * gpu.flops * MFU / (2 * parameters.used + attention)


def concurrent_sequences(
    sizes: Any, parameters: "Parameters", gpu: Gpu, gpus: int, *, max_length: int, share: float
) -> float:
    """Sequences of `max_length` tokens whose key-value cache the engine has room for; below 1 it cannot start.

    Args:
        sizes: the model's configuration.
        parameters: its numbers of weights, without an adapter.
        gpu: which GPU.
        gpus: how many one copy of the policy is spread over.
        max_length: tokens of the longest conversation.
        share: of a GPU's memory that the engine may take.
    """
    room = gpus * (share * gpu.memory - SERVING_GB * 1e9) - 2 * parameters.total
    return max(room, 0) / (max_length * cache_bytes_per_token(sizes))


def reply_tokens_per_second(
    sizes: Any, parameters: "Parameters", gpu: Gpu, gpus: int, *, at_once: float, length: float
) -> float:
    """Tokens of replies that an engine makes in a second, of so many conversations of so many tokens at once."""
    read = 2 * parameters.total + at_once * length * cache_bytes_per_token(sizes)
    step = max(
        read / (gpus * gpu.bandwidth * OF_BANDWIDTH),
        at_once / prompt_tokens_per_second(sizes, parameters, gpu, gpus, length),
    )
    return at_once / step


def cache_bytes_per_token(sizes: Any, bytes_per_number: int = 2) -> int:
    """The key-value cache's share of one token, in all layers."""
    heads = getattr(sizes, "num_key_value_heads", None) or sizes.num_attention_heads
    width = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    return int(2 * sizes.num_hidden_layers * heads * width * bytes_per_number)


def _attention_width(sizes: Any) -> int:
    """Numbers of all heads' queries."""
    heads = sizes.num_attention_heads
    return int(heads * (getattr(sizes, "head_dim", None) or sizes.hidden_size // heads))
