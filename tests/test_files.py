"""Files as readers of later versions and of odd origin meet them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from condense import artifacts
from condense.eval import crossarch
from condense.eval.report.collect import collect
from condense.files import read_tensors
from condense.synthetic import load

OLD = Path(__file__).parent / "fixtures" / "v0_1"
"""What version 0.1.0 wrote of the tiny data: a set for each decoder and each kind of labels, a run, a buffer."""


@pytest.mark.parametrize("file", sorted(OLD.glob("*.safetensors")), ids=lambda file: file.stem)
def test_sets_of_version_0_1_are_read_as_they_were(file: Path) -> None:
    syn = load(file)
    kind, _, name = file.stem.partition("-")
    assert name == (syn.decode.name if kind == "decode" else syn.label_kind.name)
    assert syn.origin.method == "random" and syn.origin.image_shape == (1, 8, 8) and syn.origin.num_classes == 3
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
    assert len(crossarch.read(OLD / "run" / "evaluation.json")) == 2


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
