"""The scores of DD-Ranking, from fractions; and what its published formula makes of percentages."""

import math

import pytest

from condense.eval.ranking import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)


def published(alpha: float) -> float:
    """The formula as it is in print."""
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def test_worked_numbers() -> None:
    """A set that loses 45 points to real data under hard labels and wins nothing over random images."""
    assert hard_label_recovery(0.85, 0.40) == pytest.approx(0.45)
    assert improvement_over_random(0.60, 0.60) == 0
    score = label_robust_score(0.85, 0.40, 0.60, 0.60)
    assert score == pytest.approx(published(-0.225)) and 0 < score < 1
    assert augmentation_robust_score(0.7, 0.5, 0.4, 0.4) == pytest.approx(published(0.1))


def test_the_published_formula_leaves_its_range_on_percentages_and_ours_does_not() -> None:
    percentages = published(0.5 * 0 - 0.5 * 45)
    assert percentages == pytest.approx(-0.1565, abs=1e-4)
    assert published(0.5 * 20 - 0.5 * 0) > 9e3
    for real, hard, own, random in [(0, 1, 1, 0), (1, 0, 0, 1), (0.85, 0.4, 0.8, 0.6)]:
        assert 0 <= label_robust_score(real, hard, own, random) <= 1


def test_the_ends_of_the_range_and_the_order() -> None:
    assert label_robust_score(0, 1, 1, 0) == pytest.approx(1)
    assert label_robust_score(1, 0, 0, 1) == pytest.approx(0)
    assert label_robust_score(0.9, 0.5, 0.7, 0.5) > label_robust_score(0.9, 0.5, 0.6, 0.5)
    assert label_robust_score(0.9, 0.6, 0.7, 0.5) > label_robust_score(0.9, 0.5, 0.7, 0.5)
    assert augmentation_robust_score(1, 0, 1, 0) == pytest.approx(1)


@pytest.mark.parametrize("accuracy", [-0.1, 1.5, 85, math.nan])
def test_percentages_are_refused(accuracy: float) -> None:
    with pytest.raises(ValueError, match="divide percents by 100"):
        hard_label_recovery(accuracy, 0.5)
