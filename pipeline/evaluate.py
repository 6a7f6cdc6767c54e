"""Stage `evaluate`: every policy, the experts and chance play the seen and unseen tasks, greedily; `bon` samples.

The SFT policy was played by the engine process that explored with it (stage `rollout`); it is looked at here all the
same, so that this stage alone is enough after a change of `evaluate` keys.
"""

from pipeline import arms, choose, jobs, runs
from pipeline.config import Config
from pipeline.records import Trajectory, read_jsonl


def main(config: Config) -> None:
    """Play what is missing for the reward table, and write the table."""
    wanted: list[jobs.Job] = []
    for env in config.env.names:
        for seed in config.seed:
            baselines = [job for name in jobs.BASELINES for job in jobs.baseline(config, env, seed, name)]
            jobs.run(config, baselines)
            wanted += baselines
            for arm in arms.of(config):
                own = jobs.evaluation(arm, env, seed)
                player = choose.best(arm, env, seed) if arm.candidates else arm
                jobs.run(arm.config.when_evaluated, own, player.policy(env, seed), player.made_by())
                wanted += own
    inputs = {"/".join(job.folder.parts[-5:]): job.folder for job in wanted}
    with runs.stage(config.folder / "evaluate", settings={}, inputs=inputs) as stage:
        if not stage.done or not (config.folder / "rewards.csv").is_file():
            from pipeline.report import write_rewards
            from pipeline.statistics import best_of

            played = [(job, read_jsonl(job.folder / jobs.EPISODES, Trajectory)) for job in wanted]
            counted = [best_of(episodes) if job.samples > 1 else episodes for job, episodes in played]
            write_rewards(config, [one for episodes in counted for one in episodes])
