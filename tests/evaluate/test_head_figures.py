"""Figures of heads against values worked out by hand, and pandas for ranks."""

import pandas
import pytest
import torch

from tinygn_dist.evaluate.quality import head_figures, ranks


def test_one_class():
    logits = torch.tensor([[2.0, 1], [0, 3], [1, 0], [5, 4]])
    assert head_figures(logits, torch.tensor([0, 1, 1, 0])) == {"accuracy": 0.75}


def test_several_labels():
    """Four are marked, all of them rightly, of five that should be; one row of two is right whole."""
    logits = torch.tensor([[1.0, 1, -1, 1], [1.0, -1, -1, -1]])
    labels = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    figures = head_figures(logits, labels)
    assert figures["f1"] == pytest.approx(2 * 4 / (4 + 5)) and figures["accuracy"] == 0.5
    assert head_figures(-torch.ones(2, 3), torch.zeros(2, 3).bool()) == {"f1": 0.0, "accuracy": 1.0}


def test_ranks_of_equal_values_are_their_mean():
    values = torch.tensor([3.0, 1, 3, 2, 2, 2])
    assert (ranks(values) + 1).tolist() == pandas.Series(values.tolist()).rank().tolist()


def test_numbers():
    wanted = torch.tensor([1.0, 2, 3, 4])
    assert head_figures(torch.tensor([[1.0], [20], [300], [4000]]), wanted)["spearman"] == pytest.approx(1)
    assert head_figures(torch.tensor([[4.0], [3], [2], [1]]), wanted)["spearman"] == pytest.approx(-1)
    # d = 0, 1, 1, 0: 1 - 6 * 2 / (4 * 15)
    assert head_figures(torch.tensor([[1.0], [3], [2], [4]]), wanted)["spearman"] == pytest.approx(0.8)
    assert head_figures(torch.zeros(4, 1), wanted) == {} == head_figures(torch.randn(4, 1), torch.zeros(4))
