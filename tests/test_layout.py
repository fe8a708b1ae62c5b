"""Shapes of samples."""

import pytest

from condense.data.layout import channel_axis, kind, require_kind, sides


@pytest.mark.parametrize(
    ("shape", "expected", "axis", "lengths"),
    [((5, 7), "series", 0, (7,)), ((3, 4, 6), "images", 0, (4, 6)), ((2, 3, 4, 6), "clips", 1, (2, 4, 6))],
)
def test_the_number_of_axes_says_what_a_sample_is(
    shape: tuple[int, ...], expected: str, axis: int, lengths: tuple[int, ...]
) -> None:
    assert (kind(shape), channel_axis(shape), sides(shape)) == (expected, axis, lengths)


@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4, 5)])
def test_other_numbers_of_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"axes: a graph has one, a series two \(C, L\), an image"):
        kind(shape)


def test_a_kind_that_is_not_taken_is_refused_with_the_remedy() -> None:
    require_kind("this", ("images", "clips"), (3, 4, 6), "do that")
    with pytest.raises(ValueError, match=r"this takes images and clips, not series of shape \(3, 4\); do that"):
        require_kind("this", ("images", "clips"), (3, 4), "do that")
