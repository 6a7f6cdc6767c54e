"""Resets and steps a second of our environments against the unmodified packages, on the same tasks and actions.

    python -m benchmarks.environment_steps [--env sciworld alfworld webshop] [--tasks 24] [--json FILE]

    sciworld   `ScienceWorldEnv` of scienceworld: `load` and `reset`, which looks around; `step`, which also returns
               the look, the inventory and all valid actions
    alfworld   `AlfredTWEnv` of alfworld, a batch of one, over the same tree of generated games
    webshop    ours alone: the official one is no package, and needs Lucene in a JVM, an index made with it, and spaCy's
               largest English model; `benchmarks.webshop_server` has its way of making and reading pages

Each side has a process of its own under this one and an environment that it keeps; they play by turns, task by task,
the solutions that our expert found in a third process. Every task is played twice: `first resets` are of the first
time, when the JVM is cold and no translation of a game's PDDL is on the disk; the rest is of the second. Rates are per
second of processor time, of the JVM, too; `clock` is the ratio by the clock. `MiB` is what a side holds with its one
environment (PSS), `solved` how many tasks the actions solved.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import envs
from benchmarks.process_tree import below, cpu_seconds, resident_mib
from envs.processes import fresh_processes

Row = dict[str, tuple[int, float, float]]
"""By what was done: how often, seconds of processor time, seconds by the clock."""

Plans = dict[str, list[str]]
"""The actions of each task's solution."""


class Side(Protocol):
    """One environment, ours or a package's."""

    def reset(self, task: str) -> str:
        """Begin a task; returns which one that is, for a package may choose another."""

    def step(self, action: str) -> bool:
        """Take an action; returns whether the task is solved now."""


class Ours:
    """An environment of this project."""

    def __init__(self, name: str, tasks: int) -> None:
        self._env = envs.load(name)(settings_of(name, tasks))

    def reset(self, task: str) -> str:
        """See `Side`."""
        self._env.reset(options={"task": task})
        return task

    def step(self, action: str) -> bool:
        """See `Side`."""
        return self._env.step(action)[4]["success"]


class ScienceWorldPackage:
    """The environment of scienceworld, which has a JVM to itself."""

    def __init__(self, name: str, tasks: int) -> None:
        from scienceworld import ScienceWorldEnv

        self._env = ScienceWorldEnv("", envStepLimit=1000)

    def reset(self, task: str) -> str:
        """See `Side`."""
        _, kind, variation = task.split(":")
        self._env.load(kind, int(variation), "easy")
        self._env.reset()
        return task

    def step(self, action: str) -> bool:
        """See `Side`."""
        score: int = self._env.step(action)[3]["score"]
        return score >= 100


class AlfWorldPackage:
    """The environment that alfworld registers with TextWorld, over our tree of games, in an order of its own."""

    def __init__(self, name: str, tasks: int) -> None:
        from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

        from envs.alfworld import tree

        self._root = tree(settings_of(name, tasks))[0] / "train"
        config = {
            "dataset": {"data_path": str(self._root), "num_train_games": 0},
            "env": {
                "task_types": [1, 2, 3, 4, 5, 6],
                "goal_desc_human_anns_prob": 0,
                "domain_randomization": False,
                "expert_type": "handcoded",
            },
            "general": {"training_method": "dqn"},
            "rl": {"training": {"max_nb_steps_per_episode": 50}},
        }
        with redirect_stdout(sys.stderr):
            self._env = AlfredTWEnv(config, train_eval="train").init_env(batch_size=1)

    def reset(self, task: str) -> str:
        """See `Side`."""
        _, infos = self._env.reset()
        return f"alfworld:{Path(infos['extra.gamefile'][0]).parent.relative_to(self._root)}"

    def step(self, action: str) -> bool:
        """See `Side`."""
        won: bool = self._env.step([action])[3]["won"][0]
        return won


PACKAGES: dict[str, Callable[[str, int], Side]] = {"sciworld": ScienceWorldPackage, "alfworld": AlfWorldPackage}


def main() -> None:
    """Play, print the tables, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(envs.ENVIRONMENTS)
    parser.add_argument("--env", nargs="+", choices=names, default=names, help="environments to measure")
    parser.add_argument("--tasks", type=int, default=24, help="tasks of each, spread over its kinds")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()

    result = {}
    print(f"{'':26}{'ours':>10}{'package':>10}{'ratio':>8}{'clock':>8}", flush=True)
    for name in args.env:
        result[name] = _compare(name, args.tasks)
        for what, row in result[name].items():
            figures = "".join(f"{_short(row[side]):>10}" for side in ("ours", "package") if side in row)
            ratios = "".join(f"{row[key]:>8.2f}" for key in ("ratio", "clock") if key in row)
            print(f"{name:10}{what:16}{figures}{ratios}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _short(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 or figure == int(figure) else f"{figure:.1f}"


def _compare(name: str, tasks: int) -> dict[str, dict[str, float]]:
    """What the sides spent, one row for each thing done."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with fresh_processes(1) as process:
            plans: Plans = process.submit(_plan, folder, name, tasks).result()
        names = ("ours", "package") if name in PACKAGES else ("ours",)
        sides = {side: stack.enter_context(fresh_processes(1)) for side in names}
        for side, process in sides.items():
            process.submit(_open, folder, name, side, tasks).result()
        sums: dict[str, Row] = {side: {} for side in sides}
        for when in ("first ", ""):
            for task in plans:
                for side, process in sides.items():
                    _add(sums[side], process.submit(_play, when, task, plans).result())
        memory = {side: process.submit(_memory).result() for side, process in sides.items()}
    table = {f"{what}s/s": _rates(sums, what) for what in ("first reset", "reset", "step")}
    table["MiB"] = memory | _ratio("ratio", memory, more_is_better=False)
    table["solved"] = {side: spent["solved"][0] for side, spent in sums.items()}
    return table


def settings_of(name: str, tasks: int, **given: str) -> Any:
    """An environment's settings for so many training tasks; no more of ALFWorld's games are made than needed."""
    few = {"train_games": tasks, "seen_games": 1, "unseen_games": 1}
    return envs.load(name).Settings(**({**few, **given} if name == "alfworld" else given))


def _plan(folder: str, name: str, tasks: int) -> Plans:
    """Our expert's solutions; none where it has none."""
    from pipeline.jobs import spread  # here, so that no side's memory holds it

    os.chdir(Path(folder))
    Path("data").mkdir()
    plans: Plans = {}
    with envs.load(name)(settings_of(name, tasks)) as env:
        for task in spread(env.tasks("train"), tasks, env.kind):
            try:
                plans[task] = [step.action for step in env.expert(task)]
            except envs.NoSolutionError:
                plans[task] = []
    return plans


_side: Side
"""The side that this process plays."""


def _open(folder: str, name: str, side: str, tasks: int) -> None:
    global _side
    os.chdir(tempfile.mkdtemp(dir=folder))
    shutil.copytree(Path(folder, "data"), "data", ignore=shutil.ignore_patterns("translations"))
    _side = Ours(name, tasks) if side == "ours" else PACKAGES[name](name, tasks)


def _play(when: str, task: str, plans: Plans) -> Row:
    children = below(os.getpid())

    def clock() -> tuple[float, float]:
        return time.process_time() + cpu_seconds(children), time.perf_counter()

    began, played = clock(), _side.reset(task)
    between = clock()
    solved = [_side.step(action) for action in plans[played]]
    ended = clock()
    return {
        f"{when}reset": (1, between[0] - began[0], between[1] - began[1]),
        f"{when}step": (len(plans[played]), ended[0] - between[0], ended[1] - between[1]),
        f"{when}solved": (int(any(solved)), 0.0, 0.0),
    }


def _memory() -> float:
    return resident_mib([os.getpid(), *below(os.getpid())])


def _add(total: Row, more: Row) -> None:
    for what, figures in more.items():
        count, cpu, seconds = (one + other for one, other in zip(total.get(what, (0, 0, 0)), figures, strict=True))
        total[what] = int(count), cpu, seconds


def _rates(sums: dict[str, Row], what: str) -> dict[str, float]:
    """How often each side did something in a second of processor time, and both ratios."""
    spent = {side: row[what] for side, row in sums.items()}
    rates = {side: count / cpu for side, (count, cpu, _) in spent.items()}
    clock = {side: count / seconds for side, (count, _, seconds) in spent.items()}
    return rates | _ratio("ratio", rates) | _ratio("clock", clock)


def _ratio(name: str, row: dict[str, float], *, more_is_better: bool = True) -> dict[str, float]:
    """By how much ours is better, if there is a package to compare with."""
    if "package" not in row:
        return {}
    ratio = row["ours"] / row["package"]
    return {name: ratio if more_is_better else 1 / ratio}


if __name__ == "__main__":
    main()
