"""Shops for tests of the WebShop site, and what the recordings note of a page."""

from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Comment

from envs.webshop.goals import Product, draw
from envs.webshop.search import document_of, open_index
from envs.webshop.text import Shop, where
from tests.official_webshop import TWO, WRITTEN, RecordedNouns, Words, drawn, products

INVISIBLE = {"style", "script", "head", "title", "meta", "[document]"}


def small_shop(everything: dict[str, Product] = TWO, **fields: Any) -> Shop:
    """A shop with an instruction per product, which costs its first price and is found by words of its title."""

    def search(query: str, k: int) -> list[str]:
        words = set(query.split())
        return [asin for asin, each in everything.items() if words & set(each["Title"].lower().split())][:k]

    written = {asin: WRITTEN.get(asin) or [WRITTEN["b0mug"][0] | {"instruction": f"get {asin}"}] for asin in everything}
    found = draw(everything, 0, instructions=written)
    of_shop = {
        "products": everything,
        "goals": found.goals,
        "prices": {asin: each["pricing"][0] for asin, each in everything.items()},
        "random_state": found.random_state,
        "search": search,
        "where": where(everything),
        "nouns": Words(),
    }
    return Shop(**of_shop | fields)


def goal_of(shop: Shop, asin: str) -> int:
    """The number of the first goal that wants a product."""
    return next(number for number, goal in enumerate(shop.goals) if goal["asin"] == asin)


def recorded_shop(folder: Path) -> Shop:
    """The shop of the recordings; its index is made in a folder."""
    everything, found = products(), drawn()
    index = open_index(folder, "recorded", lambda: ((asin, document_of(each)) for asin, each in everything.items()))
    return Shop(
        products=everything,
        goals=found.goals,
        prices=found.prices,
        random_state=found.random_state,
        search=lambda query, k: [hit.asin for hit in index.search(query, k)],
        where=where(everything),
        nouns=RecordedNouns(),
    )


def noted(html: str) -> dict[str, Any]:
    """What the recordings note of a page."""
    soup = BeautifulSoup(html, "html.parser")
    picture, reward, instruction = (soup.find(id=name) for name in ("product-image", "reward", "instruction-text"))
    return {
        "text": text_of(soup),
        "forms": [
            {
                "method": form["method"],
                "action": form["action"],
                "button": [button.get_text() for button in form.find_all("button")],
                "inputs": [field["name"] for field in form.find_all("input")],
            }
            for form in soup.find_all("form")
        ],
        "links": [{"text": link.get_text(), "href": link["href"]} for link in soup.find_all("a")],
        "radios": [
            {"name": radio["name"], "value": radio["value"], "data_url": radio["data-url"], "id": radio["id"]}
            for radio in soup.select("input[type=radio]")
        ],
        "labels": [label.get_text() for label in soup.find_all("label")],
        "clickables": [button.get_text().lower() for button in soup.find_all(class_="btn")],
        "imgs": [image["src"] for image in soup.find_all("img")],
        "product_image": picture and picture["src"],
        "reward": reward and reward.find("pre").get_text(),
        "instruction": instruction and instruction.get_text(),
    }


def text_of(soup: BeautifulSoup) -> str:
    """The visible text of a page, as the official text environment takes it."""
    strings = [each for each in soup.find_all(string=True) if not isinstance(each, Comment)]
    visible = [each for each in strings if each.parent.name not in INVISIBLE and each != "\n"]
    return " [SEP] ".join(each.strip() for each in visible)
