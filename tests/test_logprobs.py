import copy
from collections import defaultdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline import logprobs
from pipeline.logprobs import sum_turns, token_logprobs, turn_logprobs

V = 61
SIZE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**SIZE | changes))


MODELS = {
    "llama": llama,
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE, tie_word_embeddings=True)),
    "gpt2-tied": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    "gemma2-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=0.5)),
    "cohere-scaled": lambda: CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.3)),
    "granite-scaled": lambda: GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=3.0)),
}


@pytest.fixture(params=MODELS)
def model(request):
    return seeded(MODELS[request.param])


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build().eval()


def batch():
    """Three rows of 20 positions: one padded on the right, one on the left, one whole; up to 3 turns."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    mask[1, :4] = 0
    turns = torch.tensor([-1] * 6 + [0] * 3 + [-1] * 2 + [1] * 4 + [-1] + [2] * 4).expand(3, -1)
    return ids * mask, mask, turns.where(mask > 0, -1)


def naive(model, ids, mask, turns):
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return F.pad(logprobs, (1, 0)).where(turns >= 0, 0.0)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], **tolerance)


def weighted(logprobs):
    """A loss in which every position counts differently."""
    return (logprobs * torch.linspace(1, 2, logprobs.numel()).view_as(logprobs)).sum()


@pytest.fixture(params=[0, 8 * V, logprobs.KEPT], ids=["none-kept", "some-kept", "all-kept"])
def kept(request, monkeypatch):
    """How many logits are kept for the backward pass."""
    monkeypatch.setattr(logprobs, "KEPT", request.param)


@pytest.mark.usefixtures("kept")
def test_values_and_gradients_are_those_of_full_logits(model):
    assert_full_logits_agree(model, chunk=7)


@pytest.mark.parametrize("chunk", [1, 1024])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    assert_full_logits_agree(seeded(llama), chunk)


def assert_full_logits_agree(model, chunk):
    expected = naive(model, *batch())
    wanted = gradients(model, weighted(expected))
    found = token_logprobs(model, *batch(), chunk=chunk)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-6)
    assert_same_gradients(gradients(model, weighted(found)), wanted, atol=5e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was(model):
    before = model(input_ids=batch()[0]).logits
    token_logprobs(model, *batch())
    assert "forward" not in model.get_output_embeddings().__dict__
    assert torch.equal(model(input_ids=batch()[0]).logits, before)
    with pytest.raises(ValueError, match="begins with a token of the policy"):
        token_logprobs(model, *batch()[:2], torch.zeros(3, 20, dtype=torch.long))
    assert not model._forward_hooks


def test_turns_are_sums_of_their_tokens():
    model = seeded(llama)
    ids, mask, turns = batch()
    tokens = token_logprobs(model, ids, mask, turns)
    found = turn_logprobs(model, ids, mask, turns)
    assert found.shape == (3, 3)
    for row in range(3):
        for turn in range(3):
            torch.testing.assert_close(found[row, turn], tokens[row][turns[row] == turn].sum())
    assert found[0, 2] == 0  # padded away
    by_hand = sum_turns(torch.tensor([[9.0, 1, 2, 9, 4]]), torch.tensor([[-1, 0, 0, -1, 1]]))
    assert by_hand.tolist() == [[3.0, 4.0]]


def test_turn_gradients_are_those_of_full_logits():
    model = seeded(llama)
    ids, mask, turns = batch()
    wanted = gradients(model, weighted(sum_turns(naive(model, ids, mask, turns), turns)))
    assert_same_gradients(gradients(model, weighted(turn_logprobs(model, ids, mask, turns, chunk=5))), wanted)


def test_padding_and_batch_order_change_nothing(model):
    """Left, right or no padding, alone or beside others: a trajectory's turns keep their log-probs."""
    ids, mask, turns = (tensor[2:] for tensor in batch())
    with torch.no_grad():
        alone = turn_logprobs(model, ids, mask, turns)
        rows = [
            tuple(F.pad(tensor, sides, value=fill) for tensor, fill in ((ids, 0), (mask, 0), (turns, -1)))
            for sides in ((5, 0), (0, 5), (2, 3))
        ]
        together = turn_logprobs(model, *(torch.cat(column) for column in zip(*rows, strict=True)))
    torch.testing.assert_close(together, alone.expand(3, -1), atol=1e-5, rtol=1e-5)


class Shapes(TorchDispatchMode):
    """Records of every tensor with a vocabulary that an operation makes how many rows it has, by precision."""

    def __init__(self):
        super().__init__()
        self.rows = defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[-1] == V:
                self.rows[leaf.dtype].append(leaf.numel() // V)
        return output


def shapes_of(train):
    """What is made by log-probs in chunks of 4 positions, and by their gradients."""
    with torch.set_grad_enabled(train), Shapes() as shapes:
        found = token_logprobs(seeded(llama), *batch(), chunk=4)
        if train:
            weighted(found).backward()
    return shapes.rows


WEIGHT = SIZE["hidden_size"]  # rows of the output layer's own weight, [H, V] in a product


@pytest.mark.parametrize("train", [True, False])
def test_logits_that_are_not_kept_exist_a_chunk_at_a_time(train, monkeypatch):
    monkeypatch.setattr(logprobs, "KEPT", 0)
    with Shapes() as naive_shapes:
        naive(seeded(llama), *batch())
    assert max(naive_shapes.rows[torch.float32]) == 3 * 20
    assert max(shapes_of(train)[torch.float32]) <= max(4, WEIGHT)


@pytest.mark.parametrize("train", [True, False])
def test_logits_that_are_kept_exist_in_float32_a_chunk_at_a_time(train):
    with torch.autocast("cpu", torch.bfloat16):
        rows = shapes_of(train)
    assert max(rows[torch.bfloat16]) == POLICY_TOKENS
    assert max(rows[torch.float32]) <= max(4, WEIGHT)


POLICY_TOKENS = int((batch()[2] >= 0).sum())


@pytest.mark.parametrize(
    ("most", "rows"), [(0, 0), (V - 1, 0), (10 * V + 5, 10), (logprobs.KEPT, POLICY_TOKENS)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_many_logits_are_kept_for_backward_as_is_said(most, rows, dtype, monkeypatch):
    monkeypatch.setattr(logprobs, "KEPT", most)
    kept = {}

    def keep(tensor):
        if tensor.shape[-1:] == (V,) and tensor.shape[0] != WEIGHT:
            kept[tensor.data_ptr()] = (len(tensor), tensor.dtype)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16), hooks:
        found = token_logprobs(seeded(llama), *batch(), chunk=4)
    assert found.dtype == torch.float32
    assert list(kept.values()) == ([(rows, dtype)] if rows else [])


@pytest.mark.usefixtures("kept")
def test_gradients_in_autocast_are_as_exact_however_many_logits_are_kept():
    """They are off by three hundredths of their size at most, in every weight."""
    model = seeded(llama)
    wanted = gradients(model, weighted(naive(model, *batch())))
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(model, *batch(), chunk=4)
    for name, gradient in gradients(model, weighted(found)).items():
        assert (gradient - wanted[name]).norm() < 0.03 * wanted[name].norm(), name


def test_models_that_change_their_logits_keep_none():
    for build, some in ((MODELS["llama"], True), (MODELS["gemma2-capped"], False), (MODELS["cohere-scaled"], False)):
        assert bool(logprobs.kept_positions(build().config)) == some


@pytest.mark.usefixtures("kept")
def test_gradient_checkpointing_changes_nothing():
    model = seeded(llama).train()
    plain = token_logprobs(model, *batch(), chunk=4)
    wanted = gradients(model, weighted(plain))
    model.gradient_checkpointing_enable()
    found = token_logprobs(model, *batch(), chunk=4)
    assert torch.equal(found, plain)
    assert_same_gradients(gradients(model, weighted(found)), wanted)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_models_are_summed_in_float32(how):
    model = seeded(llama)
    if how == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        expected = naive(model, *batch())
        found = token_logprobs(model, *batch(), chunk=4)
    assert found.dtype == torch.float32
    # The same bfloat16 logits, up to the order of a matmul's sums; the log-softmax of both is float32.
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    assert (found != found.bfloat16().float()).any()
    wanted = gradients(model, weighted(expected))
    assert_same_gradients(gradients(model, weighted(found)), wanted, atol=0.3, rtol=0.1)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(target_modules=["q_proj", "v_proj"]),
        LoraConfig(target_modules=["q_proj", "lm_head"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["attention", "head", "head-saved"],
)
def test_lora(lora):
    base = seeded(llama)
    reference = token_logprobs(copy.deepcopy(base), *batch())
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    expected = naive(model, *batch())
    found = token_logprobs(model, *batch(), chunk=5)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-5)
    assert not torch.allclose(found, reference, atol=1e-3)
    wanted = gradients(model, weighted(expected))
    assert_same_gradients(gradients(model, weighted(found)), wanted, atol=5e-4, rtol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(token_logprobs(model, *batch()), reference)


@pytest.mark.usefixtures("kept")
def test_a_batch_without_policy_tokens_has_zero_gradients_everywhere():
    """As on a rank whose rows are all context: its gradients must exist for the others to average with."""
    model = seeded(llama)
    ids, mask, turns = batch()
    found = token_logprobs(model, ids, mask, torch.full_like(turns, -1))
    assert found.tolist() == torch.zeros(3, 20).tolist()
    zero = gradients(model, found.sum())
    assert zero.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in zero.values())


def test_models_that_do_something_unknown_to_their_logits_are_refused():
    class Shifted(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.5
            return output

    model = seeded(lambda: Shifted(LlamaConfig(**SIZE)))
    with pytest.raises(ValueError, match="Shifted changes its logits after the output layer"):
        token_logprobs(model, *batch())
    assert "forward" not in model.lm_head.__dict__
    known_name_other_meaning = seeded(llama)
    known_name_other_meaning.config.logit_scale = 2.0
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits"):
        token_logprobs(known_name_other_meaning, *batch())


def test_models_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="LlamaModel holds no Hugging Face model with an output layer"):
        token_logprobs(LlamaModel(LlamaConfig(**SIZE)), *batch())
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        token_logprobs(seeded(llama), *batch(), chunk=0)


def test_the_first_real_token_of_a_left_padded_row_is_predicted_by_nothing():
    ids, mask, turns = batch()
    turns = turns.clone()
    turns[1, 4] = 0
    with pytest.raises(ValueError, match="begins with a token of the policy"):
        token_logprobs(seeded(llama), ids, mask, turns)
