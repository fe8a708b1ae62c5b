"""The algorithms as the papers' code runs them: the baseline of every ratio in docs/performance.md.

They use eager float32 modules, a data loader, Python loops over classes and one autograd graph for everything.
``tests/test_benchmarks.py`` checks that the engine computes the same.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

Params = dict[str, Tensor]


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, instance norm as GroupNorm(C, C), ReLU and 2x2 mean pooling, then a linear layer.

    ``smooth``: the network of RCIG, with softplus (beta 60) in place of ReLU and without norm. ``batch``: the network
    of SRe2L, with BatchNorm in place of instance norm.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int = 3,
        width: int = 128,
        smooth: bool = False,
        batch: bool = False,
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.Identity() if smooth else nn.BatchNorm2d(width) if batch else nn.GroupNorm(width, width),
                nn.Softplus(beta=60) if smooth else nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
            channels, height, breadth = width, height // 2, breadth // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * height * breadth, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))


# Differentiable Siamese augmentation (Zhao and Bilen, ICML 2021): one operation per batch, drawn from the global
# generator, with parameters for each image, or (siamese) with the same parameters for all images.


def dsa(x: Tensor, strategy: str, siamese: bool = False, seed: int | None = None) -> Tensor:
    """Apply one random operation of the strategy to a batch. Equal seeds draw the same operation and parameters."""
    if not strategy:
        return x
    if seed is not None:
        torch.manual_seed(seed)
    operations = strategy.split("_")
    operation = operations[int(torch.randint(len(operations), ()))]
    return AUGMENTATIONS[operation](x, 1 if siamese else len(x))


def color(x: Tensor, rows: int) -> Tensor:
    x = x + (torch.rand(rows, 1, 1, 1, device=x.device) - 0.5)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (torch.rand(rows, 1, 1, 1, device=x.device) * 2) + mean
    mean = x.mean(dim=[1, 2, 3], keepdim=True)
    return (x - mean) * (torch.rand(rows, 1, 1, 1, device=x.device) + 0.5) + mean


def crop(x: Tensor, rows: int) -> Tensor:
    num, _, height, width = x.shape
    down, up = int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)
    shift_y = torch.randint(-down, down + 1, (rows, 1, 1), device=x.device)
    shift_x = torch.randint(-up, up + 1, (rows, 1, 1), device=x.device)
    n, i, j = _indices(num, height, width, x.device)
    i = (i + shift_y + 1).clamp(0, height + 1)
    j = (j + shift_x + 1).clamp(0, width + 1)
    padded = F.pad(x, [1, 1, 1, 1]).permute(0, 2, 3, 1)
    return padded[n, i, j].permute(0, 3, 1, 2)


def cutout(x: Tensor, rows: int) -> Tensor:
    num, _, height, width = x.shape
    tall, wide = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    centre_y = torch.randint(0, height + 1 - tall % 2, (rows, 1, 1), device=x.device)
    centre_x = torch.randint(0, width + 1 - wide % 2, (rows, 1, 1), device=x.device)
    n, i, j = _indices(num, tall, wide, x.device)
    i = (i + centre_y - tall // 2).clamp(0, height - 1)
    j = (j + centre_x - wide // 2).clamp(0, width - 1)
    mask = torch.ones(num, height, width, dtype=x.dtype, device=x.device)
    mask[n, i, j] = 0
    return x * mask.unsqueeze(1)


def flip(x: Tensor, rows: int) -> Tensor:
    return torch.where(torch.rand(rows, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def scale(x: Tensor, rows: int) -> Tensor:
    sx, sy = (torch.rand(rows) * (1.2 - 1 / 1.2) + 1 / 1.2 for _ in range(2))
    return _warp(x, [[[sx[k % rows], 0, 0], [0, sy[k % rows], 0]] for k in range(len(x))])


def rotate(x: Tensor, rows: int) -> Tensor:
    angle = (torch.rand(rows) - 0.5) * 2 * 15 / 180 * torch.pi
    cos, sin = angle.cos(), angle.sin()
    return _warp(x, [[[cos[k % rows], -sin[k % rows], 0], [sin[k % rows], cos[k % rows], 0]] for k in range(len(x))])


def _indices(num: int, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    axes = (torch.arange(length, device=device) for length in (num, height, width))
    return torch.meshgrid(*axes, indexing="ij")


def _warp(x: Tensor, theta: list[list[list[Tensor | int]]]) -> Tensor:
    grid = F.affine_grid(torch.tensor(theta, dtype=x.dtype, device=x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


AUGMENTATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
}


def train(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_epochs: int,
    *,
    lr: float = 0.01,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    strategy: str = "",
    optimiser: torch.optim.Optimizer | None = None,
) -> None:
    """Train a network; the defaults are those of an expert (Cazenavette et al., CVPR 2022). A given ``optimiser`` takes
    the place of the one that ``lr``, ``momentum`` and ``weight_decay`` describe."""
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)
    if optimiser is None:
        optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    net.train()
    for _ in range(num_epochs):
        total, hits = 0.0, 0
        for x, y in loader:
            logits = net(dsa(x, strategy))
            loss = F.cross_entropy(logits, y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(y)
            hits += int((logits.argmax(1) == y).sum())


def evaluate(net: nn.Module, images: Tensor, labels: Tensor, num_epochs: int, strategy: str) -> None:
    """Train a fresh network on a synthetic set. The learning rate drops after half of the epochs, with a new
    optimiser."""
    for lr, epochs in ((0.01, num_epochs // 2), (0.001, num_epochs - num_epochs // 2)):
        train(net, images, labels, epochs, lr=lr, momentum=0.9, weight_decay=5e-4, strategy=strategy)


def expert_buffer(
    fresh: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    num_experts: int,
    num_epochs: int,
    path: Path,
    *,
    batch_size: int,
    strategy: str,
) -> None:
    """Train experts with a snapshot after every epoch; pickle all of them into one file at the end."""
    buffer = []
    for _ in range(num_experts):
        net = fresh()
        snapshots = [[p.detach().cpu().clone() for p in net.parameters()]]
        for _ in range(num_epochs):
            train(net, images, labels, 1, batch_size=batch_size, strategy=strategy)
            snapshots.append([p.detach().cpu().clone() for p in net.parameters()])
        buffer.append(snapshots)
    torch.save(buffer, path)


def mtt_loss(
    net: nn.Module,
    start: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    num_steps: int,
    strategy: str,
) -> Tensor:
    """Return the loss of trajectory matching (Cazenavette et al., CVPR 2022), with all student steps in one graph."""
    theta: Params = {name: p.clone().requires_grad_() for name, p in start.items()}
    for _ in range(num_steps):
        index = torch.randperm(len(images))
        x = dsa(images[index], strategy)
        loss = F.cross_entropy(functional_call(net, theta, (x,)), labels[index])
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {name: p - lr * g for (name, p), g in zip(theta.items(), grads, strict=True)}

    def distance(params: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([(params[name] - p).square().sum() for name, p in target.items()]).sum()

    return distance(theta) / distance(start)


def descend(loss: Tensor, *optimisers: torch.optim.Optimizer) -> None:
    """Step all optimisers down the gradient of the loss, and read the loss, as the papers' code does to log it."""
    for optimiser in optimisers:
        optimiser.zero_grad()
    loss.backward()
    for optimiser in optimisers:
        optimiser.step()
    loss.item()


def mtt_step(
    net: nn.Module,
    start: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    optimisers: Sequence[torch.optim.Optimizer],
    num_steps: int,
    strategy: str,
) -> None:
    """Update the images and the learning rate of the student once."""
    loss = mtt_loss(net, start, target, images, labels, lr, num_steps, strategy)
    descend(loss, *optimisers)


def dc_loss(net: nn.Module, real: Tensor, syn: Tensor, label: int) -> Tensor:
    """Return the distance between the gradients of one class (Zhao, Mopuri and Bilen, ICLR 2021)."""
    params = list(net.parameters())

    def gradient(x: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
        classes = torch.full((len(x),), label, device=x.device)
        return torch.autograd.grad(F.cross_entropy(net(x), classes), params, create_graph=create_graph)

    wanted = [g.detach().clone() for g in gradient(real, create_graph=False)]
    total = torch.zeros((), dtype=syn.dtype, device=syn.device)
    for a, b in zip(wanted, gradient(syn, create_graph=True), strict=True):
        if a.ndim > 1:
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def dc_step(
    net: nn.Module,
    real: Sequence[Tensor],
    syn: Tensor,
    optimiser: torch.optim.Optimizer,
    batch_real: int,
    strategy: str,
) -> None:
    """Update the images once (DSA: Zhao and Bilen, ICML 2021), by one backward pass through the losses of all classes.

    Args:
        real: the real images of every class.
        syn: (C * ipc, ...), grouped by class.
    """
    loss = torch.zeros((), device=syn.device)
    for label, (batch, images) in enumerate(_classes(real, syn, batch_real, strategy)):
        loss = loss + dc_loss(net, batch, images, label)
    descend(loss, optimiser)


def dm_loss(net: ConvNet, real: Tensor, syn: Tensor) -> Tensor:
    """Return the distance between the mean features of one class (Zhao and Bilen, WACV 2023)."""
    wanted = net.embed(real).detach()
    return (wanted.mean(0) - net.embed(syn).mean(0)).square().sum()


def dm_step(
    net: ConvNet,
    real: Sequence[Tensor],
    syn: Tensor,
    optimiser: torch.optim.Optimizer,
    batch_real: int,
    strategy: str,
) -> None:
    """Update the images once; the arguments are those of ``dc_step``."""
    net.requires_grad_(False)
    loss = torch.zeros((), device=syn.device)
    for batch, images in _classes(real, syn, batch_real, strategy):
        loss = loss + dm_loss(net, batch, images)
    descend(loss, optimiser)


def decode(latents: Tensor, factor: int = 2) -> Tensor:
    """Return the images (factor^2 n, ...) that are stored in (n, ...): tile by tile, enlarged to full size."""
    tall, wide = (side // factor for side in latents.shape[2:])
    corners = [(i * tall, j * wide) for i in range(factor) for j in range(factor)]
    tiles = torch.cat([latents[:, :, y : y + tall, x : x + wide] for y, x in corners])
    return F.interpolate(tiles, scale_factor=factor, mode="bilinear", align_corners=False)


def idc_loss(net: nn.Module, real: Tensor, syn: Tensor, label: int) -> Tensor:
    """Return the distance between the gradients of the convolutions for one class (Kim et al., ICML 2022)."""
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]

    def gradient(x: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
        classes = torch.full((len(x),), label, device=x.device)
        return torch.autograd.grad(F.cross_entropy(net(x), classes), weights, create_graph=create_graph)

    wanted = [g.detach() for g in gradient(real, create_graph=False)]
    pairs = zip(wanted, gradient(syn, create_graph=True), strict=True)
    return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()


def idc_step(
    net: nn.Module,
    student: torch.optim.Optimizer,
    real: Sequence[Tensor],
    latents: Tensor,
    optimiser: torch.optim.Optimizer,
    batch_real: int,
    num_student: int,
    strategy: str,
) -> None:
    """Update the stored images once, then train the student for an epoch on real images.

    Args:
        student: the optimiser of ``net``.
        real: the real images of every class.
        latents: stored images (C * ipc, ...), grouped by class, each of four images.
        num_student: number of real images on which the student is trained, with a batch size of 64.
    """
    loss = torch.zeros((), device=latents.device)
    decoded = torch.cat([decode(stored) for stored in latents.chunk(len(real))])
    for label, (batch, images) in enumerate(_classes(real, decoded, batch_real, strategy)):
        loss = loss + idc_loss(net, batch, images, label)
    descend(loss, optimiser)
    images = torch.cat(list(real))
    labels = torch.arange(len(real), device=images.device).repeat_interleave(len(real[0]))
    chosen = torch.randperm(len(images))[:num_student]
    train(net, images[chosen], labels[chosen], 1, batch_size=64, strategy=strategy, optimiser=student)


def frepo_loss(net: ConvNet, real: Tensor, wanted: Tensor, images: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Return the loss of neural feature regression (Zhou et al., NeurIPS 2022).

    Args:
        wanted: targets (m, C) of the real images.
        images, targets: the set, (n, ...) and (n, C).
        ridge: relative to the mean of the diagonal of the kernel.
    """
    with torch.no_grad():
        features = net.embed(real)
    own = net.embed(images)
    kernel = own @ own.T
    scale = ridge * kernel.trace() / len(kernel)
    dual = torch.linalg.solve(kernel + scale * torch.eye(len(kernel), dtype=own.dtype, device=own.device), targets)
    error = features @ own.T @ dual - wanted
    return 0.5 * error.square().sum(1).mean() - lead(targets, 1 / targets.shape[1])


def lead(targets: Tensor, most: float) -> Tensor:
    """Return the margin between the two largest values of each target, at most ``most``, averaged."""
    first, second = targets.topk(2, 1).values.unbind(1)
    return (first - second).clamp(max=most).mean()


def frepo_step(
    net: ConvNet,
    adam: torch.optim.Optimizer,
    real: Tensor,
    wanted: Tensor,
    images: Tensor,
    targets: Tensor,
    optimiser: torch.optim.Optimizer,
    batch_real: int,
) -> None:
    """Update the set once, then train the network of the pool, whose optimiser is ``adam``, on it for a step."""
    chosen = torch.randperm(len(real))[:batch_real]
    loss = frepo_loss(net, real[chosen], wanted[chosen], images, targets, 1e-6)
    descend(loss, optimiser)
    error = net(images.detach()) - targets.detach()
    adam.zero_grad()
    (0.5 * error.square().sum(1).mean()).backward()
    adam.step()


def rat_bptt_loss(
    net: nn.Module,
    start: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    real: tuple[Tensor, Tensor],
    *,
    burn_in: int,
    window: int,
    lr: float,
    strategy: str,
) -> Tensor:
    """Return the loss on real images after training on the whole set by Adam (Feng et al., ICLR 2024). The last
    ``window`` steps are in one graph; those before have none. As in the engine, 1e-16 is added inside the root."""
    theta: Params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    mean, square = ({name: torch.zeros_like(p) for name, p in theta.items()} for _ in range(2))
    for step in range(burn_in + window):
        index = torch.randperm(len(images))
        loss = F.cross_entropy(functional_call(net, theta, (dsa(images[index], strategy),)), labels[index])
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=step >= burn_in)
        with torch.set_grad_enabled(step >= burn_in):
            for name, g in zip(list(theta), grads, strict=True):
                mean[name] = 0.9 * mean[name] + 0.1 * g
                square[name] = 0.999 * square[name] + 0.001 * g**2
                root = torch.sqrt(square[name] / (1 - 0.999 ** (step + 1)) + 1e-16) + 1e-8
                theta[name] = theta[name] - lr * mean[name] / (1 - 0.9 ** (step + 1)) / root
        if step < burn_in:
            theta = {name: p.requires_grad_() for name, p in theta.items()}
    return F.cross_entropy(functional_call(net, theta, (dsa(real[0], strategy),)), real[1])


def rat_bptt_step(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    real: tuple[Tensor, Tensor],
    optimiser: torch.optim.Optimizer,
    batch_real: int,
    burn_in: int,
    window: int,
    strategy: str,
) -> None:
    """Update the images once, through the training of the fresh network ``net``."""
    chosen = torch.randperm(len(real[0]))[:batch_real]
    batch = real[0][chosen], real[1][chosen]
    start = dict(net.named_parameters())
    loss = rat_bptt_loss(net, start, images, labels, batch, burn_in=burn_in, window=window, lr=1e-3, strategy=strategy)
    descend(loss, optimiser)


class Linearised:
    """The network of RCIG, linearised at its weights, with ridge regression in place of its last layer (Loo et al.,
    ICML 2023)."""

    def __init__(self, net: ConvNet, ridge: float) -> None:
        """``ridge`` is the regularisation per image of the set."""
        self.net, self.ridge = net, ridge
        self.body = {name: p.detach() for name, p in net.features.named_parameters()}
        self.matrix = net.classifier.weight.detach()

    def no_move(self) -> list[Tensor]:
        """A zero change of the weights of the features and of the bias of the last layer."""
        return [torch.zeros_like(p) for p in [*self.body.values(), self.net.classifier.bias]]

    def outputs(self, move: Sequence[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and the derivative of the logits along ``move``."""

        def features(*body: Tensor) -> Tensor:
            return functional_call(self.net.features, dict(zip(self.body, body, strict=True)), (images,)).flatten(1)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # raised within torch
            h, along, *_ = torch.func.jvp(features, tuple(self.body.values()), tuple(move[:-1]))
        return h, along @ self.matrix.T + move[-1]

    def dual(self, move: Sequence[Tensor], images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features of the set, the dual weights of the regression, and the targets that it fits."""
        h, o = self.outputs(move, images)
        ridge = self.ridge * len(images) * torch.eye(len(images), dtype=h.dtype, device=h.device)
        return h, torch.linalg.solve(h @ h.T + ridge, targets - o), targets - o

    def inner_loss(self, move: Sequence[Tensor], images: Tensor, targets: Tensor) -> Tensor:
        h, a, rest = self.dual(move, images, targets)
        fitted = h @ h.T @ a
        penalty = (a * fitted).sum() + torch.stack([d.square().sum() for d in move]).sum()
        return 0.5 * ((rest - fitted).square().sum() + self.ridge * len(images) * penalty) / targets.numel()

    def predict(self, move: Sequence[Tensor], images: Tensor, targets: Tensor, real: Tensor) -> Tensor:
        h, a, _ = self.dual(move, images, targets)
        h_real, o_real = self.outputs(move, real)
        return o_real + h_real @ h.T @ a


def rcig_gradients(
    net: Linearised,
    real: tuple[Tensor, Tensor],
    images: Tensor,
    targets: Tensor,
    tau: Tensor,
    num_steps: int,
    lr_inner: float,
    lr_adjoint: float,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and its gradients in images, targets and temperature. The inner problem and the linear system of
    the implicit gradient are each solved by ``num_steps`` steps of Adam."""
    fixed = images.detach(), targets.detach()
    move = [d.requires_grad_() for d in net.no_move()]
    adam = torch.optim.Adam(move, lr=lr_inner)
    for _ in range(num_steps):
        _set_gradients(move, torch.autograd.grad(net.inner_loss(move, *fixed), move))
        adam.step()
    value = F.cross_entropy(tau.exp() * net.predict(move, images, targets, real[0]), real[1])
    value = value - lead(targets, 0.5 / targets.shape[1])
    grads = torch.autograd.grad(value, [*move, images, targets, tau])
    into_move, (direct_images, direct_targets, into_tau) = grads[: len(move)], grads[len(move) :]
    slope = torch.autograd.grad(net.inner_loss(move, images, targets), move, create_graph=True)
    v = net.no_move()
    adam = torch.optim.Adam(v, lr=lr_adjoint)
    for _ in range(num_steps):
        curved = torch.autograd.grad(slope, move, v, retain_graph=True)
        _set_gradients(v, [c - g for c, g in zip(curved, into_move, strict=True)])
        adam.step()
    mixed = torch.autograd.grad(slope, (images, targets), v)
    gradients = [
        direct - m * (direct.norm() / m.norm()).clamp(max=1)
        for direct, m in zip((direct_images, direct_targets), mixed, strict=True)
    ]
    return value, [*gradients, into_tau]


def _set_gradients(tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for tensor, grad in zip(tensors, grads, strict=True):
        tensor.grad = grad


def rcig_step(
    net: ConvNet,
    adam: torch.optim.Optimizer,
    real: tuple[Tensor, Tensor],
    learned: Sequence[Tensor],
    optimiser: torch.optim.Optimizer,
    batch_real: int,
    num_steps: int,
) -> None:
    """Update the set once, then train the network of the pool, whose optimiser is ``adam``, on it for a step.

    Args:
        learned: images, targets and temperature.
    """
    chosen = torch.randperm(len(real[0]))[:batch_real]
    batch = real[0][chosen], real[1][chosen]
    images, targets, tau = learned
    value, gradients = rcig_gradients(Linearised(net, 5e-4), batch, images, targets, tau, num_steps, 1e-4, 1e-4)
    _set_gradients(learned, gradients)
    optimiser.step()
    value.item()
    error = net(images.detach()) - targets.detach()
    adam.zero_grad()
    (0.5 * error.square().mean()).backward()
    adam.step()


class StatisticsHook:
    """Holds the distance of the last batch at the input of a BatchNorm layer to the running statistics of the layer."""

    distance: Tensor

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        layer.register_forward_hook(self._measure)

    def _measure(self, layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        (x,) = inputs
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1).var(1, unbiased=False)
        self.distance = torch.norm(layer.running_var - var, 2) + torch.norm(layer.running_mean - mean, 2)


def hooks_of(net: nn.Module) -> list[StatisticsHook]:
    return [StatisticsHook(layer) for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]


def sre2l_loss(net: nn.Module, hooks: Sequence[StatisticsHook], views: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of the recovery of images (Yin, Xing and Shen, NeurIPS 2023); ``net`` is in evaluation mode."""
    entropy = F.cross_entropy(net(views), labels)
    weights = [10.0] + [1.0] * (len(hooks) - 1)
    return entropy + 0.01 * sum(w * hook.distance for w, hook in zip(weights, hooks, strict=True))


def sre2l_step(
    net: nn.Module,
    hooks: Sequence[StatisticsHook],
    images: Tensor,
    labels: Tensor,
    optimiser: torch.optim.Optimizer,
    bounds: Sequence[tuple[float, float]],
    max_roll: int,
) -> None:
    """Update the images once: all of them are cropped, mirrored and rolled alike.

    Args:
        bounds: black and white of each channel, to which the pixels are clamped.
    """
    views = transforms.RandomHorizontalFlip()(transforms.RandomResizedCrop(images.shape[2:], antialias=False)(images))
    shifts = [random.randint(-max_roll, max_roll) for _ in range(2)]
    descend(sre2l_loss(net, hooks, torch.roll(views, shifts, dims=(2, 3)), labels), optimiser)
    with torch.no_grad():
        for channel, (low, high) in enumerate(bounds):
            images[:, channel] = images[:, channel].clamp(low, high)


def _classes(real: Sequence[Tensor], syn: Tensor, batch_real: int, strategy: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield real and synthetic images of each class, both under the same draw of the augmentation."""
    for members, images in zip(real, syn.chunk(len(real)), strict=True):
        batch = members[torch.randperm(len(members))[:batch_real]]
        seed = random.randrange(100_000)
        yield dsa(batch, strategy, siamese=True, seed=seed), dsa(images, strategy, siamese=True, seed=seed)
