"""Implicit differentiation against closed forms, long unrolls and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condense.inner import (
    SGD,
    Adam,
    ConjugateGradients,
    Descent,
    Exact,
    Solver,
    hessian_product,
    implicit_gradient,
    minimise,
    mixed_gradient,
    pushforward,
    unroll,
)
from condense.networks import Functional
from condense.rng import Rng

Theta = dict[str, Tensor]
RIDGE = 0.1


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def least_squares(theta: Theta, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """|X W + b - Y|^2 / 2 + ridge (|W|^2 + |b|^2) / 2."""
    x, y = inputs
    fit = (x @ theta["w"] + theta["b"] - y).square().sum()
    return (fit + RIDGE * (theta["w"].square().sum() + theta["b"].square().sum())) / 2


def ridge_solution(x: Tensor, y: Tensor) -> Theta:
    rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    system = rows.T @ rows + RIDGE * torch.eye(rows.shape[1], dtype=x.dtype)
    solution = torch.linalg.solve(system, rows.T @ y)
    return {"w": solution[:-1], "b": solution[-1]}


def outer(theta: Theta) -> Tensor:
    return torch.stack([torch.sin(p * (i + 1)).sum() for i, p in enumerate(theta.values())]).sum()


def cotangent(theta: Theta) -> Theta:
    leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
    return dict(zip(leaves, torch.autograd.grad(outer(leaves), list(leaves.values())), strict=True))


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return draw(9, 4, seed=1).requires_grad_(), draw(9, 3, seed=2).requires_grad_()


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (ConjugateGradients(tol=1e-13), 1e-11),
        (Descent(num_steps=400, lr=0.03, rule=SGD(momentum=0.9)), 1e-8),
        (Descent(num_steps=400, lr=0.02), 1e-4),
    ],
)
def test_equals_the_gradient_of_the_closed_form_of_ridge_regression(
    solver: Solver, tolerance: float, data: tuple[Tensor, Tensor]
) -> None:
    theta = ridge_solution(*data)
    expected = torch.autograd.grad(outer(theta), data)
    found = implicit_gradient(least_squares, theta, data, cotangent(theta), solver)
    for mine, true in zip(found, expected, strict=True):
        assert error(mine, true) < tolerance
    assert not any(x.requires_grad for x in found)


def test_equals_finite_differences_of_the_solved_problem(data: tuple[Tensor, Tensor]) -> None:
    x, y = (t.detach() for t in data)
    theta = ridge_solution(x, y)
    found = implicit_gradient(least_squares, theta, data, cotangent(theta), ConjugateGradients(tol=1e-13))
    along_x, along_y, h = draw(9, 4, seed=3), draw(9, 3, seed=4), 1e-5
    ahead, behind = (outer(ridge_solution(x + s * h * along_x, y + s * h * along_y)) for s in (1, -1))
    slope = (found[0] * along_x).sum() + (found[1] * along_y).sum()
    assert slope.item() == pytest.approx(((ahead - behind) / (2 * h)).item(), rel=1e-8)


def network_loss() -> tuple[Callable[[Theta, Any], Tensor], Theta]:
    """A smooth convolutional network on soft labels, regularised until its loss is convex about the minimum."""
    network = Functional("convnet:depth=1,width=2,norm=none,activation=swish", (1, 4, 4), 2, dtype=torch.float64)
    weights = network.init(Rng(0), "weights")

    def loss_fn(theta: Theta, batch: tuple[Tensor, Tensor]) -> Tensor:
        fit = F.cross_entropy(network.logits(theta, weights.buffers, batch[0]), batch[1].softmax(1))
        return fit + 0.02 * torch.stack([p.square().sum() for p in theta.values()]).sum()

    return loss_fn, weights.params


def test_equals_a_long_unroll_of_a_network() -> None:
    loss_fn, start = network_loss()
    batch = (draw(6, 1, 4, 4, seed=1).requires_grad_(), (3 * draw(6, 2, seed=2)).requires_grad_())
    theta = unroll(loss_fn, start, [batch] * 500, rule=SGD(momentum=0.9), lr=0.5, adjoint=Exact())
    expected = torch.autograd.grad(outer(theta), batch)
    residual = torch.func.grad(loss_fn)({name: p.detach() for name, p in theta.items()}, batch)
    assert max(g.norm() for g in residual.values()) < 1e-8
    found = implicit_gradient(loss_fn, theta, batch, cotangent(theta), ConjugateGradients(tol=1e-12))
    for mine, true in zip(found, expected, strict=True):
        assert error(mine, true) < 1e-5


def test_products_with_the_hessian_are_those_of_the_whole_matrix() -> None:
    loss_fn, theta = network_loss()
    batch = (draw(6, 1, 4, 4, seed=1), draw(6, 2, seed=2))
    vector = torch.cat([p.flatten() for p in theta.values()])
    sizes, shapes = [p.numel() for p in theta.values()], [p.shape for p in theta.values()]

    def flat(vector: Tensor) -> Tensor:
        parts = zip(vector.split(sizes), shapes, strict=True)
        return loss_fn(dict(zip(theta, [part.view(shape) for part, shape in parts], strict=True)), batch)

    hessian = torch.autograd.functional.hessian(flat, vector)
    v = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(theta.items())}
    found = torch.cat([p.flatten() for p in hessian_product(loss_fn, theta, batch)(v).values()])
    assert error(found, hessian @ torch.cat([p.flatten() for p in v.values()])) < 1e-12


def test_only_what_requires_grad_gets_a_gradient(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    theta = ridge_solution(x, y)
    v = {name: draw(*p.shape, seed=7) for name, p in theta.items()}
    both = mixed_gradient(least_squares, theta, data, v)
    (alone,) = mixed_gradient(least_squares, theta, (x.detach(), y), v)
    assert torch.equal(alone, both[1])


def test_minimise_is_the_optimiser_and_keeps_the_values_before_each_step(data: tuple[Tensor, Tensor]) -> None:
    fixed = (data[0].detach(), data[1].detach())
    start = {"w": torch.zeros(4, 3, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    found = minimise(torch.func.grad_and_value(lambda theta: least_squares(theta, fixed)), start, num_steps=5, lr=0.01)
    params = {name: p.clone().requires_grad_() for name, p in start.items()}
    optimiser, values = torch.optim.Adam(params.values(), lr=0.01), []
    for _ in range(5):
        optimiser.zero_grad()
        loss = least_squares(params, fixed)
        loss.backward()
        optimiser.step()
        values.append(loss.detach())
    assert torch.allclose(found.curve, torch.stack(values), rtol=1e-12)
    for name, p in params.items():
        assert torch.allclose(found.point[name], p, rtol=1e-10)


def test_conjugate_gradients_end_after_as_many_products_as_there_are_eigenvalues() -> None:
    diagonal, calls = torch.tensor([1.0, 2.0, 5.0, 5.0], dtype=torch.float64), []

    def product(v: Theta) -> Theta:
        calls.append(1)
        return {"x": diagonal * v["x"]}

    g = {"x": draw(4)}
    assert torch.allclose(ConjugateGradients(tol=1e-10).solve(product, g)["x"], g["x"] / diagonal, rtol=1e-9)
    assert len(calls) == 3
    assert not ConjugateGradients().solve(product, {"x": torch.zeros(4, dtype=torch.float64)})["x"].any()


def test_an_inner_loss_that_is_not_convex_is_refused_by_conjugate_gradients_alone() -> None:
    def saddle(v: Theta) -> Theta:
        return {"x": torch.tensor([1.0, -1.0]) * v["x"]}

    with pytest.raises(FloatingPointError, match=r"not convex: .*Descent"):
        ConjugateGradients().solve(saddle, {"x": torch.tensor([0.0, 1.0])})
    assert Descent().solve(saddle, {"x": torch.tensor([0.0, 1.0])})["x"].isfinite().all()


def test_a_pushforward_is_the_derivative_along_a_direction_and_silent() -> None:
    point, direction = {"x": draw(3)}, {"x": draw(3, seed=1)}
    value, slope = pushforward(lambda p: p["x"].square().sum(), point, direction)
    assert value == point["x"].square().sum()
    assert torch.allclose(slope, 2 * (point["x"] * direction["x"]).sum())


@pytest.mark.parametrize("make", [Descent, ConjugateGradients])
def test_bad_values_are_refused(make: Any) -> None:
    steps = "num_steps" if make is Descent else "max_steps"
    rate = "lr" if make is Descent else "tol"
    for field in ({steps: 0}, {rate: 0.0}):
        with pytest.raises(ValueError, match=f"needs {steps} >= 1 and {rate} > 0, .*; give"):
            make(**field)
    assert Descent().rule == Adam(eps_root=0.0)


@pytest.mark.parametrize(
    "spec", ["convnet:depth=1,width=4,norm=batch", "convnet:depth=1,width=4,norm=layer", "vit:depth=1,width=6"]
)
def test_derivatives_of_derivatives_through_normalisation(spec: str) -> None:
    """Each against central differences."""
    network = Functional(spec, (1, 8, 8), 3, dtype=torch.float64)
    params, buffers = network.init(Rng(0), "weights")
    x, labels = draw(4, 1, 8, 8), torch.arange(4) % 3
    v = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(params.items())}
    step = torch.zeros_like(x)
    step[0, 0, 3, 4] = 1e-5

    def loss_fn(params: Theta, x: Tensor) -> Tensor:
        return F.cross_entropy(network.logits(params, buffers, x), labels)

    def slope(x: Tensor) -> Tensor:
        grads = torch.func.grad(loss_fn)(params, x)
        return torch.stack([(grads[name] * v[name]).sum() for name in v]).sum()

    difference = (slope(x + step) - slope(x - step)) / 2e-5
    (mixed,) = mixed_gradient(loss_fn, params, x.clone().requires_grad_(), v)
    assert torch.allclose(mixed[0, 0, 3, 4], difference, rtol=1e-6)
    if "batch" not in spec:
        along = torch.func.grad(lambda x: pushforward(lambda p: loss_fn(p, x), params, v)[1])(x)
        assert torch.allclose(along, mixed, rtol=1e-6)

    ahead, behind = ({name: p + sign * 1e-5 * v[name] for name, p in params.items()} for sign in (1, -1))
    grads = [torch.func.grad(loss_fn)(theta, x) for theta in (ahead, behind)]
    for name, found in hessian_product(loss_fn, params, x)(v).items():
        assert torch.allclose(found, (grads[0][name] - grads[1][name]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_every_product_is_with_one_and_the_same_hessian() -> None:
    def loss_fn(theta: Theta, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return least_squares(theta, (F.dropout(inputs[0], 0.5), inputs[1]))

    theta = {"w": draw(4, 3), "b": draw(3)}
    product = hessian_product(loss_fn, theta, (draw(6, 4), draw(6, 3)))
    state = torch.get_rng_state()
    first, second = product(theta), product(theta)
    assert all(torch.equal(first[name], second[name]) for name in theta)
    assert torch.equal(torch.get_rng_state(), state)
