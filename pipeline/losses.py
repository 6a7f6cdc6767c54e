"""The preference loss on per-turn log-probs, and the discounts that tell DMPO, trajectory DPO and the controls apart.

Everything here is a pure function of small tensors. Paper: Direct Multi-Turn Preference Optimization for Language
Agents, https://arxiv.org/abs/2406.14868. Shapes: B pairs, T turns of the longest trajectory in the batch.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from pipeline.methods import Discount


class PreferenceLoss(NamedTuple):
    """What `preference_loss` returns; all [B]. The rewards carry gradients: detach them before logging."""

    losses: Tensor
    logits: Tensor
    """Chosen less rejected reward; positive when the pair is ordered rightly."""
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def discount(
    name: str,
    lengths: Tensor,
    gamma: float,
    *,
    max_turns: int | None = None,
    seed: int | Sequence[int] = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of every turn.

    Args:
        name: a `Discount`.
        lengths: [B] integers, the number of turns of each trajectory.
        gamma: in [0, 1]; 1 is the limit (T-t)/T of both DMPO forms.
        max_turns: width of the table; the longest length when not given.
        seed: for `permuted`; one number, or one a trajectory. A trajectory's order depends on its seed and its length
            alone, never on its place in the batch: with one number, trajectories of equal length are shuffled alike.
        dtype: of the result; computed in float64.

    Returns:
        [B, max_turns], 0 from each trajectory's length on, on the device of `lengths`.

    Raises:
        ValueError: unknown name, gamma outside [0, 1], a length below 1 or above `max_turns`.
    """
    if name not in _TABLES:
        raise ValueError(f"There is no discount {name!r}: choose one of {', '.join(Discount)}.")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} is outside [0, 1].")
    longest = max_turns if max_turns is not None else int(lengths.max())
    if int(lengths.min()) < 1 or int(lengths.max()) > longest:
        raise ValueError(f"Trajectories must have 1 to {longest} turns; the lengths are {lengths.tolist()}.")
    turns = torch.arange(longest, device=lengths.device).expand(len(lengths), -1)  # [B, T]
    own_length = lengths[:, None]
    weights = _TABLES[Discount(name)](turns.double(), own_length.double(), gamma)
    weights = weights.where(turns < own_length, 0.0)
    if name == Discount.PERMUTED:
        weights = weights.gather(1, _shuffled(lengths, longest, seed))
    return weights.to(dtype)


def _dmpo_printed(t: Tensor, length: Tensor, gamma: float) -> Tensor:
    if gamma == 1:
        return (length - t) / length
    if gamma == 0:
        return torch.ones_like(t)
    # Eq 16. expm1 keeps 1 - gamma^n exact where gamma is near 1.
    log_gamma = math.log(gamma)
    return torch.expm1((length - t) * log_gamma) / torch.expm1(length * log_gamma)


def _dmpo(t: Tensor, length: Tensor, gamma: float) -> Tensor:
    # Eq 15 put into Eq 14; 0**0 is 1, so gamma=0 keeps turn 0.
    return gamma**t * _dmpo_printed(t, length, gamma)


def _trajectory(t: Tensor, length: Tensor, gamma: float) -> Tensor:
    return torch.ones_like(t)


def _mean(t: Tensor, length: Tensor, gamma: float) -> Tensor:
    return (1 / length).expand_as(t)


def _reversed(t: Tensor, length: Tensor, gamma: float) -> Tensor:
    return _dmpo(t, length, gamma).gather(1, (length - 1 - t).clamp(min=0).long())


def _matched(t: Tensor, length: Tensor, gamma: float) -> Tensor:
    total = _dmpo(t, length, gamma).where(t < length, 0.0).sum(dim=1, keepdim=True)
    return (total / length).expand_as(t)


_TABLES: dict[Discount, Callable[[Tensor, Tensor, float], Tensor]] = {
    Discount.DMPO: _dmpo,
    Discount.DMPO_PRINTED: _dmpo_printed,
    Discount.TRAJECTORY: _trajectory,
    Discount.MEAN: _mean,
    Discount.REVERSED: _reversed,
    Discount.PERMUTED: _dmpo,  # shuffled afterwards
    Discount.MATCHED: _matched,
}


def _shuffled(lengths: Tensor, longest: int, seed: int | Sequence[int]) -> Tensor:
    """[B, T] indices: each row's first `length` places shuffled, the others left."""
    seeds = [seed] * len(lengths) if isinstance(seed, int) else seed
    rows = []
    for length, row_seed in zip(lengths.tolist(), seeds, strict=True):
        order = random.Random(f"{row_seed}/{length}").sample(range(length), length)
        rows.append([*order, *range(length, longest)])
    return torch.tensor(rows, device=lengths.device)


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    weights_chosen: Tensor,
    weights_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """The multi-turn preference loss, a value a pair.

    The four log-prob tensors hold, for every turn, the *sum* of the log-probs of the turn's tokens. What stands beyond
    a trajectory's length is never looked at where its weight is 0.

    Args:
        policy_chosen: [B, T_w].
        policy_rejected: [B, T_l].
        reference_chosen: [B, T_w].
        reference_rejected: [B, T_l].
        weights_chosen: [B, T_w] from `discount`.
        weights_rejected: [B, T_l].
        beta: how strongly the policy is held to the reference, above 0.
        label_smoothing: share of pairs taken to be labelled the wrong way round (conservative DPO, Mitchell 2023,
            https://ericmitchell.ai/cdpo.pdf, eq. 3), in [0, 0.5).

    Raises:
        ValueError: beta or label_smoothing is out of range, or shapes do not go together.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be above 0.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} is outside [0, 0.5).")
    chosen_rewards = _reward(policy_chosen, reference_chosen, weights_chosen, beta)
    rejected_rewards = _reward(policy_rejected, reference_rejected, weights_rejected, beta)
    # Eq 14 (general phi) and Eq 16 (as printed): -log sigma( Phi(tau_w) - Phi(tau_l) ).
    logits = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return PreferenceLoss(losses, logits, chosen_rewards, rejected_rewards)


def _reward(policy: Tensor, reference: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Phi(tau) = sum_t beta phi(t,T) log( pi(a_t|s_t) / pi_ref(a_t|s_t) ), [B]."""
    if not policy.shape == reference.shape == weights.shape:
        raise ValueError(
            "Policy log-probs, reference log-probs and weights of one side must have one shape [B, T]; they have "
            f"{tuple(policy.shape)}, {tuple(reference.shape)} and {tuple(weights.shape)}."
        )
    ratios = (policy - reference).where(weights != 0, 0.0)
    return beta * (weights * ratios).sum(dim=1)
