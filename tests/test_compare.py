"""The tool `compare` on two made-up runs, and the evaluation card."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from scipy import stats

from pipeline import card, compare, evaluate, jobs, runs
from pipeline.__main__ import main
from pipeline.config import Config
from pipeline.records import Trajectory, read_jsonl, write_jsonl
from tests.synthetic_run import make_run

TASKS = 6


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def two() -> tuple[Config, Config]:
    """Runs `a` (seeds 0, 1) and `b` (seeds 1, 2; another gamma; one policy more)."""
    a = make_run(methods=["dmpo"], seeds=[0, 1], tasks=TASKS, name="a")
    return a, make_run(methods=["dmpo", "dpo"], seeds=[1, 2], tasks=TASKS, name="b", gamma=0.3)


def episodes_of(config: Config, policy: str, split: str = "seen", seed: int = 1) -> Path:
    return runs.seed_folder(config, "sciworld", seed) / "evaluate" / policy / split / runs.EPISODES


def table(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {(row["policy"], row["split"]): row for row in csv.DictReader(file)}


def change(path: Path, rewards: list[float] | None = None, keep: slice = slice(None)) -> None:
    episodes = read_jsonl(path, Trajectory)
    for episode, reward in zip(episodes, rewards or [], strict=False):
        episode.reward = reward
    write_jsonl(path, episodes[keep])


def test_a_policy_of_one_name_is_paired_over_common_seeds_and_tasks(two, capsys):
    a, b = two
    change(episodes_of(a, "sft"), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], slice(1, None))  # A lacks the first task
    change(episodes_of(b, "sft"), [0.9, 0.4, 0.3, 0.3, 0.9, 0.0], slice(0, 5))  # B lacks the last
    assert main(["compare", "a", "runs/b", "--csv", "out/table.csv"]) == 0
    printed = capsys.readouterr().out
    rows = table(Path("out/table.csv"))
    assert set(rows) == {(p, s) for p in ("random", "sft", "dmpo", "expert") for s in ("seen", "unseen")}
    row = rows["sft", "seen"]
    assert (row["n"], row["seeds"], row["wins"], row["losses"], row["ties"]) == ("4", "1", "2", "1", "1")
    assert float(row["reward_a"]) == pytest.approx((0.2 + 0.3 + 0.4 + 0.5) / 4)
    assert float(row["difference"]) == pytest.approx((0.2 + 0 - 0.1 + 0.4) / 4)
    assert float(row["se_a"]) == pytest.approx((0.05 / 3 / 4) ** 0.5)  # s^2 = 0.05 / 3 of 0.2, 0.3, 0.4, 0.5
    # |sum| >= 0.5 of +-0.2 +-0.1 +-0.4: 0.5 and 0.7 on both sides, 4 of 8 patterns.
    assert (float(row["p"]), float(row["p_sign"]), float(row["p_holm"])) == (0.5, 1.0, 1.0)
    assert row["verdict"] == "not told apart"
    assert [row[f"{what}_left_out_{side}"] for what in ("tasks", "seeds") for side in "ab"] == ["2", "2", "1", "1"]
    assert "Left out of A, not played on both sides: tasks 2, seeds 1 (sciworld seen sft)." in printed
    others = "sciworld seen dmpo, sciworld unseen dmpo, sciworld seen expert, sciworld unseen expert"
    assert f"Left out of B, not played on both sides: tasks 0, seeds 1 ({others}, " in printed
    assert "Evaluated by B alone: sciworld seen dpo, sciworld unseen dpo." in printed
    for line in ("train.gamma", "seed", "method"):
        assert line in printed.split("differences in recipes")[1]
    assert "No difference in what was measured under." in printed


def test_two_policies_of_one_run(two, capsys):
    assert main(["compare", "b", "b", "--policies", "sft:dmpo", "--split", "unseen", "--csv", "t.csv"]) == 0
    ((place, row),) = table(Path("t.csv")).items()
    assert (place, row["seeds"], row["n"]) == (("sft:dmpo", "unseen"), "2", str(TASKS))
    printed = capsys.readouterr().out
    assert "No difference in recipes." in printed
    assert "Left out" not in printed


def test_a_clear_win_is_called_so_and_the_other_way_worse(two):
    a, _ = two
    tasks = range(TASKS)
    for seed in (0, 1):
        change(episodes_of(a, "sft", seed=seed), [0.10 + 0.01 * task for task in tasks])
        change(episodes_of(a, "dmpo", seed=seed), [0.60 + 0.02 * task for task in tasks])
    for names, verdict, wins in (("sft:dmpo", "better", "12"), ("dmpo:sft", "worse", "0")):
        assert main(["compare", "a", "a", "--policies", names, "--split", "seen", "--csv", "t.csv"]) == 0
        (row,) = table(Path("t.csv")).values()
        assert (row["verdict"], row["wins"]) == (verdict, wins)
        # Both seeds alike, so Student's over the tasks' differences 0.5 + 0.01 * task.
        assert float(row["p_holm"]) == pytest.approx(stats.ttest_1samp([0.5 + 0.01 * task for task in tasks], 0).pvalue)


def test_unlike_conditions_are_told(two, capsys):
    _, b = two
    path = episodes_of(b, "dmpo")
    episodes = read_jsonl(path, Trajectory)
    episodes[0].messages[0]["content"] = "You are a pirate."
    write_jsonl(path, episodes)
    manifest = path.with_name(runs.MANIFEST)
    told = json.loads(manifest.read_text("utf-8"))
    told["packages"]["scienceworld"] = "0.9 [b]"
    told["settings"] = {"env": {"fingerprint": "other data"}, "temperature": 0.5}
    manifest.write_text(json.dumps(told), "utf-8")
    assert main(["compare", "a", "b"]) == 0
    printed = capsys.readouterr().out.split("what was measured under")[1]
    assert {line.split(" (in 1 of 8)")[0].strip() for line in printed.splitlines() if "(in " in line} == {
        "prompts", "packages.scienceworld", "data", "sampling.temperature"
    }  # fmt: skip
    assert "0.9 [b]" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a", "nowhere"], "nowhere is no run: neither it nor runs/nowhere is a folder with a config.yaml."),
        (["a", "b", "--policies", "sft:gpt"], "hold no finished evaluation of sft and gpt on the same split."),
        (["a", "b", "--split", "dev"], "hold no finished evaluation of the same policy on the same split."),
        (["a", "empty"], "hold no finished evaluation of the same policy"),
        (["a", "later"], "sciworld, seen, dmpo: A and B have no seed in common, so nothing can be paired."),
        (["a", "other"], "sciworld, seen, dmpo: A and B have no task in common, so nothing can be paired."),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(two, capsys, arguments, sentence):
    a, _ = two
    Path("runs/empty").mkdir()
    Path("runs/empty/config.yaml").write_text("run: empty\n", "utf-8")
    make_run(methods=["dmpo"], seeds=[7], tasks=2, name="later")
    other = make_run(methods=["dmpo"], seeds=[0, 1], tasks=3, name="other")
    change(episodes_of(other, "dmpo"), keep=slice(0, 1))
    change(episodes_of(a, "dmpo"), keep=slice(1, None))
    assert main(["compare", *arguments]) == 1
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


def test_policies_are_two_names(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "a", "b", "--policies", "sft"])
    assert "it has to be two names, as sft:dmpo" in capsys.readouterr().err


def test_differing_settings_by_dotted_key():
    ours = {"a": {"b": 1, "c": [1, 2]}, "same": {"x": None}, "gone": 1}
    theirs = {"a": {"b": 2, "c": [1, 3]}, "same": {"x": None}}
    assert list(compare.differing(ours, theirs)) == [("a.b", 1, 2), ("a.c", [1, 2], [1, 3]), ("gone", 1, None)]


# ---- The card ----


def played(config: Config, seed: int, *, temperature: float = 0.0) -> Path:
    """One evaluation with the manifest that a job writes."""
    checkpoint = runs.seed_folder(config, "sciworld", seed) / "train" / "dmpo"
    with runs.stage(checkpoint, settings={"seed": seed}):
        (checkpoint / "policy").mkdir()
        (checkpoint / "policy" / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
        (checkpoint / "policy" / "model.safetensors").write_text(f"weights {seed}", "utf-8")
    folder = runs.seed_folder(config, "sciworld", seed) / "evaluate" / "dmpo" / "seen"
    job = jobs.Job(
        config=config, folder=folder, env="sciworld", seed=seed, policy="dmpo", split="seen", temperature=temperature
    )
    source = read_jsonl(episodes_of(config, "dmpo", seed=seed), Trajectory)
    with runs.stage(folder, settings=jobs.settings(job), inputs={"train": checkpoint}):
        write_jsonl(folder / runs.EPISODES, source)
    return folder


def test_the_card_says_what_was_measured_under_what():
    config = make_run(methods=["dmpo"], seeds=[0, 1], tasks=TASKS)
    folders = [played(config, seed) for seed in (0, 1)]
    told = card.card(map(card.read, folders))["sciworld"]["seen"]["dmpo"]
    assert (told["n"], told["seeds"]) == (TASKS, [0, 1])
    assert told["sampling"] == {
        "temperature": 0.0, "top_p": 1.0, "samples": 1, "max_length": 2048, "example": True,
        "max_tokens": 256, "max_malformed": None, "max_invalid": None,
    }  # fmt: skip
    assert told["chat_template"] == runs.file_digest(
        runs.seed_folder(config, "sciworld", 0) / "train" / "dmpo" / "policy" / "chat_template.jinja"
    )
    assert len(set(told["checkpoint"].values())) == 2  # each seed has weights of its own
    assert told["data"].startswith("scienceworld ")
    assert told["settings"]["simplification"] == "easy"
    assert told["engine"]["name"] == config.engine.name
    assert {"python", "torch", "scienceworld"} <= set(told["packages"])
    assert told["git_commit"] == runs.provenance()["git_commit"]
    assert told["episodes"] == {
        f"seed{seed}": runs.content_digest(folder / runs.EPISODES) for seed, folder in enumerate(folders)
    }
    prompts = {one.id: one.prompt for one in read_jsonl(folders[0] / runs.EPISODES, Trajectory)}
    assert told["prompts"] == runs.digest(prompts)  # the same under both seeds


def test_the_card_lists_what_seeds_disagree_in():
    config = make_run(methods=["dmpo"], seeds=[0, 1], tasks=TASKS)
    folders = [played(config, 0), played(config, 1, temperature=1.0)]
    told = card.card(map(card.read, folders))["sciworld"]["seen"]["dmpo"]
    assert [told["sampling"][f"seed{seed}"]["temperature"] for seed in (0, 1)] == [0.0, 1.0]


def test_nobody_who_needs_no_model_has_a_template_or_checkpoint():
    config = make_run(methods=["dmpo"], seeds=[0], tasks=2)
    told = card.entry([card.read(episodes_of(config, "random", seed=0).parent)])
    assert (told["chat_template"], told["checkpoint"], told["engine"]) == (None, {"seed0": None}, None)


def test_the_stage_evaluate_writes_the_card_and_mends_a_lost_one(monkeypatch):
    config = make_run(methods=["dmpo"], seeds=[0], tasks=2)
    monkeypatch.setattr(jobs, "run", lambda *_: None)  # all is played already
    evaluate.main(config)
    path = config.folder / card.CARD
    first = path.read_text("utf-8")
    told = json.loads(first)
    assert {(env, split, policy) for env in told for split in told[env] for policy in told[env][split]} == {
        ("sciworld", split, policy) for split in ("seen", "unseen") for policy in ("random", "expert", "sft", "dmpo")
    }
    path.unlink()
    evaluate.main(config)
    assert path.read_text("utf-8") == first
    assert yaml.safe_load((config.folder / "config.yaml").read_text("utf-8"))["run"] == config.run
