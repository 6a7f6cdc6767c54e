"""A tiny text environment that obeys, and on command crashes, hangs, raises or prints."""

import ctypes
import os
import subprocess
import sys
import time
from typing import Any

from pydantic import BaseModel, ConfigDict

from envs import MALFORMED_OBSERVATION, SPLITS, ExpertStep, Info, NoSolutionError, TextEnv

LIMIT = 5


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    variations: int = 3
    broken: str = ""
    """Message of the ValueError that making the environment raises, if any."""
    child: bool = False
    """Whether to have a child that lives as long as a pipe from this process, as a JVM does."""


class ToyEnv(TextEnv):
    """Count to the task's number by the action `up`; `down` loses for good."""

    name = "toy"
    Settings = Settings

    def __init__(self, settings: Any = None) -> None:
        self._settings = settings or Settings()
        if self._settings.broken:
            raise ValueError(self._settings.broken)
        self._over = True
        self._child = subprocess.Popen(["cat"], stdin=subprocess.PIPE) if self._settings.child else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        task = (options or {}).get("task", "")
        if task not in [task for split in SPLITS for task in self.tasks(split)]:
            raise ValueError(f"No such toy task: {task!r}.")
        self._goal = int(task.split(":")[2]) + 1
        self._count, self._steps, self._reward, self._over = 0, 0, 0.0, False
        return f"Count to {self._goal}.", self._info(True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if self._over:
            raise ValueError("The episode is over: call reset before the next step.")
        verb, _, argument = action.strip().partition(" ")
        self._misbehave(verb, argument)
        self._steps += 1
        before, lost = self._reward, verb == "down"
        if verb == "up":
            self._count += 1
            self._reward = self._count / self._goal
        terminated = lost or self._count == self._goal
        truncated = not terminated and self._steps >= LIMIT
        self._over = terminated or truncated
        observation = f"{self._count}" if action.strip() else MALFORMED_OBSERVATION
        return observation, self._reward - before, terminated, truncated, self._info(verb in ("up", "down"))

    def _misbehave(self, verb: str, argument: str) -> None:
        match verb:
            case "exit":
                os._exit(int(argument))
            case "segfault":
                ctypes.string_at(0)
            case "sleep":
                time.sleep(float(argument))
            case "value":
                raise ValueError(argument)
            case "key":
                raise NoSolutionError(argument)
            case "break":
                raise RuntimeError(argument)
            case "disk":
                raise OSError(28, "No space left on device", argument)
            case "print":
                sys.stdout.write(f"{argument}\n")
                sys.stdout.flush()
            case "shell":
                subprocess.run(["echo", argument], check=True)

    def pid(self) -> int:
        return os.getpid()

    def child_pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def unpicklable(self) -> Any:
        return lambda: None

    def tasks(self, split: str) -> list[str]:
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}.")
        return [f"toy:{split}:{number}" for number in range(self._settings.variations)]

    def valid_actions(self) -> list[str]:
        return ["down", "up"]

    def expert(self, task: str) -> list[ExpertStep]:
        goal = int(task.split(":")[2]) + 1
        return [ExpertStep(f"{number} comes next.", "up", f"{number}") for number in range(1, goal + 1)]

    @classmethod
    def kind(cls, task: str) -> str:
        return task.split(":")[1]

    @classmethod
    def fingerprint(cls, settings: Any) -> str:
        return f"toy {settings.variations}"

    @classmethod
    def instruction(cls, settings: Any) -> str:
        return "Count. Actions: up, down."

    @classmethod
    def example(cls, settings: Any) -> list[tuple[str, str]]:
        return [("Count to 1.", "Action: up")]

    @classmethod
    def official_turn(cls, action: str, observation: str, settings: Any) -> tuple[str, str]:
        if action.split()[0] not in ("up", "down"):
            raise ValueError(f"toy knows no action {action!r} (verb {action.split()[0]!r})")
        return action, observation

    @classmethod
    def official_id(cls, item: dict[str, Any], settings: Any) -> str:
        if "id" not in item:
            raise ValueError("no id")
        return f"toy:train:{item['id']}"

    @classmethod
    def official_task(cls, text: str) -> str:
        return text

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _info(self, valid: bool) -> Info:
        return Info(reward=self._reward, success=self._reward == 1, valid=valid)


class OtherToyEnv(ToyEnv):
    """The same again, as another environment."""

    name = "other"
