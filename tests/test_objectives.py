"""What each method minimises: the stages pairs, reference and train up to the gradient, on hand-made trajectories."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from pipeline import arms, pairs, reference, runs, train, training
from pipeline.batches import Run, collate
from pipeline.methods import Method
from pipeline.records import write_jsonl
from tests.test_arms import recipe
from tests.test_steps import played
from tests.tiny_policy import save_tiny_policy

SEED, BETA = 3, 0.5


def tokened(one, *lengths):
    """The trajectory with so many tokens in its turns."""
    for turn, length in zip(one.turns, lengths, strict=True):
        turn.token_ids = list(range(10, 10 + length))
    return one


WINNER = tokened(played("abc", 0.8), 2, 1, 3)
LOSER = tokened(played("xy", 0.2, sample=1), 1, 3)
EXPERT = played("abcd", 1.0, policy="expert", begun_with=4)
FROM_STEPS = [
    tokened(played("abcd", 1.0), 0, 0, 0, 0),  # tokenised as text
    tokened(played("zw", 0.3, sample=1), 0, 0),
    tokened(played("axy", 0.0, sample=2, begun_with=1), 0, 0, 0),
    tokened(played("abcd", 0.8, sample=3, begun_with=2), 0, 0, 0, 0),
    tokened(played("abcd", 1.0, sample=4, begun_with=3), 0, 0, 0, 0),
]
"""Only after `a` there is a pair, of `bcd` and `xy`: `b` is worth 0.8, `x` nothing. `z` is worth more than `a`."""

WEIGHTS = {
    # gamma = 1/2. T = 3: 1 - gamma^3 = 7/8, 1 - gamma^2 = 3/4, 1 - gamma = 1/2. T = 2: 3/4, 1/2.
    "dmpo": ([1, 1 / 2 * 6 / 7, 1 / 4 * 4 / 7], [1, 1 / 2 * 2 / 3]),
    "dmpo_printed": ([1, 6 / 7, 4 / 7], [1, 2 / 3]),
    "dpo": ([1, 1, 1], [1, 1]),
    "eto": ([1, 1, 1], [1, 1]),
    "dpo_norm": ([1 / 6, 1 / 6, 1 / 6], [1 / 4, 1 / 4]),
    "mean": ([1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2]),
    "reversed": ([1 / 7, 3 / 7, 1], [1 / 3, 1]),
    "permuted": ([1 / 7, 1, 3 / 7], [1 / 3, 1]),  # the order 2, 0, 1 and 1, 0, as SEED draws it
    "matched": ([11 / 21, 11 / 21, 11 / 21], [2 / 3, 2 / 3]),  # (1 + 3/7 + 1/7) / 3 and (1 + 1/3) / 2
    "step": ([1, 1, 1], [1, 1]),
}
"""phi(t, T) of README's table for a winner of three turns and six tokens and a loser of two turns and four."""


def finish(folder, episodes):
    """A stage that has played these."""
    with runs.stage(folder, settings={}):
        write_jsonl(folder / runs.EPISODES, episodes)


def given_to_training(**tree):
    """The examples and the objective of every policy, by its name, and the tokenizer."""
    config = recipe(seed=[SEED], model={"max_length": 512}, pairs={"contest": "samples"}, **tree)
    every = arms.trained(config)
    sft = every[0].folder("sciworld", SEED, "sft")
    with runs.stage(sft, settings={}):
        save_tiny_policy(sft / "policy")
    finish(every[0].folder("sciworld", SEED, "experts"), [EXPERT])
    for arm in every:
        explored = FROM_STEPS if arm.method == Method.STEP else [WINNER, LOSER]
        finish(arm.folder("sciworld", SEED, "rollout"), explored)
    given = []

    def note(model, examples, objective, *how):
        given.append((examples, objective))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_train", note)
        for stage in (pairs, reference, train):
            stage.main(config)
    by_name = dict(zip((arm.name for arm in every), given, strict=True))
    return by_name, AutoTokenizer.from_pretrained(sft / "policy")


TERMS = [(0.0, 0.0), (0.1, 0.0), (0.1, 0.5)]
"""Label smoothing and weight of the SFT term."""


@pytest.fixture(scope="module", params=TERMS, ids=lambda terms: "smoothing{}-nll{}".format(*terms))
def terms_and_given(request, tmp_path_factory):
    """What training is given of every method under these terms."""
    smoothing, nll = request.param
    keys = {"beta": BETA, "gamma": 0.5, "label_smoothing": smoothing, "nll": nll}
    methods = [one for one in Method if one.is_trained]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        return smoothing, nll, given_to_training(method=methods, train=keys, rft={"min_reward": 0.5})[0]


def gradient(examples, objective, logprobs):
    """d loss / d log-prob, as `logprobs` a list [P, T] a side, of an optimizer step that holds just these examples."""
    run = Run(examples, [objective.items(one) for one in examples], batch_size=len(examples), epochs=1, seed=0)
    sides = [torch.tensor(side, requires_grad=True) for side in logprobs]
    loss, _ = objective(sides, collate([run[place] for place in range(len(run))]))
    loss.backward()
    return [side.grad.tolist() for side in sides]


@pytest.mark.parametrize("method", [one for one in Method if one.discount])
def test_the_gradient_of_every_preference_method_is_its_formula(terms_and_given, method):
    """With z = beta (sum of phi log-ratio over the winner's turns, less the loser's), e the smoothing, n the winner's
    tokens, and phi written out above:

        d loss / d log pi(a_t|s_t)  =  -(sigma(-z) - e) beta phi(t, T) - nll / n   on the winner's turns,
                                        (sigma(-z) - e) beta phi(t, T)             on the loser's
    """
    smoothing, nll, given = terms_and_given
    (pair,), objective = given[method]
    ratios = [1.0, -0.5, 0.75], [-2.0, 0.5]  # log(pi / pi_ref) of each turn
    logprobs = [
        [[old + moved for old, moved in zip(side.reference, of_turns, strict=True)]]
        for side, of_turns in zip(pair, ratios, strict=True)
    ]
    phi = WEIGHTS[method]
    winner, loser = (sum(w * r for w, r in zip(*side, strict=True)) for side in zip(phi, ratios, strict=True))
    pull = (1 / (1 + math.exp(BETA * (winner - loser))) - smoothing) * BETA
    n = pair[0].rendered.trained_tokens if method == Method.STEP else 6  # what the expert says is tokenised
    (of_winner,), (of_loser,) = gradient([pair], objective, logprobs)
    assert of_winner == pytest.approx([-pull * one - nll / n for one in phi[0]], rel=1e-4)
    assert of_loser == pytest.approx([pull * one for one in phi[1]], rel=1e-4)


def test_the_gradient_of_fine_tuning_is_one_a_token(terms_and_given):
    """Of `rft`, as of the stage `sft`: the mean over the step's tokens, so -1 / tokens for every turn's log-prob."""
    examples, objective = terms_and_given[2]["rft"]
    expert, own = (one.rendered for (one,) in examples)
    assert (expert.turns, own.turns, own.trained_tokens) == (4, 3, 6)
    ((of_longer, of_shorter),) = gradient(examples, objective, [[[-1.0] * 4, [-1.0, -1.0, -1.0, 0.0]]])
    tokens = 6 + sum(turn >= 0 for turn in expert.turn_index)
    assert of_longer == pytest.approx([-1 / tokens] * 4)
    assert of_shorter[:3] == pytest.approx([-1 / tokens] * 3)


def test_a_mixture_of_steps_and_whole_trajectories_trains_on_both(tmp_path, monkeypatch):
    """`step.with_trajectories`: what follows a step, the turns that it shares being context, and whole attempts."""
    monkeypatch.chdir(tmp_path)
    mixed = {"method": "step", "step.with_trajectories": True}
    given, tokenizer = given_to_training(method=["step"], arms={"mixed": mixed})
    step = ["bcd", "xy"]
    assert actions(given["step"][0], tokenizer) == [step]
    assert actions(given["mixed"][0], tokenizer) == [step, ["abcd", "zw"]]
    of_step, whole = given["mixed"][0]
    assert ["Action: a<" in tokenizer.decode(side.rendered.ids) for side in of_step] == [True, True]
    assert [side.weights for side in (*of_step, *whole)] == [[1.0] * turns for turns in (3, 2, 4, 2)]
    assert [len(side.reference) for side in (*of_step, *whole)] == [3, 2, 4, 2]


def actions(examples, tokenizer):
    """What the policy is to say on each side of each pair, a letter a turn."""
    return [[_said(side.rendered, tokenizer) for side in example] for example in examples]


def _said(rendered, tokenizer):
    of_policy = [one for one, turn in zip(rendered.ids, rendered.turn_index, strict=True) if turn >= 0]
    return tokenizer.decode(of_policy, skip_special_tokens=True).replace("Action: ", "")
