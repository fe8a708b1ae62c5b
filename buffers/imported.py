"""Import of networks that others trained: single ones, and published trajectories.

Trajectories are ``replay_buffer_N.pt``, as the code of MTT and its descendants writes it. Each file is a list of
experts, an expert a list of epochs (the initialisation first), an epoch a list of tensors: the parameters in the order
of the network, without names. Nothing says on which data or how they were trained, so they are matched on the shapes of
the parameters alone and the caller says the rest. The statistics of BatchNorm were never stored.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense.artifacts import IMPORTED, BufferWriter, pack
from condense.buffers.trajectories import measure_accuracy
from condense.compute import Compute
from condense.exchange.weights import match, read_state_dict
from condense.files import checksum, read_foreign
from condense.names import spelt
from condense.networks import Functional, Weights
from condense.rng import Rng
from condense.task import Task
from condense.train import Scorer


def import_replay_buffers(
    src: Path, dst_root: Path, task: Task, *, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write published trajectories as a buffer under ``dst_root`` and return its folder.

    The buffer becomes visible once all of it is written. It says ``origin: imported`` and leaves open how its
    experts were trained; a warning says what could not be checked.

    Args:
        src: a folder of ``replay_buffer_N.pt``, or one such file. One file at a time is held in memory.
        dst_root: folder of buffers.
        task: the data set, split, transform and network that the user says they belong to.
        progress: called with (files done, files).

    Raises:
        ValueError: no such files; something else than lists of tensors in them; tensors that do not fit the
            network; snapshots that are all the same; the buffer exists already or cannot be written.
    """
    files = _files(src)
    params = task.network.init(Rng(0), "layout").params
    identity = {**task.identity(), "origin": IMPORTED}
    writer = BufferWriter(dst_root, task.name, identity, Weights(params, {}))
    if writer.experts:
        raise ValueError(f"{writer.folder} was imported already; move it away or choose another destination")
    for done, file in enumerate(files, 1):
        for number, expert in enumerate(_items(_load(file), str(file), "experts")):
            table = _table(expert, task.network, f"{file}, expert {number}")
            writer.add(len(writer.experts), table, table[:, :0], {"origin": IMPORTED})
        if progress is not None:
            progress(done, len(files))
    writer.save()
    warnings.warn(
        f"{len(writer.experts)} experts were imported to {writer.folder} by the shapes of their parameters: "
        f"that they belong to {task.name}, this transform and network is your word, the files do not say it",
        stacklevel=2,
    )
    return writer.folder


def import_weights(src: Path, dst_root: Path, task: Task) -> Path:
    """Write one network that others trained as a buffer of its last epoch under ``dst_root``, and return its folder.

    Its manifest says ``origin: imported``, and its accuracy on at most 5000 of the training images and, where there is
    one, on the validation split. How it was trained stays open.

    Args:
        src: a state dict, see ``condense.exchange.weights``.
        dst_root: folder of buffers.
        task: the data set, split, transform and network that the user says it belongs to.

    Raises:
        ValueError: no state dict, or one that does not fit the network; the same weights were imported already; the
            folder cannot be written. Nothing half-written stays.
    """
    network = task.network
    weights = match(read_state_dict(src), network, str(src))
    digest = checksum({**weights.params, **weights.buffers})
    identity = {**task.identity(), "origin": IMPORTED, "weights": digest}
    writer = BufferWriter(dst_root, task.name, identity, weights, "last")
    if writer.experts:
        raise ValueError(f"{writer.folder} holds these weights already; use it, or choose another destination")
    accuracies = measure_accuracy(task, Scorer(network, Compute(compile=False)), Rng(0))(weights)
    is_new = not writer.folder.exists()
    try:
        params, buffers = (pack(part)[None] for part in weights)
        record = {"origin": IMPORTED, **{name: [value] for name, value in accuracies.items()}}
        writer.add(0, params, buffers, record, num_epochs=0)
        writer.save()
    except BaseException:
        if is_new:
            shutil.rmtree(writer.folder, ignore_errors=True)
        raise
    return writer.folder


def _files(src: Path) -> list[Path]:
    if src.is_file():
        return [src]
    names = [(re.fullmatch(r"replay_buffer_(\d+)\.pt", path.name), path) for path in src.glob("*.pt")]
    numbered = sorted((int(match[1]), path) for match, path in names if match)
    if not numbered:
        raise ValueError(f"no replay_buffer_N.pt in {src}: nothing to import; give the folder of these files")
    return [path for _, path in numbered]


def _load(file: Path) -> Any:
    return read_foreign(file, holds="lists of tensors", save_as="a list of lists of lists of tensors")


def _items(value: Any, where: str, what: str) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        found = "an empty one" if isinstance(value, list | tuple) else type(value).__name__
        raise ValueError(f"{where}: a list of {what} was expected, found {found}; give files as MTT's code writes them")
    return list(value)


def _table(expert: Any, network: Functional, where: str) -> Tensor:
    """The snapshots of one expert as (E + 1, P)."""
    rows = []
    for epoch, value in enumerate(_items(expert, where, "epochs")):
        tensors = _items(value, f"{where}, epoch {epoch}", "tensors")
        if len(tensors) != len(network.shapes):
            raise ValueError(
                f"{where}, epoch {epoch}: {len(tensors)} tensors, {network.name} has {len(network.shapes)}; "
                f"give {spelt('network')} as they were trained"
            )
        snapshot = dict(zip(network.shapes, tensors, strict=True))
        for name, tensor in snapshot.items():
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            if found != network.shapes[name]:
                raise ValueError(
                    f"{where}, epoch {epoch}: {found} where {name} of {network.name} is "
                    f"{network.shapes[name]}; give {spelt('network')} and {spelt('dataset')} as they were trained"
                )
        rows.append(pack(snapshot))
    if len(rows) < 2 or torch.equal(rows[0], rows[-1]):
        raise ValueError(
            f"{where}: the first and the last snapshot are the same, which is no trajectory (on a CPU MTT's "
            "code stores the final weights for every epoch); train experts with `condense buffer`"
        )
    return torch.stack(rows)
