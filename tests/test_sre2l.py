"""SRe2L and CDA: slow twin, chunks of images on disk, and what the objective implies."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condense import api, catalog, engine, files, overview
from condense.artifacts import BufferWriter, find, pack
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays, load
from condense.eval.report import collect
from condense.method import Context, GradientState, Optim
from condense.methods import recovery
from condense.methods.recovery import by_class, by_image, rounded
from condense.methods.sre2l import Inversion, SRe2L, real_statistics
from condense.networks import Functional, build
from condense.recipe import Recipe, named
from condense.registry import load as method
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic import Hard, Labels, Origin, Pixels, Pixels8Bit
from condense.synthetic import load as read
from condense.synthetic.labels import Teacher
from condense.task import Split, make_task
from condense.teachers import opened
from tests.conftest import BATCH, TINY
from tests.reference import sre2l as reference

COUNTS = (5, 9, 7)
TWO = "convnet:depth=2,width=4,norm=batch"
VIEWS = "resized-crop_flip_roll:mode=M,max_roll=2"
QUICK = Optim(kind="adam", lr=0.1, momentum=0.5, beta2=0.9, schedule=Schedule(cosine_to=0.0))


def small(**fields: Any) -> SRe2L:
    return SRe2L(**{"num_steps": 4, "chunk": 2, "optim": QUICK, "weight_bn": 0.5} | fields)


def make_context(
    folder: Path, plan: Inversion, augment: str = "none", labels: Labels | None = None, network: str = TWO, ipc: int = 2
) -> Context:
    """A context with teachers whose weights and running statistics are random."""
    classes = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    images = torch.rand(len(classes), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = make_task(
        load((images, classes)),
        transform="channel",
        split=Split(),
        network=Functional(network, (1, 8, 8), 3),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    opened = {}
    for name, spec in plan.needs(task).items():
        of = task.with_network(name)
        writer = BufferWriter(folder, task.name, of.identity(), of.network.init(Rng(0), "structure"))
        for k in range(spec.num_networks):  # type: ignore[attr-defined]
            params, buffers = of.network.init(Rng(1), name, 0, k)
            noise = Rng(2).generator(name, 0, k)
            moved = {
                key: value + torch.rand(value.shape, generator=noise) if value.is_floating_point() else value
                for key, value in buffers.items()
            }
            row = pack(params)
            writer.add(k, torch.stack([row, row]), torch.stack([pack(moved)] * 2), {})
        writer.save()
        opened[name] = spec.open(find(folder, spec, task.name))
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    return Context(task, Rng(0), ipc, Pixels(), labels or Hard(), Compute(), origin, opened, scratch=folder / "scratch")


def advance(plan: Inversion, ctx: Context, state: GradientState, steps: range) -> list[float]:
    return [float(plan.step(ctx, state, step)["loss"]) for step in steps]


def module(ctx: Context, name: str, number: int) -> nn.Module:
    """A teacher as a module in the way of the textbook."""
    task = ctx.task if name == "same" else ctx.task.with_network(name)
    teacher = opened([name] * (number + 1), ctx)[number]
    network = build(task.network.name, task.input_shape, task.num_classes)
    network.load_state_dict({**teacher.weights.params, **teacher.weights.buffers})
    return network


@pytest.mark.parametrize("augment", ["none", VIEWS])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"per_class": True, "start": "real"},
        {"teachers": ("same", BATCH), "first_bn": 3.0, "chunk": 3},
        {"curriculum": "linear", "start": "real", "optim": dataclasses.replace(QUICK, beta2=0.999)},
    ],
    ids=["mixed", "per class", "two teachers", "curriculum"],
)
def test_agrees_with_the_slow_twin_step_by_step(fields: dict[str, Any], augment: str, tmp_path: Path) -> None:
    plan = small(**fields)
    if plan.curriculum != "none" and augment == "none":
        augment = "resized-crop:mode=M"
    ctx = make_context(tmp_path, plan, augment)
    state = plan.init(ctx)
    chunks = [(plan.begin(ctx, state, rows), rows // 2) for rows in plan.chunks(ctx)]
    modules = [module(ctx, name, 0) for name in plan.teachers]

    def view(step: int, image: Tensor) -> Tensor:
        strategy = ctx.task.augment
        if plan.curriculum == "linear":
            strategy = dataclasses.replace(strategy, min_area=1 - 0.92 * (step % 4) / 4)
        drawn = strategy.sample(ctx.rng("view", step), 1, (1, 8, 8), siamese=True)
        return strategy.apply(image, drawn)

    def wanted(chunk: int, turn: int) -> dict[str, tuple[Tensor, Tensor]] | None:
        if not plan.per_class:
            return None
        real = ctx.task.train.images[ctx.task.train.by_class[chunk]]
        inputs = reference.with_inputs(modules[turn].eval(), real)[1]
        return {name: reference.statistics(x.detach()) for name, x in inputs.items()}

    low, high = (ctx.task.transform(torch.full((1, 1, 1, 1), end))[0] for end in (0.0, 1.0))
    twin = reference.recover(
        chunks,
        4,
        teachers=modules,
        view=view,
        wanted=wanted,
        weight_bn=0.5,
        first_bn=plan.first_bn,
        lr=0.1,
        betas=(0.5, plan.optim.beta2),
        low=low,
        high=high,
    )
    before = torch.zeros(())
    for step, (loss, expected) in enumerate(twin):
        assert float(plan.step(ctx, state, step)["loss"]) == pytest.approx(loss, rel=1e-4)
        if (step + 1) % 4:
            found = state.syn.latents[: len(expected)].detach()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert step == 0 or not torch.equal(found, before)
            before = found.clone()
        else:  # the chunk is finished
            stored = plan.recovered(ctx, step // 4)
            assert (stored.int() - rounded(ctx.task, expected).int()).abs().max() <= 1
    assert step + 1 == plan.total_steps(ctx) == 4 * len(chunks)


def test_a_chunk_has_one_image_of_each_class_or_images_of_one_class() -> None:
    for rows in (by_image(7, 3, 3), by_class(7, 3, 2)):
        assert sorted(torch.cat(rows).tolist()) == list(range(21)), "every image once"
    mixed, pure = [[rows // 3 for rows in of] for of in (by_image(7, 3, 3), by_class(7, 3, 2))]
    assert all(len(classes.unique()) == len(classes) for classes in mixed)
    assert all(len(classes.unique()) == 1 for classes in pure)
    assert sorted(map(len, by_image(7, 3, 3))) == [2] * 6 + [3] * 3 and max(map(len, by_class(7, 3, 2))) == 2
    assert len(by_image(7, 3, 100)) == 3


def test_the_images_of_other_chunks_do_not_matter(tmp_path: Path) -> None:
    """The second of two chunks of unequal size is the same whatever was optimised before it."""
    plan = small(chunk=2)
    ctx = make_context(tmp_path, plan)
    state = plan.init(ctx)
    advance(plan, ctx, state, range(8))
    fresh = make_context(tmp_path / "fresh", plan)
    again = plan.init(fresh)
    again.syn.latents.data.normal_()
    plan._store(fresh, 0, again.syn.latents)
    plan.enter(fresh, again, 1)
    advance(plan, fresh, again, range(4, 8))
    assert [len(rows) for rows in plan.chunks(ctx)] == [2, 1, 2, 1]
    assert torch.equal(plan.recovered(fresh, 1), plan.recovered(ctx, 1))


def test_a_snapshot_has_finished_current_and_initial_images(tmp_path: Path) -> None:
    plan = small(chunk=3)  # two chunks: the first image of each class, then the second
    ctx = make_context(tmp_path, plan)
    state = plan.init(ctx)
    steps = [plan.finalize(ctx, state, 0)()[0]]
    for k in range(0, 8, 2):
        advance(plan, ctx, state, range(k, k + 2))
        steps.append(plan.finalize(ctx, state, k + 2)()[0])
    first, second = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])
    changed = [[not torch.equal(b[rows], a[rows]) for rows in (first, second)] for a, b in itertools.pairwise(steps)]
    assert changed == [[True, False], [True, False], [False, True], [False, True]]


def test_the_set_is_the_same_in_8_bits(tmp_path: Path) -> None:
    plan = small()
    sets = []
    for decode in (Pixels(), Pixels8Bit()):
        ctx = dataclasses.replace(make_context(tmp_path / decode.name, plan), decode=decode)
        sets.append(engine.compute(plan, ctx))
    assert torch.equal(sets[0]()[0], sets[1]()[0]) and sets[1].cost().images * 4 == sets[0].cost().images


def test_the_teacher_recognises_the_recovered_images_and_labels_them(
    tiny: Arrays, tiny_buffers: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"dataset": tiny, "network": BATCH, "buffers": tiny_buffers, "augment": "none", "ipc": 2}
    plan = small(num_steps=100, chunk=100, weight_bn=1.0)
    syn = api.distill(plan, labels="teacher", out=tmp_path / "run", **fields)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for first, last in ((0, 99), (100, 199)):  # of two chunks
        assert lines[last]["loss_entropy"] < 0.5 * lines[first]["loss_entropy"]
        assert lines[last]["loss_statistics"] < 0.5 * lines[first]["loss_statistics"]
        assert lines[first]["lr_latents"] == 0.1 and lines[last]["lr_latents"] < 1e-4
    images, targets = syn()
    assert (targets.argmax(1) == syn.classes).all() and ((targets > 0) & (targets < 1)).all()
    assert images.isfinite().all()


def test_labels_are_the_mean_of_the_teachers(tmp_path: Path) -> None:
    plan = small(teachers=("same", "same", BATCH), num_steps=2)
    ctx = make_context(tmp_path, plan, labels=Teacher())
    images, targets = engine.compute(plan, ctx)()
    labels = [teacher.labeller(Compute())(images).softmax(1) for teacher in opened(plan.teachers, ctx)]
    torch.testing.assert_close(targets, torch.stack(labels).mean(0))


def test_statistics_of_a_class_are_those_of_all_its_images_at_once(tmp_path: Path) -> None:
    ctx = make_context(tmp_path, small())
    observe, images = opened(["same"], ctx)[0].observer(Compute()), ctx.task.train.images[:]
    found, expected = real_statistics(observe, images.split(4)), observe(images)[1]
    assert list(found) == list(expected) and len(found) == 2
    for name, (mean, var) in expected.items():
        torch.testing.assert_close(found[name].mean, mean)
        torch.testing.assert_close(found[name].var, var)


@pytest.mark.parametrize(
    ("curriculum", "expected"),
    [
        ("none", [0.2] * 5),
        ("step", [1.0, 1.0, 0.2, 0.2, 0.2]),
        ("linear", [1.0, 0.6, 0.2, 0.2, 0.2]),
        ("cosine", [1.0, 0.6, 0.2, 0.2, 0.2]),
    ],
)
def test_the_curriculum_ends_at_the_area_of_the_recipe(curriculum: Any, expected: list[float]) -> None:
    plan = SRe2L(num_steps=100, curriculum=curriculum, milestone=0.5)
    augment = Augment.parse("resized-crop:min_area=0.2")
    areas = [plan.augment_at(augment, step).min_area for step in (0, 25, 50, 75, 99)]
    assert areas == pytest.approx(expected)
    if curriculum == "cosine":
        assert plan.augment_at(augment, 10).min_area > 1 - 0.8 * 0.2


# Chunks on disk


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data of 1000 classes of 8x8 images, and the folder of a teacher."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("thousand")
    parts = {}
    for part, each in (("train", 2), ("test", 1)):
        parts |= {
            f"x_{part}": rng.integers(0, 256, (1000 * each, 8, 8), dtype=np.uint8),
            f"y_{part}": np.arange(1000 * each) % 1000,
        }
    np.savez(root / "data.npz", **parts)
    api.make_buffer(root / "data.npz", BATCH, num_experts=1, num_epochs=1, out=root / "buffers", device="cpu")
    return root / "data.npz", root / "buffers"


class Stop(KeyboardInterrupt):
    """As if the user had stopped the run."""


def test_a_thousand_classes_keep_the_state_small_and_resume_within_a_chunk(
    thousand: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, buffers = thousand
    plan = Recipe(method=small(num_steps=3, chunk=100), dataset=str(data), network=BATCH, ipc=2, decode=Pixels8Bit())
    whole = api.run(plan, api.RunOptions(out=tmp_path / "whole", buffers=buffers, device="cpu"))
    assert len(whole) == 2000 and whole.latents.dtype == torch.uint8
    checkpoint = (tmp_path / "whole" / "checkpoint.safetensors").stat().st_size
    assert checkpoint < 6 * 100 * 64 * 4, "a chunk, two moments of Adam, and a header"

    written, write = [], engine.write_tensors

    def stopping(path: Path, *rest: Any, **options: Any) -> None:
        write(path, *rest, **options)
        written.append(path)
        if len(written) == 40 and path.name.startswith("checkpoint"):  # within a chunk, after 13 finished ones
            raise Stop

    options = api.RunOptions(out=tmp_path / "stopped", buffers=buffers, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "CHECKPOINT_STEPS", 1)
        patch.setattr(engine, "write_tensors", stopping)
        with pytest.raises(Stop):
            api.run(plan, options)
    assert len(list((options.out / "scratch").iterdir())) == 13
    api.run(plan, dataclasses.replace(options, resume=True))
    files = [tmp_path / name / "synthetic.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture
def interrupted(tiny: Arrays, tiny_buffers: Path, tmp_path: Path) -> tuple[Recipe, api.RunOptions]:
    """A run that was stopped in the second of its four chunks."""
    plan = Recipe(method=small(num_steps=3), dataset="tiny", network=BATCH, ipc=2, augment="none")
    options = api.RunOptions(out=tmp_path / "run", buffers=tiny_buffers, device="cpu")
    log = options.out / "log.jsonl"

    def stop(self: SRe2L, ctx: Context, state: GradientState, step: int) -> Any:
        if step == 5:
            raise Stop
        return after(self, ctx, state, step)

    after = SRe2L.after
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CHECKPOINT_STEPS", 1)
        patch.setattr(SRe2L, "after", stop)
        with pytest.raises(Stop):
            api.run(plan, options, arrays=tiny)
    assert len([line for line in log.read_text().splitlines() if "event" not in json.loads(line)]) == 5
    return plan, dataclasses.replace(options, resume=True)


def test_a_resumed_run_needs_no_chunk_that_is_not_finished(interrupted: Any, tiny: Arrays) -> None:
    plan, options = interrupted
    (options.out / "scratch" / "chunk_000001.safetensors").write_bytes(b"half of a fi")
    assert len(api.run(plan, options, arrays=tiny)) == 6


def test_steps_are_those_of_all_chunks(interrupted: Any, tiny: Arrays) -> None:
    """In the list of runs, and in the report, whose snapshots of later chunks are older than the set."""
    plan, options = interrupted
    stopped = overview.summary(options.out)
    assert (stopped.state, stopped.steps, stopped.num_steps) == ("stopped", 5, 12)
    api.run(plan, options, arrays=tiny)
    finished = overview.summary(options.out)
    assert (finished.state, finished.steps, finished.num_steps) == ("finished", 12, 12)
    assert list(collect(options.out).snapshots)[-1] == 12


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "other"])
def test_a_damaged_chunk_is_refused_in_one_line(damage: str, interrupted: Any, tiny: Arrays) -> None:
    plan, options = interrupted
    path = options.out / "scratch" / "chunk_000000.safetensors"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        tensors, header = files.read_tensors(path, recovery.KIND)
        files.write_tensors(path, tensors, header | {"chunk": 1})
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="chunk_000000") as error:
        api.run(plan, options, arrays=tiny)
    assert "\n" not in str(error.value)
    assert not (options.out / "synthetic.safetensors").exists()


# What is refused, and the recipes


def test_a_teacher_without_batch_norm_is_refused_unless_its_statistics_have_no_weight(
    tiny: Arrays, tiny_buffers: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"dataset": tiny, "buffers": tiny_buffers, "ipc": 1, "augment": "none", "num_steps": 2}
    with pytest.raises(ValueError, match=r"has no BatchNorm layer, .*; give network='convnet:norm=batch'$"):
        api.distill(small(), network=TINY, out=tmp_path / "run", **fields)
    with pytest.raises(ValueError, match=r"has no BatchNorm layer, .*; give teachers='convnet:norm=batch'$"):
        api.distill(small(teachers=(TINY,)), network=BATCH, out=tmp_path / "run", **fields)
    assert len(api.distill(small(weight_bn=0.0), network=TINY, out=tmp_path / "run", **fields)) == 3
    plain = f"{TINY},norm=none"
    api.make_buffer(tiny, plain, num_experts=1, num_epochs=1, out=tmp_path, device="cpu")
    fields |= {"buffers": tmp_path, "out": tmp_path / "plain"}
    assert len(api.distill(small(weight_bn=0.0), network=plain, **fields)) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decode": "factor"}, r"^sre2l recovers one image after the other, unlike factor; give decode='pixels'$"),
        ({"transform": "zca"}, r"^sre2l stores 8-bit pixels, which zca whitens; give transform='channel'$"),
        ({"ema": 0.9}, r"^sre2l rounds each image when it is finished, not an average; give ema=None$"),
        ({"labels": "logits"}, r"^sre2l gives labels no gradient"),
        ({"curriculum": "linear", "augment": "roll"}, r"^the curriculum changes the crops .* or curriculum='none'$"),
        ({"chunk": 0}, r"^method.chunk must be at least 1"),
        ({"milestone": 0.0}, r"^method.milestone must lie in \(0, 1\]"),
        (
            {"curriculum": "step"},
            r"^method.curriculum step changes the crops at .* the end; give milestone=0.5$",
        ),
        ({"teachers": ()}, r"^method.teachers names no network"),
        ({"ipc": 13, "start": "real"}, r"has 12 training images, 13 are needed"),
    ],
)
def test_what_cannot_be_is_refused(
    fields: dict[str, Any], message: str, tiny: Arrays, tiny_buffers: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"dataset": tiny, "network": BATCH, "buffers": tiny_buffers, "num_steps": 1}
    with pytest.raises(ValueError, match=message) as error:
        api.distill("sre2l", out=tmp_path / "run", **common | fields)
    assert "\n" not in str(error.value)


def test_series_are_refused(tmp_path: Path) -> None:
    series = np.random.default_rng(0).normal(size=(12, 2, 16)).astype(np.float32)
    data = load((series, np.arange(12) % 3), layout="NCL")
    with pytest.raises(ValueError, match="takes images and clips, not series"):
        api.distill(small(), dataset=data, augment="none", out=tmp_path / "run")


def test_clips_are_recovered(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clips = load((rng.integers(0, 256, (12, 4, 8, 8, 3), dtype=np.uint8), np.arange(12) % 3))
    fields: dict[str, Any] = {"network": "convnet3d:depth=1,width=4,norm=batch", "device": "cpu"}
    api.make_buffer(clips, num_experts=1, num_epochs=1, out=tmp_path / "buffers", **fields)
    plan = small(num_steps=2)
    api.distill(plan, dataset=clips, ipc=1, buffers=tmp_path / "buffers", augment=VIEWS, out=tmp_path / "run", **fields)
    assert read(tmp_path / "run")()[0].shape == (3, *clips.input_shape)


def test_recipes_have_the_published_values() -> None:
    names = {name for name in catalog.recipes() if name.split("-")[0] in ("sre2l", "cda")}
    assert names == {"sre2l", "cda", "sre2l-digits-ipc1"} | {
        f"sre2l-{dataset}-ipc{ipc}"
        for dataset in ("cifar10", "cifar100", "mnist", "fashion-mnist")
        for ipc in (1, 10, 50)
    }
    default = named("sre2l")
    assert default.method == SRe2L(num_steps=4000) and default.augment == str(Augment.parse(default.augment))
    assert named("sre2l-cifar100-ipc10").method == SRe2L(num_steps=1000)
    assert named("sre2l-cifar100-ipc10").augment == "roll:mode=M"
    assert named("cda").method == SRe2L(num_steps=4000, curriculum="cosine")
    assert method("sre2l") is SRe2L
