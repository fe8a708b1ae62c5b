"""The decoder static-dynamic: clips made of distilled stills and learned sequences."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from condense import api, cli, testing
from condense.compute import Compute
from condense.data import Transform
from condense.data.datasets import Arrays, load
from condense.method import GradientMethod
from condense.methods.recovery import Recovery
from condense.recipe import Recipe
from condense.registry import load as method
from condense.synthetic import Factor, StaticDynamic, SyntheticSet
from condense.synthetic.decode import Decode
from condense.task import Split
from condense.teachers import OWN
from condense.testing import CHECKS
from tests.conftest import TINY
from tests.reference import static_dynamic
from tests.test_contract import FIELDS, LEARNING, small

SHAPE = (8, 3, 8, 8)
NETWORK = "convnet3d:depth=1,width=4,dropout=false"
pytestmark = pytest.mark.usefixtures("short_search")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips (8, 3, 8, 8) of three classes that differ in brightness, 12 + 6 of each; their middle frames; a buffer; and
    stills for one clip of each class."""
    folder, rng, content = tmp_path_factory.mktemp("clips"), np.random.default_rng(0), {}
    for part, num in (("train", 36), ("test", 18)):
        labels = np.arange(num) % 3
        levels = (30 + 80 * labels)[:, None, None, None, None]
        content |= {f"x_{part}": (levels + rng.integers(0, 40, (num, *SHAPE))).astype(np.uint8), f"y_{part}": labels}
    np.savez(folder / "clips.npz", **content, classes=["dark", "gray", "light"], layout="NTCHW")
    api.frames(folder / "clips.npz", folder / "frames.npz")
    experts: dict[str, Any] = {"num_experts": 2, "num_epochs": 4, "batch_size": 12, "lr": 0.1}
    api.make_buffer(folder / "clips.npz", NETWORK, **experts, out=folder / "artifacts", compute=Compute(), device="cpu")
    still_images(folder, folder / "stills", ipc=2)
    return folder


def still_images(folder: Path, out: Path, **fields: Any) -> SyntheticSet:
    common: dict[str, Any] = {"network": TINY, "device": "cpu", "augment": "none", "transform": "none"}
    return api.distill("random", dataset=folder / "frames.npz", out=out, **common | fields)


@pytest.fixture
def clips(folder: Path) -> Arrays:
    return load(folder / "clips.npz")


def distilled(folder: Path, name: str, out: Path, **fields: Any) -> SyntheticSet:
    fields = {
        "network": NETWORK,
        "ipc": 1,
        "method": dataclasses.replace(small(name), num_steps=2),
        **FIELDS.get(name, {}),
        **fields,
    }
    if fields["method"].private:
        fields["transform"] = "none"  # the statistics of these data are not published
    options = api.RunOptions(out=out, buffers=folder / "artifacts", device="cpu")
    return api.run(Recipe(dataset=str(folder / "clips.npz"), **fields), options)


def stills_of(syn: SyntheticSet) -> Tensor:
    """The stills (N, statics, C, H, W) of the latents, in pixels."""
    assert isinstance(syn.decode, StaticDynamic)
    size, _ = syn.decode.sizes(SHAPE)
    stills = syn.latents.detach()[:, :size].unflatten(1, (-1, *SHAPE[1:]))
    transform = Transform.from_description(syn.origin.transform)
    return transform.inverse(stills.flatten(0, 1)).unflatten(0, stills.shape[:2])


def test_a_clip_is_the_convolution_of_every_pair() -> None:
    """The twin, for three stills and two sequences in a latent, in the order of the decoder."""
    decode, shape = StaticDynamic(statics=3, dynamics=2), (3, 2, 4, 5)
    decoder = decode.build(shape, 2)
    for param in decoder.parameters():
        param.data.normal_(generator=generator(1))
    latents = torch.randn(2, sum(decode.sizes(shape)), generator=generator())
    made = decoder(latents, torch.arange(2)).unflatten(0, (3, 2, 2))
    kernels, bias = (param.detach() for param in decoder.parameters())
    for n, latent in enumerate(latents):
        stills, sequences = latent[: 3 * 2 * 4 * 5].view(3, 2, 4, 5), latent[3 * 2 * 4 * 5 :].view(2, 3, 4, 5)
        for s, still in enumerate(stills):
            for d, sequence in enumerate(sequences):
                expected = static_dynamic.clip(still, sequence, kernels, bias)
                torch.testing.assert_close(made[s, d, n], expected, rtol=1e-4, atol=1e-4)


def test_clips_begin_near_the_middle_frames_of_the_initial_clips() -> None:
    decode, shape = StaticDynamic(), (5, 3, 12, 12)
    images, decoder = torch.randn(4 * 3, *shape, generator=generator()), decode.build(shape, 3)
    latents = decode.encode(images, torch.arange(3), decoder, generator())
    middle = images.unflatten(0, (2, 2, 3))[:, :1, :, 2:3]
    made = decoder(latents, torch.arange(3)).detach().unflatten(0, (2, 2, 3))
    apart = (made - middle)[..., 1:-1, 1:-1]
    assert 0.05 < float(apart.std()) < 0.3 and float((made[:, 0] - made[:, 1]).std()) > 0.05


@pytest.mark.parametrize(
    ("shape", "decode", "ipc", "latents"),
    [
        ((16, 3, 64, 64), StaticDynamic(), 1, 1),
        ((16, 3, 64, 64), StaticDynamic(), 5, 5),
        ((16, 3, 64, 64), StaticDynamic(dynamics=3), 5, 4),
        ((16, 1, 64, 64), StaticDynamic(), 3, 1),
    ],
)
def test_latents_are_as_many_as_clips_or_fewer_where_they_are_larger(
    shape: tuple[int, ...], decode: StaticDynamic, ipc: int, latents: int
) -> None:
    assert decode.latents_per_class(ipc, shape, 10) == latents


def test_all_three_parts_are_counted(folder: Path, tmp_path: Path) -> None:
    cost = distilled(folder, "dm", tmp_path / "run", decode=StaticDynamic(stills=str(folder / "stills"))).cost()
    stills, sequences = 3 * 2 * 3 * 64 * 4, 3 * 2 * 8 * 64 * 4
    assert cost.images == stills + sequences and cost.decoder == (3 * 4 * 27 + 3) * 4


def test_frames_are_the_middle_ones(folder: Path, clips: Arrays, tmp_path: Path) -> None:
    frames = load(folder / "frames.npz")
    assert np.array_equal(frames.x_train, clips.x_train[:, 4]) and np.array_equal(frames.x_test, clips.x_test[:, 4])
    assert np.array_equal(frames.y_train, clips.y_train) and frames.classes == clips.classes
    with pytest.raises(ValueError, match="already exists; move it"):
        api.frames(folder / "clips.npz", folder / "frames.npz")
    with pytest.raises(ValueError, match="takes clips, not images of shape"):
        api.frames("digits", tmp_path / "f.npz")
    assert not (tmp_path / "f.npz").exists()


@pytest.mark.parametrize("name", ["dm", "mtt"])
def test_stills_stay_what_they_are_and_all_else_learns(name: str, folder: Path, tmp_path: Path) -> None:
    decode = StaticDynamic(stills=str(folder / "stills"))
    syn = distilled(folder, name, tmp_path / "run", decode=decode)
    first = api.load(tmp_path / "run" / "snapshots" / "step_0000001.safetensors")
    given, _ = api.load(folder / "stills")()
    torch.testing.assert_close(stills_of(syn).flatten(0, 1), given.detach())
    size, _ = decode.sizes(SHAPE)
    assert torch.equal(syn.latents[:, :size], first.latents[:, :size])
    assert not torch.equal(syn.latents[:, size:], first.latents[:, size:])
    for new, old in zip(syn.decoder.parameters(), first.decoder.parameters(), strict=True):
        assert not torch.equal(new, old)
    evaluation = api.evaluate(tmp_path / "run", networks=NETWORK, num_seeds=1, protocol="own", device="cpu")
    assert 0 <= evaluation.results[0].mean <= 1 and evaluation.results[0].num_images == 12


def test_stills_of_another_decoder_are_sorted_by_class(folder: Path, tmp_path: Path) -> None:
    """Two images of each latent: those of a class are not next to each other."""
    fields: dict[str, Any] = {"decode": Factor(factor=2), "ipc": 1, "transform": "channel"}
    stills = still_images(folder, tmp_path / "stills", **fields)
    decode = StaticDynamic(stills=str(tmp_path / "stills"), statics=4)
    syn = distilled(folder, "dm", tmp_path / "run", ipc=2, decode=decode)
    pixels = Transform.from_description(stills.origin.transform).inverse(stills()[0].detach())
    torch.testing.assert_close(stills_of(syn), pixels.unflatten(0, (4, 3)).transpose(0, 1))


def test_the_set_of_the_stills_decides_and_not_its_path(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "stills", tmp_path / "same stills")
    still_images(folder, tmp_path / "other stills", ipc=2, seed=1)
    runs = {}
    paths = {"one": folder / "stills", "copy": tmp_path / "same stills", "other": tmp_path / "other stills"}
    for name, path in paths.items():
        runs[name] = distilled(folder, "dm", tmp_path / name, decode=StaticDynamic(stills=str(path)))
    one, copy = (tmp_path / name / "synthetic.safetensors" for name in ("one", "copy"))
    assert one.read_bytes() == copy.read_bytes()
    assert runs["one"].origin.recipe_hash != runs["other"].origin.recipe_hash
    assert str(folder) not in (tmp_path / "one" / "recipe.yaml").read_text()
    again = [str(tmp_path / "one" / "recipe.yaml"), "--dataset", str(folder / "clips.npz"), "--out", str(one.parent)]
    with pytest.raises(SystemExit):
        cli.main(["distill", *again, "--resume"])
    cli.main(["distill", *again, "--resume", "--decode.stills", str(paths["copy"])])
    with pytest.raises(SystemExit):
        cli.main(["distill", *again, "--resume", "--decode.stills", str(paths["other"])])
    where, what = capsys.readouterr().err.splitlines()
    assert "give --decode.stills RUN with the run folder or file" in where
    assert "was started with decode.stills = " in what


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["dm", "mtt"])
def test_methods_keep_their_promises(
    name: str, check: Callable[..., None], folder: Path, clips: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testing, "_arrays", lambda: clips)
    check(
        dataclasses.replace(small(name), num_steps=3),
        buffers=folder / "artifacts",
        network=NETWORK,
        decode=StaticDynamic(stills=str(folder / "stills")),
        ipc=1,
    )


@pytest.mark.parametrize("name", LEARNING)
def test_every_method_takes_it_or_is_refused_with_the_reason(name: str, folder: Path, tmp_path: Path) -> None:
    decode, learner = StaticDynamic(stills=str(folder / "stills")), method(name)
    if issubclass(learner, Recovery) or name in ("cim", "linear-gradient", "selmatch"):
        refusal = f"{name} ((recovers|stores|keeps) .* give decode='pixels'|takes images, not clips)"
        with pytest.raises(ValueError, match=refusal):
            distilled(folder, name, tmp_path / "run", decode=decode)
        return
    if learner.private:
        refusal = f"^{name} is private, and stills would be real images or noise; give decode='pixels'"
        with pytest.raises(ValueError, match=refusal):
            distilled(folder, name, tmp_path / "run", decode=decode)
        return
    fields: dict[str, Any] = {"clamp": False} if issubclass(learner, GradientMethod) else {}
    if name == "krr-st":
        fields["teachers"] = (OWN,)
    plan = dataclasses.replace(small(name), num_steps=2, **fields)
    syn = distilled(folder, name, tmp_path / "run", decode=decode, method=plan)
    assert syn.latents.isfinite().all()
    given, order = api.load(folder / "stills")()[0].detach(), syn.classes.argsort(stable=True)
    torch.testing.assert_close(stills_of(syn)[order].flatten(0, 1), given, rtol=1e-4, atol=1e-5)


def renamed(folder: Path, out: Path) -> Path:
    content = dict(np.load(folder / "frames.npz"))
    np.savez(out / "frames.npz", **content | {"classes": np.array(["a", "b", "c"])})
    return out


def enlarged(folder: Path, out: Path) -> Path:
    content = dict(np.load(folder / "frames.npz"))
    both = {name: content[name].repeat(2, 2).repeat(2, 3) for name in ("x_train", "x_test")}
    np.savez(out / "frames.npz", **content | both)
    return out


def same(folder: Path, out: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("make", "given", "fields", "line"),
    [
        (enlarged, {"ipc": 2}, {}, r"have shape \(3, 16, 16\), frames of the clips \(3, 8, 8\); distil frames of"),
        (renamed, {"ipc": 2}, {}, "have 3 classes and the clips 3, or their names differ; distil frames of"),
        (same, {"ipc": 1}, {}, "are 1 images of a class, 2 are needed; distil the frames with ipc=2"),
        (same, {"ipc": 2}, {"split": Split(val_fraction=0.25)}, "held out for validation here; .* split=Split"),
        (same, {"ipc": 2, "transform": "zca"}, {}, "whitened images and no pixels; .* transform='channel'"),
        (same, {"ipc": 2}, {"method": small("random")}, r"distilled stills would have no use; give decode=Static"),
    ],
)
def test_stills_that_do_not_fit_are_refused(
    make: Any, given: dict[str, Any], fields: dict[str, Any], line: str, folder: Path, tmp_path: Path
) -> None:
    still_images(make(folder, tmp_path), tmp_path / "stills", **given)
    with pytest.raises(ValueError, match=line) as error:
        distilled(folder, "dm", tmp_path / "run", decode=StaticDynamic(stills=str(tmp_path / "stills")), **fields)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: StaticDynamic(statics=0), "decode.statics must be at least 1, got 0; the published value is 2"),
        (lambda: StaticDynamic(dynamics=0), "decode.dynamics must be at least 1, got 0; the published value is 2"),
        (lambda: StaticDynamic().latents_per_class(1, (16, 1, 8, 8), 10), "more than the 1024 of ipc=1; give ipc=3"),
    ],
)
def test_bad_fields_are_refused(make: Callable[[], Decode], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()


def test_stills_that_are_not_there_are_refused_before_the_data_are_read(tmp_path: Path) -> None:
    plan = Recipe(method=small("dm"), dataset="absent.npz", decode=StaticDynamic(stills="runs/none"))
    with pytest.raises(ValueError, match=r"^there are no stills 'runs/none'; give decode=StaticDynamic\(stills='RUN'"):
        api.run(plan, api.RunOptions(out=tmp_path / "run"))


def test_images_are_refused(folder: Path, tiny: Arrays, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^decoder static-dynamic takes clips, not images"):
        api.distill("dm", dataset=tiny, network=TINY, decode="static-dynamic", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_commands_of_both_stages(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, frames = str(folder / "clips.npz"), str(tmp_path / "frames.npz")
    common = ["--device", "cpu", "--augment", "none", "--method.num-steps", "1", "--method.batch-real", "4"]
    cli.main(["frames", data, frames])
    stills = ["--network", TINY, "--ipc", "2", "--method.inner-epochs", "1", "--out", str(tmp_path / "stills")]
    cli.main(["distill", "dc", "--dataset", frames, *stills, *common])
    run = ["--network", NETWORK, "--ipc", "1", "--out", str(tmp_path / "run")]
    decoder = ["--decode", "static-dynamic", "--decode.stills", str(tmp_path / "stills")]
    cli.main(["distill", "dm", "--dataset", data, *run, *decoder, *common])
    cli.main(["show", str(tmp_path / "run")])
    assert "static-dynamic" in capsys.readouterr().out
    for words, line in (
        (["frames", data], "frames needs a data set of clips and the file to write"),
        (["frames", data, frames], f"{frames} already exists; move it or give another name"),
    ):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert line in capsys.readouterr().err
