"""What a user gets wrong in words is refused before data are read, by every command that reads data."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from condense import api, compute, runs
from condense.baselines import prepare_baselines
from condense.cli import main
from condense.data import datasets
from condense.data.datasets import Arrays
from condense.experiment import check, check_run, prepare, recipe_for, resolve
from condense.files import checksum
from condense.recipe import Recipe, to_mapping
from condense.registry import load
from condense.runs import RunOptions
from condense.synthetic import StaticDynamic, save
from condense.task import Split
from tests.conftest import TINY

NO_NETWORK = "unknown network 'convnets'"
NO_OPTION = "unknown option 'depht' of convnet"
NO_DEVICE = "device 'gpu9' cannot be used"
NO_METHOD = "unknown method or recipe 'herdng': did you mean 'herding'"


@pytest.fixture(scope="module")
def run(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    api.distill("random", dataset=tiny, network=TINY, ipc=1, transform="zca", out=out, device="cpu")
    return out


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever reads data fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("data were read"))
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    (tmp_path / "odd.yaml").write_text("method: {name: dm}\nlabels: logits\n")


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("distill herdng", NO_METHOD),
        ("distill dm --network convnets", NO_NETWORK),
        ("distill dm --network convnet:depht=3", NO_OPTION),
        ("distill dm --augment dsa:mod=M", "unknown option 'mod=M'"),
        ("distill dm --augment flip_corp", "unknown operation 'corp'"),
        ("distill dm --transform zcaa", "unknown transform 'zcaa'"),
        ("distill dm --labels logits", "dm gives labels no gradient"),
        ("distill odd.yaml", "dm gives labels no gradient"),
        ("distill dm --labels targets", "dm gives labels no gradient"),
        ("distill dm --decode hallucinator --method.clamp True", "--method.clamp False"),
        ("distill dm --decode factr", "unknown decode 'factr'"),
        ("distill dm --seed -1", "give --seed 0"),
        ("distill dm --ipc 0", "give --ipc 10"),
        ("distill dm --split.val-fraction 2", "split.val_fraction must lie in"),
        ("distill dm --eval-every 5 --split.val-fraction 0", "--eval-every needs a validation split"),
        ("distill dm --track wandbb", "unknown tracker 'wandbb'"),
        ("distill dm --device gpu9", NO_DEVICE),
        ("distill dm --method.num-step 3", "did you mean --method.num-steps?"),
        ("distill dm --out file", "file is a file"),
        ("distill dm --out file/run", "cannot write"),
        ("distill dm --out other", "other is not empty and holds no run"),
        ("distill dm --out RUN", "already holds a run"),
        ("distill dm --network auto:wdth=3", "unknown option 'wdth' of convnet"),
        ("buffer --network convnets", NO_NETWORK),
        ("buffer --transform zcaa", "unknown transform 'zcaa'"),
        ("buffer --augment dsa:mod=M", "unknown option 'mod=M'"),
        ("buffer --augment dsa:flips=true", "leave it out of --augment"),
        ("buffer --augment dsa:tile=2", "tile=2 is for synthetic ones; leave it out of --augment"),
        ("buffer --seed -1", "give --seed 0"),
        ("buffer --device gpu9", NO_DEVICE),
        ("buffer --num-expert 3", "did you mean --num-experts?"),
        ("buffer --lr 0", "a finite lr > 0, got 20, 256 and 0.0; correct these fields"),
        ("buffer --out file", "cannot write"),
        ("evaluate RUN --networks convnets", NO_NETWORK),
        ("evaluate RUN --networks convnet1d", "give --networks convnet;"),
        ("evaluate RUN --protocol soft-teacher --protocol.teacher convnet1d", "give --protocol.teacher convnet;"),
        ("evaluate RUN --protocol canon", "unknown protocol 'canon'"),
        ("evaluate RUN --protocol canonical --protocol.augment dsaa", "unknown operation 'dsaa'"),
        ("evaluate RUN --protocol soft-teacher --protocol.teacher convnets", NO_NETWORK),
        ("evaluate RUN --protocol dd-ranking", "held-out real images"),
        ("evaluate RUN --baselines random herdng", NO_METHOD),
        ("evaluate RUN --baselines odd.yaml", "dm gives labels no gradient"),
        ("evaluate RUN --num-seeds 0", "num_seeds must be at least 1"),
        ("evaluate RUN --seed -1", "give --seed 0"),
        ("evaluate RUN --device gpu9", NO_DEVICE),
        ("evaluate RUN --out nowhere/x.json", "there is no folder nowhere"),
        ("evaluate RUN --out other", "other is a folder"),
        ("evaluate RUN --num-seed 3", "did you mean --num-seeds?"),
        ("apply continuous RUN", "did you mean 'continual'"),
        ("apply continual RUN --network convnets", NO_NETWORK),
        ("apply continual RUN --num-groups 3 --network convnet3d", "network convnet3d takes clips, not images"),
        ("apply privacy RUN --network convnet1d", "network convnet1d takes series, not images"),
        ("apply continual RUN --num-groups 9", "3 classes cannot arrive in 9 groups"),
        ("apply nas RUN --norms btch", "option norm of convnet"),
        ("apply privacy RUN --protocol canon", "unknown protocol 'canon'"),
        ("apply ranking RUN --baselines herding", "the scores need the baseline random"),
        ("apply continual RUN --num-groups 3 --baselines herdng", NO_METHOD),
        ("apply continual RUN --seed -1 --num-groups 3", "give --seed 0"),
        ("apply continual RUN --device gpu9 --num-groups 3", NO_DEVICE),
        ("apply continual RUN --out nowhere/x.json", "there is no folder nowhere"),
        ("apply continual RUN --num-group 3", "did you mean --num-groups?"),
        ("import IMAGES set.safetensors --transform zcaa", "unknown transform 'zcaa'"),
        ("import IMAGES set.safetensors --decode factr", "unknown decode 'factr'"),
        ("import IMAGES nowhere/set.safetensors", "there is no folder nowhere"),
        ("import other artifacts --network convnets", NO_NETWORK),
        ("import other artifacts --transform zcaa", "unknown transform 'zcaa'"),
        ("import other file", "cannot write"),
        ("export RUN set.npz --format npx", "unknown format 'npx'"),
        ("export RUN file", "file exists already"),
        ("export RUN file/set.npz", "cannot write"),
        ("report RUN --out nowhere/report.html", "there is no folder nowhere"),
        ("report other", "other is no run folder"),
        ("report RUN --outt x", "did you mean --out?"),
    ],
)
def test_wrong_words_are_refused_before_data_are_read(
    words: str, line: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(run), "IMAGES": str(tmp_path / "images.npz")}
    if "IMAGES" in words:
        np.savez(places["IMAGES"], images=np.zeros((3, 1, 8, 8), np.float32), labels=np.arange(3))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main([places.get(word, word) for word in words.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1, error
    assert line in error
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def test_a_baseline_is_what_distill_makes_by_that_recipe(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    fields: dict[str, Any] = {"dataset": tiny, "network": TINY, "ipc": 2, "split": Split(val_fraction=0.25), "seed": 3}
    ours = api.distill("herding", out=tmp_path / "herding", device="cpu", **fields)
    subject = api.distill("random", out=tmp_path / "random", device="cpu", **fields)
    makers = prepare_baselines(["herding"], subject, tiny, "mlp", torch.device("cpu"), seed=3)
    made = makers["herding"]()
    assert made.origin == ours.origin
    assert checksum(made.state_dict()) == checksum(ours.state_dict())
    save(made, tmp_path / "made.safetensors")
    assert (tmp_path / "made.safetensors").read_bytes() == (tmp_path / "herding/synthetic.safetensors").read_bytes()


def test_a_resumed_run_is_prepared_as_the_first_one(tiny: Arrays, tmp_path: Path) -> None:
    """``compute`` stays as it was resolved first, whatever a later version would choose."""
    plan = Recipe(method=load("dm")(num_steps=1), network="convnet:width=4,depth=1", ipc=1)
    first = resolve(plan, tiny, device=torch.device("cpu"))
    assert first.plan.network == TINY and first.plan.split.val_fraction == 0.0
    earlier = to_mapping(first.plan)["compute"] | {"compile": not first.plan.compute.compile}
    again = resolve(plan, tiny, device=torch.device("cpu"), earlier={"compute": earlier})
    assert again.plan.compute.compile is earlier["compile"]
    one, other = prepare(first), prepare(resolve(first.plan, tiny, device=torch.device("cpu")))
    assert one.origin == other.origin


def test_a_run_that_began_on_a_cpu_is_resumed_on_a_gpu(tiny: Arrays, tmp_path: Path) -> None:
    plan = Recipe(method=load("dm")(num_steps=1), network="convnet:width=4,depth=1", ipc=1)
    begun = resolve(plan, tiny, device=torch.device("cpu")).plan
    written = to_mapping(begun)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compute._TABLE, "cpu", compute._TABLE["cuda"])
        again = resolve(plan, tiny, device=torch.device("cpu"), earlier=written).plan
    runs.claim(tmp_path, again, written)
    assert again == begun


def test_the_folder_of_a_run_is_left_as_it_was(tiny: Arrays, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    with pytest.raises(ValueError, match="unknown network"):
        api.distill("dm", dataset=tiny, network="convnets", out=out)
    check_run(Recipe(method=load("dm")()), RunOptions(out=out, device="cpu"), dataset=tiny)
    assert list(tmp_path.iterdir()) == []


def test_a_field_that_method_and_recipe_have_is_that_of_the_method() -> None:
    plan = recipe_for("frepo", "digits", {"objective": "platt"})
    assert plan.method == dataclasses.replace(recipe_for("frepo", "digits", {}).method, objective="platt")
    assert plan.objective == "cross-entropy"
    assert recipe_for("mtt", "digits", {"objective": "mse"}).objective == "mse"


@pytest.mark.parametrize("name", ["dc", "dd", "cafe", "rtp", "rat-bptt"])
def test_stills_that_never_change_are_no_noise(name: str) -> None:
    noise = Recipe(method=load(name)(start="noise"), decode=StaticDynamic())
    with pytest.raises(ValueError, match=r"starts from noise, .* never change; give .*stills='RUN'.*, or start='real'"):
        check(noise)
    check(dataclasses.replace(noise, method=load(name)(start="real")))
