import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import runs
from pipeline.config import Config
from pipeline.records import MEASURED, write_jsonl
from tests.test_records import trajectory


def make(folder, settings, inputs=None, text="x"):
    """Run one stage that writes a file; returns whether it had anything to do."""
    with runs.stage(folder, settings=settings, inputs=inputs) as stage:
        if not stage.done:
            (folder / "out.txt").write_text(text)
            stage.facts["count"] = 1
    return not stage.done


def test_the_same_settings_and_inputs_are_done_once(tmp_path):
    assert make(tmp_path / "a", {"k": 1})
    assert not make(tmp_path / "a", {"k": 1})
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["facts"] == {"count": 1}
    assert manifest["outputs"]["out.txt"]["bytes"] == 1
    assert {"git_commit", "packages", "python", "seconds", "settings", "inputs"} <= manifest.keys()


def test_another_setting_empties_the_folder_and_runs_again(tmp_path):
    make(tmp_path / "a", {"k": 1})
    (tmp_path / "a" / "leftover").write_text("old")
    assert make(tmp_path / "a", {"k": 2})
    assert not (tmp_path / "a" / "leftover").exists()


def test_changed_inputs_run_the_stages_after_them_again(tmp_path):
    make(tmp_path / "a", {"k": 1})
    assert make(tmp_path / "b", {}, {"a": tmp_path / "a"})
    assert not make(tmp_path / "b", {}, {"a": tmp_path / "a"})
    make(tmp_path / "a", {"k": 2}, text="y")
    assert make(tmp_path / "b", {}, {"a": tmp_path / "a"})


def test_the_same_content_made_again_changes_nothing_downstream(tmp_path):
    make(tmp_path / "a", {"k": 1})
    make(tmp_path / "b", {}, {"a": tmp_path / "a"})
    make(tmp_path / "a", {"k": 2})
    assert not make(tmp_path / "b", {}, {"a": tmp_path / "a"})


def test_what_is_measured_of_episodes_changes_nothing_downstream(tmp_path):
    def episodes(folder, attempt, measured):
        with runs.stage(folder, settings={"attempt": attempt}) as stage:
            assert not stage.done
            write_jsonl(folder / runs.EPISODES, [trajectory(**dict.fromkeys(MEASURED, measured))])

    episodes(tmp_path / "a", 1, 5)
    make(tmp_path / "b", {}, {"a": tmp_path / "a"})
    episodes(tmp_path / "a", 2, 7)
    assert not make(tmp_path / "b", {}, {"a": tmp_path / "a"})


def test_an_output_edited_by_hand_is_noticed(tmp_path):
    make(tmp_path / "a", {"k": 1})
    make(tmp_path / "b", {}, {"a": tmp_path / "a"})
    (tmp_path / "a" / "out.txt").write_text("edited")
    assert make(tmp_path / "b", {}, {"a": tmp_path / "a"})


def test_a_killed_stage_finds_its_files_again(tmp_path):
    folder = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt), runs.stage(folder, settings={"k": 1}):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert not (folder / "manifest.json").exists()
    with runs.stage(folder, settings={"k": 1}) as stage:
        assert not stage.done
        assert (folder / "half").read_text() == "half"


def test_a_killed_stage_with_other_settings_starts_afresh(tmp_path):
    folder = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt), runs.stage(folder, settings={"k": 1}):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    with runs.stage(folder, settings={"k": 2}):
        assert not (folder / "half").exists()


def test_a_missing_input_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"run the stage `sft` first"):
        make(tmp_path / "b", {}, {"sft": tmp_path / "sft"})


def test_a_vanished_output_is_named(tmp_path):
    make(tmp_path / "a", {"k": 1})
    (tmp_path / "a" / "out.txt").unlink()
    with pytest.raises(ValueError, match=r"out.txt is gone; delete .*manifest.json and run the stage `a` again"):
        make(tmp_path / "b", {}, {"a": tmp_path / "a"})


@pytest.mark.parametrize("text", ["", '{"key": "', "[]"])
def test_a_broken_manifest_counts_for_nothing(tmp_path, text):
    make(tmp_path / "a", {"k": 1})
    (tmp_path / "a" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"holds no finished output; run the stage `a` first"):
        make(tmp_path / "b", {}, {"a": tmp_path / "a"})
    assert make(tmp_path / "a", {"k": 1})
    assert make(tmp_path / "b", {}, {"a": tmp_path / "a"})


@pytest.mark.parametrize("broken", ["{broken}\n", "[1]\n", '{"id": "cut'])
def test_a_broken_line_in_a_finished_stage_is_named(tmp_path, broken):
    folder = tmp_path / "a"
    with runs.stage(folder, settings={}):
        write_jsonl(folder / runs.EPISODES, [trajectory()])
    with (folder / runs.EPISODES).open("a") as file:
        file.write(broken)
    with pytest.raises(ValueError, match=r"episodes.jsonl, line 2: not a whole record"):
        make(tmp_path / "b", {}, {"a": folder})


def test_the_second_process_in_a_run_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(run="twice")
    other = "from pipeline import runs, config\nwith runs.locked(config.Config(run='twice')): pass"
    with runs.locked(config):
        refused = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode != 0
    assert "Another process works in runs/twice" in refused.stderr
    assert subprocess.run([sys.executable, "-c", other], cwd=tmp_path).returncode == 0


def test_a_run_takes_over_what_another_did_the_same_way_and_leaves_the_other_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, mine = (Path("runs") / name / "sciworld" / "seed1" for name in ("first", "second"))
    make(theirs / "sft", {"lr": 1})
    make(theirs / "train" / "dpo", {"beta": 1}, {"sft": theirs / "sft"})
    make(theirs / "train" / "dmpo", {"beta": 1}, {"sft": theirs / "sft"})
    make(Path("runs/first/sciworld/seed0/sft"), {"lr": 1})

    with runs.locked(Config(run="second", reuse=["first"], seed=[1], env={"names": ["sciworld"]})):
        assert not make(mine / "sft", {"lr": 1})
        assert not make(mine / "train" / "dpo", {"beta": 1}, {"sft": mine / "sft"})
        assert make(mine / "train" / "dmpo", {"beta": 2}, {"sft": mine / "sft"}, text="other")

    assert not Path("runs/second/sciworld/seed0").exists()
    assert not make(theirs / "train" / "dmpo", {"beta": 1}, {"sft": theirs / "sft"})
    assert (theirs / "train" / "dmpo" / "out.txt").read_text() == "x"


def test_a_run_to_reuse_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with runs.locked(Config(run="second", reuse=["gone"])):
        assert "there is no run in runs/gone" in capsys.readouterr().err
