"""The whole way of the data on the real simulator with real vLLM, and what happens when it is killed on the way."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.__main__ import STAGES
from pipeline.records import Pair, Trajectory, read_jsonl

pytestmark = [pytest.mark.java, pytest.mark.vllm, pytest.mark.slow]

SMOKE = Path(__file__).parent / "smoke.yaml"


def start(folder, stage, *overrides):
    """Start one stage in a work folder of its own."""
    command = [sys.executable, "-m", "pipeline", stage, str(SMOKE), *overrides]
    environment = os.environ | {"TMPDIR": str(folder)}  # where the simulator is started
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(folder, stage, *overrides):
    process = start(folder, stage, *overrides)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def rewards(folder, run="smoke"):
    """The reward table: every number of rewards.csv as it is written."""
    with (folder / "runs" / run / "rewards.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A work folder in which every stage has run once."""
    folder = tmp_path_factory.mktemp("whole")
    printed = {stage: run(folder, stage) for stage in STAGES}
    return folder, printed


def seed_folder(folder, run="smoke"):
    return folder / "runs" / run / "sciworld" / "seed0"


def test_alfworld_goes_the_same_way(finished):
    """Games generated, checked, solved, learned, explored, paired, trained on and evaluated."""
    folder, _ = finished
    for stage in STAGES:
        printed = run(folder, stage, "env=alfworld", "run=household", "sft.epochs=10", "train.epochs=1")
    table = rewards(folder, "household")
    assert {(row["env"], row["method"], row["split"]) for row in table} == {
        ("alfworld", method, split) for method in ("random", "expert", "sft", "dmpo") for split in ("seen", "unseen")
    }
    assert all(row["n"] == "3" for row in table)
    assert all(float(row["reward"]) == 0 for row in table if row["method"] == "random")
    assert "alfworld" in printed
    experts = read_jsonl(folder / "runs/household/alfworld/seed0/experts/episodes.jsonl", Trajectory)
    assert experts
    assert all(one.success and len(one.turns) <= 40 and one.note is None for one in experts)
    manifest = json.loads((folder / "runs/household/alfworld/seed0/experts/manifest.json").read_text())
    assert manifest["packages"]["textworld"] == "1.7.0"
    assert "generated" in json.dumps(manifest["settings"])


def test_webshop_goes_the_same_way(finished):
    """A catalogue made, indexed, shopped in by experts, learned, explored, paired, trained on and evaluated."""
    folder, _ = finished
    for stage in STAGES:
        printed = run(folder, stage, "env=webshop", "run=shop", "model.max_length=2048", "train.epochs=1")
    table = rewards(folder, "shop")
    assert {(row["env"], row["method"], row["split"]) for row in table} == {
        ("webshop", method, split) for method in ("random", "expert", "sft", "dmpo") for split in ("seen", "unseen")
    }
    assert all(float(row["reward"]) == 1 for row in table if row["method"] == "expert")
    assert "seen bought" in printed
    base = folder / "runs/shop/webshop/seed0"
    experts = read_jsonl(base / "experts/episodes.jsonl", Trajectory)
    assert len(experts) == 10
    assert all(one.success and one.note is None and one.kind for one in experts)
    manifest = json.loads((base / "experts/manifest.json").read_text())
    assert "PatternTagger" in json.dumps(manifest["settings"])
    assert "PatternTagger" in (folder / "runs/shop/report.html").read_text()


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
        run(folder, stage, "env.sciworld.heap_mb=600", "sft.save_steps=7")  # neither changes a result
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


ROUND = ("rollout", "pairs", "reference", "train")
METHODS = ("method=bon,rft,eto,step", "bon.samples=3", "step.tasks=4", "step.samples=2", "train.epochs=1")
SMALL = ("rft.batch_size=4", "rft.micro_batch_size=4", "rft.epochs=1", "rft.min_reward=0.01", "rft.learning_rate=1e-3")
PICKED = ("arms={picked: {method: dmpo, pairs.contest: all, choose: {train.gamma: [0.1, 0.9]}}}", "env.dev_tasks=4")


@pytest.fixture(scope="module")
def methods(finished, tmp_path_factory):
    """A work folder with a run of every method, and what its report printed."""
    folder = tmp_path_factory.mktemp("methods")
    shutil.copytree(finished[0], folder, dirs_exist_ok=True)
    for stage in ("experts", "sft", *ROUND, *ROUND, "evaluate", "report"):
        printed = run(folder, stage, *METHODS, *SMALL, *PICKED)
    return folder, printed


def test_every_method_goes_the_same_way(methods):
    """From one SFT policy: best of n, rejection sampling, a second round, steps, and a gamma chosen on dev tasks."""
    folder, printed = methods
    base = seed_folder(folder)
    table = {(row["method"], row["split"]): float(row["reward"]) for row in rewards(folder)}
    names = ("random", "sft", "bon", "rft", "eto", "step", "picked", "expert")
    assert set(table) == {(name, split) for name in names for split in ("seen", "unseen")}
    assert all(name in printed for name in names)
    bon = read_jsonl(base / "evaluate/bon/seen/episodes.jsonl", Trajectory)
    assert len(bon) == 18
    best = {one.id: max(other.reward for other in bon if other.id == one.id) for one in bon}
    assert table["bon", "seen"] == pytest.approx(sum(best.values()) / 6, abs=1e-6)
    again = read_jsonl(base / "rounds/eto/2/rollout/episodes.jsonl", Trajectory)
    assert {one.policy for one in again} == {"eto"}
    begun = read_jsonl(base / "arms/method=step/rollout/episodes.jsonl", Trajectory)
    experts = {one.id: one for one in read_jsonl(base / "experts/episodes.jsonl", Trajectory)}
    assert {one.begun_with for one in begun} >= {0, 1}
    for one in begun:
        replayed = [(turn.text, turn.observation) for turn in one.turns[: one.begun_with]]
        assert replayed == [(turn.text, turn.observation) for turn in experts[one.id].turns[: one.begun_with]]
        assert all(turn.token_ids for turn in one.turns[one.begun_with :])
    dev = {one.id for one in read_jsonl(base / "evaluate/picked@train.gamma=0.1/dev/episodes.jsonl", Trajectory)}
    assert len(dev) == 4
    assert not dev & set(experts)
    chosen = json.loads((base / "choose/picked/choice.json").read_text())
    assert chosen["dev_reward"][chosen["chosen"]] == max(chosen["dev_reward"].values())


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


def progress(folder, stage):
    """How far a stage has come, by what it writes for its restart."""
    base = seed_folder(folder)
    lines = {
        "experts": ["experts/replays.jsonl"],
        "rollout": ["rollout/episodes.jsonl"],
        "evaluate": ["evaluate/random/seen/episodes.jsonl"],
    }
    if stage in lines:
        return sum((base / name).read_bytes().count(b"\n") for name in lines[stage] if (base / name).exists())
    part = {"sft": "sft", "train": "train/step"}.get(stage)
    if part:
        return len(list((base / part / "checkpoints").glob("checkpoint-*/trainer_state.json")))
    return len(list(base.glob(f"arms/*/{stage}/*")))


def kill_in_the_middle(folder, stage, *overrides):
    """Start a stage, kill -9 it once it has something to lose; returns whether it was still at work."""
    process = start(folder, stage, *overrides)
    deadline = time.monotonic() + 120
    while process.poll() is None and progress(folder, stage) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def rows(folder, name, methods):
    """The lines of a table that are of some policies, as they are written."""
    lines = (folder / "runs/smoke" / name).read_bytes().splitlines(keepends=True)
    return [line for line in lines if line.split(b",")[1].decode() in ("method", *methods)]


def test_a_run_killed_in_every_stage_ends_with_the_same_tables_bit_by_bit(methods, tmp_path):
    """Sampling, steps and what is chosen on dev included: no policy that is made again differs in a bit."""
    keys = (*METHODS, *PICKED, "method=bon,step", "train.save_steps=1")
    killed = set()
    for stage in STAGES:
        if kill_in_the_middle(tmp_path, stage, *keys):
            killed.add(stage)
        run(tmp_path, stage, *keys)
    assert killed >= {"experts", "sft", "rollout", "train", "evaluate"}  # pairs takes a moment, and may win the race
    for name in ("episodes.csv", "rewards.csv"):
        again = (tmp_path / "runs/smoke" / name).read_bytes()
        assert again == b"".join(rows(methods[0], name, ("random", "expert", "sft", "bon", "step", "picked")))
    policies = list(seed_folder(tmp_path).glob("**/policy/model.safetensors"))
    assert len(policies) == 4  # of sft, of step, and with the two gammas
    for path in policies:
        assert path.read_bytes() == (methods[0] / path.relative_to(tmp_path)).read_bytes(), path
    resumed = json.loads((seed_folder(tmp_path) / "sft" / "manifest.json").read_text())["facts"]["resumed_at_step"]
    assert resumed > 0
    replayed = json.loads((seed_folder(tmp_path) / "rollout" / "manifest.json").read_text())["facts"]["already_played"]
    assert replayed > 0


def test_nothing_of_a_killed_run_stays_alive(tmp_path):
    process = start(tmp_path, "experts")
    deadline = time.monotonic() + 60
    while progress(tmp_path, "experts") < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "java" in _working_in(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 10
    while _working_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _working_in(tmp_path) == []


def _working_in(folder):
    """Command names of the processes whose work folder lies in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(folder):
                found.append((process / "comm").read_text().strip())
        except OSError:
            continue
    return found
