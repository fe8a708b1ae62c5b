"""Files that describe themselves: atomic to write, checked to read, and never a pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
_LONGEST_HEADER = 100 << 20  # bytes, as of the format


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def expanded(path: Path | str) -> Path:
    """A path as a user gave it, with the home folder in the place of a leading ``~``.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"cannot expand {path}: the home folder is not known; give the whole path") from error


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """A temporary file to write to; on success it is synced and takes the place of ``path``, else it is removed.

    Args:
        path: the file to be written.
        keep: where the file goes that was at ``path`` before; None: it is overwritten.

    Raises:
        ValueError: the disk is full or not writable; what was there before is unchanged.
    """
    with reporting(path), temporary(path.parent) as fresh:
        yield fresh
        with open(fresh, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(fresh, path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn what the system says of a write into one line for the user."""
    try:
        yield
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, "choose another place")
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; {mend}; what was there before is unchanged"
        ) from error


_MENDS = {
    errno.ENOSPC: "make room or choose another place",
    errno.EDQUOT: "your quota is used up: make room or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you are allowed to write to",
    errno.EPERM: "choose a place that you are allowed to write to",
    errno.EIO: "the disk reports a fault: check it or choose another place",
    errno.ENOENT: "make the folder that it is to lie in",
}


@contextlib.contextmanager
def temporary(folder: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """A new hidden file (or folder) in ``folder`` to write to; at the end it is removed, unless it was renamed.

    It is locked while it is in use. So what a killed process left is told from what another process is writing, and
    is removed when the same folder is next written to.

    Raises:
        OSError: it cannot be made.
    """
    _remove_leftovers(folder)
    path = folder / f".condense-{uuid.uuid4().hex}.tmp"
    try:
        if is_folder:
            path.mkdir()
        else:
            open(path, "xb").close()
        with contextlib.ExitStack() as lock:
            _lock(path, lock)
            yield path
    finally:
        _remove(path, is_folder)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of the name ``path`` among all processes, and on a shared disk among all machines.

    The lock is the file ``.NAME.lock`` beside ``path``. The kernel releases it when its holder ends, however that
    happens. On Windows, and with a warning on file systems without locks, nothing is held.

    Raises:
        BlockingIOError: without ``wait``, where another process holds it; the message says which.
        ValueError: the file of the lock cannot be written.
    """
    if fcntl is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with _open_locked(lock, path, wait) as file:
        try:
            with contextlib.suppress(OSError):
                os.truncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(lock)


def content(folder: Path) -> list[Path]:
    """What lies in a folder besides locks and temporary files of this package."""
    return [path for path in folder.iterdir() if not _LOCK.fullmatch(path.name) and not _TEMPORARY.fullmatch(path.name)]


def check_writable(folder: Path) -> None:
    """Make a folder where there is none, and write to it.

    Raises:
        ValueError: that fails, or its path has characters that compilers do not take.
    """
    if not str(folder).isprintable():
        raise ValueError(f"the path {str(folder)!r} has characters that cannot be printed; choose another place")
    with reporting(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with temporary(folder) as probe:
            probe.write_bytes(bytes(4096))


_LOCK = re.compile(r"\..+\.lock")
_TEMPORARY = re.compile(r"\.condense-[0-9a-f]{32}\.tmp|\..+\.[0-9a-f]{32}\.tmp|\.checkpoint\.next\.safetensors")
"""Names that ``temporary`` makes, and those of version 0.1.0."""

_YOUNG, _OLD = 60, 7 * 24 * 3600
"""Seconds for which a temporary file may be about to be locked, and after which none is written any more."""


def _open_locked(lock: Path, path: Path, wait: bool) -> IO[bytes]:
    while True:
        with reporting(path):
            file = open(lock, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read(300).decode(errors="replace")
            raise BlockingIOError(holder or "another process") from None
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(f"{lock.parent} has no locks ({reason}): use it from one process at a time", stacklevel=2)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        file.close()  # the holder before removed it


def _lock(path: Path, stack: contextlib.ExitStack) -> bool | None:
    """Lock a file or folder until ``stack`` ends; False: another process has it, None: there are no locks."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that ended; what cannot be removed stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if _TEMPORARY.fullmatch(entry.name) and not entry.is_symlink()]:
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                age = time.time() - entry.stat().st_mtime
                free = age > _YOUNG and _lock(Path(entry.path), stack)
                if free or (free is None and age > _OLD):
                    _remove(Path(entry.path), entry.is_dir())


def _remove(path: Path, is_folder: bool) -> None:
    """Remove what can be removed; whatever hinders it must not hide why this was called."""
    if is_folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _sync_folder(folder: Path) -> None:
    """Let a rename in a folder last, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], *, keep: Path | None = None) -> None:
    """Tensors and one JSON header under the metadata key ``condense``; the header gains a checksum of the bytes.

    ``keep`` is where the file goes that was at ``path`` before, if it is to be kept.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {**header, "sha256": checksum(tensors)}
    header["header_sha256"] = _header_checksum(header)
    data = safetensors.torch.save(tensors, {"condense": canonical_json(header)})
    with replacing(path, keep) as fresh:
        fresh.write_bytes(data)


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


def read_foreign(path: Path, *, holds: str, mend: str, allowed: Sequence[Any] = ()) -> Any:
    """The content of a ``.pt`` file that others wrote, on the CPU; nothing in it is run.

    Args:
        path: the file.
        holds: what it should hold, and ``mend`` how to save it, for the error.
        allowed: harmless types that it may hold besides tensors, containers and numbers.

    Raises:
        ValueError: it is damaged, missing, or holds something else.
    """
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or holds other objects than {holds}, and to read those may run any "
            f"code; save it again as {mend}"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason[:120]}; it may be cut short, get it again") from error


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
