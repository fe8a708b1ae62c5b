"""Files as readers of later versions and of odd origin meet them."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import harness
from condense import artifacts, cli, exchange, recipe, runs, tracking
from condense.eval import results
from condense.eval.report.collect import collect, uses_of
from condense.files import parse_json, read_foreign, read_header, read_json, read_tensors, read_yaml, write_tensors
from condense.synthetic import DCT, Factor, Origin, SyntheticSet, load, save
from condense.tracking import cut_back, progress, read_log
from tests import mutations

OLD = Path(__file__).parent / "fixtures" / "v0_1"
"""What version 0.1.0 wrote of the tiny data: a set for each decoder and each kind of labels, a run, a buffer."""


@pytest.mark.parametrize("file", sorted(OLD.glob("*.safetensors")), ids=lambda file: file.stem)
def test_sets_of_version_0_1_are_read_as_they_were(file: Path) -> None:
    syn = load(file)
    kind, _, name = file.stem.partition("-")
    assert name == (syn.decode.name if kind == "decode" else syn.label_kind.name)
    assert syn.origin.method == "random" and syn.origin.input_shape == (1, 8, 8) and syn.origin.num_classes == 3
    written, read = load_file(file), syn.state_dict()
    assert written.keys() == read.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(read[name], tensor)


def test_a_run_of_version_0_1_is_read_as_it_was() -> None:
    run = collect(OLD / "run")
    assert run.method == "dm" and run.ipc == 1 and [line["step"] for line in run.log] == [1, 2]
    assert [row["network"] for row in run.results] == ["convnet:depth=1,width=4", "mlp"]
    assert run.uses[0]["rows"] == (("dm", "83.3", "72.2"),)
    assert run.record["seconds"] == 0.04 and run.record["dataset"] == "tiny"
    tensors, header = read_tensors(OLD / "run" / "checkpoint.safetensors", "checkpoint")
    assert header["step"] == 2 and tensors.keys() == load_file(OLD / "run" / "checkpoint.safetensors").keys()
    assert len(results.read(OLD / "run" / "evaluation.json")) == 2


def test_a_buffer_of_version_0_1_is_read_as_it_was() -> None:
    buffer = artifacts.Trajectories(OLD / "buffer")
    assert (buffer.num_experts, buffer.num_epochs) == (1, 2)
    table = load_file(OLD / "buffer" / "expert_0000.safetensors")["params"]
    assert torch.equal(artifacts.pack(buffer.snapshot(0, 2)), table[2])
    assert buffer.manifest == {
        name: value
        for name, value in json.loads((OLD / "buffer" / "manifest.json").read_text()).items()
        if name != "checksum"
    }


def one_line(action: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    return message


def changed(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The set ``name`` of version 0.1.0 with another header, and checksums that fit."""
    layout, body = mutations.split_safetensors((OLD / f"{name}.safetensors").read_bytes())
    header = json.loads(layout["__metadata__"]["condense"])
    change(header)
    layout["__metadata__"]["condense"] = json.dumps(header)
    (tmp_path / "set.safetensors").write_bytes(mutations.reseal_tensors(layout, body))
    return tmp_path / "set.safetensors"


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("decode-pixels", put("origin", "dataset", "classes", value=3), "dataset, classes: 3 is not"),
        ("decode-pixels", put("origin", "dataset", "input_shape", value=["1", "8", "8"]), "'1' is not a whole number"),
        (
            "decode-pixels",
            put("origin", "dataset", "input_shape", value=[1, 8, 10**6]),
            r"images of shape \(1, 8, 8\), but its data set has",
        ),
        ("decode-pixels", put("origin", "dataset", "input_shape", value=[1, 0, 8]), "a side below 1"),
        ("decode-pixels", put("origin", "dataset", "input_shape", value=[]), r"shape \(\) has 0 axes"),
        ("decode-pixels", put("origin", "dataset", "input_shape", value=[1] * 9), "has 9 axes"),
        ("decode-pixels", put("origin", "dataset", "input_shape", value=[8, 8]), "1 channels, but samples have"),
        ("decode-dct", put("origin", "dataset", "input_shape", value=[1, 1, 5000]), "a side of more than 4096"),
        ("decode-pixels", put("origin", "recipe", "method", value=[]), r"recipe, method: \[\] is not a mapping"),
        ("decode-pixels", put("origin", "recipe", "split", value={"part": 1}), "split has unknown fields"),
        ("decode-pixels", put("origin", "recipe", "ipc", value=0), "ipc is 0"),
        ("decode-pixels", put("origin", "transform", "std", value=["a"]), "transform, std: 'a' is not a number"),
        ("decode-pixels", put("origin", "transform", "std", value=[0.0]), "are not statistics of channels"),
        ("decode-pixels", put("decode", "name", value=["pixels"]), "decode, name: .* is not text"),
        ("decode-pixels", put("decode", "name", value="wavelet"), "'wavelet' is none of pixels, pixels-8bit, graphs"),
        ("decode-pixels", put("decode", "factor", value=2), "pixels has no field 'factor'"),
        ("labels-logits", put("labels", "confidence", value="high"), "confidence: 'high' is not a number"),
        ("labels-teacher", put("labels", value={"name": "logits", "confidence": 0.5}), "expected \\["),
    ],
)
def test_a_header_of_other_types_or_values_is_refused(
    name: str, change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    path = changed(tmp_path, name, change)
    message = one_line(lambda: load(path))
    assert message.startswith(f"{path} does not fit its header: ") and re.search(words, message)


def test_a_set_or_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, "decode-pixels", put("format", value=2))
    line = f"{path} holds a synthetic set of format 2, not a synthetic set of format 1; give the right file"
    assert one_line(lambda: load(path)) == line
    checkpoint = tmp_path / "checkpoint.safetensors"
    tensors, header = read_tensors(OLD / "run" / "checkpoint.safetensors", "checkpoint")
    write_tensors(checkpoint, tensors, header | {"format": 2})
    line = f"{checkpoint} holds a checkpoint of format 2, not a checkpoint of format 1; give the right file"
    assert one_line(lambda: read_tensors(checkpoint, "checkpoint")) == line


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("decode-factor", put("decode", "factor", value=3000), "factor would produce 27000000 images of 6.91 GB"),
        ("decode-hallucinator", put("decode", "num_styles", value=2_000_000), "would produce 6000000 images"),
        ("decode-bases", put("decode", "num_bases", value=10**9), "the decoder bases does not take latents"),
        ("decode-bases", put("decode", "num_bases", value=10**30), "is too large"),
        ("decode-dct", put("decode", "coefficients", value=10**9), "has 64 pixels per channel"),
        (
            "decode-dct",
            put("origin", "dataset", "input_shape", value=[1, 4096, 4096]),
            "would produce 24 images of 1.61 GB",
        ),
        (
            "decode-bases",
            put("origin", "dataset", "input_shape", value=[1, 4096, 4096]),
            "(GB|images of shape|bases is)",
        ),
        ("labels-logits", put("origin", "dataset", "classes", value=["a"] * 100_000), "is torch.float32 of shape"),
    ],
)
def test_a_small_file_takes_little_memory(
    name: str, change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    path = changed(tmp_path, name, change)

    def refused() -> None:
        assert re.search(words, one_line(lambda: load(path)))

    if sys.platform == "linux":
        assert harness.peak_mb(refused, torch.device("cpu")) < 200
    else:
        refused()


def test_what_is_saved_is_loaded_whatever_the_shape_of_the_images(tmp_path: Path) -> None:
    """Signals of one row are images, too."""
    dataset = {"name": "signals", "fingerprint": "f", "classes": ["a", "b"], "input_shape": [1, 1, 6000]}
    origin = Origin(dataset=dataset, transform={"kind": "none"})
    syn = SyntheticSet(torch.rand(2, 1, 1, 6000), torch.arange(2), origin)
    save(syn, tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors").latents, syn.latents)
    syn.decode = DCT()
    assert "a side of more than 4096" in one_line(lambda: save(syn, tmp_path / "b.safetensors"))


def test_a_set_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    syn = load(OLD / "decode-factor.safetensors")
    syn.decode = Factor(factor=3000)
    assert "the limit for such a set is 1.07 GB" in one_line(lambda: save(syn, tmp_path / "a.safetensors"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": []}, "elements, not 2"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "do not hold F32"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "not the shape"),
        ({"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}, "'F33' is not"),
        ({"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}, "size does not match its header"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "size does not match its header"),
        ({"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}, "not the shape"),
        ("F32", "'F32' is not a mapping"),
    ],
)
def test_a_layout_that_lies_is_refused(entry: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(mutations.join_safetensors({"__metadata__": {"condense": "{}"}, "x": entry}, bytes(8)))
    assert words in one_line(lambda: read_header(path))


def test_tensors_do_not_overlap(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    layout = {"__metadata__": {"condense": "{}"}, "x": one, "y": one, "z": {**one, "data_offsets": [4, 8]}}
    (tmp_path / "a.safetensors").write_bytes(mutations.join_safetensors(layout, bytes(8)))
    assert "not contiguous" in one_line(lambda: read_header(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("length", [100 << 20, 2**63, 9])
def test_a_header_is_no_longer_than_the_file_or_the_limit(length: int, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}      ")
    assert "longer than the file" in one_line(lambda: read_header(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested more than 64 levels deep"),
        ("[" * 200 + "]" * 200, "nested more than 64 levels deep"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ("NaN", "not finite"),
        ("[1e999]", "not finite"),
        ("1" * 5000, "more than 100 digits"),
        ('"\\ud800"', "UTF-8"),
        ("[1,", "not valid JSON"),
    ],
)
def test_odd_json_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    message = one_line(lambda: read_json(tmp_path / "a.json", fix="remove it"))
    assert words in message and message.endswith("; remove it")


def test_json_that_is_plain_is_taken() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "é\\u00e9\\ud83d\\ude00"]}') == {"a": [1, 2.5, None, True, "éé😀"]}
    assert parse_json("[NaN]", finite=False) != [0.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: *x", "anchor or alias in line 1"),
        ("[" * 5000, "nested more than 64"),
        ("- " * 500 + "1", "nested more than 64"),
        ("a: 1\na: 2", "a key twice"),
        ("a: 1" + "1" * 5000, "cannot be read"),
        ("a: 2001-99-99", "cannot be read"),
        ("a: [", "not valid YAML"),
        ("a: " + "x" * 300_000, "longer than 256 KiB"),
    ],
)
def test_odd_yaml_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert words in one_line(lambda: read_yaml(tmp_path / "recipe.yaml", fix="correct it"))
    assert words in one_line(lambda: recipe.from_yaml(tmp_path / "recipe.yaml"))
    assert words in one_line(lambda: runs.written_recipe(tmp_path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    shutil.copytree(OLD / "run", tmp_path / "run")
    for name in ("evaluation.json", "apply-continual.json", "log.jsonl", "recipe.yaml", "checkpoint.safetensors"):
        (tmp_path / "run" / name).unlink()
        make(tmp_path / "run" / name)
    run, odd = tmp_path / "run", tmp_path / "odd.safetensors"
    make(odd)
    (tmp_path / "buffer").mkdir()
    make(tmp_path / "buffer" / "manifest.json")
    make(tmp_path / "images_best.pt")
    for action in (
        lambda: read_header(odd),
        lambda: results.read(run / "evaluation.json"),
        lambda: uses_of(run),
        lambda: read_log(run / "log.jsonl"),
        lambda: cut_back(run / "log.jsonl", 1),
        lambda: recipe.from_yaml(run / "recipe.yaml"),
        lambda: runs.written_recipe(run),
        lambda: read_tensors(run / "checkpoint.safetensors", "checkpoint"),
        lambda: artifacts.read_manifest(tmp_path / "buffer"),
        lambda: read_foreign(tmp_path / "images_best.pt", holds="tensors", save_as="tensors"),
    ):
        assert "is not a regular file" in one_line(action)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.update(mean="x", n=7, interval=None), None),
        (lambda row: row.pop("seconds"), "left out"),
        (lambda row: row.update(accuracies=["0.5"]), "row 1, accuracies: '0.5' is not a number"),
        (lambda row: row.update(accuracies=[0.5]), "entries of 1 networks"),
        (lambda row: row.update(accuracies=[50.0, 27.0]), "are not fractions"),
        (lambda row: row["metrics"].update(nll=[1, None]), "metrics of network 1, nll: None is not a number"),
        (lambda row: row["metrics"]["reliability"][0].pop(), "reliability"),
        (lambda row: row.update(stored_bytes={"images": 0}), "stored_bytes"),
        (lambda row: row.update(network=None), "row 1, network: None is not text"),
    ],
)
def test_rows_of_results_say_what_they_should(
    change: Callable[[dict[str, Any]], Any], words: str | None, tmp_path: Path
) -> None:
    content = json.loads((OLD / "run" / "evaluation.json").read_text())
    good = results.read_complete(OLD / "run" / "evaluation.json")
    for row, written in zip(good, content["results"], strict=True):
        assert {**row, "interval": pytest.approx(row["interval"])} == {
            **written,
            "interval": tuple(written["interval"]),
            "teacher": "",
            "split": "test",
        }
    change(content["results"][0])
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    if words is None:
        assert results.read_complete(tmp_path / "evaluation.json") == good
    elif words == "left out":
        with pytest.warns(UserWarning, match="1 rows of .* are left out"):
            assert results.read_complete(tmp_path / "evaluation.json") == good[1:]
    else:
        assert words in one_line(lambda: results.read_complete(tmp_path / "evaluation.json"))


def test_bad_lines_of_a_log_are_kept_apart_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LONGEST_LINE", 64)
    log, long = tmp_path / "log.jsonl", b'{"step": 2, "x": "' + b"y" * 100 + b'"}\n'
    bad = [b'{"step": 2, "lo\xff": 1}\n', b"[3]\n", long]
    log.write_bytes(b'{"step": 1}\n' + bad[0] + b'{"step": 2}\n' + b"".join(bad[1:]) + b'{"step": 3}\n{"st')
    with pytest.warns(UserWarning, match=r"log\.jsonl has lines that hold no record; they are skipped"):
        assert read_log(log) == [{"step": 1}, {"step": 2}, {"step": 3}]
    with pytest.warns(UserWarning, match=r"they are moved to .*log\.jsonl\.damaged"):
        cut_back(log, 2)
    assert log.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == b"".join(bad)
    cut_back(log, 1)
    assert log.read_bytes() == b'{"step": 1}\n'


EVIL = "\x1b[31m[red]\u202e:smile:\r"


def test_text_from_files_is_shown_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(OLD / "run", tmp_path / "run")
    path = changed(tmp_path, "decode-pixels", lambda header: header["origin"]["dataset"].update(name=EVIL))
    path.replace(tmp_path / "run" / "synthetic.safetensors")
    content = json.loads((OLD / "run" / "evaluation.json").read_text())
    for row in content["results"]:
        row |= {"method": EVIL, "network": f"{row['network']}{EVIL}", "protocol": EVIL}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(content))
    apply = json.loads((OLD / "run" / "apply-continual.json").read_text())
    apply["table"] |= {"title": EVIL, "columns": [EVIL, "b", "c"]}
    (tmp_path / "run" / "apply-continual.json").write_text(json.dumps(apply))
    cli.main(["show", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert r"\x1b[31m[red]\u202e:smile:\r" in shown
    with pytest.raises(SystemExit):
        cli.main(["show", f"{EVIL}/none"])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with progress(EVIL, 1) as bar:
        bar(1, "[bold]half")
    error = capsys.readouterr().err
    assert r"\x1b[31m[red]\u202e" in error.splitlines()[0] and "[bold]half" in error and "\u202e" not in error


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_epochs", 9, "it states 1 experts of 9 epochs, but lists 1 of 2"),
        ("num_experts", 2, "it states 2 experts of 2 epochs, but lists 1 of 2"),
        ("experts", ["a"], "experts, entry 0: 'a' is not a mapping"),
        ("experts", [{"num_epochs": "2"}], "num_epochs: '2' is not a whole number"),
        ("params", [["w", [4, "1"]]], "params, entry 0, entry 1: '1' is not a whole number"),
        ("params", [["w", [-4]]], "negative"),
        ("identity", [], r"identity: [] is not a mapping"),
        ("format", "1", "format: '1' is not a whole number"),
    ],
)
def test_a_manifest_that_lies_is_refused(field: str, value: Any, words: str, tmp_path: Path) -> None:
    manifest = json.loads((OLD / "buffer" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(mutations.reseal_manifest(manifest | {field: value}))
    assert words in one_line(lambda: artifacts.read_manifest(tmp_path))


def test_rows_of_another_width_than_the_manifest_says_are_not_read(tmp_path: Path) -> None:
    manifest = json.loads((OLD / "buffer" / "manifest.json").read_text())
    manifest["params"] = [["w", [10**6, 10**6]]]
    (tmp_path / "manifest.json").write_text(mutations.reseal_manifest(manifest))
    shutil.copy(OLD / "buffer" / "expert_0000.safetensors", tmp_path)
    assert "is damaged" in one_line(lambda: artifacts.Trajectories(tmp_path).snapshot(0, 0))


@pytest.mark.parametrize(
    "value",
    [{}, torch.zeros(0), [], "0.1", -1.0, torch.tensor(torch.inf), True, torch.tensor(1j), torch.tensor([0.5, 1.0])],
)
def test_a_published_step_size_is_a_positive_number(value: Any, tmp_path: Path) -> None:
    torch.save(torch.zeros(2, 1, 2, 2), tmp_path / "images_best.pt")
    torch.save(torch.arange(2), tmp_path / "labels_best.pt")
    torch.save(value, tmp_path / "lr_best.pt")
    assert "a learning rate is one positive number" in one_line(lambda: exchange.read(tmp_path / "images_best.pt"))
    for right in (0.5, torch.tensor([0.5]), [0.5], [torch.tensor(0.5)]):
        torch.save(right, tmp_path / "lr_best.pt")
        assert exchange.read(tmp_path / "images_best.pt").lr == 0.5


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1).expand(2, 3, 10**5, 10**5), "MiB in memory"),
        (torch.zeros(2, 1, 2, 2).to_sparse(), "is a sparse tensor"),
        (torch.zeros(2, 1, 2, 2, device="meta"), "is a meta tensor"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.complex64), "are complex64, not numbers"),
    ],
    ids=["expanded", "sparse", "meta", "complex"],
)
def test_published_images_are_plain_tensors(images: torch.Tensor, words: str, tmp_path: Path) -> None:
    torch.save([images, torch.arange(2)], tmp_path / "a.pt")
    assert words in one_line(lambda: exchange.read(tmp_path / "a.pt"))
