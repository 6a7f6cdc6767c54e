import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from envs import NoSolutionError
from envs.pool import EnvironmentFailure, EnvironmentTimeout, EnvPool
from tests.env_checker import check_env
from tests.toy_env import Settings, ToyEnv

TASK = "toy:train:2"


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before the file was opened, or before it was read
        return False


def wait_gone(pids: list[int], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < end, f"still running: {left}"
        time.sleep(0.05)


def test_toy_keeps_the_contract():
    check_env(ToyEnv(), TASK)


async def test_plays_episodes_and_reuses_workers():
    async with EnvPool(ToyEnv, Settings(variations=7), workers=2, slots=2) as pool:

        async def play(number: int) -> tuple[float, int]:
            async with pool.session() as env:
                assert (await env.reset(f"toy:train:{number % 3}"))[0] == f"Count to {number % 3 + 1}."
                for step in await env.call("expert", f"toy:train:{number % 3}"):
                    _, _, terminated, _, info = await env.step(step.action)
                assert terminated
                assert env.seconds > 0
                return info["reward"], await env.call("pid")

        played = await asyncio.gather(*(play(number) for number in range(20)))
        assert [reward for reward, _ in played] == [1.0] * 20
        assert len({pid for _, pid in played}) == 2
        async with pool.session() as env:
            assert len(await env.call("tasks", "train")) == 7


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="unknown environment"):
        EnvPool("chess")
    for wrong in ({"workers": 0}, {"slots": 0}, {"timeout": 0}):
        with pytest.raises(ValueError, match="at least one"):
            EnvPool(ToyEnv, **wrong)


async def test_starts_no_more_workers_than_needed():
    async with EnvPool(ToyEnv, workers=3, slots=1) as pool:
        pids = []
        for _ in range(4):
            async with pool.session() as env:
                pids.append(await env.call("pid"))
        assert len(set(pids)) == 1


async def test_sessions_wait_for_a_slot_in_order():
    order = []
    async with EnvPool(ToyEnv) as pool:

        async def visit(number: int) -> None:
            async with pool.session() as env:
                order.append(number)
                await env.reset(TASK)
                await asyncio.sleep(0.01)

        await asyncio.gather(*(visit(number) for number in range(6)))
    assert order == list(range(6))


async def test_waiting_for_a_turn_is_no_timeout():
    async with EnvPool(ToyEnv, slots=4, timeout=1.5) as pool:

        async def nap() -> None:
            async with pool.session() as env:
                await env.reset(TASK)
                await env.step("sleep 0.6")

        await asyncio.gather(*(nap() for _ in range(4)))


async def test_a_session_knows_how_long_it_waited_for_turns():
    async with EnvPool(ToyEnv, slots=2) as pool, pool.session() as one, pool.session() as two:
        await one.reset(TASK)
        await two.reset(TASK)
        before = one.waited, two.waited
        napping = asyncio.create_task(one.step("sleep 0.6"))
        await asyncio.sleep(0.1)
        await two.step("up")
        await napping
        assert one.waited - before[0] < 0.4
        assert two.waited - before[1] > 0.4


async def test_refusals_come_back_as_they_are():
    async with EnvPool(ToyEnv) as pool, pool.session() as env:
        pid = await env.call("pid")
        with pytest.raises(ValueError, match="No such toy task: 'toy:no'"):
            await env.reset("toy:no")
        await env.reset(TASK)
        with pytest.raises(ValueError, match=r"^a wrong value$"):
            await env.step("value a wrong value")
        with pytest.raises(NoSolutionError) as caught:
            await env.step("key a lost key")
        assert caught.value.args == ("a lost key",)
        assert (await env.step("up"))[0] == "1"
        assert await env.call("pid") == pid


async def test_settings_are_refused_where_the_environment_is_made():
    async with EnvPool(ToyEnv, Settings(broken="install Java")) as pool:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"^install Java$"):
                async with pool.session():
                    pass


async def test_an_environment_that_breaks_is_replaced_alone():
    async with EnvPool(ToyEnv, slots=2) as pool, pool.session() as other:
        await other.reset(TASK)
        async with pool.session() as env:
            await env.reset(TASK)
            with pytest.raises(EnvironmentFailure, match=r"out of luck.*RuntimeError at .*toy_env.py"):
                await env.step("break out of luck")
            with pytest.raises(EnvironmentFailure):
                await env.step("up")
        assert (await other.step("up"))[0] == "1"
        async with pool.session() as env:
            assert await env.reset(TASK)


async def test_answers_that_cannot_be_sent_are_failures():
    async with EnvPool(ToyEnv) as pool, pool.session() as env:
        with pytest.raises(EnvironmentFailure, match="cannot be sent"):
            await env.call("unpicklable")
        assert await env.reset(TASK)


async def test_prints_do_not_disturb():
    async with EnvPool(ToyEnv) as pool, pool.session() as env:
        await env.reset(TASK)
        await env.step("print hello")
        await env.step("shell hello")
        assert (await env.step("up"))[0] == "1"


async def test_a_worker_that_dies_is_replaced():
    async with EnvPool(ToyEnv, slots=3, timeout=20) as pool:
        async with pool.session() as one, pool.session() as two:
            await one.reset(TASK)
            await two.reset(TASK)
            with pytest.raises(EnvironmentFailure, match="exit code 3") as caught:
                await one.step("exit 3")
            assert not isinstance(caught.value, EnvironmentTimeout)
            with pytest.raises(EnvironmentFailure):
                await two.step("up")
            async with pool.session() as three:  # while the others still hold their slots
                assert await three.reset(TASK)
        async with pool.session() as one, pool.session() as two:
            await one.reset(TASK)
            assert (await two.reset(TASK))[0]


async def test_a_session_alone_has_a_worker_of_its_own_that_ends_with_it():
    async with EnvPool(ToyEnv, slots=2, timeout=20) as pool:
        async with pool.session() as beside:
            await beside.reset(TASK)
            async with pool.session(alone=True) as alone:
                await alone.reset(TASK)
                pid = await alone.call("pid")
                assert pid != await beside.call("pid")
                with pytest.raises(EnvironmentFailure, match="signal 11"):
                    await alone.step("segfault")
            assert (await beside.step("up"))[0] == "1"
        async with pool.session(alone=True) as alone:
            pid = await alone.call("pid")
        wait_gone([pid])


async def test_a_killed_worker_is_named_by_its_signal():
    async with EnvPool(ToyEnv) as pool, pool.session() as env:
        await env.reset(TASK)
        pid = await env.call("pid")
        step = asyncio.create_task(env.step("sleep 30"))
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFailure, match="signal 9"):
            await step


async def test_a_step_that_hangs_times_out_and_its_worker_is_killed():
    async with EnvPool(ToyEnv, slots=2, timeout=1) as pool:
        async with pool.session() as env, pool.session() as other:
            pid = await env.call("pid")
            await env.reset(TASK)
            await other.reset(TASK)
            stuck = asyncio.create_task(env.step("sleep 60"))
            await asyncio.sleep(0.1)
            with pytest.raises(EnvironmentTimeout):
                await other.step("up")
            with pytest.raises(EnvironmentTimeout, match="no answer to 'step' in 1 s"):
                await stuck
            wait_gone([pid])
        async with pool.session() as env:
            assert await env.reset(TASK)


async def test_a_caller_that_leaves_does_not_shift_the_answers():
    async with EnvPool(ToyEnv, slots=2) as pool, pool.session() as other:
        await other.reset(TASK)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), pool.session() as env:
                await env.reset("toy:seen:1")
                await env.step("sleep 0.6")
        assert (await other.step("up"))[0] == "1"
        async with pool.session() as env:
            assert (await env.reset("toy:train:0"))[0] == "Count to 1."


async def test_close_ends_workers_and_their_children_even_in_a_step():
    pool = EnvPool(ToyEnv, Settings(child=True), workers=2)
    async with pool.session() as env, pool.session() as busy:
        pids = [
            await env.call("pid"),
            await env.call("child_pid"),
            await busy.call("pid"),
            await busy.call("child_pid"),
        ]
        await busy.reset(TASK)
        stuck = asyncio.create_task(busy.step("sleep 60"))
        await asyncio.sleep(0.1)
        await pool.close()
        await pool.close()
        with pytest.raises(EnvironmentFailure):
            await stuck
        wait_gone(pids)
    with pytest.raises(EnvironmentFailure, match="closed"):
        async with pool.session():
            pass


async def test_an_error_in_the_block_closes_the_pool():
    with pytest.raises(ZeroDivisionError):
        async with EnvPool(ToyEnv) as pool, pool.session() as env:
            pid = await env.call("pid")
            _ = 1 / 0
    wait_gone([pid])


@pytest.mark.parametrize("busy", [False, True])
def test_nothing_outlives_a_killed_parent(tmp_path, busy):
    wait_gone(killed_parent(tmp_path, "tests.toy_env:ToyEnv", "Settings(child=True)", TASK, busy=busy))


def killed_parent(tmp_path: Path, env: str, settings: str, task: str, *, busy: bool) -> list[int]:
    """Start a process that opens a pool and begins an episode, kill -9 it, and return its descendants' ids."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio
        from envs.pool import EnvPool
        from {env.split(":")[0]} import {env.split(":")[1]}, Settings

        async def main():
            async with EnvPool({env.split(":")[1]}, {settings}, workers=2, slots=2) as pool:
                async with pool.session() as one, pool.session() as two:
                    await one.reset({task!r})
                    await two.reset({task!r})
                    print("ready", flush=True)
                    if {busy}:
                        await one.step("sleep 60")
                    await asyncio.sleep(60)

        asyncio.run(main())
        """)
    )
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(root)}
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        pids = descendants(parent.pid)
        assert len(pids) >= 4, "two workers with a child each"
        parent.kill()
    return pids


def descendants(pid: int) -> list[int]:
    """Ids of the processes that a process has started, and that those have started."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], check=True, capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found[1:]
