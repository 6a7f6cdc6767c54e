"""What is minimised: the mean over tokens in SFT, over pairs in preference training; and what is logged beside it.

An objective is a pure function of per-turn log-probs and a collated micro-batch; shapes as in `pipeline/batches.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.batches import Side
from pipeline.losses import preference_loss

Metrics = dict[str, tuple[Tensor, Tensor]]
"""By name: a sum and the number of what was summed, both scalars or both [T] (by turn)."""


class SftObjective:
    """Mean negative log-prob of the policy's tokens: the items of a step are its tokens."""

    def items(self, example: tuple[Side, ...]) -> int:
        """How many items of the step an example is."""
        return example[0].rendered.trained_tokens

    def __call__(self, logprobs: list[Tensor], batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
        """The micro-batch's share of the step's loss, from one side's [P, T], and what to log."""
        loss = -(logprobs[0].sum(1) * batch["weight"]).sum()
        present = _present_turns(batch, 0)
        return loss, {"logprob_by_turn": _by_turn(logprobs[0], present)}


@dataclass(frozen=True)
class PreferenceObjective:
    """Mean preference loss: the items of a step are its pairs. See `losses.preference_loss`.

    Logged, means over the pairs since the last line:

    - `chosen_logprob`, `rejected_logprob`: of a whole trajectory; with `_by_turn`, of each turn, over the pairs that
      have one of that number; `chosen_logratio_by_turn`, `rejected_logratio_by_turn`: of each turn, less what it is
      under the reference, and so 0 at the start for whatever pairs;
    - `chosen_reward`, `rejected_reward` (Phi of the paper), their difference `margin`, and `accuracy`, the share of
      pairs with a positive one;
    - `kl`: how far the policy has gone from the reference, in nats a turn, on the rejected trajectories: mean over
      turns of r - 1 - log r, r = policy / reference (Schulman's k3, http://joschu.net/blog/kl-approx.html). Never
      negative and of low variance near 0. It would estimate KL(reference || policy) if these turns were a fair sample
      of the reference at temperature 1; they are those that lost, and a few are the expert's;
    - `chosen_nll`, the winner's mean negative log-prob a token, which `nll` times is added to the loss.
    """

    beta: float
    label_smoothing: float = 0.0
    nll: float = 0.0
    """Weight of the SFT term (Pang et al. 2024, arXiv 2404.19733, eq. 2), whose mean is over tokens here."""

    def items(self, example: tuple[Side, ...]) -> int:
        """How many items of the step an example is."""
        return 1

    def __call__(self, logprobs: list[Tensor], batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
        """The micro-batch's share of the step's loss, from [P, T] of chosen and rejected, and what to log."""
        chosen, rejected = batch["sides"]
        losses, logits, chosen_rewards, rejected_rewards = preference_loss(
            logprobs[0],
            logprobs[1],
            chosen["reference"],
            rejected["reference"],
            chosen["weights"],
            rejected["weights"],
            self.beta,
            self.label_smoothing,
        )
        tokens = (chosen["turn_index"] >= 0).sum(1).clamp(min=1)
        chosen_nll = -logprobs[0].sum(1) / tokens
        loss = ((losses + self.nll * chosen_nll) * batch["weight"]).sum()
        with torch.no_grad():
            pairs = (batch["weight"] > 0).float()
            sides = [_present_turns(batch, 0), _present_turns(batch, 1)]
            ratios = [
                (ours - side["reference"]).where(present > 0, 0.0)
                for ours, side, present in zip(logprobs, batch["sides"], sides, strict=True)
            ]
            metrics = {
                "chosen_logprob": _over(logprobs[0].sum(1), pairs),
                "rejected_logprob": _over(logprobs[1].sum(1), pairs),
                "chosen_reward": _over(chosen_rewards, pairs),
                "rejected_reward": _over(rejected_rewards, pairs),
                "margin": _over(logits, pairs),
                "accuracy": _over((logits > 0).float(), pairs),
                "chosen_nll": _over(chosen_nll, pairs),
                "kl": _over(ratios[1].expm1() - ratios[1], sides[1]),
                "chosen_logprob_by_turn": _by_turn(logprobs[0], sides[0]),
                "rejected_logprob_by_turn": _by_turn(logprobs[1], sides[1]),
                "chosen_logratio_by_turn": _by_turn(ratios[0], sides[0]),
                "rejected_logratio_by_turn": _by_turn(ratios[1], sides[1]),
            }
        return loss, metrics


def _present_turns(batch: dict[str, Any], side: int) -> Tensor:
    """[P, T], 1.0 where a trajectory of a real example has a turn of that number."""
    turns = batch["sides"][side]["turn_index"].amax(1) + 1
    width = int(turns.max())
    turns = turns * (batch["weight"] > 0)
    present: Tensor = torch.arange(width, device=turns.device) < turns[:, None]
    return present.float()


def _over(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the values that are present."""
    return (values.detach() * present).sum(), present.sum()


def _by_turn(logprobs: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number over the examples, for each turn: [T] both."""
    return (logprobs.detach() * present).sum(0), present.sum(0)
