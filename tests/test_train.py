"""Several networks trained at once are those trained one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from condense import api
from condense.artifacts import Trajectories
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.networks import Functional, Weights
from condense.rng import Rng
from condense.train import Trainer, Training
from tests.conftest import TINY

AUGMENT = Augment.parse("color_crop_cutout_flip_scale_rotate")


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(10, 3, 8, 8, dtype=torch.float64, generator=Rng(0)("images")), torch.arange(10) % 3


@pytest.mark.parametrize("num", [1, 3])
def test_together_or_one_by_one(num: int) -> None:
    network = Functional("convnet:depth=2,width=4", (3, 8, 8), 3, dtype=torch.float64)
    trainer = Trainer(network, Training(num_epochs=3, batch_size=4, lr=0.1), AUGMENT, Compute())
    rngs = [Rng(k) for k in range(num)]
    initial = [network.init(rng, "weights") for rng in rngs]
    epochs: list[list[Weights]] = []

    def keep(done: int, live: object) -> None:
        assert isinstance(live, list) and done == len(epochs) + 1
        epochs.append([Weights({n: p.clone() for n, p in one.params.items()}, {}) for one in live])

    together = trainer.run_together(initial, *data(), rngs, on_epoch=keep)
    assert len(epochs) == 3
    for k in range(num):
        alone = trainer.run(initial[k], *data(), rngs[k])
        for name, expected in alone.params.items():
            torch.testing.assert_close(together[k].params[name], expected)
            assert torch.equal(epochs[-1][k].params[name], together[k].params[name])
            assert not torch.equal(epochs[0][k].params[name], expected)


def test_a_training_that_goes_on_keeps_its_velocity() -> None:
    network = Functional("convnet:depth=1,width=4", (3, 8, 8), 3, dtype=torch.float64)
    initial = network.init(Rng(0), "weights")
    whole, half = (
        Trainer(
            network, Training(num_epochs=n, batch_size=4, lr=0.1, decay_at=None, order="stored"), Augment(), Compute()
        )
        for n in (4, 2)
    )
    expected = whole.run(initial, *data(), Rng(0)).params
    velocity = {name: torch.zeros_like(p) for name, p in initial.params.items()}
    weights = half.run(initial, *data(), Rng(0), velocity=velocity)
    for name, p in half.run(weights, *data(), Rng(0), velocity=velocity).params.items():
        assert torch.equal(p, expected[name])
    assert not torch.equal(
        half.run(weights, *data(), Rng(0)).params["classifier.weight"], expected["classifier.weight"]
    )


def test_running_statistics_are_not_shared() -> None:
    network = Functional("convnet:depth=1,width=4,norm=batch", (3, 8, 8), 3)
    trainer = Trainer(network, Training(), Augment(), Compute())
    weights = [network.init(Rng(k), "weights") for k in range(2)]
    with pytest.raises(ValueError, match=r"keep running statistics; give --compute\.networks 1"):
        trainer.run_together(weights, *data(), [Rng(0), Rng(1)])


def test_experts_and_evaluations_at_once(tiny: Arrays, tmp_path: Path) -> None:
    """To rounding, the experts and accuracies of one at a time."""
    folders = [
        api.make_buffer(
            tiny, TINY, num_experts=3, num_epochs=2, batch_size=12, out=tmp_path / str(n), compute=Compute(networks=n)
        )
        for n in (1, 2)
    ]
    one, two = (Trajectories(folder) for folder in folders)
    assert one.num_experts == two.num_experts == 3
    for expert in range(3):
        for name, expected in one.snapshot(expert, 2).items():
            torch.testing.assert_close(two.snapshot(expert, 2)[name], expected, rtol=1e-4, atol=1e-6)
    syn = api.distill("random", dataset=tiny, network=TINY, ipc=2, out=tmp_path / "run")
    rows = [
        api.evaluate(syn, tiny, networks=[TINY], num_seeds=5, compute=Compute(networks=n)).results[0] for n in (1, 2)
    ]
    assert rows[0].accuracies == pytest.approx(rows[1].accuracies, abs=0.06)
    assert [row.compute.get("networks") for row in rows] == [None, 2]
