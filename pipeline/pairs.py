"""Stage `pairs`: win/lose pairs of what experts and policies have played, for every way of making them.

`pipeline/pairing.py` pairs whole trajectories, `pipeline/steps.py` what follows single steps (`method=step`).
"""

from collections import Counter

from pipeline import arms, jobs, pairing, runs, steps
from pipeline.arms import Arm
from pipeline.config import Config
from pipeline.methods import Method
from pipeline.records import Pair, Trajectory, read_jsonl, write_jsonl

PAIRS = "pairs.jsonl"


def main(config: Config) -> None:
    """Write the pairs of each environment and seed, for every way of making them and every round."""
    for env in config.env.names:
        for seed in config.seed:
            for arm, number in arms.pairings(config, env, seed, "pairs"):
                _stage(arm, env, seed, number)


def _stage(arm: Arm, env: str, seed: int, number: int) -> None:
    explorations = arm.explored(env, seed, number)
    inputs = {"experts": arm.folder(env, seed, "experts")} | explorations
    settings = runs.settings_of(arm.config.pairs, *([arm.config.step] if arm.method == Method.STEP else []), seed=seed)
    with runs.stage(arm.folder(env, seed, "pairs", number), settings=settings, inputs=inputs) as stage:
        if stage.done:
            return
        experts = read_jsonl(inputs["experts"] / jobs.EPISODES, Trajectory)
        explored = jobs.trajectories(explorations.values())
        try:
            pairs, dropped = build(arm, experts, explored, seed)
        except ValueError as error:
            raise ValueError(f"{env}, seed {seed}, {arm.name}: {error}.") from None
        if not pairs:
            raise ValueError(
                f"{env}, seed {seed}, {arm.name}: none of {len(explored)} explored trajectories makes a pair "
                f"({pairing.told(dropped)}); explore more tasks (rollout.tasks), more often (rollout.samples) or at "
                "a higher rollout.temperature, or loosen the rules (pairs)."
            )
        write_jsonl(stage.folder / PAIRS, pairs)
        stage.facts.update(pairing.facts(pairs, dropped))


def build(
    arm: Arm, experts: list[Trajectory], explored: list[Trajectory], seed: int
) -> tuple[list[Pair], Counter[str]]:
    """The pairs that an arm trains on, and what makes none, counted by reason."""
    if arm.method != Method.STEP:
        return pairing.build(experts, explored, arm.config.pairs, seed)
    pairs, dropped = steps.build(experts, explored, arm.config.step)
    if arm.config.step.with_trajectories:
        whole = [one for one in explored if not one.begun_with]
        more, reasons = pairing.build(experts, whole, arm.config.pairs, seed)
        return pairs + more, dropped + reasons
    return pairs, dropped
