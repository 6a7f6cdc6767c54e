"""Who shops: a customer who knows the goal's own record and sees what an agent sees.

It searches for the instruction as it stands, as WebShop's rule baseline does, less the price: words that a small model
can copy from the place where they always begin. It looks for the goal's product on the pages of results, tries fewer
words if it is not there, chooses the wanted options by their text, looks at the price and buys. Where it does not find
the product in time, it buys the first one listed.

With `noise` a share of its purchases goes wrong in one of the ways of `mistakes`.
"""

import random
import re
from collections.abc import Sequence

from envs.webshop.goals import CEILING, Goal
from envs.webshop.reward import matched_options
from envs.webshop.settings import Mistake
from envs.webshop.text import Page

PAGES = 2
"""Pages of results that it looks through before it tries other words."""

_OPENING = re.compile(
    r"^(?:please |can you |could you |help me )*(?:i am|i'm|i)?\s*(?:would|'d)?\s*"
    r"(?:like|need|want|looking|look|find|show|get|buy|searching|interested)\b"
    r"(?: (?:to (?:buy|get|find|purchase|have)|for|in|me|some))*\s*"
)
"""How people begin: `i would like to buy`, `please find me`, `i'm looking for`."""
_IDLE = {
    *(
        "a",
        "an",
        "and",
        "are",
        "be",
        "color",
        "find",
        "for",
        "get",
        "i",
        "in",
        "is",
        "it",
        "like",
        "looking",
        "me",
        "my",
    ),
    *("need", "of", "one", "please", "should", "size", "some", "that", "the", "to", "want", "which", "with", "would"),
}
"""Words that say nothing of the product."""


def asked_of(instruction: str) -> str:
    """An instruction without the price.

    >>> asked_of("i am looking for a red mug, and price lower than 20.00 dollars")
    'i am looking for a red mug'
    """
    return CEILING.sub("", instruction).strip(" .")


def wish_of(instruction: str) -> str:
    """What an instruction asks for, without the price and without how it begins.

    >>> wish_of("i am looking for a red mug, and price lower than 20.00 dollars")
    'a red mug'
    """
    asked = asked_of(instruction)
    return _OPENING.sub("", asked) or asked


def queries(goal: Goal) -> list[str]:
    """Words to search for, those to try first at the front: fewer and fewer, at last those of the record."""
    asked, wish = (re.sub(r"[\[\]]", " ", part(goal["instruction_text"])) for part in (asked_of, wish_of))
    words = " ".join(word for word in re.findall(r"[^\s,.()]+(?:\.\d+)?", wish) if word not in _IDLE)
    record = " ".join([*goal["attributes"], goal["query"], *values_of(goal)])
    return list(dict.fromkeys([asked, wish.partition(". ")[0], words, record]))


def values_of(goal: Goal) -> list[str]:
    """The option values that a goal wants."""
    options = goal["goal_options"]
    return list(options.values()) if isinstance(options, dict) else list(options)


class Customer:
    """Says what to do next on each page, and why."""

    def __init__(self, goal: Goal, limit: int, chance: random.Random, mistake: Mistake | None = None) -> None:
        """Have a goal and so many steps, and perhaps make a mistake."""
        self._goal, self._mistake = goal, mistake
        self._queries = queries(goal)
        self._values = [] if mistake == "no option" else values_of(goal)
        self._chance = chance
        self._left = limit
        self._searched = 0
        self._page = 1

    def next(self, page: Page) -> tuple[str, str]:
        """Thought and action on a page."""
        self._left -= 1
        match page.kind:
            case "":
                return self._search()
            case "search_results":
                return self._look(page)
            case _:
                return self._choose(page)

    def _search(self) -> tuple[str, str]:
        self._page = 1
        query = self._queries[self._searched % len(self._queries)]
        self._searched += 1
        if self._searched == 1:
            return "I search for what I am to buy.", f"search[{query}]"
        return "It was not there, so I try other words.", f"search[{query}]"

    def _look(self, page: Page) -> tuple[str, str]:
        """Open the right product if it is listed."""
        listed = [target.name for target in page.targets.values() if target.kind == "product"]
        wanted = self._goal["asin"]
        if wanted in listed:
            asin = wanted
            if self._mistake == "another product" and len(listed) > 1:
                asin = self._chance.choice([one for one in listed if one != wanted])
            return f"{asin} may be it, so I open it.", f"click[{asin}]"
        spare = self._left - 2 - len(self._values)  # to search again, to look, to open, to choose and to buy
        if self._page < PAGES and "next >" in page.targets and spare > 1 and listed:
            self._page += 1
            return "I do not see it on this page. I look at the next one.", "click[Next >]"
        if not listed or (self._searched < len(self._queries) and spare > 2):
            return "It is not among these results, so I go back.", "click[Back to Search]"
        return "None of these is just right, so I open the first.", f"click[{listed[0]}]"

    def _choose(self, page: Page) -> tuple[str, str]:
        """Choose the next wanted value, then buy."""
        values = [key for key, target in page.targets.items() if target.kind == "option"]
        while self._values and self._left > 0:
            wanted = self._values.pop(0)
            found = self._like(wanted, values)
            if found and self._mistake == "another option":
                others = self._beside(found, page)
                found = self._chance.choice(others) if others else found
            if found:
                return f"{page.targets[found].name}: {wanted}. I choose it.", f"click[{found}]"
        return self._paying(page), "click[Buy Now]"

    def _like(self, wanted: str, values: Sequence[str]) -> str | None:
        """The value that is wanted, or one that counts as it."""
        exact = [value for value in values if value == wanted.lower()]
        return next(iter(exact or [value for value in values if matched_options([value], [wanted])]), None)

    def _beside(self, value: str, page: Page) -> list[str]:
        """The other values of an option."""
        name = page.targets[value].name
        return [key for key, target in page.targets.items() if target.name == name and key != value]

    def _paying(self, page: Page) -> str:
        """What it says of the price, in the words of the page and of the instruction."""
        price = next((text for text in page.strings if text.startswith("Price: ")), "Price: unknown")
        ceiling = CEILING.search(self._goal["instruction_text"])
        return f"{price}, {ceiling.group(1)}. I buy it." if ceiling else f"{price}. I buy it."
