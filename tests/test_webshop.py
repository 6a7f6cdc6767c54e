"""The environment `webshop`: its contract, splits, experts, official data, and the pages of a server."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from envs import SPLITS
from envs.pool import EnvPool
from envs.webshop import STEP_LIMIT, Settings, WebShop
from envs.webshop.expert import Customer, queries, wish_of
from envs.webshop.reward import english_nouns, tagger
from envs.webshop.server import serving
from envs.webshop.settings import Mistake
from envs.webshop.shop import open_shop
from envs.webshop.tasks import check, content_id, split
from envs.webshop.text import WebShopText
from pipeline.config import PlayConfig
from pipeline.experts import keep_training_tasks, read_official
from pipeline.play import Episode, play_episodes
from pipeline.react import action_of
from pipeline.recipe import load
from pipeline.records import EpisodeStatus, JsonlAppender, Trajectory, read_jsonl
from tests.env_checker import check_env
from tests.official_webshop import RECORDINGS, SEED, lines, recorded
from tests.planned import Planned

SIZES = {"products": 400, "seen_goals": 30, "unseen_goals": 20}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a catalogue; its path has a space."""
    return tmp_path_factory.mktemp("a shop")


@pytest.fixture
def settings(home, monkeypatch):
    monkeypatch.chdir(home)
    return Settings(**SIZES)


@pytest.fixture
def env(settings):
    with WebShop(settings) as env:
        yield env


def play(env, task, actions):
    env.reset(options={"task": task})
    return [env.step(action) for action in actions]


class TestContract:
    def test_it_keeps_every_promise_of_an_environment(self, settings):
        env = WebShop(settings)
        check_env(env, env.tasks("train")[0])

    def test_an_episode_ends_after_ten_steps_with_no_reward(self, env):
        steps = play(env, env.tasks("train")[0], ["search[lamp]"] * STEP_LIMIT)
        assert [truncated for *_, truncated, _ in steps] == [False] * 9 + [True]
        assert steps[-1][4] == {"reward": 0.0, "success": False, "valid": True}

    def test_any_purchase_ends_an_episode_and_only_a_full_reward_is_a_success(self, env):
        task = env.tasks("train")[0]
        wrong = next(one for one in env.tasks("train") if env.kind(one) != env.kind(task))
        bought = [step.action for step in env.expert(wrong)]
        observation, reward, terminated, _, info = play(env, task, bought)[-1]
        assert terminated
        assert reward == info["reward"] < 1
        assert not info["success"]
        assert observation.startswith("Thank you for shopping with us!")

    def test_where_the_official_code_raises_the_page_stays(self, env):
        task = env.tasks("train")[0]
        before = play(env, task, ["search[lamp]"])[0][0]
        (_, (observation, reward, _, _, info)) = play(env, task, ["search[lamp]", "search[<a> odd]"])
        assert observation == before
        assert reward == 0
        assert not info["valid"]

    def test_random_players_can_search_and_click_all_that_is_there(self, env):
        task = env.tasks("train")[0]
        env.reset(options={"task": task})
        (search,) = env.valid_actions()
        assert search.startswith("search[")
        env.step(search)
        assert {"click[back to search]", "click[next >]"} < set(env.valid_actions())
        assert len(env.valid_actions()) == 12

    def test_environments_of_a_process_share_one_shop(self, settings):
        first, second = WebShop(settings), WebShop(settings)
        assert first._shop is second._shop

    def test_a_task_of_another_draw_is_refused(self, settings):
        task = WebShop(settings).tasks("train")[0]
        with WebShop(settings.model_copy(update={"draw_seed": 5})) as other:
            assert other.tasks("train")[0] != task
            with pytest.raises(ValueError, match="of this catalogue and draw"):
                for one in WebShop(settings).tasks("train"):
                    other.reset(options={"task": one})

    def test_notes_name_the_tagger(self, settings):
        assert english_nouns().name == tagger()
        assert tagger() in WebShop.notes(settings)[0]
        assert tagger() in WebShop.fingerprint(settings)


class TestDraws:
    def test_two_processes_would_draw_the_same(self, settings):
        first = open_shop(settings)
        kept = list(Path("data/webshop").glob("*-goals-*/goals.json"))
        assert kept
        open_shop.__globals__["_opened"].cache_clear()
        again = open_shop(settings)
        assert again is not first
        assert again.goals == first.goals
        assert dict(again.prices) == dict(first.prices)
        assert again.random_state == first.random_state

    def test_a_missing_folder_is_one_sentence(self, tmp_path):
        with pytest.raises(ValueError, match=r"env\.webshop\.data: no folder .*nowhere\. It has to hold"):
            WebShop(Settings(data=tmp_path / "nowhere"))

    def test_human_goals_need_their_file(self, settings, tmp_path):
        open_shop(settings)
        (made,) = Path("data/webshop").glob("generated-*/items_shuffle.json")
        for name in ("items_shuffle.json", "items_ins_v2.json"):
            (tmp_path / name).write_bytes((made.parent / name).read_bytes())
        with pytest.raises(ValueError, match=r"no items_human_ins.json.*human_goals=false"):
            WebShop(Settings(data=tmp_path))
        with WebShop(Settings(data=tmp_path, human_goals=False, limit_goals=200)) as env:
            assert len(env._shop.goals) == 200
            assert env.tasks("unseen")

    def test_keys_of_our_own_catalogue_have_no_place_beside_official_files(self):
        with pytest.raises(ValueError, match="products is for our own catalogue"):
            Settings(data="somewhere", products=500)


class TestSplits:
    def test_ours_share_no_product_and_unseen_shares_no_category(self, env):
        goals = env._shop.goals
        numbers = {name: [int(task.split("-")[1]) for task in env.tasks(name)] for name in SPLITS}
        products = [{goals[number]["asin"] for number in numbers[name]} for name in SPLITS]
        assert not products[0] & products[1] | products[0] & products[2] | products[1] & products[2]
        categories = [{goals[number]["product_category"] for number in numbers[name]} for name in SPLITS]
        assert not categories[0] & categories[2]
        assert categories[1] <= categories[0]
        assert [len(numbers[name]) for name in ("seen", "unseen")] == [30, 20]
        assert len(categories[2]) >= 5

    def test_sizes_are_the_most_of_each_split(self, settings):
        goals = open_shop(settings).goals
        whole = split(goals, settings).goals
        small = split(goals, settings.model_copy(update={"train_goals": 10, "unseen_goals": 5})).goals
        assert small["train"] == whole["train"][:10]
        assert small["unseen"] == whole["unseen"][:5]

    def test_tests_are_of_as_many_products_where_a_product_has_many_goals(self, settings):
        """Synthetic goals, one for each combination of a product's options."""
        synthetic = settings.model_copy(update={"human_goals": False})
        goals = open_shop(synthetic).goals
        found, human = split(goals, synthetic).goals, split(open_shop(settings).goals, settings).goals
        asins = {name: [goals[number]["asin"] for number in numbers] for name, numbers in found.items()}
        assert len(asins["train"]) > 3 * len(set(asins["train"]))
        assert [len(set(asins[name])) for name in ("seen", "unseen")] == [30, 20] == [len(found["seen"]), 20]
        check(goals, found, products=True)
        told = set(asins["seen"])
        assert told == {open_shop(settings).goals[number]["asin"] for number in human["seen"]}
        others = sum(goal["asin"] in told for goal in goals) - 30
        assert f"Goals for a product that another goal tests, left out of train: {others}." in WebShop.notes(synthetic)

    def test_leaks_are_refused(self, settings):
        goals = open_shop(settings).goals
        found = split(goals, settings).goals
        with pytest.raises(ValueError, match="share a category"):
            check(goals, found | {"unseen": found["train"][:1]}, products=True)
        with pytest.raises(ValueError, match=r"train and seen goals share the product"):
            check(goals, found | {"seen": found["train"][:1]}, products=True)

    def lists(self, folder, train, test):
        (folder / "train_indices.json").write_text(json.dumps(train))
        (folder / "test_indices.json").write_text(json.dumps(test))
        return folder

    def test_official_lists_are_played_as_they_are_but_for_what_overlaps(self, settings, tmp_path):
        chosen = settings.model_copy(update={"splits": self.lists(tmp_path, [5, 9, 9, 3, 7, 8], [7, 30, 31])})
        with WebShop(chosen) as env:
            goals = env._shop.goals
            assert env.tasks("train") == [content_id(number, goals[number]) for number in (5, 9, 3, 8)]
            assert env.tasks("seen") == [content_id(number, goals[number]) for number in (7, 30, 31)]
            assert env.tasks("unseen")
        notes = WebShop.notes(chosen)
        assert "Goals in the train list twice, left out of train: 1." in notes
        assert "Goals in the train and the test list, left out of train: 1." in notes
        assert WebShop.relevant(chosen, "seen") != WebShop.relevant(settings, "seen")

    @pytest.mark.parametrize(
        ("contents", "complaint"),
        [("[1, 2", "is no list"), ('["1"]', "is no list"), ("[4000]", "no goal 4000; this catalogue has goals 0 to")],
    )
    def test_bad_lists_are_named(self, settings, tmp_path, contents, complaint):
        (self.lists(tmp_path, [1], [2]) / "test_indices.json").write_text(contents)
        with pytest.raises(ValueError, match=rf"test_indices\.json.* {complaint}"):
            WebShop(settings.model_copy(update={"splits": tmp_path}))

    def test_a_folder_without_lists_is_named(self, settings, tmp_path):
        with pytest.raises(ValueError, match=r"train_indices\.json is no list .*\(No such file"):
            WebShop(settings.model_copy(update={"splits": tmp_path}))


class TestExperts:
    def test_they_earn_all_there_is_in_the_embedded_catalogue(self, env):
        for task in env.tasks("train")[:150] + env.tasks("seen") + env.tasks("unseen"):
            steps = env.expert(task)
            ends = play(env, task, [step.action for step in steps])
            assert [end[0] for end in ends] == [step.observation for step in steps]
            assert all(end[4]["valid"] for end in ends)
            assert ends[-1][4]["success"], task

    def test_they_buy_what_synthetic_goals_ask_for(self, settings):
        with WebShop(settings.model_copy(update={"human_goals": False})) as env:
            for task in env.tasks("train")[:50]:
                ends = play(env, task, [step.action for step in env.expert(task)])
                assert all(end[4]["valid"] for end in ends)
                assert ends[-1][4]["reward"] > 0.5, task

    def test_they_search_for_the_instruction_as_it_stands_less_the_price(self, env):
        for task in env.tasks("train")[:40]:
            instruction = env._shop.goals[int(task.split("-")[1])]["instruction_text"]
            query = env.expert(task)[0].action[len("search[") : -1]
            assert re.fullmatch(re.escape(query) + r"[ .]*, and price lower than [\d.]+ dollars", instruction)

    def test_thoughts_follow_from_the_goal_and_from_the_page(self, env):
        task = next(one for one in env.tasks("train") if len(env.expert(one)) == 5)
        goal = env._shop.goals[int(task.split("-")[1])]
        search, look, first, _, buy = env.expert(task)
        assert search.thought == "I search for what I am to buy."
        assert look.thought == f"{goal['asin']} may be it, so I open it."
        assert first.thought.endswith(f": {goal['goal_options'][0]}. I choose it.")
        assert first.thought.partition(":")[0] in ("color", "size", "scent", "style", "flavor name", "fit type")
        assert buy.thought.endswith(f", lower than {goal['price_upper']:.2f} dollars. I buy it.")

    def test_noise_makes_near_misses_and_nothing_else(self, settings):
        with WebShop(settings.model_copy(update={"noise": 1.0})) as env:
            rewards = []
            for task in env.tasks("train")[:60]:
                *_, (_, _, terminated, _, info) = play(env, task, [step.action for step in env.expert(task)])
                assert terminated
                rewards.append(info["reward"])
            assert env.expert(task) == env.expert(task)
        assert sum(reward < 1 for reward in rewards) > 30
        assert sum(rewards) / len(rewards) > 0.4

    def test_of_the_mistakes_some_can_be_asked_for(self, settings):
        hasty = settings.model_copy(update={"noise": 1.0, "mistakes": ["no option"]})
        with WebShop(settings) as careful, WebShop(hasty) as env:
            for task in env.tasks("train")[:20]:
                chosen = [step for step in careful.expert(task) if step.thought.endswith("I choose it.")]
                left = [step for step in careful.expert(task) if step not in chosen]
                assert [step.action for step in env.expert(task)] == [step.action for step in left]

    @pytest.mark.parametrize("mistake", get_args(Mistake))
    def test_each_mistake_is_what_it_says(self, env, mistake):
        task = next(one for one in env.tasks("train") if len(env.expert(one)) == 5)
        text = WebShopText(env._shop)
        text.reset(int(task.split("-")[1]))
        customer = Customer(text.goal, STEP_LIMIT, random.Random(0), mistake)
        while text.purchase is None:
            text.step(customer.next(text.page)[1])
        right = text.purchase.asin == text.goal["asin"]
        assert right == (mistake != "another product")
        if mistake == "no option":
            assert text.purchase.options == {}
        if mistake == "another option":
            assert not set(text.purchase.options.values()) & set(text.goal["goal_options"])

    @pytest.mark.parametrize(
        ("instruction", "wish"),
        [
            ("i am looking for a red mug, and price lower than 20.00 dollars", "a red mug"),
            ("please find me socks that are black.", "socks that are black"),
            ("i would like to buy some tea", "tea"),
            ("place order for a pack of 12 almonds", "place order for a pack of 12 almonds"),
            ("i need", "i need"),
        ],
    )
    def test_wishes(self, instruction, wish):
        assert wish_of(instruction) == wish

    def test_other_words_are_tried_where_the_product_is_not_found(self, env):
        goal = dict(env._shop.goals[0])
        assert len(queries(goal)) >= 2
        text = WebShopText(env._shop)
        text.reset(0)
        customer = Customer({**goal, "asin": "B0NOWHERE0"}, STEP_LIMIT, random.Random(0))
        actions = []
        while text.purchase is None and len(actions) < STEP_LIMIT:
            actions.append(customer.next(text.page)[1])
            text.step(actions[-1])
        assert actions.count("click[Back to Search]") >= 1
        assert len({action for action in actions if action.startswith("search[")}) >= 2
        assert text.purchase, "it buys something in the end"


class TestOfficialData:
    @pytest.fixture
    def published(self, env, tmp_path):
        """A trajectory as ETO publishes them, whose price ceiling another process drew."""
        task = env.tasks("train")[0]
        text, _ = env.reset(options={"task": task})
        lines = [("human", "You are web shopping."), ("gpt", "OK"), ("human", text)]
        for step in env.expert(task):
            lines += [("gpt", f"Thought: {step.thought}\nAction: {step.action}")]
            lines += [("human", f"Observation:\n{step.observation}")]
        told = json.dumps([{"from": speaker, "value": value} for speaker, value in lines])
        told = told.replace(f"{env._goal['price_upper']:.2f}", "12345.00")
        path = tmp_path / "webshop_sft.json"
        path.write_text(f'[{{"id": "webshop_7", "conversations": {told}, "reward": 0.75}}]')
        return task, path

    async def test_it_is_read_by_its_instruction_and_kept(self, settings, published):
        task, path = published
        sizes = [f"env.webshop.{key}={value}" for key, value in SIZES.items()]
        config = load("tiny", ["env=webshop", f"experts.source={path}", "workers.processes=1", *sizes])
        ((one,), _) = read_official(WebShop, config.env.webshop, path)
        assert one.id == task
        assert one.reward == 0.75
        assert not one.success
        assert one.turns[0].observation.startswith("Instruction: [SEP]")
        kept, facts = await keep_training_tasks(config, WebShop, [one])
        assert [one.kind for one in kept] == [WebShop(settings).kind(task)]
        assert facts["replays_that_differ"] == [task]  # another ceiling is another text

    def test_data_of_another_catalogue_are_refused(self, settings):
        task = {"value": "WebShop [SEP] Instruction: [SEP] a ghost [SEP] Search"}
        item = {"id": "webshop_3", "conversations": [{}, {}, task]}
        with pytest.raises(ValueError, match=r"0 goals of this catalogue have its instruction 'a ghost'"):
            WebShop.official_id(item, settings)


class TestServed:
    """Pages of a server instead of the process's own."""

    def test_episodes_are_the_same_over_http(self, env, settings):
        with serving(open_shop(settings)) as url, WebShop(settings.model_copy(update={"url": url})) as remote:
            for task in env.tasks("train")[:5] + env.tasks("unseen")[:2]:
                actions = ["click[nothing]", *(step.action for step in env.expert(task))]
                assert remote.reset(options={"task": task}) == env.reset(options={"task": task})
                for action in actions:
                    assert remote.valid_actions() == env.valid_actions()
                    assert remote.step(action) == env.step(action)

    @pytest.mark.slow
    async def test_a_site_killed_in_mid_episode_costs_the_episode_one_retry_and_is_recorded_once(self, env, tmp_path):
        """The other episode, begun while the site was there, has ended before."""
        command = [sys.executable, "-m", "envs.webshop.server", "port=0", f"products={SIZES['products']}"]
        site = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        url = site.stdout.readline().split()[2]
        tasks = env.tasks("train")[:2]
        plans = {task: [step.action for step in env.expert(task)] for task in tasks}

        class Killing(Planned):
            async def reply(self):
                if self.episode.task == tasks[1] and not site.returncode and self.played == 1:
                    site.kill()
                    site.wait()
                return await super().reply()

        settings = Settings(**SIZES, url=url)
        episodes = [Episode(task=task, kind="", split="train", policy="sft", seed=0) for task in tasks]
        with JsonlAppender(tmp_path / "episodes.jsonl") as appender:
            async with EnvPool(WebShop, settings, workers=1, slots=1, timeout=60) as pool:
                await play_episodes(
                    pool, episodes, lambda _: Killing(plans), PlayConfig(), appender, example=False, label="killed"
                )
        first, second = read_jsonl(tmp_path / "episodes.jsonl", Trajectory)
        assert (first.id, first.success) == (tasks[0], True)
        assert (second.id, second.status) == (tasks[1], EpisodeStatus.ENV_ERROR)
        assert "the connection failed, in 6 attempts" in second.note

    def test_a_site_of_another_catalogue_is_noticed(self, settings):
        other = settings.model_copy(update={"catalogue_seed": 1})
        with (
            serving(open_shop(other)) as url,
            WebShop(settings.model_copy(update={"url": url})) as remote,
            pytest.raises(ValueError, match="has another goal under number"),
        ):
            remote.reset(options={"task": remote.tasks("train")[0]})


@recorded
class TestRecordedCatalogue:
    def test_experts_shop_well_among_odd_products_too(self, home, monkeypatch):
        monkeypatch.chdir(home)
        with WebShop(Settings(data=RECORDINGS / "catalogue_main")) as env:
            tasks = [task for split in SPLITS for task in env.tasks(split)]
            rewards = [play(env, task, [step.action for step in env.expert(task)])[-1][4]["reward"] for task in tasks]
        assert len(rewards) > 250
        assert sum(rewards) / len(rewards) > 0.89

    def test_etos_episodes_read_as_recorded(self, home, monkeypatch):
        """Observations, rewards and ends of what goes through its wrapper; its answers to replies without an action are
        its own."""
        monkeypatch.chdir(home)
        steps = 0
        with WebShop(Settings(data=RECORDINGS / "catalogue_main", draw_seed=SEED)) as env:
            for line in lines("traces_eto.jsonl"):
                if line["step"] == 0:
                    number = line["session"]
                    text, _ = env.reset(options={"task": content_id(number, env._shop.goals[number])})
                    assert text == line.get("task_message", text)
                elif line["step"] != "to_dict":
                    action = action_of(line["llm_output"])
                    observation, reward, terminated, truncated, _ = env.step(action)
                    if action:
                        assert line["returned"].removeprefix("Observation:\n") == observation
                        steps += 1
                    assert (terminated or truncated) == line["finished"]
                    assert reward == (line["reward"] or 0)
        assert steps > 20
