"""Stage `reference`: the log-prob of every turn of every pair under policy 0, once for all methods, betas and gammas.

One line a pair: `id`, and under `chosen` and `rejected` one number a turn, the sum over the turn's tokens. The stage's
key is made of the policy's weights, the pairs and the longest conversation, so stale numbers are never read.
"""

import math
from typing import Annotated

from pydantic import BaseModel, Field

from pipeline import pairs as pairing
from pipeline import runs
from pipeline.config import Config
from pipeline.records import Pair, read_jsonl, write_jsonl

LOGPROBS = "turn_logprobs.jsonl"


class TurnLogprobs(BaseModel):
    """The log-probs of one pair's turns under the reference."""

    id: str
    chosen: Annotated[list[float], Field(min_length=1)]
    """[T_w] natural log-probs, float32."""
    rejected: Annotated[list[float], Field(min_length=1)]


def main(config: Config) -> None:
    """Write the reference log-probs of each environment and seed."""
    for env in config.env.names:
        for seed in config.seed:
            folder = runs.seed_folder(config, env, seed)
            settings = {"max_length": config.model.max_length, "bf16": config.train.bf16}
            inputs = {"sft": folder / "sft", "pairs": folder / "pairs"}
            with runs.stage(folder / "reference", settings=settings, inputs=inputs) as stage:
                if stage.done:
                    continue
                from pipeline import models, training
                from pipeline.examples import pair_examples
                from pipeline.rendering import Renderer

                pairs = read_jsonl(folder / "pairs" / pairing.PAIRS, Pair)
                model, tokenizer = models.load_policy(folder / "sft" / "policy", config.model, seed)
                kept, examples, counts = pair_examples(Renderer(tokenizer), pairs, config.model.max_length)
                logprobs = training.reference_turn_logprobs(model, examples, config.train)
                if runs.is_main_process():
                    lines = [
                        {"id": pair.id, "chosen": chosen, "rejected": rejected}
                        for pair, (chosen, rejected) in zip(kept, logprobs, strict=True)
                    ]
                    write_jsonl(stage.folder / LOGPROBS, lines)
                stage.facts.update(counts | {"pairs": len(kept), "template_hash": Renderer(tokenizer).template_hash})


def read(config: Config, env: str, seed: int, pairs: list[Pair]) -> list[tuple[list[float], list[float]]]:
    """The reference log-probs that go with the pairs that fit.

    Raises:
        ValueError: one is missing, or is no number.
    """
    path = runs.seed_folder(config, env, seed) / "reference" / LOGPROBS
    lines = read_jsonl(path, TurnLogprobs)
    if [line.id for line in lines] != [pair.id for pair in pairs]:
        raise ValueError(f"{path}: not the log-probs of these pairs; delete its folder and run the stage `reference`.")
    for line in lines:
        if not all(map(math.isfinite, line.chosen + line.rejected)):
            raise ValueError(f"{path}: {line.id} has a log-prob that is no number; the SFT policy is broken.")
    return [(line.chosen, line.rejected) for line in lines]
