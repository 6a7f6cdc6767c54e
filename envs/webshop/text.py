"""WebShop as text: pages, sessions and clicks, as the official `WebAgentTextEnv(observation_mode="text")` has them.

Official code: `web_agent_site/envs/web_agent_text_env.py`, `engine/engine.py` and `templates/`
(https://github.com/princeton-nlp/WebShop, 64fa2a5). It renders each page to HTML with Jinja, parses it with Beautiful
Soup, and joins the visible strings with ` [SEP] `. Here a page is made of its strings at once (`Page`), which takes
microseconds instead of milliseconds.

A session's id decides its goal: `reset(7)` opens session `7` with goal 7, `reset("anna")` and `reset()` draw a goal,
and an id met before keeps its goal. Actions are `search[words]`, possible on every page, and `click[text]` for a text
in `available.clickables`; anything else changes nothing.

Profile `official` has the quirks that published numbers were made with. Profile `fixed` mends those that are plainly
bugs:

=====================  =========================================  ==================================================
what                   official                                   fixed
=====================  =========================================  ==================================================
drawing a goal         never goal 0, the last twice as often      by weight
reading an action      the argument starts at the last `[`, so    at the first `[`; blanks and newlines around the
                       that option values with one can't be       action or its argument don't matter
                       clicked; ends with the line; blanks count
next/previous          the page is known by substrings of its     by what it is
                       URL: after `search[search_results lamp]`
                       `< Prev` on an item goes to page 0
`Next >`               always there                               only if there are more results
`search[<a> x]`        raises TypeError                           the products with the attribute x
`search[<c>]`          raises IndexError                          no results
`search[<r>]`          raises ValueError below 50 products        all of them, in random order
long queries           over 1,024 terms raise TooManyClauses      no results
asins                  with a lower-case letter raise KeyError    open their item
empty bullet points    give an empty segment                      don't show
after buying           searching and buying go on                 nothing happens until `reset`
reward: options        colours found as substrings (`tan` in      as words; values compared
                       `standard`); options of synthetic goals
                       compared as (name, value) tuples
reward: attributes     those with capitals never found in texts   found
=====================  =========================================  ==================================================

Kept in both: an option value that reads like a button acts as that button, of equal values in two options only the last
option's can be chosen, chosen options don't show, going back to the results forgets them, and the done page has the
empty fields that the official one has.
"""

import dataclasses
import json
import random
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from envs.webshop.goals import Goal, Product, Profile, cumulative, random_index
from envs.webshop.reward import Nouns, RewardInfo, reward
from envs.webshop.search import TooManyTermsError

Search = Callable[[str, int], Sequence[str]]
"""Given a query and a number, the asins of that many best products, best first."""

Field = Literal["category", "query", "Attributes"]

Where = Callable[[Field, str], Sequence[str]]
"""Given a field and a value, the asins of the products that have it, in the catalogue's order."""

Kind = Literal["", "search_results", "item_page", "item_sub_page", "done"]
"""Kinds of pages by their part of the URL; the first is the page with the search box."""

RESULTS = 50
PER_PAGE = 10
BASE_URL = "http://127.0.0.1:3000"
KINDS: tuple[Kind, ...] = ("search_results", "item_page", "item_sub_page", "done")  # in the official order of tests
_FIELDS: dict[str, Field] = {"<a>": "Attributes", "<c>": "category", "<q>": "query"}
MARKS = ("<r>", *_FIELDS)
"""First words of a search that list products: random ones, or those with an attribute, a category or a query."""

SUB_PAGES = {name.lower(): name for name in ("Description", "Features", "Reviews", "Attributes")}

ACTION = re.compile(r"(.+)\[(.+)\]")
FIXED_ACTION = re.compile(r"\s*(search|click)\s*\[(.*)\]", re.DOTALL)
ASCII_BLANKS = " \n\t\f\r"


class Target(NamedTuple):
    """What a clickable text is."""

    kind: Literal["button", "product", "option"]
    name: str = ""
    """The product's asin, or the option's name."""


BUTTON = Target("button")


class Available(NamedTuple):
    """What can be done on a page; `_asdict()` is what the official `get_available_actions` returns."""

    has_search_bar: bool
    clickables: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """A page's visible strings, in order, and its clickable texts in the order of the official list."""

    kind: Kind
    strings: list[str]
    """As the template has them: see `segments` for what of them is seen."""
    targets: dict[str, Target]

    @property
    def text(self) -> str:
        """The observation."""
        return " [SEP] ".join(segments(self.strings))

    @property
    def available(self) -> Available:
        """The search bar and the clickable texts."""
        return Available(has_search_bar=not self.kind, clickables=list(self.targets))


def segments(strings: Iterable[str]) -> list[str]:
    """The strings as the official text observation shows them.

    Beautiful Soup drops an empty string, and makes one of ASCII blanks only a newline, if it has one, or else a space.
    The official code drops what is a newline then, and strips the rest, so that blanks can leave an empty segment.
    """
    shown = []
    for each in strings:
        if (stripped := each.strip()) or (each and ("\n" not in each or each.strip(ASCII_BLANKS))):
            shown.append(stripped)
    return shown


def index_page(instruction: str) -> Page:
    """The page with the search box."""
    return Page("", ["WebShop", "Instruction:", instruction, "Search"], {"search": BUTTON})


def results_page(
    instruction: str, shown: Iterable[Product], number: int, total: int, *, next_always: bool = True
) -> Page:
    """Page `number` of the results, of which there are `total`, with its products."""
    buttons = ["Back to Search"]
    if number > 1:
        buttons.append("< Prev")
    if next_always or number * PER_PAGE < total:
        buttons.append("Next >")
    counted = f"Page {number} (Total results: {total})"
    strings = ["Instruction:", instruction, buttons[0], counted, *buttons[1:]]
    targets = dict.fromkeys(map(str.lower, buttons), BUTTON)
    for product in shown:
        strings += (product["asin"], product["Title"], product["Price"])
        targets[product["asin"].lower()] = Target("product", product["asin"])
    return Page("search_results", strings, targets)


def item_page(instruction: str, product: Product, *, show_attrs: bool = False) -> Page:
    """A product with its options."""
    buttons = ["Description", "Features", "Reviews", *(["Attributes"] if show_attrs else []), "Buy Now"]
    strings = ["Instruction:", instruction, "Back to Search", "< Prev"]
    targets = dict.fromkeys(["back to search", "< prev", *map(str.lower, buttons)], BUTTON)
    for name, values in product["options"].items():
        strings += (name, *values)
        target = Target("option", name)
        for value in values:
            targets[value] = target
    strings += (product["Title"], f"Price: {product['Price']}", f"Rating: {product['Rating']}", *buttons)
    return Page("item_page", strings, targets)


def sub_page(instruction: str, product: Product, name: str, *, blank_bullets: bool = True) -> Page:
    """A product's `Description`, `Features`, `Reviews` or `Attributes`."""
    strings = ["Instruction:", instruction, "Back to Search", "< Prev"]
    if name == "Description":
        strings.append(product["Description"])
    elif name == "Features":
        # The template has the blank, so that an empty bullet point is seen.
        strings += (f" {bullet}" for bullet in product["BulletPoints"] if blank_bullets or bullet.strip())
    elif name == "Reviews":
        for review in product["Reviews"]:
            strings += (f'"{review["title"]}"', str(review["score"]), review["body"])
    else:
        strings += (f" {attribute}" for attribute in product["Attributes"])
        strings += (product["category"], product["query"], product["product_category"])
    return Page("item_sub_page", strings, {"back to search": BUTTON, "< prev": BUTTON})


def done_page(asin: str, options: Mapping[str, str], score: float) -> Page:
    """The score. The official text environment leaves most fields of the site's page without their contents."""
    strings = ["Thank you for shopping with us!", "Your code:", "None", "(Paste it in your MTurk interface.)"]
    strings += ["Purchased", "asin", asin, "options", html_json(options), "attrs", "None", "category", "None"]
    strings += ["query", "None", "product category", "None", "Target", "asin", "options", "attrs", "price upper"]
    strings += ["instuction text", "category", "product category", "query", "Goal", "None", "Reward"]
    strings += ["Your score (min 0.0, max 1.0)", str(score), "Reward Details", "None"]
    return Page("done", strings, {})


def html_json(value: Any) -> str:
    """JSON as Flask's `tojson` filter writes it: sorted keys, ASCII, and `<`, `>`, `&`, `'` escaped."""
    text = json.dumps(value, sort_keys=True)
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


class OfficialError(Exception):
    """Raised where the official code raises; the text begins with the name of the official exception."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shop:
    """What all sessions share; nothing in it changes."""

    products: Mapping[str, Product]
    """By asin, in the catalogue's order."""
    goals: Sequence[Goal]
    prices: Mapping[str, float]
    """What each product costs at the till."""
    random_state: tuple[Any, ...]
    """Where each environment's generator begins (`goals.Draw.random_state`)."""
    search: Search
    where: Where
    """`Catalogue.where`, or `where(products)`."""
    nouns: Nouns
    """Finds the nouns of titles, for the reward."""
    show_attrs: bool = False
    """Whether items have a page of attributes."""
    profile: Profile = "official"


class Step(NamedTuple):
    """What an action led to."""

    observation: str
    reward: float
    done: bool
    valid: bool
    """Whether the action was possible."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Purchase:
    """What was bought, and what it was worth."""

    asin: str
    options: dict[str, str]
    price: float
    reward: float
    info: RewardInfo


def buy(shop: Shop, goal: Goal, product: Product, options: Mapping[str, str]) -> Purchase:
    """Buy a product of the shop with these options (name -> value), for a goal."""
    price = shop.prices[product["asin"]]
    score, info = reward(product, goal, price, options, shop.nouns, shop.profile)
    return Purchase(asin=product["asin"], options=dict(options), price=price, reward=score, info=info)


def ranked(shop: Shop, query: str) -> list[str]:
    """Asins of the best products for a query, by Lucene's ranking.

    Raises:
        OfficialError: the query has more terms than Lucene takes (profile `official`).
    """
    try:
        found = shop.search(query, RESULTS)
    except TooManyTermsError as error:
        if shop.profile == "official":
            raise OfficialError(f"TooManyClauses: {error}") from error
        found = []
    return [asin for asin in found if asin in shop.products]


def listed(shop: Shop, keywords: Sequence[str], rng: random.Random) -> list[str]:
    """Asins for words that begin with a mark (`MARKS`): by chance, or with an attribute, category or query, in order.

    Raises:
        OfficialError: the official code raises there (profile `official`).
    """
    mark, *words = keywords
    if mark == "<r>":
        asins = list(shop.products)
        if len(asins) < RESULTS and shop.profile == "official":
            raise OfficialError("ValueError: fewer products than the sample")
        return rng.sample(asins, min(RESULTS, len(asins)))
    if mark == "<c>" and not words:
        if shop.profile == "official":
            raise OfficialError("IndexError: no category")
        return []
    value = words[0] if mark == "<c>" else " ".join(words)
    return list(shop.where(_FIELDS[mark], value.strip()))


def on_page(found: Sequence[str], number: int) -> Sequence[str]:
    """What of the results is on page `number`; below page 1 it is what Python makes of the slice, as official."""
    return found[(number - 1) * PER_PAGE : number * PER_PAGE]


def parse_action(action: str, profile: Profile) -> tuple[str, str]:
    """The name and the lower-cased argument of an action, the latter empty if there is none."""
    if profile == "fixed":
        match = FIXED_ACTION.match(action)
        return (match[1], match[2].strip().lower()) if match else ("", "")
    match = ACTION.match(action)
    return (match[1], match[2].lower()) if match else (action, "")


class WebShopText:
    """One customer in a shop. See the module's docstring; like the official one, it begins with a `reset()`."""

    def __init__(self, shop: Shop) -> None:
        if not shop.goals:
            raise ValueError("This shop has no goals: no product has an instruction.")
        self.shop = shop
        self._fixed = shop.profile == "fixed"
        self._totals = cumulative(shop.goals)
        self._random = random.Random()
        self._random.setstate(shop.random_state)
        self._sessions: dict[str, int] = {}
        self._found: tuple[str, list[str]] = ("", [])
        self.reset()

    @property
    def goal(self) -> Goal:
        """The session's goal."""
        return self.shop.goals[self.goal_index]

    @property
    def available(self) -> Available:
        """What can be done on this page."""
        return self.page.available

    def reset(self, session: int | str | None = None) -> str:
        """Begin a session; the observation is the page with the search box.

        Raises:
            IndexError: the shop has no goal of this number.
        """
        name = "".join(self._random.choices(string.ascii_lowercase, k=10)) if session is None else str(session)
        if name not in self._sessions:
            self._sessions[name] = self._goal_of(session)
        self.session, self.goal_index = name, self._sessions[name]
        self.purchase: Purchase | None = None
        self._open_index()
        return self.page.text

    def step(self, action: str) -> Step:
        """Search, click, or change nothing.

        Raises:
            OfficialError: the official code raises there (profile `official`). The page stays.
        """
        page = self.page
        over = self._fixed and page.kind == "done"
        name, argument = ("", "") if over else parse_action(action, self.shop.profile)
        if argument and name == "search":
            self._open_results(argument.split(" "), 1)
        elif argument and name == "click" and argument != "search" and argument in page.targets:
            self._click(argument, page.targets[argument])
        else:
            return Step(page.text, 0, False, False)
        if self.page.kind == "done" and self.purchase:
            return Step(self.page.text, self.purchase.reward, True, True)
        return Step(self.page.text, 0.0, False, True)

    def _goal_of(self, session: int | str | None) -> int:
        """The number of a new session's goal."""
        if not isinstance(session, int):
            return random_index(self._totals, self._random, self.shop.profile)
        count = len(self.shop.goals)
        if not -count <= session < count:
            raise IndexError(f"No goal {session}: this shop has goals 0 to {count - 1}.")
        return session % count

    def _click(self, text: str, target: Target) -> None:
        """Follow a clickable text, tested in the official order."""
        kind = self._kind()
        if text == "buy now":
            self._buy()
        elif text == "back to search":
            self._open_index()
        elif text == "next >" and kind == "search_results":
            self._open_results(self._keywords, self._number + 1)
        elif text == "< prev" and kind == "search_results":
            self._open_results(self._keywords, self._number - 1)
        elif text == "< prev" and kind == "item_page":
            self._open_results(self._keywords, self._number)
        elif text in SUB_PAGES:
            self._open_sub_page(SUB_PAGES[text])
        else:
            self._open_item(text, target)

    def _kind(self) -> Kind:
        """The kind of page that the official code takes this one for."""
        if self._fixed:
            return self.page.kind
        return next((kind for kind in KINDS if kind in self.url), "")

    def _open_index(self) -> None:
        self._keywords: list[str] = []
        self._number = 1
        self._asin = ""
        self._options: dict[str, str] = {}
        self.page = index_page(self.goal["instruction_text"])
        self.url = f"{BASE_URL}/{self.session}"

    def _open_results(self, keywords: list[str], number: int) -> None:
        found = self._search(keywords)  # first: where it raises, nothing has changed
        self._keywords, self._number = keywords, number
        self._asin = ""
        self._options = {}
        shown = [self.shop.products[asin] for asin in on_page(found, number)]
        text = self.goal["instruction_text"]
        self.page = results_page(text, shown, number, len(found), next_always=not self._fixed)
        self.url = f"{BASE_URL}/search_results/{self.session}/{'+'.join(keywords)}/{number}"

    def _open_item(self, text: str, target: Target) -> None:
        if target.kind == "product":
            self._asin = target.name if self._fixed else text.upper()
        elif target.kind == "option":
            self._options[target.name.lower()] = text
        product = self._product()
        self.page = item_page(self.goal["instruction_text"], product, show_attrs=self.shop.show_attrs)
        self.url = f"{self._item_url('item_page')}/{json.dumps(self._options)}"

    def _open_sub_page(self, name: str) -> None:
        self.page = sub_page(self.goal["instruction_text"], self._product(), name, blank_bullets=not self._fixed)
        self.url = f"{self._item_url('item_sub_page')}/{name}/{self._options}"

    def _buy(self) -> None:
        self.purchase = buy(self.shop, self.goal, self._product(), self._options)
        self.page = done_page(self._asin, self.purchase.options, self.purchase.reward)
        self.url = f"{BASE_URL}/done/{self.session}/{self._asin}/{self._options}"

    def _item_url(self, kind: Kind) -> str:
        return f"{BASE_URL}/{kind}/{self.session}/{self._asin}/{'+'.join(self._keywords)}/{self._number}"

    def _product(self) -> Product:
        """The open product."""
        try:
            return self.shop.products[self._asin]
        except KeyError:
            raise OfficialError(f"KeyError: no product {self._asin!r}") from None

    def _search(self, keywords: list[str]) -> list[str]:
        """Asins for these words, by Lucene's ranking unless the first one is a special mark."""
        if keywords[0] in MARKS:
            if keywords[0] == "<a>" and not self._fixed:
                raise OfficialError("TypeError: the text environment has no index of attributes")
            return listed(self.shop, keywords, self._random)
        query = " ".join(keywords)
        if self._found[0] != query:
            self._found = query, ranked(self.shop, query)
        return self._found[1]


def where(products: Mapping[str, Product]) -> Where:
    """Look a field up in products by going through all of them."""

    def found(field: Field, value: str) -> list[str]:
        several = field == "Attributes"
        return [asin for asin, each in products.items() if (value in each[field] if several else value == each[field])]

    return found
