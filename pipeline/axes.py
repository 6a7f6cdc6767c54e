"""What a study varies: the number that its arms differ in, and which of them lie on one line over it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.arms import Arm

LEAST = 3
"""Points of a line: two show no course."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Arms as points over a number."""

    key: str
    """The recipe's key, such as `train.beta`."""
    values: list[float]
    """Every value of the key, rising."""
    lines: Mapping[str, Mapping[float, str]]
    """For each line, by what sets it apart from the other lines: the arm at each of its values."""


def axis(arms: Sequence[Arm]) -> Axis | None:
    """The numeric key with the most values over the arms; None where none has three, or not on every line.

    A key that goes with the axis (a longest and a shortest length) or with another key (beta with the method) makes no
    lines of its own.

    Args:
        arms: the arms that a recipe names.
    """
    keys = list(dict.fromkeys(key for arm in arms for key in arm.differs))
    columns: dict[str, list[Any]] = {"method": [arm.method.value for arm in arms]}
    columns |= {key: [_value(arm, key) for arm in arms] for key in keys}
    varying = {key: column for key, column in columns.items() if len(set(map(str, column))) > 1}
    numeric = {key: len(set(column)) for key, column in varying.items() if all(map(_is_number, column))}
    key = max(numeric, key=numeric.__getitem__, default="")
    if numeric.get(key, 0) < LEAST:
        return None
    apart: dict[str, list[Any]] = {}
    for other, column in varying.items():
        if other != key and not any(_follows(column, given) for given in [varying[key], *apart.values()]):
            apart[other] = column
    lines: dict[str, dict[float, str]] = {}
    for place, arm in enumerate(arms):
        told = {other: column[place] for other, column in apart.items()}
        lines.setdefault(_label(told) or "policy", {})[varying[key][place]] = arm.name
    if any(len(line) < LEAST for line in lines.values()) or sum(map(len, lines.values())) < len(arms):
        return None
    return Axis(key, sorted(set(varying[key])), lines)


def _value(arm: Arm, key: str) -> Any:
    """An arm's value of a key, the recipe's where it has none of its own."""
    found: Any = arm.config
    for name in key.split("."):
        found = getattr(found, name, None)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _follows(column: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether one key's value is settled by another's."""
    return len(set(map(str, zip(column, given, strict=True)))) == len(set(map(str, given)))


def _label(told: Mapping[str, Any]) -> str:
    """A line's name: the bare method, and the last word of every other key with its value."""
    return ", ".join(
        str(value) if key == "method" else f"{key.rpartition('.')[2]} {value}" for key, value in told.items()
    )
