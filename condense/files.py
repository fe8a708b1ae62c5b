"""Files that describe themselves: atomic to write, checked to read, and never a pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import socket
import time
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any, Literal

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from condense.names import printable, reason, spelt
from condense.schema import brief, from_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
_HARMLESS = 256 << 20  # bytes that anything may take in memory
_LARGEST_EXPANSION = 100
LONGEST_JSON = 32 << 20
"""Bytes of a JSON file, or of the header of a safetensors file, that are read."""
LONGEST_YAML = 256 << 10
"""Bytes of a YAML file that are read."""
DEEPEST = 64
"""Levels of lists and mappings in a JSON or YAML file."""


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

    It is locked while it is in use. The lock tells what another process is writing from what a killed process left;
    the latter is removed when something is next written to the same folder.

    Raises:
        OSError: it cannot be made.
    """
    remove_leftovers(folder)
    path = folder / f".condense-{uuid.uuid4().hex}.tmp"
    try:
        if is_folder:
            path.mkdir()
        else:
            open(path, "xb").close()
        with contextlib.ExitStack() as lock:
            try_lock(path, lock)
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


def check_new_folder(folder: Path) -> None:
    """Raise ValueError where a folder cannot be made or written to. Nothing is left behind."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with reporting(folder), temporary(existing):
        pass


def check_new_file(file: Path, content: str) -> None:
    """Raise ValueError where a file cannot be written; ``content`` says what it is to hold. Nothing is left behind."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give a file for the {content} as {spelt('out')}")
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent} for the {content}; make it or give another {spelt('out')}")
    with reporting(file), temporary(file.parent):
        pass


_LOCK = re.compile(r"\..+\.lock")
_TEMPORARY = re.compile(r"\.condense-[0-9a-f]{32}\.tmp|\..+\.[0-9a-f]{32}\.tmp|\.checkpoint\.next\.safetensors")
"""Names that ``temporary`` makes, and those of version 0.1.0."""

_YOUNG, _OLD = 60, 7 * 24 * 3600
"""Ages in seconds: up to the first, a process may have made a temporary file and not locked it yet; beyond the second,
a temporary file counts as left behind where there are no locks."""


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


def try_lock(path: Path, stack: contextlib.ExitStack, *, shared: bool = False) -> bool | None:
    """Lock a file or folder until ``stack`` ends, alone or ``shared`` with others.

    Returns:
        Whether it is locked: False where another process holds it, None where there are no locks.

    Raises:
        OSError: it cannot be opened.
    """
    if fcntl is None:  # on Windows what is open cannot be renamed
        return None
    descriptor = os.open(path, os.O_RDONLY if shared or path.is_dir() else os.O_RDWR)
    stack.callback(os.close, descriptor)
    return try_lock_open(descriptor, shared=shared)


def try_lock_open(descriptor: int, *, shared: bool = False) -> bool | None:
    """``try_lock`` of an open file; the lock lasts until the descriptor and all duplicates of it are closed."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that ended; what cannot be removed stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if _TEMPORARY.fullmatch(entry.name) and not entry.is_symlink()]:
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                age = time.time() - entry.stat().st_mtime
                free = age > _YOUNG and try_lock(Path(entry.path), stack)
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


def read_json(path: Path, *, mend: str, finite: bool = True) -> Any:
    """The value in a JSON file; see ``parse_json``.

    Args:
        path: the file.
        mend: what to do about a file that cannot be read, for the error.
        finite: refuse NaN and infinities.

    Raises:
        ValueError: there is no such file; it is longer than ``LONGEST_JSON`` or cannot be parsed.
    """
    data = _read_bytes(path, LONGEST_JSON, mend)
    try:
        return parse_json(data, finite=finite)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; {mend}") from None


def parse_json(data: bytes | str, *, finite: bool = True) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is no JSON, has a key twice or is nested more than ``DEEPEST`` levels deep; a number of more than
            100 digits; a number that is not finite, where ``finite``.
    """
    constant = _not_finite if finite else float
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_mapping, parse_int=_whole, parse_float=_number, parse_constant=constant
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"it is not valid UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no valid JSON ({error.msg} in line {error.lineno})") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if _deeper(value):
        raise ValueError(_TOO_DEEP)
    return value


def read_yaml(path: Path, *, mend: str) -> Any:
    """The value in a YAML file, without anchors and aliases; the arguments are those of ``read_json``.

    Raises:
        ValueError: there is no such file; it is longer than ``LONGEST_YAML``, has anchors, has a key twice, is nested
            more than ``DEEPEST`` levels deep or cannot be parsed.
    """
    data = _read_bytes(path, LONGEST_YAML, mend)
    try:
        return yaml.load(data.decode("utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: it is not valid UTF-8 ({error.reason}); {mend}") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path} cannot be read: it is no valid YAML ({error.problem}{line}); {mend}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets errors of its numbers and dates through
        raise ValueError(f"{path} cannot be read: {reason(error)}; {mend}") from None


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by ``write_tensors``.

    Raises:
        ValueError: missing, not of this kind or format, truncated, or changed since it was written.
    """
    header = read_header(path)
    if header.get("kind") != kind or header.get("format") != FORMAT:
        found = f"{printable(str(header.get('kind')), 60)} of format {brief(header.get('format'))}"
        raise ValueError(f"{path} holds a {found}, not a {kind} of format {FORMAT}; give the right file")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {reason(error)}; restore it") from error
    if checksum(tensors) != header.get("sha256") or "header_sha256" not in header:
        raise ValueError(f"{path} is damaged: its checksum does not fit its content; write it again or restore it")
    return tensors, header


def check_expansion(what: str, size: int, stored: int, mend: str) -> None:
    """Refuse a file whose content would take far more memory than it has bytes, before the memory is taken.

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
    require_file(path)
    check_expansion(str(path), _unpacked_size(path), path.stat().st_size, "save it again with torch.save")
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or holds other objects than {holds}, and to read those may run any "
            f"code; save it again as {mend}"
        ) from error
    except Exception as error:  # whatever the unpickler meets in a damaged file: no list of types is complete
        raise ValueError(f"{path} cannot be read: {reason(error)}; it may be cut short, get it again") from error


def _unpacked_size(path: Path) -> int:
    """Bytes that the members of a zip file say they have; 0 of any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    except Exception:  # the reader that comes next says what is wrong with it
        return 0


def read_header(path: Path) -> dict[str, Any]:
    """The header of a Condense file, without reading its tensors.

    Raises:
        ValueError: there is no such file; it is not of this form, or its size or checksum does not fit.
    """
    require_file(path)
    try:
        with _unbuffered(path) as file:
            layout = _layout(file)
        if "condense" not in layout.metadata:
            raise _Foreign
        header = parse_json(layout.metadata["condense"])
        if not isinstance(header, dict):
            raise ValueError("its header is no mapping")
    except _Foreign:
        raise ValueError(
            f"{path} was not written by Condense: it has no `condense` header; for published files see "
            "`condense import --help`"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {error}; it may be cut short or of another kind, so restore it or "
            "give another file"
        ) from error
    if "header_sha256" in header and header["header_sha256"] != _header_checksum(header):
        raise ValueError(f"{path} is damaged: its checksum does not fit its header; write it again or restore it")
    return header


def read_row(path: Path, name: str, index: int, width: int) -> Tensor:
    """One row of a float32 table of this width in a safetensors file, and no other byte of it.

    Raises:
        OSError, ValueError: the file is not of this form.
    """
    with _unbuffered(path) as file:
        layout = _layout(file)
        entry = layout.entries.get(name)
        if entry is None or entry.dtype != "F32" or len(entry.shape) != 2 or not 0 <= index < entry.shape[0]:
            raise ValueError(f"{path} has no float32 row {index} in {name}")
        if entry.shape[1] != width:
            raise ValueError(f"{path} has rows of {entry.shape[1]} numbers in {name}, not of {width}")
        file.seek(layout.start + entry.data_offsets[0] + 4 * width * index)
        row = torch.empty(width)
        if file.readinto(row.numpy().data.cast("B")) != 4 * width:
            raise ValueError(f"{path} is cut short")
        return row


def require_file(path: Path, mend: str = "check the path") -> None:
    """Raise ValueError where there is no regular file: to open a pipe would wait for ever."""
    if not path.is_file():
        what = f"{path} is no file" if path.exists() else f"there is no file {path}"
        raise ValueError(f"{what}; {mend}")


def _read_bytes(path: Path, longest: int, mend: str) -> bytes:
    require_file(path, mend)
    try:
        with open(path, "rb") as file:
            data = file.read(longest + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {mend}") from error
    if len(data) > longest:
        raise ValueError(f"{path} is longer than the {longest >> 10} KiB that are read of such a file; {mend}")
    return data


_TOO_DEEP = f"it is nested more than {DEEPEST} levels deep"


def _deeper(value: Any) -> bool:
    """Whether lists and mappings are nested more than ``DEEPEST`` levels deep."""
    level = [value]
    for _ in range(DEEPEST + 1):
        holders = [item for item in level if isinstance(item, dict | list)]
        if not holders:
            return False
        level = [item for holder in holders for item in (holder.values() if isinstance(holder, dict) else holder)]
    return True


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {brief(next(name for name in names if names.count(name) > 1))} twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > 100:
        raise ValueError("it has a number of more than 100 digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _not_finite(digits)


def _not_finite(text: str) -> float:
    raise ValueError(f"it has the number {brief(text)}, which is not finite")


class _Loader(yaml.SafeLoader):
    """Plain YAML: a tree that is as large as its text."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(f"it has an anchor or alias in line {event.start_mark.line + 1}, write the value out")
        if self._depth > DEEPEST:
            raise yaml.YAMLError(_TOO_DEEP)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep=deep)
        if len(found) != len(node.value):
            raise yaml.YAMLError(f"it has a key twice in the mapping of line {node.start_mark.line + 1}")
        return found


class _Foreign(Exception):
    """A safetensors file without our header."""


@dataclass(frozen=True)
class _Entry:
    """A tensor in a safetensors file."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.shape) > 16 or not all(0 <= side < 2**48 for side in self.shape):
            raise ValueError(f"{brief(self.shape)} is no shape of a tensor")
        begin, end = self.data_offsets
        if not 0 <= begin <= end or end - begin != _BYTES[self.dtype] * math.prod(self.shape):
            raise ValueError(f"bytes {begin} to {end} do not hold {self.dtype} of shape {list(self.shape)}")


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class _Layout:
    """What the first part of a safetensors file says."""

    entries: Mapping[str, _Entry]
    metadata: Mapping[str, str]
    start: int
    """Where the bytes of the tensors begin."""


def _unbuffered(path: Path) -> FileIO:
    """For reading what is asked for: a memory map, or a buffer, reads ahead."""
    file = open(path, "rb", buffering=0)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _layout(file: FileIO) -> _Layout:
    """Raises ValueError where it is of another form, or promises more or less than the file holds."""
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if length > min(LONGEST_JSON, size - 8):
        raise ValueError(f"its header is longer than the file or than {LONGEST_JSON >> 20} MiB")
    found = parse_json(file.read(length))
    if not isinstance(found, dict):
        raise ValueError("its header is no mapping")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata hold something else than text")
    entries = {name: from_json(_Entry, entry, f"its tensor {brief(name)}") for name, entry in found.items()}
    spans = sorted(entry.data_offsets for entry in entries.values())
    if any(before[1] != after[0] for before, after in itertools.pairwise([(0, 0), *spans, (size - 8 - length, 0)])):
        raise ValueError("its size is not what it says, or its tensors do not lie one after the other")
    return _Layout(entries, metadata, 8 + length)


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
