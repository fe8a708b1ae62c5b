"""The common part of methods that recover images from trained networks, a chunk of images after the other.

The loss of such a method couples the images of a chunk, for example by the statistics of a batch, and those of
different chunks not at all. A chunk holds at most ``chunk`` images: one of each class, for every image of a class in
turn. ``num_steps`` steps optimise one chunk, so a run takes that many for each of them.

Only the chunk that is being optimised is in memory as float32, with its optimiser. A finished one is rounded to 8-bit
pixels and stored as a file in ``Context.scratch_folder``, before the checkpoint of its last step. The state is as large
as one chunk, whatever the number of images, and a resumed run checks the files of the chunks before its own.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from condense import teachers
from condense.artifacts import ArtifactSpec
from condense.data.datasets import to_float
from condense.data.layout import Kind
from condense.files import FORMAT, read_tensors, write_tensors
from condense.method import Context, GradientMethod, GradientState, Loss, Optim
from condense.names import spelt
from condense.objective import ObjectiveName
from condense.schedule import Schedule
from condense.synthetic.decode import Decode, Pixels
from condense.synthetic.labels import Labels
from condense.synthetic.set import SyntheticSet
from condense.task import Task
from condense.teachers import Teacher

KIND = "recovered images"


@dataclass(frozen=True, kw_only=True)
class Recovery(GradientMethod):
    """Base class. ``GradientState.syn`` is the current chunk, and ``finalize`` returns the set of all chunks.

    A subclass defines ``chunk_loss`` and the first images of a chunk, ``begin``. It may replace ``chunks``, and extend
    ``enter``, which begins a chunk, and ``after``, which stores a finished one and enters the next.
    """

    family: ClassVar[str] = "decoupled"
    learns_labels: ClassVar[bool] = False
    has_teacher: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images", "clips")

    num_steps: int = 1000
    """Number of steps in which each image is optimised."""
    optim: Optim = Optim(kind="adam", lr=0.25, momentum=0.5, beta2=0.9, schedule=Schedule(cosine_to=0.0))
    """Optimiser of the images; a new one for each chunk."""
    clamp: bool = True
    """Clamp pixels to [0, 1] after each step."""
    teachers: tuple[str, ...] = (teachers.OWN,)
    """Networks of the teachers, used in turn, one in each step; same is the network of the recipe."""
    chunk: int = 100
    """Largest number of images that are optimised together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "chunk")
        if not self.teachers:
            raise ValueError(f"method.teachers names no network; give {spelt('method.teachers', teachers.OWN)}")

    def incompatibility(
        self, decode: Decode, labels: Labels, transform: str, objective: ObjectiveName = "cross-entropy"
    ) -> str | None:
        if not decode.stores_pixels or decode.expansion > 1:
            return f"recovers one image after the other, unlike {decode.name}; give {spelt('decode', 'pixels')}"
        if transform not in ("none", "channel"):
            return f"stores 8-bit pixels, which {transform} whitens; give {spelt('transform', 'channel')}"
        if self.ema is not None:
            return f"rounds each image when it is finished, not an average; give {spelt('method.ema', None)}"
        return super().incompatibility(Pixels(), labels, transform, objective)

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        return teachers.needed(self.teachers, task)

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return self.num_steps * num_classes * images_per_class

    def total_steps(self, ctx: Context) -> int:
        return self.num_steps * len(self.chunks(ctx))

    def chunks(self, ctx: Context) -> Sequence[Tensor]:
        """Return the positions of the images of each chunk among all images, which are grouped by class."""
        return by_image(ctx.task.num_classes, ctx.images_per_class, self.chunk)

    def opened(self, ctx: Context, state: GradientState) -> list[Teacher]:
        """Return the teachers."""
        return ctx.kept("teachers", state, lambda: teachers.opened(self.teachers, ctx))

    def init(self, ctx: Context) -> GradientState:
        state = self._state(ctx)
        self.enter(ctx, state, 0)
        return state

    def _state(self, ctx: Context) -> GradientState:
        """Return a state as large as the largest chunk, whose images and classes are zeros."""
        size, device = max(map(len, self.chunks(ctx))), ctx.task.device
        images = torch.zeros(size, *ctx.task.input_shape, device=device)
        syn = SyntheticSet(images, torch.zeros(size, dtype=torch.long, device=device), ctx.origin)
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    @abstractmethod
    def begin(self, ctx: Context, state: Any, rows: Tensor) -> Tensor:
        """Return the initial images (n, *input_shape) at the positions ``rows`` (n,) among all images."""

    def enter(self, ctx: Context, state: Any, number: int) -> None:
        """Put the initial images of a chunk in place of the current ones, with a new optimiser.

        A chunk that is smaller than the largest one leaves the rest as it is; ``loss`` does not read it.
        """
        rows = self.chunks(ctx)[number]
        images, classes = self.begin(ctx, state, rows), rows // ctx.images_per_class
        for name, tensor in state.syn.state_dict().items():
            tensor[: len(rows)] = images if name == "latents" else classes
        for optimiser in state.optimisers.values():
            Optim.restart(optimiser)

    @abstractmethod
    def chunk_loss(self, ctx: Context, state: Any, step: int, rows: Tensor, images: Tensor, targets: Tensor) -> Loss:
        """Return the loss of a chunk.

        Args:
            ctx, state, step: as for ``loss``; ``step % num_steps`` is the step within the chunk.
            rows: the positions (n,) of the images among all images.
            images: (n, *input_shape), or twice as many if the augmentation adds mirror images.
            targets: their classes.
        """

    def loss(self, ctx: Context, state: GradientState, step: int, part: int) -> Loss:
        current = step // self.num_steps
        ctx.kept("finished chunks", state, lambda: self._check(ctx, current))
        rows = self.chunks(ctx)[current]
        images, targets = ctx.task.augment.mirrored(*state.syn(torch.arange(len(rows), device=ctx.task.device)))
        return self.chunk_loss(ctx, state, step, rows, images, targets)

    def after(self, ctx: Context, state: GradientState, step: int) -> None:
        """Store the chunk that is finished, and begin the next."""
        current, step_of_chunk = divmod(step, self.num_steps)
        if step_of_chunk < self.num_steps - 1:
            return
        self._store(ctx, current, state.syn.latents)
        if current + 1 < len(self.chunks(ctx)):
            self.enter(ctx, state, current + 1)

    def finalize(self, ctx: Context, state: GradientState, steps: int) -> SyntheticSet:
        """Return all images as far as they are: finished, being optimised, or initial, in 8-bit pixels."""
        task, chunks, current = ctx.task, self.chunks(ctx), steps // self.num_steps
        num, floats = task.num_classes * ctx.images_per_class, ctx.decode.differentiable
        dtype = torch.float32 if floats else torch.uint8
        images = torch.empty(num, *task.input_shape, dtype=dtype, device=task.device)
        for k, rows in enumerate(chunks):
            if k < current:
                pixels = self.recovered(ctx, k)
            else:
                pixels = rounded(task, state.syn.latents[: len(rows)] if k == current else self.begin(ctx, state, rows))
            images[rows.to(task.device)] = task.transform(to_float(pixels)) if floats else pixels.to(task.device)
        decoder = ctx.new_decoder()
        syn = SyntheticSet(images, ctx.classes, ctx.origin, decode=ctx.decode, decoder=decoder, label_kind=ctx.labels)
        teachers.assign(syn, [teacher.labeller(ctx.compute) for teacher in self.opened(ctx, state)])
        return syn

    def recovered(self, ctx: Context, number: int) -> Tensor:
        """Return the pixels (n, *input_shape), uint8, of a finished chunk.

        Raises:
            ValueError: its file is missing, damaged, or of another recipe.
        """
        path, fix = _path(ctx, number), f"restore it, or choose another {spelt('out')} to start again"
        tensors, header = read_tensors(path, KIND)
        pixels, shape = tensors.get("pixels"), (len(self.chunks(ctx)[number]), *ctx.task.input_shape)
        if header.get("recipe_hash") != ctx.origin.recipe_hash or header.get("chunk") != number:
            raise ValueError(f"{path} belongs to another recipe or chunk; {fix}")
        if pixels is None or pixels.shape != shape or pixels.dtype != torch.uint8:
            raise ValueError(f"{path} does not hold {shape[0]} images; {fix}")
        return pixels.to(ctx.task.device)

    def _check(self, ctx: Context, finished: int) -> None:
        """Raise ValueError if a finished chunk cannot be read, at the beginning of a run that is resumed."""
        for number in range(finished):
            self.recovered(ctx, number)

    def _store(self, ctx: Context, number: int, latents: Tensor) -> None:
        header = {"kind": KIND, "format": FORMAT, "recipe_hash": ctx.origin.recipe_hash, "chunk": number}
        pixels = rounded(ctx.task, latents[: len(self.chunks(ctx)[number])])
        write_tensors(_path(ctx, number), {"pixels": pixels}, header)


def divided(num: int, most: int) -> tuple[Tensor, ...]:
    """Divide the numbers below ``num`` into as few groups of at most ``most`` as possible, of nearly equal size."""
    return torch.arange(num).tensor_split(-(-num // most))


@functools.lru_cache(maxsize=4)
def by_image(num_classes: int, each: int, most: int) -> list[Tensor]:
    """Return chunks of at most ``most`` images of different classes: the first image of every class, then the second.

    The classes are divided into as few groups as possible, whose sizes differ by one at most.
    """
    return [group * each + image for image in range(each) for group in divided(num_classes, most)]


@functools.lru_cache(maxsize=4)
def by_class(num_classes: int, each: int, most: int) -> list[Tensor]:
    """Return chunks of at most ``most`` images of one class, class after class."""
    return [label * each + group for label in range(num_classes) for group in divided(each, most)]


def noise(ctx: Context, rows: Tensor) -> Tensor:
    """Return standard normal images (n, *input_shape), each drawn for its position among all images."""
    drawn = [
        torch.randn(ctx.task.input_shape, generator=ctx.rng.generator("initial images", 0, i)) for i in rows.tolist()
    ]
    return torch.stack(drawn).to(ctx.task.device)


def real(ctx: Context, rows: Tensor) -> Tensor:
    """Return the indices (n,) of random training images of the classes at ``rows``, which are sorted by class; no image
    is drawn for two positions."""
    each, found = ctx.images_per_class, list[Tensor]()
    for c in (rows // each).unique_consecutive().tolist():
        members = ctx.task.train.by_class[c]
        chosen = ctx.rng("initial images", 0, c).subset(len(members), each)[rows[rows // each == c] % each]
        found.append(members[chosen.to(members.device)])
    return torch.cat(found)


def rounded(task: Task, images: Tensor) -> Tensor:
    """Return the 8-bit pixels that are nearest to images in the space of the transform."""
    return (task.transform.to_data(images.detach()) * 255).round_().to(torch.uint8)


def _path(ctx: Context, number: int) -> Path:
    return ctx.scratch_folder / f"chunk_{number:06d}.safetensors"
