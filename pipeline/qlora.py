"""QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): the frozen base of a LoRA policy in 4 bits.

By bitsandbytes: each linear layer but the output's in NF4, whose constants are quantised, too (double quantisation).
Embeddings, norms and output layer keep their precision. A layer is dequantised whenever it computes, forward and
backward, in the precision of the training: bfloat16 with autocast, else float32.
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import BitsAndBytesConfig

BLOCK = 64
"""Weights that share a constant of 8 bits (the paper's section 3)."""
GROUP = 256
"""Constants that share one of 32 bits."""
TABLES = 4 * (16 + 256 + 1)
"""Bytes that each layer has beside these, in float32: the values that 4 and 8 bits stand for, its constants' mean."""


def loading() -> dict[str, Any]:
    """What `from_pretrained` needs to be told; each process loads onto its own GPU, where layers are quantised.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "model.load_in_4bit needs bitsandbytes, which is not installed: python -m pip install bitsandbytes==0.50.2"
        )
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return {"quantization_config": how, "device_map": {"": PartialState(cpu=not torch.cuda.is_available()).device}}


def is_in_4bit(model: Any) -> bool:
    """Whether a policy's base is held in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def compute_as_autocast(model: Any, *, bf16: bool) -> None:
    """Have the 4-bit layers of a policy, if it has any, compute as autocast has others, for it does not reach them.

    A policy is loaded to compute without autocast; training and scoring then say what they do.

    In scoring they compute as in training. bitsandbytes has another kernel for the former on CPUs with AVX512-BF16, of
    other rounding, for which it packs the weights so that no gradient flows through them any more.
    """
    if not is_in_4bit(model):
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.bfloat16 if bf16 else torch.float32, True
            module.support_avx512bf16_for_cpu = False


def merged(model: Any, adapter: Path) -> Any:
    """A QLoRA policy as a plain model of transformers, the very policy that was trained; the policy is left as it was.

    peft by itself would quantise each layer again once its adapter is merged in, which rounds the adapter away.

    Args:
        model: the policy.
        adapter: folder where its adapter was saved.
    """
    base = copy.deepcopy(model).unload().dequantize()
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def bytes_of(weights: int) -> int:
    """Bytes that a layer of so many weights takes: about 0.516 each."""
    blocks = -(-weights // BLOCK)
    return -(-weights // 2) + blocks + 4 * -(-blocks // GROUP) + TABLES
