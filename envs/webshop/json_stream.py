"""Big JSON files, one value at a time: WebShop's are a list or an object of over a million entries, up to 5 GB."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

CHUNK = 1 << 20
"""Characters that are read at once."""

LONGEST = 1 << 26
"""Characters of the longest value; what has no end within them is taken for broken."""


def items(path: Path) -> Iterator[Any]:
    """The values of a file's list.

    Raises:
        ValueError: the file is not there, or no list of JSON values; names file, line and character.
    """
    with _opened(path) as reader:
        reader.expect("[", "a list")
        if reader.took("]"):
            return reader.finish()
        while True:
            yield reader.value()
            if reader.took("]"):
                return reader.finish()
            reader.expect(",", "a comma or the end of the list")


def entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of a file's object, in order; a key that is there twice comes twice.

    Raises:
        ValueError: the file is not there, or no JSON object; names file, line and character.
    """
    with _opened(path) as reader:
        reader.expect("{", "an object")
        if reader.took("}"):
            return reader.finish()
        while True:
            key = reader.value()
            if not isinstance(key, str):
                reader.fail("a key has to be a string")
            reader.expect(":", "a colon")
            yield key, reader.value()
            if reader.took("}"):
                return reader.finish()
            reader.expect(",", "a comma or the end of the object")


def _opened(path: Path) -> "_Reader":
    try:
        return _Reader(path, path.open(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None


class _Reader:
    """A window onto the file's text, in which `at` is the next character to look at."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.at = "", 0
        self.lines, self.characters = 0, 0  # before the window
        self.ended = False
        self.decode = json.JSONDecoder().raw_decode

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def more(self) -> bool:
        """Move the window on, twice as wide if nothing of it has been used; False at the file's end."""
        if self.ended:
            return False
        rest = self.text[self.at :]
        try:
            chunk = self.file.read(max(CHUNK, len(rest)))
        except UnicodeDecodeError as error:
            self.fail(f"what follows is no UTF-8 ({error.reason})")
        self.lines += self.text.count("\n", 0, self.at)
        self.characters += self.at
        self.text, self.at, self.ended = rest + chunk, 0, not chunk
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no blank; empty at the file's end."""
        while True:
            while self.at < len(self.text):
                if (character := self.text[self.at]) not in " \t\r\n":
                    return character
                self.at += 1
            if not self.more():
                return ""

    def took(self, character: str) -> bool:
        """Whether the next character is this one, which is then passed over."""
        if self.peek() != character:
            return False
        self.at += 1
        return True

    def expect(self, character: str, what: str) -> None:
        """Pass over a character that has to come."""
        if not self.took(character):
            self.fail(f"{what} has to come there, not {self.text[self.at : self.at + 10] or 'the end'!r}")

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except RecursionError:
                self.fail("it is nested too deeply")
            except json.JSONDecodeError as error:
                ahead = error.pos - self.at
                if len(self.text) - self.at > LONGEST or not self.more():
                    self.fail(error.msg, ahead)
                continue
            length = end - self.at
            if end < len(self.text) - len("e+") or not self.more():  # a number might go on
                self.at += length
                return value

    def finish(self) -> None:
        """Make sure that nothing follows."""
        if self.peek():
            self.fail("something follows the end")

    def fail(self, why: str, ahead: int = 0) -> NoReturn:
        """Refuse the file, at the window's next character or some way ahead of it."""
        at = self.at + ahead
        line = self.lines + self.text.count("\n", 0, at) + 1
        raise ValueError(f"{self.path}: no valid JSON at character {self.characters + at} (line {line}): {why}.")
