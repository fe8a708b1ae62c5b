"""Five kinds of sources give their batches by key; views and stored labels are the same in every process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from condense.augment import Augment
from condense.compute import Compute
from condense.data.images import Images
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


def relabelled(seed: int = 7, **fields: Any) -> Source:
    return Relabelled(examples(seed, **fields), teacher, KL(temperature=2.0))


def stored(seed: int = 7, epochs: Sequence[int] = range(EPOCHS), **fields: Any) -> Source:
    source = examples(seed, **fields)
    logits = torch.stack(
        [torch.cat([teacher(source.batch(e, b).images) for b in range(source.num_batches)]) for e in epochs]
    )
    return StoredLabels(source, lambda k, positions: logits[k, positions], epochs, KL(temperature=2.0))


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


def test_images_with_weights_have_no_stored_order() -> None:
    with pytest.raises(
        ValueError, match="in proportion to these, and not in their stored order; give the order"
    ) as refused:
        examples(order="stored", weights=torch.ones(NUM))
    assert "\n" not in str(refused.value)


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


DIGESTS = """
import json
from tests.test_sources import digests, stored
print(json.dumps(digests(stored())))
"""


def test_stored_labels_meet_the_same_views_in_another_process() -> None:
    """Views agree to the bit, and training on stored labels agrees with that under the teacher itself."""
    other = subprocess.run([sys.executable, "-c", DIGESTS], check=True, capture_output=True, text=True)
    assert json.loads(other.stdout) == digests(examples())
    live = trained(relabelled())
    for name, p in trained(stored()).items():
        torch.testing.assert_close(p, live[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(live["classifier.weight"], trained(examples())["classifier.weight"])


def test_stored_epochs_come_again_with_their_views() -> None:
    source, live = stored(epochs=(0, 2, 1)), relabelled()
    assert equal(source.batch(EPOCHS + 1, 2), source.batch(1, 2))
    for epoch, of_views in enumerate((0, 2, 1)):
        for index in range(source.num_batches):
            one, other = source.batch(epoch, index), live.batch(of_views, index)
            assert torch.equal(one.images, other.images)
            torch.testing.assert_close(one.targets, other.targets)


def test_a_device_may_hold_the_numbers_of_epoch_and_batch() -> None:
    source = stored(epochs=(0, 2, 1), views=Views(cutmix=0.7))
    assert source.on_device
    for epoch in (1, EPOCHS + 2):
        source.begin(epoch)
        for index in range(source.num_batches - 1):
            there = source.batch(torch.tensor(epoch), torch.tensor(index))
            assert equal(there, source.batch(epoch, index))


def test_the_identity_of_views_tells_components_of_one_seed_apart() -> None:
    images, targets = data()
    one, other = (
        Examples(images, targets, Rng(0).child("a", unit), batch_size=4, num_classes=CLASSES) for unit in (1, 2)
    )
    assert one.identity() != other.identity()
