import pytest
import yaml

from pipeline.config import Config, describe
from pipeline.recipe import RECIPES, load


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_recipe_parses(path):
    assert load(str(path)).run == "-".join(path.relative_to(RECIPES).with_suffix("").parts)


def test_overrides_win_over_the_recipe_and_the_recipe_over_defaults(recipe):
    loaded = load(recipe("sft: {epochs: 2, learning_rate: 1e-3}\n"), ["sft.epochs=4", "run=x", "seed=1,2"])
    assert (loaded.sft.epochs, loaded.sft.learning_rate, loaded.sft.batch_size) == (4, 1e-3, 64)
    assert (loaded.run, loaded.seed) == ("x", [1, 2])


def test_env_is_both_a_list_and_a_section(recipe):
    path = recipe("env: {names: [sciworld], example: false, sciworld: {tasks: [boil, melt]}}\n")
    loaded = load(path, ["env=sciworld", "env.sciworld.eval_variations=3"])
    assert loaded.env.names == ["sciworld"]
    assert loaded.env.example is False
    assert loaded.env.sciworld.tasks == ["boil", "melt"]
    assert load(path, ["env.sciworld.tasks=melt,freeze"]).env.sciworld.tasks == ["melt", "freeze"]
    assert load(path, ["run=1"]).run == "1"
    assert loaded.env.sciworld.eval_variations == 3
    assert load(recipe("env: sciworld\n")).env.names == ["sciworld"]


def test_the_resolved_recipe_reads_back_equal(recipe, tmp_path):
    loaded = load("tiny", ["seed=3"])
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(loaded.model_dump(mode="json")))
    assert load(str(path)) == loaded


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["sft.epoch=1"], "unknown key 'sft.epoch'; did you mean 'sft.epochs'?"),
        (["env=mars"], "env.names.0: unknown environment; known: alfworld, sciworld, webshop"),
        (["method=ppo"], "method.0: Input should be 'sft', 'bon'"),
        (["train.gamma=2"], "train.gamma: Input should be less than or equal to 1 (given: 2)"),
        (["sft.batch_size=many"], "sft.batch_size: Input should be a valid integer"),
        (["sft.batch_size=10", "sft.micro_batch_size=4"], "batch_size 10 is no multiple of micro_batch_size 4"),
        (["env.sciworld.tasks=[boyl]"], "boyl"),
        (["evaluate.splits=test"], "evaluate.splits.0: Input should be 'train', 'dev', 'seen' or 'unseen'"),
        (["nonsense"], "'nonsense' is no override; write key=value"),
        (["seed.x.y=1"], "seed"),
        (["sft.epochs=[1"], "the value is no YAML"),
        (["run=../elsewhere"], "run: String should match pattern"),
        (["run=.."], "run: String should match pattern"),
        (["seed=0,0"], "seed: names something twice"),
        (["seed=-1"], "seed.0: Input should be greater than or equal to 0"),
        (["evaluate.splits=[]"], "evaluate.splits: Value should have at least 1 item"),
        (["model.path=x", "model.layers=2"], "layers is a size of a new model"),
        (["rollout.temperature=0", "rollout.samples=4"], "samples and top_p have no effect at temperature 0"),
        (["seed=true"], "seed"),
        (["env="], "env.names: Value should have at least 1 item"),
        (["engine.name=hf", "engine.concurrency=4"], "engine.concurrency has no effect with engine.name=hf"),
        (["evaluate.splits=dev"], "evaluate.splits: dev has no tasks; set env.dev_tasks"),
        (["experts.source=x.json", "env=sciworld,webshop"], "experts.source holds the data of one environment"),
        (["experts.tasks=0"], "experts.tasks: a number of tasks must be at least 1, and 0 is not"),
        (["experts.tasks={webshop: -1}"], "experts.tasks: a number of tasks must be at least 1, and -1 is not"),
        (["experts.tasks={shop: 3}"], "experts.tasks: unknown environment; known: alfworld, sciworld, webshop"),
        (["experts.min_reward=0"], "experts.min_reward: Input should be greater than 0"),
        (["env.webshop.mistakes=another option"], "has no effect: env.webshop.noise is 0"),
        (["env.webshop.noise=1", "env.webshop.mistakes="], "env.webshop.mistakes: Value should have at least 1 item"),
        (["experts.tasks.webshop=3", "env=sciworld"], "has no effect: the run plays sciworld"),
        (["sft.epochs=9"], "'sft.epochs=9' has no effect: sft.max_steps=700 decides"),
        (["train.gamma=0.5", "method=trajectory"], "'train.gamma=0.5' has no effect: method=dpo makes no use of it"),
        (["train.gamma=0.5", "method=dpo,rft"], "method=dpo makes no use of it; method=rft makes no use of it"),
        (["train.beta=3", "method=rft"], "'train.beta=3' has no effect: method=rft makes no use of it"),
        (["train={beta: 3}", "method=rft"], "has no effect: method=rft makes no use of it"),
        (["rft.epochs=3"], "'rft.epochs=3' has no effect: method=dmpo makes no use of it"),
        (["rft.epochs=3", "rft.max_steps=9", "method=rft"], "has no effect: rft.max_steps=9 decides"),
        (["rollout.tasks=9", "method=sft"], "has no effect: method=sft makes no use of it"),
        (["rollout.samples=4", "method=step"], "has no effect: method=step makes no use of it"),
        (["rollout.tasks=9", "method=rft", "rft.min_reward="], "rft.min_reward is empty, so nothing that was explored"),
        (["pairs.limit=5", "method=step"], "method=step makes no use of it without step.with_trajectories"),
        (["train.reference=kept"], "'train.reference=kept' has no effect: train.rounds is 1"),
        (["evaluate.env={webshop.catalogue_seed: 1}", "env=alfworld"], "has no effect: the run plays alfworld"),
        (["model.lora_alpha=2"], "has no effect: model.lora_rank is 0"),
        (["model.load_in_4bit=true"], "load_in_4bit is of the frozen base of a LoRA policy; set model.lora_rank"),
        (["pairs.corruption=random"], "has no effect: pairs.corrupted is 0"),
        (["compare=[[dpo, dmpo]]"], "compare: the run has no policy 'dpo' to compare; it has sft, dmpo."),
        (["compare=[[bon, dmpo]]", "method=bon,dmpo"], "compare: the run has no policy 'bon' to compare; it has sft,"),
        (["compare=[[dmpo, dmpo]]"], "compare: dmpo is set against itself"),
        (["compare=[[sft, dmpo], [sft, dmpo]]"], "compare: names something twice"),
        (["compare=[dmpo]"], "compare.0: Input should be a valid tuple"),
        (["pairs.min_gap=0.1", "pairs.reward=success"], "has no effect: pairs.reward=success knows 0 and 1 alone"),
        (["pairs.min_turns=5", "pairs.max_turns=4"], "min_turns 5 is more than max_turns 4"),
        (["pairs.min_turn_gap=5", "pairs.max_turn_gap=4"], "min_turn_gap 5 is more than max_turn_gap 4"),
        (["env=alfworld", "env.sciworld.heap_mb=600"], "has no effect: the run plays alfworld"),
        (["workers.slots=128"], "heap_mb=1024 is too little for 128 environments in a process; set it to 2610 or more"),
    ],
)
def test_bad_keys_and_values_are_one_sentence(overrides, complaint):
    with pytest.raises(ValueError) as error:
        load("tiny", overrides)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.gamma=0.5", "method=dpo,dmpo"],
        ["pairs.limit=5", "method=step", "step.with_trajectories=true"],
        ["train.reference=kept", "method=eto"],
        ["train.reference=kept", "train.rounds=2"],
        ["rollout.temperature=1", "method=step"],
        ["rollout.samples=4", "method=rft"],
        ["bon.samples=3", "method=dmpo,bon"],
    ],
)
def test_what_changes_one_of_the_policies_is_accepted(overrides):
    assert load("tiny", overrides).run == "tiny"


def test_a_recipe_may_hold_keys_for_other_methods_than_it_has(recipe):
    path = recipe("method: [rft]\ntrain: {gamma: 0.2}\nstep: {samples: 2}\npairs: {limit: 9}\n")
    assert load(path, ["method=dmpo"]).train.gamma == 0.2
    assert load(path).method == ["rft"]


def test_an_override_of_what_every_arm_says_itself_is_refused(recipe):
    path = recipe("method: [sft]\narms: {a: {method: dmpo, train.beta: 1}, b: {method: dpo, train.beta: 2}}\n")
    assert load(path, ["train.nll=1"]).train.nll == 1
    with pytest.raises(ValueError, match=r"'train.beta=3' has no effect: the arms have values of their own\.$"):
        load(path, ["train.beta=3"])
    with pytest.raises(ValueError, match="the arms have values of their own; method=rft makes no use of it"):
        load(recipe("method: []\narms: {a: {method: dmpo, train.beta: 1}, b: {method: rft}}\n"), ["train.beta=3"])


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"No recipe 'huge': .*tiny"):
        load("huge")


def test_a_recipe_that_is_no_yaml_is_named(recipe):
    path = recipe("a: [1\n")
    with pytest.raises(ValueError, match="not YAML") as error:
        load(path)
    assert path in str(error.value)


def test_every_key_is_described():
    rows = {name: (default, meaning) for name, default, meaning in describe(Config)}
    assert not [name for name, (_, meaning) in rows.items() if not meaning]
    assert rows["train.gamma"][0] == "0.7"
    assert rows["seed"][0] == "[0]"
    assert "sft.learning_rate" in rows
    assert "AdamW" in rows["sft.learning_rate"][1]


def test_config_loads_nothing_heavy():
    """A second run_all.sh must be fast: reading a recipe imports neither torch nor transformers."""
    import subprocess
    import sys

    code = (
        "import sys, pipeline.config, pipeline.runs; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_a_recipe_builds_on_another(recipe, tmp_path):
    below = recipe("sft: {epochs: 2, learning_rate: 1e-3}\nmethod: [dpo]\narms: {a: {method: dmpo}}\n")
    above = tmp_path / "above.yaml"
    above.write_text(f"base: {below}\nsft: {{epochs: 5}}\narms: {{b: {{method: mean}}}}\n")
    loaded = load(str(above))
    assert (loaded.sft.epochs, loaded.sft.learning_rate, loaded.run) == (5, 1e-3, "above")
    assert loaded.method == ["dpo"]
    assert list(loaded.arms) == ["b"]


def test_what_is_compared_goes_with_the_arms(recipe, tmp_path):
    below = recipe("arms: {a: {method: dpo}}\ncompare: [[a, dmpo]]\n")
    above = tmp_path / "above.yaml"
    above.write_text(f"base: {below}\nseed: 1\n")
    assert load(str(above)).compare == [("a", "dmpo")]
    above.write_text(f"base: {below}\narms: {{b: {{method: mean}}}}\n")
    assert load(str(above)).compare == []
    again = load(str(above), ["compare=[[b, dmpo]]"])
    assert again.compare == [("b", "dmpo")]
    assert again.differing({"seed": 2}).compare == []


def test_a_recipe_that_builds_on_itself_is_refused(recipe, tmp_path):
    path = tmp_path / "circle.yaml"
    path.write_text(f"base: {path}\n")
    with pytest.raises(ValueError, match="leads back to it"):
        load(str(path))


def test_one_path_may_name_the_expert_data_of_every_environment():
    loaded = load("tiny", ["experts.source=data/{env}_sft.json"])
    assert [str(loaded.experts.source_of(env)) for env in loaded.env.names] == [
        *("data/sciworld_sft.json", "data/alfworld_sft.json", "data/webshop_sft.json")
    ]
    assert load("tiny", []).experts.source_of("webshop") is None


def test_a_studys_run_is_named_after_it():
    assert load("study/beta").run == "study-beta"
    assert load("study/beta").folder.parts == ("runs", "study-beta")
