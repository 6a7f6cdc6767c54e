import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.losses import Discount, discount, preference_loss

GAMMAS = [0.0, 0.1, 0.5, 0.7, 0.9, 0.99, 1.0]
FAMILY = [Discount.DMPO, Discount.DMPO_PRINTED]
DMPO_SHAPED = [Discount.DMPO, Discount.REVERSED, Discount.PERMUTED, Discount.MATCHED]

lengths_and_gamma = st.tuples(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.floats(0, 1))


def table(name: str, lengths: list[int], gamma: float, **kwargs) -> Tensor:
    return discount(name, torch.tensor(lengths), gamma, dtype=torch.float64, **kwargs)


def random_batch(lengths: list[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -20 * torch.rand(len(lengths), max(lengths), generator=generator, dtype=torch.float64)
    return logprobs.where(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], 0.0)


@pytest.mark.parametrize(
    ("name", "gamma", "expected"),
    [
        # T = 3, gamma = 1/2: 1 - gamma^3 = 7/8, 1 - gamma^2 = 3/4, 1 - gamma = 1/2.
        ("dmpo", 0.5, [1, 1 / 2 * 6 / 7, 1 / 4 * 4 / 7]),
        ("dmpo_printed", 0.5, [1, 6 / 7, 4 / 7]),
        ("trajectory", 0.5, [1, 1, 1]),
        ("mean", 0.5, [1 / 3, 1 / 3, 1 / 3]),
        ("reversed", 0.5, [1 / 7, 3 / 7, 1]),
        ("matched", 0.5, [11 / 21, 11 / 21, 11 / 21]),
        ("dmpo", 1.0, [1, 2 / 3, 1 / 3]),
        ("dmpo_printed", 1.0, [1, 2 / 3, 1 / 3]),
        ("dmpo", 0.0, [1, 0, 0]),
        ("dmpo_printed", 0.0, [1, 1, 1]),
        ("reversed", 0.0, [0, 0, 1]),
    ],
)
def test_discount_by_hand(name, gamma, expected):
    weights = table(name, [3, 1], gamma, max_turns=4)
    torch.testing.assert_close(weights[0], torch.tensor([*expected, 0], dtype=torch.float64))
    torch.testing.assert_close(weights[1], torch.tensor([1, 0, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("name", Discount)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_turn_has_weight_one_whatever_gamma(name, gamma):
    assert table(name, [1], gamma).tolist() == [[1.0]]


@pytest.mark.parametrize("name", [name for name in Discount if name.uses_gamma])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [2**-53, 1e-15, 1e-12, 1e-9, 1e-7])
def test_gamma_near_one_goes_into_its_branch(name, dtype, gap):
    lengths = torch.tensor([1, 2, 7, 120, 5000])
    near = discount(name, lengths, 1 - gap, dtype=dtype)
    limit = discount(name, lengths, 1.0, dtype=dtype)
    # phi moves by at most T per unit of gamma.
    torch.testing.assert_close(near, limit, rtol=0, atol=5000 * gap + 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", Discount)
@given(drawn=lengths_and_gamma)
def test_weights_are_finite_and_end_with_the_trajectory(name, drawn):
    lengths, gamma = drawn
    weights = table(name, lengths, gamma)
    assert weights.shape == (len(lengths), max(lengths))
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert (weights <= 1 + 1e-12).all()
    for row, length in zip(weights, lengths, strict=True):
        assert (row[length:] == 0).all()


@given(drawn=lengths_and_gamma)
def test_controls_keep_what_they_promise(drawn):
    lengths, gamma = drawn
    dmpo, flipped, shuffled, matched = (table(name, lengths, gamma, seed=5) for name in DMPO_SHAPED)
    torch.testing.assert_close(matched.sum(1), dmpo.sum(1))
    for row, length in enumerate(lengths):
        assert flipped[row, :length].tolist() == dmpo[row, :length].flip(0).tolist()
        assert sorted(shuffled[row].tolist()) == sorted(dmpo[row].tolist())
        assert matched[row, :length].unique().numel() == 1
    torch.testing.assert_close(table("mean", lengths, gamma).sum(1), torch.ones(len(lengths), dtype=torch.float64))


def test_permutations_depend_on_seed_and_length_alone():
    first = table("permuted", [9, 4, 9], 0.7, seed=3)
    assert first.tolist() == table("permuted", [9, 4, 9], 0.7, seed=3).tolist()
    assert first[0].tolist() == first[2].tolist()
    assert table("permuted", [4], 0.7, seed=3)[0].tolist() == first[1, :4].tolist()
    assert first.tolist() != table("permuted", [9, 4, 9], 0.7, seed=4).tolist()
    each = table("permuted", [9, 4, 9], 0.7, seed=[1, 2, 3])
    assert each[0].tolist() != each[2].tolist()
    assert each[2].tolist() == first[0].tolist()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("gamma", [0.01, 0.5, 0.9, 0.999])
def test_weights_fall_with_the_turn_and_start_at_one(name, gamma):
    weights = table(name, [12], gamma)[0]
    assert weights[0] == 1
    assert (weights.diff() <= 0).all()


def test_very_long_trajectories():
    assert table("dmpo", [100_000], 0.9)[0, :3].tolist() == pytest.approx([1, 0.9, 0.81])
    assert table("dmpo", [100_000], 1 - 1e-5).isfinite().all()


def test_float32_is_float64_rounded():
    lengths = torch.tensor([3, 50])
    for name in Discount:
        for gamma in (0.7, 0.999999):
            exact = discount(name, lengths, gamma, dtype=torch.float64)
            assert discount(name, lengths, gamma).tolist() == exact.float().tolist()


def test_discount_refuses():
    with pytest.raises(ValueError, match="no discount 'dpmo': choose one of dmpo, dmpo_printed, trajectory"):
        table("dpmo", [1], 0.5)
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            table("dmpo", [1], gamma)
    with pytest.raises(ValueError, match=r"1 to 2 turns; the lengths are \[2, 3\]"):
        table("dmpo", [2, 3], 0.5, max_turns=2)
    with pytest.raises(ValueError, match="1 to 2 turns"):
        table("dmpo", [0, 2], 0.5)


def test_what_uses_gamma():
    for name in Discount:
        moved = not torch.equal(table(name, [5], 0.2), table(name, [5], 0.8))
        assert moved == name.uses_gamma


def test_loss_by_hand():
    one = torch.tensor([[1.0, 0.5]])
    loss = preference_loss(
        policy_chosen=torch.tensor([[-1.0, -2.0]]),
        policy_rejected=torch.tensor([[-3.0, -1.0]]),
        reference_chosen=torch.tensor([[-2.0, -4.0]]),
        reference_rejected=torch.tensor([[-2.0, -2.0]]),
        weights_chosen=one,
        weights_rejected=one,
        beta=0.1,
    )
    # chosen 0.1 (1*1 + 0.5*2), rejected 0.1 (1*-1 + 0.5*1)
    torch.testing.assert_close(loss.chosen_rewards, torch.tensor([0.2]))
    torch.testing.assert_close(loss.rejected_rewards, torch.tensor([-0.05]))
    torch.testing.assert_close(loss.logits, torch.tensor([0.25]))
    torch.testing.assert_close(loss.losses, torch.tensor([math.log(1 + math.exp(-0.25))]))


def batch_loss(name="dmpo", gamma=0.7, beta=0.3, rows=slice(None), width=None, junk=0.0):
    """Four pairs; `width` pads every table to so many turns, with `junk` in the log-probs."""
    chosen, rejected = [1, 3, 5, 2], [4, 2, 6, 2]
    sides = [random_batch(lengths, seed) for seed, lengths in enumerate([chosen, rejected, chosen, rejected])]
    weights = [table(name, lengths, gamma) for lengths in (chosen, rejected)]
    if width:
        sides = [F.pad(side, (0, width - side.shape[1]), value=junk) for side in sides]
        weights = [F.pad(weight, (0, width - weight.shape[1])) for weight in weights]
    return preference_loss(*(tensor[rows] for tensor in (*sides, *weights)), beta=beta)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", Discount)
def test_one_turn_is_dpo(name, gamma):
    sides = [random_batch([1, 1], seed) for seed in range(4)]
    weights = table(name, [1, 1], gamma)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (side[:, 0] for side in sides)
    dpo = -F.logsigmoid(0.3 * ((policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)))
    torch.testing.assert_close(preference_loss(*sides, weights, weights, beta=0.3).losses, dpo)


def test_trajectory_is_dpo_on_sums():
    sides = [random_batch([5, 3], seed) for seed in range(4)]
    weights = table("trajectory", [5, 3], 0.7)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (side.sum(1) for side in sides)
    dpo = -F.logsigmoid(0.3 * ((policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)))
    torch.testing.assert_close(preference_loss(*sides, weights, weights, beta=0.3).losses, dpo)
    torch.testing.assert_close(batch_loss("dmpo_printed", gamma=0.0).losses, batch_loss("trajectory").losses)


def test_gamma_zero_is_dpo_on_the_first_turn():
    alone = batch_loss("trajectory", width=6)
    sides = [random_batch(lengths, seed)[:, :1] for seed, lengths in enumerate([[1, 3, 5, 2], [4, 2, 6, 2]] * 2)]
    ones = torch.ones(4, 1, dtype=torch.float64)
    expected = preference_loss(*sides, ones, ones, beta=0.3)
    torch.testing.assert_close(batch_loss("dmpo", gamma=0.0).losses, expected.losses)
    assert not torch.allclose(alone.losses, expected.losses)


def test_swapping_the_sides_flips_the_logit():
    sides = [random_batch([3, 2], seed) for seed in range(4)]
    weights = [table("dmpo", [3, 2], gamma) for gamma in (0.5, 0.9)]
    forth = preference_loss(*sides, *weights, beta=0.3)
    back = preference_loss(sides[1], sides[0], sides[3], sides[2], weights[1], weights[0], beta=0.3)
    assert back.logits.tolist() == (-forth.logits).tolist()
    assert back.chosen_rewards.tolist() == forth.rejected_rewards.tolist()


@pytest.mark.parametrize("name", Discount)
def test_padding_order_and_split_of_the_batch_change_nothing(name):
    whole = batch_loss(name)
    padded = batch_loss(name, width=9, junk=-math.inf)
    torch.testing.assert_close(padded.losses, whole.losses)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(batch_loss(name, rows=order).losses, whole.losses[order])
    halves = [batch_loss(name, rows=slice(0, 2)).losses, batch_loss(name, rows=slice(2, 4)).losses]
    torch.testing.assert_close(torch.cat(halves), whole.losses)


@pytest.mark.parametrize("name", Discount)
def test_gradcheck(name):
    chosen, rejected = ([3, 1], [2, 4])
    weights = [table(name, lengths, 0.7) for lengths in (chosen, rejected)]
    sides = [random_batch(lengths, seed) / 10 for seed, lengths in enumerate([chosen, rejected] * 2)]
    policy = [side.requires_grad_() for side in sides[:2]]

    def losses(policy_chosen, policy_rejected):
        return preference_loss(policy_chosen, policy_rejected, *sides[2:], *weights, beta=0.3).losses

    assert torch.autograd.gradcheck(losses, policy)


def test_extreme_logits_stay_finite():
    far = torch.tensor([[-1e4]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss = preference_loss(far, zero, zero, zero, one, one, beta=1.0)
    assert loss.losses.item() == 1e4
    loss.losses.sum().backward()
    assert far.grad.item() == -1


def test_label_smoothing_is_the_mean_of_both_labels():
    sides = [random_batch([3, 2], seed) for seed in range(4)]
    weights = [table("dmpo", [3, 2], 0.7)] * 2
    right = preference_loss(*sides, *weights, beta=0.3)
    wrong = preference_loss(sides[1], sides[0], sides[3], sides[2], weights[1], weights[0], beta=0.3)
    smoothed = preference_loss(*sides, *weights, beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(smoothed.losses, 0.9 * right.losses + 0.1 * wrong.losses)
    assert smoothed.logits.tolist() == right.logits.tolist()


def test_loss_refuses():
    side = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"label_smoothing=0.5 is outside \[0, 0.5\)"):
        preference_loss(side, side, side, side, side, side, beta=0.1, label_smoothing=0.5)
    for beta in (0, -0.1, math.nan):
        with pytest.raises(ValueError, match="must be above 0"):
            preference_loss(side, side, side, side, side, side, beta=beta)
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 1\) and \(2, 3\)"):
        preference_loss(side, side, side[:, :1], side, side, side, beta=0.1)
