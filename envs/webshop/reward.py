"""What a purchase is worth: WebShop's reward, part by part.

Official code: `get_reward` of `web_agent_site/engine/goal.py` and `engine/normalize.py`
(https://github.com/princeton-nlp/WebShop, 64fa2a5; Yao et al. 2022, https://arxiv.org/abs/2207.01206, section 3 and
appendix):

    reward = r_type * (matched attributes + matched options + [price <= ceiling]) / (attributes + options + 1)

Attributes and options match above 85 in thefuzz 0.22.1's `token_set_ratio` (`similarity`). `r_type` compares the nouns
of the two titles. The official code tags them with spaCy's en_core_web_lg; the tagger is the replaceable part here
(`english_nouns`): spaCy's model if it is installed, else the lexicon and rules that TextBlob carries.

Quirks kept in the `official` profile: option names are ignored, and one bought value may satisfy several wanted ones; a
colour is found as a substring (the `tan` of `standard`), the first in alphabetical order winning; wanted attributes are
not lower-cased before they are looked for in lower-cased texts; the options of synthetic goals are compared as
(name, value) tuples.
"""

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NotRequired, Protocol, TypedDict

from rapidfuzz import fuzz
from rapidfuzz.utils import default_process

from envs.webshop.goals import Goal, Product, Profile

TEXTBLOB = f"textblob {importlib.metadata.version('textblob')} PatternTagger"
SPACY_MODELS = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm")
MATCH = 85
LATIN_1 = dict.fromkeys(range(128, 256))

# The order counts. Official: web_agent_site/engine/normalize.py.
COLOR_SET = (
    *("alabaster", "apricot", "aqua", "ash", "asphalt", "azure", "banana", "beige", "black", "blue", "blush"),
    *("bordeaux", "bronze", "brown", "burgundy", "camel", "camo", "caramel", "champagne", "charcoal", "cheetah"),
    *("chestnut", "chocolate", "christmas", "coffee", "cognac", "copper", "coral", "cranberry", "cream", "crystal"),
    *("dark", "denim", "eggplant", "elephant", "espresso", "fuchsia", "gold", "granite", "grape", "graphite", "grass"),
    *("gray", "green", "grey", "heather", "indigo", "ivory", "ivy", "khaki", "lavender", "lemon", "leopard", "light"),
    *("lilac", "lime", "magenta", "maroon", "mauve", "merlot", "midnight", "mint", "mocha", "multicolor", "mushroom"),
    *("mustard", "natural", "navy", "nude", "olive", "orange", "peach", "pewter", "pink", "plum", "purple", "rainbow"),
    *("red", "rose", "royal", "rust", "sand", "sapphire", "seashell", "silver", "skull", "slate", "steel", "stone"),
    *("stonewash", "sunflower", "tan", "taupe", "teal", "tiger", "turquoise", "violet", "walnut", "wheat", "white"),
    *("wine", "yellow"),
)


class RewardInfo(TypedDict):
    """The parts of a reward, by their official names: `r_` is a share that was met, `w_` its weight in the sum."""

    r_type: float
    r_att: float
    w_att: float
    query_match: bool
    category_match: bool
    title_score: float
    r_option: NotRequired[float]
    """Absent, like its weight, where the goal has no options."""
    w_option: NotRequired[float]
    r_price: bool
    w_price: float


class Nouns(Protocol):
    """Finds the nouns of a title."""

    @property
    def name(self) -> str:
        """Which tagger this is, with its version: rewards depend on it."""

    def __call__(self, title: str) -> Sequence[str]:
        """The title's nouns in lower case, in order, with repeats."""


class SpacyNouns:
    """Nouns and proper nouns by one of spaCy's English models.

    Raises:
        ImportError: spaCy or the model is not installed.
    """

    def __init__(self, model: str = "en_core_web_lg") -> None:
        self._parse = importlib.import_module(model).load()
        self.name = _spacy_name(model)

    def __call__(self, title: str) -> Sequence[str]:
        """See `Nouns`."""
        return [token.text.lower() for token in self._parse(title) if token.pos_ in ("NOUN", "PROPN")]


class TextBlobNouns:
    """Nouns by TextBlob's PatternTagger, whose lexicon comes with the package."""

    def __init__(self) -> None:
        tagger = importlib.import_module("textblob.en.taggers").PatternTagger()  # takes a second or more: imports nltk
        self.name = TEXTBLOB
        self._tag = tagger.tag
        self("A Zyxqed lamp")  # reads the lexicon and its rules now: it would do so in the first threads to come

    def __call__(self, title: str) -> Sequence[str]:
        """See `Nouns`."""
        return [word.lower() for word, tag in self._tag(title) if tag.startswith("NN")]


class CachedNouns:
    """Remembers the nouns of the titles met last: an episode's titles come again."""

    def __init__(self, nouns: Nouns, size: int = 4096) -> None:
        self.name = nouns.name
        self._find = lru_cache(size)(lambda title: tuple(nouns(title)))

    def __call__(self, title: str) -> Sequence[str]:
        """See `Nouns`."""
        return self._find(title)


@lru_cache
def english_nouns() -> Nouns:
    """The best tagger that is installed: a spaCy model, the largest first, else TextBlob's."""
    model = _spacy_model()
    return CachedNouns(SpacyNouns(model) if model else TextBlobNouns())


def tagger() -> str:
    """The name of `english_nouns`, without loading it."""
    model = _spacy_model()
    return _spacy_name(model) if model else TEXTBLOB


def _spacy_model() -> str | None:
    find = importlib.util.find_spec
    return next((model for model in SPACY_MODELS if find(model)), None) if find("spacy") else None


def _spacy_name(model: str) -> str:
    return f"spacy {importlib.metadata.version('spacy')} {model} {importlib.metadata.version(model)}"


def reward(
    bought: Product,
    goal: Goal,
    price: float,
    options: Mapping[str, str],
    nouns: Nouns,
    profile: Profile = "official",
) -> tuple[float, RewardInfo]:
    """What it is worth to a goal to buy a product at a price, with these option values chosen (name -> value)."""
    info_type = type_reward(bought, goal, nouns)
    attributes = matched_attributes(bought, goal["attributes"], profile)
    wanted = _wanted_options(goal["goal_options"], profile)
    matched = matched_options(options.values(), wanted, profile)
    r_price = price <= goal["price_upper"]
    parts = len(goal["attributes"]) + len(wanted) + 1
    info = RewardInfo(
        r_type=info_type[0],
        r_att=attributes / len(goal["attributes"]),
        w_att=len(goal["attributes"]) / parts,
        query_match=info_type[1],
        category_match=info_type[2],
        title_score=info_type[3],
        r_price=r_price,
        w_price=1 / parts,
    )
    if wanted:
        info["r_option"] = matched / len(wanted)
        info["w_option"] = len(wanted) / parts
    return (attributes + matched + r_price) / parts * info_type[0], info


def type_reward(bought: Product, goal: Goal, nouns: Nouns) -> tuple[float, bool, bool, float]:
    """r_type, query_match, category_match and title_score: is it the kind of product that is wanted?

    title_score is the share of the wanted title's nouns (counted with repeats) that the bought title has, and 0.2 if it
    has none. r_type is 1 if the query, two parts of the category, or a title_score above 0.2 say so, else 0.5; but 0.1
    below a title_score of 0.1, and 0 at 0, whatever the others say.
    """
    query_match = bought["query"] == goal["query"]
    category_match = len(_categories(bought["product_category"]) & _categories(goal["product_category"])) >= 2
    wanted = nouns(goal["name"])
    title_score = len(set(nouns(bought["Title"])) & set(wanted)) / len(wanted) if wanted else 0.2
    r_type = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
    if title_score < 0.1:
        r_type = 0.1 if title_score else 0.0
    return r_type, query_match, category_match, title_score


def matched_attributes(bought: Product, wanted: Iterable[str], profile: Profile = "official") -> int:
    """How many wanted attributes the product has: similar to one of its own, or literally in one of its texts."""
    texts = [bought["Title"].lower(), " ".join(bought["BulletPoints"]).lower(), bought["Description"].lower()]
    own = [_processed(attribute) for attribute in bought["Attributes"]]
    count = 0
    for attribute in wanted:
        literal = attribute.lower() if profile == "fixed" else attribute
        processed = _processed(attribute)
        count += any(_similarity(each, processed) > MATCH for each in own) or any(literal in text for text in texts)
    return count


def matched_options(bought: Iterable[str], wanted: Iterable[Any], profile: Profile = "official") -> int:
    """How many wanted option values are similar to a bought one, colours reduced to their plain names."""
    values = [_processed(normalize_color(value, profile)) for value in bought]
    targets = [_processed(normalize_color(value, profile)) for value in wanted]
    return sum(any(_similarity(value, target) > MATCH for value in values) for target in targets)


def normalize_color(value: Any, profile: Profile = "official") -> Any:
    """The first colour of `COLOR_SET` that is in the value (as a substring; as a word in `fixed`), or the value."""
    if profile == "fixed":
        words = set(re.findall(r"[^\W\d_]+", value))
        return next((color for color in COLOR_SET if color in words), value)
    return next((color for color in COLOR_SET if color in value), value)


def similarity(first: object, second: object) -> int:
    """`fuzz.token_set_ratio` of thefuzz 0.22.1, 0 to 100: sets of words, Latin-1 letters and punctuation dropped."""
    return _similarity(_processed(first), _processed(second))


def _similarity(first: str, second: str) -> int:
    return round(fuzz.token_set_ratio(first, second))


@lru_cache(65536)
def _processed(value: object) -> str:
    return default_process(str(value).translate(LATIN_1))


def _categories(path: str) -> set[str]:
    return {part.strip() for part in path.split("\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")}


def _wanted_options(options: Sequence[str] | Mapping[str, str], profile: Profile) -> Sequence[Any]:
    if isinstance(options, Mapping):
        return list(options.values()) if profile == "fixed" else list(options.items())
    return options
