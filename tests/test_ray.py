"""Environment workers as actors of a real Ray cluster: three raylets on this machine, of which some are killed."""

import asyncio
import contextlib
import dataclasses
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import ObjectLostError, OutOfMemoryError

import envs
from envs import NoSolutionError
from envs.actors import Actor, ActorLink
from envs.pool import EnvironmentFailure, EnvironmentTimeout, EnvPool, MachineLost
from pipeline import jobs
from pipeline.config import Config, PlayConfig
from pipeline.play import Episode, RandomPlayer, play_episodes
from pipeline.recipe import load
from pipeline.records import MEASURED, JsonlAppender, Trajectory, read_jsonl
from tests.planned import Planned
from tests.test_pool import descendants, wait_gone
from tests.toy_env import Settings, ToyEnv

ROOT = Path(__file__).parents[1]
TASK = "toy:train:2"
SMALL = {"object_store_memory": 80 * 2**20, "include_log_monitor": False}
QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "worker_niceness": 0}
"""Raylets that are dead are missed after three seconds, not after fifteen; actors stand behind no other program."""
HEAD = SMALL | {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK}


@pytest.fixture(scope="module")
def cluster():
    """A head, on which nothing runs, and two nodes."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a path short enough for sockets
        for name, value in {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        made = Cluster(initialize_head=True, head_node_args=HEAD)
        patch.setenv("RAY_ADDRESS", made.address)
        grow(made)
        yield made
        ray.shutdown()
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


PARENT = """
import asyncio
from envs.pool import EnvPool
from tests.toy_env import Settings, ToyEnv

async def main():
    async with EnvPool(ToyEnv, Settings(child=True), backend="ray") as pool, pool.session() as env:
        await env.reset("toy:train:2")
        print(await env.call("pid"), await env.call("child_pid"), flush=True)
        await env.step("sleep 60")

asyncio.run(main())
"""


def grow(cluster: Cluster) -> None:
    """Add nodes until there are two that run actors."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1, wait=False, **SMALL)
    cluster.wait_for_nodes()


def hosted(node) -> list[psutil.Process]:
    """The actors that run on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [child for child in raylet.children() if "Actor" in " ".join(child.cmdline())]


def kill_a_raylet(cluster: Cluster) -> None:
    """Kill -9 the raylet of a node with actors."""
    node = max(cluster.worker_nodes, key=lambda node: len(hosted(node)))
    actors = hosted(node)
    assert actors
    node.all_processes["raylet"][0].process.kill()
    cluster.remove_node(node, allow_graceful=False)
    wait_gone([actor.pid for actor in actors])


@contextlib.contextmanager
def killing(cluster: Cluster, file: Path, episodes: int):
    """Kill a raylet as soon as a file holds so many episodes."""

    def wait() -> None:
        while not file.is_file() or file.read_bytes().count(b"\n") < episodes:
            time.sleep(0.02)
        left.append(file.read_bytes().count(b"\n"))
        kill_a_raylet(cluster)

    left: list[int] = []
    with ThreadPoolExecutor(1) as executor:
        killed = executor.submit(wait)
        yield left
        killed.result(30)


def told(trajectories: list[Trajectory]) -> list[dict]:
    """Episodes without what was measured of their play, in a fixed order."""
    played = [dataclasses.asdict(one) | dict.fromkeys(MEASURED) for one in trajectories]
    return sorted(played, key=lambda one: (one["split"], one["id"], one["sample"]))


async def play(path: Path, backend: str, episodes: list[Episode], make_player, **sizes) -> list[dict]:
    async with EnvPool(ToyEnv, Settings(variations=4), backend=backend, timeout=30, **sizes) as pool:
        with JsonlAppender(path) as appender:
            await play_episodes(pool, episodes, make_player, PlayConfig(), appender, example=False, label="toy")
    return told(read_jsonl(path, Trajectory))


def episodes(samples: int) -> list[Episode]:
    tasks = [f"toy:train:{number}" for number in range(4)]
    return [
        Episode(task=task, kind="train", split="train", policy="random", seed=0, sample=sample)
        for task in tasks
        for sample in range(samples)
    ]


def test_without_ray_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "envs.actors", raising=False)
    monkeypatch.delattr(envs, "actors", raising=False)
    with pytest.raises(ValueError, match=r"^workers=ray needs Ray, which is not installed here") as error:
        EnvPool(ToyEnv, backend="ray")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["ray"][0] in str(error.value)
    assert extras["ray"][0] in extras["test"]


@pytest.mark.parametrize("address", ["free port", "nonsense", "ray://127.0.0.1:10001"])
def test_a_cluster_that_does_not_answer_is_one_sentence(monkeypatch, address):
    ray.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = f"127.0.0.1:{server.getsockname()[1]}"
    address = free if address == "free port" else address
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"^No Ray cluster can be joined at {address}") as error:
        EnvPool(ToyEnv, backend="ray")
    assert "\n" not in str(error.value)


def test_a_node_without_the_folder_is_one_sentence(tmp_path):
    answer = pickle.loads(Actor().begin(str(tmp_path / "gone"), ([], "tests.toy_env:ToyEnv", {})))
    assert f"has no folder {tmp_path / 'gone'}" in str(answer.error)


def test_workers_is_short_for_their_backend(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("workers: ray\n")
    loaded = load(str(path), ["workers.processes=5"])
    assert (loaded.workers.backend, loaded.workers.processes) == ("ray", 5)
    assert load("tiny", ["workers=ray"]).workers.backend == "ray"
    assert load("tiny").workers.backend == "local"
    assert load("tiny", ["workers=ray", "workers.processes=1000"]).workers.here == os.cpu_count()
    with pytest.raises(ValueError, match=r"workers.backend: Input should be 'local' or 'ray'"):
        load("tiny", ["workers=spark"])


async def test_episodes_are_those_of_local_workers_on_every_node(cluster, tmp_path):
    local = await play(tmp_path / "local.jsonl", "local", episodes(3), lambda _: RandomPlayer())
    there = await play(tmp_path / "ray.jsonl", "ray", episodes(3), lambda _: RandomPlayer(), workers=4, slots=2)
    assert there == local
    assert len(there) == 12


async def test_refusals_and_failures_come_back_as_from_local_workers(cluster):
    async with EnvPool(ToyEnv, Settings(child=True), slots=2, backend="ray") as pool:  # noqa: SIM117 - closed apart
        async with pool.session() as env, pool.session() as other:
            pids = [await env.call("pid"), await env.call("child_pid"), await other.call("child_pid")]
            assert {actor.pid for node in cluster.worker_nodes for actor in hosted(node)} == {pids[0]}
            with pytest.raises(ValueError, match="No such toy task: 'toy:no'"):
                await env.reset("toy:no")
            await env.reset(TASK)
            await other.reset(TASK)
            with pytest.raises(NoSolutionError) as caught:
                await env.step("key a lost key")
            assert caught.value.args == ("a lost key",)
            with pytest.raises(EnvironmentFailure, match="cannot be sent"):
                await env.call("unpicklable")
            with pytest.raises(OSError, match=r"No space left on device: /full") as full:
                await env.step("disk /full")
            assert full.value.errno == 28
            with pytest.raises(EnvironmentFailure, match="broke before"):
                await env.step("up")
            assert (await other.step("up"))[0] == "1"
    wait_gone(pids)


async def test_settings_are_refused_where_the_environment_is_made(cluster):
    async with EnvPool(ToyEnv, Settings(broken="install Java"), backend="ray") as pool:
        with pytest.raises(ValueError, match=r"^install Java$"):
            async with pool.session():
                pass


async def test_a_node_without_the_project_is_one_sentence(cluster, monkeypatch):
    nowhere = types.ModuleType("nowhere")
    nowhere.Actor = type("Actor", (Actor,), {"__module__": "nowhere"})
    monkeypatch.setitem(sys.modules, "nowhere", nowhere)
    monkeypatch.setattr(envs.actors, "Actor", nowhere.Actor)
    async with EnvPool(ToyEnv, backend="ray") as pool:
        with pytest.raises(ValueError, match=r"cannot load this project .*No module named 'nowhere'"):
            async with pool.session():
                pass


async def test_a_cluster_without_room_for_a_worker_is_one_sentence(cluster, monkeypatch):
    monkeypatch.setattr(envs.actors, "PLACING_SECONDS", 1)
    monkeypatch.setattr(ray, "remote", ray.remote(num_cpus=64))
    async with EnvPool(ToyEnv, backend="ray") as pool:
        with pytest.raises(
            ValueError, match=r"No node of the Ray cluster has taken a worker in 1 s: .* 3 nodes .* 2 of"
        ):
            await pool.run(lambda env: env.reset(TASK))


@pytest.mark.parametrize("error", [OutOfMemoryError("out of memory"), ObjectLostError("ab" * 14, None, "")])
async def test_whatever_ray_raises_is_the_end_of_the_worker_and_not_of_the_run(error):
    async def fail(_) -> None:
        raise error

    link = ActorLink(([], "", {}))
    link._actor = types.SimpleNamespace(answer=types.SimpleNamespace(remote=fail))
    with pytest.raises(EOFError) as caught:
        await link.exchange((0, "open", ()))
    ended = await link.ended(caught.value)
    assert str(ended).startswith("The environment's worker died (")
    assert not isinstance(ended, MachineLost)


async def test_work_under_which_every_machine_is_lost_is_given_up():
    async def lose(_) -> None:
        begun.append(1)
        raise MachineLost("The Ray node of the environment's worker is gone.")

    begun: list[int] = []
    async with EnvPool(ToyEnv) as pool:
        with pytest.raises(EnvironmentFailure, match=r"^5 machines were lost") as caught:
            await pool.run(lose)
    assert not isinstance(caught.value, MachineLost)
    assert len(begun) == 5


async def test_a_worker_that_hangs_or_dies_is_replaced(cluster):
    async with EnvPool(ToyEnv, Settings(child=True), timeout=2, backend="ray") as pool:
        async with pool.session() as env:
            pids = [await env.call("pid"), await env.call("child_pid")]
            await env.reset(TASK)
            with pytest.raises(EnvironmentTimeout, match="no answer to 'step' in 2 s"):
                await env.step("sleep 60")
            wait_gone(pids)
        async with pool.session() as env:
            await env.reset(TASK)
            with pytest.raises(EnvironmentFailure, match="worker process has died") as caught:
                await env.step("segfault")
            assert not isinstance(caught.value, EnvironmentTimeout | MachineLost)
            assert "\n" not in str(caught.value)
        async with pool.session() as env:
            assert (await env.reset(TASK))[0] == "Count to 3."


async def test_close_ends_workers_and_their_children_even_in_a_step(cluster):
    pool = EnvPool(ToyEnv, Settings(child=True), backend="ray")
    async with pool.session() as env:
        pids = [await env.call("pid"), await env.call("child_pid")]
        await env.reset(TASK)
        stuck = asyncio.create_task(env.step("sleep 60"))
        await asyncio.sleep(0.1)
        await pool.close()
        await pool.close()
        with pytest.raises(EnvironmentFailure):
            await stuck
    wait_gone(pids)


async def test_a_raylet_killed_in_mid_run_costs_no_episode(cluster, tmp_path):
    grow(cluster)
    plans = {f"toy:train:{number}": ["up", "sleep 0.1", "down"] for number in range(4)}
    begun: list[Episode] = []

    def make_player(episode: Episode) -> Planned:
        begun.append(episode)
        return Planned(plans)

    local = await play(tmp_path / "local.jsonl", "local", episodes(8), make_player, workers=2, slots=2)
    assert len(begun) == len(local) == 32
    path = tmp_path / "ray.jsonl"
    with killing(cluster, path, 3) as left:
        there = await play(path, "ray", episodes(8), make_player, workers=4, slots=2)
    assert there == local
    assert 3 <= left[0] < 32
    assert len(begun) > 64  # what was played on the node began again


@pytest.mark.java
@pytest.mark.slow
def test_a_raylet_killed_under_a_job_of_scienceworld_costs_no_episode(cluster, tmp_path, monkeypatch):
    grow(cluster)
    monkeypatch.chdir(tmp_path)
    env = {"names": ["sciworld"], "sciworld": {"tasks": ["find-living-thing"], "eval_variations": 8}}
    tree = {"env": env, "evaluate": {"splits": ["seen"]}}
    (local,) = jobs.baseline(Config(run="local", workers={"processes": 1}, **tree), "sciworld", 0, "expert")
    (there,) = jobs.baseline(Config(run="ray", workers={"slots": 2, "backend": "ray"}, **tree), "sciworld", 0, "expert")
    assert jobs.settings(there) == jobs.settings(local)
    jobs.run([local])
    with killing(cluster, there.folder / jobs.EPISODES, 1) as left:
        jobs.run([there])
    assert told(jobs.trajectories([there.folder])) == told(jobs.trajectories([local.folder]))
    assert left[0] <= 4  # of eight, four of which are under way at any time: some of them on the node that was killed


@pytest.mark.slow
@pytest.mark.parametrize("where", ["this cluster", "local"])
def test_nothing_outlives_a_killed_parent(cluster, where):
    address = cluster.address if where == "this cluster" else "local"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=os.environ | {"RAY_ADDRESS": address}
    ) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        # Ray's own agents take a minute to notice that they are alone.
        others = [pid for pid in descendants(parent.pid) if "Agent" not in " ".join(psutil.Process(pid).cmdline())]
        assert len(workers) == 2
        parent.kill()
    wait_gone([*workers, *others])
