"""Tool `fetch`: official data from where others publish them into data/, checked.

python -m pipeline fetch                             what there is, its licence, and what of it is here
python -m pipeline fetch webshop-small               get it; after a cut or a kill it goes on where it was
python -m pipeline fetch webshop-small --offline     only check and unpack what is here, and say what is missing
python -m pipeline fetch --verify                    read everything that is here again

`pipeline/assets.yaml` lists addresses, sizes and checksums. What a file was when it was first fetched is kept in
`data/assets.lock.json`; where nobody publishes a checksum, that is what it has to be ever after.
"""

import argparse
import contextlib
import difflib
import fcntl
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from pipeline import archives
from pipeline.download import Expected, WrongBytesError, download
from pipeline.runs import file_digest, write_json

ASSETS = Path(__file__).parent / "assets.yaml"
DATA = Path("data")
LOCK = DATA / "assets.lock.json"

_Below = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
"""A path below `data/`; no part of it is `..`."""


class File(BaseModel):
    """A file of an asset."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: _Below
    urls: list[str] = Field(min_length=1)
    size: int | None = Field(ge=1)
    sha256: str | None = Field(pattern="^[0-9a-f]{64}$")
    into: _Below | None = None

    @property
    def place(self) -> Path:
        """Where the file lies."""
        return DATA / self.path


class Asset(BaseModel):
    """Files that are of use together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str
    licence: str
    use: str
    files: list[File] = Field(min_length=1)


class Record(BaseModel):
    """What a file was when it was first here."""

    size: int
    sha256: str
    url: str | None
    """Where it came from; None if it was put there by hand."""
    date: str

    @property
    def source(self) -> str:
        """When and how it came, as the end of a sentence."""
        origin = self.url or "a file put there by hand"
        return f", as recorded on {self.date} from {origin}; if a new version is wanted, delete its entry in {LOCK}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch; without any, the list is shown")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--offline", action="store_true", help="open no connection; say what is missing")
    mode.add_argument("--verify", action="store_true", help="read what is here again and compare; fetch nothing")


def main(options: argparse.Namespace) -> int:
    """List, fetch or verify; exit code 1 where something is missing or wrong."""
    assets = load()
    chosen = {name: _named(assets, name) for name in options.names}
    if options.verify:
        return _verify(chosen or assets, whole=bool(chosen))
    if not chosen:
        if options.offline:
            raise ValueError("fetch --offline: name what has to be here; `python -m pipeline fetch` lists the names.")
        _console().print(_table(assets))
        return 0
    with _alone():
        here = [_fetch(name, asset, offline=options.offline) for name, asset in chosen.items()]
    return int(not all(here))


def load() -> dict[str, Asset]:
    """What can be fetched, by name.

    Raises:
        ValueError: `assets.yaml` is malformed.
    """
    try:
        return TypeAdapter(dict[str, Asset]).validate_python(yaml.safe_load(ASSETS.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{ASSETS}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None


def _named(assets: Mapping[str, Asset], name: str) -> Asset:
    if name not in assets:
        near = difflib.get_close_matches(name, assets, n=1)
        hint = f"did you mean {near[0]!r}" if near else f"known: {', '.join(assets)}"
        raise ValueError(f"fetch: there is no {name!r}; {hint}. `python -m pipeline fetch` lists all.")
    return assets[name]


def _fetch(name: str, asset: Asset, *, offline: bool) -> bool:
    """Put an asset in place; whether all of it is here now."""
    console = _console()
    console.print(f"{name}: {asset.about}. Licence: {asset.licence}.", soft_wrap=True)
    missing = [file for file in asset.files if not _here(file)]
    if offline:
        for file in missing:
            console.print(f"{file.place} is missing: put it there, or fetch {name} without --offline.", soft_wrap=True)
    else:
        for file in missing:
            _record(file, download(file.urls, file.place, _known(file)))
    for file in asset.files:
        if file.into is not None and file.place.is_file():
            archives.unpack(file.place, DATA / file.into)
    whole = not (missing and offline)
    if whole:
        console.print(f"{name} is here: {asset.use}", soft_wrap=True)
    return whole


def _here(file: File) -> bool:
    """Whether a file is in place. One that is new to us is read and recorded; of others the size has to do.

    Raises:
        ValueError: another file lies in its place.
    """
    if not file.place.is_file():
        return False
    known, recorded = _known(file), file.path in _records()
    try:
        if recorded:
            known.check_size(file.place.stat().st_size)
        else:
            known.check(file.place)
    except WrongBytesError as error:
        raise ValueError(f"{file.place} is not the file that it should be ({error}); delete or rename it.") from None
    if not recorded:
        _record(file, None)
    return True


def _known(file: File) -> Expected:
    """What a file has to be: as published, or else as recorded."""
    record = _records().get(file.path)
    if file.sha256 is not None or record is None:
        read = _parse if file.place.suffix == ".json" else None
        return Expected(file.size, file.sha256, f", as {ASSETS.name} has it", read)
    return Expected(record.size, record.sha256, record.source)


def _parse(file: Path) -> None:
    """Read a file of JSON, which tells whether its end is there; ValueError where it is not."""
    try:
        json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"no whole JSON: {error}") from None


def _records() -> dict[str, Record]:
    try:
        return TypeAdapter(dict[str, Record]).validate_json(LOCK.read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise ValueError(f"{LOCK}: {error.errors()[0]['msg']}. Mend it, or delete it to record anew.") from None


def _record(file: File, url: str | None) -> None:
    """Write down what a file is; an archive that cannot be read is none to hold later ones to."""
    if file.into is not None:
        archives.check(file.place)
    record = Record(
        size=file.place.stat().st_size,
        sha256=file.sha256 or file_digest(file.place),  # a published one was compared just now
        url=url,
        date=time.strftime("%Y-%m-%d"),
    )
    records = {**_records(), file.path: record}
    write_json(LOCK, {path: one.model_dump() for path, one in sorted(records.items())})


def _verify(assets: Mapping[str, Asset], *, whole: bool) -> int:
    """Compare what is here with what it has to be; what is missing counts where the user named it (`whole`)."""
    console = _console()
    wrong = 0
    for name, asset in assets.items():
        for file in asset.files:
            if not file.place.is_file():
                if whole:
                    console.print(f"{name}: {file.place} is missing", soft_wrap=True)
                    wrong += 1
                continue
            found = _fault(file)
            console.print(f"{name}: {file.place} {found or 'is as it should be'}", soft_wrap=True)
            wrong += found is not None
    if not whole and not any(file.place.is_file() for asset in assets.values() for file in asset.files):
        console.print("Nothing was fetched yet.")
    return int(wrong > 0)


def _fault(file: File) -> str | None:
    """What is wrong with a file that is here, or with what was unpacked of it."""
    known = _known(file)
    try:
        known.check(file.place)
        if file.into is not None and (place := archives.changed(file.place, DATA / file.into)):
            return f"is right, but {place} is missing or was changed; delete it and fetch again"
    except (WrongBytesError, ValueError) as error:
        return f"is wrong: {error}"
    return None if known.sha256 else "has no checksum to compare with yet; fetch it, and this one is recorded"


def _table(assets: Mapping[str, Asset]) -> Table:
    table = Table("name", "what", "size", "licence", "state", show_edge=False)
    records = _records()
    for name, asset in assets.items():
        sizes = [file.size or (records[file.path].size if file.path in records else None) for file in asset.files]
        known = sum(size or 0 for size in sizes)
        size = "not known" if not known else f"{'' if all(sizes) else 'over '}{_bytes(known)}"
        table.add_row(name, asset.about, size, asset.licence, _state(asset.files))
    return table


def _state(files: Sequence[File]) -> str:
    """What is here of some files, by names and sizes alone."""
    here = [file for file in files if file.place.is_file()]
    try:
        for file in here:
            _known(file).check_size(file.place.stat().st_size)
        unpacked = all(file.into is None or archives.is_unpacked(file.place, DATA / file.into) for file in here)
    except (WrongBytesError, ValueError):
        return "wrong, see --verify"
    if len(here) == len(files):
        return "here" if unpacked else "here, not all unpacked"
    parts = [file.place.with_name(f"{file.place.name}.part") for file in files]
    begun = sum(part.stat().st_size for part in parts if part.is_file())
    return f"{len(here)} of {len(files)} files" + (f" and {_bytes(begun)}" if begun else "")


def _bytes(count: int) -> str:
    """A number of bytes to read: 147 kB, 5.48 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1000:.3g} kB"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let no other process fetch meanwhile: two would write one part."""
    DATA.mkdir(exist_ok=True)
    with (DATA / ".fetch.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process fetches into {DATA.resolve()}; wait for it.") from None
        yield


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    return console
