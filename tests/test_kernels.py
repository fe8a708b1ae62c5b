"""Kernels against finite networks, hand computation and quadrature; ridge regression against scipy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

from condense.kernels import (
    arc_cosine_0,
    arc_cosine_1,
    empirical_ntk,
    fully_connected,
    regression,
    regression_targets,
    ridge_solve,
)
from condense.networks import Functional
from condense.rng import Rng
from tests.reference.kip import matrix

W, B = math.sqrt(2), 0.1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Wide:
    """A finite ReLU network in the parameterisation of the kernel."""

    def __init__(self, size: int, width: int, depth: int, num_outputs: int = 1, seed: int = 0) -> None:
        sizes = [size, *[width] * depth, num_outputs]
        generator = torch.Generator().manual_seed(seed)
        self.params: dict[str, Tensor] = {}
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            self.params[f"w{i}"] = torch.randn(fan_out, fan_in, generator=generator)
            self.params[f"b{i}"] = torch.randn(fan_out, generator=generator)
        self.depth = depth

    def __call__(self, params: Any, x: Tensor, last: bool = True) -> Tensor:
        x = x.flatten(1)
        for i in range(self.depth + 1):
            w, b = params[f"w{i}"], params[f"b{i}"]
            if i == self.depth and not last:
                return x
            x = W * x @ w.T / math.sqrt(w.shape[1]) + B * b
            x = x.relu() if i < self.depth else x
        return x


@pytest.mark.parametrize(("depth", "width", "tolerance"), [(1, 20_000, 0.03), (2, 2_500, 0.06)])
def test_the_ntk_is_that_of_a_wide_network(depth: int, width: int, tolerance: float) -> None:
    """The error of one draw falls like 1 / sqrt(width)."""
    a, b = normal(4, 1, 3, 3).float(), normal(3, 1, 3, 3, seed=1).float()
    wide = Wide(9, width, depth)
    exact = fully_connected(a, b, depth=depth, w_std=W, b_std=B).ntk
    torch.testing.assert_close(empirical_ntk(wide, wide.params, a, b, chunk=2), exact, rtol=tolerance, atol=tolerance)


def test_the_nngp_is_the_covariance_of_random_features() -> None:
    a, b = normal(4, 9).float(), normal(3, 9, seed=1).float()
    wide = Wide(9, 100_000, 1)
    features = [wide(wide.params, x, last=False) for x in (a, b)]
    found = W**2 * features[0] @ features[1].T / 100_000 + B**2
    torch.testing.assert_close(found, fully_connected(a, b).nngp, rtol=0.02, atol=0.02)


def test_one_hidden_layer_by_hand() -> None:
    """Two images at a right angle, no bias: theta = pi / 2 at the hidden layer, where cos = 0 and sin = 1."""
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)  # 2 <x, y> / 2: 4 and 0
    nngp, ntk = fully_connected(x, depth=1, w_std=W, b_std=0.0)
    off = 2 * 4 / (2 * math.pi)
    torch.testing.assert_close(nngp, torch.tensor([[4.0, off], [off, 4.0]], dtype=torch.float64))
    torch.testing.assert_close(ntk, torch.tensor([[8.0, off], [off, 8.0]], dtype=torch.float64))


def test_without_hidden_layers_both_kernels_are_linear() -> None:
    a, b = normal(3, 5), normal(2, 5, seed=1)
    nngp, ntk = fully_connected(a, b, depth=0, w_std=1.5, b_std=0.2)
    torch.testing.assert_close(nngp, 1.5**2 * a @ b.T / 5 + 0.04)
    assert torch.equal(nngp, ntk)


@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_recursion_agrees_pair_by_pair(depth: int, kernel: str) -> None:
    a, b = normal(4, 1, 2, 3), normal(3, 1, 2, 3, seed=1)
    for left, right in ((a, b), (a, None)):
        found = getattr(fully_connected(left, right, depth=depth, w_std=1.2, b_std=0.3), kernel)
        expected = matrix(left, left if right is None else right, kernel, depth, 1.2, 0.3)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("theta", [0.0, 0.3, math.pi / 2, 2.5, math.pi])
def test_the_arc_cosine_functions_are_the_expectations(order: int, theta: float) -> None:
    """With u, v standard normal at the angle theta, by polar coordinates: the radius gives 1 or 2."""
    angle = torch.linspace(-math.pi, math.pi, 200_001, dtype=torch.float64)
    u, v = angle.cos(), (angle - theta).cos()
    powers = [x.relu() if order else (x > 0).double() for x in (u, v)]
    expected = 2 * (2 if order else 1) * (powers[0] * powers[1]).mean()
    function = arc_cosine_1 if order else arc_cosine_0
    found = function(torch.tensor(math.cos(theta), dtype=torch.float64))
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("function", [arc_cosine_0, arc_cosine_1])
def test_the_arc_cosine_functions_have_their_derivatives(function: Any) -> None:
    cos = torch.linspace(-0.95, 0.95, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, cos)
    assert torch.autograd.gradgradcheck(function, cos)


@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
def test_the_kernels_have_their_derivatives(kernel: str) -> None:
    a, b = normal(3, 4).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: getattr(fully_connected(a, b, depth=2), kernel), (a, b))
    assert torch.autograd.gradcheck(lambda a: getattr(fully_connected(a, depth=2), kernel), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_gradient_is_finite_where_images_are_equal_or_opposite_or_black(dtype: torch.dtype, depth: int) -> None:
    images = normal(3, 4).to(dtype)
    images[2] = 0
    others = torch.cat([images, -images, 3 * images, images.roll(1, 0)])
    for b_std in (0.0, 0.1):
        leaf = images.clone().requires_grad_()
        ntk = fully_connected(leaf, others, depth=depth, b_std=b_std).ntk
        (grad,) = torch.autograd.grad(ntk.sum(), leaf)
        assert ntk.isfinite().all() and grad.isfinite().all()
        assert grad.abs().max() < 100


def test_at_an_equal_image_the_gradient_is_the_mean_of_the_directional_derivatives() -> None:
    """k(x, y) around x = y: the cone is symmetric, what remains is the smooth part."""
    y, direction = normal(1, 6), normal(1, 6, seed=1)
    x = y.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fully_connected(x, y).ntk.sum(), x)
    h = 1e-5
    ahead, behind = (fully_connected(y + s * h * direction, y).ntk.item() for s in (1, -1))
    assert abs(ahead - 2 * fully_connected(y, y).ntk.item() + behind) / h > 0.1  # a tip
    assert (grad * direction).sum().item() == pytest.approx((ahead - behind) / (2 * h), rel=1e-3)


def test_kernels_are_symmetric_positive_definite_and_exact_on_the_diagonal() -> None:
    x = normal(20, 6)
    for kernel in fully_connected(x, depth=3):
        torch.testing.assert_close(kernel, kernel.T)
        assert torch.linalg.eigvalsh(kernel).min() > 0
    scaled = fully_connected(x.float(), depth=1, b_std=0.0).ntk.diagonal()
    torch.testing.assert_close(scaled, 4 * x.float().square().mean(1), rtol=1e-6, atol=0)


def test_the_empirical_ntk_is_the_product_of_gradients_whatever_the_chunk() -> None:
    network = Functional("convnet:depth=1,width=4", (1, 4, 4), 3, dtype=torch.float64)
    weights = network.init(Rng(0), "network")
    images = normal(5, 1, 4, 4)

    def logits(params: Any, x: Tensor) -> Tensor:
        return network.logits(params, weights.buffers, x)

    params = [p.clone().requires_grad_() for p in weights.params.values()]
    rows = []
    for image in images:
        output = logits(dict(zip(weights.params, params, strict=True)), image[None])[0]
        grads = [torch.autograd.grad(o, params, retain_graph=True, materialize_grads=True) for o in output]
        rows.append(torch.cat([g.flatten() for one in grads for g in one]))
    expected = torch.stack(rows) @ torch.stack(rows).T / 3
    for chunk in (2, 100):
        torch.testing.assert_close(empirical_ntk(logits, weights.params, images, chunk=chunk), expected)
    torch.testing.assert_close(empirical_ntk(logits, weights.params, images, images[:2]), expected[:, :2])


def test_the_empirical_ntk_is_differentiable_in_the_images() -> None:
    wide = Wide(4, 6, 1, num_outputs=2)
    params = {name: p.double() for name, p in wide.params.items()}
    a, b = normal(2, 4).requires_grad_(), normal(2, 4, seed=1)
    assert torch.autograd.gradcheck(lambda a: empirical_ntk(wide, params, a, b), a)


def positive_definite(n: int) -> Tensor:
    x = normal(n, n)
    return x @ x.T + 0.1 * torch.eye(n, dtype=x.dtype)


def test_the_solution_is_that_of_scipy() -> None:
    k, y = positive_definite(6), normal(6, 3, seed=1)
    expected = scipy.linalg.solve(k.numpy() + 0.2 * torch.eye(6).numpy(), y.numpy(), assume_a="pos")
    torch.testing.assert_close(ridge_solve(k, y, 0.2), torch.from_numpy(expected))
    torch.testing.assert_close(ridge_solve(k, y, torch.tensor(0.2, dtype=k.dtype)), torch.from_numpy(expected))


def test_the_solution_has_its_derivatives() -> None:
    k, y = positive_definite(4), normal(4, 2, seed=1)
    inputs = (k.requires_grad_(), y.requires_grad_())
    assert torch.autograd.gradcheck(lambda k, y: ridge_solve((k + k.T) / 2, y, 0.3), inputs)


def test_the_gradient_of_a_regression_goes_through_its_ridge() -> None:
    """A ridge of the size of the kernel: without its part the gradient is far from the finite differences."""
    phi, y = normal(5, 7), normal(5, 2, seed=1)
    real = normal(3, 7, seed=2)
    inputs = (phi.requires_grad_(), y.requires_grad_())
    assert torch.autograd.gradcheck(lambda phi, y: regression(real @ phi.T, phi @ phi.T, y, 0.5), inputs)


def test_a_ridge_that_is_too_small_grows_tenfold_until_it_serves() -> None:
    x = normal(6, 2)
    identity = torch.eye(6, dtype=x.dtype)
    indefinite, y = x @ x.T - 5e-8 * identity, normal(6, 3, seed=1)
    torch.testing.assert_close(
        ridge_solve(indefinite, y, 1e-9), torch.linalg.solve(indefinite + 1e-7 * identity, y), rtol=1e-5, atol=0
    )
    assert ridge_solve(torch.ones(6, 6, dtype=x.dtype), y, 0.0).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_what_no_ridge_mends_is_refused(bad: float) -> None:
    k = positive_definite(4)
    k[2, 2] = bad * 1e3
    with pytest.raises(FloatingPointError, match="4 images is not positive definite"):
        ridge_solve(k, torch.ones(4, 1, dtype=k.dtype), 1e-9)


def test_a_regression_with_hardly_any_ridge_gives_back_its_targets() -> None:
    x, y = normal(8, 5), normal(8, 3, seed=1)
    kernel = fully_connected(x).ntk
    torch.testing.assert_close(regression(kernel, kernel, y, 1e-12), y, rtol=1e-6, atol=1e-6)
    flat = regression(kernel, kernel, y, 1e6)
    assert flat.abs().max() < 1e-4 * y.abs().max()
    torch.testing.assert_close(regression(7 * kernel, 7 * kernel, y, 0.1), regression(kernel, kernel, y, 0.1))


def test_targets_are_centred_where_they_are_classes_or_probabilities() -> None:
    classes = torch.tensor([2, 0])
    hard = regression_targets(classes, "classes", 4)
    assert hard.tolist() == [[-0.25, -0.25, 0.75, -0.25], [0.75, -0.25, -0.25, -0.25]]
    soft = regression_targets(torch.tensor([[0.5, 0.5, 0, 0]]), "probabilities", 4)
    assert soft.tolist() == [[0.25, 0.25, -0.25, -0.25]]
    assert regression_targets(torch.tensor([[3.0, 1.0]]), "values", 2).tolist() == [[3.0, 1.0]]
    assert {x.dtype for x in (hard, soft)} == {torch.float64}
