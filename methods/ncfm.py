"""NCFM: Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective", CVPR 2025.

    min_S max_psi  E_{m, u, omega}  300 sum_c mean_t sqrt( alpha (|Phi_B(t)| - |Phi_S(t)|)^2
                                        + 2 beta (|Phi_B(t)| |Phi_S(t)| - Re Phi_B(t) conj Phi_S(t)) )

    Phi_X(t) = mean_{x in X_c} exp(i t.f(A(x))),    theta = u theta_{m,0} + (1 - u) theta_{m,E}

The means of DM are replaced by characteristic functions, which determine a distribution. Its frequencies t are Gaussian
or those of a network psi that maximises the distance. The network of a step lies between the first and the last weights
of an expert m. After every matching step, the trained expert calibrates the images by a step on its cross-entropy.

    symbol   code
    S_c      decoded images of class c
    B_c      ``batch_real`` real images of class c, drawn at every step
    f        ``ctx.features`` divided by their norm; the weights theta are ``state.params``
    t        the rows of ``frequencies``
    psi      ``state.learned["frequencies"]``, see ``frequency_network``
    u        uniform over [0, ``initial_share``]
    E        ``last_epoch``
    alpha    ``amplitude``
    beta     ``phase``
    A        the ``matched`` operations of ``task.augment``; omega is drawn once for both batches of a class

Deviations: see docs/methods/ncfm.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from condense.match import characteristic_distance
from condense.method import Context, Optim, Value
from condense.methods.dm import DMState, synthetic
from condense.methods.mtt import experts_of
from condense.methods.tgdd import ExpertMatching, ExpertState
from condense.networks import Weights
from condense.schedule import Schedule
from condense.task import Task
from condense.teachers import has_batch_norm
from condense.train import Training

SCALE = 300.0
"""Factor of the distance."""
LAYERS = 3
"""Number of layers of psi."""


@final
@dataclass(frozen=True, kw_only=True)
class NCFM(ExpertMatching):
    """Matches characteristic functions of features, optionally at frequencies that are learned to tell them apart."""

    num_steps: int = 40000
    """Number of updates of the images. With calibration, every second one is a calibration step."""
    optim: Optim = Optim(kind="adam", lr=0.157, momentum=0.35)
    """Optimiser of the images (latents). The recipes also set beta2; see docs/methods/ncfm.md."""
    batch_real: int = 1024
    """Real images per class in each step; all of them if a class has fewer."""
    initial_share: float = 1.0
    """Largest fraction of an expert's initial weights in the network of a step; the rest are its trained weights."""
    num_frequencies: int = 4096
    """Number of frequencies; 64 are published for learned ones."""
    adversarial: bool = False
    """Whether a network learns the frequencies by maximising the distance; otherwise they are standard normal."""
    optim_frequencies: Optim = Optim(lr=1e-3, momentum=0.0)
    """Optimiser of the network of the frequencies."""
    amplitude: float = 0.5
    """Weight of the difference of absolute values (alpha)."""
    phase: float = 0.5
    """Weight of the difference of angles (beta)."""
    calibration: float = 1.0
    """Weight of the cross-entropy of calibration steps; 0: there are none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(2 if self.adversarial else 1, "num_frequencies")  # batch statistics need two
        self.require_at_least(0, "amplitude", "phase", "calibration")
        if not 0 <= self.initial_share <= 1:
            raise ValueError(
                f"method.initial_share must lie in [0, 1], got {self.initial_share}; the published value is 1"
            )

    @property
    def period(self) -> int:
        """Number of steps that share an expert: a matching step and, if there is one, its calibration step."""
        return 2 if self.calibration else 1

    def optims(self) -> dict[str, Optim]:
        return super().optims() | {"frequencies": self.optim_frequencies}

    def graphs(self, ctx: Context) -> bool:
        return not self.calibration

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        calibration = images_per_class if self.calibration else 0
        matching = self.batch_real / 3 + images_per_class
        return self.num_steps / self.period * num_classes * (matching + calibration)

    def training(self, task: Task) -> Training:
        return Training(
            num_epochs=2000,
            batch_size=128,
            optimiser="adamw",
            lr=1e-3,
            weight_decay=0.01,
            schedule=Schedule(drop_at=(0.2, 0.4, 0.6, 0.8), drop_factor=0.5),
            cutmix=0.5,
        )

    def init(self, ctx: Context) -> ExpertState:
        state = super().init(ctx)
        if self.adversarial:
            width = ctx.task.network.num_features
            weights = (2 * ctx.rng("frequency network").uniform(LAYERS, width, width) - 1) / width**0.5
            norms = torch.tensor([1.0, 0.0])[:, None].expand(LAYERS, 2, width)
            state.learned["frequencies"] = nn.Parameter(torch.cat([weights, norms], 1).to(ctx.task.device))
            state.optimisers = self.optimisers(state.syn, state.learned)
        return state

    def networks(self, ctx: Context, step: int) -> tuple[Weights, Weights]:
        experts, draws, network = experts_of(ctx), ctx.rng("experts", step // self.period), ctx.task.network
        expert, share = draws.integer(0, experts.num_experts), self.initial_share * float(draws.uniform(1))
        first, last = (experts.weights(expert, network, epoch) for epoch in (0, self.last_epoch))
        return Weights({k: torch.lerp(p, first.params[k], share) for k, p in last.params.items()}, last.buffers), last

    def losses(self, ctx: Context, state: DMState, step: int, parts: Sequence[int]) -> Tensor:
        if not self.calibration or step % 2 == 0:
            return super().losses(ctx, state, step, parts)
        classes = self.classes(ctx, parts)
        images = [synthetic(ctx, self.augment(ctx), state.syn, step, c)[0] for c in classes]
        return self.calibration * self.cross_entropy(ctx, state, classes, images)

    def distance(
        self,
        ctx: Context,
        state: DMState,
        step: int,
        classes: Sequence[int],
        real: Sequence[Tensor],
        syn: Sequence[Tensor],
    ) -> Tensor:
        frequencies = self.frequencies(ctx, state, step)
        with torch.no_grad():
            wanted = self.directions(ctx, state, real)
        pairs = zip(wanted, self.directions(ctx, state, syn), strict=True)
        distances = [characteristic_distance(r, s, frequencies, self.amplitude, self.phase) for r, s in pairs]
        return SCALE * torch.stack(distances).sum()

    def directions(self, ctx: Context, state: DMState, groups: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return features (n, F) of norm 1 of groups of images (n, C, H, W). A pass has at most ``micro_batch`` images,
        unless the network has BatchNorm; with several passes, all but the features are computed again for gradients."""
        features, images, most = self.features(ctx, state), torch.cat(list(groups)), ctx.compute.micro_batch
        if most is None or len(images) <= most or has_batch_norm(ctx.task.network):
            found = features(images)
        else:
            found = torch.cat([checkpoint(features, x, use_reentrant=False) for x in images.split(most)])
        return F.normalize(found, dim=1).split([len(x) for x in groups])

    def frequencies(self, ctx: Context, state: DMState, step: Any) -> Tensor:
        """Return the frequencies (``num_frequencies``, F) of a step, which all classes share."""
        device = ctx.task.device
        if isinstance(step, int) and device.type != "cpu":
            step = torch.full((), step, device=device)  # millions of numbers are drawn on the device
        noise = ctx.rng("frequencies", step).normal(self.num_frequencies, ctx.task.network.num_features)
        return frequency_network(state.learned["frequencies"], noise) if self.adversarial else noise

    def update(self, state: Any, record: dict[str, Value]) -> None:
        """Minimise over the set and maximise over the frequencies."""
        for param in state.learned.values():
            param.grad.neg_()
        super().update(state, record)


def frequency_network(layers: Tensor, noise: Tensor) -> Tensor:
    """Return frequencies (K, F) in (-1, 1) for standard normal noise (K, F).

    Args:
        layers: (3, F + 2, F): for each layer the weights of a linear map, and gain and shift of the normalisation over
            the K rows that follows it.
    """
    x, width = noise, noise.shape[1]
    for number, layer in enumerate(layers, 1):
        x = F.batch_norm(F.linear(x, layer[:width]), None, None, layer[width], layer[width + 1], training=True)
        x = F.leaky_relu(x, 0.2) if number < LAYERS else x.tanh()
    return x
