import random
from typing import Any

import pytest

from envs.webshop import reward as module
from envs.webshop.goals import human_goals, synthetic_goals
from envs.webshop.reward import (
    COLOR_SET,
    CachedNouns,
    english_nouns,
    matched_attributes,
    matched_options,
    normalize_color,
    reward,
    similarity,
    type_reward,
)
from tests.official_webshop import (
    LAMP,
    MUG,
    TWO,
    WRITTEN,
    RecordedNouns,
    Words,
    contents,
    lines,
    path,
    product,
    products,
    recorded,
)

PRICES = {"B0LAMP": 30.0, "b0mug": 20.0}


def goal_of(asin: str) -> Any:
    return next(goal for goal in human_goals(TWO, WRITTEN, PRICES, random.Random(0)) if goal["asin"] == asin)


@recorded
class TestRecorded:
    def check_rewards(self, nouns):
        everything, goals = products(), contents("goals_main.json")
        cases = lines("reward_cases_main.jsonl")
        misses = []
        for number, case in enumerate(cases):
            goal = goals[case["goal_idx"]]
            got = reward(everything[case["asin"]], goal, case["price"], case["options"], nouns)
            if got != (case["reward"], case["info"]):
                misses.append((number, got))
        assert not misses, f"{len(cases) - len(misses)} of {len(cases)} exact"
        assert len(cases) == 700

    def test_rewards_and_their_parts(self):
        self.check_rewards(RecordedNouns())

    def test_rewards_with_the_tagger_of_the_recordings(self):
        pytest.importorskip("textblob")
        self.check_rewards(CachedNouns(module.TextBlobNouns()))

    def test_nouns_of_the_tagger_of_the_recordings(self):
        pytest.importorskip("textblob")
        nouns = module.TextBlobNouns()
        wanted = {title: found["nouns"] for title, found in contents("nouns_standin.json").items()}
        assert {title: nouns(title) for title in wanted} == wanted
        assert len(wanted) == 353

    def test_options(self):
        cases = lines("option_reward_cases.jsonl")
        got = [matched_options(case["purchased"], case["goal"]) for case in cases]
        assert got == [case["num_option_matches"] for case in cases]
        assert len(cases) == 150

    def test_similarity(self):
        cases = lines("fuzz_cases.jsonl")
        assert [similarity(case["p"], case["g"]) for case in cases] == [case["token_set_ratio"] for case in cases]
        assert len(cases) == 200

    def test_colours(self):
        wanted = contents("normalize_color.json")
        assert {value: normalize_color(value) for value in wanted} == wanted
        assert len(wanted) == 160
        assert list(COLOR_SET) == contents("color_set.json")


class TestReward:
    def test_everything_right(self):
        got, info = reward(LAMP, goal_of("B0LAMP"), 31.0, {"color": "black"}, Words())
        assert got == (1 + 1 + 1) / 4  # `Made of` has a capital, and is found nowhere
        assert info == {
            "r_type": 1.0,
            "r_att": 0.5,
            "w_att": 0.5,
            "query_match": True,
            "category_match": True,
            "title_score": 1.0,
            "r_option": 1.0,
            "w_option": 0.25,
            "r_price": True,
            "w_price": 0.25,
        }

    def test_fixed_finds_an_attribute_with_a_capital(self):
        assert reward(LAMP, goal_of("B0LAMP"), 31.0, {"color": "black"}, Words(), "fixed")[0] == 1.0

    def test_too_dear_and_without_its_option(self):
        got, info = reward(LAMP, goal_of("B0LAMP"), 100.0, {}, Words())
        assert got == 1 / 4
        assert not info["r_price"]
        assert info["r_option"] == 0.0

    def test_another_kind_of_product(self):
        got, info = reward(MUG, goal_of("B0LAMP"), 20.0, {}, Words())
        assert got == 0.0
        assert info["r_type"] == info["title_score"] == 0.0

    def test_a_goal_without_options_has_no_part_for_them(self):
        goal = goal_of("B0LAMP") | {"goal_options": []}
        got, info = reward(LAMP, goal, 31.0, {"color": "black"}, Words())
        assert got == 2 / 3
        assert not {"r_option", "w_option"} & set(info)

    def test_a_colour_is_found_inside_a_word(self):
        """The mug's `standard` reads as tan, which its goal wants."""
        assert reward(MUG, goal_of("b0mug"), 20.0, {"size": "standard"}, Words())[0] == 1.0
        assert reward(MUG, goal_of("b0mug"), 20.0, {"size": "standard"}, Words(), "fixed")[0] == 2 / 3


class TestSyntheticOptions:
    goal = synthetic_goals(
        {"b0mug": MUG}, {"b0mug": {"instruction": "x", "instruction_attributes": ["odd"]}}, PRICES, random.Random(0)
    )[0]

    def test_official_compares_names_and_values_as_one(self):
        """str(("size", "standard")) has the word `standard`, so that all its words are found; a part of it is not."""
        assert reward(MUG, self.goal, 20.0, {"size": "standard"}, Words())[1]["r_option"] == 0.0
        assert reward(MUG, self.goal, 20.0, {"size": "size"}, Words())[1]["r_option"] == 1.0

    def test_fixed_compares_values(self):
        assert reward(MUG, self.goal, 20.0, {"size": "standard"}, Words(), "fixed")[1]["r_option"] == 1.0
        assert reward(MUG, self.goal, 20.0, {"size": "size"}, Words(), "fixed")[1]["r_option"] == 0.0


class TestType:
    @pytest.mark.parametrize(
        ("bought", "wanted", "related", "r_type"),
        [
            ("a b c d e", "a b c d e", False, 1.0),
            ("a x y z w", "a b c d e", False, 0.5),  # one noun of five is not above 0.2
            ("a x", "a b c d e", True, 1.0),
            ("a b x", "a b c d e", False, 1.0),
            ("a", "a b c d e f g h i j k", True, 0.1),
            ("x", "a b", True, 0.0),
            ("x", "", False, 0.5),
            ("x", "", True, 1.0),
            ("a", "a a a", False, 1.0),  # repeats count: 1 of 3
        ],
    )
    def test_by_nouns(self, bought, wanted, related, r_type):
        goal: Any = {"name": wanted, "query": "q", "product_category": path("A", "B")}
        sold = product("x", bought, query="q" if related else "other", product_category=path("A", "C"))
        assert type_reward(sold, goal, Words())[0] == r_type

    def test_two_parts_of_the_category_in_any_order(self):
        goal: Any = {"name": "a", "query": "q", "product_category": path("A", "B", "C")}
        assert type_reward(product("x", "a", product_category=path("C", "A").replace(" ", "")), goal, Words())[2]
        assert not type_reward(product("x", "a", product_category=path("A", "A")), goal, Words())[2]


class TestMatching:
    @pytest.mark.parametrize(
        ("wanted", "found"),
        [
            ("stainless steel", 1),  # its own
            ("steel, stainless!", 1),  # the same words
            ("made of", 1),  # in a bullet point
            ("<dark>", 1),  # in the description
            ("floor lamp", 1),  # in the title
            ("wood", 0),
        ],
    )
    def test_attributes(self, wanted, found):
        assert matched_attributes(LAMP, [wanted]) == found

    def test_one_bought_value_may_satisfy_several_wanted_ones(self):
        assert matched_options(["dark red"], ["dark", "darker", "blue"]) == 2

    @pytest.mark.parametrize(
        ("value", "official", "fixed"),
        [
            ("dark red", "dark", "dark"),
            ("standard", "tan", "standard"),
            ("shredded", "red", "shredded"),
            ("02 pink", "pink", "pink"),
            ("xl", "xl", "xl"),
        ],
    )
    def test_colours(self, value, official, fixed):
        assert normalize_color(value) == official
        assert normalize_color(value, "fixed") == fixed

    def test_similarity_of_what_has_no_letters(self):
        assert similarity("!!", "!!") == similarity("", "a") == 0


class TestNouns:
    def test_the_largest_spacy_model_that_is_there(self, monkeypatch):
        class Model:
            def __init__(self, model):
                self.name = model

            def __call__(self, title):
                return [title]

        monkeypatch.setattr(module, "SpacyNouns", Model)
        installed = {"spacy", "en_core_web_md", "en_core_web_sm"}
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name if name in installed else None)
        nouns = english_nouns.__wrapped__()
        assert nouns.name == "en_core_web_md"
        assert nouns("lamp") == ("lamp",)

    def test_textblob_without_spacy(self, monkeypatch):
        pytest.importorskip("textblob")
        monkeypatch.setattr(module, "SPACY_MODELS", ("no_such_model",))
        nouns = english_nouns.__wrapped__()
        assert nouns.name.startswith("textblob ")
        assert nouns.name.endswith(" PatternTagger")
        assert list(nouns("Floor Lamp with Shelves")) == ["floor", "lamp", "shelves"]
