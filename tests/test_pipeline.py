"""The whole way of the data on real simulators with real vLLM."""

import json
import shutil

import pytest

from pipeline.__main__ import STAGES
from pipeline.records import Pair, Trajectory, read_jsonl
from tests.stages import rewards, run, run_whole, seed_folder

pytestmark = [pytest.mark.java, pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A work folder in which every stage has run once, and what they printed."""
    return run_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def others(finished):
    """The same folder with a run of the other two environments, which one engine plays, and what was printed last."""
    folder, _ = finished
    keys = ("env=alfworld,webshop", "run=others", "model.max_length=2048", "sft.epochs=10", "train.epochs=1")
    for stage in STAGES:
        printed = run(folder, stage, *keys)
    return folder, printed


def test_alfworld_goes_the_same_way(others):
    """Games generated, checked, solved, learned, explored, paired, trained on and evaluated."""
    folder, printed = others
    table = [row for row in rewards(folder, "others") if row["env"] == "alfworld"]
    assert {(row["method"], row["split"]) for row in table} == {
        (method, split) for method in ("random", "expert", "sft", "dmpo") for split in ("seen", "unseen")
    }
    assert all(row["n"] == "3" for row in table)
    assert all(float(row["reward"]) == 0 for row in table if row["method"] == "random")
    assert "alfworld" in printed
    experts = read_jsonl(folder / "runs/others/alfworld/seed0/experts/episodes.jsonl", Trajectory)
    assert experts
    assert all(one.success and len(one.turns) <= 40 and one.note is None for one in experts)
    manifest = json.loads((folder / "runs/others/alfworld/seed0/experts/manifest.json").read_text())
    assert manifest["packages"]["textworld"] == "1.7.0"
    assert "generated" in json.dumps(manifest["settings"])


def test_webshop_goes_the_same_way(others):
    """A catalogue made, indexed, shopped in by experts, learned, explored, paired, trained on and evaluated."""
    folder, printed = others
    table = [row for row in rewards(folder, "others") if row["env"] == "webshop"]
    assert {(row["method"], row["split"]) for row in table} == {
        (method, split) for method in ("random", "expert", "sft", "dmpo") for split in ("seen", "unseen")
    }
    assert all(float(row["reward"]) == 1 for row in table if row["method"] == "expert")
    assert "seen bought" in printed
    base = folder / "runs/others/webshop/seed0"
    experts = read_jsonl(base / "experts/episodes.jsonl", Trajectory)
    assert len(experts) == 10
    assert all(one.success and one.note is None and one.kind for one in experts)
    manifest = json.loads((base / "experts/manifest.json").read_text())
    assert "PatternTagger" in json.dumps(manifest["settings"])
    assert "PatternTagger" in (folder / "runs/others/report.html").read_text()


def test_the_run_ends_in_a_table_a_csv_and_a_page(finished):
    folder, printed = finished
    table = rewards(folder)
    columns = [
        "env",
        "method",
        "split",
        "seed",
        "n",
        "reward",
        "reward_se",
        "success",
        "success_se",
        "steps",
        "invalid_rate",
        "steps_se",
        "invalid_rate_se",
        "steps_to_success",
        "steps_to_success_se",
    ]
    assert list(table[0]) == columns
    assert {(row["method"], row["split"]) for row in table} == {
        (method, split) for method in ("random", "expert", "sft", "dmpo") for split in ("seen", "unseen")
    }
    assert all(row["n"] == "6" for row in table)
    assert all(float(row["reward"]) == 1.0 for row in table if row["method"] == "expert")
    assert "dmpo" in printed["report"]
    assert (folder / "runs" / "smoke" / "report.html").stat().st_size > 10_000


def test_what_the_policy_said_is_what_the_engine_returned(finished):
    from transformers import AutoTokenizer

    from pipeline.rendering import Renderer

    folder = seed_folder(finished[0])
    renderer = Renderer(AutoTokenizer.from_pretrained(folder / "sft" / "policy"))
    trajectories = read_jsonl(folder / "rollout" / "episodes.jsonl", Trajectory)
    assert trajectories
    for trajectory in trajectories:
        for turn in trajectory.turns:
            assert renderer.reply_text(turn.token_ids) == turn.text
        assert [one["content"] for one in trajectory.completion[::2]] == [turn.text for turn in trajectory.turns]


def test_pairs_set_the_expert_against_the_policy_and_load_into_the_reference(finished):
    folder = seed_folder(finished[0])
    pairs = read_jsonl(folder / "pairs" / "pairs.jsonl", Pair)
    assert pairs
    assert all(pair.chosen_reward > pair.rejected_reward for pair in pairs)
    lines = [json.loads(line) for line in (folder / "reference" / "turn_logprobs.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [pair.id for pair in pairs]
    for line, pair in zip(lines, pairs, strict=True):
        assert len(line["chosen"]) <= pair.chosen_turns
        assert all(value < 0 for value in line["chosen"] + line["rejected"])


def test_manifests_say_with_what_the_work_was_done(finished):
    folder = seed_folder(finished[0])
    manifest = json.loads((folder / "rollout" / "manifest.json").read_text())
    assert manifest["packages"]["torch"].startswith("2.13")
    assert manifest["settings"]["seed"] == 0
    assert manifest["facts"]["episodes"] == 32
    assert manifest["facts"]["engine_dtype"] == "float32"
    assert manifest["inputs"]["sft"].keys() >= {"policy/model.safetensors", "policy/chat_template.jinja"}


def test_a_second_run_does_nothing(finished):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    for stage in STAGES:
        run(folder, stage)
    for stage in STAGES.keys() - {"report"}:  # the report tells the recipe
        # None of them changes a result of ScienceWorld's.
        run(folder, stage, "env.sciworld.heap_mb=600", "sft.save_steps=7", "experts.tasks={webshop: 5}")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")} == before


def test_a_sweep_over_beta_needs_no_new_reference_pass(finished, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(finished[0], folder)
    reference = seed_folder(folder) / "reference" / "manifest.json"
    before = reference.stat().st_mtime_ns
    for stage in ("sft", "rollout", "pairs", "reference", "train"):
        run(folder, stage, "train.beta=0.5", "train.epochs=1")
    assert reference.stat().st_mtime_ns == before
    manifest = json.loads((seed_folder(folder) / "train" / "dmpo" / "manifest.json").read_text())
    assert manifest["settings"]["PreferenceConfig"]["beta"] == 0.5


OWN = """arms={
    deep: {method: sft, model.layers: 3},
    abroad: {method: sft, env.others: true},
    abroad-dmpo: {method: dmpo, env.others: true, train.epochs: 1},
}"""


def test_arms_with_an_sft_policy_of_their_own(finished, tmp_path):
    """A deeper one, and one that learns from the run's other environment; what other runs did is not done again."""
    folder = tmp_path / "own"
    shutil.copytree(finished[0], folder)
    keys = ("env=sciworld,webshop", "run=own", "reuse=smoke", "method=sft", "sft.epochs=10", OWN)
    for stage in STAGES:
        run(folder, stage, *keys)
    players = ("random", "sft", "deep", "abroad", "abroad-dmpo", "expert")
    assert {(row["env"], row["method"]) for row in rewards(folder, "own")} == {
        (env, name) for env in ("sciworld", "webshop") for name in players
    }
    base = folder / "runs/own/sciworld/seed0"
    assert (base / "experts/manifest.json").samefile(seed_folder(folder) / "experts/manifest.json")
    deep = json.loads((base / "arms/model.layers=3/sft/policy/config.json").read_text())
    assert deep["num_hidden_layers"] == 3
    abroad = base / "arms/env.others=True"
    goals = read_jsonl(abroad / "experts/episodes.jsonl", Trajectory)
    at_home = folder / "runs/own/webshop/seed0/experts/episodes.jsonl"
    assert [one.id for one in goals] == [one.id for one in read_jsonl(at_home, Trajectory)]
    explored = read_jsonl(abroad / "rollout/webshop/episodes.jsonl", Trajectory)
    assert {one.env for one in explored} == {"webshop"}
    assert {pair.id for pair in read_jsonl(abroad / "pairs/pairs.jsonl", Pair)} <= {one.id for one in goals}
    played = read_jsonl(base / "evaluate/abroad-dmpo/seen/episodes.jsonl", Trajectory)
    assert {one.env for one in played} == {"sciworld"}
