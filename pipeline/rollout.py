"""Stage `rollout`: one engine explores, with policy 0, the training tasks that have an expert, and evaluates it.

Arms of several rounds explore once more with the policy of each round, as soon as that is trained: run the stages
`rollout`, `pairs`, `reference` and `train` once a round, as run_all.sh does.
"""

from pathlib import Path

from pipeline import arms, jobs
from pipeline.arms import Arm
from pipeline.config import Config
from pipeline.methods import Method


def main(config: Config) -> None:
    """Play what the pairs and the table need of the SFT policy, and of the policies between two rounds."""
    for env in config.env.names:
        for seed in config.seed:
            every = arms.of(config)
            played: set[Path] = set()
            for arm in (arm for arm in every if arm.method.is_trained):
                folder = arm.folder(env, seed, "rollout")
                if folder not in played:
                    played.add(folder)
                    policy = arm.policy(env, seed, 0)
                    evaluated = [one for one in every if one.is_explorer_of(folder, env, seed)]
                    evaluation = [job for one in evaluated for job in jobs.evaluation(one, env, seed)]
                    jobs.run(arm.config, [*explorations(arm, env, seed, 1), *evaluation], policy, "sft")
                for number in range(2, arm.rounds + 1):
                    if arm.is_done(env, seed, "train", number - 1):
                        again = explorations(arm, env, seed, number)
                        jobs.run(arm.config, again, arm.policy(env, seed, number - 1), "train")


def explorations(arm: Arm, env: str, seed: int, number: int) -> list[jobs.Job]:
    """What the policy that a round begins with plays of the training tasks; for `step` from every step of an expert."""
    rollout, step = arm.config.rollout, arm.config.step
    by_step = arm.method == Method.STEP
    return [
        jobs.Job(
            folder=arm.folder(env, seed, "rollout", number),
            env=env,
            seed=seed,
            policy="sft" if number == 1 else arm.name,
            split="train",
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            samples=step.samples if by_step else rollout.samples,
            limit=step.tasks if by_step else rollout.tasks,
            only=arm.folder(env, seed, "experts") / jobs.EPISODES,
            from_steps=by_step,
        )
    ]
