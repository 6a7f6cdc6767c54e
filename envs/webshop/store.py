"""Folders of prepared files: made whole or not at all, by one process at a time, anew when their sources change."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def prepare(folder: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> bool:
    """Have a folder filled, unless it is there, whole, and was made with the same key.

    Args:
        folder: where the files are to lie; replaced if it has to be made again, which is logged with the reason.
        key: what the files depend on, in JSON's types.
        make: writes the files into an empty folder.

    Returns:
        Whether it was made now.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if (reason := _stale(folder, key)) is None:
            return False
        if folder.exists():
            logger.warning("%s is made again: %s.", folder, reason)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            make(made)
            sizes = {file.name: file.stat().st_size for file in made.iterdir()}
            (made / MANIFEST).write_text(json.dumps({"key": dict(key), "sizes": sizes}, indent=1) + "\n", "utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    return True


def _stale(folder: Path, key: Mapping[str, Any]) -> str | None:
    """Why a folder cannot be used as it is; None if it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        was, sizes = dict(manifest["key"]), dict(manifest["sizes"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no whole {MANIFEST}"
    if other := sorted(name for name in {*was, *key} if was.get(name) != key.get(name)):
        return f"it was made with another {' and '.join(other)}"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or damaged"
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make a folder; the others wait for it."""
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
