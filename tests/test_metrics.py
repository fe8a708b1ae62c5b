"""Metrics against scikit-learn, loops over images, and cases with a known answer."""

import math

import pytest
import torch
from sklearn.metrics import brier_score_loss, f1_score, log_loss
from torch import Tensor

from condense.eval.metrics import NUM_BINS, Scores

C = 4


@pytest.fixture(scope="module")
def predictions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(307, C, generator=generator)
    return logits, torch.randint(C, (307,), generator=generator)


def test_accuracy_f1_and_likelihood_are_those_of_sklearn(predictions: tuple[Tensor, Tensor]) -> None:
    logits, labels = predictions
    found, p = Scores.of(logits, labels), logits.double().softmax(1)
    assert found.accuracy == pytest.approx(float((p.argmax(1) == labels).double().mean()))
    assert found.macro_f1 == pytest.approx(f1_score(labels, p.argmax(1), average="macro"))
    assert found.nll == pytest.approx(log_loss(labels, p))
    assert found.brier == pytest.approx(sum(brier_score_loss(labels == c, p[:, c]) for c in range(C)))
    for c, accuracy in enumerate(found.per_class):
        assert accuracy == pytest.approx(float((p.argmax(1) == labels)[labels == c].double().mean()))


def expected_gap(confidence: Tensor, right: Tensor) -> float:
    """By a loop over bins (low, high]."""
    gap = 0.0
    for b in range(NUM_BINS):
        inside = (confidence > b / NUM_BINS) & (confidence <= (b + 1) / NUM_BINS)
        if inside.any():
            gap += float(inside.double().mean() * (confidence[inside].mean() - right[inside].mean()).abs())
    return gap


def test_calibration_errors_are_those_of_a_loop(predictions: tuple[Tensor, Tensor]) -> None:
    logits, labels = predictions
    found, p = Scores.of(logits, labels), logits.double().softmax(1)
    confidence, predicted = p.max(1)
    right = (predicted == labels).double()
    assert found.ece == pytest.approx(expected_gap(confidence, right))
    assert found.ece_classwise == pytest.approx(
        sum(expected_gap(p[:, c], (labels == c).double()) for c in range(C)) / C
    )
    adaptive, order = 0.0, confidence.argsort()
    for piece in order.tensor_split(NUM_BINS):
        adaptive += len(piece) / len(p) * abs(float(confidence[piece].mean() - right[piece].mean()))
    assert found.ece_adaptive == pytest.approx(adaptive)
    shares, means, accuracies = zip(*found.reliability, strict=True)
    assert sum(shares) == pytest.approx(1)
    assert sum(s * a for s, a in zip(shares, accuracies, strict=True)) == pytest.approx(found.accuracy)
    assert sum(s * m for s, m in zip(shares, means, strict=True)) == pytest.approx(float(confidence.mean()))


def test_a_sure_and_right_network_is_perfect_and_a_sure_and_wrong_one_is_not() -> None:
    labels = torch.arange(C).repeat(5)
    logits = 60.0 * torch.nn.functional.one_hot(labels, C)
    right, wrong = Scores.of(logits, labels), Scores.of(logits, (labels + 1) % C)
    assert (right.accuracy, right.macro_f1) == (1, 1) and right.ece < 1e-12 and right.brier < 1e-12
    assert (wrong.accuracy, wrong.macro_f1) == (0, 0)
    assert wrong.ece == pytest.approx(1) and wrong.brier == pytest.approx(2) and wrong.nll == pytest.approx(60)


def test_confidence_that_is_true_has_no_calibration_error() -> None:
    """Three of four images of this confidence are right."""
    logits = torch.tensor([[math.log(3), 0.0]]).repeat(8, 1)
    labels = torch.tensor([0, 0, 0, 1] * 2)
    assert Scores.of(logits, labels).ece == pytest.approx(0, abs=1e-7)


def test_a_class_without_images_does_not_count_as_right() -> None:
    found = Scores.of(torch.eye(3), torch.tensor([0, 0, 0]))
    assert found.per_class == (pytest.approx(1 / 3), 0, 0)
