"""Differentiable Siamese augmentation (DSA): drawn parameters are values, and applying them is a pure function.

Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021. Images are
(N, C, H, W) and normalised, so that zero, with which operations pad, is the mean of the data. Clips are
(N, T, C, H, W): all frames of a clip share one draw and are transformed as separate images. No operation takes series.

* ``color``: brightness x + b, b in [-0.5, 0.5]; then saturation (x - m) s + m, s in [0, 2], m the mean over
  channels; then contrast (x - m) c + m, c in [0.5, 1.5], m the mean over channels and pixels.
* ``crop``: a translation by whole pixels, up to an eighth of each side.
* ``cutout``: a rectangle of half the height and width is set to zero. Its centre is anywhere in the image, and its part
  outside the image is ignored.
* ``flip``: a horizontal flip with probability one half.
* ``scale``: both axes of the sampling grid are multiplied by independent factors in [1/1.2, 1.2].
* ``rotate``: the sampling grid is rotated by up to 15 degrees. Since the grid has normalised coordinates, an image that
  is not square is sheared as well.
* ``crop-dc``, ``scale-dc``, ``rotate-dc``: the operations of DC's evaluation on MNIST (Zhao, Mopuri and Bilen 2021).
  A crop moves its window by up to an eighth of each side, and one pixel less to the right and down than to the left and
  up. Scaling multiplies width and height by independent factors in [0.8, 1.2]. A rotation is by up to 45 degrees.
  Pixels that a crop or a rotation uncovers are filled with the batch mean of their channel before the operation.

The milder operations of the evaluations of Zhou et al. (2022, FRePo) and Loo et al. (2023, RCIG) have separate names:

* ``jitter``: brightness x + b, b in [-0.25, 0.25]; then contrast and saturation as in ``color``, with factors
  log-uniform in [exp(-0.25), exp(0.25)].
* ``zoom``: the image is magnified by a factor log-uniform in [0.8, 1.25] and moved at random. A magnified image still
  covers the whole frame, and a reduced one stays inside it.
* ``translate``: a translation by up to an eighth of each side, not restricted to whole pixels.
* ``cutout-quarter``: a rectangle of a quarter of the height and width, entirely inside the image, is set to zero.

The views under which images are recovered from trained networks and teachers label them (Yin et al. 2023, SRe2L):

* ``resized-crop``: a rectangle is enlarged to the size of the image, with bilinear interpolation inside the rectangle.
  Its area is uniform over [``min_area``, 1] of the image, and its ratio of width to height log-uniform over [3/4, 4/3].
  A rectangle that does not fit into the image is drawn again; after ten of these it is the largest centred one, which
  is a square image as a whole. These are the draws of torchvision's ``RandomResizedCrop``.
* ``roll``: a circular shift by whole pixels, up to ``max_roll`` down or up and right or left. Without ``max_roll`` it
  is up to a seventh of each side: the published 32 of 224 pixels, and 4 of 32.

Sets of mosaics (``condense.mosaic``) have views of their own, which come before all operations, whatever the mode:
``shuffle=f`` puts the f x f tiles of an image in random order, and ``tile=f`` shows one of them or the whole image.

Deviations from the published code: parameters come from keyed draws, where the original
re-seeds the global generator from the system time; all images are transformed at once, each by its own row of
parameters, where the original loops over images. Warps use ``grid_sample`` instead of kornia. The two agree on square
images; on others kornia rotates in pixel coordinates, which is not the published definition. The crops of kornia equal
``resized-crop``, but they draw from the global generator, read the draws, and cut one image after the other: on one
core 100 images of 64x64, each with a draw of its own, take 17 ms with their gradient here, and 33 ms with kornia.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.cudagraph import fused
from condense.data.layout import InputShape, Kind, kind, require_kind
from condense.mosaic import enlarged, joined, tiles_of
from condense.names import spelt, suggest
from condense.rng import Draws
from condense.schema import Checked

Mode = Literal["S", "M", "D", "P"]

_OPTIONS: dict[str, tuple[str, Any]] = {
    "mode=s": ("mode", "S"),
    "mode=m": ("mode", "M"),
    "mode=d": ("mode", "D"),
    "mode=p": ("mode", "P"),
    "align_corners=true": ("align_corners", True),
    "align_corners=false": ("align_corners", False),
    "flips=true": ("flips", True),
    "flips=false": ("flips", False),
}
_NUMBERS: dict[str, int | float] = {"min_area": 0.08, "max_roll": 4, "shuffle": 2, "tile": 2}
"""Options that take a number, with an example."""


TAKES: tuple[Kind, ...] = ("images", "clips")
"""The kinds of samples that all operations take."""

MILD = ("jitter", "zoom", "rotate", "translate", "cutout-quarter")
"""The operations of FRePo's evaluation on grey images; on colour images it uses ``flip`` as well."""


def mild(input_shape: InputShape) -> tuple[str, ...]:
    """Return the operations of FRePo's evaluation for samples of this shape; empty for series and clips."""
    if kind(input_shape) != "images":
        return ()
    return MILD if input_shape[0] == 1 else ("flip", *MILD)


class Params(NamedTuple):
    """The parameters of one draw. As a named tuple it is a pytree, over whose tensors torch.func can map."""

    values: dict[str, Tensor]
    """Parameters by operation, in the order of application: one row shared by all images (siamese) or one per image."""
    applies: dict[str, Tensor] = {}  # noqa: RUF012 - it is never changed
    """Whether an operation is applied: one bool for all images, or one per image. Others are always applied."""

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(self.values)

    def to(self, device: torch.device | str) -> Params:
        return Params(*({name: value.to(device) for name, value in part.items()} for part in self))

    def take(self, index: Tensor | slice) -> Params:
        """Return the parameters of a part of the batch; a row shared by all images is kept."""
        return Params(*({name: v if len(v) == 1 else v[index] for name, v in part.items()} for part in self))


@dataclass(frozen=True)
class Augment(Checked):
    """An augmentation strategy. ``str`` returns the string that ``parse`` reads."""

    ops: tuple[str, ...] = ()
    """Names of operations of this module, each at most once. Without any, images are unchanged."""
    mode: Mode = "S"
    """How operations are chosen. S: one drawn operation for the whole batch. M: all operations, in order. D: flip,
    color, one of crop, scale and rotate, and cutout, in this order, if they are listed (Kim et al. 2022, IDC). P: one
    drawn operation for each image (evaluation of DC and RCIG)."""
    align_corners: bool = False
    """Whether the coordinates -1 and 1 of warps are the centres of the corner pixels (True: MTT, TESLA, FTD, DATM) or
    their outer edges (False: DC, DSA, DM)."""
    flips: bool = False
    """Whether the mirror image of every synthetic image is added to the set before any other operation (Son et al.
    2024, FYI). Real images are never mirrored. An evaluation mirrors the set if the protocol or the training recorded
    with the set has ``flips``, as for RCIG."""
    min_area: float = 0.08
    """The smallest area of the rectangle of ``resized-crop``, as a fraction of the image."""
    max_roll: int | None = None
    """The largest shift of ``roll`` in pixels; None: a seventh of each side."""
    shuffle: int = 1
    """Factor f of mosaics of f x f tiles, at most 9. Above 1 the tiles are put in random order before all operations
    (Sun et al. 2024, RDED)."""
    tile: int = 1
    """Factor f of mosaics of f x f tiles, at most 9. Above 1 an image is replaced by one of its tiles, enlarged to the
    size of the image, with probability 1 - 1/f^2 before all operations (CIM)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for op in self.ops:
            if op not in _OPERATIONS:
                raise ValueError(
                    f"augmentation {str(self)!r}: unknown operation {op!r}; "
                    f"{suggest(op, [*_OPERATIONS, 'dsa', 'none'])} (operations are joined by underscores)"
                )
        if len(set(self.ops)) < len(self.ops):
            raise ValueError(f"augmentation {str(self)!r}: an operation occurs twice; give each once")
        unsupported = [op for op in self.ops if op not in _OF_MODE_D] if self.mode == "D" else []
        if unsupported:
            raise ValueError(
                f"augmentation {str(self)!r}: mode D does not support {unsupported[0]}; give mode=S, M or P"
            )
        if not 0 < self.min_area <= 1:
            raise ValueError(f"augmentation {str(self)!r}: min_area must lie in (0, 1]; the published value is 0.08")
        if self.max_roll is not None and self.max_roll < 0:
            raise ValueError(f"augmentation {str(self)!r}: max_roll is a number of pixels >= 0; give max_roll=4")
        if not (1 <= self.shuffle <= 9 and 1 <= self.tile <= 9):
            raise ValueError(
                f"augmentation {str(self)!r}: shuffle and tile must be from 1 to 9; give 2 for 2 x 2 tiles"
            )

    @classmethod
    def parse(cls, spec: str, *, own: str = "none") -> Augment:
        """Parse ``none``, ``dsa`` (the strategy ``own`` of the data set) or operations joined by underscores,
        with options after a colon: ``dsa:mode=M,align_corners=true``.

        Raises:
            ValueError: an operation is unknown or repeated, or an option is unknown.
        """
        strategy, colon, options = spec.partition(":")
        strategy = own if strategy == "dsa" else strategy
        fields: dict[str, Any] = {}
        for option in options.split(",") if colon else ():
            name, _, number = option.lower().partition("=")
            if name in _NUMBERS:
                try:
                    fields[name] = type(_NUMBERS[name])(number)
                except ValueError:
                    example = f"{name}={_NUMBERS[name]}"
                    raise ValueError(f"augmentation {spec!r}: {option!r} holds no number; give {example}") from None
                continue
            if option.lower() not in _OPTIONS:
                known = [*_OPTIONS, *(f"{name}={example}" for name, example in _NUMBERS.items())]
                raise ValueError(f"augmentation {spec!r}: unknown option {option!r}; {suggest(option, known)}")
            name, value = _OPTIONS[option.lower()]
            fields[name] = value
        return cls(() if strategy == "none" else tuple(strategy.split("_")), **fields)

    def __str__(self) -> str:
        """Return the string that ``parse`` reads back to an equal value."""
        options = [f"mode={self.mode}"] if self.mode != "S" else []
        options += ["align_corners=true"] if self.align_corners else []
        options += ["flips=true"] if self.flips else []
        options += [f"{name}={value}" for name, value in self._numbers().items()]
        strategy = "_".join(self.ops) or "none"
        return f"{strategy}:{','.join(options)}" if options else strategy

    def content(self) -> dict[str, Any]:
        """Return the settings that affect real images, for hashes."""
        fields: dict[str, Any] = {"ops": list(self.ops)}
        if self.ops:
            fields |= {"mode": self.mode, "align_corners": self.align_corners, **self._numbers()}
        return fields

    def _numbers(self) -> dict[str, float]:
        """Return the options that take a number and differ from their defaults."""
        values = {name: getattr(self, name) for name in _NUMBERS}
        return {name: value for name, value in values.items() if value != getattr(type(self), name)}

    def require_kind(self, input_shape: Sequence[int], field: str = "augment") -> None:
        """Raise ValueError, which names ``field``, if the operations do not take samples of this shape."""
        what = f"augmentation {str(self)!r}"
        if self.ops or self.flips or self.views:
            remedy = f"give {spelt(field, 'none')}"
            require_kind(what, TAKES, input_shape, remedy)
        for view, factor in self.views.items():
            height, width = input_shape[-2:]
            if height % factor or width % factor:
                raise ValueError(
                    f"{what}: an image of {height} x {width} pixels is no mosaic of {factor} x {factor} equal tiles; "
                    f"give {view}= a factor that divides both sides"
                )

    def only(self, ops: Sequence[str]) -> Augment:
        """Return this strategy with those of its operations that are among ``ops``."""
        return replace(self, ops=tuple(op for op in self.ops if op in ops))

    @property
    def views(self) -> dict[str, int]:
        """The factors of the views of mosaics that change something, in the order in which they are applied."""
        return {view: factor for view in _VIEWS if (factor := getattr(self, view)) > 1}

    @property
    def copies(self) -> int:
        """The number of images that ``mirrored`` returns for each image."""
        return 2 if self.flips else 1

    def mirrored(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return synthetic images (n, ..., H, W) and targets (n, ...), with ``flips`` followed by the mirror images."""
        if not self.flips:
            return images, targets
        return torch.cat([images, images.flip(-1)]), torch.cat([targets, targets])

    def sample(self, draws: Draws, num: int, input_shape: Sequence[int], siamese: bool) -> Params:
        """Draw parameters for ``num`` images of shape (C, H, W), or clips of shape (T, C, H, W).

        A siamese draw is one row that all images share. It can be applied to batches of any size, and so to the real
        and the synthetic batch. Draws on a device are never read: an operation that is not chosen is computed, too, and
        its result is ignored.

        Raises:
            ValueError: there are operations and the shape is that of a series.
        """
        self.require_kind(input_shape)
        rows = 1 if siamese else num
        views = {view: _VIEWS[view].draw(draws, rows, factor**2) for view, factor in self.views.items()}
        if not self.ops:
            return Params(views)
        ops = [op for op in _OF_MODE_D if op in self.ops] if self.mode == "D" else self.ops
        u = draws.uniform(len(ops), rows, max(_OPERATIONS[op].numbers for op in ops))
        values = views | {op: self._drawn(op, x, *input_shape[-2:]) for op, x in zip(ops, u, strict=True)}
        if self.mode == "M":
            return Params(values)
        alternatives = [op for op in ops if self.mode != "D" or op in ("crop", "scale", "rotate")]
        if not alternatives:
            return Params(values)
        chosen = draws.integers(0, len(alternatives), rows if self.mode == "P" else 1)
        if draws.on_host and self.mode != "P":
            dropped = set(alternatives) - {alternatives[int(chosen)]}
            return Params({op: value for op, value in values.items() if op not in dropped})
        return Params(values, {op: chosen == i for i, op in enumerate(alternatives)})

    def _drawn(self, op: str, u: Tensor, height: int, width: int) -> Tensor:
        """Turn uniform numbers (rows, at least ``numbers``) into the parameters of an operation."""
        operation = _OPERATIONS[op]
        option = () if operation.option is None else (getattr(self, operation.option),)
        return operation.draw(u[:, : operation.numbers], *option, height, width)

    @fused()
    def apply(self, x: Tensor, params: Params) -> Tensor:
        """Apply ``params`` to images (N, C, H, W) or clips (N, T, C, H, W).

        The result is deterministic, differentiable in ``x``, and has its dtype.
        """
        if x.dim() == 5 and params.values:
            frames = x.shape[1]
            rows = [{n: v if len(v) == 1 else v.repeat_interleave(frames, 0) for n, v in p.items()} for p in params]
            return self.apply(x.flatten(0, 1), Params(*rows)).unflatten(0, (-1, frames))
        values, applies = params.to(x.device)
        for name, value in values.items():
            assert len(value) in (1, len(x)), f"{len(value)} rows of {name} for {len(x)} images"
            if name in _VIEWS:
                x = _VIEWS[name].apply(x, value, self.views[name])
                continue
            changed = _OPERATIONS[name].apply(x, value, self.align_corners)
            x = torch.where(applies[name][:, None, None, None], changed, x) if name in applies else changed
        return x


def _extent(side: int, ratio: float) -> int:
    return int(side * ratio + 0.5)


def _per_image(value: Tensor, x: Tensor) -> Tensor:
    """Reshape (rows,) to (rows, 1, 1, 1), in the dtype of the images."""
    return value[:, None, None, None].to(x.dtype)


def _integers(u: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Return integers (rows, len(ranges)), uniform over {low, ..., high - 1} if ``u`` (rows, 3) is uniform over
    [0, 1)."""
    columns = [(x * (high - low)).floor() + low for x, (low, high) in zip(u.unbind(1), ranges, strict=False)]
    return torch.stack(columns, 1).long()


def _draw_color(u: Tensor, height: int, width: int) -> Tensor:
    """(rows, 3): brightness, saturation, contrast."""
    return torch.stack([u[:, 0] - 0.5, u[:, 1] * 2, u[:, 2] + 0.5], 1)


def _color(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    brightness, saturation, contrast = (_per_image(v, x) for v in value.unbind(1))
    x = x + brightness
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * saturation + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * contrast + mean


def _draw_crop(u: Tensor, height: int, width: int) -> Tensor:
    """(rows, 2): the shift of the window down and right, in pixels."""
    limits = (_extent(side, 0.125) for side in (height, width))
    return _integers(u, [(-limit, limit + 1) for limit in limits])


def _crop(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    shifted, inside = _shifted(x, value)
    return shifted * inside


def _shifted(x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return y[i, j] = x[i + down, j + right] and a mask of the pixels where that is inside x; elsewhere y is
    arbitrary."""
    height, width = x.shape[2:]
    rows = (torch.arange(height, device=x.device) + value[:, :1])[:, None, :, None]
    columns = (torch.arange(width, device=x.device) + value[:, 1:])[:, None, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    x = torch.take_along_dim(x, rows.clamp(0, height - 1), 2)
    return torch.take_along_dim(x, columns.clamp(0, width - 1), 3), inside


def _draw_crop_dc(u: Tensor, height: int, width: int) -> Tensor:
    """(rows, 2), as ``_draw_crop``."""
    limits = (_extent(side, 0.125) for side in (height, width))
    return _integers(u, [(-limit, max(limit, 1)) for limit in limits])


def _crop_dc(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    shifted, inside = _shifted(x, value)
    return torch.where(inside, shifted, _batch_mean(x))


def _batch_mean(x: Tensor) -> Tensor:
    """Return the mean of each channel over the batch, (1, C, 1, 1)."""
    return x.mean((0, 2, 3), keepdim=True)


def _draw_cutout(u: Tensor, height: int, width: int) -> Tensor:
    """(rows, 2): row and column of the centre, which is a pixel if the side cut out is odd, else a pixel edge."""
    return _integers(u, [(0, side + 1 - _extent(side, 0.5) % 2) for side in (height, width)])


def _cutout(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    def covered(side: int, centre: Tensor) -> Tensor:
        extent = _extent(side, 0.5)
        offset = torch.arange(side, device=x.device) - centre[:, None] + extent // 2
        return (offset >= 0) & (offset < extent)

    rows, columns = covered(x.shape[2], value[:, 0]), covered(x.shape[3], value[:, 1])
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _draw_flip(u: Tensor, height: int, width: int) -> Tensor:
    """(rows,): whether to flip."""
    return u[:, 0] < 0.5


def _flip(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    return torch.where(value[:, None, None, None], x.flip(3), x)


def _draw_scale(u: Tensor, height: int, width: int) -> Tensor:
    """(rows, 2): the factors of the horizontal and vertical coordinates; a factor below one enlarges."""
    return u[:, :2] * (1.2 - 1 / 1.2) + 1 / 1.2


def _draw_scale_dc(u: Tensor, height: int, width: int) -> Tensor:
    """(rows, 2), as ``_draw_scale``."""
    return 1 / (u[:, :2] * 0.4 + 0.8)


def _scale(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    horizontal, vertical = value.unbind(1)
    zero = torch.zeros_like(horizontal)
    return _warp(x, (horizontal, zero, zero, vertical), align_corners)


def _draw_rotate(u: Tensor, height: int, width: int) -> Tensor:
    """(rows,): the angle in radians."""
    return (u[:, 0] * 2 - 1) * math.radians(15)


def _draw_rotate_dc(u: Tensor, height: int, width: int) -> Tensor:
    """(rows,): the angle in radians."""
    return 3 * _draw_rotate(u, height, width)


def _rotate_dc(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    mean = _batch_mean(x)
    return _rotate(x - mean, value, align_corners) + mean


def _rotate(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    value = value.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = value.cos(), value.sin()
    return _warp(x, (cos, -sin, sin, cos), align_corners)


def _draw_jitter(u: Tensor, height: int, width: int) -> Tensor:
    """(rows, 3): brightness, contrast, saturation."""
    u = u * 0.5 - 0.25
    return torch.stack([u[:, 0], u[:, 1].exp(), u[:, 2].exp()], 1)


def _jitter(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    brightness, contrast, saturation = (_per_image(v, x) for v in value.unbind(1))
    x = x + brightness
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * contrast + mean
    mean = x.mean(1, keepdim=True)
    return (x - mean) * saturation + mean


def _draw_zoom(u: Tensor, height: int, width: int) -> Tensor:
    """(rows, 3): the factor of both coordinates, then the shift of the window right and down in normalised coordinates;
    a factor below one magnifies."""
    u = u * 2 - 1
    factor = (u[:, :1] * math.log(1.25)).exp()
    return torch.cat([factor, u[:, 1:] * (1 - factor).abs()], 1)


def _zoom(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    factor, right, down = value.unbind(1)
    zero = torch.zeros_like(factor)
    return _warp(x, (factor, zero, zero, factor), align_corners, (right, down))


def _draw_translate(u: Tensor, height: int, width: int) -> Tensor:
    """(rows, 2): the shift of the window right and down, in normalised coordinates, in which the image spans 2."""
    return u[:, :2] * 0.5 - 0.25


def _translate(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    right, down = value.unbind(1)
    one, zero = torch.ones_like(right), torch.zeros_like(right)
    return _warp(x, (one, zero, zero, one), align_corners, (right, down))


def _draw_cutout_quarter(u: Tensor, height: int, width: int) -> Tensor:
    """(rows, 2): the first row and column of the rectangle."""
    return _integers(u, [(0, side - side // 4 + 1) for side in (height, width)])


def _cutout_quarter(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    def covered(side: int, first: Tensor) -> Tensor:
        offset = torch.arange(side, device=x.device) - first[:, None]
        return (offset >= 0) & (offset < side // 4)

    rows, columns = covered(x.shape[2], value[:, 0]), covered(x.shape[3], value[:, 1])
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _draw_order(draws: Draws, rows: int, num: int) -> Tensor:
    """(rows, num): the number of the tile that is moved to each place."""
    return draws.words(rows * num).view(rows, num).argsort(dim=1, stable=True)


def _shuffle(x: Tensor, value: Tensor, factor: int) -> Tensor:
    grid = tiles_of(x, factor).unflatten(0, (factor**2, -1))  # (tile, N, C, h, w)
    return joined(torch.take_along_dim(grid, value.T[:, :, None, None, None], 0).flatten(0, 1), factor)


def _draw_tile(draws: Draws, rows: int, num: int) -> Tensor:
    """(rows,): the number of the tile, or -1 for the whole image."""
    tile = draws.integers(0, num, rows)
    return torch.where(draws.integers(0, num, rows) == 0, -1, tile)


def _tile(x: Tensor, value: Tensor, factor: int) -> Tensor:
    grid = tiles_of(x, factor).unflatten(0, (factor**2, -1))  # (tile, N, C, h, w)
    (chosen,) = torch.take_along_dim(grid, value.clamp(min=0)[None, :, None, None, None], 0)
    return torch.where(value[:, None, None, None] < 0, x, enlarged(chosen, (x.shape[2], x.shape[3])))


_CANDIDATES = 10
"""The number of rectangles that are drawn for one crop; the first that fits is taken."""


def _draw_resized_crop(u: Tensor, min_area: float, height: int, width: int) -> Tensor:
    """(rows, 4): the first row and column of the rectangle, its height and width, in whole pixels."""
    area, log_ratio = u[:, :_CANDIDATES], u[:, _CANDIDATES : 2 * _CANDIDATES]
    area = (min_area + (1 - min_area) * area) * (height * width)
    ratio = ((2 * log_ratio - 1) * math.log(4 / 3)).exp()
    sizes = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], 2)
    most = torch.stack([u.new_full((), height), u.new_full((), width)])
    fits = ((sizes > 0) & (sizes <= most)).all(2)
    first = fits.int().argmax(1)[:, None, None].expand(-1, 1, 2)
    largest = most.minimum((most.flip(0) * (4 / 3)).round())
    size = torch.where(fits.any(1)[:, None], sizes.gather(1, first)[:, 0], largest)
    free = most - size
    moved = torch.where(fits.any(1)[:, None], (u[:, 2 * _CANDIDATES :] * (free + 1)).floor(), (free / 2).floor())
    return torch.cat([moved, size], 1).long()


def _resized_crop(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    first, size = value.to(dtype).split(2, 1)

    def places(axis: int) -> Tensor:
        """Where the rows or columns of the result lie, (rows, side), in normalised coordinates."""
        side, begin, extent = x.shape[2 + axis], first[:, axis, None], size[:, axis, None]
        index = torch.arange(side, dtype=dtype, device=x.device)
        if align_corners:
            inside = index * ((extent - 1) / max(side - 1, 1))
        else:
            inside = ((index + 0.5) * (extent / side) - 0.5).clamp(min=0).minimum(extent - 1)
        return (2 * (begin + inside) + 1) / side - 1

    v, u = places(0), places(1)
    grid = torch.stack(torch.broadcast_tensors(u[:, None, :], v[:, :, None]), 3).expand(len(x), -1, -1, -1)
    return F.grid_sample(x.to(dtype), grid, "bilinear", "border", align_corners=False).to(x.dtype)


def _draw_roll(u: Tensor, max_roll: int | None, height: int, width: int) -> Tensor:
    """(rows, 2): the shift up and left, in pixels."""
    most = [side // 7 if max_roll is None else max_roll for side in (height, width)]
    return _integers(u, [(-shift, shift + 1) for shift in most])


def _roll(x: Tensor, value: Tensor, align_corners: bool) -> Tensor:
    for axis, shift in enumerate(value.unbind(1), 2):
        index = (torch.arange(x.shape[axis], device=x.device) + shift[:, None]) % x.shape[axis]
        shape = (len(value), 1, -1, 1) if axis == 2 else (len(value), 1, 1, -1)
        x = torch.take_along_dim(x, index.view(shape), axis)
    return x


def _warp(
    x: Tensor,
    matrix: tuple[Tensor, Tensor, Tensor, Tensor],
    align_corners: bool,
    offset: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Sample images at (a u + b v, c u + d v) plus ``offset``, where (u, v) are normalised coordinates.

    Interpolation is bilinear, with zeros outside the image. The grid is at least float32 and computed without a matrix
    product, whose precision TF32 or autocast would reduce.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    v, u = (
        torch.linspace(-1, 1, side, dtype=dtype, device=x.device) * (1 if align_corners else 1 - 1 / side)
        for side in x.shape[2:]
    )
    a, b, c, d = (entry.to(dtype)[:, None, None] for entry in matrix)
    grid = torch.stack([a * u + b * v[:, None], c * u + d * v[:, None]], 3)
    if offset is not None:
        grid = grid + torch.stack(offset, 1).to(dtype)[:, None, None]
    grid = grid.expand(len(x), -1, -1, -1)
    return F.grid_sample(x.to(dtype), grid, "bilinear", "zeros", align_corners).to(x.dtype)


_OF_MODE_D = ("flip", "color", "crop", "scale", "rotate", "cutout")
"""The operations that mode D supports."""


class _Operation(NamedTuple):
    draw: Callable[..., Tensor]
    """Turns uniform numbers (rows, numbers), the value of the option if there is one, and the height and width of an
    image into parameters (rows, ...)."""
    apply: Callable[[Tensor, Tensor, bool], Tensor]
    option: str | None = None
    """The field of ``Augment`` that bounds the draws."""
    numbers: int = 3


_OPERATIONS = {
    "color": _Operation(_draw_color, _color),
    "crop": _Operation(_draw_crop, _crop),
    "cutout": _Operation(_draw_cutout, _cutout),
    "flip": _Operation(_draw_flip, _flip),
    "scale": _Operation(_draw_scale, _scale),
    "rotate": _Operation(_draw_rotate, _rotate),
    "crop-dc": _Operation(_draw_crop_dc, _crop_dc),
    "scale-dc": _Operation(_draw_scale_dc, _scale),
    "rotate-dc": _Operation(_draw_rotate_dc, _rotate_dc),
    "jitter": _Operation(_draw_jitter, _jitter),
    "zoom": _Operation(_draw_zoom, _zoom),
    "translate": _Operation(_draw_translate, _translate),
    "cutout-quarter": _Operation(_draw_cutout_quarter, _cutout_quarter),
    "resized-crop": _Operation(_draw_resized_crop, _resized_crop, "min_area", 2 * _CANDIDATES + 2),
    "roll": _Operation(_draw_roll, _roll, "max_roll"),
}


class _View(NamedTuple):
    draw: Callable[[Draws, int, int], Tensor]
    """Draws parameters (rows, ...), given the number of rows and of tiles."""
    apply: Callable[[Tensor, Tensor, int], Tensor]


_VIEWS = {"shuffle": _View(_draw_order, _shuffle), "tile": _View(_draw_tile, _tile)}
