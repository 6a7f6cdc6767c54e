"""What WebShop leaves to chance before an episode: purchase prices, the goals' price ceilings, and the goals' order.

Official code: `web_agent_site/engine/goal.py`, `generate_product_prices` of `engine/engine.py`, `random_idx` of
`utils.py` and the constructor of `envs/web_agent_text_env.py` (https://github.com/princeton-nlp/WebShop, 64fa2a5). All
of it draws from Python's global generator, which nobody seeds before prices and ceilings are drawn: two official
processes ask for other prices. Here they come from a `random.Random` of the caller's, in the official order of draws:

1. the purchase price of each product with two prices, in the catalogue's order (`draw_prices`);
2. the ceiling of each goal, product by product: one draw per human instruction, or one per product with a synthetic
   one, shared by all combinations of its options (`human_goals`, `synthetic_goals`);
3. a generator that begins at 233 shuffles the goals, picks `limit` of them, and goes on to name sessions and to choose
   their goals (`shuffled`). The order therefore depends on the number of goals alone.

`draw` does all three. A seed of 4 gives what official runs give that import `web_agent_site.models` first, which seeds
the global generator with 4 (`run_envs/run_web_agent_text_env.py` does).
"""

import bisect
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

Product = Mapping[str, Any]
"""A product as loaded: asin, Title, Description, BulletPoints, pricing, Price, options, Attributes, query, ..."""

Profile = Literal["official", "fixed"]
"""`official`: as published numbers were made; `fixed`: plain bugs mended, see the table in `envs.webshop.text`."""

SHUFFLE_SEED = 233
CEILINGS = tuple(10.0 * step for step in range(1, 100))
NO_CEILING = 1000000
CEILING = re.compile(r",? and price (lower than [\d.]+ dollars)(?= \[SEP\]|$)")
"""The clause that an instruction ends with where its goal has a price ceiling; on a page a separator follows."""

_OF_INSTRUCTION = ("instruction", "instruction_attributes", "instruction_options")


class Goal(TypedDict):
    """What a customer wants, with the official names."""

    asin: str
    category: str
    query: str
    name: str
    """The product's title."""
    product_category: str
    instruction_text: str
    attributes: list[str]
    price_upper: float
    goal_options: list[str] | dict[str, str]
    """Values (human goals), or values by the options' names (synthetic ones)."""
    weight: float
    """Share in random draws of a goal, not normalised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Everything that is drawn once for a catalogue and a seed."""

    prices: dict[str, float]
    """What each product costs at the till."""
    goals: list[Goal]
    """In the order that sessions' numbers index."""
    random_state: tuple[Any, ...]
    """Where the generator stands that then names sessions and chooses their goals (`random.Random.setstate`)."""


def draw(
    products: Mapping[str, Product],
    seed: int,
    *,
    pricings: Iterable[tuple[str, Sequence[float]]] | None = None,
    instructions: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
    limit: int | None = None,
    profile: Profile = "official",
) -> Draw:
    """Prices and goals of a catalogue: human goals if `instructions` are given, else synthetic ones of `attributes`.

    Args:
        products: The products by asin, in the catalogue's order.
        seed: Begins the draws of prices and ceilings.
        pricings: Each asin's prices, where the catalogue has them at hand without reading all products.
        instructions: Contents of `items_human_ins.json`.
        attributes: Contents of `items_ins_v2.json`.
        limit: How many goals to keep, picked by their weights (`limit_goals`); None keeps all.
        profile: Whether the first goal can be picked.
    """
    rng = random.Random(seed)
    prices = draw_prices(pricings or ((asin, product["pricing"]) for asin, product in products.items()), rng)
    if instructions is not None:
        goals = human_goals(products, instructions, prices, rng)
    else:
        goals = synthetic_goals(products, attributes or {}, prices, rng)
    goals, after = shuffled(goals, limit=limit, profile=profile)
    return Draw(prices=prices, goals=goals, random_state=after.getstate())


def draw_prices(pricings: Iterable[tuple[str, Sequence[float]]], rng: random.Random) -> dict[str, float]:
    """What each product costs: its price, or one drawn between its first two (in either order)."""
    return {
        asin: rng.uniform(pricing[0], pricing[1]) if len(pricing) > 1 else pricing[0] if pricing else 100.0
        for asin, pricing in pricings
    }


def human_goals(
    products: Mapping[str, Product],
    instructions: Mapping[str, Sequence[Mapping[str, Any]]],
    prices: Mapping[str, float],
    rng: random.Random,
) -> list[Goal]:
    """A goal for each person's instruction that names attributes, in the catalogue's order.

    Raises:
        ValueError: an instruction lacks a field; names the asin and the field.
    """
    goals = []
    for asin in products:
        for written in instructions.get(asin, ()):
            if missing := [name for name in _OF_INSTRUCTION if name not in written]:
                raise ValueError(f"items_human_ins: an instruction for {asin!r} has no {missing[0]!r}.")
            if not written["instruction_attributes"]:
                continue
            ceiling, clause = _ceiling(prices[asin], rng)
            goal = _goal(products[asin], written["instruction"].strip(".") + clause, ceiling)
            goal["attributes"] = list(written["instruction_attributes"])
            goal["goal_options"] = written["instruction_options"]
            goals.append(goal)
    return goals


def synthetic_goals(
    products: Mapping[str, Product],
    attributes: Mapping[str, Mapping[str, Any]],
    prices: Mapping[str, float],
    rng: random.Random,
) -> list[Goal]:
    """A goal for each combination of option values of each product that has a synthetic instruction.

    A product with an option that has no values has no combination, hence no goal, but draws its ceiling.

    Raises:
        ValueError: a product has no entry in `attributes`, or an instruction without attributes.
    """
    goals = []
    for asin in products:
        if asin not in attributes:
            raise ValueError(f"Synthetic goals need an entry for every product in items_ins_v2: {asin!r} has none.")
        entry = attributes[asin]
        if (instruction := entry.get("instruction")) is None:
            continue
        wanted, product = entry.get("instruction_attributes"), products[asin]
        if not wanted:
            raise ValueError(f"items_ins_v2 has an instruction for {asin!r}, but no instruction_attributes.")
        ceiling, clause = _ceiling(prices[asin], rng)
        for options in _combinations(product["options"]):
            text = ", and ".join(f"{name}: {value}" for name, value in options.items())
            goal = _goal(product, f"{instruction}{' with ' + text if text else ''}{clause}", ceiling)
            goal["attributes"] = list(wanted)
            goal["goal_options"] = options
            goals.append(goal)
    count = Counter(attribute for goal in goals for attribute in goal["attributes"])
    for goal in goals:
        goal["weight"] = sum(1.0 / count[attribute] for attribute in goal["attributes"]) / len(goal["attributes"])
    return goals


def shuffled(
    goals: Sequence[Goal], *, limit: int | None = None, profile: Profile = "official"
) -> tuple[list[Goal], random.Random]:
    """The goals in the official order, `limit` of them, and the generator as the official constructor leaves it.

    Raises:
        ValueError: `limit` is below 0.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit_goals must be 0 or more, not {limit}.")
    rng = random.Random(SHUFFLE_SEED)
    order = list(goals)
    rng.shuffle(order)
    if limit is None or limit >= len(order):
        return order, rng
    totals = cumulative(order)
    picked: dict[int, None] = {}
    while len(picked) < limit:
        picked[random_index(totals, rng, profile)] = None
    return [order[index] for index in picked], rng


def cumulative(goals: Iterable[Goal]) -> list[float]:
    """Running totals of the goals' weights, from 0."""
    return list(itertools.accumulate((goal["weight"] for goal in goals), initial=0))


def random_index(totals: Sequence[float], rng: random.Random, profile: Profile = "official") -> int:
    """Draw a goal by its weight.

    As official, the result is one too high: goal 0 is never drawn, and the last one also for the one before it.
    """
    found = bisect.bisect(totals, rng.uniform(0, totals[-1]))
    return min(found if profile == "official" else found - 1, len(totals) - 2)


def _ceiling(price: float, rng: random.Random) -> tuple[float, str]:
    """The most a goal wants to pay, drawn from the four next tens above the price, and the instruction's clause."""
    start = bisect.bisect_right(CEILINGS, price)
    choices = CEILINGS[start : start + 4]
    if len(choices) < 2:
        return NO_CEILING, ""
    ceiling = max(rng.sample(choices, 2))
    return ceiling, f", and price lower than {ceiling:.2f} dollars"


def _goal(product: Product, instruction: str, ceiling: float) -> Goal:
    return Goal(
        asin=product["asin"],
        category=product["category"],
        query=product["query"],
        name=product["Title"],
        product_category=product["product_category"],
        instruction_text=instruction,
        attributes=[],
        price_upper=ceiling,
        goal_options=[],
        weight=1,
    )


def _combinations(options: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """Every choice of one value per option, the options sorted by name."""
    names = sorted(options)
    for values in itertools.product(*(options[name] for name in names)):
        yield dict(zip(names, values, strict=True))
