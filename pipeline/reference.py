"""Stage `reference`: the log-prob of every turn of every pair under policy 0, once for all methods, betas and gammas.

In later rounds the reference is the policy that the round begins with, or policy 0 still (`train.reference`).

One line a pair: `id`, and under `chosen` and `rejected` one number a turn, the sum over the turn's tokens. The stage's
key is made of the policy's weights, the pairs and the longest conversation, so stale numbers are never read; nor are
those of another precision than the training's (`check_precision`).
"""

import math
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from pipeline import arms, runs
from pipeline.arms import Arm
from pipeline.config import Config
from pipeline.pairs import PAIRS
from pipeline.records import Pair, read_jsonl, write_jsonl

LOGPROBS = "turn_logprobs.jsonl"


class TurnLogprobs(BaseModel):
    """The log-probs of one pair's turns under the reference."""

    id: str
    chosen: Annotated[list[float], Field(min_length=1)]
    """[T_w] natural log-probs, float32."""
    rejected: Annotated[list[float], Field(min_length=1)]


def main(config: Config) -> None:
    """Write the reference log-probs of each environment and seed, for every set of pairs."""
    for env in config.env.names:
        for seed in config.seed:
            for arm, number in arms.pairings(config, env, seed, "reference"):
                _stage(arm, env, seed, number)


def _stage(arm: Arm, env: str, seed: int, number: int) -> None:
    config = arm.config
    before = number - 1 if config.train.reference == "renewed" else 0
    settings = {name: getattr(config.model, name) for name in ("max_length", "load_in_4bit")}
    settings["bf16"] = config.train.bf16
    inputs = {arm.made_by(before): arm.policy(env, seed, before), "pairs": arm.folder(env, seed, "pairs", number)}
    with runs.stage(arm.folder(env, seed, "reference", number), settings=settings, inputs=inputs) as stage:
        if stage.done:
            return
        from pipeline import models, precision, training
        from pipeline.examples import pair_examples
        from pipeline.rendering import Renderer

        pairs = read_jsonl(inputs["pairs"] / PAIRS, Pair)
        model, tokenizer = models.load_policy(arm.policy(env, seed, before) / "policy", config.model, seed)
        kept, examples, counts = pair_examples(Renderer(tokenizer), pairs, config.model.max_length)
        logprobs = training.reference_turn_logprobs(model, examples, config.train)
        if runs.is_main_process():
            lines = [
                {"id": pair.id, "chosen": chosen, "rejected": rejected}
                for pair, (chosen, rejected) in zip(kept, logprobs, strict=True)
            ]
            write_jsonl(stage.folder / LOGPROBS, lines)
        stage.facts.update(counts | {"pairs": len(kept), "template_hash": Renderer(tokenizer).template_hash})
        stage.facts["precision"] = precision.of_training(config.train)


def check_precision(folder: Path, precision: str) -> None:
    """Refuse to train in another precision than that of the reference: their ratio would not begin at one.

    Args:
        folder: of the stage.
        precision: of the training.

    Raises:
        ValueError: they differ, for the stage ran on another machine.
    """
    computed = runs.read_manifest(folder, "reference")["facts"].get("precision", precision)
    if computed != precision:
        raise ValueError(
            f"The log-probs in {folder} were computed in {computed}, and this machine trains in {precision}: set "
            "train.bf16=true or train.bf16=false to have both alike, or delete the folder and run the stage "
            "`reference` here."
        )


def read(path: Path, pairs: list[Pair]) -> list[tuple[list[float], list[float]]]:
    """The reference log-probs that go with the pairs that fit.

    Raises:
        ValueError: one is missing, or is no number.
    """
    lines = read_jsonl(path, TurnLogprobs)
    if [line.id for line in lines] != [pair.id for pair in pairs]:
        raise ValueError(f"{path}: not the log-probs of these pairs; delete its folder and run the stage `reference`.")
    for line in lines:
        if not all(map(math.isfinite, line.chosen + line.rejected)):
            raise ValueError(f"{path}: {line.id} has a log-prob that is no number; the SFT policy is broken.")
    return [(line.chosen, line.rejected) for line in lines]
