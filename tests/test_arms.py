from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline import arms, choose, fetch, jobs, runs
from pipeline.config import Config, choices_of
from pipeline.methods import Discount, Method
from pipeline.recipe import RECIPES, load
from pipeline.records import write_jsonl
from pipeline.train import successes
from tests.synthetic_run import play
from tests.test_records import trajectory

BASE = Path("runs/study/sciworld/seed0")


def recipe(**tree):
    return Config.model_validate({"run": "study", **tree})


def arm(name, **tree):
    return next(one for one in arms.of(recipe(**tree)) if one.name == name)


def test_policy_0_comes_first_and_each_method_once():
    config = recipe(method=["dmpo", "sft", "rft"], arms={"far": {"method": "dmpo", "train.beta": 0.5}})
    assert [one.name for one in arms.of(config)] == ["sft", "dmpo", "rft", "far"]
    assert [one.name for one in arms.trained(config)] == ["dmpo", "rft", "far"]
    assert [one.name for one in arms.preferring(config)] == ["dmpo", "far"]
    assert arms.of(config)[-1].config.train.beta == 0.5
    assert config.train.beta == 0.1


@pytest.mark.parametrize("method", Method)
def test_a_method_is_a_weight_table_or_none(method):
    assert (method.discount is None) == (method in {"sft", "bon", "rft"})
    assert method.is_trained == (method not in {"sft", "bon"})


def test_dpo_is_also_called_by_its_weights():
    assert recipe(method=["trajectory"]).method == [Method.DPO]
    assert Method.DPO.discount == Method.ETO.discount == Discount.TRAJECTORY


@pytest.mark.parametrize(
    ("keys", "own"),
    [
        ({"train.beta": 0.5}, ["train"]),
        ({"pairs.min_gap": 0.5}, ["pairs", "reference", "train"]),
        ({"rollout.samples": 4}, ["rollout", "pairs", "reference", "train"]),
        ({"model.hidden": 128}, ["sft", "rollout", "pairs", "reference", "train"]),
        ({"env.sciworld.train_variations": 9}, ["experts", "sft", "rollout", "pairs", "reference", "train"]),
        ({"evaluate.tasks": 3}, []),
    ],
)
def test_an_arm_shares_the_stages_that_its_keys_leave_alone(keys, own):
    plain, other = (arm("x", arms={"x": {"method": "dmpo", **more}}) for more in ({}, keys))
    stages = ["experts", "sft", "rollout", "pairs", "reference", "train"]
    differ = [one for one in stages if plain.folder("sciworld", 0, one) != other.folder("sciworld", 0, one)]
    assert differ == own
    assert other.folder("sciworld", 0, "evaluate") == BASE / "evaluate" / "x"


def test_arms_with_the_same_keys_share_what_they_change():
    config = recipe(arms={name: {"method": name, "model.hidden": 128} for name in ("dpo", "mean")})
    first, second = arms.preferring(config)[1:]
    assert (
        first.folder("sciworld", 0, "sft") == second.folder("sciworld", 0, "sft") == BASE / "arms/model.hidden=128/sft"
    )
    assert first.policy("sciworld", 0, 0) == first.folder("sciworld", 0, "sft")
    assert first.policy("sciworld", 0) == BASE / "train/dpo"


def test_policy_0_is_evaluated_by_the_engine_that_explores_only_where_it_plays_the_same_way():
    keys = {
        "hot": {"method": "dmpo", "play.max_tokens": 9},
        "shifted": {"method": "sft", "evaluate.env": {"example": False}},
    }
    every = {one.name: one for one in arms.of(recipe(method=["dmpo", "bon"], arms=keys))}

    def explorers(name):
        folder = every[name].folder("sciworld", 0, "rollout")
        return [one.name for one in every.values() if one.is_explorer_of(folder, "sciworld", 0)]

    assert explorers("dmpo") == ["sft", "bon"]
    assert explorers("hot") == []


def test_arms_that_share_pairs_make_them_once():
    config = recipe(method=["dpo", "dmpo"], arms={"strict": {"method": "dmpo", "pairs.min_gap": 0.5}})
    made = [one.folder("sciworld", 0, "pairs", number) for one, number in arms.pairings(config, "sciworld", 0, "pairs")]
    assert made == [BASE / "pairs", BASE / "arms/pairs.min_gap=0.5/pairs"]


def test_step_has_pairs_of_its_own():
    config = recipe(method=["dpo", "step"])
    folders = [one.folder("sciworld", 0, "pairs") for one in arms.preferring(config)]
    assert folders == [BASE / "pairs", BASE / "arms/method=step/pairs"]


def test_an_iterated_arm_has_folders_for_its_rounds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    eto = arm("eto", method=["eto"], train={"rounds": 3})
    assert (eto.rounds, arm("eto", method=["eto"]).rounds, arm("dmpo", method=["dmpo"]).rounds) == (3, 2, 1)
    places = [eto.folder("sciworld", 0, "rollout", number) for number in (1, 2, 3)]
    assert places == [BASE / "rollout", BASE / "rounds/eto/2/rollout", BASE / "rounds/eto/3/rollout"]
    policies = [eto.policy("sciworld", 0, number) for number in (0, 1, 2, 3)]
    assert policies == [BASE / "sft", BASE / "rounds/eto/1/train", BASE / "rounds/eto/2/train", BASE / "train/eto"]
    assert eto.open_rounds("sciworld", 0) == [1]
    with runs.stage(places[1], settings={}):
        pass
    assert eto.open_rounds("sciworld", 0) == [1, 2]


def test_an_arm_is_compared_with_the_policy_that_it_began_from():
    small = {"model.hidden": 128}
    shifted = {"evaluate.env": {"sciworld.simplification": ""}}
    config = recipe(
        method=["dmpo"],
        arms={
            "small-sft": {"method": "sft", **small},
            "small": {"method": "dmpo", **small},
            "shifted-sft": {"method": "sft", **shifted},
            "shifted": {"method": "dmpo", **shifted},
        },
    )
    every = arms.of(config)
    assert {one.name: arms.baseline(one, every).name for one in every if one.method == "dmpo"} == {
        "dmpo": "sft",
        "small": "small-sft",
        "shifted": "shifted-sft",
    }


@pytest.mark.parametrize("study", ["shift", "shift-webshop", "shift-alfworld"])
def test_a_shift_is_of_what_is_evaluated_alone(study):
    config = load(f"study/{study}")
    every = arms.of(config)
    shifted = [one for one in every if one.name in config.arms]
    assert {one.method for one in shifted} == {one.method for one in every}
    assert all(one.config.env == config.env != one.config.when_evaluated.env for one in shifted)
    assert {arms.baseline(one, every).name for one in shifted[1:]} == {shifted[0].name}
    trained = {(one.method, one.policy(env, 0)) for env in config.env.names for one in every}
    assert len(trained) == len(shifted)


def test_what_the_shift_to_official_games_needs_can_be_fetched():
    config, comment = load("study/shift-alfworld"), (RECIPES / "study" / "shift-alfworld.yaml").read_text()
    (data,) = {one["evaluate.env"]["alfworld.data"] for one in config.arms.values()}
    name = Path(data).name
    assert f"pipeline fetch {name}\n" in comment
    assert {file.into for file in fetch.load()[name].files} == {name}


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        ({"sft": {"method": "dmpo"}}, "arms.sft: the run has a policy of this name already"),
        ({"x": {"train.beta": 0.5}}, "arms.x: an arm has one method"),
        ({"x": {"method": ["dmpo", "dpo"]}}, "arms.x: an arm has one method"),
        ({"x": {"method": "dmpo", "seed": [1]}}, "arms.x: seed is the whole run's"),
        ({"x": {"method": "dmpo", "train.betta": 1}}, "arms.x: unknown key 'train.betta'; did you mean 'train.beta'?"),
        ({"x": {"method": "dmpo", "choose": {"train.gamma": [0.5]}}}, "arms.x: choose needs a dev split"),
        ({"x": {"method": "dmpo", "evaluate.env": {"sciworld.nothing": 1}}}, "arms.x: unknown key"),
        ({"../x": {"method": "dmpo"}}, "arms"),
    ],
)
def test_an_arm_that_cannot_be_is_one_sentence(tmp_path, named, complaint):
    path = tmp_path / "study.yaml"
    path.write_text(f"arms: {named}")
    with pytest.raises(ValueError) as error:
        load(str(path))
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"method": "dpo", "train.gamma": 0.9}, "train.gamma has no effect: method=dpo makes no use of it"),
        ({"method": "mean", "train.gamma": 0.9}, "train.gamma has no effect: method=mean makes no use of it"),
        ({"method": "bon", "train.beta": 3}, "train.beta has no effect: method=bon makes no use of it"),
        ({"method": "sft", "train.nll": 0.5}, "train.nll has no effect: method=sft makes no use of it"),
        ({"method": "sft", "bon.samples": 3}, "bon.samples has no effect: method=sft makes no use of it"),
        ({"method": "step", "pairs.corrupted": 0.5}, "makes no use of it without step.with_trajectories"),
        ({"method": "dmpo", "train.reference": "kept"}, "train.reference has no effect: train.rounds is 1"),
        ({"method": "eto", "train.rounds": 1}, "train.rounds has no effect: eto has at least two rounds"),
        ({"method": "dmpo", "train.epochs": 2, "train.max_steps": 9}, "train.epochs has no effect: train.max_steps=9"),
        ({"method": "dmpo", "pairs.corruption": "random"}, "pairs.corruption has no effect: pairs.corrupted is 0"),
        ({"method": "dmpo", "env.webshop.products": 200}, "env.webshop.products has no effect: the run plays sciworld"),
        (
            {"method": "sft", "evaluate.env": {"webshop.products": 200}},
            "evaluate.env has no effect: the run plays sciworld",
        ),
        (
            {"method": "dpo", "choose": {"train.gamma": [0.5, 0.9]}},
            "train.gamma has no effect: method=dpo makes no use of it",
        ),
        ({"method": "dpo", "choose": {"train.beta": [0.5, 0.5]}}, "choose: train.beta has the same value twice"),
    ],
)
def test_a_key_that_makes_no_difference_to_its_arm_is_refused(keys, reason):
    with pytest.raises(ValidationError, match=reason):
        recipe(env={"dev_tasks": 9}, arms={"x": keys})


def test_a_key_that_one_of_the_candidates_uses_is_accepted():
    keys = {"method": "step", "pairs.limit": 9, "choose": {"step.with_trajectories": [False, True]}}
    assert len(arm("x", env={"dev_tasks": 9}, arms={"x": keys}).candidates) == 2


def test_candidates_are_every_combination_of_values():
    own, grid = choices_of({"method": "dmpo", "choose": {"train.gamma": [0.1, 0.9], "train.beta": [1]}})
    assert own == {"method": "dmpo"}
    assert grid == [{"train.gamma": 0.1, "train.beta": 1}, {"train.gamma": 0.9, "train.beta": 1}]
    with pytest.raises(ValueError, match="choose: name keys"):
        choices_of({"choose": ["train.gamma"]})


def test_the_best_on_dev_is_chosen_the_first_of_equal_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = {"method": "dmpo", "choose": {"train.gamma": [0.1, 0.5, 0.9]}}
    picked = arm("picked", env={"dev_tasks": 2}, arms={"picked": keys})
    assert [one.name for one in picked.candidates] == [f"picked@train.gamma={gamma}" for gamma in (0.1, 0.5, 0.9)]

    for candidate, reward in zip(picked.candidates, (0.2, 0.6, 0.6), strict=True):
        job = jobs.on_dev(candidate, "sciworld", 0)
        assert job.split == "dev"
        with runs.stage(job.folder, settings={}):
            write_jsonl(job.folder / runs.EPISODES, [trajectory(id=f"t:{number}", reward=reward) for number in (0, 1)])

    assert choose.best(picked, "sciworld", 0).name == "picked@train.gamma=0.5"
    manifest = runs.read_manifest(BASE / "choose/picked", "evaluate")
    assert manifest["facts"]["notes"].startswith("picked@train.gamma=0.5 was chosen by its reward on dev (")
    assert choose.best(picked, "sciworld", 0).config.train.gamma == 0.5
    assert choose.chosen(picked, "sciworld", 0).name == "picked@train.gamma=0.5"
    assert choose.chosen(picked.candidates[0], "sciworld", 0) is picked.candidates[0]
    other = arm("picked", env={"dev_tasks": 2}, arms={"picked": keys | {"choose": {"train.gamma": [0.7]}}})
    with pytest.raises(ValueError, match=r"names picked@train.gamma=0.5, no candidate of picked now; run .*`evaluate`"):
        choose.chosen(other, "sciworld", 0)


def test_rft_learns_from_each_different_success_once():
    good = [play("sft", "train", 0, task) for task in (0, 1)]
    for one in good:
        one.reward = 1.0
    low = play("sft", "train", 0, 2)
    low.reward = 0.9
    kept, counts = successes([*good, good[0], low], 1.0)
    assert kept == good
    assert counts["own_trajectories"] == 2
    assert counts["dropped"] == {"reward below rft.min_reward": 1, "the same as another of the task": 1}
    assert successes(good, None) == ([], {"own_trajectories": 0})


def test_a_policy_that_learns_from_the_other_environments():
    keys = {"method": "dmpo", "env.others": True}
    other = arm("other", env={"names": ["sciworld", "webshop", "alfworld"]}, arms={"other": keys})
    assert other.sources("webshop") == ["sciworld", "alfworld"]
    assert other.explored("sciworld", 0) == {
        f"rollout in {env}": BASE / "arms/env.others=True/rollout" / env for env in ("webshop", "alfworld")
    }
    assert arms.baseline(other, arms.of(other.config)).name == "sft"


def test_each_stage_that_arms_share_is_made_once():
    tree = {"model": {"hidden": 64}, "arms": {
        "small": {"method": "sft", "model.hidden": 32},
        "small-dpo": {"method": "dpo", "model.hidden": 32},
        "beta": {"method": "dpo", "train.beta": 1.0},
    }}  # fmt: skip
    made = arms.sharing(recipe(**tree), "sciworld", 0, "sft")
    assert {one.folder("sciworld", 0, "sft"): one.config.model.hidden for one in made} == {
        BASE / "sft": 64,
        BASE / "arms/model.hidden=32/sft": 32,
    }
    assert len(arms.sharing(recipe(**tree), "sciworld", 0, "experts")) == 1


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"arms": {"a": {"method": "sft", "env.others": True}}}, "the run plays one environment"),
        (
            {
                "env": {"names": ["sciworld", "webshop"]},
                "arms": {"a": {"method": "sft", "env.others": True, "env.sciworld.heap_mb": 300}},
            },
            "leave env.sciworld.heap_mb out",
        ),
    ],
)
def test_other_environments_that_cannot_be(tree, message):
    with pytest.raises(ValidationError, match=message):
        recipe(**tree)
