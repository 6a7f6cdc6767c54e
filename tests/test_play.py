"""Episodes on a toy environment with a scripted policy: the whole agent loop without a model or a simulator."""

import asyncio
import itertools
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from envs import NoSolutionError
from envs.pool import EnvPool
from pipeline import react
from pipeline.config import PlayConfig
from pipeline.engines.scripted import ScriptedEngine
from pipeline.play import Episode, ExpertPlayer, PolicyPlayer, RandomPlayer, play_episodes
from pipeline.records import EpisodeStatus, JsonlAppender, Trajectory, read_jsonl
from pipeline.rendering import Renderer
from tests.tiny_policy import save_tiny_policy
from tests.toy_env import Settings, ToyEnv


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    return Renderer(AutoTokenizer.from_pretrained(save_tiny_policy(tmp_path_factory.mktemp("policy"))))


def ids(renderer, text):
    return renderer.tokenizer(text, add_special_tokens=False)["input_ids"]


async def play(tmp_path, make_player, tasks=("toy:train:2",), *, example=False, rules=None, slots=4, timeout=20):
    """Play and read back what was recorded."""
    path = tmp_path / "episodes.jsonl"
    episodes = [Episode(task=task, kind="train", split="train", policy="sft", seed=0) for task in tasks]
    async with EnvPool(ToyEnv, Settings(), workers=1, slots=slots, timeout=timeout) as pool:
        with JsonlAppender(path) as appender:
            await play_episodes(
                pool, episodes, make_player, rules or PlayConfig(max_tokens=40), appender,
                example=example, label="toy",
            )  # fmt: skip
    return read_jsonl(path, Trajectory)


def scripted(renderer, replies, max_length=512, **rules):
    """A maker of players who all say the same."""

    def make(_):
        engine = ScriptedEngine(
            [ids(renderer, reply) for reply in replies], max_length=max_length, end_token_ids=renderer.end_token_ids
        )
        make.engines.append(engine)
        return PolicyPlayer(engine, renderer, PlayConfig(**({"max_tokens": 40} | rules)), 0.7, 1.0)

    make.engines = []
    return make


async def test_an_episode_is_recorded_as_it_was_played(tmp_path, renderer):
    make = scripted(renderer, ["Thought: one\nAction: up", "Action: up", "Action: up"])
    (one,) = await play(tmp_path, make)
    assert (one.reward, one.success, one.status) == (1.0, True, EpisodeStatus.COMPLETED)
    assert [turn.action for turn in one.turns] == ["up", "up", "up"]
    assert [turn.reward for turn in one.turns] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [message["content"] for message in one.completion] == [
        "Thought: one\nAction: up", "Observation: 1", "Action: up", "Observation: 2", "Action: up",
    ]  # fmt: skip
    assert one.env_seconds > 0


async def test_the_engine_sees_ids_that_only_grow_and_that_rendering_gives_again(tmp_path, renderer):
    make = scripted(renderer, ["Action: up", "Action: up", "Action: up"])
    (one,) = await play(tmp_path, make)
    prompts = [prompt for prompt, _, _ in make.engines[0].requests]
    for shorter, longer in itertools.pairwise(prompts):
        assert longer[: len(shorter)] == shorter
    rendered = renderer.render(one.prompt, one.completion, [turn.token_ids for turn in one.turns])
    assert rendered.ids == prompts[-1] + one.turns[-1].token_ids
    assert [token for token, turn in zip(rendered.ids, rendered.turn_index, strict=True) if turn == 1] == one.turns[
        1
    ].token_ids


class Slow(ScriptedEngine):
    """Takes its time for every reply, and says that it had all but the prompt's last token cached."""

    async def generate(self, prompt_ids, sampling, episode=""):
        await asyncio.sleep(0.05)
        completion = await super().generate(prompt_ids, sampling, episode)
        return replace(completion, cached_tokens=len(prompt_ids) - 1)


async def test_time_is_the_engines_the_environments_or_the_queues_and_never_two_of_them(tmp_path, renderer):
    """Two episodes in one worker: each waits for its turn while the other's environment works."""
    engine = Slow(lambda _: ids(renderer, "Action: sleep 0.2"), max_length=512, end_token_ids=renderer.end_token_ids)
    rules = PlayConfig(max_tokens=40, max_invalid=2)
    tasks = ["toy:train:2", "toy:train:1"]
    played = await play(
        tmp_path, lambda _: PolicyPlayer(engine, renderer, rules, 0.0, 1.0), tasks=tasks, rules=rules, slots=2
    )
    for one in played:
        assert one.env_seconds >= 0.4
        assert 0.1 <= one.engine_seconds < 0.4
        prompts = [len(prompt) for prompt, _, name in engine.requests if one.id in name]
        assert (one.prompt_tokens, one.cached_tokens) == (sum(prompts), sum(prompts) - 2)
    assert sum(one.queue_seconds for one in played) > 0.1
    (alone,) = await play(
        tmp_path / "alone", lambda _: PolicyPlayer(engine, renderer, rules, 0.0, 1.0), tasks=tasks[:1], rules=rules
    )
    assert alone.queue_seconds < 0.1


async def test_what_chance_asks_of_the_environment_is_no_time_of_an_engine(tmp_path):
    (one,) = await play(tmp_path, lambda _: RandomPlayer())
    assert (one.engine_seconds, one.prompt_tokens) == (0, 0)
    assert one.env_seconds > 0


async def test_each_request_has_a_seed_of_its_own_that_does_not_hang_on_the_others(tmp_path, renderer):
    make = scripted(renderer, ["Action: up"] * 3)
    await play(tmp_path, make, tasks=["toy:train:2", "toy:train:1"])
    alone = scripted(renderer, ["Action: up"] * 3)
    await play(tmp_path / "alone", alone, tasks=["toy:train:1"])
    seeds = {request[2]: [r[1].seed for r in engine.requests] for engine in make.engines for request in engine.requests}
    assert len({seed for one in seeds.values() for seed in one}) == 5
    assert seeds["train/toy:train:1/0"] == [request[1].seed for request in alone.engines[0].requests]


async def test_a_malformed_reply_costs_a_step_and_leaves_the_reward(tmp_path, renderer):
    make = scripted(renderer, ["Action: up", "I would rather not.", "Action: up", "Action: up"])
    (one,) = await play(tmp_path, make)
    assert [(turn.action, turn.valid) for turn in one.turns] == [("up", True), ("", False), ("up", True), ("up", True)]
    assert one.turns[1].reward == one.turns[0].reward
    assert "no action" in one.turns[1].observation
    assert one.reward == 1.0


async def test_malformed_replies_in_a_row_end_the_episode_where_the_recipe_says_so(tmp_path, renderer):
    replies = ["Action: up", "no", "no", "no", "no"]
    (patient,) = await play(tmp_path / "a", scripted(renderer, replies))
    assert patient.status == EpisodeStatus.MAX_STEPS
    rules = PlayConfig(max_tokens=40, max_malformed=2)
    (strict,) = await play(tmp_path / "b", scripted(renderer, replies), rules=rules)
    assert (strict.status, len(strict.turns)) == (EpisodeStatus.PARSE_ERROR, 3)
    assert strict.reward == pytest.approx(1 / 3)


async def test_steps_in_a_row_that_are_not_possible_end_the_episode_where_the_recipe_says_so(tmp_path, renderer):
    replies = ["Action: fly", "Action: up", "no", "Action: fly", "Action: up"]
    (patient,) = await play(tmp_path / "a", scripted(renderer, replies))
    assert [turn.valid for turn in patient.turns] == [False, True, False, False, True]
    rules = PlayConfig(max_tokens=40, max_invalid=2)
    (strict,) = await play(tmp_path / "b", scripted(renderer, replies), rules=rules)
    assert (strict.status, len(strict.turns)) == (EpisodeStatus.STUCK, 4)
    assert strict.reward == pytest.approx(1 / 3)


async def test_an_unknown_action_is_answered_and_counted_as_invalid(tmp_path, renderer):
    (one,) = await play(tmp_path, scripted(renderer, ["Action: fly", "Action: up", "Action: down"]))
    assert [turn.valid for turn in one.turns] == [False, True, True]
    assert (one.status, one.success) == (EpisodeStatus.COMPLETED, False)
    assert one.reward == pytest.approx(1 / 3)


async def test_a_full_context_ends_the_episode_before_a_cut_reply(tmp_path, renderer):
    prompt = len(renderer.prompt_ids(react.prompt(ToyEnv, Settings(), "Count to 3.", example=False)))
    make = scripted(renderer, ["Action: up"] * 3, max_length=prompt + 60)
    (one,) = await play(tmp_path, make)
    assert one.status == EpisodeStatus.CONTEXT_FULL
    assert 1 <= len(one.turns) < 3
    assert one.reward > 0


async def test_a_worked_example_stands_in_the_prompt_and_no_turn_of_it_is_the_policys(tmp_path, renderer):
    (one,) = await play(tmp_path, scripted(renderer, ["Action: up"] * 3), example=True)
    assert [message["content"] for message in one.prompt[2:4]] == ["Count to 1.", "Action: up"]
    assert len(one.turns) == 3
    rendered = renderer.render(one.prompt, one.completion, [turn.token_ids for turn in one.turns])
    assert rendered.turns == 3


async def test_an_environment_that_breaks_is_tried_once_more_and_then_recorded(tmp_path, renderer):
    make = scripted(renderer, ["Action: up", "Action: break it"])
    (one,) = await play(tmp_path, make)
    assert len(make.engines) == 2
    assert (one.status, one.reward, one.turns) == (EpisodeStatus.ENV_ERROR, 0.0, [])
    assert "it" in one.note


async def test_a_worker_that_dies_under_one_episode_does_not_lose_the_others(tmp_path, renderer):
    def make(episode):
        first = make.count == 0
        make.count += 1
        replies = ["Action: exit 3"] if first else ["Action: up"] * 3
        return scripted(renderer, replies)(episode)

    make.count = 0
    tasks = ["toy:train:2", "toy:train:1", "toy:train:0"]
    found = await play(tmp_path, make, tasks=tasks)
    assert sorted(one.id for one in found) == sorted(tasks)
    assert all(one.success for one in found)


async def test_an_episode_that_always_crashes_its_worker_takes_no_other_with_it(tmp_path, renderer):
    """It dies in native code on both attempts; the episodes beside it end as they would, each counted once."""

    def make(episode):
        replies = ["Action: segfault"] if episode.task == "toy:train:2" else ["Action: sleep 0.3", *["Action: up"] * 3]
        return scripted(renderer, replies)(episode)

    tasks = [f"toy:{split}:{number}" for split in ("train", "seen") for number in range(3)]
    found = await play(tmp_path, make, tasks=tasks)
    assert sorted(one.id for one in found) == sorted(tasks)
    (crashed,) = [one for one in found if one.status == EpisodeStatus.ENV_ERROR]
    assert crashed.id == "toy:train:2"
    assert "signal 11" in crashed.note
    assert all(one.success for one in found if one is not crashed)


async def test_a_full_disk_is_raised_as_it_is(tmp_path, renderer, monkeypatch):
    def full(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JsonlAppender, "append", full)
    with pytest.raises(OSError, match="No space left"):
        await play(tmp_path, scripted(renderer, ["Action: up"] * 3), tasks=["toy:train:2", "toy:train:1"])


async def test_a_workers_full_disk_is_raised_and_no_episode_counts_as_played(tmp_path, renderer):
    with pytest.raises(OSError, match=r"No space left on device: data/x"):
        await play(tmp_path, scripted(renderer, ["Action: disk data/x"]))
    assert read_jsonl(tmp_path / "episodes.jsonl", Trajectory) == []


async def test_an_expert_without_a_solution_is_recorded(tmp_path, monkeypatch):
    class Ignorant(ExpertPlayer):
        async def prepare(self, episode, env):
            raise NoSolutionError("nobody knows")

    (one,) = await play(tmp_path, lambda _: Ignorant())
    assert (one.status, one.reward, one.note) == (EpisodeStatus.MAX_STEPS, 0.0, "nobody knows")


async def test_an_environment_that_hangs_is_a_timeout(tmp_path, renderer):
    (one,) = await play(tmp_path, scripted(renderer, ["Action: sleep 60"]), timeout=1)
    assert one.status == EpisodeStatus.TIMEOUT


async def test_experts_replay_their_solution_and_say_where_it_goes_otherwise(tmp_path):
    (one,) = await play(tmp_path, lambda _: ExpertPlayer())
    assert one.success
    assert one.note is None
    assert one.turns[0].text == "Thought: 1 comes next.\nAction: up"


async def test_experts_without_thoughts_only_act(tmp_path):
    (one,) = await play(tmp_path, lambda _: ExpertPlayer(thoughts=False))
    assert [turn.text for turn in one.turns] == ["Action: up"] * 3


async def test_a_replay_that_reads_something_else_is_noted(tmp_path, monkeypatch):
    class Misremembering(ExpertPlayer):
        async def prepare(self, episode, env):
            await super().prepare(episode, env)
            self._solution[1] = self._solution[1]._replace(observation="seven")

    (one,) = await play(tmp_path, lambda _: Misremembering())
    assert one.note == "replay differs after turn 1"


async def test_chance_is_seeded_by_the_episode(tmp_path):
    tasks = [f"toy:train:{number}" for number in range(3)]
    first = await play(tmp_path / "a", lambda _: RandomPlayer(), tasks=tasks)
    second = await play(tmp_path / "b", lambda _: RandomPlayer(), tasks=tasks[::-1], slots=1)
    acted = [{one.id: [turn.action for turn in one.turns] for one in found} for found in (first, second)]
    assert acted[0] == acted[1]
    assert all(action in ("up", "down") for actions in acted[0].values() for action in actions)
