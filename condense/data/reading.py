"""Files of others, read within bounds: the arrays of an ``.npz`` and pictures.

What a file declares is compared with its size before memory is taken. Only ordinary files are opened: a pipe would
wait for ever.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from condense.data.pixels import Array
from condense.files import check_expansion
from condense.names import excerpt, reason

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""What is tried on a file of pictures. Others are left out: to open PostScript would run a program."""

MOST_PIXELS = 1 << 26
"""Of one picture: 8192 x 8192."""

_TURNS: Mapping[Any, str] = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What undoes each EXIF orientation. ``ImageOps.exif_transpose`` writes all other tags again, and fails on odd ones."""


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name; hidden files are left out.

    Raises:
        ValueError: it cannot be listed.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ValueError(f"cannot read {folder}: {error.strerror or error}; check its permissions") from error


def read_npz(path: Path, wanted: Collection[str]) -> tuple[dict[str, Array], list[str]]:
    """The arrays of an ``.npz`` file that have one of the wanted names, and the names of all that it holds.

    Raises:
        ValueError: it is damaged, holds other things than plain arrays, or declares more than is stored.
    """
    if not path.is_file():
        raise ValueError(f"cannot read {path}: it is not an ordinary file; give an .npz file")
    try:
        stored = path.stat().st_size
        with zipfile.ZipFile(path) as file:
            members = {member.filename.removesuffix(".npy"): member for member in file.infolist()}
            found = {name: _read_member(file, members[name], stored) for name in wanted if name in members}
    except Exception as error:  # a damaged zip raises nearly anything
        raise ValueError(
            f"cannot read {path}: {reason(error)}; give an .npz file of plain arrays, as np.savez writes it"
        ) from error
    return found, list(members)


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
        raise ValueError(f"{what} declares the shape {excerpt(shape)} of {excerpt(dtype)}, which is not its size")
    with file.open(member) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def text_of(what: str, array: Array) -> str:
    """The text that an array of one element holds, bytes or str.

    Raises:
        ValueError: it holds something else.
    """
    text = array.item() if array.size == 1 and array.dtype.kind in "US" else None
    if isinstance(text, bytes):
        text = text.decode("ascii", "replace")
    if not isinstance(text, str):
        raise ValueError(f"{what} is {excerpt(array.dtype)} of shape {excerpt(array.shape)}: it is one text; give NCL")
    return text


def read_images(files: Iterable[Path]) -> Iterator[tuple[Path, Array]]:
    """Each picture with its file: HW where it is gray, HWC in RGB where it has colour, uint8.

    Pictures are turned the way their EXIF orientation says. An alpha channel is dropped. Of several frames the first
    is read.

    Raises:
        ValueError: no ordinary file; none of the known formats; damaged; more than 8 bits a value; too large.
    """
    from PIL import Image

    decoded = stored = 0
    for file in files:
        if not file.is_file():
            raise ValueError(f"cannot read {file}: it is not an ordinary file; move it out of the folder of images")
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(file, formats=_FORMATS) as image:
                num_pixels = math.prod(image.size)
                if num_pixels > MOST_PIXELS:
                    raise ValueError(f"it declares {image.width}x{image.height} pixels, {MOST_PIXELS:,} are the most")
                decoded, stored = decoded + num_pixels * len(image.getbands()), stored + file.stat().st_size
                check_expansion("this picture with those before it", decoded, stored, "give an .npz if it is right")
                picture = pixels_of(image)
        except Exception as error:  # a damaged picture raises nearly anything
            raise ValueError(
                f"cannot read {file}: {reason(error)}; replace it by an 8-bit image, or move it out of the folder"
            ) from error
        yield file, picture


def pixels_of(image: Image.Image) -> Array:
    """A picture of PIL as an array: HW where it is gray, HWC in RGB where it has colour, uint8.

    Raises:
        ValueError: it has more than 8 bits a value, or colours that do not convert to RGB.
    """
    from PIL import ExifTags, Image

    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"its pixels have more than 8 bits (mode {image.mode}); with TOP, the greatest value that a pixel can have "
            "(65535 for 16 bits), Image.fromarray((np.asarray(image) / TOP * 255).round().astype('uint8')) has 8"
        )
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:
        image = image.transpose(Image.Transpose[turn])
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))


def as_rgb(images: list[Array]) -> list[Array]:
    """The same pictures; gray ones as RGB where one of them has colour."""
    if all(image.ndim == 2 for image in images):
        return images
    return [np.stack([image] * 3, axis=-1) if image.ndim == 2 else image for image in images]


def check_names(where: str, names: Iterable[Any]) -> list[str]:
    """Names of classes as text.

    Raises:
        ValueError: a name twice, or one that cannot be printed on a line.
    """
    found: dict[str, None] = {}
    for name in map(str, names):
        odd = any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
        if odd or len(name.encode()) > _LONGEST_NAME:
            raise ValueError(
                f"{where} has the class name {excerpt(ascii(name))}: a name has at most {_LONGEST_NAME} bytes, and "
                "no line breaks or broken characters; rename the class"
            )
        if name in found:
            raise ValueError(
                f"{where} has two classes of the name {excerpt(name)}: names tell classes apart; rename one of them"
            )
        found[name] = None
    return list(found)


_LONGEST_NAME = 200  # bytes: with a number before it, the name of a folder
