"""Series, images and clips of users: which axis is which, which values are taken, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from condense.data import load
from condense.data.layout import kind

CLASSES = np.arange(6) % 2
SHAPES: dict[str, tuple[int, ...]] = {"NCL": (6, 3, 5), "NCHW": (6, 3, 4, 5), "NTCHW": (6, 2, 3, 4, 5)}
"""A shape in each standard layout, with axes of different lengths."""


def samples_in(standard: str) -> Any:
    """Six samples in a standard layout: series as float32 on both sides of 0, else pixels."""
    values = np.random.default_rng(0).integers(0, 256, SHAPES[standard])
    return (values - 100.5).astype(np.float32) if standard == "NCL" else values.astype(np.uint8)


def rearranged(values: Any, standard: str, layout: str) -> Any:
    """The same values with their axes in the order of ``layout``; without a C, the first channel of them."""
    if "C" not in layout:
        values, standard = values.take(0, axis=standard.index("C")), standard.replace("C", "")
    return values.transpose([standard.index(axis) for axis in layout])


def as_file(path: Path, samples: Any, **entries: Any) -> Path:
    """An ``.npz`` with these samples for training and for testing."""
    np.savez(path, x_train=samples, y_train=CLASSES, x_test=samples, y_test=CLASSES, **entries)
    return path


def fails(source: Any, message: str, **options: Any) -> None:
    with pytest.raises(ValueError) as caught:
        load(source, **options)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text and "; " in text, text


LAYOUTS = [
    *((layout, "NCL") for layout in ("NCL", "NLC", "NL", "LNC")),
    *((layout, "NCHW") for layout in ("NCHW", "NHWC", "NHW", "HWCN")),
    *((layout, "NTCHW") for layout in ("NTCHW", "NTHWC", "NCTHW", "NTHW")),
]


@pytest.mark.parametrize(("layout", "standard"), LAYOUTS)
def test_a_layout_says_the_axes_of_a_file_of_arrays_and_of_tensors(layout: str, standard: str, tmp_path: Path) -> None:
    values = samples_in(standard)
    given = rearranged(values, standard, layout)
    axis = standard.index("C")
    expected = values if "C" in layout else values.take([0], axis=axis)
    tensors = torch.from_numpy(given.copy()), torch.from_numpy(CLASSES)
    for arrays in (
        load(as_file(tmp_path / "mine.npz", given, layout=layout)),
        load((given, CLASSES), layout=layout),
        load(tensors, layout=layout),
    ):
        assert arrays.input_shape == expected.shape[1:] and arrays.x_train.dtype == expected.dtype
        assert np.array_equal(arrays.x_train, expected)
        assert (arrays.strategy == "none") == (standard != "NCHW")


@pytest.mark.parametrize("entry", ["ncl", b"NCL", ["NCL"], np.array([b"Ncl"])])
def test_the_entry_is_text_in_any_case(entry: Any, tmp_path: Path) -> None:
    assert load(as_file(tmp_path / "mine.npz", samples_in("NCL"), layout=entry)).input_shape == (3, 5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("NCX", "x_train of .* has the unknown layout 'NCX': series are NCL, NLC or NL"),
        ("", "unknown layout ''"),
        ("NCCL", "unknown layout"),
        ("CL", "unknown layout"),
        ("NCHW", r"has shape \(6, 3, 5\): its layout NCHW names 4 axes"),
        (7, r"layout of .* is int64 of shape \(\): it must be one text"),
        (["NCL", "NCL"], r"of shape \(2,\): it must be one text"),
        (b"\xff\xff\xff", "unknown layout"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(entry: Any, message: str, tmp_path: Path) -> None:
    fails(as_file(tmp_path / "bad.npz", samples_in("NCL"), layout=entry), message)


def test_files_of_clips_need_no_layout(tmp_path: Path) -> None:
    """The last axis is preferred for the channels in files, the third in tensors."""
    clips = samples_in("NTCHW")
    assert np.array_equal(load(as_file(tmp_path / "a.npz", rearranged(clips, "NTCHW", "NTHWC"))).x_train, clips)
    assert np.array_equal(load(as_file(tmp_path / "b.npz", clips)).x_train, clips)
    assert np.array_equal(load((torch.from_numpy(clips / 255), torch.from_numpy(CLASSES))).x_train, clips)
    both = np.zeros((6, 2, 3, 4, 1), np.uint8)
    assert load((both, CLASSES)).input_shape == (2, 1, 3, 4)
    assert load((torch.from_numpy(both), torch.from_numpy(CLASSES))).input_shape == (2, 3, 4, 1)


def test_files_with_lengths_hold_series(tmp_path: Path) -> None:
    """The entry is that of the UCR and UEA archives; values in [0, 1] are no images then. Other entries are ignored."""
    series = samples_in("NCL")
    lengths = np.full(6, 5)
    others = {"length_test": lengths, "sequence_train": lengths, "x_val": np.zeros((2, 2)), "superclass": np.arange(2)}
    arrays = load(as_file(tmp_path / "a.npz", series, length_train=lengths, **others))
    assert arrays.input_shape == (3, 5) and np.array_equal(arrays.x_train, series)
    unit = (series - series.min()) / np.ptp(series)
    assert load(as_file(tmp_path / "b.npz", unit, length_train=lengths)).input_shape == (3, 5)
    assert load(as_file(tmp_path / "c.npz", unit)).input_shape == (1, 3, 5)
    assert load(as_file(tmp_path / "d.npz", unit, length_train=lengths, layout="NHW")).input_shape == (1, 3, 5)


def test_series_keep_their_values() -> None:
    series = samples_in("NCL")
    found = load((series, CLASSES), layout="NCL").x_train
    assert found.dtype == np.float32 and np.array_equal(found, series)
    for dtype in (np.float64, np.float16, np.int16, np.uint8, np.int64):
        given = (series * 2).clip(0, 255).astype(dtype)
        found = load((given, CLASSES), layout="NCL").x_train
        assert found.dtype == np.float32 and np.array_equal(found, given)


def with_value(value: Any, dtype: Any = np.float32) -> Any:
    series = samples_in("NCL").astype(dtype)
    series[2, 1, 3] = value
    return series


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (with_value(np.nan), "x_train has NaN or infinite values: series are finite floats; clean the data"),
        (with_value(-np.inf), "NaN or infinite values"),
        (with_value(1e39, np.float64), r"values up to 1e\+39"),
        (with_value(2**24 + 1, np.int64), "int64 with values that float32 cannot represent exactly"),
        (with_value(1) > 0, r"is bool: series are finite floats; give x \* 1.0"),
        (with_value(1).astype(complex), "is complex128"),
        (with_value(1).astype(str), "series are finite floats; give numbers"),
        (with_value(1)[:0], "at least one sample is needed"),
        (with_value(1)[:, :, :0], "a sample has at least one value"),
    ],
)
def test_values_that_no_series_has_are_refused(series: Any, message: str) -> None:
    fails((series, CLASSES[: len(series)]), message, layout="NCL")


def test_three_axes_beyond_pixels_are_asked_for_their_layout(tmp_path: Path) -> None:
    """(N, H, W) and (N, C, L) cannot be told apart. The advice is taken literally."""
    series = samples_in("NCL")
    path = as_file(tmp_path / "bad.npz", series)
    fails(path, r'pixels from .*; if these are series, give a layout, np.savez\(..., layout="NCL"\)$')
    np.savez(path, **dict(np.load(path)), layout="NCL")
    assert load(path).input_shape == (3, 5)
    fails((series, CLASSES), r'give a layout, condense.data.load\(..., layout="NCL"\)$')
    fails((series.astype(np.int64), CLASSES), "if these are series")
    fails((series[:, 0], CLASSES), r'has shape \(6, 5\): .*condense.data.load\(..., layout="NL"\)')


@pytest.mark.parametrize(
    ("samples", "message", "options"),
    [
        (
            np.zeros((6, 4, 5, 5), np.uint8),
            'neither its second .*layout="NCHW".*; the layout of gray clips is NTHW',
            {},
        ),
        (np.zeros((6, 2, 4, 4, 2), np.uint8), 'neither its third nor its last axis .*layout="NTCHW"', {}),
        (np.zeros((6, 4, 4, 4), np.uint8), "images have one .gray. or three .RGB.|has 4 channels", {"layout": "NCHW"}),
        (np.zeros((6, 1, 2, 3, 4, 5), np.uint8), "images have three or four axes and clips five", {}),
        (np.full((6, 2, 3, 4, 5), 2.0), r"pixels from 2 to 2: floats must lie in \[0, 1\]", {}),
    ],
)
def test_shapes_and_pixels_of_no_clip_are_refused(samples: Any, message: str, options: Any) -> None:
    fails((samples, CLASSES), message, **options)


def test_both_parts_have_samples_of_one_shape() -> None:
    series = samples_in("NCL")
    fails((series, CLASSES, series[:, :, 1:], CLASSES), r"x_train of shape \(3, 5\) \(C, L\)", layout="NCL")


def test_a_layout_is_for_what_has_no_file(tiny_file: Path) -> None:
    fails("digits", r"layout='NCL' with 'digits'", layout="NCL")
    fails(tiny_file, r'add an entry to an .npz file, np.savez\(..., layout="NHW"\)', layout="NHW")


def test_the_items_of_a_dataset_may_be_series_and_clips() -> None:
    labels = torch.from_numpy(CLASSES)
    series, clips = torch.from_numpy(samples_in("NCL")), torch.from_numpy(samples_in("NTCHW"))
    found = load(TensorDataset(series.movedim(1, 2), labels), layout="NLC")
    assert np.array_equal(found.x_train, series)
    assert np.array_equal(load(TensorDataset(clips, labels)).x_train, clips)


def test_fingerprints_tell_shapes_and_types_apart() -> None:
    unit = np.linspace(0.1, 0.9, 60, dtype=np.float32).reshape(6, 10)
    forms = [(unit[:, None], "NCL"), (unit.reshape(6, 2, 5), "NCL"), (unit.reshape(6, 2, 5), "NHW")]
    forms += [(unit.reshape(6, 1, 2, 5), "NTHW"), (unit.astype(np.float16), "NL")]
    found = [load((samples, CLASSES), layout=layout).fingerprint["train"] for samples, layout in forms]
    assert len(set(found)) == len(forms)
    order = np.random.default_rng(0).permutation(6)
    assert load((unit[order], CLASSES[order]), layout="NL").fingerprint["train"] == found[0]


def test_decoded_series_and_clips_are_mapped_from_the_cache(tmp_path: Path) -> None:
    for standard in ("NCL", "NTCHW"):
        path = as_file(tmp_path / f"{standard}.npz", samples_in(standard), layout=standard)
        first, second = (load(path, cache=tmp_path / "cache") for _ in range(2))
        assert np.array_equal(first.x_train, samples_in(standard)) and np.array_equal(second.x_train, first.x_train)
        assert second.fingerprint == first.fingerprint and second.input_shape == first.input_shape


REAL: dict[str, tuple[tuple[int, ...], int, int, int, bool]] = {
    "japanese_vowels.npz": ((12, 29), 9, 270, 370, True),
    "osuleaf.npz": ((1, 427), 6, 200, 242, True),
    "ut_interaction_16x64_q92.npz": ((16, 3, 64, 64), 6, 83, 37, False),
    "pneumoniamnist.npz": ((1, 28, 28), 2, 4708, 624, False),
    "imagenette64_q92.npz": ((3, 64, 64), 10, 9469, 3925, False),
    "cifar100_q94.npz": ((3, 32, 32), 100, 50000, 10000, False),
}
"""Shape, classes, samples for training and testing, and whether they are floats."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n[:5] in ("image", "cifar") else n for n in REAL]
)
def test_real_data_load(name: str, shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    subprocess.run([sys.executable, shared_data / "unpack.py", shared_data / name, path], check=True)
    arrays = load(path)
    shape, classes, train, test, floats = REAL[name]
    assert (arrays.input_shape, arrays.num_classes) == (shape, classes)
    assert (len(arrays.x_train), len(arrays.x_test)) == (train, test)
    assert arrays.x_train.dtype == (np.float32 if floats else np.uint8)
    assert (arrays.strategy == "none") == (kind(shape) != "images")


def test_the_page_about_inputs_makes_files_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "inputs.md"
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), names)
    assert names["arrays"].input_shape == (3, 128)
    shapes = {"series.npz": (3, 128), "images.npz": (3, 32, 32), "clips.npz": (16, 3, 32, 32)}
    assert {name: load(tmp_path / name).input_shape for name in shapes} == shapes
