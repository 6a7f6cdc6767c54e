"""The script that `torchrun` starts twice, on CPUs, with accelerate's FSDP on: trains, dies, goes on, saves.

accelerate shares weights out on accelerators alone; here it is told that the processes' CPUs are such.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import GradientState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

from pipeline import training
from pipeline.config import ModelConfig
from pipeline.models import add_lora, new_policy, save_policy
from tests.training_worker import SIZES, TEXTS, prefer, tiny_model, train_preference, train_sft

CONFIG = Path(__file__).parent.parent / "pipeline" / "accelerate" / "fsdp.yaml"


def environment() -> dict[str, str]:
    """What `accelerate launch` sets for the shipped configuration."""
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(CONFIG), "worker.py"])
    )
    found = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def take_cpus_for_accelerators() -> None:
    plain = PartialState.__init__

    def changed(self, *arguments, **more):
        plain(self, *arguments, **more)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = changed


def train_lora(folder: Path, **changes):
    """Preference training of an adapter."""
    return prefer(add_lora(tiny_model(), ModelConfig(lora_rank=4), seed=0), folder, **changes)


KINDS = {"sft": train_sft, "preference": train_preference, "lora": train_lora}


class KilledError(Exception):
    """Stands for a kill -9."""


def killed(train: Callable[..., Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """Training that dies in its third step of four and goes on from the checkpoint after the second."""
    step = training._TurnTrainer.training_step

    def die(self, *arguments, **more):
        if self.state.global_step == 2:
            raise KilledError
        return step(self, *arguments, **more)

    training._TurnTrainer.training_step = die
    with contextlib.suppress(KilledError):
        train(folder, micro_batch_size=2, save_steps=2)
    training._TurnTrainer.training_step = step
    GradientState._reset_state()  # a new process does not know that the old one died between two micro-batches
    return train(folder, micro_batch_size=2, save_steps=2)


RUNS = {
    "plain": lambda train, folder: train(folder, micro_batch_size=2),
    "checkpointing": lambda train, folder: train(folder, micro_batch_size=2, gradient_checkpointing=True),
    "bf16": lambda train, folder: train(folder, micro_batch_size=2, bf16=True),
    "killed": killed,
}


def look_at_gradients() -> list[bool]:
    """Whether each process had no more than its part of every gradient, after each micro-batch from now on."""
    step, found = training._TurnTrainer.training_step, []

    def look(self, *arguments, **more):
        loss = step(self, *arguments, **more)
        found.append(all(isinstance(one.grad, DTensor) for one in self.model.parameters() if one.requires_grad))
        return loss

    training._TurnTrainer.training_step = look
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    take_cpus_for_accelerators()
    gradients = look_at_gradients()
    tokenizer = new_policy(SIZES, TEXTS, seed=0)[1]
    for kind, train in KINDS.items():
        for name, run in RUNS.items():
            place = folder / kind / name
            model, facts = run(train, place)
            facts["shared_out"] = all(isinstance(weight, DTensor) for weight in model.parameters())
            facts["gradients_shared_out"] = all(gradients) and len(gradients) > facts["steps"]
            gradients.clear()
            save_policy(model, tokenizer, place / "policy")
            if torch.distributed.get_rank() == 0:
                (place / "facts.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
