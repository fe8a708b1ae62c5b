"""Photos as people keep them: which files there are, their classes and their parts. Nothing is decoded here."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from condense.data.reading import check_names, entries
from condense.names import excerpt, printable, reason

Part = Literal["train", "test", "val"]

PARTS: Mapping[str, Part] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
"""Names of parts in any case, as folders, splits and columns have them."""

_COLUMNS = ("path", "label", "split")


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photo that was not opened yet. ``name`` is for messages; ``open`` returns its stored bytes."""

    name: str
    label: int
    open: Callable[[], BinaryIO]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The photos of a source in a fixed order.

    ``test`` is empty where there is no test part. ``strays`` are files that belong to no class. ``remarks`` are whole
    sentences about what is used in another way than the source may suggest.
    """

    train: Sequence[Photo]
    test: Sequence[Photo]
    classes: Sequence[str]
    strays: Sequence[str] = ()
    remarks: Sequence[str] = ()


def is_listing(path: Path) -> bool:
    """Return whether a path is a table of photos."""
    return path.suffix.lower() == ".csv"


def list_photos(source: Path) -> Listing:
    """Return the photos of a folder or of a table.

    A folder holds ``CLASS/*``, or ``train/CLASS/*`` with ``test/CLASS/*`` or ``val/CLASS/*``; folders within the folder
    of a class belong to the class. Files and folders whose names begin with a dot are left out. A table is a ``.csv``
    file with the columns ``path`` (relative to the table), ``label`` and, optionally, ``split``. Classes are sorted by
    name; those of a table by number if all are whole numbers.

    Raises:
        ValueError: there is no such source, it has no photos, or a part has a class that the training part lacks.
    """
    if is_listing(source):
        return _of_table(source)
    if not source.is_dir():
        raise ValueError(
            f"there is no folder of photos {excerpt(source)}: give a folder with a folder for each class, or a .csv "
            "file with the columns path and label"
        )
    return _of_folder(source)


def _of_folder(folder: Path) -> Listing:
    inside = entries(folder)
    parts: dict[Part, Path] = {}
    for path in inside:
        part = PARTS.get(path.name.lower())
        if part is None or not (path.is_dir() and any(below.is_dir() for below in entries(path))):
            continue
        if part in parts:
            raise ValueError(f"{folder} has {parts[part].name} and {path.name}: one {part} part is read; move one away")
        parts[part] = path
    if parts and "train" not in parts:
        first = next(iter(parts.values())).name
        raise ValueError(f"{folder} has a folder {first} and no folder train: networks need training photos; add it")
    parts = parts or {"train": folder}
    classes = check_names(str(folder), [path.name for path in entries(parts["train"]) if path.is_dir()])
    if not classes:
        raise ValueError(
            f"{parts['train']} has no folders: each class is a folder of its photos, named as the class; "
            "make the folders, or give a .csv file with the columns path and label"
        )
    strays = [str(path) for path in inside if path.is_file()]
    if parts["train"] != folder:
        strays += [f"{path}/*" for path in inside if path.is_dir() and path not in parts.values()]
        strays += [str(path) for root in parts.values() for path in entries(root) if path.is_file()]
    photos: dict[Part, list[Photo]] = {part: list(_of_part(root, classes)) for part, root in parts.items()}
    return _divided(str(folder), photos, classes, strays)


def _of_part(root: Path, classes: Sequence[str]) -> Iterator[Photo]:
    for folder in entries(root):
        if not folder.is_dir():
            continue
        if folder.name not in classes:
            raise ValueError(
                f"{folder} is a class that the training part lacks: there are {excerpt(', '.join(classes))}; "
                "rename it, move it away, or add training photos"
            )
        label = classes.index(folder.name)
        seen: set[str] = set()
        for path, below, names in os.walk(folder, onerror=_raise, followlinks=True):
            if os.path.realpath(path) in seen:  # a link to a folder above or beside it
                below.clear()
                continue
            seen.add(os.path.realpath(path))
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith("."):
                    file = Path(path, name)
                    yield Photo(name=str(file), label=label, open=_opener(file))


def _raise(error: OSError) -> None:
    raise ValueError(
        f"cannot read the folder {error.filename}: {reason(error)}; change its permissions or move it away"
    )


def _of_table(table: Path) -> Listing:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = [name.strip().lower() for name in next(rows, [])]
            if not {"path", "label"} <= set(header):
                raise ValueError(
                    f"cannot read {table}: its first line has to name the columns path, label and, optionally, split; "
                    "correct it"
                )
            columns = [header.index(name) for name in _COLUMNS if name in header]
            cells: list[tuple[int, list[str]]] = []
            for row in rows:
                where = f"{table}: line {rows.line_num}"
                if not any(row):
                    continue
                if len(row) <= max(columns):
                    raise ValueError(f"{where} has {len(row)} of {len(header)} columns; correct or remove it")
                if not row[header.index("label")].strip():
                    raise ValueError(f"{where} has no label; give one, or remove the line")
                cells.append((rows.line_num, [row[column].strip() for column in columns]))
    except (OSError, UnicodeError, csv.Error) as error:
        raise ValueError(f"cannot read {table}: {reason(error)}; give a .csv file in UTF-8") from error
    if not cells:
        raise ValueError(f"{table} lists no photos: it has no line after its first; add lines")
    names = {row[1] for _, row in cells}
    ordered = sorted(names)
    if all(map(str.isdecimal, names)):
        ordered.sort(key=int)
    classes = check_names(str(table), ordered)
    labels = {name: label for label, name in enumerate(classes)}
    photos: dict[Part, list[Photo]] = {}
    for line, (path, label, *split) in cells:
        part = PARTS.get(split[0].lower()) if split else "train"
        if part is None:
            raise ValueError(f"line {line} of {table} has the split {excerpt(split[0])!r}: give train, test or val")
        place = table.parent / path
        if not place.exists():
            raise ValueError(
                f"line {line} of {table}: there is no file {excerpt(place)}; paths are relative to the folder of the "
                "table; correct the line or remove it"
            )
        photos.setdefault(part, []).append(Photo(name=str(place), label=labels[label], open=_opener(place)))
    return _divided(str(table), photos, classes, [])


def _divided(source: str, photos: Mapping[Part, list[Photo]], classes: Sequence[str], strays: list[str]) -> Listing:
    """Return the listing of a source whose parts may include one for validation."""
    remarks = []
    if num_val := len(photos.get("val", ())):
        used = "it is left out, because there is a test part" if photos.get("test") else "it is the test part"
        remarks.append(f"the validation part has {num_val} photos: {used}")
    train, test = photos.get("train", []), photos.get("test") or photos.get("val", [])
    present = {photo.label for photo in train}
    for label, name in enumerate(classes):
        if label not in present:
            raise ValueError(
                f"{source} has no training photos of the class {printable(name)}: each class needs some; add photos, "
                "or remove the class"
            )
    return Listing(train=train, test=test, classes=classes, strays=strays, remarks=remarks)


def _opener(file: Path) -> Callable[[], BinaryIO]:
    def opened() -> BinaryIO:
        if not file.is_file():
            raise ValueError("it is not a regular file")
        return file.open("rb")

    return opened
