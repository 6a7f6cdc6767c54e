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


class Method(StrEnum):
    """How a policy is made of policy 0, the SFT policy."""

    SFT = "sft"
    """Policy 0 itself; every table has it, named or not."""
    BON = "bon"
    """Policy 0, of whose `bon.samples` attempts at a task the best counts (Best-of-N of ETO and the paper): what
    sampling alone could reach. Not a policy that can be had, since the environment's reward does the choosing."""
    RFT = "rft"
    """Rejection-sampled fine-tuning: SFT goes on, on the experts and policy 0's own successes (Yuan et al. 2023,
    arXiv 2308.01825)."""
    DPO = "dpo"
    """DPO on whole trajectories, every turn's weight 1; also called `trajectory`."""
    ETO = "eto"
    """`dpo` in two rounds or, with `train.rounds`, more: each explores with the policy of the one before."""
    DPO_NORM = "dpo_norm"
    """Length-normalised DPO: a trajectory's log-ratio divided by its number of the policy's tokens, and so with a beta
    some fifty times as large (Lambert et al. 2024, arXiv 2411.15124, take 5)."""
    DMPO = "dmpo"
    """The paper's: turns discounted by DMPO's weights."""
    DMPO_PRINTED = "dmpo_printed"
    """With the weights of Eq 16 as printed."""
    MEAN = "mean"
    """Control: 1/T."""
    REVERSED = "reversed"
    """Control: DMPO's weights, last turn first."""
    PERMUTED = "permuted"
    """Control: DMPO's weights, shuffled."""
    MATCHED = "matched"
    """Control: a constant with the sum of DMPO's weights."""
    STEP = "step"
    """DPO on what follows a step of the expert's, the step's worth estimated by rollouts from there (Xiong et al. 2024,
    IPR, arXiv 2406.11176)."""

    @classmethod
    def _missing_(cls, value: object) -> "Method | None":
        return cls.DPO if value == Discount.TRAJECTORY else None

    @property
    def discount(self) -> Discount | None:
        """The weights of its preference loss; None where it has no such loss."""
        match self:
            case Method.SFT | Method.BON | Method.RFT:
                return None
            case Method.DPO | Method.ETO | Method.STEP | Method.DPO_NORM:
                return Discount.TRAJECTORY
        return Discount(self.value)

    @property
    def is_trained(self) -> bool:
        """Whether it has a policy of its own."""
        return self not in (Method.SFT, Method.BON)
