r"""The WebShop site over HTTP: the addresses, pages and forms of the official one, for programs and people.

    python -m envs.webshop.server [key=value ...]

Official code: `web_agent_site/app.py` and `templates/` (https://github.com/princeton-nlp/WebShop, 64fa2a5). An address
holds all that a page depends on, but for the session's goal:

    /<session>                                                                 the search box; a POST of it searches
    /search_results/<session>/<keywords>/<page>
    /item_page/<session>/<asin>/<keywords>/<page>/<options>
    /item_sub_page/<session>/<asin>/<keywords>/<page>/<Description|Features|Reviews|Attributes>/<options>
    /done/<session>/<asin>/<options>                                           buys: code, goal, reward and its parts

Keywords are a Python list of strings or one plain string, options a Python dict; they are read by a pattern, never
evaluated. A session named `..fixed..._7` has goal 7; any other draws one by weight when its search box is first opened,
and keeps it as long as it is among the `SESSIONS` used last. The visible text of a page is that of the official page,
and that of `envs.webshop.text`; class and id names that programs look for are kept.

Where the official site answers 500, to sessions, products, numbers and literals that there are not, this one answers
404. In both, a `/` in a keyword or an option's name leads to 404, except that links of profile `fixed` write it as
`\x2f`. `<a>` searches work in both, other than in the official text environment. Pictures are named in `<template>`
elements, which programs can read and browsers don't load. Addresses below `/-/` are our own: `/-/health`, `/-/static`.
"""

import argparse
import contextlib
import difflib
import hashlib
import logging
import random
import re
import signal
import socket
import sys
import textwrap
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import yaml
from flask import Flask, Response, jsonify, redirect, render_template, request, url_for
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from waitress import wasyncore
from waitress.server import create_server
from werkzeug.exceptions import HTTPException, NotFound, RequestURITooLarge
from werkzeug.wrappers import Response as AnyResponse

from envs.webshop.goals import Goal, Product, cumulative
from envs.webshop.settings import Settings
from envs.webshop.text import (
    MARKS,
    SUB_PAGES,
    OfficialError,
    Page,
    Shop,
    buy,
    html_json,
    index_page,
    item_page,
    listed,
    on_page,
    ranked,
    results_page,
    sub_page,
)

SESSIONS = 100_000
"""How many sessions keep the goal that was drawn for them."""

LONGEST_NAME = 200
"""Characters of a session's name."""

LONGEST_LITERAL = 50_000
"""Characters of the keywords, or of the options, in an address."""

LONGEST_ADDRESS = 60_000
"""Characters of the address that a search leads to: Python's own HTTP client takes no header of more than 64 KiB."""

QUERIES = 1024
"""How many queries' results are remembered: turning a page searches again, since an address knows of no other."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
}

_ABOVE = 4
"""Strings of a sub page above its contents: the instruction and two buttons."""

_STRING = r"""(?:'(?:[^'\\\n]|\\.)*+'|"(?:[^"\\\n]|\\.)*+")\s*+"""
_LIST = re.compile(rf"\[\s*+(?:{_STRING}(?:,\s*+|(?=\])))*+\]")
_DICT = re.compile(rf"\{{\s*+(?:{_STRING}:\s*+{_STRING}(?:,\s*+|(?=\}})))*+\}}")
_STRINGS = re.compile(_STRING)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"'}


def read_list(text: str) -> list[str]:
    """The strings of a Python list literal.

    >>> read_list('''['a', "women's"]''')
    ['a', "women's"]

    Raises:
        ValueError: it is none, or too long.
    """
    return _read(text, _LIST)


def read_dict(text: str) -> dict[str, str]:
    """What a Python dict literal of strings holds.

    Raises:
        ValueError: it is none, or too long.
    """
    found = _read(text, _DICT)
    return dict(zip(found[::2], found[1::2], strict=True))


def _read(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The strings of a literal, in order. Not `ast.literal_eval`: nested ones cost it memory and the stack."""
    if len(text) > LONGEST_LITERAL or not pattern.fullmatch(text.strip()):
        raise ValueError("no literal of strings")
    return [_unescaped(string.rstrip()[1:-1]) for string in _STRINGS.findall(text)]


def _unescaped(text: str) -> str:
    """The contents of a string literal, with the escapes that `repr` writes."""
    return _ESCAPE.sub(_character, text) if "\\" in text else text


def _character(match: re.Match[str]) -> str:
    if (code := match[1] or match[2] or match[3]) is None:
        if match[4] in _ESCAPED:
            return _ESCAPED[match[4]]
    elif (number := int(code, 16)) <= sys.maxunicode:
        return chr(number)
    raise ValueError(f"no escape: {match[0]}")


class Sessions:
    """Which goal each session has. Threads may share it."""

    def __init__(self, shop: Shop, most: int = SESSIONS) -> None:
        self._goals = shop.goals
        self._totals = cumulative(shop.goals)[1:]
        self._random = random.Random()
        self._random.setstate(shop.random_state)
        self._most = most
        self._known: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many sessions are remembered."""
        return len(self._known)

    def goal(self, name: str, *, begin: bool = False) -> Goal:
        """A session's goal; to `begin` one that is not known, a goal is drawn for it.

        Raises:
            NotFound: the session is not known, or names a goal that there is not.
        """
        if "fixed" in name:
            return self._fixed(name)
        if len(name) > LONGEST_NAME:
            raise NotFound(f"A session's name has {LONGEST_NAME} characters at most.")
        with self._lock:
            if name not in self._known:
                if not begin:
                    raise NotFound("There is no such session, or it is too long ago: begin with its search page.")
                self._known[name] = self._random.choices(range(len(self._goals)), cum_weights=self._totals)[0]
            self._known.move_to_end(name)
            if len(self._known) > self._most:
                self._known.popitem(last=False)
            return self._goals[self._known[name]]

    def _fixed(self, name: str) -> Goal:
        """The goal whose number is in a name; it needs no memory."""
        try:
            return self._goals[_int(name.rpartition("_")[2])]
        except (ValueError, IndexError):
            raise NotFound(f"{name[:LONGEST_NAME]!r} ends with no goal's number.") from None


class Site:
    """The pages. A request takes what it needs from its address, so threads may share it."""

    def __init__(self, shop: Shop, sessions: int = SESSIONS) -> None:
        if not shop.goals:
            raise ValueError("This shop has no goals: no product has an instruction.")
        self.shop = shop
        self.sessions = Sessions(shop, sessions)
        self._fixed = shop.profile == "fixed"
        self._ranked = lru_cache(QUERIES)(lambda query: ranked(shop, query))
        self._random = random.Random()  # threads may draw at once: nobody expects an order

    def home(self) -> AnyResponse:
        """Somewhere to begin, as official."""
        return redirect(url_for("index", session="abc"))

    def health(self) -> AnyResponse:
        """Whether the site is up, and what it serves."""
        shop = self.shop
        return jsonify(
            status="ok",
            products=len(shop.products),
            goals=len(shop.goals),
            profile=shop.profile,
            tagger=shop.nouns.name,
        )

    def index(self, session: str) -> AnyResponse:
        """The search box, or where a search leads."""
        goal = self.sessions.goal(session, begin=True)
        if request.method == "POST" and "search_query" in request.form:
            keywords = request.form["search_query"].lower().split(" ")
            place = url_for("search_results", session=session, keywords=self._written(keywords), number=1)
            if len(place) > LONGEST_ADDRESS:
                raise RequestURITooLarge("The query is too long.")
            return redirect(place)
        return self._page(index_page(goal["instruction_text"]), session, goal)

    def search_results(self, session: str, keywords: str, number: str) -> AnyResponse:
        """A page of results."""
        goal = self.sessions.goal(session)
        words, at = _keywords(keywords), _number(number)
        found = self._found(words)
        shown = [self.shop.products[asin] for asin in on_page(found, at)]
        page = results_page(goal["instruction_text"], shown, at, len(found), next_always=not self._fixed)
        return self._page(
            page,
            session,
            goal,
            products=shown,
            total=len(found),
            number=at,
            keywords=self._written(words),
            options=self._written({}),
        )

    def item_page(self, session: str, asin: str, keywords: str, number: str, options: str) -> AnyResponse:
        """A product and its options."""
        goal, product, chosen = self.sessions.goal(session), self._product(asin), _options(options)
        page = item_page(goal["instruction_text"], product, show_attrs=self.shop.show_attrs)
        return self._page(
            page,
            session,
            goal,
            product=product,
            chosen=chosen,
            with_option=lambda name, value: self._written({**chosen, name: value}),
            number=_number(number),
            keywords=self._written(_keywords(keywords)),
            options=self._written(chosen),
        )

    def item_sub_page(
        self, session: str, asin: str, keywords: str, number: str, name: str, options: str
    ) -> AnyResponse:
        """What there is to read about a product."""
        goal, product, chosen = self.sessions.goal(session), self._product(asin), _options(options)
        if name not in SUB_PAGES.values():
            raise NotFound(f"A product has the pages {', '.join(SUB_PAGES.values())}.")
        page = sub_page(goal["instruction_text"], product, name, blank_bullets=not self._fixed)
        return self._page(
            page,
            session,
            goal,
            product=product,
            name=name,
            contents=page.strings[_ABOVE:],
            number=_number(number),
            keywords=self._written(_keywords(keywords)),
            options=self._written(chosen),
        )

    def done(self, session: str, asin: str, options: str) -> AnyResponse:
        """What a purchase was worth. Nothing is kept of it: it can be looked at again."""
        goal, product = self.sessions.goal(session), self._product(asin)
        purchase = buy(self.shop, goal, product, _options(options))
        html = render_template(
            "done.html",
            goal=goal,
            product=product,
            purchase=purchase,
            bought=html_json(purchase.options),
            code=hashlib.sha1(session.encode("utf-8", "replace")).hexdigest()[:10].upper(),
        )
        return _html(html)

    def _page(self, page: Page, session: str, goal: Goal, **values: Any) -> AnyResponse:
        template = f"{page.kind or 'index'}.html"
        return _html(render_template(template, page=page, session=session, goal=goal, **values))

    def _written(self, literal: Sequence[str] | Mapping[str, str]) -> str:
        """Keywords or options as addresses have them."""
        text = repr(literal)
        return text.replace("/", r"\x2f") if self._fixed else text

    def _product(self, asin: str) -> Product:
        try:
            return self.shop.products[asin]
        except KeyError:
            raise NotFound(f"There is no product {asin[:20]!r}.") from None

    def _found(self, keywords: Sequence[str]) -> Sequence[str]:
        """The asins of the results."""
        if not keywords:
            raise NotFound("A search needs keywords.")
        try:
            if keywords[0] in MARKS:
                return listed(self.shop, keywords, self._random)
            return self._ranked(" ".join(keywords))
        except OfficialError as error:
            raise NotFound(f"The official site fails here ({error}).") from None


def _html(text: str, status: int = 200) -> Response:
    # A catalogue's JSON can hold half a character, which UTF-8 can't.
    return Response(text.encode("utf-8", "xmlcharrefreplace"), status, content_type="text/html; charset=utf-8")


def _keywords(text: str) -> list[str]:
    if not text.startswith("["):
        return [text]
    try:
        return read_list(text)
    except ValueError:
        raise NotFound("The keywords are no list of strings.") from None


def _options(text: str) -> dict[str, str]:
    try:
        return read_dict(text)
    except ValueError:
        raise NotFound("The options are no dict of strings.") from None


def _number(text: str) -> int:
    try:
        return _int(text)
    except ValueError:
        raise NotFound(f"{text[:20]!r} is no page's number.") from None


def _int(text: str) -> int:
    if len(text) > 20:  # numbers of thousands of digits can be read, but not written
        raise ValueError("too long")
    return int(text)


def create_app(shop: Shop, *, sessions: int = SESSIONS) -> Flask:
    """The site as a WSGI application.

    Args:
        shop: what is sold and wanted; only read, by all requests at once.
        sessions: how many sessions keep the goal that was drawn for them.

    Raises:
        ValueError: the shop has no goals.
    """
    site = Site(shop, sessions)
    app = Flask("envs.webshop", static_url_path="/-/static")
    app.config["MAX_CONTENT_LENGTH"] = 1 << 20
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.add_url_rule("/", view_func=site.home)
    app.add_url_rule("/-/health", view_func=site.health)
    for rule, view in (
        ("/<session>", site.index),
        ("/search_results/<session>/<keywords>/<number>", site.search_results),
        ("/item_page/<session>/<asin>/<keywords>/<number>/<options>", site.item_page),
        ("/item_sub_page/<session>/<asin>/<keywords>/<number>/<name>/<options>", site.item_sub_page),
        ("/done/<session>/<asin>/<options>", site.done),
    ):
        app.add_url_rule(rule, view_func=view, methods=["GET", "POST"])
    app.register_error_handler(HTTPException, _refusal)
    app.after_request(_guarded)
    return app


def _refusal(error: HTTPException) -> AnyResponse:
    """A plain page for what there is not."""
    response = _html(render_template("error.html", error=error), error.code or 500)
    for name, value in error.get_headers():
        if name not in ("Content-Type", "Content-Length"):
            response.headers[name] = value
    return response


def _guarded(response: Response) -> Response:
    response.headers.update(HEADERS)
    if not request.path.startswith("/-/static/"):
        response.headers["Cache-Control"] = "no-cache"
    return response


@contextlib.contextmanager
def serving(shop: Shop, host: str = "127.0.0.1", port: int = 0, threads: int = 8) -> Iterator[str]:
    """Serve a shop from threads of this process as long as the context lasts; gives the site's URL.

    Args:
        shop: what is sold and wanted.
        host: the address to listen at; other machines are let in only by another one than the loopback's.
        port: 0 takes one that is free.
        threads: how many requests are worked at side by side.

    Raises:
        ValueError: the address is taken or not this machine's, or the shop has no goals.
    """
    app = create_app(shop)
    # It warns whenever more clients than threads ask at once, which is what it is for here.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    channels: dict[int, Any] = {}
    with _listening(host, port) as listening:
        server: Any = create_server(  # its type hints know of no trigger
            app,
            map=channels,
            sockets=[listening],
            threads=threads,
            connection_limit=1000,
            max_request_body_size=1 << 21,
            ident=None,
        )
        ending = threading.Event()

        def run() -> None:
            while not ending.is_set():
                wasyncore.loop(timeout=1, use_poll=True, map=channels, count=1)

        loop = threading.Thread(target=run, name="webshop", daemon=True)
        loop.start()
        try:
            shown = f"[{host}]" if ":" in host else host
            yield f"http://{shown}:{listening.getsockname()[1]}"
        finally:
            ending.set()
            server.trigger.pull_trigger()  # wakes the loop up; nothing it watches is closed before it has ended
            loop.join()
            server.task_dispatcher.shutdown()
            wasyncore.close_all(channels, ignore_all=True)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ValueError(
            f"Cannot listen at {host}, port {port} ({error.strerror}): choose others by host= and port= (0: any free)."
        ) from None


class Listen(BaseModel):
    """Where the command listens."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen at. The default lets only this machine in; 0.0.0.0 lets in every other."""
    port: int = Field(3000, ge=0, le=65535)
    """Port to listen at; 0 takes a free one."""
    threads: int = Field(8, ge=1)
    """How many requests are worked at side by side."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: serve a shop until SIGINT or SIGTERM; returns the exit code."""
    shop_keys = _shop_keys()
    parser = argparse.ArgumentParser(
        prog="python -m envs.webshop.server",
        description="Serve a WebShop site until Ctrl-C or SIGTERM. With no key, a catalogue of our own at port 3000.",
        epilog=_help(shop_keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="keys that differ from their defaults")
    given = parser.parse_args(arguments).settings
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        listen, settings = _settings(given, shop_keys)
        from envs.webshop.shop import open_shop

        with serving(open_shop(settings), listen.host, listen.port, listen.threads) as url:
            sys.stdout.write(f"WebShop at {url}/ (Ctrl-C ends it)\n")
            sys.stdout.flush()
            threading.Event().wait()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _end(number: int, frame: Any) -> None:
    raise SystemExit(0)


def _shop_keys() -> list[str]:
    """The settings that a site depends on; others say how goals are chosen and played."""
    from envs.webshop.shop import OF_SHOP

    return [name for name in Settings.model_fields if name in (*OF_SHOP, "draw_seed")]


def _help(shop_keys: Sequence[str]) -> str:
    fields = {**Listen.model_fields, **{name: Settings.model_fields[name] for name in shop_keys}}
    lines = ["keys (key = default: meaning)"]
    for name, field in fields.items():
        default = "null" if field.default is None else str(field.default).lower()
        meaning = " ".join((field.description or "").split())
        lines.append(f"  {name} = {default}")
        lines += textwrap.wrap(meaning, 114, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ("", "examples:", "  python -m envs.webshop.server port=8080 products=1000")
    lines += ("  python -m envs.webshop.server data=FOLDER profile=fixed", "", "pages:")
    lines += ("  /NAME          a new session, whose goal is drawn", "  /fixed_7       a session with goal 7")
    lines += ("  /-/health      what is served, as JSON",)
    return "\n".join(lines)


def _settings(given: Sequence[str], shop_keys: Sequence[str]) -> tuple[Listen, Settings]:
    """What `key=value` arguments say.

    Raises:
        ValueError: a key is unknown, or cannot have its value.
    """
    values: dict[str, Any] = {}
    for each in given:
        key, separator, text = each.partition("=")
        if not separator:
            raise ValueError(f"{each!r} is no setting; write key=value, as in port=8080.")
        if key not in (*Listen.model_fields, *shop_keys):
            near = difflib.get_close_matches(key, [*Listen.model_fields, *shop_keys], n=1, cutoff=0.5)
            said = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"The site has no key {key!r}{said} --help lists them all.")
        try:
            values[key] = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ValueError(f"{each!r}: the value is no YAML ({str(error).splitlines()[0]}).") from None
    try:
        listen = Listen(**{key: value for key, value in values.items() if key in Listen.model_fields})
        return listen, Settings(**{key: value for key, value in values.items() if key in shop_keys})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{key}: {first['msg'].removeprefix('Value error, ')} (given: {first['input']!r}).") from None


if __name__ == "__main__":
    sys.exit(main())
