"""Stages of tests/smoke.yaml, run as users run them: commands in a work folder of their own."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from pipeline.__main__ import STAGES

SMOKE = Path(__file__).parent / "smoke.yaml"


def start(folder, stage, *overrides):
    """Start one stage in a work folder of its own, with two threads, whose sums are not those of one."""
    command = [sys.executable, "-m", "pipeline", stage, str(SMOKE), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TMPDIR": str(folder)}  # where the simulator is started
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


def run_whole(folder):
    """Run every stage once; returns the folder and what each stage printed."""
    return folder, {stage: run(folder, stage) for stage in STAGES}


def seed_folder(folder, run="smoke"):
    return folder / "runs" / run / "sciworld" / "seed0"
