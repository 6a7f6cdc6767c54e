"""Stage `train`: fine-tuning from policy 0, one policy an arm: on pairs, or (`rft`) on experts and its own successes.

Deviations from the paper's official code, all stated:

- A trajectory that is too long loses whole turns from its end, and the others keep the weights that they have in the
  whole trajectory; the official code cuts tokens within a turn.
- Log-probs of the reference are computed once, before training, in the precision that training computes in.
- Every stage has a seed, and the order of the pairs is a function of it.
- `rft` goes on from policy 0; ETO's trains the base model anew on the enlarged data.
"""

from typing import Any

from pipeline import arms, jobs, reference, runs
from pipeline.arms import Arm
from pipeline.config import Config
from pipeline.methods import Method
from pipeline.pairs import PAIRS
from pipeline.records import Pair, Trajectory, read_jsonl


def main(config: Config) -> None:
    """Train and save the policy of each environment, seed and arm, in the rounds for which there are pairs."""
    for env in config.env.names:
        for seed in config.seed:
            for arm in arms.trained(config):
                for number in arm.open_rounds(env, seed):
                    _stage(arm, env, seed, number)


def _stage(arm: Arm, env: str, seed: int, number: int) -> None:
    if arm.method.discount is None:
        inputs = {"experts": arm.folder(env, seed, "experts")} | arm.explored(env, seed, number)
    else:
        inputs = {name: arm.folder(env, seed, name, number) for name in ("pairs", "reference")}
    inputs[arm.made_by(number - 1)] = arm.policy(env, seed, number - 1)
    work = runs.stage(
        arm.folder(env, seed, "train", number), settings=_settings(arm, seed), inputs=inputs, keep=runs.TRAINING_LOGS
    )
    with work as stage:
        if not stage.done:
            train = _reject_and_tune if arm.method.discount is None else _prefer
            stage.facts.update(train(arm, env, seed, number, stage))


def _settings(arm: Arm, seed: int) -> dict[str, Any]:
    """What a policy depends on besides its inputs."""
    weighting, config = arm.method.discount, arm.config
    if weighting is None:
        return runs.settings_of(config.model, config.rft, method=arm.method, seed=seed)
    settings = runs.settings_of(config.model, config.train, method=arm.method, seed=seed)
    ignored = ["rounds", "reference"] if arm.rounds == 1 else ["rounds"]
    for key in ignored if weighting.uses_gamma else [*ignored, "gamma"]:
        del settings["PreferenceConfig"][key]
    return settings


def _prefer(arm: Arm, env: str, seed: int, number: int, stage: runs.Stage) -> dict[str, Any]:
    """Preference training on the pairs of a round."""
    from pipeline import models, precision, training
    from pipeline.examples import pair_examples
    from pipeline.rendering import Renderer

    assert arm.method.discount is not None
    config, computed_in = arm.config, precision.of_training(arm.config.train)
    reference.check_precision(arm.folder(env, seed, "reference", number), computed_in)
    runs.compute_in(stage.folder, computed_in)
    model, tokenizer = models.load_policy(arm.policy(env, seed, number - 1) / "policy", config.model, seed)
    pairs = read_jsonl(arm.folder(env, seed, "pairs", number) / PAIRS, Pair)
    kept, examples, counts = pair_examples(Renderer(tokenizer), pairs, config.model.max_length)
    logprobs = reference.read(arm.folder(env, seed, "reference", number) / reference.LOGPROBS, kept)
    facts = training.run_preference(
        model,
        examples,
        logprobs,
        arm.method.discount,
        config.train,
        stage.folder,
        seed,
        per_token=arm.method == Method.DPO_NORM,
    )
    models.save_policy(model, tokenizer, stage.folder / "policy")
    training.drop_checkpoints(stage.folder)
    return counts | facts


def _reject_and_tune(arm: Arm, env: str, seed: int, number: int, stage: runs.Stage) -> dict[str, Any]:
    """SFT on the experts and on what policy 0 played well itself."""
    from pipeline import models, precision, training
    from pipeline.examples import sft_examples
    from pipeline.rendering import Renderer

    config = arm.config
    runs.compute_in(stage.folder, precision.of_training(config.rft))
    experts = read_jsonl(arm.folder(env, seed, "experts") / jobs.EPISODES, Trajectory)
    explored = jobs.trajectories(arm.explored(env, seed, number).values())
    good, counts = successes(explored, config.rft.min_reward)
    model, tokenizer = models.load_policy(arm.policy(env, seed, number - 1) / "policy", config.model, seed)
    examples, rendered = sft_examples(Renderer(tokenizer), [*experts, *good], config.model.max_length)
    facts = training.run_sft(model, examples, config.rft, stage.folder, seed)
    models.save_policy(model, tokenizer, stage.folder / "policy")
    training.drop_checkpoints(stage.folder)
    return counts | rendered | facts


def successes(explored: list[Trajectory], min_reward: float | None) -> tuple[list[Trajectory], dict[str, Any]]:
    """Explored trajectories with at least this reward, equal ones of a task once, and how many were left and why.

    Two are equal if their replies are. Without a reward there are none.
    """
    if min_reward is None:
        return [], {"own_trajectories": 0}
    found: dict[tuple[str, ...], Trajectory] = {}
    low = 0
    for one in explored:
        if one.reward < min_reward or not one.turns:
            low += 1
        else:
            found.setdefault((one.id, *(turn.text for turn in one.turns)), one)
    repeated = len(explored) - low - len(found)
    return list(found.values()), {
        "own_trajectories": len(found),
        "dropped": {"reward below rft.min_reward": low, "the same as another of the task": repeated},
    }
