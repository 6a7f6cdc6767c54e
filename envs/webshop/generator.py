"""A WebShop catalogue of our own, in the formats of the official files: what is played where those can't be had.

`kinds.yaml` says what is sold: kinds of products in the five official categories, the words for them, what can be said
of them, their options and prices. A product is drawn from its kind: brand, title, bullet points, options, price. Some
of the products have an instruction as a person would write it; as in the official files, it asks for some of the
attributes and options of its product, in other words than the title's.

Nothing is copied from the official files. What follows them: the keys, the share of price ranges and missing prices,
one to three options, one or two wanted attributes. What does not: titles and texts are shorter, and every product is
one that the site can sell.
"""

import functools
import hashlib
import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

KINDS = Path(__file__).with_name("kinds.yaml")

INSTRUCTIONS = 12_000
"""Most instructions of a catalogue; the official one has about as many. They are spread evenly over its products."""

PATH_SEPARATOR = " \N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK} "

CONSONANTS, VOWELS = "BCDFGHJKLMNPRSTVWXYZ", "AEIOU"
SYLLABLES = tuple(first + second for first in CONSONANTS for second in VOWELS)
STEP = 38_196_601
"""From one asin to the next; shares no factor with their number, and so meets each one once."""

BRAND_BEGINNINGS = ("Al", "Bel", "Cor", "Da", "El", "Fen", "Gar", "Hol", "Iv", "Jun", "Kel", "Lor", "Mar", "Nor", "Or")
BRAND_MIDDLES = ("a", "an", "e", "en", "i", "in", "o", "on", "u", "ar")
BRAND_ENDINGS = ("bay", "by", "dale", "dora", "field", "ford", "land", "lin", "mere", "na", "rix", "ta", "tex", "ville")

STYLES = ("Classic", "Deluxe", "Essential", "Everyday", "Modern", "Premium", "Pro", "Signature", "Simple", "Vintage")

REASONS = ("made to last", "for every day", "you will not want to miss it", "our customers love it", "easy to care for")

OPENINGS = (
    "i am looking for {what}",
    "i need {what}",
    "i want {what}",
    "i want to buy {what}",
    "i'd like {what}",
    "i would like to get {what}",
    "find me {what}",
    "show me {what}",
    "please get me {what}",
    "can you find {what}",
    "looking for {what}",
    "buy {what}",
)
"""How people begin to say what they want."""

SAID = {
    "color": ("in {0}", "in {0} color", "the color should be {0}", "i want the {0} one"),
    "size": ("in size {0}", "in {0}", "the size should be {0}", "i need it in {0}"),
    "scent": ("with {0} scent", "that smells of {0}", "i prefer the {0} scent"),
    "flavor name": ("in {0} flavor", "with {0} flavor", "i like the {0} flavor"),
    "": ("in {0}", "the {1} should be {0}", "i would like the {0} {1}"),
}
"""How people name an option's value ({0}) by the option ({1}); a part that begins with `i` or `the` is a clause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of products."""

    query: str
    """What people would search for; the official `query` of its products."""
    category: str
    path: str
    """The official `product_category`."""
    nouns: tuple[str, ...]
    attributes: tuple[str, ...]
    options: dict[str, tuple[str, ...]]
    prices: tuple[float, float]
    """Dollars, from and to."""
    endings: tuple[str, ...]
    """How titles may end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A product before it is dressed in the official form."""

    kind: Kind
    noun: str
    attributes: list[str]
    options: dict[str, list[str]]


@functools.cache
def kinds() -> tuple[Kind, ...]:
    """The kinds of `kinds.yaml`."""
    told = yaml.safe_load(KINDS.read_text("utf-8"))
    return tuple(
        Kind(
            query=query,
            category=name,
            path=PATH_SEPARATOR.join([category["path"], *kind["path"]]),
            nouns=tuple(kind["nouns"]),
            attributes=tuple(kind["attributes"]),
            options={
                option: tuple(told["lists"][values] if isinstance(values, str) else values)
                for option, values in kind["options"].items()
            },
            prices=(kind["prices"][0], kind["prices"][1]),
            endings=tuple(kind["for"]),
        )
        for name, category in told["categories"].items()
        for query, kind in category["kinds"].items()
    )


def version() -> str:
    """What a catalogue depends on besides its size and seed: this module and `kinds.yaml`, hashed."""
    return hashlib.sha256(Path(__file__).read_bytes() + KINDS.read_bytes()).hexdigest()[:16]


def write(folder: Path, products: int, seed: int) -> None:
    """Write a catalogue's three files into a folder; the same arguments write the same bytes.

    Args:
        folder: must be there.
        products: how many.
        seed: another seed makes other products.

    Raises:
        ValueError: more products than there are asins.
    """
    entries: dict[str, Any] = {}
    human: dict[str, Any] = {}
    with (folder / "items_shuffle.json").open("w", encoding="utf-8") as file:
        for number, (product, entry, written) in enumerate(
            tqdm(generate(products, seed), "webshop: making products", products, disable=None)
        ):
            file.write(("[" if number == 0 else ",") + json.dumps(product) + "\n")
            entries[product["asin"]] = entry
            if written:
                human[product["asin"]] = [written]
        file.write("]\n")
    for name, contents in (("items_ins_v2", entries), ("items_human_ins", human)):
        (folder / f"{name}.json").write_text(json.dumps(contents) + "\n", "utf-8")


def generate(products: int, seed: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]]:
    """Raw products, their entries of items_ins_v2, and for some what a person wrote.

    Raises:
        ValueError: more products than there are asins.
    """
    rng = random.Random(f"webshop {products} {seed}")
    order: list[Kind] = []
    for number, asin in enumerate(_asins(seed, products)):
        order = order or rng.sample(kinds(), len(kinds()))  # each kind as often as any other
        draft = _draft(order.pop(), rng)
        product, entry = _product(asin, draft, number, rng), _entry(draft, rng)
        most = min(INSTRUCTIONS, products)
        is_told = most * (number + 1) // products > most * number // products
        yield product, entry, {"asin": asin, **_written(draft, rng)} if is_told else None


def _asins(seed: int, count: int) -> Iterator[str]:
    """So many different asins: `B0` and four syllables, which small vocabularies can spell."""
    most = len(SYLLABLES) ** 4
    if count > most:
        raise ValueError(f"A catalogue of our own has at most {most} products, not {count}.")
    first = random.Random(f"asins {seed}").randrange(most)
    for number in range(count):
        rest = (first + number * STEP) % most
        text = ""
        for _ in range(4):
            rest, syllable = divmod(rest, len(SYLLABLES))
            text += SYLLABLES[syllable]
        yield f"B0{text}"


def _draft(kind: Kind, rng: random.Random) -> Draft:
    return Draft(
        kind=kind,
        noun=rng.choice(kind.nouns),
        attributes=rng.sample(kind.attributes, rng.randint(2, 4)),
        options={name: _some(values, rng) for name, values in kind.options.items() if rng.random() < 0.85},
    )


def _product(asin: str, draft: Draft, number: int, rng: random.Random) -> dict[str, Any]:
    """The raw product."""
    kind, noun, attributes, style = draft.kind, draft.noun, draft.attributes, rng.choice(STYLES)
    title = f"{_brand(rng)} {style} {attributes[0]} {noun}"
    return {
        "name": f"{string.capwords(title)} {rng.choice(kind.endings)}",
        "full_description": f"{style} {noun}, {' and '.join(attributes)}. {rng.choice(REASONS).capitalize()}.",
        "pricing": _pricing(kind.prices, rng),
        "images": [f"images/{asin}.jpg"],
        "product_category": kind.path,
        "average_rating": rng.choice(["", 3.5, 4, 4.2, 4.5, 4.7, 5]),
        "small_description": [f"{attribute.capitalize()}: {rng.choice(REASONS)}" for attribute in attributes],
        "customization_options": {
            string.capwords(name): [{"value": value, "is_selected": False, "image": None} for value in values]
            for name, values in draft.options.items()
        },
        "asin": asin,
        "category": kind.category,
        "query": kind.query,
        "page": number // 50 + 1,
    }


def _brand(rng: random.Random) -> str:
    return rng.choice(BRAND_BEGINNINGS) + rng.choice(BRAND_MIDDLES) + rng.choice(BRAND_ENDINGS)


def _some(values: tuple[str, ...], rng: random.Random) -> list[str]:
    """Two to five of an option's values, in their order."""
    kept = set(rng.sample(range(len(values)), min(len(values), rng.randint(2, 5))))
    return [value for place, value in enumerate(values) if place in kept]


def _pricing(prices: tuple[float, float], rng: random.Random) -> str:
    """A price tag; one in ten is a range, one in twenty-five is missing."""
    low, high = prices
    price, chance = low * (high / low) ** rng.random(), rng.random()
    if chance < 0.04:
        return ""
    first = f"${_tag(price)}"
    return f"{first} - ${_tag(price * rng.uniform(1.1, 1.6))}" if chance < 0.14 else first


def _tag(price: float) -> str:
    return f"{int(price)}.{'99' if price < 100 else '00'}"


def _entry(draft: Draft, rng: random.Random) -> dict[str, Any]:
    """The entry of items_ins_v2, with a synthetic instruction."""
    wanted = rng.sample(draft.attributes, rng.randint(1, 2))
    return {
        "attributes": draft.attributes,
        "instruction": f"Find me {', '.join(wanted)} {draft.kind.query}",
        "instruction_attributes": wanted,
    }


def _written(draft: Draft, rng: random.Random) -> dict[str, Any]:
    """What a person wrote: some attributes, and a value of each option that matters to them."""
    wanted = rng.sample(draft.attributes, rng.choice((1, 1, 2)))
    chosen = {name: rng.choice(values) for name, values in draft.options.items() if rng.random() < 0.8}
    before = wanted[:1] if rng.random() < 0.6 else []
    after = wanted[len(before) :]
    what = " ".join([_article((*before, draft.noun)), *before, draft.noun]).strip()
    if after:
        what += f" {rng.choice(('that is', 'which is', 'with'))} {' and '.join(after)}"
    parts = [rng.choice(OPENINGS).format(what=what)]
    clauses: list[str] = []
    for name, value in chosen.items():
        text = rng.choice(SAID.get(name, SAID[""])).format(value, name)
        (clauses if text.startswith(("i ", "the ")) else parts).append(text)
    return {
        "instruction": ". ".join([" ".join(parts), *clauses]) + rng.choice((".", "", "")),
        "attributes": draft.attributes,
        "options": [f"{name}: {value}" for name, value in chosen.items()],
        "instruction_attributes": wanted,
        "instruction_options": list(chosen.values()),
    }


UNCOUNTED = frozenset(
    ("shampoo", "polish", "lacquer", "coffee", "tea", "powder", "protein", "fruit", "butter", "spread", "sauce", "mix")
) | {"rub", "blend", "chocolate", "candy", "makeup"}
"""Last words of what people ask for without an article."""


def _article(words: tuple[str, ...]) -> str:
    """`a` or `an` before one thing, nothing before several things or much of one."""
    last = words[-1].split()[-1]
    if last in UNCOUNTED or (last.endswith("s") and not last.endswith("ss")):
        return ""
    return "an" if words[0][0] in "aeiou" else "a"
