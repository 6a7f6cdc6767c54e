import ast
import dataclasses
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import requests
from bs4 import BeautifulSoup
from flask.testing import FlaskClient
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from envs.webshop import server
from envs.webshop.client import WebShopClient
from envs.webshop.goals import cumulative
from envs.webshop.search import TooManyTermsError
from envs.webshop.server import LONGEST_LITERAL, Sessions, create_app, read_dict, read_list, serving
from envs.webshop.settings import Settings
from envs.webshop.text import PER_PAGE, Shop, item_page, results_page, sub_page
from tests.official_webshop import TWO, lines, product, recorded
from tests.webshop_site import goal_of, noted, recorded_shop, small_shop, text_of

NASTY = """</title></script><script>window.injected = 1</script>"' onload=alert(1) & <b>bold</b> {{ 7 * 7 }}"""


@pytest.fixture(scope="module")
def shop() -> Shop:
    return small_shop()


@pytest.fixture(scope="module")
def site(shop: Shop) -> FlaskClient:
    return create_app(shop).test_client()


@recorded
def test_every_recorded_request(tmp_path):
    """Status, place, text, forms, links, option values and rewards, as the official site answered."""
    site = create_app(recorded_shop(tmp_path / "index")).test_client()
    rows, misses = lines("http.jsonl"), []
    for row in rows:
        answer = site.open(row["path"], method=row["method"], data=row["data"])
        got = {"status": answer.status_code, "location": answer.headers.get("Location")}
        got["content_type"] = answer.headers["Content-Type"]
        if answer.status_code == 200:
            got |= noted(answer.get_data(as_text=True))
        misses += [(row["episode"], row["step"], key, got[key], row[key]) for key in got if got[key] != row[key]]
    assert not misses
    assert len(rows) == 93
    assert len({row["episode"] for row in rows}) == 8


class TestAddresses:
    def test_the_root_leads_to_a_session(self, site):
        answer = site.get("/")
        assert (answer.status_code, answer.headers["Location"]) == (302, "/abc")

    @pytest.mark.parametrize(
        "path",
        [
            "/abc",
            "/fixed_0",
            "/fixed_-1",
            "/favicon.ico",
            "/search_results/fixed_1/['lamp']/1",
            "/search_results/fixed_1/lamp/0",
            "/search_results/fixed_1/lamp/-1",
            "/search_results/fixed_1/floor lamp/99",
            '/search_results/fixed_1/["floor","lamp",]/1',
            "/item_page/fixed_1/B0LAMP/floor lamp/1/{}",
            "/item_page/fixed_1/b0mug/[]/1/{'size': 'standard'}",
            "/item_page/fixed_1/B0LAMP/lamp/1/{'color': \"no such\", 'other': '\\x41'}",
            "/item_sub_page/fixed_1/B0LAMP/lamp/1/Attributes/{}",
            "/done/fixed_1/B0LAMP/{}",
        ],
    )
    def test_that_there_are(self, site, path):
        assert site.get(path).status_code == 200
        assert site.post(path).status_code == 200

    @pytest.mark.parametrize(
        "path",
        [
            "/fixed_2",
            "/fixed_-3",
            "/fixed_abc",
            "/fixed",
            "/fixed_" + "9" * 5000,
            "/" + "n" * 201,
            "/abc/",
            "/search_results/unknown/lamp/1",
            "/item_page/unknown/B0LAMP/lamp/1/{}",
            "/done/unknown/B0LAMP/{}",
            "/search_results/fixed_1/lamp/abc",
            "/search_results/fixed_1/lamp/" + "1" * 5000 + "x",
            "/search_results/fixed_1/[]/1",
            "/search_results/fixed_1/['lamp'/1",
            "/search_results/fixed_1/[1]/1",
            "/search_results/fixed_1/['floor/lamp']/1",
            "/item_page/fixed_1/B0NONE/lamp/1/{}",
            "/item_page/fixed_1/B0LAMP/lamp/one/{}",
            "/item_page/fixed_1/B0LAMP/lamp/1/[]",
            "/item_page/fixed_1/B0LAMP/lamp/1/{'color': 1}",
            "/item_page/fixed_1/B0LAMP/lamp/1/{'color'}",
            "/item_page/fixed_1/B0LAMP/lamp/1/None",
            "/item_sub_page/fixed_1/B0LAMP/lamp/1/description/{}",
            "/done/fixed_1/B0NONE/{}",
            "/done/fixed_1/B0LAMP/{'a': __import__('os')}",
            "/no/such",
            "/-/static/none.css",
            "/-/static/../server.py",
        ],
    )
    def test_that_there_are_not(self, site, path):
        for answer in (site.get(quote(path, safe="/'")), site.post(quote(path, safe="/'"))):
            assert answer.status_code == 404 or (answer.status_code, path[:10]) == (405, "/-/static/")
            assert "Traceback" not in answer.get_data(as_text=True)
            assert answer.headers["X-Content-Type-Options"] == "nosniff"

    def test_other_methods(self, site):
        for path in ("/abc", "/done/fixed_1/B0LAMP/{}"):
            assert site.put(path).status_code == 405
        assert "GET" in site.put("/abc").headers["Allow"]

    def test_a_search_is_an_address(self, site):
        answer = site.post("/fixed_0", data={"search_query": "Women's  Caf\u00e9"})
        assert answer.headers["Location"] == "/search_results/fixed_0/%5B%22women's%22,%20'',%20'caf%C3%A9'%5D/1"
        assert site.post("/fixed_0", data={"other": "x"}).status_code == 200

    def test_without_capitals_in_asins(self, site):
        links = noted(site.get("/search_results/fixed_0/mug/1").get_data(as_text=True))["links"]
        assert [link["text"] for link in links] == ["b0mug"]
        assert "Enamel Mug" in site.get(links[0]["href"]).get_data(as_text=True)

    def test_options_follow_each_other(self, site):
        page = noted(site.get("/item_page/fixed_0/B0LAMP/lamp/1/{'color': 'black'}").get_data(as_text=True))
        options = [urlsplit(radio["data_url"]).path.rpartition("/")[2] for radio in page["radios"]]
        assert options == [
            quote(each, safe="':,")
            for each in (
                "{'color': 'black'}",
                "{'color': 'dark red'}",
                "{'color': 'black', 'kind': 'next >'}",
                "{'color': 'black', 'kind': 'with [bulb]'}",
            )
        ]

    def test_the_chosen_option_is_marked(self, site):
        html = site.get("/item_page/fixed_0/B0LAMP/lamp/1/{'color': 'dark red'}").get_data(as_text=True)
        assert [radio["value"] for radio in BeautifulSoup(html, "html.parser").select("[checked]")] == ["dark red"]

    def test_health(self, site):
        answer = site.get("/-/health")
        assert answer.json == {"status": "ok", "products": 2, "goals": 2, "profile": "official", "tagger": "words"}

    def test_headers_that_protect(self, site):
        for path in ("/abc", "/", "/none/at/all", "/-/health", "/-/static/webshop.js"):
            answer = site.get(path)
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
            assert "unsafe" not in answer.headers["Content-Security-Policy"]
        html = site.get("/abc").get_data(as_text=True)
        assert not re.search(r"<script(?! src=)|\son\w+=|<style|style=", html)

    def test_pages_ask_nothing_of_other_machines(self, site):
        for path in ("/abc", "/search_results/fixed_0/lamp/1", "/item_page/fixed_0/B0LAMP/lamp/1/{}"):
            html = site.get(path).get_data(as_text=True)
            assert not re.search(r'(?:src|href|action)="(?!/)', html)
        css = site.get("/-/static/webshop.css").get_data(as_text=True)
        assert not re.search(r"url\(|@import|https?:", css)


class TestProfiles:
    def test_a_slash_in_a_keyword(self):
        for profile, status in (("official", 404), ("fixed", 200)):
            site = create_app(small_shop(profile=profile)).test_client()
            place = site.post("/fixed_0", data={"search_query": "Lamp/x lamp"}).headers["Location"]
            assert site.get(place).status_code == status

    def test_a_slash_in_the_name_of_an_option(self):
        cable = product("B0CABLE", "Cable", options={"size/length": ["1 m", "2 m"]})
        for profile, status in (("official", 404), ("fixed", 200)):
            site = create_app(small_shop({"B0CABLE": cable}, profile=profile)).test_client()
            page = noted(site.get("/item_page/fixed_0/B0CABLE/cable/1/{}").get_data(as_text=True))
            answer = site.get(page["radios"][1]["data_url"])
            assert answer.status_code == status
        buy = noted(answer.get_data(as_text=True))["forms"][-1]
        assert '{"size/length": "2 m"}' in noted(site.post(buy["action"]).get_data(as_text=True))["text"]

    @pytest.mark.parametrize(
        ("keywords", "official", "fixed"),
        [
            ("['<a>', 'easy', 'clean']", 1, 1),
            ("['<a>', 'nothing']", 0, 0),
            ("['<c>', 'kitchen']", 1, 1),
            ("['<q>', 'floor', 'lamps']", 1, 1),
            ("['<c>']", None, 0),
            ("['<r>']", None, 2),
            ("['too', 'many']", None, 0),
        ],
    )
    def test_special_searches(self, keywords, official, fixed):
        def search(query: str, k: int) -> list[str]:
            raise TooManyTermsError(query)

        for profile, total in (("official", official), ("fixed", fixed)):
            answer = (
                create_app(small_shop(profile=profile, search=search))
                .test_client()
                .get(f"/search_results/fixed_0/{keywords}/1")
            )
            assert answer.status_code == (404 if total is None else 200)
            assert total is None or f"(Total results: {total})" in answer.get_data(as_text=True)

    def test_random_products_are_drawn_for_every_page(self):
        many = {f"B{number}": product(f"B{number}", "T") for number in range(200)}
        site = create_app(small_shop(many)).test_client()
        pages = [site.get("/search_results/fixed_0/['<r>']/1").get_data(as_text=True) for _ in range(2)]
        assert all("(Total results: 50)" in page for page in pages)
        assert pages[0] != pages[1]

    def test_a_query_is_searched_once(self):
        asked = []

        def search(query: str, k: int) -> list[str]:
            asked.append(query)
            return list(TWO)

        site = create_app(small_shop(search=search)).test_client()
        for number in (1, 2, 1):
            site.get(f"/search_results/fixed_0/['a', 'b']/{number}")
        assert asked == ["a b"]


class TestSessions:
    def test_goals_are_drawn_as_on_the_official_site(self, shop):
        rng = random.Random()
        rng.setstate(shop.random_state)
        sessions = Sessions(shop)
        for number in range(50):
            drawn = rng.choices(shop.goals, [goal["weight"] for goal in shop.goals])[0]
            assert sessions.goal(f"s{number}", begin=True) is drawn
        assert cumulative(shop.goals)[-1] == 2

    def test_a_session_keeps_its_goal(self, site):
        names = [f"kept{number}" for number in range(20)]
        first = [site.get(f"/{name}").get_data(as_text=True) for name in names]
        assert len(set(first)) > 1
        assert [site.get(f"/{name}").get_data(as_text=True) for name in names] == first
        assert noted(site.get(f"/search_results/{names[0]}/lamp/1").get_data(as_text=True))["text"].startswith(
            noted(first[0])["text"].removeprefix("WebShop [SEP] ").removesuffix(" [SEP] Search")
        )

    def test_the_longest_unused_are_forgotten(self, shop):
        sessions = Sessions(shop, 3)
        for name in "abc":
            sessions.goal(name, begin=True)
        sessions.goal("a")
        sessions.goal("d", begin=True)
        assert len(sessions) == 3
        for name in "acd":
            sessions.goal(name)
        with pytest.raises(server.NotFound, match="no such session"):
            sessions.goal("b")

    def test_memory_is_bounded(self, shop):
        app = create_app(shop, sessions=5)
        site = app.test_client()
        for number in range(50):
            assert site.get(f"/name{number}").status_code == 200
            assert site.get(f"/fixed_{number % 2}").status_code == 200
        assert sum(site.get(f"/search_results/name{number}/lamp/1").status_code == 200 for number in range(50)) == 5

    def test_threads_agree_on_a_goal(self, shop):
        sessions = Sessions(shop, 50)
        names = [f"n{number % 25}" for number in range(2000)]
        with ThreadPoolExecutor(16) as pool:
            goals = list(pool.map(lambda name: sessions.goal(name, begin=True)["asin"], names))
        assert len(set(zip(names, goals, strict=True))) == 25

    def test_a_shop_without_goals_is_refused(self, shop):
        with pytest.raises(ValueError, match="no goals"):
            create_app(dataclasses.replace(shop, goals=[]))


class TestLiterals:
    @given(st.lists(st.text()), st.dictionaries(st.text(), st.text()))
    @example(["\ud800", "\U0010ffff", "'\"\\", "a\nb\t\r\x00/"], {"": ""})
    def test_what_python_writes_is_read(self, strings, options):
        assert read_list(repr(strings)) == strings
        assert read_dict(repr(options)) == options
        slashes = repr(strings).replace("/", r"\x2f")
        assert "/" not in slashes
        assert read_list(slashes) == strings

    @given(st.text("""[]{}'",: \\nx41uU0{}a/\n""", max_size=12))
    def test_what_is_read_is_what_python_reads(self, text):
        for read in (read_list, read_dict):
            try:
                found: Any = read(text)
            except ValueError:
                continue
            assert found == ast.literal_eval(text.strip())

    @pytest.mark.parametrize(
        "text",
        [
            *("[" * 20_000, "[" * 20_000 + "]" * 20_000, "{" * 20_000, "-" * 40_000 + "1", "[" + "(" * 40_000),
            *("['" + "\\" * 40_000, "['" + "a" * 49_000, "[" + "'a'," * 12_000, "[" + "'a' " * 12_000 + "]"),
            *("[" + " " * 49_000, "{" + "'a':" * 12_000 + "}", "['a'" + "+'a'" * 9000 + "]", "[9**9**9]", "[b'a']"),
            *("['a', ['b']]", "['\\U00110000']", "['\\UFFFFFFFF']", "['\\xg0']", "['\\q']", "[f'a']", "['''a''']"),
            *("['a\n']", "[,]", "['a',,]", "{'a'}", "{'a': 'b' 'c': 'd'}", "{'a': 'b', **{}}", "['a'] or 1", "", "[]x"),
            "['" + "a" * LONGEST_LITERAL + "']",
        ],
    )
    def test_bombs_and_others_are_refused_at_once(self, site, text):
        began = time.perf_counter()
        for read in (read_list, read_dict):
            with pytest.raises(ValueError):
                read(text)
        if text[:1] in ("[", "{"):
            assert site.get(f"/search_results/fixed_0/['lamp{quote(text)}/1").status_code == 404
            assert site.get(f"/done/fixed_0/B0LAMP/{quote(text)}").status_code == 404
        assert time.perf_counter() - began < 2


KNOWN = [
    *("search_results", "item_page", "item_sub_page", "done", "-", "health", "static", "fixed_0", "fixed_", "abc"),
    *("B0LAMP", "b0mug", "lamp", "['lamp']", "[]", "{}", "{'color': 'black'}", "1", "0", "-1", "Description", ".."),
]
SEGMENT = st.one_of(
    st.sampled_from(KNOWN),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=3).map(repr),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2).map(repr),
    st.integers().map(str),
)


class TestAnyAddress:
    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(SEGMENT, max_size=8).filter(lambda segments: segments[:1] != [""]),  # `//x/y` is host and path
        st.sampled_from(["GET", "POST", "PUT", "HEAD"]),
        st.text(max_size=20),
    )
    def test_never_fails(self, site, segments, method, query):
        path = "/" + "/".join(quote(each.encode("utf-8", "replace"), safe="") for each in segments)
        words = query.encode("utf-8", "replace").decode()
        answer = site.open(path, method=method, data={"search_query": words} if method == "POST" else None)
        assert answer.status_code in (200, 302, 308, 404, 405)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.sampled_from(["search_results/{s}/{k}/{n}", "item_page/{s}/{a}/{k}/{n}/{o}", "done/{s}/{a}/{o}"]),
        st.fixed_dictionaries(
            {
                "s": st.sampled_from(["fixed_0", "fixed_-1", "nobody"]),
                "k": st.lists(st.text(max_size=6), max_size=4).map(repr) | st.text(max_size=20),
                "n": st.integers().map(str) | st.text(max_size=5),
                "a": st.sampled_from(["B0LAMP", "b0mug"]),
                "o": st.dictionaries(st.text(max_size=6), st.text(max_size=6)).map(repr) | st.text(max_size=20),
            }
        ),
    )
    def test_of_the_right_form_never_fails(self, site, form, parts):
        path = form.format(**{name: quote(value.encode("utf-8", "replace"), safe="") for name, value in parts.items()})
        assert site.get(f"/{path}").status_code in (200, 308, 404)

    def test_bytes_that_are_no_text(self, site):
        option = "/done/fixed_0/B0LAMP/%7B'%ed%a0%80':'a'%7D"
        for path in ("/%ff%fe", "/fixed_%ff", "/search_results/fixed_0/%ff/1", option):
            assert site.get(path).status_code in (200, 404)
        answer = site.post("/fixed_0", data=b"search_query=%ff%fe", content_type="application/x-www-form-urlencoded")
        assert answer.status_code == 302


BLANKS = ["", " ", "\n", " \n", "\u00a0", "<br>"]


class TestText:
    """The visible text of every page is that of the text environment."""

    @settings(max_examples=60, deadline=None)
    @given(
        title=st.text(max_size=20),
        options=st.dictionaries(st.text(max_size=6), st.lists(st.text(max_size=6), max_size=3), max_size=3),
        texts=st.lists(st.text(max_size=8) | st.sampled_from(BLANKS), max_size=4),
        profile=st.sampled_from(["official", "fixed"]),
        show=st.booleans(),
    )
    @example(title=NASTY, options={NASTY: [NASTY]}, texts=[NASTY, "", " "], profile="official", show=True)
    def test_of_any_product(self, title, options, texts, profile, show):
        made = product(
            *("B0ANY", title),
            options=options,
            BulletPoints=texts,
            Attributes=texts,
            Description=title,
            Reviews=[{"title": text, "score": 5, "body": text} for text in texts],
        )
        shop = small_shop({"B0ANY": made}, profile=profile, show_attrs=show, search=lambda query, k: ["B0ANY"])
        site = create_app(shop).test_client()
        text = shop.goals[0]["instruction_text"]
        blank = profile == "official"

        def shown(path: str) -> str:
            return text_of(BeautifulSoup(site.get(path).get_data().decode(), "html.parser"))

        results = results_page(text, [made], 1, 1, next_always=blank)
        assert shown("/search_results/fixed_0/x/1") == results.text
        assert shown("/item_page/fixed_0/B0ANY/x/1/{}") == item_page(text, made, show_attrs=show).text
        for name in ("Description", "Features", "Reviews", "Attributes"):
            there = shown(f"/item_sub_page/fixed_0/B0ANY/x/1/{name}/{{}}")
            assert there == sub_page(text, made, name, blank_bullets=blank).text
        assert site.get("/done/fixed_0/B0ANY/{}").status_code == 200

    def test_half_a_character_does_no_harm(self):
        made = product("B0ANY", "thing \ud800", options={"\ud800": ["\udfff"]}, Description="\ud800")
        site = create_app(small_shop({"B0ANY": made})).test_client()
        for path in ("search_results/fixed_0/thing/1", "item_page/fixed_0/B0ANY/x/1/{'\\ud800': '\\udfff'}"):
            answer = site.get(f"/{path}")
            assert answer.status_code == 200
            assert "\ufffd" in BeautifulSoup(answer.get_data().decode(), "html.parser").get_text()
        assert site.get("/done/fixed_0/B0ANY/{'\\ud800': '\\udfff'}").status_code == 200

    def test_pages_of_results(self):
        many = {f"B{number}": product(f"B{number}", f"thing {number}") for number in range(23)}
        for profile in ("official", "fixed"):
            shop = small_shop(many, profile=profile)
            site = create_app(shop).test_client()
            for number in (-2, -1, 0, 1, 2, 3, 4):
                page = noted(site.get(f"/search_results/fixed_0/thing/{number}").get_data(as_text=True))
                here = list(many.values())[(number - 1) * PER_PAGE : number * PER_PAGE]
                always = profile == "official"
                made = results_page(shop.goals[0]["instruction_text"], here, number, 23, next_always=always)
                assert page["text"] == made.text
                assert page["clickables"] + [link["text"].lower() for link in page["links"]] == list(made.targets)


def test_markup_in_texts_stays_text():
    texts = {"Description": NASTY, "Price": NASTY, "MainImage": 'x" onerror="1'}
    nasty = product("B0NASTY", NASTY, options={NASTY: [NASTY]}, **texts)
    shop = small_shop({"B0NASTY": nasty}, search=lambda query, k: ["B0NASTY"])
    site = create_app(shop).test_client()
    slash = site.post("/fixed_0", data={"search_query": NASTY}).headers["Location"]
    assert site.get(slash).status_code == 404
    typed = quote(NASTY.replace("/", ""), safe="")
    addresses = [f"/search_results/fixed_0/{typed}/1", f"/item_page/fixed_0/B0NASTY/{typed}/1/{{}}", f"/{typed}"]
    addresses += ["/item_sub_page/fixed_0/B0NASTY/x/1/Description/{}", "/item_page/fixed_0/B0NASTY/x/no/{}"]
    option = quote(repr({NASTY: NASTY}).replace("/", r"\x2f"), safe="")
    for address in [*addresses, f"/done/fixed_0/B0NASTY/{option}", f"/item_page/fixed_0/{typed}/x/1/{{}}"]:
        soup = BeautifulSoup(site.get(address).get_data(as_text=True), "html.parser")
        assert [script.get("src") for script in soup.find_all("script")] == ["/-/static/webshop.js"]
        assert not soup.find_all("b")
        assert not any(name.startswith("on") for tag in soup.find_all(True) for name in tag.attrs)
        assert "49" not in soup.get_text()


class TestServing:
    def test_64_clients_at_once(self, shop):
        """Each plays episodes of its own, all at the same time; every purchase is worth what it is in process."""
        lamp = goal_of(shop, "B0LAMP")
        plays = {
            0.75: ["search[lamp]", "click[B0LAMP]", "click[dark red]", "click[Black]", "click[buy now]"],
            0.5: ["search[lamp]", "click[b0lamp]", "click[features]", "click[< prev]", "click[buy now]"],
        }
        begin = threading.Barrier(64)

        def play(url: str, number: int) -> list[tuple[float, bool, str]]:
            found = []
            with WebShopClient(url, attempts=1) as client:
                begin.wait()
                for wanted, actions in [*plays.items()][:: 1 - 2 * (number % 2)]:
                    client.reset(lamp)
                    *_, last = [client.step(action) for action in actions]
                    found.append((last.reward, last.done, str(wanted)))
            return found

        with serving(shop) as url, ThreadPoolExecutor(64) as pool:
            for future in [pool.submit(play, url, number) for number in range(64)]:
                for reward, done, wanted in future.result():
                    assert done
                    assert str(reward) == wanted

    def test_health_over_http(self, shop):
        with serving(shop) as url:
            answer = requests.get(f"{url}/-/health", timeout=10)
            assert answer.json()["status"] == "ok"
            assert "Server" not in answer.headers

    def test_no_address_leads_to_another_machine(self, shop):
        with serving(shop) as url:
            connection = HTTPConnection(urlsplit(url).netloc, timeout=10)
            for path in ("//evil.example", "//evil.example/", "///evil.example/%2e%2e", "/%2f%2fevil.example", "//"):
                for method in ("GET", "POST"):
                    connection.request(method, path, body="search_query=x" if method == "POST" else None)
                    answer = connection.getresponse()
                    answer.read()
                    assert answer.status in (200, 302, 308, 404, 405)
                    place = answer.headers.get("Location", url)
                    assert urlsplit(place).netloc in ("", urlsplit(url).netloc)
            connection.close()

    def test_nothing_is_left(self, shop):
        before = threading.active_count()
        with serving(shop) as url:
            place = urlsplit(url)
            kept = HTTPConnection(place.hostname, place.port, timeout=10)
            kept.request("GET", "/abc")
            kept.getresponse().read()
            assert threading.active_count() > before
        assert threading.active_count() == before
        with pytest.raises(ConnectionError):
            socket.create_connection((place.hostname, place.port), 5)
        assert kept.sock.recv(1) == b""
        kept.close()
        with serving(shop, port=place.port) as again:
            assert again == url

    def test_it_ends_when_the_caller_fails(self, shop):
        before = threading.active_count()
        with pytest.raises(KeyError), serving(shop):
            raise KeyError
        assert threading.active_count() == before

    def test_a_taken_port_is_said(self, shop):
        with serving(shop) as url:
            taken = serving(shop, port=int(urlsplit(url).port or 0))
            with pytest.raises(ValueError, match="choose others by host= and port="):
                taken.__enter__()

    def test_long_queries_pass(self, shop):
        with serving(shop) as url, WebShopClient(url, attempts=1) as client:
            assert client.step("search[" + "\u5c0f" * 6_000 + " lamp]").valid
            assert client.step("search[" + "a" * 40_000 + " lamp]").valid
            assert not client.step("search[" + "\u5c0f" * 7_000 + " lamp]").valid
            assert not client.step("search[" + "a" * 600_000 + " lamp]").valid


STAND_IN = """
import sys, types
from tests.webshop_site import small_shop
shop = types.ModuleType("envs.webshop.shop")
shop.OF_SHOP, shop.open_shop = ("profile", "products"), lambda settings: small_shop(profile=settings.profile)
sys.modules["envs.webshop.shop"] = shop
"""


class TestCommand:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_serves_until_a_signal(self, number):
        code = f"{STAND_IN}\nfrom envs.webshop import server\nsys.exit(server.main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "port=0", "profile=fixed", "draw_seed=3"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            assert found
            assert requests.get(f"{found[0]}-/health", timeout=10).json()["profile"] == "fixed"
            process.send_signal(number)
            _, wrong = process.communicate(timeout=20)
        assert (process.returncode, wrong) == (0, "")

    def test_keys_are_those_that_make_a_shop(self):
        assert {"data", "products", "profile", "draw_seed"} < set(server._shop_keys()) < set(Settings.model_fields)

    @pytest.fixture
    def main(self, monkeypatch) -> Callable[..., int]:
        monkeypatch.setitem(sys.modules, "envs.webshop.shop", None)
        exec(STAND_IN, {})
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)
        return lambda *arguments: server.main(arguments)

    def test_help_teaches(self, main, capsys):
        with pytest.raises(SystemExit) as ended:
            main("--help")
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        for text in ("host = 127.0.0.1", "port = 3000", "profile = official", "draw_seed = 0", "/-/health", "fixed_7"):
            assert text in shown
        assert "noise" not in shown

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("3000", "write key=value"),
            ("prot=1", "did you mean 'port'?"),
            ("noise=0.5", "The site has no key 'noise'"),
            ("port=70000", "port: Input should be less than or equal to 65535 (given: 70000)."),
            ("profile=odd", "profile: Input should be 'official' or 'fixed'"),
            ("port={", "the value is no YAML"),
            ("host=192.0.2.1", "choose others by host= and port="),
        ],
    )
    def test_mistakes_are_explained(self, main, argument, said, capsys):
        assert main(argument) == 1
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("error: ")
        assert told.err.count("\n") == 1
        assert said in told.err
