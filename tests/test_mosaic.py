"""RDED and CIM against their slow twins, and what mosaics of real images imply."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condense import api, catalog, engine
from condense.artifacts import Artifact
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays, load
from condense.method import Context, Method, Optim
from condense.methods import mosaic
from condense.methods.cim import CIM
from condense.methods.rded import RDED
from condense.mosaic import enlarged, joined, tiles_of
from condense.networks import Functional, Weights
from condense.recipe import Recipe, named
from condense.rng import Rng
from condense.synthetic import Decode, Factor, Hard, Labels, Origin, Pixels
from condense.synthetic.labels import Teacher
from condense.task import Split, make_task
from tests.reference import mosaic as reference

COUNTS = (20, 24, 17)
SHAPE = (3, 8, 12)
NETWORK = "convnet:depth=2,width=6,norm=batch"


class Stub:
    """A buffer whose networks are drawn."""

    def weights(self, index: int, network: Functional) -> Weights:
        return network.init(Rng(7), "teacher", index)


def make_context(
    augment: str = "none",
    ipc: int = 2,
    decode: Decode | None = None,
    labels_kind: Labels | None = None,
    block: int = 1,
) -> Context:
    """The images consist of constant squares of ``block`` pixels a side."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    small = (SHAPE[0], SHAPE[1] // block, SHAPE[2] // block)
    images = torch.rand(len(labels), *small, generator=torch.Generator().manual_seed(0))
    images = images.repeat_interleave(block, 2).repeat_interleave(block, 3)
    task = make_task(
        load((images, labels)),
        transform="channel",
        split=Split(),
        network=Functional(NETWORK, SHAPE, 3),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    stub = cast(Artifact, Stub())
    ctx = Context(task, Rng(0), ipc, decode or Pixels(), labels_kind or Hard(), Compute(), origin)
    return dataclasses.replace(ctx, artifacts={task.network.name: stub})


def teacher(ctx: Context, index: int = 0) -> Any:
    network = ctx.task.network
    weights = Stub().weights(index, network)
    return lambda images: network.logits(*weights, images, train=False)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_tiles_are_joined_by_rows(factor: int) -> None:
    tiles = torch.randn(factor**2 * 5, 2, 3, 4)
    mosaics = joined(tiles, factor)
    for i, image in enumerate(mosaics):
        expected = reference.mosaic([tiles[k * 5 + i] for k in range(factor**2)], factor)
        assert torch.equal(image, expected)
    assert torch.equal(tiles_of(mosaics, factor), tiles)


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (3, 5), (16, 9)])
def test_crops_are_windows_that_are_resized_with_antialiasing(size: tuple[int, int]) -> None:
    images = torch.randn(60, *SHAPE, generator=torch.Generator().manual_seed(0))
    crops = mosaic.random_crops(images, size, 0.08, Rng(0)("crops"))
    u = Rng(0)("crops").uniform(3, 60)
    for image, crop, row in zip(images, crops, u.T.tolist(), strict=True):
        torch.testing.assert_close(crop, reference.crop(image, *row, size, 0.08), rtol=1e-4, atol=1e-5)


def test_the_area_of_a_crop_is_uniform_and_its_place_anywhere() -> None:
    place = torch.arange(16.0).expand(4000, 1, 16, 16)  # the value of a pixel is its column
    crops = mosaic.random_crops(place, (1, 16), 0.25, Rng(0)("crops"))[:, 0, 0]
    first, last = crops[:, 0], crops[:, -1]
    assert first.min() < 0.5 and last.max() > 14.5
    side = (last - first) * 16 / 15
    assert ((side / 16) ** 2).mean() == pytest.approx(0.625, abs=0.03)
    assert side.min() > 7 and (first + last).mean() == pytest.approx(15, abs=0.2)


@pytest.mark.parametrize(("factor", "min_area"), [(1, 0.08), (2, 0.08), (2, 0.7)])
def test_rded_agrees_with_the_slow_twin(factor: int, min_area: float) -> None:
    ctx = make_context()
    method = RDED(factor=factor, num_candidates=14, num_crops=3, min_area=min_area)
    images = engine.compute(method, ctx).latents.detach()
    size = (SHAPE[1] // factor, SHAPE[2] // factor)
    for c in range(3):
        index = ctx.task.train.by_class[c][ctx.rng("candidates", 0, c).subset(COUNTS[c], 14)]
        real, draws = ctx.task.train.images[index], ctx.rng("crops", 0, c)
        u = [draws.uniform(3, 14).T.tolist() for _ in range(3)]
        expected = reference.rded(
            list(real),
            lambda i, k, u=u, real=real: reference.crop(real[i], *u[k][i], size, min_area),
            teacher(ctx),
            c,
            num_crops=3,
            num=2,
            factor=factor,
        )
        torch.testing.assert_close(images[2 * c : 2 * c + 2], torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_rded_takes_the_crops_that_the_teacher_classifies_best() -> None:
    ctx = make_context()
    few, many = (RDED(factor=1, num_candidates=17, num_crops=k) for k in (1, 20))
    score = [
        mosaic.realism([teacher(ctx)], engine.compute(method, ctx).latents.detach()[2 * c : 2 * c + 2], c).mean()
        for method in (few, many)
        for c in range(3)
    ]
    assert sum(score[3:]) > sum(score[:3]) + 0.03


def test_the_score_is_the_mean_over_the_teachers() -> None:
    ctx = make_context()
    images = ctx.task.train.images[:10]
    scores = mosaic.realism(mosaic.labellers(("same", "same"), ctx), images, 1)
    expected = [sum(reference.log_probability(teacher(ctx, k), image, 1) for k in range(2)) / 2 for image in images]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def twin(method: CIM, ctx: Context, label: int) -> Iterator[tuple[float, list[Tensor]]]:
    task = ctx.task
    index = task.train.by_class[label][ctx.rng("candidates", 0, label).subset(COUNTS[label], method.num_candidates)]
    scores = [reference.log_probability(teacher(ctx), task.train.images[i[None]][0], label) for i in index]
    order = sorted(range(len(index)), key=lambda i: (-scores[i], i))[: ctx.ipc * method.factor**2]
    network = task.network
    weights = Stub().weights(0, network)

    def features(image: Tensor) -> Tensor:
        if method.block:
            return network.capture(*weights, image[None], method.block, train=False).values[method.block][0]
        return network.features(*weights, image[None], train=False)[0]

    def augment(step: int, image: Tensor) -> Tensor:
        ops = tuple(op for op in task.augment.ops if op in ("flip", "crop", "cutout"))
        used = Augment(ops, task.augment.mode)
        return used.apply(image[None], used.sample(ctx.rng("siamese", step, label), 1, SHAPE, siamese=True))[0]

    return reference.cim(
        list(task.train.images[index[torch.tensor(order)]]),
        method.num_steps,
        features=features,
        augment=augment,
        num=ctx.ipc,
        factor=method.factor,
        lr=method.optim.lr,
        beta=method.optim.momentum,
    )


@pytest.mark.parametrize("augment", ["none", "color_crop_cutout_flip_scale:mode=D"])
@pytest.mark.parametrize("block", ["", "features.0"])
def test_cim_agrees_with_the_slow_twin_step_by_step(augment: str, block: str) -> None:
    ctx, method = make_context(augment), CIM(num_steps=4, num_candidates=16, block=block)
    state, twins = method.init(ctx), [twin(method, ctx, c) for c in range(3)]
    for step in range(4):
        record, expected = method.step(ctx, state, step), [next(each) for each in twins]
        assert float(record["loss"]) == pytest.approx(sum(loss for loss, _ in expected), rel=1e-4)
        images = torch.stack([image for _, images in expected for image in images])
        torch.testing.assert_close(state.syn()[0].detach(), images, rtol=1e-3, atol=1e-3)


def test_the_loss_of_cim_falls_and_the_mosaics_stay_near_the_real_images() -> None:
    ctx, method = make_context(), CIM(num_steps=60, num_candidates=16)
    state = method.init(ctx)
    start = state.syn.latents.detach().clone()
    originals = ctx.task.train.images[state.originals[1]]
    assert torch.equal(tiles_of(start[2:4], 2), F.interpolate(originals, scale_factor=0.5, mode="nearest"))
    losses = [float(method.step(ctx, state, step)["loss"]) for step in range(60)]
    assert losses[-1] < 0.6 * losses[0]
    assert (state.syn.latents - start).abs().max() < 60 * method.optim.lr


@pytest.mark.parametrize(("ipc", "factor"), [(1, 2), (2, 1)])
def test_a_tile_is_compared_with_its_own_original_whatever_the_decoder(ipc: int, factor: int) -> None:
    ctx = make_context(ipc=ipc, decode=Factor(factor=2), block=4)
    method = CIM(num_candidates=16, factor=factor)
    state = method.init(ctx)
    originals = ctx.task.train.images[state.originals[0]]
    tiles = method.tiles(ctx, state, 0)
    assert tiles.shape == originals.shape == (4 * ipc * factor**2, *SHAPE)
    nearest = torch.cdist(tiles.detach().flatten(1), originals.flatten(1)).argmin(1)
    assert nearest.tolist() == list(range(len(tiles)))


@pytest.mark.parametrize("method", [RDED(factor=2, num_candidates=16), CIM(num_steps=1, num_candidates=16)])
def test_teacher_labels_are_what_the_teachers_say_of_the_final_images(method: Method) -> None:
    syn = engine.compute(method, make_context(labels_kind=Teacher()))
    images, targets = syn()
    torch.testing.assert_close(targets, teacher(make_context())(images).softmax(1), rtol=1e-4, atol=1e-5)
    hard = engine.compute(method, make_context())
    assert torch.equal(hard.latents, syn.latents) and hard()[1].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_class_with_fewer_images_than_tiles_repeats_them() -> None:
    ctx = make_context(ipc=6)
    selected = engine.compute(RDED(factor=2), ctx).latents.detach(), CIM().init(ctx).syn.latents.detach()
    for latents in selected:
        tiles = tiles_of(latents[12:], 2)
        assert torch.equal(tiles[:7], tiles[17:]) and len(tiles) == 24 and len(tiles.unique(dim=0)) == 17


def test_the_views_of_the_training_are_those_of_mosaics() -> None:
    task = make_context("color_flip").task
    assert str(RDED(factor=2).training_augment(task)) == "resized-crop_flip:mode=M,min_area=0.5,shuffle=2"
    assert str(RDED().training_augment(task)) == "flip", "a whole image is not cropped"
    assert str(CIM().training_augment(task)) == "color_flip:tile=2"
    assert str(RDED(factor=2).training_augment(make_context().task)) == "resized-crop:mode=M,min_area=0.5,shuffle=2"
    large = dataclasses.replace(task, input_shape=(3, 64, 64))
    assert RDED().factor_for(large) == 2 and RDED().factor_for(task) == 1


def test_networks_train_on_the_views_that_are_stored_with_the_set(
    tiny: Arrays, tiny_buffer: Path, tmp_path: Path
) -> None:
    plan = Recipe(method=RDED(factor=2), dataset="tiny", network="convnet:depth=1,width=4", ipc=1, augment="crop_flip")
    syn = api.run(plan, api.RunOptions(out=tmp_path / "run", buffers=tiny_buffer, device="cpu"), arrays=tiny)
    assert syn.origin.training["augment"] == "resized-crop_flip:mode=M,min_area=0.5,shuffle=2"
    result = api.evaluate(syn, tiny, networks=["mlp"], num_seeds=1, protocol="own").results[0]
    assert result.augment == syn.origin.training["augment"]


def test_recipes_hold_the_published_values() -> None:
    assert {name for name in catalog.recipes() if name.split("-")[0] in ("rded", "cim")} == {
        "rded",
        "rded-digits-ipc1",
        "cim",
        "cim-digits-ipc1",
    }
    assert named("rded").method == RDED(num_candidates=300, num_crops=5, min_area=0.08) == RDED()
    assert named("cim").method == CIM(num_steps=200, optim=Optim(kind="adam", lr=0.04, momentum=0.9)) == CIM()
    assert named("cim").augment == "dsa:mode=D"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (RDED(factor=3), "method.factor 3 does not divide images of 8 x 12 pixels into equal tiles; give factor=1"),
        (CIM(factor=5), "method.factor 5 does not divide"),
        (RDED(factor=2, num_candidates=7), "method.num_candidates is 7, but .* 8 tiles.*; give num_candidates=8"),
        (CIM(num_candidates=7), "method.num_candidates is 7"),
        (CIM(block="feature.0"), "did you mean 'features.0'"),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_first_step(method: Method, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        method.init(make_context())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RDED(factor=0), "method.factor must be from 1 to 9"),
        (lambda: RDED(num_crops=0), "method.num_crops"),
        (lambda: RDED(min_area=0.0), "method.min_area must lie in"),
        (lambda: CIM(factor=10), "method.factor must be from 1 to 9"),
        (lambda: CIM(matched=("corp",)), "unknown operation 'corp'"),
        (lambda: CIM(teachers=()).needs(make_context().task), "at least one network; give teachers="),
    ],
)
def test_refuses_bad_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_enlarging_is_bilinear() -> None:
    tile = torch.tensor([[[[0.0, 4.0]]]])
    assert enlarged(tile, (2, 4))[0, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
