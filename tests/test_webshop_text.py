import dataclasses
from typing import Any

import pytest

from envs.webshop.goals import cumulative, draw
from envs.webshop.search import TooManyTermsError, document_of, open_index
from envs.webshop.text import OfficialError, Shop, WebShopText, html_json, segments, where
from tests.official_webshop import (
    LAMP,
    TWO,
    WRITTEN,
    RecordedNouns,
    Words,
    contents,
    drawn,
    lines,
    product,
    products,
    recorded,
)


def shop_of(everything: Any, search: Any, **fields: Any) -> Shop:
    """A shop with one instruction per product, which costs what its first price is."""
    written = {
        asin: WRITTEN.get(asin) or [{**WRITTEN["b0mug"][0], "instruction": f"find {asin}"}] for asin in everything
    }
    found = draw(everything, 0, instructions=written)
    prices = {asin: each["pricing"][0] for asin, each in everything.items()}
    return Shop(
        **{
            "products": everything,
            "goals": found.goals,
            "prices": prices,
            "random_state": found.random_state,
            "search": search,
            "where": where(everything),
            "nouns": Words(),
            **fields,
        }
    )


def search_titles(query: str, k: int) -> list[str]:
    return [asin for asin, each in TWO.items() if set(query.split()) & set(each["Title"].lower().split())][:k]


def play(*actions: str, asin: str = "B0LAMP", **fields: Any) -> WebShopText:
    """The two-product shop after these actions, with the goal of one of the products."""
    env = WebShopText(shop_of(TWO, **{"search": search_titles, **fields}))
    env.reset(next(number for number, goal in enumerate(env.shop.goals) if goal["asin"] == asin))
    for action in actions:
        env.step(action)
    return env


INSTRUCTION = next(goal for goal in draw(TWO, 0, instructions=WRITTEN).goals if goal["asin"] == "B0LAMP")[
    "instruction_text"
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    """The shop of the recordings."""
    everything, found = products(), drawn()
    index = open_index(
        tmp_path_factory.mktemp("index") / "main",
        "recorded",
        lambda: ((asin, document_of(each)) for asin, each in everything.items()),
    )
    return Shop(
        products=everything,
        goals=found.goals,
        prices=found.prices,
        random_state=found.random_state,
        search=lambda query, k: [hit.asin for hit in index.search(query, k)],
        where=where(everything),
        nouns=RecordedNouns(),
    )


@recorded
class TestRecorded:
    def test_episodes(self, shop):
        """Every recorded step: observation, available actions, reward, done, URL, and what was bought."""
        env = WebShopText(shop)
        rows = lines("traces_main.jsonl")
        misses = []
        for row in rows:
            got: dict[str, Any] = {}
            try:
                if row["action"] is None:
                    got |= {"obs": env.reset(row["session"]), "reward": None, "done": None}
                else:
                    step = env.step(row["action"])
                    got |= {"obs": step.observation, "reward": step.reward, "done": step.done}
                got["available"] = env.available._asdict()
            except OfficialError as error:
                got |= {"obs": None, "reward": None, "done": None, "available": None, "error": str(error).split(":")[0]}
            wanted = {name: row[name] for name in ("obs", "reward", "done", "available")}
            if "error" in row:
                wanted["error"] = row["error"].split(":")[0]
            if "reward_info" in row and row["done"]:
                bought = env.purchase
                assert bought is not None
                wanted |= {"info": row["reward_info"], "bought": row["bought"]}
                got |= {"info": bought.info, "bought": {"asin": bought.asin, "options": bought.options}}
            if (got, env.url, env.goal_index) != (wanted, row["url"], row["goal_idx"]):
                misses.append((row["episode"], row["step"], got, wanted))
        assert not misses, f"{len(rows) - len(misses)} of {len(rows)} steps exact"
        assert len(rows) == 361
        assert sum(row["step"] == 0 for row in rows) == 50

    def test_resets_without_a_session(self, shop):
        env = WebShopText(shop)
        loaded = contents("load_main.json")
        assert (env.session, env.goal["instruction_text"]) == (loaded["first_session"], loaded["first_goal"])
        wanted = contents("random_resets_main.json")
        got = [{"obs": env.reset(), "session": env.session, "goal_idx": env.goal_index} for _ in wanted]
        assert got == wanted
        assert len(wanted) == 30


class TestPages:
    def test_a_purchase_by_hand(self):
        env = play()
        assert env.page.text == f"WebShop [SEP] Instruction: [SEP] {INSTRUCTION} [SEP] Search"
        assert env.available == (True, ["search"])

        step = env.step("search[Floor Lamp]")
        assert step == (
            f"Instruction: [SEP] {INSTRUCTION} [SEP] Back to Search [SEP] Page 1 (Total results: 1) [SEP] Next > "
            "[SEP] B0LAMP [SEP] Floor Lamp [SEP] $30.0 to $40.0",
            0.0,
            False,
            True,
        )
        assert env.available == (False, ["back to search", "next >", "b0lamp"])

        item = (
            f"Instruction: [SEP] {INSTRUCTION} [SEP] Back to Search [SEP] < Prev [SEP] color [SEP] black [SEP] "
            "dark red [SEP] kind [SEP] next > [SEP] with [bulb] [SEP] Floor Lamp [SEP] Price: $30.0 to $40.0 [SEP] "
            "Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
        )
        assert env.step("click[B0LAMP]").observation == item
        buttons = ["back to search", "< prev", "description", "features", "reviews", "buy now"]
        assert env.available == (False, [*buttons, "black", "dark red", "next >", "with [bulb]"])

        assert env.step("click[Black]").observation == item
        assert env.url.endswith(
            '/item_page/0/B0LAMP/floor+lamp/1/{"color": "black"}'.replace("/0/", f"/{env.session}/")
        )
        top = f"Instruction: [SEP] {INSTRUCTION} [SEP] Back to Search [SEP] < Prev"
        assert env.step("click[Features]").observation == f"{top} [SEP] Easy to clean [SEP]  [SEP] Made of steel"
        assert env.step("click[< Prev]").observation == item
        assert env.step("click[Description]").observation == f"{top} [SEP] A lamp for <dark> rooms."
        assert env.available == (False, ["back to search", "< prev"])
        assert env.step("click[< prev]").observation == item
        assert env.step("click[Reviews]").observation == top
        env.step("click[< prev]")

        step = env.step("click[Buy Now]")
        assert (step.reward, step.done, step.valid) == (0.75, True, True)
        assert step.observation.startswith("Thank you for shopping with us! [SEP] Your code: [SEP] None [SEP] ")
        assert 'asin [SEP] B0LAMP [SEP] options [SEP] {"color": "black"} [SEP] attrs' in step.observation
        assert step.observation.endswith("(min 0.0, max 1.0) [SEP] 0.75 [SEP] Reward Details [SEP] None")
        assert env.available == (False, [])
        assert env.purchase is not None
        assert (env.purchase.asin, env.purchase.options, env.purchase.price) == ("B0LAMP", {"color": "black"}, 30.0)

    def test_attributes_have_a_page_if_the_shop_shows_them(self):
        env = play("search[lamp]", "click[b0lamp]", show_attrs=True)
        assert env.available.clickables[5:7] == ["attributes", "buy now"]
        observation = env.step("click[Attributes]").observation
        shown = f"easy clean [SEP] stainless steel [SEP] garden [SEP] floor lamps [SEP] {LAMP['product_category']}"
        assert observation.endswith(f"< Prev [SEP] {shown}")

    def test_reviews(self):
        review = {"title": "Good", "score": 5, "body": "Bright."}
        reviewed = {"B0LAMP": {**LAMP, "Reviews": [review]}}
        env = WebShopText(shop_of(reviewed, lambda query, k: ["B0LAMP"]))
        for action in ("search[x]", "click[b0lamp]", "click[reviews]"):
            env.step(action)
        assert env.page.text.endswith('< Prev [SEP] "Good" [SEP] 5 [SEP] Bright.')

    def test_pages_of_ten(self):
        everything = {f"B{number}": product(f"B{number}", f"T{number}") for number in range(12)}
        env = WebShopText(shop_of(everything, lambda query, k: list(everything)[:k]))
        first = env.step("search[x]").observation
        assert "Page 1 (Total results: 12)" in first
        assert env.available.clickables == ["back to search", "next >", *(f"b{number}" for number in range(10))]
        env.step("click[next >]")
        assert env.available.clickables == ["back to search", "< prev", "next >", "b10", "b11"]
        env.step("click[next >]")
        assert env.available.clickables == ["back to search", "< prev", "next >"]
        assert "Page 3 (Total results: 12) [SEP] < Prev [SEP] Next >" in env.page.text
        env.step("click[< prev]")
        assert env.step("click[< prev]").observation == first

    @pytest.mark.parametrize(
        ("strings", "shown"),
        [
            (["a", "", "b"], ["a", "b"]),
            ([" a\n"], ["a"]),
            ([" "], [""]),
            ([" \n\t"], []),
            (["\t\r"], [""]),
            (["\u00a0"], [""]),
            (["\u00a0\n"], [""]),
        ],
    )
    def test_what_of_blanks_is_seen(self, strings, shown):
        assert segments(strings) == shown

    def test_options_on_the_done_page_are_json_safe_in_html(self):
        assert html_json({"b": "<'&>", "a": "é"}) == '{"a": "\\u00e9", "b": "\\u003c\\u0027\\u0026\\u003e"}'


class TestActions:
    @pytest.mark.parametrize(
        "action",
        [
            *("", "buy now", "click", "click[]", "search[]", " search[lamp]", "SEARCH[lamp]", "Click[buy now]"),
            *("click[buy now ]", "click[no such thing]", "think[hmm]", "search[a\nb]", "search[lamp] click[buy now]"),
            *("click[search]", "click[with [bulb]]"),
        ],
    )
    def test_invalid_ones_change_nothing(self, action):
        env = play("search[lamp]", "click[b0lamp]")
        before = env.page.text, env.url
        assert env.step(action) == (before[0], 0, False, False)
        assert (env.page.text, env.url) == before

    @pytest.mark.parametrize("action", ["click[BUY NOW]", "click[buy now] and more", "click[buy now]\nObservation: x"])
    def test_odd_ones_that_count(self, action):
        assert play("search[lamp]", "click[b0lamp]").step(action).done

    @pytest.mark.parametrize("action", [" click[ Buy Now ]", "click[Buy Now]  ", "click [buy now]", "click[buy\n now]"])
    def test_fixed_ignores_blanks_around(self, action):
        env = play("search[lamp]", "click[b0lamp]", profile="fixed")
        assert env.step(action).done == ("\n" not in action)

    def test_fixed_clicks_values_with_brackets(self):
        env = play("search[lamp]", "click[b0lamp]", "click[with [bulb]]", "click[buy now]", profile="fixed")
        assert env.purchase is not None
        assert env.purchase.options == {"kind": "with [bulb]"}

    def test_search_works_everywhere_and_after_buying(self):
        env = play("search[lamp]", "click[b0lamp]", "click[buy now]")
        assert env.step("click[buy now]") == (env.page.text, 0, False, False)
        assert "Total results: 1" in env.step("search[lamp]").observation
        env.step("click[b0lamp]")
        assert env.step("click[buy now]").done

    def test_fixed_ends_with_buying(self):
        env = play("search[lamp]", "click[b0lamp]", "click[buy now]", profile="fixed")
        assert not env.step("search[lamp]").valid
        env.reset()
        assert env.step("search[lamp]").valid

    def test_options_are_forgotten_on_the_way_to_the_results_and_kept_on_sub_pages(self):
        path = ("search[lamp]", "click[b0lamp]", "click[black]", "click[features]", "click[< prev]")
        env = play(*path)
        assert env.url.endswith('{"color": "black"}')
        env.step("click[< prev]")
        assert env.step("click[b0lamp]")
        assert env.url.endswith("{}")

    def test_an_option_that_reads_like_the_next_button_is_an_option(self):
        env = play("search[lamp]", "click[b0lamp]", "click[next >]")
        assert env.url.endswith('{"kind": "next >"}')

    def test_of_equal_values_the_last_option_is_chosen(self):
        twice = {"a": product("a", "A", options={"one": ["x", "buy now"], "two": ["x"]})}
        env = WebShopText(shop_of(twice | {"A": twice["a"] | {"asin": "A"}}, lambda query, k: ["A"]))
        for action in ("search[x]", "click[a]", "click[x]"):
            env.step(action)
        assert env.url.endswith('{"two": "x"}')
        assert env.available.clickables[-2:] == ["buy now", "x"]
        assert env.step("click[buy now]").done


class TestUrls:
    def test_a_query_that_names_a_page_misleads_the_previous_button(self):
        env = play("search[search_results lamp]", "click[b0lamp]", "click[< prev]")
        assert "Page 0 (Total results: 1)" in env.page.text
        assert env.available.clickables == ["back to search", "next >"]
        env = play("search[item_page lamp]", "click[b0lamp]", "click[features]", "click[< prev]")
        assert env.page.kind == "search_results"

    def test_fixed_goes_back_to_where_it_came_from(self):
        env = play("search[search_results lamp]", "click[b0lamp]", "click[< prev]", profile="fixed")
        assert "Page 1" in env.page.text
        env = play("search[item_page lamp]", "click[b0lamp]", "click[features]", "click[< prev]", profile="fixed")
        assert env.page.kind == "item_page"

    def test_fixed_has_a_next_page_only_if_there_are_more_results(self):
        assert "next >" not in play("search[lamp]", profile="fixed").available.clickables

    def test_fixed_shows_no_empty_bullet_points(self):
        env = play("search[lamp]", "click[b0lamp]", "click[features]", profile="fixed")
        assert env.page.text.endswith("Easy to clean [SEP] Made of steel")


class TestSpecialSearches:
    def test_category_and_query(self):
        assert play("search[<c> kitchen]").available.clickables[2:] == ["b0mug"]
        assert play("search[<q> floor  lamps]").available.clickables[2:] == []
        assert play("search[<q> floor lamps]").available.clickables[2:] == ["b0lamp"]

    @pytest.mark.parametrize(
        ("action", "official", "fixed"),
        [
            ("search[<c>]", "IndexError", []),
            ("search[<a> easy clean]", "TypeError", ["b0lamp"]),
            ("search[<r>]", "ValueError", ["b0lamp", "b0mug"]),
        ],
    )
    def test_where_the_official_code_raises(self, action, official, fixed):
        env = play()
        before = env.page.text
        with pytest.raises(OfficialError, match=official):
            env.step(action)
        assert env.page.text == before
        assert env.step("search[lamp]").valid
        assert sorted(play(action, profile="fixed").available.clickables[1:]) == fixed

    def test_random_results_are_drawn_again_on_every_page(self):
        everything = {f"B{number}": product(f"B{number}", f"T{number}") for number in range(200)}
        env = WebShopText(shop_of(everything, lambda query, k: []))
        first = env.step("search[<r> ignored]").observation
        assert "Total results: 50" in first
        env.step("click[next >]")
        assert env.step("click[< prev]").observation != first

    def test_too_many_terms(self):
        def search(query, k):
            raise TooManyTermsError(query)

        with pytest.raises(OfficialError, match="TooManyClauses"):
            play("search[lamp]", search=search)
        assert "Total results: 0" in play("search[lamp]", search=search, profile="fixed").page.text

    def test_asins_with_lower_case_letters(self):
        with pytest.raises(OfficialError, match="KeyError"):
            play("search[mug]", "click[b0mug]")
        assert "Enamel Mug" in play("search[mug]", "click[b0mug]", profile="fixed").page.text

    def test_hits_that_the_catalogue_does_not_hold_are_dropped(self):
        env = play("search[x]", search=lambda query, k: ["gone", "B0LAMP"])
        assert "Total results: 1" in env.page.text

    def test_turning_pages_does_not_search_again(self):
        queries = []

        def search(query, k):
            queries.append((query, k))
            return ["B0LAMP"]

        play("search[a  B ]", "click[next >]", "click[< prev]", "click[b0lamp]", "click[< prev]", search=search)
        assert queries == [("a  b ", 50)]


class TestSessions:
    def test_a_number_is_a_goal_and_may_count_from_the_end(self):
        env = play()
        texts = [goal["instruction_text"] for goal in env.shop.goals]
        for session in (0, 1, -1, -2):
            assert texts[session] in env.reset(session)
            assert env.session == str(session)
        with pytest.raises(IndexError, match="No goal 2: this shop has goals 0 to 1"):
            env.reset(2)

    def test_a_known_name_keeps_its_goal(self):
        env = WebShopText(dataclasses.replace(play().shop, profile="fixed"))
        goals = {name: (env.reset(name), env.goal_index)[1] for name in "abcdefgh"}
        assert set(goals.values()) == {0, 1}
        assert {name: (env.reset(name), env.goal_index)[1] for name in goals} == goals

    def test_a_name_that_was_a_number_keeps_the_numbers_goal(self):
        env = play()
        env.reset(0)
        env.reset("0")
        assert env.goal_index == 0

    def test_environments_of_one_shop_draw_alike_and_share_nothing(self):
        first = play().shop
        one, other = WebShopText(first), WebShopText(first)
        assert [one.reset() for _ in range(5)] == [other.reset() for _ in range(5)]
        one.step("search[lamp]")
        assert other.page.kind == ""

    def test_going_back_to_the_search_keeps_the_session(self):
        env = play("search[lamp]", "click[b0lamp]", "click[back to search]")
        assert env.page.text == f"WebShop [SEP] Instruction: [SEP] {INSTRUCTION} [SEP] Search"

    def test_a_shop_without_goals_is_refused(self):
        with pytest.raises(ValueError, match="no goals"):
            WebShopText(dataclasses.replace(play().shop, goals=[]))

    def test_the_first_goal_is_never_drawn(self):
        env = play()
        assert cumulative(env.shop.goals) == [0, 1, 2]
        assert {(env.reset(), env.goal_index)[1] for _ in range(50)} == {1}
