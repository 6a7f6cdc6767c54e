"""Stage `rollout`: one engine explores, with policy 0, the training tasks that have an expert, and evaluates it."""

from pipeline import jobs, runs
from pipeline.config import Config


def main(config: Config) -> None:
    """Play what the pairs and the table need of the SFT policy."""
    for env in config.env.names:
        for seed in config.seed:
            folder = runs.seed_folder(config, env, seed)
            explore = jobs.Job(
                folder=folder / "rollout",
                env=env,
                seed=seed,
                policy="sft",
                split="train",
                temperature=config.rollout.temperature,
                top_p=config.rollout.top_p,
                samples=config.rollout.samples,
                limit=config.rollout.tasks,
                only=folder / "experts" / jobs.EPISODES,
            )
            evaluation = jobs.evaluation(config, env, seed, "sft")
            jobs.run(config, [explore, *evaluation], folder / "sft", "sft")
