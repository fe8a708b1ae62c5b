"""Photos of any sizes and formats become one data set file.

Each photo is decoded once, by several threads, into its rows of an array on disk, so memory does not grow with their
number.
"""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import warnings
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from condense.data.listing import Listing, Photo
from condense.data.pixels import Array
from condense.data.reading import FORMATS, MOST_PIXELS, orientation, oriented, require_8_bit_colours
from condense.files import replacing, reporting, temporary
from condense.names import excerpt, printable, reason, speaks_flags, spelt
from condense.schema import Checked
from condense.tracking import progress

if TYPE_CHECKING:
    from PIL import Image

Fit = Literal["crop", "pad", "stretch"]

_USUAL_TEST_FRACTION = 0.2
_WAITING = 1024
"""Number of photos that wait for a thread."""
_BLOCK = 1 << 20
"""Number of bytes that are copied together."""
_NAMED = 3
"""Number of files that a message names."""
_BITS_16 = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""PIL's modes of gray images with 16 bits; some versions read 16 bits as ``I``."""


@dataclass(frozen=True, kw_only=True)
class Preparation(Checked):
    """How photos become the images of a data set."""

    size: int | None = None
    """Rows and columns of the images. Needed where the photos differ in size."""
    fit: Fit = "crop"
    """How a photo becomes a square: crop (the shorter side has the size, and the middle is kept), pad (the longer side
    has the size, and the rest has the colour of the background) or stretch."""
    background: str = "white"
    """Colour behind transparent pixels and around padded photos, as a name or #rrggbb."""
    white: int = 65535
    """Value of white in gray photos of 16 bits, e.g. 4095 where 12 of them are used."""
    test_fraction: float | None = None
    """Fraction of each class that becomes the test part, for photos without one. Unset: 0.2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        from PIL import ImageColor

        if self.size is not None and not 1 <= self.size**2 <= MOST_PIXELS:
            raise ValueError(f"size must lie in 1..{math.isqrt(MOST_PIXELS)}, got {self.size}; try {spelt('size', 64)}")
        if not 1 <= self.white <= 65535:
            raise ValueError(f"white must lie in 1..65535, got {self.white}; 12 bits have {spelt('white', 4095)}")
        if self.fit != "crop" and self.size is None:
            raise ValueError(f"fit={self.fit} makes squares of a size; give {spelt('size', 64)}")
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise ValueError(
                f"test_fraction must lie between 0 and 1, got {self.test_fraction}; try {spelt('test_fraction', 0.2)}"
            )
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(
                f"background is the unknown colour {excerpt(self.background)!r}; give a name such as black, or #rrggbb"
            ) from error

    @property
    def colour(self) -> tuple[int, int, int]:
        """The background in RGB."""
        from PIL import ImageColor

        red, green, blue, *_ = ImageColor.getrgb(self.background)
        return red, green, blue


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What ``prepare`` wrote.

    ``num_train`` and ``num_test`` are numbers of images, each of ``input_shape`` (C, H, W). ``remarks`` are what a user
    should know about photos that were left out or changed in other ways than asked.
    """

    path: Path
    num_train: int
    num_test: int
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What is known of a photo once it was decoded. ``shape``: (H, W) as it is shown. ``deepest``: its largest value if
    it has 16 bits. ``key``: the hash of its stored bytes. ``failure``: why it could not be read; all else is unset."""

    shape: tuple[int, int] = (0, 0)
    gray: bool = True
    deepest: int | None = None
    key: bytes = b""
    failure: str = ""


def command(source: str | Path, size: int | None = 64) -> str:
    """Return the command, or the call, that prepares photos at a path, for messages."""
    out = f"{Path(source).resolve().stem}.npz"
    if speaks_flags():
        return shlex.join(["condense", "prepare", str(source), out, *(["--size", str(size)] if size else [])])
    return f"condense.prepare({str(source)!r}, {out!r}{f', size={size}' if size else ''})"


def prepare(listing: Listing, source: str, target: Path, plan: Preparation) -> Prepared:
    """Decode the photos of a listing and write them as an ``.npz`` data set, uint8 with layout NCHW.

    The images have one channel if all are gray, else three. Photos that cannot be read are left out. Without a test
    part, the photos of each class are ordered by the hash of their bytes and the first become the test part, so that
    the parts depend neither on names nor on the machine, and copies of a photo are in one part.

    Args:
        source: what the photos are called in messages.
        target: the file to write.

    Raises:
        ValueError: the photos differ in size and the plan has none; a class has no photo that can be read; there are
            two test parts; the disk is full.
    """
    if listing.test and plan.test_fraction is not None:
        raise ValueError(
            f"{source} has a test part of {len(listing.test)} photos: {spelt('test_fraction')} is for photos without "
            "one; leave it out"
        )
    photos = [*listing.train, *listing.test]
    shape = (plan.size, plan.size) if plan.size else _first_shape(photos, plan)
    with reporting(target), temporary(target.parent) as store:
        pixels = _reserved(store, (len(photos), 3, *shape))
        seen = _decode(photos, pixels, plan, source)
        readable = np.array([not one.failure for one in seen])
        is_test = np.arange(len(photos)) >= len(listing.train)
        labels = np.array([photo.label for photo in photos], dtype=np.int64)
        if not listing.test:
            fraction = _USUAL_TEST_FRACTION if plan.test_fraction is None else plan.test_fraction
            is_test = _drawn(labels, [one.key for one in seen], readable, fraction)
        train, test = np.flatnonzero(readable & ~is_test), np.flatnonzero(readable & is_test)
        _check_classes(listing, labels[train], source, photos, seen)
        if not len(test):
            raise ValueError(f"{source} has no test photo that can be read: add photos of all classes")
        channels = 1 if all(one.gray for one in seen) else 3
        _write(target, pixels[:, :channels], labels, train, test, listing.classes)
        del pixels
    remarks = [*listing.remarks, *_remarks(listing, photos, seen, plan, set(train.tolist()), test.tolist())]
    return Prepared(
        path=target,
        num_train=len(train),
        num_test=len(test),
        input_shape=(channels, *shape),
        classes=tuple(listing.classes),
        remarks=tuple(remarks),
    )


def _reserved(file: Path, shape: tuple[int, ...]) -> Array:
    """Return an array of uint8 in a file. Its space is taken now: a disk that is full later would end the process."""
    if hasattr(os, "posix_fallocate"):
        with file.open("rb+") as opened:
            os.posix_fallocate(opened.fileno(), 0, math.prod(shape))
    return np.memmap(file, np.uint8, "r+" if hasattr(os, "posix_fallocate") else "w+", shape=shape)


def _first_shape(photos: Sequence[Photo], plan: Preparation) -> tuple[int, int]:
    """Return the shape of the first photo that can be read."""
    for photo in photos:
        seen = _into(photo, None, plan)
        if not seen.failure:
            return seen.shape
    raise ValueError(f"{photos[0].name} and all others cannot be read: {seen.failure}; give photos")


def _decode(photos: Sequence[Photo], pixels: Array, plan: Preparation, source: str) -> list[_Seen]:
    """Decode all photos into the rows of ``pixels`` (N, 3, H, W)."""
    seen: list[_Seen] = []
    height, width = pixels.shape[2:]
    with (
        warnings.catch_warnings(action="ignore"),
        ThreadPoolExecutor() as threads,
        progress(f"prepare {source}", len(photos)) as bar,
    ):
        for first in range(0, len(photos), _WAITING):
            some = photos[first : first + _WAITING]
            for one in threads.map(lambda photo, row: _into(photo, row, plan), some, pixels[first : first + _WAITING]):
                name = photos[len(seen)].name
                if plan.size is None and not one.failure and one.shape != (height, width):
                    raise ValueError(
                        f"{name} is {one.shape[1]}x{one.shape[0]}, the photos before it are {width}x{height}: the "
                        f"images of a data set have one size; give {spelt('size', 64)}"
                    )
                if one.deepest is not None and one.deepest > plan.white:
                    raise ValueError(
                        f"{name} has the value {one.deepest}, which is more than white, {plan.white}: give "
                        f"{spelt('white', one.deepest)} or more"
                    )
                seen.append(one)
                bar(len(seen))
    return seen


def _deepest(pixels: Array) -> int:
    """Return the largest of 16-bit pixels, which may be stored in 32 bits. Raises ValueError if they have more."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"its pixels go from {pixels.min()} to {pixels.max()}, and photos have at most 16 bits")
    return int(pixels.max())


def _into(photo: Photo, row: Array | None, plan: Preparation) -> _Seen:
    """Decode a photo into ``row`` (3, H, W), if one is given and fits, and return what was seen."""
    from PIL import Image, UnidentifiedImageError

    try:
        with photo.open() as file, Image.open(file, formats=FORMATS) as image:
            if math.prod(image.size) > MOST_PIXELS:
                raise ValueError(f"it declares {image.width}x{image.height} pixels; the limit is {MOST_PIXELS:,}")
            require_8_bit_colours(image)
            image.load()
            turn = orientation(image)
            deepest = _deepest(np.asarray(image)) if image.mode in _BITS_16 else None
            shown = oriented(_as_rgb(image, plan), turn)
            file.seek(0)
            key = hashlib.sha256(file.read()).digest()
    except UnidentifiedImageError:
        return _Seen(failure=f"no image in a known format: {', '.join(FORMATS)}")
    except Exception as error:  # a damaged picture can raise almost any exception
        return _Seen(failure=reason(error))
    shape, gray = (shown.height, shown.width), True
    if row is not None and (plan.size is not None or shape == row.shape[1:]):
        fitted = np.asarray(shown if shape == row.shape[1:] else _fitted(shown, row.shape[1], plan))
        row[:] = fitted.transpose(2, 0, 1)
        gray = bool((fitted == fitted[..., :1]).all())
    return _Seen(shape=shape, gray=gray, deepest=deepest, key=key)


def _as_rgb(image: Image.Image, plan: Preparation) -> Image.Image:
    """Return a decoded image in RGB, with the background behind its transparent pixels."""
    from PIL import Image

    if image.mode in _BITS_16:
        values = np.asarray(image).astype(np.float64).clip(0, plan.white)
        image = Image.fromarray((values * (255 / plan.white)).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floats, and no value of them is known to be white")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        behind = Image.new("RGBA", image.size, (*plan.colour, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    return image.convert("RGB")


def _fitted(image: Image.Image, size: int, plan: Preparation) -> Image.Image:
    """Return an image as a square, resized by Lanczos' filter."""
    from PIL import Image

    width, height = image.size
    if plan.fit == "stretch":
        return image.resize((size, size), Image.Resampling.LANCZOS)
    if plan.fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    scale = size / max(width, height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = Image.new("RGB", (size, size), plan.colour)
    square.paste(image.resize(inner, Image.Resampling.LANCZOS), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return square


def _drawn(labels: Array, keys: Sequence[bytes], readable: Array, fraction: float) -> Array:
    """Return which photos, (N,) bool, become the test part: of each class, the first by key. Photos with the same key
    stay together, and a class of one photo has none in the test part."""
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(readable & (labels == label)).tolist(), key=lambda index: keys[index])
        if len(members) > 1:
            first = keys[members[min(max(1, round(fraction * len(members))), len(members) - 1)]]
            is_test[[index for index in members if keys[index] < first]] = True
    return is_test


def _check_classes(
    listing: Listing, of_training: Array, source: str, photos: Sequence[Photo], seen: Sequence[_Seen]
) -> None:
    present = set(of_training.tolist())
    for label, name in enumerate(listing.classes):
        if label not in present:
            pairs = zip(photos, seen, strict=True)
            bad = next(f"{photo.name} ({one.failure})" for photo, one in pairs if one.failure and photo.label == label)
            raise ValueError(
                f"{source} has no training photo of the class {printable(name)} that can be read, e.g. {excerpt(bad)}: "
                "each class needs one; add photos or move the class away"
            )


def _write(target: Path, pixels: Array, labels: Array, train: Array, test: Array, classes: Sequence[str]) -> None:
    """Write the rows of both parts as ``np.savez`` does, a block at a time and with the same bytes at any time."""
    with replacing(target) as fresh, zipfile.ZipFile(fresh, "w") as archive:
        for part, rows in (("train", train), ("test", test)):
            with archive.open(zipfile.ZipInfo(f"x_{part}.npy"), "w", force_zip64=True) as file:
                shape = (len(rows), *pixels.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                at_once = max(1, _BLOCK // math.prod(pixels.shape[1:]))
                for first in range(0, len(rows), at_once):
                    file.write(pixels[rows[first : first + at_once]].tobytes())
            _write_array(archive, f"y_{part}", labels[rows])
        _write_array(archive, "classes", np.array(classes))
        _write_array(archive, "layout", np.array("NCHW"))


def _write_array(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _remarks(
    listing: Listing,
    photos: Sequence[Photo],
    seen: Sequence[_Seen],
    plan: Preparation,
    train: set[int],
    test: Sequence[int],
) -> list[str]:
    """Return what a user should know of the photos; ``train`` and ``test`` are the rows of both parts."""
    remarks = []
    bad = [f"{photo.name} ({one.failure})" for photo, one in zip(photos, seen, strict=True) if one.failure]
    if bad:
        remarks.append(f"left out, because they cannot be read: {_some(bad)}")
    if listing.strays:
        remarks.append(f"left out, because they are in no folder of a class: {_some(listing.strays)}")
    if not listing.test:
        fraction = _USUAL_TEST_FRACTION if plan.test_fraction is None else plan.test_fraction
        remarks.append(f"there was no test part: {100 * fraction:g} % of each class are it now, by a hash of the files")
    copies = {seen[index].key for index in train}
    if num_copies := sum(seen[index].key in copies for index in test):
        remarks.append(f"{num_copies} test photos are copies of training photos")
    if deep := [one.deepest for one in seen if one.deepest is not None]:
        hint = f"; {spelt('white', max(deep))} would make that white" if max(deep) <= plan.white // 2 else ""
        remarks.append(
            f"{len(deep)} photos have 16 bits: 0 to {plan.white} became 0 to 255; their largest value is {max(deep)}"
            + hint
        )
    if plan.size:
        side = max if plan.fit == "pad" else min
        if small := sum(not one.failure and side(one.shape) < plan.size for one in seen):
            remarks.append(f"{small} photos are smaller than {plan.size}x{plan.size} and were enlarged")
    return remarks


def _some(names: Sequence[str]) -> str:
    """Return the number of files and the names of the first."""
    rest = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {'file' if len(names) == 1 else 'files'}: {', '.join(map(excerpt, names[:_NAMED]))}{rest}"
