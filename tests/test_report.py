import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline import report
from pipeline.axes import Axis
from pipeline.config import Config
from pipeline.figures import draw
from pipeline.records import Trajectory, read_jsonl, write_jsonl
from pipeline.rendering import Renderer
from pipeline.statistics import COLUMNS, holm
from pipeline.viewer import EMBEDDED, content, sample, weightings
from tests.synthetic_run import ODD, SCRIPT, make_run, play
from tests.tiny_policy import save_tiny_policy

METHODS = ["dmpo", "dpo"]
TASKS = EMBEDDED + 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        config = make_run(methods=METHODS, seeds=[0, 1], tasks=TASKS)
        report.main(config)
        yield config


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    return make_run(methods=["dmpo"], seeds=[0], tasks=4)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rewards_csv_holds_the_episodes_means(run: Config):
    rows = rows_of(run.folder / "rewards.csv")
    assert list(rows[0]) == COLUMNS
    places = [(row["method"], row["split"], row["seed"]) for row in rows]
    players = ["random", "sft", *METHODS, "expert"]
    assert sorted(places) == sorted((p, split, s) for p in players for split in ("seen", "unseen") for s in "01")
    row = rows[places.index(("dmpo", "unseen", "1"))]
    path = run.folder / "sciworld" / "seed1" / "evaluate" / "dmpo" / "unseen" / "episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    rewards = [line["reward"] for line in lines]
    mean = sum(rewards) / len(rewards)
    error = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1) / len(rewards)) ** 0.5
    turns = [turn for line in lines for turn in line["turns"]]
    assert int(row["n"]) == TASKS
    assert float(row["reward"]) == pytest.approx(mean, abs=1e-6)
    assert float(row["reward_se"]) == pytest.approx(error, abs=1e-6)
    assert float(row["success"]) == pytest.approx(sum(line["success"] for line in lines) / TASKS, abs=1e-6)
    assert float(row["steps"]) == pytest.approx(len(turns) / TASKS, abs=1e-6)
    assert float(row["invalid_rate"]) == pytest.approx(sum(not t["valid"] for t in turns) / len(turns), abs=1e-6)


def test_rewards_by_kind_add_up(run: Config):
    kinds = [
        row
        for row in rows_of(run.folder / "rewards_by_kind.csv")
        if (row["method"], row["split"], row["seed"]) == ("sft", "seen", "0")
    ]
    whole = next(
        row
        for row in rows_of(run.folder / "rewards.csv")
        if (row["method"], row["split"], row["seed"]) == ("sft", "seen", "0")
    )
    assert {row["kind"] for row in kinds} == {"boil", "find-plant", "lifespan-longest", "use-thermometer"}
    assert sum(int(row["n"]) for row in kinds) == TASKS
    mean = sum(int(row["n"]) * float(row["reward"]) for row in kinds) / TASKS
    assert mean == pytest.approx(float(whole["reward"]), abs=1e-6)


def test_the_page_names_no_outside_address_and_holds_no_text_of_policies_as_markup(run: Config):
    page = (run.folder / "report.html").read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import", page.partition('id="data"')[0])
    assert not re.search(r'\b(?:src|href)="(?!#)', page)
    assert SCRIPT not in page
    assert page.count("<script") == 2
    assert page.count("</script") == 2


def test_figures_are_saved_for_papers(run: Config):
    names = {path.name for path in (run.folder / "figures").iterdir()}
    stems = ("rewards-sciworld", "sft-sciworld", "preference-sciworld", "turns-sciworld")
    assert names == {f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "pdf")}
    assert (run.folder / "figures" / "rewards-sciworld.pdf").read_bytes().startswith(b"%PDF")


def test_tables_are_printed_again_without_work(run: Config, capsys: pytest.CaptureFixture[str]):
    before = (run.folder / "report.html").stat().st_mtime_ns
    report.main(run)
    printed = capsys.readouterr().out
    assert (run.folder / "report.html").stat().st_mtime_ns == before
    assert "sciworld: mean reward with 95 % CI" in printed
    assert "reward less the SFT policy's" in printed
    assert "find-plant" in printed
    assert "sciworld dmpo seen 2" in printed  # the broken episodes
    assert str(run.folder / "report.html") in printed


def test_importing_the_stage_loads_no_heavy_library():
    heavy = "{'pandas', 'matplotlib', 'numpy', 'jinja2'}"
    code = "import sys, pipeline.config; old = set(sys.modules); import pipeline.report;"
    code += f"print((set(sys.modules) - old) & {heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_missing_output_is_made_again(small: Config):
    report.main(small)
    (small.folder / "report.html").unlink()
    report.main(small)
    assert (small.folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("folder", "stage"),
    [("experts", "experts"), ("train/dmpo", "train"), ("evaluate/dmpo/unseen", "evaluate"), ("pairs", "pairs")],
)
def test_an_unfinished_stage_is_named(small: Config, folder: str, stage: str):
    (small.folder / "sciworld" / "seed0" / folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"{folder} holds no finished output; run the stage `{stage}` first"):
        report.main(small)
    assert not (small.folder / "rewards.csv").exists()


def test_differences_as_csv(run: Config):
    rows = rows_of(run.folder / "differences.csv")
    table = json.loads((run.folder / "report" / "tables.json").read_text("utf-8"))["paired"]
    assert [(row["method"], row["split"], row["verdict"]) for row in rows] == [
        (row["method"], row["split"], row["verdict"]) for row in table
    ]
    differences = [float(row["difference"]) for row in rows]
    assert differences == pytest.approx([row["difference"] for row in table], abs=1e-6)


def test_a_page_without_training_logs(small: Config):
    for path in (small.folder / "sciworld" / "seed0").rglob("log.jsonl"):
        manifest = path.with_name("manifest.json")
        told = json.loads(manifest.read_text("utf-8"))
        del told["outputs"]["log.jsonl"]  # as where logs are kept but not hashed
        manifest.write_text(json.dumps(told), "utf-8")
        path.unlink()
    report.main(small)
    assert {path.stem for path in (small.folder / "figures").iterdir()} == {"rewards-sciworld"}


def row_of(method: str) -> dict[str, Any]:
    return {"method": method, "split": "seen", "n": 1, "reward": 0.5, "reward_low": None, "reward_high": None}


def test_logs_of_any_shape_are_drawn():
    logs = {
        ("sft", 0): [{"step": 1, "loss": 2.0}],
        ("dmpo", 0): [{"step": 1, "loss": float("nan"), "new_number": 1, "text": "x"}, {"step": 2, "margin": None}],
        ("mean", 0): [{"step": 1, "chosen_logratio_by_turn": [-1.0, None]}, {"epoch": 1}],
    }
    row = row_of("dmpo")
    drawn = draw("toy", [row], [row], logs, ["dmpo", "mean"], None)
    assert [axes.get_title() for axes in drawn["preference-toy"].axes] == ["new number"]
    assert [axes.get_title() for axes in drawn["turns-toy"].axes] == ["mean"]


def test_turns_are_drawn_as_means_over_thirds_of_training_and_seeds():
    course = [[0.0], [-1.0, None], [-2.0, -4.0], [-3.0], [-4.0, -8.0], [-5.0]]
    logs = {
        ("dmpo", seed): [
            {"step": step, "chosen_logratio_by_turn": [value and value * (1 + 2 * seed) for value in values]}
            for step, values in enumerate(course)
        ]
        for seed in (0, 1)
    }
    row = row_of("dmpo")
    (panel,) = draw("toy", [row], [row], logs, ["dmpo"], None)["turns-toy"].axes
    reference, *chosen = [list(line.get_ydata()) for line in panel.lines][:4]
    assert reference == [0, 0]
    assert chosen[0][0] == -1.0
    assert chosen[1:] == [[-5.0, -8.0], [-9.0, -16.0]]
    assert all(math.isnan(value) for value in chosen[0][1:])


def test_the_legend_of_a_study_is_no_wider_than_its_figure():
    names = [f"g0.{gamma}-noise{noise}" for gamma in range(4) for noise in ("0.0", "0.5", "1.0")]
    logs = {(name, 0): [{"step": 1, "chosen_reward": 0.0, "loss": 1.0, "kl": 0.0}] for name in names}
    figure = draw("toy", [row_of("dmpo")], [], logs, names, None)["preference-toy"]
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().width < figure.bbox.width


def test_a_study_is_drawn_over_what_it_varies():
    axis = Axis("train.beta", [0.1, 1.0, 5.0], {"dpo": {0.1: "a", 5.0: "c", 1.0: "b"}, "dmpo": {0.1: "d", 1.0: "e"}})
    rewards = {"sft": 0.3, "a": 0.4, "b": 0.5, "c": 0.2, "d": 0.6, "e": 0.7}
    summary = [
        {"method": name, "split": split, "n": 9, "reward": mean, "reward_low": mean - 0.1, "reward_high": mean + 0.1}
        for name, mean in rewards.items()
        for split in ("seen", "unseen")
    ]
    figure = draw("toy", summary, [], {}, list("abcde"), axis)["axis-toy"]
    seen, unseen = figure.axes
    assert [label.get_text() for label in seen.get_xticklabels()] == ["0.1", "1", "5"]
    courses = [list(line.get_ydata()) for line in unseen.lines if line.get_marker() == "o"]
    assert courses == [[0.4, 0.5, 0.2], [0.6, 0.7]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sft", "dpo", "dmpo"]


def test_a_log_keeps_the_last_line_of_a_step(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n{"step": 1, "loss": 3}\n{"step": 2, "loss": 0.5}\n{"runtime": 1}\n{"st')
    assert report.read_log(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 0.5}]


def test_paste_texts():
    rows: list[dict[str, Any]] = [
        {"env": "sciworld", "split": "seen", "method": "dmpo_printed"}
        | {"reward": 0.5, "reward_low": 0.25, "reward_high": 0.75},
        {"env": "sciworld", "split": "seen", "method": "expert"}
        | {"reward": 1.0, "reward_low": None, "reward_high": None},
    ]
    assert report.markdown(rows) == (
        "| method | sciworld seen |\n|---|---|\n| dmpo_printed | 0.500 [0.250, 0.750] |\n| expert | 1.000 |\n"
    )
    assert r"dmpo\_printed & 0.500 {\scriptsize [0.250, 0.750]} \\" in report.latex(rows)
    assert r"expert & 1.000 \\" in report.latex(rows)


def test_facts_of_drops_and_notes_are_found(small: Config):
    stages = report.finished(small)
    assert [(one.name, reason, count) for one, reason, count in report.left_out(stages)] == [
        ("pairs", "dropped: tie", 2)
    ]
    assert [note for one in stages for note in report.notes(one.facts)] == [ODD]
    assert report.notes({"deviations": "one sentence"}) == ["one sentence"]


def test_what_episodes_waited_for_is_told_over_all_stages():
    def stage(name: str, **facts: float) -> report.Done:
        return report.Done(env="webshop", seed=0, name=name, folder=Path(name), manifest={"facts": facts})

    stages = [
        stage("experts", env_seconds=5.0, queue_seconds=900.0),
        stage("rollout", engine_seconds=50, env_seconds=10, queue_seconds=0, prefix_cache_hit_rate=0.9),
        stage("evaluate/sft/seen", engine_seconds=30, env_seconds=5, queue_seconds=5, prefix_cache_hit_rate=0.75),
    ]
    assert report.waits_told(stages) == (
        "What the policies' episodes, many at once, waited for: the engine 80%, environments at work 15%, their "
        "turn of a worker 5%. "
        "The prefix cache held 75% to 90% of a stage's prompt tokens."
    )
    assert report.waits_told(stages[:1]) == ""


def test_the_sample_shows_all_policies_on_the_same_tasks_and_every_kind():
    sft = [play("sft", "seen", 0, task) for task in range(40)]
    dmpo = [play("dmpo", "seen", 1, task) for task in reversed(range(40))]
    kinds = {one.id: one.kind for one in sft}
    shown = [one.id for one in sample(sft, kinds, 10)]
    assert {one.id for one in sample(dmpo, kinds, 10)} == set(shown)
    assert {kinds[task] for task in shown} == {"boil", "find-plant", "lifespan-longest", "use-thermometer"}
    assert shown == [one.id for one in sft if one.id in shown]  # in their own order
    assert sample(sft, kinds, 40) == sft


def test_an_arm_with_choose_is_told_by_what_was_chosen_for_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    named = {"picked": {"method": "dmpo", "choose": {"train.gamma": [0.5, 0.9]}}}
    config = make_run(methods=["dmpo", "eto"], seeds=[0, 1, 2], tasks=2, env={"dev_tasks": 1}, arms=named)
    seeds = [config.folder / "sciworld" / f"seed{seed}" for seed in (0, 1, 2)]
    logs = report.training_logs(config, "sciworld")
    assert {name for name, _ in logs} == {"sft", "dmpo", "eto", "eto, round 1", "picked"}
    for seed, gamma in enumerate((0.5, 0.9, 0.5)):
        assert logs["picked", seed] == report.read_log(seeds[seed] / f"train/picked@train.gamma={gamma}/log.jsonl")
    assert logs["eto, round 1", 2] == report.read_log(seeds[2] / "rounds/eto/1/train/log.jsonl")
    found = [one for one in weightings(config) if one["policy"] == "picked"]
    assert [(one["seed"], one["gamma"]) for one in found] == [(0, 0.5), (1, 0.9), (2, 0.5)]
    assert report.discounts_told(weightings(config)) == [
        "dmpo: γ = 0.7, β = 0.1",  # noqa: RUF001
        "eto: β = 0.1",
        "picked: γ = 0.5 (2 of 3), 0.9 (1 of 3), β = 0.1",  # noqa: RUF001
    ]
    report.main(config)
    for figure in ("preference-sciworld", "turns-sciworld"):
        drawn = (config.folder / "figures" / f"{figure}.svg").read_text("utf-8")
        assert all(f">{name}<" in drawn for name in ("picked", "eto", "eto, round 1"))


def test_arms_of_one_training_have_its_log_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    harder = {"harder": {"method": "dmpo", "evaluate.env": {"example": False}}}
    config = make_run(methods=["dmpo"], seeds=[0], tasks=2, arms=harder)
    assert list(report.training_logs(config, "sciworld")) == [("sft", 0), ("dmpo", 0)]


def test_contrasts_are_judged_with_the_other_comparisons_and_bounds_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    contrasts = [("dpo", "dmpo"), ("sft", "dmpo"), ("mean", "dmpo")]  # the second is compared anyway
    config = make_run(methods=["bon", "dmpo", "dpo", "mean"], seeds=[0], tasks=12, compare=contrasts)
    report.main(config)
    rows = rows_of(config.folder / "differences.csv")
    compared = [(row["method"], row["baseline"]) for row in rows if row["split"] == "seen"]
    judged = [("dmpo", "sft"), ("dpo", "sft"), ("mean", "sft"), ("dmpo", "dpo"), ("dmpo", "mean")]
    assert compared == [*judged, ("random", "sft"), ("bon", "sft")]
    family = [row for row in rows if row["method"] not in ("random", "bon")]
    assert [float(row["p_holm"]) for row in family] == pytest.approx(
        holm([float(row["p"]) for row in family]), abs=1e-5
    )
    assert {(row["p_holm"], row["verdict"]) for row in rows if row not in family} == {("", "not judged")}
    told = json.loads((config.folder / "report" / "tables.json").read_text("utf-8"))
    assert {(row["method"], row["baseline"]) for row in told["contrasts"]} == {("dmpo", "dpo"), ("dmpo", "mean")}
    sentences = [*report.findings(told["paired"]), *report.contrasts_told(told["contrasts"])]
    assert not any(name in sentence for sentence in sentences for name in ("random", "bon"))
    seen = next(row for row in rows if (row["method"], row["baseline"], row["split"]) == ("dmpo", "dpo", "seen"))
    start = f"dmpo less dpo: {seen['verdict']} on sciworld seen ({float(seen['difference']):+.3f} ["
    assert sentences[3].startswith(start)
    page = (config.folder / "report.html").read_text("utf-8")
    assert start in page
    assert '<th scope="row">dmpo less mean</th>' in page
    assert "dmpo less mean" in capsys.readouterr().out


def test_a_run_without_a_trained_policy_has_bounds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = make_run(methods=["bon"], seeds=[0], tasks=2)
    report.main(config)
    assert {row["method"] for row in rows_of(config.folder / "differences.csv")} == {"random", "bon"}


def norm_run() -> Config:
    """A run of `dpo_norm` with a tokenizer; an engine played its SFT policy."""
    config = make_run(methods=["dpo_norm"], seeds=[0], tasks=2)
    save_tiny_policy(config.folder / "sciworld" / "seed0" / "sft" / "policy")
    path = config.folder / "sciworld" / "seed0" / "evaluate" / "sft" / "seen" / "episodes.jsonl"
    played = read_jsonl(path, Trajectory)
    for one in played:
        for turn in one.turns:
            turn.token_ids = [1, 2, 3]
    write_jsonl(path, played)
    return config


def test_length_normalised_weights_are_one_over_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = norm_run()
    folder = config.folder / "sciworld" / "seed0"
    played = {
        ("sciworld", 0, policy, "seen"): read_jsonl(
            folder / "evaluate" / policy / "seen" / "episodes.jsonl", Trajectory
        )
        for policy in ("sft", "expert")
    }
    told = content(config, played, {})
    assert [(one["policy"], one["per_token"]) for one in told["weightings"]] == [("dpo_norm", True)]
    renderer = Renderer(AutoTokenizer.from_pretrained(folder / "sft" / "policy"))
    engine, expert = played.values()
    expected = [3 * len(one.turns) for one in engine]
    expected += [renderer.render(one.prompt, one.completion).trained_tokens for one in expert]
    assert [item["sides"][0]["tokens"] for item in told["items"]] == expected


def test_viewer_weights_are_the_discounts(small: Config):
    played = {("sciworld", 0, "sft", "seen"): [play("sft", "seen", 0, task) for task in range(3)]}
    told = content(small, played, {})
    for item in told["items"]:
        turns = len(item["sides"][0]["turns"])
        expected = [0.7**t * (1 - 0.7 ** (turns - t)) / (1 - 0.7**turns) for t in range(turns)]
        assert told["weights"][told["weightings"][0]["table"]][turns] == pytest.approx(expected, abs=1e-5)
    assert [(one["policy"], one["gamma"], one["per_token"]) for one in told["weightings"]] == [("dmpo", 0.7, False)]
    assert {item["sides"][0]["tokens"] for item in told["items"]} == {None}


# ---- In a browser ----

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--no-first-run"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.fail("These tests drive a real Chromium and find none: apt-get install chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, run: Config) -> Iterator[Any]:
    """The report, opened from disk; whatever goes wrong in it fails the test at its end."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    address, wrong = (run.folder / "report.html").resolve().as_uri(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(address) else wrong.append(request.url))
    page.goto(address)
    page.wait_for_selector(".turn")
    yield page
    assert wrong == []
    assert page.evaluate("window.injected") is None
    page.close()


def episode(run: Config, policy: str, split: str, seed: int = 0) -> Trajectory:
    path = run.folder / "sciworld" / f"seed{seed}" / "evaluate" / policy / split / "episodes.jsonl"
    return read_jsonl(path, Trajectory)[0]


def shading(page: Any) -> list[str]:
    return page.eval_on_selector_all(".said", "all => all.map(one => getComputedStyle(one).backgroundColor)")


@pytest.mark.browser
def test_an_episode_is_shown_as_recorded(page: Any, run: Config):
    page.select_option("#viewer-policy", "sft")
    page.select_option("#viewer-split", "seen")
    record = episode(run, "sft", "seen")
    page.click("#viewer-list a")
    assert page.text_content("#viewer-task h3") == record.id
    assert page.text_content("#viewer-task .text") == record.prompt[-1]["content"]
    assert ODD in record.turns[0].text
    assert page.eval_on_selector_all(".reply", "all => all.map(one => one.textContent)") == [
        turn.text for turn in record.turns
    ]
    assert page.eval_on_selector_all(".observation", "all => all.map(one => one.textContent)") == [
        turn.observation for turn in record.turns
    ]
    assert page.locator(".turn.wrong").count() == sum(not turn.valid for turn in record.turns)
    head = page.text_content(".side")
    assert f"reward {record.reward:.3f}" in head
    assert "max steps" in head


@pytest.mark.browser
def test_a_pair_is_read_side_by_side(page: Any):
    assert page.input_value("#viewer-policy") == "pairs"
    assert page.eval_on_selector_all(".side h3", "all => all.map(one => one.textContent)") == ["chosen", "rejected"]
    chosen, rejected = (
        page.locator(f".turn[data-side={side}]").first.bounding_box() for side in ("chosen", "rejected")
    )
    assert chosen["y"] == rejected["y"]
    assert chosen["x"] + chosen["width"] <= rejected["x"]


@pytest.mark.browser
def test_turns_are_shaded_by_the_chosen_methods_weight(page: Any):
    page.select_option("#viewer-policy", "sft")
    numbers = page.eval_on_selector_all(".turn", "all => all.map(one => Number(one.dataset.phi))")
    assert numbers[0] == 1
    assert numbers == sorted(numbers, reverse=True)
    assert page.text_content(".turn .phi") == "φ 1.000"
    assert f"φ {numbers[1]:.3f}" == page.locator(".turn .phi").nth(1).text_content()
    faded = shading(page)
    assert len(set(faded)) == len(faded)
    page.select_option("#viewer-weights", "dpo")
    assert page.eval_on_selector_all(".turn", "all => all.map(one => one.dataset.phi)") == ["1"] * len(numbers)
    assert set(shading(page)) == {faded[0]}
    options = page.eval_on_selector_all("#viewer-weights option", "all => all.map(one => one.textContent)")
    assert options == ["dmpo, γ = 0.7", "dpo"]  # noqa: RUF001


@pytest.mark.browser
def test_length_normalised_weights_are_shown(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = norm_run()
    report.main(config)
    page = browser.new_page()
    page.goto((config.folder / "report.html").resolve().as_uri())
    page.wait_for_selector(".turn")
    page.select_option("#viewer-policy", "sft")
    page.select_option("#viewer-split", "seen")
    numbers = page.eval_on_selector_all(".turn", "all => all.map(one => Number(one.dataset.phi))")
    assert numbers == pytest.approx([1 / (3 * len(numbers))] * len(numbers))
    assert page.text_content("#viewer-weights option") == "dpo_norm, 1 / tokens"
    page.close()


@pytest.mark.browser
def test_arrow_keys_and_buttons_walk_through_the_list(page: Any):
    page.select_option("#viewer-policy", "dmpo")
    tasks = page.eval_on_selector_all("#viewer-list .task", "all => all.map(one => 'sciworld:' + one.textContent)")
    page.locator("body").press("ArrowRight")
    page.locator("body").press("ArrowRight")
    assert page.text_content("#viewer-task h3") == tasks[2]
    page.locator("body").press("ArrowLeft")
    assert page.text_content("#viewer-task h3") == tasks[1]
    page.click("#viewer-next")
    assert page.text_content("#viewer-place") == f"3 of {EMBEDDED}"
    page.locator("#viewer-list [aria-current]").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.text_content("#viewer-task h3") == tasks[4]


@pytest.mark.browser
def test_a_view_has_an_address_of_its_own(page: Any, browser: Any):
    page.select_option("#viewer-seed", "1")
    page.select_option("#viewer-policy", "dpo")
    page.select_option("#viewer-split", "unseen")
    page.select_option("#viewer-kind", "find-plant")
    page.select_option("#viewer-beside", "sft")
    page.select_option("#viewer-weights", "dpo")
    page.click("#viewer-next")
    shown = page.text_content("#viewer-turns")
    other = browser.new_page()
    other.goto(page.url)
    other.wait_for_selector(".turn")
    assert other.text_content("#viewer-turns") == shown
    assert other.eval_on_selector_all(".side h3", "all => all.map(one => one.textContent)") == ["dpo", "sft"]
    assert other.input_value("#viewer-kind") == "find-plant"
    other.close()


@pytest.mark.browser
def test_finding_by_id_and_status(page: Any):
    page.select_option("#viewer-policy", "dmpo")
    page.fill("#viewer-find", "env_error")
    assert page.locator("#viewer-list li").count() == 1
    assert SCRIPT in page.text_content(".side .note")
    page.fill("#viewer-find", "no such task")
    assert page.text_content("#viewer-turns") == "Nothing here matches."
    page.fill("#viewer-find", "")
    assert page.locator("#viewer-list li").count() == EMBEDDED
    assert f"the page holds {EMBEDDED} of {TASKS}" in page.text_content("#viewer-count")
    assert "python -m pipeline inspect" in page.text_content("#viewer-count")


@pytest.mark.browser
def test_tables_are_copied(page: Any):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("summary:has-text('Markdown or LaTeX')")
    page.click("button[data-copy=latex]")
    page.wait_for_selector("text=Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("\\begin{tabular}{lcc}")
    assert copied == page.input_value("#latex")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_text_can_be_read(page: Any, scheme: str):
    """Contrast of at least 4.5 (WCAG 2.1 AA) of text on what is behind it, full shading included."""
    page.emulate_media(color_scheme=scheme)
    page.fill("#viewer-find", "")
    worst = page.evaluate(CONTRAST)
    assert worst["ratio"] >= 4.5, worst


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => rgb.map((value) => value / 255)
    .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  let worst = { ratio: 99 };
  for (const node of document.querySelectorAll("h1, h2, h3, p, a, dt, dd, th, td, span, b, summary, li, figcaption")) {
    if (!node.textContent.trim() || !node.checkVisibility()) continue;
    const behind = [];
    for (let at = node; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const [text, ground] = [[...behind, getComputedStyle(node).color], behind].map(paint).map(luminance);
    const ratio = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    if (ratio < worst.ratio) worst = { ratio, text: node.textContent.slice(0, 60), tag: node.tagName, behind };
  }
  return worst;
}"""


def test_findings_are_three_sentences_and_call_nothing_better_that_is_not_told_apart():
    row = {"env": "sciworld", "split": "seen", "difference": 0.05, "low": 0.01, "high": 0.09}
    rows = [
        row | {"method": "dmpo", "verdict": "better"},
        row | {"method": "dpo", "verdict": "not told apart"},
        row | {"method": "random", "verdict": "not judged"},
    ]
    assert report.findings(rows) == [
        "Better than the SFT policy: dmpo on sciworld seen (+0.050 [0.010, 0.090]).",
        "Worse: none.",
        "Not told apart from it: dpo on sciworld seen (+0.050 [0.010, 0.090]).",
    ]
