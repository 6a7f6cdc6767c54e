"""Stage `sft`: supervised fine-tuning on the experts' turns; makes policy 0.

Without `model.path` the policy is new: its tokenizer is trained on the experts' text, its weights drawn by the seed.
"""

from pathlib import Path
from typing import Any

from pipeline import arms, jobs, runs
from pipeline.arms import Arm
from pipeline.config import Config
from pipeline.records import Trajectory, read_jsonl


def main(config: Config) -> None:
    """Train and save policy 0 of each environment and seed; several where arms differ in what it is made of."""
    for env in config.env.names:
        for seed in config.seed:
            for arm in arms.sharing(config, env, seed, "sft"):
                _stage(arm, env, seed)


def _stage(arm: Arm, env: str, seed: int) -> None:
    config = arm.config
    base = Path(config.model.path) if config.model.path else None
    weights = runs.folder_digest(base) if base and base.is_dir() else None
    settings = runs.settings_of(config.model, config.sft, seed=seed, weights=weights)
    inputs = {"experts": arm.folder(env, seed, "experts")}
    folder = arm.folder(env, seed, "sft")
    with runs.stage(folder, settings=settings, inputs=inputs, keep=runs.TRAINING_LOGS) as stage:
        if not stage.done:
            experts = read_jsonl(inputs["experts"] / jobs.EPISODES, Trajectory)
            stage.facts.update(_train(config, experts, stage, seed))


def _train(config: Config, experts: list[Trajectory], stage: runs.Stage, seed: int) -> dict[str, Any]:
    from pipeline import models, precision, training
    from pipeline.examples import sft_examples
    from pipeline.rendering import Renderer

    runs.compute_in(stage.folder, precision.of_training(config.sft))
    if config.model.path is None:
        texts = [message["content"] for expert in experts for message in expert.messages]
        model, tokenizer = models.new_policy(config.model, texts, seed)
    else:
        model, tokenizer = models.load_policy(config.model.path, config.model, seed, config.model.revision)
    renderer = Renderer(tokenizer)
    examples, counts = sft_examples(renderer, experts, config.model.max_length)
    parameters = model.num_parameters()  # which knows that 4-bit weights lie two in a byte, not of DeepSpeed's parts
    facts = training.run_sft(model, examples, config.sft, stage.folder, seed)
    models.save_policy(model, tokenizer, stage.folder / "policy")
    training.drop_checkpoints(stage.folder)
    commit = getattr(model.config, "_commit_hash", None)  # of a Hub model
    return counts | facts | {"template_hash": renderer.template_hash, "parameters": parameters, "hub_commit": commit}
