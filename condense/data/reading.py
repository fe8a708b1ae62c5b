"""Readers of untrusted files: the arrays of an ``.npz``, and pictures.

The size that a file declares is compared with the size of the file before memory is allocated. Only regular files are
opened, because reading from a pipe could block for ever.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from condense.data.pixels import Array
from condense.files import check_expansion
from condense.names import excerpt, reason

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Formats in which pictures are read. Others are excluded, because PIL opens PostScript by running a program."""

MOST_PIXELS = 1 << 26
"""Largest number of pixels of one picture: 8192 x 8192."""

_TRANSPOSES: Mapping[Any, str] = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation -> transpose that undoes it. ``ImageOps.exif_transpose`` also rewrites the other tags, which can
fail."""


def entries(folder: Path) -> list[Path]:
    """Return the files and folders in a folder, sorted by name and without hidden ones.

    Raises:
        ValueError: the folder cannot be listed.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ValueError(f"cannot read {folder}: {error.strerror or error}; check its permissions") from error


def read_npz(path: Path, wanted: Collection[str]) -> tuple[dict[str, Array], list[str]]:
    """Return the arrays of an ``.npz`` file that have one of the wanted names, and the names of all its entries.

    Raises:
        ValueError: the file is damaged, holds something else than plain arrays, or declares more than it stores.
    """
    if not path.is_file():
        raise ValueError(f"cannot read {path}: it is not a regular file; give an .npz file")
    try:
        stored = path.stat().st_size
        with zipfile.ZipFile(path) as file:
            members = {member.filename.removesuffix(".npy"): member for member in file.infolist()}
            arrays = {name: _read_member(file, members[name], stored) for name in wanted if name in members}
    except Exception as error:  # a damaged zip can raise almost any exception
        raise ValueError(
            f"cannot read {path}: {reason(error)}; give an .npz file of plain arrays, as np.savez writes it"
        ) from error
    return arrays, list(members)


def _read_member(file: zipfile.ZipFile, member: zipfile.ZipInfo, stored: int) -> Array:
    what = excerpt(member.filename)
    check_expansion(what, member.file_size, min(member.compress_size, stored), "save it with np.savez if it is right")
    with file.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        header = stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{what} holds Python objects, which are never loaded")
    if not dtype.itemsize or header + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{what} declares shape {excerpt(shape)} of {excerpt(dtype)}, which does not fit its size")
    with file.open(member) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def text_of(what: str, array: Array) -> str:
    """Return the text in an array of one element, bytes or str.

    Raises:
        ValueError: the array holds something else.
    """
    text = array.item() if array.size == 1 and array.dtype.kind in "US" else None
    if isinstance(text, bytes):
        text = text.decode("ascii", "replace")
    if not isinstance(text, str):
        raise ValueError(
            f"{what} is {excerpt(array.dtype)} of shape {excerpt(array.shape)}: it must be one text; give NCL"
        )
    return text


def read_images(files: Iterable[Path]) -> Iterator[tuple[Path, Array]]:
    """Yield each file with its picture, as ``decoded`` does.

    Raises:
        ValueError: a file is not a regular one; see ``decoded``.
    """

    def opened() -> Iterator[tuple[Path, int]]:
        for file in files:
            if not file.is_file():
                raise ValueError(f"cannot read {file}: it is not a regular file; move it out of the folder of images")
            paths.append(file)
            yield file, file.stat().st_size

    paths: list[Path] = []
    for picture in decoded(opened(), lambda index: f"{paths[index]}"):
        yield paths[-1], picture


def decoded(sources: Iterable[tuple[Path | BinaryIO, int]], name: Callable[[int], str]) -> Iterator[Array]:
    """Yield pictures, uint8: HW if they are gray, HWC in RGB if they have colour.

    Pictures are rotated according to their EXIF orientation. An alpha channel is dropped, and only the first of several
    frames is read.

    Args:
        sources: files, and their sizes in bytes.
        name: the name of the file of this index, for errors.

    Raises:
        ValueError: a file has an unknown format, more than 8 bits per value or too many pixels, or is damaged.
    """
    from PIL import Image

    size = stored = 0
    for index, (source, num_bytes) in enumerate(sources):
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(source, formats=FORMATS) as image:
                num_pixels = math.prod(image.size)
                if num_pixels > MOST_PIXELS:
                    raise ValueError(f"it declares {image.width}x{image.height} pixels; the limit is {MOST_PIXELS:,}")
                size, stored = size + num_pixels * len(image.getbands()), stored + num_bytes
                check_expansion("this picture with those before it", size, stored, "give an .npz if it is right")
                picture = pixels_of(image)
        except Exception as error:  # a damaged picture can raise almost any exception
            raise ValueError(
                f"cannot read {name(index)}: {reason(error)}; replace it by an 8-bit image, or move it out of the "
                "folder"
            ) from error
        yield picture


def pixels_of(image: Image.Image) -> Array:
    """Return a PIL image as uint8: HW if it is gray, HWC in RGB if it has colour.

    Raises:
        ValueError: it has more than 8 bits per value, or cannot be converted to RGB.
    """
    require_8_bit_colours(image)
    image.load()  # some formats are turned when they are loaded
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"its pixels have more than 8 bits (mode {image.mode}); with TOP, the largest value that a pixel can have "
            "(65535 for 16 bits), Image.fromarray((np.asarray(image) / TOP * 255).round().astype('uint8')) has 8"
        )
    image = oriented(image, orientation(image))
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))


def require_8_bit_colours(image: Image.Image) -> None:
    """Raise ValueError if an image, which was not loaded yet, has colours or transparency of 16 bits: Pillow would keep
    the upper 8 of them."""
    stored = [str(tile[3]) for tile in getattr(image, "tile", ())]
    if not image.mode.startswith(("I", "F")) and any(";16" in mode for mode in stored):
        raise ValueError(f"its pixels have 16 bits in each of {len(image.getbands())} channels; save it with 8 bits")


def orientation(image: Image.Image) -> int:
    """Return the orientation that the EXIF tags of an image give, 1 to 8; 1 for an image without one."""
    from PIL import ExifTags

    given = image.getexif().get(ExifTags.Base.Orientation)
    return given if isinstance(given, int) and given in _TRANSPOSES else 1


def oriented(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image that was stored in this EXIF orientation as it is shown."""
    from PIL import Image

    return image if orientation == 1 else image.transpose(Image.Transpose[_TRANSPOSES[orientation]])


def as_rgb(images: list[Array]) -> list[Array]:
    """Return the same pictures; if one of them has colour, the gray ones are converted to RGB."""
    if all(image.ndim == 2 for image in images):
        return images
    return [np.stack([image] * 3, axis=-1) if image.ndim == 2 else image for image in images]


def check_names(where: str, names: Iterable[Any]) -> list[str]:
    """Return the names of classes as text.

    Raises:
        ValueError: a name occurs twice, is too long or cannot be printed on one line.
    """
    checked: dict[str, None] = {}
    for name in map(str, names):
        unprintable = any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
        if unprintable or len(name.encode()) > _LONGEST_NAME:
            raise ValueError(
                f"{where} has the class name {excerpt(ascii(name))}: a name has at most {_LONGEST_NAME} bytes, and "
                "no control or invalid characters; rename the class"
            )
        if name in checked:
            raise ValueError(
                f"{where} has two classes with the name {excerpt(name)}: names must be unique; rename one of them"
            )
        checked[name] = None
    return list(checked)


_LONGEST_NAME = 200  # bytes; exports use the name, with a number before it, as the name of a folder
