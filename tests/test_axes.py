import pytest

from pipeline import arms
from pipeline.axes import axis
from pipeline.config import Config
from pipeline.recipe import load


def of(recipe):
    config = load(recipe) if isinstance(recipe, str) else Config.model_validate({"run": "study", "arms": recipe})
    return axis([arm for arm in arms.of(config) if arm.name in config.arms])


def test_lines_of_a_grid():
    found = of("study/gamma-noise")
    assert (found.key, found.values) == ("train.gamma", [0.1, 0.5, 0.9, 0.99])
    assert list(found.lines) == ["corrupted 0.0", "corrupted 0.5", "corrupted 1.0"]
    assert found.lines["corrupted 0.5"][0.9] == "g0.9-noise0.5"


def test_keys_that_go_with_the_axis_or_the_method_make_no_lines():
    found = of("study/loser-length")
    assert (found.key, list(found.lines)) == ("pairs.min_turns", ["dpo", "dmpo"])
    grid = {
        f"{method}{limit}": {"method": method, "train.beta": beta, "pairs.limit": limit}
        for method, beta in (("dpo", 0.1), ("dpo_norm", 5.0))
        for limit in (10, 20, 30)
    }
    assert list(of(grid).lines) == ["dpo", "dpo_norm"]


def test_an_arm_without_the_key_stands_at_the_recipes_value():
    grid = {
        "low": {"method": "dpo", "train.beta": 0.01},
        "as-it-is": {"method": "dpo"},
        "high": {"method": "dpo", "train.beta": 1.0},
    }
    assert of(grid).lines == {"policy": {0.01: "low", Config().train.beta: "as-it-is", 1.0: "high"}}


@pytest.mark.parametrize("recipe", ["study/main", "study/controls", "study/disparity", "study/reward", "study/shift"])
def test_nothing_to_draw_a_line_over(recipe):
    assert of(recipe) is None


def test_an_incomplete_grid_has_no_axis():
    assert of({f"d{beta}": {"method": "dpo", "train.beta": beta} for beta in (0.1, 0.2, 0.3)}) is not None
    grid = {f"d{beta}": {"method": "dpo", "train.beta": beta} for beta in (0.1, 0.2, 0.3)}
    assert of(grid | {"m": {"method": "dmpo", "train.beta": 0.1}}) is None
