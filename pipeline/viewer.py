"""What the report's trajectory viewer shows, as JSON: a sample of episodes and pairs, and the weight of each turn."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from pipeline import arms
from pipeline.config import Config
from pipeline.records import Message, Pair, Trajectory

R = TypeVar("R", Trajectory, Pair)
Json = dict[str, Any]

EMBEDDED = 60
"""Most episodes, or pairs, of one environment, seed, policy and split; `python -m pipeline inspect` shows the rest."""
PAIRS = "pairs"
"""Stands for the policy's name where the items are pairs."""


def content(
    config: Config,
    episodes: Mapping[tuple[str, int, str, str], Sequence[Trajectory]],
    pairs: Mapping[tuple[str, int], Sequence[Pair]],
) -> Json:
    """Everything that the viewer is told.

    Args:
        config: the run; its arms' methods and gammas give the weights.
        episodes: by environment, seed, policy and split.
        pairs: by environment and seed, of tasks that are among the episodes.

    Returns:
        `items`: one for each episode or pair shown, with its one or two `sides`; `prompts`: conversations before the
        task, which items name by index; `groups`: how many of how many are shown; `weights`: of the turns of a
        trajectory, by method and number of turns (of `permuted`, which training draws anew for every trajectory, one
        draw); `gammas`: by method, null where none is used.
    """
    kinds = {one.id: one.kind for group in episodes.values() for one in group}
    prompts: list[list[Message]] = []
    items: list[Json] = []
    groups: list[Json] = []

    def add(group: Json, records: Sequence[R], sides: Callable[[R], list[Json]]) -> None:
        shown, seen = sample(records, kinds), Counter[str]()
        groups.append(group | {"shown": len(shown), "total": len(records)})
        for record in shown:
            attempt = seen[record.id]
            seen[record.id] += 1
            key = f"{record.id}#{attempt}" if attempt else record.id
            *before, task = record.prompt or [{"role": "user", "content": ""}]
            if before not in prompts:
                prompts.append(before)
            items.append(
                group
                | {"key": key, "kind": kinds[record.id], "prompt": prompts.index(before), "task": task["content"]}
                | {"sides": sides(record)}
            )

    for (env, seed), found in pairs.items():
        known = {
            (one.source, one.id): one
            for (its_env, its_seed, _, split), group in episodes.items()
            if (its_env, its_seed, split) == (env, seed, "train")
            for one in group
        }
        group = {"env": env, "seed": seed, "policy": PAIRS, "split": "train"}
        add(group, found, lambda one, known=known: _pair_sides(one, known))  # type: ignore[misc]
    for (env, seed, policy, split), played in episodes.items():
        add({"env": env, "seed": seed, "policy": policy, "split": split}, played, lambda one: [_side(one, one.policy)])
    weighted = [(arm, arm.method.discount) for arm in arms.of(config) if arm.method.discount is not None]
    lengths = sorted({len(side["turns"]) for item in items for side in item["sides"]} - {0})
    return {
        "items": items,
        "prompts": prompts,
        "groups": groups,
        "weights": {arm.name: _weights(weighting, lengths, arm.config.train.gamma) for arm, weighting in weighted},
        "gammas": {arm.name: arm.config.train.gamma if weighting.uses_gamma else None for arm, weighting in weighted},
    }


def sample(records: Sequence[R], kinds: Mapping[str, str], limit: int = EMBEDDED) -> list[R]:
    """At most `limit` records in their own order, taken from every kind of task in turn.

    Which ones depends on their ids alone: policies that played the same tasks are shown on the same tasks.
    """
    if len(records) <= limit:
        return list(records)
    by_kind: dict[str, list[int]] = defaultdict(list)
    for place in sorted(range(len(records)), key=lambda place: _shuffled(records[place])):
        by_kind[kinds[records[place].id]].append(place)
    in_turn = [place for rank in zip_longest(*(by_kind[name] for name in sorted(by_kind))) for place in rank]
    return [records[place] for place in sorted([place for place in in_turn if place is not None][:limit])]


def _shuffled(record: Trajectory | Pair) -> str:
    attempt = str(record.sample) if isinstance(record, Trajectory) else record.chosen_source + record.rejected_source
    return hashlib.sha256(f"{record.id} {attempt}".encode()).hexdigest()


def _side(trajectory: Trajectory, title: str) -> Json:
    """One trajectory; its turns are [reply, observation, reward so far, valid]."""
    return {
        "title": title,
        "source": trajectory.source,
        "status": trajectory.status.value,
        "reward": trajectory.reward,
        "success": trajectory.success,
        "note": trajectory.note,
        "turns": [[turn.text, turn.observation, turn.reward, turn.valid] for turn in trajectory.turns],
    }


def _pair_sides(pair: Pair, known: Mapping[tuple[str, str], Trajectory]) -> list[Json]:
    """Chosen and rejected; what a pair does not record of its turns comes from the trajectory it was made of."""
    sides = []
    for title in ("chosen", "rejected"):
        messages: list[Message] = getattr(pair, title)
        source: str = getattr(pair, f"{title}_source")
        side = {
            "title": title,
            "source": source,
            "status": getattr(pair, f"{title}_status").value,
            "reward": getattr(pair, f"{title}_reward"),
            "success": None,
            "note": None,
            "turns": _turns(messages),
        }
        origin = known.get((source, pair.id))
        if origin and [turn.text for turn in origin.turns] == [turn[0] for turn in side["turns"]]:
            side = _side(origin, title)
        sides.append(side)
    return sides


def _turns(messages: Sequence[Message]) -> list[list[Any]]:
    """The turns of a conversation, of which neither reward nor validity is known."""
    turns: list[list[Any]] = []
    for message in messages:
        if message["role"] == "assistant":
            turns.append([message["content"], "", None, None])
        elif turns:
            turns[-1][1] = message["content"]
    return turns


def _weights(method: str, lengths: Sequence[int], gamma: float) -> dict[int, list[float]]:
    """phi(t, T) of every t, by number of turns T."""
    import torch

    from pipeline.losses import discount

    if not lengths:
        return {}
    table = discount(method, torch.tensor(lengths), gamma, dtype=torch.float64)
    return {
        length: [round(phi, 6) for phi in row[:length]] for length, row in zip(lengths, table.tolist(), strict=True)
    }
