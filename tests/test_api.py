import base64
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import socket
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import condense
from condense import api, cli, engine, plugins, runs, sets
from condense.api import find_recipe
from condense.augment import Augment
from condense.data.datasets import Arrays, load
from condense.eval.evaluate import SetScorer
from condense.eval.protocol import PROTOCOLS, named
from condense.eval.results import Evaluation
from condense.eval.subject import Subject
from condense.exchange.weights import read_state_dict
from condense.files import checksum
from condense.inner import Truncated
from condense.method import Method, Optim
from condense.methods.selection import Selection
from condense.networks import build, resolve
from condense.recipe import Recipe
from condense.registry import load as load_method
from condense.synthetic import Factor, Logits
from condense.task import Split

TINY = "convnet:depth=1,width=4"
SHORT = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=1)


def pooled(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A network that is not ours."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes)
    )


def tensors(num: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3 * num) % 3
    return (labels[:, None, None, None] * 0.3 + 0.1 * torch.rand(3 * num, 1, 8, 8, generator=generator)), labels


def test_distill_takes_data_at_hand_and_a_network_of_the_users(tmp_path: Path) -> None:
    x, y = tensors()
    options = {"ipc": 1, "num_steps": 2, "batch_real": 4, "device": "cpu"}
    from_tensors = condense.distill("dm", dataset=(x, y, x, y), network=pooled, out=tmp_path / "a", **options)
    from_dataset = condense.distill(
        "dm", dataset=(TensorDataset(x, y), TensorDataset(x, y)), network=pooled, out=tmp_path / "b", **options
    )
    assert checksum(from_tensors.state_dict()) == checksum(from_dataset.state_dict())
    assert "pooled" in from_tensors.origin.recipe["network"]
    found = condense.evaluate(
        from_tensors, (x, y, x, y), networks=[pooled, TINY], num_seeds=1, protocol="canonical", device="cpu"
    )
    assert len(found.results) == 2


def test_a_method_or_a_recipe_serves_as_well_as_a_name(tiny: Arrays, tmp_path: Path) -> None:
    method: Method = load_method("dm")(num_steps=2, batch_real=4)  # type: ignore[call-arg]
    fields = {"dataset": tiny, "network": TINY, "ipc": 1, "device": "cpu"}
    by_name = condense.distill("dm", out=tmp_path / "a", num_steps=2, batch_real=4, **fields)
    by_value = condense.distill(method, out=tmp_path / "b", **fields)
    by_recipe = condense.distill(
        Recipe(method=method, network=TINY, ipc=1), dataset=tiny, out=tmp_path / "c", device="cpu"
    )
    (tmp_path / "mine.yaml").write_text((tmp_path / "a" / "recipe.yaml").read_text())
    by_file = condense.distill(tmp_path / "mine.yaml", dataset=tiny, out=tmp_path / "d", device="cpu")
    assert len({checksum(syn.state_dict()) for syn in (by_name, by_value, by_recipe, by_file)}) == 1


def test_a_network_of_the_same_name_and_another_shape_is_another_recipe(tiny: Arrays, tmp_path: Path) -> None:
    def make(width: int) -> object:
        def net(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))

        return net

    fields = {"dataset": tiny, "ipc": 1, "out": tmp_path / "run", "device": "cpu", "num_steps": 2, "batch_real": 4}
    condense.distill("dm", network=make(4), **fields)
    with pytest.raises(ValueError, match="another recipe"):
        condense.distill("dm", network=make(8), resume=True, **fields)


def test_choices_and_options_are_spelt_as_on_the_command_line(tiny: Arrays, tmp_path: Path) -> None:
    syn = condense.distill(
        "random", dataset=tiny, network=TINY, ipc=1, decode="factor", out=str(tmp_path / "run"), device="cpu"
    )
    assert syn.decode.name == "factor" and len(syn()[0]) == 12
    with pytest.raises(ValueError, match="did you mean 'factor'"):
        condense.distill("random", dataset=tiny, decode="facto")
    with pytest.raises(ValueError, match="did you mean 'ipc'"):
        condense.distill("random", dataset=tiny, ipcc=1)


def test_a_baseline_is_what_its_own_recipe_says(tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syn = condense.distill("random", dataset=tiny, network=TINY, ipc=2, out=tmp_path / "run", device="cpu")
    seen = []
    compute = engine.compute

    def spy(method: Method, ctx: object, *rest: object) -> object:
        seen.append(ctx)
        return compute(method, ctx, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "compute", spy)
    brief = dataclasses.replace(named("canonical", syn), num_epochs=1)
    condense.evaluate(
        tmp_path / "run", tiny, networks="mlp", num_seeds=1, protocol=brief, baselines=["k-center"], device="cpu"
    )
    assert seen[0].ipc == 2 and str(seen[0].task.network.name) == TINY


def test_unknown_fields_get_a_suggestion(tiny: Arrays) -> None:
    with pytest.raises(ValueError, match="did you mean 'num_steps'"):
        condense.distill("dm", dataset=tiny, num_step=3)
    with pytest.raises(ValueError, match="did you mean 'num_experts'"):
        condense.make_buffer(tiny, num_expert=3)


def test_a_set_is_an_ordinary_dataset(tiny: Arrays, tmp_path: Path) -> None:
    syn = condense.distill("random", dataset=tiny, network=TINY, ipc=2, out=tmp_path / "run", device="cpu")
    (images, labels), *_ = DataLoader(syn.to_dataset("pixels"), batch_size=6)
    assert images.shape == (6, 1, 8, 8) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    real = torch.from_numpy(tiny.x_train).float() / 255
    assert all(torch.isclose(real, image, atol=1e-5).flatten(1).all(1).any() for image in images)


def test_validation_is_split_off_only_where_something_is_selected(tiny: Arrays, tmp_path: Path) -> None:
    fields = {"dataset": tiny, "network": TINY, "ipc": 1, "device": "cpu", "num_steps": 2, "batch_real": 4}
    plain = condense.distill("dm", out=tmp_path / "a", **fields)
    watched = condense.distill("dm", out=tmp_path / "b", eval_every=1, **fields)
    assert plain.origin.recipe["split"]["val_fraction"] == 0.0
    assert watched.origin.recipe["split"]["val_fraction"] == 0.1
    log = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert all(0 <= record["val_accuracy"] <= 1 for record in log)


def test_baselines_come_from_the_table_at_the_same_budget(tiny: Arrays, tmp_path: Path) -> None:
    condense.distill("dm", dataset=tiny, network=TINY, ipc=2, num_steps=1, out=tmp_path / "run", device="cpu")
    found = condense.evaluate(
        tmp_path / "run", tiny, networks=[TINY], num_seeds=2, baselines=["random", "full"], device="cpu"
    )
    assert [result.method for result in found.results] == ["dm", "random", "full"]
    assert [result.num_images for result in found.results] == [6, 6, 36]
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["dm", "random", "full"]


def test_a_baseline_with_soft_labels_is_trained_on_them(tiny: Arrays, tmp_path: Path) -> None:
    condense.distill("random", dataset=tiny, network=TINY, ipc=2, out=tmp_path / "run", device="cpu")
    found = condense.evaluate(
        tmp_path / "run", tiny, networks=["mlp"], num_seeds=1, baselines=["random-soft"], device="cpu"
    )
    hard, soft = found.results
    assert (hard.method, hard.protocol) == ("random", "canonical")
    assert (soft.method, soft.protocol, soft.protocol_fields["labels"]) == ("random-soft", "canonical*", "own")
    assert soft.stored_bytes["labels"] == 6 * 3 * 4


def test_regression_targets_of_a_baseline_are_not_probabilities(tiny: Arrays, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("method: {name: kip, num_steps: 2}\nlabels: targets\nnetwork: mlp\n")
    condense.distill("random", dataset=tiny, network="mlp", ipc=2, out=tmp_path / "run", device="cpu")
    found = condense.evaluate(
        tmp_path / "run", tiny, networks=["mlp"], num_seeds=1, baselines=[str(plan)], device="cpu"
    )
    assert [result.protocol for result in found.results] == ["canonical", "canonical"]


def test_own_brings_the_network_that_the_set_is_meant_for(tiny: Arrays, tmp_path: Path) -> None:
    network = "convnet:depth=1,width=4,norm=batch"
    fields: dict[str, Any] = {"num_steps": 1, "batch_real": 12, "pool_size": 2, "labels": "targets"}
    condense.distill("frepo", dataset=tiny, network=network, ipc=1, out=tmp_path / "run", **fields)
    plan = dataclasses.replace(named("own", condense.load(tmp_path / "run")), num_epochs=2)
    (own,) = condense.evaluate(tmp_path / "run", tiny, num_seeds=1, protocol=plan).results
    assert own.network == "convnet:depth=1,norm=none,width=4"
    usual = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=1)
    (plain,) = condense.evaluate(tmp_path / "run", tiny, num_seeds=1, protocol=usual).results
    (given,) = condense.evaluate(tmp_path / "run", tiny, networks="mlp", num_seeds=1, protocol=plan).results
    assert (plain.network, given.network) == ("convnet", "mlp")


def test_a_set_for_a_network_without_a_name_asks_for_networks(tiny: Arrays, tmp_path: Path) -> None:
    def mine(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))

    condense.distill("random", dataset=tiny, network=mine, ipc=1, out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"a network given as a callable; give the networks to train"):
        condense.evaluate(tmp_path / "run", tiny, protocol="own")


def test_a_network_without_a_name_is_trained_again(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a callable builds may change while it keeps its name."""
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    condense.distill("random", dataset=tiny, network=TINY, ipc=2, out=tmp_path / "run", device="cpu")

    def evaluate(activation: type[nn.Module]) -> float:
        def factory(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), activation(), nn.Linear(8, num_classes))

        fields: dict[str, Any] = {"networks": [factory], "num_seeds": 1, "baselines": ["full"], "device": "cpu"}
        return condense.evaluate(tmp_path / "run", tiny, out=tmp_path / "x.json", **fields).results[1].metrics["nll"][0]

    assert evaluate(nn.ReLU) != evaluate(nn.Sigmoid)


def test_a_network_that_diverges_is_scored_as_one_that_knows_nothing(tiny: Arrays, tmp_path: Path) -> None:
    condense.distill("random", dataset=tiny, network="mlp", ipc=2, out=tmp_path / "run", device="cpu")
    plan = dataclasses.replace(PROTOCOLS["canonical"], lr=1e9)
    with pytest.warns(UserWarning, match="a network of mlp diverged"):
        (row,) = condense.evaluate(
            tmp_path / "run", tiny, networks=["mlp"], num_seeds=1, protocol=plan, device="cpu"
        ).results
    assert row.mean == pytest.approx(1 / 3) and row.metrics["nll"][0] == pytest.approx(math.log(3))
    json.loads((tmp_path / "run" / "evaluation.json").read_text(), parse_constant=pytest.fail)


def test_baselines_are_made_and_trained_once(tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    fields: dict[str, Any] = {"networks": [TINY], "baselines": ["herding", "full"], "device": "cpu"}
    for seed in (0, 1):
        condense.distill("random", dataset=tiny, network=TINY, ipc=2, seed=seed, out=tmp_path / f"{seed}", device="cpu")
    first = condense.evaluate(tmp_path / "0", tiny, num_seeds=2, **fields)
    monkeypatch.setattr(Selection, "step", None)
    scored: list[int] = []
    score = SetScorer.score
    monkeypatch.setattr(SetScorer, "score", lambda *a, **k: scored.append(1) or score(*a, **k))
    again = condense.evaluate(tmp_path / "1", tiny, num_seeds=2, **fields)
    assert again.results[1:] == first.results[1:] and len(scored) == 2
    assert again.results[0] != first.results[0]
    monkeypatch.setattr("condense.eval.evaluate.VERSION", -1)  # what other draws gave is measured again
    condense.evaluate(tmp_path / "1", tiny, num_seeds=2, **fields)
    assert len(scored) == 2 + 6
    monkeypatch.setattr("condense.baselines.VERSION", -1)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        condense.evaluate(tmp_path / "1", tiny, num_seeds=2, **fields)


@pytest.mark.parametrize("network", [TINY, f"{TINY},norm=batch"])
def test_the_networks_of_an_evaluation_can_be_kept(network: str, tiny: Arrays, tmp_path: Path) -> None:
    syn = condense.distill("random", dataset=tiny, network=network, ipc=2, out=tmp_path / "run", device="cpu")
    short, kept = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=9), tmp_path / "networks"
    fields: dict[str, Any] = {"networks": [network], "num_seeds": 2, "protocol": short, "device": "cpu"}
    (result,) = condense.evaluate(tmp_path / "run", tiny, keep=kept, **fields).results
    files, test = sorted(kept.iterdir()), Subject(syn=syn, arrays=tiny, device=torch.device("cpu"), cache=None).test
    assert [file.name.rpartition("-canonical-")[2] for file in files] == ["0.safetensors", "1.safetensors"]
    for file, accuracy in zip(files, result.accuracies, strict=True):
        module = build(resolve(network, tiny.input_shape), tiny.input_shape, 3).eval()
        module.load_state_dict(safetensors.torch.load_file(file))
        with torch.no_grad():
            found = (module(test.images[torch.arange(len(test))]).argmax(1) == test.labels).float().mean()
        assert found.item() == pytest.approx(accuracy)
    assert read_state_dict(files[0]).keys() == module.state_dict().keys()
    before = files[0].stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"-canonical-0\.safetensors exists already; give keep with another folder"):
        condense.evaluate(tmp_path / "run", tiny, keep=kept, **fields)
    assert files[0].stat().st_mtime_ns == before


def test_an_evaluation_that_keeps_networks_can_be_repeated_after_a_stop(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    condense.distill("random", dataset=tiny, network=TINY, ipc=1, out=tmp_path / "run", device="cpu")
    protocols = [dataclasses.replace(PROTOCOLS[name], num_epochs=1) for name in ("canonical", "canonical-dsa")]
    fields: dict[str, Any] = {"networks": [TINY], "num_seeds": 1, "protocol": protocols, "device": "cpu"}
    kept, score, calls = tmp_path / "networks", SetScorer.score, list[int]()

    def stopped(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **options)

    monkeypatch.setattr(SetScorer, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        condense.evaluate(tmp_path / "run", tiny, keep=kept, **fields)
    assert [file.name for file in kept.iterdir()] == [".unfinished"]
    condense.evaluate(tmp_path / "run", tiny, keep=kept, **fields)
    assert len(list(kept.iterdir())) == 2 and not (kept / ".unfinished").exists()
    (kept / f"{TINY.replace(':', '-').replace(',', '-')}-canonical-0.safetensors").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"canonical-dsa-0\.safetensors exists already"):
        condense.evaluate(tmp_path / "run", tiny, keep=kept, **fields)
    with pytest.raises(ValueError, match="named after networks and protocols; give each once"):
        condense.evaluate(tmp_path / "run", tiny, keep=tmp_path / "new", **fields | {"protocol": protocols[:1] * 2})
    assert len(calls) == 4, "refused before the first training"


def test_resuming_a_finished_run_leaves_its_record(tiny: Arrays, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"dataset": tiny, "network": TINY, "ipc": 1, "out": tmp_path, "device": "cpu"}
    condense.distill("dm", num_steps=1, batch_real=4, **fields)
    before = (tmp_path / "run.json").read_bytes()
    condense.distill("dm", num_steps=1, batch_real=4, resume=True, **fields)
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize(("labels", "trainings"), [("hard", 1), ("logits", 2)])
def test_a_training_that_two_protocols_spell_differently_is_run_once(
    labels: str, trainings: int, tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    condense.distill("dd", dataset=tiny, network=TINY, ipc=1, labels=labels, num_steps=1, out=tmp_path, device="cpu")
    short = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=2, augment="dsa")
    alike = dataclasses.replace(short, name="alike", labels="own", augment=tiny.strategy)
    scored: list[int] = []
    score = SetScorer.score
    monkeypatch.setattr(SetScorer, "score", lambda *a, **k: scored.append(1) or score(*a, **k))
    fields: dict[str, Any] = {"networks": [TINY], "num_seeds": 1, "device": "cpu"}
    first, second = condense.evaluate(tmp_path, tiny, protocol=[short, alike], **fields).results
    assert len(scored) == trainings
    assert (second.protocol_hash, second.protocol_fields["labels"]) == (alike.hash, "own")
    assert (first.protocol_hash, first.protocol_fields["labels"]) == (short.hash, "hard")
    assert trainings == 2 or first.accuracies == second.accuracies


PICK = '''
from dataclasses import dataclass
from condense.methods.selection import Random
from condense.networks.mlp import MLP

@dataclass(frozen=True, kw_only=True)
class Pick(Random):
    """Version 1."""

class Flat(MLP):
    """A network."""
'''


def test_baselines_with_code_of_another_package_are_made_again_after_it_changed(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    module = tmp_path / "condense_pick.py"
    module.write_text(PICK)
    monkeypatch.syspath_prepend(tmp_path)
    entries = [
        EntryPoint("pick", "condense_pick:Pick", "condense.methods"),
        EntryPoint("flat", "condense_pick:Flat", "condense.networks"),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry for entry in entries if entry.group == group])
    condense.distill("random", dataset=tiny, network=TINY, ipc=1, out=tmp_path / "run", device="cpu")
    compute, score, done = engine.compute, SetScorer.score, list[str]()
    monkeypatch.setattr(engine, "compute", lambda *a, **k: done.append("made") or compute(*a, **k))
    monkeypatch.setattr(SetScorer, "score", lambda *a, **k: done.append("scored") or score(*a, **k))

    def evaluate() -> list[str]:
        done.clear()
        plugins._source_hash.cache_clear()  # as in a new process
        fields: dict[str, Any] = {"networks": ["flat"], "num_seeds": 1, "baselines": ["pick"], "device": "cpu"}
        condense.evaluate(tmp_path / "run", tiny, **fields)
        return done.copy()

    assert evaluate() == ["scored", "made", "scored"]
    assert evaluate() == ["scored"]
    module.write_text(PICK.replace("Version 1", "Version 2"))
    assert evaluate() == ["scored", "made", "scored"]


def test_a_baseline_of_equal_bytes_has_more_images_where_the_set_has_a_decoder(tiny: Arrays, tmp_path: Path) -> None:
    options = {"network": TINY, "ipc": 1, "num_steps": 1, "decode": "hallucinator", "device": "cpu"}
    condense.distill("dm", dataset=tiny, out=tmp_path / "run", **options)
    size = sum(condense.load(tmp_path / "run").cost())
    fields: dict[str, Any] = {"networks": ["mlp"], "num_seeds": 1, "baselines": ["random"], "device": "cpu"}
    by_images = condense.evaluate(tmp_path / "run", tiny, **fields).results[1]
    by_bytes = condense.evaluate(tmp_path / "run", tiny, budget="bytes", **fields).results[1]
    assert by_images.num_images == 3 < by_bytes.num_images
    each = sum(by_images.stored_bytes.values()) // 3
    assert sum(by_bytes.stored_bytes.values()) <= size < sum(by_bytes.stored_bytes.values()) + each


def test_the_public_names_are_there() -> None:
    assert set(condense.__all__) <= set(dir(condense))
    assert condense.load is api.load and condense.export is api.export_set and condense.report is api.report
    for name in condense.__all__:
        assert callable(getattr(condense, name)), name
    with pytest.raises(AttributeError, match="nothing"):
        condense.nothing  # noqa: B018


def test_sets_and_results_are_short_and_shown_in_notebooks(tiny: Arrays, tmp_path: Path) -> None:
    syn = condense.distill("random", dataset=tiny, network=TINY, ipc=2, out=tmp_path / "run", device="cpu")
    said = "random of tiny, 6 images 1x8x8 of 3 classes, ipc 2, hard labels, 1584 bytes"
    assert repr(syn) == f"SyntheticSet({said})"
    assert syn.class_names == tiny.classes
    picture = syn.plot(columns=1)
    assert picture.height > 2 * picture.width, "three rows of one image"
    page = syn._repr_html_()
    assert "<td>random of tiny</td>" in page
    shown = Image.open(io.BytesIO(base64.b64decode(page.partition("base64,")[2].partition('"')[0])))
    assert shown.size == syn.plot().size
    found = condense.evaluate(syn, tiny, networks=[TINY, "mlp"], num_seeds=2, protocol=SHORT, device="cpu")
    line = f"Result(random on {TINY}, canonical*: {100 * found.results[0].mean:.1f} ± "
    assert repr(found).splitlines()[0].startswith(line) and len(repr(found)) < 200
    assert found._repr_html_().count("<tr>") == 3 and "<td>canonical*</td>" in found._repr_html_()
    assert "<th>test accuracy</th>" in found._repr_html_()
    validation = dataclasses.replace(found, results=[dataclasses.replace(found.results[0], split="validation")])
    assert "<th>validation accuracy</th>" in validation._repr_html_()
    assert set(validation.to_pandas()["split"]) == {"validation"}
    assert found.classes == tiny.classes
    table = found.to_pandas()
    assert list(table["network"]) == [TINY, TINY, "mlp", "mlp"] and list(table["number"]) == [0, 1, 0, 1]
    assert tuple(table["accuracy"]) == found.results[0].accuracies + found.results[1].accuracies
    assert table[f"accuracy of {tiny.classes[2]}"][3] == found.results[1].metrics["per_class"][1][2]
    assert {"ece", "nll", "macro_f1"} <= set(table.columns)


def test_a_whitened_set_is_shown_without_its_data_and_drawn_with_them(
    tiny: Arrays, tiny_file: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"network": TINY, "ipc": 1, "transform": "zca", "device": "cpu"}
    syn = condense.distill("random", dataset=tiny, out=tmp_path / "run", **fields)
    assert "<img" not in syn._repr_html_()
    with pytest.raises(ValueError, match="tiny"):
        syn.plot()
    assert syn.plot(tiny_file).width > 0


def test_a_table_without_pandas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="pip install pandas"):
        Evaluation(()).to_pandas()


def test_a_file_that_holds_no_results_is_seen_before_anything_is_trained(tmp_path: Path) -> None:
    api.distill("random", dataset="digits", network="mlp", ipc=1, out=tmp_path / "run", device="cpu")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mine.json holds no results"):
        api.evaluate(tmp_path / "run", networks=["no such network"], out=tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        ("herdng", "unknown method or recipe 'herdng': did you mean 'herding'"),
        ("method: {name: dm}\nlabels: logits\n", "dm gives labels no gradient"),
        ("method: {name: dm, clamp: true}\ndecode: hallucinator\n", "give clamp=False"),
        ("method: {name: dm}\naugment: dsa_corp\n", "augmentation 'dsa_corp': unknown operation"),
        ("method: {name: dm, num_step: 3}\n", "unknown field 'method.num_step'"),
        ("method: {name: dm}\ndecode: {name: bases, num_bases: 50}\n", "50 bases of 16 numbers leave too few"),
        ("method: {name: dm}\ndecode: {name: dct, coefficients: 65}\n", "an image has 64 pixels per channel"),
        ("method: {name: random}\nfingerprint: abcdef\n", "the recipe is for data with fingerprint abcdef, tiny has"),
        ("method: {name: mtt}\n", "no trajectories for tiny in artifacts: there are none"),
    ],
)
def test_a_baseline_is_refused_with_the_line_of_distill_before_anything_is_trained(
    plan: str, line: str, tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    condense.distill("random", dataset=tiny, network=TINY, ipc=1, out=tmp_path / "run", device="cpu")
    if "\n" in plan:
        (tmp_path / "odd.yaml").write_text(plan)
        plan = "odd.yaml"
    with pytest.raises(ValueError, match=re.escape(line)) as ours:
        condense.distill(plan, dataset=tiny, network=TINY, ipc=1, out=tmp_path / "odd", device="cpu")
    monkeypatch.setattr(SetScorer, "score", None)
    monkeypatch.setattr(Selection, "step", None)
    fields: dict[str, Any] = {"baselines": ["herding", plan], "device": "cpu"}
    for use in (
        lambda: condense.evaluate(tmp_path / "run", tiny, **fields),
        lambda: api.apply("continual", tmp_path / "run", tiny, num_groups=3, **fields),
    ):
        with pytest.raises(ValueError) as theirs:
            use()
        assert str(theirs.value) == str(ours.value)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: condense.distill("dm", num_steps=3.5), r"^DM: num_steps=3\.5 is not a whole number; give an int$"),
        (lambda: condense.distill("dm", clamp="False"), "^DM: clamp='False' is not True or False"),
        (lambda: condense.distill("dm", optim="adam"), "^DM: optim='adam' is not of type Optim; give an Optim$"),
        (lambda: condense.distill("dm", ipc="1"), "^distill: ipc='1' is not a whole number or None"),
        (lambda: condense.distill("dm", ipc=0), "^ipc must be at least 1, got 0; give ipc=10$"),
        (lambda: condense.distill("dm", seed=-1), "^seed must be at least 0, got -1; give seed=0$"),
        (lambda: condense.distill("dm", eval_every=-1), "^eval_every must be at least 0, got -1"),
        (lambda: condense.distill("dm", out=3), "^RunOptions: out=3 is not of type Path or None"),
        (lambda: condense.distill("dm", split=Split(val_fraction=2)), "^split.val_fraction must lie in"),
        (lambda: condense.distill(3), "^distill: method=3 is not"),
        (lambda: condense.load(3), "^load: path=3 is not"),
        (lambda: condense.save("x", "y"), "^save: syn='x' is not of type SyntheticSet; give a SyntheticSet$"),
        (lambda: condense.make_buffer("digits", num_experts="3"), "^Experts: num_experts='3' is not a whole number"),
        (lambda: condense.make_buffer("digits", seed=-1), "^seed must be at least 0"),
        (lambda: condense.evaluate("x", num_seeds=2.5), r"^evaluate: num_seeds=2\.5 is not a whole number"),
        (lambda: condense.evaluate("x", compute="exact"), "^evaluate: compute='exact' is not of type Compute"),
        (lambda: api.apply("nas", "x", widths=("a",)), "^NAS: widths=.*'a' is not a whole number"),
        (lambda: api.apply("nas", "x", seed=-1), "^seed must be at least 0"),
        (lambda: Optim(lr=math.nan), "^Optim: lr=nan is not a number"),
        (lambda: dataclasses.replace(PROTOCOLS["canonical"], lr=math.inf), "a finite lr > 0"),
        (lambda: dataclasses.replace(PROTOCOLS["canonical"], momentum=-1), "0 <= momentum < 1"),
        (lambda: dataclasses.replace(PROTOCOLS["canonical"], lr_grid=(0.1, 0)), "lr_grid needs finite learning rates"),
        (lambda: dataclasses.replace(PROTOCOLS["canonical"], steps_for=[(0, 5)]), "steps_for needs pairs"),
        (lambda: Augment(ops=("flip",), flips="3"), "^Augment: flips='3' is not True or False"),
        (lambda: Truncated(window=2.5), r"^Truncated: window=2\.5 is not a whole number"),
        (lambda: Factor(factor="2"), "^Factor: factor='2' is not a whole number"),
        (lambda: Logits(confidence="high"), "^Logits: confidence='high' is not a number"),
        (lambda: Recipe(method="dm"), "^Recipe: method='dm' is not of type Method"),
    ],
)
def test_what_a_python_user_passes_is_checked(call: Callable[[], object], line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        call()
    assert "--" not in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_numpy_serve_and_results_stay_json(tiny: Arrays, tmp_path: Path) -> None:
    for ipc in np.arange(1, 2):
        fields = {"network": TINY, "ipc": ipc, "num_steps": np.int64(1), "seed": np.int32(3), "device": "cpu"}
        condense.distill("dm", dataset=tiny, optim=Optim(lr=np.float32(0.5)), out=tmp_path / "run", **fields)
    plan = find_recipe(str(tmp_path / "run" / "recipe.yaml"))[0]
    assert (plan.ipc, plan.seed, plan.method.num_steps) == (1, 3, 1)
    brief = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=np.int64(1))
    condense.evaluate(tmp_path / "run", tiny, networks=["mlp"], num_seeds=np.int64(1), protocol=brief, device="cpu")
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]
    assert rows[0]["n"] == 1


def test_validation_needs_images_of_every_class(tmp_path: Path) -> None:
    x, y = tensors(4)
    fields: dict[str, Any] = {"dataset": (x, y, x, y), "network": TINY, "ipc": 1, "num_steps": 1, "device": "cpu"}
    complaint = r"eval_every needs validation images of every class.* class '0'; give split=Split\(val_fraction=0.25\)"
    with pytest.raises(ValueError, match=complaint):
        condense.distill("dm", out=tmp_path / "a", eval_every=1, batch_real=2, **fields)
    split = Split(val_fraction=0.25)
    condense.distill("dm", out=tmp_path / "b", eval_every=1, batch_real=2, split=split, **fields)
    lacking = torch.ones(12, dtype=torch.bool)
    lacking[[2, 5, 8]] = False
    fields["dataset"] = (x[lacking], y[lacking], x, y)
    with pytest.raises(ValueError, match=r"holds out none of class '2'; give eval_every=0$"):
        condense.distill("dm", out=tmp_path / "c", eval_every=1, batch_real=1, split=split, **fields)


def test_shared_files_say_which_data_are_needed_and_not_where_they_lie(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "host-of-mine")
    data = tmp_path / "private place" / "tiny.npz"
    data.parent.mkdir()
    shutil.copy(tiny_file, data)
    run = tmp_path / "run"
    condense.distill("dm", dataset=data, network=TINY, ipc=2, num_steps=1, batch_real=4, out=run, device="cpu")
    condense.evaluate(run, networks=["mlp"], num_seeds=1, protocol=SHORT, baselines=["random"], device="cpu")
    api.apply("continual", run, num_groups=1, num_seeds=1, device="cpu")
    api.report([run])
    api.export_set(run, tmp_path / "npz.npz", "npz")
    record = (run / "run.json").read_text()
    assert "private place" in record and "host-of-mine" in record
    for file in [*run.rglob("*"), tmp_path / "npz.npz"]:
        if file.is_file() and file.name != "run.json":
            for secret in ("private place", str(tmp_path), "host-of-mine"):
                assert secret.encode() not in file.read_bytes(), f"{secret} in {file.name}"
    plan = yaml.safe_load((run / "recipe.yaml").read_text())
    assert plan["dataset"] == "tiny" and plan["fingerprint"] == condense.load(run).origin.dataset["fingerprint"]
    assert condense.load(run).origin.recipe == json.loads(json.dumps(plan))


def test_a_recipe_of_a_run_finds_its_data_and_a_shared_one_asks_for_them(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields: dict[str, Any] = {"num_steps": 1, "device": "cpu"}
    job = {"network": TINY, "ipc": 1, "batch_real": 4, **fields}
    first = condense.distill("dm", dataset=tiny_file, out=tmp_path / "run", **job)
    again = condense.distill(tmp_path / "run" / "recipe.yaml", out=tmp_path / "run", resume=True, **fields)
    assert torch.equal(first.latents, again.latents)
    shared = tmp_path / "elsewhere" / "recipe.yaml"
    shared.parent.mkdir()
    shutil.copy(tmp_path / "run" / "recipe.yaml", shared)
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        condense.distill(shared, out="~/run", resume=True, **fields)
    record = tmp_path / "run" / "run.json"
    for place in (None, load(tiny_file)):  # at hand, too, they leave the record as it is
        condense.distill(shared, dataset=place, out=tmp_path / "run", resume=True, **fields)
        assert json.loads(record.read_text())["dataset"] == str(tiny_file.resolve())
    with pytest.raises(ValueError, match=r"for the data set 'tiny' with fingerprint .* give dataset='PATH'$"):
        condense.distill(shared, out=tmp_path / "new", **fields)
    with pytest.raises(ValueError, match=r"digits has .* give dataset with the right data, or fingerprint=None"):
        condense.distill(shared, dataset="digits", out=tmp_path / "new", **fields)
    assert not (tmp_path / "new").exists()
    there = condense.distill(shared, dataset=tiny_file, out=tmp_path / "new", **fields)
    assert (tmp_path / "new" / "synthetic.safetensors").read_bytes() == (
        tmp_path / "run" / "synthetic.safetensors"
    ).read_bytes()
    assert there.origin.recipe_hash == first.origin.recipe_hash
    condense.distill(shared, dataset="digits", fingerprint=None, out=tmp_path / "other", **fields)


def test_a_run_that_was_stopped_finds_its_data(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job: dict[str, Any] = {"network": TINY, "ipc": 1, "batch_real": 4, "num_steps": 2, "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            condense.distill("dm", dataset=tiny_file, out=tmp_path / "run", **job)
    del job["network"], job["ipc"], job["batch_real"]
    condense.distill(tmp_path / "run" / "recipe.yaml", out=tmp_path / "run", resume=True, **job)


def test_the_time_of_a_run_that_was_stopped_counts(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, now, saved = runs.Stopwatch.save, itertools.count(), itertools.count(1)
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    monkeypatch.setattr(runs.Stopwatch, "_now", lambda self: {"seconds": 1.0 * next(now), "cpu_seconds": 0.5})

    def save_twice(watch: runs.Stopwatch) -> None:
        save(watch)
        if next(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Stopwatch, "save", save_twice)
    job: dict[str, Any] = {"network": TINY, "ipc": 1, "batch_real": 4, "num_steps": 4, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        condense.distill("dm", dataset=tiny_file, out=tmp_path / "run", **job)
    assert runs.read_record(tmp_path / "run")["seconds"] == 2.0
    condense.distill("dm", dataset=tiny_file, out=tmp_path / "run", resume=True, **job)
    assert runs.read_record(tmp_path / "run")["seconds"] == 5.0  # two more steps, and the end


def test_a_run_of_version_0_1_0_is_resumed(tiny_file: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {"network": TINY, "ipc": 1, "batch_real": 4, "num_steps": 1, "device": "cpu"}
    first = condense.distill("dm", dataset=tiny_file, out=tmp_path / "run", **job)
    file = tmp_path / "run" / "recipe.yaml"
    old = yaml.safe_load(file.read_text()) | {"dataset": str(tiny_file)}
    del old["fingerprint"]
    file.write_text(yaml.safe_dump(old, sort_keys=False))
    again = condense.distill(file, out=tmp_path / "run", resume=True, num_steps=1, device="cpu")
    assert torch.equal(first.latents, again.latents)
    with pytest.raises(ValueError, match="belongs to another recipe"):
        file.write_text(yaml.safe_dump(old, sort_keys=False))
        condense.distill(file, dataset="digits", out=tmp_path / "run", resume=True, num_steps=1, device="cpu")


def test_a_method_of_a_script_is_resumed_by_that_script(tiny: Arrays, tmp_path: Path) -> None:
    class Mine(load_method("dm")):  # type: ignore[misc]
        pass

    fields: dict[str, Any] = {"dataset": tiny, "network": TINY, "ipc": 1, "out": tmp_path / "run", "device": "cpu"}
    first = condense.distill(Mine(num_steps=1, batch_real=4), **fields)
    again = condense.distill(Mine(num_steps=1, batch_real=4), resume=True, **fields)
    assert torch.equal(first.latents, again.latents)


def test_results_are_not_sent_to_a_folder(tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    condense.distill("random", dataset=tiny, network=TINY, ipc=1, out=tmp_path / "run", device="cpu")
    monkeypatch.setattr(SetScorer, "score", None)
    for use in (
        lambda: condense.evaluate(tmp_path / "run", tiny, out=tmp_path, device="cpu"),
        lambda: api.apply("continual", tmp_path / "run", tiny, out=tmp_path, device="cpu"),
    ):
        with pytest.raises(ValueError, match=r"is a folder; give a file for the results$"):
            use()


def test_one_name_serves_where_several_may_stand(tiny: Arrays, tmp_path: Path) -> None:
    condense.distill("random", dataset=tiny, network=TINY, ipc=1, out=tmp_path / "run", device="cpu")
    fields: dict[str, Any] = {"num_seeds": 1, "protocol": SHORT, "device": "cpu"}
    found = condense.evaluate(str(tmp_path / "run"), tiny, networks=pooled, baselines="herding", **fields)
    assert [row.method for row in found.results] == ["random", "herding"]
    assert api.report(tmp_path / "run").exists()
    with pytest.raises(ValueError, match="needs a network"):
        condense.evaluate(tmp_path / "run", tiny, networks=[], **fields)


def test_a_missing_data_set_is_downloaded_where_the_pixels_of_a_whitened_set_need_it(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    syn = api.distill("random", dataset=tiny, network="mlp", ipc=1, transform="zca", out=run, device="cpu")
    asked = []
    monkeypatch.setattr(sets, "open_data", lambda source, download: asked.append(download) or tiny)
    for download in (True, False):
        api.draw(syn, tmp_path / "set.png", tiny, download=download)
        api.export_set(syn, tmp_path / f"{download}.npz", "npz", tiny, download=download)
        syn.plot(tiny, download=download)
        syn.to_dataset("pixels", tiny, download=download)
        flags = ["--dataset", "digits", "--download", str(download)]
        cli.main(["show", str(run), "--png", str(tmp_path / "set.png"), *flags])
        cli.main(["export", str(run), str(tmp_path / str(download)), *flags])
    assert asked == [True] * 6 + [False] * 6
