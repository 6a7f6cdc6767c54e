"""WebShop episodes per second: many clients of a site over HTTP against one customer in process.

    python -m benchmarks.webshop_server [--sessions 512] [--clients 64] [--processes 1] [--data FOLDER] [--json FILE]

Both sides play the same scripted episodes: a search for the goal's title, the next page and back, the first item, up to
three of its options, two of its pages, and the purchase. The site runs in a process of its own, as it does in use; its
clients are threads of `--processes` others. Each side plays a tenth of the sessions first, unmeasured. What a client
does with a page (asking for it, parsing it) takes more time than what the site does, so that both share the cores.

"""

import argparse
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np

from envs.webshop.client import WebShopClient
from envs.webshop.server import serving
from envs.webshop.settings import Settings
from envs.webshop.shop import open_shop
from envs.webshop.text import WebShopText

Row = dict[str, float]


def main() -> None:
    """Measure both sides, print the table, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=512, help="episodes of each side")
    parser.add_argument("--clients", type=int, default=64, help="clients that play at the same time")
    parser.add_argument("--processes", type=int, default=1, help="processes that the clients are threads of")
    parser.add_argument("--threads", type=int, default=8, help="threads of the site")
    parser.add_argument("--data", type=Path, help="folder of the official files; by default our own catalogue")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    settings = Settings(data=args.data)

    sides = {"in process": _in_process(settings, args.sessions)}
    sides["over HTTP"] = _over_http(settings, args.sessions, args.clients, args.processes, args.threads)
    ratio = sides["over HTTP"]["sessions/s"] / sides["in process"]["sessions/s"]
    names = list(sides["in process"])
    print(f"{'':12}" + "".join(f"{name:>15}" for name in names))
    for side, row in sides.items():
        print(f"{side:12}" + "".join(f"{row[name]:>15,.2f}" for name in names))
    print(f"ratio of sessions/s, HTTP to in process: {ratio:.3f} ({os.cpu_count()} cores)")
    figures = {"sides": sides, "ratio": ratio, "cores": os.cpu_count(), "sessions": args.sessions}
    figures |= {"clients": args.clients, "processes": args.processes, "threads": args.threads}
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def _play(env: WebShopText | WebShopClient, goal: int, title: str) -> Iterator[float]:
    """One episode; gives the seconds of each action."""

    def act(action: str) -> float:
        began = time.perf_counter()
        env.step(action)
        return time.perf_counter() - began

    began = time.perf_counter()
    env.reset(goal)
    yield time.perf_counter() - began
    for action in (f"search[{title}]", "click[next >]", "click[< prev]"):
        yield act(action)
    product = next(text for text, target in env.page.targets.items() if target.kind == "product")
    yield act(f"click[{product}]")
    options = {target.name: text for text, target in env.page.targets.items() if target.kind == "option"}
    for value in [*options.values()][:3]:
        yield act(f"click[{value}]")
    for button in ("description", "< prev", "features", "< prev", "buy now"):
        yield act(f"click[{button}]")


def _row(sessions: int, seconds: float, actions: list[float], cpu: dict[str, float]) -> Row:
    """Figures of a side; `cpu`: seconds of processors' time by who spent them."""
    return {
        "sessions/s": sessions / seconds,
        "actions/s": len(actions) / seconds,
        "mean ms": 1000 * float(np.mean(actions)),
        "p50 ms": 1000 * float(np.quantile(actions, 0.5)),
        "p95 ms": 1000 * float(np.quantile(actions, 0.95)),
        "p99 ms": 1000 * float(np.quantile(actions, 0.99)),
        **{f"{who} CPU ms": 1000 * spent / len(actions) for who, spent in cpu.items()},
    }


def _titles(settings: Settings) -> list[str]:
    """What the goals' products are called, as an action can say it."""
    return [goal["name"].replace("[", " ").replace("]", " ").replace("/", " ") for goal in open_shop(settings).goals]


def _in_process(settings: Settings, sessions: int) -> Row:
    env, titles = WebShopText(open_shop(settings)), _titles(settings)

    def play(first: int, last: int) -> list[float]:
        return [each for n in range(first, last) for each in _play(env, n % len(titles), titles[n % len(titles)])]

    play(0, sessions // 10)
    began, spent = time.perf_counter(), time.process_time()
    actions = play(sessions // 10, sessions // 10 + sessions)
    cpu = {"site": 0.0, "client": time.process_time() - spent}
    return _row(sessions, time.perf_counter() - began, actions, cpu)


def _over_http(settings: Settings, sessions: int, clients: int, processes: int, threads: int) -> Row:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    site = context.Process(target=_serve, args=(settings, threads, theirs))
    site.start()
    try:
        url, titles = ours.recv(), _titles(settings)
        each = clients // processes

        def play(pool: Pool, sessions: int) -> tuple[list[float], float]:
            jobs = [(url, titles, sessions // processes, each, number) for number in range(processes)]
            parts = pool.map(_clients, jobs, chunksize=1)
            return [seconds for part, _ in parts for seconds in part], sum(spent for _, spent in parts)

        def of_site() -> float:
            ours.send("CPU")
            return float(ours.recv())

        with context.Pool(processes) as pool:
            play(pool, sessions // 10)
            began, spent = time.perf_counter(), of_site()
            actions, of_clients = play(pool, sessions)
            seconds, cpu = time.perf_counter() - began, {"site": of_site() - spent, "client": of_clients}
    finally:
        ours.send("end")
        site.join()
    return _row(sessions // processes * processes, seconds, actions, cpu)


def _serve(settings: Settings, threads: int, pipe: Connection) -> None:
    with serving(open_shop(settings), threads=threads) as url:
        pipe.send(url)
        while pipe.recv() != "end":
            pipe.send(time.process_time())


def _clients(job: tuple[str, list[str], int, int, int]) -> tuple[list[float], float]:
    """A process's share of the sessions, by its clients side by side; the seconds of the actions, and of its CPU."""
    spent = time.process_time()
    url, titles, sessions, clients, number = job
    left, lock = iter(range(number * sessions, (number + 1) * sessions)), threading.Lock()

    def customer(_: int) -> list[float]:
        seconds: list[float] = []
        with WebShopClient(url) as client:
            while True:
                with lock:
                    session = next(left, None)
                if session is None:
                    return seconds
                goal = session % len(titles)
                seconds += _play(client, goal, titles[goal])

    with ThreadPoolExecutor(clients) as pool:
        seconds = [each for part in pool.map(customer, range(clients)) for each in part]
    return seconds, time.process_time() - spent


if __name__ == "__main__":
    main()
