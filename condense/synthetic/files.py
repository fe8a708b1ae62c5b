"""Read and write a synthetic set as one ``.safetensors`` file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from condense import zoo
from condense.data.layout import channel_axis, kind
from condense.files import FORMAT, expanded, read_tensors, write_tensors
from condense.plugins import Registry
from condense.schema import brief, checked, from_json
from condense.synthetic.decode import DECODERS, Coded, Decode
from condense.synthetic.labels import LABELS, Labels
from condense.synthetic.set import Origin, RecipeRecord, SyntheticSet
from condense.task import Split

T = TypeVar("T")

MOST_DECODED = 1 << 30
"""The maximum size, in bytes, of the decoded images of a set, unless ``MOST_EXPANDED`` allows more."""
MOST_EXPANDED = 1000
"""The maximum ratio of the sizes of the decoded images and of the stored tensors, above ``MOST_DECODED``."""
LONGEST_SIDE = 4096
"""The maximum number of channels, rows or columns of an image that is not stored as pixels."""


@checked
def save(syn: SyntheticSet, path: Path | str) -> None:
    """Write the set; equal sets give equal bytes.

    Raises:
        ValueError: the file cannot be written, or the decoded images are larger than ``load`` accepts.
    """
    tensors = syn.state_dict()
    _limit(len(syn), syn.decode, syn.origin, tensors)
    header = {
        "kind": "synthetic set",
        "format": FORMAT,
        "space": "transformed",
        "decode": _choice(syn.decode, DECODERS),
        "labels": _choice(syn.label_kind, LABELS),
        "origin": {k: v for k, v in dataclasses.asdict(syn.origin).items() if k != "privacy" or v},
    }
    write_tensors(expanded(path), tensors, header)


@checked
def load(path: Path | str) -> SyntheticSet:
    """Read a set written by ``save``, the set of a run folder, or a set of the zoo (``zoo:digits/ipc1``).

    Everything is checked before memory is allocated: the set takes as much as its file, and its decoded images take at
    most ``MOST_DECODED`` bytes or ``MOST_EXPANDED`` times the stored size, whichever is larger.

    Raises:
        ValueError: ``read_tensors`` refuses the file; the header has fields of other types or values; the decoder or
            kind of labels is unknown; the tensors do not fit the header; the decoded images are too large; values are
            not finite.
    """
    path = zoo.located(path)
    if path.is_dir():
        path = path / "synthetic.safetensors"
    tensors, header = read_tensors(path, "synthetic set")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path} holds values that are not finite in {brief(name)}; distil it again")
    try:
        return _assembled(tensors, from_json(_Header, header, "header"))
    except _MissingPackage as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} does not fit its header: {error}; write it again or restore it") from error


def _assembled(tensors: Mapping[str, Tensor], header: _Header) -> SyntheticSet:
    origin = _origin(header.origin)
    decode = _choose(header.decode, DECODERS, "decode")
    label_kind = _choose(header.labels, LABELS, "labels")
    latents, classes, log_lr, weights = (tensors.get(name) for name in ("latents", "classes", "log_lr", "weights"))
    if latents is None or not _fits(latents, decode) or not latents.dim() or not len(latents):
        kind_of = "floating-point" if decode.differentiable else f"{8 * decode.stored.itemsize}-bit"
        raise ValueError(f"it has no {kind_of} latents")
    if origin.num_classes and (classes is None or latents.shape[:1] != classes.shape):
        raise ValueError(f"it has {len(latents)} latents but {0 if classes is None else classes.numel()} classes")
    if log_lr is not None and (log_lr.dim() > 1 or not log_lr.numel() or not log_lr.is_floating_point()):
        raise ValueError("its learning rate is neither one number nor one number for each step")
    if weights is not None and (weights.shape != latents.shape[:1] or not weights.is_floating_point()):
        raise ValueError("its weights are not one number for each latent")
    _limit(len(latents), decode, origin, tensors)
    syn = _skeleton(latents, log_lr, weights, origin, decode, label_kind)
    expected = syn.state_dict()
    if expected.keys() != tensors.keys():
        raise ValueError(f"it has the tensors {brief(sorted(tensors))}, expected {brief(sorted(expected))}")
    values = {}
    for name, like in expected.items():
        tensor = tensors[name]
        same_kind = tensor.is_floating_point() if like.is_floating_point() else tensor.dtype == like.dtype
        if tensor.shape != like.shape or not same_kind:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {like.dtype} of {tuple(like.shape)}"
            )
        values[name] = tensor.to(like.dtype, copy=True)
    syn.load_state_dict(values, assign=True)
    if not origin.num_classes:
        syn.register_buffer("classes", torch.zeros(len(latents), dtype=torch.long), persistent=False)
    _check_values(syn)
    return syn


def _fits(latents: Tensor, decode: Decode) -> bool:
    return latents.is_floating_point() if decode.differentiable else latents.dtype == decode.stored


def _skeleton(
    latents: Tensor,
    log_lr: Tensor | None,
    weights: Tensor | None,
    origin: Origin,
    decode: Decode,
    label_kind: Labels,
) -> SyntheticSet:
    """Return a set of these shapes on the meta device. Raises ValueError if its decoder does not take such latents."""
    try:
        with torch.device("meta"):
            images = torch.empty(latents.shape, dtype=latents.dtype)
            labels = torch.empty(len(latents), origin.target_width)
            lr = None if log_lr is None else torch.empty(log_lr.shape, dtype=log_lr.dtype)
            given = None if weights is None else torch.empty_like(weights)
            syn = SyntheticSet(images, labels, origin, decode=decode, label_kind=label_kind, lr=lr, weights=given)
        shape = tuple(syn.decoder(syn.latents[:1], syn.classes[:1]).shape[1:])
    except (RuntimeError, IndexError) as error:  # the errors of torch for incompatible shapes
        raise ValueError(f"the decoder {decode.name} does not take latents of shape {tuple(latents.shape)}") from error
    if shape != origin.input_shape:
        raise ValueError(f"it has images of shape {shape}, but its data set has {origin.input_shape}")
    return syn


@torch.no_grad()
def _check_values(syn: SyntheticSet) -> None:
    """Raise ValueError for classes, targets or learning rates out of range, and for latents that cannot be decoded."""
    _, targets = syn.classes, syn.provider(torch.arange(len(syn)))
    for of in (syn.classes, targets if targets.dim() == 1 else syn.classes):
        if not 0 <= int(of.min()) <= int(of.max()) < (syn.origin.num_classes or 1):
            raise ValueError(f"it has classes outside 0..{syn.origin.num_classes - 1}")
    if syn.label_kind.space == "probabilities" and not (targets >= 0).all():
        raise ValueError("it has probabilities below zero")
    syn.provider.check()
    if syn.weights is not None and not (syn.weights > 0).all():
        raise ValueError("it has weights that are not positive")
    if syn.lr is not None and not (syn.lr.isfinite() & (syn.lr > 0)).all():
        raise ValueError("its learned learning rate is not a positive finite number")
    syn.decode.check(syn.latents, syn.decoder)
    one_of_each = torch.tensor(list({label: i for i, label in enumerate(syn.classes.tolist())}.values()))
    try:
        syn.decoder(syn.latents[one_of_each], syn.classes[one_of_each])
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"the decoder {syn.decode.name} looks up entries that the latents do not have") from error
    if isinstance(syn.decode, Coded):
        syn.cost()  # raises ValueError if its entropy model is broken


def _limit(num_latents: int, decode: Decode, origin: Origin, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the images or the decoder would take far more memory than the stored tensors."""
    has_sides = kind(origin.input_shape) != "graphs"
    if has_sides and not decode.stores_pixels and max(origin.input_shape) > LONGEST_SIDE:
        raise ValueError(
            f"images of shape {brief(origin.input_shape)} have a side of more than {LONGEST_SIDE}, the limit of the "
            f"decoder {decode.name}"
        )
    images = num_latents * decode.expansion
    itemsize = tensors["latents"].itemsize if decode.differentiable else torch.float32.itemsize
    size = images * math.prod(origin.input_shape) * itemsize
    stored = sum(tensor.nbytes for tensor in tensors.values())
    most = max(MOST_DECODED, MOST_EXPANDED * stored)
    if size > most:
        raise ValueError(
            f"its decoder {decode.name} would produce {images} images of {size / 1e9:.3g} GB from "
            f"{stored / 1e9:.3g} GB; the limit for such a set is {most / 1e9:.3g} GB"
        )


def _choice(value: Any, table: Registry[type[T]]) -> dict[str, Any]:
    """Return the header entry of a decoder or kind of labels: its fields, and its package if it is a plugin."""
    package = table.package(value.name) if value.name in table else None
    added = value.added_fields if isinstance(value, Labels) else ()
    usual = {f.name: f.default for f in dataclasses.fields(value) if f.name in added}
    fields = {key: entry for key, entry in dataclasses.asdict(value).items() if usual.get(key, ...) != entry}
    return {"name": value.name, **fields} | ({} if package is None else {"package": package})


def _choose(fields: Mapping[str, Any], table: Registry[type[T]], where: str) -> T:
    """Return the decoder or kind of labels that a header describes."""
    named = from_json(_Named, fields, where)
    name = named.name
    if name not in table:
        if named.package:
            raise _MissingPackage(
                f"its {where} {brief(name)} needs the package {brief(named.package)}, which is not installed; "
                "install that package if you trust it"
            )
        raise ValueError(f"{where}: {brief(name)} is none of {', '.join(table)}; update condense")
    known = {f.name for f in dataclasses.fields(table[name])}  # type: ignore[arg-type]
    for key, value in fields.items():
        if key not in ("name", "package") and key not in known:
            raise ValueError(f"{where}: {name} has no field {brief(key)}; update condense")
        if isinstance(value, int) and value >= 2**31:
            raise ValueError(f"{where}, {key}: {value} is too large")
    return from_json(table[name], fields, where)


def _origin(value: Mapping[str, Any]) -> Origin:
    """Return the origin that a file records, after checking all fields that are read later."""
    origin = from_json(Origin, value, "origin")
    if "image_shape" in origin.dataset:  # its name in version 0.1
        renamed = {"input_shape" if key == "image_shape" else key: item for key, item in origin.dataset.items()}
        origin = dataclasses.replace(origin, dataset=renamed)
    from_json(_Dataset, origin.dataset, "origin, dataset")
    from_json(RecipeRecord, origin.recipe, "origin, recipe")
    split = origin.recipe.get("split", {})
    if not split.keys() <= {f.name for f in dataclasses.fields(Split)}:
        raise ValueError(f"origin, recipe, split has unknown fields: {brief(sorted(split))}; update condense")
    for artifact in origin.artifacts:
        from_json(_Artifact, artifact, "origin, artifacts")
    kind = _TRANSFORMS.get(from_json(_Transform, origin.transform, "origin, transform").kind)
    if kind is not None:
        statistics: object = from_json(kind, origin.transform, "origin, transform")
        channels = origin.input_shape[channel_axis(origin.input_shape)]
        if isinstance(statistics, _Channel) and len(statistics.mean) != channels:
            raise ValueError(
                f"origin, transform: it has {len(statistics.mean)} channels, but samples have shape "
                f"{origin.input_shape}"
            )
    return origin


class _MissingPackage(ValueError):
    """Raised if a file needs code of a package that is not installed."""


@dataclass(frozen=True)
class _Header:
    decode: Mapping[str, Any]
    labels: Mapping[str, Any]
    origin: Mapping[str, Any]
    space: Literal["transformed"] = "transformed"


@dataclass(frozen=True)
class _Named:
    name: str
    package: str = ""


@dataclass(frozen=True)
class _Dataset:
    name: str
    fingerprint: str
    input_shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    target_width: int | None = None
    held_out: str = ""

    def __post_init__(self) -> None:
        if not self.classes and self.target_width is None:
            raise ValueError("it has neither classes nor a target_width")
        if self.target_width is not None and not 0 < self.target_width < 2**31:
            raise ValueError(f"target_width is {brief(self.target_width)}, not from 1 to {2**31 - 1}")
        kind(self.input_shape)
        if min(self.input_shape) < 1:
            raise ValueError(f"input_shape {brief(self.input_shape)} has a side below 1")


@dataclass(frozen=True)
class _Transform:
    kind: str


@dataclass(frozen=True)
class _Channel:
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(std > 0 for std in self.std):
            raise ValueError(f"mean {brief(self.mean)} and std {brief(self.std)} are not statistics of channels")


@dataclass(frozen=True)
class _Zca:
    flavour: Literal["absolute", "relative"]
    eps: float
    key: str
    trace: float


_TRANSFORMS: Mapping[str, type] = {"channel": _Channel, "zca": _Zca}


@dataclass(frozen=True)
class _Artifact:
    kind: str = ""
    name: str = ""
