import pytest
from transformers import AutoTokenizer

from pipeline.config import PairsConfig
from pipeline.examples import pair_examples, sft_examples
from pipeline.pairing import build
from pipeline.rendering import Renderer
from tests.test_pairing import expert
from tests.test_records import trajectory
from tests.tiny_policy import save_tiny_policy


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    return Renderer(AutoTokenizer.from_pretrained(save_tiny_policy(tmp_path_factory.mktemp("policy"))))


def talk(turns, **changes):
    """A trajectory of so many turns."""
    one = trajectory(**changes)
    reply, answer = one.completion[0], {"role": "user", "content": "Observation: nothing happens here, as ever"}
    one.messages = [*one.prompt, *([reply, answer] * turns)[:-1]]
    one.turns = [one.turns[0].__class__(text="", action="", observation="", reward=0, valid=True) for _ in range(turns)]
    return one


def test_what_is_too_long_loses_whole_turns_and_is_counted(renderer):
    whole, counts = sft_examples(renderer, [talk(4)], 10_000)
    assert (whole[0].turns, counts["turns_cut_off"], counts["trajectories_cut"]) == (4, 0, 0)
    cut, counts = sft_examples(renderer, [talk(4)], len(whole[0].ids) - 1)
    assert (cut[0].turns, counts["turns_cut_off"], counts["trajectories_cut"]) == (3, 1, 1)
    assert cut[0].ids == whole[0].ids[: len(cut[0].ids)]


def test_what_does_not_fit_at_all_is_dropped_by_name_or_refused(renderer):
    long = trajectory(id="long:0", prompt_length=1)
    long.messages = [{"role": "user", "content": "word " * 500}, long.completion[0]]
    examples, counts = sft_examples(renderer, [talk(1), long], 100)
    assert (len(examples), counts["dropped_too_long"]) == (1, ["long:0"])
    with pytest.raises(ValueError, match=r"No trajectory fits into model.max_length=100"):
        sft_examples(renderer, [long], 100)


def pairs_of(rejected):
    one = talk(2)
    chosen = expert(messages=one.messages, turns=one.turns)
    return build([chosen], [rejected], PairsConfig(), seed=0)[0]


def test_both_sides_of_a_pair_are_rendered_and_counted(renderer):
    kept, examples, counts = pair_examples(renderer, pairs_of(talk(5)), 10_000)
    assert len(kept) == 1
    assert [side.turns for side in examples[0]] == [2, 5]
    assert counts["trajectories"] == 2


def test_a_pair_of_which_a_side_renders_to_nothing_is_named(renderer):
    pairs = pairs_of(talk(1))
    pairs[0].rejected = []
    with pytest.raises(ValueError, match=r"The pair of sciworld:boil:3 \(sft/seed0/0\) cannot be rendered: .*empty"):
        pair_examples(renderer, pairs, 10_000)


def test_pairs_that_do_not_fit_are_refused_when_none_is_left(renderer):
    with pytest.raises(ValueError, match=r"No pair fits into model.max_length=8"):
        pair_examples(renderer, pairs_of(talk(1)), 8)
