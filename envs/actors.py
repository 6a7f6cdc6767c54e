"""Environment workers as actors of a Ray cluster: the pool's `backend="ray"`. Nothing else here knows of Ray.

An actor hosts the environments that a local worker would host (`envs.pool.Host`) and answers the same requests, so that
the episodes are the same. Actors are spread over the nodes; each ends with the pool, with the pool's process, or with
its node. Where a node is lost its sessions raise `MachineLost`, and the next ones are opened on the nodes that are
left. What an environment prints stands in Ray's own logs, on its node.

A node needs what this machine has: the project and its packages, Java for ScienceWorld, and, under the same path, the
folder that the pool's process works in with the data that the environments read. Environment variables (JAVA_HOME) are
the node's own.
"""

import asyncio
import contextlib
import os
import pickle
import platform
import socket
import sys
from typing import Any

from envs.pool import CLOSING_SECONDS, Answer, EnvironmentFailure, Greeting, Host, MachineLost, packed

try:
    import ray
    from ray._private import services
    from ray.exceptions import ActorUnavailableError, RayActorError, RayError
except ModuleNotFoundError as error:
    if error.name != "ray":
        raise
    raise ValueError(
        "workers=ray needs Ray, which is not installed here; install the extra `ray` (pip install ray==2.60.0)."
    ) from None

CONNECTING_SECONDS = 10.0
"""How long a cluster may take to pick up."""

PLACING_SECONDS = 300.0
"""How long the cluster may take to start a worker, and a node for it, where it makes nodes when they are wanted."""

NEEDED = (
    "Every node needs the project, its packages and its data under the path that they have on this machine, as on a "
    "shared file system."
)


def connect() -> None:
    """Attach to the cluster that `RAY_ADDRESS` names, else to the one running here, else start one of this machine.

    Raises:
        ValueError: no cluster answers, or it takes nobody in; says where and what to do.
    """
    if ray.is_initialized():
        return
    try:
        address = services.canonicalize_bootstrap_address(None)  # what `init` will find; it waits minutes for the dead
        if address is not None:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), CONNECTING_SECONDS).close()
        own = {} if address else {"worker_niceness": 0}  # 15 by default: behind everything else on this machine
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", _system_config=own)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        where = os.environ.get("RAY_ADDRESS") or "the address of the last `ray start` here"
        raise ValueError(
            f"No Ray cluster can be joined at {where} ({' '.join(str(error).split())}). Start one (`ray start --head`) "
            "and run this on one of its nodes; RAY_ADDRESS=local makes do with this machine."
        ) from None


class Actor:
    """A worker, inside its actor: `Host` behind calls whose arguments and answers are pickles."""

    def begin(self, folder: str, greeting: Greeting) -> bytes:
        """Be like the pool's process: the same working folder, the same modules."""
        try:
            os.chdir(folder)
        except OSError:
            return packed(Answer(error=ValueError(f"The Ray node {platform.node()} has no folder {folder}. {NEEDED}")))
        path, where, settings = greeting
        sys.path += [entry for entry in path if entry not in sys.path]
        self._host = Host(where, settings)
        return packed(Answer())

    def answer(self, request: bytes) -> bytes:
        """See `Host.answer`."""
        return packed(self._host.answer(*pickle.loads(request)))

    def close(self) -> None:
        """Close the environments."""
        self._host.close()


class ActorLink:
    """A `Link` to an actor."""

    def __init__(self, greeting: Greeting) -> None:
        self._greeting = greeting
        self._actor: Any = None

    async def start(self) -> None:
        """See `Link`."""
        # Without num_cpus an actor wants a CPU of the node where it starts and then holds none: after the loss of a
        # node, the others can take over its actors.
        kind = ray.remote(Actor).options(scheduling_strategy="SPREAD", max_restarts=0, max_task_retries=0)
        self._actor = kind.remote()
        try:
            answer = await asyncio.wait_for(self._ask("begin", os.getcwd(), self._greeting), PLACING_SECONDS)
        except TimeoutError:
            cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
            raise ValueError(
                f"No node of the Ray cluster has taken a worker in {PLACING_SECONDS:g} s: a worker starts where a CPU "
                f"is free, and the {len(cpus)} nodes that are alive have {sum(cpus):g} of them. Add a node (`ray "
                "start --address=...`) or free a CPU; what was played is kept."
            ) from None
        if answer.error:
            raise answer.error

    async def exchange(self, request: tuple[int, str, tuple[Any, ...]]) -> Answer:
        """See `Link`."""
        return await self._ask("answer", pickle.dumps(request))

    async def _ask(self, method: str, *args: Any) -> Answer:
        try:
            answer: Answer = pickle.loads(await getattr(self._actor, method).remote(*args))
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise ValueError(f"A Ray node cannot load this project ({_cause(error)}). {NEEDED}") from None
            raise EOFError(str(error)) from error
        return answer

    async def ended(self, error: Exception) -> EnvironmentFailure:
        """See `Link`; a `MachineLost` where the node is gone, or out of reach."""
        if isinstance(error.__cause__, ActorUnavailableError) or "its node has died" in str(error):
            return MachineLost("The Ray node of the environment's worker is gone.")
        return EnvironmentFailure(f"The environment's worker died ({_cause(error)}).")

    def kill(self) -> None:
        """See `Link`."""
        if self._actor is not None:
            ray.kill(self._actor)

    async def close(self) -> None:
        """See `Link`."""
        if self._actor is not None:
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(self._actor.close.remote(), CLOSING_SECONDS + 1)
            self.kill()


def _cause(error: Exception) -> str:
    """What Ray says of an actor's end, without who it was and without guesses."""
    return str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
