"""A customer of a WebShop site over HTTP: ours (`envs.webshop.server`) or the official one.

It has the surface of `envs.webshop.text.WebShopText` and makes the same observations and available actions out of the
site's pages; also after buying, where the site itself would show the goal and the parts of the reward. Three things
differ, as they do between the official site and the official text environment:

- A page is known by its forms, not by substrings of its address, and an asin by its link, not by its capitals; so
  `search[search_results lamp]` misleads no `< Prev` button, and asins with a lower-case letter open their item.
- The site knows attributes: `search[<a> easy clean]` lists products in both profiles.
- What the site answers by 404 is an invalid action: `official`, a search with a `/`, an option whose name has one.

Views of pages are tried again, with growing and random pauses, when the connection fails, the answer is late, or the
status is 5xx. A purchase is not: whoever asks twice may have bought twice.
"""

import json
import random
import secrets
import time
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import quote, urljoin, urlsplit

import requests
from bs4 import BeautifulSoup, Comment, Tag
from requests.adapters import HTTPAdapter

from envs.webshop.goals import Profile
from envs.webshop.text import BUTTON, KINDS, Available, Kind, Page, Step, Target, done_page, parse_action, segments

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0

ATTEMPTS = 6
"""How often a page is asked for."""

FIRST_PAUSE = 0.25
"""Seconds before the second attempt; twice as many before each further one, less up to a half by chance."""

UNSEEN = {"style", "script", "head", "title", "meta", "[document]"}
"""Elements whose text the official observation leaves out."""


class SiteError(ConnectionError):
    """The site does not answer, or fails; says which address, and what to do."""


class Link(NamedTuple):
    """Where a clickable text leads."""

    method: str
    url: str


class Receipt(NamedTuple):
    """What a purchase came to, from the site's last page."""

    asin: str
    options: dict[str, str]
    reward: float


class WebShopClient:
    """One customer of a site. Like `WebShopText`, it begins with a `reset()`; not to be shared by threads.

    Args:
        url: the site's, such as http://127.0.0.1:3000.
        profile: how actions are read. By default the site is asked, and one that cannot say is taken for official.
        timeout: seconds to wait for a connection, and for an answer.
        attempts: how often a page is asked for.
        pause: seconds before the second attempt.

    Raises:
        ValueError: the URL is no site's.
        SiteError: no site answers.
    """

    def __init__(
        self,
        url: str,
        *,
        profile: Profile | None = None,
        timeout: tuple[float, float] = (CONNECT_SECONDS, READ_SECONDS),
        attempts: int = ATTEMPTS,
        pause: float = FIRST_PAUSE,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no site's URL; write http://HOST:PORT.")
        self.url = url.rstrip("/")
        self._links: dict[str, Link] = {}
        self._timeout, self._attempts, self._pause = timeout, attempts, pause
        self._http = requests.Session()
        self._http.trust_env = False  # no proxy between: sites are this machine's, or near
        for scheme in ("http://", "https://"):
            self._http.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=1))
        try:
            self.profile = profile or self._profile()
            self.reset()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; twice is fine."""
        self._http.close()

    @property
    def available(self) -> Available:
        """What can be done on this page."""
        return self.page.available

    def reset(self, session: int | str | None = None) -> str:
        """Begin a session; the observation is the page with the search box.

        Args:
            session: a goal's number, the name of a session, whose goal the site has or draws, or None for a new one.

        Raises:
            IndexError: the site has no goal of this number.
            ValueError: the site has no session of this name.
            SiteError: the site does not answer, or fails.
        """
        unique = secrets.token_hex(8)
        name = unique if session is None else session if isinstance(session, str) else f"{unique}_fixed_{session}"
        answer = self._get(Link("GET", f"{self.url}/{quote(name, safe='')}"))
        if not answer.ok:
            told = f"{answer.url} answered {answer.status_code}"
            if isinstance(session, int):
                raise IndexError(f"No goal {session}: {told}.")
            raise ValueError(f"No session {session!r}: {told}.")
        self.session = name
        self.purchase: Receipt | None = None
        self._show(answer)
        return self.page.text

    def step(self, action: str) -> Step:
        """Search, click, or change nothing.

        Raises:
            SiteError: the site does not answer, or fails. The page stays; whether a purchase counts is not known then.
        """
        over = self.profile == "fixed" and self.page.kind == "done"
        name, argument = ("", "") if over else parse_action(action, self.profile)
        if argument and name == "search":
            query = {"search_query": argument.encode("utf-8", "replace").decode()}
            answer = self._get(Link("POST", f"{self.url}/{quote(self.session, safe='')}"), query)
        elif argument and name == "click" and argument != "search" and argument in self._links:
            link = self._links[argument]
            answer = self._buy(link) if argument == "buy now" else self._get(link)
        else:
            return Step(self.page.text, 0, False, False)
        if not answer.ok:
            return Step(self.page.text, 0, False, False)
        self._show(answer)
        if self.page.kind == "done" and self.purchase:
            return Step(self.page.text, self.purchase.reward, True, True)
        return Step(self.page.text, 0.0, False, True)

    def _profile(self) -> Profile:
        answer = self._get(Link("GET", f"{self.url}/-/health"))
        try:
            told = answer.json()["profile"] if answer.ok else "official"
        except (ValueError, KeyError, TypeError):
            told = "official"
        return "fixed" if told == "fixed" else "official"

    def _show(self, answer: requests.Response) -> None:
        """Make the answer the page that is open."""
        soup = BeautifulSoup(answer.content.decode("utf-8", "replace"), "html.parser")
        kind, found = _kind(answer.url, self.url), _found(soup)
        if kind == "done":
            self.purchase = _receipt(soup, found.strings)
            self.page, self._links = done_page(*self.purchase), {}
        else:
            targets, self._links = _targets(found, answer.url)
            self.page = Page(kind, found.strings, targets)

    def _get(self, link: Link, data: Mapping[str, str] | None = None) -> requests.Response:
        """A page, asked for again if the site fails.

        Raises:
            SiteError: it failed every time.
        """
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1) * random.uniform(0.5, 1))
            try:
                answer = self._ask(link, data)
            except requests.RequestException as error:
                told = _reason(error)
                continue
            if answer.status_code < 500:
                return answer
            told = f"it answered {answer.status_code}"
        raise SiteError(
            f"{link.url}: {told}, in {self._attempts} attempts. Is a WebShop site running at {self.url}? Ours is begun "
            "by `python -m envs.webshop.server`; its standard error tells what went wrong."
        )

    def _buy(self, link: Link) -> requests.Response:
        """The page after a purchase.

        Raises:
            SiteError: the site failed.
        """
        try:
            answer = self._ask(link, None)
        except requests.RequestException as error:
            told = _reason(error)
        else:
            if answer.status_code < 500:
                return answer
            told = f"it answered {answer.status_code}"
        raise SiteError(
            f"{link.url}: {told}. A purchase is not tried again, since it may have been made: begin another session."
        )

    def _ask(self, link: Link, data: Mapping[str, str] | None) -> requests.Response:
        return self._http.request(link.method, link.url, data=data, timeout=self._timeout)


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "the connection failed"
    return f"{type(error).__name__}: {error}"


def _kind(address: str, site: str) -> Kind:
    """The kind of a page by its address; a session may have a kind's name."""
    path = urlsplit(address).path.removeprefix(urlsplit(site).path)
    first, _, rest = path.removeprefix("/").partition("/")
    return next((kind for kind in KINDS if rest and kind == first), "")


class _Found(NamedTuple):
    """What a page holds, in its order."""

    strings: list[str]
    """Those that the official observation is made of."""
    buttons: list[Tag]
    products: list[Tag]
    options: list[Tag]


def _found(soup: BeautifulSoup) -> _Found:
    # In one walk: bs4's searches cost as much as its parsing.
    found = _Found([], [], [], [])
    for each in soup.descendants:
        if isinstance(each, Tag):
            classes = each.get("class") or ()
            if "btn" in classes:
                found.buttons.append(each)
            if "product-link" in classes:
                found.products.append(each)
            if each.name == "input" and each.get("type") == "radio":
                found.options.append(each)
        elif not isinstance(each, Comment) and each.parent is not None and each.parent.name not in UNSEEN:
            found.strings.append(str(each))
    return found


def _targets(found: _Found, address: str) -> tuple[dict[str, Target], dict[str, Link]]:
    """The clickable texts and where they lead: buttons, products and option values, in the official order.

    Of equal texts the last is clicked, but a button before all others.
    """
    targets: dict[str, Target] = {}
    links: dict[str, Link] = {}
    for button in found.buttons:
        text = button.get_text().strip().lower()
        targets[text] = BUTTON
        if (form := button.find_parent("form")) is not None:
            links[text] = Link(str(form.get("method", "get")).upper(), urljoin(address, str(form.get("action", ""))))
    buttons = dict(links)
    for product in found.products:
        asin = product.get_text().strip()
        targets[asin.lower()] = Target("product", asin)
        links[asin.lower()] = Link("GET", urljoin(address, str(product.get("href", ""))))
    for option in found.options:
        value = str(option.get("value", ""))
        targets[value] = Target("option", str(option.get("name", "")))
        links[value] = Link("GET", urljoin(address, str(option.get("data-url", ""))))
    return targets, links | buttons


def _receipt(soup: BeautifulSoup, strings: list[str]) -> Receipt:
    """What was bought, from the page after it.

    Raises:
        SiteError: the page lacks it.
    """
    shown = segments(strings)
    reward = soup.find(id="reward")
    try:
        asin, options = (shown[shown.index(name, shown.index("Purchased")) + 1] for name in ("asin", "options"))
        score = reward.find("pre") if isinstance(reward, Tag) else None
        return Receipt(asin, json.loads(options), float(score.get_text() if score else ""))
    except (ValueError, IndexError):
        raise SiteError("The page after a purchase shows no asin, options or score: is this a WebShop site?") from None
