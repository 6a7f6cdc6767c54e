"""A recipe as it is given: a YAML file, the one that it names as its `base`, and `key=value` overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline import inert
from pipeline.config import SHORT, Config, choices_of, explain, put
from pipeline.methods import Method

RECIPES = Path(__file__).parent / "recipes"


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides.

    Args:
        recipe: a name in `pipeline/recipes`, or the path of a YAML file. Its key `base` may name another recipe, whose
            keys hold where it says nothing.
        overrides: `key=value` strings, later ones win.

    Raises:
        ValueError: no such recipe, or a key or value that a run cannot have; one sentence.
    """
    path, tree = _read(recipe)
    for override in overrides:
        _set(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(explain(error, str(path) + (" with " + " ".join(overrides) if overrides else ""))) from None
    if config.env.others:
        raise ValueError(f"{path}: env.others is for arms, as in {{method: sft, env.others: true}}.")
    for override in overrides:
        if reason := _inert_for_all(override.partition("=")[0], config):
            raise ValueError(f"{override!r} has no effect: {reason}.")
    return config if config.run else config.model_copy(update={"run": _run_name(path)})


def beside(file: Path) -> Config:
    """The resolved recipe of the run that a file belongs to; the defaults where it belongs to none."""
    for folder in file.resolve().parents:
        if (recipe := folder / "config.yaml").is_file():
            return load(str(recipe))
    return Config()


def _read(recipe: str) -> tuple[Path, dict[str, Any]]:
    """A recipe's file and its keys, those of the recipe that it names as its `base` beneath them.

    Raises:
        ValueError: no such recipe, no YAML, or a recipe that is its own base.
    """
    path, tree = _read_one(recipe)
    read = [path]
    while (base := tree.pop("base", None)) is not None:
        below, beneath = _read_one(str(base))
        if below in read:
            raise ValueError(f"{path}: its base {base!r} leads back to it.")
        read.append(below)
        tree = _merged(beneath, tree)
    return path, tree


def _read_one(recipe: str) -> tuple[Path, dict[str, Any]]:
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe)
    if not path.is_file() or path.suffix not in (".yaml", ".yml"):
        known = ", ".join(sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml")))
        raise ValueError(f"No recipe {recipe!r}: it is neither a YAML file nor one of {known}.")
    try:
        tree = yaml.safe_load(path.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values.")
    for section, key in SHORT.items():
        if isinstance(tree.get(section), str | list):
            tree[section] = {key: tree[section]}
    return path, tree


def _merged(beneath: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested keys of two recipes, the second's where both have one; its arms stand alone, and so what compares them."""
    merged = {key: value for key, value in beneath.items() if not (key == "compare" and "arms" in above)}
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(beneath.get(key), dict) and key != "arms"
        merged[key] = _merged(beneath[key], value) if both else value
    return merged


def _set(tree: dict[str, Any], override: str) -> None:
    """Put `a.b.c=value` into nested dicts; the value is YAML."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"{override!r} is no override; write key=value, as in seed=1.")
    try:
        put(tree, key, yaml.safe_load(text) if text else None)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is no YAML ({str(error).splitlines()[0]}).") from None


def _run_name(path: Path) -> str:
    """A run's name where the recipe gives none: `study/beta.yaml` is played in runs/study-beta."""
    inside = path.relative_to(RECIPES) if path.is_relative_to(RECIPES) else Path(path.name)
    return "-".join(inside.with_suffix("").parts)


def _inert_for_all(key: str, config: Config) -> str | None:
    """Why a key on the command line changes no policy of the run, if so; what a recipe holds is not judged."""
    plain: list[dict[str, Any]] = [{"method": method} for method in dict.fromkeys([Method.SFT, *config.method])]
    arms = [own | one for own, choices in map(choices_of, config.arms.values()) for one in choices or [{}]]
    reasons = [
        "the arms have values of their own" if key in keys else inert.reason(key, config.differing(keys))
        for keys in [*plain, *arms]
    ]
    if key == "method" or not all(reasons):
        return None
    return "; ".join(dict.fromkeys(filter(None, reasons[1:] or reasons)))  # the first is policy 0's
