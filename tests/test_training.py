"""Training: the collator's worked example, and settings that must all give the same losses and weights."""

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline import training
from pipeline.batches import Placed, Side, collate, order_examples
from pipeline.config import ModelConfig, PreferenceConfig, SftConfig
from pipeline.losses import discount, preference_loss
from pipeline.methods import Discount
from pipeline.models import add_lora, new_policy, reference_mode, save_policy
from pipeline.rendering import Rendered
from tests import sharing_worker
from tests.training_worker import (
    KINDS,
    PREFERENCE,
    SFT,
    SIZES,
    TEXTS,
    tiny_model,
    toy_pairs,
    toy_trajectories,
    train_preference,
    train_qlora,
    train_sft,
)

LN2 = math.log(2)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def distance(one, other) -> float:
    """Between two models' weights: the length of the difference."""
    theirs = other.state_dict()
    return math.sqrt(sum(float((weight - theirs[key]).pow(2).sum()) for key, weight in one.state_dict().items()))


def assert_same_run(one, other, folder: Path, other_folder: Path, **tolerance):
    for (name, weight), other_weight in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, other_weight, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    lines, other_lines = log_of(folder), log_of(other_folder)
    assert [line["step"] for line in lines] == [line["step"] for line in other_lines]
    for line, other_line in zip(lines, other_lines, strict=True):
        assert line.keys() == other_line.keys()
        for key in line.keys() - (
            {"accuracy"} if line["step"] == 1 else set()
        ):  # a margin of 0 has the sign of rounding
            ours, theirs = (value if isinstance(value, list) else [value] for value in (line[key], other_line[key]))
            assert [number is None for number in ours] == [number is None for number in theirs], key
            ours, theirs = ([number or 0 for number in numbers] for numbers in (ours, theirs))
            assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4), key


# ---- The collator and the order ----

A = Side(rendered=Rendered(ids=[5, 6, 7, 8], turn_index=[-1, 0, -1, 1]), reference=[-1.5, -2.0], weights=[1.0, 0.5])
B = Side(rendered=Rendered(ids=[5, 9, 4], turn_index=[-1, 0, 0]), reference=[-3.0], weights=[1.0])
C = Side(rendered=Rendered(ids=[5, 6], turn_index=[-1, 0]), reference=[-0.5], weights=[1.0])
D = Side(rendered=Rendered(ids=[5, 7, 7, 7], turn_index=[-1, 0, -1, 1]), reference=[-4.0, -1.0], weights=[1.0, 0.5])


def test_collate_gives_the_tensors_of_its_docstring():
    batch = collate([Placed((A, B), 0.25), Placed((C, D), 0.25)])
    assert batch["weight"].tolist() == [0.25, 0.25]
    assert {key: value.tolist() for key, value in batch["sides"][0].items()} == {
        "input_ids": [[5, 6, 7, 8], [5, 6, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "turn_index": [[-1, 0, -1, 1], [-1, 0, -1, -1]],
        "reference": [[-1.5, -2.0], [-0.5, 0.0]],
        "weights": [[1.0, 0.5], [1.0, 0.0]],
    }
    assert {key: value.tolist() for key, value in batch["sides"][1].items()} == {
        "input_ids": [[5, 9, 4, 0], [5, 7, 7, 7]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "turn_index": [[-1, 0, 0, -1], [-1, 0, -1, 1]],
        "reference": [[-3.0, 0.0], [-4.0, -1.0]],
        "weights": [[1.0, 0.0], [1.0, 0.5]],
    }


def test_collate_takes_a_side_alone_for_sft():
    batch = collate([Placed((Side(rendered=A.rendered),), 0.5)])
    assert len(batch["sides"]) == 1
    assert batch["sides"][0]["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch["sides"][0]["reference"].shape == (1, 0)


def test_every_epoch_sees_every_example_once():
    order = order_examples([3, 1, 2, 9, 5], batch_size=2, epochs=2, seed=0)
    assert len(order) == 2 * 6
    for epoch in (order[:6], order[6:]):
        assert sorted(epoch) == [-1, 0, 1, 2, 3, 4]
        assert epoch[5] == -1
    assert order[:6] != order[6:]
    assert order == order_examples([3, 1, 2, 9, 5], batch_size=2, epochs=2, seed=0)
    assert order != order_examples([3, 1, 2, 9, 5], batch_size=2, epochs=2, seed=1)


def test_an_epoch_may_end_after_any_step():
    whole = order_examples([1] * 10, batch_size=2, epochs=2, seed=0)
    assert order_examples([1] * 10, batch_size=2, epochs=1.5, seed=0) == whole[: 8 * 2]
    for steps in range(1, 11):
        assert len(order_examples([1] * 10, batch_size=2, epochs=Fraction(steps, 5), seed=0)) == steps * 2


def test_a_step_starts_with_its_longest_example():
    lengths = [7, 3, 9, 1, 5, 4]
    order = order_examples(lengths, batch_size=3, epochs=1, seed=0)
    for step in (order[:3], order[3:]):
        assert [lengths[index] for index in step] == sorted((lengths[index] for index in step), reverse=True)


# ---- Invariants ----


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_does_not_matter(kind, tmp_path):
    one, facts = KINDS[kind](tmp_path / "8x1", micro_batch_size=8)
    other, other_facts = KINDS[kind](tmp_path / "1x8", micro_batch_size=1)
    # A step moves a weight by 3e-3, whatever its gradient's size: where that is next to 0, rounding decides.
    assert_same_run(one, other, tmp_path / "8x1", tmp_path / "1x8", rtol=1e-3, atol=5e-4)
    assert facts["steps"] == other_facts["steps"] == 4  # 13 examples, 8 a step, 2 epochs
    assert facts["tokens"] == other_facts["tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_does_not_matter(kind, tmp_path):
    one, _ = KINDS[kind](tmp_path / "off")
    other, _ = KINDS[kind](tmp_path / "on", gradient_checkpointing=True)
    assert_same_run(one, other, tmp_path / "off", tmp_path / "on", rtol=1e-4, atol=1e-5)
    assert not other.is_gradient_checkpointing


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.training_worker", str(tmp_path)],
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for kind, train in KINDS.items():
        alone, _ = train(tmp_path / "alone" / kind)
        found = torch.load(tmp_path / f"{kind}.pt")
        assert found["facts"]["processes"] == 2
        together = SimpleNamespace(state_dict=lambda weights=found["weights"]: weights)
        assert_same_run(alone, together, tmp_path / "alone" / kind, tmp_path / kind, rtol=1e-3, atol=1e-4)
    for rank in (0, 1):
        assert (
            "batch_size 9 is no multiple of micro_batch_size 3 x 2 processes"
            in (tmp_path / f"refused{rank}").read_text()
        )


class KilledError(Exception):
    """Stands for a kill -9."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(kind, tmp_path, monkeypatch):
    settings = {"epochs": 6, "save_steps": 6, "micro_batch_size": 4}  # 12 steps, a line of the log every 3
    straight, facts = KINDS[kind](tmp_path / "straight", **settings)
    step = training._TurnTrainer.training_step

    def die_in_step_11(self, *arguments, **more):
        if self.state.global_step == 10:
            raise KilledError
        return step(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training._TurnTrainer, "training_step", die_in_step_11)
        with pytest.raises(KilledError):
            KINDS[kind](tmp_path / "killed", **settings)
    assert [line["step"] for line in log_of(tmp_path / "killed")] == [1, 3, 6, 9]
    half_written = tmp_path / "killed/checkpoints/checkpoint-9"
    half_written.mkdir()
    resumed, resumed_facts = KINDS[kind](tmp_path / "killed", **settings)
    assert resumed_facts["resumed_at_step"] == 6
    assert facts["resumed_at_step"] == 0
    assert not half_written.exists()
    assert (tmp_path / "killed/log.jsonl").read_bytes() == (tmp_path / "straight/log.jsonl").read_bytes()
    assert_same_run(straight, resumed, tmp_path / "straight", tmp_path / "killed", rtol=0, atol=0)
    for key in ("steps", "tokens", "first_loss", "final_loss"):
        assert facts[key] == resumed_facts[key]


def test_tied_embeddings_are_resumed_tied_and_in_silence(tmp_path, caplog):
    models = []
    for _ in range(2):
        tied = LlamaForCausalLM(LlamaConfig(**tiny_model().config.to_dict() | {"tie_word_embeddings": True}))
        facts = training.run_sft(tied, toy_trajectories(), SftConfig(**SFT), tmp_path, seed=0)
        models.append(tied)
    assert facts["resumed_at_step"] == facts["steps"]
    # vLLM, where its tests ran before in this process, leaves a process group behind, which training_args speaks of.
    assert not [record for record in caplog.records if record.name != "transformers.training_args"]
    assert models[1].lm_head.weight is models[1].model.embed_tokens.weight
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)


def test_a_finished_run_is_not_run_again(tmp_path):
    trained, facts = train_sft(tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    again, other_facts = train_sft(tmp_path)
    assert other_facts["resumed_at_step"] == facts["steps"]
    assert other_facts["final_loss"] == facts["final_loss"]
    assert (tmp_path / "log.jsonl").read_bytes() == log
    for one, other in zip(trained.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_dropping_checkpoints_leaves_the_log(tmp_path):
    train_sft(tmp_path)
    assert list((tmp_path / "checkpoints").glob("checkpoint-*"))
    training.drop_checkpoints(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert log_of(tmp_path)


def test_training_leaves_no_trace_in_the_model_but_its_weights(tmp_path):
    fresh, (trained, _) = tiny_model(), train_sft(tmp_path, bf16=True)
    assert "forward" not in trained.__dict__
    assert trained.config.use_cache
    trained.load_state_dict(fresh.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(trained(ids).logits, fresh.eval()(ids).logits)


# ---- Losses ----


def test_sft_loss_is_the_mean_over_all_tokens_of_the_step(tmp_path):
    examples = toy_trajectories(8)
    model = tiny_model()
    with torch.no_grad():
        negative = [-_turn_logprobs(model, example).sum() for example in examples]
    by_hand = sum(negative) / sum(example.trained_tokens for example in examples)
    training.run_sft(model, examples, SftConfig(**SFT | {"micro_batch_size": 2}), tmp_path, seed=0)
    assert log_of(tmp_path)[0]["loss"] == pytest.approx(by_hand.item(), rel=1e-5)


def test_preference_log_is_what_the_formulas_give(tmp_path):
    pairs = toy_pairs(8)
    model = tiny_model()
    with torch.no_grad():
        policy = [[_turn_logprobs(model, side) for side in pair] for pair in pairs]
    reference = [[logprobs - 0.25 * number for number, logprobs in enumerate(pair, 1)] for pair in policy]
    weights = [[discount(Discount.DMPO, torch.tensor([side.turns]), 0.7) for side in pair] for pair in pairs]
    results = [
        preference_loss(ours[0][None], ours[1][None], theirs[0][None], theirs[1][None], phi[0], phi[1], 0.1)
        for ours, theirs, phi in zip(policy, reference, weights, strict=True)
    ]
    config = PreferenceConfig(**PREFERENCE | {"micro_batch_size": 2})
    lists = [tuple(side.tolist() for side in pair) for pair in reference]
    training.run_preference(model, pairs, lists, Discount.DMPO, config, tmp_path, seed=0)
    line = log_of(tmp_path)[0]
    mean = lambda values: sum(float(value) for value in values) / len(values)  # noqa: E731
    assert line["loss"] == pytest.approx(mean([result.losses for result in results]), rel=1e-5)
    assert line["margin"] == pytest.approx(mean([result.logits for result in results]), rel=1e-4)
    assert line["accuracy"] == mean([result.logits > 0 for result in results])
    assert line["chosen_reward"] == pytest.approx(mean([result.chosen_rewards for result in results]), rel=1e-4)
    assert line["chosen_logprob"] == pytest.approx(mean([pair[0].sum() for pair in policy]), rel=1e-5)
    assert line["rejected_logprob"] == pytest.approx(mean([pair[1].sum() for pair in policy]), rel=1e-5)
    assert line["kl"] == pytest.approx(math.exp(0.5) - 1 - 0.5, rel=1e-3)
    third = [pair[1][2] for pair in policy if len(pair[1]) > 2]
    assert line["rejected_logprob_by_turn"][2] == pytest.approx(mean(third), rel=1e-5)
    for side, ratio in (("chosen", 0.25), ("rejected", 0.5)):
        by_turn = [value for value in line[f"{side}_logratio_by_turn"] if value is not None]
        assert by_turn == pytest.approx([ratio] * len(by_turn), rel=1e-3)
        assert len(by_turn) == max(pair[side == "rejected"].turns for pair in pairs)


def test_sft_term_smoothing_and_length_normalisation_are_what_the_formulas_give(tmp_path):
    pairs, model = toy_pairs(8), tiny_model()
    with torch.no_grad():
        policy = [[_turn_logprobs(model, side) for side in pair] for pair in pairs]
    reference = [(pair[0] - 0.5, pair[1] + 0.25) for pair in policy]
    terms = {"nll": 0.5, "label_smoothing": 0.2, "beta": 3.0, "micro_batch_size": 2}
    config = PreferenceConfig(**PREFERENCE | terms)
    lists = [tuple(side.tolist() for side in pair) for pair in reference]
    training.run_preference(model, pairs, lists, Discount.TRAJECTORY, config, tmp_path, seed=0, per_token=True)
    losses, nlls = [], []
    for sides, ours in zip(pairs, policy, strict=True):
        tokens = [side.trained_tokens for side in sides]
        margin = 3.0 * (0.5 * len(ours[0]) / tokens[0] + 0.25 * len(ours[1]) / tokens[1])
        nlls.append(-float(ours[0].sum()) / tokens[0])
        losses.append(0.8 * math.log1p(math.exp(-margin)) + 0.2 * math.log1p(math.exp(margin)) + 0.5 * nlls[-1])
    line = log_of(tmp_path)[0]
    assert line["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert line["chosen_nll"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-4)


def _turn_logprobs(model, rendered: Rendered) -> torch.Tensor:
    """[T], without any of the code under test."""
    logprobs = model(torch.tensor([rendered.ids])).logits[0].log_softmax(-1)
    sums = torch.zeros(rendered.turns)
    for position, turn in enumerate(rendered.turn_index):
        if turn >= 0:
            sums[turn] += logprobs[position - 1, rendered.ids[position]]
    return sums


@pytest.mark.parametrize("train", [train_preference, train_qlora])
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 2e-3)])
def test_training_starts_at_the_reference(train, bf16, tolerance, tmp_path):
    train(tmp_path, bf16=bf16, micro_batch_size=4)
    first = log_of(tmp_path)[0]
    assert first["loss"] == pytest.approx(LN2, abs=tolerance)
    assert first["margin"] == pytest.approx(0, abs=tolerance)
    assert first["kl"] == pytest.approx(0, abs=tolerance)


def test_reference_logprobs_come_in_the_order_of_the_pairs():
    pairs, model = toy_pairs(), tiny_model().eval()
    found = training.reference_turn_logprobs(model, pairs, PreferenceConfig(**PREFERENCE))
    with torch.no_grad():
        for pair, logprobs in zip(pairs, found, strict=True):
            for side, side_logprobs in zip(pair, logprobs, strict=True):
                assert side_logprobs == pytest.approx(_turn_logprobs(model, side).tolist(), rel=1e-5)


@pytest.mark.parametrize("method", Discount)
def test_preference_training_learns(method, tmp_path):
    model, pairs = tiny_model(), toy_pairs()
    config = PreferenceConfig(**PREFERENCE | {"epochs": 8})
    reference = training.reference_turn_logprobs(model, pairs, config)
    facts = training.run_preference(model, pairs, reference, method, config, tmp_path, seed=0)
    last = log_of(tmp_path)[-1]
    assert facts["first_loss"] == pytest.approx(LN2, abs=1e-5)
    assert facts["final_loss"] < LN2 - 0.02
    assert last["accuracy"] == 1
    assert last["margin"] > 0
    assert last["kl"] > 0


def test_sft_learns(tmp_path):
    _, facts = train_sft(tmp_path, epochs=8)
    assert facts["final_loss"] < facts["first_loss"] - 0.5


def test_the_discount_reaches_the_loss(tmp_path):
    """With gamma 0 DMPO trains on first turns alone; whatever the later ones hold changes nothing."""
    pairs, config = toy_pairs(8), PreferenceConfig(**PREFERENCE | {"gamma": 0.0, "epochs": 1})
    models = []
    for name, shift in (("as it is", 0.0), ("later turns shifted", -5.0)):
        model = tiny_model()
        reference = [
            tuple([side[0], *(logprob + shift for logprob in side[1:])] for side in pair)
            for pair in training.reference_turn_logprobs(model, pairs, config)
        ]
        training.run_preference(model, pairs, reference, Discount.DMPO, config, tmp_path / name, seed=0)
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


# ---- LoRA ----


def test_lora_trains_the_adapter_alone_and_is_its_own_reference(tmp_path):
    pairs, config = toy_pairs(), PreferenceConfig(**PREFERENCE | {"learning_rate": 1e-2})
    model = add_lora(tiny_model(), ModelConfig(lora_rank=4), seed=0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    reference = training.reference_turn_logprobs(model, pairs, config)
    assert reference == training.reference_turn_logprobs(tiny_model(), pairs, config)
    facts = training.run_preference(model, pairs, reference, Discount.DMPO, config, tmp_path, seed=0)
    assert facts["first_loss"] == pytest.approx(LN2, abs=1e-6)
    assert facts["final_loss"] < LN2
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert training.reference_turn_logprobs(model, pairs, config) == reference
    ids = torch.tensor([pairs[0][0].ids])
    base = tiny_model().eval()
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, base(ids).logits)
        with reference_mode(model):
            assert torch.equal(model(ids).logits, base(ids).logits)


# ---- Refusals ----


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to train on"):
        training.run_sft(tiny_model(), [], SftConfig(**SFT), tmp_path, seed=0)


def test_an_example_without_a_token_of_the_policy_is_refused(tmp_path):
    examples = [*toy_trajectories(2), Rendered(ids=[1, 2, 3], turn_index=[-1, -1, -1])]
    with pytest.raises(ValueError, match=r"Example 2, trajectory: none of its 3 tokens is the policy's"):
        training.run_sft(tiny_model(), examples, SftConfig(**SFT), tmp_path, seed=0)


def test_reference_logprobs_of_other_pairs_are_refused(tmp_path):
    pairs, config = toy_pairs(2), PreferenceConfig(**PREFERENCE)
    reference = [([0.0] * chosen.turns, [0.0] * rejected.turns) for chosen, rejected in pairs]
    with pytest.raises(ValueError, match=r"2 pairs and 1 reference log-probs: run the stage `reference` again"):
        training.run_preference(tiny_model(), pairs, reference[:1], Discount.DMPO, config, tmp_path, seed=0)
    reference[1] = (reference[1][0], [0.0])
    with pytest.raises(ValueError, match=r"Pair 1, rejected: \d turns and 1 reference log-probs"):
        training.run_preference(tiny_model(), pairs, reference, Discount.DMPO, config, tmp_path, seed=0)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    pairs, config = toy_pairs(2), PreferenceConfig(**PREFERENCE)
    reference = [([math.nan] * chosen.turns, [0.0] * rejected.turns) for chosen, rejected in pairs]
    with pytest.raises(RuntimeError, match=r"The loss is nan at step 1: lower learning_rate"):
        training.run_preference(tiny_model(), pairs, reference, Discount.DMPO, config, tmp_path, seed=0)


@pytest.mark.parametrize("sharing", ["FSDP", "DeepSpeed"])
def test_a_base_in_4_bits_is_not_shared_out(sharing, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{sharing.upper()}", "true")
    model = SimpleNamespace(is_loaded_in_4bit=True)
    with pytest.raises(ValueError, match=rf"{sharing} does not share out weights in 4 bits .*launch with .*/ddp\.yaml"):
        training.run_sft(model, toy_trajectories(), SftConfig(**SFT), tmp_path, seed=0)


# ---- What a run leaves behind ----


def test_facts_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, facts = train_preference(tmp_path, epochs=3)
    sides = [side for pair in toy_pairs() for side in pair]
    assert facts["examples"] == 13
    assert facts["steps"] == 6
    assert facts["tokens"] == 3 * sum(len(side.ids) for side in sides)
    assert facts["trained_tokens"] == 3 * sum(side.trained_tokens for side in sides)
    assert facts["tokens_per_second"] > 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/kl", "train/chosen_logprob_by_turn/0"} <= set(events.Tags()["scalars"])
    line = log_of(tmp_path)[-1]
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm"} <= line.keys()
    assert line["epoch"] == 3


# ---- Weights shared out ----


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["fsdp", "deepspeed"])
def test_weights_that_are_shared_out_train_resume_and_are_saved_whole(sharing, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.sharing_worker", sharing, str(tmp_path)],
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | sharing_worker.environment(sharing) | {"OMP_NUM_THREADS": "1"},
    )
    for kind, train in sharing_worker.KINDS.items():
        for name in sharing_worker.RUNS:
            bf16, folder = name == "bf16", tmp_path / kind / name
            alone = tmp_path / "alone" / kind / ("bf16" if bf16 else "float32")
            if not alone.exists():
                model, _ = train(alone, bf16=bf16, save_steps=2)
                save_policy(model, new_policy(SIZES, TEXTS, seed=0)[1], alone / "policy")
            facts = json.loads((folder / "facts.json").read_text())
            assert facts["shared_out"]
            assert facts["gradients_shared_out"]
            assert (facts["processes"], facts["resumed_at_step"]) == (2, 2 if name == "killed" else 0)
            assert (folder / "policy/adapter/adapter_model.safetensors").exists() == (kind == "lora")
            losses, expected_losses = ([line["loss"] for line in log_of(run)] for run in (folder, alone))
            assert losses == pytest.approx(expected_losses, rel=2e-3 if bf16 else 1e-5)
            saved, expected = (AutoModelForCausalLM.from_pretrained(run / "policy") for run in (folder, alone))
            assert type(saved) is LlamaForCausalLM
            # AdamW's first steps go by signs alone: where a gradient is next to 0, its last bits move the weight.
            assert distance(saved, expected) < (0.1 if bf16 else 0.005) * distance(tiny_model(), expected)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_the_shipped_launch_configurations_start_eight_processes(name):
    path = sharing_worker.CONFIGS / f"{name}.yaml"
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "worker.py"])
    )
    chosen = {"ddp": arguments.multi_gpu, "fsdp": arguments.use_fsdp, "deepspeed": arguments.use_deepspeed}
    assert arguments.num_processes == 8
    assert [sharing for sharing, on in chosen.items() if on] == [name]


@pytest.mark.parametrize(
    ("plugin", "complaint"),
    [
        ({"fsdp_version": 1, "cpu_ram_efficient_loading": False}, r"FSDP needs fsdp_version: 2 .*fsdp\.yaml"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, r"cpu_ram_efficient_loading: false .*fsdp\.yaml"),
        ({"zero_stage": 2, "zero3_init_flag": False}, r"DeepSpeed needs zero_stage: 3 .*deepspeed\.yaml"),
        ({"zero_stage": 3, "zero3_init_flag": True}, r"zero3_init_flag: false .*deepspeed\.yaml"),
    ],
)
def test_other_ways_to_share_weights_out_are_refused(plugin, complaint):
    kind = "deepspeed_plugin" if "zero_stage" in plugin else "fsdp_plugin"
    accelerator = SimpleNamespace(state=SimpleNamespace(**{kind: SimpleNamespace(**plugin)}))
    with pytest.raises(ValueError, match=complaint):
        training._share_out_in_float32(accelerator, tiny_model(), bf16=False)
