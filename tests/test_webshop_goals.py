import random

import pytest

from envs.webshop.goals import (
    CEILINGS,
    Goal,
    cumulative,
    draw,
    draw_prices,
    human_goals,
    random_index,
    shuffled,
    synthetic_goals,
)
from tests.official_webshop import LAMP, SEED, TWO, WRITTEN, contents, drawn, lines, path, product, products, recorded

ENTRIES = {
    "B0LAMP": {"instruction": "Find me a lamp", "instruction_attributes": ["easy clean", "steel"]},
    "b0mug": {"instruction": "Find me a mug", "instruction_attributes": ["steel"]},
}


def goals_of(count: int, weights: list[float] | None = None) -> list[Goal]:
    return [
        Goal(
            asin=str(number),
            category="",
            query="",
            name="",
            product_category="",
            instruction_text="",
            attributes=[],
            price_upper=10.0,
            goal_options=[],
            weight=weights[number] if weights else 1,
        )
        for number in range(count)
    ]


class TestRecorded:
    pytestmark = recorded

    def test_prices(self):
        wanted = contents("load_main.json")["prices"]
        assert drawn().prices == wanted
        assert len(wanted) == 370

    def test_order_of_products(self):
        assert list(products()) == contents("load_main.json")["all_asins"]

    def test_goals(self):
        wanted = contents("goals_main.json")
        assert drawn().goals == wanted
        assert len(wanted) == 283

    def test_weights(self):
        assert cumulative(drawn().goals)[-3:] == contents("load_main.json")["cum_weights_tail"]

    def test_a_seed_other_than_the_recorded_one_draws_other_prices(self):
        written = contents("catalogue_main/items_human_ins.json")
        assert draw(products(), SEED + 1, instructions=written).prices != drawn().prices


class TestPrices:
    def test_one_price_is_kept_and_costs_no_draw(self):
        rng = random.Random(0)
        state = rng.getstate()
        assert draw_prices([("a", [12.5]), ("b", [])], rng) == {"a": 12.5, "b": 100.0}
        assert rng.getstate() == state

    def test_two_prices_are_ends_of_a_range_in_either_order(self):
        prices = draw_prices([("a", [1.0, 2.0]), ("b", [10.5, 0.75])], random.Random(0))
        rng = random.Random(0)
        assert prices == {"a": 1.0 + rng.random(), "b": 10.5 + (0.75 - 10.5) * rng.random()}


class TestHumanGoals:
    def test_by_hand(self):
        prices = {"B0LAMP": 30.0, "b0mug": 985.0}
        lamp, mug = human_goals(TWO, WRITTEN, prices, random.Random(0))
        ceiling = max(random.Random(0).sample((40.0, 50.0, 60.0, 70.0), 2))
        assert lamp == {
            "asin": "B0LAMP",
            "category": "garden",
            "query": "floor lamps",
            "name": "Floor Lamp",
            "product_category": path("Home", "Lamps", "Floor Lamps"),
            "instruction_text": f"i want a black lamp, and price lower than {ceiling:.2f} dollars",
            "attributes": ["easy clean", "Made of"],
            "price_upper": ceiling,
            "goal_options": ["black"],
            "weight": 1,
        }
        assert mug["instruction_text"] == "find a mug"
        assert mug["price_upper"] == 1000000

    @pytest.mark.parametrize(("price", "has_ceiling"), [(0.0, True), (979.99, True), (980.0, False), (5000.0, False)])
    def test_a_ceiling_needs_two_tens_above_the_price(self, price, has_ceiling):
        goal = human_goals(TWO, {"B0LAMP": WRITTEN["B0LAMP"]}, {"B0LAMP": price}, random.Random(1))[0]
        assert ("lower than" in goal["instruction_text"]) == has_ceiling
        assert (goal["price_upper"] in CEILINGS) == has_ceiling

    def test_a_missing_field_is_named(self):
        with pytest.raises(ValueError, match=r"'B0LAMP' has no 'instruction_options'"):
            human_goals(TWO, {"B0LAMP": [{"instruction": "", "instruction_attributes": ["x"]}]}, {}, random.Random(0))


class TestSyntheticGoals:
    def test_every_combination_of_options(self):
        goals = synthetic_goals(TWO, ENTRIES, {"B0LAMP": 30.0, "b0mug": 990.0}, random.Random(0))
        options = [goal["goal_options"] for goal in goals]
        assert options == [
            {"color": "black", "kind": "next >"},
            {"color": "black", "kind": "with [bulb]"},
            {"color": "dark red", "kind": "next >"},
            {"color": "dark red", "kind": "with [bulb]"},
            {"size": "standard"},
        ]
        assert len({goal["price_upper"] for goal in goals[:4]}) == 1
        clause = f", and price lower than {goals[0]['price_upper']:.2f} dollars"
        assert goals[0]["instruction_text"] == f"Find me a lamp with color: black, and kind: next >{clause}"
        assert goals[4]["instruction_text"] == "Find me a mug with size: standard"
        assert [goal["weight"] for goal in goals] == [(1 / 4 + 1 / 5) / 2] * 4 + [1 / 5]

    def test_an_option_without_values_gives_no_goal_but_costs_a_draw(self):
        rng = random.Random(0)
        empty = product("a", "A", options={"color": []})
        assert not synthetic_goals({"a": empty}, {"a": ENTRIES["B0LAMP"]}, {"a": 1.0}, rng)
        assert rng.getstate() != random.Random(0).getstate()

    def test_no_options_and_no_instruction(self):
        entries = {"a": ENTRIES["b0mug"], "b": {"instruction": None}}
        both = {"a": product("a", "A"), "b": product("b", "B")}
        goals = synthetic_goals(both, entries, {"a": 990.0, "b": 1.0}, random.Random(0))
        assert [goal["instruction_text"] for goal in goals] == ["Find me a mug"]

    def test_a_product_without_an_entry_is_named(self):
        with pytest.raises(ValueError, match="'b0mug' has none"):
            synthetic_goals(TWO, {"B0LAMP": {}}, {}, random.Random(0))

    def test_an_instruction_without_attributes_is_refused(self):
        with pytest.raises(ValueError, match="no instruction_attributes"):
            synthetic_goals({"B0LAMP": LAMP}, {"B0LAMP": {"instruction": "x"}}, {"B0LAMP": 1.0}, random.Random(0))


class TestDraw:
    def test_is_a_function_of_its_arguments_and_leaves_the_global_generator(self):
        before = random.getstate()
        first, second = (draw(TWO, 7, instructions=WRITTEN) for _ in range(2))
        assert first == second
        assert random.getstate() == before

    def test_prices_may_come_beside_the_products(self):
        pricings = [(asin, each["pricing"]) for asin, each in TWO.items()]
        assert draw(TWO, 7, instructions=WRITTEN, pricings=pricings) == draw(TWO, 7, instructions=WRITTEN)

    def test_synthetic_without_instructions(self):
        assert len(draw(TWO, 7, attributes=ENTRIES).goals) == 5


class TestOrder:
    def test_depends_on_the_number_of_goals_alone(self):
        order = [int(goal["asin"]) for goal in shuffled(goals_of(5))[0]]
        expected = list(range(5))
        random.Random(233).shuffle(expected)
        assert order == expected

    def test_limit_keeps_different_goals_but_never_the_first(self):
        for limit in range(5):
            order, kept = (shuffled(goals_of(5), limit=most)[0] for most in (None, limit))
            assert len({goal["asin"] for goal in kept}) == limit
            assert order[0] not in kept

    def test_a_limit_beyond_the_goals_keeps_all_and_draws_nothing(self):
        everything = shuffled(goals_of(5))
        limited = shuffled(goals_of(5), limit=5)
        assert limited[0] == everything[0]
        assert limited[1].getstate() == everything[1].getstate()

    def test_a_negative_limit_is_refused(self):
        with pytest.raises(ValueError, match="limit_goals"):
            shuffled(goals_of(2), limit=-1)


class TestRandomIndex:
    def count(self, weights, profile):
        totals = cumulative(goals_of(len(weights), weights))
        rng = random.Random(0)
        found = [random_index(totals, rng, profile) for _ in range(6000)]
        return [found.count(number) for number in range(len(weights))]

    def test_official_is_one_too_high(self):
        first, second, last = self.count([1, 1, 1], "official")
        assert first == 0
        assert second == pytest.approx(2000, abs=200)
        assert last == pytest.approx(4000, abs=200)

    def test_fixed_follows_the_weights(self):
        first, second, last = self.count([1, 2, 3], "fixed")
        assert (first, second, last) == pytest.approx((1000, 2000, 3000), abs=200)

    def test_one_goal(self):
        assert self.count([1], "official") == self.count([1], "fixed") == [6000]


@recorded
def test_recorded_resets_follow_the_shuffle():
    """The generator that shuffled goes on: the constructor's session, then those of thirty resets."""
    after = drawn()
    rng = random.Random()
    rng.setstate(after.random_state)
    totals = cumulative(after.goals)
    names = [
        contents("load_main.json")["first_session"],
        *(row["session"] for row in contents("random_resets_main.json")),
    ]
    for name in names:
        assert "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=10)) == name
        random_index(totals, rng)
    assert len(names) == 31


@recorded
def test_recorded_rewards_name_goals_by_their_place():
    assert max(case["goal_idx"] for case in lines("reward_cases_main.jsonl")) < len(drawn().goals)
