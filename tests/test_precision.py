"""What `auto` comes to on a machine, and that no work goes on in another precision than it was begun in."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from pipeline import arms, jobs, precision, reference, runs, sft, train
from pipeline.config import Config
from pipeline.precision import multiplies_bf16, resolve
from pipeline.recipe import load


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"bf16": True}, "bfloat16"),  # ARM's
        ({}, "float32"),
    ],
)
def test_auto_is_what_the_cpu_multiplies_in(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve("auto") == dtype
    assert precision.of_training(Config().train) == dtype


@pytest.mark.parametrize("supported", [True, False])
def test_auto_on_a_gpu(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert multiplies_bf16() is supported


def test_a_named_precision_stands():
    assert resolve("float16") == "float16"
    assert precision.of_training(load("tiny", ["train.bf16=true"]).train) == "bfloat16"
    assert precision.of_training(load("tiny", ["train.bf16=false"]).train) == "float32"


# ---- Work that goes on elsewhere ----

BEGUN = "was begun in bfloat16, and here it would be float32"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Says what this machine multiplies in from now on."""
    monkeypatch.chdir(tmp_path)
    return lambda bf16: monkeypatch.setattr(precision, "multiplies_bf16", lambda: bf16)


def made(folder, **facts):
    with runs.stage(folder, settings={}) as stage:
        stage.facts.update(facts)
    return folder


def test_half_played_episodes_go_on_in_their_precision_alone(tmp_path, monkeypatch):
    """Whatever the engine's is: this machine's, or its servers'."""
    monkeypatch.chdir(tmp_path)
    (made(tmp_path / "sft") / "policy").mkdir()
    (tmp_path / "sft/policy/config.json").write_text("{}")
    (job,) = jobs.evaluation(arms.of(load("tiny", ["evaluate.splits=seen"]))[0], "webshop", 0)
    job = dataclasses.replace(job, checkpoint=tmp_path / "sft")
    played = []

    def play_in(precision, *, killed=False):
        async def play_job(job, *_):
            if killed:
                raise KeyboardInterrupt
            played.append(job)
            return {}

        monkeypatch.setattr(jobs, "_in_own_process", lambda play, together: play(together))
        monkeypatch.setattr(jobs, "open_pool", lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(jobs, "_engine", lambda _: contextlib.nullcontext(SimpleNamespace(dtype=precision)))
        monkeypatch.setattr(jobs, "_players", lambda *_: None)
        monkeypatch.setattr(jobs, "_play_job", play_job)
        jobs.run([job])

    with pytest.raises(KeyboardInterrupt):
        play_in("bfloat16", killed=True)
    with pytest.raises(ValueError, match=BEGUN):
        play_in("float32")
    assert not played
    play_in("bfloat16")
    play_in("float32")  # what is done is done on every machine
    assert len(played) == 1


@pytest.mark.parametrize("method", ["sft", "rft", "dmpo"])
def test_half_done_training_goes_on_in_its_precision_alone(method, machine):
    config = load("tiny", ["env=webshop", f"method={method}"])
    arm = arms.of(config)[-1]
    folder = arm.folder("webshop", 0, "sft" if method == "sft" else "train")
    machine(bf16=True)
    with pytest.raises(KeyboardInterrupt), runs.stage(folder, settings={}) as stage:
        runs.compute_in(stage.folder, "bfloat16")
        raise KeyboardInterrupt
    machine(bf16=False)
    made(arm.folder("webshop", 0, "reference"), precision="float32")
    with pytest.raises(ValueError, match=BEGUN), runs.stage(folder, settings={}) as stage:
        if method == "sft":
            sft._train(config, [], stage, 0)
        else:
            (train._prefer if method == "dmpo" else train._reject_and_tune)(arm, "webshop", 0, 1, stage)


def test_training_wants_a_reference_of_its_own_precision(tmp_path):
    folder = made(tmp_path / "reference", precision="float32")
    reference.check_precision(folder, "float32")
    with pytest.raises(ValueError, match="computed in float32, and this machine trains in bfloat16: set"):
        reference.check_precision(folder, "bfloat16")
