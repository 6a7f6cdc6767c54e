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
    folder = runs.seed_folder(arm.config, env, seed) / "choose" / arm.name
    with runs.stage(folder, settings={"among": list(places)}, inputs=places) as stage:
        if not stage.done:
            rewards = {name: _mean_reward(place / jobs.EPISODES) for name, place in places.items()}
            name = max(rewards, key=rewards.__getitem__)
            runs.write_json(folder / CHOICE, {"chosen": name, "dev_reward": rewards})
            told = ", ".join(f"{one.partition('@')[2]} {reward:.3f}" for one, reward in rewards.items())
            stage.facts["notes"] = f"{name} was chosen by its reward on dev ({told})"
    name = json.loads((folder / CHOICE).read_text("utf-8"))["chosen"]
    return next(one for one in arm.candidates if one.name == name)


def _mean_reward(path: Path) -> float:
    played = read_jsonl(path, Trajectory)
    return sum(one.reward for one in played) / len(played)
