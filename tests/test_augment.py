"""The augmentation: twin, gradients, draws."""

import itertools
import math
import random

import kornia.geometry.transform as kornia
import numpy as np
import pytest
import torch
from kornia.augmentation import RandomResizedCrop

from condense.augment import MILD, Augment, Mode, Params, mild
from condense.rng import Rng
from tests.reference import dsa

OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")
ALL = "_".join(OPS)
VIEWS = ("resized-crop", "roll")
EVERY = (*OPS, *MILD, *VIEWS)
SHAPE = (3, 8, 7)


def images(num: int, shape: tuple[int, int, int] = SHAPE, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def draw(augment: Augment, num: int, siamese: bool, key: int = 0) -> Params:
    return augment.sample(Rng(key)("augment"), num, SHAPE, siamese)


@pytest.mark.parametrize("siamese", [True, False])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("strategy", [*EVERY, ALL, "_".join(MILD)])
def test_agrees_with_the_twin(strategy: str, align_corners: bool, siamese: bool) -> None:
    augment, x = Augment(tuple(strategy.split("_")), "M", align_corners), images(4)
    for key in range(3):
        params = draw(augment, 4, siamese, key)
        expected = dsa.apply(x.numpy(), params, align_corners)
        np.testing.assert_allclose(augment.apply(x, params).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("align_corners", [True, False])
def test_warps_agree_with_kornia_on_square_images(align_corners: bool) -> None:
    x = images(5, (2, 9, 9))
    angle = torch.linspace(-0.26, 0.26, 5)
    ours = Augment(("rotate",), align_corners=align_corners).apply(x, Params({"rotate": angle}))
    theirs = kornia.rotate(x, torch.rad2deg(angle.double()), align_corners=align_corners)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    factor = torch.linspace(0.84, 1.19, 10).view(5, 2)
    ours = Augment(("scale",), align_corners=align_corners).apply(x, Params({"scale": factor}))
    theirs = kornia.scale(x, 1 / factor.double(), align_corners=align_corners)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_align_corners_changes_scale_and_rotate_only() -> None:
    x = images(2)
    for op in EVERY:
        params = draw(Augment((op,)), 2, False)
        outer, centre = (Augment((op,), align_corners=flag).apply(x, params) for flag in (False, True))
        warps = ("scale", "rotate", "zoom", "translate", "resized-crop")
        assert torch.equal(outer, centre) == (op not in warps), op


def test_ranges() -> None:
    num, shape = 20_000, (3, 32, 28)
    values = Augment(OPS, "M").sample(Rng(1)("augment"), num, shape, siamese=False).values
    for column, (low, high) in zip(values["color"].T, [(-0.5, 0.5), (0.0, 2.0), (0.5, 1.5)], strict=True):
        assert low <= column.min() < low + 1e-3 and high - 1e-3 < column.max() <= high
    assert [set(column.tolist()) for column in values["crop"].T] == [set(range(-4, 5))] * 2
    assert [set(column.tolist()) for column in values["cutout"].T] == [set(range(33)), set(range(29))]
    assert set(values["flip"].tolist()) == {True, False}
    assert abs(values["flip"].double().mean() - 0.5) < 0.02
    assert 1 / 1.2 <= values["scale"].min() < 0.834 and 1.199 < values["scale"].max() <= 1.2
    assert math.radians(14.99) < values["rotate"].abs().max() <= math.radians(15)
    assert values["rotate"].min() < 0 < values["rotate"].max()


@pytest.mark.parametrize("align_corners", [True, False])
def test_crops_agree_with_kornia_on_images_of_any_shape(align_corners: bool) -> None:
    x, augment = images(6), Augment(("resized-crop",), align_corners=align_corners)
    params = draw(augment, 6, siamese=False)
    row, column, height, width = params.values["resized-crop"].double().unbind(1)
    right, bottom = column + width - 1, row + height - 1
    corners = torch.stack([column, row, right, row, right, bottom, column, bottom], 1).view(6, 4, 2)
    theirs = RandomResizedCrop(SHAPE[1:], align_corners=align_corners, cropping_mode="slice")
    size = torch.tensor(SHAPE[1:]).expand(6, 2)
    given = {"src": corners, "dst": corners, "batch_prob": torch.ones(6), "output_size": size}
    expected = theirs(x, params=given | {"forward_input_shape": torch.tensor(x.shape)})
    torch.testing.assert_close(augment.apply(x, params), expected, rtol=0, atol=1e-6)


def test_draws_of_crops_are_those_of_torchvision() -> None:
    """Area and ratio of rectangles on an image large enough that whole pixels hardly matter."""
    num, side = 20_000, 1000
    augment = Augment(("resized-crop",), min_area=0.25)
    row, column, height, width = augment.sample(Rng(1)("a"), num, (3, side, side), False).values["resized-crop"].T
    assert (row >= 0).all() and (row + height <= side).all() and (column >= 0).all() and (column + width <= side).all()
    area, ratio = height * width / side**2, (width / height).log()
    assert 0.249 < area.min() < 0.251 and area.max() > 0.98
    assert math.log(0.745) < ratio.min() < math.log(0.76) and math.log(1.31) < ratio.max() < math.log(1.34)
    small = area < 0.5  # all of these fit, so that none was drawn again
    assert area[small].mean().item() == pytest.approx(0.375, abs=0.004)
    assert ratio[small].mean().abs() < 0.01 and ratio[small].std().item() == pytest.approx(0.575 / 12**0.5, abs=0.005)
    free = side - height
    assert ((row + 0.5) / (free + 1)).mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_crop_that_never_fits_is_the_largest_centred_one() -> None:
    for shape, expected in [
        ((1, 64, 64), [0, 0, 64, 64]),
        ((1, 20, 60), [0, 16, 20, 27]),
        ((1, 60, 20), [16, 0, 27, 20]),
    ]:
        augment = Augment(("resized-crop",), min_area=1.0)
        rows = augment.sample(Rng(1)("a"), 200, shape, False).values["resized-crop"]
        whole = (rows == torch.tensor(expected)).all(1).double().mean()
        assert whole == 1 if shape[1] != shape[2] else whole > 0.7, "a ratio of nearly 1 fits a square as well"


def test_rolls_are_circular_and_bounded() -> None:
    x, augment = images(3), Augment(("roll",), max_roll=2)
    shift = torch.tensor([[2, -1], [0, 0], [-3, 4]])
    found = augment.apply(x, Params({"roll": shift}))
    expected = [image.roll((-down, -right), (1, 2)) for image, (down, right) in zip(x, shift.tolist(), strict=True)]
    assert torch.equal(found, torch.stack(expected))
    drawn = augment.sample(Rng(1)("a"), 2000, SHAPE, False).values["roll"]
    assert [set(column.tolist()) for column in drawn.T] == [set(range(-2, 3))] * 2


@pytest.mark.parametrize(("side", "most"), [(224, 32), (32, 4), (28, 4), (8, 1), (6, 0)])
def test_rolls_without_a_bound_fit_the_image(side: int, most: int) -> None:
    """The published shifts: 32 of 224 pixels for ImageNet, 4 of 32 for CIFAR."""
    drawn = Augment(("roll",)).sample(Rng(1)("a"), 5000, (1, side, 14), False).values["roll"]
    assert [set(column.tolist()) for column in drawn.T] == [set(range(-most, most + 1)), set(range(-2, 3))]


def test_options_with_a_number_bound_the_draws_and_belong_to_the_content() -> None:
    augment = Augment.parse("resized-crop_flip_roll:mode=M,min_area=0.5,max_roll=32")
    assert augment == Augment(("resized-crop", "flip", "roll"), "M", min_area=0.5, max_roll=32)
    assert Augment.parse(str(augment)) == augment
    assert augment.content() == Augment(augment.ops, "M").content() | {"min_area": 0.5, "max_roll": 32}


DC = "crop-dc_scale-dc_rotate-dc"


def test_ranges_of_dc() -> None:
    values = Augment.parse(f"{DC}:mode=M").sample(Rng(1)("augment"), 20_000, (1, 28, 32), siamese=False).values
    assert [set(column.tolist()) for column in values["crop-dc"].T] == [set(range(-4, 4))] * 2
    longer = 1 / values["scale-dc"]
    assert 0.8 - 1e-6 <= longer.min() < 0.801 and 1.199 < longer.max() <= 1.2 + 1e-6
    assert longer.mean().item() == pytest.approx(1.0, abs=0.01)
    assert math.radians(44.9) < values["rotate-dc"].max() <= math.radians(45) + 1e-6
    assert -math.radians(45) - 1e-6 <= values["rotate-dc"].min() < -math.radians(44.9)


def test_what_dc_uncovers_takes_the_mean_of_the_batch() -> None:
    x = images(3)
    mean = x.mean((0, 2, 3))
    shift = torch.tensor([[2, -1], [0, 0], [-8, 3]])
    found = Augment.parse(DC).apply(x, Params({"crop-dc": shift}))
    assert torch.equal(found[0, :, :6, 1:], x[0, :, 2:, :6]) and torch.equal(found[1], x[1])
    for uncovered in (found[0, :, 6:], found[0, :, :, :1], found[2]):
        torch.testing.assert_close(uncovered, mean[:, None, None].expand_as(uncovered))
    angle = torch.tensor([math.pi / 4, 0.0, 0.0], dtype=torch.float64)
    turned = Augment.parse(DC).apply(x, Params({"rotate-dc": angle}))
    torch.testing.assert_close(turned[0, :, 0, 0], mean)
    torch.testing.assert_close(turned[1:], x[1:])
    plain = Augment(("rotate",)).apply(x - mean[:, None, None], Params({"rotate": angle}))
    torch.testing.assert_close(turned, plain + mean[:, None, None])


def test_dc_gives_each_image_one_operation_and_scales_to_zero() -> None:
    augment, x = Augment.parse(f"{DC}:mode=P"), images(40)
    done = torch.stack(list(draw(augment, 40, False).applies.values()))
    assert (done.sum(0) == 1).all() and done.any(1).all()
    smaller = torch.full((40, 2), 1.25)
    expected = Augment(("scale",)).apply(x, Params({"scale": smaller}))
    assert torch.equal(augment.apply(x, Params({"scale-dc": smaller})), expected)


@pytest.mark.parametrize("size", [6, 7, 8, 9])
def test_cutout_covers_a_quarter_at_most_and_never_nothing(size: int) -> None:
    augment, x = Augment(("cutout",)), torch.ones(500, 1, size, size)
    params = augment.sample(Rng(0)("augment"), 500, (1, size, size), siamese=False)
    covered = (augment.apply(x, params) == 0).sum((1, 2, 3))
    side = int(size / 2 + 0.5)
    assert covered.max() == side * side and covered.min() >= (side // 2) ** 2 > 0


@pytest.mark.parametrize("mode", ["S", "M"])
@pytest.mark.parametrize("siamese", [True, False])
def test_replay_is_exact(mode: Mode, siamese: bool) -> None:
    augment, x = Augment(OPS, mode), images(6, dtype=torch.float32)
    for key in range(8):
        first, second = draw(augment, 6, siamese, key), draw(augment, 6, siamese, key)
        assert first.ops == second.ops
        assert torch.equal(augment.apply(x, first), augment.apply(x, first))
        assert torch.equal(augment.apply(x, first), augment.apply(x, second))


@pytest.mark.parametrize("siamese", [True, False])
@pytest.mark.parametrize("op", EVERY)
def test_gradient_reaches_the_images(op: str, siamese: bool) -> None:
    augment, x = Augment((op,)), images(2, (2, 5, 4)).requires_grad_()
    params = augment.sample(Rng(3)("augment"), 2, (2, 5, 4), siamese)
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, params), x)
    (grad,) = torch.autograd.grad(augment.apply(x, params).square().sum(), x)
    assert grad.isfinite().all() and grad.count_nonzero() > 0


def test_siamese_images_get_the_same_draw() -> None:
    augment, real = Augment(OPS, "M"), images(1).expand(5, -1, -1, -1)
    syn = real[:2].clone()
    for key in range(5):
        params = draw(augment, 5, True, key)
        out = augment.apply(real, params)
        assert torch.equal(out, out[:1].expand_as(out))
        assert torch.equal(augment.apply(syn, params), out[:2])
        assert not torch.equal(out, real)


def test_a_siamese_draw_does_not_depend_on_the_number_of_images() -> None:
    augment = Augment(OPS, "M")
    few, many = draw(augment, 1, True), draw(augment, 256, True)
    assert all(torch.equal(few.values[op], many.values[op]) for op in OPS)


@pytest.mark.parametrize("op", EVERY)
def test_images_of_their_own_draw_differ(op: str) -> None:
    augment, x = Augment((op,)), images(1).expand(16, -1, -1, -1)
    distinct = torch.unique(augment.apply(x, draw(augment, 16, False)).flatten(1), dim=0)
    assert len(distinct) >= (2 if op == "flip" else 5)


def test_single_mode_picks_every_operation_equally_often() -> None:
    augment, keys = Augment(OPS), 1200
    drawn = [draw(augment, 4, False, key).ops for key in range(keys)]
    assert all(len(ops) == 1 for ops in drawn)
    counts = [drawn.count((op,)) for op in OPS]
    assert sum(counts) == keys and min(counts) > keys / 6 * 0.75 and max(counts) < keys / 6 * 1.25


def test_multiple_mode_has_all_in_the_order_of_the_strategy() -> None:
    augment, x = Augment(("rotate", "color", "flip"), "M"), images(3)
    params = draw(augment, 3, False)
    assert params.ops == ("rotate", "color", "flip")
    expected = x
    for op in params.ops:
        expected = Augment((op,)).apply(expected, Params({op: params.values[op]}))
    assert torch.equal(augment.apply(x, params), expected)


def test_the_mode_of_idc_always_flips_colours_and_cuts_out() -> None:
    """D: flip, color, one of crop, scale and rotate, cutout, in this order."""
    augment, keys = Augment(OPS, "D"), 600
    drawn = [draw(augment, 4, False, key).ops for key in range(keys)]
    assert {(*ops[:2], ops[3]) for ops in drawn} == {("flip", "color", "cutout")} and {len(ops) for ops in drawn} == {4}
    counts = [sum(ops[2] == op for ops in drawn) for op in ("crop", "scale", "rotate")]
    assert sum(counts) == keys and min(counts) > keys / 3 * 0.8


@pytest.mark.parametrize("siamese", [True, False])
def test_the_mode_of_idc_agrees_with_the_twin(siamese: bool) -> None:
    augment, x = Augment(OPS, "D"), images(4)
    for key in range(4):
        params = draw(augment, 4, siamese, key)
        np.testing.assert_allclose(augment.apply(x, params).numpy(), dsa.apply(x.numpy(), params, False), atol=1e-12)


@pytest.mark.parametrize(
    ("ops", "drawn"),
    [
        (("color", "crop", "cutout"), ("color", "crop", "cutout")),
        (("cutout", "flip"), ("flip", "cutout")),
        (("color",), ("color",)),
        ((), ()),
    ],
)
def test_the_mode_of_idc_has_only_what_is_listed(ops: tuple[str, ...], drawn: tuple[str, ...]) -> None:
    """The strategies of IDC's matching: without cutout or without flip."""
    assert all(draw(Augment(ops, "D"), 2, True, key).ops == drawn for key in range(5))


def test_mirrored_joins_every_image_by_its_mirror_image() -> None:
    x, y = images(3), torch.tensor([2, 0, 1])
    plain, flips = Augment(OPS), Augment(OPS, flips=True)
    assert plain.mirrored(x, y) == (x, y) and plain.copies == 1 and flips.copies == 2
    both, targets = flips.mirrored(x, y)
    assert torch.equal(both[:3], x) and targets.tolist() == [2, 0, 1, 2, 0, 1]
    for column in range(SHAPE[2]):
        assert torch.equal(both[3:, :, :, column], x[:, :, :, SHAPE[2] - 1 - column])
    soft = torch.rand(3, 5)
    assert torch.equal(flips.mirrored(x, soft)[1], torch.cat([soft, soft]))


def test_gradient_flows_through_image_and_mirror_image() -> None:
    x, factor = images(2).requires_grad_(), images(4)
    both, _ = Augment(flips=True).mirrored(x, torch.zeros(2))
    (grad,) = torch.autograd.grad((both * factor).sum(), x)
    assert torch.equal(grad, factor[:2] + factor[2:].flip(3))


def test_flips_change_neither_draws_nor_what_is_done_to_real_images() -> None:
    plain, flips = Augment(OPS), Augment(OPS, flips=True)
    one, two = draw(plain, 4, False), draw(flips, 4, False)
    assert one.ops == two.ops and torch.equal(plain.apply(images(4), one), flips.apply(images(4), two))
    assert plain.content() == flips.content()


def test_one_operation_an_image_leaves_the_others_as_they_are() -> None:
    """Mode P: of a batch each image differs by one operation."""
    augment, x = Augment(MILD, "P"), images(40)
    params = draw(augment, 40, False)
    alone = [Augment((op,)).apply(x, Params(*({op: part[op]} for part in params))) for op in params.ops]
    changed = torch.stack([(y - x).abs().amax((1, 2, 3)) > 1e-12 for y in alone])
    assert (changed.sum(0) <= 1).all() and (changed.sum(1) > 2).all()
    expected = x + sum(y - x for y in alone)
    torch.testing.assert_close(augment.apply(x, params), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["S", "M"])
def test_none_is_the_identity(mode: Mode) -> None:
    augment, x = Augment.parse(f"none:mode={mode}"), images(2)
    params = draw(augment, 2, True)
    assert params.ops == () and augment.apply(x, params) is x
    assert augment == Augment(mode=mode)


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("mode", ["S", "M", "D", "P"])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("ops", [OPS, (), ("flip",), ("rotate", "crop")])
def test_parse_reads_what_str_writes(ops: tuple[str, ...], mode: Mode, align_corners: bool, flips: bool) -> None:
    augment = Augment(ops, mode, align_corners, flips)
    assert Augment.parse(str(augment)) == augment
    assert str(Augment(ops)) == ("_".join(ops) or "none")


def test_parse_takes_the_strategy_of_the_data_set() -> None:
    assert Augment.parse("dsa", own="crop_flip") == Augment(("crop", "flip"))
    expected = Augment(("crop", "flip"), "M", True)
    assert Augment.parse("dsa:align_corners=True,mode=M", own="crop_flip") == expected
    assert Augment.parse("dsa") == Augment()
    assert Augment.parse("dsa:flips=true", own="crop") == Augment(("crop",), flips=True)
    assert Augment.parse("none:flips=true") == Augment(flips=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("color_corp", "unknown operation 'corp'; did you mean 'crop'?"),
        ("none_crop", "unknown operation 'none'"),
        ("dsaa", "did you mean 'dsa'?"),
        ("", "there are color, crop"),
        ("Flip", "did you mean 'flip'?"),
        ("crop_flip_crop", "an operation occurs twice"),
        ("crop:mode=X", "unknown option 'mode=X'; did you mean 'mode="),
        ("crop:align_corner=true", "did you mean 'align_corners=true'?"),
        ("crop:", "unknown option ''"),
        ("crop:flips=yes", "did you mean 'flips="),
        ("crop:min_area=x", "'min_area=x' holds no number; give min_area=0.08"),
        ("crop:max_roll=1.5", "'max_roll=1.5' holds no number; give max_roll=4"),
        ("crop:max_rol=1", "did you mean 'max_roll=4'?"),
        ("crop:min_area=0", "min_area must lie in (0, 1]"),
        ("roll:max_roll=-1", "max_roll is a number of pixels"),
        ("crop_zoom:mode=D", "mode D does not support zoom; give mode=S, M or P"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^augmentation ") as error:
        Augment.parse(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


def global_states() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


def test_global_generators_are_untouched() -> None:
    before = global_states()
    for augment in (Augment(OPS, "S"), Augment(OPS, "M")):
        augment.apply(images(3), draw(augment, 3, False))
    assert global_states() == before


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_dtype_is_kept(dtype: torch.dtype, atol: float) -> None:
    x = images(4)
    for op in EVERY:
        augment = Augment((op,))
        params = draw(augment, 4, False)
        out = augment.apply(x.to(dtype), params)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), augment.apply(x, params), rtol=0, atol=atol)


def test_half_precision_does_not_blur_the_grid() -> None:
    x = images(4, dtype=torch.bfloat16)
    augment = Augment(("rotate",))
    params = draw(augment, 4, False)
    assert torch.equal(augment.apply(x, params), augment.apply(x.float(), params).bfloat16())


@pytest.mark.parametrize("op", EVERY)
def test_vmap_and_func_grad(op: str) -> None:
    augment, x = Augment((op,)), images(4)
    params = draw(augment, 4, False)

    def one(image: torch.Tensor, params: Params) -> torch.Tensor:
        rows = Params({name: value[None] for name, value in params.values.items()})
        return augment.apply(image[None], rows)[0]

    def energy(image: torch.Tensor, params: Params) -> torch.Tensor:
        return one(image, params).square().sum()

    torch.testing.assert_close(torch.vmap(one)(x, params), augment.apply(x, params))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(augment.apply(leaf, params).square().sum(), leaf)
    torch.testing.assert_close(torch.vmap(torch.func.grad(energy))(x, params), expected)


def test_part_of_a_batch() -> None:
    augment, x, index = Augment(OPS, "M"), images(6), torch.tensor([4, 1])
    for siamese in (True, False):
        params = draw(augment, 6, siamese)
        whole = augment.apply(x, params)
        assert torch.equal(augment.apply(x[index], params.take(index)), whole[index])
        assert torch.equal(augment.apply(x[2:5], params.take(slice(2, 5))), whole[2:5])


@pytest.mark.parametrize("siamese", [True, False])
def test_all_frames_of_a_clip_undergo_the_same_draw(siamese: bool) -> None:
    augment, clips = (
        Augment((*OPS, "jitter", "zoom", "translate", "cutout-quarter", *VIEWS), "M"),
        images(8).unflatten(0, (2, 4)),
    )
    params = augment.sample(Rng(0)("augment"), 2, (4, *SHAPE), siamese)
    augmented = augment.apply(clips, params)
    assert augmented.shape == clips.shape
    for k, (clip, expected) in enumerate(zip(clips, augmented, strict=True)):
        torch.testing.assert_close(augment.apply(clip, params.take(slice(k, k + 1))), expected)


def test_a_clip_is_mirrored_from_left_to_right() -> None:
    clips = images(8).unflatten(0, (2, 4))
    both, _ = Augment(flips=True).mirrored(clips, torch.arange(2))
    assert torch.equal(both, torch.cat([clips, clips.flip(4)]))


@pytest.mark.parametrize("augment", [Augment(("crop",)), Augment(flips=True)])
def test_no_operation_takes_series(augment: Augment) -> None:
    with pytest.raises(ValueError, match=r"takes images and clips, not series .*; give augment='none'$"):
        augment.sample(Rng(0)("augment"), 2, (3, 16), siamese=False)
    x = torch.randn(2, 3, 16)
    assert torch.equal(Augment().apply(x, Augment().sample(Rng(0)("augment"), 2, (3, 16), siamese=False)), x)


def test_the_mild_operations_are_for_images() -> None:
    assert mild((1, 8, 8)) == MILD and mild((3, 8, 8)) == ("flip", *MILD)
    assert mild((3, 16)) == mild((1, 3, 8, 8)) == ()


def test_a_draw_for_other_images_does_not_fit() -> None:
    augment = Augment(("flip",))
    with pytest.raises(AssertionError, match="3 rows of flip for 1 images"):
        augment.apply(images(1), draw(augment, 3, False))


STRATEGIES = [Augment((*OPS, *(op for op in MILD if op not in OPS)), mode) for mode in ("S", "M", "P")]
STRATEGIES += [Augment(OPS, "D"), Augment(("flip", "color"), "D"), Augment.parse(f"{DC}:mode=S"), Augment(("flip",))]
STRATEGIES += [Augment(("resized-crop", "flip", "roll"), "M")]


@pytest.mark.parametrize("siamese", [True, False])
@pytest.mark.parametrize("augment", STRATEGIES, ids=str)
def test_draws_on_a_device_change_images_like_draws_on_the_host(augment: Augment, siamese: bool) -> None:
    """What is chosen cannot be read from a device, so all is computed and the choice is a mask."""
    for shape, step in itertools.product((SHAPE, (2, *SHAPE)), range(12)):
        x, found = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)), []
        for at in (step, torch.tensor(step)):
            params = augment.sample(Rng(0)("augment", at, 4), 3, shape, siamese)
            leaf = x.clone().requires_grad_()
            changed = augment.apply(leaf, params)
            (changed * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
            found.append((changed.detach(), leaf.grad))
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1] is not None and found[1][1] is not None and torch.equal(found[0][1], found[1][1])


MOSAIC = (3, 6, 12)


def mosaics(num: int) -> torch.Tensor:
    """Images whose tiles of a third of the sides are constant: tile k of image i has the value 9 i + k."""
    values = torch.arange(9.0 * num).view(num, 1, 3, 3)
    return values.repeat_interleave(2, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1).double()


@pytest.mark.parametrize("siamese", [True, False])
def test_shuffling_moves_whole_tiles_within_an_image(siamese: bool) -> None:
    x, augment = mosaics(4), Augment(shuffle=3)
    params = augment.sample(Rng(0)("augment"), 4, MOSAIC, siamese)
    shuffled = augment.apply(x, params)
    orders = []
    for i, image in enumerate(shuffled):
        tiles = [image[:, r : r + 2, c : c + 4] for r in (0, 2, 4) for c in (0, 4, 8)]
        assert all(len(tile.unique()) == 1 for tile in tiles)
        orders.append([int(tile[0, 0, 0]) - 9 * i for tile in tiles])
        assert sorted(orders[-1]) == list(range(9))
    assert len({tuple(order) for order in orders}) == (1 if siamese else 4)


def test_the_orders_of_tiles_are_uniform() -> None:
    params = Augment(shuffle=2).sample(Rng(0)("augment"), 24000, (1, 4, 4), siamese=False)
    orders, counts = params.values["shuffle"].unique(dim=0, return_counts=True)
    assert len(orders) == 24 and (counts - 1000).abs().max() < 150


def test_a_tile_or_the_whole_image_is_shown() -> None:
    num, factor = 9000, 3
    params = Augment(tile=factor).sample(Rng(0)("augment"), num, MOSAIC, siamese=False)
    shown, counts = params.values["tile"].unique(return_counts=True)
    assert shown.tolist() == [-1, *range(9)]
    np.testing.assert_allclose(counts / num, [1 / 9, *[8 / 81] * 9], atol=0.02)
    x = torch.randn(10, *MOSAIC, generator=torch.Generator().manual_seed(0))
    seen = Augment(tile=factor).apply(x, Params({"tile": torch.arange(-1, 9)}))
    assert torch.equal(seen[0], x[0])
    for k in range(9):
        r, c = 2 * (k // 3), 4 * (k % 3)
        tile = x[k + 1, None, :, r : r + 2, c : c + 4]
        expected = torch.nn.functional.interpolate(tile, (6, 12), mode="bilinear")[0]
        torch.testing.assert_close(seen[k + 1], expected)


@pytest.mark.parametrize("mode", ["S", "M", "D", "P"])
def test_views_of_mosaics_come_before_the_operations_of_any_mode(mode: Mode) -> None:
    augment, x = Augment(OPS, mode, shuffle=2, tile=2), images(4, (3, 8, 6))
    params = augment.sample(Rng(0)("augment"), 4, (3, 8, 6), siamese=False)
    assert params.ops[:2] == ("shuffle", "tile") and len(params.ops) > 2
    first = Augment(shuffle=2, tile=2).apply(x, Params({name: params.values[name] for name in ("shuffle", "tile")}))
    rest = Params({name: value for name, value in params.values.items() if name in OPS}, params.applies)
    assert torch.equal(augment.apply(x, params), Augment(OPS, mode).apply(first, rest))
    assert not torch.equal(first, x)


def test_views_of_mosaics_on_a_device_and_of_clips() -> None:
    augment = Augment.parse("color:shuffle=2,tile=2")
    for step in range(6):
        here, there = (augment.sample(Rng(0)("augment", at), 5, (3, 8, 6), False) for at in (step, torch.tensor(step)))
        assert all(torch.equal(here.values[name], there.values[name]) for name in ("shuffle", "tile"))
        clip = images(5, (3, 8, 6))[:, None].expand(-1, 2, -1, -1, -1)
        frames = augment.apply(clip, here)
        assert torch.equal(frames[:, 0], frames[:, 1])
        assert torch.equal(frames[:, 0], augment.apply(clip[:, 0], here))


def test_gradients_flow_through_views_of_mosaics() -> None:
    augment, x = Augment(shuffle=2, tile=2), images(3, (1, 4, 4)).requires_grad_()
    for siamese in (True, False):
        params = augment.sample(Rng(1)("augment"), 3, (1, 4, 4), siamese)
        assert torch.autograd.gradcheck(lambda x, params=params: augment.apply(x, params), x)


def test_views_of_mosaics_are_options() -> None:
    assert Augment.parse("crop:shuffle=2,tile=3") == Augment(("crop",), shuffle=2, tile=3)
    assert str(Augment(shuffle=2)) == "none:shuffle=2" and str(Augment(tile=1)) == "none"
    for spec, message in (("none:tile=0", "from 1 to 9"), ("none:shuffle=x", "holds no number")):
        with pytest.raises(ValueError, match=message):
            Augment.parse(spec)
    with pytest.raises(ValueError, match="no mosaic of 4 x 4 equal tiles; give tile= a factor") as error:
        Augment(tile=4).require_kind((3, 8, 6))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="takes images and clips, not series"):
        Augment(shuffle=2).require_kind((3, 8))
