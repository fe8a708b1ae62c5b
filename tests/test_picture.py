"""Sets as pictures."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from condense import api, cli, picture
from condense.data import Transform
from condense.synthetic import Origin, SyntheticSet

NONE = Transform.from_description({"kind": "none"})


def set_of(samples: Tensor, classes: list[int]) -> SyntheticSet:
    """A set of two classes that holds these samples."""
    dataset = {"name": "mine", "fingerprint": "f", "classes": ["a", "b"], "input_shape": list(samples.shape[1:])}
    return SyntheticSet(samples, torch.tensor(classes), Origin(dataset=dataset, transform=NONE.describe()))


def test_images_are_their_own_pictures() -> None:
    images = torch.rand(5, 3, 4, 6)
    rows = picture.by_class(set_of(images, [1, 0, 1, 1, 0]), NONE, columns=2)
    assert torch.equal(rows[0], images[[1, 4]]) and torch.equal(rows[1], images[[0, 2]])


def test_no_more_samples_are_decoded_than_are_drawn() -> None:
    syn, decoded = set_of(torch.rand(9, 1, 4, 6), [0, 1, 0] * 3), list[int]()
    syn.decoder.register_forward_hook(lambda _, inputs, images: decoded.append(len(images)))
    assert [len(row) for row in picture.by_class(syn, NONE, columns=2)] == [2, 2]
    assert decoded == [2, 2]


def test_clips_are_sheets_of_their_frames() -> None:
    clips = torch.rand(2, 5, 1, 4, 6)
    (sheets, _) = picture.by_class(set_of(clips, [0, 1]), NONE)
    assert sheets.shape == (1, 1, 2 * 4 + 1, 3 * 6 + 2)
    for t, (top, left) in enumerate([(0, 0), (0, 7), (0, 14), (5, 0), (5, 7)]):
        assert torch.equal(sheets[0, :, top : top + 4, left : left + 6], clips[0, t])
    assert (sheets[0, :, 5:, 14:] == picture.BACKGROUND).all() and (sheets[0, :, 4] == picture.BACKGROUND).all()


def test_clips_are_played_frame_by_frame() -> None:
    """Two gray clips of one class in a row, and a clip of one frame."""
    clips = torch.rand(3, 5, 1, 4, 6)
    animations = picture.played(set_of(clips, [0, 1, 0]), NONE)
    for animation, members in zip(animations, ([0, 2], [1]), strict=True):
        with Image.open(BytesIO(animation)) as image:
            assert isinstance(image, PngImageFile) and image.n_frames == 5 and image.info["loop"] == 0
            for t in range(5):
                image.seek(t)
                shown = torch.from_numpy(np.array(image.convert("L"), np.float32)) / 255
                for k, n in enumerate(members):
                    left = k * (6 + picture.GAP)
                    torch.testing.assert_close(shown[:, left : left + 6], clips[n, t, 0], rtol=0, atol=0.003)
                assert image.info["duration"] == picture.FRAME_MS
    (still, _) = picture.played(set_of(clips[:, :1], [0, 1, 0]), NONE)
    with Image.open(BytesIO(still)) as image:
        assert image.size == (2 * 6 + picture.GAP, 4)


def test_series_are_plots_on_one_scale() -> None:
    """A line at the bottom of the scale, one that rises to its top, and one in the middle."""
    series = torch.stack([torch.full((1, 96), -2.0), torch.linspace(-2, 6, 96)[None], torch.full((1, 96), 2.0)])
    rows = picture.by_class(set_of(series, [0, 0, 1]), NONE)
    ink = [(plot.mean(0) < 0.8).numpy() for row in rows for plot in row]
    height, width = ink[0].shape
    assert rows[0].shape[1] == 3
    bottom, rising, middle = (np.argmax(lines, axis=0) for lines in ink)
    assert all(lines.any(axis=0).all() for lines in ink)
    assert bottom.min() >= height - 4 and abs(int(middle[width // 2]) - height // 2) <= 1
    assert rising[0] >= height - 4 and rising[-1] <= 3 and (np.diff(rising.astype(int)) <= 0).all()


def test_each_channel_has_a_line_of_its_own_colour() -> None:
    series = torch.tensor([0.0, 1.0, 2.0])[None, :, None].expand(1, 3, 50)
    (plots, _) = picture.by_class(set_of(series, [0]), NONE)
    lines = plots[0, :, :, 40].T
    colours = {tuple(colour) for colour in lines[(lines.amax(1) - lines.amin(1)) > 0.4].mul(10).round().tolist()}
    assert len(colours) >= 3


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (2, 30), (1, 1), (4, 1, 8, 8), (4, 3, 8, 8)])
def test_every_shape_is_drawn_and_stripped(shape: tuple[int, ...], tmp_path: Path) -> None:
    syn = set_of(torch.rand(3, *shape), [0, 0, 1])
    picture.draw(syn, NONE, tmp_path / "set.png")
    with Image.open(tmp_path / "set.png") as image:
        assert min(image.size) > 100
    rows = picture.by_class(syn, NONE)
    with Image.open(BytesIO(picture.strip(rows[0]))) as image:
        assert image.size == (2 * rows[0].shape[3] + picture.GAP, rows[0].shape[2])


def test_a_series_that_never_changes_is_drawn(tmp_path: Path) -> None:
    picture.draw(set_of(torch.zeros(2, 1, 20), [0, 1]), NONE, tmp_path / "set.png")
    assert (tmp_path / "set.png").stat().st_size


@pytest.mark.parametrize(("layout", "shape"), [("NCL", (2, 9)), ("NTCHW", (3, 1, 4, 4))])
@pytest.mark.parametrize("transform", ["channel", "zca"])
def test_runs_are_shown_and_reported(
    layout: str, shape: tuple[int, ...], transform: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the page, too, a set that is whitened is drawn in the values of its data."""
    samples, labels = np.random.default_rng(0).random((40, *shape)), np.arange(40) % 2
    data, run = tmp_path / "data.npz", tmp_path / "run"
    np.savez(data, x_train=samples, y_train=labels, x_test=samples, y_test=labels, layout=layout)
    api.distill("random", dataset=data, network="mlp", ipc=2, transform=transform, out=run, device="cpu")
    cli.main(["show", str(run), "--png", str(tmp_path / "mine.png")])
    assert (tmp_path / "mine.png").read_bytes() == (run / "synthetic.png").read_bytes()
    said = capsys.readouterr().out
    assert ("series" if layout == "NCL" else "clips") in said and f"4 of {'x'.join(map(str, shape))}, 2 classes" in said
    page = api.report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    clips = layout == "NTCHW"
    assert page.count('<img src="data:image/png;base64,') == (4 if clips else 2)
    assert page.count("<summary>Play the clips") == clips
    assert 'src="http' not in page and page.count("data-class=") == 2
