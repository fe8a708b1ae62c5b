"""Reading and writing of files: writes are atomic, reads are validated, and pickles are never executed."""

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

from condense.names import printable, reason
from condense.schema import brief, from_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
_HARMLESS = 256 << 20  # bytes in memory that any file may need
_LARGEST_EXPANSION = 100
LONGEST_JSON = 32 << 20
"""Maximum bytes of a JSON file, or of the header of a safetensors file."""
LONGEST_YAML = 256 << 10
"""Maximum bytes of a YAML file."""
DEEPEST = 64
"""Maximum nesting depth of lists and mappings in a JSON or YAML file."""


def canonical_json(value: Any) -> str:
    """Convert a value to JSON with sorted keys and no spaces, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def expanded(path: Path | str) -> Path:
    """Convert to a path, with a leading ``~`` replaced by the home folder.

    Raises:
        ValueError: the home folder is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"cannot expand {path}: the home folder is not known; give the full path") from error


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file to write to, which replaces ``path`` on success and is removed on failure.

    Args:
        path: the file to write.
        keep: where to move the previous file at ``path``; None overwrites it.

    Raises:
        ValueError: the disk is full or not writable; existing files are unchanged.
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
    """Convert an OSError of a write to a ValueError with one line for the user."""
    try:
        yield
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "choose another location")
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; {fix}; existing files are unchanged"
        ) from error


_FIXES = {
    errno.ENOSPC: "free some space or choose another location",
    errno.EDQUOT: "your quota is used up: free some space or choose another location",
    errno.EROFS: "choose a writable location",
    errno.EACCES: "choose a location where you may write",
    errno.EPERM: "choose a location where you may write",
    errno.EIO: "the disk reports an error: check it or choose another location",
    errno.ENOENT: "create its parent folder",
}


@contextlib.contextmanager
def temporary(folder: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """Yield a new hidden file or folder in ``folder``, which is removed at the end unless it was renamed.

    It is locked while it is in use. Unlocked ones were left by killed processes and are removed by the next write to
    the same folder.

    Raises:
        OSError: it cannot be created.
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
    """Hold an exclusive lock for ``path`` among all processes and, on a shared disk, all machines.

    The lock file is ``.NAME.lock`` next to ``path``. The kernel releases the lock when its process ends in any way.
    There are no locks on Windows and, after a warning, on file systems without locks.

    Raises:
        BlockingIOError: another process holds the lock and ``wait`` is False; the message names the process.
        ValueError: the lock file cannot be written.
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


def is_locked(path: Path) -> bool:
    """Return whether another process on this machine holds the lock of ``locked(path)``; False where there are no
    locks."""
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        return try_lock(lock, stack, shared=True) is False
    return False


def content(folder: Path) -> list[Path]:
    """List a folder without the lock files and temporary files of this package."""
    return [path for path in folder.iterdir() if not _LOCK.fullmatch(path.name) and not _TEMPORARY.fullmatch(path.name)]


def check_writable(folder: Path) -> None:
    """Create a folder if it does not exist, and check that it is writable.

    Raises:
        ValueError: it is not, or its path has characters that compilers do not accept.
    """
    if not str(folder).isprintable():
        raise ValueError(f"the path {str(folder)!r} has characters that cannot be printed; choose another location")
    with reporting(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with temporary(folder) as probe:
            probe.write_bytes(bytes(4096))


def check_new_folder(folder: Path) -> None:
    """Raise ValueError if a folder cannot be created or is not writable. The check leaves no files behind."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with reporting(folder), temporary(existing):
        pass


def check_new_file(file: Path, content: str) -> None:
    """Raise ValueError if a file cannot be written. ``content`` names its content in the message."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give a file for the {content}")
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent} for the {content}; create it, or give another file")
    with reporting(file), temporary(file.parent):
        pass


def check_replaceable(file: Path, content: str, begins: bytes) -> None:
    """Raise ValueError if a file exists that does not begin with ``begins``, so that it is no earlier ``content``."""
    if file.is_file() and file.stat().st_size > 0:
        with open(file, "rb") as opened:
            if not opened.read(len(begins)).startswith(begins):
                raise ValueError(f"{file} exists already and is no {content}; give another path, or move it away")


_LOCK = re.compile(r"\..+\.lock")
_TEMPORARY = re.compile(r"\.condense-[0-9a-f]{32}\.tmp|\..+\.[0-9a-f]{32}\.tmp|\.checkpoint\.next\.safetensors")
"""Names of temporary files, including those of version 0.1.0."""

_YOUNG, _OLD = 60, 7 * 24 * 3600
"""Ages of temporary files in seconds. Below the first, a file may not be locked yet. Above the second, a file counts as
left behind on systems without locks."""


_PATIENCE = 0.2
"""Seconds for which a lock is asked for again that is held, since ``is_locked`` holds it for an instant."""


def _open_locked(lock: Path, path: Path, wait: bool) -> IO[bytes]:
    deadline = time.monotonic() + _PATIENCE
    while True:
        with reporting(path):
            file = open(lock, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read(300).decode(errors="replace")
            if time.monotonic() < deadline:
                time.sleep(_PATIENCE / 10)
                continue
            raise BlockingIOError(holder or "another process") from None
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(f"{lock.parent} has no locks ({reason}): use it from one process at a time", stacklevel=2)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        file.close()  # removed by its previous holder


def try_lock(path: Path, stack: contextlib.ExitStack, *, shared: bool = False) -> bool | None:
    """Lock a file or folder until ``stack`` is closed, exclusively or ``shared``.

    Returns:
        True if it is locked now, False if another process holds the lock, None if the system has no locks.

    Raises:
        OSError: it cannot be opened.
    """
    if fcntl is None:  # on Windows an open file cannot be renamed
        return None
    descriptor = os.open(path, os.O_RDONLY if shared or path.is_dir() else os.O_RDWR)
    stack.callback(os.close, descriptor)
    return try_lock_open(descriptor, shared=shared)


def try_lock_open(descriptor: int, *, shared: bool = False) -> bool | None:
    """Lock an open file like ``try_lock``, until its descriptor and all duplicates are closed."""
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
    """Remove temporary files of ended processes. Errors are ignored."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if _TEMPORARY.fullmatch(entry.name) and not entry.is_symlink()]:
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                age = time.time() - entry.stat().st_mtime
                free = age > _YOUNG and try_lock(Path(entry.path), stack)
                if free or (free is None and age > _OLD):
                    _remove(Path(entry.path), entry.is_dir())


def _remove(path: Path, is_folder: bool) -> None:
    """Remove a file or folder. Errors are ignored, so that they do not hide an earlier one."""
    if is_folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _sync_folder(folder: Path) -> None:
    """Flush a rename in a folder to disk, if the system supports it."""
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
    """Write a safetensors file with a JSON header, including checksums, under the metadata key ``condense``.

    ``keep`` is where to move the previous file at ``path``; None overwrites it.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {**header, "sha256": checksum(tensors)}
    header["header_sha256"] = _header_checksum(header)
    data = safetensors.torch.save(tensors, {"condense": canonical_json(header)})
    with replacing(path, keep) as fresh:
        fresh.write_bytes(data)


def save_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, with no copy of them in memory. Raises OSError if the file cannot be written, where
    the library raises an error of its own."""
    try:
        safetensors.torch.save_file(dict(tensors), path, dict(metadata))
    except safetensors.SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))
        code = int(match[1]) if match else errno.EIO
        raise OSError(code, os.strerror(code)) from error


def read_json(path: Path, *, fix: str, finite: bool = True) -> Any:
    """Read a JSON file; see ``parse_json``.

    Args:
        path: the file.
        fix: advice at the end of the error if the file cannot be read.
        finite: refuse NaN and infinities.

    Raises:
        ValueError: the file is missing, longer than ``LONGEST_JSON`` or cannot be parsed.
    """
    data = _read_bytes(path, LONGEST_JSON, fix)
    try:
        return parse_json(data, finite=finite)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; {fix}") from None


def parse_json(data: bytes | str, *, finite: bool = True) -> Any:
    """Parse a JSON text in UTF-8.

    Raises:
        ValueError: invalid JSON; a repeated key; nesting deeper than ``DEEPEST``; an integer of more than 100 digits;
            a number that is not finite, if ``finite``.
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
        raise ValueError(f"it is not valid JSON ({error.msg} in line {error.lineno})") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if _deeper(value):
        raise ValueError(_TOO_DEEP)
    return value


def read_yaml(path: Path, *, fix: str) -> Any:
    """Read a YAML file without anchors and aliases. The arguments are those of ``read_json``.

    Raises:
        ValueError: the file is missing, longer than ``LONGEST_YAML`` or not valid YAML; it has anchors, a repeated key
            or nesting deeper than ``DEEPEST``.
    """
    data = _read_bytes(path, LONGEST_YAML, fix)
    try:
        return yaml.load(data.decode("utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: it is not valid UTF-8 ({error.reason}); {fix}") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path} cannot be read: it is not valid YAML ({error.problem}{line}); {fix}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML does not catch errors of numbers and dates
        raise ValueError(f"{path} cannot be read: {reason(error)}; {fix}") from None


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a file written by ``write_tensors``.

    Raises:
        ValueError: the file is missing, truncated, damaged, or of another kind or format.
    """
    header = read_header(path)
    if header.get("kind") != kind or header.get("format") != FORMAT:
        actual = f"{printable(str(header.get('kind')), 60)} of format {brief(header.get('format'))}"
        raise ValueError(f"{path} holds a {actual}, not a {kind} of format {FORMAT}; give the right file")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {reason(error)}; restore it") from error
    if checksum(tensors) != header.get("sha256") or "header_sha256" not in header:
        raise ValueError(f"{path} is damaged: its checksum does not match its content; write it again or restore it")
    return tensors, header


def check_expansion(what: str, size: int, stored: int, fix: str) -> None:
    """Refuse a file whose content needs far more memory than disk space, before memory is allocated.

    Args:
        what: start of the error message.
        size: bytes in memory.
        stored: bytes on disk.
        fix: advice at the end of the error, for a file that is correct.

    Raises:
        ValueError: ``size`` is more than 256 MiB and more than 100 times ``stored``.
    """
    if size > max(_HARMLESS, _LARGEST_EXPANSION * stored):
        raise ValueError(
            f"{what} takes {size / 2**20:,.0f} MiB in memory and {stored / 2**20:,.1f} MiB on disk: more than "
            f"{_HARMLESS >> 20} MiB are allowed up to {_LARGEST_EXPANSION} times the size on disk only; {fix}"
        )


def read_foreign(path: Path, *, holds: str, save_as: str, allowed: Sequence[Any] = ()) -> Any:
    """Load a ``.pt`` file of unknown origin to the CPU. No code in it is executed.

    Args:
        path: the file.
        holds: the expected content, for the error.
        save_as: the form in which to save it, for the error.
        allowed: safe types that it may contain in addition to tensors, containers and numbers.

    Raises:
        ValueError: the file is missing, damaged or not a regular file, or contains other types.
    """
    require_file(path)
    check_expansion(str(path), _unpacked_size(path), path.stat().st_size, "save it again with torch.save")
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or holds objects other than {holds}, and loading those could run "
            f"arbitrary code; save it again as {save_as}"
        ) from error
    except Exception as error:  # the unpickler may raise anything for a damaged file
        raise ValueError(
            f"{path} cannot be read: it is truncated or no file of torch.save ({reason(error)}); get it again"
        ) from error


def _unpacked_size(path: Path) -> int:
    """Return the total uncompressed size that a zip file declares, or 0 for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    except Exception:  # the caller reports what is wrong
        return 0


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a Condense file without its tensors.

    Raises:
        ValueError: the file is missing or not a Condense file, or its size or checksum is wrong.
    """
    require_file(path)
    try:
        with _unbuffered(path) as file:
            layout = _layout(file)
        if "condense" not in layout.metadata:
            raise _Foreign
        header = parse_json(layout.metadata["condense"])
        if not isinstance(header, dict):
            raise ValueError("its header is not a mapping")
    except _Foreign:
        raise ValueError(
            f"{path} was not written by Condense: it has no `condense` header; for published files see "
            "`condense import --help`"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {error}; it may be truncated or of another kind, so restore it or "
            "give another file"
        ) from error
    if "header_sha256" in header and header["header_sha256"] != _header_checksum(header):
        raise ValueError(f"{path} is damaged: its checksum does not match its header; write it again or restore it")
    return header


def read_row(path: Path, name: str, index: int, width: int) -> Tensor:
    """Read one row of a float32 table (N, width) in a safetensors file, without reading the rest.

    Raises:
        OSError, ValueError: the file cannot be read or has no such row.
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
            raise ValueError(f"{path} is truncated")
        return row


def require_file(path: Path, fix: str = "check the path") -> None:
    """Raise ValueError if there is no regular file. Opening a pipe would block forever."""
    if not path.is_file():
        what = f"{path} is not a regular file" if path.exists() else f"there is no file {path}"
        raise ValueError(f"{what}; {fix}")


def _read_bytes(path: Path, longest: int, fix: str) -> bytes:
    require_file(path, fix)
    try:
        with open(path, "rb") as file:
            data = file.read(longest + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {fix}") from error
    if len(data) > longest:
        raise ValueError(f"{path} is longer than {longest >> 10} KiB, the limit for such a file; {fix}")
    return data


_TOO_DEEP = f"it is nested more than {DEEPEST} levels deep"


def _deeper(value: Any) -> bool:
    """Return whether lists and mappings are nested more than ``DEEPEST`` levels deep."""
    level = [value]
    for _ in range(DEEPEST + 1):
        holders = [item for item in level if isinstance(item, dict | list)]
        if not holders:
            return False
        level = [item for holder in holders for item in (holder.values() if isinstance(holder, dict) else holder)]
    return True


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {brief(next(name for name in names if names.count(name) > 1))} twice")
    return mapping


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
    """YAML without anchors and aliases, so that the value is not larger than its text."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(
                f"it has an anchor or alias in line {event.start_mark.line + 1}, so write the value out"
            )
        if self._depth > DEEPEST:
            raise yaml.YAMLError(_TOO_DEEP)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.YAMLError(f"it has a key twice in the mapping of line {node.start_mark.line + 1}")
        return mapping


class _Foreign(Exception):
    """A safetensors file without the header of Condense."""


@dataclass(frozen=True)
class _Entry:
    """A tensor in a safetensors file."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.shape) > 16 or not all(0 <= side < 2**48 for side in self.shape):
            raise ValueError(f"{brief(self.shape)} is not the shape of a tensor")
        begin, end = self.data_offsets
        if not 0 <= begin <= end or end - begin != _BYTES[self.dtype] * math.prod(self.shape):
            raise ValueError(f"bytes {begin} to {end} do not hold {self.dtype} of shape {list(self.shape)}")


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class _Layout:
    """The header of a safetensors file."""

    entries: Mapping[str, _Entry]
    metadata: Mapping[str, str]
    start: int
    """Offset of the first tensor in bytes."""


def _unbuffered(path: Path) -> FileIO:
    """Open a file without buffering and read-ahead, to read only the requested bytes."""
    file = open(path, "rb", buffering=0)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _layout(file: FileIO) -> _Layout:
    """Parse the header of a safetensors file. Raises ValueError if it is invalid or does not match the file size."""
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if length > min(LONGEST_JSON, size - 8):
        raise ValueError(f"its header is longer than the file or than {LONGEST_JSON >> 20} MiB")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata contain values other than text")
    entries = {name: from_json(_Entry, entry, f"its tensor {brief(name)}") for name, entry in header.items()}
    spans = sorted(entry.data_offsets for entry in entries.values())
    if any(before[1] != after[0] for before, after in itertools.pairwise([(0, 0), *spans, (size - 8 - length, 0)])):
        raise ValueError("its size does not match its header, or its tensors are not contiguous")
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
