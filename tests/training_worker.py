"""Toy data and models for the tests of training, and the script that `torchrun` starts twice."""

import random
import sys
from pathlib import Path

import torch

from pipeline import training
from pipeline.config import ModelConfig, PreferenceConfig, SftConfig
from pipeline.methods import Discount
from pipeline.models import load_policy, new_policy, save_policy
from pipeline.rendering import Rendered

TEXTS = ["open the door to the kitchen", "pour water into the metal pot", "focus on the thermometer", "look around"]
SIZES = ModelConfig(hidden=32, layers=2, heads=2, vocabulary=300, max_length=128)
QLORA = ModelConfig(lora_rank=4, load_in_4bit=True, max_length=128)
SFT = {"batch_size": 8, "micro_batch_size": 8, "epochs": 2, "learning_rate": 3e-3, "bf16": False}
PREFERENCE = SFT | {"learning_rate": 1e-3, "gamma": 0.7, "beta": 0.1}


def tiny_model():
    """A model of 30,000 weights, always the same."""
    return new_policy(SIZES, TEXTS, seed=0)[0]


def tiny_qlora_model(folder: Path):
    """The same with an adapter on it and its own weights in 4 bits; it takes the way over a checkpoint in `folder`."""
    save_policy(*new_policy(SIZES, TEXTS, seed=0), folder)
    return load_policy(folder, QLORA)[0]


def toy_trajectory(turns: int, generator: random.Random, pool: range = range(10, 290)) -> Rendered:
    """A prompt, then turns of 2 to 4 tokens of `pool` with observations of 1 to 5 tokens between them."""
    ids, turn_index = [1, 2, 3], [-1, -1, -1]
    for turn in range(turns):
        action, observation = generator.randint(2, 4), generator.randint(1, 5)
        ids += generator.choices(pool, k=action) + generator.choices(range(10, 290), k=observation)
        turn_index += [turn] * action + [-1] * observation
    return Rendered(ids=ids, turn_index=turn_index)


def toy_trajectories(count: int = 13) -> list[Rendered]:
    generator = random.Random(0)
    return [toy_trajectory(generator.randint(1, 5), generator, range(10, 40)) for _ in range(count)]


def toy_pairs(count: int = 13) -> list[tuple[Rendered, Rendered]]:
    """Winners act in tokens below 40, losers in those above 260."""
    generator = random.Random(1)
    return [
        (
            toy_trajectory(generator.randint(1, 4), generator, range(10, 40)),
            toy_trajectory(generator.randint(2, 6), generator, range(260, 290)),
        )
        for _ in range(count)
    ]


def train_sft(folder: Path, **changes):
    """Train a tiny model; returns it and the facts."""
    model = tiny_model()
    return model, training.run_sft(model, toy_trajectories(), SftConfig(**SFT | changes), folder, seed=0)


def train_preference(folder: Path, **changes):
    """Train a tiny model; returns it and the facts."""
    return prefer(tiny_model(), folder, **changes)


def train_qlora(folder: Path, **changes):
    """Train an adapter on a tiny model in 4 bits; returns it and the facts."""
    return prefer(tiny_qlora_model(folder / "base"), folder, **changes)


def prefer(model, folder: Path, **changes):
    """Train a model on the toy pairs; returns it and the facts."""
    pairs, config = toy_pairs(), PreferenceConfig(**PREFERENCE | changes)
    reference = training.reference_turn_logprobs(model, pairs, config)
    return model, training.run_preference(model, pairs, reference, Discount.DMPO, config, folder, seed=0)


KINDS = {"sft": train_sft, "preference": train_preference, "qlora": train_qlora}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for kind, train in KINDS.items():
        model, facts = train(folder / kind, micro_batch_size=2)
        if torch.distributed.get_rank() == 0:
            torch.save({"weights": model.state_dict(), "facts": facts}, folder / f"{kind}.pt")
    try:
        train_sft(folder / "uneven", batch_size=9, micro_batch_size=3)
    except ValueError as error:
        (folder / f"refused{torch.distributed.get_rank()}").write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
