"""WebShop's products: the official files read as the official site loads them, once, into a store on disk.

The files are items_shuffle*.json (products), items_ins_v2*.json (their attributes and synthetic instructions) and
items_human_ins.json (people's instructions). What becomes of a raw product is `load_products` of the official
web_agent_site/engine/engine.py (princeton-nlp/WebShop at 64fa2a5), oddities included: a falsy price is $100, a unit
price counts as the end of a range, options lose their capitals and slashes, the first of equal asins wins. What is
drawn at random there (prices within a range, price ceilings of goals) is not decided here.

A store holds each product as a line of JSON, found by its place; a process that opens it reads the asins only.
"""

import hashlib
import itertools
import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from envs.webshop import json_stream
from envs.webshop.search import Index, document_of, open_index
from envs.webshop.store import prepare

STORE = Path("data") / "webshop"
"""Where stores and indexes are made that nobody names another place for."""

VERSION = 1
"""To be raised with every change of what is kept of a product, or how."""

Product = dict[str, Any]
"""A product under the official names: asin, Title, Description, BulletPoints, pricing (one or two prices in dollars),
Price (as shown), options (name -> values), option_to_image, Attributes, MainImage, query, category, product_category,
Rating, Reviews; and, where items_ins_v2 has them, instruction and instruction_attributes."""

Field = Literal["category", "query", "Attributes"]


@dataclass(frozen=True, slots=True)
class Sources:
    """The files of a catalogue."""

    items: Path
    """items_shuffle*.json, a list of raw products."""
    attributes: Path
    """items_ins_v2*.json, an object of entries by asin."""
    human: Path | None = None
    """items_human_ins.json, an object of lists of instructions by asin."""

    @classmethod
    def in_folder(cls, folder: Path) -> Self:
        """The files in a folder as they are published; the whole catalogue where the first 1,000 lie there, too.

        Raises:
            ValueError: there are none, or several of which none is the whole one.
        """
        human = folder / "items_human_ins.json"
        return cls(_only(folder, "items_shuffle"), _only(folder, "items_ins_v2"), human if human.is_file() else None)


def _only(folder: Path, name: str) -> Path:
    whole, found = folder / f"{name}.json", sorted(folder.glob(f"{name}*.json"))
    if whole in found or len(found) == 1:
        return whole if whole in found else found[0]
    raise ValueError(
        f"{folder}: {len(found)} files {name}*.json; a WebShop catalogue is one of them, with its items_shuffle, "
        "items_ins_v2 and items_human_ins files beside each other."
    )


class Catalogue(Mapping[str, Product]):
    """The products of a store by their asins, in their file's order. `open_catalogue` makes them."""

    def __init__(self, folder: Path, human: Path | None = None, num_products: int | None = None) -> None:
        about = json.loads((folder / "about.json").read_text("utf-8"))
        self.folder, self._human = folder, human
        self._ends = self._array("ends")
        with (folder / "products.jsonl").open("rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        kept = len(self._ends) if num_products is None else int(np.searchsorted(self._array("items"), num_products))
        self.asins: list[str] = json.loads((folder / "asins.json").read_text("utf-8"))[:kept]
        """Asins of the products, in the file's order."""
        self.num_products = num_products
        self.skipped: dict[str, int] = about["skipped"]
        """Raw products of the whole file that are no products of the site, counted by the reason."""
        self.digest = f"{about['digest']}-{'all' if num_products is None else num_products}"
        """Changes with the products' contents."""
        self._rows = {asin: row for row, asin in enumerate(self.asins)}
        self._codes: dict[str, dict[str, int]] = about["codes"]

    def _array(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return array

    def __len__(self) -> int:
        return len(self.asins)

    def __contains__(self, asin: object) -> bool:
        return asin in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.asins)

    def __getitem__(self, asin: str) -> Product:
        """A product, a new dict each time.

        Raises:
            KeyError: there is no such product.
        """
        return self._product(self._rows[asin])

    def _product(self, row: int) -> Product:
        start = int(self._ends[row - 1]) if row else 0
        product: Product = json.loads(self._lines[start : int(self._ends[row])])
        return product

    def pricings(self) -> Iterator[tuple[str, list[float]]]:
        """Asins and their one or two prices, without reading the products."""
        for asin, prices in zip(self.asins, self._array("prices")[: len(self)].tolist(), strict=True):
            yield asin, [price for price in prices if price == price]

    def documents(self) -> Iterator[tuple[str, str]]:
        """Asins and texts for the search index.

        As the official indexes do, it holds the first `num_products` products, though the site keeps fewer if some of
        the first raw ones are skipped: hits that the catalogue does not contain are to be dropped.
        """
        with (self.folder / "products.jsonl").open("rb") as lines:  # not mapped: read once, no page of it stays
            for line in itertools.islice(lines, self.num_products):
                product = json.loads(line)
                yield product["asin"], document_of(product)

    def index(self, processes: int = 1) -> Index:
        """The search index of the products, which lies beside the store; built if need be."""
        name = f"{self.folder.name}-search-{self.digest.rpartition('-')[2]}"
        return open_index(self.folder.with_name(name), self.digest, self.documents, processes=processes)

    def where(self, field: Field, value: str) -> list[str]:
        """Asins of the products whose category or query is `value`, or that have it among their attributes."""
        if field == "Attributes":
            return [asin for asin, product in self.items() if value in product["Attributes"]]
        if (code := self._codes[field].get(value)) is None:
            return []
        return [self.asins[row] for row in np.flatnonzero(self._array(field)[: len(self)] == code)]

    @property
    def entries(self) -> "Entries":
        """What items_ins_v2 says of the products that it has an entry for."""
        return Entries(self, self._array("with_entry"))

    @cached_property
    def human(self) -> dict[str, list[dict[str, Any]]]:
        """People's instructions by asin, raw; none without their file. Read when it is first asked for.

        Raises:
            ValueError: the file is no object of lists of objects; names file and asin.
        """
        found = {}
        for asin, records in json_stream.entries(self._human) if self._human else ():
            if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
                raise ValueError(f"{self._human}: the value of {asin!r} has to be a list of objects.")
            found[asin] = records
        return found

    def close(self) -> None:
        """Let go of the store."""
        self._lines.close()


class Entries(Mapping[str, Mapping[str, Any]]):
    """The entries of items_ins_v2 by asin, of products that a catalogue has: `attributes`, `instruction`, ..."""

    def __init__(self, catalogue: Catalogue, present: NDArray[np.bool_]) -> None:
        self._catalogue = catalogue
        self._present = dict.fromkeys(itertools.compress(catalogue.asins, present))

    def __len__(self) -> int:
        return len(self._present)

    def __contains__(self, asin: object) -> bool:
        return asin in self._present

    def __iter__(self) -> Iterator[str]:
        return iter(self._present)

    def __getitem__(self, asin: str) -> Mapping[str, Any]:
        if asin not in self._present:
            raise KeyError(asin)
        product = self._catalogue[asin]
        return {"attributes": product["Attributes"]} | {name: product[name] for name in _OF_ENTRY if name in product}


def open_catalogue(sources: Sources, folder: Path | None = None, num_products: int | None = None) -> Catalogue:
    """The catalogue of some files, which are read if the store in `folder` is not of them as they are now.

    Args:
        sources: the official files, or others of their form.
        folder: where the store lies, or is to lie; named after the files, in `STORE`, if it is not given.
        num_products: keep what the first so many raw products hold (the official 100, 1000, 100000 or any other).

    Raises:
        ValueError: a file is malformed; names it and what is wrong where.
    """
    stamps = {}
    for name in ("items", "attributes"):
        file: Path = getattr(sources, name)
        try:
            status = file.stat()
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror}).") from None
        stamps[name] = [str(file.resolve()), status.st_size, status.st_mtime_ns]
    names = json.dumps([stamp[0] for stamp in stamps.values()])
    folder = folder or STORE / hashlib.sha256(names.encode()).hexdigest()[:12]
    prepare(folder, {"format": VERSION, **stamps}, lambda made: _make(made, sources))
    return Catalogue(folder, sources.human, num_products)


class _Columns:
    """What a store keeps of its products beside their lines."""

    def __init__(self) -> None:
        self.asins: dict[str, None] = {}
        self.ends: list[int] = []
        self.items: list[int] = []
        self.prices: list[list[float]] = []
        self.with_entry: list[bool] = []
        self.codes: dict[str, dict[str, int]] = {"category": {}, "query": {}}
        self.coded: dict[str, list[int]] = {name: [] for name in self.codes}

    def add(self, product: Product, *, item: int, end: int, with_entry: bool) -> None:
        """Note a product."""
        self.asins[product["asin"]] = None
        self.ends.append(end)
        self.items.append(item)
        self.prices.append([*product["pricing"], float("nan")][:2])
        self.with_entry.append(with_entry)
        for field, known in self.codes.items():
            self.coded[field].append(known.setdefault(product[field], len(known)))

    def write(self, folder: Path) -> None:
        """Write them as arrays."""
        columns = {"ends": self.ends, "items": self.items, "prices": self.prices, "with_entry": self.with_entry}
        for name, values in {**columns, **self.coded}.items():
            np.save(folder / f"{name}.npy", np.array(values))
        (folder / "asins.json").write_text(json.dumps(list(self.asins)) + "\n", "utf-8")


def _make(folder: Path, sources: Sources) -> None:
    """Write a store."""
    entries = _entries(sources.attributes)
    columns = _Columns()
    skipped: Counter[str] = Counter()
    digest = hashlib.sha256()
    end = 0
    with (folder / "products.jsonl").open("wb") as file:
        for item, raw in enumerate(tqdm(json_stream.items(sources.items), "webshop: reading products", disable=None)):
            asin = _asin(raw, sources.items, item)
            if reason := "asin" if asin == "nan" or len(asin) > 10 else "repeated" if asin in columns.asins else None:
                skipped[reason] += 1
                continue
            entry = entries.get(asin)
            product = _product(raw, json.loads(entry or b"{}"), f"{sources.items}: product {asin} (item {item + 1})")
            line = json.dumps(product).encode() + b"\n"
            end += file.write(line)
            digest.update(line)
            columns.add(product, item=item, end=end, with_entry=entry is not None)
    if not columns.asins:
        raise ValueError(f"{sources.items}: it has no product that can be sold ({dict(skipped)} were skipped).")
    columns.write(folder)
    about = {"digest": digest.hexdigest()[:16], "skipped": skipped, "codes": columns.codes}
    (folder / "about.json").write_text(json.dumps(about) + "\n", "utf-8")


def _asin(raw: Any, file: Path, item: int) -> str:
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: item {item + 1} is no object.")
    if not isinstance(asin := raw.get("asin"), str) or not asin:
        raise ValueError(f"{file}: item {item + 1} has no asin.")
    return asin


_OF_ENTRY: dict[str, type] = {"attributes": list, "instruction": str, "instruction_attributes": list}


def _entries(file: Path) -> dict[str, bytes]:
    """What items_ins_v2 says of each asin, as JSON: over a million dicts would take gigabytes."""
    found = {}
    for asin, entry in json_stream.entries(file):
        if not isinstance(entry, dict):
            raise ValueError(f"{file}: the value of {asin!r} has to be an object.")
        kept = {name: entry[name] for name in _OF_ENTRY if entry.get(name) is not None}
        for name, value in kept.items():
            if not isinstance(value, _OF_ENTRY[name]):
                raise ValueError(f"{file}: {name!r} of {asin!r} has to be a {_OF_ENTRY[name].__name__}.")
        found[asin] = json.dumps(kept).encode()
    return found


def _product(raw: Mapping[str, Any], entry: Mapping[str, Any], where: str) -> Product:
    """A raw product as the site knows it."""
    try:
        prices, shown = prices_of(raw.get("pricing"))
        options, images = _options(raw["customization_options"])
        points = raw["small_description"]
        product = {
            "asin": raw["asin"],
            "Title": raw["name"],
            "Description": raw["full_description"],
            "BulletPoints": points if isinstance(points, list) else [points],
            "pricing": prices,
            "Price": shown,
            "options": options,
            "option_to_image": images,
            "Attributes": entry.get("attributes", ["DUMMY_ATTR"]),
            "MainImage": raw["images"][0],
            "query": raw["query"].lower().strip(),
            "category": raw["category"],
            "product_category": raw["product_category"],
            "Rating": "N.A.",
            "Reviews": [],
        }
    except KeyError as error:
        raise ValueError(f"{where} has no {error.args[0]!r}.") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{where}: {error}.") from None
    for name in ("Title", "Description", "category", "product_category"):
        if not isinstance(product[name], str):
            raise ValueError(f"{where}: its {name} has to be a string, not {json.dumps(product[name])[:60]}.")
    return product | {name: value for name, value in entry.items() if name != "attributes"}


def prices_of(pricing: str | None) -> tuple[list[float], str]:
    """One or two prices in dollars, and the price tag.

    >>> prices_of("$19.00"), prices_of("$1,234.50 - $2,000")
    (([19.0], '$19.0'), ([1234.5, 2000.0], '$1234.5 to $2000.0'))

    Raises:
        ValueError: there is text, but no price.
    """
    if not pricing:
        return [100.0], "$100.0"
    try:
        prices = [float(Decimal(re.sub(r"[^\d.]", "", price))) for price in pricing.split("$")[1:]]
        first, *rest = prices
    except (InvalidOperation, ValueError, AttributeError):
        raise ValueError(f"its pricing {pricing!r} is no price") from None
    return prices[:2], f"${first} to ${rest[0]}" if rest else f"${first}"


def _options(raw: Any) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Names and values of the options, and the image of each value."""
    options: dict[str, list[str]] = {}
    images: dict[str, Any] = {}
    for name, contents in raw.items() if raw else ():
        if contents is not None:
            values = [content["value"].strip().replace("/", " | ").lower() for content in contents]
            images |= {value: content.get("image") for value, content in zip(values, contents, strict=True)}
            options[name.lower()] = values
    return options, images
