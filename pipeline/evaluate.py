"""Stage `evaluate`: every trained policy, the experts and chance play the seen and unseen tasks, greedily.

The SFT policy was played by the engine process that explored with it (stage `rollout`); it is looked at here all the
same, so that this stage alone is enough after a change of `evaluate` keys.
"""

from pipeline import jobs, runs
from pipeline.config import Config


def main(config: Config) -> None:
    """Play what is missing for the reward table."""
    for env in config.env.names:
        for seed in config.seed:
            folder = runs.seed_folder(config, env, seed)
            jobs.run(config, [job for name in jobs.BASELINES for job in jobs.evaluation(config, env, seed, name)])
            jobs.run(config, jobs.evaluation(config, env, seed, "sft"), folder / "sft", "sft")
            for method in config.method:
                checkpoint = folder / "train" / method
                jobs.run(config, jobs.evaluation(config, env, seed, method), checkpoint, "train")
