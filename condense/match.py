"""Distances between gradients, features or weights of a network, and the matching losses.

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
    """Return the sum over layers and output rows of 1 - <a, b> / (|a| |b| + 1e-6).

    A parameter with two or more axes is a matrix with one row per entry of the first axis: [out, in k k] for a
    convolution, [out, in] for a linear layer. Parameters with one axis (biases, affine norms) are ignored.
    This is the distance "ours" of Zhao et al., "Dataset Condensation with Gradient Matching", ICLR 2021.
    """

    def layer(a: Tensor, b: Tensor) -> Tensor:
        return _cosine_distance(a.flatten(1), b.flatten(1)).sum() if a.ndim > 1 else a.new_zeros(())

    return torch.stack([layer(a, b) for a, b in _pairs(grads_a, grads_b)]).sum()


def mse_sum(a: Tensors, b: Tensors) -> Tensor:
    """Return the sum of squared differences over all entries."""
    return torch.stack([(x - y).square().sum() for x, y in _pairs(a, b)]).sum()


def global_cosine(grads_a: Tensors, grads_b: Tensors) -> Tensor:
    """Return 1 - <a, b> / (|a| |b| + 1e-6), with all parameters as one vector."""
    flat_a, flat_b = (torch.cat([g.flatten() for g in side]) for side in zip(*_pairs(grads_a, grads_b), strict=True))
    return _cosine_distance(flat_a, flat_b)


def convolution_mse_sum(a: Tensors, b: Tensors) -> Tensor:
    """Return ``mse_sum`` of the convolution weights; other parameters are ignored.

    These are the parameters with the most axes, three to five: output channels, input channels and one for each axis of
    the kernel. Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML 2022.
    """
    return _over_convolutions(lambda x, y: (x - y).square().sum(), a, b)


def convolution_l1_sum(a: Tensors, b: Tensors) -> Tensor:
    """Return the sum of absolute differences of the convolution weights, see ``convolution_mse_sum``."""
    return _over_convolutions(lambda x, y: (x - y).abs().sum(), a, b)


DISTANCES: dict[str, Distance] = {
    "layerwise-cosine": layerwise_cosine,
    "mse": mse_sum,
    "cosine": global_cosine,
    "mse-conv": convolution_mse_sum,
    "l1-conv": convolution_l1_sum,
}


def named_distance(name: str) -> Distance:
    """Return the distance between gradients with this name in a recipe. Raises ValueError for an unknown name."""
    if name not in DISTANCES:
        raise ValueError(f"unknown distance {name!r}: {suggest(name, DISTANCES)}")
    return DISTANCES[name]


def trajectory_distance(theta: Tensors, target: Tensors, start: Tensors, trim: float = 0.0) -> Tensor:
    """Return |theta - target|^2 / |start - target|^2 over all weights, or over those that ``trim`` leaves.

    Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", CVPR 2022.

    Args:
        trim: fraction of the individual weights, rounded down to a whole number of them, that are left out of both
            sums: those with the smallest (theta - target)^2. Of equal ones the first are left out, in the order of the
            parameters and of their entries. The choice is a constant for the gradient. Li et al., "Prioritize Alignment
            in Dataset Distillation", 2024.
    """
    if not trim:
        return mse_sum(theta, target) / mse_sum(start, target)
    error, scale = (torch.cat([(x - y).square().flatten() for x, y in _pairs(side, target)]) for side in (theta, start))
    smallest = error.detach().argsort(stable=True)[: int(trim * len(error))]
    kept = torch.ones_like(error, requires_grad=False).scatter(0, smallest, 0.0)
    return (error * kept).sum() / (scale * kept).sum()


def feature_mean_distance(real_features: Tensor, syn_features: Tensor) -> Tensor:
    """Return the squared distance between the means of features (N, F) and (M, F).

    Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023.
    """
    return (real_features.mean(0) - syn_features.mean(0)).square().sum()


def characteristic_distance(
    real_features: Tensor, syn_features: Tensor, frequencies: Tensor, amplitude: float, phase: float
) -> Tensor:
    """Return the distance between the empirical characteristic functions of features (N, F) and (M, F).

    At a frequency t, a row of ``frequencies`` (K, F), the characteristic function is the mean of exp(i t.f) over the
    features f. The distance is the mean over t of the root of ``amplitude`` times the squared difference of the two
    absolute values a and b, plus ``phase`` times 2ab (1 - cos of the angle between the two), which is at least 1e-12
    because a root has no slope at 0.

    Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective", CVPR 2025.
    """
    (real_x, real_y), (syn_x, syn_y) = (_characteristic(f @ frequencies.T) for f in (real_features, syn_features))
    real_size, syn_size = torch.hypot(real_x, real_y), torch.hypot(syn_x, syn_y)
    angles = 2 * (real_size * syn_size - real_x * syn_x - real_y * syn_y)
    return (amplitude * (real_size - syn_size).square() + phase * angles.clamp(min=1e-12)).sqrt().mean()


def attention_map(maps: Tensor, power: float) -> Tensor:
    """Return the attention of feature maps (N, C, ...), flattened to (N, positions).

    It is the sum over channels of |x|^power, normalised to norm 1 for each image.

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
    """Return ``distance(real_grads, g)``, where g is the gradient of the loss in ``params``.

    The loss is ``loss_fn(params, (images, targets))``. The result is a scalar that is differentiable once, in
    ``images`` and ``targets`` only; everything else that ``loss_fn`` uses is constant. The gradients are computed
    together with the value, so that no second-order graph outlives this call. ``compile`` compiles the value and the
    gradients as one function, since a compiled ``loss_fn`` cannot be differentiated twice. A new architecture, distance
    or shape is compiled separately.

    Args:
        real_grads: gradients by parameter, with the shapes of the parameters; or those of K sets, with a first axis K.
        images, targets: (N, *input_shape) and (N, ...); for K sets (K, N, *input_shape) and (K, N, ...). For K sets the
            value is the sum over the sets.
        micro_batch: the maximum number of images in one pass. Larger batches are processed in chunks, for which
            ``loss_fn`` has to be a mean over images. Chunks change only rounding and the random numbers of dropout.
            Supported for one set only.
    """
    inputs = (images, targets)
    wanted = tuple(i for i, x in enumerate(inputs) if x.requires_grad)
    fixed = (images.detach(), targets.detach())
    sets = any(real_grads[name].dim() > p.dim() for name, p in params.items())
    evaluate = _over_sets if sets else _value_and_gradients
    run = _compiled(evaluate) if compile else evaluate
    with torch.no_grad():
        if micro_batch is None or sets or len(images) <= micro_batch:
            value, gradients = run(wanted, loss_fn, params, real_grads, distance, fixed)
        else:
            value, gradients = _in_chunks(wanted, loss_fn, params, real_grads, distance, fixed, micro_batch, compile)
    return differentiated(value, gradients, [inputs[i] for i in wanted]) if wanted else value


def feature_matching_loss(
    features: Callable[[Tensor], Tensor], real_mean: Tensor, images: Tensor, micro_batch: int
) -> Tensor:
    """Return ``|real_mean - mean of features(images)|^2``, computed in chunks of the images (N, *input_shape).

    The result is a scalar that is differentiable once, in ``images`` only. Only one chunk at a time has a graph: the
    first pass computes the mean and the second the gradients, with the same random numbers for dropout.
    """
    chunks = images.detach().split(micro_batch)
    sums, generators = [], []
    for chunk in chunks:
        generators.append(Generators.of(images.device))
        with torch.no_grad():
            sums.append(features(chunk).sum(0))
    mean = torch.stack(sums).sum(0) / len(images)
    cotangent = 2 * (mean - real_mean) / len(images)
    gradients = []
    for chunk, generator in zip(chunks, generators, strict=True):
        chunk = chunk.clone().requires_grad_()
        with torch.enable_grad(), generator.replayed():
            product = (features(chunk) * cotangent).sum()
        gradients += torch.autograd.grad(product, chunk)
    value = (real_mean - mean).square().sum()
    return differentiated(value, (torch.cat(gradients),), (images,))


def summed_in_chunks(fn: Callable[..., Tensor], inputs: Sequence[Tensor], micro_batch: int | None) -> Tensor:
    """Return the sum of ``fn(*chunks)`` over chunks of at most ``micro_batch`` rows of the inputs (N, ...).

    The result is a scalar that is differentiable once, in the first input only. Only one chunk at a time has a graph.
    ``fn`` may not draw random numbers.
    """
    if micro_batch is None or len(inputs[0]) <= micro_batch:
        return fn(*inputs)
    values, gradients = [], []
    for first, *others in zip(*(x.detach().split(micro_batch) for x in inputs), strict=True):
        chunk = first.clone().requires_grad_()
        with torch.enable_grad():
            value = fn(chunk, *others)
        gradients += torch.autograd.grad(value, chunk)
        values.append(value.detach())
    return differentiated(torch.stack(values).sum(), (torch.cat(gradients),), (inputs[0],))


def differentiated(value: Tensor, gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Return ``value`` as a once differentiable function of ``inputs`` with the given gradients."""
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
    """Return the matching loss and its gradients in the ``inputs`` at the positions ``wanted``."""

    def value(images: Tensor, targets: Tensor) -> Tensor:
        return distance(real_grads, torch.func.grad(loss_fn)(params, (images, targets)))

    if not wanted:
        return value(*inputs), ()
    gradients, loss = torch.func.grad_and_value(value, argnums=wanted)(*inputs)
    return loss, gradients


def _over_sets(
    wanted: tuple[int, ...],
    loss_fn: LossFn,
    params: dict[str, Tensor],
    real_grads: Mapping[str, Tensor],
    distance: Distance,
    inputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return ``_value_and_gradients`` for several sets at once; the values are summed."""

    def one(real_grads: Mapping[str, Tensor], inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _value_and_gradients(wanted, loss_fn, params, real_grads, distance, inputs)

    values, gradients = torch.func.vmap(one, randomness="different")(real_grads, inputs)
    return values.sum(), gradients


def _in_chunks(
    wanted: tuple[int, ...],
    loss_fn: LossFn,
    params: dict[str, Tensor],
    real_grads: Mapping[str, Tensor],
    distance: Distance,
    inputs: tuple[Tensor, Tensor],
    micro_batch: int,
    compile: bool,  # noqa: A002
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return ``_value_and_gradients``, computed in chunks.

    The first pass computes the gradient g, the second with c = dD/dg the gradients of <g, c>. Both draw the same random
    numbers for dropout.
    """
    gradient = _compiled(_gradient) if compile else _gradient
    product_gradients = _compiled(_product_gradients) if compile else _product_gradients
    chunks = list(zip(*(x.split(micro_batch) for x in inputs), strict=True))
    fractions = [len(images) / len(inputs[0]) for images, _ in chunks]
    chunk_grads, generators = [], []
    for chunk in chunks:
        generators.append(Generators.of(inputs[0].device))
        chunk_grads.append(gradient(loss_fn, params, chunk))
    grads = {
        name: torch.stack([fraction * g[name] for fraction, g in zip(fractions, chunk_grads, strict=True)]).sum(0)
        for name in params
    }
    cotangent, value = torch.func.grad_and_value(lambda g: distance(real_grads, g))(grads)
    parts = []
    for chunk, generator in zip(chunks, generators, strict=True):
        with generator.replayed():
            parts.append(product_gradients(wanted, loss_fn, params, cotangent, chunk))
    gradients = tuple(
        torch.cat([fraction * part[k] for fraction, part in zip(fractions, parts, strict=True)])
        for k in range(len(wanted))
    )
    return value, gradients


def _gradient(loss_fn: LossFn, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    grads: dict[str, Tensor] = torch.func.grad(loss_fn)(params, batch)
    return grads


def _product_gradients(
    wanted: tuple[int, ...],
    loss_fn: LossFn,
    params: dict[str, Tensor],
    cotangent: Mapping[str, Tensor],
    inputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """Return the gradients, in the ``wanted`` inputs, of the inner product of the loss gradient and ``cotangent``."""

    def product(images: Tensor, targets: Tensor) -> Tensor:
        grads = torch.func.grad(loss_fn)(params, (images, targets))
        return torch.stack([(grads[name] * cotangent[name]).sum() for name in grads]).sum()

    gradients: tuple[Tensor, ...] = torch.func.grad(product, argnums=wanted)(*inputs) if wanted else ()
    return gradients


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled_or_eager(function)


class _Differentiated(torch.autograd.Function):
    """A value with given gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)


def _characteristic(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return real and imaginary part (K,) of the mean of exp(i angle) over the rows of ``angles`` (N, K)."""
    return angles.cos().mean(0), angles.sin().mean(0)


def _pairs(a: Tensors, b: Tensors) -> list[tuple[Tensor, Tensor]]:
    if isinstance(a, Mapping):
        assert isinstance(b, Mapping) and a.keys() == b.keys(), "not the same parameters"
        return [(a[name], b[name]) for name in a]
    assert not isinstance(b, Mapping), "only one side has names"
    return list(zip(a, b, strict=True))


def _over_convolutions(distance: Callable[[Tensor, Tensor], Tensor], a: Tensors, b: Tensors) -> Tensor:
    pairs = _pairs(a, b)
    axes = max(x.ndim for x, _ in pairs)
    assert axes > 2, "no convolution among the parameters"
    pairs = [(x, y) for x, y in pairs if x.ndim == axes]
    return torch.stack([distance(x, y) for x, y in pairs]).sum()


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - cos along the last axis."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return 1 - (a * b).sum(-1) / (norms + 1e-6)
