import asyncio
import contextlib
import importlib
import random
import subprocess
import sys
import types
from dataclasses import replace

import pytest

from pipeline.engines import EngineSettings, Sampling, load_engine
from pipeline.engines.scripted import ScriptedEngine
from tests.tiny_policy import save_tiny_policy

END = 7  # not the 2 of the checkpoint's generation_config.json, which must play no part
VOCABULARY = 512
GREEDY = Sampling(max_tokens=12)


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """Near ties everywhere: a random model's likeliest token is hardly likelier than the next."""
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), vocab_size=VOCABULARY, max_length=2048)


@pytest.fixture(scope="session")
def hf(policy):
    engine = load_engine(EngineSettings(name="hf", dtype="float32"), policy, 2048, [END])
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another policy of the same shape."""
    return save_tiny_policy(tmp_path_factory.mktemp("other"), vocab_size=VOCABULARY, max_length=2048, seed=1)


@pytest.fixture(scope="session")
def fresh(other):
    """What an engine says that was started with the other policy: the first engine of this process.

    The process has imported Flask, whose proxies vLLM's start stumbles over.
    """
    importlib.import_module("flask")
    with contextlib.closing(
        load_engine(EngineSettings(kv_cache_gib=0.5, dtype="float32"), other, 2048, [END])
    ) as engine:
        return asyncio.run(ask_all(engine, PROMPTS, GREEDY))


@pytest.fixture(scope="session")
def in_bfloat16(policy, other, fresh):
    """What the other policy says in an engine started with it, and in one that it was loaded into."""
    settings = EngineSettings(kv_cache_gib=0.5, dtype="bfloat16")
    with contextlib.closing(load_engine(settings, other, 2048, [END])) as engine:
        started = asyncio.run(ask_all(engine, PROMPTS, GREEDY))
    with contextlib.closing(load_engine(settings, policy, 2048, [END])) as engine:
        engine.load(other, [END])
        return started, asyncio.run(ask_all(engine, PROMPTS, GREEDY))


@pytest.fixture(scope="session")
def vllm(policy, fresh, in_bfloat16):
    """One engine for all tests here; the last of its process, for it is closed when all tests have run."""
    engine = load_engine(EngineSettings(kv_cache_gib=0.5, dtype="float32"), policy, 2048, [END])
    yield engine
    engine.close()


def prompt(seed, length):
    draw = random.Random(f"{seed} {length}")
    return [draw.randrange(3, VOCABULARY) for _ in range(length)]


PROMPTS = [prompt(number, 20 + 40 * number) for number in range(24)]


async def ask_all(engine, prompts, sampling=GREEDY):
    """Ask everything at once, each with a seed of its own."""
    samplings = [replace(sampling, seed=sampling.seed + number) for number in range(len(prompts))]
    return await asyncio.gather(*(engine.generate(*request) for request in zip(prompts, samplings, strict=True)))


def test_the_package_imports_no_model_library():
    code = "import sys, pipeline.engines; sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestLoading:
    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match=r"No checkpoint at .*: there is no config.json"):
            load_engine(EngineSettings(name="hf", dtype="float32"), tmp_path, 64, [END])

    def test_a_setting_without_effect_is_refused(self, policy):
        with pytest.raises(ValueError, match=r"engine.concurrency has no effect with engine.name=hf; leave it out"):
            load_engine(EngineSettings(name="hf", concurrency=3), policy, 64, [END])

    @pytest.mark.vllm
    def test_a_failed_start_says_why(self, policy):
        with pytest.raises(ValueError, match=r"engine.tensor_parallel has no effect without a GPU"):
            load_engine(EngineSettings(tensor_parallel=2), policy, 64, [END])


class TestScripted:
    async def test_replies_in_order_with_end_tokens(self):
        engine = ScriptedEngine([[5, 6], [9, END, 8]], max_length=100, end_token_ids=[END])
        first = await engine.generate([1], GREEDY, "a")
        second = await engine.generate([1, 5], GREEDY)
        assert (first.token_ids, first.finish_reason, first.logprobs) == ([5, 6, END], "stop", [0.0] * 3)
        assert second.token_ids == [9, END]
        assert engine.requests == [([1], GREEDY, "a"), ([1, 5], GREEDY, "")]
        with pytest.raises(ValueError, match="no reply left"):
            await engine.generate([1], GREEDY)

    @pytest.mark.parametrize(("max_tokens", "max_length"), [(2, 100), (10, 5)])
    async def test_budget(self, max_tokens, max_length):
        engine = ScriptedEngine(lambda ids: [4, 5, 6, 7], max_length=max_length, end_token_ids=[END])
        reply = await engine.generate([1, 1, 1], Sampling(max_tokens=max_tokens))
        assert (reply.token_ids, reply.finish_reason) == ([4, 5], "length")

    async def test_an_end_token_that_just_fits(self):
        engine = ScriptedEngine(lambda ids: [4], max_length=100, end_token_ids=[END])
        reply = await engine.generate([1], Sampling(max_tokens=2))
        assert (reply.token_ids, reply.finish_reason) == ([4, END], "stop")


@pytest.fixture(params=["scripted", "hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def any_engine(request):
    if request.param == "scripted":
        return ScriptedEngine(lambda ids: [9] * 50, max_length=2048, end_token_ids=[END])
    return request.getfixturevalue(request.param)


class TestEveryEngine:
    async def test_stops_at_max_tokens(self, any_engine):
        reply = await any_engine.generate(prompt(0, 20), Sampling(max_tokens=7))
        assert len(reply.token_ids) == len(reply.logprobs) == 7
        assert reply.finish_reason == "length"

    async def test_stops_at_the_contexts_end(self, any_engine):
        reply = await any_engine.generate(prompt(0, 2045), Sampling(max_tokens=7))
        assert (len(reply.token_ids), reply.finish_reason) == (3, "length")

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([], "The prompt is empty"),
            ([5] * 2048, "has 2048 tokens; that leaves no room for a completion in max_length 2048"),
            ([5, -1], "Token id -1 of the prompt is outside"),
        ],
    )
    async def test_refuses(self, any_engine, ids, message):
        with pytest.raises(ValueError, match=message):
            await any_engine.generate(ids, GREEDY)


class TestAnotherCheckpoint:
    @pytest.mark.vllm
    async def test_vllm_says_what_a_fresh_engine_says_to_the_last_bit(self, policy, other, vllm, fresh):
        before = await ask_all(vllm, PROMPTS)
        vllm.load(other, [END])
        loaded = await ask_all(vllm, PROMPTS)
        vllm.load(policy, [END])
        again = await ask_all(vllm, PROMPTS)
        assert [reply.token_ids for reply in loaded] == [reply.token_ids for reply in fresh]
        assert [reply.logprobs for reply in loaded] == [reply.logprobs for reply in fresh]
        assert [reply.logprobs for reply in again] == [reply.logprobs for reply in before]
        assert [reply.token_ids for reply in loaded] != [reply.token_ids for reply in before]

    @pytest.mark.vllm
    def test_vllm_does_in_bfloat16_too(self, in_bfloat16):
        """The weights are saved in float32 and rounded as they are loaded, the first time and again."""
        fresh, loaded = in_bfloat16
        assert [reply.token_ids for reply in loaded] == [reply.token_ids for reply in fresh]
        assert [reply.logprobs for reply in loaded] == [reply.logprobs for reply in fresh]

    async def test_hf_too(self, policy, other, hf):
        before = await hf.generate(PROMPTS[0], GREEDY)
        hf.load(other, [END])
        loaded = await hf.generate(PROMPTS[0], GREEDY)
        with contextlib.closing(load_engine(EngineSettings(name="hf", dtype="float32"), other, 2048, [END])) as engine:
            fresh = await engine.generate(PROMPTS[0], GREEDY)
        # Where in memory a matrix lies moves MKL's last bits on a CPU with AVX2 alone.
        assert (loaded.token_ids, loaded.logprobs) == (fresh.token_ids, pytest.approx(fresh.logprobs, abs=1e-5))
        hf.load(policy, [END])
        again = await hf.generate(PROMPTS[0], GREEDY)
        assert before.token_ids == again.token_ids != loaded.token_ids

    @pytest.mark.parametrize("name", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
    async def test_ends_are_those_of_the_new_checkpoint(self, name, policy, request):
        engine = request.getfixturevalue(name)
        end = (await engine.generate(PROMPTS[0], GREEDY)).token_ids[3]
        engine.load(policy, [end])
        assert (await engine.generate(PROMPTS[0], GREEDY)).token_ids[-1] == end
        engine.load(policy, [END])

    @pytest.mark.parametrize("name", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
    def test_another_shape_is_refused(self, name, request, tmp_path):
        wide = save_tiny_policy(tmp_path / "wide", vocab_size=VOCABULARY, max_length=2048, hidden_size=96)
        with pytest.raises(ValueError, match=r"wide is of another shape than .*it needs an engine of its own"):
            request.getfixturevalue(name).load(wide, [END])

    @pytest.mark.vllm
    async def test_not_under_a_running_request(self, other, vllm):
        running = asyncio.create_task(vllm.generate(PROMPTS[0], Sampling(max_tokens=1500)))
        await asyncio.sleep(0.2)
        with pytest.raises(RuntimeError, match="1 requests are under way"):
            vllm.load(other, [END])
        running.cancel()


class TestHf:
    async def test_end_token(self, policy, hf):
        free = await hf.generate(prompt(1, 9), Sampling(max_tokens=8))
        end = free.token_ids[4]
        stopping = load_engine(EngineSettings(name="hf", dtype="float32"), policy, 2048, [end])
        reply = await stopping.generate(prompt(1, 9), Sampling(max_tokens=8))
        assert reply.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
        assert reply.finish_reason == "stop"
        stopping.close()
        stopping.close()
        with pytest.raises(RuntimeError, match="closed"):
            await stopping.generate([1], GREEDY)

    async def test_seeds(self, hf):
        replies = [await hf.generate(prompt(2, 9), Sampling(max_tokens=8, temperature=1, seed=s)) for s in (1, 1, 2)]
        assert replies[0] == replies[1]
        assert replies[0].token_ids != replies[2].token_ids

    def test_draw(self):
        import torch

        from pipeline.engines.hf import draw

        logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
        generator = torch.Generator().manual_seed(0)
        assert draw(logits, 0.0, 1.0, generator) == 0
        assert {draw(logits, 1.0, 0.5, generator) for _ in range(200)} == {0}
        assert {draw(logits, 1.0, 0.6, generator) for _ in range(200)} == {0, 2}
        assert {draw(logits, 1.0, 1.0, generator) for _ in range(200)} == {0, 1, 2, 3}

    async def test_log_probs_are_the_models(self, policy, hf):
        import torch
        from transformers import AutoModelForCausalLM

        ids = prompt(3, 30)
        reply = await hf.generate(ids, Sampling(max_tokens=5, temperature=0.7, top_p=0.9))
        model = AutoModelForCausalLM.from_pretrained(policy, dtype="float32")
        with torch.no_grad():
            logprobs = model(torch.tensor([ids + reply.token_ids])).logits[0].log_softmax(-1)
        expected = [logprobs[29 + i, token].item() for i, token in enumerate(reply.token_ids)]
        assert reply.logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.vllm
class TestVllm:
    async def test_greedy_ids_are_those_of_transformers(self, vllm, hf):
        prompts = [prompt(i, 5 + 31 * i) for i in range(20)]
        ours, reference = await ask_all(vllm, prompts), await ask_all(hf, prompts)
        assert [reply.token_ids for reply in ours] == [reply.token_ids for reply in reference]
        for reply, expected in zip(ours, reference, strict=True):
            assert reply.logprobs == pytest.approx(expected.logprobs, abs=1e-4)

    async def test_log_probs_are_before_temperature_and_top_p(self, vllm, hf):
        greedy = await hf.generate(prompt(4, 9), Sampling(max_tokens=1))
        # So small a nucleus holds the likeliest id alone: with probability 1 after top_p, its own before.
        drawn = await vllm.generate(prompt(4, 9), Sampling(max_tokens=1, temperature=0.3, top_p=0.0001))
        assert drawn.token_ids == greedy.token_ids
        assert drawn.logprobs == pytest.approx(greedy.logprobs, abs=1e-4)

    async def test_only_the_given_end_tokens_end_a_completion(self, vllm):
        sampling = Sampling(max_tokens=300, temperature=1.0, seed=5)
        replies = await ask_all(vllm, [prompt(i, 9) for i in range(12)], sampling)
        assert any(2 in reply.token_ids for reply in replies)
        assert {reply.finish_reason for reply in replies} == {"stop", "length"}
        for reply in replies:
            stopped = reply.finish_reason == "stop"
            assert reply.token_ids.count(END) == stopped == (reply.token_ids[-1] == END)
            assert stopped or len(reply.token_ids) == 300

    async def test_one_engine_at_a_time(self, policy, vllm):
        with pytest.raises(RuntimeError, match="has a vLLM engine already; close it before"):
            load_engine(EngineSettings(), policy, 64, [END])
        await vllm.generate(prompt(1, 9), GREEDY)

    async def test_seeds_hold_when_many_long_prompts_arrive_at_once(self, vllm):
        """More prompt tokens than one step takes: with chunked prefill, vLLM's CPU build fails on seeded requests."""
        sampling = Sampling(max_tokens=10, temperature=1.0)
        prompts = [prompt(i, 1500) for i in range(12)]
        together = await ask_all(vllm, prompts, sampling)
        alone = [await vllm.generate(ids, replace(sampling, seed=number)) for number, ids in enumerate(prompts)]
        other = await ask_all(vllm, prompts, replace(sampling, seed=100))
        assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]
        assert all(a.token_ids != b.token_ids for a, b in zip(together, other, strict=True))
        assert all(reply.cached_tokens > 1300 for reply in alone)

    async def test_an_episode_does_not_depend_on_the_others(self, vllm):
        """To the last bit, log-probs too, with contexts longer than the attention kernel's tiles."""
        common = prompt("common", 700)

        async def episode(number, run):
            ids, replies = common + prompt(number, 50 + 60 * number), []
            for turn in range(3):
                sampling = Sampling(max_tokens=12, temperature=float(number % 2), top_p=0.9, seed=10 * number + turn)
                reply = await vllm.generate(ids, sampling, f"{run} {number}")
                replies.append((reply.token_ids, reply.logprobs))
                ids = ids + reply.token_ids + prompt((number, turn), 10 + 25 * number)
            return replies

        async def late(number, run):
            await asyncio.sleep(random.Random(number).random() / 5)
            return await episode(number, run)

        alone = [await episode(number, "alone") for number in range(8)]
        assert await asyncio.gather(*(episode(number, "together") for number in range(8))) == alone
        shuffled = random.Random(0).sample(range(8), 8)
        mixed = await asyncio.gather(*(late(number, "late") for number in shuffled))
        assert mixed == [alone[number] for number in shuffled]

    async def test_prefixes_are_shared_within_an_episode_only(self, vllm):
        ids = prompt("cached", 300)
        assert (await vllm.generate(ids, GREEDY, "a")).cached_tokens == 0
        assert (await vllm.generate(ids, GREEDY, "a")).cached_tokens == 288
        assert (await vllm.generate(ids, GREEDY, "b")).cached_tokens == 0

    async def test_a_long_request_stalls_no_short_one(self, vllm):
        long = asyncio.create_task(vllm.generate(prompt(5, 50), Sampling(max_tokens=1500)))
        await asyncio.sleep(0.05)
        for _ in range(3):
            await vllm.generate(prompt(6, 50), Sampling(max_tokens=5))
        assert not long.done()
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long

    async def test_a_token_outside_the_vocabulary(self, vllm):
        with pytest.raises(ValueError, match=r"Token id 512 of the prompt is outside .* of 512"):
            await vllm.generate([5, 512], GREEDY)


class FakeLLMEngine:
    """vLLM's engine as far as ours talks to it, with a step that never finishes anything, or fails."""

    model_config = types.SimpleNamespace(get_vocab_size=lambda: VOCABULARY, dtype="torch.bfloat16")

    def __init__(self, failure=None):
        self.failure, self.added, self.aborted = failure, [], []

    def add_request(self, key, prompt, params):
        self.added.append(key)
        if prompt["prompt_token_ids"] == [13]:
            raise ValueError("no thirteens")

    def abort_request(self, keys):
        self.aborted += keys

    def step(self):
        if self.failure:
            raise self.failure
        return []


@pytest.mark.vllm
class TestVllmThread:
    @pytest.fixture
    def start(self, monkeypatch, policy):
        """Starts our engine on a fake one; closes it at the end."""
        from pipeline.engines import vllm_engine

        with contextlib.ExitStack() as stack:

            def start(fake):
                monkeypatch.setattr(vllm_engine, "running_vllm", lambda *_: contextlib.nullcontext(fake))
                return stack.enter_context(vllm_engine.VllmEngine(policy, max_length=64, end_token_ids=[END]))

            yield start

    async def test_a_failing_step_fails_everyone_and_everything_later(self, start):
        engine = start(FakeLLMEngine(failure=MemoryError("out of blocks")))
        replies = await asyncio.gather(*(engine.generate([5], GREEDY) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(reply, RuntimeError) and "out of blocks" in str(reply) for reply in replies)
        with pytest.raises(RuntimeError, match="out of blocks") as caught:
            await engine.generate([5], GREEDY)
        assert isinstance(caught.value.__cause__, MemoryError)

    def test_it_knows_what_vllm_computes_in(self, start):
        assert start(FakeLLMEngine()).dtype == "bfloat16"

    async def test_a_refused_request_fails_alone(self, start):
        engine = start(FakeLLMEngine())
        other = asyncio.create_task(engine.generate([5], GREEDY))
        with pytest.raises(ValueError, match="no thirteens"):
            await engine.generate([13], GREEDY)
        assert not other.done()
        other.cancel()

    async def test_cancelling_takes_the_request_off_the_engine(self, start):
        fake = FakeLLMEngine()
        engine = start(fake)
        task = asyncio.create_task(engine.generate([5], GREEDY))
        while not fake.added:
            await asyncio.sleep(0.01)
        task.cancel()
        while not fake.aborted:
            await asyncio.sleep(0.01)
        assert fake.aborted == fake.added

    async def test_close_fails_what_is_under_way(self, start):
        engine = start(FakeLLMEngine())
        task = asyncio.create_task(engine.generate([5], GREEDY))
        await asyncio.sleep(0.05)
        engine.close()
        engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await task
        with pytest.raises(RuntimeError, match="closed"):
            await engine.generate([5], GREEDY)
