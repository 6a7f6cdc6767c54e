"""The precision that this machine computes in, where a recipe leaves it open."""

import torch

from pipeline.config import TrainingConfig


def multiplies_bf16() -> bool:
    """Whether the hardware multiplies in bfloat16; a CPU without such instructions is ten times slower in it."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def uses_bf16(config: TrainingConfig) -> bool:
    """Whether autocast computes in bfloat16: as configured, else where the hardware multiplies in it."""
    return multiplies_bf16() if config.bf16 is None else config.bf16


def of_training(config: TrainingConfig) -> str:
    """The name of the precision that training computes in."""
    return "bfloat16" if uses_bf16(config) else "float32"


def resolve(dtype: str) -> str:
    """The name of a precision, `auto` resolved: bfloat16 where the hardware multiplies in it, else float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if multiplies_bf16() else "float32"
