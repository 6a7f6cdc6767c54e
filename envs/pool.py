"""Worker processes that host environments and are asked from asyncio.

    async with EnvPool("sciworld", settings, workers=2, slots=8, timeout=60) as pool:
        async with pool.session() as env:  # waits for a free slot
            observation, info = await env.reset(task)
            observation, reward, terminated, truncated, info = await env.step("look around")

A worker hosts up to `slots` environments, which take turns: it answers one request at a time. Workers start when they
are first needed and are reused. What they are is the pool's `backend`:

    local   a fresh interpreter of this machine that runs this module
    ray     an actor of a Ray cluster, see envs/actors.py

A local worker's requests and answers are pickles with their length in front, over its standard input and output; what
an environment prints goes to standard error. A worker whose input ends, because the pool was closed or because the
pool's process is gone, ends itself, in the middle of a step if need be. Environments tie their own children to the
worker's life (ScienceWorld's JVM reads its pipe).
"""

import asyncio
import builtins
import contextlib
import importlib
import os
import pickle
import queue
import struct
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import IO, Any, Literal, Protocol, Self, TypeVar

from pydantic import BaseModel

from envs import Info, NoSolutionError, TextEnv, load

STARTUP_SECONDS = 180.0
"""How long a worker may take to start, or an environment to be made: a JVM start, a first look at large files."""

MACHINES = 5
"""How many machines may be lost under one piece of work, before it is taken for what brings them down."""

CLOSING_SECONDS = 3.0
"""How long a worker may take to close its environments."""

Greeting = tuple[list[str], str, dict[str, Any]]
"""What a worker is told first: the pool's `sys.path`, where its environment is imported from, and its settings."""

_LENGTH = struct.Struct("!Q")
_T = TypeVar("_T")


class EnvironmentFailure(RuntimeError):  # noqa: N818 - a failure of the environment, not an error of the caller
    """The environment broke, or its worker died; the episode cannot go on, another session can begin it again."""


class EnvironmentTimeout(EnvironmentFailure):
    """The environment gave no answer in time; its worker was killed."""


class MachineLost(EnvironmentFailure):
    """The machine of the environment's worker is gone, whatever was played on it."""


class EnvPool:
    """Environments in worker processes.

    Args:
        env: the environment: its name or its class, which must be importable by its name.
        settings: its `Settings`; None for the defaults.
        workers: number of worker processes.
        slots: environments in each, so that `workers * slots` episodes can be played at once.
        timeout: seconds that one request may take, waiting for its turn not included.
        backend: where the workers are, see above.

    Raises:
        ValueError: an impossible number, or no way to the workers: no Ray, or no cluster.
    """

    def __init__(
        self,
        env: str | type[TextEnv],
        settings: BaseModel | None = None,
        *,
        workers: int = 1,
        slots: int = 1,
        timeout: float = 60.0,
        backend: Literal["local", "ray"] = "local",
    ) -> None:
        if workers < 1 or slots < 1 or timeout <= 0:
            raise ValueError("A pool needs at least one worker, one slot and a positive timeout.")
        self.env = load(env) if isinstance(env, str) else env
        """The class of the environments."""
        self.settings: BaseModel = settings or self.env.Settings()
        """Their settings."""
        self._link = _links(backend, (list(sys.path), _path(self.env), self.settings.model_dump()))
        self._timeout = timeout
        self._closed = False
        self._free = asyncio.Semaphore(workers * slots)
        self._alone = asyncio.Lock()
        self._workers = [_Worker(self._link, slots) for _ in range(workers)]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all workers; may be called twice."""
        self._closed = True
        await asyncio.gather(*(worker.close() for worker in self._workers))

    @contextlib.asynccontextmanager
    async def session(self, *, alone: bool = False) -> AsyncIterator["Session"]:
        """An environment of one's own for as long as the block runs; waits for a free slot, first come, first served.

        Args:
            alone: in a new worker, which nobody else uses and which ends with the session, one such session at a time.
                A task that kills its worker then takes no other episode with it.

        Raises:
            EnvironmentFailure: no environment could be made, or the pool is closed.
            ValueError: the environment refused its settings, or misses something on this machine.
        """
        async with self._alone if alone else self._free:
            if self._closed:
                raise EnvironmentFailure("The pool is closed.")
            worker = _Worker(self._link, 1) if alone else self._pick()
            slot = worker.free.pop()
            try:
                await worker.call(slot, "open", (), STARTUP_SECONDS)
                yield Session(worker, slot, self._timeout)
            finally:
                worker.free.append(slot)
                if alone:
                    await worker.close()

    async def run(self, work: Callable[["Session"], Awaitable[_T]], *, alone: bool = False) -> _T:
        """Do some work in a session of its own; from its start again, in another, where the machine under it is lost.

        Raises:
            EnvironmentFailure: see `session` and `Session`, or machine after machine was lost; never a `MachineLost`.
        """
        for _ in range(MACHINES):
            with contextlib.suppress(MachineLost):
                async with self.session(alone=alone) as env:
                    return await work(env)
        raise EnvironmentFailure(f"{MACHINES} machines were lost under the environment, one after the other.")

    def _pick(self) -> "_Worker":
        """The worker with the most free slots; a dead one is replaced first."""
        self._workers = [worker.successor() if worker.failure else worker for worker in self._workers]
        return max(self._workers, key=lambda worker: len(worker.free))


class Session:
    """One environment of a pool, asked as one would ask a `TextEnv`.

    Every method raises `EnvironmentFailure` when the environment breaks or its worker dies, `EnvironmentTimeout` when
    no answer comes in time, and passes on the `ValueError`s and `NoSolutionError`s by which environments refuse, and
    the `OSError`s of the machine (a full disk), which no other session would fare better with.
    """

    def __init__(self, worker: "_Worker", slot: int, timeout: float) -> None:
        self._worker, self._slot, self._timeout = worker, slot, timeout
        self.seconds = 0.0
        """Time spent inside the environment, in this session."""
        self.waited = 0.0
        """Seconds that its requests waited for the turn of its worker, which answers one at a time."""

    async def reset(self, task: str, *, seed: int | None = None) -> tuple[str, Info]:
        """`TextEnv.reset` of a task's content id."""
        answer: tuple[str, Info] = await self.call("reset", seed=seed, options={"task": task})
        return answer

    async def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """`TextEnv.step`."""
        answer: tuple[str, float, bool, bool, Info] = await self.call("step", action)
        return answer

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Any method of the environment."""
        answer, seconds, waited = await self._worker.call(self._slot, "call", (method, args, kwargs), self._timeout)
        self.seconds += seconds
        self.waited += waited
        return answer


class Link(Protocol):
    """The way to one worker: a process, or an actor. One message at a time is under way."""

    async def start(self) -> None:
        """Start the worker, and wait until it listens; raises as `exchange` does.

        Raises:
            TimeoutError: it takes too long.
        """

    async def exchange(self, request: tuple[int, str, tuple[Any, ...]]) -> "Answer":
        """Ask (`Host.answer`'s arguments) and wait for the answer.

        Raises:
            EOFError, OSError: the worker is gone.
            ValueError: there cannot be a worker; says what to do.
        """

    async def ended(self, error: Exception) -> EnvironmentFailure:
        """How the worker ended, after an exchange that came to this error."""

    def kill(self) -> None:
        """End the worker by force, whatever it does, if there is one."""

    async def close(self) -> None:
        """End the worker, in order if it can be done in time, if there is one."""


def _links(backend: str, greeting: Greeting) -> Callable[[], Link]:
    """What makes the links of a pool."""
    if backend == "local":
        return lambda: _Process(greeting)
    from envs import actors

    actors.connect()
    return lambda: actors.ActorLink(greeting)


class _Worker:
    """The pool's end of one worker."""

    def __init__(self, make_link: Callable[[], Link], slots: int) -> None:
        self.free = list(range(slots))
        """Slots that no session holds."""
        self.failure: EnvironmentFailure | None = None
        """Why the worker is of no more use, if so."""
        self._make_link, self._slots = make_link, slots
        self._link = make_link()
        self._started = False
        self._turn = asyncio.Lock()

    def successor(self) -> "_Worker":
        """A fresh worker in place of this one. Sessions that still hold this one's slots learn of its failure."""
        return _Worker(self._make_link, self._slots)

    async def call(self, slot: int, verb: str, args: tuple[Any, ...], timeout: float) -> tuple[Any, float, float]:
        """Ask and wait for the answer; returns it, the seconds it took inside the environment, and those before.

        A caller that is cancelled leaves, but the answer it asked for is still awaited, so that the next caller gets
        its own.
        """
        asking = asyncio.ensure_future(self._call(slot, verb, args, timeout))
        asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # heard, even if nobody waits
        return await asyncio.shield(asking)

    async def _call(self, slot: int, verb: str, args: tuple[Any, ...], timeout: float) -> tuple[Any, float, float]:
        asked = time.perf_counter()
        async with self._turn:
            waited = time.perf_counter() - asked
            if self.failure:
                raise type(self.failure)(*self.failure.args)
            try:
                if not self._started:
                    await self._link.start()
                    self._started = True
                answer = await asyncio.wait_for(self._link.exchange((slot, verb, args)), timeout)
            except TimeoutError:
                what = args[0] if args else verb
                self.failure = EnvironmentTimeout(f"The environment gave no answer to {what!r} in {timeout:g} s.")
            except (EOFError, OSError) as error:
                self.failure = await self._link.ended(error)
            if self.failure:
                self._link.kill()
                raise self.failure
        if answer.error:
            raise answer.error
        return answer.value, answer.seconds, waited

    async def close(self) -> None:
        """End the worker; who still asks it learns that the pool is closed."""
        self.failure = self.failure or EnvironmentFailure("The pool is closed.")
        await self._link.close()


class _Process:
    """A `Link` to a process of this machine."""

    def __init__(self, greeting: Greeting) -> None:
        self._greeting = greeting
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        # An interpreter of its own, not multiprocessing's spawn: that would import the caller's main module again, and
        # with it torch. Its own session keeps Ctrl-C from it, so that the pool closes it in order.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            f"import sys; sys.path[:] = {self._greeting[0]!r}; from envs.pool import serve; serve()",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        await asyncio.wait_for(self.exchange(self._greeting[1:]), STARTUP_SECONDS)

    async def exchange(self, request: object) -> "Answer":
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        data = pickle.dumps(request)
        self._process.stdin.write(_LENGTH.pack(len(data)) + data)
        await self._process.stdin.drain()
        (length,) = _LENGTH.unpack(await self._process.stdout.readexactly(_LENGTH.size))
        answer: Answer = pickle.loads(await self._process.stdout.readexactly(length))
        return answer

    async def ended(self, error: Exception) -> EnvironmentFailure:
        how = str(error)
        with contextlib.suppress(TimeoutError):
            if self._process is not None:
                status = await asyncio.wait_for(self._process.wait(), 1)
                how = f"signal {-status}" if status < 0 else f"exit code {status}"
        return EnvironmentFailure(f"The environment's worker died ({how}).")

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), CLOSING_SECONDS + 1)
        except TimeoutError:
            self.kill()
            await self._process.wait()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker sends back."""

    value: Any = None
    error: Exception | None = None
    seconds: float = 0.0


def serve() -> None:
    """Be a worker: answer requests on standard input until it ends."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done = threading.Event()

    def listen() -> None:
        # Beside the environment, so that a worker that is stuck in a step still hears its input end.
        with contextlib.suppress(EOFError, OSError):
            while True:
                requests.put(_receive(source))
        requests.put(None)
        done.wait(CLOSING_SECONDS)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    path, settings = requests.get()
    host: Host | None = None
    try:
        host = Host(path, settings)
        _send(sink, Answer())
        while (request := requests.get()) is not None:
            _send(sink, host.answer(*request))
    except OSError:
        pass  # nobody listens any more
    finally:
        if host is not None:
            host.close()
        done.set()


class Host:
    """The environments of a worker."""

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        self._envs: dict[int, TextEnv] = {}

    def answer(self, slot: int, verb: str, args: Any) -> Answer:
        """Do what is asked of the environment in a slot, which is made when a session opens it first."""
        began = time.perf_counter()
        try:
            if verb == "open":
                if slot not in self._envs:
                    self._envs[slot] = self._make()
                return Answer()
            if slot not in self._envs:
                return Answer(error=EnvironmentFailure("The environment broke before, in this session."))
            method, positional, named = args
            value = getattr(self._envs[slot], method)(*positional, **named)
            return Answer(value=value, seconds=time.perf_counter() - began)
        except NoSolutionError as error:
            return Answer(error=error, seconds=time.perf_counter() - began)
        except ValueError as error:
            return Answer(error=_plain(error), seconds=time.perf_counter() - began)
        except Exception as error:
            # Whatever else an environment raises leaves it in a state nobody knows: the next session gets a new one.
            if slot in self._envs:
                with contextlib.suppress(Exception):
                    self._envs.pop(slot).close()
            if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
                return Answer(error=_plain(error))  # a full disk, a folder that cannot be written: the machine's
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {last.filename}:{last.lineno}"
            return Answer(error=EnvironmentFailure(f"The environment broke: {error} ({where})."))

    def _make(self) -> TextEnv:
        module, _, name = self._path.partition(":")
        env: Any = importlib.import_module(module)
        for part in name.split("."):
            env = getattr(env, part)
        made: TextEnv = env(env.Settings(**self._settings))
        return made

    def close(self) -> None:
        """Close them all."""
        for env in self._envs.values():
            with contextlib.suppress(Exception):
                env.close()


def _path(env: type[TextEnv]) -> str:
    """Where a class can be imported from."""
    return f"{env.__module__}:{env.__qualname__}"


def _plain(error: Exception) -> Exception:
    """An error as its nearest built-in type, which the other side surely knows."""
    if isinstance(error, OSError):
        return OSError(error.errno, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == builtins.__name__)
    args = error.args if type(error) is kind else (str(error),)
    plain: Exception = kind(*(arg if isinstance(arg, str | int | float) else str(arg) for arg in args))
    return plain


def _receive(source: IO[bytes]) -> Any:
    header = source.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    return pickle.loads(source.read(_LENGTH.unpack(header)[0]))


def _send(sink: IO[bytes], answer: Answer) -> None:
    data = packed(answer)
    sink.write(_LENGTH.pack(len(data)) + data)
    sink.flush()


def packed(answer: Answer) -> bytes:
    """An answer as it travels; one that cannot becomes a failure of the environment."""
    try:
        return pickle.dumps(answer)
    except Exception as error:
        return pickle.dumps(Answer(error=EnvironmentFailure(f"The environment's answer cannot be sent: {error}.")))
