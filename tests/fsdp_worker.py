"""The script that `torchrun` starts twice, on CPUs, with accelerate's FSDP on: trains, goes on from a checkpoint, saves.

accelerate shares weights out on accelerators alone; here it is told that the processes' CPUs are such.
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from pipeline import training
from pipeline.config import ModelConfig, PreferenceConfig
from pipeline.methods import Discount
from pipeline.models import add_lora, new_policy, save_policy
from tests.training_worker import KINDS, PREFERENCE, SIZES, TEXTS, tiny_model, toy_pairs

CONFIG = Path(__file__).parent.parent / "pipeline" / "accelerate" / "fsdp.yaml"


def environment() -> dict[str, str]:
    """What `accelerate launch` sets for the shipped configuration."""
    settings = yaml.safe_load(CONFIG.read_text("utf-8"))["fsdp_config"]
    return {"ACCELERATE_USE_FSDP": "true"} | {
        name.upper(): str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()
    }


def take_cpus_for_accelerators() -> None:
    plain = PartialState.__init__

    def changed(self, *arguments, **more):
        plain(self, *arguments, **more)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = changed


def train_lora(folder: Path, **changes):
    """Preference training of an adapter."""
    model = add_lora(tiny_model(), ModelConfig(lora_rank=4), seed=0)
    pairs, config = toy_pairs(), PreferenceConfig(**PREFERENCE | changes)
    reference = training.reference_turn_logprobs(model, pairs, config)
    return model, training.run_preference(model, pairs, reference, Discount.DMPO, config, folder, seed=0)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    take_cpus_for_accelerators()
    tokenizer = new_policy(SIZES, TEXTS, seed=0)[1]
    for kind, train in (KINDS | {"lora": train_lora}).items():
        for name, changes in (("plain", {}), ("checkpointing", {"gradient_checkpointing": True})):
            model, facts = train(folder / kind / name, micro_batch_size=2, **changes)
            facts["shared_out"] = all(isinstance(weight, DTensor) for weight in model.parameters())
            save_policy(model, tokenizer, folder / kind / name / "policy")
            again, more = train(folder / kind / name, micro_batch_size=2, **changes)
            save_policy(again, tokenizer, folder / kind / name / "resumed")
            if torch.distributed.get_rank() == 0:
                facts["resumed_at_step"] = more["resumed_at_step"]
                (folder / kind / name / "facts.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
