"""Pairs: on each explored task the expert and the policy's samples compete; the higher reward is chosen.

With its defaults as the paper and ETO's `construct_preference.py` have it. The deviations, each a key of `pairs.*`:

- the losing trajectory is not cut at the winner's number of turns + 5 unless `cut=official`; ETO's code has that on
  WebShop and ScienceWorld and not on ALFWorld, and like there an expert that loses is never cut;
- which losers are noisy follows the rules of `pipeline/noise.py`: the paper gives none;
- best against worst of several samples, limits of length and number, and noise put in on purpose are ours.

Every explored trajectory that makes no pair is counted with the reason. What was done to a trajectory stands behind its
source: `sft/seed0/1+cut7+repeat3` lost its last seven turns, then one of its turns was repeated three times; `+flipped`
is a loser called the winner.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from pipeline import noise, react
from pipeline.config import PairsConfig
from pipeline.records import Pair, Trajectory

EXPERT = "expert"
"""The policy's name in the source of an expert's trajectory."""

OFFICIAL_MARGIN = 5
"""Turns that the official cut leaves a loser beyond the winner's number of turns."""


def build(
    experts: Iterable[Trajectory], explored: Iterable[Trajectory], rules: PairsConfig, seed: int
) -> tuple[list[Pair], Counter[str]]:
    """Pairs of expert and policy, or of the policy's own samples, on the same task.

    Args:
        experts: one trajectory a task.
        explored: the policy's samples.
        rules: who competes, what makes a pair, and the noise put in.
        seed: draws what is kept of too many pairs, corrupted and flipped.

    Returns:
        The pairs, ordered by task and sample, and how many explored trajectories are in none of them, by reason. All
        samples of a contest that makes no pair are counted under its reason.

    Raises:
        ValueError: there are fewer pairs than `limit`; says how many, and what made none.
    """
    expert_of = {trajectory.id: trajectory for trajectory in experts}
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for task, samples in groupby(sorted(explored, key=lambda one: (one.id, one.sample)), key=lambda one: one.id):
        fit: list[Trajectory] = []
        for sample in samples:
            if reason := _unfit(sample, expert_of, rules):
                dropped[reason] += 1
            else:
                fit.append(sample)
        for entrants in _contests(expert_of.get(task), fit, rules):
            result = _pair_or_reason(entrants, rules)
            competed = _explored(one.source for one in entrants)
            if isinstance(result, str):
                dropped[result] += competed
            else:
                pairs.append(result)
                dropped["neither best nor worst"] += competed - _explored_in(result)
    if rules.limit is not None and len(pairs) < rules.limit:
        raise ValueError(
            f"{len(pairs)} pairs are fewer than pairs.limit={rules.limit} ({told(+dropped)}); set a limit that "
            "every arm reaches, explore more (rollout.tasks, rollout.samples), or loosen the rules (pairs)"
        )
    kept = _limited(pairs, rules.limit, seed)
    dropped["beyond pairs.limit"] = sum(map(_explored_in, pairs)) - sum(map(_explored_in, kept))
    return _with_noise(kept, rules, seed), +dropped


def pair(chosen: Trajectory, rejected: Trajectory) -> Pair:
    """Two trajectories of one task as a pair; the prompt is the task's, without a worked example."""
    return Pair(
        id=chosen.id,
        prompt=react.zero_shot(chosen.prompt),
        chosen=chosen.completion,
        rejected=rejected.completion,
        chosen_token_ids=_token_ids(chosen),
        rejected_token_ids=_token_ids(rejected),
        chosen_reward=chosen.reward,
        rejected_reward=rejected.reward,
        chosen_status=chosen.status,
        rejected_status=rejected.status,
        chosen_turns=len(chosen.turns),
        rejected_turns=len(rejected.turns),
        chosen_source=chosen.source,
        rejected_source=rejected.source,
    )


def cut(pair: Pair, turns: int) -> Pair:
    """The pair with the loser's turns after the first `turns` cut off, whole and with their token ids.

    The loser ends with its last turn that is left; its reward and status stay those of the whole trajectory.
    """
    lost = pair.rejected_turns - turns
    if lost <= 0:
        return pair
    return replace(
        pair,
        rejected=pair.rejected[: 2 * turns - 1],
        rejected_token_ids=pair.rejected_token_ids[:turns],
        rejected_turns=turns,
        rejected_source=f"{pair.rejected_source}+cut{lost}",
    )


def facts(pairs: Sequence[Pair], dropped: Counter[str]) -> dict[str, Any]:
    """What the manifest says of the pairs, as they are trained on.

    `won_by` counts who is chosen, `turns` how many pairs have a trajectory of so many turns, and `noisy` the rejected
    trajectories that the detectors find, corrupted ones among them.
    """
    count = len(pairs)
    edits = [edit for one in pairs for edit in _edits(one)]
    cuts = [int(edit.removeprefix("cut")) for edit in edits if edit.startswith("cut")]
    return {
        "pairs": count,
        "dropped": dict(dropped),
        "won_by": dict(Counter(_player(one.chosen_source) for one in pairs)),
        "mean_reward": [
            sum(one.chosen_reward for one in pairs) / count,
            sum(one.rejected_reward for one in pairs) / count,
        ],
        "mean_turns": [
            sum(one.chosen_turns for one in pairs) / count,
            sum(one.rejected_turns for one in pairs) / count,
        ],
        "turns": {
            "chosen": dict(sorted(Counter(one.chosen_turns for one in pairs).items())),
            "rejected": dict(sorted(Counter(one.rejected_turns for one in pairs).items())),
        },
        "cut": {"pairs": len(cuts), "turns": sum(cuts)},
        "noisy": sum(noise.is_noisy(one.rejected) for one in pairs),
        "corrupted": sum(edit.startswith(("repeat", "random")) for edit in edits),
        "flipped": edits.count("flipped"),
    }


def told(dropped: Counter[str]) -> str:
    """The reasons for which trajectories are in no pair, the most frequent first."""
    return "; ".join(f"{reason}: {count}" for reason, count in dropped.most_common()) or "nothing else was explored"


def _unfit(sample: Trajectory, expert_of: dict[str, Trajectory], rules: PairsConfig) -> str:
    """Why an explored trajectory competes with nobody, if so."""
    if rules.contest == "expert" and sample.id not in expert_of:
        return "no expert for the task"
    if sample.status.is_error and rules.errors == "drop":
        return f"ended in {sample.status}"
    return "" if sample.turns else "no turn was played"


def _contests(expert: Trajectory | None, samples: list[Trajectory], rules: PairsConfig) -> list[list[Trajectory]]:
    """Who competes with whom on one task."""
    if rules.contest == "samples" or expert is None:
        return [samples] if samples else []
    if rules.contest == "all":
        return [[expert, *samples]] if samples else []
    return [[expert, sample] for sample in samples]


def _pair_or_reason(entrants: list[Trajectory], rules: PairsConfig) -> Pair | str:
    """The pair that a contest makes, or why it makes none."""
    if len(entrants) == 1:
        return "the only sample of the task"

    def reward(one: Trajectory) -> float:
        return float(one.success) if rules.reward == "success" else one.reward

    best = min(entrants, key=lambda one: (-reward(one), len(one.turns)))
    worst = min(entrants, key=lambda one: (reward(one), len(one.turns)))
    gap = reward(best) - reward(worst)
    if gap == 0:
        return "tie"
    if gap < rules.min_gap:
        return "rewards closer than min_gap"
    made = pair(best, worst)
    if rules.cut == "official" and _player(worst.source) != EXPERT:
        made = cut(made, made.chosen_turns + OFFICIAL_MARGIN)
    return _refused(made, rules) or made


def _refused(pair: Pair, rules: PairsConfig) -> str:
    """What the rules have against a pair's lengths or its loser, if anything."""
    gap = abs(pair.chosen_turns - pair.rejected_turns)
    if pair.rejected_turns < rules.min_turns:
        return "loser shorter than min_turns"
    if rules.max_turns is not None and pair.rejected_turns > rules.max_turns:
        return "loser longer than max_turns"
    if rules.min_turn_gap is not None and gap < rules.min_turn_gap:
        return "lengths closer than min_turn_gap"
    if rules.max_turn_gap is not None and gap > rules.max_turn_gap:
        return "lengths farther apart than max_turn_gap"
    if rules.noisy == "keep" or noise.is_noisy(pair.rejected) == (rules.noisy == "only"):
        return ""
    return "loser is noisy" if rules.noisy == "drop" else "loser is not noisy"


def _limited(pairs: list[Pair], limit: int | None, seed: int) -> list[Pair]:
    """`limit` of the pairs, drawn by the seed, in the order they had."""
    if limit is None:
        return pairs
    return [pairs[number] for number in sorted(random.Random(f"{seed} limit").sample(range(len(pairs)), limit))]


def _with_noise(pairs: list[Pair], rules: PairsConfig, seed: int) -> list[Pair]:
    """The pairs with the share of corrupted losers and of flips that the rules ask for."""
    corrupted = noise.corrupt(
        pairs, share=rules.corrupted, kind=rules.corruption, actions=rules.corrupted_actions, seed=seed
    )
    return noise.flip(corrupted, share=rules.flipped, seed=seed)


def _player(source: str) -> str:
    """Who played a trajectory, by its source."""
    return source.split("/")[0]


def _explored(sources: Iterable[str]) -> int:
    """How many of the trajectories are the policy's."""
    return sum(_player(source) != EXPERT for source in sources)


def _explored_in(pair: Pair) -> int:
    return _explored((pair.chosen_source, pair.rejected_source))


def _edits(pair: Pair) -> list[str]:
    """What was done to the two trajectories, as their sources tell."""
    return re.findall(r"\+(\w+)", f"{pair.chosen_source} {pair.rejected_source}")


def _token_ids(trajectory: Trajectory) -> list[list[int]]:
    """The ids of each turn where an engine played, else nothing."""
    ids = [turn.token_ids for turn in trajectory.turns]
    return ids if all(ids) else []
