"""The synthetic set: latents, labels, decoder, learned learning rate and provenance in one module."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from condense.data.layout import InputShape, kind
from condense.files import canonical_json
from condense.names import printable, spelt
from condense.schema import from_json
from condense.synthetic.budget import Cost, Unit, allowed_bits, bits, cost_of, in_words
from condense.synthetic.decode import Coded, Decode, Pixels
from condense.synthetic.labels import Hard, Labels
from condense.task import IpcPolicy, Split

if TYPE_CHECKING:
    from PIL.Image import Image

    from condense.data.datasets import Data


@dataclass(frozen=True)
class MethodRecord:
    """The fields of a recorded method that are read when its set is used."""

    name: str = ""
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 0:
            raise ValueError(f"num_steps is {self.num_steps}, below 0")


@dataclass(frozen=True)
class RecipeRecord:
    """The fields of a recorded recipe that are read when its set is used.

    A set that was imported or made in Python may record none of them.
    """

    method: MethodRecord = MethodRecord()
    transform: str = "channel"
    split: Split = Split(val_fraction=0.0)
    network: str | None = None
    ipc: int | None = None
    fraction: float | None = None
    budget: Unit = "floats"
    ipc_policy: IpcPolicy = "refuse"

    def __post_init__(self) -> None:
        if self.ipc is not None and self.ipc < 1:
            raise ValueError(f"ipc is {self.ipc}, below 1")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}, not above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The provenance of a set: JSON values only, a pure function of recipe, data and code.

    The properties read the fields that code depends on. ``condense.synthetic.load`` checks these. For an ``Origin``
    made in Python, the properties raise ``ValueError`` if a field has another type.
    """

    dataset: Mapping[str, Any]
    """The data set: name, fingerprint of the training split, classes and input_shape. target_width is the width of
    targets that are not scores of these classes; classes may then be absent. held_out is the fingerprint of the samples
    that were held out, if any were."""
    transform: Mapping[str, Any]
    """Description of the transform. Decoded images are in the transformed space."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """How the method trains on the set: the fields of ``Training``, the augmentation and the network."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The resolved recipe, by field."""
    recipe_hash: str = ""
    """Hash of recipe, data and artifacts."""
    artifacts: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """Kind, name and extent of the artifacts that the method read, such as expert buffers."""
    code: str = ""
    """Version of the code that wrote the set."""
    privacy: Mapping[str, Any] = field(default_factory=dict)
    """The differential privacy of the set (``Method.privacy``); empty, and not written to files, if it has none."""

    @property
    def target_width(self) -> int:
        """The number of values in a target, D."""
        return int(self.dataset.get("target_width", len(self.dataset.get("classes", ()))))

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for a set without classes, whose targets are other values."""
        num_classes = len(self.dataset.get("classes", ()))
        return num_classes if num_classes == self.target_width else 0

    def classes_of(self, labels: Tensor) -> Tensor:
        """Return the classes (N,) of labels, classes (N,) or logits (N, C); zeros for a set without classes."""
        if not self.num_classes:
            return torch.zeros(len(labels), dtype=torch.long, device=labels.device)
        return labels.long() if labels.dim() == 1 else labels.argmax(1)

    @property
    def dataset_name(self) -> str:
        return str(self.dataset["name"])

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the training split before validation images are held out."""
        return str(self.dataset["fingerprint"])

    @cached_property
    def recorded(self) -> RecipeRecord:
        """The typed part of ``recipe``."""
        return from_json(RecipeRecord, self.recipe, "origin, recipe")

    @property
    def method(self) -> str:
        """The name of the method that made the set; empty if it is not recorded."""
        return self.recorded.method.name

    @property
    def distillation(self) -> str:
        """Recipe without its seed, and artifacts, as JSON: equal for sets that were distilled alike from several seeds;
        empty if no recipe is recorded."""
        recipe = {name: value for name, value in self.recipe.items() if name != "seed"}
        return canonical_json([recipe, list(self.artifacts), self.fingerprint]) if self.recipe_hash else ""

    @property
    def num_steps(self) -> int | None:
        """The number of steps of the method; None if it is not recorded."""
        return self.recorded.method.num_steps

    @property
    def ipc(self) -> int | None:
        """The budget in images per class; None if it is not recorded (see ``SyntheticSet.ipc``)."""
        return self.recorded.ipc

    @property
    def fraction(self) -> float | None:
        """The budget as a fraction of the real images of each class; None if it is not one."""
        return self.recorded.fraction

    @property
    def budget(self) -> Unit:
        """What the budget in images per class counts."""
        return self.recorded.budget

    @property
    def ipc_policy(self) -> IpcPolicy:
        """What happened to classes with fewer real images than the budget."""
        return self.recorded.ipc_policy

    @property
    def split(self) -> Split:
        """The split of the real training images; if it is not recorded, nothing is held out."""
        return self.recorded.split.resolved(selects=False)

    @property
    def transform_name(self) -> str:
        """The name of the transform in a recipe, such as ``zca``; ``transform`` holds its description."""
        return self.recorded.transform

    @property
    def network(self) -> str | None:
        """The network that the set was distilled with; None if it is not recorded."""
        return self.recorded.network

    @property
    def guarantee(self) -> str:
        """The differential privacy of the set in words, and the parameters it follows from; empty if it has none."""
        names = ("epsilon", "delta", "noise_multiplier", "releases", "rate")
        numbers = {name: value for name in names if isinstance(value := self.privacy.get(name), int | float)}
        return ", ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in numbers.items())

    @property
    def input_shape(self) -> InputShape:
        """The shape of one sample: (C, L), (C, H, W) or (T, C, H, W)."""
        return tuple(self.dataset["input_shape"])


class SyntheticSet(nn.Module):
    """A synthetic set as a module, ``forward(index) -> (images, targets)``.

    What is learned is a parameter, and what is fixed is a buffer. Images are samples of the data set, which may also be
    series or clips.

    Args:
        latents: (N, ...), in the transformed space; whole numbers for a decoder that is not differentiable.
        labels: classes (N,) or logits (N, C). For a set without classes they are targets (N, D), and the kind of labels
            has to be ``targets``.
        decode, label_kind: how latents are decoded and what kind of labels the set has.
        decoder: a decoder that ``decode`` built, on the device of the latents; None builds one.
        lr: initial learning rate, a scalar or one per inner step (T,). Its logarithm is learned, so it stays positive.
        weights: (N,), positive. In a training each sample is drawn with a probability proportional to its weight. None:
            an epoch has every sample once.

    Raises:
        ValueError: the decoder does not produce samples of this shape, or the set has no classes and other labels than
            ``targets``.
    """

    latents: nn.Parameter
    weights: Tensor | None
    classes: Tensor
    """The classes of the latents, (N,). If the set has no classes (``origin.num_classes`` is 0), they are 0 and are not
    stored in the file."""

    def __init__(
        self,
        latents: Tensor,
        labels: Tensor,
        origin: Origin,
        *,
        decode: Decode | None = None,
        decoder: nn.Module | None = None,
        label_kind: Labels | None = None,
        lr: float | Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.origin, self.decode, self.label_kind = origin, decode or Pixels(), label_kind or Hard()
        self.decode.require_kind(origin.input_shape)
        if not origin.num_classes and (self.label_kind.space != "values" or labels.shape[1:] != (origin.target_width,)):
            raise ValueError(
                f"a set without classes cannot have labels of shape {tuple(labels.shape)} and kind "
                f"{self.label_kind.name}: it has targets; give shape {(len(latents), origin.target_width)} and the "
                "kind targets"
            )
        self.latents = nn.Parameter(latents.detach().clone(), requires_grad=latents.is_floating_point())
        self._members: tuple[int, list[Tensor]] | None = None
        self._in_place: Tensor | None = None
        if decoder is None:
            decoder = self.decode.build(origin.input_shape, origin.num_classes or 1).to(latents.device)
        self.decoder = decoder
        self.provider = self.label_kind.provider(
            labels.detach(), origin.num_classes, origin.input_shape, self.decode.expansion
        )
        self.register_buffer("classes", origin.classes_of(labels), persistent=origin.num_classes > 0)
        self.register_buffer("weights", weights)
        dtype = latents.dtype if latents.is_floating_point() else torch.float32
        log_lr = None if lr is None else torch.as_tensor(lr, dtype=dtype, device=latents.device).log()
        self.log_lr = None if log_lr is None else nn.Parameter(log_lr)

    def __len__(self) -> int:
        """Return the number of latents N. The number of images is N times the decoder's expansion."""
        return len(self.latents)

    def __repr__(self) -> str:
        """Return one line: method and data, size, labels, bytes."""
        return printable(f"SyntheticSet({', '.join(self._facts().values())})")

    def _repr_html_(self) -> str:
        """Return the facts and the images for a notebook. Whitened images, which need their data, are left out, and so
        are those of more than 100 classes."""
        rows = "".join(f"<tr><th>{name}</th><td>{escape(fact)}</td></tr>" for name, fact in self._facts().items())
        drawn = ""
        if self.origin.transform.get("kind") in ("channel", "none") and self.origin.num_classes <= 100:
            file = io.BytesIO()
            self.plot().save(file, format="PNG")
            drawn = f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
        return f"<table>{rows}</table>{drawn}"

    def plot(self, dataset: Data | None = None, *, columns: int = 10, download: bool = False) -> Image:
        """Return a picture of at most ``columns`` samples of each class, one row per class, which notebooks show.

        Args:
            dataset: for a ZCA-whitened set, the data that it was distilled from; by default the name in the set.
            columns: largest number of samples in a row.
            download: whether missing data may be downloaded.

        Raises:
            ValueError: the data of a whitened set cannot be read.
        """
        from condense import picture, sets  # both import this module

        return picture.drawn(*sets.with_transform(self, dataset, download=download), columns=columns)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers in ``classes``; empty for a set without classes."""
        return tuple(map(str, self.origin.dataset.get("classes", ()))) if self.origin.num_classes else ()

    def _facts(self) -> dict[str, str]:
        origin, size = self.origin, "x".join(map(str, self.origin.input_shape))
        of = f"{origin.num_classes} classes" if origin.num_classes else f"targets of {origin.target_width} values"
        return {
            "set": f"{origin.method or 'unknown method'} of {origin.dataset_name}",
            "samples": f"{len(self) * self.decode.expansion} {kind(origin.input_shape)} {size} of {of}",
            "budget": self.budget_in_full,
            "labels": f"{self.label_kind.name} labels",
            "size": f"{sum(self.cost())} bytes" if self.allowed_bits is None else f"{self.num_bits} bits",
        }

    @property
    def ipc(self) -> int:
        """The budget in images per class; if it is not recorded, the mean number of latents per class."""
        return self.origin.ipc or max(len(self) // (self.origin.num_classes or 1), 1)

    @property
    def budget_in_words(self) -> str:
        """The budget in words: ``ipc 10``, ``ipc 10 in bits`` or ``fraction 0.3``."""
        return in_words(self.ipc, self.origin.fraction, self.origin.budget)

    @property
    def budget_in_full(self) -> str:
        """The budget in words, with the largest number of bits where it is in bits."""
        return self.budget_in_words + ("" if self.allowed_bits is None else f", at most {self.allowed_bits} bits")

    @property
    def num_bits(self) -> int:
        """The number of bits that the set takes by the convention of docs/budgets.md."""
        return bits(self.cost(), self.provider, self.origin.num_classes)

    @property
    def allowed_bits(self) -> int | None:
        """The largest number of bits within the budget; None if the budget is not in bits."""
        origin, num_classes = self.origin, len(self.origin.dataset.get("classes", ()))
        if origin.budget != "bits":
            return None
        return allowed_bits(self.ipc, self.label_kind, origin.input_shape, num_classes, origin.target_width)

    def forward(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return samples (n', *input_shape) and targets (n',) or (n', D) of the latents ``index`` (default: all)."""
        if index is None:
            index = torch.arange(len(self), device=self.latents.device)
        latents = self.decode.quantised(self.latents[index]) if self._in_place is None else self._in_place[index]
        images = self.decoder(latents, self.classes[index])
        return images, self.provider(index.repeat(len(images) // max(len(index), 1)))

    @contextlib.contextmanager
    def decoding(self, latents: Tensor | None) -> Iterator[None]:
        """Inside the context ``forward`` decodes these latents (N, ...), or with None those of the set."""
        outside, self._in_place = self._in_place, latents
        try:
            yield
        finally:
            self._in_place = outside

    def finished(self) -> SyntheticSet:
        """Return the set as it is stored: itself, or a copy that is rounded if the decoder has an entropy code."""
        if not isinstance(self.decode, Coded):
            return self
        syn = copy.deepcopy(self)
        latents, syn.decoder = self.decode.finished(self.latents.detach(), self.classes, self.decoder)
        syn.latents.data = latents
        return syn

    def excess(self) -> str | None:
        """Return a line that says by how much the set exceeds a budget in bits, and what mends it; None if it does not.

        Only a set whose bits are learned can exceed it."""
        if not isinstance(self.decode, Coded) or (allowed := self.allowed_bits) is None or self.num_bits <= allowed:
            return None
        enough, kind = -(-self.num_bits * self.ipc // allowed), type(self.decode).__name__
        return (
            f"the set takes {self.num_bits} bits, more than the {allowed} of {spelt('ipc', self.ipc)}: the weight of "
            f"the rate decides on them; give a larger {spelt('decode.rate_weight', kind=kind)}, fewer "
            f"{spelt('decode.images', kind=kind)}, or {spelt('ipc', enough)}"
        )

    @property
    def lr(self) -> Tensor | None:
        """The learned learning rate, or None if the set has none."""
        return None if self.log_lr is None else self.log_lr.exp()

    def index_of(self, label: int) -> Tensor:
        """Return the indices of the latents of class ``label``."""
        if self._members is None or self._members[0] != self.classes._version:
            members = [(self.classes == c).nonzero().flatten() for c in range(self.origin.num_classes or 1)]
            self._members = (self.classes._version, members)
        return self._members[1][label]

    def require_classes(self, what: str, called: str = "this set") -> None:
        """Raise ValueError if the set, which is ``called`` so in the message, has no classes, which ``what`` needs."""
        if not self.origin.num_classes:
            raise ValueError(
                f"{what} needs classes: the targets of {called} are {self.origin.target_width} values per image; "
                "measure it with `condense apply transfer`"
            )

    def leaves(self) -> dict[str, list[nn.Parameter]]:
        """Return the learned parameters by part: latents, labels, decoder and lr; empty parts are left out."""
        parts = {
            "latents": [self.latents] if self.latents.is_floating_point() else [],
            "labels": list(self.provider.parameters()),
            "decoder": list(self.decoder.parameters()),
            "lr": [] if self.log_lr is None else [self.log_lr],
        }
        return {name: params for name, params in parts.items() if params}

    def cost(self) -> Cost:
        """Return the number of bytes that the set takes on disk, those of an entropy code by their length."""
        cost = cost_of(self.decode, self.latents, self.classes, self.provider, self.decoder)
        return cost if self.weights is None else cost._replace(labels=cost.labels + self.weights.nbytes)

    @torch.no_grad()
    def to_dataset(
        self,
        space: Literal["transformed", "pixels"] = "transformed",
        dataset: Data | None = None,
        *,
        download: bool = False,
    ) -> Dataset[tuple[Tensor, ...]]:
        """Return the decoded set as a PyTorch dataset of (image, target) pairs on the CPU.

        Args:
            space: ``transformed`` is the space in which networks are trained. ``pixels`` is the space of the data:
                [0, 1] for images and clips, any values for series.
            dataset: for the pixels of a ZCA-whitened set, the data that it was distilled from; by default the name in
                the set.
            download: whether missing data may be downloaded.

        Raises:
            ValueError: the data of a whitened set cannot be read.
        """
        from condense import sets  # imports this module

        images, targets = self()
        if space == "pixels":
            _, transform = sets.with_transform(self, dataset, download=download)
            images = transform.to_data(images)
        return TensorDataset(images.cpu(), targets.cpu())
