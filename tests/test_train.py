"""The plain training loop against steps written out; several networks at once against one by one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from condense import api
from condense.artifacts import Trajectories
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.eval.protocol import PROTOCOLS
from condense.networks import Functional, Weights
from condense.objective import one_hot
from condense.rng import Rng
from condense.schedule import Schedule
from condense.train import Trainer, Training
from condense.views import cutmix
from tests.conftest import TINY
from tests.reference import optim as twins

AUGMENT = Augment.parse("color_crop_cutout_flip_scale_rotate")


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(10, 3, 8, 8, dtype=torch.float64, generator=Rng(0).generator("images")), torch.arange(10) % 3


@pytest.mark.parametrize("num", [1, 3])
def test_together_or_one_by_one(num: int) -> None:
    network = Functional("convnet:depth=2,width=4", (3, 8, 8), 3, dtype=torch.float64)
    trainer = Trainer(network, Training(num_epochs=3, batch_size=4, lr=0.1), Compute())
    rngs = [Rng(k) for k in range(num)]
    initial = [network.init(rng, "weights") for rng in rngs]
    sources = [trainer.source(*data(), rng, AUGMENT) for rng in rngs]
    epochs: list[list[Weights]] = []

    def keep(done: int, live: object) -> None:
        assert isinstance(live, list) and done == len(epochs) + 1
        epochs.append([Weights({n: p.clone() for n, p in one.params.items()}, {}) for one in live])

    together = trainer.run_together(initial, sources, on_epoch=keep)
    assert len(epochs) == 3
    for k in range(num):
        alone = trainer.run(initial[k], sources[k])
        for name, expected in alone.params.items():
            torch.testing.assert_close(together[k].params[name], expected)
            assert torch.equal(epochs[-1][k].params[name], together[k].params[name])
            assert not torch.equal(epochs[0][k].params[name], expected)


def test_a_training_that_goes_on_keeps_its_velocity() -> None:
    network = Functional("convnet:depth=1,width=4", (3, 8, 8), 3, dtype=torch.float64)
    initial = network.init(Rng(0), "weights")
    constant = Training(batch_size=4, lr=0.1, schedule=Schedule(), order="stored")
    whole, half = (Trainer(network, dataclasses.replace(constant, num_epochs=n), Compute()) for n in (4, 2))
    source = whole.source(*data(), Rng(0))
    expected = whole.run(initial, source).params
    velocity = {name: torch.zeros_like(p) for name, p in initial.params.items()}
    optimiser = functools.partial(constant.optimise, velocity=velocity)
    weights = half.run(initial, source, optimiser=optimiser)
    for name, p in half.run(weights, source, optimiser=optimiser).params.items():
        assert torch.equal(p, expected[name])
    assert not torch.equal(half.run(weights, source).params["classifier.weight"], expected["classifier.weight"])


def test_networks_with_running_statistics_are_trained_side_by_side() -> None:
    network = Functional("convnet:depth=1,width=4,norm=batch", (3, 8, 8), 3, dtype=torch.float64)
    trainer = Trainer(network, Training(num_epochs=3, batch_size=4), Compute())
    weights = [network.init(Rng(k), "weights") for k in range(2)]
    sources = [trainer.source(*data(), Rng(k)) for k in range(2)]
    for k, together in enumerate(trainer.run_together(weights, sources)):
        alone = trainer.run(weights[k], sources[k])
        for tensors, expected in zip(together, alone, strict=True):
            assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_experts_and_evaluations_at_once(tiny: Arrays, tmp_path: Path) -> None:
    """The experts and accuracies are those of one at a time."""
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
            assert torch.equal(two.snapshot(expert, 2)[name], expected)
    syn = api.distill("random", dataset=tiny, network=TINY, ipc=2, out=tmp_path / "run")
    plan = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=10)
    fields: dict[str, Any] = {"networks": [TINY], "num_seeds": 3, "protocol": plan}
    rows = [api.evaluate(syn, tiny, compute=Compute(networks=n), **fields).results[0] for n in (1, 2)]
    assert rows[0].accuracies == rows[1].accuracies


def by_hand(
    rule: Callable[..., Tensor],
    rates: Sequence[float],
    batches: Sequence[tuple[Tensor, Tensor]],
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> tuple[Functional, Weights, dict[str, Tensor]]:
    """Network, its initial weights, and what they are after a step on every batch by a rule of the twins."""
    network = Functional("convnet:depth=1,width=4", (3, 8, 8), 3, dtype=torch.float64)
    initial = network.init(Rng(0), "weights")
    params = {name: p.detach().clone() for name, p in initial.params.items()}
    memory: dict[str, dict[str, Tensor]] = {name: {} for name in params}
    for step, (rate, (x, y)) in enumerate(zip(rates, batches, strict=True), 1):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        log_p = network.logits(leaves, initial.buffers, x, train=True).log_softmax(1)
        loss = -(one_hot(y, 3) * log_p).sum(1).mean()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        params = {
            name: rule(p, g + weight_decay * p, memory[name], step, rate, momentum)
            for (name, p), g in zip(params.items(), grads, strict=True)
        }
    return network, initial, params


def check(training: Training, expected: tuple[Functional, Weights, dict[str, Tensor]]) -> None:
    network, initial, params = expected
    trainer = Trainer(network, training, Compute())
    trained = trainer.run(initial, trainer.source(*data(), Rng(7)))
    for name, p in params.items():
        torch.testing.assert_close(trained.params[name], p)


@pytest.mark.parametrize(("optimiser", "rule"), [("sgd", twins.sgd), ("adam", twins.adam)])
def test_pieces_of_the_set_in_their_order_under_either_optimiser(optimiser: Any, rule: Callable[..., Tensor]) -> None:
    x, y = data()
    pieces = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)] * 2
    training = Training(num_epochs=2, batch_size=4, lr=0.05, optimiser=optimiser, order="stored", schedule=Schedule())
    check(training, by_hand(rule, [0.05] * 6, pieces))


def test_rates_of_single_steps_replace_everything_else() -> None:
    x, y = data()
    rates = (0.3, 0.0, 0.1, 0.2)
    schedule = Schedule(lr_per_step=rates, warmup_steps=3, cosine_to=0.1)
    training = Training(num_epochs=2, batch_size=5, order="stored", schedule=schedule)
    check(training, by_hand(twins.sgd, rates, [(x[:5], y[:5]), (x[5:], y[5:])] * 2))


def test_a_shuffled_epoch_takes_every_image_once_and_another_epoch_another_order() -> None:
    x, y = data()
    orders = [Rng(7)("order", epoch).permutation(10) for epoch in range(2)]
    assert not torch.equal(*orders)
    batches = [(x[i], y[i]) for order in orders for i in order.split(4)]
    check(Training(num_epochs=2, batch_size=4, lr=0.1, schedule=Schedule()), by_hand(twins.sgd, [0.1] * 6, batches))


def test_a_training_with_cutmix_sees_what_cutmix_gives() -> None:
    x, y = data()
    training = Training(num_epochs=6, batch_size=10, lr=0.1, order="stored", schedule=Schedule(), cutmix=0.5)
    batches = [cutmix(x, torch.eye(3)[y], 0.5, Rng(7)("cutmix", epoch, 0)) for epoch in range(6)]
    assert 0 < sum(torch.equal(a, x) for a, _ in batches) < 6
    check(training, by_hand(twins.sgd, [0.1] * 6, batches))


@pytest.mark.parametrize("field", ["weight_decay", "mixup", "temperature", "rho", "alpha"])
def test_an_infinite_number_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"training needs .*finite.* {field}"):
        Training(**{field: float("inf")})


@pytest.mark.parametrize("cutmix", [-0.1, 1.5])
def test_a_bad_probability_is_refused(cutmix: float) -> None:
    with pytest.raises(ValueError, match=r"cutmix between 0 and 1.*usual value is 0\.5"):
        Training(cutmix=cutmix)


@pytest.mark.parametrize(
    ("name", "shape", "draws"),
    [
        ("convnet3d:depth=1", (4, 1, 16, 16), True),
        ("convnet3d:depth=1,dropout=false", (4, 1, 16, 16), False),
        ("convnet:depth=1,norm=batch", (1, 8, 8), False),
    ],
)
def test_networks_with_dropout_are_trained_one_at_a_time(name: str, shape: tuple[int, ...], draws: bool) -> None:
    network = Functional(name, shape, 3)
    assert network.draws == draws
    assert network.settled(Compute(networks=3), 0).networks == (1 if draws else 3)


def with_norm(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    layers = nn.Linear(math.prod(input_shape), 5), nn.BatchNorm1d(5), nn.Linear(5, num_outputs)
    return nn.Sequential(nn.Flatten(), *layers)


def test_a_batch_of_one_image_that_cannot_be_normalised_is_refused_in_one_line() -> None:
    images, classes = data()
    network = Functional(with_norm, (3, 8, 8), 3)
    for batch_size, fits in ((9, False), (5, True)):
        trainer = Trainer(network, Training(num_epochs=1, batch_size=batch_size), Compute())
        source = trainer.source(images.float(), classes, Rng(0))
        if fits:
            trainer.run(network.init(Rng(0), "weights"), source)
            continue
        line = r"^custom:with_norm cannot be trained on a batch of one image, .* batch size 9 .*; give another batch"
        with pytest.raises(ValueError, match=line):
            trainer.run(network.init(Rng(0), "weights"), source)
