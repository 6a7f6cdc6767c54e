"""The benchmarks: each imports and reads its arguments, as the documents give them, and keeps the ratios it shows."""

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import copying, engine_tokens, preference_step
from benchmarks.preference_step import Measured

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "process_tree")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = sorted(
    {found for file in DOCUMENTS for found in re.findall(r"python -m benchmarks\.([^`#\n]+)", file.read_text("utf-8"))}
)


class Read(Exception):  # noqa: N818
    """The arguments were read: nothing is to be measured."""


def read(monkeypatch, command: str) -> None:
    """Run a benchmark's `main` up to the end of its command line."""
    name, *arguments = shlex.split(command)
    parse = argparse.ArgumentParser.parse_args

    def and_no_more(self):
        parse(self, arguments)
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", and_no_more)
    importlib.import_module(f"benchmarks.{name}").main()


@pytest.mark.parametrize("name", NAMES)
def test_each_says_its_question_and_its_command(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        read(monkeypatch, f"{name} --help")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert f"python -m benchmarks.{name}" in told
    assert "--json" in told


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documents_commands_are_understood(command, monkeypatch):
    with pytest.raises(Read):
        read(monkeypatch, command)


def test_ours_is_found_by_its_name_and_the_ratios_are_in_the_json(monkeypatch, tmp_path, capsys):
    measured = {
        "ours": Measured(side="ours", pairs_per_cpu_second=3.0, peak_mib=100.0, loss=0.7),
        "padded": Measured(side="padded", pairs_per_cpu_second=2.0, peak_mib=400.0, loss=0.7),
        "official": Measured(side="official"),
        "floor": Measured(side="floor", pairs_per_cpu_second=6.0),
    }
    monkeypatch.setattr(preference_step, "_apart", lambda side, case, gib: measured[side])

    def rows(*sides):
        file = tmp_path / "rows.json"
        arguments = ["--lengths", "500", "--vocabularies", "32000", "--json", str(file), "--sides", *sides]
        monkeypatch.setattr(sys, "argv", ["preference_step", *arguments])
        preference_step.main()
        found = json.loads(file.read_text(), parse_constant=pytest.fail)
        return {row["side"]: (row["speed_ratio"], row["memory_ratio"]) for row in found}

    assert rows("padded", "official", "ours", "floor") == {
        "padded": (1.5, 0.25),
        "official": (None, None),
        "ours": (1.0, 1.0),
        "floor": (0.5, None),
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["500", "32000", "padded", "2.000", "1.50", "x", "400", "0.25", "x"]
    assert lines[2].endswith("needs more memory than --memory")
    assert lines[4].split() == ["500", "32000", "floor", "6.000", "0.50", "x"]
    assert rows("padded", "floor") == {"padded": (None, None), "floor": (None, None)}
    assert " x" not in capsys.readouterr().out


def test_a_profile_tells_kinds_of_work_apart():
    def event(name, *shapes, caller=None):
        return SimpleNamespace(name=name, input_shapes=shapes, cpu_parent=caller)

    def kind(one):
        return preference_step.kind(one, 32000)

    layer, output = event("aten::linear", [1, 9, 256], [768, 256]), event("aten::linear", [9, 256], [32000, 256])
    assert kind(event("aten::mm", [9, 256], [256, 768], caller=layer)) == "matrix products"
    assert kind(event("aten::mm", [9, 256], [256, 32000], caller=output)) == "output layer"
    assert kind(event("aten::t", caller=output)) == "output layer"
    attention = event("aten::scaled_dot_product_attention", [1, 4, 9, 64])
    assert kind(event("aten::_scaled_dot_product_flash_attention_for_cpu", caller=attention)) == "attention"
    step = event("Optimizer.step#AdamW.step")
    assert kind(event("aten::_fused_adamw_", [32000, 256], caller=step)) == "optimizer"
    assert kind(event("aten::_foreach_norm", [])) == "optimizer"
    assert kind(event("aten::silu", [1, 9, 768])) == "other operations"


def test_an_engines_rows_say_how_they_compare_with_vllm_alone():
    bare = engine_tokens.Measurement("vLLM alone, all at once", tokens=1000, seconds=2.0, cpu_seconds=4.0)
    ours = engine_tokens.Measurement("ours, 64 at once", tokens=900, seconds=3.0, cpu_seconds=4.0)
    first, second = engine_tokens.compared([bare, ours])
    assert (first["ratio"], first["cpu_ratio"]) == (1.0, 1.0)
    assert second["tokens_per_second"] == 300
    assert second["ratio"] == pytest.approx(0.6)
    assert second["cpu_ratio"] == pytest.approx(0.9)


def test_a_token_repeats_where_it_alone_has_followed_the_two_before_it():
    ids = [1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 3]
    assert copying.repeats(ids, [0] * len(ids)) == [5, 6, 7]  # not 8, another token, nor 11, which two have followed
    assert copying.repeats(ids, [-1] * 6 + [0] * 6) == [6, 7]
