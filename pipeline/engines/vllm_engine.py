"""vLLM behind asyncio: one thread owns the engine and steps it; requests join and leave between steps.

On a CPU the defaults buy two things over vLLM's own, which `benchmarks/engine_tokens.py` and the tests measure:

- Start-up: the engine runs in this process, and eagerly. Compilation takes 10 to 35 s and wins a tenth back.
- Reproducible ids. oneDNN's products do not depend on the number of rows. The attention kernel's sums depend, in
  contexts beyond some 500 tokens, on how it deals out work to threads (so `threads=1`) and on how many tokens of a
  prompt are not cached (so `episode`); see csrc/cpu/cpu_attn_impl.hpp, AttentionScheduler::schedule and kv_tile_size.
  What is left is a function of the request and its episode's past, to the last bit.

vLLM changes its process on a CPU (it seeds the global generators, sets up torch.distributed, replaces
`torch.set_num_threads` and `torch.accelerator.synchronize`): give an engine a process of its own. There can be several
in one process only one after the other.
"""

import asyncio
import atexit
import contextlib
import itertools
import logging
import os
import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest import mock

from pipeline.engines import Completion, EngineSettings, Sampling, check_prompt, check_shape, refuse_inert

GIB = 1024**3
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
ON_CPU = {
    # In process: the start takes a third of the time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # With several threads: one sequence's keys are not dealt out according to how busy each is.
    "VLLM_CPU_ATTN_SPLIT_KV": "0",
}
# vLLM's process groups are global: closing one of two engines in a process would take them from the other.
_running = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Request:
    prompt_ids: list[int]
    sampling: Sampling
    episode: str
    answer: "Future[Completion]"


@dataclass(frozen=True, slots=True)
class _Load:
    path: Path
    answer: "Future[None]"


class VllmEngine:
    """Continuous batching over everything that waits: no request waits for another one to end.

    Args:
        path: checkpoint folder; its tokenizer is not loaded.
        max_length: most tokens of a prompt and its completion together.
        end_token_ids: ids that end a completion; whatever the checkpoint's generation_config.json names is ignored.
        settings: see `EngineSettings`.

    Raises:
        ValueError: a setting was changed that has no effect on this machine.
        RuntimeError: this process has a vLLM engine already.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_length: int,
        end_token_ids: Sequence[int],
        settings: EngineSettings | None = None,
    ) -> None:
        self.max_length = max_length
        self._ends = list(end_token_ids)
        self._path = path
        self._inbox: queue.SimpleQueue[_Request | _Load | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopped: str | None = None
        self._cause: BaseException | None = None
        ready: Future[tuple[int, str]] = Future()
        self._thread = threading.Thread(
            target=self._serve, args=(path, settings or EngineSettings(), ready), name="vllm-engine", daemon=True
        )
        self._thread.start()
        self._vocabulary, self.dtype = ready.result()
        # A daemon thread inside a C++ kernel would crash the interpreter's exit when `close` was forgotten.
        atexit.register(self.close)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, episode: str = "") -> Completion:
        """See `Engine.generate`. Cancelling the awaiting task takes the request off the engine."""
        check_prompt(prompt_ids, self.max_length, self._vocabulary)
        request = _Request(list(prompt_ids), sampling, episode, Future())
        self._put(request)
        return await asyncio.wrap_future(request.answer)

    def load(self, path: Path, end_token_ids: Sequence[int]) -> None:
        """See `Engine.load`. The weights are read into the running engine; it starts nothing anew."""
        if path != self._path:
            check_shape(self._path, path)
            load = _Load(path, Future())
            self._put(load)
            load.answer.result()
            self._path = path
        self._ends = list(end_token_ids)

    def close(self) -> None:
        """See `Engine.close`."""
        with self._lock:
            self._stopped = self._stopped or "The engine is closed."
        self._inbox.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, message: _Request | _Load) -> None:
        with self._lock:
            if self._stopped is not None:
                raise RuntimeError(self._stopped) from self._cause
            self._inbox.put(message)

    # Everything below runs in the engine's thread.

    def _serve(self, path: Path, settings: EngineSettings, ready: "Future[tuple[int, str]]") -> None:
        waiting: dict[str, _Request] = {}
        with contextlib.ExitStack() as stack:
            try:
                engine = stack.enter_context(running_vllm(path, self.max_length, settings))
            except BaseException as error:
                ready.set_exception(error)
                return
            model = engine.model_config
            ready.set_result((model.get_vocab_size(), str(model.dtype).removeprefix("torch.")))
            try:
                self._play(engine, waiting)
            except BaseException as error:
                with self._lock:
                    self._stopped = f"The vLLM engine failed: {error!r}"
                    self._cause = error
            del engine  # the last reference but vLLM's own, so that leaving the stack frees its memory
            self._fail(waiting)

    def _play(self, engine: Any, waiting: dict[str, _Request]) -> None:
        numbers = itertools.count()
        while True:
            for request in self._arrivals(block=not waiting):
                if request is None:
                    return
                if isinstance(request, _Load):
                    self._load(engine, request, under_way=len(waiting))
                    continue
                key = str(next(numbers))
                if self._add(engine, key, request):
                    waiting[key] = request
            gone = [key for key, request in waiting.items() if request.answer.cancelled()]
            engine.abort_request(gone)
            for key in gone:
                del waiting[key]
            for output in engine.step() if waiting else ():
                if output.finished and (request := waiting.pop(output.request_id, None)):
                    _settle(request.answer, _completion(output))

    def _load(self, engine: Any, load: _Load, under_way: int) -> None:
        """Put other weights into the engine, and forget what it has cached of the old ones."""
        if under_way:
            load.answer.set_exception(RuntimeError(f"{under_way} requests are under way; load when they are done."))
            return
        try:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": str(load.path)})
            if not engine.reset_prefix_cache():
                raise RuntimeError("vLLM did not empty its prefix cache")
        except BaseException as error:  # half old, half new: such an engine must not go on
            load.answer.set_exception(error)
            raise
        load.answer.set_result(None)

    def _arrivals(self, block: bool) -> Iterator[_Request | _Load | None]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._inbox.get(block)
                block = False

    def _add(self, engine: Any, key: str, request: _Request) -> bool:
        """Hand a request to vLLM; one that it refuses fails alone."""
        from vllm.inputs.engine import tokens_input
        from vllm.platforms import current_platform

        # On a GPU ids hang on the batch anyway; there all episodes share the cache of what their prompts share.
        salt = request.episode if current_platform.is_cpu() else ""
        # Raw prompts are deprecated (vllm/v1/engine/input_processor.py, process_inputs); this is what vLLM's renderer
        # makes of them.
        prompt = tokens_input(request.prompt_ids, cache_salt=salt or None)
        budget = min(request.sampling.max_tokens, self.max_length - len(request.prompt_ids))
        try:
            engine.add_request(key, prompt, sampling_params(request.sampling, budget, self._ends))
        except ValueError as error:
            _settle(request.answer, error)
            return False
        return True

    def _fail(self, waiting: dict[str, _Request]) -> None:
        """Fail what is under way and what still waits; `_stopped` is set, so nothing more comes."""
        left = [*waiting.values(), *(message for message in self._arrivals(block=False) if message)]
        for message in left:
            error = RuntimeError(self._stopped)
            error.__cause__ = self._cause
            _settle(message.answer, error)


def _settle(answer: "Future[Any]", result: Completion | BaseException) -> None:
    """Resolve an answer, unless its task has been cancelled meanwhile."""
    if not answer.set_running_or_notify_cancel():
        return
    if isinstance(result, BaseException):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def _completion(output: Any) -> Completion:
    reply = output.outputs[0]
    return Completion(
        token_ids=list(reply.token_ids),
        logprobs=[chosen[token].logprob for token, chosen in zip(reply.token_ids, reply.logprobs, strict=True)],
        finish_reason=reply.finish_reason,
        cached_tokens=output.num_cached_tokens or 0,
    )


def sampling_params(sampling: Sampling, budget: int, end_token_ids: list[int]) -> Any:
    """VLLM's `SamplingParams` for at most `budget` tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        max_tokens=budget,
        # Of the drawn id alone; vLLM's logprobs_mode "raw_logprobs", its default, is before temperature and top_p.
        logprobs=0,
        stop_token_ids=end_token_ids,
        # Without it the ids of generation_config.json would end completions too (SamplingParams.update_from_generation_
        # config); stop_token_ids work all the same.
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@contextlib.contextmanager
def running_vllm(path: Path, max_length: int, settings: EngineSettings) -> Iterator[Any]:
    """A running `LLMEngine`, for one thread, shut down at the end.

    Raises:
        RuntimeError: this process has one already.
    """
    if not _running.acquire(blocking=False):
        raise RuntimeError("This process has a vLLM engine already; close it before starting another.")
    try:
        arguments, stance = _prepare(path, max_length, settings)
        import torch
        from vllm import EngineArgs, LLMEngine
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        with torch.compiler.set_stance(stance):
            with _tolerant_kernel_search():
                engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
            try:
                yield engine
            finally:
                engine.engine_core.shutdown()
                engine.renderer.shutdown()
                del engine
                cleanup_dist_env_and_memory()  # collects garbage too, which frees the weights and the cache
    finally:
        _running.release()


@contextlib.contextmanager
def _tolerant_kernel_search() -> Iterator[None]:
    """Let vLLM start in a process that has imported Flask.

    On a CPU, vLLM asks every attribute of every loaded module for a `__dict__` (vllm/triton_utils/dispatcher.py,
    _rebind_kernels), and Flask's `request` answers with a RuntimeError outside a request, which ends vLLM's start.
    """
    from vllm.triton_utils import dispatcher

    def has(value: object, name: str) -> bool:
        try:
            return hasattr(value, name)
        except RuntimeError:
            return False

    with mock.patch.object(dispatcher, "hasattr", has, create=True):
        yield


def _prepare(path: Path, max_length: int, settings: EngineSettings) -> tuple[dict[str, Any], str]:
    """Set this process up; returns vLLM's arguments and torch.compile's stance."""
    _set_missing(QUIET)  # the logging level is read when vLLM is imported
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # and before that there are warnings already
    # vLLM's own use of a renamed torch name, at import and at start.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    from torch._C import set_num_threads  # torch.set_num_threads is a no-op once vLLM has run in this process
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    arguments = _engine_arguments(path, max_length, settings, on_cpu)
    if on_cpu:
        _set_missing(ON_CPU)
        set_num_threads(settings.threads)
    # vLLM's "eager" leaves its sampler compiled, 3 to 15 s at the first token (vllm/v1/sample/ops/logprobs.py).
    return arguments, "force_eager" if on_cpu and arguments["enforce_eager"] else "default"


def _engine_arguments(path: Path, max_length: int, settings: EngineSettings, on_cpu: bool) -> dict[str, Any]:
    from pipeline.precision import resolve  # imports torch, which must come after QUIET is set

    arguments: dict[str, Any] = {
        "model": str(path),
        "dtype": resolve(settings.dtype),  # vLLM's own "auto" would serve our float32 weights in float16
        "skip_tokenizer_init": True,
        "max_model_len": max_length,
        "max_num_seqs": settings.concurrency,
        "enable_prefix_caching": True,
        "seed": 0,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * GIB) if settings.kv_cache_gib else None,
    }
    if not on_cpu:
        refuse_inert(settings, ["threads"], "on a GPU")
        return arguments | {
            "gpu_memory_utilization": settings.gpu_memory,
            "tensor_parallel_size": settings.tensor_parallel,
            "enforce_eager": bool(settings.eager),
        }
    refuse_inert(settings, ["gpu_memory", "tensor_parallel"], "without a GPU")
    return arguments | {
        "kv_cache_memory_bytes": int((settings.kv_cache_gib or 2.0) * GIB),
        "enforce_eager": settings.eager is not False,
        # The cache serves whole blocks, and what is left of a conversation is computed again each turn: of vLLM's 128
        # tokens half, on average. 32, the least that its kernels are made for, takes a fifth off the engine's time on
        # recorded ScienceWorld episodes (15.6 s for 19.6), with the same ids.
        "block_size": 32,
        # A seeded request whose prompt is prefilled in parts makes vLLM rewind its generator by an offset, which CPU
        # generators do not have (vllm 0.32.0, vllm/v1/worker/gpu_model_runner.py:3502, `gen.set_offset`). So no
        # chunks, and room for the longest prompt in one step.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_length, 4096),
    }


def _set_missing(variables: dict[str, str]) -> None:
    """Set environment variables that the user has not."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
