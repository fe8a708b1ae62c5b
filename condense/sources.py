"""Sources of training batches: each gives batch b of epoch e.

``Examples`` are real or synthetic images, in memory or mapped from disk. ``Pairs`` are two views of each of them.
``Streamed`` reads images shard by shard.
``Embedded`` gives the features of the images of another source in their place.
``Relabelled`` and ``StoredLabels`` take the images of another source and the targets of a teacher, which are computed
for each batch or read from stored logits. A batch is a pure function of the root seed, e and b (see
``condense.views``), so stored logits need no record of the views that they belong to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from condense.data.images import Images
from condense.objective import Objective
from condense.rng import Rng
from condense.views import UNCHANGED, Views

Order = Literal["shuffled", "stored"]
Teacher = Callable[[Tensor], Tensor]
"""Images (n, C, H, W) to logits (n, num_outputs)."""
StoredLogits = Callable[[int | Tensor, Tensor], Tensor]
"""``logits(k, positions)``: the logits (n, num_outputs), float32, of the views at ``positions`` (n,) of stored epoch k.
Views are counted in the order of the batches."""


class Batch(NamedTuple):
    images: Tensor
    """Shape (n, C, H, W), in the space that networks see."""
    targets: Tensor
    """Classes (n,), or one row of targets per image (n, num_outputs)."""


class Source(ABC):
    """Gives the batches of a training. All batches of an epoch have the same size; only the last may be smaller."""

    rng: Rng | None
    """Root of all draws, including those of the network's layers (dropout). None: the source draws nothing, and layers
    draw from the global generators."""
    num_batches: int
    """Number of batches per epoch."""
    batch_size: int
    """Images per batch, including mirrored copies."""
    on_device: bool = False
    """Whether ``batch`` takes tensors and computes a batch on the device, without reading it."""

    def begin(self, epoch: int) -> None:  # noqa: B027
        """Prepare the batches of an epoch; required before ``batch`` is called with tensors."""

    @abstractmethod
    def batch(self, epoch: int | Tensor, index: int | Tensor) -> Batch:
        """Return a batch; epochs and batches count from 0.

        This is a pure function: batches may be requested in any order and more than once. Where ``on_device`` is True,
        both arguments may be 0-d int64 tensors on the device; a tensor ``index`` must be that of a batch of
        ``batch_size`` images.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, what determines the views of the images apart from the images themselves."""


class _Viewed(Source):
    """Images in an order that is drawn for each epoch, and in views that are drawn for each batch."""

    rng: Rng

    def __init__(
        self, num_examples: int, rng: Rng, *, batch_size: int, num_classes: int, order: Order, views: Views
    ) -> None:
        """
        Args:
            num_examples: images per epoch.
            rng: root of the draws of the order and the views.
            batch_size: images per batch, before mirrored copies are added.
            num_classes: number of classes, for views that mix targets.
            order: shuffled: a new order in each epoch. stored: the order in which the images are stored.
        """
        self.num_examples, self.rng, self.num_classes = num_examples, rng, num_classes
        self.order, self.views = order, views
        self.num_batches, self.batch_size = -(-num_examples // batch_size), batch_size * views.augment.copies
        self._num_drawn = batch_size

    def _viewed(self, images: Tensor, targets: Tensor, epoch: int | Tensor, index: int | Tensor) -> Batch:
        return Batch(*self.views(images, targets, self.num_classes, self.rng, epoch, index))

    def identity(self) -> dict[str, Any]:
        return {
            **self.rng.identity(),
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
            "order": self.order,
            **self.views.identity(),
        }


class Examples(_Viewed):
    """Real or synthetic images that can be indexed: a tensor, or ``Images`` over a mapped file."""

    def __init__(
        self,
        images: Tensor | Images,
        targets: Tensor,
        rng: Rng,
        *,
        batch_size: int,
        num_classes: int,
        order: Order = "shuffled",
        views: Views = UNCHANGED,
        weights: Tensor | None = None,
    ) -> None:
        """
        Args:
            images: (N, C, H, W), in the space that networks see.
            targets: classes (N,), or (N, num_classes).
            rng: root of the draws of the order and the views.
            batch_size: images per batch, before mirrored copies are added.
            num_classes: number of classes, for views that mix targets.
            order: shuffled: a new order in each epoch. stored: the order of ``images``.
            weights: (N,), positive: an epoch has N images, each drawn in proportion to the weights.

        Raises:
            ValueError: images with weights are to be drawn in their stored order.
        """
        super().__init__(len(images), rng, batch_size=batch_size, num_classes=num_classes, order=order, views=views)
        if weights is not None and order == "stored":
            raise ValueError(
                "images with weights are drawn at random, in proportion to these, and not in their stored order; give "
                "the order shuffled"
            )
        self.images, self.targets, self.weights = images, targets, weights
        self.on_device = views.on_device
        self._epoch, self._indices = -1, torch.arange(len(images), device=images.device)

    def begin(self, epoch: int) -> None:
        if epoch != self._epoch and self.order == "shuffled":
            self._indices.copy_(self._order(epoch), non_blocking=True)
        self._epoch = epoch

    def _order(self, epoch: int) -> Tensor:
        draws = self.rng("order", epoch)
        if self.weights is not None:
            return draws.weighted(self.weights, self.num_examples)
        return draws.permutation(self.num_examples)

    def batch(self, epoch: int | Tensor, index: int | Tensor) -> Batch:
        if isinstance(epoch, int):
            self.begin(epoch)
        first, size = index * self._num_drawn, self._num_drawn
        if isinstance(first, int):
            chosen = self._indices[first : first + size]
        else:
            chosen = self._indices[first + torch.arange(size, device=self._indices.device)]
        return self._viewed(self.images[chosen], self.targets[chosen], epoch, index)


class Pairs(Examples):
    """Two views of every image, for objectives without labels.

    A batch holds the first views of its images, followed by their second views in the same order. Both pass through the
    network together, so BatchNorm normalises them by common statistics.
    """

    def __init__(self, images: Tensor | Images, targets: Tensor, rng: Rng, *, batch_size: int, views: Views) -> None:
        """As in ``Examples``; ``batch_size`` counts images."""
        super().__init__(images, targets, rng, batch_size=batch_size, num_classes=0, views=views)
        self.batch_size *= 2

    def _viewed(self, images: Tensor, targets: Tensor, epoch: int | Tensor, index: int | Tensor) -> Batch:
        views = [
            self.views(images, targets, self.num_classes, self.rng.child("view", number), epoch, index)
            for number in range(2)
        ]
        return Batch(*(torch.cat(parts) for parts in zip(*views, strict=True)))


class Minibatches(Source):
    """Fixed batches of images, without views; they are the same in every epoch."""

    rng = None

    def __init__(self, images: Tensor, targets: Tensor, indices: Sequence[Tensor]) -> None:
        """``indices``: for each batch, the indices of its images (N, C, H, W) and targets (N, ...)."""
        self.images, self.targets, self.indices = images, targets, indices
        self.num_batches, self.batch_size = len(indices), max(map(len, indices), default=0)

    def batch(self, epoch: int | Tensor, index: int | Tensor) -> Batch:
        assert isinstance(index, int)
        chosen = self.indices[index]
        return Batch(self.images[chosen], self.targets[chosen])

    def identity(self) -> dict[str, Any]:
        return {"indices": [index.tolist() for index in self.indices]}


class Streamed(_Viewed):
    """Images that are read from shards and need not fit in memory together.

    One shard is in memory at a time, with the images of the previous one that did not fill a batch. A shuffled epoch
    draws a new order of the shards and shuffles the images within each shard. Batches are meant to be read in
    sequence: for any other batch the epoch is read again from its start.
    """

    def __init__(
        self,
        shards: Sequence[Callable[[], tuple[Tensor, Tensor]]],
        num_examples: int,
        rng: Rng,
        *,
        batch_size: int,
        num_classes: int,
        order: Order = "shuffled",
        views: Views = UNCHANGED,
    ) -> None:
        """
        Args:
            shards: each call returns the images (n, C, H, W) and targets (n, ...) of one shard, the same ones every
                time; n >= 1 may differ between shards.
            num_examples: number of images in all shards.
            others: as in ``Examples``.
        """
        super().__init__(num_examples, rng, batch_size=batch_size, num_classes=num_classes, order=order, views=views)
        self.shards = shards
        self._next = (-1, 0)
        self._stream: Iterator[tuple[Tensor, Tensor]] = iter(())

    def batch(self, epoch: int | Tensor, index: int | Tensor) -> Batch:
        """Return a batch, see ``Source.batch``.

        Raises:
            ValueError: the number of images in the shards is not ``num_examples``.
        """
        assert isinstance(epoch, int) and isinstance(index, int)
        if self._next != (epoch, index):
            self._stream = self._read(epoch)
            for _ in range(index):
                next(self._stream)
        images, targets = next(self._stream)
        self._next = (epoch, index + 1)
        return self._viewed(images, targets, epoch, index)

    def _read(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, without views."""
        size, seen = self._num_drawn, 0
        shuffled, order = self.order == "shuffled", list(range(len(self.shards)))
        if shuffled:
            order = self.rng("shards", epoch).permutation(len(order)).tolist()
        pending: tuple[Tensor, Tensor] | None = None
        for position, number in enumerate(order):
            images, targets = self.shards[number]()
            seen += len(images)
            if seen > self.num_examples or (seen == self.num_examples and position + 1 < len(self.shards)):
                raise ValueError(
                    f"the shards hold more than {self.num_examples} images; set num_examples to their number"
                )
            if shuffled:
                index = self.rng("within a shard", epoch, number).permutation(len(images))
                images, targets = images[index.to(images.device)], targets[index.to(targets.device)]
            if pending is not None:
                images, targets = torch.cat([pending[0], images]), torch.cat([pending[1], targets])
            whole = len(images) // size * size
            yield from zip(images[:whole].split(size), targets[:whole].split(size), strict=True) if whole else ()
            pending = images[whole:].clone(), targets[whole:].clone()
        if seen != self.num_examples:
            raise ValueError(f"the shards hold {seen} images, not {self.num_examples}; give num_examples={seen}")
        if pending is not None and len(pending[0]):
            yield pending

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "num_shards": len(self.shards)}


class _Derived(Source):
    """The batches of another source, in which a subclass replaces images or targets."""

    def __init__(self, source: Source) -> None:
        self.source, self.on_device = source, source.on_device
        self.rng, self.num_batches, self.batch_size = source.rng, source.num_batches, source.batch_size

    def begin(self, epoch: int) -> None:
        self.source.begin(epoch)

    def identity(self) -> dict[str, Any]:
        return self.source.identity()


class Embedded(_Derived):
    """The features (n, 1, F) of the views of another source, and its targets."""

    def __init__(self, source: Source, embed: Callable[[Tensor], Tensor]) -> None:
        """``embed`` maps images (n, *input_shape) to features (n, F), which get no gradient."""
        super().__init__(source)
        self.embed = embed

    @torch.no_grad()
    def batch(self, epoch: int | Tensor, index: int | Tensor) -> Batch:
        images, targets = self.source.batch(epoch, index)
        return Batch(self.embed(images)[:, None], targets)


class Relabelled(_Derived):
    """The images of another source, with targets from a teacher that gets the same views as the network."""

    def __init__(self, source: Source, teacher: Teacher, objective: Objective) -> None:
        """Targets are ``objective.taught`` of the teacher's logits."""
        super().__init__(source)
        self.teacher, self.objective = teacher, objective

    @torch.no_grad()
    def batch(self, epoch: int | Tensor, index: int | Tensor) -> Batch:
        images, targets = self.source.batch(epoch, index)
        return Batch(images, self.objective.taught(self.teacher(images), targets))


class StoredLabels(_Derived):
    """The images of another source, with targets from the stored logits of a teacher.

    The logits of all views of K epochs are stored. Epoch e has the views and the labels of stored epoch e mod K.
    """

    def __init__(self, source: Source, logits: StoredLogits, epochs: Sequence[int], objective: Objective) -> None:
        """
        Args:
            source: the source of the images; it must be the one, with the seed, that the logits were computed on.
            logits: returns stored logits.
            epochs: for each stored epoch, the epoch of ``source`` that has its views.
            objective: targets are ``objective.taught`` of the logits.
        """
        super().__init__(source)
        self.logits, self.epochs, self.objective = logits, epochs, objective
        self._table = torch.tensor(epochs)

    def begin(self, epoch: int) -> None:
        self.source.begin(self.epochs[epoch % len(self.epochs)])

    @torch.no_grad()
    def batch(self, epoch: int | Tensor, index: int | Tensor) -> Batch:
        stored = epoch % len(self.epochs)
        if isinstance(stored, int):
            images, targets = self.source.batch(self.epochs[stored], index)
        else:
            self._table = self._table.to(stored.device)
            images, targets = self.source.batch(self._table[stored], index)
        positions = index * self.batch_size + torch.arange(len(images), device=images.device)
        return Batch(images, self.objective.taught(self.logits(stored, positions), targets))

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "epochs": list(self.epochs)}
