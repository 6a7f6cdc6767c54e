"""Build time, size, memory and latency of WebShop's search index over synthetic documents.

    python -m benchmarks.webshop_search [--documents 10000 100000] [--processes 2] [--json FILE]

Documents have 112 tokens on average, words are drawn with Zipf's frequencies from a vocabulary that grows with their
number, and queries are made of 3 to 20 words of one document with a price clause, as people's instructions are. Each
size is measured in a process of its own, latency on one core and after one round of the same queries; 1000000 documents
take some minutes and about 1 GB of disk.

There is no second side: the official shop's index is Lucene's, which needs a JVM and was not at hand. What bounds the
figures is what they are for: a search is not to be felt beside the policy's reply, which takes tens of ms or more.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from envs.processes import fresh_processes
from envs.webshop.search import open_index

QUERIES = 300


def main() -> None:
    """Measure each size, print the table, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000], help="sizes to measure")
    parser.add_argument("--processes", type=int, default=1, help="processes that analyse when the index is built")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()

    rows = []
    for size in args.documents:
        with tempfile.TemporaryDirectory() as folder:
            row = {"documents": size}
            for measure, more in ((_build, (args.processes,)), (_search, ())):
                with fresh_processes(1) as process:
                    row |= process.submit(measure, Path(folder) / "index", size, *more).result()
            rows.append(row)
    names = list(rows[0])
    print("".join(f"{name:>14}" for name in names))
    for row in rows:
        print(
            "".join(f"{row[name]:>14,.2f}" if isinstance(row[name], float) else f"{row[name]:>14,}" for name in names)
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def _documents(size: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Asins and texts: words `w<number>s` of a Zipf distribution, most documents with a sign outside of ASCII."""
    rng = np.random.default_rng(seed)
    words = int(40 * size**0.6)
    share = np.cumsum(1 / np.arange(10, words + 10))
    syllables = ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu"]
    names = ["".join(syllables[int(digit)] for digit in str(number)) for number in range(words)]
    for number in range(size):
        length = int(rng.lognormal(4.6, 0.5))
        drawn = np.searchsorted(share, rng.random(length) * share[-1])
        text = " ".join(names[word] for word in drawn)
        yield f"B{number:09d}", f"{text} size: {number % 40}, color: {names[number % 60]}{' ™' if number % 3 else ''}"


def _build(folder: Path, size: int, processes: int) -> dict[str, float]:
    documents = list(_documents(size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    open_index(folder, str(size), lambda: documents, processes=processes)
    spent = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "build s": spent,
        "build MB": grown / 1024,
        "disk MB": sum(file.stat().st_size for file in folder.iterdir()) / 2**20,
    }


def _search(folder: Path, size: int) -> dict[str, float]:
    queries = list(_queries(size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    index = open_index(folder, str(size), list)
    opened = time.perf_counter() - began
    for query in queries:
        index.search(query)
    seconds = []
    for query in queries:
        began = time.perf_counter()
        index.search(query)
        seconds.append(time.perf_counter() - began)
    return {
        "open ms": 1000 * opened,
        "mean ms": 1000 * float(np.mean(seconds)),
        "p95 ms": 1000 * float(np.quantile(seconds, 0.95)),
        "resident MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def _queries(size: int) -> Iterator[str]:
    rng = np.random.default_rng(1)
    for _, text in _documents(QUERIES if size > QUERIES else size):
        words = text.split()[: int(rng.integers(3, 21))]
        yield f"i want {' '.join(words)}, and price lower than {10 * int(rng.integers(1, 99))}.00 dollars"


if __name__ == "__main__":
    main()
