"""Five kinds of sources give their batches by key; views and stored labels are the same in every process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from condense.augment import Augment
from condense.compute import Compute
from condense.data.images import Images
from condense.files import read_tensors, write_tensors
from condense.networks import Functional, Weights
from condense.objective import KL
from condense.rng import Rng
from condense.sources import Batch, Examples, Minibatches, Relabelled, Source, StoredLabels, Streamed
from condense.train import Trainer, Training
from condense.views import Views

NUM, CLASSES = 10, 3
VIEWS = Views(augment=Augment.parse("color_crop_flip_scale:mode=M,flips=true"), cutmix=0.7, mixup=0.3)
EPOCHS = 3


def data() -> tuple[Tensor, Tensor]:
    return torch.rand(NUM, 3, 8, 8, generator=Rng(0).generator("images")), torch.arange(NUM) % CLASSES


def examples(seed: int = 7, **fields: Any) -> Examples:
    return Examples(*data(), Rng(seed), **{"batch_size": 4, "num_classes": CLASSES, "views": VIEWS} | fields)


def streamed(seed: int = 7, **fields: Any) -> Streamed:
    images, labels = data()
    shards = [lambda a=a, b=b: (images[a:b], labels[a:b]) for a, b in ((0, 3), (3, 9), (9, 10))]  # type: ignore[misc]
    usual: dict[str, Any] = {"batch_size": 4, "num_classes": CLASSES, "views": VIEWS}
    return Streamed(shards, NUM, Rng(seed), **usual | fields)


def network() -> tuple[Functional, Weights, Weights]:
    """A network, its first weights and those of a teacher."""
    net = Functional("convnet:depth=1,width=4", (3, 8, 8), CLASSES)
    return net, net.init(Rng(0), "weights"), net.init(Rng(0), "teacher")


def teacher(images: Tensor) -> Tensor:
    net, _, weights = network()
    return 5 * net.logits(*weights, images, train=False)


def relabelled(seed: int = 7) -> Source:
    return Relabelled(examples(seed), teacher, KL(temperature=2.0))


def stored(seed: int = 7) -> Source:
    return StoredLabels.of(examples(seed), teacher, EPOCHS, temperature=2.0)


SOURCES: dict[str, Callable[..., Source]] = {
    "examples": examples,
    "streamed": streamed,
    "relabelled": relabelled,
    "stored": stored,
}


def every(source: Source, num_epochs: int = EPOCHS) -> list[Batch]:
    return [source.batch(epoch, index) for epoch in range(num_epochs) for index in range(source.num_batches)]


def equal(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_a_batch_is_a_function_of_seed_epoch_and_index(make: Callable[..., Source]) -> None:
    batches, source, before = every(make()), make(), torch.get_rng_state()
    assert [len(batch.images) for batch in batches] == [8, 8, 4] * EPOCHS, "mirrored copies are added"
    keys = [(epoch, index) for epoch in range(EPOCHS) for index in range(3)]
    for position in [*Rng(0)("order").permutation(9).tolist(), 4, 4]:
        assert equal(source.batch(*keys[position]), batches[position])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(make(8).batch(0, 0).images, batches[0].images)
    assert not torch.equal(batches[3].images, batches[0].images)


@pytest.mark.parametrize("order", ["shuffled", "stored"])
@pytest.mark.parametrize("make", [examples, streamed])
def test_an_epoch_has_every_image_once(make: Callable[..., Source], order: str) -> None:
    source, (images, labels) = make(views=Views(), order=order), data()
    for epoch in range(2):
        batches = [source.batch(epoch, index) for index in range(source.num_batches)]
        seen = torch.cat([batch.images for batch in batches])
        index = [int((images == one).flatten(1).all(1).nonzero()) for one in seen]
        assert sorted(index) == list(range(NUM)) and (index == list(range(NUM))) == (order == "stored")
        assert torch.equal(torch.cat([batch.targets for batch in batches]), labels[index])
        assert [len(batch.images) for batch in batches] == [4, 4, 2]


def test_a_stream_reads_no_shard_before_it_is_needed_and_each_once_an_epoch() -> None:
    images, labels = data()
    read: list[int] = []

    def shard(number: int) -> Callable[[], tuple[Tensor, Tensor]]:
        def load() -> tuple[Tensor, Tensor]:
            read.append(number)
            return images[2 * number : 2 * number + 2], labels[2 * number : 2 * number + 2]

        return load

    source = Streamed([shard(k) for k in range(5)], NUM, Rng(0), batch_size=4, num_classes=CLASSES, order="stored")
    source.batch(0, 0)
    assert read == [0, 1]
    source.batch(0, 1), source.batch(0, 2), source.batch(1, 0)
    assert read == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize(
    ("num", "complaint"),
    [
        (12, "the shards hold 10 images, not 12; give num_examples=10"),
        (9, "the shards hold more than 9 images"),
        (8, "the shards hold more than 8 images"),
    ],
)
def test_a_stream_of_another_length_is_refused(num: int, complaint: str) -> None:
    images, labels = data()
    shards = [lambda k=k: (images[k : k + 2], labels[k : k + 2]) for k in range(0, NUM, 2)]  # type: ignore[misc]
    with pytest.raises(ValueError, match=complaint):
        every(Streamed(shards, num, Rng(0), batch_size=4, num_classes=CLASSES), 1)


def test_images_mapped_from_disk_give_the_batches_of_a_tensor(tmp_path: Path) -> None:
    images, labels = data()
    np.save(tmp_path / "images.npy", (255 * images).byte().numpy())
    mapped = Images.of(np.load(tmp_path / "images.npy", mmap_mode="c"), torch.device("cpu"))
    fields: dict[str, Any] = {"batch_size": 4, "num_classes": CLASSES, "views": VIEWS}
    pairs = (Examples(x, labels, Rng(1), **fields) for x in (mapped, mapped[:]))
    for one, other in zip(*map(every, pairs), strict=True):
        assert equal(one, other)


def test_minibatches_are_the_given_ones() -> None:
    images, labels = data()
    source = Minibatches(images, labels, [torch.tensor([3, 1]), torch.tensor([0])])
    assert source.num_batches == 2 and source.rng is None
    assert equal(source.batch(0, 0), Batch(images[[3, 1]], labels[[3, 1]])) and equal(
        *[source.batch(e, 1) for e in (0, 5)]
    )


def test_a_teacher_labels_what_the_network_sees() -> None:
    for batch, plain in zip(every(relabelled()), every(examples()), strict=True):
        assert torch.equal(batch.images, plain.images)
        torch.testing.assert_close(batch.targets, (teacher(plain.images) / 2.0).softmax(1))


def trained(source: Source) -> dict[str, Tensor]:
    net, start, _ = network()
    plan = Training(num_epochs=EPOCHS, batch_size=4, lr=0.1, loss="kl", temperature=2.0)
    return Trainer(net, plan, Compute()).run(start, source).params


def digests(source: Source) -> list[str]:
    """Of the images of every batch."""
    return [hashlib.sha256(batch.images.numpy().tobytes()).hexdigest() for batch in every(source)]


STORE = """
import json, sys
from pathlib import Path
from tests.test_sources import EPOCHS, StoredLabels, digests, examples, teacher
labels = StoredLabels.of(examples(), teacher, EPOCHS, temperature=2.0)
labels.save(Path(sys.argv[1]))
print(json.dumps(digests(labels)))
"""


def test_labels_stored_by_one_process_meet_the_same_views_in_another(tmp_path: Path) -> None:
    """The file has logits alone. Views agree to the bit, so training agrees with that under the teacher itself."""
    file = tmp_path / "labels.safetensors"
    other = subprocess.run([sys.executable, "-c", STORE, file], check=True, capture_output=True, text=True)
    assert json.loads(other.stdout) == digests(examples())
    labels = StoredLabels.load(file, examples(), temperature=2.0)
    assert labels.nbytes == EPOCHS * 2 * NUM * CLASSES * 4
    live = trained(relabelled())
    for name, p in trained(labels).items():
        torch.testing.assert_close(p, live[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(live["classifier.weight"], trained(examples())["classifier.weight"])


def test_stored_epochs_come_again_with_their_views() -> None:
    source = stored()
    assert equal(source.batch(EPOCHS + 1, 2), source.batch(1, 2))


def test_half_precision_labels_are_probabilities_of_full_precision() -> None:
    full = StoredLabels.of(examples(), teacher, 1)
    half = StoredLabels(examples(), full.logits.half())
    assert half.nbytes == full.nbytes / 2 and half.batch(0, 0).targets.dtype == torch.float32
    torch.testing.assert_close(half.batch(0, 0).targets, full.batch(0, 0).targets, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (lambda: examples(8), "other views: they differ in seed;"),
        (lambda: examples(batch_size=5), "other views: they differ in batch_size;"),
        (lambda: examples(views=Views()), "other views: they differ in batch_size, augment, cutmix, mixup;"),
        (lambda: streamed(), "other views: they differ in num_shards;"),
    ],
)
def test_labels_of_other_views_are_refused(other: Callable[[], Source], complaint: str, tmp_path: Path) -> None:
    StoredLabels.of(examples(), teacher, 1).save(tmp_path / "labels.safetensors")
    with pytest.raises(ValueError, match=complaint) as raised:
        StoredLabels.load(tmp_path / "labels.safetensors", other())
    assert "\n" not in str(raised.value)


def test_labels_of_views_of_earlier_draws_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels.safetensors"
    StoredLabels.of(examples(), teacher, 1).save(file)
    tensors, header = read_tensors(file, "stored-labels")
    del header["views"]["draws"], header["views"]["base"]  # as version 0.1.0 wrote it
    write_tensors(file, tensors, header)
    with pytest.raises(ValueError, match=r"other views: they differ in base, draws; give .*, or make them again"):
        StoredLabels.load(file, examples())


def test_the_identity_of_views_tells_components_of_one_seed_apart() -> None:
    images, targets = data()
    one, other = (
        Examples(images, targets, Rng(0).child("a", unit), batch_size=4, num_classes=CLASSES) for unit in (1, 2)
    )
    assert one.identity() != other.identity()


@pytest.mark.parametrize(
    ("logits", "complaint"),
    [
        (torch.zeros(1, 2 * NUM - 1, CLASSES), r"shape \(1, 19, 3\), where \(epochs, 20, outputs\) is expected"),
        (torch.zeros(0, 2 * NUM, CLASSES), r"shape \(0, 20, 3\)"),
        (torch.zeros(2 * NUM, CLASSES), r"shape \(20, 3\)"),
        (torch.zeros(1, 2 * NUM, CLASSES, dtype=torch.int64), "make the labels again"),
        (torch.full((1, 2 * NUM, CLASSES), torch.nan), "not finite"),
    ],
)
def test_files_that_hold_no_labels_are_refused(logits: Tensor, complaint: str, tmp_path: Path) -> None:
    StoredLabels(examples(), logits).save(tmp_path / "labels.safetensors")
    with pytest.raises(ValueError, match=complaint):
        StoredLabels.load(tmp_path / "labels.safetensors", examples())
    (tmp_path / "labels.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="labels"):
        StoredLabels.load(tmp_path / "labels.safetensors", examples())
