"""Distances between what two sets do to a network (its gradients, features, weights), and the matching loss.

Gradients and weights are mappings of tensors, compared by name, or sequences, compared in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from condense.compute import compiled_or_eager
from condense.names import suggest
from condense.rng import Generators

Tensors = Mapping[str, Tensor] | Sequence[Tensor]
Distance = Callable[[Tensors, Tensors], Tensor]
LossFn = Callable[[dict[str, Tensor], tuple[Tensor, Tensor]], Tensor]


def layerwise_cosine(grads_a: Tensors, grads_b: Tensors) -> Tensor:
    """Sum over layers and over output rows of 1 - <a, b> / (|a| |b| + 1e-6).

    A parameter with two or more axes is a matrix with one row per entry of the first: [out, in k k] for a
    convolution, [out, in] for a linear layer. Those with one axis (biases, affine norms) count nothing.
    The distance "ours" of Zhao et al., "Dataset Condensation with Gradient Matching", ICLR 2021.
    """

    def layer(a: Tensor, b: Tensor) -> Tensor:
        return _cosine_distance(a.flatten(1), b.flatten(1)).sum() if a.ndim > 1 else a.new_zeros(())

    return torch.stack([layer(a, b) for a, b in _pairs(grads_a, grads_b)]).sum()


def mse_sum(a: Tensors, b: Tensors) -> Tensor:
    """Sum of squared differences over all entries."""
    return torch.stack([(x - y).square().sum() for x, y in _pairs(a, b)]).sum()


def global_cosine(grads_a: Tensors, grads_b: Tensors) -> Tensor:
    """1 - <a, b> / (|a| |b| + 1e-6) of all parameters as one vector."""
    flat_a, flat_b = (torch.cat([g.flatten() for g in side]) for side in zip(*_pairs(grads_a, grads_b), strict=True))
    return _cosine_distance(flat_a, flat_b)


def convolution_mse_sum(a: Tensors, b: Tensors) -> Tensor:
    """``mse_sum`` of convolution weights, which are the parameters with the most axes, three to five: channels out, in,
    and one for each axis of the kernel. The others count nothing.

    Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML 2022.
    """
    return _over_convolutions(lambda x, y: (x - y).square().sum(), a, b)


def convolution_l1_sum(a: Tensors, b: Tensors) -> Tensor:
    """Sum of absolute differences of convolution weights; otherwise as ``convolution_mse_sum``."""
    return _over_convolutions(lambda x, y: (x - y).abs().sum(), a, b)


DISTANCES: dict[str, Distance] = {
    "layerwise-cosine": layerwise_cosine,
    "mse": mse_sum,
    "cosine": global_cosine,
    "mse-conv": convolution_mse_sum,
    "l1-conv": convolution_l1_sum,
}


def named_distance(name: str) -> Distance:
    """The distance between gradients that a recipe calls ``name``. Raises ValueError on an unknown name."""
    if name not in DISTANCES:
        raise ValueError(f"unknown distance {name!r}: {suggest(name, DISTANCES)}")
    return DISTANCES[name]


def trajectory_distance(theta: Tensors, target: Tensors, start: Tensors) -> Tensor:
    """|theta - target|^2 / |start - target|^2 over all weights.

    Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", CVPR 2022.
    """
    return mse_sum(theta, target) / mse_sum(start, target)


def feature_mean_distance(real_features: Tensor, syn_features: Tensor) -> Tensor:
    """Squared distance between the means of features (N, F) and (M, F).

    Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023.
    """
    return (real_features.mean(0) - syn_features.mean(0)).square().sum()


def attention_map(maps: Tensor, power: float) -> Tensor:
    """Where feature maps (N, C, ...) are strong, (N, number of places): sums over channels of |x|^power, of norm 1 for
    each image.

    Sajedi et al., "DataDAM: Efficient Dataset Distillation with Attention Matching", ICCV 2023.
    """
    return F.normalize(maps.abs().pow(power).sum(1).flatten(1), dim=1)


def matching_loss(
    loss_fn: LossFn,
    params: dict[str, Tensor],
    real_grads: Mapping[str, Tensor],
    distance: Distance,
    images: Tensor,
    targets: Tensor,
    compile: bool = False,  # noqa: A002
    micro_batch: int | None = None,
) -> Tensor:
    """``distance(real_grads, g)``, g = gradient in ``params`` of ``loss_fn(params, (images, targets))``.

    A scalar, differentiable once, in ``images`` and ``targets`` only: whatever else ``loss_fn`` uses is a
    constant. The gradients are computed with the value, so that no second-order graph outlives this call.
    ``compile`` sends value and gradients through torch.compile as one function, since a compiled ``loss_fn``
    could not be differentiated twice; a new architecture, distance or shape compiles anew.

    Args:
        real_grads: by parameter, of its shape; or of K sets at once, with K in front.
        images, targets: (N, *input_shape) and (N, ...); of K sets (K, N, *input_shape) and (K, N, ...). The value is
            then the sum over the sets.
        micro_batch: most images of one pass; more are gone through in pieces, for which ``loss_fn`` has to be a
            mean over them. It changes nothing but rounding, and which random numbers dropout draws. One set only.
    """
    inputs = (images, targets)
    wanted = tuple(i for i, x in enumerate(inputs) if x.requires_grad)
    fixed = (images.detach(), targets.detach())
    sets = any(real_grads[name].dim() > p.dim() for name, p in params.items())
    evaluate = _of_sets if sets else _value_and_gradients
    run = _compiled(evaluate) if compile else evaluate
    with torch.no_grad():
        if micro_batch is None or sets or len(images) <= micro_batch:
            value, gradients = run(wanted, loss_fn, params, real_grads, distance, fixed)
        else:
            value, gradients = _in_pieces(wanted, loss_fn, params, real_grads, distance, fixed, micro_batch, compile)
    return differentiated(value, gradients, [inputs[i] for i in wanted]) if wanted else value


def feature_matching_loss(
    features: Callable[[Tensor], Tensor], real_mean: Tensor, images: Tensor, micro_batch: int
) -> Tensor:
    """``|real_mean - mean of features(images)|^2``, going through the images (N, *input_shape) in pieces.

    A scalar, differentiable once, in ``images`` only. The features of one piece at a time have a graph: the first
    pass finds the mean, the second the gradients, with the same random numbers (dropout).
    """
    pieces = images.detach().split(micro_batch)
    sums, draws = [], []
    for piece in pieces:
        draws.append(Generators.of(images.device))
        with torch.no_grad():
            sums.append(features(piece).sum(0))
    mean = torch.stack(sums).sum(0) / len(images)
    slope = 2 * (mean - real_mean) / len(images)
    gradients = []
    for piece, drawn in zip(pieces, draws, strict=True):
        piece = piece.clone().requires_grad_()
        with torch.enable_grad(), drawn.replayed():
            product = (features(piece) * slope).sum()
        gradients += torch.autograd.grad(product, piece)
    value = (real_mean - mean).square().sum()
    return differentiated(value, (torch.cat(gradients),), (images,))


def differentiated(value: Tensor, gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """``value`` as a function of ``inputs``, differentiable once, whose gradients there are known already."""
    output: Tensor = _Differentiated.apply(value, tuple(gradients), *inputs)
    return output


def _value_and_gradients(
    wanted: tuple[int, ...],
    loss_fn: LossFn,
    params: dict[str, Tensor],
    real_grads: Mapping[str, Tensor],
    distance: Distance,
    inputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The matching loss and its gradients in those ``inputs`` whose positions are ``wanted``."""

    def value(images: Tensor, targets: Tensor) -> Tensor:
        return distance(real_grads, torch.func.grad(loss_fn)(params, (images, targets)))

    if not wanted:
        return value(*inputs), ()
    gradients, loss = torch.func.grad_and_value(value, argnums=wanted)(*inputs)
    return loss, gradients


def _of_sets(
    wanted: tuple[int, ...],
    loss_fn: LossFn,
    params: dict[str, Tensor],
    real_grads: Mapping[str, Tensor],
    distance: Distance,
    inputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``_value_and_gradients`` of several sets at once, summed."""

    def one(real_grads: Mapping[str, Tensor], inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _value_and_gradients(wanted, loss_fn, params, real_grads, distance, inputs)

    values, gradients = torch.func.vmap(one, randomness="different")(real_grads, inputs)
    return values.sum(), gradients


def _in_pieces(
    wanted: tuple[int, ...],
    loss_fn: LossFn,
    params: dict[str, Tensor],
    real_grads: Mapping[str, Tensor],
    distance: Distance,
    inputs: tuple[Tensor, Tensor],
    micro_batch: int,
    compile: bool,  # noqa: A002
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``_value_and_gradients``: the gradient g first, then with c = dD/dg the gradients of <g, c>, by pieces; both
    passes draw the same random numbers (dropout)."""
    gradient = _compiled(_gradient) if compile else _gradient
    along = _compiled(_slope_gradients) if compile else _slope_gradients
    pieces = list(zip(*(x.split(micro_batch) for x in inputs), strict=True))
    shares = [len(images) / len(inputs[0]) for images, _ in pieces]
    found, draws = [], []
    for piece in pieces:
        draws.append(Generators.of(inputs[0].device))
        found.append(gradient(loss_fn, params, piece))
    grads = {
        name: torch.stack([share * g[name] for share, g in zip(shares, found, strict=True)]).sum(0) for name in params
    }
    into_grads, value = torch.func.grad_and_value(lambda g: distance(real_grads, g))(grads)
    parts = []
    for piece, drawn in zip(pieces, draws, strict=True):
        with drawn.replayed():
            parts.append(along(wanted, loss_fn, params, into_grads, piece))
    gradients = tuple(
        torch.cat([share * part[k] for share, part in zip(shares, parts, strict=True)]) for k in range(len(wanted))
    )
    return value, gradients


def _gradient(loss_fn: LossFn, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.func.grad(loss_fn)(params, batch)
    return found


def _slope_gradients(
    wanted: tuple[int, ...],
    loss_fn: LossFn,
    params: dict[str, Tensor],
    along: Mapping[str, Tensor],
    inputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """Gradients in the ``wanted`` inputs of the derivative of the loss along a direction in ``params``."""

    def slope(images: Tensor, targets: Tensor) -> Tensor:
        grads = torch.func.grad(loss_fn)(params, (images, targets))
        return torch.stack([(grads[name] * along[name]).sum() for name in grads]).sum()

    gradients: tuple[Tensor, ...] = torch.func.grad(slope, argnums=wanted)(*inputs) if wanted else ()
    return gradients


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled_or_eager(function)


class _Differentiated(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)


def _pairs(a: Tensors, b: Tensors) -> list[tuple[Tensor, Tensor]]:
    if isinstance(a, Mapping):
        assert isinstance(b, Mapping) and a.keys() == b.keys(), "not the same parameters"
        return [(a[name], b[name]) for name in a]
    assert not isinstance(b, Mapping), "names on one side only"
    return list(zip(a, b, strict=True))


def _over_convolutions(distance: Callable[[Tensor, Tensor], Tensor], a: Tensors, b: Tensors) -> Tensor:
    pairs = _pairs(a, b)
    axes = max(x.ndim for x, _ in pairs)
    assert axes > 2, "no convolution among the parameters"
    pairs = [(x, y) for x, y in pairs if x.ndim == axes]
    return torch.stack([distance(x, y) for x, y in pairs]).sum()


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos along the last axis."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return 1 - (a * b).sum(-1) / (norms + 1e-6)
