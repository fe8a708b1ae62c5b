import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from condense import api
from condense.data.datasets import Arrays
from condense.tracking import cut_back, progress


def distill(tiny: Arrays, out: Path, track: str) -> list[dict[str, float]]:
    method = {"num_steps": 3, "batch_real": 4}
    api.distill("dm", dataset=tiny, network="mlp", ipc=1, out=out, track=(track,), device="cpu", **method)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def leveldb_records(content: bytes, header: int = 7, block: int = 2**15) -> Iterator[bytes]:
    """The records of a LevelDB log, the format of offline wandb files, after a file header of 7 bytes."""
    position, record = header, b""
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.filterwarnings("default")
def test_an_offline_wandb_run_holds_what_the_log_holds(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    steps = distill(tiny, tmp_path / "run", "wandb")
    (file,) = (tmp_path / "run").rglob("*.wandb")
    losses = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        if "loss" in items:
            losses.append(json.loads(items["loss"]))
    assert losses == pytest.approx([step["loss"] for step in steps])


@pytest.mark.filterwarnings("default")
def test_tensorboard_holds_what_the_log_holds(tiny: Arrays, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = distill(tiny, tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([step["loss"] for step in steps])


def test_a_log_is_cut_back_to_whole_lines_of_the_steps_done(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"event": "resume", "step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    cut_back(log, 2)
    assert log.read_text() == '{"step": 1}\n{"event": "resume", "step": 1}\n{"step": 2}\n'


def test_progress_is_quiet_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("work", 2) as bar:
        bar(1, "half")
    assert capfd.readouterr() == ("", "")
    with progress("work", 2, show=True) as bar:
        bar(2, "all of it")
    assert "work" in capfd.readouterr().err
