"""RFAD: kernel ridge regression on the features of random networks.

Loo, Hasani, Amini and Rus, "Efficient Dataset Distillation using Random Feature Approximation", NeurIPS 2022.

    min_X_s  E_theta_1..N  l( K_ts (K_ss + lambda tr(K_ss)/n I)^-1 y_s, y_t )
    K(x, x') = 2 <phi(x), phi(x')> + 0.01,   phi = concat_i psi_(theta_i) / sqrt(N F)

The kernel of KIP is estimated instead of computed exactly. If only the last layer of a wide network is fitted, the
kernel is the expectation of products of random features, which a few random networks estimate.

    symbol      code
    X_s, y_s    the images of ``state.syn``, mapped by ``pixel_map`` if there is one, and their centred targets
    X_t, y_t    ``num_batches`` times ``batch_real`` real images per step
    theta_i     ``num_networks`` fresh networks per step: ``gaussian``
    psi, F      the network without its last layer, and the number of its outputs
    lambda      ``ridge``
    l           ``objective``: half the mean squared error, or the cross-entropy of e^k times the prediction (Platt)
    k           ``state.learned["temperature"]``

Deviations: see docs/methods/rfad.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.kernels import centred, feature_kernel, regression, regression_targets
from condense.method import Context, GradientMethod, GradientState, Optim
from condense.methods.kip import support
from condense.names import spelt
from condense.networks import Functional, Weights
from condense.objective import ObjectiveName
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic.decode import Decode
from condense.synthetic.labels import Labels
from condense.synthetic.set import SyntheticSet
from condense.task import Task
from condense.teachers import has_batch_norm
from condense.train import Training

W_STD, B_STD = math.sqrt(2), 0.1
"""Standard deviations of weights and biases, in the random networks and in the last layer that the kernel implies."""


@final
@dataclass(frozen=True, kw_only=True)
class RFAD(GradientMethod):
    """Kernel ridge regression on the features of random networks."""

    family: ClassVar[str] = "kernel"
    regresses: ClassVar[bool] = True

    num_steps: int = 10000
    """Number of updates of the images."""
    optim: Optim = Optim(kind="adabelief", lr=1e-3, momentum=0.9)
    """Optimiser of the images (latents)."""
    optim_labels: Optim = Optim(kind="adabelief", lr=1e-3, momentum=0.9)
    """Optimiser of learned labels."""
    optim_temperature: Optim = Optim(kind="adabelief", lr=1e-2, momentum=0.9)
    """Optimiser of the logarithm of the temperature of Platt scaling."""
    optim_pixel_map: Optim = Optim(kind="adabelief", lr=5e-5, momentum=0.9)
    """Optimiser of the linear map of the pixels."""
    start: Literal["real", "noise"] = "real"
    """Initial images: real ones drawn per class, or standard normal noise."""
    objective: Literal["mse", "platt"] = "platt"
    """Loss of the predictions: mse (half the mean squared error) or platt (cross-entropy, learned temperature)."""
    num_networks: int = 8
    """Number of random networks per step."""
    num_batches: int = 4
    """Number of batches of real images per step."""
    batch_real: int = 1280
    """Number of real images per batch, of any class."""
    ridge: float = 5e-3
    """Ridge of the regression, relative to the mean of the kernel's diagonal."""
    pixel_map: bool = False
    """Whether to learn a linear map of the pixels that all images share; it is applied before the images are stored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_networks", "num_batches", "batch_real")
        self.require_positive("ridge")

    def incompatibility(
        self, decode: Decode, labels: Labels, transform: str, objective: ObjectiveName = "cross-entropy"
    ) -> str | None:
        if self.pixel_map and decode.name != "pixels":
            fix = spelt("method.pixel_map", False)
            return f"cannot apply its pixel map to the latents of {decode.name}; give {fix}"
        if self.pixel_map and self.clamp:
            return f"cannot clamp pixels that its pixel map changes afterwards; give {spelt('method.clamp', False)}"
        return super().incompatibility(decode, labels, transform, objective)

    def optims(self) -> dict[str, Optim]:
        return super().optims() | {"temperature": self.optim_temperature, "pixel_map": self.optim_pixel_map}

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        real = min(self.batch_real, num_images) * self.num_batches
        return self.num_steps * self.num_networks * (real / 3 + images_per_class * num_classes)

    def training(self, task: Task) -> Training:
        return Training(num_epochs=1000, batch_size=500, lr=0.01, weight_decay=0.0, schedule=Schedule(), loss="mse")

    def init(self, ctx: Context) -> GradientState:
        syn, device = ctx.new_set(*ctx.initial(self.start)), ctx.task.device
        learned = nn.ParameterDict()
        if self.objective == "platt":
            learned["temperature"] = nn.Parameter(torch.zeros((), device=device))
        if self.pixel_map:
            learned["pixel_map"] = nn.Parameter(torch.eye(math.prod(ctx.task.input_shape), device=device))
        return GradientState(syn=syn, optimisers=self.optimisers(syn, learned), learned=learned)

    def parts(self, ctx: Context) -> Sequence[int]:
        return range(self.num_batches)

    def parts_at_once(self, ctx: Context) -> int:
        return self.num_batches

    def graphs(self, ctx: Context) -> bool:
        return True

    def loss(self, ctx: Context, state: GradientState, step: int, part: int) -> Tensor:
        return self.losses(ctx, state, step, (part,))

    def losses(self, ctx: Context, state: GradientState, step: int, parts: Sequence[int]) -> Tensor:
        task = ctx.task
        batches = [task.train.sample(self.batch_real, ctx.rng("real", step, part)) for part in parts]
        real, classes = [images for images, _ in batches], torch.cat([classes for _, classes in batches])
        images, targets = state.syn()
        images, targets = support(ctx, mapped(images, state.learned), targets, step)
        k_ts, k_ss = self._kernels(ctx, real, images, step)
        y = regression_targets(targets, ctx.labels.space, task.num_classes)
        predicted = regression(k_ts, k_ss, y, self.ridge)
        if self.objective == "platt":
            errors = F.cross_entropy(state.learned["temperature"].exp() * predicted, classes, reduction="none")
        else:
            wanted = centred(classes, task.num_classes)
            errors = 0.5 * (predicted - wanted).square().mean(1)
        means = [batch.mean() for batch in errors.split([len(x) for x, _ in batches])]
        return torch.stack(means).sum() / self.num_batches

    def _kernels(self, ctx: Context, real: Sequence[Tensor], images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """``K_ts`` (m, n) of all batches of real images, and ``K_ss`` (n, n), float64."""
        most = None if has_batch_norm(ctx.task.network) else ctx.compute.micro_batch
        num = sum(len(batch) for batch in real), len(images)
        k_ts, k_ss = (torch.zeros(m, len(images), dtype=torch.float64, device=images.device) for m in num)
        for k in range(self.num_networks):
            weights = gaussian(ctx.task.network, ctx.rng, step, k)
            with torch.no_grad():
                chunks = [chunk for batch in real for chunk in batch.split(most or len(batch))]
                phi_t = torch.cat([ctx.features(*weights, chunk) for chunk in chunks])
            phi_s = ctx.features(*weights, images)
            scale = W_STD**2 / (self.num_networks * phi_s.shape[1])
            k_ts = k_ts + scale * feature_kernel(phi_t, phi_s)
            k_ss = k_ss + scale * feature_kernel(phi_s, phi_s)
        return k_ts + B_STD**2, k_ss + B_STD**2

    def finalize(self, ctx: Context, state: GradientState, steps: int) -> SyntheticSet:
        syn = super().finalize(ctx, state, steps)
        if not self.pixel_map:
            return syn
        folded = copy.deepcopy(syn)
        with torch.no_grad():
            folded.latents.copy_(mapped(folded.latents, state.learned))
        return folded


def mapped(images: Tensor, learned: nn.ParameterDict) -> Tensor:
    """Apply the linear map of the pixels, if one is learned, to images (n, C, H, W)."""
    return (images.flatten(1) @ learned["pixel_map"]).view_as(images) if "pixel_map" in learned else images


def gaussian(network: Functional, rng: Rng, step: int, unit: int) -> Weights:
    """Return fresh weights. The weights of layers are normal with standard deviation sqrt(2 / fan-in), their biases
    with 0.1. Other parameters have the initial values of the network.

    A layer is a weight with two or more axes, [out, ...], and its bias.
    """
    weights, draws = network.init(rng, "network", step, unit), rng("gaussian", step, unit)
    for name, shape in network.shapes.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias") or len(network.shapes.get(f"{module}.weight", ())) < 2:
            continue
        std = W_STD / math.sqrt(math.prod(shape[1:])) if kind == "weight" else B_STD
        drawn = std * draws.normal(*shape)
        weights.params[name] = drawn.to(network.device, network.dtype)
    return weights
