"""Stage `pairs`: on each explored task the expert's trajectory against the policy's; the higher reward is chosen.

As the paper and ETO's `construct_preference.py` have it, except that the losing trajectory is never cut at the winner's
length, and that every trajectory which makes no pair is counted with the reason.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import arms, jobs, react, runs
from pipeline.arms import Arm
from pipeline.config import Config, PairsConfig
from pipeline.records import Pair, Trajectory, read_jsonl, write_jsonl

PAIRS = "pairs.jsonl"


def main(config: Config) -> None:
    """Write the pairs of each environment and seed, for every way of making them and every round."""
    for env in config.env.names:
        for seed in config.seed:
            done: set[Path] = set()
            for arm in arms.preferring(config):
                for number in arm.open_rounds(env, seed):
                    if (folder := arm.folder(env, seed, "pairs", number)) not in done:
                        done.add(folder)
                        _stage(arm, env, seed, number)


def _stage(arm: Arm, env: str, seed: int, number: int) -> None:
    inputs = {"experts": arm.folder(env, seed, "experts"), "rollout": arm.folder(env, seed, "rollout", number)}
    settings = runs.settings_of(arm.config.pairs)
    with runs.stage(arm.folder(env, seed, "pairs", number), settings=settings, inputs=inputs) as stage:
        if stage.done:
            return
        experts = read_jsonl(inputs["experts"] / jobs.EPISODES, Trajectory)
        explored = read_jsonl(inputs["rollout"] / jobs.EPISODES, Trajectory)
        pairs, dropped = build(experts, explored, arm.config.pairs)
        if not pairs:
            raise ValueError(
                f"{env}, seed {seed}: none of {len(explored)} explored trajectories makes a pair "
                f"({_told(dropped)}); explore more tasks (rollout.tasks) or at a higher rollout.temperature."
            )
        write_jsonl(stage.folder / PAIRS, pairs)
        stage.facts.update(facts(pairs, dropped))


def build(
    experts: Iterable[Trajectory], explored: Iterable[Trajectory], rules: PairsConfig
) -> tuple[list[Pair], Counter[str]]:
    """Pairs of expert and policy on the same task.

    Returns:
        The pairs, ordered by task and sample, and how many explored trajectories made none, by reason.
    """
    expert_of = {trajectory.id: trajectory for trajectory in experts}
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for trajectory in sorted(explored, key=lambda one: (one.id, one.sample)):
        expert = expert_of.get(trajectory.id)
        if expert is None:
            dropped["no expert for the task"] += 1
        elif trajectory.status.is_error and rules.errors == "drop":
            dropped[f"ended in {trajectory.status}"] += 1
        elif not trajectory.turns:
            dropped["no turn was played"] += 1
        elif expert.reward == trajectory.reward:
            dropped["tie"] += 1
        elif abs(expert.reward - trajectory.reward) < rules.min_gap:
            dropped["rewards closer than min_gap"] += 1
        else:
            better, worse = (expert, trajectory) if expert.reward > trajectory.reward else (trajectory, expert)
            pairs.append(pair(better, worse))
    return pairs, dropped


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


def facts(pairs: list[Pair], dropped: Counter[str]) -> dict[str, Any]:
    """What the manifest says of the pairs."""
    count = len(pairs)
    return {
        "pairs": count,
        "dropped": dict(dropped),
        "won_by": dict(Counter(one.chosen_source.split("/")[0] for one in pairs)),
        "mean_reward": [
            sum(one.chosen_reward for one in pairs) / count,
            sum(one.rejected_reward for one in pairs) / count,
        ],
        "mean_turns": [
            sum(one.chosen_turns for one in pairs) / count,
            sum(one.rejected_turns for one in pairs) / count,
        ],
    }


def _token_ids(trajectory: Trajectory) -> list[list[int]]:
    """The ids of each turn where an engine played, else nothing."""
    ids = [turn.token_ids for turn in trajectory.turns]
    return ids if all(ids) else []


def _told(dropped: Counter[str]) -> str:
    return "; ".join(f"{reason}: {count}" for reason, count in dropped.most_common()) or "nothing was explored"
