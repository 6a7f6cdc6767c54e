"""The evaluation card: under what conditions each number of a run was measured (lm-evaluation-harness' idea).

The stage `evaluate` writes `runs/NAME/card.json`, as `{ENV: {SPLIT: {POLICY: entry}}}`. An entry holds:

    n               number of tasks
    seeds           of the run
    sampling        temperature, top_p, samples a task, and the limits of play (max_tokens, ...)
    prompts         hash of every task's first messages: instruction, example and task as the policy reads them
    chat_template   SHA-256 of the template that turns messages into tokens; null where no model plays
    checkpoint      hash of the files of the policy that played; null where no model plays
    engine          what generated: name, number format; null where no model plays
    data            fingerprint of the environment: version of its package and hash of its data
    settings        of the environment that the tasks and episodes of the split depend on
    packages        versions, Python's among them
    git_commit      of this code, with `+changes` where the work tree differed
    episodes        SHA-256 of what episodes.jsonl says

Where a run's seeds disagree, an entry lists each seed's value: `{"seed0": ..., "seed1": ...}`. Checkpoint and episodes
do so always.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import runs
from pipeline.records import Trajectory, read_jsonl

CARD = "card.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The finished episodes of one policy on one split, under one seed."""

    env: str
    split: str
    policy: str
    seed: int
    episodes: list[Trajectory]
    manifest: dict[str, Any]


def read(folder: Path) -> Evaluation:
    """The evaluation in `ENV/seedK/evaluate/POLICY/SPLIT`; of several attempts at a task (`bon`) the best.

    Raises:
        ValueError: it is not finished, or a line of its episodes is no record.
    """
    from pipeline.statistics import best_of

    env, seed, _, policy, split = folder.parts[-5:]
    manifest = runs.read_manifest(folder, "evaluate")
    episodes = read_jsonl(folder / runs.EPISODES, Trajectory)
    return Evaluation(
        env=env,
        split=split,
        policy=policy,
        seed=int(seed.removeprefix("seed")),
        manifest=manifest,
        episodes=best_of(episodes) if manifest["settings"].get("samples", 1) > 1 else episodes,
    )


def card(evaluations: Iterable[Evaluation]) -> dict[str, dict[str, dict[str, Any]]]:
    """The card of a run's evaluations; see the module."""
    found: dict[tuple[str, str, str], list[Evaluation]] = defaultdict(list)
    for one in evaluations:
        found[one.env, one.split, one.policy].append(one)
    told: dict[str, dict[str, dict[str, Any]]] = {}
    for (env, split, policy), group in found.items():
        told.setdefault(env, {}).setdefault(split, {})[policy] = entry(group)
    return told


def entry(group: Sequence[Evaluation]) -> dict[str, Any]:
    """The card's entry of one environment, split and policy, from its evaluations under each seed."""

    def agreed(value: Callable[[Evaluation], Any]) -> Any:
        by_seed = {f"seed{one.seed}": value(one) for one in group}
        first, *others = by_seed.values()
        return by_seed if any(other != first for other in others) else first

    return {
        "n": agreed(lambda one: len({episode.id for episode in one.episodes})),
        "seeds": [one.seed for one in group],
        "sampling": agreed(_sampling),
        "prompts": agreed(lambda one: runs.digest({episode.id: episode.prompt for episode in one.episodes})),
        "chat_template": agreed(_chat_template),
        "checkpoint": {f"seed{one.seed}": runs.digest(files) if (files := _files(one)) else None for one in group},
        "engine": agreed(lambda one: one.manifest["settings"].get("engine")),
        "data": agreed(lambda one: one.manifest["settings"].get("env", {}).get("fingerprint")),
        "settings": agreed(lambda one: _without(one.manifest["settings"].get("env", {}), "fingerprint")),
        "packages": agreed(lambda one: {"python": one.manifest["python"], **one.manifest["packages"]}),
        "git_commit": agreed(lambda one: one.manifest["git_commit"]),
        "episodes": {f"seed{one.seed}": one.manifest["outputs"][runs.EPISODES]["sha256"] for one in group},
    }


def _sampling(one: Evaluation) -> dict[str, Any]:
    settings: dict[str, Any] = one.manifest["settings"]
    named = ("temperature", "top_p", "samples", "max_length", "example")
    limits: dict[str, Any] = settings.get("PlayConfig", {})
    return {name: settings[name] for name in named if name in settings} | limits


def _files(one: Evaluation) -> dict[str, str]:
    """SHA-256 of the files of the policy that played; none for random play and experts, who read no file."""
    return {
        name: sha256
        for files in one.manifest["inputs"].values()
        for name, sha256 in files.items()
        if name.startswith("policy/")
    }


def _chat_template(one: Evaluation) -> str | None:
    return _files(one).get("policy/chat_template.jinja")


def _without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != name}
