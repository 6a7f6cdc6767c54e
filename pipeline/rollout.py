"""Stage `rollout`: policy 0 explores training tasks, and is evaluated by the same engine.

Arms of several rounds explore once more with the policy of each round, as soon as that is trained: run the stages
`rollout`, `pairs`, `reference` and `train` once a round, as run_all.sh does.
"""

from collections.abc import Iterator

from pipeline import arms, jobs
from pipeline.arms import Arm
from pipeline.config import Config
from pipeline.methods import Method


def main(config: Config) -> None:
    """Play what the pairs and the table need of the SFT policies, and of the policies between two rounds."""
    wanted = {job.folder: job for env in config.env.names for seed in config.seed for job in _wanted(config, env, seed)}
    jobs.run(list(wanted.values()))


def _wanted(config: Config, env: str, seed: int) -> Iterator[jobs.Job]:
    """The jobs of an environment and seed; arms that share a folder each name its job."""
    every = arms.of(config)
    for arm in arms.trained(config):
        yield from _explorations(arm, env, seed, 1)
        for one in every:
            if one.is_explorer_of(arm.folder(env, seed, "rollout"), env, seed):
                yield from jobs.evaluation(one, env, seed)
        for number in range(2, arm.rounds + 1):
            if arm.is_trained(env, seed, number - 1):
                yield from _explorations(arm, env, seed, number)


def _explorations(arm: Arm, env: str, seed: int, number: int) -> Iterator[jobs.Job]:
    """What the policy that a round begins with plays of the training tasks; for `step` from every step of an expert."""
    rollout, step = arm.config.rollout, arm.config.step
    by_step = arm.method == Method.STEP
    for source, folder in zip(arm.sources(env), arm.explored(env, seed, number).values(), strict=True):
        yield jobs.Job(
            config=arm.config,
            folder=folder,
            env=source,
            seed=seed,
            policy="sft" if number == 1 else arm.name,
            checkpoint=arm.policy(env, seed, number - 1),
            made_by=arm.made_by(number - 1),
            split="train",
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            samples=step.samples if by_step else rollout.samples,
            limit=step.tasks if by_step else rollout.tasks,
            explores=True,
            only=None if rollout.undemonstrated and not by_step else arm.folder(env, seed, "experts") / jobs.EPISODES,
            from_steps=by_step,
        )
