"""CUDD: slow twin, stages and their students, the images that a stage starts from, and what cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import api, catalog
from condense.data.datasets import Arrays
from condense.method import Context
from condense.methods import cudd
from condense.methods.cudd import CUDD, CUDDState, unlikelihood
from condense.methods.recovery import rounded
from condense.networks import build
from condense.recipe import named
from condense.testing import resumes_to_the_byte
from tests.conftest import BATCH
from tests.reference import cudd as reference
from tests.test_sre2l import COUNTS, QUICK, VIEWS, advance, make_context, module


def small(**fields: Any) -> CUDD:
    return CUDD(**{"num_steps": 3, "stages": (1, 2), "chunk": 2, "optim": QUICK, "student_epochs": 3} | fields)


def student_of(ctx: Context, state: CUDDState) -> nn.Module:
    network = build(ctx.task.network.name, ctx.task.input_shape, ctx.task.num_classes)
    network.load_state_dict({**state.params, **state.buffers})
    return network


@pytest.mark.parametrize(
    ("fields", "ipc"),
    [
        ({"weight_bn": 0.5}, 3),
        ({"teachers": ("same", BATCH), "stages": (1,), "weight_start": 5.0, "weight_adversarial": 4.0, "chunk": 3}, 2),
    ],
    ids=["three stages", "two teachers"],
)
@pytest.mark.parametrize("augment", ["none", VIEWS])
def test_agrees_with_the_slow_twin_step_by_step(fields: dict[str, Any], ipc: int, augment: str, tmp_path: Path) -> None:
    plan = small(**fields)
    ctx = make_context(tmp_path, plan, augment, ipc=ipc)
    state = plan.init(ctx)
    modules = [module(ctx, name, 0) for name in plan.teachers]
    low, high = (ctx.task.transform(torch.full((1, 1, 1, 1), end))[0] for end in (0.0, 1.0))

    def view(step: int, image: Tensor) -> Tensor:
        drawn = ctx.task.augment.sample(ctx.rng("view", step), 1, (1, 8, 8), siamese=True)
        return ctx.task.augment.apply(image, drawn)

    for number, rows in enumerate(plan.chunks(ctx)):
        stage = sum(int(rows[0]) % ipc >= end for end in plan.stages)
        twin = reference.recover(
            plan.begin(ctx, state, rows),
            (rows // ipc).tolist(),
            3,
            3 * number,
            teachers=modules,
            student=student_of(ctx, state) if stage else None,
            view=view,
            weight_bn=plan.weight_bn,
            first_bn=10.0,
            weight_start=plan.weight_start,
            weight_adversarial=plan.weight_adversarial,
            lr=0.1,
            betas=(0.5, 0.9),
            low=low,
            high=high,
        )
        for step, (loss, expected) in enumerate(twin, 3 * number):
            assert float(plan.step(ctx, state, step)["loss"]) == pytest.approx(loss, rel=1e-4)
            if (step + 1) % 3:
                torch.testing.assert_close(state.syn.latents[: len(rows)].detach(), expected, rtol=1e-4, atol=1e-4)
        assert (plan.recovered(ctx, number).int() - rounded(ctx.task, expected).int()).abs().max() <= 1
    assert plan.stage(ctx, number) == len(plan.stages)


def test_a_stage_starts_from_what_the_teacher_knows_and_the_student_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each network classifies correctly is given here: the last student knows all images of class 0, the teacher
    none of class 1."""
    taught, *known = (torch.rand(sum(COUNTS), generator=torch.Generator().manual_seed(k)) < 0.5 for k in range(3))
    known[1][: COUNTS[0]], taught[COUNTS[0] : COUNTS[0] + COUNTS[1]] = True, False
    answers = iter([taught, taught, known[0], taught, known[1]])
    monkeypatch.setattr(cudd, "classified", lambda networks, data: next(answers))
    ipc, plan = 4, small(stages=(1, 2), chunk=3)
    ctx = make_context(tmp_path, plan, ipc=ipc)
    state, met = plan.init(ctx), set()
    for stage, (begin, end) in enumerate([(0, 1), (1, 2), (2, 4)]):
        advance(plan, ctx, state, range(3 * (begin and begin - 1), 3 * begin))
        assert plan.stage(ctx, begin) == stage
        for label, members in enumerate(ctx.task.train.by_class):
            chosen = state.chosen[ipc * label : ipc * (label + 1)].tolist()
            used, new = chosen[:begin], chosen[begin:end]
            groups: list[list[int]] = [[], [], []]
            for i in members.tolist():
                if i not in used:
                    groups[2 if stage and known[stage - 1][i] else 0 if taught[i] else 1].append(i)
            for k, group in enumerate(groups):
                assert set(new[: len(group)]) <= set(group), "nothing else while one of this group is left"
                met |= {(stage, k)} if new and group else set()
                new = new[len(group) :]
            assert len(set(chosen[:end])) == end
    assert met >= {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}


def test_a_network_classifies_what_the_plain_module_does(tiny: Arrays, tmp_path: Path) -> None:
    plan = small(teachers=("same", "same"))
    ctx = make_context(tmp_path, plan)
    state, train = plan.init(ctx), ctx.task.train
    logits = sum(module(ctx, "same", k).eval()(train.images[:]) for k in range(2))
    expected = [int(row.argmax()) == c for row, c in zip(logits, train.labels.tolist(), strict=True)]
    assert cudd.classified(plan.opened(ctx, state), train).tolist() == expected and any(expected)


def test_images_begin_at_the_chosen_ones(tmp_path: Path) -> None:
    plan = small(chunk=3)
    ctx = make_context(tmp_path, plan)
    state = plan.init(ctx)
    first = state.chosen[[0, 2, 4]]
    assert (ctx.task.train.labels[state.chosen] == ctx.classes).all()
    assert torch.equal(state.syn.latents.detach(), ctx.task.train.images[first])
    advance(plan, ctx, state, range(3))
    assert torch.equal(state.syn.latents.detach(), ctx.task.train.images[state.chosen[[1, 3, 5]]])
    assert torch.equal(state.chosen[[0, 2, 4]], first)


def test_a_student_depends_on_the_finished_images_alone(tmp_path: Path) -> None:
    """It is no continuation of the one before, and it sees the images of all earlier stages."""
    plan = small(chunk=3)
    ctx = make_context(tmp_path, plan, ipc=3)
    state = plan.init(ctx)
    advance(plan, ctx, state, range(6))

    def again(changed: int | None) -> dict[str, Tensor]:
        fresh = make_context(tmp_path / str(changed), plan, ipc=3)
        other = plan.init(fresh)
        for number in range(2):
            pixels = fresh.task.transform(plan.recovered(ctx, number) / 255)
            plan._store(fresh, number, pixels.flip(3) if number == changed else pixels)
        plan.enter(fresh, other, 2)
        return other.params

    torch.testing.assert_close(again(None), state.params, rtol=0, atol=0)
    for number in range(2):
        assert not torch.equal(next(iter(again(number).values())), next(iter(state.params.values())))


def test_a_student_learns_the_answers_of_the_teacher(tmp_path: Path) -> None:
    """On the images of the first stage; the answers of this teacher are not the classes."""
    apart = []
    for epochs in (1, 100):
        plan = small(stages=(2,), chunk=3, student_epochs=epochs, student_lr=0.02)
        ctx = make_context(tmp_path / str(epochs), plan, ipc=3)
        state = plan.init(ctx)
        advance(plan, ctx, state, range(6))
        images = ctx.task.transform(torch.cat([plan.recovered(ctx, k) for k in range(2)]) / 255)
        networks = student_of(ctx, state), module(ctx, "same", 0)
        student, teacher = ((network.eval()(images) / 20).log_softmax(1) for network in networks)
        apart.append(F.kl_div(student, teacher, log_target=True, reduction="batchmean").item())
    assert apart[1] < 0.2 * apart[0]


def test_the_adversarial_loss_lowers_the_probability_that_the_student_gives(
    tiny: Arrays, tiny_buffers: Path, tmp_path: Path
) -> None:
    """There is none before the first student, and its weight changes no image of the first stage."""
    losses, sets = [], []
    for weight in (0.0, 3.0):
        plan = small(stages=(1,), num_steps=20, weight_adversarial=weight, student_epochs=20, chunk=3)
        out = tmp_path / str(weight)
        fields: dict[str, Any] = {"dataset": tiny, "network": BATCH, "buffers": tiny_buffers, "augment": "none"}
        sets.append(api.distill(plan, ipc=2, out=out, **fields)()[0])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss_adversarial"] for line in lines if "event" not in line])
    assert losses[0] == [0.0] * 40 and losses[1][:20] == [0.0] * 20
    assert 0 < losses[1][39] < losses[1][20]
    assert torch.equal(sets[0][::2], sets[1][::2]) and not torch.equal(sets[0][1::2], sets[1][1::2])


def test_unlikelihood_is_that_of_the_target_and_constant_where_it_does_not_count() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0], [100.0, 0.0, 0.0]], requires_grad=True)
    targets, counted = torch.tensor([1, 2, 0]), torch.tensor([True, False, True])
    found = unlikelihood(logits, targets, counted)
    first = -math.log(1 - logits[0].softmax(0)[1].item())
    assert found.item() == pytest.approx((first + math.log(3 / 2) + 100 - math.log(2)) / 3, rel=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.isfinite().all() and (gradient[1] == 0).all()
    assert gradient[2, 0] == pytest.approx(1 / 3)  # also where the probability rounds to one


def test_a_masked_image_is_one_that_the_teacher_does_not_classify(tmp_path: Path) -> None:
    plan = small(chunk=3, stages=(1,), weight_bn=0.0, weight_start=0.0)
    ctx = make_context(tmp_path, plan)
    state = plan.init(ctx)
    advance(plan, ctx, state, range(3))
    images, targets = state.syn(torch.arange(3))
    logits = module(ctx, "same", 0).eval()(images)
    counted = logits.argmax(1) == targets
    assert counted.any() and not counted.all()
    found, terms = plan.chunk_loss(ctx, state, 3, plan.chunks(ctx)[1], images, targets)
    expected = unlikelihood(student_of(ctx, state).eval()(images), targets, counted)
    torch.testing.assert_close(terms["adversarial"], expected)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets) + expected)


def test_it_resumes_to_the_byte_within_and_between_stages() -> None:
    resumes_to_the_byte(small(teachers=("same", "same"), num_steps=2, chunk=3), network=BATCH, ipc=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decode": "factor"}, r"^cudd recovers one image after the other, unlike factor; give decode='pixels'$"),
        ({"transform": "zca"}, r"^cudd stores 8-bit pixels, which zca whitens; give transform='channel'$"),
        ({"stages": (2, 2)}, r"^method.stages must be positive and ascend, got \(2, 2\); the default is \(10, 20\)$"),
        ({"stages": (0, 2)}, r"^method.stages must be positive and ascend"),
        ({"student_epochs": 0}, r"^method.student_epochs must be at least 1"),
        ({"student_lr": 0.0}, r"^training needs .* a finite lr > 0"),
        ({"weight_adversarial": -1.0}, r"^method.weight_adversarial must be at least 0"),
        ({"ipc": 13}, r"has 12 training images, 13 are needed"),
    ],
)
def test_what_cannot_be_is_refused(
    fields: dict[str, Any], message: str, tiny: Arrays, tiny_buffers: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"dataset": tiny, "network": BATCH, "buffers": tiny_buffers, "num_steps": 1}
    with pytest.raises(ValueError, match=message) as error:
        api.distill("cudd", out=tmp_path / "run", **common | fields)
    assert "\n" not in str(error.value)


def test_recipes_have_the_published_values() -> None:
    names = {name for name in catalog.recipes() if name.split("-")[0] == "cudd"}
    small = ("cifar10", "cifar100", "mnist", "fashion-mnist")
    assert names == {"cudd", "cudd-digits-ipc1", "cudd-digits-ipc3"} | {
        f"cudd-{dataset}-ipc{ipc}" for dataset in small for ipc in (10, 50)
    }
    assert named("cudd").method == CUDD() and named("cudd-cifar100-ipc50").method == CUDD(num_steps=1000)
    assert named("cudd").augment == "resized-crop_flip_roll:mode=M"
