"""The page that shows runs side by side: what it says, and how it behaves in a browser."""

import dataclasses
import html
import json
import re
import shlex
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import condense
from condense import api, cli
from condense.artifacts import DEFAULT_ROOT
from condense.buffers.trajectories import Experts
from condense.data.datasets import Arrays, load
from condense.data.images import Images
from condense.eval import report
from condense.eval.protocol import PROTOCOLS, own
from condense.eval.report import collect, figures, nearest, page, reproduce
from condense.eval.report.figures import Point
from condense.eval.results import by_set
from condense.schedule import Schedule
from condense.task import Split
from tests.conftest import TINY
from tests.reference import published

pytestmark = pytest.mark.usefixtures("short_protocol")


@pytest.fixture(scope="module")
def folders(tiny: Arrays, tiny_file: Path, tiny_buffer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs with snapshots, validation, results and findings; the second has learned labels and a name that is markup,
    the third a learned step size."""
    root = tmp_path_factory.mktemp("runs")
    common: dict[str, Any] = {"dataset": tiny_file, "network": TINY, "device": "cpu"}
    dm = {"ipc": 2, "num_steps": 8, "eval_every": 4, "batch_real": 4}
    condense.distill("dm", out=root / "dm", **common, **dm)
    condense.distill("kip", out=root / "<b>kip", **common, ipc=1, num_steps=4, labels="targets")
    for name, baselines in (("dm", ["random", "full"]), ("<b>kip", [])):
        condense.evaluate(root / name, networks=[TINY, "mlp"], num_seeds=2, baselines=baselines, device="cpu")
    mtt = {"ipc": 1, "num_steps": 2, "syn_steps": 2, "max_start_epoch": 2, "buffers": tiny_buffer}
    condense.distill("mtt", out=root / "mtt", **common, **mtt)
    api.apply("continual", root / "dm", num_groups=3, num_seeds=1, network="mlp", baselines=[], device="cpu")
    return [root / "dm", root / "<b>kip", root / "mtt"]


@pytest.fixture(scope="module")
def file(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api.report(folders, tmp_path_factory.mktemp("report") / "report.html")


def test_the_page_holds_what_was_measured(file: Path, folders: list[Path]) -> None:
    text = file.read_text(encoding="utf-8")
    for folder in folders[:2]:
        for row in json.loads((folder / "evaluation.json").read_text())["results"]:
            assert f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" in text
            assert row["train_fingerprint"] in text
    assert "Learned learning rate" in text
    assert "full data" in text and "random, ipc 2" in text and "kip, ipc 1" in text
    assert json.loads((folders[0] / "apply-continual.json").read_text())["table"]["title"] in text


def test_the_summary_answers_first(file: Path, folders: list[Path]) -> None:
    text = file.read_text(encoding="utf-8")
    summary = text[text.index('id="summary"') : text.index('id="images"')]
    headings = re.findall(r'<th scope="col">([^<]+)</th>', summary)
    assert headings[:4] == ["run", "accuracy, %", "gain over random", "share of full data"]
    rows = json.loads((folders[0] / "evaluation.json").read_text())["results"]
    own, random, full = (next(row for row in rows if row["method"] == name) for name in ("dm", "random", "full"))
    assert f">{100 * (own['mean'] - random['mean']):+.1f}</td>" in summary
    assert f">{100 * own['mean'] / full['mean']:.0f} %</td>" in summary
    assert "★" not in summary, "no two runs share a budget and were evaluated"


def test_the_best_run_of_a_budget_is_marked(tiny_file: Path, tmp_path: Path) -> None:
    means = {}
    for seed in range(4):
        run = tmp_path / f"seed{seed}"
        condense.distill("random", dataset=tiny_file, network=TINY, ipc=1, out=run, seed=seed, device="cpu")
        means[run.name] = condense.evaluate(run, networks=TINY, num_seeds=1).results[0].mean
    text = api.report([tmp_path / name for name in means]).read_text(encoding="utf-8")
    (marked,) = re.findall(r'class="best">\s*<th scope="row">random, ipc 1 \((seed\d)\)', text)
    assert means[marked] == max(means.values()) > min(means.values())


def test_the_part_of_the_training_images_is_named(file: Path) -> None:
    """dm validates during the run and kip does not."""
    text = file.read_text(encoding="utf-8")
    assert "90 % of the training images (the rest, drawn by seed 0, is held out for validation)" in text
    assert "<dd>all training images</dd>" in text


def test_tables_of_a_data_set_have_one_scale_and_end_with_all_data(tiny_file: Path, tmp_path: Path) -> None:
    condense.distill("random", dataset=tiny_file, network="mlp", ipc=1, out=tmp_path / "run", device="cpu")
    for epochs in (1, 20):
        plan = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=epochs)
        condense.evaluate(
            tmp_path / "run", networks=["mlp"], num_seeds=1, baselines=["full"], protocol=plan, device="cpu"
        )
    text = api.report([tmp_path / "run"]).read_text(encoding="utf-8")
    part = text[text.index('id="h-architectures"') : text.index('id="h-calibration"')]
    found = re.findall(r'--share: ([\d.]+)" data-value="([\d.]+)"', part)
    assert part.count("<tfoot>") == 2 and len(found) == 4
    rows = sorted(json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"], key=lambda r: r["mean"])
    low, high = rows[0]["mean"], rows[-1]["mean"]
    assert high > low
    for share, value in found:
        assert float(share) == pytest.approx((float(value) - low) / (high - low), abs=1e-3)


def test_a_run_is_compared_with_random_images_and_full_data_under_its_own_transform(
    tiny_file: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "none", tmp_path / "channel"]
    alone = {}
    for folder in folders:
        condense.distill(
            "dm", dataset=tiny_file, ipc=1, transform=folder.name, out=folder, num_steps=1, batch_real=4, device="cpu"
        )
        fields: dict[str, Any] = {"baselines": ["random", "full"], "num_seeds": 1, "device": "cpu"}
        condense.evaluate(folder, networks=["mlp"], **fields)
        condense.evaluate(folder, networks=["mlp"], out=tmp_path / "all.json", **fields)
        run = collect(folder)
        (headline,) = run.own_results
        alone[folder] = page._references(run, headline, [run])
    runs = [collect(folder) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        (headline,) = run.own_results
        assert page._references(run, headline, runs) == alone[folder]
    assert alone[folders[0]] != alone[folders[1]]
    rows = json.loads((tmp_path / "all.json").read_text())["results"]
    assert [row["transform"] for row in rows if row["method"] == "full"] == ["none", "channel"]
    assert {"full (none)", "full (channel)"} < set(by_set(rows))


def repeated(run: Path, text: str, num_commands: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the evaluations that the page of a run names anew, check that the results are those of before, and return the
    number of their rows."""
    commands = re.findall("condense (evaluate .*)", text[text.index('class="commands"') :].split("</pre>")[0])
    assert len(commands) == num_commands
    names = ("method", "protocol", "protocol_hash", "synthetic_sha256", "mean")

    def found() -> set[tuple[Any, ...]]:
        rows = json.loads((run / "evaluation.json").read_text())["results"]
        return {tuple(row[name] for name in names) for row in rows}

    before = found()
    (run / "evaluation.json").unlink()
    monkeypatch.chdir(run.parent)
    for command in commands:
        cli.main([*shlex.split(command), "--device", "cpu"])
    assert found() == before
    return len(before)


def test_the_commands_of_a_page_repeat_its_results(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, plan = tmp_path / "run", dataclasses.replace(PROTOCOLS["canonical"], num_epochs=2, lr=0.02)
    condense.distill("random", dataset=tiny_file, network="mlp", ipc=2, out=run, device="cpu")
    fields: dict[str, Any] = {"networks": ["mlp"], "num_seeds": 2, "protocol": plan, "device": "cpu", "seed": 3}
    condense.evaluate(run, baselines=["herding", "full"], **fields)
    text = html.unescape(api.report([run]).read_text(encoding="utf-8"))
    assert repeated(run, text, 1, monkeypatch) == 3
    capsys.readouterr()


def test_the_commands_of_a_page_repeat_changes_of_every_protocol(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of ``own``, fields that were set back to their default, and baselines with soft labels."""
    run = tmp_path / "run"
    condense.distill(
        "rat-bptt", dataset=tiny_file, network="mlp", ipc=1, num_steps=1, inner_steps=2, out=run, device="cpu"
    )
    made, frepo = condense.load(run), PROTOCOLS["frepo"]
    constant = dataclasses.replace(frepo.schedule, cosine_to=None)
    plans = [
        dataclasses.replace(own(made), num_epochs=2),
        dataclasses.replace(frepo, num_epochs=2, steps_for=(), schedule=constant),
        dataclasses.replace(PROTOCOLS["canonical"], num_epochs=2),
    ]
    common: dict[str, Any] = {"networks": ["mlp"], "num_seeds": 1, "device": "cpu"}
    for plan in plans[:2]:
        condense.evaluate(run, protocol=plan, **common)
    condense.evaluate(run, protocol=plans[2], baselines=["random-soft"], **common)
    text = html.unescape(api.report([run]).read_text(encoding="utf-8"))
    assert repeated(run, text, 3, monkeypatch) == 4
    assert "Changed fields of the protocol: num_epochs 2, schedule (cosine_to None), steps_for none" in text
    capsys.readouterr()


def test_the_commands_of_a_page_repeat_a_run_in_an_empty_folder(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Buffers with other settings than the usual ones, too."""
    experts = Experts(
        num_experts=2, num_epochs=3, lr=0.02, momentum=0.5, batch_size=5, schedule=Schedule(drop_at=(0.5,))
    )
    buffers, run = tmp_path / "artifacts", tmp_path / "run"
    api.make_buffer(tiny_file, TINY, experts=experts, out=buffers, seed=4, device="cpu")
    job: dict[str, Any] = {"num_steps": 1, "syn_steps": 1, "expert_epochs": 1, "max_start_epoch": 1, "device": "cpu"}
    condense.distill("mtt", dataset=tiny_file, network=TINY, ipc=1, out=run, buffers=buffers, **job)
    there = started_anew(run, tiny_file, tmp_path, monkeypatch)
    assert (there / "run" / "synthetic.safetensors").read_bytes() == (run / "synthetic.safetensors").read_bytes()
    capsys.readouterr()


@pytest.mark.parametrize("labels", [{"labels": "stored", "epochs": 2, "batch_size": 3}, {"labels": "projector"}])
def test_the_commands_of_a_page_label_the_views_again(
    labels: dict[str, Any],
    tiny_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The teacher has other settings than the usual ones and another network than the set."""
    buffers, run, of_projector = tmp_path / "artifacts", tmp_path / "run", labels["labels"] == "projector"
    api.make_buffer(tiny_file, TINY, num_experts=1, num_epochs=2, lr=0.02, batch_size=5, out=buffers, device="cpu")
    condense.distill("random", dataset=tiny_file, network="mlp", ipc=2, out=run, device="cpu")
    more = {"epochs": 1, "num_teachers": 2, "rank": 2, "head_rank": 2, "batch_size": 4} if of_projector else {}
    condense.relabel(run, buffers, **labels, **more, device="cpu")
    file = run / f"synthetic-{labels['labels']}.safetensors"
    plan = dataclasses.replace(PROTOCOLS["relabelled"], num_epochs=2)
    condense.evaluate(file, networks=["mlp"], num_seeds=1, protocol=plan, device="cpu")
    there = started_anew(file, tiny_file, tmp_path, monkeypatch)
    repeated = there / "run" / file.name
    assert repeated.read_bytes() == file.read_bytes()
    results = [json.loads(path.with_suffix(".evaluation.json").read_text())["results"] for path in (repeated, file)]
    assert results[0][0]["mean"] == results[1][0]["mean"]
    capsys.readouterr()


def started_anew(target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the commands of a page in an empty folder that has the data, and return it."""
    text = html.unescape(api.report([target]).read_text(encoding="utf-8"))
    script = re.findall('<pre tabindex="0">(cat > recipe.yaml .*?)</pre>', text, flags=re.DOTALL)[0]
    recipe, commands = script.removeprefix("cat > recipe.yaml << 'END'\n").split("END\n")
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(data, there)
    monkeypatch.chdir(there)
    Path("recipe.yaml").write_text(recipe)
    for line in commands.splitlines():
        cli.main([*shlex.split(line)[1:], "--device", "cpu"])
    return there


def test_the_commands_of_a_page_start_with_the_buffer(file: Path, folders: list[Path], tiny_buffer: Path) -> None:
    text = file.read_text(encoding="utf-8")
    (command,) = re.findall("condense buffer .*", text)
    (used,) = condense.load(folders[2]).origin.artifacts
    assert f"--network {TINY} " in command
    assert f"--num-experts {used['num_experts']} --num-epochs {used['num_epochs']}" in command
    assert used["name"] in text


def test_nouns_agree_with_their_numbers() -> None:
    from condense.eval.report.page import counted

    cases = (1, "run"), (2, "run"), ("1, 2", "network"), (2, "process"), (2, "class")
    assert [counted(*case) for case in cases] == ["1 run", "2 runs", "1, 2 networks", "2 processes", "2 classes"]


def test_nothing_is_asked_of_a_network_and_no_path_is_given_away(file: Path, folders: list[Path]) -> None:
    text = file.read_text(encoding="utf-8")
    for found in re.findall(r'(?:\s(?:src|href)="|url\()([^")]+)', text):
        assert found.startswith(("data:", "#")), found
    assert "default-src 'none'" in text
    assert str(folders[0].parent) not in text
    assert "<b>kip" not in text


def test_equal_runs_give_equal_pages(folders: list[Path], tmp_path: Path, file: Path) -> None:
    assert api.report(folders, tmp_path / "again.html").read_bytes() == file.read_bytes()


def test_identifiers_are_unique(file: Path) -> None:
    found = re.findall(r'\sid="([^"]+)"', file.read_text(encoding="utf-8"))
    assert len(found) == len(set(found))


def test_results_of_different_trainings_stand_in_different_tables(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two changes of one protocol have one name, and must not take each other's place."""
    condense.distill("random", dataset=tiny_file, network="mlp", ipc=1, out=tmp_path / "run", device="cpu")
    for epochs in (1, 2):
        plan = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=epochs)
        condense.evaluate(tmp_path / "run", networks=["mlp"], num_seeds=1, protocol=plan, device="cpu")
    text = api.report([tmp_path / "run"]).read_text(encoding="utf-8")
    assert "protocol: num_epochs 1." in text and "protocol: num_epochs 2." in text
    cli.main(["show", str(tmp_path / "run")])
    assert len(set(re.findall(r"%: (canonical\* \w{6})", capsys.readouterr().out))) == 2


def test_sets_of_one_name_keep_their_own_rows(tiny_file: Path, tmp_path: Path) -> None:
    """Runs of one method and budget in folders of one name, and the baselines of different splits."""
    means = set()
    for seed, parent in enumerate(("a", "b")):
        run = tmp_path / parent / "run"
        run.parent.mkdir()
        common: dict[str, Any] = {"dataset": tiny_file, "network": "mlp", "ipc": 1, "seed": seed, "device": "cpu"}
        condense.distill("random", out=run, split=Split(val_fraction=0.25, seed=seed), **common)
        condense.evaluate(run, networks=["mlp"], num_seeds=1, baselines=["random", "herding"], device="cpu", seed=9)
        rows = json.loads((run / "evaluation.json").read_text())["results"]
        means |= {row["synthetic_sha256"] for row in rows}
    text = api.report([tmp_path / "a" / "run", tmp_path / "b" / "run"]).read_text(encoding="utf-8")
    table = text[text.index('id="h-architectures"') : text.index('id="h-calibration"')]
    assert table.count('<th scope="row">') == len(means) > 3
    assert "random, ipc 1 (run) (1)" in table and "random, ipc 1 (run) (2)" in table
    points = text[text.index('id="h-bytes"') : text.index('id="h-cost"')]
    assert points.count("<title>measured: ") == len(means)


def test_seeds_of_one_recipe_are_pooled(tiny_file: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"dataset": tiny_file, "network": TINY, "ipc": 1, "device": "cpu"}
    folders, rows = [tmp_path / f"seed{seed}" for seed in range(3)], []
    for seed, folder in enumerate(folders):
        condense.distill("random", **common, out=folder, seed=seed)
        rows += [result.row() for result in condense.evaluate(folder, networks=TINY, num_seeds=2).results]
    page = api.report(folders, tmp_path / "report.html").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if "<td>canonical</td><td>3</td><td>2</td>" in line]
    means = [100 * row["mean"] for row in rows]
    within = statistics.fmean((100 * row["std"]) ** 2 for row in rows) ** 0.5
    numbers = [statistics.fmean(means), within, statistics.stdev(means)]
    assert line.endswith("".join(f"<td>{number:.1f}</td>" for number in numbers) + "</tr>")
    assert "Several seeds" not in api.report(folders[:1], tmp_path / "one.html").read_text(encoding="utf-8")


def test_the_point_of_a_set_is_that_of_the_network_it_is_meant_for(tiny_file: Path, tmp_path: Path) -> None:
    """FRePo distils with a norm and is evaluated without."""
    fields: dict[str, Any] = {"num_steps": 1, "batch_real": 4, "pool_size": 1, "training_epochs": 1, "device": "cpu"}
    condense.distill("frepo", dataset=tiny_file, network=f"{TINY},norm=batch", ipc=1, out=tmp_path, **fields)
    condense.evaluate(tmp_path, protocol="own", num_seeds=1, device="cpu")
    text = api.report([tmp_path]).read_text(encoding="utf-8")
    assert "convnet:depth=1,norm=none,width=4" in text and text.count("<title>measured: ") == 1


def test_of_several_answers_the_one_of_most_networks_is_shown(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    condense.distill("random", dataset=tiny_file, network="mlp", ipc=1, out=tmp_path / "run", device="cpu")
    for n in (3, 1):
        condense.evaluate(tmp_path / "run", networks=["mlp"], num_seeds=n, device="cpu")
    assert "shows n = 3 networks" in api.report([tmp_path / "run"]).read_text(encoding="utf-8")
    cli.main(["show", str(tmp_path / "run")])
    assert "n = 3 networks" in capsys.readouterr().out


def test_data_of_a_known_name_and_other_content_have_no_published_companions(tiny_file: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_file, tmp_path / "mnist.npz")
    condense.distill("random", dataset=tmp_path / "mnist.npz", network="mlp", ipc=1, out=tmp_path / "run", device="cpu")
    condense.evaluate(tmp_path / "run", networks=["mlp"], num_seeds=1, device="cpu")
    assert "published: " not in api.report([tmp_path / "run"]).read_text(encoding="utf-8")


def test_unverified_published_numbers_are_shown_on_demand(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data of the runs take the name and the place of MNIST."""
    from condense.eval.report import page

    resource = page._resource
    monkeypatch.setattr(page, "is_known", lambda *_: True)
    monkeypatch.setattr(page, "_resource", lambda name: resource(name).replace('"mnist"', '"tiny"'))
    rows = json.loads(resource("published.json"))["mnist"]["rows"]
    unverified = {row["method"] for row in rows if not row["verified"]}
    text = api.report(folders[2], tmp_path / "page.html").read_text(encoding="utf-8")
    shown = re.findall("<title>published: (.+?), ipc 1, ", text)
    assert len(shown) == len(rows) - len(unverified) and not unverified & set(shown)
    assert f"{len(unverified)} published numbers of tiny are hidden" in text
    cli.main(["report", str(folders[2]), "--out", str(tmp_path / "page.html"), "--unverified"])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(re.findall("<title>published: ", text)) == len(rows) and "are hidden" not in text
    assert len(re.findall("<title>published: [^,]+ \\(unverified\\), ", text)) == len(unverified)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("apply-nas.json", "[]", "apply-nas.json holds no findings"),
        ("apply-nas.json", '{"table": null}', "apply-nas.json holds no findings"),
        ("apply-nas.json", "{", "apply-nas.json cannot be read: it is not valid JSON"),
        ("run.json", '{"seconds": "long"}', None),
        ("run.json", "[]", None),
        ("log.jsonl", '1\n{"loss": 2}\n{"step": 1, "lo', None),
        ("snapshots/step_0000001 (1).safetensors", "copy", None),
        ("snapshots/step_0000002.safetensors", "damaged", "step_0000002.safetensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*hold no record")
def test_odd_files_of_a_run(
    name: str,
    content: str,
    complaint: str | None,
    folders: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "$odd$ [b]name"
    shutil.copytree(folders[0], run)
    (run / name).write_text(content)
    if complaint is None:
        cli.main(["report", str(run)])
        cli.main(["show", str(run)])
        assert "[b]name" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", str(run)])
        assert stop.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_rows_of_another_version_are_left_out(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folders[0], run)
    rows = json.loads((run / "evaluation.json").read_text())["results"]
    del rows[0]["metrics"]["ece"]
    (run / "evaluation.json").write_text(json.dumps({"results": rows}))
    with pytest.warns(UserWarning, match="1 rows of .* another version"):
        text = api.report([run]).read_text(encoding="utf-8")
    assert "random, ipc 2" in text
    cli.main(["show", str(run)])
    assert "another version" in capsys.readouterr().err


def test_a_run_that_was_not_evaluated_has_a_page(tiny_file: Path, tmp_path: Path) -> None:
    condense.distill("random", dataset=tiny_file, network=TINY, ipc=1, out=tmp_path / "run", device="cpu")
    target = api.report([tmp_path / "run"])
    assert target == tmp_path / "run" / "report.html"
    assert "not evaluated" in target.read_text(encoding="utf-8")


class TestImportedSets:
    @pytest.fixture
    def imported(self, folders: list[Path], tmp_path: Path) -> Path:
        """The set of the first run as another's file, imported without a word on how it was made."""
        condense.export(folders[0], tmp_path / "others.npz", "npz")
        data = json.loads((folders[0] / "run.json").read_text())["dataset"]
        cli.main(["import", str(tmp_path / "others.npz"), str(tmp_path / "dc.safetensors"), "--dataset", data])
        return tmp_path / "dc.safetensors"

    def test_they_stand_beside_runs(self, folders: list[Path], tiny_file: Path, imported: Path) -> None:
        result = condense.evaluate(imported, tiny_file, networks=["mlp", TINY], num_seeds=2, device="cpu").results[1]
        text = api.report([*folders, imported], imported.with_name("page.html")).read_text(encoding="utf-8")
        (mean, *_) = re.findall(r'<th scope="row">imported:npz, ipc 2</th>\s*<td data-value="([\d.]+)"', text)
        assert float(mean) == result.mean, "the network of the runs is preferred"
        assert f"<title>measured: imported:npz, ipc 2 on {TINY}" in text
        assert text.count('alt="0, step 8"') == 1 and text.count('<img src="data:image/png') == 3 * 4
        assert "not shown, because the data set is not at hand" in text, "the imported set has no path of its data"

    def test_nothing_of_them_is_guessed(self, imported: Path) -> None:
        target = api.report(imported)
        text = html.unescape(target.read_text(encoding="utf-8"))
        assert target == imported.with_name("dc.report.html")
        facts = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]*)</dd>", text))
        unknown = ("made from", "recipe", "ran on", "finished", "artifacts used")
        assert {facts[name] for name in unknown} == {"not recorded"} and facts["code"].startswith("not recorded")
        assert text.count('<td data-value="-1">not recorded</td>') == 3, "minutes twice, and memory"
        assert 'type="range"' not in text and "no earlier steps" in text and "All the training images" not in text
        (line,) = re.findall("condense import PUBLISHED dc.safetensors .*", text)
        assert "--transform channel --decode pixels --name npz" in line

    @pytest.mark.filterwarnings("ignore:the set has no image of 1 of 10 classes")
    def test_a_class_without_images_is_said_to_have_none(self, tmp_path: Path) -> None:
        digits = load("digits")
        kept = digits.y_train[:50] != 3
        np.savez(tmp_path / "a.npz", images=digits.x_train[:50][kept], labels=digits.y_train[:50][kept])
        cli.main(["import", str(tmp_path / "a.npz"), str(tmp_path / "a.safetensors"), "--dataset", "digits"])
        text = api.report(tmp_path / "a.safetensors").read_text(encoding="utf-8")
        assert text.count("<dd>no image</dd>") == 1

    def test_a_learned_rate_and_a_decoder_are_shown(self, tmp_path: Path) -> None:
        digits = load("digits")
        rows = np.concatenate([np.flatnonzero(digits.y_train == c)[:1] for c in range(10)])
        images = torch.from_numpy(digits.x_train[rows]) - 0.5
        source = published.mtt(tmp_path, images, torch.from_numpy(digits.y_train[rows]), 0.02)
        cli.main(["import", str(source), str(tmp_path / "a.safetensors"), "--dataset", "digits", "--decode", "factor"])
        text = api.report(tmp_path / "a.safetensors").read_text(encoding="utf-8")
        assert "The learned learning rate of the set is 0.02." in text
        assert "--decode factor --decode.factor 2" in text


@pytest.mark.parametrize("transform", ["channel", "zca"])
def test_the_nearest_training_images_are_found(transform: str, tiny: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among chunks of five, compared with all distances at once; a copy has distance 0."""
    monkeypatch.setattr(nearest, "_CHUNK_VALUES", 5 * 64)
    space = api.plain_task(tiny, "mlp", transform, Split(val_fraction=0.0)).transform
    images = Images.of(tiny.x_train, torch.device("cpu")).subset(torch.arange(3, len(tiny.x_train)))
    real = space(images[:])
    rows = [real[[7, 2]], real[:0], real[[9]] + 0.3 * torch.randn(1, 1, 8, 8)]
    found, others = nearest.nearest([rows, [real[[4]]]], images, space)
    assert others.distances[0] == pytest.approx([0], abs=1e-5) and torch.equal(
        others.samples[0], images[torch.tensor([4])]
    )
    assert found.num_images == len(images) and [len(row) for row in found.samples] == [2, 0, 1]
    assert found.distances[0] == pytest.approx([0, 0], abs=1e-5)
    assert torch.equal(found.samples[0], images[torch.tensor([7, 2])])
    apart = torch.cdist(rows[2].flatten(1), real.flatten(1))[0]
    assert found.distances[2] == pytest.approx([apart.min().item()], rel=1e-4)
    assert torch.equal(found.samples[2][0], images[apart.argmin()[None]][0])


def test_only_images_that_the_run_saw_are_shown_as_the_nearest(file: Path, folders: list[Path], tiny: Arrays) -> None:
    text = file.read_text(encoding="utf-8")
    held_out = len(condense.load(folders[0]).origin.split.indices(torch.from_numpy(tiny.y_train))[1])
    assert held_out and f"the nearest of {len(tiny.x_train) - held_out} training images of the run" in text
    assert text.count('class="nearest"') == 3 * 3 and '["0 (start)", "1", ' in text


def test_the_data_of_several_runs_are_read_once(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second and third run saw all training images, the first did not."""
    opened, compared = [], []
    open_data, find = api.open_data, nearest.nearest
    monkeypatch.setattr(api, "open_data", lambda source, download: opened.append(source) or open_data(source, download))
    monkeypatch.setattr(
        page, "nearest", lambda sets, real, transform: compared.append(len(sets)) or find(sets, real, transform)
    )
    text = api.report(folders, tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(opened) == 1 and sorted(compared) == [1, 2]
    assert text.count('class="nearest"') == 3 * 3


def test_a_whitened_set_without_its_data_has_no_pictures(tiny_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    shutil.copy(tiny_file, data)
    condense.distill("random", dataset=data, network=TINY, ipc=1, transform="zca", out=tmp_path / "run", device="cpu")
    assert "<img" in api.report([tmp_path / "run"]).read_text(encoding="utf-8")
    data.unlink()
    with pytest.warns(UserWarning, match="no pictures"):
        text = api.report([tmp_path / "run"]).read_text(encoding="utf-8")
    assert "<img" not in text and "whitening matrix" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a report needs at least one run"),
        (["{dm}/run.json"], "run.json"),
        (["{foreign}"], "first run `condense import"),
        (["nothing"], "no run folder"),
        (["{empty}"], "no run folder"),
        (["{dm}", "--out", "no/such/folder.html"], "there is no folder"),
        (["{unfinished}"], "not finished"),
        (["{damaged}"], "cannot be read: it is not valid JSON"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("empty", "unfinished", "damaged")}
    places["empty"].mkdir()
    places["foreign"] = tmp_path / "others.npz"
    condense.export(folders[0], places["foreign"], "npz")
    for name in ("unfinished", "damaged"):
        shutil.copytree(folders[0], places[name])
    (places["unfinished"] / "synthetic.safetensors").unlink()
    (places["damaged"] / "evaluation.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *(word.format(dm=folders[0], **places) for word in words)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def point(label: str, num_bytes: int, accuracy: float, **fields: Any) -> Point:
    return Point(
        **{"method": label, "budget": "ipc 1", "std": None} | fields,
        label=label,
        num_bytes=num_bytes,
        accuracy=accuracy,
    )


@pytest.mark.parametrize("other", [1000, 2000], ids=["dots", "scatter"])
def test_published_points_are_marked_and_apart_from_measured_ones(other: int) -> None:
    points = [point("ours", 1000, 0.5, std=0.01), point("theirs", other, 0.6, published=True)]
    svg = figures.accuracy_against_bytes("name", points, ("ceiling", 0.9))
    assert "<title>measured: ours, 1,000 bytes, 50.0 ± 1.0 %</title>" in svg
    assert f"<title>published: theirs, {other:,} bytes, 60.0 %</title>" in svg
    assert re.search(r">\s*theirs[^<]*</text>", svg) and "ceiling</text>" in svg


def test_where_all_bytes_of_a_budget_are_equal_accuracy_has_the_axis() -> None:
    equal = [point("dm", 1000, 0.5), point("dm", 9000, 0.6, budget="ipc 10"), point("mtt", 1000, 0.7)]
    assert "bytes stored" not in figures.accuracy_against_bytes("name", equal, None)
    assert "bytes stored" in figures.accuracy_against_bytes("name", [*equal, point("idc", 999, 0.7)], None)


@pytest.mark.parametrize("extra", [0, 1], ids=["dots", "scatter"])
def test_a_method_has_one_colour_and_random_images_a_line(extra: int) -> None:
    points = [
        point("dm", 1000, 0.5),
        point("dm", 9000 + extra, 0.6, budget="ipc 10"),
        point("mtt", 1000 + extra, 0.7),
        point("random", 1000, 0.3),
    ]
    svg = figures.accuracy_against_bytes("name", points, None)
    drawn = re.findall(r"<title>measured: (\w+),.*?fill: (var\(--series-\d\)|currentColor)", svg, re.DOTALL)
    assert len({colour for method, colour in drawn if method == "dm"}) == 1
    assert len(set(drawn)) == 3 and ("random", "currentColor") in drawn
    assert svg.count("stroke-dasharray") == 2 and "random images</text>" in svg  # a line, and its entry in the legend


def test_names_of_equally_large_sets_do_not_crowd_the_figure_out() -> None:
    points = [point(f"set {k}", 1000, 0.94 + k / 1000, std=0.001) for k in range(9)]
    for more in ([], [point("other", 900, 0.9)]):
        svg = figures.accuracy_against_bytes("name", [*points, *more], None)
        assert all(f"set {k}</text>" in svg for k in range(9))


def test_the_published_rows_are_fractions_of_a_hundred_and_say_their_source() -> None:
    folder = Path(report.__file__).parent
    for name, table in json.loads((folder / "published.json").read_text(encoding="utf-8")).items():
        assert 0 < table["full"]["accuracy"] <= 100, name
        assert table["full"]["source"] in {row["source"] for row in table["rows"] if row["verified"]}
        for row in table["rows"]:
            assert row["source"] and row["labels"] in ("hard", "soft") and isinstance(row["verified"], bool)
            assert all(0 < mean <= 100 and (std is None or std < 10) for mean, std in row["accuracy"].values())


def test_the_bytes_of_a_published_row_are_those_of_a_set_of_ours(tmp_path: Path) -> None:
    """Hard labels, ten digits of 8 x 8 a class."""
    syn = condense.distill("random", dataset="digits", network="mlp", ipc=10, out=tmp_path / "run", device="cpu")
    from condense.eval.report.page import _published_bytes

    assert _published_bytes(syn.origin.input_shape, 10, 10, "hard") == sum(syn.cost())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium as Debian packages it, or any other that is on the path."""
    programme = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if programme is None:
        pytest.skip("no browser on this machine; Debian's is `apt install chromium`")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as started:
        found = started.chromium.launch(executable_path=programme, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.mark.filterwarnings("default")
class TestInABrowser:
    @pytest.fixture
    def tab(self, browser: Any, file: Path) -> Iterator[Any]:
        """The page, opened; it fails where the console has errors or something is asked for from outside."""
        tab = browser.new_page(viewport={"width": 1200, "height": 800})
        said: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        yield tab
        tab.close()
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]

    def test_it_loads_with_every_picture(self, tab: Any) -> None:
        widths = tab.eval_on_selector_all("img", "pictures => pictures.map(picture => picture.naturalWidth)")
        assert len(widths) == 18 and min(widths) >= 8

    def test_the_slider_changes_the_picture_by_keyboard(self, tab: Any) -> None:
        slider, picture = tab.locator("input[type=range]").first, tab.locator(".film img").first
        last = picture.get_attribute("src")
        assert picture.get_attribute("alt") == "0, step 8"
        slider.focus()
        tab.keyboard.press("Home")
        assert picture.get_attribute("src") != last
        start = "step 0 (start)"
        assert picture.get_attribute("alt") == f"0, {start}" and slider.get_attribute("aria-valuetext") == start
        tab.keyboard.press("End")
        assert picture.get_attribute("src") == last

    def test_sliders_move_together_until_they_are_told_not_to(self, tab: Any) -> None:
        first, second, _ = tab.locator("input[type=range]").all()
        first.focus()
        tab.keyboard.press("Home")
        assert second.input_value() == "0"
        tab.locator("#together").uncheck()
        first.focus()
        tab.keyboard.press("End")
        assert second.input_value() == "0" and first.input_value() != "0"

    @pytest.mark.parametrize("width", [390, 1200])
    def test_a_row_is_enlarged_by_keyboard_and_by_mouse(self, tab: Any, width: int) -> None:
        """The nearest training images stand beside those of the last step, and of no other."""
        tab.set_viewport_size({"width": width, "height": 800})
        row, dialog = tab.locator(".picture").first, tab.locator("dialog")
        assert not dialog.is_visible()
        row.focus()
        tab.keyboard.press("Enter")
        assert dialog.is_visible() and dialog.locator("canvas").count() == 2 * 2
        assert all(text.startswith("distance ") for text in dialog.locator("figcaption").all_text_contents())
        assert dialog.evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")
        drawn = "all => all.map(c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size)"
        assert min(dialog.locator("canvas").evaluate_all(drawn)) > 2, "no canvas is empty"
        tab.keyboard.press("Escape")
        assert not dialog.is_visible() and row.evaluate("row => row === document.activeElement")
        tab.locator("input[type=range]").first.focus()
        tab.keyboard.press("Home")
        row.click()
        assert dialog.locator("canvas").count() == 2 and "step 0 (start)" in dialog.locator("h2").text_content()
        dialog.get_by_text("Close").click()
        assert not dialog.is_visible()

    def test_the_tables_sort_by_their_headings(self, tab: Any) -> None:
        table = tab.locator("#architectures table").first
        heading = table.locator("th button").nth(1)
        orders = []
        for _ in range(2):
            heading.click()
            values = table.locator("tbody tr td:nth-child(2)").evaluate_all("cells => cells.map(c => +c.dataset.value)")
            orders.append(values)
        assert orders[0] == sorted(orders[0], reverse=True) and orders[1] == sorted(orders[0])
        assert len(set(orders[0])) > 1

    def test_it_fits_a_phone_and_follows_the_dark_mode(self, tab: Any) -> None:
        tab.set_viewport_size({"width": 360, "height": 700})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        colours = []
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            colours.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colours[0] != colours[1]

    @pytest.mark.parametrize("other", [1000, 2000], ids=["dots", "scatter"])
    def test_no_word_of_a_figure_is_cut(self, browser: Any, tmp_path: Path, other: int) -> None:
        names = [f"a method with a very long name, ipc 1 (folder {k})" for k in range(12)]
        points = [point(name, 1000, 0.9 + k / 1000, published=k % 2 == 0) for k, name in enumerate(names)]
        svg = figures.accuracy_against_bytes("name", [*points, point("other", other, 0.8)], ("all training data", 0.99))
        (tmp_path / "figure.svg").write_text(figures.standalone(svg), encoding="utf-8")
        tab = browser.new_page()
        tab.goto((tmp_path / "figure.svg").as_uri())
        cut = """all => all.filter(text => {
            const [box, of] = [text.getBoundingClientRect(), text.ownerSVGElement.getBoundingClientRect()];
            return Math.min(box.left - of.left, of.right - box.right, box.top - of.top, of.bottom - box.bottom) < -1;
        }).map(text => text.textContent)"""
        assert tab.locator("text").count() > 12 and tab.eval_on_selector_all("text", cut) == []
        tab.close()

    def test_commands_are_copied(self, tab: Any) -> None:
        tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
        box = tab.locator(".commands").first
        box.locator("button").focus()
        tab.keyboard.press("Enter")
        box.get_by_text("Copied").wait_for()
        assert tab.evaluate("navigator.clipboard.readText()") == box.locator("pre").text_content()

    def test_no_table_loses_a_column(self, tab: Any) -> None:
        """On a phone the answers are visible at once and the rest scrolls; on paper (A4 without margins) all is."""
        tab.set_viewport_size({"width": 390, "height": 800})
        right = "cells => cells.slice(0, 4).map(cell => cell.getBoundingClientRect().right)"
        assert max(tab.eval_on_selector_all("#summary thead th", right)) <= 390
        boxes = "all => all.filter(t => !t.closest('.scroll')).length"
        assert tab.eval_on_selector_all("table", boxes) == 0
        tab.set_viewport_size({"width": 680, "height": 900})
        tab.emulate_media(media="print")
        wide = "all => all.filter(t => t.getBoundingClientRect().right > 680).map(t => t.textContent.slice(0, 60))"
        assert tab.eval_on_selector_all("table", wide) == []

    def test_everything_has_a_name_for_a_screen_reader(self, tab: Any) -> None:
        unnamed = "all => all.filter(e => !(e.alt || e.ariaLabel || e.labels?.length || e.textContent.trim())).length"
        for kind in ("img", "input", "button", "[role=img]", "[role=region]"):
            assert tab.locator(kind).count() and tab.eval_on_selector_all(kind, unnamed) == 0, kind

    def test_it_prints(self, tab: Any) -> None:
        tab.emulate_media(media="print")
        assert not any(tab.locator(name).is_visible() for name in ("nav", ".hint"))
        assert tab.locator(".film img").first.is_visible()
        assert tab.pdf(format="A4").startswith(b"%PDF")


def test_the_teacher_of_a_protocol_is_named_by_its_buffer() -> None:
    assert reproduce._with_path({"teacher": "digits-convnet@0123", "lr": 1}) == {
        "teacher": f"{DEFAULT_ROOT}/digits-convnet",
        "lr": 1,
    }
    assert reproduce._with_path({"teacher": "convnet"}) == {"teacher": "convnet"}
