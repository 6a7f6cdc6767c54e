"""Step-level pairs: what follows a step of the expert's against what follows a worse step of the policy's.

As IPR has it (Xiong et al. 2024, https://arxiv.org/abs/2406.11176, sec. 3): policy 0 goes on from every step of an
expert's trajectory, several times, and a step is worth the mean reward of what follows it (Monte Carlo). With V(t) the
mean over the rollouts that begin after t of the expert's turns, and V(T) the expert's own reward:

    the expert's turn t          is worth V(t + 1)
    an action of the policy's    the mean over the rollouts that begin with it after the same t turns

Where the expert's is worth more by `step.min_gap`, the rest of the expert's trajectory is chosen over the rollout with
the least reward among those of the worst action. The turns that both share are part of the pair's prompt: they are
context, no term of the loss, and T counts the turns after them.

Deviations from IPR: the policy's step is judged by the same rollouts that explore it, not by further ones; no SFT term
unless `train.nll` adds it; one round.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pipeline import pairing, react
from pipeline.config import StepConfig
from pipeline.records import Pair, Trajectory


def build(
    experts: Iterable[Trajectory], explored: Iterable[Trajectory], rules: StepConfig
) -> tuple[list[Pair], Counter[str]]:
    """The pairs, in the order of tasks and steps, and how many of the experts' steps make none, by reason.

    Args:
        experts: one trajectory a task.
        explored: rollouts from their steps, each with the number of turns it shares with the expert (`begun_with`).
        rules: the least difference in worth.
    """
    from_step: dict[str, dict[int, list[Trajectory]]] = defaultdict(lambda: defaultdict(list))
    dropped: Counter[str] = Counter()
    for one in explored:
        if one.status.is_error or len(one.turns) <= one.begun_with:
            dropped[f"rollouts without a step of the policy's ({one.status})"] += 1
        else:
            from_step[one.id][one.begun_with].append(one)
    pairs: list[Pair] = []
    for expert in sorted(experts, key=lambda one: one.id):
        rollouts = from_step.get(expert.id, {})
        for step in range(len(expert.turns) if rollouts else 0):
            made = _pair_or_reason(expert, step, rollouts, rules)
            if isinstance(made, str):
                dropped[made] += 1
            else:
                pairs.append(made)
    return pairs, dropped


def _pair_or_reason(
    expert: Trajectory, step: int, rollouts: Mapping[int, Sequence[Trajectory]], rules: StepConfig
) -> Pair | str:
    """The pair at a step of the expert's, or why there is none."""
    after = rollouts.get(step + 1, ())
    if not rollouts.get(step) or not (after or step + 1 == len(expert.turns)):
        return "a step without rollouts"
    worth = _mean(after) if after else expert.reward
    by_action: dict[str, list[Trajectory]] = defaultdict(list)
    for one in rollouts[step]:
        by_action[one.turns[step].action].append(one)
    by_action.pop(expert.turns[step].action, None)
    if not by_action:
        return "the policy takes the expert's step"
    worst = min(by_action.values(), key=_mean)
    if worth - _mean(worst) < rules.min_gap:
        return "the policy's step is worth as much"
    loser = min(worst, key=lambda one: (one.reward, one.sample))
    whole = pairing.pair(expert, loser)
    shared = 2 * step
    return replace(
        whole,
        prompt=[*react.zero_shot(expert.prompt), *expert.completion[:shared]],
        chosen=expert.completion[shared:],
        rejected=loser.completion[shared:],
        chosen_token_ids=[],
        rejected_token_ids=[turn.token_ids for turn in loser.turns[step:]],
        chosen_reward=worth,
        rejected_reward=_mean(worst),
        chosen_turns=len(expert.turns) - step,
        rejected_turns=len(loser.turns) - step,
        chosen_source=f"{expert.source}+after{step}",
        rejected_source=f"{loser.source}+after{step}",
    )


def _mean(rollouts: Sequence[Trajectory]) -> float:
    return sum(one.reward for one in rollouts) / len(rollouts)
