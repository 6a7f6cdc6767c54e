"""The script that `torchrun` starts twice, on CPUs, with FSDP or DeepSpeed on: trains, dies, goes on, saves."""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

from pipeline import logprobs, training
from pipeline.config import ModelConfig
from pipeline.models import add_lora, new_policy, save_policy
from tests.training_worker import SIZES, TEXTS, prefer, tiny_model, train_preference, train_sft

CONFIGS = Path(__file__).parent.parent / "pipeline" / "accelerate"


def environment(sharing: str) -> dict[str, str]:
    """What `accelerate launch` sets for a shipped configuration."""
    arguments, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{sharing}.yaml"), "worker.py"])
    )
    if sharing == "deepspeed":
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        found = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        found = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def take_cpus_for_accelerators() -> None:
    """For FSDP, which accelerate has on accelerators alone."""
    plain = PartialState.__init__

    def changed(self, *arguments, **more):
        plain(self, *arguments, **more)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = changed


def share_out_small_weights_over_gloo() -> None:
    """For DeepSpeed, which would leave weights of this size whole, and compile what stands in for gloo on one CPU."""
    import deepspeed

    plain = DeepSpeedPlugin.__post_init__

    def changed(self):
        plain(self)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = changed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


PREPARE = {"fsdp": take_cpus_for_accelerators, "deepspeed": share_out_small_weights_over_gloo}


def train_lora(folder: Path, **changes):
    """Preference training of an adapter."""
    return prefer(add_lora(tiny_model(), ModelConfig(lora_rank=4), seed=0), folder, **changes)


KINDS = {"sft": train_sft, "preference": train_preference, "lora": train_lora}


def recomputed(train: Callable[..., Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """Training that keeps nothing that it can compute again: neither layers' activations nor logits."""
    with mock.patch.object(logprobs, "KEPT", 0):
        return train(folder, micro_batch_size=2, save_steps=2, gradient_checkpointing=True)


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
    "plain": lambda train, folder: train(folder, micro_batch_size=2, save_steps=2),
    "checkpointing": recomputed,
    "bf16": lambda train, folder: train(folder, micro_batch_size=2, save_steps=2, bf16=True),
    "killed": killed,
}


def is_shared_out(weight: torch.Tensor | None) -> bool:
    """Whether a process has no more than its part of a weight or gradient: none at all where DeepSpeed holds parts.

    What DeepSpeed holds of gradients stands in buffers of its own, so of them this says only that no whole one is left.
    """
    return weight is None or isinstance(weight, DTensor) or (hasattr(weight, "ds_id") and not weight.numel())


def look_at_gradients() -> list[bool]:
    """Whether each process had no more than its part of every gradient, after each micro-batch from now on."""
    step, found = training._TurnTrainer.training_step, []

    def look(self, *arguments, **more):
        loss = step(self, *arguments, **more)
        found.append(all(is_shared_out(one.grad) for one in self.model.parameters() if one.requires_grad))
        return loss

    training._TurnTrainer.training_step = look
    return found


def main(sharing: str, folder: Path) -> None:
    torch.set_num_threads(1)
    PREPARE[sharing]()
    gradients = look_at_gradients()
    tokenizer = new_policy(SIZES, TEXTS, seed=0)[1]
    for kind, train in KINDS.items():
        for name, run in RUNS.items():
            place = folder / kind / name
            model, facts = run(train, place)
            facts["shared_out"] = all(map(is_shared_out, model.parameters()))
            facts["gradients_shared_out"] = all(gradients) and len(gradients) > facts["steps"]
            gradients.clear()
            save_policy(model, tokenizer, place / "policy")
            if torch.distributed.get_rank() == 0:
                (place / "facts.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
