"""ScienceWorld's simulator: the JVM that it runs in, and its server objects.

The real, unmodified simulator of the `scienceworld` package (1.2.3; Wang et al. 2022, https://arxiv.org/abs/2203.07540)
runs in a JVM. This module talks to the simulator's own server object over py4j. `ScienceWorldEnv.step` of the package
does so too, but then computes every valid action, which takes most of its time.

What 1.2.3 leaves to chance, found by replaying gold paths of all 24 tasks, 72 of them:

- The order in a set follows Java's identity hashes, which depend on everything the JVM did before. It decides the order
  of objects in observations, the numbers of ambiguous requests, even scores: on a second replay in the same JVM 25 of
  the 72 read other observations, and 3 of those other scores. The JVM option `-XX:hashCode=2` gives every object the
  same hash, so that sets keep the order of insertion: none of the 72 differed, in the same JVM or in another one. It
  costs about a quarter of the speed. Other JVMs than HotSpot ignore it.
- Animals and pollen draw from one global generator (`scala.util.Random`), which only `load` seeds. Here it is seeded
  before every step, with the task, the episode's seed and the step's number.
- The gold path's search for an object walks through the rooms in an order that each JVM draws once (in seconds, and
  hundreds of MB) and then remembers; it is handed the walks instead (`_room_walks`).

Several environments of one process share one JVM. Besides the generator, the simulator keeps two mutable things outside
its server objects that episodes can see: `UniqueIdentifier.count` and `SimplifierProcessor.simplifications`. `Jvm.turn`
puts them back when the turn goes to another environment, and lets one thread in at a time. Solutions of all 24 tasks
replayed in turns, step by step, read what they read when replayed alone (`tests/test_sciworld.py`).
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
from py4j.protocol import Py4JError, Py4JJavaError
from scienceworld.constants import JAR_PATH

from envs import SPLITS

DOORS = {
    "art studio": ("hallway",),
    "bathroom": ("kitchen",),
    "bedroom": ("hallway",),
    "foundry": ("outside",),
    "greenhouse": ("hallway", "outside"),
    "hallway": ("art studio", "bedroom", "greenhouse", "kitchen", "living room", "workshop"),
    "kitchen": ("bathroom", "hallway", "outside"),
    "living room": ("hallway",),
    "outside": ("foundry", "greenhouse", "kitchen"),
    "workshop": ("hallway",),
}
"""Which rooms each room has doors to, the same in every variation."""

SIMPLIFICATIONS = ("noElectricalAction", "openContainers", "openDoors", "selfWateringFlowerPots", "teleportAction")

NO_JAVA = (
    "ScienceWorld needs Java 8 or later, and {problem}: install a JRE (Debian and Ubuntu: "
    "`apt-get install default-jre-headless`; conda: `conda install openjdk`)."
)

JVM_MB, WORLD_MB = 50, 20
"""Heap that a JVM needs, and with it each environment's world: 10.7 MB live on average over the 24 tasks, and as much
room again to collect garbage in. With 14 MB a world 32 environments take 2.5 times the processor time that they take
with 30 (docs/performance.md), and a heap that is nearly full leaves the JVM to it for minutes before it gives up."""

OUT_OF_MEMORY = 3
"""HotSpot's exit code on -XX:+ExitOnOutOfMemoryError."""


class Jvm:
    """The JVM that the environments of this process share; it ends with the last of them, or with the process.

    The JVM reads from a pipe and exits when that breaks, so that it does not outlive a process that was killed.
    """

    _shared: ClassVar["Jvm | None"] = None
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, heap_mb: int) -> None:
        home = os.environ.get("JAVA_HOME")
        java = shutil.which("java", path=str(Path(home, "bin")) if home else None) or shutil.which("java")
        if java is None:
            raise ValueError(NO_JAVA.format(problem="no `java` is on the path"))
        options = ["-XX:+IgnoreUnrecognizedVMOptions", "-XX:+ExitOnOutOfMemoryError", "-XX:+UseSerialGC"]
        # Start small and stay so: by default the heap starts at a 64th of the machine's memory and gives nothing back.
        options += [f"-Xmx{heap_mb}m", "-Xms48m", "-XX:MinHeapFreeRatio=20", "-XX:MaxHeapFreeRatio=40"]
        options += ["-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2"]  # see the module's docstring
        try:
            port, token, self.process = launch_gateway(
                classpath=JAR_PATH,
                javaopts=options,
                java_path=java,
                die_on_exit=True,
                enable_auth=True,
                return_proc=True,
                cwd=tempfile.gettempdir(),  # the simulator leaves object_type_ids.tsv where it starts
            )
        except (ValueError, OSError) as error:  # py4j reads the port from Java's first line
            raise ValueError(NO_JAVA.format(problem=f"`{java}` did not start the simulator")) from error
        self.users = 0
        self._heap_mb = heap_mb
        self._lock = threading.RLock()
        self._last: Server | None = None
        self.gateway = JavaGateway(
            gateway_parameters=GatewayParameters(port=port, auth_token=token), java_process=self.process
        )
        jvm = self.gateway.jvm
        # The simulator prints a lot, and py4j would read it all in a Python thread.
        jvm.java.lang.System.setOut(jvm.java.io.PrintStream(jvm.java.io.FileOutputStream(os.devnull)))
        self._random = getattr(getattr(jvm.scala.util, "Random$"), "MODULE$")
        self._identifiers = jvm.util.UniqueIdentifier
        self._simplifier = jvm.main.scala.scienceworld.runtime.SimplifierProcessor
        self._parser = jvm.scienceworld.input.InputParser
        self._paths = jvm.scienceworld.goldagent.PathFinder.precomputedExhaustivePaths()

    @classmethod
    def acquire(cls, heap_mb: int) -> "Jvm":
        """The process's JVM, started if there is none; give it back with `release`."""
        with cls._guard:
            if cls._shared is None or cls._shared.process.poll() is not None:
                cls._shared = cls(heap_mb)
            cls._shared.users += 1
            return cls._shared

    def release(self) -> None:
        """Give the JVM back; the last one out ends it."""
        with self._guard:
            self.users -= 1
            if self.users:
                return
            if Jvm._shared is self:
                Jvm._shared = None
        with contextlib.suppress(Py4JError, OSError):
            self.gateway.shutdown()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def turn(self, server: "Server", seed: object) -> Iterator[None]:
        """Give the simulator to one server object: put its part of the global state back and seed the generator."""
        with self._lock:
            try:
                self._prepare(server, seed)
                yield
            except Py4JJavaError:
                raise  # the simulator's, in a JVM that lives
            except (Py4JError, OSError) as error:
                if not self._ran_out_of_memory():
                    raise
                raise RuntimeError(
                    f"ScienceWorld's JVM ran out of its {self._heap_mb} MB with {self.users} environments: raise "
                    "env.sciworld.heap_mb, or have fewer in a process"
                ) from error

    def _prepare(self, server: "Server", seed: object) -> None:
        if self._last is not server:
            if self._last is not None:
                self._last.identifiers = self._identifiers.count()
            getattr(self._identifiers, "count_$eq")(server.identifiers)
            self._simplifier.parseSimplificationStr(server.simplifications)
            self._last = server
        digest = hashlib.sha256(repr(seed).encode()).digest()
        self._random.setSeed(int.from_bytes(digest[:6], "big"))

    def _ran_out_of_memory(self) -> bool:
        """Whether the JVM has ended by its option ExitOnOutOfMemoryError."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return bool(self.process.wait(1) == OUT_OF_MEMORY)
        return False

    def reachable(self, root: Any) -> set[int]:
        """Ids of the objects that the simulator's parser finds in a room or on the agent."""
        objects = self._parser.collectAccessibleObjects(root, True).iterator()
        found = set()
        while objects.hasNext():
            found.add(objects.next().uuid())
        return found

    def remember_walks(self) -> None:
        """Hand the gold paths' search the walks it would look for at length."""
        if self._paths.isEmpty():
            for start, walk in _room_walks().items():
                segments = self.gateway.new_array(self.gateway.jvm.java.lang.String, len(walk), 2)
                for i, room in enumerate(walk):
                    segments[i][0], segments[i][1] = f"open door to {room}", f"go to {room}"
                self._paths.put(start, segments)


class Server:
    """One server object of the simulator: one world."""

    def __init__(self, jvm: Jvm) -> None:
        self._jvm = jvm
        self.simplifications = ""
        self.identifiers = 0
        """The simulator's counter of object ids, as this world left it."""
        with jvm.turn(self, "server"):
            self._server = jvm.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()
        self._interface: Any = None
        self._seed: tuple[object, ...] = ()

    def load(self, task: str, variation: int, simplification: str, *, gold: bool = False, seed: int = 0) -> None:
        """Set up a world; with `gold`, also have its solution worked out."""
        self._seed = (task, variation, seed)
        with self._jvm.turn(self, self._seed):
            if gold:
                self._jvm.remember_walks()
            self._server.load(task, variation, simplification, gold)
            # What the last world left: `task` and `help` report it unless a real step has come before them.
            getattr(self._server, "score_$eq")(0.0)
            getattr(self._server, "isComplete_$eq")(False)
            self._interface = self._server.agentInterface().get()
            self.simplifications = self._interface.simplificationStr()

    def step(self, action: str, number: int) -> tuple[str, float, bool]:
        """Take the episode's `number`-th action; returns observation, score (1: all, below 0: lost), and if over."""
        with self._jvm.turn(self, (*self._seed, number)):
            observation = self._server.step(action)
            if self._interface.isInErrorState():
                raise RuntimeError(f"ScienceWorld broke on {action!r}: {self._interface.getErrorStateMessage()}")
            return observation, self._server.getScore(), self._server.getCompleted()

    def description(self) -> str:
        """The task's text."""
        with self._jvm.turn(self, self._seed):
            text: str = self._server.getTaskDescription()
            return text

    def valid_actions(self) -> list[str]:
        """What the simulator would understand now.

        Its own list also names what is in closed containers, which its parser does not let anyone touch.
        """
        with self._jvm.turn(self, self._seed):
            listed = json.loads(self._server.getValidActionObjectCombinationsJSON())["validActions"]
            if self._interface.inputParser().isInAmbiguousState():
                return [one["action"] for one in listed]
            agent = self._interface.agent()
            reach = self._jvm.reachable(agent.getContainer().get()) | self._jvm.reachable(agent)
            return [
                one["action"]
                for one in listed
                if reach.issuperset(one["obj_ids"]) or one["action"].startswith("teleport")
            ]

    def gold(self) -> list[str]:
        """The solution, after a load with `gold`."""
        with self._jvm.turn(self, self._seed):
            return list(self._server.getGoldActionSequence())

    def variations(self, task: str) -> dict[str, list[int]]:
        """The simulator's own split of a task's variations, by our names of the splits; loads nothing."""
        with self._jvm.turn(self, self._seed):
            getattr(self._server, "taskStr_$eq")(task)
            ranges = (
                self._server.getVariationsTrain(),
                self._server.getVariationsDev(),
                self._server.getVariationsTest(),
            )
            return {split: list(numbers) for split, numbers in zip(SPLITS, ranges, strict=True)}

    def variation_count(self, task: str) -> int:
        """How many variations a task has."""
        with self._jvm.turn(self, self._seed):
            count: int = self._server.getTaskMaxVariations(task)
            return count


@lru_cache
def jar_hash() -> str:
    """Hash of the simulator."""
    return hashlib.sha256(Path(JAR_PATH).read_bytes()).hexdigest()[:16]


def _room_walks() -> dict[str, list[str]]:
    """For each room, a shortest walk from there through every room."""
    walks = {}
    for start in DOORS:
        queue: deque[tuple[str, frozenset[str], list[str]]] = deque([(start, frozenset([start]), [])])
        reached = {queue[0][:2]}
        while queue:
            room, visited, walk = queue.popleft()
            if len(visited) == len(DOORS):
                walks[start] = walk
                break
            for door in DOORS[room]:
                state = (door, visited | {door})
                if state not in reached:
                    reached.add(state)
                    queue.append((*state, [*walk, door]))
    return walks
