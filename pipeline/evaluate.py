"""Stage `evaluate`: every policy, the experts and chance play the seen and unseen tasks, greedily; `bon` samples.

The SFT policy was played by the engine process that explored with it (stage `rollout`); it is looked at here all the
same, so that this stage alone is enough after a change of `evaluate` keys.
"""

from pipeline import arms, card, choose, jobs, runs
from pipeline.config import Config


def main(config: Config) -> None:
    """Play what is missing for the reward table; write the table, and the card of what it was measured under."""
    every = [(arm, env, seed) for env in config.env.names for seed in config.seed for arm in arms.of(config)]
    jobs.run([jobs.on_dev(one, env, seed) for arm, env, seed in every for one in arm.candidates])
    wanted = [
        job
        for env in config.env.names
        for seed in config.seed
        for name in jobs.BASELINES
        for job in jobs.baseline(config, env, seed, name)
    ]
    for arm, env, seed in every:
        player = choose.best(arm, env, seed) if arm.candidates else arm
        wanted += jobs.evaluation(arm, env, seed, player)
    jobs.run(wanted)
    inputs = {"/".join(job.folder.parts[-5:]): job.folder for job in wanted}
    with runs.stage(config.folder / "evaluate", settings={}, inputs=inputs) as stage:
        written = [config.folder / name for name in ("episodes.csv", "rewards.csv", card.CARD)]
        if not stage.done or not all(path.is_file() for path in written):
            from pipeline.report import write_rewards

            evaluations = [card.read(job.folder) for job in wanted]
            write_rewards(config.folder, [episode for one in evaluations for episode in one.episodes])
            runs.write_json(config.folder / card.CARD, card.card(evaluations))
