"""The evaluator: what the protocols mean, what a result says, and what it can never have seen."""

import contextlib
import dataclasses
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import api, sets
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays, load, to_float
from condense.data.images import Images
from condense.data.transform import fit
from condense.eval import baselines
from condense.eval.evaluate import SetScorer, evaluate, validator
from condense.eval.journal import CachedCells
from condense.eval.metrics import Scores
from condense.eval.protocol import PROTOCOLS, Protocol, named, own, recorded_name
from condense.eval.results import Evaluation, Result, read
from condense.eval.subject import Subject, decoded
from condense.files import read_header
from condense.networks import Functional
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic import Factor, Logits, Origin, SyntheticSet, Targets, save
from condense.synthetic import load as load_set
from condense.task import Split, make_task
from condense.train import Scorer, Training

OLD = Path(__file__).parent / "fixtures" / "v0_1"
CPU = torch.device("cpu")
CLASSES = 3
SHAPE = (1, 8, 8)
CANONICAL = PROTOCOLS["canonical"]
TINY = "convnet:depth=1,width=8"
SHORT = dataclasses.replace(CANONICAL, num_epochs=30)


def stripes(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of classes that a bright row tells apart, with noise; in [0, 1]."""
    labels = torch.arange(num) % CLASSES
    images = 0.2 * torch.rand(num, *SHAPE, generator=torch.Generator().manual_seed(seed))
    images[torch.arange(num), 0, 2 * labels] += 0.7
    return images, labels


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return load((*stripes(36, 0), *stripes(60, 1)))


def make_set(
    arrays: Arrays, *, images: Tensor | None = None, labels: Tensor | None = None, **options: Any
) -> SyntheticSet:
    """One training image a class, or as many as there are ``labels``."""
    origin = Origin(
        dataset={
            "name": arrays.name,
            "fingerprint": arrays.fingerprint["train"],
            "classes": list(arrays.classes),
            "input_shape": list(arrays.input_shape),
        },
        transform=options.pop("transform", {"kind": "none"}),
        training=options.pop("training", {}),
        recipe=options.pop("recipe", {}),
    )
    labels = torch.from_numpy(arrays.y_train[:CLASSES]) if labels is None else labels
    images = to_float(arrays.x_train[: len(labels)]) if images is None else images
    return SyntheticSet(images, labels, origin, **options)


def run(syn: SyntheticSet, arrays: Arrays, **options: Any) -> Evaluation:
    given: dict[str, Any] = {"networks": ["mlp"], "num_seeds": 2, "protocol": SHORT}
    subject = Subject(syn=syn, arrays=arrays, device=CPU, cache=options.pop("cache", None))
    return evaluate(subject, compute=Compute(), **given | options)


def test_held_out_images_of_the_same_data_in_another_order_are_refused(tiny: Arrays, tmp_path: Path) -> None:
    """Another order holds out other images, of which the set was made."""
    order = np.random.default_rng(0).permutation(len(tiny.y_train))
    shuffled = load((tiny.x_train[order], tiny.y_train[order], tiny.x_test, tiny.y_test))
    assert shuffled.fingerprint == tiny.fingerprint
    split = Split(val_fraction=0.5)
    syn = api.distill("random", dataset=tiny, network=TINY, ipc=2, split=split, out=tmp_path / "run", device="cpu")
    networks, before = ["mlp"], dataclasses.replace(syn.origin, dataset=dict(syn.origin.dataset))
    run(syn, tiny, networks=networks, split="validation")
    run(syn, shuffled, networks=networks)
    with pytest.raises(ValueError, match="which has the same samples in another order; give dataset with") as caught:
        run(syn, shuffled, networks=networks, split="validation")
    assert "\n" not in str(caught.value)
    assert sets.training_samples(syn, tiny) is not None
    with pytest.raises(ValueError, match="in another order"):
        sets.training_samples(syn, shuffled)
    before.dataset.pop("held_out")  # type: ignore[attr-defined]
    syn.origin = before
    run(syn, shuffled, networks=networks, split="validation")


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [Logits(), Targets()], ids=lambda kind: kind.name)
def test_validation_trains_on_the_labels_of_the_set(arrays: Arrays, kind: Logits | Targets) -> None:
    """Two of three copies of an image have another class, but hardly more of it than of the others."""
    images, right = to_float(arrays.x_train[:CLASSES]).repeat(3, 1, 1, 1), torch.eye(CLASSES)
    labels = torch.cat([10 * right, *2 * [0.01 * right.roll(1, 0)]])
    syn = make_set(arrays, images=images, labels=labels, label_kind=kind)
    split, network = Split(val_fraction=0.5), Functional("mlp", SHAPE, CLASSES)
    task = make_task(arrays, transform="none", split=split, network=network, augment=Augment(), device=CPU)
    assert validator(task, Compute(), 0)(syn, 1)["val_accuracy"] > 0.9
    wrong = make_set(arrays, images=images, labels=labels.argmax(1))
    assert validator(task, Compute(), 0)(wrong, 1)["val_accuracy"] < 0.1


class TestProtocols:
    def test_the_names_and_hashes_are_frozen(self) -> None:
        """A change here makes every number measured before incomparable: add a protocol, never alter one."""
        assert {name: protocol.hash for name, protocol in PROTOCOLS.items()} == {
            "canonical": "b22de2fbeb64392fc586a2c02a92093bcbf25eccf4b4231a3575d31444094567",
            "canonical-dsa": "ee47dffdd6a79389d4123ba8f147ac9fc96009f8c438d71d11337688a45f75e7",
            "full-data": "fb22739fc945c1aa04ab3cdb20a10afc0217229dfc72fcd2c155c3242b2d579e",
            "graphs": "1386207ddeaaba6c64b5623cc39063402254c18888f09fa7968b883753d77d9c",
            "full-graphs": "18a49e90bf6c26e1286805ac249905367d2f99e40f6c0d284770d6c386635718",
            "dc": "518c5251e943896d164040deb368aa56f9d6edd89a617b3f3cb394fca766007e",
            "frepo": "4ef5c4ad7bd9bedb5dc1108b627ca854d021d44f88be1747d395b98648c64a34",
            "rcig": "2be031cacef00f25cd5dabdfd1fb825c5ff6610cd40ee7c004687af2dda3ed24",
            "datm": "fcea2c6e501eb0c6130877c882af1edba0c0b79d276d4e6e672ee4995fb65c0e",
            "soft-teacher": "6a0c35f57efeda77e8c8f7e1aa6e131aede54f8b2ff6c5328deecee533f1618c",
            "relabelled": "77fd2e29f6f74aea9747a284e28ab619185fbc394193454205de941625eb2d20",
            "mse-teacher": "9a7845b8f2224d853335cca37513f2c2fac89a1f9ece042d57982e1eba04490b",
            "gift": "ccf9aa6450107193a5a2993c14230eef8156b2de974536187cc3ea4cfe0b6480",
            "pruned": "77b9006875a6f7b6bfc662d8c1cf9c6d3f23a1ee8479f9ef6d9ada6275c3b3f1",
            "dd-ranking": "b852a9f88f00d15f6381129100d05e253208743d7d2ec1e280fd54018b516eee",
        }

    def test_the_hash_is_of_the_content(self) -> None:
        assert dataclasses.replace(CANONICAL, name="mine").hash == CANONICAL.hash
        changes: list[dict[str, Any]] = [{}, {"lr": 1.0}, {"schedule": Schedule()}, {"labels": "own"}]
        assert len({dataclasses.replace(CANONICAL, **change).hash for change in changes}) == 4

    def test_canonical_drops_the_rate_exactly_once_at_half(self) -> None:
        rates = [CANONICAL.lr_at(epoch, 1) for epoch in range(CANONICAL.num_epochs)]
        assert rates == [0.01] * 150 + [pytest.approx(0.001)] * 150

    def test_canonical_is_the_training_of_torch(self) -> None:
        """300 epochs by hand, the momentum kept, give the same bits; a rebuilt optimiser gives others."""
        images, labels = torch.randn(24, *SHAPE, generator=Rng(0).generator("images")) / 4, torch.arange(24) % CLASSES
        network, rng = Functional("mlp", SHAPE, CLASSES), Rng(5)
        start = SetScorer(network, Training(num_epochs=0), Compute()).train(images, labels, rng).params
        trained = SetScorer(network, CANONICAL, Compute()).train(images, labels, rng).params

        def by_hand(keep_momentum: bool) -> Tensor:
            params = {name: p.clone().requires_grad_() for name, p in start.items()}
            options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4}
            optimiser = torch.optim.SGD(params.values(), lr=0.01, **options)
            for epoch in range(300):
                if epoch == 150 and keep_momentum:
                    optimiser.param_groups[0]["lr"] = 0.01 * 0.1
                elif epoch == 150:
                    optimiser = torch.optim.SGD(params.values(), lr=0.01 * 0.1, **options)
                order = rng.child("training")("order", epoch).permutation(24)
                loss = F.cross_entropy(network.logits(params, {}, images[order]), labels[order])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            return network.flatten(params).detach()

        result = network.flatten(trained)
        assert torch.equal(result, by_hand(keep_momentum=True))
        assert (result - by_hand(keep_momentum=False)).abs().max() > 1e-3

    def test_canonical_dsa_augments_every_image_by_the_strategy_of_the_data(self) -> None:
        strategy = Augment.parse(PROTOCOLS["canonical-dsa"].augment, own="color_crop_flip")
        assert strategy == Augment(("color", "crop", "flip"), mode="S", align_corners=False)

    def test_changed_fields_show_in_the_name(self, arrays: Arrays) -> None:
        assert recorded_name(CANONICAL) == "canonical"
        assert recorded_name(dataclasses.replace(CANONICAL, num_epochs=299)) == "canonical*"
        assert recorded_name(Protocol(name="mine", num_epochs=7)) == "mine"
        syn = make_set(arrays, training={"num_epochs": 5})
        assert recorded_name(own(syn), syn) == "own"
        assert recorded_name(dataclasses.replace(own(syn), num_epochs=6), syn) == "own*"

    def test_unknown_name(self, arrays: Arrays) -> None:
        with pytest.raises(ValueError, match="unknown protocol 'cannonical': did you mean 'canonical'"):
            named("cannonical", make_set(arrays))


class TestOwn:
    def test_it_is_the_record_of_the_set_with_the_learned_rate(self, arrays: Arrays) -> None:
        record = Training(num_epochs=7, loss="mse", momentum=0.0).content() | {"augment": "flip"}
        protocol = named("own", make_set(arrays, training=record, lr=0.25))
        assert protocol.content() == record | {"lr": pytest.approx(0.25), "labels": "own"}
        assert named("own", make_set(arrays, training=record)).lr == record["lr"]

    def test_without_a_record(self, arrays: Arrays) -> None:
        with pytest.raises(ValueError, match="stores no training of its own"):
            own(make_set(arrays))

    def test_a_record_that_this_version_cannot_follow(self, arrays: Arrays) -> None:
        with pytest.raises(ValueError, match="curriculum"):
            own(make_set(arrays, training={"curriculum": "hard first"}))

    @pytest.mark.parametrize("record", [{"decay_at": "late"}, {"rates": [0.1, -1.0]}, {"schedule": {"drop_at": [0.5]}}])
    def test_nor_a_schedule_that_is_none(self, record: dict[str, Any], arrays: Arrays) -> None:
        with pytest.raises(
            ValueError, match="this version cannot follow the training that is stored with the set"
        ) as raised:
            own(make_set(arrays, training=record))
        assert "\n" not in str(raised.value)

    def test_records_of_version_0_1_are_read_as_they_are(self) -> None:
        for file in (OLD / "run" / "synthetic.safetensors", *OLD.glob("*.safetensors")):
            syn = load_set(file)
            read = json.loads(json.dumps(own(syn).content()))
            learned = {} if syn.lr is None else {"rates" if syn.lr.dim() else "lr": syn.lr.tolist()}
            assert read == {"labels": "own", **syn.origin.training, **learned}

    def test_a_step_size_for_every_step_is_followed_in_order(self, arrays: Arrays) -> None:
        record = Training(num_epochs=2, batch_size=2, order="stored", momentum=0.0, weight_decay=0.0).content()
        syn = make_set(arrays, training=record, lr=torch.tensor([0.1, 0.2, 0.3, 0.4]))
        plan, (images, labels) = own(syn), decoded(syn, soft=True)
        assert plan.schedule.lr_per_step == pytest.approx((0.1, 0.2, 0.3, 0.4))
        network, rng = Functional("mlp", SHAPE, CLASSES), Rng(1)
        found = SetScorer(network, plan, Compute()).train(images, labels, rng).params
        params = SetScorer(network, Training(num_epochs=0), Compute()).train(images, labels, rng).params
        for step, batch in enumerate([[0, 1], [2], [0, 1], [2]]):

            def loss(params: dict[str, Tensor], batch: list[int] = batch) -> Tensor:
                return torch.nn.functional.cross_entropy(network.logits(params, {}, images[batch]), labels[batch])

            grads = torch.func.grad(loss)(params)
            params = {name: p - plan.schedule.lr_per_step[step] * grads[name] for name, p in params.items()}
        torch.testing.assert_close(found, params)

    def test_soft_labels_and_learned_rate_act_only_here(self, arrays: Arrays) -> None:
        soft = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.9], [0.0, 1.0, 2.0]])
        record = Training(num_epochs=20).content()
        syn = make_set(arrays, labels=soft, label_kind=Logits(), training=record, lr=0.05)
        by_canonical, by_own = (run(syn, arrays, protocol=plan).results[0] for plan in (SHORT, own(syn)))
        assert by_canonical.accuracies == run(make_set(arrays), arrays).results[0].accuracies
        lr = by_own.protocol_fields["lr"]
        assert lr == pytest.approx(0.05)
        scorer = SetScorer(Functional("mlp", SHAPE, CLASSES), Training(num_epochs=20, lr=lr), Compute())
        images, x, y = (
            to_float(arrays.x_train[:CLASSES]),
            to_float(arrays.x_test),
            torch.from_numpy(arrays.y_test),
        )
        rng = Rng(0).child("evaluate", "mlp")
        hard_score, soft_score = (
            [scorer.score(images, targets, x, y, [rng.child("network", k)])[0].accuracy for k in range(2)]
            for targets in (soft.argmax(1), soft.softmax(1))
        )
        assert list(by_own.accuracies) == soft_score != hard_score


class TestEvaluate:
    def test_separable_classes_are_learned_from_one_image_each(self, arrays: Arrays) -> None:
        evaluation = run(make_set(arrays), arrays, networks=["mlp", TINY], protocol=CANONICAL)
        assert [result.accuracies for result in evaluation.results] == [(1.0, 1.0), (1.0, 1.0)]

    def test_accuracies_are_fractions_of_the_test_images(self, arrays: Arrays) -> None:
        plan = dataclasses.replace(SHORT, num_epochs=15)  # few, so that the networks differ
        (result,) = run(make_set(arrays), arrays, num_seeds=3, protocol=plan).results
        hits = [accuracy * len(arrays.y_test) for accuracy in result.accuracies]
        assert hits == pytest.approx([round(h) for h in hits])
        assert all(0 <= accuracy <= 1 for accuracy in result.accuracies)
        assert len(set(result.accuracies)) > 1
        assert result.mean == pytest.approx(sum(result.accuracies) / 3)
        assert result.std == pytest.approx(statistics.stdev(result.accuracies))

    def test_the_last_epoch_counts_not_the_best(self) -> None:
        """Networks are taught the wrong classes, so they are best at the start."""
        images, labels = stripes(12, 0)
        x, y = stripes(60, 1)
        network, rng = Functional("mlp", SHAPE, CLASSES), Rng(0)
        seen: list[float] = []
        scorer = Scorer(network, Compute())
        (last,) = SetScorer(network, SHORT, Compute()).score(
            images,
            (labels + 1) % CLASSES,
            x,
            y,
            [rng],
            lambda _, weights: seen.append(scorer.accuracy(weights, x, y)),
        )
        assert max(seen) > 0.1
        assert last.accuracy == seen[-1] == 0.0

    def test_training_never_sees_test_data(self, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
        """Other test images and labels: the networks that are scored stay the same to the bit."""
        scored: list[dict[str, Tensor]] = []
        logits = Scorer.logits

        def spy(self: Scorer, weights: Any, images: Images) -> Tensor:
            scored.append(weights.params)
            return logits(self, weights, images)

        monkeypatch.setattr(Scorer, "logits", spy)
        other = dataclasses.replace(arrays, x_test=1 - arrays.x_test, y_test=(arrays.y_test + 1) % CLASSES)
        syn = make_set(arrays)
        first, second = run(syn, arrays).results[0], run(syn, other).results[0]
        assert len(scored) == 4
        assert identical(scored[0], scored[2]) and identical(scored[1], scored[3])
        assert first.accuracies != second.accuracies

    def test_equal_seeds_give_equal_results_and_the_global_generators_rest(self, arrays: Arrays) -> None:
        syn, dsa = make_set(arrays), dataclasses.replace(PROTOCOLS["canonical-dsa"], num_epochs=20)
        before = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
        options: dict[str, Any] = {"protocol": dsa, "num_seeds": 3}
        one, two = run(syn, arrays, **options).results[0], run(syn, arrays, **options).results[0]
        other = run(syn, arrays, seed=1, **options).results[0]
        assert before == (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())  # noqa: NPY002
        assert one.accuracies == two.accuracies != other.accuracies
        assert one.augment == arrays.strategy

    def test_a_network_does_not_depend_on_its_company(self, arrays: Arrays) -> None:
        syn, plan = make_set(arrays), dataclasses.replace(SHORT, num_epochs=1)
        alone = run(syn, arrays, protocol=plan, num_seeds=1).results[0]
        among = run(syn, arrays, protocol=plan, networks=[TINY, "mlp"]).results[1]
        assert among.accuracies[0] == alone.accuracies[0]

    def test_images_are_decoded_and_labels_follow(self, arrays: Arrays) -> None:
        syn = make_set(arrays, decode=Factor(factor=2))
        images, labels = decoded(syn, soft=False)
        assert images.shape == (12, *SHAPE) and not images.requires_grad
        assert labels.tolist() == [0, 1, 2] * 4
        assert run(syn, arrays).results[0].num_images == 12

    @pytest.mark.parametrize("spec", ["channel", "zca"])
    def test_test_images_go_through_the_transform_of_the_set(
        self, arrays: Arrays, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        split = Split(val_fraction=0.25, seed=3)
        index, _ = split.indices(torch.from_numpy(arrays.y_train))
        transform = fit(spec, to_float(arrays.x_train)[index], known=None, key="stripes", cache=None)
        syn = make_set(arrays, transform=transform.describe(), recipe={"split": dataclasses.asdict(split)})
        scored: list[Images] = []

        def spy(self: Scorer, weights: Any, images: Images) -> Tensor:
            scored.append(images)
            return torch.zeros(len(images), CLASSES)

        monkeypatch.setattr(Scorer, "logits", spy)
        run(syn, arrays, num_seeds=1, protocol=dataclasses.replace(SHORT, num_epochs=0), cache=tmp_path)
        torch.testing.assert_close(scored[0][:], transform(to_float(arrays.x_test)))

    def test_callables_are_networks_too(self, arrays: Arrays) -> None:
        def linear(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))

        (result,) = run(make_set(arrays), arrays, networks=[linear]).results
        assert "linear" in result.network and result.num_params == 64 * 3 + 3

    def test_a_wrong_network_is_refused_before_any_training(self, arrays: Arrays) -> None:
        done: list[Result] = []
        with pytest.raises(ValueError, match="convnot"):
            run(make_set(arrays), arrays, networks=["mlp", "convnot"], on_result=done.append)
        assert not done

    @pytest.mark.parametrize(
        ("spoil", "complaint"),
        [
            (lambda a: load((*stripes(39, 7), *stripes(60, 1))), "fingerprint"),
            (lambda a: dataclasses.replace(a, classes=("a", "b", "c", "d")), "number of classes 3"),
            (lambda a: dataclasses.replace(a, x_train=a.x_train[:, :, :6]), "image shape"),
            (lambda a: dataclasses.replace(a, x_test=a.x_test[:0], y_test=a.y_test[:0]), "no test images"),
        ],
    )
    def test_data_of_another_set(self, arrays: Arrays, spoil: Callable[[Arrays], Arrays], complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint) as caught:
            run(make_set(arrays), spoil(arrays))
        assert "\n" not in str(caught.value) and "give" in str(caught.value)

    def test_no_seeds(self, arrays: Arrays) -> None:
        with pytest.raises(ValueError, match="num_seeds must be at least 1"):
            run(make_set(arrays), arrays, num_seeds=0)

    def test_progress_counts_epochs(self, arrays: Arrays) -> None:
        seen: list[Any] = []

        @contextlib.contextmanager
        def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
            seen.append((title, total))
            yield lambda done, note="": seen.append(done)

        run(make_set(arrays), arrays, protocol=dataclasses.replace(SHORT, num_epochs=3), progress=progress)
        assert seen == [("canonical* mlp", 6), 1, 2, 3, 4, 5, 6]

    def test_progress_shows_the_mean_of_those_done_in_percent(self, arrays: Arrays) -> None:
        notes: list[str] = []

        @contextlib.contextmanager
        def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
            yield lambda done, note="": notes.append(note)

        found = run(make_set(arrays), arrays, protocol=dataclasses.replace(SHORT, num_epochs=1), progress=progress)
        assert notes == ["", f"mean {100 * found.results[0].accuracies[0]:.1f} %, n = 1"]


class TestFile:
    def test_a_row_says_what_decided_it(self, arrays: Arrays, tmp_path: Path) -> None:
        syn = make_set(arrays, recipe={"method": {"name": "dm"}})
        plan = dataclasses.replace(SHORT, num_epochs=15)  # few, so that the two networks differ
        save(syn, tmp_path / "synthetic.safetensors")
        run(syn, arrays, protocol=plan, seed=4).write(tmp_path / "evaluation.json")
        (row,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
        assert row == {
            "method": "dm",
            "network": "mlp",
            "num_params": Functional("mlp", SHAPE, CLASSES).num_params,
            "accuracies": row["accuracies"],
            "metrics": row["metrics"],
            "mean": pytest.approx(statistics.fmean(row["accuracies"])),
            "std": pytest.approx(statistics.stdev(row["accuracies"])),
            "interval": row["interval"],
            "n": 2,
            "protocol": "canonical*",
            "protocol_hash": plan.hash,
            "protocol_fields": plan.content(),
            "augment": "none",
            "seed": 4,
            "num_images": 3,
            "synthetic_sha256": read_header(tmp_path / "synthetic.safetensors")["sha256"],
            "dataset": arrays.name,
            "train_fingerprint": arrays.fingerprint["train"],
            "test_fingerprint": arrays.fingerprint["test"],
            "compute": {"compile": False, "autocast": "none"},
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "seconds": row["seconds"],
            "peak_memory_bytes": row["peak_memory_bytes"],
            "stored_bytes": {"images": 3 * 64 * 4, "labels": 3 * 8, "decoder": 0},
            "stored_bits": 3 * (64 * 32 + 2),
            "full_bytes": arrays.x_train.nbytes + arrays.y_train.nbytes,
            "compression": (arrays.x_train.nbytes + arrays.y_train.nbytes) / (3 * 64 * 4 + 3 * 8),
            "code": row["code"],
            "split": "test",
            "teacher": "",
            "transform": "none",
            "changed": {"num_epochs": 15},
        }
        assert len(set(row["accuracies"])) == 2 and max(row["accuracies"]) < 1
        assert row["seconds"] > 0 and row["peak_memory_bytes"] > 1e6
        # Student's t with one degree of freedom: its 97.5th percentile is tan(0.475 pi).
        half = math.tan(0.475 * math.pi) * row["std"] / math.sqrt(2)
        low, high = max(row["mean"] - half, 0), min(row["mean"] + half, 1)
        assert row["interval"] == pytest.approx([low, high])
        assert {len(values) for values in row["metrics"].values()} == {2} and "ece" in row["metrics"]

    def test_one_network_has_no_deviation(self, arrays: Arrays) -> None:
        row = run(make_set(arrays), arrays, num_seeds=1).results[0].row()
        assert row["std"] is None and row["interval"] is None

    def test_the_same_question_replaces_its_row(self, arrays: Arrays, tmp_path: Path) -> None:
        file, syn = tmp_path / "evaluation.json", make_set(arrays)
        plan = dataclasses.replace(SHORT, num_epochs=1)
        run(syn, arrays, protocol=plan, networks=["mlp", TINY]).write(file)
        first = read(file)
        assert [row["network"] for row in first] == ["mlp", TINY]
        again = run(syn, arrays, protocol=plan)
        Evaluation((dataclasses.replace(again.results[0], seconds=99.0),)).write(file)
        assert [(row["network"], row["seconds"]) for row in read(file)] == [
            (TINY, first[1]["seconds"]),
            ("mlp", 99.0),
        ]
        changes: list[dict[str, Any]] = [{"num_seeds": 1}, {"seed": 1}, {"protocol": SHORT}]
        for change in changes:
            run(syn, arrays, **{"protocol": plan} | change).write(file)
        run(make_set(arrays, labels=torch.tensor([0, 1, 2, 0])), arrays, protocol=plan).write(file)
        assert len(read(file)) == 6

    @pytest.mark.parametrize("content", ["{", "[]", '{"results": 3}', '{"other": []}'])
    def test_a_foreign_file_is_left_alone(self, tmp_path: Path, content: str) -> None:
        file = tmp_path / "evaluation.json"
        file.write_text(content)
        with pytest.raises(ValueError, match=r"holds no results|cannot be read"):
            Evaluation(()).write(file)
        assert file.read_text() == content


class TestFullData:
    def full(self, arrays: Arrays, cache: Path | None, **options: Any) -> Result:
        plan = dataclasses.replace(PROTOCOLS["full-data"], num_epochs=12, batch_size=8)
        given: dict[str, Any] = {"network": "mlp", "num_seeds": 2, "protocol": plan, "transform": "none"}
        journal = CachedCells(cache)
        return baselines.full_data(arrays, compute=Compute(), device=CPU, journal=journal, **given | options)

    def test_all_training_images_are_used(self, arrays: Arrays) -> None:
        result = self.full(arrays, None)
        assert result.num_images == len(arrays.y_train) and result.method == "full"
        assert result.protocol == "full-data*" and result.mean > 0.9
        assert result.compression == 1

    def test_trained_once(self, arrays: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.full(arrays, tmp_path)
        trained: list[str] = []
        score = SetScorer.score

        def spy(self: SetScorer, *tensors: Any, **options: Any) -> list[Scores]:
            trained.append(self.network.name)
            return score(self, *tensors, **options)

        monkeypatch.setattr(SetScorer, "score", spy)
        assert self.full(arrays, tmp_path) == first and not trained
        assert self.full(arrays, tmp_path, num_seeds=1).accuracies == first.accuracies[:1] and not trained
        other_test = load((*stripes(36, 0), *stripes(60, 2)))
        others: list[dict[str, Any]] = [{"seed": 1}, {"network": TINY}, {"transform": "channel"}]
        for other in others:
            self.full(arrays, tmp_path, **other)
        self.full(other_test, tmp_path)
        assert trained == ["mlp"] * 2 + [Functional(TINY, SHAPE, CLASSES).name] * 2 + ["mlp"] * 4

    def test_a_damaged_cache_is_trained_again(self, arrays: Arrays, tmp_path: Path) -> None:
        first = self.full(arrays, tmp_path)
        for file in tmp_path.rglob("cell.json"):
            file.write_text("{")
        assert self.full(arrays, tmp_path).accuracies == first.accuracies

    def test_without_a_place_to_write_nothing_is_kept(self, arrays: Arrays, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.warns(UserWarning, match="nothing more is cached"):
            assert self.full(arrays, tmp_path / "file").n == 2
