"""Linear gradient matching against its slow twin, its pyramid, its backbones and what it stores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import api, cli
from condense.artifacts import TrainedNetworks, open_buffer
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.eval.protocol import PROTOCOLS
from condense.method import Context, Optim
from condense.methods.linear_gradient import LinearGradient
from condense.networks import Functional, build
from condense.recipe import Recipe, named
from condense.rng import Rng
from condense.synthetic import Decode, Hard, Origin, Pixels, Pixels8Bit, load
from condense.task import Labelled, Split, make_task
from tests.reference import linear_gradient as twin

BACKBONE = "convnet:depth=2,width=4,norm=batch"
SIZES = [(1, 1), (2, 2), (4, 4), (8, 8)]
ADAM = Optim(kind="adam", lr=0.05, momentum=0.9)
SHORT = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=1)
TINY = LinearGradient(num_steps=9, teachers=(BACKBONE,), views=2, grow_every=2, optim=ADAM)


@pytest.fixture(scope="module")
def backbones(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("backbones")
    fields: dict[str, Any] = {"num_experts": 1, "num_epochs": 2, "lr": 0.05, "batch_size": 12, "projector": 8}
    api.make_buffer(tiny, BACKBONE, objective="barlow-twins", keep="last", out=root, device="cpu", **fields)
    return root


def context(backbones: Path, tiny: Arrays, augment: str = "none", ipc: int = 2) -> Context:
    task = make_task(
        tiny,
        transform="channel",
        split=Split(),
        network=Functional("mlp", (1, 8, 8), 3),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    opened = {"teacher": open_buffer(next(backbones.iterdir()))}
    return Context(task, Rng(0), ipc, Pixels(), Hard(), Compute(), origin, opened)


@pytest.mark.usefixtures("double_teachers")
@pytest.mark.parametrize("augment", ["none", "resized-crop_flip:mode=M"])
def test_it_follows_its_twin_through_the_levels_of_the_pyramid(augment: str, backbones: Path, tiny: Arrays) -> None:
    ctx = context(backbones, tiny, augment)
    task, method, rng = ctx.task, TINY, ctx.rng
    ctx = dataclasses.replace(
        ctx, task=dataclasses.replace(task, train=Labelled(task.train.images[:].double(), task.train.labels))
    )
    described = task.transform.describe()
    (mean,), (std,) = described["mean"], described["std"]
    state = method.init(ctx)
    state.syn.double()
    assert state.syn.decoder.colours.item() == 1  # type: ignore[operator]
    buffer, phi = ctx.artifacts["teacher"], build(BACKBONE, (1, 8, 8), 3).double().eval()
    assert isinstance(buffer, TrainedNetworks)
    params, buffers = buffer.weights(0, Functional(BACKBONE, (1, 8, 8), 3))
    phi.load_state_dict({**params, **buffers})

    def view(name: str, step: int, images: Tensor) -> Tensor:
        drawn = task.augment.sample(rng(f"{name} views", step), len(images), (1, 8, 8), siamese=False)
        images, draws = task.augment.apply(images, drawn), rng(f"{name} noise", step)
        half = draws.uniform(len(images)).tolist()
        noise = draws.normal(len(images), 1, 8, 8)
        return torch.stack([image + (0.2 / std * noise[i] if half[i] < 0.5 else 0) for i, image in enumerate(images)])

    def real(step: int) -> tuple[Tensor, Tensor]:
        images, classes = ctx.task.train.sample(2 * 6, rng("real", step))
        return view("real", step, images), classes

    expected = twin.linear_gradient(
        method.num_steps,
        phi,
        SIZES,
        torch.tensor([0, 0, 1, 1, 2, 2]),
        noise=lambda level, step: (
            torch.randn(6, 1, 4**level, generator=rng.generator("level", step, level))
            .view(6, 1, *SIZES[level])
            .double()
        ),
        head=lambda step: rng("head", step).normal(3, 16).double() * 0.01,
        real=real,
        view=lambda step, images: view("syn", step, images),
        num_views=method.views,
        grow_every=method.grow_every,
        lr=ADAM.lr,
        mean=mean,
        std=std,
    )
    for step, (loss, images) in enumerate(expected):
        before = state.syn.latents.detach().clone()
        record = method.step(ctx, state, step)
        assert record["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-9)
        if method.num_levels(ctx, step + 1) == method.num_levels(ctx, step):
            torch.testing.assert_close(state.syn()[0].detach(), images, rtol=1e-5, atol=1e-5)
        assert not torch.equal(before, state.syn.latents)
    assert method.num_levels(ctx, step) == 4


def test_levels_appear_one_after_the_other_and_none_after_the_last_step(backbones: Path, tiny: Arrays) -> None:
    ctx, seen = context(backbones, tiny), []
    method = dataclasses.replace(TINY, num_steps=6)
    state = method.init(ctx)
    for step in range(6):
        levels = state.syn.latents.detach().split([1, 4, 16, 64], 2)
        seen.append([bool(level.abs().sum()) for level in levels])
        method.step(ctx, state, step)
    assert [sum(of) for of in seen] == [1, 1, 2, 2, 3, 3]
    assert not state.syn.latents[:, :, 21:].any(), "a level that no step learned would be noise"
    single = dataclasses.replace(TINY, coarsest=8)
    assert single.init(ctx).syn.latents.shape == (6, 1, 64)


def test_images_in_parts_give_the_same_steps(backbones: Path, tiny: Arrays) -> None:
    ends = []
    for most in (None, 5):
        ctx = context(backbones, tiny, "resized-crop_flip:mode=M")
        ctx = dataclasses.replace(ctx, compute=Compute(micro_batch=most))
        state = TINY.init(ctx)
        for step in range(4):
            TINY.step(ctx, state, step)
        ends.append(state.syn.latents.detach().clone())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


def test_it_descends(backbones: Path, tiny: Arrays) -> None:
    ctx, method = context(backbones, tiny, ipc=1), dataclasses.replace(TINY, num_steps=60, grow_every=10)
    state = method.init(ctx)
    losses = [float(method.step(ctx, state, step)["loss"]) for step in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


PLAN: dict[str, Any] = {"method": TINY, "dataset": "tiny", "network": "mlp", "ipc": 2, "augment": "none"}


@pytest.mark.parametrize("decode", [Pixels(), Pixels8Bit()], ids=str)
def test_its_set_holds_the_rendered_images_within_the_budget(
    decode: Decode, backbones: Path, tiny: Arrays, tmp_path: Path
) -> None:
    options = api.RunOptions(out=tmp_path / "run", buffers=backbones, device="cpu")
    syn = api.run(Recipe(**PLAN, decode=decode), options, arrays=tiny)
    assert syn.cost().images == 6 * 64 * (1 if decode.name == "pixels-8bit" else 4)
    pixels = load(tmp_path / "run").to_dataset("pixels").tensors[0]  # type: ignore[attr-defined]
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert syn.origin.artifacts[0]["kind"] == "networks"
    found = api.evaluate(tmp_path / "run", tiny, num_seeds=1, protocol=SHORT)
    assert found.results[0].n == 1


def test_its_backbone_is_one_that_was_trained_without_labels(
    tiny: Arrays, tiny_buffers: Path, backbones: Path, tmp_path: Path
) -> None:
    options = api.RunOptions(out=tmp_path / "run", buffers=tiny_buffers, device="cpu")
    other = dataclasses.replace(TINY, teachers=("convnet:depth=1,width=4",))
    with pytest.raises(ValueError, match=r"objective is null, not \"barlow-twins\".* --objective barlow-twins"):
        api.run(Recipe(**PLAN | {"method": other}), options, arrays=tiny)
    anyhow = dataclasses.replace(other, trained_by="any")
    api.run(Recipe(**PLAN | {"method": anyhow}), options, arrays=tiny)
    absent = dataclasses.replace(options, buffers=tmp_path / "none", out=tmp_path / "again")
    with pytest.raises(ValueError, match=r"condense buffer .* --objective barlow-twins --keep last"):
        api.run(Recipe(**PLAN | {"method": anyhow}), absent, arrays=tiny)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decode": "factor"}, r"stores the images of its own pyramid, not those of factor; give decode='pixels'"),
        ({"decode": "pyramid"}, r"stores the images of its own pyramid, not those of pyramid; give decode='pixels'"),
        ({"transform": "zca"}, r"learns pixels from 0 to 1, which zca whitens; give transform='channel'"),
        ({"ema": 0.5}, r"adds levels to its pyramid, which cannot be averaged; give ema=None"),
        ({"clamp": True}, r"has no pixels below 0 or above 1 to clamp; give clamp=False"),
        ({"labels": "logits"}, r"gives labels no gradient"),
        ({"teachers": ("mlp", "mlp")}, r"method.teachers has 2 networks, but the features of one are used"),
        ({"views": 0}, r"method.views must be at least 1"),
        ({"coarsest": 9}, r"is 9, but the longer side of an image has 8 pixels"),
    ],
)
def test_what_makes_no_sense_is_refused(
    fields: dict[str, Any], message: str, backbones: Path, tiny: Arrays, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    usual: dict[str, Any] = {"teachers": (BACKBONE,), "network": "mlp", "ipc": 2, "augment": "none"}
    with pytest.raises(ValueError, match=message) as error:
        api.distill("linear-gradient", dataset=tiny, buffers=backbones, out=out, device="cpu", **usual | fields)
    assert "\n" not in str(error.value)


def test_recipes_hold_the_described_values() -> None:
    plan = named("linear-gradient")
    assert plan.method == LinearGradient(trained_by="any")
    assert plan.augment == "flip_resized-crop:mode=M" and plan.transform == "channel"


def test_a_backbone_of_torchvision_serves_without_its_classifier(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.models import mobilenet_v3_small

    name = "torchvision:mobilenet_v3_small"
    torch.save(mobilenet_v3_small(weights=None).state_dict(), tmp_path / "weights.pth")  # of 1000 classes
    words = ["import", str(tmp_path / "weights.pth"), str(tmp_path / "buffers"), "--network", name]
    cli.main([*words, "--dataset", str(tiny_file), "--features-only", "True"])
    with pytest.raises(SystemExit):
        cli.main([*words, "--dataset", str(tiny_file), "--decode", "factor"])
    assert "--decode describes a set, and SRC holds networks; leave it out" in capsys.readouterr().err
    method = dataclasses.replace(TINY, num_steps=2, teachers=(name,), trained_by="any")
    options = api.RunOptions(out=tmp_path / "run", buffers=tmp_path / "buffers", device="cpu")
    api.run(Recipe(**PLAN | {"method": method, "dataset": str(tiny_file)}), options)
    found = api.apply("probe", tmp_path / "run", backbones=(str(tmp_path / "buffers"),), num_epochs=2, num_seeds=1)
    assert found.columns == ("trained on", name)
