"""The split lists published with ETO (eval_agent/data/sciworld): pairs of a task's name and a variation."""

import hashlib
import re
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

OFFICIAL = {"train": "train_indices.json", "seen": "dev_indices.json", "unseen": "test_indices.json"}
"""File by split."""


def published(folder: Path, known: tuple[str, ...]) -> dict[str, list[str]]:
    """Content ids of the published lists, overlaps and all: 54 of the 194 dev variations are also in train.

    ```
    task-10-measure-melting-point-(known-substance), 325 -> sciworld:measure-melting-point-known-substance:325
    ```

    Args:
        folder: holds the three files.
        known: names of the tasks in use.

    Raises:
        ValueError: a list is missing or malformed, or names a task that is not in use.
    """
    return {split: _ids(folder.expanduser() / file, known) for split, file in OFFICIAL.items()}


def leak_free(lists: dict[str, list[str]]) -> dict[str, list[str]]:
    """The lists, each task once, and train without what is tested: published results stay comparable."""
    tested = {task for split in ("seen", "unseen") for task in lists[split]}
    once = {split: list(dict.fromkeys(tasks)) for split, tasks in lists.items()}
    return once | {"train": [task for task in once["train"] if task not in tested]}


def digest(lists: dict[str, list[str]]) -> str:
    """A hash of the lists."""
    return hashlib.sha256(repr(lists).encode()).hexdigest()[:16]


def _ids(file: Path, known: tuple[str, ...]) -> list[str]:
    try:
        pairs = TypeAdapter(list[tuple[str, int]]).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ValueError(
            f"env.sciworld.splits: {file} is no list of tasks and variations ({why}); the folder has to hold "
            f"{', '.join(OFFICIAL.values())} as published with ETO (`python -m pipeline fetch sciworld-splits`)."
        ) from None
    names = [re.sub(r"[()]", "", re.sub(r"^task-\w+?-", "", name)) for name, _ in pairs]
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"{file}: {wrong[0]!r} is no ScienceWorld task in use; known: {', '.join(known)}.")
    return [f"sciworld:{name}:{number}" for name, (_, number) in zip(names, pairs, strict=True)]
