"""A shop opened from its settings: catalogue, search index, prices and goals, each made once and kept on disk.

Environments of one process share one shop; processes share its pages of memory, which are mapped from disk.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from envs.webshop import generator, goals
from envs.webshop.catalogue import STORE, Catalogue, Sources, open_catalogue
from envs.webshop.goals import Draw
from envs.webshop.reward import english_nouns
from envs.webshop.settings import Settings
from envs.webshop.store import prepare
from envs.webshop.text import Shop

VERSION = 1
"""To be raised with every change of how prices and goals are drawn or kept."""

OF_SHOP = ("data", "products", "catalogue_seed", "num_products", "human_goals", "limit_goals", "show_attrs", "profile")
"""The settings that make a shop, beside `draw_seed`; the others choose among its goals or say how they are played."""


def content_of(settings: Settings) -> str:
    """What a shop's pages and prices depend on besides its settings, hashed; makes a store of the official files.

    Raises:
        ValueError: the official files are missing or malformed.
    """
    if settings.data is None:
        return f"generated {generator.version()}, drawn as of {VERSION}"
    catalogue = catalogue_of(settings)
    return f"official {catalogue.digest}, instructions {_digest(catalogue.human)}, drawn as of {VERSION}"


def open_shop(settings: Settings, processes: int = 1) -> Shop:
    """The shop of the settings, made if it is not there yet.

    Args:
        settings: the `env.webshop` section.
        processes: how many may work at the search index side by side.

    Raises:
        ValueError: the catalogue's files are missing or malformed, or nobody wants anything in it.
    """
    catalogue_of(settings).index(processes)
    return _opened(settings.model_dump_json(include={*OF_SHOP, "draw_seed"}))


@functools.lru_cache(maxsize=1)
def _opened(dumped: str) -> Shop:
    settings = Settings.model_validate_json(dumped)
    catalogue = catalogue_of(settings)
    draw = _draw_of(settings, catalogue)
    index = catalogue.index()
    return Shop(
        products=catalogue,
        goals=draw.goals,
        prices=draw.prices,
        random_state=draw.random_state,
        search=lambda query, k: [hit.asin for hit in index.search(query, k)],
        where=catalogue.where,
        nouns=english_nouns(),
        show_attrs=settings.show_attrs,
        profile=settings.profile,
    )


def catalogue_of(settings: Settings) -> Catalogue:
    """The catalogue of the settings; one of our own is made if it is not there yet.

    Raises:
        ValueError: the official files are missing or malformed.
    """
    return open_catalogue(_sources(settings), num_products=settings.num_products)


def _sources(settings: Settings) -> Sources:
    if settings.data is not None:
        folder = settings.data.expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"env.webshop.data: no folder {folder}. It has to hold the official items_shuffle*.json, "
                "items_ins_v2*.json and items_human_ins.json (`python -m pipeline fetch webshop-full` or -small); "
                "empty, it stands for a catalogue made here."
            )
        return Sources.in_folder(folder)
    key = {"products": settings.products, "seed": settings.catalogue_seed, "generator": generator.version()}
    folder = STORE / f"generated-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"
    prepare(folder, key, lambda made: generator.write(made, settings.products, settings.catalogue_seed))
    return Sources.in_folder(folder)


def _draw_of(settings: Settings, catalogue: Catalogue) -> Draw:
    """Prices and goals, drawn the first time and read afterwards.

    Raises:
        ValueError: human goals without their file, or no goal at all.
    """
    if settings.human_goals and not catalogue.human:
        raise ValueError(
            f"{settings.data}: no items_human_ins.json, or nothing in it; put it beside the other files, or take "
            "synthetic goals (env.webshop.human_goals=false)."
        )
    key: dict[str, Any] = {
        "format": VERSION,
        "catalogue": catalogue.digest,
        "seed": settings.draw_seed,
        "limit": settings.limit_goals,
        "profile": settings.profile,
        "human": _digest(catalogue.human) if settings.human_goals else None,
    }
    name = f"{catalogue.folder.name}-goals-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"
    folder = catalogue.folder.with_name(name)
    prepare(folder, key, lambda made: _write(made, _draw(settings, catalogue)))
    return _read(folder, catalogue)


def _draw(settings: Settings, catalogue: Catalogue) -> Draw:
    draw = goals.draw(
        catalogue,
        settings.draw_seed,
        pricings=catalogue.pricings(),
        instructions=catalogue.human if settings.human_goals else None,
        attributes=catalogue.entries,
        limit=settings.limit_goals,
        profile=settings.profile,
    )
    if not draw.goals:
        raise ValueError(f"{catalogue.folder}: this catalogue has no goals: no product in it has an instruction.")
    return draw


def _write(folder: Path, draw: Draw) -> None:
    np.save(folder / "prices.npy", np.fromiter(draw.prices.values(), float, len(draw.prices)))
    (folder / "goals.json").write_text(json.dumps(draw.goals) + "\n", "utf-8")
    (folder / "random_state.json").write_text(json.dumps(draw.random_state) + "\n", "utf-8")


def _read(folder: Path, catalogue: Catalogue) -> Draw:
    version, internal, gauss = json.loads((folder / "random_state.json").read_text("utf-8"))
    return Draw(
        prices=dict(zip(catalogue, np.load(folder / "prices.npy").tolist(), strict=True)),
        goals=json.loads((folder / "goals.json").read_text("utf-8")),
        random_state=(version, tuple(internal), gauss),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
