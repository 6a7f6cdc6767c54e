"""Zip archives: unpacked below a folder and nowhere else, over nothing that lies there."""

import contextlib
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tqdm import tqdm


def unpack(archive: Path, folder: Path) -> None:
    """Unpack what is not there yet; a kill leaves no half file under a member's name.

    Raises:
        ValueError: no zip archive, a member that would lie elsewhere, or another file in a member's place.
    """
    with _opened(archive) as (opened, members):
        todo = [member for member in members if not _is_there(member, folder)]
        for member in tqdm(todo, desc=f"unpacking {archive.name}", unit="file", disable=None):
            place = folder / member.filename
            place.parent.mkdir(parents=True, exist_ok=True)
            half = place.with_name(f".{place.name}.half")
            with opened.open(member) as source, half.open("wb") as file:
                shutil.copyfileobj(source, file)
            half.replace(place)


def check(archive: Path) -> None:
    """Read an archive's table of contents.

    Raises:
        ValueError: no zip archive, or a member that would lie elsewhere.
    """
    with _opened(archive):
        pass


def is_unpacked(archive: Path, folder: Path) -> bool:
    """Whether every member is there, by names and sizes alone.

    Raises:
        ValueError: as `unpack` does.
    """
    with _opened(archive) as (_, members):
        return all(_is_there(member, folder) for member in members)


def changed(archive: Path, folder: Path) -> Path | None:
    """The first unpacked file that is missing or whose bytes are not the archive's (CRC-32), if there is one.

    Raises:
        ValueError: as `unpack` does.
    """
    with _opened(archive) as (_, members):
        for member in tqdm(members, desc=f"reading {folder}", unit="file", disable=None):
            place: Path = folder / member.filename
            if not _is_there(member, folder) or zlib.crc32(place.read_bytes()) != member.CRC:
                return place
    return None


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]]:
    """An archive and its files, all of which belong below the folder that it is unpacked into."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            for member in members:
                path = PurePosixPath(member.filename)
                outside = path.is_absolute() or ".." in path.parts or "\\" in member.filename
                if outside or stat.S_ISLNK(member.external_attr >> 16):
                    raise ValueError(f"{archive}: its {member.filename!r} leads out of the folder; not unpacked.")
            yield opened, members
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{archive} is no whole zip archive ({error}); delete it and fetch it again.") from None


def _is_there(member: zipfile.ZipInfo, folder: Path) -> bool:
    place = folder / member.filename
    if not place.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{place} leads out of {folder} through a link; remove the link.")
    if not place.exists():
        return False
    if place.is_dir() or place.stat().st_size != member.file_size:
        raise ValueError(f"{place} is not what the archive has there; delete or rename it.")
    return True
