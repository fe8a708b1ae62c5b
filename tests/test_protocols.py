"""What the named protocols do: choices on held-out images, labels by a teacher, length by size, learned rates."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condense import pretraining
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays, load, to_float
from condense.eval import evaluate as evaluation
from condense.eval.evaluate import SetScorer, evaluate
from condense.eval.journal import CachedCells
from condense.eval.protocol import PROTOCOLS, STRATEGIES, Protocol, named
from condense.eval.results import Result
from condense.eval.subject import Subject, decoded
from condense.networks import Functional
from condense.rng import Rng
from condense.sources import Batch, Examples, Relabelled
from condense.synthetic import Labels, Logits, Origin, SyntheticSet, Targets
from condense.teachers import Teacher
from condense.train import Scorer, Trainer, Training

CPU = torch.device("cpu")
SHORT = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=20)


def stripes(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of three classes that a faint row tells apart."""
    labels = torch.arange(num) % 3
    images = 0.4 * torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    images[torch.arange(num), 0, 2 * labels] += 0.25
    return images, labels


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return load((*stripes(90, 0), *stripes(60, 1)))


def make_set(arrays: Arrays, *, val_fraction: float = 0.25, lr: Any = None, kind: Labels | None = None) -> SyntheticSet:
    origin = Origin(
        dataset={
            "name": arrays.name,
            "fingerprint": arrays.fingerprint["train"],
            "classes": list(arrays.classes),
            "input_shape": list(arrays.input_shape),
        },
        transform={"kind": "none"},
        recipe={"split": {"val_fraction": val_fraction, "seed": 0}, "transform": "none"},
    )
    images, labels = to_float(arrays.x_train[:6]), torch.from_numpy(arrays.y_train[:6])
    return SyntheticSet(images, labels, origin, lr=lr, label_kind=kind)


def run(syn: SyntheticSet, arrays: Arrays, plan: Protocol, **options: Any) -> Result:
    given: dict[str, Any] = {"networks": ["mlp"], "num_seeds": 2, "compute": Compute()}
    subject = Subject(syn=syn, arrays=arrays, device=CPU, cache=options.pop("cache", None))
    return evaluate(subject, protocol=plan, **given | options).results[0]


GRID = dataclasses.replace(PROTOCOLS["dd-ranking"], num_epochs=15, augment="none", lr_grid=(1e-5, 0.05, 0.01))


def test_dc_and_dd_ranking_are_what_was_published() -> None:
    dc, ranking = PROTOCOLS["dc"], PROTOCOLS["dd-ranking"]
    assert (dc.num_epochs, dc.batch_size, dc.augment) == (1000, 256, "crop-dc_scale-dc_rotate-dc:mode=P")
    assert (ranking.num_epochs, ranking.batch_size, ranking.augment) == (1000, 128, "dsa")
    assert ranking.lr_grid == (0.001, 0.005, 0.01, 0.05, 0.1) and ranking.labels == "hard"


def test_the_rate_is_the_best_one_on_held_out_images(arrays: Arrays) -> None:
    syn = make_set(arrays)
    chosen = run(syn, arrays, GRID).protocol_fields["lr"]
    held_out = Subject(syn=syn, arrays=arrays, device=CPU).held_out
    assert len(held_out) == 24
    images, labels = decoded(syn, soft=False)
    found = {}
    for lr in GRID.lr_grid:
        scorer = SetScorer(Functional("mlp", (1, 8, 8), 3), dataclasses.replace(GRID, lr=lr), Compute())
        keys = [Rng(0).child("learning rate", "mlp")]
        found[lr] = scorer.score(images, labels, held_out.images, held_out.labels, keys)[0].accuracy
    assert found[chosen] == max(found.values()) > found[1e-5]


def test_no_choice_and_no_training_reads_test_data(arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other test images and labels the chosen rate, the temperatures and the trained networks stay the same, and
    the test images are looked at once for each network, after everything else."""
    plan = dataclasses.replace(GRID, calibration="temperature", teacher="mlp", loss="kl", temperature=4.0)
    logits, temperature = Scorer.logits, evaluation.temperature
    seen: list[tuple[str, Any]] = []

    def spy_logits(self: Scorer, weights: Any, images: Any) -> Tensor:
        seen.append((f"{len(images)} images", weights.params["classifier.weight"].clone()))
        return logits(self, weights, images)

    def spy_temperature(*given: Any) -> float:
        seen.append(("temperature", temperature(*given)))
        return seen[-1][1]  # type: ignore[no-any-return]

    monkeypatch.setattr(Scorer, "logits", spy_logits)
    monkeypatch.setattr(evaluation, "temperature", spy_temperature)
    other = dataclasses.replace(arrays, x_test=1 - arrays.x_test, y_test=(arrays.y_test + 1) % 3)
    syn = make_set(arrays)
    first, second = (run(syn, data, plan) for data in (arrays, other))
    half = len(seen) // 2
    assert [what for what, _ in seen[:half]] == ["24 images"] * 3 + ["24 images", "temperature", "60 images"] * 2
    for (what, a), (_, b) in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), what
    assert first.protocol_fields == second.protocol_fields and first.metrics != second.metrics


def test_networks_are_scored_on_held_out_images_alone(arrays: Arrays) -> None:
    syn = make_set(arrays)
    without_test = dataclasses.replace(arrays, x_test=arrays.x_test[:0], y_test=arrays.y_test[:0])
    given, on_test = run(syn, without_test, SHORT, split="validation"), run(syn, arrays, SHORT)
    held_out = Subject(syn=syn, arrays=arrays, device=CPU).held_out
    keys = [Rng(0).child("evaluate", "mlp").child("network", k) for k in range(2)]
    scorer = SetScorer(Functional("mlp", (1, 8, 8), 3), SHORT, Compute())
    scores = scorer.score(*decoded(syn, soft=False), held_out.images, held_out.labels, keys)
    assert given.accuracies == tuple(one.accuracy for one in scores) != on_test.accuracies
    assert (given.split, on_test.split) == ("validation", "test")


def test_what_was_chosen_on_held_out_images_is_not_scored_on_them(arrays: Arrays) -> None:
    for plan in (GRID, dataclasses.replace(SHORT, calibration="temperature")):
        with pytest.raises(ValueError, match=r"makes a choice on the held-out images.* give split='test'"):
            run(make_set(arrays), arrays, plan, split="validation")
    with pytest.raises(ValueError, match="needs held-out real images"):
        run(make_set(arrays, val_fraction=0.0), arrays, SHORT, split="validation")


@pytest.mark.parametrize(("plan", "split"), [(SHORT, "validation"), (GRID, "test")])
def test_a_fraction_that_holds_out_no_image_is_refused(arrays: Arrays, plan: Protocol, split: str) -> None:
    line = r"split=Split\(val_fraction=0.01\) holds out no image, .*; distil the set with a larger fraction$"
    with pytest.raises(ValueError, match=line) as error:
        run(make_set(arrays, val_fraction=0.01), arrays, plan, split=split)
    assert "\n" not in str(error.value)


def test_scores_of_another_split_are_not_taken_from_the_cache(arrays: Arrays, tmp_path: Path) -> None:
    """Though the set has the same images: networks are scored on others, or a teacher has learned from others."""
    kept = CachedCells(tmp_path)
    for fraction in (0.25, 0.5):
        syn = make_set(arrays, val_fraction=fraction)
        for options in ({"split": "validation"}, {"plan": dataclasses.replace(SHORT, teacher="mlp", labels="teacher")}):
            first, again = (run(syn, arrays, **{"plan": SHORT, "journal": kept} | options) for _ in range(2))
            fresh = run(syn, arrays, **{"plan": SHORT} | options)
            assert first.metrics == again.metrics == fresh.metrics


def test_without_held_out_images_a_choice_is_refused(arrays: Arrays) -> None:
    for plan in (GRID, dataclasses.replace(SHORT, calibration="temperature")):
        with pytest.raises(ValueError, match=r"held-out real images.+split=Split"):
            run(make_set(arrays, val_fraction=0.0), arrays, plan)


def test_calibration_changes_the_confidence_and_not_the_accuracy(arrays: Arrays) -> None:
    syn = make_set(arrays)
    plain, scaled = (
        run(syn, arrays, dataclasses.replace(SHORT, num_epochs=200, calibration=kind))
        for kind in ("none", "temperature")
    )
    assert plain.accuracies == scaled.accuracies and plain.protocol_hash != scaled.protocol_hash
    assert sum(scaled.metrics["nll"]) < sum(plain.metrics["nll"])


def test_a_teacher_labels_each_batch_as_the_network_sees_it() -> None:
    network, rng = Functional("mlp", (1, 8, 8), 3), Rng(0)
    images, labels = stripes(12, 0)
    teacher = network.init(rng, "teacher")
    plan = Training(num_epochs=1, batch_size=12, lr=0.5, momentum=0.0, weight_decay=0.0, loss="kl", temperature=3.0)
    trainer = Trainer(network, plan, Compute())
    start = network.init(rng, "weights")
    source = Relabelled(
        trainer.source(images, labels, rng), Teacher(network, teacher).labeller(Compute()), plan.objective
    )
    found = trainer.run(start, source).params

    def loss(params: dict[str, Tensor]) -> Tensor:
        wanted = (network.logits(teacher.params, {}, images, train=False) / 3).softmax(1)
        log_p = (network.logits(params, {}, images) / 3).log_softmax(1)
        return F.kl_div(log_p, wanted, reduction="sum") / 12

    grads = torch.func.grad(loss)(start.params)
    torch.testing.assert_close(found, {name: p - 0.5 * grads[name] for name, p in start.params.items()})


def test_a_teacher_is_trained_once_and_kept(arrays: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(PROTOCOLS["soft-teacher"], num_epochs=30, teacher="mlp")
    first = run(make_set(arrays), arrays, plan, cache=tmp_path)
    (file,) = (tmp_path / "networks").glob("*/*/*.safetensors")
    trained: list[int] = []
    monkeypatch.setattr(pretraining, "Trainer", lambda *_: trained.append(1))
    assert run(make_set(arrays), arrays, plan, cache=tmp_path).accuracies == first.accuracies and not trained
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-5])
    assert run(make_set(arrays), arrays, plan, cache=tmp_path).accuracies == first.accuracies


@pytest.mark.parametrize(
    ("num_images", "steps"),
    [(10, 1000), (40, 2000), (100, 2000), (200, 20000), (400, 5000), (1000, 10000), (2000, 40000), (5000, 40000)],
)
def test_length_follows_the_size_of_the_set(num_images: int, steps: int) -> None:
    assert PROTOCOLS["frepo"].resolved(num_images).num_epochs * -(-num_images // 500) == steps


@pytest.mark.parametrize(("num_images", "steps"), [(10, 1000), (20, 2000), (100, 2000), (500, 2000)])
def test_mirror_images_lengthen_no_training(num_images: int, steps: int) -> None:
    """The table of steps asks for the images of the set, batches are made of them and their mirror images."""
    plan = PROTOCOLS["rcig"]
    assert plan.resolved(num_images).num_epochs * -(-num_images // 256) == steps
    assert plan.resolved(num_images, copies=2).num_epochs * -(-2 * num_images // 256) == steps


def test_the_strategies_that_go_with_colour_are_frozen() -> None:
    assert {name: tuple(map(str, pair)) for name, pair in STRATEGIES.items()} == {
        "frepo": (
            "jitter_zoom_rotate_translate_cutout-quarter",
            "flip_jitter_zoom_rotate_translate_cutout-quarter",
        ),
        "rcig": (
            "zoom_rotate_translate_cutout-quarter:mode=P",
            "flip_jitter_zoom_rotate_translate_cutout-quarter:mode=P,flips=true",
        ),
    }
    plan = PROTOCOLS["rcig"]
    assert plan.augment_for((1, 8, 8), "crop") == STRATEGIES["rcig"][0]
    assert plan.augment_for((3, 8, 8), "crop") == STRATEGIES["rcig"][1]
    assert str(plan.augment_for((3, 8), "crop")) == "none", "series have no augmentation"
    assert str(dataclasses.replace(plan, augment="dsa").augment_for((3, 8, 8), "crop")) == "crop"


def test_a_colour_set_is_joined_by_its_mirror_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = stripes(90, 0)
    arrays = load((images.expand(-1, 3, -1, -1), labels, images[:30].expand(-1, 3, -1, -1), labels[:30]))
    seen, batch = list[Tensor](), Examples.batch

    def spy(self: Examples, epoch: int, index: int) -> Batch:
        seen.append(self.images[:])
        return batch(self, epoch, index)

    monkeypatch.setattr(Examples, "batch", spy)
    plan = dataclasses.replace(PROTOCOLS["rcig"], num_epochs=1, steps_for=())
    result = run(make_set(arrays), arrays, plan)
    assert result.num_images == 6 and result.augment.endswith("mode=P,flips=true")
    assert len(seen[0]) == 12 and torch.equal(seen[0][6:], seen[0][:6].flip(3))


@pytest.mark.parametrize(
    ("name", "fields", "other"),
    [
        ("frepo", {"num_epochs": 3}, r"steps_for instead; .* give protocol=Protocol\(steps_for=\(\)\) too"),
        ("dd-ranking", {"lr": 0.1}, "lr_grid"),
        ("datm", {"lr": 0.1}, r"learned_lr instead; leave it out, or give protocol=Protocol\(learned_lr=False\) too"),
    ],
)
def test_a_change_without_effect_is_refused(name: str, fields: dict[str, Any], other: str, arrays: Arrays) -> None:
    syn, plan = make_set(arrays, lr=0.03), dataclasses.replace(PROTOCOLS[name], **fields)
    (field,) = fields
    with pytest.raises(ValueError, match=f"protocol.{field} has no effect, because the protocol {name} takes {other}"):
        evaluation.check(syn, ["mlp"], plan, 1)


def test_a_rate_for_each_step_takes_the_place_of_one(arrays: Arrays) -> None:
    syn = make_set(arrays, lr=[0.1, 0.2])
    syn.origin = dataclasses.replace(syn.origin, training=Training().content())
    for fields in ({"lr": 0.5}, {"lr_grid": (0.1, 0.2)}):
        with pytest.raises(ValueError, match=r"takes schedule.lr_per_step instead"):
            evaluation.check(syn, ["mlp"], dataclasses.replace(named("own", syn), **fields), 1)


def test_a_learned_rate_acts_where_the_protocol_says_so(arrays: Arrays) -> None:
    short = dataclasses.replace(PROTOCOLS["datm"], num_epochs=3)
    assert run(make_set(arrays, lr=0.03), arrays, short).protocol_fields["lr"] == pytest.approx(0.03)
    assert run(make_set(arrays), arrays, short).protocol_fields["lr"] == 0.01
    assert run(make_set(arrays, lr=0.03), arrays, SHORT).protocol_fields["lr"] == 0.01


@pytest.mark.parametrize(("kind", "mean"), [(None, 0.0), (Logits(), 0.0), (Targets(), 0.0)])
def test_regression_targets_are_centred(
    kind: Labels | None, mean: float, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, source = list[Tensor](), Trainer.source

    def spy(self: Trainer, images: Tensor, targets: Tensor, rng: Rng, augment: Augment, weights: None) -> Examples:
        seen.append(targets)
        return source(self, images, targets, rng, augment, weights)

    monkeypatch.setattr(Trainer, "source", spy)
    plan = dataclasses.replace(named("frepo", make_set(arrays)), num_epochs=1, steps_for=())
    run(make_set(arrays, kind=kind), arrays, plan)
    assert torch.allclose(seen[0].sum(1), torch.tensor(mean), atol=1e-6)
    assert seen[0].argmax(1).tolist() == [0, 1, 2, 0, 1, 2]
