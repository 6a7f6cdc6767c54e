import pytest
import torch

from pipeline.precision import multiplies_bf16, resolve


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"bf16": True}, "bfloat16"),  # ARM's
        ({}, "float32"),
    ],
)
def test_auto_is_what_the_cpu_multiplies_in(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve("auto") == dtype


@pytest.mark.parametrize("supported", [True, False])
def test_auto_on_a_gpu(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert multiplies_bf16() is supported


def test_a_named_precision_stands():
    assert resolve("float16") == "float16"
