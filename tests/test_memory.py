"""The dry run's memory, against models that are really built and steps that are really trained."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from pipeline import logprobs, memory, qlora, training
from pipeline.batches import Run, Side, collate
from pipeline.config import ModelConfig, PreferenceConfig
from pipeline.logprobs import KEPT, causal_lm_of
from pipeline.methods import Discount
from pipeline.models import add_lora, load_policy, read_sizes
from pipeline.objectives import PreferenceObjective
from pipeline.packing import packed_attention
from pipeline.rendering import Rendered
from tests.tiny_policy import save_tiny_policy
from tests.training_worker import PREFERENCE

CONFIGS = Path(__file__).parent / "fixtures" / "model_configs"
LENGTH = 256
SMALL = LlamaConfig(
    vocab_size=600,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama2-7b", 6_738_415_616),
        ("mistral-7b", 7_241_732_096),
        ("llama3.1-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-4b", 4_022_468_096),
    ],
)
def test_published_models_have_their_published_numbers_of_weights(name, published):
    sizes = read_sizes(CONFIGS / name, ModelConfig(max_length=4096))
    counted = memory.count(memory.build(sizes, ModelConfig()))
    assert (counted.total, counted.trained, counted.base_bytes) == (published, published, 0)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_a_model_that_is_built(rank, tied):
    sizes = AutoConfig.for_model(**SMALL.to_dict() | {"tie_word_embeddings": tied})
    config = ModelConfig(lora_rank=rank)
    built = add_lora(AutoModelForCausalLM.from_config(sizes, dtype=torch.float32), config, 0)
    counted = memory.count(memory.build(sizes, config))
    assert counted.total == sum(weight.numel() for weight in built.parameters())
    assert counted.trained == sum(weight.numel() for weight in built.parameters() if weight.requires_grad)
    assert counted.used + counted.embedding + (0 if tied else counted.head) == counted.total - sizes.hidden_size


def test_the_base_of_a_lora_policy_keeps_its_checkpoints_precision_on_a_gpu_alone():
    sizes, config = read_sizes(CONFIGS / "llama2-7b", ModelConfig()), ModelConfig(lora_rank=8)
    assert memory.count(memory.build(sizes, config)).base_bytes == 2 * 6_738_415_616
    assert memory.count(memory.build(sizes, config, gpu=False)).base_bytes == 4 * 6_738_415_616


def test_a_base_in_4_bits_is_counted_to_the_byte(tmp_path):
    config = ModelConfig(lora_rank=4, load_in_4bit=True, max_length=512)
    folder = save_tiny_policy(tmp_path, hidden_size=96)  # 96 x 96 weights are no whole number of groups
    model, _ = load_policy(folder, config)
    held = [weight for weight in model.parameters() if not weight.requires_grad]
    for state in [weight.quant_state for weight in held if hasattr(weight, "quant_state")]:
        held += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    measured = sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in held}.values())
    counted = memory.count(memory.build(read_sizes(folder, config), config, gpu=False))
    assert measured == counted.base_bytes
    assert counted.total == model.num_parameters()


def test_a_weight_in_4_bits_takes_about_half_a_byte():
    assert qlora.bytes_of(4096 * 11008) / (4096 * 11008) == pytest.approx(0.5159, abs=1e-4)
    sizes, config = read_sizes(CONFIGS / "llama2-7b", ModelConfig()), ModelConfig(lora_rank=8, load_in_4bit=True)
    outside = 2 * 32000 * 4096 + 65 * 4096  # embedding, output layer and norms
    expected = 2 * outside + 0.5159 * (6_738_415_616 - outside)
    assert memory.count(memory.build(sizes, config)).base_bytes == pytest.approx(expected, rel=1e-3)


def test_a_mixture_multiplies_with_the_experts_a_token_is_sent_to():
    sizes = Qwen3MoeConfig(
        vocab_size=600,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    model = memory.build(sizes, ModelConfig())
    experts = 2 * 8 * 3 * 64 * 32
    assert (
        memory.count(model).used == sum(weight.numel() for weight in model.model.layers.parameters()) - experts * 3 // 4
    )
    assert memory.kept(model, [128], bf16=True).activations > 0


def pair() -> tuple[Rendered, Rendered]:
    """Two trajectories of LENGTH tokens that share none, all but the first the policy's."""
    first, second = (Rendered(ids=[token] * LENGTH, turn_index=[-1, *[0] * (LENGTH - 1)]) for token in (7, 8))
    return first, second


def test_what_training_holds_between_steps_is_counted_to_the_byte(tmp_path, monkeypatch):
    held = {}

    def look(trainer, *arguments, **more):
        optimizer = trainer.optimizer.state.values()
        held["weights"] = _bytes(trainer.model.parameters())
        held["gradients"] = _bytes(weight.grad for weight in trainer.model.parameters() if weight.grad is not None)
        held["optimizer"] = _bytes(state[key] for state in optimizer for key in ("exp_avg", "exp_avg_sq"))
        return step(trainer, *arguments, **more)

    step = training._TurnTrainer.training_step
    monkeypatch.setattr(training._TurnTrainer, "training_step", look)
    monkeypatch.setattr(torch.nn.Module, "zero_grad", lambda self, set_to_none=True: None)  # they are freed, else
    for rank in (0, 4):
        model = add_lora(LlamaForCausalLM(SMALL), ModelConfig(lora_rank=rank), 0)
        config = PreferenceConfig(**PREFERENCE | {"batch_size": 1, "micro_batch_size": 1, "epochs": 2})
        reference = training.reference_turn_logprobs(model, [pair()], config)
        training.run_preference(model, [pair()], reference, Discount.DMPO, config, tmp_path / str(rank), seed=0)
        shapes = memory.build(SMALL, ModelConfig(lora_rank=rank), gpu=False)
        kept = memory.kept(shapes, [LENGTH] * 2)
        said = memory.training(shapes, kept)
        assert memory.scoring(shapes, kept).weights == held["weights"]
        assert held == {"weights": said.weights, "gradients": said.gradients, "optimizer": said.optimizer}


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_of_a_step(model, bf16: bool, checkpointing: bool) -> int:
    """Bytes beyond weights and gradients at the worst moment of a real step, as torch's profiler saw them."""
    sides = tuple(Side(rendered=side, reference=[-1.0] * side.turns, weights=[1.0] * side.turns) for side in pair())
    batch = collate([Run([sides], [1], batch_size=1, epochs=1, seed=0)[0]])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for weight in model.parameters():  # what earlier micro-batches of the step leave
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    with profiling() as profiler, packed_attention(causal_lm_of(model)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # as accelerate: around the forward pass alone
            of_sides = training._sides_logprobs(model, batch["sides"])
        PreferenceObjective(beta=0.1)(of_sides, batch)[0].backward()
    return peak_in(profiler)


def profiling() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def peak_in(profiler: profile) -> int:
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_peak_of_a_step_in_4_bits_is_near_what_is_said(tmp_path):
    LlamaForCausalLM(SMALL).to(torch.bfloat16).save_pretrained(tmp_path)
    config = ModelConfig(lora_rank=4, load_in_4bit=True, max_length=512)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **qlora.loading())  # as on a GPU
    model = add_lora(base, config, 0)
    qlora.compute_as_autocast(model, bf16=True)
    measured = peak_of_a_step(model, bf16=True, checkpointing=False)
    shapes = memory.build(read_sizes(tmp_path, config), config)
    said = memory.training(shapes, memory.kept(shapes, [LENGTH] * 2, bf16=True))
    assert 0.85 < said.passing / measured < 1.15, (measured, said)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("vocabulary", "logits_kept"),
    [(600, KEPT), (32_000, KEPT), (32_000, 100 * 32_000)],  # little is the output layer's; most is; and few are kept
)
def test_the_peak_of_a_step_is_near_what_is_said(rank, bf16, checkpointing, vocabulary, logits_kept, monkeypatch):
    monkeypatch.setattr(logprobs, "KEPT", logits_kept)
    sizes = LlamaConfig(**SMALL.to_dict() | {"vocab_size": vocabulary})
    model = add_lora(LlamaForCausalLM(sizes), ModelConfig(lora_rank=rank), 0)
    measured = peak_of_a_step(model, bf16, checkpointing)
    shapes = memory.build(sizes, ModelConfig(lora_rank=rank), gpu=False)
    kept = memory.kept(shapes, [LENGTH] * 2, bf16=bf16, checkpointing=checkpointing)
    said = memory.training(shapes, kept)
    ratio = said.passing / measured
    assert 0.85 < ratio < 1.15, (measured, said)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_peak_of_a_reference_pass_is_near_what_is_said(rank, bf16):
    model = add_lora(LlamaForCausalLM(SMALL), ModelConfig(lora_rank=rank), 0)
    with profiling() as profiler:
        training.reference_turn_logprobs(model, [pair()], PreferenceConfig(bf16=bf16, micro_batch_size=1))
    shapes = memory.build(SMALL, ModelConfig(lora_rank=rank), gpu=False)
    said = memory.scoring(shapes, memory.kept(shapes, [LENGTH] * 2, bf16=bf16, checkpointing=True))
    assert 0.95 < said.passing / peak_in(profiler) < 1.55, (peak_in(profiler), said)
