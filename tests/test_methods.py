"""Every method on the real simulator with real vLLM, and what comes of it when each stage is killed on the way."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.__main__ import STAGES
from pipeline.records import Trajectory, read_jsonl
from tests.stages import rewards, run, seed_folder, start

pytestmark = [pytest.mark.java, pytest.mark.vllm, pytest.mark.slow]

ROUND = ("rollout", "pairs", "reference", "train")
METHODS = ("method=bon,rft,eto,step", "bon.samples=3", "step.tasks=4", "step.samples=2", "train.epochs=1")
SMALL = ("rft.batch_size=4", "rft.micro_batch_size=4", "rft.epochs=1", "rft.min_reward=0.01", "rft.learning_rate=1e-3")
PICKED = ("arms={picked: {method: dmpo, pairs.contest: all, choose: {train.gamma: [0.1, 0.9]}}}", "env.dev_tasks=4")


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """A work folder with a run of every method, what its report printed, and the table that dev alone gave before."""
    folder = tmp_path_factory.mktemp("methods")
    for stage in ("experts", "sft", *ROUND, *ROUND, "evaluate"):
        run(folder, stage, *METHODS, *SMALL, *PICKED, "evaluate.splits=train,dev")
    looked = rewards(folder)
    assert not list(seed_folder(folder).glob("evaluate/*/*seen")), "tests were played"
    for stage in ("evaluate", "report"):
        printed = run(folder, stage, *METHODS, *SMALL, *PICKED)
    return folder, printed, looked


def test_every_method_goes_the_same_way(methods):
    """From one SFT policy: best of n, rejection sampling, a second round, steps, and a gamma chosen on dev tasks."""
    folder, printed, _ = methods
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


def test_training_tasks_tell_a_recipe_before_any_test_is_played(methods):
    """Those that were learned from, and those that were set aside."""
    folder, _, looked = methods
    table = {(row["method"], row["split"]): float(row["reward"]) for row in looked}
    names = ("random", "sft", "bon", "rft", "eto", "step", "picked", "expert")
    assert set(table) == {(name, split) for name in names for split in ("train", "dev")}
    assert {(row["split"], row["n"]) for row in looked} == {("train", "12"), ("dev", "4")}
    learned = {one.id for one in read_jsonl(seed_folder(folder) / "experts/episodes.jsonl", Trajectory)}
    trained = read_jsonl(seed_folder(folder) / "evaluate/rft/train/episodes.jsonl", Trajectory)
    assert {one.id for one in trained} == learned
    chosen = json.loads((seed_folder(folder) / "choose/picked/choice.json").read_text())
    assert table["picked", "dev"] == pytest.approx(max(chosen["dev_reward"].values()), abs=1e-6)


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
    part = {"sft": "sft", "train": "train/picked@train.gamma=0.1"}.get(stage)  # each takes more than one step
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
