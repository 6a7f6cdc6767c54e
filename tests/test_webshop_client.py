import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from urllib3.connection import HTTPConnection
from werkzeug.serving import make_server

from envs.webshop.client import SiteError, WebShopClient
from envs.webshop.server import create_app, serving
from envs.webshop.text import OfficialError, Profile, Shop, WebShopText
from tests.official_webshop import TWO, lines, product, recorded
from tests.webshop_site import goal_of, recorded_shop, small_shop

CABLE = product("B0CABLE", "Lamp Cable", options={"size/length": ["1 m", "2 m"], "plug": ["buy now", "1 m"]})
THREE = {**TWO, "B0CABLE": CABLE}

TO_LAMP = ["search[lamp]", "click[b0lamp]"]
EPISODES = [
    ["search[floor lamp]", "click[B0LAMP]", "click[black]", "click[features]", "click[< prev]", "click[buy now]"],
    [*TO_LAMP, "click[dark red]", "click[next >]", "click[Description]", "click[reviews]"],
    ["search[lamp]", *["click[next >]"] * 2, *["click[< prev]"] * 2, "click[b0lamp]", "click[< prev]"],
    [*TO_LAMP, "click[black]", "click[< prev]", "click[b0lamp]", "click[buy now]"],
    [*TO_LAMP, "search[mug]", "click[back to search]", "search[nothing]", "click[back to search]"],
    [*TO_LAMP, "click[buy now]", "click[buy now]", *TO_LAMP, "click[buy now]"],
    ["", "buy now", "click[]", "click[search]", "search[ ]", "search[a  B ]", "click[ back to search]", "click[none]"],
    ["search[l\u00e4mp \u5c0f lamp]", 'search[women\'s "lamp" \\ lamp]', "search[100% lamp & ? # + ; = lamp]"],
    ["search[lamp", "search[lamp]]", "search[a] click[b]", "search[lamp\nlamp]", " click[b0lamp] ", "click[with [x]]"],
    ["search[<c> kitchen]", "search[<q> floor lamps]", "click[b0lamp]", "click[with [bulb]]", "click[buy now]"],
]


@pytest.fixture(scope="module", params=["official", "fixed"])
def both(request: pytest.FixtureRequest) -> Iterator[tuple[WebShopClient, WebShopText]]:
    """A customer over HTTP and one in process, of one shop."""
    shop = small_shop(THREE, profile=request.param)
    with serving(shop) as url, WebShopClient(url, attempts=1) as client:
        yield client, WebShopText(shop)


def seen(env: WebShopClient | WebShopText, act: Callable[[], Any]) -> dict[str, Any]:
    """Everything that a customer sees of what it does."""
    answer = act()
    bought = env.purchase
    return {
        "answer": answer,
        "text": env.page.text,
        "available": env.available,
        "kind": env.page.kind,
        "targets": env.page.targets,
        "bought": bought and (bought.asin, bought.options, bought.reward),
    }


@pytest.mark.parametrize("asin", ["B0LAMP", "b0mug", "B0CABLE"])
@pytest.mark.parametrize("actions", EPISODES)
def test_episodes_are_those_in_process(both, actions, asin):
    client, env = both
    goal = goal_of(env.shop, asin)
    assert seen(client, lambda: client.reset(goal)) == seen(env, lambda: env.reset(goal))
    for action in actions:
        assert seen(client, lambda: client.step(action)) == seen(env, lambda: env.step(action)), action  # noqa: B023


@pytest.mark.parametrize("seed", range(12))
def test_random_episodes_are_those_in_process(both, seed):
    client, env = both
    rng = random.Random(seed)
    goal = rng.randrange(-3, 3)
    assert client.reset(goal) == env.reset(goal)
    without = ("b0mug", "2 m") if client.profile == "official" else ()
    for _ in range(15):
        choices = [f"click[{text}]" for text in env.available.clickables if text not in without]
        action = rng.choice([*choices, "search[lamp mug]", "search[lamp]", "click[nothing]"])
        assert seen(client, lambda: client.step(action)) == seen(env, lambda: env.step(action)), action  # noqa: B023


@recorded
def test_recorded_episodes_are_those_in_process(tmp_path):
    """But for three actions: two have no address on the site, and to one the official text environment raises."""
    shop = recorded_shop(tmp_path / "index")
    env, rows, left, played = WebShopText(shop), lines("traces_main.jsonl"), {}, set()
    with serving(shop) as url, WebShopClient(url, attempts=1) as client:
        for row in rows:
            episode, action = row["episode"], row["action"]
            if episode in left:
                continue
            played.add(episode)
            if action is None:
                assert client.reset(row["session"]) == env.reset(row["session"]) == row["obs"]
                continue
            before = client.page.text
            step = client.step(action)
            try:
                assert step == env.step(action)
                assert step[:3] == (row["obs"], row["reward"], row["done"])
                assert client.available == env.available
            except (AssertionError, OfficialError):
                assert step == (before, 0, False, False)
                left[episode] = action
    assert left == {100: "click[1 m]", 119: "search[<c>]", 124: "search[lamp/rug]"}
    assert len(played) == 50


@pytest.fixture(scope="module")
def official() -> Iterator[WebShopClient]:
    with serving(small_shop(THREE)) as url, WebShopClient(url, attempts=1) as client:
        yield client


class TestWhatDiffersFromTheTextEnvironment:
    def play(self, client: WebShopClient, *actions: str) -> None:
        client.reset(0)
        for action in actions:
            client.step(action)

    def test_asins_with_lower_case_letters_open(self, official):
        self.play(official, "search[mug]", "click[b0mug]")
        assert "Enamel Mug" in official.page.text

    def test_a_query_that_names_a_page_misleads_nobody(self, official):
        self.play(official, "search[search_results lamp]", "click[b0lamp]", "click[< prev]")
        assert "Page 1" in official.page.text

    def test_attributes_can_be_searched(self, official):
        self.play(official, "search[<a> easy clean]")
        assert official.available.clickables[2:] == ["b0lamp"]

    def test_what_has_no_address_is_invalid(self, official):
        self.play(official, "search[lamp]", "click[b0cable]")
        before = official.page.text
        assert official.step("click[2 m]") == (before, 0, False, False)
        assert official.step("search[floor/lamp]") == (before, 0, False, False)
        assert official.step("search[<c>]") == (before, 0, False, False)
        assert official.step("click[description]").valid

    def test_options_with_a_slash_in_fixed(self):
        with serving(small_shop(THREE, profile="fixed")) as url, WebShopClient(url) as client:
            self.play(client, "search[lamp / lamp]", "click[b0cable]", "click[2 m]", "click[buy now]")
            assert client.purchase is not None
            assert client.purchase.options == {"size/length": "2 m"}


class TestSessions:
    def test_names_are_new_each_time(self, both):
        client, _ = both
        names = {(client.reset(1), client.session)[1] for _ in range(20)}
        assert len(names) == 20
        assert all(name.endswith("_fixed_1") for name in names)
        assert len({(client.reset(), client.session)[1] for _ in range(20)}) == 20
        assert "fixed" not in client.session

    def test_a_named_session_keeps_its_goal(self, both):
        client, _ = both
        for name in ("anna", "ann/a b?#", "\u00fcber"):
            if "/" in name:
                with pytest.raises(ValueError, match="No session 'ann/a b"):
                    client.reset(name)
            else:
                assert client.reset(name) == client.reset(name)
        assert client.reset("x_fixed_0") == client.reset(0)

    def test_a_goal_that_there_is_not(self, both):
        client, _ = both
        client.reset(-3)
        with pytest.raises(IndexError, match=r"No goal 3: http://.*_fixed_3 answered 404\."):
            client.reset(3)

    def test_the_site_says_how_actions_are_read(self, both):
        client, env = both
        assert client.profile == env.shop.profile


# ---- Sites that fail ----


class Flaky:
    """A site that does, at its next requests, what `plan` says: a status, "drop" the connection, or "sleep"."""

    def __init__(self, shop: Shop) -> None:
        self.app = create_app(shop)
        self.plan: list[int | str] = []
        self.asked: list[str] = []
        self.enough = threading.Event()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        self.asked.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        todo = self.plan.pop(0) if self.plan else None
        if todo == "drop":
            environ["werkzeug.socket"].shutdown(2)
        elif todo == "sleep":
            self.enough.wait(10)
        elif todo is not None:
            start(f"{todo} Failing", [("Content-Length", "0")])
            return []
        return self.app(environ, start)


@contextmanager
def failing(profile: Profile = "official") -> Iterator[tuple[Flaky, str]]:
    site = Flaky(small_shop(profile=profile))
    server = make_server("127.0.0.1", 0, site, threaded=True)  # type: ignore[arg-type]
    server.log = lambda *_: None  # type: ignore[method-assign]
    loop = threading.Thread(target=server.serve_forever)
    loop.start()
    try:
        yield site, f"http://127.0.0.1:{server.server_port}"
    finally:
        site.enough.set()
        server.shutdown()
        loop.join()
        server.server_close()


class TestFailures:
    @pytest.mark.parametrize("failure", [500, 502, 503, "drop", "sleep"])
    def test_views_are_asked_for_again(self, failure):
        with failing() as (site, url), WebShopClient(url, pause=0.01, timeout=(1, 0.3)) as client:
            env = WebShopText(small_shop())
            client.reset(goal_of(env.shop, "B0LAMP"))
            env.reset(goal_of(env.shop, "B0LAMP"))
            for action in ("search[lamp]", "click[b0lamp]", "click[black]", "click[features]", "click[< prev]"):
                site.plan = [failure] * (1 if failure == "sleep" else 3)
                assert client.step(action) == env.step(action)
                assert site.plan == []

    @pytest.mark.parametrize(
        ("failure", "told"),
        [(503, "it answered 503"), ("drop", "the connection failed"), ("sleep", "no answer in time")],
    )
    def test_a_purchase_is_not(self, failure, told):
        with failing() as (site, url), WebShopClient(url, pause=0.01, timeout=(1, 0.3)) as client:
            client.reset(0)
            for action in ("search[lamp]", "click[b0lamp]"):
                client.step(action)
            before = client.page
            site.asked, site.plan = [], [failure]
            with pytest.raises(SiteError, match=f"/done/.*: {told}. A purchase is not tried again") as error:
                client.step("click[buy now]")
            assert isinstance(error.value, ConnectionError)
            assert len(site.asked) == 1
            assert site.asked[0].startswith("POST /done/")
            assert client.page is before
            assert client.purchase is None

    def test_pauses_grow(self, monkeypatch):
        slept: list[float] = []
        monkeypatch.setattr(time, "sleep", slept.append)
        with failing() as (site, url), WebShopClient(url, pause=1, attempts=5) as client:
            site.plan = [503] * 5
            with pytest.raises(SiteError, match="it answered 503, in 5 attempts"):
                client.step("search[lamp]")
        assert len(slept) == 4
        assert all(2**n / 2 <= pause <= 2**n for n, pause in enumerate(slept))

    def test_nobody_there(self):
        with failing() as (_, url):
            pass
        with pytest.raises(SiteError, match=f"{url}/-/health: the connection failed, in 2 attempts. Is a WebShop site"):
            WebShopClient(url, attempts=2, pause=0.01)

    def test_an_answer_that_comes_late(self):
        with failing() as (site, url), WebShopClient(url, attempts=1, timeout=(1, 0.2)) as client:
            site.plan = ["sleep"]
            began = time.monotonic()
            with pytest.raises(SiteError, match="no answer in time, in 1 attempts"):
                client.step("search[lamp]")
            assert time.monotonic() - began < 5

    def test_a_site_that_is_none(self):
        with pytest.raises(ValueError, match="no site's URL; write http://HOST:PORT"):
            WebShopClient("localhost:3000")

    def test_a_connection_that_was_closed_meanwhile_costs_no_purchase(self):
        shop = small_shop()
        with serving(shop) as url:
            client = WebShopClient(url, attempts=1)
            client.reset(goal_of(shop, "B0LAMP"))
            for action in ("search[lamp]", "click[b0lamp]"):
                client.step(action)
        with serving(shop, port=int(urlsplit(url).port or 0)), client:
            assert client.step("click[buy now]").done

    def test_one_connection_serves_all(self, monkeypatch):
        connect, made = HTTPConnection.connect, []
        monkeypatch.setattr(HTTPConnection, "connect", lambda self: (made.append(self), connect(self))[1])
        with serving(small_shop()) as url, WebShopClient(url) as client:
            for number in range(5):
                client.reset(number % 2)
                client.step("search[lamp]")
        assert len(made) == 1

    def test_an_official_site_says_nothing_of_itself(self):
        with failing("fixed") as (site, url):
            site.plan = [404]
            with WebShopClient(url) as client:
                assert client.profile == "official"
            with WebShopClient(url, profile="fixed") as client:
                assert client.profile == "fixed"
            assert "GET /-/health" in site.asked
