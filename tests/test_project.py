import itertools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import STAGES, TOOLS

ROOT = Path(__file__).parent.parent


def cli(*arguments):
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_environment_yml_pins_what_pyproject_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    extras = project["optional-dependencies"]
    assert sorted(pip) == sorted(project["dependencies"] + extras["gpu"] + extras["qlora"])


def test_every_requirement_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        assert "==" in requirement, requirement


@pytest.mark.parametrize("command", [*STAGES, *TOOLS])
def test_help_teaches_each_command(command):
    told = cli(command, "--help")
    assert told.returncode == 0
    if command in STAGES:
        assert "train.gamma = 0.7" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sft", "tiny", "sft.epoch=1"], "unknown key 'sft.epoch'; did you mean 'sft.epochs'?"),
        (["sft", "nothere"], "error: No recipe 'nothere'"),
        (["pairs", "tiny", "run=never-run"], "run the stage `experts` first"),
        (["evaluate", "tiny", "env=mars"], "env.names.0"),
    ],
)
def test_mistakes_are_one_sentence_on_stderr_and_a_failing_exit(arguments, complaint, tmp_path):
    told = subprocess.run([sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert told.returncode == 1
    assert complaint in told.stderr
    assert "Traceback" not in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1


def test_an_unknown_stage_lists_the_known_ones():
    told = cli("fly", "tiny")
    assert told.returncode == 2
    assert "invalid choice: 'fly'" in told.stderr


def test_debug_shows_the_traceback(tmp_path):
    told = subprocess.run(
        [sys.executable, "-m", "pipeline", "sft", "nothere", "--debug"], capture_output=True, text=True, cwd=tmp_path
    )
    assert "Traceback" in told.stderr


def test_run_all_is_short():
    assert len((ROOT / "run_all.sh").read_text().splitlines()) < 80
