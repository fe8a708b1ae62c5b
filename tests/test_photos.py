"""Photos as people keep them become a data set file."""

from __future__ import annotations

import re
import shlex
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import condense
from condense import cli
from condense.data import load
from condense.data.listing import list_photos
from condense.data.photos import Prepared

RED, BLUE = (255, 0, 0), (0, 0, 255)


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def photo(path: Path, content: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = content if isinstance(content, Image.Image) else Image.fromarray(content)
    image.save(path, **options)
    return path


def folder(root: Path, count: int = 5, size: int = 8, first: int = 0) -> Path:
    """A folder of two classes with photos of one size; ``first`` is the seed of the first."""
    for number, label in enumerate(("ant", "bee")):
        for index in range(count):
            photo(root / label / f"{index}.png", noise(size, size, first + 100 * number + index))
    return root


def prepared(photos: Path, **fields: Any) -> tuple[Prepared, Mapping[str, Any]]:
    out = photos.parent / f"{photos.stem}-out.npz"
    out.unlink(missing_ok=True)
    done = condense.prepare(photos, out, **fields)
    return done, dict(np.load(out))


def only(tmp_path: Path, content: Any, name: str = "a.png", save: Mapping[str, Any] = {}, **fields: Any) -> Any:
    """Return the image that a photo becomes, HWC, and the remarks."""
    root = tmp_path / "photos"
    shutil.rmtree(root, ignore_errors=True)
    first = photo(root / "train" / "a" / name, content, **save)
    with Image.open(first) as opened:
        rgb = np.asarray(opened.convert("RGB"))
    for number, label in enumerate(("train/b", "test/a", "test/b")):
        photo(root / label / "b.png", rgb // 16 + np.uint8(number))
    done, arrays = prepared(root, **fields)
    return arrays["x_train"][0].transpose(1, 2, 0), done.remarks


def refused(photos: Path, message: str, **fields: Any) -> None:
    out = photos.parent / "refused.npz"
    with pytest.raises(ValueError, match=message) as error:
        condense.prepare(photos, out, **fields)
    assert "\n" not in str(error.value) and not out.exists()
    assert not [path for path in photos.parent.iterdir() if path.name.endswith(".tmp")]


# Which photos there are


def test_every_command_takes_what_was_prepared_and_names_and_pixels_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    folder(root / "train", 3)
    folder(root / "test", 3, first=1000)
    done, _ = prepared(root)
    arrays = load(done.path)
    direct = load(root)
    assert arrays.fingerprint == direct.fingerprint and arrays.classes == direct.classes == ("ant", "bee")
    assert done.input_shape == arrays.input_shape == (3, 8, 8) and (done.num_train, done.num_test) == (6, 6)
    assert done.classes == arrays.classes and done.remarks == ()
    assert len(condense.distill("random", dataset=done.path, ipc=1, out=tmp_path / "run", device="cpu")) == 2


def test_names_of_classes_are_those_of_the_folders(tmp_path: Path) -> None:
    names = ["10", "9", "Ünïcode", "with space", "train"]
    for seed, name in enumerate(names):
        for index in range(2):
            below = "" if name == "train" else "deeper"
            photo(tmp_path / "photos" / name / below / f"{index}.png", noise(4, 4, 10 * seed + index))
    done, arrays = prepared(tmp_path / "photos")
    assert list(done.classes) == sorted(names) == arrays["classes"].tolist()


@pytest.mark.parametrize(
    ("parts", "used"),
    [(("train", "test"), "test"), (("Training", "valid"), "valid"), (("train", "test", "val"), "test")],
)
def test_parts_are_found_by_name(parts: tuple[str, ...], used: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for number, part in enumerate(parts):
        folder(root / part, 2 + number)
    done, _ = prepared(root)
    assert (done.num_train, done.num_test) == (4, 2 * (2 + parts.index(used)))
    assert any("validation part" in remark for remark in done.remarks) == (len(parts) == 3 or used == "valid")


def test_a_table_lists_photos_anywhere(tmp_path: Path) -> None:
    folder(tmp_path / "photos", 4)
    lines = [f"photos/{label}/{index}.png,{number},{'test' if index == 3 else 'train'}"
             for label, number in (("ant", 10), ("bee", 9)) for index in range(4)]  # fmt: skip
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path, label ,split", *lines, ""]), encoding="utf-8-sig")
    done, arrays = prepared(table)
    assert done.classes == ("9", "10") and (done.num_train, done.num_test) == (6, 2)
    assert arrays["y_train"].tolist() == [1, 1, 1, 0, 0, 0]
    assert np.array_equal(arrays["x_test"][1], noise(8, 8, 103).transpose(2, 0, 1))
    table.write_text("path,label\n" + "".join(line.rpartition(",")[0] + "\n" for line in lines))
    assert prepared(table)[0].num_test == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,1\n", "its first line has to name the columns path, label"),
        ("path,label\n", "lists no photos"),
        ("path,label\na.png,1\nnowhere.png,2\n", "line 3 of .*: there is no file .*nowhere.png"),
        ("path,label,split\na.png,1,dev\n", "line 2 of .* has the split 'dev': give train, test or val"),
        ("path,label\na.png\n", "line 2 has 1 of 2 columns"),
        ("path,label\na.png,1\na.png,\n", "line 3 has no label"),
        ("path,label,split\na.png,1,train\na.png,2,test\n", "no training photos of the class 2"),
    ],
)
def test_bad_tables_are_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    photo(tmp_path / "a.png", noise(4, 4))
    (tmp_path / "table.csv").write_text(text)
    refused(tmp_path / "table.csv", message)


def test_bad_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no folder of photos")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no folders: each class is a folder")
    folder(tmp_path / "odd" / "test")
    refused(tmp_path / "odd", "has a folder test and no folder train")
    folder(tmp_path / "odd" / "train", 2)
    folder(tmp_path / "odd" / "Training", 2)
    refused(tmp_path / "odd", "one train part is read; move one away")
    root = tmp_path / "photos"
    folder(root / "train")
    photo(root / "test" / "cat" / "1.png", noise(8, 8))
    refused(root, "cat is a class that the training part lacks: there are ant, bee")
    (root / "test" / "cat").rename(root / "test" / "ant")
    refused(root, "has a test part of 1 photos: test_fraction is for", test_fraction=0.5)
    (root / "train" / "dog").mkdir()
    refused(root, "no training photos of the class dog")
    (root / "train" / "dog" / "1.jpg").write_text("hello")
    refused(
        root, "no training photo of the class dog that can be read, e.g. .*1.jpg .no image in a known format: BMP, "
    )


def test_files_that_are_no_photos_are_named_and_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", 5)
    (root / "readme.txt").write_text("hello")
    (root / "ant" / ".hidden").write_text("hello")
    for index in range(4):
        (root / "ant" / f"Thumbs{index}.db").write_bytes(b"\0" * 100)
    content = (root / "bee" / "4.png").read_bytes()
    (root / "bee" / "4.png").write_bytes(content[: len(content) // 2])
    done, _ = prepared(root)
    assert done.num_train + done.num_test == 9
    unreadable = next(remark for remark in done.remarks if "cannot be read" in remark)
    assert "5 files" in unreadable and "Thumbs0.db" in unreadable and "and 2 more" in unreadable
    assert any("1 file: " in remark and "readme.txt" in remark for remark in done.remarks)
    assert not any("hidden" in remark for remark in done.remarks)


# Sizes


def test_photos_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", 3)
    photo(root / "bee" / "wide.png", noise(8, 9))
    refused(root, "wide.png is 9x8, the photos before it are 8x8: .* give size=64")
    done, arrays = prepared(root, size=4)
    assert done.input_shape == (3, 4, 4) and arrays["layout"] == "NCHW"


def test_crop_keeps_the_middle_pad_all_of_it_and_stretch_neither(tmp_path: Path) -> None:
    wide = noise(8, 24)
    wide[:, :8], wide[:, 16:] = RED, BLUE
    middle, _ = only(tmp_path, wide, size=8)
    assert np.array_equal(middle, wide[:, 8:16])
    lanczos = Image.Resampling.LANCZOS
    half, _ = only(tmp_path, np.ascontiguousarray(wide[:, 8:16]), size=4)
    assert np.array_equal(half, np.asarray(Image.fromarray(wide[:, 8:16]).resize((4, 4), lanczos)))
    padded, remarks = only(tmp_path, wide, size=24, fit="pad", background="#00ff00")
    assert np.array_equal(padded[8:16], wide) and (padded[:8] == (0, 255, 0)).all() and not remarks
    stretched, _ = only(tmp_path, wide, size=8, fit="stretch")
    assert np.array_equal(stretched, np.asarray(Image.fromarray(wide).resize((8, 8), lanczos)))
    _, remarks = only(tmp_path, wide, size=16)
    assert remarks == ("4 photos are smaller than 16x16 and were enlarged",)


# Formats


def test_photos_are_turned_the_way_their_exif_says(tmp_path: Path) -> None:
    shown = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    stored = Image.fromarray(shown).transpose(Image.Transpose.ROTATE_90)
    found, _ = only(tmp_path, stored, save={"exif": exif}, size=4)
    assert np.array_equal(found, shown[1:5])


def png_of_16_bits(path: Path, values: Any, kind: int) -> Path:
    """Write pixels (H, W, channels) as a PNG of 16 bits: 2 is RGB, 4 gray with transparency, 6 RGBA."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_colours_of_16_bits_are_left_out_and_named(kind: int, channels: int, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for number, label in enumerate(("train/a", "train/b", "test/a", "test/b")):
        photo(root / label / "b.png", noise(2, 2) // 16 + np.uint8(number))
    deep = png_of_16_bits(root / "train" / "a" / "deep.png", np.full((2, 2, channels), 4000), kind)
    done, arrays = prepared(root, white=4095)
    assert len(arrays["x_train"]) == 2
    assert any("deep.png" in remark and "save it with 8 bits" in remark for remark in done.remarks)
    with pytest.raises(ValueError, match=r"deep\.png: its pixels have 16 bits in each of . channels; save it with 8"):
        load(root)
    assert deep.exists()


def test_photos_of_a_linked_folder_are_read_once(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "photos"
    for number, label in enumerate(("train/a", "train/b", "test/a", "test/b")):
        photo(root / label / "b.png", noise(2, 2) // 16 + np.uint8(number))
    photo(elsewhere / "c.png", noise(2, 2))
    (root / "train" / "a" / "more").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(root / "train" / "a")
    done, _ = prepared(root)
    assert done.num_train == 3


def test_numbers_as_labels_are_ordered_alike_in_every_process(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", noise(2, 2))
    lines = [f"a.png,{label}" for label in ("2", "1", "01", "001")]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *lines]))
    assert list_photos(tmp_path / "table.csv").classes == ["001", "01", "1", "2"]


def test_what_is_transparent_shows_the_background(tmp_path: Path) -> None:
    alpha = np.array([[0, 255], [0, 51]], np.uint8)
    colour = Image.merge("RGBA", (*Image.new("RGB", (2, 2), RED).split(), Image.fromarray(alpha)))
    found, _ = only(tmp_path, colour)
    assert found.tolist() == [[[255, 255, 255], [255, 0, 0]], [[255, 255, 255], [255, 204, 204]]]
    assert only(tmp_path, colour, background="blue")[0].tolist()[0] == [[0, 0, 255], [255, 0, 0]]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, *RED, *BLUE])
    palette.putpixel((1, 0), 2)
    assert only(tmp_path, palette)[0].tolist() == [[[255, 0, 0], [0, 0, 255]], [[255, 0, 0], [255, 0, 0]]]
    found, _ = only(tmp_path, palette, name="a.gif", save={"transparency": 2})
    assert found.tolist() == [[[255, 0, 0], [255, 255, 255]], [[255, 0, 0], [255, 0, 0]]]
    gray = Image.merge("LA", (Image.new("L", (2, 2), 0), Image.fromarray(alpha)))
    assert only(tmp_path, gray)[0].tolist() == [[[255], [0]], [[255], [204]]]


def test_inks_become_light(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    found, _ = only(tmp_path, cyan, name="a.tif")
    assert (found == (0, 255, 255)).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_divided_by_what_white_is(name: str, tmp_path: Path) -> None:
    deep = np.array([[0, 4095], [2048, 16]], np.uint16)
    found, remarks = only(tmp_path, deep, name=name, white=4095)
    assert found[..., 0].tolist() == [[0, 255], [128, 1]]
    assert any(remark.startswith("1 photos have 16 bits: 0 to 4095 became 0 to 255") for remark in remarks)
    found, remarks = only(tmp_path, deep, name=name)
    assert found[..., 0].tolist() == [[0, 16], [8, 0]]
    assert any("their largest value is 4095; white=4095 would make that white" in remark for remark in remarks)
    refused(
        tmp_path / "photos", f"{name} has the value 4095, which is more than white, 1000: give white=4095", white=1000
    )


def test_32_bits_are_no_photo(tmp_path: Path) -> None:
    """Such a photo is left out and counted; no value of ``white`` would be right for it."""
    root = folder(tmp_path / "photos", 3, 4)
    for value in (99806, -3):
        Image.fromarray(np.full((4, 4), value, np.int32)).save(root / "ant" / f"{value}.tif")
    _, arrays = prepared(root)
    assert len(arrays["x_train"]) + len(arrays["x_test"]) == len([*root.rglob("*.png")])


def test_images_are_gray_if_all_of_them_are(tmp_path: Path) -> None:
    gray = noise(4, 4, channels=1)
    assert only(tmp_path, gray)[0].shape == (4, 4, 1)
    root = folder(tmp_path / "mixed", 2, 4)
    photo(root / "ant" / "gray.png", gray)
    _, arrays = prepared(root)
    every = np.concatenate([arrays["x_train"], arrays["x_test"]])
    assert any(np.array_equal(image, np.stack([gray] * 3)) for image in every)


# The test part


def contents(arrays: Mapping[str, Any], part: str) -> set[bytes]:
    return {image.tobytes() for image in arrays[f"x_{part}"]}


def test_a_test_part_is_drawn_from_every_class_whatever_the_names_are(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", 10, 4)
    for index in range(25):
        photo(root / "cat" / f"{index}.png", noise(4, 4, 1000 + index))
    done, arrays = prepared(root)
    assert np.bincount(arrays["y_test"]).tolist() == [2, 2, 5]
    assert any(remark.startswith("there was no test part: 20 % of each class") for remark in done.remarks)
    again = prepared(root)[1]
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
    for index in range(10):
        (root / "bee" / f"{index}.png").rename(root / "bee" / f"z{9 - index}.png")
    renamed = prepared(root)[1]
    assert contents(renamed, "test") == contents(arrays, "test")
    assert not contents(renamed, "test") & contents(renamed, "train")
    assert np.bincount(prepared(root, test_fraction=0.5)[1]["y_test"]).tolist() == [5, 5, 12]


def test_copies_of_a_photo_are_in_one_part_or_reported(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", 5, 4)
    for index in range(5):
        for label in ("ant", "bee"):
            content = (root / label / f"{index}.png").read_bytes()
            for copy in range(3):
                (root / label / f"{index}-{copy}.png").write_bytes(content)
    done, arrays = prepared(root, test_fraction=0.3)
    assert done.num_test == 8 and not contents(arrays, "test") & contents(arrays, "train")
    split = tmp_path / "split"
    for part in ("train", "test"):
        folder(split / part, 2)
    photo(split / "test" / "ant" / "new.png", noise(8, 8, 7))
    assert prepared(split)[0].remarks == ("4 test photos are copies of training photos",)


# The file and the command


def test_a_file_is_written_once_and_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", 3)
    for name in ("a.npz", "b.npz"):
        condense.prepare(root, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    for out, message in (("a.npz", "already exists"), ("a.zip", "its name ends in .npz"), ("no/a.npz", "no folder")):
        with pytest.raises(ValueError, match=message):
            condense.prepare(root, tmp_path / out)
    with pytest.raises(ValueError, match=r"its name ends in .npz; give photos\.npz"):
        condense.prepare(root, ".")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "size must lie in 1..8192, got 0; try size=64"),
        ({"fit": "zoom"}, "zoom"),
        ({"fit": "pad"}, "fit=pad makes squares of a size; give size=64"),
        ({"background": "pinkish"}, "background is the unknown colour 'pinkish'; give a name"),
        ({"white": 0}, "white must lie in 1..65535"),
        ({"test_fraction": 1.0}, "test_fraction must lie between 0 and 1"),
        ({"sise": 64}, "sise"),
    ],
)
def test_bad_fields_are_refused_in_one_line(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(folder(tmp_path / "photos", 2), message, **fields)


def test_memory_does_not_grow_with_the_photos(tmp_path: Path) -> None:
    """Arrays on disk are not counted. All images take 9 MiB, and 1024 rows of 48x48 are copied at once otherwise."""
    root = folder(tmp_path / "photos", 5, 8)
    lines = [f"photos/{label}/{index % 5}.png,{label}" for label in ("ant", "bee") for index in range(700)]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *lines]))
    assert root.is_dir()
    tracemalloc.start()
    try:
        done = condense.prepare(tmp_path / "table.csv", tmp_path / "out.npz", size=48)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert done.num_train + done.num_test == 1400
    assert peak < 0.7 * 1400 * 3 * 48 * 48


def test_the_command_says_what_it_did_and_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "photos", 5)
    photo(root / "ant" / "wide.png", noise(8, 20, 77))
    out = str(tmp_path / "out.npz")
    cli.main(["prepare", str(root), out, "--size", "4", "--fit", "pad", "--test-fraction", "0.4"])
    said = capsys.readouterr().out
    assert f"{out}: 7 training and 4 test images, 4x4 RGB, of 2 classes; next: condense distill" in said
    for words in (["prepare", str(root)], ["prepare", str(root), out], ["prepare", str(root), "new.npz"]):
        with pytest.raises(SystemExit):
            cli.main(words)
    errors = capsys.readouterr().err
    assert "prepare needs a folder of photos" in errors and "already exists" in errors and "give --size 64" in errors


def test_a_folder_that_is_no_data_set_is_refused_with_the_command_that_makes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = folder(tmp_path / "my photos", 3)
    table = tmp_path / "table.csv"
    table.write_text("path,label\nmy photos/ant/0.png,a\nmy photos/bee/0.png,b\nmy photos/bee/1.png,b\n")
    for source, out in ((root, "my photos.npz"), (table, "table.npz")):
        with pytest.raises(SystemExit):
            cli.main(["distill", "random", "--dataset", str(source), "--ipc", "1"])
        command = re.search(r"condense (prepare .*)$", capsys.readouterr().err)
        assert command
        cli.main(shlex.split(command[1]))
        assert load(tmp_path / out).input_shape == (3, 64, 64)
    for part in ("train", "test"):
        folder(tmp_path / "split" / part, 2)
    photo(tmp_path / "split" / "test" / "ant" / "wide.png", noise(8, 9))
    with pytest.raises(
        ValueError, match=r"the images before it are 8x8: .* condense.prepare\('.*split', 'split.npz', s"
    ):
        load(tmp_path / "split")
