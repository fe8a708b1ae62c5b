"""Files that describe themselves: atomic to write, checked to read, and never a pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT = 1
_LONGEST_HEADER = 100 << 20  # bytes, as of the format
_HARMLESS = 256 << 20  # bytes that anything may take in memory
_LARGEST_EXPANSION = 100


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
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}; restore it") from error
    if checksum(tensors) != header.get("sha256") or "header_sha256" not in header:
        raise ValueError(f"{path} is damaged: its checksum does not fit its content; write it again or restore it")
    return tensors, header


def check_expansion(what: str, size: int, stored: int, mend: str) -> None:
    """Refuse what a few stored bytes say that they hold, before memory is taken for it.

    Args:
        what: the culprit, for the message.
        size: bytes in memory.
        stored: bytes on disk.
        mend: what helps where the content is right after all.

    Raises:
        ValueError: more than 256 MiB, and more than a hundred times what is stored.
    """
    if size > max(_HARMLESS, _LARGEST_EXPANSION * stored):
        raise ValueError(
            f"{what} takes {size / 2**20:,.0f} MiB in memory and {stored / 2**20:,.1f} MiB on disk: what takes more "
            f"than {_HARMLESS >> 20} MiB may take at most {_LARGEST_EXPANSION} times as much as on disk; {mend}"
        )


def read_foreign(path: Path, *, holds: str, mend: str, allowed: Sequence[Any] = ()) -> Any:
    """The content of a ``.pt`` file that others wrote, on the CPU; nothing in it is run.

    Args:
        path: the file.
        holds: what it should hold, and ``mend`` how to save it, for the error.
        allowed: harmless types that it may hold besides tensors, containers and numbers.

    Raises:
        ValueError: it is damaged, missing, no ordinary file, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file that can be read; check the path")
    check_expansion(str(path), _unpacked_size(path), path.stat().st_size, "save it again with torch.save")
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or holds other objects than {holds}, and to read those may run any "
            f"code; save it again as {mend}"
        ) from error
    except Exception as error:  # a damaged file raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason[:120]}; it may be cut short, get it again") from error


def _unpacked_size(path: Path) -> int:
    """Bytes that the members of a zip file say they have; 0 of any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    except Exception:  # the reader that comes next says what is wrong with it
        return 0


def read_header(path: Path) -> dict[str, Any]:
    """The header of a Condense file, without reading its tensors."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; check the path")
    try:
        with _unbuffered(path) as file:
            layout, start = _layout(file)
        ends = [entry["data_offsets"][1] for name, entry in layout.items() if name != "__metadata__"]
        if path.stat().st_size != start + max(ends, default=0):
            raise ValueError("its size is not what it says")
        header = dict(json.loads(layout.get("__metadata__", {})["condense"]))
    except KeyError:
        raise ValueError(
            f"{path} was not written by Condense: it has no `condense` header; for published files see "
            "`condense import --help`"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}; it may be cut short, restore it") from error
    if "header_sha256" in header and header["header_sha256"] != _header_checksum(header):
        raise ValueError(f"{path} is damaged: its checksum does not fit its header; write it again or restore it")
    return header


def read_row(path: Path, name: str, index: int) -> Tensor:
    """One row of a float32 table in a safetensors file, and no other byte of it.

    Raises:
        OSError, ValueError, KeyError, TypeError: the file is not of this form.
    """
    with _unbuffered(path) as file:
        layout, start = _layout(file)
        num_rows, width = layout[name]["shape"]
        if layout[name]["dtype"] != "F32" or not 0 <= index < num_rows:
            raise ValueError(f"{path} has no float32 row {index} in {name}")
        file.seek(start + layout[name]["data_offsets"][0] + 4 * width * index)
        row = torch.empty(width)
        if file.readinto(row.numpy().data.cast("B")) != 4 * width:
            raise ValueError(f"{path} is cut short")
        return row


def _unbuffered(path: Path) -> FileIO:
    """For reading what is asked for: a memory map, or a buffer, reads ahead."""
    file = open(path, "rb", buffering=0)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _layout(file: FileIO) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file: its entries, and where the data begin."""
    length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError("its header is longer than any")
    return dict(json.loads(file.read(length))), 8 + length


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
