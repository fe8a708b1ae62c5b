"""Label the views of a finished set by a teacher, and find the teacher of such a set again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from condense.artifacts import MANIFEST, TrainedNetworkSpec, find, folder_name, open_buffer, read_manifest
from condense.augment import Augment
from condense.compute import Compute
from condense.files import checksum
from condense.names import printable, spelt
from condense.networks import Functional
from condense.synthetic.set import Origin, SyntheticSet
from condense.synthetic.teaching import Stored, StoredTable, StoredTeacher, ViewLabels
from condense.task import ROUNDING
from condense.teachers import Teacher


@dataclasses.dataclass(frozen=True)
class NamedTeacher:
    """A teacher with its provenance."""

    name: str
    """The name of the buffer, without its location, and the start of the checksum of the weights."""
    teacher: Teacher
    described: dict[str, Any]
    """The description of the buffer (``Artifact.describe``)."""


def open_teacher(path: Path, origin: Origin, device: torch.device, option: str = "teacher") -> NamedTeacher:
    """Open the first network of a buffer as a teacher for sets of the same data, split and transform.

    Args:
        path: the folder of the buffer, or a folder with one such buffer.
        origin: the origin of the set.
        device: device of the teacher.
        option: the name of the user's option, for errors.

    Raises:
        ValueError: there is no such buffer, or it is damaged.
    """
    transform = {name: value for name, value in origin.transform.items() if name not in ROUNDING}
    split = {"val_fraction": origin.split.val_fraction, "seed": origin.split.seed}
    identity = {"dataset": origin.fingerprint, "split": split, "transform": transform}
    folder = find(path, TrainedNetworkSpec(identity=identity), origin.dataset_name, option)
    buffer = open_buffer(folder)
    network = Functional(buffer.manifest["identity"]["network"], origin.input_shape, origin.num_classes, device)
    weights = buffer.weights(0, network)
    digest = checksum({**weights.params, **weights.buffers})[:12]
    return NamedTeacher(f"{_name(folder)}@{digest}", Teacher(network, weights), buffer.describe())


def find_teacher(name: str, buffers: Path, origin: Origin, device: torch.device) -> NamedTeacher:
    """Open the teacher of a recorded ``name``, in the folder ``buffers`` or a folder in it.

    Raises:
        ValueError: it is not there, its weights are other ones, or its buffer is damaged.
    """
    folders = [path.parent for path in (buffers / MANIFEST, *sorted(buffers.glob(f"*/{MANIFEST}"))) if path.is_file()]
    found = [folder for folder in folders if _name(folder) == name.partition("@")[0]]
    if not found:
        raise ValueError(
            f"the teacher {printable(name, 200)} of the labels is not in {buffers}; give its folder with "
            f"{spelt('buffers')}"
        )
    opened = open_teacher(found[0], origin, device, "buffers")
    if opened.name != name:
        raise ValueError(
            f"{found[0]} is not the teacher of the labels any more: it is {opened.name}, not {printable(name, 200)}; "
            f"give another folder with {spelt('buffers')}"
        )
    return opened


def teacher_of(syn: SyntheticSet, buffers: Path, device: torch.device) -> NamedTeacher:
    """Return the teacher that labelled the views of a set, from the set or else from ``buffers`` (``find_teacher``)."""
    kind = syn.label_kind
    assert isinstance(kind, ViewLabels)
    if not isinstance(syn.provider, StoredTeacher) or kind.is_named:
        return find_teacher(kind.teacher, buffers, syn.origin, device)
    network = Functional(kind.network, syn.origin.input_shape, syn.origin.num_classes, device)
    described = next((entry for entry in syn.origin.artifacts if entry.get("use") == _USE), {})
    return NamedTeacher(kind.teacher, Teacher(network, syn.provider.weights(network)), dict(described))


def relabelled(
    syn: SyntheticSet,
    kind: ViewLabels,
    by: NamedTeacher,
    *,
    strategy: str = "none",
    compute: Compute = Compute(),
    on_epoch: Callable[[int], None] = lambda done: None,
) -> SyntheticSet:
    """Return a copy of a set, with labels of its views by a teacher.

    Args:
        syn: the set, which must have classes; its labels are replaced.
        kind: the settings of the labels.
        by: the teacher, on the device to compute on.
        strategy: the augmentation ``dsa`` of the data set.
        compute: compute policy of the teacher.
        on_epoch: called with the number of labelled epochs.

    Raises:
        ValueError: the set has no classes, ``kind`` asks for another teacher or does not fit the images, or the logits
            of the teacher cannot be stored.
    """
    syn.require_classes(f"a set with {kind.name} labels")
    network, weights = by.teacher
    for field, actual, any_value in (("teacher", by.name, ""), ("network", network.name, "auto")):
        asked = getattr(kind, field)
        if asked not in (any_value, actual):
            raise ValueError(f"labels.{field} is {asked}, but the {field} is {actual}; give that, or leave it out")
    kind = dataclasses.replace(kind, teacher=by.name, network=network.name)
    if isinstance(kind, Stored):
        kind = dataclasses.replace(kind, augment=str(Augment.parse(kind.augment, own=strategy)))
    device, origin = network.device, syn.origin
    provider = kind.provider(syn.classes.cpu(), origin.num_classes, origin.input_shape, syn.decode.expansion)
    if isinstance(provider, StoredTable):
        with torch.no_grad():
            images, _ = syn()
        copies = len(images) // len(syn)
        classes = syn.classes.repeat(copies).to(device)
        source = provider.kind.views(images.to(device), classes, origin.num_classes)
        label = by.teacher.labeller(compute)
        with torch.no_grad(), compute.arithmetic():
            for k, epoch in enumerate(provider.kind.stored_epochs):
                batches = [label(source.batch(epoch, index).images) for index in range(source.num_batches)]
                provider.fill(k, torch.cat(batches).cpu())
                on_epoch(k + 1)
    elif isinstance(provider, StoredTeacher) and not kind.is_named:
        provider.fill(weights)
    result = copy.deepcopy(syn)
    others = [entry for entry in origin.artifacts if entry.get("use") != _USE]
    result.origin = dataclasses.replace(origin, artifacts=[*others, {**by.described, "use": _USE}])
    result.label_kind, result.provider = kind, provider.to(syn.latents.device)
    return result


_USE = "labels"
"""Marks the buffer of the teacher among the artifacts of a set."""


def _name(folder: Path) -> str:
    """Return the name that the folder of a buffer had when it was made."""
    manifest = read_manifest(folder)
    return folder_name(str(manifest.get("dataset", "")), {"network": "", **manifest["identity"]})
