"""Projectors with an encoder of open_clip and a head of embedded texts. A stand-in takes the place of open_clip."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize

import condense
from condense import api, cli, labelling
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.eval.protocol import PROTOCOLS
from condense.files import read_header
from condense.networks import Functional, build, parse
from condense.rng import Rng
from condense.synthetic import Projector, SyntheticSet, load, save
from condense.synthetic.teaching import StoredProjector
from tests.conftest import TINY

CPU = torch.device("cpu")
ENCODER = "open_clip:Tiny-1/small"
SMALL: dict[str, Any] = {"rank": 2, "num_teachers": 3, "epochs": 2, "batch_size": 16, "lr": 0.02, "augment": "none"}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_size = (16, 16)
        self.conv = nn.Conv2d(3, 4, 4, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.position = nn.Parameter(torch.zeros(16), requires_grad=False)
        self.project = nn.Parameter(torch.randn(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)).flatten(2) + self.position).relu().flatten(1) @ self.project


class Clip(nn.Module):
    """The public interface of a model of open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(128, 8)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        return self.visual(image)  # type: ignore[no-any-return]

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return self.token_embedding(text).sum(1)  # type: ignore[no-any-return]


def tokenise(texts: Sequence[str], context_length: int = 77) -> Tensor:
    return torch.tensor([[ord(letter) for letter in text.ljust(context_length)] for text in texts])


class OpenClip(ModuleType):
    """The functions of open_clip that Condense calls."""

    seed = 0

    def list_models(self) -> list[str]:
        return ["Tiny-1", "Tiny-1-tokens"]

    def list_pretrained_tags_by_model(self, model: str) -> list[str]:
        return ["small", "missing"] if model == "Tiny-1" else []

    def get_tokenizer(self, model_name: str) -> Any:
        return tokenise

    def create_model_and_transforms(self, model_name: str, pretrained: str | None = None) -> tuple[Any, Any, Any]:
        if pretrained == "missing":
            raise OSError("no connection\nto the hub")
        with torch.random.fork_rng(devices=[], enabled=pretrained is not None):
            if pretrained is not None:
                torch.manual_seed(self.seed)
            model = Clip()
        if pretrained is not None:
            model.visual.position.copy_(torch.arange(16) / 16)
            model.visual.norm.running_mean.fill_(0.1)  # type: ignore[union-attr]
        if model_name.endswith("tokens"):
            model.visual.forward = lambda x: (x.flatten(1), x)  # type: ignore[method-assign, assignment, return-value]
        return model, None, Compose([nn.Identity(), Normalize(MEAN, STD)])


@pytest.fixture(autouse=True)
def open_clip(monkeypatch: pytest.MonkeyPatch) -> OpenClip:
    module = OpenClip("open_clip")
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return module


@pytest.fixture(scope="module")
def named(tiny: Arrays) -> Arrays:
    return dataclasses.replace(tiny, classes=("dark", "in_between", "bright"))


@pytest.fixture
def syn(named: Arrays, tmp_path: Path) -> SyntheticSet:
    return api.distill("random", dataset=named, network=TINY, ipc=2, out=tmp_path / "run", device="cpu")


def relabel(syn: SyntheticSet | Path, weak: Path, data: Arrays, **fields: Any) -> SyntheticSet:
    options: dict[str, Any] = {"weak_teachers": weak, "dataset": data, "device": "cpu", "head": "text"}
    return condense.relabel(syn, ENCODER, "projector", **(options | SMALL | fields))


def labels(syn: SyntheticSet, images: Tensor) -> Tensor:
    return labelling.teacher_of(syn, Path("nowhere"), CPU).labeller(Compute())(images)


@pytest.mark.parametrize("transform", ["none", "channel"])
def test_the_encoder_sees_the_pixels_as_it_was_trained_to(
    transform: str, named: Arrays, open_clip: OpenClip, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"network": TINY, "ipc": 2, "out": tmp_path / "run", "device": "cpu"}
    syn = api.distill("random", dataset=named, transform=transform, **options)
    opened = labelling.open_encoder(ENCODER, syn.origin, CPU)
    network, weights = opened.teacher
    model, _, preprocess = open_clip.create_model_and_transforms("Tiny-1", pretrained="small")
    pixels = syn.to_dataset("pixels").tensors[0].float().expand(-1, 3, -1, -1)
    resized = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    expected = model.eval().encode_image(preprocess.transforms[-1](resized))
    found = network.features(*weights, syn()[0], train=False)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert opened.name.startswith(f"{ENCODER}@") and opened.network == "open_clip:Tiny-1"


@pytest.mark.parametrize("prompt", [None, "one CLASS image, CLASS"])
def test_the_head_starts_with_the_embeddings_of_texts(
    prompt: str | None, syn: SyntheticSet, named: Arrays, tiny_buffer: Path, open_clip: OpenClip
) -> None:
    fields = {} if prompt is None else {"prompt": prompt}
    made = relabel(syn, tiny_buffer, named, **fields)
    model, *_ = open_clip.create_model_and_transforms("Tiny-1", pretrained="small")
    texts = ["a photo of a dark", "a photo of a in between", "a photo of a bright"]
    if prompt is not None:
        texts = ["one dark image, dark", "one in between image, in between", "one bright image, bright"]
    expected = torch.stack([v / v.square().sum().sqrt() for v in model.encode_text(tokenise(texts))])
    assert isinstance(made.provider, StoredProjector)
    torch.testing.assert_close(made.provider.head, expected.detach())
    means = relabel(syn, tiny_buffer, named, head="class-means")
    assert isinstance(means.provider, StoredProjector) and (means.provider.head - expected).abs().max() > 0.1
    assert made.cost().labels == means.cost().labels and made.provider.params.any()


def test_a_named_encoder_takes_no_bytes_for_texts(
    syn: SyntheticSet, named: Arrays, tiny_buffer: Path, tmp_path: Path, open_clip: OpenClip
) -> None:
    kept, lent = (relabel(syn, tiny_buffer, named, keep_encoder=keep) for keep in (True, False))
    means = relabel(syn, tiny_buffer, named, head="class-means", keep_encoder=False)
    assert means.cost().labels - lent.cost().labels == 4 * 3 * 8, "the head"
    assert kept.cost().labels - lent.cost().labels == 4 * (3 * 8 + sum(p.numel() for p in Visual().parameters()))
    assert [entry["kind"] for entry in lent.origin.artifacts] == ["open_clip", "trajectories"]
    images, _ = syn()
    for number, one in enumerate((kept, lent, means)):
        save(one, tmp_path / f"{number}")
    again = [load(tmp_path / f"{number}") for number in range(3)]
    assert torch.equal(labels(again[0], images), labels(again[1], images))
    assert not torch.equal(labels(again[0], images), labels(again[2], images))
    options: dict[str, Any] = {"networks": TINY, "num_seeds": 1, "device": "cpu", "baselines": "random"}
    plan = dataclasses.replace(PROTOCOLS["mse-teacher"], num_epochs=2)
    own, rival = condense.evaluate(again[1], named, protocol=plan, **options).results
    assert own.teacher == rival.teacher == lent.label_kind.teacher  # type: ignore[attr-defined]
    open_clip.seed = 1
    labels(again[0], images)
    with pytest.raises(
        ValueError, match=r"the encoder of the labels is open_clip.+, but open_clip has .+label the set"
    ):
        labels(again[1], images)


def test_files_name_the_head_where_it_is_not_the_usual_one(
    syn: SyntheticSet, named: Arrays, tiny_buffer: Path, tmp_path: Path
) -> None:
    for head in ("class-means", "text"):
        save(relabel(syn, tiny_buffer, named, head=head), tmp_path / "set")
        entry = read_header(tmp_path / "set")["labels"]
        assert entry.get("head") == (None if head == "class-means" else "text") and "prompt" not in entry
        kind = load(tmp_path / "set").label_kind
        assert isinstance(kind, Projector) and kind.head == head


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (3, 40, 24)])
def test_an_image_encoder_is_a_network_with_random_weights(shape: tuple[int, int, int]) -> None:
    network = Functional("open_clip:Tiny-1", shape, 3)
    one, same, other = (network.init(Rng(seed), "weights") for seed in (0, 0, 1))
    assert torch.equal(one.params["visual.project"], same.params["visual.project"])
    assert not torch.equal(one.params["visual.project"], other.params["visual.project"])
    images = torch.randn(2, *shape, generator=Rng(0).generator("images"))
    params = {key: value.clone().requires_grad_() for key, value in one.params.items()}
    network.logits(params, one.buffers, images).square().sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in params.values())
    assert network.num_features == 8 and not any("token" in name for name in network.shapes)


def test_mistakes_are_one_line(
    syn: SyntheticSet,
    tiny: Arrays,
    tiny_file: Path,
    tiny_buffer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["relabel", str(tmp_path / "run"), "--device", "cpu", "--dataset", str(tiny_file)]
    clip, text, weak = ["--teacher", ENCODER], ["--labels", "projector", "--labels.head", "text"], str(tiny_buffer)
    lent = ["--weak-teachers", weak]
    api.distill("random", dataset=tiny, network=TINY, ipc=1, out=tmp_path / "numbers", device="cpu")
    options: dict[str, Any] = {"network": TINY, "ipc": 1, "device": "cpu", "transform": "zca"}
    api.distill("random", dataset=tiny, out=tmp_path / "whitened", **options)

    def refused(more: list[str], complaint: str, run: str = "run") -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main([words[0], str(tmp_path / run), *words[2:], *more])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and complaint in error and error.count("\n") == 1, error

    refused([*clip, *text], "no epochs to be the weak teachers")
    refused([*clip, *text, *lent], "needs names of the classes, and those of this set are numbers", "numbers")
    refused(["--teacher", weak, *text], "the head text needs an encoder of texts, which")
    refused([*clip, *text[:2], *lent], "an encoder of open_clip sees pixels, and the set is whitened (zca)", "whitened")
    refused([*clip], "an encoder of open_clip has no classifier of these classes for stored labels")
    refused([*clip, weak, *text, *lent], "projector labels cannot be the mean of 2 teachers")
    refused([*clip, *text, *lent, "--labels.prompt", "a photo"], "without the word CLASS")
    refused([*clip, *text[:2], *lent, "--labels.prompt", "CLASS"], "labels.prompt is for the head text")
    for name, complaint in (
        ("open_clip:Tinny-1/small", "unknown network 'open_clip:Tinny-1': no such model; did you mean 'Tiny-1'?"),
        ("open_clip:Tiny-1", "no weights are named for 'open_clip:Tiny-1': give open_clip:Tiny-1/WEIGHTS"),
        ("open_clip:Tiny-1/smal", "no weights 'smal' of 'open_clip:Tiny-1'"),
        ("open_clip:Tiny-1/folder/weights.pt", "no weights 'folder/weights.pt' of 'open_clip:Tiny-1'"),
        ("open_clip:Tiny-1/missing", "open_clip cannot make 'open_clip:Tiny-1/missing': no connection to the hub"),
    ):
        refused(["--teacher", name, *text, *lent], complaint)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refused([*clip, *text, *lent], "open_clip is not installed; run: pip install")


def test_networks_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ValueError, match="does not return one vector for each image; give another model"):
        build("open_clip:Tiny-1-tokens", (3, 16, 16), 3)
    with pytest.raises(ValueError, match="cannot take images of 2 channels"):
        build("open_clip:Tiny-1", (2, 16, 16), 3)
    with pytest.raises(ValueError, match=r"unknown network 'open_clip:tiny': .*did you mean 'Tiny-1'"):
        parse("open_clip:tiny")
