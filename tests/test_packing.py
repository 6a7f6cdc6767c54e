"""Packed rows against padded ones: the same log-probs and gradients, for fewer tokens."""

import math
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F  # noqa: N812
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DogeConfig,
    DogeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.logprobs import token_logprobs
from pipeline.packing import MULTIPLE, NAME, can_pack, pack, packed_attention
from tests.test_logprobs import MODELS, SIZE, assert_same_gradients, gradients, llama, naive, seeded, weighted

EXACT = {"atol": 5e-6, "rtol": 1e-5}
GRADIENTS = {"atol": 1e-4, "rtol": 1e-4}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOWS = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 5}

PACKED = {name: build for name, build in MODELS.items() if name != "gemma2-capped"} | {
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=5)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=8)),
    "qwen3-some-windows": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZE, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    # Both give attention its window by the mask alone.
    "qwen2-moe-windows": lambda: spread(Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZE, **MIXTURE, **WINDOWS))),
    "phimoe-window": lambda: spread(PhimoeForCausalLM(PhimoeConfig(**SIZE, **MIXTURE, sliding_window=5))),
}


def spread(model):
    """With weights so large that a token feels what it sees, and with none that are 0 or not filled at all."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 + (weight.ndim == 1))
    return model


@pytest.fixture(params=PACKED)
def model(request):
    return seeded(PACKED[request.param])


def twins(left=0):
    """Two pairs: the sides of the first begin with 9 like tokens, a turn among them, those of the other with 3.

    Args:
        left: how many positions of padding stand on the left, the same for both sides of a pair.
    """
    generator = torch.Generator().manual_seed(1)
    lengths, alike, width = [(20, 14), (11, 17)], [9, 3], 20 + left
    rows = [[torch.randint(3, 61, (length,), generator=generator) for length in pair] for pair in lengths]
    for (chosen, rejected), number in zip(rows, alike, strict=True):
        rejected[:number] = chosen[:number]
        rejected[number] = (chosen[number] + 1 - 3) % 58 + 3
    sides = [rows[pair][side] for side in (0, 1) for pair in (0, 1)]
    ids = torch.stack([F.pad(row, (left, width - left - len(row))) for row in sides])
    mask = torch.stack([F.pad(torch.ones_like(row), (left, width - left - len(row))) for row in sides])
    turns = torch.tensor([-1] * (left + 2) + [0] * 4 + [-1] + [1] * 5 + [-1] * 3 + [2] * 5).expand(4, -1)
    return ids, mask, turns.where(mask > 0, -1)


def test_a_row_is_laid_out_as_its_docstring_says():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    packing = pack(ids, (ids > 0).long(), torch.zeros_like(ids), twins=True)
    assert packing.input_ids.shape == (1, 64)
    assert packing.input_ids[0, :6].tolist() == [5, 6, 7, 8, 9, 0]
    assert packing.positions[0, :7].tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert packing.places.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0]]
    assert packing.own.tolist() == [[True] * 4, [False, False, True, False]]
    assert packing.rows[0] == slice(0, 4)
    assert packing.rows[1].tolist() == [0, 1, 4]
    assert packing.rows[2] == slice(5, 64)
    assert packing.shared == (0, 2, 0)


def test_nothing_is_shared_unless_asked_for_nor_of_another_turn():
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    assert pack(ids, torch.ones_like(ids), torch.zeros_like(ids)).own.all()
    other_turn = torch.tensor([[-1, -1, 0], [-1, 0, 0]])
    assert pack(ids, torch.ones_like(ids), other_turn, twins=True).shared[:2] == (0, 1)


@pytest.mark.parametrize("share", [False, True])
def test_values_and_gradients_are_those_of_full_logits(model, share):
    expected = naive(model, *twins())
    wanted = gradients(model, weighted(expected))
    with packed_attention(model):
        assert model.config._attn_implementation == NAME
        found = token_logprobs(model, *twins(), chunk=7, twins=share)
        torch.testing.assert_close(found, expected, **EXACT)
        assert_same_gradients(gradients(model, weighted(found)), wanted, **GRADIENTS)
    assert model.config._attn_implementation == "sdpa"


def test_padding_on_the_left_and_equal_sides():
    model = seeded(llama)
    ids, mask, turns = twins(left=3)
    with packed_attention(model):
        found = token_logprobs(model, ids, mask, turns, twins=True)
    with torch.no_grad():
        torch.testing.assert_close(found, token_logprobs(model, ids, mask, turns), **EXACT)
        ids, mask, turns = (tensor[:2].repeat(2, 1) for tensor in twins())
        with packed_attention(model):
            found = token_logprobs(model, ids, mask, turns, twins=True)
        assert torch.equal(found[:2], found[2:])
        torch.testing.assert_close(found, token_logprobs(model, ids, mask, turns), **EXACT)


def test_a_shared_beginning_is_computed_once():
    model, seen = seeded(llama), []
    ids, mask, turns = (tensor.repeat_interleave(4, dim=0) for tensor in twins())
    with packed_attention(model), torch.no_grad():
        model.model.layers[0].mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[:2]))
        token_logprobs(model, ids, mask, turns)
        token_logprobs(model, ids, mask, turns, twins=True)
    token_logprobs(model, ids, mask, turns)
    tokens = 4 * (20 + 14 + 11 + 17)
    rounded = [-(-number // 64) * 64 for number in (tokens, tokens - 4 * (9 + 3))]
    assert seen == [(1, rounded[0]), (1, rounded[1]), (16, 20)]


def test_gradient_checkpointing_changes_nothing():
    model = seeded(llama).train()
    with packed_attention(model):
        plain = token_logprobs(model, *twins(), twins=True)
        wanted = gradients(model, weighted(plain))
        model.gradient_checkpointing_enable()
        found = token_logprobs(model, *twins(), twins=True)
        assert torch.equal(found, plain)
        assert_same_gradients(gradients(model, weighted(found)), wanted)


def test_lora_and_its_reference():
    base = seeded(llama)
    reference = token_logprobs(base, *twins())
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    expected = naive(model, *twins())
    wanted = gradients(model, weighted(expected))
    with packed_attention(model.get_base_model()):
        found = token_logprobs(model, *twins(), twins=True)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert_same_gradients(gradients(model, weighted(found)), wanted, atol=2e-3, rtol=1e-2)
        with model.disable_adapter():
            torch.testing.assert_close(token_logprobs(model, *twins(), twins=True), reference, **EXACT)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=8)),  # a soft cap inside attention
        lambda: JambaForCausalLM(JambaConfig(**SIZE, use_mamba_kernels=False)),  # tokens meet in state spaces, too
        lambda: LlamaForCausalLM(LlamaConfig(**SIZE, attn_implementation="eager")),
    ],
    ids=["gemma2", "jamba", "eager"],
)
def test_other_models_stay_padded(build):
    model = seeded(build)
    assert not can_pack(model)
    before = model.config._attn_implementation
    with packed_attention(model):
        assert model.config._attn_implementation == before


def doge():
    """Every layer makes a mask of its own, of numbers."""
    return spread(DogeForCausalLM(DogeConfig(**SIZE)))


def mixing():
    """A Llama in which tokens meet outside attention, as in a convolution: its configuration does not say so."""
    model = llama()
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _, arguments: arguments[0] + arguments[0].roll(1, 1))
    return spread(model)


def looking_ahead():
    """An encoder: a token sees those after it, too."""
    return spread(BertLMHeadModel(BertConfig(**SIZE, hidden_dropout_prob=0, attention_probs_dropout_prob=0)))


APART = r"its log-probs come out \d\S* apart"
FAILS = r"packed, it fails \(It asks for a mask that packed attention does not compute\.\)"


@pytest.mark.parametrize(("build", "why"), [(doge, FAILS), (mixing, APART), (looking_ahead, FAILS)])
def test_a_model_that_comes_out_otherwise_when_packed_is_padded(build, why, capsys):
    model = seeded(build).train()
    assert can_pack(model)  # for all that its configuration says
    expected = naive(model, *twins())
    with packed_attention(model):
        assert model.config._attn_implementation == "sdpa"
        assert model.training
        torch.testing.assert_close(token_logprobs(model, *twins(), twins=True), expected, **EXACT)
    told = capsys.readouterr().err
    assert re.fullmatch(f"{type(model).__name__} cannot be packed, and is computed with padding: .*{why}.*\n", told)


def test_under_autocast_packing_changes_less_than_bfloat16_does():
    model = seeded(lambda: spread(llama()))
    exact = naive(model, *twins())
    exact_gradients = gradients(model, weighted(exact))
    with torch.autocast("cpu", torch.bfloat16):
        padded = token_logprobs(model, *twins())
        with packed_attention(model):
            packed = token_logprobs(model, *twins(), twins=True)
            found = gradients(model, weighted(packed))
    wanted = gradients(model, weighted(padded))
    rounding = (padded - exact).abs().max().item()
    assert 0.01 < rounding < 0.2  # so that the bound says something
    torch.testing.assert_close(packed, padded, atol=rounding, rtol=0)
    assert distance(found, wanted) < distance(wanted, exact_gradients) / 2


def distance(first, second):
    return math.sqrt(sum(float((first[name] - second[name]).pow(2).sum()) for name in first))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"softcap": 3.0}, "LlamaAttention needs softcap"),
        ({"attention_mask": torch.zeros(1, 1, MULTIPLE, MULTIPLE)}, "LlamaAttention makes a mask of its own"),
    ],
)
def test_what_attention_does_not_compute_is_refused(arguments, complaint):
    model, ids = seeded(llama), torch.ones(1, 3, dtype=torch.long)
    with packed_attention(model), pytest.raises(ValueError, match=complaint):
        model(**pack(ids, ids, ids).arguments() | arguments)
