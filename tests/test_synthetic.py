import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from condense import api
from condense.data.datasets import Arrays
from condense.data.layout import channel_axis
from condense.files import read_header
from condense.synthetic import (
    LABELS,
    Factor,
    Hard,
    Labels,
    Logits,
    Origin,
    Pixels8Bit,
    SyntheticSet,
    Targets,
    Teacher,
    load,
    save,
)
from condense.synthetic.labels import Assigned
from condense.task import Split
from tests.conftest import TINY

ORIGIN = Origin(
    dataset={"name": "tiny", "fingerprint": "f", "classes": ["a", "b", "c"], "input_shape": [1, 8, 8]},
    transform={"kind": "none"},
    training={"num_epochs": 1},
)


def make(num: int = 2, **fields: object) -> SyntheticSet:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3 * num, 1, 8, 8, generator=generator)
    return SyntheticSet(latents, torch.arange(3).repeat_interleave(num), ORIGIN, **fields)  # type: ignore[arg-type]


def test_forward_gives_images_and_targets_of_the_latents_asked_for() -> None:
    syn = make(num=2)
    images, targets = syn(torch.tensor([5, 0]))
    assert torch.equal(images, syn.latents[[5, 0]]) and targets.tolist() == [2, 0]


def test_the_step_size_is_positive_whatever_happens_to_its_parameter() -> None:
    syn = make(lr=0.01)
    assert syn.lr is not None and torch.isclose(syn.lr, torch.tensor(0.01))
    with torch.no_grad():
        syn.log_lr.sub_(50.0)  # type: ignore[union-attr]
    assert 0 < syn.lr.detach().item() < 1e-20


def test_a_set_of_bytes_has_its_learning_rate() -> None:
    latents = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    syn = SyntheticSet(latents, torch.arange(3), ORIGIN, decode=Pixels8Bit(), lr=0.01)
    torch.testing.assert_close(syn.lr, torch.tensor(0.01))
    assert "lr" in syn.leaves() and make(lr=0.01).lr.dtype == torch.float32  # type: ignore[union-attr]


def test_soft_labels_begin_at_the_class_and_receive_gradient() -> None:
    syn = make(label_kind=Logits(confidence=0.8))
    targets = syn()[1]
    assert torch.allclose(targets.sum(1), torch.ones(6)) and torch.allclose(targets.max(1).values, torch.tensor(0.8))
    targets[:, 0].sum().backward()
    assert syn.leaves()["labels"][0].grad is not None


def test_factor_holds_several_images_in_the_room_of_one() -> None:
    images = torch.stack([torch.full((1, 8, 8), float(value)) for value in range(4)])
    decode = Factor(factor=2)
    decoder = decode.build((1, 8, 8), 3)
    latents = decode.encode(images, torch.tensor([0]), decoder, torch.Generator())
    assert latents.shape == (1, 1, 8, 8)
    assert torch.equal(decoder(latents, torch.tensor([0])), images)
    syn = make(decode=decode)
    decoded, targets = syn(torch.tensor([0, 4]))
    assert decoded.shape == (8, 1, 8, 8) and targets.tolist() == [0, 2] * 4
    assert syn.cost().images == make().cost().images


@pytest.mark.parametrize("size", [(7, 7), (8, 6)])
def test_factor_takes_sizes_that_do_not_divide(size: tuple[int, int]) -> None:
    decode = Factor(factor=3)
    images = torch.randn(9 * 2, 3, *size)
    decoder, classes = decode.build((3, *size), 2), torch.tensor([0, 1])
    latents = decode.encode(images, classes, decoder, torch.Generator())
    assert latents.shape == (2, 3, *size)
    assert decoder(latents, classes).shape == images.shape


@pytest.mark.parametrize("labels", [Hard(), Logits()])
@pytest.mark.parametrize("lr", [None, 0.02, torch.tensor([0.1, 0.2])])
def test_a_file_gives_back_the_set_and_equal_sets_equal_bytes(tmp_path: Path, labels: object, lr: object) -> None:
    syn = make(label_kind=labels, lr=lr, decode=Factor())
    save(syn, tmp_path / "a.safetensors")
    save(make(label_kind=labels, lr=lr, decode=Factor()), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = load(tmp_path / "a.safetensors")
    assert again.origin == syn.origin and again.decode == syn.decode and again.label_kind == syn.label_kind
    for name, tensor in syn.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_header_has_one_key_of_sorted_json(tmp_path: Path) -> None:
    save(make(), tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header["__metadata__"]) == ["condense"]
    text = header["__metadata__"]["condense"]
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_a_dataset_is_ordinary() -> None:
    data = make().to_dataset()
    batches = list(torch.utils.data.DataLoader(data, batch_size=4))
    assert [len(x) for x, _ in batches] == [4, 2]
    pixels, _ = make().to_dataset("pixels")[0]
    assert 0 <= float(pixels.min()) and float(pixels.max()) <= 1


def test_pixels_of_a_whitened_set_come_from_its_data(tiny: Arrays, tmp_path: Path) -> None:
    syn = api.distill("random", dataset=tiny, network=TINY, ipc=2, transform="zca", out=tmp_path / "run", device="cpu")
    pixels = syn.to_dataset("pixels", tiny).tensors[0]  # type: ignore[attr-defined]
    real = torch.from_numpy(tiny.x_train).float() / 255
    assert all((real - image).abs().amax((1, 2, 3)).min() < 1e-3 for image in pixels)
    with pytest.raises(ValueError, match="tiny"):
        syn.to_dataset("pixels")


def rewrite(path: Path, **changes: torch.Tensor) -> None:
    """Exchange tensors and write a checksum that fits, as a careless tool would."""
    from condense.files import write_tensors

    header = read_header(path)
    write_tensors(path, load_file(path) | changes, header)


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(make(), path)
    good = path.read_bytes()

    flipped = bytearray(good)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="checksum"):
        load(path)
    path.write_bytes(good.replace(b"tiny", b"tinY"))
    with pytest.raises(ValueError, match="checksum does not match its header"):
        load(path)
    path.write_bytes(good[:-40])
    with pytest.raises(ValueError, match=r"cannot be read|damaged"):
        load(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="cannot be read"):
        load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not written by Condense"):
        load(path)
    with pytest.raises(ValueError, match="there is no file"):
        load(tmp_path / "missing.safetensors")

    for changes, complaint in (
        ({"classes": torch.tensor([0, 0, 1, 1, 2, 9])}, "classes outside"),
        ({"latents": torch.zeros(6, 1, 8, 7)}, "images of shape"),
        ({"latents": torch.full((6, 1, 8, 8), float("nan"))}, "not finite"),
        ({"latents": torch.zeros(5, 1, 8, 8)}, "5 latents but 6 classes"),
        ({"more": torch.zeros(2)}, "does not fit"),
    ):
        path.write_bytes(good)
        rewrite(path, **changes)
        with pytest.raises(ValueError, match=complaint):
            load(path)
    save(make(label_kind=Teacher()), path)
    rewrite(path, **{"provider.probabilities": torch.tensor([1.5, -0.5, 0.0]).repeat(6, 1)})
    with pytest.raises(ValueError, match="probabilities below zero"):
        load(path)


def test_targets_begin_at_the_centred_class_and_are_learned() -> None:
    syn = make(label_kind=Targets(scale=2.0))
    targets = syn()[1]
    expected = 2 * (torch.nn.functional.one_hot(syn.classes, 3) - 1 / 3)
    torch.testing.assert_close(targets, expected)
    (targets * torch.arange(3.0)).sum().backward()
    (leaf,) = syn.leaves()["labels"]
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.arange(3.0).expand(6, 3))
    with pytest.raises(ValueError, match=r"labels\.scale must be positive, got 0\.0; try 1\.0"):
        Targets(scale=0.0)


def test_a_teacher_assigns_what_nobody_learns() -> None:
    syn = make(label_kind=Teacher())
    assert torch.equal(syn()[1], torch.nn.functional.one_hot(syn.classes, 3).float())
    assert "labels" not in syn.leaves()
    assert isinstance(syn.provider, Assigned)
    said = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    syn.provider.assign(said)
    assert torch.equal(syn(torch.tensor([4, 0]))[1], said[[4, 0]]) and not syn()[1].requires_grad


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Hard(), lambda logits: logits.argmax(1)),
        (Logits(), lambda logits: logits.softmax(1)),
        (Targets(scale=3.0), lambda logits: 3 * (logits.softmax(1) - 1 / 3)),
        (Teacher(), lambda logits: logits.softmax(1)),
    ],
)
def test_labels_may_begin_at_logits(kind: Labels, expected: Callable[[torch.Tensor], torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 3, generator=generator)
    syn = SyntheticSet(torch.zeros(6, 1, 8, 8), logits, ORIGIN, label_kind=kind)
    torch.testing.assert_close(syn()[1], expected(logits))
    assert torch.equal(syn.classes, logits.argmax(1))


@pytest.mark.parametrize("kind", [name for name, kind in LABELS.items() if not kind.of_views])
def test_copies_of_a_latent_share_its_target_and_a_file_keeps_it(kind: str, tmp_path: Path) -> None:
    syn = make(label_kind=LABELS[kind](), decode=Factor())
    with torch.no_grad():
        for tensor in (*syn.provider.parameters(), *syn.provider.buffers()):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 3)
    targets = syn()[1].unflatten(0, (4, 6))
    assert torch.equal(targets, targets[:1].expand_as(targets))
    save(syn, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert again.label_kind == syn.label_kind and torch.equal(again()[1], syn()[1])
    assert again.cost().labels == (6 * 8 if kind == "hard" else 6 * 3 * 4)


@pytest.mark.parametrize("shape", [(2, 9), (2, 1, 8, 8)])
def test_sets_of_series_and_clips_are_saved_and_loaded(shape: tuple[int, ...], tmp_path: Path) -> None:
    dataset = {**ORIGIN.dataset, "input_shape": list(shape)}
    channels = shape[channel_axis(shape)]
    origin = Origin(dataset=dataset, transform={"kind": "channel", "mean": [0.5] * channels, "std": [0.25] * channels})
    latents = torch.linspace(-4, 4, 6 * math.prod(shape)).view(6, *shape)
    syn = SyntheticSet(latents, torch.arange(3).repeat_interleave(2), origin)
    save(syn, tmp_path / "set.safetensors")
    again = load(tmp_path / "set.safetensors")
    assert again.origin.input_shape == shape and torch.equal(again.latents, syn.latents)
    values = again.to_dataset("pixels").tensors[0]  # type: ignore[attr-defined]
    assert values.shape == (6, *shape) and (bool((values < 0).any()) == (len(shape) == 2))


def test_an_origin_reads_the_fields_of_its_recipe_or_their_defaults() -> None:
    recipe = {
        "method": {"name": "dm", "num_steps": 7, "batch_real": 3},
        "transform": "zca",
        "split": {"val_fraction": 0.25, "seed": 4},
        "network": "mlp",
        "ipc": 5,
        "augment": "dsa",
    }
    full = dataclasses.replace(ORIGIN, recipe=recipe)
    assert (full.method, full.num_steps, full.transform_name) == ("dm", 7, "zca")
    assert (full.split, full.network, full.ipc) == (Split(val_fraction=0.25, seed=4), "mlp", 5)
    assert (full.dataset_name, full.fingerprint, full.num_classes) == ("tiny", "f", 3)
    assert (ORIGIN.method, ORIGIN.num_steps, ORIGIN.transform_name) == ("", None, "channel")
    assert (ORIGIN.split, ORIGIN.network, ORIGIN.ipc) == (Split(val_fraction=0.0), None, None)
    assert dataclasses.asdict(full)["recipe"] == recipe, "what is written does not change"
    with pytest.raises(ValueError, match="origin, recipe, ipc: 'ten' is not a whole number"):
        dataclasses.replace(ORIGIN, recipe={"ipc": "ten"}).ipc  # noqa: B018


def test_the_budget_is_the_recorded_one_or_the_number_of_latents() -> None:
    assert make(num=2).ipc == 2
    syn = make(num=2)
    syn.origin = dataclasses.replace(ORIGIN, recipe={"ipc": 1})
    assert syn.ipc == 1, "two latents of a class may take the room of one image"
