"""Labels of views: a teacher labels every view of the images, not every image once.

``stored`` holds the teacher's logits for the views of some epochs (Shen and Xing 2022, FKD; Yin et al. 2023, SRe2L).
``online`` holds the teacher itself, or its name. ``projector`` holds a function from views to labels: changes of low
rank in a trained encoder, and a head (HeLlO). ``condense.relabel`` gives a set such labels. Networks are then trained
on ``Provider.source``; ``Provider.forward`` returns the classes.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from condense.augment import Augment
from condense.data.images import Images
from condense.data.layout import InputShape, Kind, require_kind
from condense.names import excerpt, spelt
from condense.networks import Functional, Network, Weights
from condense.networks.lowrank import HEAD, Adapted
from condense.networks.registry import build, is_builtin, require_moderate
from condense.objective import Objective
from condense.rng import Rng
from condense.schedule import Schedule
from condense.sources import Examples, Relabelled, Source, StoredLabels, Teacher
from condense.synthetic.labels import Labels, Provider
from condense.train import Training
from condense.views import Views

MOST_EPOCHS = 100_000
"""The largest number of epochs of stored labels."""
LARGEST_SEED = 2**31 - 1
PLACE = "CLASS"
PROMPT = f"a photo of a {PLACE}"


@dataclass(frozen=True, kw_only=True)
class ViewLabels(Labels, ABC):
    """Labels that a teacher gives to every view of an image."""

    space: ClassVar[Literal["classes", "probabilities", "values"]] = "classes"
    of_views: ClassVar[bool] = True

    teacher: str = ""
    """Teacher to use, as a labelled set records it: the name of its buffer and the start of a checksum of its weights;
    unset allows any."""
    network: str = "auto"
    """Architecture of the teacher, as a labelled set records it; auto allows any."""

    def build(self, labels: Tensor, num_classes: int) -> Provider:
        raise ValueError(f"labels {self.name} belong to images and not to latents: use provider")

    def training(self) -> Mapping[str, Any]:
        """Return the fields of a training that the labels fix, with the augmentation as ``augment``."""
        return {}

    @property
    def num_rounds(self) -> int:
        """The number of rounds in which the labels are made, such as epochs."""
        return 1

    @property
    def is_named(self) -> bool:
        """Whether networks are trained with a teacher that the set names and does not hold."""
        return False


@dataclass(frozen=True, kw_only=True)
class Stored(ViewLabels):
    """Logits of a teacher for every view of some epochs; all networks are trained on the same views."""

    name: ClassVar[str] = "stored"
    epochs: int = 300
    """Number of epochs whose views are labelled."""
    keep: float = 1.0
    """Fraction of the epochs that is stored, drawn at random; networks go through the stored epochs in turn."""
    precision: Literal["fp16", "int8"] = "fp16"
    """Number type of the stored logits. int8 has one scale, in fp16, for the logits of each view."""
    top_k: int = 0
    """Number of largest logits to store of each view, with their classes and the mean of the other logits; 0: all."""
    batch_size: int = 100
    """Images per batch of the views."""
    augment: str = "dsa"
    """Augmentation of the views; dsa is the default strategy of the data set."""
    cutmix: float = 1.0
    """Probability of CutMix in a batch of the views."""
    seed: int = 0
    """Seed of the views and of the stored epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.epochs <= MOST_EPOCHS or not 0 < self.keep <= 1:
            raise ValueError(
                f"labels need epochs from 1 to {MOST_EPOCHS} and keep above 0 and at most 1, got {self.epochs} and "
                f"{self.keep}; usual values are 300 and 1.0"
            )
        if self.top_k < 0 or self.batch_size < 1 or not 0 <= self.cutmix <= 1 or not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(
                f"labels need top_k >= 0, batch_size >= 1, cutmix between 0 and 1 and a seed from 0 to {LARGEST_SEED}, "
                f"got {self.top_k}, {self.batch_size}, {self.cutmix} and {self.seed}; usual values are 0, 100, 1.0, 0"
            )
        Augment.parse(self.augment)

    @property
    def num_rounds(self) -> int:
        return self.num_stored

    @property
    def num_stored(self) -> int:
        """The number of epochs whose labels are stored, K."""
        return max(round(self.keep * self.epochs), 1)

    @property
    def stored_epochs(self) -> list[int]:
        """The epochs whose labels are stored, in ascending order."""
        return sorted(Rng(self.seed)("stored epochs").subset(self.epochs, self.num_stored).tolist())

    def views(self, images: Tensor | Images, targets: Tensor, num_classes: int) -> Examples:
        """Return the views of images (n, *input_shape) with targets (n,) or (n, C)."""
        return Examples(
            images,
            targets,
            Rng(self.seed).child("views"),
            batch_size=self.batch_size,
            num_classes=num_classes,
            views=Views(augment=Augment.parse(self.augment), cutmix=self.cutmix),
        )

    def training(self) -> Mapping[str, Any]:
        return {
            "batch_size": self.batch_size,
            "augment": self.augment,
            "cutmix": self.cutmix,
            "mixup": 0.0,
            "order": "shuffled",
        }

    def provider(self, labels: Tensor, num_classes: int, input_shape: InputShape, expansion: int) -> StoredTable:
        augment = Augment.parse(self.augment)
        augment.require_kind(input_shape, "labels.augment")
        if self.cutmix:
            mixed: tuple[Kind, ...] = ("series", "images", "clips")
            require_kind("labels.cutmix", mixed, input_shape, f"give {spelt('labels.cutmix', 0, 'Stored')}")
        if not self.top_k < max(num_classes, 1):
            raise ValueError(
                f"labels.top_k is {self.top_k}, but there are {num_classes} classes; give fewer, or 0 for all"
            )
        num = len(labels) * expansion * augment.copies
        return StoredTable(self, _classes(labels), num, num_classes)


@dataclass(frozen=True, kw_only=True)
class Online(ViewLabels):
    """A teacher that labels every batch while networks are trained."""

    name: ClassVar[str] = "online"
    keep_weights: bool = True
    """Store the weights of the teacher in the set. If false, the set names the buffer of the teacher, which every
    evaluation then needs."""

    @property
    def is_named(self) -> bool:
        return not self.keep_weights

    def provider(self, labels: Tensor, num_classes: int, input_shape: InputShape, expansion: int) -> StoredTeacher:
        num_params = num_buffers = 0
        if self.keep_weights:
            network = _layout(self.network, input_shape, num_classes)
            num_params = sum(p.numel() for p in network.parameters() if p.requires_grad)
            num_buffers = sum(buffer.numel() for buffer in network.buffers())
        return StoredTeacher(_classes(labels), params=(num_params,), statistics=(num_buffers,))


@dataclass(frozen=True, kw_only=True)
class Projector(ViewLabels):
    """A small change of a trained network, the encoder, that labels every batch while networks are trained.

    f(x) = W E(x): the weights of the encoder E and the head W have changes of low rank, which are trained on the real
    images towards the mean logits of several weak teachers and towards the classes (HeLlO, re-implemented from a
    description)."""

    name: ClassVar[str] = "projector"
    added_fields: ClassVar[tuple[str, ...]] = ("head", "prompt")
    keep_encoder: bool = True
    """Store the weights of the encoder and its start of the head in the set. If false, the set names the encoder, which
    every evaluation then needs, and stores a start from class means alone."""
    head: Literal["class-means", "text"] = "class-means"
    """Start of the head: the means of the features of each class, or, with an encoder of open_clip, the embeddings of
    texts with the names of the classes."""
    prompt: str = PROMPT
    """Text for the head text, in which CLASS stands for the name of a class."""
    rank: int = 8
    """Rank of the changes of convolutions and linear layers, at most the smaller side of each weight matrix."""
    head_rank: int = 64
    """Rank of the change of the head, at most the number of classes and the number of features."""
    num_teachers: int = 9
    """Number of weak teachers: evenly spaced epochs of one trajectory, the last one included."""
    class_weight: float = 1.0
    """Weight of the cross-entropy of the classes, beside half the squared distance to the mean logits."""
    epochs: int = 60
    """Number of epochs for which the projector is trained."""
    lr: float = 1e-3
    """Learning rate of AdamW; it decays to zero as a cosine."""
    batch_size: int = 128
    """Real images per batch."""
    augment: str = "dsa"
    """Augmentation of the real images; dsa is the default strategy of the data set."""
    seed: int = 0
    """Seed of the training of the projector."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rank, self.head_rank, self.num_teachers) < 1 or not 1 <= self.epochs <= MOST_EPOCHS:
            raise ValueError(
                f"labels need rank, head_rank and num_teachers of at least 1 and epochs from 1 to {MOST_EPOCHS}, got "
                f"{self.rank}, {self.head_rank}, {self.num_teachers} and {self.epochs}; usual values are 8, 64, 9, 60"
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"labels need a seed from 0 to {LARGEST_SEED}, got {self.seed}; give 0")
        if PLACE not in self.prompt:
            raise ValueError(
                f"labels.prompt is {excerpt(self.prompt)!r}, without the word {PLACE} for the name of a class; give "
                f"{spelt('labels.prompt', PROMPT)!r}"
            )
        if self.prompt != PROMPT and self.head != "text":
            raise ValueError(
                f"labels.prompt is for the head text, and the head is {self.head}; give "
                f"{spelt('labels.head', 'text')}, or leave it out"
            )
        augment = Augment.parse(self.augment)
        if augment.flips or augment.views:
            raise ValueError(
                f"the projector is trained on real images, but {self.augment} is for synthetic ones; give "
                f"{spelt('labels.augment', 'dsa')}"
            )
        self.plan()

    @property
    def is_named(self) -> bool:
        return not self.keep_encoder

    @property
    def num_rounds(self) -> int:
        return self.epochs

    def texts(self, classes: Sequence[str]) -> list[str]:
        """Return the text of each class for the head ``text``.

        Raises:
            ValueError: the classes have numbers and no names.
        """
        if all(name.strip().isdecimal() for name in classes):
            raise ValueError(
                f"the head text needs names of the classes, and those of this set are numbers; give "
                f"{spelt('labels.head', 'class-means')}, or distil from data whose classes have names"
            )
        return [self.prompt.replace(PLACE, name.replace("_", " ").strip()) for name in classes]

    def plan(self) -> Training:
        """Return how the projector is trained. Raises ValueError as ``Training`` does."""
        return Training(
            num_epochs=self.epochs,
            batch_size=self.batch_size,
            optimiser="adamw",
            lr=self.lr,
            weight_decay=0.0,
            schedule=Schedule(cosine_to=0.0),
            loss="mse-distillation",
            class_weight=self.class_weight,
        )

    def adapted(self, encoder: Network, num_classes: int) -> Adapted:
        """Return the projector of an encoder, which is changed; its head is random."""
        return Adapted(encoder, num_classes, self.rank, self.head_rank)

    def provider(self, labels: Tensor, num_classes: int, input_shape: InputShape, expansion: int) -> StoredProjector:
        base = self.adapted(_layout(self.network, input_shape, num_classes), num_classes)
        frozen = base.frozen()
        head = frozen.pop(HEAD)
        return StoredProjector(
            _classes(labels),
            params=(sum(p.numel() for p in base.parameters() if p.requires_grad),),
            statistics=(sum(buffer.numel() for buffer in base.buffers()),),
            head=(0,) if self.is_named and self.head == "text" else tuple(head.shape),
            encoder=(0 if self.is_named else sum(p.numel() for p in frozen.values()),),
        )


class StoredTable(Provider):
    """The logits of a teacher for the views of the stored epochs.

    Args:
        kind: the settings.
        classes: (N,), the classes of the latents.
        num_views: number of views in an epoch.
        num_classes: C.
    """

    classes: Tensor
    values: Tensor
    """(K, num_views, C or top_k), fp16 or int8."""
    scale: Tensor
    """(K, num_views), fp16; int8 values are multiplied by it."""
    members: Tensor
    """(K, num_views, top_k): the classes of the values, as the smallest of uint8, int16 and int32 that holds them."""
    rest: Tensor
    """(K, num_views), fp16: the logit of all other classes."""

    def __init__(self, kind: Stored, classes: Tensor, num_views: int, num_classes: int) -> None:
        super().__init__()
        self.kind, self.num_classes = kind, num_classes
        views = (kind.num_stored, num_views)
        width = kind.top_k or num_classes

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=classes.device)

        self.register_buffer("classes", classes.clone())
        self.register_buffer("values", zeros(*views, width, dtype=_TYPES[kind.precision]))
        if kind.precision == "int8":
            self.register_buffer("scale", zeros(*views, dtype=torch.float16))
        if kind.top_k:
            fitting = (dtype for dtype in _MEMBERS if num_classes - 1 <= torch.iinfo(dtype).max)
            self.register_buffer("members", zeros(*views, width, dtype=next(fitting)))
            self.register_buffer("rest", zeros(*views, dtype=torch.float16))

    def forward(self, index: Tensor) -> Tensor:
        return self.classes[index]

    def source(self, source: Examples, objective: Objective, teacher: Teacher | None = None) -> Source:
        views = self.kind.views(source.images, source.targets, self.num_classes)
        return StoredLabels(views, self.logits, self.kind.stored_epochs, objective)

    @torch.no_grad()
    def fill(self, k: int, logits: Tensor) -> None:
        """Store the logits (num_views, C) of stored epoch ``k``.

        Raises:
            ValueError: a logit is not finite or too large for fp16.
        """
        kind, logits = self.kind, logits.float()
        if not logits.abs().max() <= torch.finfo(torch.float16).max:
            raise ValueError("the logits of the teacher are not finite or too large to be stored; use another teacher")
        if kind.top_k:
            every, (logits, members) = logits, logits.topk(kind.top_k, dim=1)
            self.members[k] = members.to(self.members.dtype)
            self.rest[k] = (every.sum(1) - logits.sum(1)) / (self.num_classes - kind.top_k)
        if kind.precision == "int8":
            scale = (logits.abs().amax(1) / 127).half()
            self.scale[k] = scale
            logits = (logits / scale.float().clamp(min=_SMALLEST)[:, None]).round().clamp(-127, 127)
        self.values[k] = logits.to(self.values.dtype)

    def logits(self, k: int | Tensor, positions: Tensor) -> Tensor:
        """Return stored logits; see ``condense.sources.StoredLogits``."""
        values = self.values[k, positions].float()
        if self.kind.precision == "int8":
            values = values * self.scale[k, positions].float()[:, None]
        if not self.kind.top_k:
            return values
        rest = self.rest[k, positions].float()[:, None].expand(-1, self.num_classes)
        return rest.scatter(1, self.members[k, positions].long(), values)

    def check(self) -> None:
        if not all(tensor.isfinite().all() for tensor in self.buffers()):
            raise ValueError("its stored labels are too large for their number type")
        if self.kind.precision == "int8" and not (self.scale >= 0).all():
            raise ValueError("its stored labels have a scale below zero")
        if self.kind.top_k and not (0 <= int(self.members.min()) <= int(self.members.max()) < self.num_classes):
            raise ValueError(f"its stored labels are of classes outside 0..{self.num_classes - 1}")


class LiveTeacher(Provider, ABC):
    """A teacher that labels the batches of a training, as tensors of the set.

    Args:
        classes: (N,), the classes of the latents.
        sizes: the shapes of the tensors, by name; they are float32.
    """

    classes: Tensor
    params: Tensor
    """(num_params,): the trained parameters of the teacher."""
    statistics: Tensor
    """(num_buffers,): its buffers, such as running statistics."""

    def __init__(self, classes: Tensor, **sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("classes", classes.clone())
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size, device=classes.device))

    def forward(self, index: Tensor) -> Tensor:
        return self.classes[index]

    def source(self, source: Examples, objective: Objective, teacher: Teacher | None = None) -> Source:
        assert teacher is not None
        return Relabelled(source, teacher, objective)

    @torch.no_grad()
    def fill(self, weights: Weights) -> None:
        """Store the weights of the teacher."""
        _join(weights.params.values(), self.params)
        _join(weights.buffers.values(), self.statistics)

    def weights(self, network: Functional) -> Weights:
        """Return the weights of the teacher, whose architecture is ``network``, on its device."""
        return network.restored(_split(self.params, network.shapes), _split(self.statistics, network.buffer_shapes))


class StoredTeacher(LiveTeacher):
    """The weights of a teacher; both vectors are empty if the set only names it."""


class StoredProjector(LiveTeacher):
    """The changes of low rank and the buffers of a projector, and its frozen parameters."""

    head: Tensor
    """(C, F): the head W without its change; empty if it consists of embeddings of texts by an encoder that the set
    only names."""
    encoder: Tensor
    """(num_frozen,): the other frozen parameters of ``Adapted``; empty if the set only names the encoder."""

    @torch.no_grad()
    def freeze(self, network: Functional) -> None:
        """Store the frozen parameters of a projector."""
        frozen = dict(network.frozen)
        head = frozen.pop(HEAD)
        if self.head.numel():
            self.head.copy_(head)
        if self.encoder.numel():
            _join(frozen.values(), self.encoder)

    @torch.no_grad()
    def thaw(self, base: Adapted) -> None:
        """Copy the stored frozen parameters into those of ``base``; the others stay as they are."""
        frozen: dict[str, Tensor] = {**base.frozen()}
        head = frozen.pop(HEAD)
        if self.head.numel():
            head.copy_(self.head)
        if self.encoder.numel():
            for name, value in _split(self.encoder, {name: p.shape for name, p in frozen.items()}).items():
                frozen[name].copy_(value)


def _join(tensors: Iterable[Tensor], vector: Tensor) -> None:
    """Copy tensors into a vector, one after the other."""
    vector.copy_(torch.cat([vector[:0], *(tensor.flatten().to(vector) for tensor in tensors)]))


def _split(vector: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return the tensors of these shapes that ``_join`` joined."""
    pieces = vector.split([math.prod(shape) for shape in shapes.values()])
    return {name: x.view(tuple(shape)) for (name, shape), x in zip(shapes.items(), pieces, strict=True)}


_TYPES = {"fp16": torch.float16, "int8": torch.int8}
_MEMBERS = (torch.uint8, torch.int16, torch.int32)
_SMALLEST = 2.0**-24
"""The smallest positive number in fp16."""


def _classes(labels: Tensor) -> Tensor:
    return labels.long() if labels.dim() == 1 else labels.argmax(1)


def _layout(name: str, input_shape: InputShape, num_outputs: int) -> Network:
    """Return a network for the shapes of its tensors. A network of this package takes no memory, whatever a file says
    of its width."""
    require_moderate(name, input_shape, num_outputs)
    with Rng(0).forked("architecture"), torch.device("meta" if is_builtin(name) else "cpu"):
        return build(name, input_shape, num_outputs)
