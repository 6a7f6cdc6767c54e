"""Which goals a policy learns from and which it is tested on, and their content ids."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from envs.webshop.goals import Goal
from envs.webshop.settings import Settings

UNSEEN_SHARE, SEEN_SHARE = 1 / 6, 1 / 4
"""Most that splits of our own set aside: of the categories for unseen, of what is left for seen."""

Groups = dict[str, list[int]]
"""Numbers of goals by their product or category."""

OFFICIAL = {"train": "train_indices.json", "seen": "test_indices.json"}
"""The index files published with ETO (eval_agent/data/webshop): lists of session numbers."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Numbers of goals by split."""

    goals: dict[str, list[int]]
    left_out: dict[str, int] = field(default_factory=dict)
    """Goals that no split plays, or entries of the official lists, counted by the reason."""


def content_id(number: int, goal: Goal) -> str:
    """`webshop:goal-<number>-<first 8 hex digits of the instruction's SHA-256>`."""
    return f"webshop:goal-{number}-{hashlib.sha256(goal['instruction_text'].encode()).hexdigest()[:8]}"


def split(goals: Sequence[Goal], settings: Settings) -> Splits:
    """The splits of the settings: official lists, or our own, which share no product, and with unseen no category.

    Tests of our own are of as many products as goals: those of one product tell little more than one of them.

    Raises:
        ValueError: an official list is missing or malformed, or names a goal that there is not.
    """
    if settings.splits is not None:
        return _official(goals, settings, settings.splits)
    categories = _grouped(goals, range(len(goals)), "product_category")
    names = sorted(categories)
    random.Random("unseen categories").shuffle(names)
    aside = int(len(names) * UNSEEN_SHARE)
    unseen = _grouped(goals, [number for name in names[:aside] for number in categories[name]], "asin")
    rest = _grouped(goals, [number for name in names[aside:] for number in categories[name]], "asin")
    products = sorted(rest)
    random.Random("seen products").shuffle(products)
    tested = products[: min(settings.seen_goals, int(len(products) * SEEN_SHARE))]
    known = {goals[rest[asin][0]]["product_category"] for asin in products[len(tested) :]}
    seen = [rest.pop(asin) for asin in tested if goals[rest[asin][0]]["product_category"] in known]
    train = [number for numbers in rest.values() for number in numbers]
    others = sum(map(len, seen)) - len(seen)
    return Splits(
        {
            "train": _shuffled(train, "train")[: settings.train_goals],
            "seen": _shuffled(_one_each(goals, seen), "seen"),
            "unseen": _shuffled(_one_each(goals, unseen.values()), "unseen")[: settings.unseen_goals],
        },
        {"for a product that another goal tests": others} if others else {},
    )


def _official(goals: Sequence[Goal], settings: Settings, folder: Path) -> Splits:
    """ETO's test list as seen; its train list without what is tested; unseen from goals that neither list touches.

    The published lists overlap: 21 of the 200 test goals are also in train, and one train goal is there twice.
    """
    lists = published(folder, len(goals))
    seen = list(dict.fromkeys(lists["seen"]))
    once = list(dict.fromkeys(lists["train"]))
    train = [number for number in once if number not in set(seen)]
    used = {goals[number]["product_category"] for number in train}
    tested = {goals[number]["asin"] for number in seen}
    unseen = [
        number
        for number, goal in enumerate(goals)
        if goal["product_category"] not in used and goal["asin"] not in tested
    ]
    left_out = {
        "in the train list twice": len(lists["train"]) - len(once),
        "in the train and the test list": len(once) - len(train),
    }
    return Splits(
        {
            "train": train[: settings.train_goals],
            "seen": seen,
            "unseen": _shuffled(unseen, "unseen")[: settings.unseen_goals],
        },
        {reason: count for reason, count in left_out.items() if count},
    )


def published(folder: Path, goals: int) -> dict[str, list[int]]:
    """Numbers of goals in ETO's train and test list (the seen split), as the files of a folder have them.

    Raises:
        ValueError: a list is missing or malformed, or names a goal beyond the catalogue's `goals`.
    """
    return {name: _numbers(folder.expanduser() / file, goals) for name, file in OFFICIAL.items()}


def _numbers(file: Path, goals: int) -> list[int]:
    try:
        numbers = TypeAdapter(list[int]).validate_json(file.read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ValueError(
            f"env.webshop.splits: {file} is no list of goals' numbers ({why}); the folder has to hold "
            f"{' and '.join(OFFICIAL.values())} as published with ETO (`python -m pipeline fetch webshop-splits`)."
        ) from None
    if wrong := [number for number in numbers if not 0 <= number < goals]:
        raise ValueError(f"{file}: there is no goal {wrong[0]}; this catalogue has goals 0 to {goals - 1}.")
    return numbers


def check(goals: Sequence[Goal], splits: Mapping[str, Sequence[int]], *, products: bool) -> None:
    """Refuse splits that leak.

    Args:
        goals: all of them.
        splits: numbers of goals.
        products: whether splits may not share a product either; the official lists do.

    Raises:
        ValueError: unseen has a category of train, or two splits share a product.
    """
    categories = {name: {goals[number]["product_category"] for number in numbers} for name, numbers in splits.items()}
    if shared := categories["train"] & categories["unseen"]:
        raise ValueError(f"WebShop's unseen goals share a category with its training goals: {sorted(shared)[0]!r}.")
    owner: dict[str, str] = {}
    for name, numbers in splits.items() if products else ():
        for number in numbers:
            asin = goals[number]["asin"]
            if owner.setdefault(asin, name) != name:
                raise ValueError(f"WebShop's {owner[asin]} and {name} goals share the product {asin}.")


def _grouped(goals: Sequence[Goal], numbers: Iterable[int], field: Literal["asin", "product_category"]) -> Groups:
    """Numbers of goals by what one of their fields says."""
    groups: Groups = defaultdict(list)
    for number in numbers:
        groups[goals[number][field]].append(number)
    return groups


def _one_each(goals: Sequence[Goal], products: Iterable[Sequence[int]]) -> list[int]:
    """One goal of each product, whatever the others are."""
    return [random.Random(goals[numbers[0]]["asin"]).choice(sorted(numbers)) for numbers in products]


def _shuffled(numbers: Sequence[int], name: str) -> list[int]:
    """In an order that hangs on nothing but the numbers, so that the first so many are a fair draw."""
    return random.Random(f"order of {name}").sample(sorted(numbers), len(numbers))
