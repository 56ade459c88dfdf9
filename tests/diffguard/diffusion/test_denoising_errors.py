"""The formulas of denoising errors, by hand."""

import math

import pytest
import torch

from diffguard.diffusion.denoising_errors import hopeless, label_gain, posterior_odds


def test_the_gain_is_the_weighted_mean_of_log_ratios():
    under_label, under_none = torch.tensor([[0.1, 0.4]]), torch.tensor([[0.2, 0.2]])
    gain = label_gain(under_label, under_none, torch.tensor([1.0, 3.0]))
    assert gain.tolist() == pytest.approx([(math.log(0.5) + 3 * math.log(2)) / 4])


def test_the_odds_are_those_of_the_softmax_of_summed_squares():
    errors = torch.tensor([[[0.10, 0.30], [0.12, 0.26], [0.20, 0.40]]], dtype=torch.float64)
    weights, elements = torch.tensor([3.0, 1.0]), 50
    posterior = (-elements * (errors * weights).sum(dim=2) / 4).softmax(dim=1)[0]
    for label, p in enumerate(posterior.tolist()):
        odds = posterior_odds(errors, torch.tensor([label]), weights, elements)
        assert odds.tolist() == pytest.approx([math.log((1 - p) / p)])


def test_a_label_that_was_given_up_has_no_share_in_the_odds():
    errors = torch.tensor([[[0.1], [0.2]]])
    with_one_more = torch.tensor([[[0.1], [0.2], [math.inf]]])
    label, weights = torch.tensor([0]), torch.tensor([1.0])
    assert posterior_odds(with_one_more, label, weights, 10) == posterior_odds(errors, label, weights, 10)


def test_odds_rank_images_whose_posterior_rounds_to_one():
    errors = torch.tensor([[[0.1], [0.9]], [[0.1], [0.8]]])
    odds = posterior_odds(errors, torch.tensor([0, 0]), torch.tensor([1.0]), 10_000)
    assert odds[0] < odds[1] < -1000


def test_a_label_is_hopeless_by_its_paired_difference_to_the_best():
    best = torch.tensor([0.1, 0.5, 0.9])
    surely_worse, perhaps_worse = best + torch.tensor([0.01, 0.011, 0.012]), best + torch.tensor([0.3, -0.2, 0.1])
    errors, weights = torch.stack([perhaps_worse, best, surely_worse, surely_worse + 0.2]), torch.ones(3)
    assert hopeless(errors, weights, 3.0).tolist() == [False, False, False, True]  # the third is the second best
    assert hopeless(errors[:, :2], weights[:2], 3.0).tolist() == [False] * 4
    assert not hopeless(errors, weights, 1e9).any()
