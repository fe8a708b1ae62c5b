"""Costly things that methods need from disk: what is asked for, how it is found, how it is read.

An artifact is a folder with a ``manifest.json``. Its *identity* says what decided its content; the hash of it
ends the folder's name. Its *extent* (experts, epochs) says how much of it there is, and may grow.

Trained networks lie in a *buffer*, which keeps each of them in one ``.safetensors`` file: ``params`` (R, P) and, where
the network has some, ``buffers`` (R, B), float32. A buffer of *trajectories* keeps every epoch: R = E + 1 rows, row 0
the initialisation. A buffer of *networks* keeps the last epoch alone: R = 1. The header holds a checksum of every row,
so that a row is read and verified without touching the others.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from condense.data import datasets
from condense.files import canonical_json, expanded, locked, read_header, read_json, read_row, replacing, write_text
from condense.names import printable, spelt
from condense.networks import Functional, Weights
from condense.schema import from_json

FORMAT = 1
DEFAULT_ROOT = Path("artifacts")
MANIFEST = "manifest.json"

Keep = Literal["all", "last"]
"""Which epochs of a training a buffer keeps: all of them, the initialisation included, or the last one alone."""

IMPORTED = "imported"
"""The origin of networks that others trained."""

_MEND = "restore it, or move it away and build the buffer again, which trains what is missing"


class Artifact(ABC):
    """What a spec finds on disk, opened for reading.

    Raises:
        ValueError: as ``read_manifest`` does.
    """

    kind: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder, self.kind)

    @abstractmethod
    def extent(self) -> dict[str, int]:
        """How much of it there is, by name; JSON-able."""

    def describe(self) -> dict[str, Any]:
        """For the files of what was made with it: kind, name (which ends in the hash of its identity) and extent."""
        return {"kind": self.kind, "name": self.folder.resolve().name, **self.extent()}


class TrainedNetworks(Artifact):
    """Networks of one architecture at the end of their training."""

    kind = "networks"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._key = _hash(self.manifest["identity"])

    @property
    def num_networks(self) -> int:
        return int(self.manifest["num_experts"])

    @property
    def num_epochs(self) -> int:
        """The epochs that every network was trained for; 0 of imported networks, of which the number is not known."""
        return int(self.manifest["num_epochs"])

    def extent(self) -> dict[str, int]:
        return {"num_networks": self.num_networks}

    def weights(self, index: int, network: Functional) -> Weights:
        """Network ``index`` after its last epoch, on the device and in the types of ``network``.

        Raises:
            ValueError: its file is missing or damaged; its tensors are not those of ``network``.
        """
        return self._weights(index, self._last_row(index), network)

    def _last_row(self, index: int) -> int:
        return 0

    def _weights(self, index: int, row: int, network: Functional) -> Weights:
        params, buffers = ({name: tuple(shape) for name, shape in self.manifest[part]} for part in Weights._fields)
        if network.buffer_shapes and not buffers:
            raise ValueError(
                f"networks of {self.folder} cannot label images: they came without the running statistics of "
                f"{network.name}; train them with `condense buffer`, which keeps these"
            )
        if (params, buffers) != (network.shapes, network.buffer_shapes):
            raise ValueError(f"{self.folder} holds other networks than {network.name}; give another folder")
        stored = (self._read(part, index, (row,))[0] if self.manifest[part] else {} for part in Weights._fields)
        return network.restored(*stored)

    def _read(self, table: str, index: int, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        assert 0 <= index < self.num_networks, f"network {index} of {self.num_networks}"
        path = self.folder / expert_file(index)
        header = from_json(_ExpertHeader, read_header(path), str(path))
        if header.buffer != self._key:
            raise ValueError(f"{path} belongs to another buffer; {_MEND}")
        layout, checksums = self.manifest[table], header.rows.get(table, ())
        width = sum(math.prod(shape) for _, shape in layout)
        tensors = []
        for number in rows:
            try:
                row = read_row(path, table, number, width)
                intact = number < len(checksums) and _checksum(row) == checksums[number]
            except (OSError, ValueError):
                intact = False
            if not intact:
                raise ValueError(f"{path} is damaged: row {number} of its {table} does not fit its checksum; {_MEND}")
            tensors.append(_unpack(row, layout))
        return tensors


class Trajectories(TrainedNetworks):
    """Snapshots of experts: epoch 0 is the initialisation, epoch k the weights after k epochs."""

    kind = "trajectories"

    @property
    def num_experts(self) -> int:
        return self.num_networks

    def extent(self) -> dict[str, int]:
        return {"num_experts": self.num_experts, "num_epochs": self.num_epochs}

    def weights(self, index: int, network: Functional, epoch: int | None = None) -> Weights:
        """As of ``TrainedNetworks``, after ``epoch`` epochs; by default after as many as every expert has."""
        row = self._last_row(index) if epoch is None else self._row(index, epoch)
        return self._weights(index, row, network)

    def snapshot(self, expert: int, epoch: int) -> dict[str, Tensor]:
        """Parameters by name, float32, on the CPU.

        Raises:
            ValueError: the expert's file is missing or damaged.
        """
        return self._read("params", expert, (self._row(expert, epoch),))[0]

    def pair(self, expert: int, start: int, target: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Two snapshots of one expert; raises as ``snapshot`` does."""
        first, second = self._read("params", expert, (self._row(expert, start), self._row(expert, target)))
        return first, second

    def buffers(self, expert: int, epoch: int) -> dict[str, Tensor]:
        """Buffers by name (BatchNorm's statistics), float32, on the CPU; empty where the network has none."""
        return self._read("buffers", expert, (self._row(expert, epoch),))[0] if self.manifest["buffers"] else {}

    def _last_row(self, index: int) -> int:
        return self.num_epochs

    def _row(self, expert: int, epoch: int) -> int:
        assert 0 <= expert < self.num_experts, f"expert {expert} of {self.num_experts}"
        last = self.manifest["experts"][expert]["num_epochs"]
        assert 0 <= epoch <= last, f"epoch {epoch} of {last}"
        return epoch


def open_buffer(folder: Path) -> TrainedNetworks:
    """Trained networks, or the trajectories of which they are the end.

    Raises:
        ValueError: the folder holds neither, or its manifest is damaged.
    """
    is_trajectories = read_manifest(folder)["kind"] == Trajectories.kind
    return Trajectories(folder) if is_trajectories else TrainedNetworks(folder)


@dataclass(frozen=True)
class ArtifactSpec(ABC):
    """What a method asks for."""

    kind: ClassVar[str]

    identity: Mapping[str, Any]
    """What has to agree; keys left out, at any level, are open."""

    @abstractmethod
    def command(self, dataset: str) -> str:
        """The command line that builds it."""

    @abstractmethod
    def open(self, path: Path) -> Artifact:
        """Open the folder that ``find`` returned. Raises ValueError if it is damaged."""

    def compares(self, kind: str) -> bool:
        """Whether artifacts of this kind serve, or come near enough for ``misfits`` to say what they lack."""
        return kind == self.kind

    def misfits(self, manifest: Mapping[str, Any]) -> list[str]:
        """Why an artifact of a kind that ``compares`` accepts does not serve, in words; empty if it does."""
        return _differences(_plain(self.identity), manifest["identity"])


@dataclass(frozen=True)
class _BufferSpec(ArtifactSpec):
    """What the specs of buffers share."""

    def compares(self, kind: str) -> bool:
        return kind in (Trajectories.kind, TrainedNetworks.kind)

    def _command(self, dataset: str) -> list[str]:
        """The words of ``condense buffer`` that follow from the identity."""
        words = ["condense", "buffer", "--dataset", dataset]
        if "network" in self.identity:
            words += ["--network", self.identity["network"]]
        transform = self.identity.get("transform", {"kind": "channel"})
        relative = transform.get("flavour") == "relative"
        if relative or transform["kind"] != "channel":
            words += ["--transform", "zca-relative" if relative else transform["kind"]]
        split = self.identity.get("split", {})
        if split.get("val_fraction"):
            words += ["--split.val-fraction", str(split["val_fraction"]), "--split.seed", str(split["seed"])]
        return [*words, *_flags(self.identity.get("training", {}))]


@dataclass(frozen=True)
class TrajectorySpec(_BufferSpec):
    """Expert trajectories of at least this extent."""

    kind: ClassVar[str] = Trajectories.kind

    num_experts: int = 1
    """Fewest experts that serve."""
    num_epochs: int = 1
    """Fewest epochs that serve; there is one snapshot more."""
    experts: Literal["any", "sgd", "gsam"] = "any"
    """How they were trained. Of imported experts it is not known, and not asked."""

    def command(self, dataset: str) -> str:
        words = self._command(dataset)
        if self.experts == "gsam":
            words += ["--rho", "0.01", "--alpha", "0.3"]
        if self.num_experts > 1:
            words += ["--num-experts", str(self.num_experts)]
        return shlex.join([*words, "--num-epochs", str(self.num_epochs)])

    def misfits(self, manifest: Mapping[str, Any]) -> list[str]:
        short = _shortfall(manifest, num_experts=self.num_experts, num_epochs=self.num_epochs)
        if manifest["kind"] != self.kind:
            short.append("only the last epoch is kept")
        training = manifest["identity"].get("training", {})
        result = "gsam" if training.get("rho") else "sgd"
        if training and self.experts not in ("any", result):
            short.append(f"experts are trained by {result}, not {self.experts}")
        return super().misfits(manifest) + short

    def open(self, path: Path) -> Trajectories:
        return Trajectories(path)


@dataclass(frozen=True)
class TrainedNetworkSpec(_BufferSpec):
    """Networks at the end of their training, such as teachers; of an expert buffer its last epoch serves.

    ``identity`` says which, with ``Task.identity`` for the data and the architecture (of ``task.with_network(name)``
    for another one than the recipe's) and, where it matters, the fields ``training``, of which names and values are
    those of ``condense buffer``: ``{**task.identity(), "training": {"lr": 0.1, "momentum": 0.9}}``. What is left out
    is open. Imported networks do not say how they were trained: they serve where ``training`` is left out.
    """

    kind: ClassVar[str] = TrainedNetworks.kind

    num_networks: int = 1
    """Fewest networks that serve."""
    num_epochs: int = 1
    """Fewest epochs of training that serve."""

    def command(self, dataset: str) -> str:
        extent = ["--num-experts", str(self.num_networks), "--num-epochs", str(self.num_epochs)]
        return shlex.join([*self._command(dataset), *extent, "--keep", "last"])

    def misfits(self, manifest: Mapping[str, Any]) -> list[str]:
        is_imported = manifest["identity"].get("origin") == IMPORTED
        epochs = {} if is_imported else {"num_epochs": self.num_epochs}
        return super().misfits(manifest) + _shortfall(manifest, num_experts=self.num_networks, **epochs)

    def open(self, path: Path) -> TrainedNetworks:
        return open_buffer(path)


def _shortfall(manifest: Mapping[str, Any], **fewest: int) -> list[str]:
    return [f"{key} is {manifest[key]}, less than {n}" for key, n in fewest.items() if manifest[key] < n]


def _flags(fields: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    """The words that give these fields on the command line."""
    for name, value in fields.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            yield from _flags(value, f"{flag}.")
        else:
            yield from (flag, str(value))


class BufferWriter:
    """A buffer being written: experts are added in any order, each atomically; ``save`` makes them visible.

    Several processes may write one buffer: ``save`` adds to what the others saved. Readers see the experts that come
    before the first one missing.

    Args:
        root: folder of buffers.
        dataset: its name, for the folder's name.
        identity: everything that decided the snapshots; JSON-able, with the key ``network``.
        weights: of the network, for names and shapes.
        keep: which epochs of an expert it holds. Where it is "last", ``identity`` has to say how many were trained.

    Raises:
        ValueError: the folder cannot be made, or what it holds is damaged or another buffer.
    """

    def __init__(
        self, root: Path, dataset: str, identity: Mapping[str, Any], weights: Weights, keep: Keep = "all"
    ) -> None:
        self.identity = _plain(identity)
        self._key = _hash(self.identity)
        self.folder = root / folder_name(dataset, self.identity)
        self._kind = Trajectories.kind if keep == "all" else TrainedNetworks.kind
        self._fixed = {
            "kind": self._kind,
            "format": FORMAT,
            "dataset": dataset,
            "identity": self.identity,
            "params": [[name, list(t.shape)] for name, t in weights.params.items()],
            "buffers": [[name, list(t.shape)] for name, t in weights.buffers.items()],
        }
        self.experts: list[dict[str, Any] | None] = self._saved()
        """What is known of each expert, None of one that is missing; ``num_epochs`` is its extent."""
        self._added: dict[int, dict[str, Any]] = {}

    @property
    def complete(self) -> list[dict[str, Any]]:
        """The experts before the first one missing."""
        found = []
        for expert in self.experts:
            if expert is None:
                break
            found.append(expert)
        return found

    def make_folder(self) -> None:
        """Called by ``add``; earlier by whoever wants to know before the work that the place can be written.

        Raises:
            ValueError: it cannot.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make {self.folder}: {error.strerror}; choose another {spelt('out')}") from error

    def epochs(self, expert: int) -> int:
        """The extent of an expert; 0 if it is not there."""
        record = self.experts[expert] if expert < len(self.experts) else None
        if record is None or not (self.folder / expert_file(expert)).exists():
            return 0
        return int(record["num_epochs"])

    def add(
        self, expert: int, params: Tensor, buffers: Tensor, record: Mapping[str, Any], num_epochs: int | None = None
    ) -> None:
        """Write an expert, a new one or in place of an old one.

        Args:
            params, buffers: (R, P) and (R, B), rows made by ``pack``; R is one for each epoch and one for the
                initialisation, or 1 where the last epoch alone is kept.
            record: for the manifest.
            num_epochs: epochs that it was trained for; by default R - 1.
        """
        self.make_folder()
        tables = {"params": params} | ({"buffers": buffers} if buffers.shape[1] else {})
        header = {
            "kind": "expert",
            "format": FORMAT,
            "buffer": self._key,
            "rows": {name: [_checksum(row) for row in table] for name, table in tables.items()},
        }
        with replacing(self.folder / expert_file(expert)) as fresh:
            try:
                safetensors.torch.save_file(tables, fresh, {"condense": canonical_json(header)})
            except safetensors.SafetensorError as error:
                found = re.search(r"os error (\d+)", str(error))
                code = int(found[1]) if found else errno.EIO
                raise OSError(code, os.strerror(code)) from error
        self._added[expert] = {"num_epochs": len(params) - 1 if num_epochs is None else num_epochs, **record}
        self._place(self._added)

    def save(self) -> None:
        """Write the manifest: what was added here since the last time, and what others saved meanwhile."""
        with locked(self.folder / MANIFEST):
            self.experts = self._saved()
            self._place(self._added)
            extent = {
                "num_experts": len(self.complete),
                "num_epochs": min((expert["num_epochs"] for expert in self.complete), default=0),
                "experts": self.experts,
            }
            manifest = self._fixed | extent
            text = json.dumps(manifest | {"checksum": _hash(manifest)}, indent=1, allow_nan=False)
            write_text(self.folder / MANIFEST, text + "\n")
        self._added = {}

    def _saved(self) -> list[dict[str, Any] | None]:
        """The experts of the manifest. Raises ValueError where it is of another buffer."""
        if not (self.folder / MANIFEST).exists():
            return []
        manifest = read_manifest(self.folder, self._kind)
        changes = _differences({k: v for k, v in self._fixed.items() if k != "dataset"}, manifest)
        if changes:
            raise ValueError(f"{self.folder} is another buffer: {changes[0]}; choose another {spelt('out')}")
        return list(manifest["experts"])

    def _place(self, records: Mapping[int, dict[str, Any]]) -> None:
        for expert, record in records.items():
            self.experts += [None] * (expert + 1 - len(self.experts))
            self.experts[expert] = record


def find(root: Path, spec: ArtifactSpec, dataset: str) -> Path:
    """The one folder under ``root`` that serves; ``root`` may itself be that folder.

    Raises:
        ValueError: none serves (the line says how the nearest one differs, and the command that builds one);
            several do; a manifest is damaged.
    """
    is_artifact = (root / MANIFEST).is_file()
    folders = [root] if is_artifact else sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))
    manifests = {folder: read_manifest(folder) for folder in folders}
    misfits = {f: spec.misfits(found) for f, found in manifests.items() if spec.compares(found["kind"])}
    fitting = [folder for folder, reasons in misfits.items() if not reasons]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(folder.name for folder in fitting)
        raise ValueError(f"several buffers in {root} serve {dataset}: {names}; choose with {spelt('buffers')}")
    why = "there are none"
    if misfits:
        nearest = min(misfits, key=lambda folder: len(misfits[folder]))
        why = f"the nearest is {nearest.name}, where {', '.join(misfits[nearest][:3])}"
    out = "" if is_artifact or root == DEFAULT_ROOT else f" --out {shlex.quote(str(root))}"
    in_python = dataset not in datasets.names() and not expanded(dataset).exists()  # no command finds such data
    with_what = "make_buffer in Python, from the same data and with the fields of " if in_python else ""
    command = f"{with_what}`{spec.command(dataset)}{out}`"
    raise ValueError(f"no {spec.kind} for {dataset} in {root}: {why}; build them with {command}")


def identities(root: Path, kind: str, like: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The identities of the artifacts under ``root`` that agree with ``like``; what that leaves out is open."""
    manifests = [read_manifest(path.parent) for path in sorted(root.glob(f"*/{MANIFEST}"))]
    found = [dict(manifest["identity"]) for manifest in manifests if manifest["kind"] == kind]
    return [identity for identity in found if not _differences(_plain(like), identity)]


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        ValueError: missing, changed since it was written, of another format, or not of this kind.
    """
    path = folder / MANIFEST
    manifest = read_json(path, fix="restore it, or give the folder of a buffer")
    checksum = manifest.pop("checksum", None) if isinstance(manifest, dict) else None
    if checksum != _hash(manifest):
        raise ValueError(f"{path} is damaged: its checksum does not fit; restore it, or move {folder} away")
    head = from_json(_Manifest, manifest, str(path))
    if head.format != FORMAT or kind not in (None, head.kind):
        found, wanted = f"{printable(head.kind, 60)} of format {head.format}", f"{kind or 'format'} {FORMAT}"
        raise ValueError(f"{folder} holds {found}, not {wanted}; give another folder")
    if head.kind in (Trajectories.kind, TrainedNetworks.kind):
        from_json(_BufferManifest, manifest, str(path))
    return dict(manifest)


@dataclass(frozen=True)
class _Manifest:
    """The fields that the manifest of every artifact has."""

    kind: str
    format: int
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class _Identity:
    """The fields of the identity of a buffer that are used here."""

    network: str
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = "trained"


@dataclass(frozen=True)
class _Expert:
    num_epochs: int

    def __post_init__(self) -> None:
        if self.num_epochs < 0:
            raise ValueError(f"an expert of {self.num_epochs} epochs")


_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class _BufferManifest:
    """The other fields of the manifest of a buffer; see ``BufferWriter.save``."""

    dataset: str
    identity: _Identity
    params: _Shapes
    buffers: _Shapes
    num_experts: int
    num_epochs: int
    experts: tuple[_Expert | None, ...]

    def __post_init__(self) -> None:
        sides = [side for _, shape in (*self.params, *self.buffers) for side in shape]
        if not all(0 <= side < 2**48 for side in sides):
            raise ValueError("it has a shape with a negative or far too long side")
        first_missing = self.experts.index(None) if None in self.experts else len(self.experts)
        extents = [expert.num_epochs for expert in self.experts[:first_missing] if expert is not None]
        said, listed = (self.num_experts, self.num_epochs), (len(extents), min(extents, default=0))
        if said != listed:
            raise ValueError(f"it says {said[0]} experts of {said[1]} epochs, and lists {listed[0]} of {listed[1]}")


@dataclass(frozen=True)
class _ExpertHeader:
    """The header of the file of one expert."""

    buffer: str
    rows: Mapping[str, Sequence[str]]
    """Checksums of the rows of each table."""


def folder_name(dataset: str, identity: Mapping[str, Any]) -> str:
    """The name of a buffer's folder: data set, network, and the first digits of the hash of its identity."""
    return "-".join([_slug(dataset), _slug(identity["network"]), _hash(_plain(identity))[:8]])


def expert_file(expert: int) -> str:
    return f"expert_{expert:04d}.safetensors"


def pack(tensors: Mapping[str, Tensor]) -> Tensor:
    """Parameters or buffers as one row: a float32 vector on the CPU that shares no memory with them."""
    parts = [tensor.detach().reshape(-1).to("cpu", torch.float32) for tensor in tensors.values()]
    return torch.cat([torch.empty(0), *parts])


def _unpack(row: Tensor, layout: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Tensor]:
    parts = row.split([math.prod(shape) for _, shape in layout])
    return {name: part.view(tuple(shape)) for (name, shape), part in zip(layout, parts, strict=True)}


def _checksum(row: Tensor) -> str:
    digest = hashlib.blake2b(f"{row.dtype} {tuple(row.shape)}\n".encode(), digest_size=16)
    digest.update(row.numpy().data)
    return digest.hexdigest()


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return dict(json.loads(canonical_json(value)))


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-.")


def _differences(wanted: Any, found: Any, where: str = "") -> list[str]:
    """Where ``found`` disagrees with ``wanted``; what ``wanted`` leaves out is open."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        pairs = [(f"{where}.{key}".lstrip("."), value, found.get(key)) for key, value in wanted.items()]
        return [line for name, ours, theirs in pairs for line in _differences(ours, theirs, name)]
    return [] if wanted == found else [f"{where} is {_brief(found)}, not {_brief(wanted)}"]


def _brief(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 40 else f"{text[:36]}..."
