"""FADRM: slow twin, mosaics that images begin at and are drawn back to, and what cannot be."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import api, catalog, engine
from condense.data.datasets import Arrays
from condense.methods.fadrm import FADRM, by_group
from condense.methods.rded import RDED
from condense.methods.recovery import by_image, rounded
from condense.recipe import named
from condense.testing import resumes_to_the_byte
from tests.conftest import BATCH
from tests.reference import fadrm as reference
from tests.test_sre2l import QUICK, VIEWS, advance, make_context, module


def small(**fields: Any) -> FADRM:
    return FADRM(**{"num_steps": 5, "stages": 2, "chunk": 2, "optim": QUICK, "num_candidates": 5} | fields)


@pytest.mark.parametrize(
    ("fields", "lengths"),
    [
        ({"weight_bn": 0.5}, [3, 2]),
        ({"teachers": ("same", BATCH), "keep": 0.25, "stages": 3, "chunk": 3}, [2, 2, 1]),
        ({"stages": 1}, [5]),
    ],
    ids=["two stages", "two teachers", "one stage"],
)
@pytest.mark.parametrize("augment", ["none", VIEWS])
def test_agrees_with_the_slow_twin_step_by_step(
    fields: dict[str, Any], lengths: list[int], augment: str, tmp_path: Path
) -> None:
    plan = small(**fields)
    ctx = make_context(tmp_path, plan, augment)
    state = plan.init(ctx)
    modules = [module(ctx, name, 0) for name in plan.teachers]
    low, high = (ctx.task.transform(torch.full((1, 1, 1, 1), end))[0] for end in (0.0, 1.0))

    def view(step: int, image: Tensor) -> Tensor:
        drawn = ctx.task.augment.sample(ctx.rng("view", step), 1, (1, 8, 8), siamese=True)
        return ctx.task.augment.apply(image, drawn)

    for number, rows in enumerate(plan.chunks(ctx)):
        twin = reference.recover(
            plan.begin(ctx, state, rows),
            rows // 2,
            lengths,
            5 * number,
            teachers=modules,
            view=view,
            keep=plan.keep,
            weight_bn=plan.weight_bn,
            first_bn=10.0,
            lr=0.1,
            betas=(0.5, 0.9),
            low=low,
            high=high,
        )
        for step, (loss, expected) in enumerate(twin, 5 * number):
            assert float(plan.step(ctx, state, step)["loss"]) == pytest.approx(loss, rel=1e-4)
            if (step + 1) % 5:
                torch.testing.assert_close(state.syn.latents[: len(rows)].detach(), expected, rtol=1e-4, atol=1e-4)
        assert (plan.recovered(ctx, number).int() - rounded(ctx.task, expected).int()).abs().max() <= 1


def test_images_begin_at_the_mosaics_of_rded(tmp_path: Path) -> None:
    crops: dict[str, Any] = {"factor": 2, "num_candidates": 9, "num_crops": 3, "min_area": 0.5}
    plan = small(teachers=("same", "same"), **crops)
    ctx = make_context(tmp_path, plan)
    found = plan.finalize(ctx, plan.init(ctx), 0)
    expected = engine.compute(RDED(teachers=("same", "same"), **crops), ctx)
    assert torch.equal(rounded(ctx.task, found()[0]), rounded(ctx.task, expected()[0]))
    assert torch.equal(found.classes, expected.classes)


def test_each_stage_but_the_last_draws_the_images_back_and_forgets_the_momentum(tmp_path: Path) -> None:
    """Without a learning rate nothing else moves them."""
    still = small(optim=type(QUICK)(kind="adam", lr=0.0), num_steps=4, chunk=3)
    ctx = make_context(tmp_path, still)
    state = still.init(ctx)
    mosaics = still.begin(ctx, state, still.chunks(ctx)[0])
    with torch.no_grad():
        state.syn.latents.copy_(mosaics * 0.9)
    scales, moments = [], []
    for step in range(3):
        advance(still, ctx, state, range(step, step + 1))
        scales.append(float(state.syn.latents.detach().norm() / mosaics.norm()))
        moments.append(bool(state.optimisers["latents"].state))
    assert scales == pytest.approx([0.9, 0.95, 0.95], abs=1e-5) and moments == [True, False, True]


def test_all_images_of_a_group_of_classes_come_before_the_next_group() -> None:
    found, others = by_group(7, 3, 3), by_image(7, 3, 3)
    assert sorted(map(torch.Tensor.tolist, found)) == sorted(map(torch.Tensor.tolist, others))
    groups = [tuple((rows // 3).tolist()) for rows in found]
    assert len([name for name, _ in itertools.groupby(groups)]) == 3


@pytest.mark.parametrize("teachers", [("same",), ("same", "same")])
def test_it_resumes_to_the_byte_within_and_between_stages(teachers: tuple[str, ...]) -> None:
    resumes_to_the_byte(small(teachers=teachers, num_steps=4, num_candidates=4), network=BATCH)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decode": "factor"}, r"^fadrm recovers one image after the other, unlike factor; give decode='pixels'$"),
        ({"transform": "zca"}, r"^fadrm stores 8-bit pixels, which zca whitens; give transform='channel'$"),
        ({"stages": 0}, r"^method.stages must be at least 1"),
        ({"keep": 1.5}, r"^method.keep must lie in \[0, 1\], got 1.5; the published value is 0.5$"),
        ({"min_area": 0.0}, r"^method.min_area must lie in \(0, 1\]"),
        ({"factor": 3}, r"^method.factor 3 does not divide images of 8 x 8 pixels"),
        ({"num_candidates": 1, "ipc": 2}, r"^method.num_candidates is 1, but the mosaics of a class have 2 tiles"),
    ],
)
def test_what_cannot_be_is_refused(
    fields: dict[str, Any], message: str, tiny: Arrays, tiny_buffers: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"dataset": tiny, "network": BATCH, "buffers": tiny_buffers, "num_steps": 1}
    with pytest.raises(ValueError, match=message) as error:
        api.distill("fadrm", out=tmp_path / "run", **common | fields)
    assert "\n" not in str(error.value)


def test_recipes_have_the_published_values() -> None:
    names = {name for name in catalog.recipes() if name.split("-")[0] == "fadrm"}
    assert names == {"fadrm", "fadrm-digits-ipc1"} | {
        f"fadrm-{dataset}-ipc{ipc}" for dataset in ("cifar100", "mnist", "fashion-mnist") for ipc in (1, 10, 50)
    }
    assert named("fadrm").method == named("fadrm-cifar100-ipc10").method == FADRM()
    assert named("fadrm-cifar100-ipc10").augment == "resized-crop_flip_roll:mode=M"
