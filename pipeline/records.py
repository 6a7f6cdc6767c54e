"""The records that stages hand to each other, and the JSON-lines files they travel in.

A `Trajectory` is one episode as it was played; a `Pair` is two trajectories of one task, the better one first. Both
keep their conversation in the Hugging Face conversational form (`[{"role": ..., "content": ...}]`), so `pairs.jsonl`
loads into TRL as it is.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

R = TypeVar("R")

MEASURED = ("env_seconds", "engine_seconds", "queue_seconds", "prompt_tokens", "cached_tokens")
"""What of a `Trajectory` says how it was played: of one and the same episode it differs from run to run."""


class Message(TypedDict):
    """One message of a conversation, as chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: str


class EpisodeStatus(StrEnum):
    """How an episode ended."""

    COMPLETED = "completed"
    """The environment ended it: task done, or failed for good."""
    MAX_STEPS = "max_steps"
    """The task's step limit was reached, or a player had nothing more to do: an expert's solution was used up."""
    CONTEXT_FULL = "context_full"
    """The next prompt and reply would not fit into the model's context."""
    PARSE_ERROR = "parse_error"
    """Given up after `max_malformed` malformed replies in a row."""
    STUCK = "stuck"
    """Given up after `max_invalid` steps in a row that were not possible."""
    ENV_ERROR = "env_error"
    """The environment broke, twice; `Trajectory.note` says how."""
    TIMEOUT = "timeout"
    """The environment gave no answer in time."""

    @property
    def is_error(self) -> bool:
        """Whether the episode says nothing about the policy."""
        return self in (EpisodeStatus.ENV_ERROR, EpisodeStatus.TIMEOUT)


@dataclass(kw_only=True, slots=True)
class Turn:
    """One action of the policy and what the environment answered."""

    text: str
    """The policy's whole reply, as decoded (for ReAct: thought and action)."""
    action: str
    """The action inside the reply; empty when the reply was malformed."""
    observation: str
    """What the environment answered, as the next message gives it to the policy."""
    reward: float
    """The episode's reward so far, in [0, 1]."""
    valid: bool
    """Whether the environment understood the action."""
    token_ids: list[int] = field(default_factory=list)
    """The ids the engine returned, end token included; empty where no engine played (experts, random)."""


@dataclass(kw_only=True, slots=True)
class Trajectory:
    """One episode."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str
    """Content id of the task, such as `sciworld:boil:3`."""
    env: str
    split: str
    kind: str = ""
    """The kind of the task, which tables are broken down by."""
    policy: str
    """Who played: `expert`, `random`, `sft`, or a method's name."""
    seed: int
    sample: int = 0
    """Number of this attempt at the task, from 0."""
    begun_with: int = 0
    """How many of its first turns were an expert's, replayed."""
    messages: list[Message]
    """The whole conversation: `prompt_length` messages of prompt, then reply and observation in turn."""
    prompt_length: int
    turns: list[Turn]
    reward: float
    """The episode's reward in [0, 1]."""
    success: bool
    """The environment's own predicate of success, never merely that the episode ended."""
    status: EpisodeStatus
    env_seconds: float = 0.0
    """Inside the environment."""
    engine_seconds: float = 0.0
    """From each question to the engine's answer; how long it waits for a place in the batch is part of that."""
    queue_seconds: float = 0.0
    """Waiting for the turn of its environment's worker, which answers one at a time; not for a free environment."""
    prompt_tokens: int = 0
    """Tokens of all prompts that were put to the engine: the conversation's past counts anew at each turn."""
    cached_tokens: int = 0
    """How many of those the engine took from its prefix cache."""
    note: str | None = None
    """What is odd about the episode: how the environment broke, where a replay read something else."""

    @property
    def source(self) -> str:
        """Where it comes from: policy, seed and sample, as `expert/seed0/0`."""
        return f"{self.policy}/seed{self.seed}/{self.sample}"

    @property
    def prompt(self) -> list[Message]:
        """The messages before the policy's first turn."""
        return self.messages[: self.prompt_length]

    @property
    def completion(self) -> list[Message]:
        """The policy's turns and the observations between them."""
        return self.messages[self.prompt_length :]


@dataclass(kw_only=True, slots=True)
class Pair:
    """Two trajectories of one task, `chosen` preferred over `rejected`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str
    """Content id of the task."""
    prompt: list[Message]
    """What both trajectories begin with: instruction, acknowledgement, task."""
    chosen: list[Message]
    """The winner's turns and the observations between them."""
    rejected: list[Message]
    chosen_token_ids: list[list[int]] = field(default_factory=list)
    """The ids of each turn of the winner as the engine returned them; empty where no engine played."""
    rejected_token_ids: list[list[int]] = field(default_factory=list)
    chosen_reward: float
    rejected_reward: float
    chosen_status: EpisodeStatus
    rejected_status: EpisodeStatus
    chosen_turns: int
    """Number of turns the winner took."""
    rejected_turns: int
    chosen_source: str
    """The winner's `Trajectory.source`."""
    rejected_source: str


class ShareGptLine(BaseModel):
    """One message of a published conversation."""

    speaker: Literal["human", "gpt"] = Field(alias="from")
    value: str


class ShareGpt(BaseModel):
    """One expert trajectory as published with ETO; further fields, such as `game_file`, are kept."""

    model_config = ConfigDict(extra="allow")

    id: int | str | None = None
    conversations: list[ShareGptLine]
    reward: float | None = Field(None, ge=0, le=1)
    """The trajectory's reward where the data carry it (WebShop); elsewhere only full successes are published."""


def dump_line(record: Any) -> str:
    """One record (a dataclass instance or a plain dict) as one JSON line, newline included."""
    return json.dumps(record, default=_fields, ensure_ascii=False) + "\n"


def _fields(record: Any) -> dict[str, Any]:
    """A dataclass instance's fields; `asdict` copies what is in them, and takes many times as long."""
    return {one.name: getattr(record, one.name) for one in fields(record)}


def read_jsonl(path: Path, record_type: type[R]) -> list[R]:
    """Read the records of a whole JSON-lines file.

    Args:
        path: the file.
        record_type: a record class of this module, or any type that pydantic validates.

    Raises:
        ValueError: a line is not a record, or the last one has no end; names the file, the line and the field.
    """
    records, cut = recover_jsonl(path, record_type)
    if cut:
        raise ValueError(
            f"{path}, line {len(records) + 1}: the last line has no end; the file was cut short. Add a newline if the "
            "line is whole, else delete it, or delete the file to make it again."
        )
    return records


def recover_jsonl(path: Path, record_type: type[R]) -> tuple[list[R], int]:
    """Read what a killed run wrote so far: a last line without its newline is half written, and dropped.

    Args:
        path: the file.
        record_type: a record class of this module, or any type that pydantic validates.

    Returns:
        The records, and the number of half-written last lines dropped (0 or 1).

    Raises:
        ValueError: a line is not a record; names the file, the line and the field.
    """
    adapter: TypeAdapter[R] = TypeAdapter(record_type)
    records: list[R] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return records, 1
            try:
                records.append(adapter.validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise ValueError(
                    f"{path}, line {number}: not a {record_type.__name__}{f' (field {where})' if where else ''}: "
                    f"{first['msg']}. Mend or delete the line, or delete the file to make it again."
                ) from None
    return records, 0


@contextlib.contextmanager
def atomic_write(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when it is whole: a crash or a full disk leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write records as a whole JSON-lines file, or nothing."""
    with atomic_write(path) as file:
        file.writelines(map(dump_line, records))


class JsonlAppender:
    """A JSON-lines file that grows record by record and survives being killed.

    Opening it cuts a half-written last line off, so that what is appended next starts a line of its own. A record that
    could not be written whole (a full disk) is taken back.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def append(self, record: Any) -> None:
        """Append one record and hand it to the operating system."""
        size = self._file.seek(0, os.SEEK_END)
        line = dump_line(record).encode()
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"{self._file.name}: only {written} of {len(line)} bytes written; is the disk full?")
        except OSError:
            self._file.truncate(size)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
