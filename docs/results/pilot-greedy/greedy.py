"""Pairs that are about what the policy says greedily, which is what evaluation plays.

    python docs/results/pilot-greedy/greedy.py CONFIG lost    # the best sample against a greedy episode that is worse
    python docs/results/pilot-greedy/greedy.py CONFIG both    # best against worst; of equals the greedy episode counts
    python docs/results/pilot-greedy/greedy.py CONFIG after   # the tasks of `lost` once more, by what was trained

takes the SFT policy and the exploration of a run (one environment, one seed), plays greedily each explored task that a
sample has won (reward 0.3 or more), and writes the run's stage `pairs`. `reference`, `train` and `evaluate` are then as
ever. `after` counts, for each trained policy, the tasks won by SFT that it loses, and those lost that it wins.
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

from pipeline import arms, jobs, pairing, pairs, recipe, runs
from pipeline.arms import Arm
from pipeline.records import Pair, Trajectory, read_jsonl, write_jsonl

MIN_GAP = 0.3


def played(arm: Arm, folder: Path, only: Path) -> dict[str, Trajectory]:
    """One greedy episode of each task of a file, by the policy of an arm."""
    config = arm.config
    (env,), (seed,) = config.env.names, config.seed
    job = jobs.Job(
        config=config,
        folder=folder,
        env=env,
        seed=seed,
        policy=arm.name,
        checkpoint=arm.policy(env, seed),
        made_by=arm.made_by(),
        split="train",
        only=only,
    )
    jobs.run([job])
    return {one.id: one for one in jobs.trajectories([folder])}


def pair(samples: list[Trajectory], said: Trajectory, contest: str) -> Pair | None:
    """The pair of a task, if its rewards are far enough apart."""
    best = min(samples, key=lambda one: (-one.reward, len(one.turns)))
    worst = min(samples, key=lambda one: (one.reward, len(one.turns)))
    if contest == "lost":
        worst = said
    else:
        best = said if said.reward >= best.reward else best
        worst = said if said.reward <= worst.reward else worst
    return pairing.pair(best, worst) if best.reward - worst.reward >= MIN_GAP else None


def main() -> None:
    """Play, and write pairs or counts."""
    config, contest = recipe.load(sys.argv[1]), sys.argv[2]
    (env,), (seed,) = config.env.names, config.seed
    base = runs.seed_folder(config, env, seed)
    policies = {arm.name: arm for arm in arms.of(config)}
    by_task: dict[str, list[Trajectory]] = defaultdict(list)
    for one in read_jsonl(base / "rollout" / jobs.EPISODES, Trajectory):
        if one.turns and not one.status.is_error:
            by_task[one.id].append(one)
    won = [max(samples, key=lambda one: one.reward) for samples in by_task.values()]
    with runs.stage(base / "greedy" / "won", settings={}, inputs={"rollout": base / "rollout"}) as stage:
        if not stage.done:
            write_jsonl(stage.folder / jobs.EPISODES, [one for one in won if one.reward >= MIN_GAP])
    only = base / "greedy" / "won" / jobs.EPISODES
    said = played(policies["sft"], base / "greedy" / "sft", only)
    if contest == "after":
        for name in policies.keys() - {"sft"}:
            now = played(policies[name], base / "greedy" / name, only)
            gained = sum(one.success and not said[task].success for task, one in now.items())
            lost = sum(said[task].success and not one.success for task, one in now.items())
            had = sum(one.success for one in said.values())
            told = f"wins {gained} of {len(said) - had} that SFT loses, loses {lost} of {had} others"
            sys.stdout.write(f"{name}: {told}\n")
        return
    made = [found for task, one in sorted(said.items()) if (found := pair(by_task[task], one, contest))]
    inputs = {"rollout": base / "rollout", "greedy": base / "greedy" / "sft"}
    with runs.stage(base / "pairs", settings={"made by": f"greedy.py {contest}"}, inputs=inputs) as stage:
        write_jsonl(stage.folder / pairs.PAIRS, made)
        stage.facts.update(pairing.facts(made, Counter()))
    sys.stdout.write(f"{len(made)} pairs of {len(said)} tasks that a sample has won\n")


if __name__ == "__main__":
    main()
