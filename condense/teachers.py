"""Teachers: trained networks that label images, or whose features and statistics images are fitted to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from condense.artifacts import ArtifactSpec, TrainedNetworks, TrainedNetworkSpec
from condense.compute import Compute
from condense.data.images import Images
from condense.method import Context
from condense.names import spelt
from condense.networks import Factory, Functional, NetworkSpec, Weights
from condense.synthetic.labels import Assigned
from condense.synthetic.set import SyntheticSet
from condense.task import Task

OWN = "same"
"""The name of the recipe's network among the names of teachers."""

TrainedBy = Literal["barlow-twins", "simclr", "any"]
"""The objective of a backbone. ``any`` accepts networks that were trained with labels or imported, too."""

Embedder = Callable[[Tensor], Tensor]
"""Images (n, *input_shape) to features (n, F)."""

BATCH = 256
"""Latents that are decoded and labelled, and images whose features are computed, at once."""


class Statistics(NamedTuple):
    """Mean and biased variance (channels,) of the inputs of one BatchNorm layer, over samples and positions."""

    mean: Tensor
    var: Tensor


class Teacher(NamedTuple):
    """A trained network, used in evaluation mode."""

    network: Functional
    weights: Weights

    def labeller(self, compute: Compute) -> Callable[[Tensor], Tensor]:
        """Return a function from images (N, *input_shape) to logits (N, num_outputs), differentiable once."""
        network, weights = self

        def logits(images: Tensor) -> Tensor:
            return network.logits(*weights, images, train=False).float()

        run: Callable[[Tensor], Tensor] = compute.first_order(logits, network.device)
        return lambda images: run(compute.layout(images))

    def scorer(self) -> Callable[[Tensor], Tensor]:
        """Return ``labeller`` in full precision, for choices that do not depend on the compute policy of the run."""
        exact = Compute(exact=True)
        label = self.labeller(exact)

        def score(images: Tensor) -> Tensor:
            with exact.arithmetic():
                return label(images)

        return score

    def embedder(self, compute: Compute) -> Embedder:
        """Return a function from images (N, *input_shape) to features (N, F), differentiable once."""
        network, weights = self

        def features(images: Tensor) -> Tensor:
            return network.features(*weights, images, train=False).float()

        run: Callable[[Tensor], Tensor] = compute.first_order(features, network.device)
        return lambda images: run(compute.layout(images))

    def running(self, layer: str) -> Statistics:
        """Return the running statistics of a layer, by its name in the result of ``observer``."""
        name, buffers = layer.partition("#")[0], self.weights.buffers
        return Statistics(buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"])

    def observer(self, compute: Compute) -> Callable[[Tensor], tuple[Tensor, dict[str, Statistics]]]:
        """Return a function from images (N, *input_shape) to logits (N, num_outputs) and the statistics of the batch in
        each BatchNorm layer, by name in the order of the forward pass; differentiable once.

        The layers use their running statistics. A layer that runs twice is listed twice, as ``name`` and ``name#2``.
        """
        network, (params, buffers) = self
        if not has_batch_norm(network):
            label = self.labeller(compute)
            return lambda images: (label(images), {})
        network.require_capture("norm-inputs")

        def observe(images: Tensor) -> tuple[Tensor, dict[str, Statistics]]:
            values, _, logits = network.capture(params, buffers, images, "norm-inputs", train=False)
            kept = {name: x for name, x in values.items() if f"{name.partition('#')[0]}.running_mean" in buffers}
            return logits.float(), {name: batch_statistics(x) for name, x in kept.items()}

        run = compute.first_order(observe, network.device)
        return lambda images: cast(tuple[Tensor, dict[str, Statistics]], run(compute.layout(images)))


def mean_labeller(labellers: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return the function from images (N, *input_shape) to the mean (N, num_outputs) of the logits of ``labellers``."""
    return lambda images: torch.stack([label(images) for label in labellers]).mean(0)


def has_batch_norm(network: Functional) -> bool:
    """Whether a network has a BatchNorm layer with running statistics, so that the images of a batch influence each
    other."""
    return any(name.endswith("running_mean") for name in network.buffer_shapes)


def batch_statistics(x: Tensor) -> Statistics:
    """Return the statistics of the inputs (N, channels, ...) of a layer."""
    var, mean = torch.var_mean(x.float(), (0, *range(2, x.dim())), correction=0)
    return Statistics(mean, var)


def needed(networks: Sequence[str], task: Task) -> Mapping[str, ArtifactSpec]:
    """Return the buffers that hold the teachers, by the names of their networks, for ``Method.needs``.

    Args:
        networks: one name per teacher, where ``same`` is the network of the task. Teachers with equal names are
            different networks of one buffer.

    Raises:
        ValueError: no network is given, or one is unknown or does not take samples of this shape.
    """
    if not networks:
        raise ValueError(f"method.teachers needs at least one network; give {spelt('method.teachers', (OWN,))}")
    tasks = {name: task if name == OWN else task.with_network(name) for name in networks}
    numbers = Counter(tasks[name].network.name for name in networks)
    by_network = {of.network.name: of for of in tasks.values()}
    return {
        name: TrainedNetworkSpec(identity=by_network[name].identity(), num_networks=number)
        for name, number in numbers.items()
    }


def opened(networks: Sequence[str], ctx: Context) -> list[Teacher]:
    """Read the teachers from the buffers that ``needed`` asked for, in the order of ``networks``.

    Raises:
        ValueError: a buffer is damaged.
    """
    seen, teachers = Counter[str](), list[Teacher]()
    for name in networks:
        network = (ctx.task if name == OWN else ctx.task.with_network(name)).network
        buffer = cast(TrainedNetworks, ctx.artifacts[network.name])
        teachers.append(Teacher(network, buffer.weights(seen[network.name], network)))
        seen[network.name] += 1
    return teachers


def needed_backbone(networks: Sequence[str], trained_by: TrainedBy, task: Task) -> Mapping[str, ArtifactSpec]:
    """Return the buffer that holds a backbone, a network of which only the features are used, for ``Method.needs``.

    Args:
        networks: its name, where ``same`` is the network of the task.
        trained_by: its objective.

    Raises:
        ValueError: ``networks`` does not hold one name, or the network is unknown or does not take such samples.
    """
    identity = task.with_network(_backbone(networks, task)).identity()
    training = {} if trained_by == "any" else {"training": {"objective": trained_by}}
    return {"teacher": TrainedNetworkSpec(identity={**identity, **training}, features_only=True)}


def opened_backbone(networks: Sequence[str], ctx: Context) -> Teacher:
    """Read the backbone from the buffer that ``needed_backbone`` asked for.

    Raises:
        ValueError: the buffer is damaged.
    """
    network = ctx.task.with_network(_backbone(networks, ctx.task)).network
    return Teacher(network, cast(TrainedNetworks, ctx.artifacts["teacher"]).weights(0, network))


def require_one_backbone(networks: Sequence[str]) -> None:
    """Raise ValueError unless one network is named."""
    if len(networks) != 1:
        raise ValueError(
            f"method.teachers has {len(networks)} networks, but the features of one are used; give "
            f"{spelt('method.teachers', (OWN,))}"
        )


def _backbone(networks: Sequence[str], task: Task) -> str | NetworkSpec | Factory:
    (name,) = networks
    return task.network.spec if name == OWN else name


@torch.no_grad()
def embedded(embed: Embedder, images: Tensor | Images) -> Tensor:
    """Return the features (N, F) of samples (N, *input_shape)."""
    return torch.cat([embed(part) for part in images.split(BATCH)])


@torch.no_grad()
def assign(syn: SyntheticSet, labellers: Sequence[Callable[[Tensor], Tensor]]) -> None:
    """Set the ``teacher`` labels of a set, if its labels are of this kind, to the mean softmax of the teachers.

    Args:
        syn: the set, on the device of the teachers.
        labellers: see ``Teacher.labeller``. Images of one latent share the mean of their labels.
    """
    if not isinstance(syn.provider, Assigned):
        return
    means = []
    for part in torch.arange(len(syn), device=syn.latents.device).split(BATCH):
        images, _ = syn(part)
        answers = torch.stack([label(images).softmax(1) for label in labellers]).mean(0)
        means.append(answers.unflatten(0, (-1, len(part))).mean(0))
    syn.provider.assign(torch.cat(means))
