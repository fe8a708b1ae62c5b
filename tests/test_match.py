"""The distances and the matching loss: twin, invariances, equality with plain double backward."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from condense import match
from condense.augment import Augment
from condense.networks.base import CONVOLUTIONS, make_pooling
from condense.rng import Rng
from tests.reference import distances

SHAPES = {
    "conv": (4, 3, 2, 2),
    "bias": (4,),
    "norm": (4,),
    "linear": (5, 6),
    "position": (1, 3, 2),
    "scale": (),
}
Weights = dict[str, Tensor]


def weights(seed: int, dtype: torch.dtype = torch.float64) -> Weights:
    gen = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=gen, dtype=dtype) for name, shape in SHAPES.items()}


def arrays(values: Weights) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in values.items()}


@pytest.mark.parametrize("name", match.DISTANCES)
def test_distances_agree_with_the_twin(name: str) -> None:
    a, b = weights(0), weights(1)
    twin = {
        "layerwise-cosine": distances.layerwise_cosine,
        "mse": distances.mse_sum,
        "cosine": distances.global_cosine,
        "mse-conv": distances.convolution_mse_sum,
        "l1-conv": distances.convolution_l1_sum,
    }[name]
    distance = match.named_distance(name)
    assert distance(a, b).item() == pytest.approx(twin(arrays(a), arrays(b)), rel=1e-12)
    assert torch.equal(distance(list(a.values()), tuple(b.values())), distance(a, b))


@pytest.mark.parametrize("name", match.DISTANCES)
def test_distances_are_zero_for_equal_gradients_and_symmetric(name: str) -> None:
    distance, a, b = match.DISTANCES[name], weights(0), weights(1)
    assert distance(a, a).abs().item() < 1e-4
    assert distance(a, b).item() == pytest.approx(distance(b, a).item(), rel=1e-12) and distance(a, b) > 0.1


@pytest.mark.parametrize("name", match.DISTANCES)
def test_distances_do_not_depend_on_the_order_of_names_or_rows(name: str) -> None:
    distance, a, b = match.DISTANCES[name], weights(0), weights(1)
    expected = distance(a, b).item()
    assert distance(dict(reversed(a.items())), b).item() == pytest.approx(expected, rel=1e-12)
    for side in (a, b):
        side["conv"] = side["conv"][[2, 0, 3, 1]]
    assert distance(a, b).item() == pytest.approx(expected, rel=1e-12)


def test_layerwise_cosine_ignores_the_length_of_a_row() -> None:
    a, b = weights(0), weights(1)
    expected = match.layerwise_cosine(a, b).item()
    b["linear"] = b["linear"] * torch.tensor([0.1, 1, 7, 100, 3]).double()[:, None]
    assert match.layerwise_cosine(a, b).item() == pytest.approx(expected, abs=1e-4)
    assert match.global_cosine(a, b).item() != pytest.approx(expected, abs=1e-1)


def test_layerwise_cosine_counts_two_for_an_opposite_row_and_nothing_for_biases() -> None:
    a = weights(0)
    b = {name: value.clone() for name, value in a.items()}
    b["linear"][2] *= -1
    b["bias"] *= -1
    b["norm"] += 5
    assert match.layerwise_cosine(a, b).item() == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("name", ["mse-conv", "l1-conv"])
def test_convolutions_alone_count(name: str) -> None:
    distance, a = match.DISTANCES[name], weights(0)
    b = {key: value + 2 * (key != "conv") for key, value in a.items()}
    assert distance(a, b) == 0
    b["conv"] = a["conv"] + 2
    assert distance(a, b).item() == pytest.approx({"mse-conv": 4, "l1-conv": 2}[name] * a["conv"].numel())
    with pytest.raises(AssertionError, match="no convolution"):
        distance([a["bias"]], [a["bias"]])


@pytest.mark.parametrize("name", match.DISTANCES)
def test_a_dead_row_has_a_finite_gradient(name: str) -> None:
    a, b = weights(0), weights(1)
    a["linear"][1] = b["linear"][1] = 0
    b["conv"][0] = 0
    leaves = {name: value.requires_grad_() for name, value in b.items()}
    match.DISTANCES[name](a, leaves).backward()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves.values())


def test_other_parameters_are_refused() -> None:
    a, b = weights(0), weights(1)
    with pytest.raises(AssertionError, match="not the same parameters"):
        match.mse_sum(a, {**b, "more": b["bias"]})
    with pytest.raises(ValueError, match="shorter"):
        match.mse_sum([*a.values()], [*b.values()][1:])


@pytest.mark.parametrize(("name", "guess"), [("layerwise_cosine", "did you mean 'layerwise-cosine'?"), ("x", "mse")])
def test_unknown_distance(name: str, guess: str) -> None:
    with pytest.raises(ValueError, match=f"^unknown distance '{name}': .*there are") as error:
        match.named_distance(name)
    assert guess in str(error.value) and "\n" not in str(error.value)


def test_trajectory_distance() -> None:
    theta, target, start = weights(0), weights(1), weights(2)
    value = match.trajectory_distance(theta, target, start).item()
    assert value == pytest.approx(
        distances.trajectory_distance(arrays(theta), arrays(target), arrays(start)), rel=1e-12
    )
    assert match.trajectory_distance(target, target, start) == 0
    assert match.trajectory_distance(start, target, start) == 1
    halfway = {name: (start[name] + target[name]) / 2 for name in start}
    assert match.trajectory_distance(halfway, target, start).item() == pytest.approx(0.25)


@pytest.mark.parametrize("trim", [0.1, 0.5, 0.99])
def test_a_trimmed_trajectory_distance_leaves_out_the_weights_nearest_to_the_target(trim: float) -> None:
    theta, target, start = ({name: w.requires_grad_() for name, w in weights(seed).items()} for seed in range(3))
    value = match.trajectory_distance(theta, target, start, trim)
    expected = distances.trajectory_distance(*(arrays(weights(seed)) for seed in range(3)), trim)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    errors = torch.cat([(theta[name] - target[name]).abs().flatten() for name in theta])
    moved = torch.cat([w.grad.flatten() for w in theta.values() if w.grad is not None]) != 0
    assert moved.sum() == len(errors) - int(trim * len(errors))
    assert errors[moved].min() > errors[~moved].max()


def test_of_equal_errors_the_first_are_trimmed() -> None:
    zero = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    theta = {"a": torch.tensor([[2.0, 1.0], [1.0, 1.0]]), "b": torch.tensor([1.0, 1.0, 1.0])}
    start = {"a": torch.arange(4.0).view(2, 2), "b": torch.arange(4.0, 7.0)}
    value = match.trajectory_distance(theta, zero, start, 0.5)  # three of seven: the second to the fourth of a
    assert value.item() == pytest.approx((2**2 + 1 + 1 + 1) / (0 + 4**2 + 5**2 + 6**2))


def test_nothing_trimmed_is_the_distance_to_the_bit() -> None:
    theta, target, start = weights(0), weights(1), weights(2)
    plain = match.mse_sum(theta, target) / match.mse_sum(start, target)
    assert torch.equal(match.trajectory_distance(theta, target, start, 0.0), plain)


def test_feature_mean_distance() -> None:
    gen = torch.Generator().manual_seed(0)
    real, syn = (torch.randn(n, 5, generator=gen, dtype=torch.float64) for n in (7, 3))
    value = match.feature_mean_distance(real, syn).item()
    assert value == pytest.approx(distances.feature_mean_distance(real.numpy(), syn.numpy()), rel=1e-12)
    assert match.feature_mean_distance(real, syn[[2, 0, 1]]).item() == pytest.approx(value, rel=1e-12)
    assert match.feature_mean_distance(real, real.repeat(2, 1)).item() == pytest.approx(0, abs=1e-15)


class Problem:
    """A small ConvNet, the gradients of a real batch, and a synthetic batch."""

    def __init__(self, soft: bool, dtype: torch.dtype = torch.float64, seed: int = 0, axes: int = 2) -> None:
        """``axes``: of the maps of the network; 1 for series, 2 for images."""
        with Rng(seed).forked("network"):
            network = nn.Sequential(
                CONVOLUTIONS[axes - 1](2, 4, 3, padding=1),
                nn.GroupNorm(4, 4),
                nn.Softplus(),
                make_pooling("avg", 2, axes),
                nn.Flatten(),
                nn.Linear(4 * 3**axes, 3),
            ).to(dtype)
        gen, shape = Rng(seed).generator("batches"), (2, *(6 for _ in range(axes)))
        self.params = {name: p.detach() for name, p in network.named_parameters()}
        self.images = torch.randn(4, *shape, generator=gen, dtype=dtype)
        self.targets = torch.randint(3, (4,), generator=gen)
        if soft:
            self.targets = torch.randn(4, 3, generator=gen, dtype=dtype).softmax(1)
        real = torch.randn(8, *shape, generator=gen, dtype=dtype), torch.randint(3, (8,), generator=gen)

        self.network = network
        self.real_grads = torch.func.grad(self.loss_fn)(self.params, real)

    @property
    def loss_fn(self) -> match.LossFn:
        """A new closure every time, as a method makes one for every student."""

        def loss_fn(params: Weights, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(self.network, params, (batch[0],)), batch[1])

        return loss_fn

    def loss(self, distance: match.Distance, images: Tensor, targets: Tensor, **options: bool) -> Tensor:
        return match.matching_loss(self.loss_fn, self.params, self.real_grads, distance, images, targets, **options)

    def double_backward(self, distance: match.Distance, images: Tensor, targets: Tensor) -> Tensor:
        leaves = {name: p.clone().requires_grad_() for name, p in self.params.items()}
        loss = self.loss_fn(leaves, (images, targets))
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        return distance(self.real_grads, dict(zip(leaves, grads, strict=True)))


def evaluate(loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, targets: Tensor) -> list[Tensor]:
    """The value of ``loss`` and its gradients, behind an augmentation and a softmax, with an outer factor."""
    images = images.clone().requires_grad_()
    soft = targets.is_floating_point()
    targets = targets.clone().requires_grad_(soft)
    augment = Augment.parse("color_crop_rotate:mode=M")
    params = augment.sample(Rng(5)("augment"), len(images), tuple(images.shape[1:]), siamese=True)
    value = loss(augment.apply(images, params), targets.softmax(1) if soft else targets)
    return [value.detach(), *torch.autograd.grad(-3 * value + 1, (images, targets) if soft else (images,))]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", match.DISTANCES)
def test_matching_loss_equals_double_backward(name: str, soft: bool) -> None:
    problem, distance = Problem(soft), match.DISTANCES[name]
    ours = evaluate(partial(problem.loss, distance), problem.images, problem.targets)
    theirs = evaluate(partial(problem.double_backward, distance), problem.images, problem.targets)
    assert len(ours) == (3 if soft else 2)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("name", match.DISTANCES)
def test_matching_loss_in_pieces_is_the_same(name: str, micro_batch: int, soft: bool) -> None:
    problem, distance = Problem(soft), match.DISTANCES[name]
    whole = evaluate(partial(problem.loss, distance), problem.images, problem.targets)
    pieces = evaluate(partial(problem.loss, distance, micro_batch=micro_batch), problem.images, problem.targets)
    for a, b in zip(pieces, whole, strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", match.DISTANCES)
def test_matching_loss_of_several_sets_is_their_sum(name: str, soft: bool) -> None:
    distance, problems = match.DISTANCES[name], [Problem(soft), Problem(soft, seed=1)]
    stacked = {key: torch.stack([p.real_grads[key] for p in problems]) for key in problems[0].params}
    images = torch.stack([p.images for p in problems]).requires_grad_()
    targets = torch.stack([p.targets for p in problems]).requires_grad_(soft)
    first = problems[0]
    value = match.matching_loss(first.loss_fn, first.params, stacked, distance, images, targets)
    inputs = (images, targets) if soft else (images,)
    together = torch.autograd.grad(value, inputs)
    total = torch.zeros(())
    for k, problem in enumerate(problems):
        x, y = images[k].detach().requires_grad_(), targets[k].detach().requires_grad_(soft)
        alone = match.matching_loss(first.loss_fn, first.params, problem.real_grads, distance, x, y)
        total = total + alone.detach()
        for a, b in zip(together, torch.autograd.grad(alone, (x, y) if soft else (x,)), strict=True):
            torch.testing.assert_close(a[k], b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(value.detach(), total.to(value.dtype))


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("name", match.DISTANCES)
def test_matching_loss_of_series_and_clips(name: str, axes: int) -> None:
    """Alone, in pieces, and of two sets that are the same."""
    problem, distance = Problem(False, axes=axes), match.DISTANCES[name]
    leaf = problem.images.clone().requires_grad_()
    value = problem.double_backward(distance, leaf, problem.targets)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert gradient.abs().max() > 1e-4
    for options in ({}, {"micro_batch": 3}):
        ours = problem.loss(distance, leaf, problem.targets, **options)
        torch.testing.assert_close(ours, value)
        torch.testing.assert_close(torch.autograd.grad(ours, leaf)[0], gradient)
    twice = {key: torch.stack([g, g]) for key, g in problem.real_grads.items()}
    images, targets = torch.stack([leaf, leaf]), torch.stack([problem.targets, problem.targets])
    both = match.matching_loss(problem.loss_fn, problem.params, twice, distance, images, targets)
    torch.testing.assert_close(both, 2 * value)
    torch.testing.assert_close(torch.autograd.grad(both, leaf)[0], 2 * gradient)


def test_convolutions_are_the_parameters_with_the_most_axes() -> None:
    """A norm by layer has three axes for images, as many as the convolutions for series have."""
    image = {"conv": torch.ones(4, 2, 3, 3), "norm": torch.ones(4, 6, 6), "linear": torch.ones(3, 4)}
    series = {"conv": torch.ones(4, 2, 3), "norm": torch.ones(4, 6), "linear": torch.ones(3, 4)}
    for params, count in ((image, 72), (series, 24)):
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        assert match.convolution_mse_sum(params, zeros) == count


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 5, 6, 3), (2, 5, 4, 6, 3)])
def test_an_attention_map_has_a_number_for_each_place(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([m.abs().square().sum(0).flatten() / m.abs().square().sum(0).norm() for m in maps])
    torch.testing.assert_close(match.attention_map(maps, 2), expected)


@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_feature_matching_in_pieces_is_the_same(micro_batch: int) -> None:
    gen = Rng(0).generator("features")
    weights = torch.randn(12, 7, generator=gen, dtype=torch.float64)
    images = torch.randn(5, 3, 2, 2, generator=gen, dtype=torch.float64).requires_grad_()
    real = torch.randn(1, 7, generator=gen, dtype=torch.float64)

    def features(x: Tensor) -> Tensor:
        return (x.flatten(1) @ weights).tanh()

    whole = match.feature_mean_distance(real, features(images))
    pieces = match.feature_matching_loss(features, real[0], images, micro_batch)
    torch.testing.assert_close(pieces, whole)
    expected = torch.autograd.grad(-2 * whole, images)
    torch.testing.assert_close(torch.autograd.grad(-2 * pieces, images), expected)


def test_matching_loss_differentiates_what_requires_it_and_nothing_else() -> None:
    problem = Problem(soft=True)
    targets = problem.targets.clone().requires_grad_()
    for p in problem.params.values():
        p.requires_grad_()
    problem.loss(match.mse_sum, problem.images, targets).backward()
    assert targets.grad is not None and targets.grad.count_nonzero() == targets.numel()
    assert problem.images.grad is None and all(p.grad is None for p in problem.params.values())
    assert not problem.loss(match.mse_sum, problem.images, problem.targets).requires_grad
    with torch.no_grad():
        assert not problem.loss(match.mse_sum, problem.images, targets).requires_grad


def test_matching_loss_of_the_real_batch_is_zero() -> None:
    problem = Problem(soft=False)
    problem.real_grads = torch.func.grad(problem.loss_fn)(problem.params, (problem.images, problem.targets))
    images = problem.images.clone().requires_grad_()
    value = problem.loss(match.mse_sum, images, problem.targets)
    (grad,) = torch.autograd.grad(value, images)
    assert value.item() == 0 and grad.abs().max() < 1e-12


def test_matching_loss_cannot_be_differentiated_twice() -> None:
    problem = Problem(soft=False)
    images = problem.images.clone().requires_grad_()
    value = problem.loss(match.mse_sum, images, problem.targets)
    (grad,) = torch.autograd.grad(value.square(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class Dropping(Problem):
    """With masks of two shapes in every pass."""

    def __init__(self, soft: bool) -> None:
        super().__init__(soft)
        self.network.insert(3, nn.Dropout(0.5))
        self.network.insert(6, nn.Dropout(0.3))
        renamed = {"5.weight": "7.weight", "5.bias": "7.bias"}
        self.params, self.real_grads = (
            {renamed.get(name, name): x for name, x in tensors.items()} for tensors in (self.params, self.real_grads)
        )


def in_pieces_by_hand(problem: Problem, images: Tensor, micro_batch: int) -> Tensor:
    """The distance of the mean gradient of all pieces, each with a graph."""
    leaves = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    pieces = zip(images.split(micro_batch), problem.targets.split(micro_batch), strict=True)
    losses = [problem.loss_fn(leaves, piece) * (len(piece[0]) / len(images)) for piece in pieces]
    grads = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()), create_graph=True)
    return match.mse_sum(problem.real_grads, dict(zip(leaves, grads, strict=True)))


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_both_passes_over_the_pieces_draw_the_same(micro_batch: int) -> None:
    problem = Dropping(soft=False)
    images = problem.images.clone().requires_grad_()
    values = []
    for loss in (
        partial(problem.loss, match.mse_sum, targets=problem.targets, micro_batch=micro_batch),
        partial(in_pieces_by_hand, problem, micro_batch=micro_batch),
    ):
        with Rng(0).forked("dropout"):
            value = loss(images=images)
        values.append((value.detach(), torch.autograd.grad(value, images)[0]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-12)


def test_several_sets_draw_apart() -> None:
    problem = Dropping(soft=False)
    twice = {name: torch.stack([g, g]) for name, g in problem.real_grads.items()}
    images = torch.stack([problem.images] * 2).requires_grad_()
    value = match.matching_loss(
        problem.loss_fn, problem.params, twice, match.mse_sum, images, torch.stack([problem.targets] * 2)
    )
    first, second = torch.autograd.grad(value, images)[0]
    assert first.isfinite().all() and not torch.allclose(first, second)


def test_both_passes_of_feature_matching_draw_the_same() -> None:
    problem, real = Dropping(soft=False), torch.zeros(36, dtype=torch.float64)
    images = problem.images.clone().requires_grad_()

    def features(x: Tensor) -> Tensor:
        return functional_call(problem.network[:-1], {k: p for k, p in problem.params.items() if k[0] != "7"}, (x,))

    with Rng(0).forked("dropout"):
        pieces = match.feature_matching_loss(features, real, images, 3)
    with Rng(0).forked("dropout"):
        mean = torch.cat([features(x) for x in images.split(3)]).mean(0)
    whole = (real - mean).square().sum()
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces, images), torch.autograd.grad(whole, images))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_matching_loss_agrees_and_compiles_once_per_architecture() -> None:
    problem = Problem(soft=True, dtype=torch.float32)
    loss = partial(problem.loss, match.layerwise_cosine)
    for step in range(4):
        images = problem.images + step
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            compiled = evaluate(partial(loss, compile=True), images, problem.targets)
        eager = evaluate(loss, images, problem.targets)
        for a, b in zip(compiled, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        problem.params = {name: p + 0.01 for name, p in problem.params.items()}
