"""A file from the web: resumed where it was cut, checked, and under its name only when it is whole.

A download grows in `NAME.part`; `NAME.part.json` says of which version at which address it is a part. The rest is asked
for with `Range` and `If-Range` (RFC 9110, sections 13 and 14), so that two versions are never joined. What cannot be
asked for so (no `ETag`, another address) is resumed only where a checksum will tell; else it starts again.
"""

import contextlib
import email.utils
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from pipeline.runs import file_digest, write_json

CHUNK = 1 << 14
"""Bytes read at once: what is lost of each connection that is cut."""
TRIES = 5
"""Tries in a row that bring nothing new, before the next address is tried."""
PATIENCE = 120
"""Most seconds to wait because a server asks for it; one that wants more is passed over."""
TIMEOUT = (10, 60)
"""Seconds to wait for a connection, and for the next bytes."""
BUSY = (429, 500, 502, 503, 504)
"""Answers that another try may change."""


class SourceError(Exception):
    """An address does not give the file; the next one may."""


class WrongBytesError(SourceError):
    """An address gives another file."""


class InterruptedTransferError(Exception):
    """A transfer ended early, or was put off; `wait` is how many seconds the server asks for, if it does."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Expected:
    """What is known of a file before it is here."""

    size: int | None = None
    """In bytes."""
    sha256: str | None = None
    source: str = ""
    """Where that is known from, as the end of a sentence."""
    read: Callable[[Path], None] | None = None
    """Reads a file and raises ValueError where it is not whole; asked where there is no checksum."""

    def check(self, file: Path) -> None:
        """Compare a file with what is known of it.

        Raises:
            WrongBytesError: it differs.
        """
        self.check_size(file.stat().st_size)
        if self.sha256 is not None:
            if (digest := file_digest(file)) != self.sha256:
                raise WrongBytesError(f"SHA-256 {digest[:16]}..., not {self.sha256[:16]}...{self.source}")
        elif self.read is not None:
            try:
                self.read(file)
            except ValueError as error:
                raise WrongBytesError(str(error)) from None

    def check_size(self, size: int | None) -> None:
        """Compare a size in bytes, if there is one to compare, likewise."""
        if self.size is not None and size not in (None, self.size):
            raise WrongBytesError(f"{size} bytes, not {self.size}{self.source}")

    @property
    def tells_the_end(self) -> bool:
        """Whether `check` notices that a file was cut."""
        return self.size is not None or self.sha256 is not None or self.read is not None


def download(urls: Sequence[str], target: Path, expected: Expected) -> str:
    """Put a file in place, from the first address that gives it.

    Args:
        urls: tried in this order.
        target: the file; what lies there is replaced, once the new one is whole.
        expected: what the file has to be.

    Returns:
        The address it came from.

    Raises:
        ValueError: no address gave it; says why each did not.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(target, expected)
    failures = []
    for url in urls:
        try:
            _from(url, part)
        except SourceError as error:
            failures.append(f"{url}: {error}")
            _tell(failures[-1])
            continue
        part.path.replace(target)
        part.drop()
        return url
    raise ValueError(
        f"{target}: no address gave it ({'; '.join(failures)}). Try again later, or put the file there by hand."
    )


class _Part:
    """What is here of a file that is on its way."""

    def __init__(self, target: Path, expected: Expected) -> None:
        self.target, self.expected = target, expected
        self.path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")
        self.resumed = False
        """Whether bytes of an earlier time are among these."""

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def drop(self) -> None:
        """Forget what is here."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self.resumed = False

    def begin(self, url: str, response: requests.Response) -> None:
        """Start anew with a version, noting which it is before its first byte is written."""
        self.drop()
        write_json(self._note, {"url": url, "validator": _validator(response)})

    def request(self, url: str) -> dict[str, str]:
        """The headers that ask an address for the rest; what cannot go on is dropped."""
        headers = {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file itself
        if not self.size:
            return headers
        noted: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            noted = json.loads(self._note.read_text("utf-8"))
        if noted.get("url") == url and noted.get("validator"):
            return headers | {"Range": f"bytes={self.size}-", "If-Range": noted["validator"]}
        if self.expected.sha256:
            return headers | {"Range": f"bytes={self.size}-"}
        self.drop()
        return headers


def _from(url: str, part: _Part) -> None:
    """Complete a part from one address.

    Raises:
        SourceError: the address does not give the file.
    """
    part.resumed = part.size > 0
    while True:
        _receive(url, part)
        try:
            return part.expected.check(part.path)
        except WrongBytesError as error:
            again = part.resumed  # the fault may lie in the bytes of an earlier time: once more without them
            part.drop()
            if not again:
                raise WrongBytesError(f"sent the wrong bytes ({error})") from None
            _tell(f"{part.target}: what was here of it does not belong to it ({error}); it starts again")


def _receive(url: str, part: _Part) -> None:
    """Transfer until the server says that this is all, through cuts and waits."""
    fruitless, most = 0, part.size
    while True:
        try:
            return _transfer(url, part)
        except InterruptedTransferError as error:
            fruitless = 0 if part.size > most else fruitless + 1
            most = max(most, part.size)
            wait = 2.0**fruitless if error.wait is None else error.wait
            if fruitless == TRIES:
                raise SourceError(f"{error}, {TRIES} times in a row") from None
            if wait > PATIENCE:
                raise SourceError(f"{error}, and asks to wait {wait:.0f} s") from None
            _tell(f"{url}: {error}; again in {wait:.0f} s")
            time.sleep(wait)


def _transfer(url: str, part: _Part) -> None:
    """One request for what is missing.

    Raises:
        InterruptedTransferError: not all came; another try may bring more.
        SourceError: this address will not give the file.
    """
    if part.expected.size is not None and part.size >= part.expected.size:
        return  # complete, or too long: the check tells
    try:
        headers = part.request(url)
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            _take(url, response, part)
    except requests.ConnectionError as error:
        raise InterruptedTransferError(f"no connection, or it was cut ({_cause(error)})") from None
    except (requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise InterruptedTransferError(f"the connection was cut ({_cause(error)})") from None
    except requests.RequestException as error:
        raise SourceError(_cause(error)) from None


def _take(url: str, response: requests.Response, part: _Part) -> None:
    """Act on an answer: append what it brings, start again with it, or refuse it."""
    asked = "Range" in response.request.headers
    status = response.status_code
    if status in BUSY:
        raise InterruptedTransferError(f"HTTP {status}", _retry_after(response))
    if status == 416 and asked:
        _past_the_end(response, part)
        return
    if status != 200 and not (status == 206 and asked):
        raise SourceError(f"HTTP {status}")
    start, total = _extent(response)
    if status == 206 and start != part.size:
        part.drop()
        raise InterruptedTransferError(f"sent bytes from {start} on, which were not asked for")
    chunks = response.iter_content(CHUNK)
    first = next(chunks, b"")
    if status == 200 and _is_page(response, first):  # Google Drive's: confirm this, or too many have asked
        raise WrongBytesError(f"sent a web page{_title(first)} instead of the file")
    part.expected.check_size(total)  # now, not after gigabytes
    if status == 200:
        part.begin(url, response)
    _append(part, itertools.chain([first], chunks), total)
    if not (part.expected.tells_the_end or _tells_the_end(response)):  # asked for more, the server may tell it
        raise InterruptedTransferError("does not say where the file ends")


def _append(part: _Part, chunks: Iterable[bytes], total: int | None) -> None:
    name = part.target.name
    bar = tqdm(desc=name, total=total, initial=part.size, unit="B", unit_scale=True, mininterval=0.5, disable=None)
    with bar, part.path.open("ab", buffering=0) as file:
        for chunk in chunks:
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and part.size != total:
        raise InterruptedTransferError(f"the connection was cut at {part.size} of {total} bytes")


def _past_the_end(response: requests.Response, part: _Part) -> None:
    """After HTTP 416: the part is the whole file, or of another one."""
    _, total = _extent(response)
    if part.size != total:
        part.drop()
        raise InterruptedTransferError("HTTP 416: has no such rest; what was here of it is stale")


def _extent(response: requests.Response) -> tuple[int | None, int | None]:
    """Where the bytes of an answer begin, and how many the whole file has, as far as the headers say it."""
    if response.status_code == 200:
        length = None if "Content-Encoding" in response.headers else response.headers.get("Content-Length")
        return 0, int(length) if length else None
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    start, total = found.groups() if found else (None, None)
    return int(start) if start else None, int(total) if total and total != "*" else None


def _tells_the_end(response: requests.Response) -> bool:
    """Whether a cut would have been noticed: else a closed connection may be the end of the file, or not."""
    if response.status_code == 206:
        return _extent(response)[1] is not None
    return "Content-Length" in response.headers or response.headers.get("Transfer-Encoding") == "chunked"


def _validator(response: requests.Response) -> str | None:
    """What `If-Range` may name: a strong ETag or a date, of bytes that are the file's own."""
    if "Content-Encoding" in response.headers:
        return None
    etag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified") if etag.startswith("W/") else etag


def _retry_after(response: requests.Response) -> float | None:
    """Seconds that a server asks to wait, which it says as such or as a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _is_page(response: requests.Response, first: bytes) -> bool:
    declared = response.headers.get("Content-Type", "").startswith("text/html")
    return declared or first.lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _title(page: bytes) -> str:
    found = re.search(rb"<title[^>]*>(.*?)</title>", page, re.IGNORECASE | re.DOTALL)
    return f' ("{" ".join(found[1].decode("utf-8", "replace").split())}")' if found else ""


def _cause(error: BaseException) -> str:
    """What lies at the bottom of an error of requests, in a few words."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
