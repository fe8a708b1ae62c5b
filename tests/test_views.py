"""What is done to a batch before a network sees it."""

from __future__ import annotations

import pytest
import torch

from condense.rng import Rng
from condense.views import cutmix


def test_cutmix_mixes_labels_by_the_area_that_changed_hands() -> None:
    """Images of one grey each, so that the shares can be counted."""
    grey = torch.arange(1.0, 7.0)
    x, y = grey.view(6, 1, 1, 1).expand(6, 1, 8, 8), torch.eye(6)
    mixed_some, shares = 0, []
    for seed in range(40):
        mixed, targets = cutmix(x, y, 1.0, Rng(seed)("cutmix"))
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        counted = torch.stack([(mixed == value).float().mean((1, 2, 3)) for value in grey], 1)
        torch.testing.assert_close(targets, counted)
        changed = (mixed != x).any(0)[0]
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        assert changed.sum() == len(rows) * len(columns), "no rectangle"
        mixed_some += bool(changed.any())
        shares.append(float(changed.float().mean()))
    assert mixed_some > 30 and max(shares) > 0.5
    again, untouched = (cutmix(x, y, p, Rng(3)("cutmix")) for p in (1.0, 0.0))
    assert torch.equal(again[0], cutmix(x, y, 1.0, Rng(3)("cutmix"))[0]) and torch.equal(untouched[0], x)
    left = sum(torch.equal(cutmix(x, y, 0.5, Rng(seed)("cutmix"))[1], y) for seed in range(200))
    assert 80 < left < 130


@pytest.mark.parametrize("shape", [(3, 8, 7), (4, 2, 8, 7), (3, 16)])
def test_cutmix_drawn_on_a_device_equals_cutmix_drawn_on_the_host(shape: tuple[int, ...]) -> None:
    x, y = torch.rand(6, *shape), torch.eye(3)[torch.arange(6) % 3]
    for step in range(30):
        host, device = (cutmix(x, y, 0.5, Rng(0)("cutmix", at)) for at in (step, torch.tensor(step)))
        assert torch.equal(host[0], device[0]) and torch.equal(host[1], device[1])
