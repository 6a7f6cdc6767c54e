"""Which of an arm's candidates stands for it: the one with the best mean reward on the dev split, for each seed."""

import json
from pathlib import Path

from pipeline import jobs, runs
from pipeline.arms import Arm
from pipeline.records import Trajectory, read_jsonl

CHOICE = "choice.json"


def best(arm: Arm, env: str, seed: int) -> Arm:
    """The candidate with the best reward on the dev split, the first of equal ones; nothing else is looked at.

    Every candidate has played it (`jobs.on_dev`).
    """
    places = {one.name: one.folder(env, seed, "evaluate") / "dev" for one in arm.candidates}
    with runs.stage(folder(arm, env, seed), settings={"among": list(places)}, inputs=places) as stage:
        if not stage.done:
            rewards = {name: _mean_reward(place / jobs.EPISODES) for name, place in places.items()}
            name = max(rewards, key=rewards.__getitem__)
            runs.write_json(stage.folder / CHOICE, {"chosen": name, "dev_reward": rewards})
            told = ", ".join(f"{one.partition('@')[2]} {reward:.3f}" for one, reward in rewards.items())
            stage.facts["notes"] = f"{name} was chosen by its reward on dev ({told})"
    return chosen(arm, env, seed)


def chosen(arm: Arm, env: str, seed: int) -> Arm:
    """What plays as an arm: itself or, of an arm with candidates, the one that was found `best`.

    Raises:
        ValueError: what was chosen is none of the candidates.
    """
    if not arm.candidates:
        return arm
    path = folder(arm, env, seed) / CHOICE
    name = json.loads(path.read_text("utf-8"))["chosen"]
    for one in arm.candidates:
        if one.name == name:
            return one
    raise ValueError(f"{path} names {name}, no candidate of {arm.name} now; run the stage `evaluate` again.")


def folder(arm: Arm, env: str, seed: int) -> Path:
    """Where the choice among an arm's candidates is kept."""
    return runs.seed_folder(arm.config, env, seed) / "choose" / arm.name


def _mean_reward(path: Path) -> float:
    played = read_jsonl(path, Trajectory)
    return sum(one.reward for one in played) / len(played)
