"""Files that describe themselves: atomic to write, checked to read, and never a pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT = 1


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; on success it is synced and takes the place of ``path``, else it is removed.

    Raises:
        ValueError: the disk is full or not writable; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # machines that share a disk share process ids
    try:
        with reporting(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn what the system says of a write into one line for the user."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another place, what was there before "
            "is unchanged"
        ) from error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Tensors and one JSON header under the metadata key ``condense``; the header gains a checksum of the bytes."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {**header, "sha256": checksum(tensors)}
    header["header_sha256"] = _header_checksum(header)
    data = safetensors.torch.save(tensors, {"condense": canonical_json(header)})
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by ``write_tensors``.

    Raises:
        ValueError: missing, not of this kind or format, truncated, or changed since it was written.
    """
    header = read_header(path)
    if header.get("kind") != kind or header.get("format") != FORMAT:
        found = f"{header.get('kind')} of format {header.get('format')}"
        raise ValueError(f"{path} holds a {found}, not a {kind} of format {FORMAT}; give the right file")
    tensors = safetensors.torch.load_file(path)
    if checksum(tensors) != header.get("sha256") or "header_sha256" not in header:
        raise ValueError(f"{path} is damaged: its checksum does not fit its content; write it again or restore it")
    return tensors, header


def read_header(path: Path) -> dict[str, Any]:
    """The header of a Condense file, without reading its tensors."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; check the path")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        header = dict(json.loads(metadata["condense"]))
    except KeyError:
        raise ValueError(
            f"{path} was not written by Condense: it has no `condense` header; for published files see "
            "`condense import --help`"
        ) from None
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}; it may be cut short, restore it") from error
    if "header_sha256" in header and header["header_sha256"] != _header_checksum(header):
        raise ValueError(f"{path} is damaged: its checksum does not fit its header; write it again or restore it")
    return header


def _header_checksum(header: Mapping[str, Any]) -> str:
    content = {name: value for name, value in header.items() if name != "header_sha256"}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
