"""Stage `evaluate`: every trained policy, the experts and chance play the seen and unseen tasks, greedily.

The SFT policy was played by the engine process that explored with it (stage `rollout`); it is looked at here all the
same, so that this stage alone is enough after a change of `evaluate` keys.
"""

from pipeline import jobs, runs
from pipeline.config import Config
from pipeline.records import Trajectory, read_jsonl


def main(config: Config) -> None:
    """Play what is missing for the reward table, and write the table."""
    wanted: list[jobs.Job] = []
    for env in config.env.names:
        for seed in config.seed:
            folder = runs.seed_folder(config, env, seed)
            baselines = [job for name in jobs.BASELINES for job in jobs.evaluation(config, env, seed, name)]
            jobs.run(config, baselines)
            sft = jobs.evaluation(config, env, seed, "sft")
            jobs.run(config, sft, folder / "sft", "sft")
            wanted += baselines + sft
            for method in config.method:
                trained = jobs.evaluation(config, env, seed, method)
                jobs.run(config, trained, folder / "train" / method, "train")
                wanted += trained
    inputs = {"/".join(job.folder.parts[-5:]): job.folder for job in wanted}
    with runs.stage(config.folder / "evaluate", settings={}, inputs=inputs) as stage:
        if not stage.done or not (config.folder / "rewards.csv").is_file():
            from pipeline.report import write_rewards

            write_rewards(config, [one for job in wanted for one in read_jsonl(job.folder / jobs.EPISODES, Trajectory)])
