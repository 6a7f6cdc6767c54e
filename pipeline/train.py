"""Stage `train`: preference fine-tuning of policy 0, one policy a method, all from the same pairs and reference.

Deviations from the paper's official code, all stated:

- A trajectory that is too long loses whole turns from its end, and the others keep the weights that they have in the
  whole trajectory; the official code cuts tokens within a turn.
- Log-probs of the reference are computed once, before training, in the precision that training computes in.
- Every stage has a seed, and the order of the pairs is a function of it.
"""

from typing import Any

from pipeline import pairs as pairing
from pipeline import reference, runs
from pipeline.config import Config
from pipeline.methods import Discount
from pipeline.records import Pair, read_jsonl


def main(config: Config) -> None:
    """Train and save one policy for each environment, seed and method."""
    for env in config.env.names:
        for seed in config.seed:
            folder = runs.seed_folder(config, env, seed)
            inputs = {name: folder / name for name in ("sft", "pairs", "reference")}
            for method in config.method:
                settings = runs.settings_of(config.model, config.train, method=method, seed=seed)
                if not method.uses_gamma:
                    del settings["PreferenceConfig"]["gamma"]
                work = runs.stage(folder / "train" / method, settings=settings, inputs=inputs, keep=runs.TRAINING_LOGS)
                with work as stage:
                    if not stage.done:
                        stage.facts.update(_train(config, env, seed, method, stage))


def _train(config: Config, env: str, seed: int, method: Discount, stage: runs.Stage) -> dict[str, Any]:
    from pipeline import models, training
    from pipeline.examples import pair_examples
    from pipeline.rendering import Renderer

    folder = runs.seed_folder(config, env, seed)
    model, tokenizer = models.load_policy(folder / "sft" / "policy", config.model, seed)
    pairs = read_jsonl(folder / "pairs" / pairing.PAIRS, Pair)
    kept, examples, counts = pair_examples(Renderer(tokenizer), pairs, config.model.max_length)
    logprobs = reference.read(config, env, seed, kept)
    facts = training.run_preference(model, examples, logprobs, method, config.train, stage.folder, seed)
    models.save_policy(model, tokenizer, stage.folder / "policy")
    training.drop_checkpoints(stage.folder)
    return counts | facts
