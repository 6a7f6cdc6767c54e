"""Which example stands where in a run, and how a micro-batch is padded.

How a run is laid out decides most of what can go wrong, so it is fixed before the first step: `order_examples` says
which example stands at which place of which optimizer step, for all epochs. From that follow, without more machinery:

- An optimizer step holds the same examples however it is split into micro-batches and processes, and its loss is the
  mean over *its* items (tokens in SFT, pairs in preference training): each example carries 1 / (items of its step).
- A step with too few examples (the end of an epoch) is filled up with places that weigh nothing, so that every process
  does the same number of passes and nothing is dropped or seen twice.
- Resuming skips the places already done; the order does not hang on any random state.
- Micro-batches hold sequences of like length (little padding), while the optimizer's batches stay random ones.

Shapes: P examples of a micro-batch, L tokens of its longest sequence, T turns of its longest trajectory. A *side* is
one trajectory of each example: SFT has one, a preference pair has two, chosen and rejected, padded apart.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from pipeline.rendering import Rendered


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One trajectory of an example."""

    rendered: Rendered
    reference: Sequence[float] = ()
    """Log-prob of each turn under the reference policy."""
    weights: Sequence[float] = ()
    """Discount phi(t, T) of each turn."""


class Placed(NamedTuple):
    """An example at its place in the run."""

    sides: tuple[Side, ...]
    weight: float
    """1 / (items of its optimizer step); 0 where the place is empty."""


def collate(places: Sequence[Placed]) -> dict[str, Any]:
    """Pad a micro-batch on the right, each side to its own longest sequence.

    Padding has id 0, mask 0, turn -1, log-prob and weight 0; it only brings rows into one tensor, and where the model
    allows it is not computed (`pipeline/packing.py`).

    Worked example, two pairs, sides A/B and C/D, of a step of four pairs:

        A  ids 5 6 7 8  turn_index -1  0 -1  1  reference -1.5 -2.0  weights 1.0 0.5
        B  ids 5 9 4    turn_index -1  0  0     reference -3.0       weights 1.0
        C  ids 5 6      turn_index -1  0        reference -0.5       weights 1.0
        D  ids 5 7 7 7  turn_index -1  0 -1  1  reference -4.0 -1.0  weights 1.0 0.5

        weight [0.25, 0.25]
        sides[0] (A, C)  input_ids   [[ 5, 6, 7, 8], [ 5, 6, 0, 0]]
                         turn_index  [[-1, 0,-1, 1], [-1, 0,-1,-1]]
                         reference   [[-1.5, -2.0], [-0.5, 0.0]]
                         weights     [[ 1.0,  0.5], [ 1.0, 0.0]]
        sides[1] (B, D)  input_ids   [[ 5, 9, 4, 0], [ 5, 7, 7, 7]]
                         turn_index  [[-1, 0, 0,-1], [-1, 0,-1, 1]]
                         reference   [[-3.0, 0.0], [-4.0, -1.0]]
                         weights     [[ 1.0, 0.0], [ 1.0, 0.5]]

    Returns:
        `weight` [P] and `sides`, for each a dict of `input_ids`, `attention_mask` and `turn_index` [P, L], `reference`
        and `weights` [P, T]; the last two are [P, 0] where the objective needs none.
    """
    return {
        "weight": torch.tensor([place.weight for place in places]),
        "sides": [pad(sides) for sides in zip(*(place.sides for place in places), strict=True)],
    }


def pad(sides: Sequence[Side]) -> dict[str, Tensor]:
    """One side of a micro-batch as tensors; see `collate`."""

    def padded(rows: Iterable[Sequence[float]], value: float, dtype: torch.dtype) -> Tensor:
        return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": padded((side.rendered.ids for side in sides), 0, torch.long),
        "attention_mask": padded(([1] * len(side.rendered.ids) for side in sides), 0, torch.long),
        "turn_index": padded((side.rendered.turn_index for side in sides), -1, torch.long),
        "reference": padded((side.reference for side in sides), 0.0, torch.float32),
        "weights": padded((side.weights for side in sides), 0.0, torch.float32),
    }


def order_examples(lengths: Sequence[int], batch_size: int, epochs: float | Fraction, seed: int) -> list[int]:
    """Which example stands at each place of a whole run.

    An epoch is a random permutation cut into optimizer steps. Within a step the longest example comes first, so that a
    micro-batch holds like lengths; which examples share a step is left to chance.

    Args:
        lengths: of the examples, in tokens.
        batch_size: examples of one optimizer step.
        epochs: may end within an epoch, after a whole number of steps.
        seed: of the permutations.

    Returns:
        Indices into `lengths`, a multiple of `batch_size` of them; -1 fills up the last step of each epoch.
    """
    steps_per_epoch = math.ceil(len(lengths) / batch_size)
    steps = math.ceil(epochs * steps_per_epoch)
    order: list[int] = []
    for epoch in range(math.ceil(epochs)):
        shuffled = random.Random(f"{seed}/{epoch}").sample(range(len(lengths)), len(lengths))
        for start in range(0, len(shuffled), batch_size):
            step = sorted(shuffled[start : start + batch_size], key=lambda index: -lengths[index])
            order += step + [-1] * (batch_size - len(step))
    return order[: steps * batch_size]


class Run(Dataset[Placed]):
    """All places of a run, in order, as the Trainer's dataset: its one epoch is the whole run."""

    def __init__(
        self,
        examples: Sequence[tuple[Side, ...]],
        items: Sequence[int],
        *,
        batch_size: int,
        epochs: float | Fraction,
        seed: int,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        lengths = [sum(len(side.rendered.ids) for side in example) for example in examples]
        self._order = order_examples(lengths, batch_size, epochs, seed)
        self._items = items
        self._empty = (_EMPTY,) * len(examples[0])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Placed:
        index = self._order[place]
        if index < 0:
            return Placed(self._empty, 0.0)
        return Placed(self.examples[index], 1 / sum(self._items[other] for other in self._step(place)))

    def _step(self, place: int) -> list[int]:
        """The examples of a place's optimizer step."""
        start = place - place % self.batch_size
        return [index for index in self._order[start : start + self.batch_size] if index >= 0]

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self._order) // self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every example once."""
        return math.ceil(len(self.examples) / self.batch_size)

    @property
    def max_turns(self) -> int:
        """Turns of the longest trajectory."""
        return max(side.rendered.turns for example in self.examples for side in example)

    def tokens(self, since: int = 0, trained: bool = False) -> int:
        """Tokens seen from optimizer step `since` to the end, padding not counted; or the policy's among them."""
        seen = (self.examples[index] for index in self._order[since * self.batch_size :] if index >= 0)
        sides = (side.rendered for example in seen for side in example)
        return sum(side.trained_tokens if trained else len(side.ids) for side in sides)


_EMPTY = Side(rendered=Rendered(ids=[0, 0], turn_index=[-1, 0]), reference=(0.0,), weights=(1.0,))
"""Stands at an empty place and weighs nothing. It has a turn, so that every weight of the model has a gradient."""


def check(examples: Sequence[tuple[Side, ...]]) -> None:
    """Refuse what cannot be trained on."""
    if not examples:
        raise ValueError("There is nothing to train on: no example is left. The stages before say what was dropped.")
    for number, example in enumerate(examples):
        for name, side in zip(("chosen", "rejected") if len(example) == 2 else ("trajectory",), example, strict=True):
            if not side.rendered.trained_tokens:
                raise ValueError(
                    f"Example {number}, {name}: none of its {len(side.rendered.ids)} tokens is the policy's, so "
                    "there is nothing to learn from it. Leave it out."
                )
            if len(example) == 2 and len(side.reference) != side.rendered.turns:
                raise ValueError(
                    f"Pair {number}, {name}: {side.rendered.turns} turns and {len(side.reference)} reference "
                    "log-probs. Run the stage `reference` again on these pairs."
                )
