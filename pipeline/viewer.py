"""What the report's trajectory viewer shows, as JSON: a sample of episodes and pairs, and the weight of each turn."""

import functools
import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline import arms, choose, runs
from pipeline.config import Config
from pipeline.methods import Method
from pipeline.records import Message, Pair, Trajectory

if TYPE_CHECKING:
    from pipeline.rendering import Renderer

R = TypeVar("R", Trajectory, Pair)
Json = dict[str, Any]
Count = Callable[[Sequence[Message], Sequence[Message], Sequence[Sequence[int]]], int | None]
"""How many tokens of a trajectory, given as `Renderer.render` takes it, are the policy's."""

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
        task, which items name by index; `groups`: how many of how many are shown; `weightings`: see `weightings`;
        `weights`: of the turns of a trajectory, by the table that a weighting names and number of turns (of `permuted`,
        which training draws anew for every trajectory, one draw).
    """
    per_token = any(arm.method == Method.DPO_NORM for arm in arms.of(config))
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
        count = _counter(config, env, seed) if per_token else _uncounted
        add(group, found, functools.partial(_pair_sides, known=known, count=count))
    for (env, seed, policy, split), played in episodes.items():
        group = {"env": env, "seed": seed, "policy": policy, "split": split}
        count = _counter(config, env, seed) if per_token else _uncounted
        add(group, played, functools.partial(_episode_sides, count=count))
    lengths = sorted({len(side["turns"]) for item in items for side in item["sides"]} - {0})
    found_weightings = weightings(config)
    tables = {one["table"]: (one["discount"], one["gamma"]) for one in found_weightings}
    return {
        "items": items,
        "prompts": prompts,
        "groups": groups,
        "weightings": found_weightings,
        "weights": {table: _weights(discount, lengths, gamma or 0.0) for table, (discount, gamma) in tables.items()},
    }


def weightings(config: Config) -> list[Json]:
    """How each preference policy weighs turns, for every environment and seed: of an arm with `choose`, as was chosen.

    Returns:
        `env`, `seed`, `policy`; `discount`; `gamma`, null where none is used; `beta`; `table`, one name for one
        discount and gamma; `per_token`: whether the weights are divided by the trajectory's number of the policy's
        tokens.
    """
    found: list[Json] = []
    for env, seed, arm in itertools.product(config.env.names, config.seed, arms.of(config)):
        if (discount := arm.method.discount) is not None:
            train = choose.chosen(arm, env, seed).config.train
            gamma = train.gamma if discount.uses_gamma else None
            found.append(
                {"env": env, "seed": seed, "policy": arm.name, "discount": discount, "gamma": gamma}
                | {"beta": train.beta, "table": f"{discount} {gamma}", "per_token": arm.method == Method.DPO_NORM}
            )
    return found


def sample(records: Sequence[R], kinds: Mapping[str, str], limit: int = EMBEDDED) -> list[R]:
    """At most `limit` records in their own order, taken from every kind of task in turn.

    Which ones depends on their ids alone: policies that played the same tasks are shown on the same tasks.
    """
    if len(records) <= limit:
        return list(records)
    by_kind: dict[str, list[int]] = defaultdict(list)
    for place in sorted(range(len(records)), key=lambda place: _shuffled(records[place])):
        by_kind[kinds[records[place].id]].append(place)
    in_turn = [place for rank in itertools.zip_longest(*(by_kind[name] for name in sorted(by_kind))) for place in rank]
    return [records[place] for place in sorted([place for place in in_turn if place is not None][:limit])]


def _shuffled(record: Trajectory | Pair) -> str:
    attempt = str(record.sample) if isinstance(record, Trajectory) else record.chosen_source + record.rejected_source
    return hashlib.sha256(f"{record.id} {attempt}".encode()).hexdigest()


def _side(trajectory: Trajectory, title: str, count: Count) -> Json:
    """One trajectory; its turns are [reply, observation, reward so far, valid]."""
    ids = [turn.token_ids for turn in trajectory.turns]
    return {
        "title": title,
        "source": trajectory.source,
        "status": trajectory.status.value,
        "reward": trajectory.reward,
        "success": trajectory.success,
        "note": trajectory.note,
        "tokens": count(trajectory.prompt, trajectory.completion, ids),
        "turns": [[turn.text, turn.observation, turn.reward, turn.valid] for turn in trajectory.turns],
    }


def _episode_sides(trajectory: Trajectory, count: Count) -> list[Json]:
    """The one side of an episode, under its policy's name."""
    return [_side(trajectory, trajectory.policy, count)]


def _pair_sides(pair: Pair, known: Mapping[tuple[str, str], Trajectory], count: Count) -> list[Json]:
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
            "tokens": count(pair.prompt, messages, getattr(pair, f"{title}_token_ids")),
            "turns": _turns(messages),
        }
        origin = known.get((source, pair.id))
        if origin and [turn.text for turn in origin.turns] == [turn[0] for turn in side["turns"]]:
            side = _side(origin, title, count)
        sides.append(side)
    return sides


def _uncounted(prompt: Sequence[Message], completion: Sequence[Message], ids: Sequence[Sequence[int]]) -> None:
    """The `Count` of a run in which no weight hangs on the number of tokens."""


def _counter(config: Config, env: str, seed: int) -> Count:
    """Counts as training does before anything is cut: an engine's ids, or what the SFT policy's tokenizer makes."""
    checkpoint = (runs.seed_folder(config, env, seed) / "sft" / "policy").resolve()

    def count(prompt: Sequence[Message], completion: Sequence[Message], ids: Sequence[Sequence[int]]) -> int:
        if not completion:
            return 0
        if ids and all(ids):
            return sum(map(len, ids))
        return _renderer(checkpoint).render(prompt, completion, ids).trained_tokens

    return count


@functools.cache
def _renderer(checkpoint: Path) -> "Renderer":
    from transformers import AutoTokenizer

    from pipeline.rendering import Renderer

    return Renderer(AutoTokenizer.from_pretrained(checkpoint))


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
