"""Stage `evaluate`: every trained policy, the experts and chance play the seen and unseen tasks, greedily.

The SFT policy was played by the engine process that explored with it (stage `rollout`); it is looked at here all the
same, so that this stage alone is enough after a change of `evaluate` keys.
"""

from pipeline import card, jobs, runs
from pipeline.config import Config


def main(config: Config) -> None:
    """Play what is missing for the reward table; write the table, and the card of what it was measured under."""
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
        if not stage.done or not all((config.folder / name).is_file() for name in ("rewards.csv", card.CARD)):
            from pipeline.report import write_rewards

            evaluations = [card.read(job.folder) for job in wanted]
            write_rewards(config, [episode for one in evaluations for episode in one.episodes])
            runs.write_json(config.folder / card.CARD, card.card(evaluations))
