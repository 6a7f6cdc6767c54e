"""Recordings of the official WebShop, which lie beside some checkouts and are no part of the project; two products."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from envs.webshop.goals import Draw, Product, draw

RECORDINGS = Path(__file__).parents[2] / "shared" / "webshop"
SEED = 4
"""What the recordings' global generator began at, just before the catalogue was loaded."""

recorded = pytest.mark.skipif(not RECORDINGS.is_dir(), reason=f"no recordings of the official WebShop in {RECORDINGS}")


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (RECORDINGS / name).read_text("utf-8").splitlines()]


def contents(name: str) -> Any:
    return json.loads((RECORDINGS / name).read_text("utf-8"))


def products() -> dict[str, Product]:
    return {product["asin"]: product for product in lines("products_main.jsonl")}


def drawn() -> Draw:
    return draw(products(), SEED, instructions=contents("catalogue_main/items_human_ins.json"))


class RecordedNouns:
    """What the recordings' tagger said."""

    name = "recorded"

    def __init__(self) -> None:
        self._nouns = {title: found["nouns"] for title, found in contents("nouns_standin.json").items()}

    def __call__(self, title: str) -> Sequence[str]:
        return self._nouns[title]


class Words:
    """Takes every word for a noun."""

    name = "words"

    def __call__(self, title: str) -> Sequence[str]:
        return title.lower().split()


def path(*parts: str) -> str:
    """A product category."""
    return " \N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK} ".join(parts)


def product(asin: str, title: str, **fields: Any) -> dict[str, Any]:
    """A product as loaded, plain where `fields` don't say otherwise."""
    plain = {
        "Description": "",
        "BulletPoints": ["plain"],
        "pricing": [20.0],
        "Price": "$20.0",
        "options": {},
        "Attributes": ["odd"],
        "MainImage": "",
        "query": "things",
        "category": "garden",
        "product_category": path("Home", "Things"),
        "Rating": "N.A.",
        "Reviews": [],
    }
    return {"asin": asin, "Title": title, **plain, **fields}


LAMP = product(
    "B0LAMP",
    "Floor Lamp",
    Description="A lamp for <dark> rooms.",
    BulletPoints=["Easy to clean", "", "Made of steel"],
    pricing=[30.0, 40.0],
    Price="$30.0 to $40.0",
    options={"color": ["black", "dark red"], "kind": ["next >", "with [bulb]"]},
    Attributes=["easy clean", "stainless steel"],
    query="floor lamps",
    product_category=path("Home", "Lamps", "Floor Lamps"),
)
MUG = product("b0mug", "Enamel Mug", options={"size": ["standard"]}, category="kitchen")
TWO = {each["asin"]: each for each in (LAMP, MUG)}
WRITTEN = {
    "B0LAMP": [
        {
            "instruction": "i want a black lamp.",
            "instruction_attributes": ["easy clean", "Made of"],
            "instruction_options": ["black"],
        },
        {"instruction": "skipped", "instruction_attributes": [], "instruction_options": []},
    ],
    "b0mug": [
        {"instruction": "find a mug...", "instruction_attributes": ["odd"], "instruction_options": ["tan"]},
    ],
}
"""What people wrote for the two products."""
