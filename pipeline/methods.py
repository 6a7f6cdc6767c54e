"""What `method=` may be. Kept apart from the losses so that reading a recipe does not load torch."""

from enum import StrEnum


class Discount(StrEnum):
    """How much each turn of a trajectory counts: phi(t, T), t from 0, T the trajectory's own number of turns."""

    DMPO = "dmpo"
    """gamma^t (1 - gamma^(T-t)) / (1 - gamma^T): Eq 15 put into Eq 14, and what the official code computes."""
    DMPO_PRINTED = "dmpo_printed"
    """(1 - gamma^(T-t)) / (1 - gamma^T): Eq 16 as printed."""
    TRAJECTORY = "trajectory"
    """1: DPO on whole trajectories, as ETO does. In no gamma of the DMPO family."""
    MEAN = "mean"
    """1/T: control for length normalisation alone."""
    REVERSED = "reversed"
    """DMPO's weights, last turn first: control for early turns counting more."""
    PERMUTED = "permuted"
    """DMPO's weights, shuffled: control for order."""
    MATCHED = "matched"
    """A constant with the sum of DMPO's weights: control for size alone."""

    @property
    def uses_gamma(self) -> bool:
        """Whether gamma makes a difference."""
        return self not in (Discount.TRAJECTORY, Discount.MEAN)
