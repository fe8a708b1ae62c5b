"""Import of state dicts: names, shapes, types, wrappers, and files that are no state dict."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from condense import api
from condense.artifacts import BufferWriter, TrainedNetworks, TrainedNetworkSpec, find, read_manifest
from condense.buffers.imported import import_weights
from condense.cli import main
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.exchange.weights import match, read_state_dict
from condense.networks import Functional, build
from condense.rng import Rng
from condense.task import Split, Task
from condense.train import Scorer
from tests.conftest import TINY

NETWORK = f"{TINY},norm=batch"


def own(spec: str = NETWORK, num_classes: int = 3) -> nn.Module:
    """A network that others trained: its weights are not those that an initialisation draws here."""
    with Rng(7).forked("theirs"):
        network = build(spec, (1, 8, 8), num_classes)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.add_(3 if tensor.dtype == torch.int64 else 0.01)
    return network


def torchvisions(name: str = "resnet18") -> nn.Module:
    from torchvision.models import get_model

    torch.manual_seed(3)
    return get_model(name, weights=None, num_classes=3)


@pytest.fixture
def task(tiny: Arrays) -> Task:
    return api.plain_task(tiny, NETWORK, "channel", Split(val_fraction=0.25))


def one_line(action: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


def saved(state: Any, path: Path) -> Path:
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_state_dict_becomes_an_artifact_of_one_network(suffix: str, task: Task, tmp_path: Path) -> None:
    network = own().eval()
    folder = import_weights(saved(network.state_dict(), tmp_path / f"w{suffix}"), tmp_path / "root", task)
    artifact = TrainedNetworks(folder)
    assert artifact.extent() == {"num_networks": 1} and artifact.num_epochs == 0
    weights = artifact.weights(0, task.network)
    assert weights.buffers["features.1.num_batches_tracked"].dtype == torch.int64
    x = task.train.images[:5]
    assert torch.equal(task.network.logits(*weights, x, train=False), network(x))
    (record,) = read_manifest(folder)["experts"]
    assert record["origin"] == "imported" and task.val is not None
    expected = Scorer(task.network, Compute()).accuracy(weights, task.val.images, task.val.labels)
    assert record["val_accuracy"] == [expected]
    spec = TrainedNetworkSpec(task.identity(), num_epochs=20)
    assert find(tmp_path / "root", spec, "tiny") == folder


@pytest.mark.parametrize(
    ("name", "published", "image_shape"),
    [
        ("torchvision:resnet18", "resnet18", (3, 32, 32)),
        ("torchvision:resnet18", "resnet18", (1, 32, 32)),
        ("torchvision:mobilenet_v3_small", "mobilenet_v3_small", (3, 64, 64)),
        pytest.param("torchvision:vgg11_bn", "vgg11_bn", (3, 64, 64), marks=pytest.mark.slow),
        pytest.param("torchvision:vit_b_16", "vit_b_16", (3, 224, 224), marks=pytest.mark.slow),
        ("timm:resnet10t", "", (3, 32, 32)),
        ("timm:vit_tiny_patch16_224", "", (3, 32, 32)),
    ],
)
def test_published_names_of_torchvision_and_timm(
    name: str, published: str, image_shape: tuple[int, int, int], tmp_path: Path
) -> None:
    functional, size = Functional(name, image_shape, 3), image_shape[1:]
    torch.manual_seed(3)
    if published:
        network = torchvisions(published)
    else:
        import timm

        options = {"img_size": size} if "vit" in name else {}
        network = timm.create_model(name.partition(":")[2], num_classes=3, **options)
    weights = match(read_state_dict(saved(network.state_dict(), tmp_path / "weights.pth")), functional, "weights.pth")
    x = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval()(x.expand(-1, 3, -1, -1))
        torch.testing.assert_close(functional.logits(*weights, x, train=False), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {"epoch": 3, "state_dict": state, "arch": "convnet"},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}, "optimizer": {"lr": 0.1}},
        lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
        lambda state: {name: value.double() if value.is_floating_point() else value for name, value in state.items()},
        lambda state: {name: nn.Parameter(value) if "weight" in name else value for name, value in state.items()},
    ],
    ids=["module", "compiled", "state_dict", "model", "old", "double", "parameters"],
)
def test_what_the_field_writes_is_read(wrapped: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    network, functional = own(), Functional(NETWORK, (1, 8, 8), 3)
    path = saved(wrapped(network.state_dict()), tmp_path / "weights.pt")
    weights = match(read_state_dict(path), functional, str(path))
    for name, parameter in network.named_parameters():
        assert torch.equal(weights.params[name], parameter) and not weights.params[name].requires_grad


RUBBISH: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda s: {n: t for n, t in s.items() if n != "classifier.bias"}, "it lacks classifier.bias"),
    "renamed": (
        lambda s: {n.replace("classifier", "clasifier"): t for n, t in s.items()},
        "it lacks classifier.weight, classifier.bias (it has clasifier.",
    ),
    "extra": (
        lambda s: {**s, "classifier.weights": torch.zeros(3)},
        "no classifier.weights (similar: classifier.weight",
    ),
    "shape": (lambda s: {**s, "classifier.bias": torch.zeros(10)}, "classifier.bias has shape (10,), not (3,)"),
    "nan": (lambda s: {**s, "classifier.bias": torch.tensor([0.0, float("nan"), 0.0])}, "not finite"),
    "overflow": (lambda s: {**s, "classifier.bias": torch.full((3,), 1e300, dtype=torch.float64)}, "not finite"),
    "integer": (lambda s: {**s, "classifier.bias": torch.zeros(3, dtype=torch.int64)}, "holds torch.int64"),
    "complex": (lambda s: {**s, "classifier.bias": torch.zeros(3, dtype=torch.complex64)}, "complex64"),
    "sparse": (lambda s: {**s, "classifier.bias": torch.zeros(3).to_sparse()}, "cannot be read"),
    "float counter": (lambda s: {**s, "features.1.num_batches_tracked": torch.tensor(0.5)}, "not torch.int64"),
    "no tensor": (lambda s: {**s, "classifier.bias": [0.0]}, "'classifier.bias' is a list"),
    "a list": (lambda s: list(s.values()), "holds a list, not a state dict"),
    "empty": (lambda s: {}, "not a state dict"),
    "numbers": (lambda s: {1: torch.zeros(3)}, "not a state dict"),
    "a checkpoint without a holder": (lambda s: {"net": s}, "'net' is a"),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_what_does_not_fit_is_refused_and_leaves_nothing(kind: str, task: Task, tmp_path: Path) -> None:
    spoil, words = RUBBISH[kind]
    path = saved(spoil(dict(own().state_dict())), tmp_path / "weights.pt")
    message = one_line(lambda: import_weights(path, tmp_path / "root", task))
    assert words in message and "weights.pt" in message
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("size", [0, 7, 100, -10])
def test_a_file_that_is_cut_short_is_refused(suffix: str, size: int, task: Task, tmp_path: Path) -> None:
    path = saved(own().state_dict(), tmp_path / f"weights{suffix}")
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in one_line(lambda: import_weights(path, tmp_path / "root", task))
    assert not (tmp_path / "root").exists()


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch harmed",)


def test_nothing_in_a_pickle_is_run(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    torch.save({**own().state_dict(), "harm": Harmful()}, path)
    assert "refused" in one_line(lambda: import_weights(path, tmp_path / "root", task))
    path.write_bytes(pickle.dumps(Harmful()))
    assert str(path) in one_line(lambda: import_weights(path, tmp_path / "root", task))
    assert not (tmp_path / "harmed").exists()


def test_a_table_of_indices_has_to_be_the_network_s_own(tmp_path: Path) -> None:
    functional = Functional("torchvision:swin_t", (3, 64, 64), 3)
    state = dict(torchvisions("swin_t").state_dict())
    match(state, functional, "swin.pth")
    name = next(name for name in state if name.endswith("relative_position_index"))
    message = one_line(lambda: match({**state, name: state[name] + 10**6}, functional, "swin.pth"))
    assert f"{name} in swin.pth differs" in message


def test_an_import_that_cannot_be_written_leaves_nothing(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(own().state_dict(), tmp_path / "weights.pt")

    def fail(self: BufferWriter) -> None:
        raise ValueError("cannot write: the disk is full; make room")

    with monkeypatch.context() as patch:
        patch.setattr(BufferWriter, "save", fail)
        one_line(lambda: import_weights(path, tmp_path / "root", task))
        assert list((tmp_path / "root").iterdir()) == []
    folder = import_weights(path, tmp_path / "root", task)
    assert "holds these weights already" in one_line(lambda: import_weights(path, tmp_path / "root", task))
    assert TrainedNetworks(folder).num_networks == 1


def test_the_command_says_the_accuracy(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(own().state_dict(), tmp_path / "w.pth")
    words = ["import", "w.pth", "artifacts", "--dataset", str(tiny_file), "--network", NETWORK]
    main([*words, "--split.val-fraction", "0.25"])
    printed = capsys.readouterr().out
    assert "accuracy on the validation split: " in printed and "accuracy on training images: " in printed
    main(words)
    printed = capsys.readouterr().out
    assert "validation" not in printed and "accuracy on training images: " in printed
    main(["show", printed.splitlines()[-1]])
    assert "1 networks, imported" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["import", "w.pth", "artifacts", "--dataset", str(tiny_file), "--network", TINY])
    error = capsys.readouterr().err
    assert (
        error.startswith("condense: w.pth does not fit convnet:depth=1,width=4, which has no ") and "--network" in error
    )


@pytest.mark.parametrize("head", ["absent", "of other classes"])
def test_features_alone_need_no_classifier(head: str, task: Task, tmp_path: Path) -> None:
    network = own(num_classes=7).eval()
    state = {name: t for name, t in network.state_dict().items() if head != "absent" or "classifier" not in name}
    path = saved(state, tmp_path / "weights.safetensors")
    assert "classifier" in one_line(lambda: import_weights(path, tmp_path / "root", task))
    folder = import_weights(path, tmp_path / "root", task, features_only=True)
    weights = TrainedNetworks(folder).weights(0, task.network)
    x = task.train.images[:5]
    assert torch.equal(task.network.features(*weights, x, train=False), network.embed(x))  # type: ignore[operator]
    (record,) = read_manifest(folder)["experts"]
    assert 0 <= record["probe_accuracy"][0] <= 1 and "train_accuracy" not in record
    spec = TrainedNetworkSpec(task.identity())
    assert "no classifier was imported" in one_line(lambda: find(tmp_path / "root", spec, "tiny"))
    of_features = TrainedNetworkSpec(task.identity(), features_only=True)
    assert find(tmp_path / "root", of_features, "tiny") == folder
    assert "lacks" in one_line(
        lambda: import_weights(
            saved({"classifier.bias": state["features.0.bias"]}, path), tmp_path / "root", task, features_only=True
        )
    )
