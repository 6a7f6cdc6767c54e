"""Any number of `vllm serve` on this and other machines, spoken to by OpenAI's completions API: token in, token out.

    VLLM_SERVER_DEV_MODE=1 vllm serve CHECKPOINT --generation-config vllm --enable-prompt-tokens-details ...

- An episode stays with one server, which has its past cached; which one, its name decides (rendezvous hashing): with a
  server that goes, only its own episodes go over to others. In a server with `--data-parallel-size` it stays with one
  rank, for each rank has a cache of its own, and left to itself vLLM takes the one that is least busy.
- A request that a server does not answer is asked of another one, and put off longer each time once all have failed
  it. Sampling has the request's own seed: who answers makes no difference beyond the last bits of the arithmetic.
- A policy is put into every server by vLLM's `reload_weights`, from a folder that the servers see under the same path,
  and named as the weights' version. Each server is asked for that version every two seconds, and after each reply
  before the reply counts. One that was started anew does not have it, and gets the policy again; one that has somebody
  else's ends the run. `VLLM_SERVER_DEV_MODE` is what makes these calls possible: keep such servers on a network of
  your own.

On a CPU, unlike the other engines, these share cached prefixes between episodes: last bits may hang on who played when.
"""

import asyncio
import atexit
import contextlib
import hashlib
import re
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
from tqdm import tqdm

from pipeline.engines import Completion, EngineSettings, Sampling, check_prompt, check_shape, read_sizes

POLL = 2.0
"""Seconds between two looks at a server; it takes longer than that to start one anew."""
SILENCE = 60.0
"""Seconds after which a server that does not say its version is lost."""
PATIENCE = 900.0
"""Most seconds that a request waits for any server to be there."""
TRIES = 8
"""How often a request may fail before it is the request's own fault."""
LONGEST_PAUSE = 60.0
"""Most seconds that a request is put off, whatever a server asks for."""
RANK = "X-data-parallel-rank"
"""The header that names the rank a request is for (vllm/entrypoints/generate/base/serving.py)."""
NEW = "default"
"""The version of a server's weights that nobody has named (vllm/v1/engine/core.py)."""

_T = TypeVar("_T")


class LostError(Exception):
    """A server did not answer, or not as one that is well; another may."""

    def __init__(self, reason: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        """Of the HTTP answer, if there was one."""
        self.wait = wait
        """Seconds after which the server asks to be tried again, being well but busy."""


class NewError(LostError):
    """A server was started anew: it is there, without the policy."""


class ForeignWeightsError(Exception):
    """A server has weights that another run has put there."""


class OpenAiEngine:
    """Requests go to whichever server is there; it ends with the first error that another server would not mend.

    Args:
        path: checkpoint folder, seen by the servers under the same path.
        max_length: most tokens of a prompt and its completion together.
        end_token_ids: ids that end a completion.
        settings: `servers`, and the `dtype` that they have to have.

    Raises:
        ValueError: no server is named or reachable, or one is not as it has to be.
    """

    def __init__(
        self, path: Path, *, max_length: int, end_token_ids: Sequence[int], settings: EngineSettings | None = None
    ) -> None:
        settings = settings or EngineSettings(name="openai")
        self.max_length = max_length
        self.dtype: str = "" if settings.dtype == "auto" else settings.dtype
        self._path, self._ends, self._vocabulary = path, list(end_token_ids), int(read_sizes(path)["vocab_size"])
        self._version, self._under_way, self._error = "", 0, ""
        # The engine's own loop: its callers come and go with theirs, and `load` blocks.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        # vLLM drops connections that are idle for 5 s; it must never be asked over one that it is about to drop.
        limits = httpx.Limits(keepalive_expiry=2)
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=10), limits=limits)
        self._changed = asyncio.Event()
        self._servers = [_Server(url.rstrip("/"), self._client) for url in settings.servers]
        self._monitors: list[asyncio.Task[None]] = []
        try:
            self._call(self._start())
        except BaseException:
            self.close()
            raise

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, episode: str = "") -> Completion:
        """See `Engine.generate`. Cancelling the awaiting task takes the request off its server."""
        check_prompt(prompt_ids, self.max_length, self._vocabulary)
        if self._error:
            raise RuntimeError(self._error)
        asked = asyncio.run_coroutine_threadsafe(self._generate(list(prompt_ids), sampling, episode), self._loop)
        try:
            return await asyncio.wrap_future(asked)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._error and task is not None and not task.cancelling():  # `close` cancelled it, not who asked
                raise RuntimeError(self._error) from None
            raise

    def load(self, path: Path, end_token_ids: Sequence[int]) -> None:
        """See `Engine.load`."""
        if self._error:
            raise RuntimeError(self._error)
        if self._under_way:
            raise RuntimeError(f"{self._under_way} requests are under way; load when they are done.")
        self._ends = list(end_token_ids)
        if path != self._path:
            check_shape(self._path, path)
            self._path = path
            self._call(self._start())

    def close(self) -> None:
        """See `Engine.close`. The servers go on."""
        self._error = self._error or "The engine is closed."
        if self._thread.is_alive():
            self._call(self._stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        atexit.unregister(self.close)

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # Everything below runs in the engine's loop.

    async def _start(self) -> None:
        """Put the policy into every server that is there, and watch them all from now on."""
        await self._unwatch()
        if not self._servers:
            raise ValueError("engine.servers names no server; give their addresses, as http://HOST:8000.")
        self._version = f"{self._path} {uuid.uuid4().hex}"
        found = await asyncio.gather(*map(self._bring_up, self._servers), return_exceptions=True)
        for server, error in zip(self._servers, found, strict=True):
            if isinstance(error, LostError):
                _tell(f"{server.url}: {error}; going on without it until it is there")
            elif isinstance(error, BaseException):
                raise error
        if not any(server.is_up for server in self._servers):
            raise ValueError(f"engine.servers: none is there ({'; '.join(map(str, found))}). Start them first.")
        self._monitors = [asyncio.create_task(self._watch(server)) for server in self._servers]

    async def _bring_up(self, server: "_Server") -> None:
        await server.load(self._path, self._version, self.max_length)
        self._check_dtype(server)
        self._changed.set()

    def _check_dtype(self, server: "_Server") -> None:
        """Hold all servers to one precision: `engine.dtype`, or that of the first.

        Raises:
            ValueError: this one computes in another.
        """
        if not self.dtype and server.dtype == "float16":
            raise ValueError(
                f"{server.url} computes in float16, which vLLM makes of float32 checkpoints unasked; start it with "
                "--dtype bfloat16 or float32, or say engine.dtype=float16."
            )
        self.dtype = self.dtype or server.dtype
        if server.dtype != self.dtype:
            raise ValueError(
                f"{server.url} computes in {server.dtype}, and in {self.dtype} the servers before it, or what "
                f"engine.dtype says; start it with --dtype {self.dtype}."
            )

    async def _look_at(self, server: "_Server") -> None:
        """Bring up a server that is well and has the policy, and give the policy to one that was started anew.

        Raises:
            LostError: it is not there.
            ForeignWeightsError: another run has it.
            ValueError: it cannot serve the policy.
        """
        try:
            await server.expect(self._version)
        except NewError:
            server.go_down()
            await self._bring_up(server)
        if not server.is_up:
            server.come_up()
        self._changed.set()

    def _fail(self, error: Exception) -> None:
        """End the engine: nothing that is asked of it can be answered any more."""
        self._error = self._error or str(error)
        for server in self._servers:
            server.go_down()
        self._changed.set()

    async def _watch(self, server: "_Server") -> None:
        """Look after one server; what cannot be mended ends the engine."""
        while True:
            await asyncio.sleep(POLL)
            try:
                was_up = server.is_up
                await self._look_at(server)
                if not was_up:
                    _tell(f"{server.url}: is there")
            except LostError as error:
                _give_up(server, error)
            except (ForeignWeightsError, ValueError) as error:
                self._fail(error)
                return

    async def _unwatch(self) -> None:
        for monitor in self._monitors:
            monitor.cancel()
        await asyncio.gather(*self._monitors, return_exceptions=True)
        self._monitors = []

    async def _stop(self) -> None:
        await self._unwatch()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await self._client.aclose()

    async def _generate(self, prompt_ids: list[int], sampling: Sampling, episode: str) -> Completion:
        self._under_way += 1
        try:
            failed: list[_Server] = []
            while True:
                server = await self._server_of(episode or str(prompt_ids), failed)
                try:
                    return await self._ask(server, prompt_ids, sampling, episode)
                except LostError as error:
                    failed.append(server)
                    if len(failed) == TRIES:
                        raise RuntimeError(
                            f"A request failed {TRIES} times, at last so: {server.url}: {error}."
                        ) from None
                    there = [one for one in self._servers if one.is_up]
                    if there and all(one in failed for one in there):
                        await asyncio.sleep(pause(len(failed), error.wait))
        finally:
            self._under_way -= 1

    async def _ask(self, server: "_Server", prompt_ids: list[int], sampling: Sampling, episode: str) -> Completion:
        """A completion that is proven to be the policy's: the server had its version before, and has it after.

        Raises:
            LostError: another server may answer.
            RuntimeError: another run has the server.
        """
        try:
            try:
                completion = await server.complete(prompt_ids, sampling, self.max_length, self._ends, episode)
                await server.expect(self._version)
                return completion
            except LostError as error:
                if error.wait is None:
                    await self._recheck(server)
                raise
        except ForeignWeightsError as error:
            self._fail(error)
            raise RuntimeError(self._error) from None

    async def _recheck(self, server: "_Server") -> None:
        """After a failure: one request that was dropped is no lost server."""
        try:
            await server.expect(self._version)
        except LostError as error:
            _give_up(server, error)  # until its monitor has seen it well

    async def _server_of(self, episode: str, failed: Sequence["_Server"]) -> "_Server":
        """The server of an episode among those that are there, of which those that failed it come last; waits for one.

        Raises:
            RuntimeError: none came, or the engine has ended.
        """
        deadline = time.monotonic() + PATIENCE
        while not self._error:
            if there := [server for server in self._servers if server.is_up]:
                best = [server for server in there if server not in failed] or there
                return max(best, key=lambda server: hashlib.sha256(f"{server.url} {episode}".encode()).digest())
            if (left := deadline - time.monotonic()) <= 0:
                self._fail(TimeoutError(f"No server of engine.servers was there for {PATIENCE:.0f} s."))
                break
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        raise RuntimeError(self._error)


class _Server:
    """One server's calls."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url = url
        self.dtype = ""
        """Precision that it computes in."""
        self._client = client
        self._model, self._ranks = "", 1
        self._lost = asyncio.Event()
        self._lost.set()

    @property
    def is_up(self) -> bool:
        return not self._lost.is_set()

    def come_up(self) -> None:
        """Let it be asked."""
        self._lost.clear()

    def go_down(self) -> None:
        """Give up what is asked of it."""
        self._lost.set()

    async def expect(self, version: str) -> None:
        """See that it has these weights.

        Raises:
            LostError: it is not there, or has no policy yet.
            ForeignWeightsError: it has others.
        """
        found = str((await self._ask("GET", "/weight_info", timeout=SILENCE))["weight_version"])
        if found in (NEW, _loading(version)):
            raise NewError("was started anew")
        if found != version:
            raise ForeignWeightsError(f"{self.url} was given other weights by another run; let one run have it.")

    async def load(self, path: Path, version: str, max_length: int) -> None:
        """Put a policy into it. Its version is another one from the first moment on that its weights may be.

        Raises:
            LostError: it is not there.
            ValueError: it cannot serve the policy.
        """
        (model,) = (await self._ask("GET", "/v1/models", timeout=SILENCE))["data"][:1]
        if model["max_model_len"] < max_length:
            raise ValueError(
                f"{self.url} takes {model['max_model_len']} tokens, fewer than model.max_length {max_length}; start it "
                f"with --max-model-len {max_length}."
            )
        self._model = model["id"]
        config = (await self._ask("GET", "/server_info?config_format=json"))["vllm_config"]
        self.dtype = config["model_config"]["dtype"].removeprefix("torch.")
        self._ranks = _ranks(config["parallel_config"])
        await self._ask("POST", "/update_weight_version", {"new_version": _loading(version)})
        try:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(path.resolve())}}
            await self._ask("POST", "/collective_rpc", body)
        except LostError as error:
            if error.status is None:
                raise
            raise ValueError(
                f"{self.url} could not load {path.resolve()} ({error}) and has to be started anew: it must see that "
                "path, and be started with a model of the same shape."
            ) from None
        await self._check_layers(path)
        if not (await self._ask("POST", "/reset_prefix_cache"))["success"]:
            raise LostError("did not empty its prefix cache")
        await self._ask("POST", "/update_weight_version", {"new_version": version})
        self.come_up()

    async def _check_layers(self, path: Path) -> None:
        """See that no layer kept its old weights: vLLM says nothing where a checkpoint has fewer than the model.

        Raises:
            ValueError: the server's model has another number of layers.
        """
        names = (await self._ask("POST", "/weight_checker", {"action": "checksum"}))["checksums"]
        layers = {int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
        wanted = read_sizes(path)["num_hidden_layers"]
        if layers != set(range(wanted)):
            raise ValueError(
                f"{self.url} serves a model of {len(layers)} layers, and {path} has {wanted}; start it with a model of "
                "the same shape."
            )

    async def complete(
        self, prompt_ids: list[int], sampling: Sampling, max_length: int, ends: list[int], episode: str
    ) -> Completion:
        """One completion, by the episode's rank where the server has several; given up when the server goes down."""
        body = {
            "model": self._model,
            "prompt": prompt_ids,
            "max_tokens": min(sampling.max_tokens, max_length - len(prompt_ids)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "logprobs": 0,  # of the drawn id alone
            "stop_token_ids": ends,
            "ignore_eos": True,  # see vllm_engine.sampling_params
            "return_token_ids": True,
            "skip_special_tokens": False,
            # What a server's generation_config.json could set otherwise.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        headers = {}
        if episode and self._ranks > 1:
            headers[RANK] = str(int.from_bytes(hashlib.sha256(episode.encode()).digest()) % self._ranks)
        answer = await self._unless_lost(self._ask("POST", "/v1/completions", body, headers=headers))
        (choice,) = answer["choices"]
        details = answer["usage"].get("prompt_tokens_details") or {}
        return Completion(
            token_ids=choice["token_ids"],
            logprobs=choice["logprobs"]["token_logprobs"],
            finish_reason=choice["finish_reason"],
            cached_tokens=details.get("cached_tokens") or 0,
        )

    async def _unless_lost(self, work: Awaitable[_T]) -> _T:
        asked, lost = asyncio.ensure_future(work), asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait({asked, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise LostError("went down")
            return asked.result()
        finally:
            asked.cancel()
            lost.cancel()

    async def _ask(
        self,
        method: str,
        place: str,
        body: Any = None,
        timeout: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """One call.

        Raises:
            LostError: the server is not there, or not well.
            ValueError: it refuses the call.
        """
        try:
            async with asyncio.timeout(timeout):
                answer = await self._client.request(method, self.url + place, json=body, headers=headers)
        except (httpx.TransportError, TimeoutError) as error:
            raise LostError(f"{type(error).__name__} {error}".strip()) from None
        if answer.status_code in (429, 503) and answer.headers.get("Retry-After", "").isdigit():
            raise LostError("is busy", answer.status_code, float(answer.headers["Retry-After"]))
        if answer.status_code >= 500 or answer.status_code == 429:
            raise LostError(f"HTTP {answer.status_code}: {answer.text[:300]}", answer.status_code)
        if answer.status_code == 404:
            raise ValueError(
                f"{self.url}{place} is not there; engine.name=openai needs `vllm serve` with VLLM_SERVER_DEV_MODE=1."
            )
        if answer.status_code >= 400:
            raise ValueError(f"{self.url}{place}: HTTP {answer.status_code}: {answer.text[:300]}")
        return answer.json() if answer.content else None


def pause(failures: int, asked: float | None) -> float:
    """Seconds to put a request off that failed so often: 1, 2, 4, ..., longer where a server asks for it, bounded."""
    return min(max(2.0 ** (failures - 1), asked or 0.0), LONGEST_PAUSE)


def _ranks(config: dict[str, Any]) -> int:
    """How many data-parallel ranks a server can be asked for by number (vllm/v1/engine/input_processor.py)."""
    here_alone = config["data_parallel_external_lb"] or config["data_parallel_hybrid_lb"]
    return int(config["data_parallel_size_local" if here_alone else "data_parallel_size"])


def _loading(version: str) -> str:
    """The version of weights that are on their way."""
    return f"loading {version}"


def _give_up(server: _Server, error: LostError) -> None:
    if server.is_up:
        _tell(f"{server.url}: {error}; its episodes go on elsewhere, or wait for it")
    server.go_down()


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
