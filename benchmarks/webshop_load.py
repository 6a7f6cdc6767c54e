"""Time and memory to open a WebShop of as many and as large products as the official one has: at first, and prepared.

    python -m benchmarks.webshop_load [--products 1180000] [--bytes 4200] [--processes 2] [--json FILE]

The catalogue is made here, in the official files and of the official size: 1.18 million products and 5 GB of JSON.
Products are those of `envs.webshop.generator` with longer texts: words drawn with Zipf's frequencies fill the
description until 112 words are searched on average, as of the real products, and the bullet points, of which all but
the first are not searched, up to `--bytes` a product. `first` reads the files, writes the store, builds the search
index and draws prices and goals; `prepared` opens what that left. Both end with a search and a whole page of results,
each in a process of its own. 1,180,000 products take about half an hour and 16 GB of disk.

There is no second side: the official shop opens such files with Lucene in a JVM and an index made beforehand, and was
not at hand. What bounds `first` is reading all the JSON and analysing its texts once; `prepared`, which each worker
waits for at its start, does neither and is to be read as a share of `first`, as the last line says it.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from envs.processes import fresh_processes
from envs.webshop import generator
from envs.webshop.settings import Settings
from envs.webshop.shop import open_shop

SEARCHED = 80
"""Words that fill a description; with title, first bullet point and options about 112 words are searched."""


def main() -> None:
    """Make the catalogue, open it twice, print the table, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=int, default=1_180_000, help="size of the catalogue")
    parser.add_argument("--bytes", type=int, default=4200, help="of a product's JSON in items_shuffle.json, on average")
    parser.add_argument("--processes", type=int, default=2, help="that analyse texts when the index is built")
    parser.add_argument("--folder", type=Path, help="where to work, a temporary one if it is not given")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()

    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        files = Path(folder) / "official"
        files.mkdir()
        with fresh_processes(1) as process:
            process.submit(_write, files, args.products, args.bytes).result()
        size = sum(file.stat().st_size for file in files.iterdir())
        print(f"{args.products:,} products, {size / 2**30:.2f} GB of JSON")
        for name in ("first", "prepared"):
            with fresh_processes(1) as process:
                rows[name] = process.submit(_open, Path(folder), files, args.processes).result()
        made = sum(file.stat().st_size for file in (Path(folder) / "data").rglob("*") if file.is_file())
    print(f"{made / 2**30:.2f} GB of store, index and goals\n")
    print(f"{'':>10}" + "".join(f"{name:>14}" for name in rows["first"]))
    for name, row in rows.items():
        print(f"{name:>10}" + "".join(f"{value:>14,.2f}" for value in row.values()))
    share = rows["prepared"]["open s"] / rows["first"]["open s"]
    print(f"prepared opens in {share:.3f} of the time that it takes at first")
    if args.json:
        about = {"products": args.products, "GB of JSON": size / 2**30, "GB made": made / 2**30, "ratio": share}
        args.json.write_text(json.dumps(about | rows, indent=1) + "\n")


def _write(folder: Path, products: int, size: int) -> None:
    """Our generator's catalogue with products of the real ones' size."""
    made = generator.generate
    with mock.patch.object(generator, "generate", lambda *args: _lengthened(made(*args), products, size)):
        generator.write(folder, products, seed=0)


def _lengthened(drawn: Iterator[tuple[dict[str, Any], Any, Any]], products: int, size: int) -> Iterator[Any]:
    rng = np.random.default_rng(0)
    share = np.cumsum(1 / np.arange(10, int(40 * products**0.6) + 10))
    for product, entry, written in drawn:
        product["full_description"] += " " + _words(int(rng.lognormal(np.log(SEARCHED) - 0.125, 0.5)), share, rng)
        lacking = max(size - len(json.dumps(product)), 0)
        product["small_description"] += [_words(max(lacking // 32, 1), share, rng) for _ in range(4)]
        yield product, entry, written


def _words(number: int, share: Any, rng: np.random.Generator) -> str:
    syllables = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu")
    drawn = np.searchsorted(share, rng.random(number) * share[-1])
    return " ".join("".join(syllables[int(digit)] for digit in str(word)) for word in drawn)


def _open(folder: Path, files: Path, processes: int) -> dict[str, float]:
    os.chdir(folder)  # where data/webshop is made
    began = time.perf_counter()
    shop = open_shop(Settings(data=files), processes)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    pages = [shop.products[asin]["Title"] for asin in shop.search("i want a red cotton shirt in size large", 50)]
    searched = time.perf_counter() - began
    if len(pages) != 50:
        raise ValueError(f"The search found {len(pages)} products instead of 50.")
    return {
        "open s": opened,
        "search ms": 1000 * searched,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "children MB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "products": len(shop.products),
        "goals": len(shop.goals),
    }


if __name__ == "__main__":
    main()
