"""Temperature scaling finds the temperature that a network's logits were spoilt with."""

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from condense.eval.calibration import temperature
from condense.eval.metrics import Scores


@pytest.fixture(scope="module")
def true_logits() -> tuple[Tensor, Tensor]:
    """Logits whose softmax is the truth: labels are drawn from it."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_it_is_the_minimum_of_the_likelihood(true_logits: tuple[Tensor, Tensor]) -> None:
    logits, labels = true_logits
    found = temperature("temperature", 3 * logits, labels, torch.Generator())
    wanted = minimize_scalar(
        lambda t: float(torch.nn.functional.cross_entropy(3 * logits / t, labels)), bounds=(0.5, 10), method="bounded"
    )
    assert found == pytest.approx(wanted.x, rel=1e-4) and found == pytest.approx(3, rel=0.05)


def test_it_mends_the_confidence_and_leaves_the_accuracy(true_logits: tuple[Tensor, Tensor]) -> None:
    logits, labels = true_logits
    half = len(labels) // 2
    divisor = temperature("temperature", 3 * logits[:half], labels[:half], torch.Generator())
    before, after = (Scores.of(3 * logits[half:] / t, labels[half:]) for t in (1.0, divisor))
    assert after.accuracy == before.accuracy
    assert after.ece < 0.04 < 0.1 < before.ece and after.nll < before.nll


def test_masks_raise_the_temperature_and_come_from_the_generator(true_logits: tuple[Tensor, Tensor]) -> None:
    """Masked logits are often wrong, so their confidence is lowered more: the temperature rises."""
    logits, labels = true_logits
    plain = temperature("temperature", logits, labels, torch.Generator())
    first, again, other = (
        temperature("masked-temperature", logits, labels, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert first > plain and first == again != other
    assert temperature("none", logits, labels, torch.Generator()) == 1.0
