"""Steps a second of our ScienceWorld against the package's own `ScienceWorldEnv.step`, on the same gold paths.

    python -m benchmarks.sciworld_steps [--variations 3] [--json FILE]

Both replay the same actions of the same tasks by turns, path by path, each in a JVM of its own under this process; what
is timed is `step`, without loads. Ours seeds every step and orders sets, which costs some speed; the official one also
returns the look, the inventory and all valid actions with each step.
"""

import argparse
import json
import time
from pathlib import Path

from scienceworld import ScienceWorldEnv

from envs.sciworld import ScienceWorld, Settings

TASKS = ("find-animal", "find-plant", "lifespan-shortest-lived", "use-thermometer", "test-conductivity", "melt")


def main() -> None:
    """Replay, print the table, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variations", type=int, default=3, help="variations of each task")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()

    with ScienceWorld(Settings(tasks=list(TASKS), train_variations=args.variations)) as ours:
        official = ScienceWorldEnv("", envStepLimit=1000)
        paths = {task: [step.action for step in ours.expert(task)] for task in ours.tasks("train")}
        _replay(ours, official, paths)  # let both JVMs compile
        rows = _replay(ours, official, paths)
        official.close()

    print(f"{'task':<32}{'steps':>8}{'ours /s':>10}{'official /s':>13}{'ratio':>8}")
    for row in rows:
        print(
            f"{row['task']:<32}{row['steps']:>8}{row['ours']:>10.0f}{row['official']:>13.0f}"
            f"{row['ours'] / row['official']:>8.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def _replay(ours: ScienceWorld, official: ScienceWorldEnv, paths: dict[str, list[str]]) -> list[dict[str, str | float]]:
    """Rows of steps and steps a second for each task, and for all."""
    seconds: dict[str, list[float]] = {}
    steps: dict[str, int] = {}
    for task, actions in paths.items():
        _, kind, variation = task.split(":")
        ours.reset(options={"task": task})
        official.load(kind, int(variation), "easy")
        began = time.perf_counter()
        for action in actions:
            ours.step(action)
        between = time.perf_counter()
        for action in actions:
            official.step(action)
        spent = between - began, time.perf_counter() - between
        for name in (kind, "all"):
            steps[name] = steps.get(name, 0) + len(actions)
            seconds[name] = [a + b for a, b in zip(seconds.get(name, [0.0, 0.0]), spent, strict=True)]
    return [
        {"task": name, "steps": steps[name], "ours": steps[name] / mine, "official": steps[name] / theirs}
        for name, (mine, theirs) in sorted(seconds.items(), key=lambda item: item[0] == "all")
    ]


if __name__ == "__main__":
    main()
