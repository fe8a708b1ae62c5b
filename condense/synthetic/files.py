"""A synthetic set as one ``.safetensors`` file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from condense.files import FORMAT, expanded, read_tensors, write_tensors
from condense.synthetic.decode import DECODERS
from condense.synthetic.labels import LABELS
from condense.synthetic.set import Origin, SyntheticSet


def save(syn: SyntheticSet, path: Path | str) -> None:
    """Write the set; equal sets give equal bytes.

    Raises:
        ValueError: it cannot be written.
    """
    header = {
        "kind": "synthetic set",
        "format": FORMAT,
        "space": "transformed",
        "decode": _choice(syn.decode),
        "labels": _choice(syn.label_kind),
        "origin": dataclasses.asdict(syn.origin),
    }
    write_tensors(expanded(path), syn.state_dict(), header)


def load(path: Path | str) -> SyntheticSet:
    """Read a set written by ``save``, or the set of a run folder.

    Raises:
        ValueError: see ``read_tensors``; unknown decoder or labels; tensors that do not fit the header; values
            that are not finite.
    """
    path = expanded(path)
    if path.is_dir():
        path = path / "synthetic.safetensors"
    tensors, header = read_tensors(path, "synthetic set")
    try:
        origin = Origin(**header["origin"])
        decode = _choose(header["decode"], DECODERS)
        label_kind = _choose(header["labels"], LABELS)
        latents, classes = tensors["latents"], tensors["classes"]
        lr = tensors["log_lr"].exp() if "log_lr" in tensors else None
        if latents.shape[:1] != classes.shape:
            raise ValueError(f"{len(latents)} latents but {len(classes)} classes")
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < origin.num_classes:
            raise ValueError(f"classes outside 0..{origin.num_classes - 1}")
        syn = SyntheticSet(latents, classes, origin, decode=decode, label_kind=label_kind, lr=lr)
        syn.load_state_dict(tensors)
        with torch.no_grad():
            shape = tuple(syn.decoder(latents[:1], classes[:1]).shape[1:])
        if shape != origin.image_shape:
            raise ValueError(f"images of shape {shape}, the data set has {origin.image_shape}")
    except (KeyError, TypeError, RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit its own header: {reason}; write it again or restore it") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path} holds values that are not finite in `{name}`; distil it again")
    return syn


def _choice(value: Any) -> dict[str, Any]:
    return {"name": value.name, **dataclasses.asdict(value)}


def _choose(fields: dict[str, Any], table: dict[str, Any]) -> Any:
    fields = dict(fields)
    return table[fields.pop("name")](**fields)
