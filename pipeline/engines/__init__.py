"""Engines: token prompts in, token completions out.

An engine serves one checkpoint at a time. It never sees text: what a prompt looks like is `pipeline.rendering`'s
business. Many episodes ask one engine at once; it batches what is waiting, so no episode waits for another one's turn
to end.

    vllm      the one that plays; CUDA or CPU
    openai    `vllm serve` on any number of machines
    hf        plain transformers, one request at a time: the reference the others are tested against
    scripted  canned replies, for tests

Importing this package imports neither torch nor vLLM.
"""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from envs import comma_list


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one completion is drawn."""

    max_tokens: int
    """Most tokens of a completion, end token included."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    seed: int = 0
    """Seed of this request alone; the same prompt, sampling and engine give the same ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What an engine returned for one prompt."""

    token_ids: list[int]
    """The new ids. The end token, if it was drawn, is the last one."""
    logprobs: list[float]
    """Natural log-probability of each id under the policy at temperature 1."""
    finish_reason: Literal["stop", "length"]
    """`stop`: an end token was drawn; `length`: `max_tokens` or the context's end was reached."""
    cached_tokens: int = 0
    """How many prompt tokens the engine took from its prefix cache."""


class Engine(Protocol):
    """Serves one checkpoint at a time."""

    max_length: int
    """Most tokens of a prompt and its completion together."""
    dtype: str
    """Precision that it computes in, as `bfloat16`."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, episode: str = "") -> Completion:
        """Complete one prompt.

        Args:
            prompt_ids: the whole conversation so far.
            sampling: how to draw.
            episode: a name. On a CPU only requests of one name share cached prefixes: how much of a prompt is computed
                afresh moves the last bits of its log-probs, and with a name an episode has of its own that depends on
                the episode's past alone, not on who else played when.

        Raises:
            ValueError: the prompt is empty, holds an id outside the vocabulary, or leaves no room for one token.
            RuntimeError: the engine is closed or has failed.
        """
        ...

    def load(self, path: Path, end_token_ids: Sequence[int]) -> None:
        """Serve another checkpoint of the same shape from now on, as an engine that was started with it would.

        Args:
            path: checkpoint folder; the one that is served already is not read again.
            end_token_ids: ids that end a completion.

        Raises:
            ValueError: the checkpoint's config.json is not the one of the checkpoint that is served.
            RuntimeError: requests are under way, or the engine is closed or has failed.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory and processes; requests under way fail. Calling it twice is fine."""
        ...


class EngineSettings(BaseModel):
    """The engine that serves a policy in rollouts and evaluations."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Literal["vllm", "openai", "hf"] = "vllm"
    """`vllm`, `openai` (servers that run already, on any number of machines), or `hf` (plain transformers, one request
    at a time: slow, a reference)."""
    servers: Annotated[list[str], BeforeValidator(comma_list)] = []
    """With `openai`: where the servers are, as http://a:8000,http://b:8000."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the served weights. `auto`: bfloat16 where the machine multiplies in it, float32 elsewhere; the
    manifest says which. With `openai` it is the servers' to choose: one that computes in another is refused, with
    `auto` one in float16 or in another than the rest."""
    concurrency: int = Field(default=64, ge=1)
    """Most requests that the engine works on at once; more wait."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory of the key-value cache in GiB. Empty: 2 on a CPU, what `gpu_memory` leaves on a GPU."""
    gpu_memory: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that one copy of the policy is spread over."""
    eager: bool | None = None
    """Whether to skip vLLM's compilation. Empty: yes on a CPU, where it takes longer than a small model wins back."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the engine, where there is no GPU. With 1, ids do not depend on what else is in the batch, and
    simulators keep the other cores; raise it for models above some 100M parameters."""

    @model_validator(mode="after")
    def _of_vllm_alone(self) -> Self:
        takes = {"vllm": type(self).model_fields.keys() - {"servers"}, "openai": {"servers", "dtype"}, "hf": {"dtype"}}
        inert = type(self).model_fields.keys() - takes[self.name] - {"name"}
        refuse_inert(self, sorted(inert), f"with engine.name={self.name}")
        return self


def load_engine(settings: EngineSettings, path: Path, max_length: int, end_token_ids: Sequence[int]) -> Engine:
    """Start the engine that `settings.name` names.

    Args:
        settings: the recipe's `engine.*` keys.
        path: checkpoint folder.
        max_length: most tokens of a prompt and its completion together.
        end_token_ids: ids that end a completion.

    Raises:
        ValueError: no checkpoint is at `path`, or a setting was changed that would have no effect here.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"No checkpoint at {path}: there is no config.json; give the folder that training wrote.")
    module, name = {
        "vllm": ("pipeline.engines.vllm_engine", "VllmEngine"),
        "openai": ("pipeline.engines.openai_engine", "OpenAiEngine"),
        "hf": ("pipeline.engines.hf", "HfEngine"),
    }[settings.name]
    engine = getattr(importlib.import_module(module), name)
    return cast("Engine", engine(path, max_length=max_length, end_token_ids=end_token_ids, settings=settings))


def check_prompt(prompt_ids: Sequence[int], max_length: int, vocabulary: int) -> None:
    """Refuse a prompt that no engine can complete.

    Raises:
        ValueError: it is empty, holds an id outside the vocabulary, or leaves no room for one token.
    """
    if not prompt_ids:
        raise ValueError("The prompt is empty; it needs at least one token.")
    if len(prompt_ids) >= max_length:
        raise ValueError(
            f"The prompt has {len(prompt_ids)} tokens; that leaves no room for a completion in max_length {max_length}."
        )
    if not (min(prompt_ids) >= 0 and max(prompt_ids) < vocabulary):
        strange = next(token for token in prompt_ids if not 0 <= token < vocabulary)
        raise ValueError(f"Token id {strange} of the prompt is outside the checkpoint's vocabulary of {vocabulary}.")


def read_sizes(path: Path) -> dict[str, Any]:
    """A checkpoint's sizes, as its config.json has them; those of the text model, where it has several."""
    config = json.loads((Path(path) / "config.json").read_text("utf-8"))
    return {**config, **config.get("text_config", {})}


def check_shape(served: Path, path: Path) -> None:
    """Refuse a checkpoint that cannot take the place of the one that is served.

    Raises:
        ValueError: the two have not the same config.json.
    """
    if (Path(path) / "config.json").read_bytes() != (Path(served) / "config.json").read_bytes():
        raise ValueError(f"{path} is of another shape than {served} (config.json); it needs an engine of its own.")


def refuse_inert(settings: EngineSettings, keys: Sequence[str], why: str) -> None:
    """Refuse settings that were changed from their default but would have no effect.

    Raises:
        ValueError: one of `keys` is not at its default.
    """
    for key in keys:
        if getattr(settings, key) != EngineSettings.model_fields[key].default:
            raise ValueError(f"engine.{key} has no effect {why}; leave it out.")
